//! Who makes the next block: the clock's step, the built-in producer, and the fault commands.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use fvm_shared::crypto::signature::Signature;
use lotus_actors::{Dst, draw_randomness};
use lotus_node_client::api::{
    BeaconEntry, BlockHeader, ElectionProof, SignedMessage, Ticket, TipSet,
};
use lotus_types::{Address, Epoch, TokenAmount};

use super::store::{Block, Entry, Executed};
use super::{Chain, genesis, lock, message_root};
use crate::error::ChainError;
use crate::keys;

/// Epochs by which a provider's block may be early. It waits for its epoch.
const EARLY_MAX: i64 = 1;
/// Early blocks that wait.
const HELD_MAX: usize = 64;

/// What the holder of the writer's lock knows.
#[derive(Debug)]
pub(super) struct Writer {
    /// Blocks for the next epoch.
    held: Vec<Block>,
    /// No blocks at all.
    stopped: bool,
    /// No block at this epoch or below.
    null_until: i64,
    /// The providers could mine but did not: the producer works until one does.
    stalled: bool,
    /// Reorgs so far, so that each has tickets of its own.
    reorgs: u64,
}

impl Writer {
    pub(super) fn new() -> Self {
        Self {
            held: Vec::new(),
            stopped: false,
            null_until: -1,
            stalled: false,
            reorgs: 0,
        }
    }

    /// Whether a provider's block of this height is for now: `Ok(false)` keeps it for later.
    pub(super) fn admits(&self, height: i64, epoch: i64) -> Result<bool, ChainError> {
        if self.stopped {
            return Err(ChainError::Fault("block production is stopped".into()));
        }
        if height <= self.null_until {
            return Err(ChainError::Fault(format!(
                "epoch {height} is a null round by command"
            )));
        }
        if height > epoch + EARLY_MAX {
            return Err(ChainError::Block(format!(
                "block was from the future (height {height}, now {epoch})"
            )));
        }
        Ok(height <= epoch)
    }

    pub(super) fn hold(&mut self, b: Block) {
        if self.held.len() < HELD_MAX && !self.held.iter().any(|h| h.cid == b.cid) {
            self.held.push(b);
        }
    }

    pub(super) fn provider_mined(&mut self) {
        self.stalled = false;
    }
}

impl Chain {
    /// Steps the clock by one epoch: takes the blocks that wait for it, or lets the producer make
    /// one if it is its turn. Returns the head.
    pub fn advance(&self) -> Result<Arc<TipSet>, ChainError> {
        let mut w = lock(&self.0.writer);
        let epoch = self.0.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        let held = std::mem::take(&mut w.held);
        if w.stopped || epoch <= w.null_until {
            return Ok(self.head());
        }
        for block in held.iter().filter(|b| b.header.height.0 == epoch) {
            if let Err(e) = self.adopt(block) {
                tracing::warn!(cid = %block.cid, "early block dropped: {e}");
            }
        }
        let head = self.read().head.clone();
        if head.height() < epoch && self.producer_due(&mut w, &head, epoch)? {
            let x = self.execute(&head)?;
            let messages = self.select(&head, &x);
            let block = self.produce(&head, &x, epoch, 1, 0, messages)?;
            self.adopt(&block)?;
        }
        Ok(self.head())
    }

    /// The producer mines while nobody else can, and while those who could do not.
    fn producer_due(
        &self,
        w: &mut Writer,
        head: &Arc<Entry>,
        epoch: i64,
    ) -> Result<bool, ChainError> {
        let state = self.execute(head)?;
        let mut able = false;
        for id in state.state.miners.keys() {
            let info =
                self.miner_get_base_info(&Address::new_id(*id), Epoch(epoch), &head.ts.key());
            able |= info?.is_some_and(|i| i.eligible_for_mining);
        }
        if epoch - head.height() > self.0.policy.stall_rounds && !w.stalled {
            tracing::warn!(
                epoch,
                head = head.height(),
                "no provider mines: the producer takes over"
            );
            w.stalled = true;
        }
        Ok(!able || w.stalled)
    }

