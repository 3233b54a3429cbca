//! The chain: tipsets, messages, keys, block production, and what a node answers about them.

mod blocks;
mod genesis;
mod messages;
mod mpool;
mod persist;
mod produce;
mod query;
mod query_actors;
mod query_market;
mod store;
mod verdicts;
mod wallet;

use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use cid::Cid;
use lotus_actors::BigInt;
use lotus_node_client::api::{HeadChange, HeadChangeKind, TipSet, TipSetKey, cbor_cid};
use lotus_proofs::{ProofMode, Verifier};
use lotus_types::{Address, SectorSize, TokenAmount};
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::error::ChainError;
use crate::keys::Key;
use crate::policy::Policy;
use crate::state::State;
use crate::vm::{self, BlockMessages, Env};

use mpool::Pool;
use persist::{Disk, HeadWrite, STATE_INTERVAL};
use produce::Writer;
use store::{Block, Entry, Executed, LineDraw, Store, StoredState};
use verdicts::Verdicts;
use wallet::Wallet;

pub(crate) use persist::{keys, put_key};
pub use query::BlockMessageLists;
pub use query_market::AllocationOrder;

/// Steps of the head that a slow subscriber may lag behind before it loses some.
const HEADS_KEPT: usize = 256;
/// Epochs between prunings.
const PRUNE_INTERVAL: i64 = 64;

/// What a chain is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChainConfig {
    /// The network's constants. Only the block time may differ when the chain is opened again.
    pub policy: Policy,
    /// The network's name.
    pub network_name: String,
    /// Sector size of the miner t01000 that genesis makes.
    pub sector_size: SectorSize,
    /// Which proofs the chain takes: vanilla, groth16-post or groth16. The SNARKs of the latter
    /// two need parameter files: `lotus-miner params`.
    pub proofs: ProofMode,
    /// Whole FIL of the wallet's default key, which owns t01000, and of a second key for clients.
    pub wallet_fil: u64,
    /// Whole FIL of t01000 itself, for deposits and pledges.
    pub miner_fil: u64,
}

impl Default for ChainConfig {
    fn default() -> Self {
        Self {
            policy: Policy::devnet_2k(),
            network_name: "devnet".into(),
            sector_size: SectorSize::S2KiB,
            proofs: ProofMode::Vanilla,
            wallet_fil: 10_000_000,
            miner_fil: 100_000,
        }
    }
}

struct Inner {
    policy: Policy,
    network_name: String,
    proofs: ProofMode,
    block_time_ms: AtomicU64,
    /// The current epoch: the head's height or, after null rounds, above it.
    epoch: AtomicI64,
    beacon_seed: [u8; 32],
    producer: Key,
    producer_id: u64,
    store: RwLock<Store>,
    pool: Mutex<Pool>,
    wallet: RwLock<Wallet>,
    /// Held by whoever changes the head.
    writer: Mutex<Writer>,
    verifier: Verdicts,
    /// By command: the base fee does not fall below this before this epoch.
    fee_floor: Mutex<(TokenAmount, i64)>,
    disk: Disk,
    heads: broadcast::Sender<Arc<Vec<HeadChange>>>,
    latest: watch::Sender<Arc<TipSet>>,
}

