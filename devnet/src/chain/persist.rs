//! The chain on disk: blocks, the head, a state every now and then, keys, pending messages.
//!
//! A restart loads the newest state that is final, and executes what lies above it again; the
//! verdicts on its proofs are stored, so that costs milliseconds a tipset.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use cid::Cid;
use fvm_shared::crypto::signature::SignatureType;
use lotus_journal::{Journal, JournalError, Map};
use lotus_node_client::api::{BlockHeader, SignedMessage, TipSet, TipSetKey};
use lotus_types::Epoch;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::store::{Block, StoredState};
use super::verdicts::VerdictKey;
use crate::error::ChainError;
use crate::keys::Key;

/// Epochs between stored states.
pub(super) const STATE_INTERVAL: i64 = 100;

const META: Map<String, ByteBuf> = Map::new("meta");
const HEAD: Map<u64, Vec<Cid>> = Map::new("head");
const BLOCKS: Map<(i64, [u8; 32]), StoredBlock> = Map::new("blocks");
const STATES: Map<i64, StoredState> = Map::new("states");
const VERDICTS: Map<[u8; 32], i64> = Map::new("verdicts");
const KEYS: Map<String, StoredKey> = Map::new("keys");
const POOL: Map<[u8; 32], ByteBuf> = Map::new("pool");

#[derive(Serialize, Deserialize)]
struct StoredBlock {
    cid: Cid,
    /// The header's JSON.
    header: ByteBuf,
    messages: Vec<ByteBuf>,
}

#[derive(Serialize, Deserialize)]
struct StoredKey {
    bls: bool,
    secret: ByteBuf,
}

/// What one new head writes.
pub(super) struct HeadWrite<'a> {
    pub(super) blocks: &'a [Block],
    pub(super) head: &'a TipSetKey,
    pub(super) height: i64,
    /// States of tipsets on the way, by height.
    pub(super) states: Vec<(i64, StoredState)>,
    pub(super) verdicts: Vec<VerdictKey>,
    /// No longer pending.
    pub(super) landed: &'a [Cid],
}

fn digest(cid: &Cid) -> [u8; 32] {
    let mut out = [0; 32];
    let d = cid.hash().digest();
    let n = d.len().min(32);
    out[..n].copy_from_slice(&d[..n]);
    out
}

fn damaged(what: &str, why: impl std::fmt::Display) -> ChainError {
    ChainError::Damaged(format!("{what}: {why}"))
}

fn encode(b: &Block) -> Result<StoredBlock, JournalError> {
    let header = serde_json::to_vec(&b.header).map_err(|e| JournalError::Encode {
        table: "blocks",
        why: e.to_string(),
    })?;
    Ok(StoredBlock {
        cid: b.cid,
        header: header.into(),
        messages: b.messages.iter().map(|m| m.to_cbor().into()).collect(),
    })
}

fn decode(s: StoredBlock) -> Result<Block, ChainError> {
    let header: BlockHeader = serde_json::from_slice(&s.header).map_err(|e| damaged("block", e))?;
    let mut messages = Vec::new();
    for m in &s.messages {
        let m = SignedMessage::from_cbor(m).map_err(|e| damaged("message", e))?;
        messages.push(Arc::new(m));
    }
    Ok(Block {
        cid: s.cid,
        header,
        messages: Arc::new(messages),
    })
}

/// The store.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    journal: Journal,
}

/// The tipsets of a chain with their blocks, from genesis on.
type Line = Vec<(TipSet, Vec<Block>)>;

impl Disk {
    pub(super) fn open(repo: &Path) -> Result<Self, ChainError> {
        std::fs::create_dir_all(repo).map_err(|error| ChainError::Io {
            what: format!("creating {}", repo.display()),
            error,
        })?;
        Ok(Self {
            journal: Journal::open(&repo.join("chain.redb"))?,
        })
    }

    pub(super) fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, ChainError> {
        let found = self
            .journal
            .read::<_, JournalError>(|v| v.get(&META, &key.to_owned()))?;
        Ok(found.map(ByteBuf::into_vec))
    }

    /// Writes the genesis block, its state and the chain's fixed facts, all at once.
    pub(super) fn found(
        &self,
        meta: &[(&str, Vec<u8>)],
        genesis: &Block,
        state: StoredState,
        keys: &[Key],
    ) -> Result<(), ChainError> {
        self.journal.write::<_, JournalError>(|tx| {
            for (k, v) in meta {
                tx.put(&META, &(*k).to_owned(), &ByteBuf::from(v.clone()))?;
            }
            tx.put(&BLOCKS, &(0, digest(&genesis.cid)), &encode(genesis)?)?;
            tx.put(&HEAD, &0, &vec![genesis.cid])?;
            tx.put(&STATES, &0, &state)?;
            for k in keys {
                tx.put(&KEYS, &hex::encode(k.address().to_bytes()), &stored_key(k))?;
            }
            Ok(())
        })?;
        Ok(())
    }

    pub(super) fn put_key(&self, key: &Key) -> Result<(), ChainError> {
        put_key(&self.journal, key)
    }

    pub(super) fn keys(&self) -> Result<Vec<Key>, ChainError> {
        keys(&self.journal)
    }

    pub(super) fn put_pending(&self, m: &SignedMessage) -> Result<(), ChainError> {
        let key = digest(&m.cid());
        let bytes = ByteBuf::from(m.to_cbor());
        self.journal
            .write::<_, JournalError>(|tx| tx.put(&POOL, &key, &bytes))?;
        Ok(())
    }

