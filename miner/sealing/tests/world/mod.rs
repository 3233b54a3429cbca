//! A chain with one miner that verifies seal proofs, and a hub's sealing part on top of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use cid::Cid;
use lotus_actors::miner::{
    PRE_COMMIT_SECTOR_BATCH2, PROVE_COMMIT_SECTORS3, PreCommitSectorBatchParams2,
    ProveCommitSectors3Params,
};
use lotus_actors::{
    Dst, RawBytes, RegisteredAggregateProof, address_entropy, decode, draw_randomness,
};
use lotus_chain::Follower;
use lotus_journal::{Journal, JournalError, Map, Tx};
use lotus_messages::{MessagesConfig, Sender};
use lotus_node_client::api::{
    Actor, BigInt, BitField, InvocResult, Message, MessageSendSpec, MinerInfo, MsgLookup,
    NetworkParams, Partition, SectorLocation, SectorOnChainInfo, SectorPreCommitInfo,
    SectorPreCommitOnChainInfo, SignedMessage, TipSet, TipSetKey,
};
use lotus_node_client::{FullNode, HeadChanges, NodeError};
use lotus_proofs::{
    AGGREGATE_SEALS, ProofMode, SealingSector, Vanilla, Verifier, comm_d, commp, layout,
};
use lotus_sealing::{
    Observer, PieceFiles, Sealing, SealingConfig, SealingDeps, SectorChange, SectorState, Storage,
    StorageConfig, Terms,
};
use lotus_types::{
    ActorId, Address, Commitment, DealKey, Epoch, EpochDelta, PaddedSize, PieceCid, PieceInfo,
    SectorId, SectorNumber, SectorSize, TokenAmount,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::fake::Fake;
use super::worker::Worker;

const MINER: ActorId = ActorId(1000);
const SIZE: SectorSize = SectorSize::S2KiB;
const DELAY: i64 = 10;
/// Oldest ticket that the chain takes, in epochs.
const MAX_TICKET_AGE: i64 = 400;

pub(crate) fn deal(n: usize) -> DealKey {
    DealKey {
        client: "t1client".into(),
        id: (n as u128).into(),
    }
}

pub(crate) fn terms() -> Terms {
    Terms {
        start_epoch: Epoch(0),
        end_epoch: Epoch(2_000_000),
        allocation: None,
        notify: None,
    }
}

fn randomness(dst: Dst, epoch: i64) -> [u8; 32] {
    draw_randomness(
        b"chain",
        dst,
        Epoch(epoch),
        &address_entropy(&MINER.address()),
    )
}

/// State of the miner actor.
#[derive(Default)]
pub(crate) struct Miner {
    pub(crate) allocated: BTreeSet<u64>,
    pub(crate) pre_commits: BTreeMap<u64, SectorPreCommitOnChainInfo>,
    pub(crate) active: BTreeMap<u64, SectorOnChainInfo>,
    /// Sectors of the aggregates that were taken, in their order.
    pub(crate) aggregates: Vec<Vec<u64>>,
    /// Exit codes for the next messages, by method.
    pub(crate) exits: Vec<(u64, i64)>,
    /// Epochs after which a ticket is refused.
    pub(crate) max_ticket_age: i64,
}

impl Miner {
    fn execute(&mut self, msg: &Message, height: i64) -> i64 {
        if let Some(i) = self.exits.iter().position(|(m, _)| *m == msg.method) {
            return self.exits.remove(i).1;
        }
        let done = match msg.method {
            PRE_COMMIT_SECTOR_BATCH2 => self.pre_commit(msg, height),
            PROVE_COMMIT_SECTORS3 => self.prove_commit(msg, height),
            _ => Some(()),
        };
        if done.is_some() { 0 } else { 16 }
    }

    fn pre_commit(&mut self, msg: &Message, height: i64) -> Option<()> {
        let params: PreCommitSectorBatchParams2 = decode(&msg.params).ok()?;
        for s in params.sectors {
            let age = height - s.seal_rand_epoch;
            let fine = (1..=self.max_ticket_age).contains(&age)
                && msg.value >= TokenAmount::from_atto(1_000)
                && s.expiration > height + 180 * 2_880
                && self.allocated.insert(s.sector_number);
            fine.then_some(())?;
            let on_chain = SectorPreCommitOnChainInfo {
                info: SectorPreCommitInfo {
                    seal_proof: s.seal_proof.into(),
                    sector_number: SectorNumber(s.sector_number),
                    sealed_cid: s.sealed_cid,
                    seal_rand_epoch: Epoch(s.seal_rand_epoch),
                    deal_ids: vec![],
                    expiration: Epoch(s.expiration),
                    unsealed_cid: s.unsealed_cid.0,
                },
                pre_commit_deposit: TokenAmount::from_atto(1_000),
                pre_commit_epoch: Epoch(height),
            };
            self.pre_commits.insert(s.sector_number, on_chain);
        }
        Some(())
    }

    fn prove_commit(&mut self, msg: &Message, height: i64) -> Option<()> {
        let params: ProveCommitSectors3Params = decode(&msg.params).ok()?;
        let sectors = &params.sector_activations;
        let aggregated = params.sector_proofs.is_empty();
        let proofs: Vec<RawBytes> = if aggregated {
            // The small chain's aggregate is the list of the proofs, see the worker.
            let fine = params.aggregate_proof_type == Some(RegisteredAggregateProof::SnarkPackV2)
                && AGGREGATE_SEALS.contains(&sectors.len());
            fine.then_some(())?;
            decode(params.aggregate_proof.bytes()).ok()?
        } else {
            params.aggregate_proof.is_empty().then_some(())?;
            params.sector_proofs.clone()
        };
        (sectors.len() == proofs.len()).then_some(())?;
        for (manifest, proof) in sectors.iter().zip(&proofs) {
            let number = manifest.sector_number;
            let pre = self.pre_commits.get(&number)?;
            let seed_epoch = pre.pre_commit_epoch.0 + DELAY;
            let pieces: Option<Vec<_>> = manifest
                .pieces
                .iter()
                .map(|p| {
                    let size = PaddedSize::new(p.size.0).ok()?;
                    Some(PieceInfo {
                        cid: PieceCid::from_cid(&p.cid).ok()?,
                        size,
                        raw_size: size.unpadded().get(),
                    })
                })
                .collect();
            let data = comm_d(SIZE, &layout(SIZE, &pieces?).ok()?).ok()?;
            let claimed = pre.info.unsealed_cid.unwrap_or_else(|| data.unsealed_cid());
            (height > seed_epoch && claimed == data.unsealed_cid()).then_some(())?;
            let sector = SealingSector {
                id: SectorId {
                    miner: MINER,
                    number: SectorNumber(number),
                },
                size: SIZE,
            };
            Vanilla
                .verify_seal(
                    &sector,
                    &randomness(Dst::SealRandomness, pre.info.seal_rand_epoch.0),
                    &randomness(Dst::InteractiveSealChallengeSeed, seed_epoch),
                    &data,
                    &Commitment::from_sealed_cid(&pre.info.sealed_cid).ok()?,
                    proof.bytes(),
                )
                .ok()?;
            let pre = self.pre_commits.remove(&number)?;
            self.active.insert(number, active(&pre, height));
        }
        if aggregated {
            let numbers = sectors.iter().map(|s| s.sector_number).collect();
            self.aggregates.push(numbers);
        }
        Some(())
    }
}

fn active(pre: &SectorPreCommitOnChainInfo, height: i64) -> SectorOnChainInfo {
    SectorOnChainInfo {
        sector_number: pre.info.sector_number,
        seal_proof: pre.info.seal_proof,
        sealed_cid: pre.info.sealed_cid,
        activation: Epoch(height),
        expiration: pre.info.expiration,
        deal_weight: BigInt::default(),
        verified_deal_weight: BigInt::default(),
        initial_pledge: TokenAmount::default(),
        expected_day_reward: None,
        expected_storage_pledge: None,
        power_base_epoch: Epoch(height),
        replaced_day_reward: None,
        sector_key_cid: None,
        flags: 0,
        daily_fee: TokenAmount::default(),
    }
}

/// The node: the small chain with the miner's state.
struct Node {
    chain: Fake,
    miner: Arc<Mutex<Miner>>,
}

/// Calls that the small chain answers.
macro_rules! forward {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $ret:ty;)*) => {
        #[async_trait]
        impl FullNode for Node {
            $(
                async fn $name(&self, $($arg: $ty),*) -> Result<$ret, NodeError> {
                    self.chain.$name($($arg),*).await
                }
            )*

            async fn state_miner_info(
                &self,
                miner: Address,
                _key: &TipSetKey,
            ) -> Result<MinerInfo, NodeError> {
                Ok(MinerInfo {
                    owner: Address::new_id(1001),
                    worker: Address::new_id(1001),
                    new_worker: None,
                    control_addresses: vec![],
                    worker_change_epoch: Epoch(-1),
                    peer_id: None,
                    multiaddrs: vec![],
                    window_post_proof_type: 10,
                    sector_size: SIZE.bytes(),
                    window_post_partition_sectors: 2,
                    consensus_fault_elapsed: Epoch(-1),
                    pending_owner_address: None,
                    beneficiary: Some(miner),
                    beneficiary_term: None,
                    pending_beneficiary_term: None,
                })
            }

            async fn state_miner_allocated(
                &self,
                _miner: Address,
                _key: &TipSetKey,
            ) -> Result<BitField, NodeError> {
                let miner = self.miner.lock().unwrap();
                Ok(BitField::try_from_bits(miner.allocated.iter().copied()).unwrap())
            }

            async fn state_miner_sector_allocated(
                &self,
                _miner: Address,
                sector: SectorNumber,
                _key: &TipSetKey,
            ) -> Result<bool, NodeError> {
                Ok(self.miner.lock().unwrap().allocated.contains(&sector.0))
            }

            async fn state_sector_get_info(
                &self,
                _miner: Address,
                sector: SectorNumber,
                _key: &TipSetKey,
            ) -> Result<Option<SectorOnChainInfo>, NodeError> {
                Ok(self.miner.lock().unwrap().active.get(&sector.0).cloned())
            }

            async fn state_sector_partition(
                &self,
                _miner: Address,
                _sector: SectorNumber,
                _key: &TipSetKey,
            ) -> Result<SectorLocation, NodeError> {
                Ok(SectorLocation { deadline: 0, partition: 0 })
            }

            async fn state_miner_partitions(
                &self,
                _miner: Address,
                _deadline: u64,
                _key: &TipSetKey,
            ) -> Result<Vec<Partition>, NodeError> {
                let miner = self.miner.lock().unwrap();
                let all = BitField::try_from_bits(miner.active.keys().copied()).unwrap();
                Ok(vec![Partition {
                    all_sectors: all.clone(),
                    live_sectors: all.clone(),
                    active_sectors: all,
                    ..Partition::default()
                }])
            }

            async fn state_sector_precommit_info(
                &self,
                _miner: Address,
                sector: SectorNumber,
                _key: &TipSetKey,
            ) -> Result<Option<SectorPreCommitOnChainInfo>, NodeError> {
                Ok(self.miner.lock().unwrap().pre_commits.get(&sector.0).cloned())
            }

            async fn state_miner_pre_commit_deposit_for_power(
                &self,
                _miner: Address,
                _info: &SectorPreCommitInfo,
                _key: &TipSetKey,
            ) -> Result<TokenAmount, NodeError> {
                Ok(TokenAmount::from_atto(1_000))
            }

            async fn state_miner_initial_pledge_for_sector(
                &self,
                _duration: EpochDelta,
                _size: u64,
                _verified: u64,
                _key: &TipSetKey,
            ) -> Result<TokenAmount, NodeError> {
                Ok(TokenAmount::from_atto(3_000))
            }

            async fn state_get_randomness_from_tickets(
                &self,
                dst: i64,
                at: Epoch,
                _entropy: &[u8],
                _key: &TipSetKey,
            ) -> Result<[u8; 32], NodeError> {
                Ok(randomness(Dst::try_from(dst).unwrap(), at.0))
            }

            async fn state_get_randomness_from_beacon(
                &self,
                dst: i64,
                at: Epoch,
                _entropy: &[u8],
                _key: &TipSetKey,
            ) -> Result<[u8; 32], NodeError> {
                Ok(randomness(Dst::try_from(dst).unwrap(), at.0))
            }

            async fn state_get_network_params(&self) -> Result<NetworkParams, NodeError> {
                Ok(NetworkParams {
                    network_name: "small".into(),
                    block_delay_secs: 1,
                    block_delay_millis: Some(5),
                    consensus_miner_min_power: BigInt::default(),
                    pre_commit_challenge_delay: EpochDelta(DELAY),
                    fork_upgrade_params: serde_json::Value::Null,
                    eip155_chain_id: 0,
                    genesis_timestamp: 0,
                })
            }
        }
    };
}

