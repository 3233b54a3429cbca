//! Tipsets in memory: the tree of recent ones, the line to the head, and randomness along it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use cid::Cid;
use lotus_actors::{BigInt, Dst, draw_randomness_from_digest, ticket_digest};
use lotus_node_client::api::{
    BeaconEntry, BlockHeader, HeadChange, HeadChangeKind, SignedMessage, TipSet, TipSetKey,
};
use lotus_types::{Epoch, TokenAmount};
use serde::{Deserialize, Serialize};

use crate::error::ChainError;
use crate::state::State;
use crate::vm::{Applied, Draw};

/// What executing a tipset gave: the parent state of its children.
#[derive(Debug)]
pub(super) struct Executed {
    pub(super) state: State,
    pub(super) root: Cid,
    pub(super) receipts_root: Cid,
    /// Of the children.
    pub(super) base_fee: TokenAmount,
    pub(super) applied: Vec<(Cid, Applied)>,
}

/// The part of [`Executed`] that children need after a restart.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StoredState {
    pub(super) tipset: Vec<Cid>,
    pub(super) state: State,
    pub(super) receipts_root: Cid,
    pub(super) base_fee: TokenAmount,
}

/// A block with its messages, BLS ones first.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) cid: Cid,
    pub(super) header: BlockHeader,
    pub(super) messages: Arc<Vec<Arc<SignedMessage>>>,
}

/// A tipset with what is known of it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) ts: Arc<TipSet>,
    pub(super) blocks: Vec<Block>,
    /// Chain weight with this tipset's wins in it.
    pub(super) weight: BigInt,
    executed: Mutex<Option<Arc<Executed>>>,
    /// Its messages are gone: it can not be executed again.
    pub(super) pruned: bool,
}

impl Entry {
    pub(super) fn new(ts: TipSet, blocks: Vec<Block>, weight: BigInt) -> Self {
        Self {
            ts: Arc::new(ts),
            blocks,
            weight,
            executed: Mutex::new(None),
            pruned: false,
        }
    }

    pub(super) fn executed(&self) -> Option<Arc<Executed>> {
        self.executed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn set_executed(&self, e: Option<Arc<Executed>>) {
        *self.executed.lock().unwrap_or_else(PoisonError::into_inner) = e;
    }

    pub(super) fn height(&self) -> i64 {
        self.ts.height.0
    }
}

/// Recent tipsets, and the headers of older ones.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) entries: HashMap<TipSetKey, Arc<Entry>>,
    /// Genesis to head.
    pub(super) line: BTreeMap<i64, TipSetKey>,
    pub(super) head: Arc<Entry>,
    pub(super) genesis: Arc<Entry>,
    pub(super) blocks: HashMap<Cid, Block>,
    by_height: BTreeMap<i64, Vec<Cid>>,
    pub(super) messages: HashMap<Cid, Arc<SignedMessage>>,
    /// Tipsets that include a message.
    pub(super) included: HashMap<Cid, Vec<TipSetKey>>,
    /// Messages of one sender with one nonce: more than one after a replacement by fee.
    pub(super) by_nonce: HashMap<(Vec<u8>, u64), Vec<Cid>>,
    pub(super) objects: HashMap<Cid, Vec<u8>>,
}

impl Store {
    pub(super) fn new(genesis: Entry) -> Self {
        let genesis = Arc::new(genesis);
        let mut store = Self {
            entries: HashMap::new(),
            line: BTreeMap::from([(genesis.height(), genesis.ts.key())]),
            head: genesis.clone(),
            genesis: genesis.clone(),
            blocks: HashMap::new(),
            by_height: BTreeMap::new(),
            messages: HashMap::new(),
            included: HashMap::new(),
            by_nonce: HashMap::new(),
            objects: HashMap::new(),
        };
        store.add(genesis);
        store
    }

    /// Adds a tipset beside the line.
    pub(super) fn add(&mut self, e: Arc<Entry>) {
        let key = e.ts.key();
        for b in &e.blocks {
            self.put_block(b);
            for m in b.messages.iter() {
                self.note_message(m);
                let at = self.included.entry(m.cid()).or_default();
                if !at.contains(&key) {
                    at.push(key.clone());
                }
            }
        }
        self.entries.insert(key, e);
    }

    /// Remembers a block, whether or not it is in a tipset yet.
    pub(super) fn put_block(&mut self, b: &Block) {
        if self.blocks.insert(b.cid, b.clone()).is_none() {
            self.by_height
                .entry(b.header.height.0)
                .or_default()
                .push(b.cid);
        }
    }

    /// Every known block above a height.
    pub(super) fn blocks_above(&self, height: i64) -> impl Iterator<Item = &Block> {
        let above = self.by_height.range(height.saturating_add(1)..);
        above
            .flat_map(|(_, cids)| cids)
            .filter_map(|c| self.blocks.get(c))
    }

