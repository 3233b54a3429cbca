//! Sealing on the embedded chain, over its RPC, and somebody who proves the sectors.

#![allow(dead_code, reason = "two tests use it, each another part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lotus_actors::miner::{PoStPartition, SUBMIT_WINDOWED_POST, SubmitWindowedPoStParams};
use lotus_actors::{
    BitField, Dst, PoStProof, Randomness, RegisteredPoStProof, address_entropy, encode,
    post_randomness,
};
use lotus_chain::Follower;
use lotus_devnet::rpc::{Perm, Server, Tokens};
use lotus_devnet::{Chain, ChainConfig, Policy};
use lotus_journal::{Journal, JournalError, Tx};
use lotus_messages::{MessageKind, MessagesConfig, Payer, SendRequest, Sender};
use lotus_node_client::api::{DeadlineInfo, TipSetKey};
use lotus_node_client::{Client, Node, NodeConfig};
use lotus_proofs::{PostSector, ProofMode, Prover as _, Vanilla, WindowPost, commp};
use lotus_runtime::Health;
use lotus_sealing::{
    Observer, PieceFiles, Sealing, SealingConfig, SealingDeps, SectorChange, SectorState, Storage,
    StorageConfig,
};
use lotus_types::{
    ActorId, Commitment, DealKey, PieceCid, PieceInfo, SectorId, SectorNumber, SectorSize,
    TokenAmount,
};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::worker::Worker;

pub(crate) const MINER: ActorId = ActorId(1000);
pub(crate) const SIZE: SectorSize = SectorSize::S2KiB;
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
pub(crate) const HEAD: &TipSetKey = &TipSetKey::HEAD;

/// Raw pieces in a folder.
pub(crate) struct Files(PathBuf);

impl PieceFiles for Files {
    fn path(&self, cid: &PieceCid) -> PathBuf {
        self.0.join(cid.to_string())
    }
}

struct Nobody;

impl Observer for Nobody {
    fn in_tx(&self, _tx: &mut Tx, _change: &SectorChange<'_>) -> Result<(), JournalError> {
        Ok(())
    }
    fn committed(&self) {}
}

/// A chain that outlives the hubs on it.
pub(crate) struct Net {
    pub(crate) dir: TempDir,
    pub(crate) chain: Chain,
    pub(crate) node: Node,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Net {
    pub(crate) async fn start(policy: Policy) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cfg = ChainConfig {
            policy,
            sector_size: SIZE,
            ..ChainConfig::default()
        };
        for folder in ["devnet", "pieces"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let repo = dir.path().join("devnet");
        let chain = Chain::open(&repo, cfg, Arc::new(Vanilla)).unwrap();
        let tokens = Tokens::open(&repo).unwrap();
        let token = tokens.issue(&Perm::Admin.up_to());
        let any = ([127, 0, 0, 1], 0).into();
        let server = Server::bind(any, chain.clone(), tokens).await.unwrap();
        let api = format!("{token}:http://{}", server.local_addr().unwrap());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let serve = server.serve(stop.clone());
        tasks.spawn(async move { serve.await.unwrap() });
        let clock = chain.clone();
        let end = stop.clone();
        tasks.spawn(async move { clock.run(end).await.unwrap() });
        let node: Node = Client::connect(&NodeConfig {
            api,
            ..NodeConfig::default()
        })
        .unwrap();
        Self {
            dir,
            chain,
            node,
            stop,
            tasks,
        }
    }

    /// A piece of so many bytes, on disk.
    pub(crate) fn piece(&self, len: usize) -> PieceInfo {
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251).to_le_bytes()[0]).collect();
        let piece = commp(bytes.as_slice()).unwrap();
        let files = Files(self.dir.path().join("pieces"));
        std::fs::write(files.path(&piece.cid), bytes).unwrap();
        piece
    }

    /// Copies the journal of a hub that has stopped.
    pub(crate) fn back_up(&self) -> Vec<u8> {
        drop(open(&self.dir.path().join("journal")));
        std::fs::read(self.dir.path().join("journal")).unwrap()
    }

    /// Puts a copy back.
    pub(crate) fn restore(&self, journal: &[u8]) {
        drop(open(&self.dir.path().join("journal")));
        std::fs::write(self.dir.path().join("journal"), journal).unwrap();
    }

    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// The sealing part of a hub, and who proves its sectors.
pub(crate) struct Hub {
    pub(crate) sealing: Sealing,
    pub(crate) storage: Storage,
    pub(crate) work: Arc<Worker>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

pub(crate) fn deal(n: u64) -> DealKey {
    DealKey {
        client: "t1client".into(),
        id: u128::from(n).into(),
    }
}

impl Hub {
    pub(crate) fn start(net: &Net, adjust: impl FnOnce(&mut SealingConfig)) -> Self {
        let dir = net.dir.path();
        let journal = open(&dir.join("journal"));
        let (follower, walk) = Follower::new(net.node.clone());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(walk.run(stop.clone()));
        let messages = MessagesConfig {
            confidence_epochs: 4,
            repush_secs: 1,
            ..MessagesConfig::default()
        };
        let (sender, runner) = Sender::new(journal.clone(), net.node.clone(), &follower, messages);
        tasks.spawn(runner.run(stop.clone()));
        let work = Arc::new(Worker::default());
        let mut cfg = SealingConfig {
            ticket_lookback_epochs: 8,
            seed_confidence_epochs: 4,
            message_confidence_epochs: 4,
            retry_first_secs: 1,
            ..SealingConfig::default()
        };
        adjust(&mut cfg);
        let quick = StorageConfig {
            check_secs: 1,
            keep_moved_secs: 1,
            ..StorageConfig::default()
        };
        let storage = Storage::open(journal.clone(), &dir.join("sectors"), SIZE, quick).unwrap();
        tasks.spawn(storage.clone().run(Health::default(), stop.clone()));
        let (sealing, runner) = Sealing::new(SealingDeps {
            journal,
            node: net.node.clone(),
            follower,
            sender: sender.clone(),
            work: work.clone(),
            storage: storage.clone(),
            miner: MINER,
            size: SIZE,
            proofs: ProofMode::Vanilla,
            cfg,
            observer: Arc::new(Nobody),
            pieces: Arc::new(Files(dir.join("pieces"))),
        })
        .unwrap();
        tasks.spawn(runner.run(stop.clone()));
        tasks.spawn(prove(
            net.node.clone(),
            sender,
            sealing.clone(),
            stop.clone(),
        ));
        Self {
            sealing,
            storage,
            work,
            stop,
            tasks,
        }
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
        if tokio::time::timeout(PATIENCE, there).await.is_err() {
            panic!("no {state}: {:#?}", self.sealing.sector(n));
        }
    }