forward! {
    chain_notify() -> HeadChanges;
    chain_head() -> TipSet;
    chain_get_tipset(key: &TipSetKey) -> TipSet;
    chain_get_tipset_by_height(at: Epoch, key: &TipSetKey) -> TipSet;
    state_account_key(addr: Address, key: &TipSetKey) -> Address;
    state_get_actor(addr: Address, key: &TipSetKey) -> Option<Actor>;
    mpool_get_nonce(addr: Address) -> u64;
    mpool_push(msg: &SignedMessage) -> Cid;
    wallet_has(addr: Address) -> bool;
    wallet_sign_message(addr: Address, msg: &Message) -> SignedMessage;
    gas_estimate_message_gas(msg: &Message, spec: Option<&MessageSendSpec>, key: &TipSetKey)
        -> Message;
    gas_estimate_gas_premium(blocks: u64, sender: Address, gas_limit: i64, key: &TipSetKey)
        -> TokenAmount;
    state_call(msg: &Message, key: &TipSetKey) -> InvocResult;
    state_search_msg(key: &TipSetKey, cid: Cid, lookback: EpochDelta, allow_replaced: bool)
        -> Option<MsgLookup>;
}

/// What outlives a hub: the chain, the disk, the piece files.
pub(crate) struct World {
    pub(crate) chain: Fake,
    miner: Arc<Mutex<Miner>>,
    dir: tempfile::TempDir,
    _mining: JoinSet<()>,
}