/// The chain. Clones share it.
#[derive(Clone)]
pub struct Chain(Arc<Inner>);

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Chain({})", self.0.network_name)
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Chain {
    /// Opens the chain of a repo, or makes a new one. Blocks while it reads.
    pub fn open(
        repo: &Path,
        cfg: ChainConfig,
        verifier: Arc<dyn Verifier>,
    ) -> Result<Self, ChainError> {
        cfg.policy.check().map_err(ChainError::Policy)?;
        let disk = Disk::open(repo)?;
        let facts = match genesis::Facts::load(&disk)? {
            Some(facts) => facts.check(&cfg)?,
            None => genesis::found(&disk, &cfg)?,
        };
        let (line, state) = disk.load(cfg.policy.finality)?;
        let mut tipsets = line.into_iter();
        let Some((ts, blocks)) = tipsets.next() else {
            return Err(ChainError::Damaged("no genesis".into()));
        };
        let mut store = Store::new(Entry::new(ts, blocks, BigInt::default()));
        let begin = TipSetKey(state.tipset.clone());
        let executed = restore(state);
        if let Ok(e) = store.get(&begin) {
            e.set_executed(Some(executed.clone()));
        }
        let above: Vec<_> = tipsets.collect();
        for (i, (ts, blocks)) in above.iter().enumerate() {
            // A tipset's weight is in its child's header. The head has no child: anything above
            // its parent's weight will do, because whatever is built on it is heavier.
            let weight = match above.get(i + 1) {
                Some((child, _)) => child.min_ticket_block().parent_weight.clone(),
                None => ts.min_ticket_block().parent_weight.clone() + 1,
            };
            let e = Arc::new(Entry::new(ts.clone(), blocks.clone(), weight));
            if e.ts.key() == begin {
                e.set_executed(Some(executed.clone()));
            }
            store.add(e.clone());
            store.set_head(&e)?;
        }
        let right = disk.verdicts()?;
        let head = store.head.ts.clone();
        let height = head.height.0;
        let inner = Inner {
            block_time_ms: AtomicU64::new(cfg.policy.block_time_ms),
            policy: cfg.policy,
            network_name: facts.network_name,
            proofs: facts.proofs,

            beacon_seed: facts.beacon_seed,
            producer: facts.producer,
            producer_id: facts.producer_id,
            store: RwLock::new(store),
            pool: Mutex::new(Pool::default()),
            wallet: RwLock::new(Wallet::new(disk.keys()?, facts.default_address)),
            epoch: AtomicI64::new(height),
            writer: Mutex::new(Writer::new()),
            verifier: Verdicts::new(verifier, right.into_iter()),
            fee_floor: Mutex::new((TokenAmount::default(), 0)),
            disk,
            heads: broadcast::channel(HEADS_KEPT).0,
            latest: watch::channel(head).0,
        };
        let chain = Self(Arc::new(inner));
        let head = chain.read().head.clone();
        chain.execute(&head)?;
        chain.reload_pool()?;
        Ok(chain)
    }

    fn read(&self) -> RwLockReadGuard<'_, Store> {
        self.0.store.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Store> {
        self.0.store.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The network's constants.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.0.policy
    }

    /// The miner that genesis made.
    #[must_use]
    pub fn miner(&self) -> Address {
        genesis::MINER.address()
    }

    /// The head.
    #[must_use]
    pub fn head(&self) -> Arc<TipSet> {
        self.read().head.ts.clone()
    }

    /// The first tipset.
    #[must_use]
    pub fn genesis(&self) -> Arc<TipSet> {
        self.read().genesis.ts.clone()
    }

    /// The head now, and every step from it on, without a gap between the two. A receiver that
    /// lags too far loses steps and must subscribe again.
    #[must_use]
    pub fn subscribe_heads(&self) -> (Arc<TipSet>, broadcast::Receiver<Arc<Vec<HeadChange>>>) {
        let _writer = lock(&self.0.writer);
        (self.head(), self.0.heads.subscribe())
    }

    /// Follows the head; skips steps when it moves faster than the watcher.
    #[must_use]
    pub fn watch_head(&self) -> watch::Receiver<Arc<TipSet>> {
        self.0.latest.subscribe()
    }

    /// Milliseconds per epoch, now.
    #[must_use]
    pub fn block_time_ms(&self) -> u64 {
        self.0.block_time_ms.load(Ordering::Relaxed)
    }

    /// Changes the block time. Takes effect after the current epoch.
    pub fn set_block_time_ms(&self, ms: u64) {
        self.0.block_time_ms.store(ms.max(1), Ordering::Relaxed);
    }

    /// What executing a tipset gives, computed at most once while it is kept.
    fn execute(&self, e: &Arc<Entry>) -> Result<Arc<Executed>, ChainError> {
        let mut todo = vec![e.clone()];
        loop {
            let Some(top) = todo.last().cloned() else {
                break;
            };
            if top.executed().is_some() {
                todo.pop();
                continue;
            }
            if top.pruned {
                return Err(ChainError::Pruned(top.height()));
            }
            let parent = self.read().parent(&top)?;
            match parent.executed() {
                Some(before) => {
                    top.set_executed(Some(Arc::new(self.apply(&top, &parent, &before)?)));
                    todo.pop();
                }
                None if parent.height() == 0 || parent.height() >= top.height() => {
                    return Err(ChainError::Pruned(parent.height()));
                }
                None => todo.push(parent),
            }
        }
        e.executed().ok_or_else(|| ChainError::Pruned(e.height()))
    }

    fn apply(
        &self,
        e: &Arc<Entry>,
        parent: &Entry,
        before: &Executed,
    ) -> Result<Executed, ChainError> {
        let mut state = before.state.clone();
        let draw = LineDraw {
            store: &self.0.store,
            tip: e.clone(),
        };
        let env = Env {
            policy: &self.0.policy,
            epoch: e.height(),
            draw: &draw,
            verifier: &self.0.verifier,
        };
        let mut blocks = Vec::new();
        for b in &e.blocks {
            let miner = b.header.miner.id();
            let miner = miner.map_err(|_| ChainError::Block("miner is no ID address".into()))?;
            blocks.push(BlockMessages {
                miner,
                wins: b.header.election_proof.as_ref().map_or(0, |p| p.win_count),
                messages: b.messages.iter().map(|m| &**m).collect(),
            });
        }
        // The header's word and not `before`'s: after a restart a command is forgotten that was in
        // force when the block was made.
        let fee = &e.ts.min_ticket_block().parent_base_fee;
        let out = vm::apply_tipset(&mut state, &env, parent.height(), fee, &blocks);
        let receipts: Vec<_> = out
            .applied
            .iter()
            .map(|(_, a)| {
                let ret = serde_bytes::ByteBuf::from(a.receipt.r#return.clone());
                (a.receipt.exit_code, ret, a.receipt.gas_used)
            })
            .collect();
        Ok(Executed {
            root: state.root(),
            receipts_root: cbor_cid(&lotus_actors::encode(&receipts)),
            base_fee: self.raised(
                e,
                vm::next_base_fee(&self.0.policy, fee, out.gas_limit, blocks.len()),
            ),
            applied: out.applied,
            state,
        })
    }

    /// The state that a tipset's headers name: that after its parent. Lotus answers state queries
    /// "at a tipset" from it.
    fn parent_state(&self, e: &Arc<Entry>) -> Result<Arc<Executed>, ChainError> {
        if e.height() == 0 {
            return self.execute(e);
        }
        let parent = self.read().parent(e)?;
        self.execute(&parent)
    }

    fn state_at(&self, key: &TipSetKey) -> Result<(Arc<Entry>, Arc<Executed>), ChainError> {
        let e = self.read().get(key)?;
        let state = self.parent_state(&e)?;
        Ok((e, state))
    }

    /// Chain weight with this tipset in it. Source: lotus, chain/consensus/filcns/weight.go.
    fn weight(&self, ts: &TipSet, before: &State) -> BigInt {
        let power = before.total_power().qa;
        let log2 = BigInt::from(power.bits().saturating_sub(1).max(1));
        let wins = ts.blocks.iter().filter_map(|b| b.election_proof.as_ref());
        let wins: i64 = wins.map(|p| p.win_count).sum();
        let expected = lotus_actors::EXPECTED_LEADERS * 2;
        let own: BigInt = (&log2 << 8usize) + (&log2 << 8usize) * wins / expected;
        ts.min_ticket_block().parent_weight.clone() + own
    }

    /// Makes a tipset of a new block and its siblings, and the head if it is the heaviest.
    fn adopt(&self, block: &Block) -> Result<Arc<Entry>, ChainError> {
        let parents = TipSetKey(block.header.parents.clone());
        let (parent, siblings) = {
            let mut store = self.write();
            store.put_block(block);
            let mut all: Vec<Block> = store
                .blocks_above(block.header.height.0 - 1)
                .filter(|b| {
                    b.header.height == block.header.height
                        && b.header.parents == block.header.parents
                })
                .cloned()
                .collect();
            all.sort_by_key(|b| b.cid);
            (store.get(&parents)?, all)
        };
        let headers = siblings.iter().map(|b| b.header.clone()).collect();
        let ts = TipSet::new(headers).map_err(|e| ChainError::Block(e.to_string()))?;
        let before = self.execute(&parent)?;
        let weight = self.weight(&ts, &before.state);
        let order = |b: &Block| ts.cids.iter().position(|c| *c == b.cid);
        let mut blocks = siblings;
        blocks.sort_by_key(order);
        let e = Arc::new(Entry::new(ts, blocks, weight));
        self.execute(&e)?;
        self.make_head(e.clone())?;
        Ok(e)
    }

    /// Stores a tipset, and makes it the head if it is heavier than the head.
    fn make_head(&self, e: Arc<Entry>) -> Result<(), ChainError> {
        let head = self.read().head.clone();
        let heavier =
            e.weight > head.weight || (e.weight == head.weight && ticket_before(&e.ts, &head.ts));
        self.write().add(e.clone());
        if !heavier {
            return Ok(());
        }
        let path = self.read().path(&head, &e)?;
        let (mut landed, mut blocks, mut states) = (Vec::new(), Vec::new(), Vec::new());
        let mut below = path
            .iter()
            .find(|s| s.kind == HeadChangeKind::Apply)
            .map_or(0, |s| {
                let parent = self.read().get(&s.val.parents());
                parent.map_or(0, |p| p.height())
            });
        for step in path.iter().filter(|s| s.kind == HeadChangeKind::Apply) {
            let applied = self.read().get(&step.val.key())?;
            for b in &applied.blocks {
                landed.extend(b.messages.iter().map(|m| m.cid()));
                blocks.push(b.clone());
            }
            if applied.height() / STATE_INTERVAL > below / STATE_INTERVAL {
                let x = self.execute(&applied)?;
                let state = StoredState {
                    tipset: applied.ts.cids.clone(),
                    state: x.state.clone(),
                    receipts_root: x.receipts_root,
                    base_fee: x.base_fee.clone(),
                };
                states.push((applied.height(), state));
            }
            below = applied.height();
        }
        self.0.disk.put_head(HeadWrite {
            blocks: &blocks,
            head: &e.ts.key(),
            height: e.height(),
            states,
            verdicts: self.0.verifier.take_fresh(),
            landed: &landed,
        })?;
        let path = self.write().set_head(&e)?;
        self.update_pool(&path);
        self.0.latest.send_replace(e.ts.clone());
        // Nobody may be listening.
        drop(self.0.heads.send(Arc::new(path)));
        if e.height() / PRUNE_INTERVAL > head.height() / PRUNE_INTERVAL {
            self.prune()?;
        }
        Ok(())
    }

    fn prune(&self) -> Result<(), ChainError> {
        let (dropped, slimmed, limit) = {
            let mut store = self.write();
            let keep = self.0.policy.finality + STATE_INTERVAL;
            let (dropped, slimmed) = store.prune(keep);
            (dropped, slimmed, store.head.height() - keep)
        };
        let on_line =
            |height: i64, cids: &[Cid]| self.read().line.get(&height).is_some_and(|k| k.0 == cids);
        self.0.disk.prune(&dropped, &slimmed, limit, &on_line)
    }

    /// Runs the chain's clock until told to stop. The chain does not run while the devnet is
    /// down: epochs go on where they stopped.
    pub async fn run(&self, stop: CancellationToken) -> Result<(), ChainError> {
        let mut next = tokio::time::Instant::now();
        loop {
            next += std::time::Duration::from_millis(self.block_time_ms());
            // After a suspension epochs are not caught up in a burst.
            next = next.max(tokio::time::Instant::now());
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep_until(next) => {}
            }
            let chain = self.clone();
            let step = tokio::task::spawn_blocking(move || chain.advance()).await;
            step.map_err(|_| ChainError::Stopping)??;
        }
    }
}

fn restore(s: StoredState) -> Arc<Executed> {
    Arc::new(Executed {
        root: s.state.root(),
        state: s.state,
        receipts_root: s.receipts_root,
        base_fee: s.base_fee,
        applied: Vec::new(),
    })
}

fn ticket_before(a: &TipSet, b: &TipSet) -> bool {
    let ticket = |t: &TipSet| t.min_ticket_block().ticket.clone();
    match (ticket(a), ticket(b)) {
        (Some(a), Some(b)) => a.order(&b).is_lt(),
        _ => false,
    }
}

/// Root of a block's messages, which its header names.
fn message_root(bls: &[Cid], secp: &[Cid]) -> Cid {
    cbor_cid(&lotus_actors::encode(&(bls, secp)))
}

/// Base fee of the first blocks. Source: lotus, build/buildconstants, InitialBaseFee.
fn initial_base_fee() -> TokenAmount {
    TokenAmount::from_atto(100_000_000u64)
}