    /// States of a sector's log, in order, repeats removed.
    pub(crate) fn walked(&self, n: SectorNumber) -> Vec<String> {
        let log = self.sealing.sector(n).unwrap().unwrap().log;
        let mut states: Vec<_> = log.into_iter().map(|e| e.to).collect();
        states.dedup();
        states
    }

    pub(crate) const fn id(n: SectorNumber) -> SectorId {
        SectorId {
            miner: MINER,
            number: n,
        }
    }

    pub(crate) async fn stop(self) {
        let Self {
            work,
            stop,
            mut tasks,
            ..
        } = self;
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        work.end().await;
    }
}

/// The journal, once the last hub has let it go.
fn open(path: &Path) -> Journal {
    let began = Instant::now();
    loop {
        match Journal::open(path) {
            Err(JournalError::Locked { .. }) if began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// Proves every partition of every deadline with the replica that the chain has.
async fn prove(node: Node, sender: Sender, sealing: Sealing, stop: CancellationToken) {
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let mut proved = BTreeMap::new();
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return,
        }
        // A node that does not answer now does later.
        let Ok(d) = node
            .state_miner_proving_deadline(MINER.address(), HEAD)
            .await
        else {
            continue;
        };
        let early = d.current_epoch <= d.open;
        if early || proved.get(&d.index) == Some(&d.open) {
            continue;
        }
        let posted = tokio::select! {
            posted = prove_deadline(&node, &sender, &sealing, &d) => posted,
            () = stop.cancelled() => return,
        };
        match posted {
            Ok(()) => {
                proved.insert(d.index, d.open);
            }
            Err(e) => tracing::warn!("deadline {}: {e}", d.index),
        }
    }
}

async fn prove_deadline(
    node: &Node,
    sender: &Sender,
    sealing: &Sealing,
    d: &DeadlineInfo,
) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let miner = MINER.address();
    let partitions = node.state_miner_partitions(miner, d.index, HEAD).await;
    let challenge = node
        .state_get_randomness_from_beacon(
            Dst::WindowedPoStChallengeSeed as i64,
            d.challenge,
            &address_entropy(&miner),
            HEAD,
        )
        .await
        .map_err(|e| text(&e))?;
    let commit = node
        .state_get_randomness_from_tickets(Dst::PoStChainCommit as i64, d.open, &[], HEAD)
        .await
        .map_err(|e| text(&e))?;
    for (i, p) in (0u64..).zip(partitions.map_err(|e| text(&e))?) {
        let Some(first) = p.live_sectors.first() else {
            continue;
        };
        // Ended sectors are stood in for by the first good one, as the actor does.
        let mut sectors = Vec::new();
        for n in p.all_sectors.iter() {
            let n = SectorNumber(if p.live_sectors.get(n) { n } else { first });
            let info = node.state_sector_get_info(miner, n, HEAD).await;
            let info = info.map_err(|e| text(&e))?.ok_or("a live sector is gone")?;
            let comm_r = Commitment::from_sealed_cid(&info.sealed_cid).unwrap();
            let files = sealing.replica(n, &comm_r);
            sectors.push(PostSector {
                number: n,
                comm_r,
                sealed: files.sealed,
                cache: files.cache,
            });
        }
        let challenge = post_randomness(challenge);
        let made = tokio::task::spawn_blocking(move || {
            Vanilla.window_post(MINER, SIZE, &challenge, &sectors)
        });
        let WindowPost::Proved(proof) = made.await.unwrap().map_err(|e| text(&e))? else {
            return Err("a replica is bad".into());
        };
        let params = SubmitWindowedPoStParams {
            deadline: d.index,
            partitions: vec![PoStPartition {
                index: i,
                skipped: BitField::new(),
            }],
            proofs: vec![PoStProof {
                post_proof: RegisteredPoStProof::from(lotus_proofs::window_post_proof_type(SIZE)),
                proof_bytes: proof,
            }],
            chain_commit_epoch: d.open.0,
            chain_commit_rand: Randomness(commit.to_vec()),
        };
        let request = SendRequest {
            key: format!("post/{}/{}/{i}", d.index, d.open),
            from: Payer::Miner(miner),
            to: miner,
            method: SUBMIT_WINDOWED_POST,
            params: encode(&params),
            value: TokenAmount::default(),
            kind: MessageKind::Post,
            max_fee: None,
        };
        sender.send(request).await.map_err(|e| text(&e))?;
    }
    Ok(())
}