    pub(super) fn remove_pending(&self, cid: &Cid) -> Result<(), ChainError> {
        let key = digest(cid);
        self.journal
            .write::<_, JournalError>(|tx| tx.remove(&POOL, &key).map(drop))?;
        Ok(())
    }

    pub(super) fn pending(&self) -> Result<Vec<SignedMessage>, ChainError> {
        let all = self
            .journal
            .read::<_, JournalError>(|v| v.scan(&POOL, None, usize::MAX))?;
        all.iter()
            .map(|(_, b)| SignedMessage::from_cbor(b).map_err(|e| damaged("pending message", e)))
            .collect()
    }

    pub(super) fn verdicts(&self) -> Result<Vec<VerdictKey>, ChainError> {
        let all = self
            .journal
            .read::<_, JournalError>(|v| v.scan(&VERDICTS, None, usize::MAX))?;
        Ok(all.into_iter().map(|(k, _)| k).collect())
    }

    pub(super) fn put_head(&self, w: HeadWrite<'_>) -> Result<(), ChainError> {
        self.journal.write::<_, JournalError>(|tx| {
            for b in w.blocks {
                tx.put(&BLOCKS, &(b.header.height.0, digest(&b.cid)), &encode(b)?)?;
            }
            tx.put(&HEAD, &0, &w.head.0)?;
            for (height, s) in &w.states {
                tx.put(&STATES, height, s)?;
            }
            for v in &w.verdicts {
                tx.put(&VERDICTS, v, &w.height)?;
            }
            for m in w.landed {
                tx.remove(&POOL, &digest(m))?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Drops what is final for long: blocks beside the line, messages, states, verdicts.
    pub(super) fn prune(
        &self,
        dropped: &[Block],
        slimmed: &[Block],
        limit: i64,
        on_line: &dyn Fn(i64, &[Cid]) -> bool,
    ) -> Result<(), ChainError> {
        self.journal.write::<_, JournalError>(|tx| {
            for b in dropped {
                tx.remove(&BLOCKS, &(b.header.height.0, digest(&b.cid)))?;
            }
            for b in slimmed {
                tx.put(&BLOCKS, &(b.header.height.0, digest(&b.cid)), &encode(b)?)?;
            }
            // The newest state below the limit is where a restart begins.
            let mut kept = false;
            let states = tx.scan(&STATES, None, usize::MAX)?;
            for (h, s) in states.iter().rev().filter(|(h, _)| *h < limit) {
                if kept || !on_line(*h, &s.tipset) {
                    tx.remove(&STATES, h)?;
                } else {
                    kept = true;
                }
            }
            for (k, h) in tx.scan(&VERDICTS, None, usize::MAX)? {
                if h < limit - STATE_INTERVAL {
                    tx.remove(&VERDICTS, &k)?;
                }
            }
            Ok(())
        })?;
        Ok(())
    }

    /// The line from genesis to the head, and the state to execute it from.
    pub(super) fn load(&self, finality: i64) -> Result<(Line, StoredState), ChainError> {
        let (blocks, head, mut states) = self.journal.read::<_, JournalError>(|v| {
            Ok((
                v.scan(&BLOCKS, None, usize::MAX)?,
                v.get(&HEAD, &0)?.unwrap_or_default(),
                v.scan(&STATES, None, usize::MAX)?,
            ))
        })?;
        let mut by_cid = HashMap::new();
        for (_, s) in blocks {
            let b = decode(s)?;
            by_cid.insert(b.cid, b);
        }
        let mut line = Vec::new();
        let mut key = head;
        while !key.is_empty() {
            let found: Option<Vec<Block>> = key.iter().map(|c| by_cid.get(c).cloned()).collect();
            let found = found.ok_or_else(|| damaged("tipset", TipSetKey(key.clone())))?;
            let Some(first) = found.first() else {
                return Err(damaged("tipset", "no blocks"));
            };
            let parents = first.header.parents.clone();
            let ts = TipSet {
                cids: key,
                height: Epoch(first.header.height.0),
                blocks: found.iter().map(|b| b.header.clone()).collect(),
            };
            line.push((ts, found));
            key = parents;
        }
        line.reverse();
        let top = line.last().map_or(0, |(ts, _)| ts.height.0);
        let on_line: HashSet<&[Cid]> = line.iter().map(|(ts, _)| ts.cids.as_slice()).collect();
        states.retain(|(_, s)| on_line.contains(s.tipset.as_slice()));
        if states.is_empty() {
            return Err(damaged("states", "none"));
        }
        let final_at = states
            .iter()
            .rposition(|(h, _)| *h <= top - finality)
            .unwrap_or(0);
        let state = states.swap_remove(final_at).1;
        Ok((line, state))
    }
}

/// Keeps a key.
pub(crate) fn put_key(journal: &Journal, key: &Key) -> Result<(), ChainError> {
    let address = hex::encode(key.address().to_bytes());
    journal.write::<_, JournalError>(|tx| tx.put(&KEYS, &address, &stored_key(key)))?;
    Ok(())
}

/// Every key.
pub(crate) fn keys(journal: &Journal) -> Result<Vec<Key>, ChainError> {
    let all = journal.read::<_, JournalError>(|v| v.scan(&KEYS, None, usize::MAX))?;
    all.into_iter()
        .map(|(address, k)| {
            let kind = if k.bls {
                SignatureType::BLS
            } else {
                SignatureType::Secp256k1
            };
            Key::from_bytes(kind, &k.secret).ok_or_else(|| damaged("key", address))
        })
        .collect()
}

fn stored_key(k: &Key) -> StoredKey {
    StoredKey {
        bls: k.kind() == SignatureType::BLS,
        secret: k.to_bytes().into(),
    }
}