    /// Remembers a message under its CID and its sender's nonce.
    pub(super) fn note_message(&mut self, m: &Arc<SignedMessage>) {
        let cid = m.cid();
        if self.messages.insert(cid, m.clone()).is_none() {
            let slot = (m.message.from.to_bytes(), m.message.nonce);
            self.by_nonce.entry(slot).or_default().push(cid);
        }
    }

    pub(super) fn get(&self, key: &TipSetKey) -> Result<Arc<Entry>, ChainError> {
        if key.is_head() {
            return Ok(self.head.clone());
        }
        self.entries
            .get(key)
            .cloned()
            .ok_or_else(|| ChainError::NoTipSet(key.clone()))
    }

    pub(super) fn parent(&self, e: &Entry) -> Result<Arc<Entry>, ChainError> {
        let key = e.ts.parents();
        self.entries
            .get(&key)
            .cloned()
            .ok_or(ChainError::NoTipSet(key))
    }

    fn on_line(&self, e: &Entry) -> bool {
        self.line.get(&e.height()) == Some(&e.ts.key())
    }

    /// The tipset at `height` on the chain that ends with `tip`, or the nearest below it.
    pub(super) fn at_or_before(
        &self,
        tip: &Arc<Entry>,
        height: i64,
    ) -> Result<Arc<Entry>, ChainError> {
        let mut e = tip.clone();
        while e.height() > height && e.height() > 0 {
            if self.on_line(&e) {
                let found = self.line.range(..=height.max(0)).next_back();
                return self.get(found.map_or(&self.genesis.ts.key(), |(_, k)| k));
            }
            e = self.parent(&e)?;
        }
        Ok(e)
    }

    /// The tipset at `height` on the chain that ends with `tip`, or the nearest above it.
    pub(super) fn at_or_after(
        &self,
        tip: &Arc<Entry>,
        height: i64,
    ) -> Result<Arc<Entry>, ChainError> {
        let mut e = tip.clone();
        while e.height() > height {
            if self.on_line(&e) {
                let found = self.line.range(height..).next();
                return self.get(found.map_or(&self.genesis.ts.key(), |(_, k)| k));
            }
            let parent = self.parent(&e)?;
            if parent.height() < height {
                break;
            }
            e = parent;
        }
        Ok(e)
    }

    /// The reverts and applies that lead from one tipset to another.
    pub(super) fn path(
        &self,
        from: &Arc<Entry>,
        to: &Arc<Entry>,
    ) -> Result<Vec<HeadChange>, ChainError> {
        let (mut a, mut b) = (from.clone(), to.clone());
        let (mut reverts, mut applies) = (Vec::new(), Vec::new());
        while a.ts.cids != b.ts.cids {
            if a.height() > b.height() || (a.height() == b.height() && a.height() > 0) {
                reverts.push(change(HeadChangeKind::Revert, &a));
                let parent = self.parent(&a)?;
                if a.height() == b.height() {
                    applies.push(change(HeadChangeKind::Apply, &b));
                    b = self.parent(&b)?;
                }
                a = parent;
            } else {
                applies.push(change(HeadChangeKind::Apply, &b));
                b = self.parent(&b)?;
            }
        }
        applies.reverse();
        reverts.extend(applies);
        Ok(reverts)
    }

    /// Makes a tipset the head. Returns the steps from the old one.
    pub(super) fn set_head(&mut self, to: &Arc<Entry>) -> Result<Vec<HeadChange>, ChainError> {
        let path = self.path(&self.head, to)?;
        for step in &path {
            let height = step.val.height.0;
            match step.kind {
                HeadChangeKind::Revert => self.line.remove(&height),
                HeadChangeKind::Apply | HeadChangeKind::Current => {
                    self.line.insert(height, step.val.key())
                }
            };
        }
        self.head = to.clone();
        Ok(path)
    }

    /// The digest of the ticket that seeds randomness at `epoch` on the chain of `tip`.
    pub(super) fn ticket_digest(
        &self,
        tip: &Arc<Entry>,
        epoch: i64,
    ) -> Result<[u8; 32], ChainError> {
        if epoch > tip.height() {
            return Err(ChainError::Randomness(format!(
                "cannot draw randomness from the future (epoch {epoch}, head {})",
                tip.height()
            )));
        }
        let e = self.at_or_before(tip, epoch.max(0))?;
        let ticket = e.ts.min_ticket_block().ticket.as_ref();
        Ok(ticket_digest(
            ticket.map_or(&[], |t| t.vrf_proof.as_slice()),
        ))
    }