    /// The current epoch: the head's height or, after null rounds, above it.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.0.epoch.load(Ordering::SeqCst))
    }

    /// Beacon entries that a block at `epoch` on top of `parent` carries.
    pub(super) fn beacon_entries(&self, parent: i64, epoch: i64) -> Vec<BeaconEntry> {
        (parent + 1..=epoch)
            .filter_map(|e| u64::try_from(e).ok())
            .map(|round| genesis::beacon_entry(&self.0.beacon_seed, round))
            .collect()
    }

    /// Unix time of a block, in seconds. Hand-stepped chains run ahead of the wall clock; a chain
    /// that was down catches up with it in its next block.
    pub(super) fn timestamp(&self, parent: &Entry, epoch: i64) -> u64 {
        let rounds = u64::try_from(epoch - parent.height()).unwrap_or(1);
        let steady = parent.ts.min_timestamp() + (rounds * self.block_time_ms()) / 1000;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        steady.max(now.as_secs())
    }

    /// The header of a block on top of `parent`; ticket, proof and signature are the caller's.
    pub(super) fn draft(
        &self,
        parent: &Entry,
        x: &Executed,
        epoch: i64,
        messages: Vec<Arc<SignedMessage>>,
    ) -> Result<Block, ChainError> {
        use fvm_shared::crypto::signature::SignatureType;
        let (bls, secp): (Vec<_>, Vec<_>) = messages
            .into_iter()
            .partition(|m| m.signature.sig_type == SignatureType::BLS);
        let cids = |list: &[Arc<SignedMessage>]| list.iter().map(|m| m.cid()).collect::<Vec<_>>();
        let aggregate = keys::aggregate(bls.iter().map(|m| m.signature.bytes.as_slice()));
        let aggregate = aggregate
            .ok_or_else(|| ChainError::Block("a BLS signature does not aggregate".into()))?;
        let header = BlockHeader {
            miner: Address::new_id(self.0.producer_id),
            ticket: None,
            election_proof: None,
            beacon_entries: self.beacon_entries(parent.height(), epoch),
            win_post_proof: Vec::new(),
            parents: parent.ts.cids.clone(),
            parent_weight: parent.weight.clone(),
            height: Epoch(epoch),
            parent_state_root: x.root,
            parent_message_receipts: x.receipts_root,
            messages: message_root(&cids(&bls), &cids(&secp)),
            bls_aggregate: Some(aggregate),
            timestamp: self.timestamp(parent, epoch),
            block_sig: None,
            fork_signaling: 0,
            parent_base_fee: x.base_fee.clone(),
        };
        Ok(Block {
            cid: header.cid(),
            header,
            messages: Arc::new(bls.into_iter().chain(secp).collect()),
        })
    }

    /// A block of the built-in producer.
    fn produce(
        &self,
        parent: &Entry,
        x: &Executed,
        epoch: i64,
        wins: i64,
        fork: u64,
        messages: Vec<Arc<SignedMessage>>,
    ) -> Result<Block, ChainError> {
        let mut block = self.draft(parent, x, epoch, messages)?;
        let base = block
            .header
            .beacon_entries
            .last()
            .map(|b| b.data.clone())
            .unwrap_or_default();
        let sign = |data: &[u8]| {
            let sig: Option<Signature> = self.0.producer.sign(data);
            sig.ok_or_else(|| ChainError::Block("the producer's key can not sign".into()))
        };
        let entropy = [parent.ts.cids.concat_bytes(), fork.to_be_bytes().to_vec()].concat();
        let ticket = draw_randomness(&base, Dst::TicketProduction, Epoch(epoch - 1), &entropy);
        let election = draw_randomness(&base, Dst::ElectionProofProduction, Epoch(epoch), &entropy);
        block.header.ticket = Some(Ticket {
            vrf_proof: sign(&ticket)?.bytes,
        });
        block.header.election_proof = Some(ElectionProof {
            win_count: wins,
            vrf_proof: sign(&election)?.bytes,
        });
        block.header.fork_signaling = fork;
        block.header.block_sig = Some(sign(&block.header.signing_bytes())?);
        block.cid = block.header.cid();
        Ok(block)
    }

    /// Stops every kind of block, until [`Chain::resume_blocks`]. Epochs pass as null rounds.
    pub fn stop_blocks(&self) {
        lock(&self.0.writer).stopped = true;
    }

    /// Lets blocks come again.
    pub fn resume_blocks(&self) {
        lock(&self.0.writer).stopped = false;
    }

    /// Makes the next `n` epochs null rounds.
    pub fn null_rounds(&self, n: u64) {
        let mut w = lock(&self.0.writer);
        w.null_until = self
            .epoch()
            .0
            .saturating_add(i64::try_from(n).unwrap_or(i64::MAX));
    }

    /// Keeps the base fee at or above `floor`, attoFIL per unit of gas, for the next `epochs`. Then
    /// it falls as fast as empty blocks let it.
    pub fn raise_base_fee(&self, floor: TokenAmount, epochs: u64) {
        let epochs = i64::try_from(epochs).unwrap_or(i64::MAX);
        *lock(&self.0.fee_floor) = (floor, self.epoch().0.saturating_add(epochs));
    }

    /// The base fee of a tipset's children under [`Chain::raise_base_fee`].
    pub(super) fn raised(&self, e: &Entry, base_fee: TokenAmount) -> TokenAmount {
        let (floor, until) = &*lock(&self.0.fee_floor);
        if e.height() < *until {
            base_fee.max(floor.clone())
        } else {
            base_fee
        }
    }

    /// Replaces the last `depth` tipsets by as many epochs of empty, heavier blocks: their
    /// messages are pending again, and their randomness is other randomness.
    pub fn reorg(&self, depth: u64) -> Result<Arc<TipSet>, ChainError> {
        let mut w = lock(&self.0.writer);
        let limit = self.0.policy.finality.cast_unsigned();
        if depth == 0 || depth > limit {
            return Err(ChainError::Invalid(format!(
                "reorg depth must be 1 to {limit}"
            )));
        }
        w.reorgs += 1;
        let old = self.read().head.clone();
        let mut base = old.clone();
        for _ in 0..depth {
            base = self.read().parent(&base).map_err(|_| {
                ChainError::Invalid(format!("the chain has fewer than {depth} tipsets"))
            })?;
        }
        // Heavier than whatever it replaces: at most 15 wins a block.
        let blocks = i64::try_from(old.ts.blocks.len()).unwrap_or(1);
        let wins = 1 + blocks * lotus_actors::MAX_WIN_COUNT;
        let mut tip = base;
        for epoch in tip.height() + 1..=old.height() {
            let x = self.execute(&tip)?;
            let block = self.produce(&tip, &x, epoch, wins, w.reorgs, Vec::new())?;
            tip = self.adopt(&block)?;
        }
        Ok(self.head())
    }
}

trait ConcatBytes {
    fn concat_bytes(&self) -> Vec<u8>;
}

impl ConcatBytes for Vec<cid::Cid> {
    fn concat_bytes(&self) -> Vec<u8> {
        self.iter().flat_map(cid::Cid::to_bytes).collect()
    }
}