impl World {
    pub(crate) fn new() -> Self {
        let miner = Arc::new(Mutex::new(Miner {
            max_ticket_age: MAX_TICKET_AGE,
            ..Miner::default()
        }));
        let state = miner.clone();
        let chain = Fake::new(Box::new(move |msg, height| {
            (state.lock().unwrap().execute(msg, height.0), vec![])
        }));
        let mut mining = JoinSet::new();
        let mined = chain.clone();
        mining.spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                mined.mine();
            }
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("pieces")).unwrap();
        Self {
            chain,
            miner,
            dir,
            _mining: mining,
        }
    }

    /// Copies the journal of a hub that has stopped.
    pub(crate) fn back_up(&self) -> Vec<u8> {
        std::fs::read(self.dir.path().join("journal")).unwrap()
    }

    /// Puts a copy back.
    pub(crate) fn restore(&self, journal: &[u8]) {
        std::fs::write(self.dir.path().join("journal"), journal).unwrap();
    }

    pub(crate) fn miner(&self) -> MutexGuard<'_, Miner> {
        self.miner.lock().unwrap()
    }

    pub(crate) fn height(&self) -> i64 {
        self.chain.lock().head().height.0
    }

    pub(crate) fn id(&self, number: SectorNumber) -> SectorId {
        SectorId {
            miner: MINER,
            number,
        }
    }

    /// A piece of so many bytes, on disk.
    pub(crate) fn piece(&self, len: usize) -> PieceInfo {
        let bytes: Vec<u8> = (0..len)
            .map(|i| ((i * 31 + len) % 251).to_le_bytes()[0])
            .collect();
        let piece = commp(bytes.as_slice()).unwrap();
        std::fs::write(
            Files(self.dir.path().join("pieces")).path(&piece.cid),
            bytes,
        )
        .unwrap();
        piece
    }

    pub(crate) async fn until(&self, what: &str, f: impl Fn(&Self) -> bool) {
        let poll = async {
            while !f(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let done = tokio::time::timeout(super::PATIENCE, poll).await;
        done.unwrap_or_else(|_| panic!("{what}"));
    }
}

struct Files(PathBuf);

impl PieceFiles for Files {
    fn path(&self, cid: &PieceCid) -> PathBuf {
        self.0.join(cid.to_string())
    }
}

/// Writes down the states in the journal.
struct Witness;

const SEEN: Map<u64, String> = Map::new("witness.seen");
const RETURNED: Map<u64, DealKey> = Map::new("witness.returned");

impl Observer for Witness {
    fn in_tx(&self, tx: &mut Tx, change: &SectorChange<'_>) -> Result<(), JournalError> {
        let next = tx.len(&SEEN)?;
        tx.put(&SEEN, &next, &change.to.to_string())?;
        for piece in change.returned {
            let next = tx.len(&RETURNED)?;
            tx.put(&RETURNED, &next, &piece.key)?;
        }
        Ok(())
    }
    fn committed(&self) {}
}

/// The sealing part of a hub.
pub(crate) struct Hub {
    pub(crate) sealing: Sealing,
    pub(crate) storage: Storage,
    pub(crate) work: Arc<Worker>,
    journal: Journal,
    path: PathBuf,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Hub {
    pub(crate) fn start(world: &World) -> Self {
        Self::start_with(world, |_| {})
    }

    pub(crate) fn start_with(world: &World, adjust: impl FnOnce(&mut SealingConfig)) -> Self {
        Self::start_in(world, ProofMode::Vanilla, adjust)
    }

    /// The mode decides whether proofs are aggregated; they are vanilla ones in each.
    pub(crate) fn start_in(
        world: &World,
        proofs: ProofMode,
        adjust: impl FnOnce(&mut SealingConfig),
    ) -> Self {
        let dir = world.dir.path();
        let path = dir.join("journal");
        let journal = Journal::open(&path).unwrap();
        let node = Arc::new(Node {
            chain: world.chain.clone(),
            miner: world.miner.clone(),
        });
        let (follower, walk) = Follower::new(node.clone());
        let messages = MessagesConfig {
            confidence_epochs: 2,
            repush_secs: 1,
            ..MessagesConfig::default()
        };
        let (sender, writing) = Sender::new(journal.clone(), node.clone(), &follower, messages);
        let mut cfg = SealingConfig {
            ticket_lookback_epochs: 5,
            ticket_max_age_epochs: MAX_TICKET_AGE - 50,
            seed_confidence_epochs: 2,
            message_confidence_epochs: 2,
            retry_first_secs: 0,
            ..SealingConfig::default()
        };
        adjust(&mut cfg);
        let storage = Storage::open(
            journal.clone(),
            &dir.join("sectors"),
            SIZE,
            StorageConfig::default(),
        )
        .unwrap();
        let work = Arc::new(Worker::default());
        let (sealing, runner) = Sealing::new(SealingDeps {
            journal: journal.clone(),
            node,
            follower,
            sender,
            work: work.clone(),
            storage: storage.clone(),
            miner: MINER,
            size: SIZE,
            proofs,
            cfg,
            observer: Arc::new(Witness),
            pieces: Arc::new(Files(dir.join("pieces"))),
        })
        .unwrap();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let end = stop.clone();
        tasks.spawn(async move {
            walk.run(end).await;
        });
        tasks.spawn(writing.run(stop.clone()));
        tasks.spawn(runner.run(stop.clone()));
        Self {
            sealing,
            storage,
            work,
            journal,
            path,
            stop,
            tasks,
        }
    }

    pub(crate) async fn restart_with(
        self,
        world: &World,
        adjust: impl FnOnce(&mut SealingConfig),
    ) -> Self {
        self.stop().await;
        Self::start_with(world, adjust)
    }

    pub(crate) fn state(&self, n: SectorNumber) -> SectorState {
        self.sealing.sector(n).unwrap().unwrap().sector.state
    }

    /// Waits until the sector is in a state.
    pub(crate) async fn until(&self, n: SectorNumber, state: SectorState) {
        let mut changes = self.sealing.changes();
        let there = async {
            while self.state(n) != state {
                changes.changed().await.unwrap();
            }
        };
        if tokio::time::timeout(super::PATIENCE, there).await.is_err() {
            panic!("no {state}: {:#?}", self.sealing.sector(n));
        }
    }

    /// Waits until the sector is in another state than now, or in its last.
    pub(crate) async fn moved(&self, n: SectorNumber) -> SectorState {
        let mut changes = self.sealing.changes();
        let before = self.state(n);
        let moves = async {
            while self.state(n) == before && self.state(n) != SectorState::Proving {
                changes.changed().await.unwrap();
            }
            self.state(n)
        };
        let moved = tokio::time::timeout(super::PATIENCE, moves).await;
        moved.unwrap_or_else(|_| panic!("stuck: {:#?}", self.sealing.sector(n)))
    }

    /// The states that the observer was told.
    pub(crate) fn observed(&self) -> Vec<String> {
        let seen = self.journal.read(|v| v.scan(&SEEN, None, 10_000));
        let seen: Vec<(u64, String)> = seen.map_err(|e: JournalError| e).unwrap();
        seen.into_iter().map(|(_, s)| s).collect()
    }

    /// The deals whose pieces were given back.
    pub(crate) fn returned(&self) -> Vec<DealKey> {
        let all = self.journal.read(|v| v.scan(&RETURNED, None, 10_000));
        let all: Vec<(u64, DealKey)> = all.map_err(|e: JournalError| e).unwrap();
        all.into_iter().map(|(_, key)| key).collect()
    }

    /// Stops, and waits until the last call into the journal has returned.
    pub(crate) async fn stop(self) {
        let Self {
            sealing,
            storage,
            work,
            journal,
            path,
            stop,
            mut tasks,
        } = self;
        drop((sealing, storage, journal));
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        // A hub's workers end with it.
        work.end().await;
        let closed = async {
            while let Err(e) = Journal::open(&path) {
                assert!(matches!(e, JournalError::Locked { .. }), "{e}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let done = tokio::time::timeout(super::PATIENCE, closed).await;
        done.expect("the journal is closed");
    }
}