    /// The beacon entry of `epoch` as the chain of `tip` has it.
    pub(super) fn beacon_entry(
        &self,
        tip: &Arc<Entry>,
        epoch: i64,
    ) -> Result<BeaconEntry, ChainError> {
        let epoch = epoch.max(0);
        if epoch > tip.height() {
            return Err(ChainError::Randomness(format!(
                "cannot draw randomness from the future (epoch {epoch}, head {})",
                tip.height()
            )));
        }
        let e = self.at_or_after(tip, epoch)?;
        let entries = &e.ts.min_ticket_block().beacon_entries;
        entries
            .iter()
            .find(|b| i64::try_from(b.round) == Ok(epoch))
            .cloned()
            .ok_or_else(|| ChainError::Randomness(format!("no beacon entry for epoch {epoch}")))
    }

    /// Drops what lies more than `keep` epochs behind the head: states and messages of the line,
    /// all of what is beside it. Headers of the line stay, without their WinningPoSt bytes.
    /// Returns the blocks to drop from disk and those to keep there as headers.
    pub(super) fn prune(&mut self, keep: i64) -> (Vec<Block>, Vec<Block>) {
        let limit = self.head.height() - keep;
        let mut old: Vec<_> = self
            .entries
            .values()
            .filter(|e| e.height() > 0 && e.height() < limit && !is_slim(e))
            .cloned()
            .collect();
        // Those beside the line first: they may share blocks with those on it.
        old.sort_by_key(|e| self.on_line(e));
        let (mut dropped, mut slimmed) = (Vec::new(), Vec::new());
        for e in old {
            let key = e.ts.key();
            let on_line = self.on_line(&e);
            self.entries.remove(&key);
            for b in &e.blocks {
                self.blocks.remove(&b.cid);
                if let Some(at) = self.by_height.get_mut(&e.height()) {
                    at.retain(|c| *c != b.cid);
                }
                for m in b.messages.iter() {
                    let cid = m.cid();
                    self.messages.remove(&cid);
                    self.included.remove(&cid);
                    self.by_nonce
                        .remove(&(m.message.from.to_bytes(), m.message.nonce));
                }
            }
            if on_line {
                let slim = slim(&e);
                slimmed.extend(slim.blocks.iter().cloned());
                self.add(Arc::new(slim));
            } else {
                dropped.extend(e.blocks.iter().cloned());
            }
        }
        // A block beside the line may also be part of a tipset on it.
        dropped.retain(|b| !self.blocks.contains_key(&b.cid));
        (dropped, slimmed)
    }
}

fn change(kind: HeadChangeKind, e: &Entry) -> HeadChange {
    HeadChange {
        kind,
        val: (*e.ts).clone(),
    }
}

fn is_slim(e: &Entry) -> bool {
    let no_proof = |b: &Block| {
        b.header
            .win_post_proof
            .iter()
            .all(|p| p.proof_bytes.is_empty())
    };
    e.executed().is_none()
        && e.blocks
            .iter()
            .all(|b| b.messages.is_empty() && no_proof(b))
}

fn slim(e: &Entry) -> Entry {
    let strip = |h: &BlockHeader| {
        let mut h = h.clone();
        for p in &mut h.win_post_proof {
            p.proof_bytes = Vec::new();
        }
        h
    };
    let ts = TipSet {
        cids: e.ts.cids.clone(),
        blocks: e.ts.blocks.iter().map(strip).collect(),
        height: Epoch(e.height()),
    };
    let blocks = e.blocks.iter().map(|b| Block {
        cid: b.cid,
        header: strip(&b.header),
        messages: Arc::default(),
    });
    let mut slim = Entry::new(ts, blocks.collect(), e.weight.clone());
    slim.pruned = true;
    slim
}

/// Randomness of the chain that ends with a tipset.
pub(super) struct LineDraw<'a> {
    pub(super) store: &'a std::sync::RwLock<Store>,
    pub(super) tip: Arc<Entry>,
}

impl LineDraw<'_> {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Store> {
        self.store.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Draw for LineDraw<'_> {
    fn tickets(&self, dst: Dst, epoch: i64, entropy: &[u8]) -> Result<[u8; 32], String> {
        let digest = self
            .read()
            .ticket_digest(&self.tip, epoch)
            .map_err(|e| e.to_string())?;
        Ok(draw_randomness_from_digest(
            &digest,
            dst,
            Epoch(epoch),
            entropy,
        ))
    }

    fn beacon(&self, dst: Dst, epoch: i64, entropy: &[u8]) -> Result<[u8; 32], String> {
        let entry = self
            .read()
            .beacon_entry(&self.tip, epoch)
            .map_err(|e| e.to_string())?;
        let digest = ticket_digest(&entry.data);
        Ok(draw_randomness_from_digest(
            &digest,
            dst,
            Epoch(epoch),
            entropy,
        ))
    }
}
