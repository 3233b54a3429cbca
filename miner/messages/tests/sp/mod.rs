//! A storage provider of one sector: an embedded chain, and the parts of a hub that send and
//! prove.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lotus_actors::miner::{
    self, CompactCommD, PieceActivationManifest, PreCommitSectorBatchParams2,
    ProveCommitSectors3Params, SectorActivationManifest, SectorPreCommitInfo,
};
use lotus_actors::{Dst, RawBytes, address_entropy, encode};
use lotus_chain::Follower;
use lotus_devnet::rpc::{Perm, Server, Tokens};
use lotus_devnet::{Chain, ChainConfig, Policy};
use lotus_journal::Journal;
use lotus_messages::{MessageKind, MessagesConfig, Payer, SendRequest, Sender};
use lotus_node_client::api::TipSetKey;
use lotus_node_client::{Client, Node, NodeConfig};
use lotus_proofs::{Prover as _, SealingSector, Vanilla};
use lotus_proving::{Activity, Outcome, ProvingConfig, ProvingDeps, SectorFiles, WindowPost};
use lotus_runtime::{CancellationToken, Health};
use lotus_types::{
    ActorId, Commitment, Epoch, Generation, SectorId, SectorNumber, SectorSize, TokenAmount,
};
use lotus_workers::{Pool, PoolConfig, WorkersConfig};
use tokio::task::JoinSet;

pub(crate) const MINER: ActorId = ActorId(1000);
pub(crate) const HEAD: &TipSetKey = &TipSetKey::HEAD;
const SIZE: SectorSize = SectorSize::S2KiB;
const SEED_DELAY: i64 = 3;
const LIMIT: Duration = Duration::from_secs(180);

/// Replicas in one directory per sector.
struct Files(PathBuf);

impl Files {
    fn of(&self, sector: SectorNumber, name: &str) -> PathBuf {
        self.0.join(sector.to_string()).join(name)
    }
}

impl SectorFiles for Files {
    fn sealed(&self, sector: SectorNumber, _: &Commitment) -> PathBuf {
        self.of(sector, "sealed")
    }
    fn cache(&self, sector: SectorNumber, _: &Commitment) -> PathBuf {
        self.of(sector, "cache")
    }
}

/// The chain and its RPC.
pub(crate) struct Devnet {
    pub(crate) chain: Chain,
    pub(crate) node: Node,
    _tasks: JoinSet<()>,
}

impl Devnet {
    pub(crate) async fn start(repo: &Path) -> Self {
        Self::start_with(repo, 12).await
    }

    /// With deadlines of so many epochs.
    pub(crate) async fn start_with(repo: &Path, epochs: i64) -> Self {
        let policy = Policy::fast()
            .with_deadlines(3, epochs)
            .with_block_time_ms(200)
            .with_seed_delay(SEED_DELAY);
        let cfg = ChainConfig {
            policy,
            sector_size: SIZE,
            ..ChainConfig::default()
        };
        let chain = Chain::open(repo, cfg, Arc::new(Vanilla)).unwrap();
        let tokens = Tokens::open(repo).unwrap();
        let token = tokens.issue(&Perm::Admin.up_to());
        let any = ([127, 0, 0, 1], 0).into();
        let server = Server::bind(any, chain.clone(), tokens).await.unwrap();
        let api = format!("{token}:http://{}", server.local_addr().unwrap());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let serve = server.serve(stop.clone());
        tasks.spawn(async move { serve.await.unwrap() });
        let clock = chain.clone();
        tasks.spawn(async move { clock.run(stop).await.unwrap() });
        let node = Client::connect(&NodeConfig {
            api,
            ..NodeConfig::default()
        });
        Self {
            chain,
            node: node.unwrap(),
            _tasks: tasks,
        }
    }
}

/// The parts of a hub that send and prove.
pub(crate) struct Hub {
    pub(crate) sender: Sender,
    pub(crate) post: WindowPost,
    follower: Follower,
    health: Health,
    node: Node,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Hub {
    pub(crate) fn start(
        dir: &Path,
        name: &str,
        node: &Node,
        generation: u64,
        cfg: MessagesConfig,
    ) -> Self {
        let journal = Journal::open(&dir.join(name)).unwrap();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let (follower, runner) = Follower::new(node.clone());
        tasks.spawn(runner.run(stop.clone()));
        let cfg = MessagesConfig {
            confidence_epochs: 1,
            ..cfg
        };
        let (sender, runner) = Sender::new(journal.clone(), node.clone(), &follower, cfg);
        tasks.spawn(runner.run(stop.clone()));
        let (pool, runner) = Pool::new(PoolConfig {
            settings: WorkersConfig {
                seal_workers: 0,
                ..WorkersConfig::default()
            },
            run_dir: dir.join("run"),
            log_dir: dir.join("log"),
            exe: std::env::current_exe().unwrap(),
            authority: dir.join("worker-ca"),
            telemetry: Default::default(),
            proofs: Default::default(),
            generation: Generation(generation),
        });
        let end = stop.clone();
        tasks.spawn(async move { runner.run(end).await.unwrap() });
        let health = Health::default();
        let post = WindowPost::new(ProvingDeps {
            journal,
            node: node.clone(),
            follower: follower.clone(),
            sender: sender.clone(),
            pool,
            files: Arc::new(Files(dir.join("sectors"))),
            miner: MINER,
            size: SIZE,
            cfg: ProvingConfig::default(),
            health: health.clone(),
            activity: Activity::default(),
        });
        tasks.spawn(post.clone().run(stop.clone()));
        Self {
            sender,
            post,
            follower,
            health,
            node: node.clone(),
            stop,
            tasks,
        }
    }

    pub(crate) async fn end(mut self) {
        self.stop.cancel();
        while let Some(part) = self.tasks.join_next().await {
            part.unwrap();
        }
    }

    /// Sends what an operator would, and waits for its success.
    pub(crate) async fn send(&self, key: &str, method: u64, params: Vec<u8>, value: TokenAmount) {
        let request = SendRequest {
            key: key.into(),
            from: Payer::Miner(MINER.address()),
            to: MINER.address(),
            method,
            params,
            value,
            kind: MessageKind::Operator,
            max_fee: None,
        };
        self.sender.send(request).await.unwrap();
        let landed = self.sender.wait(key, 1).await.unwrap();
        assert_eq!(landed.exit_code, 0, "{key}");
    }

    /// Seals a sector and brings it on chain.
    pub(crate) async fn onboard(&self, dir: &Path, number: u64) {
        let (node, address) = (&self.node, MINER.address());
        let entropy = address_entropy(&address);
        let head = self.follower.wait_height(Epoch(5)).await.unwrap();
        let ticket_epoch = Epoch(head.height.0 - 2);
        let dst = Dst::SealRandomness as i64;
        let ticket = node
            .state_get_randomness_from_tickets(dst, ticket_epoch, &entropy, HEAD)
            .await
            .unwrap();
        let files = Files(dir.join("sectors"));
        let n = SectorNumber(number);
        let (sealed, cache) = (files.of(n, "sealed"), files.of(n, "cache"));
        std::fs::create_dir_all(&cache).unwrap();
        let unsealed = cache.with_file_name("unsealed");
        let data = vec![7u8; 1016];
        let piece = lotus_proofs::commp(data.as_slice()).unwrap();
        let layout = lotus_proofs::layout(SIZE, &[piece]).unwrap();
        lotus_proofs::add_pieces(&unsealed, SIZE, &layout, &mut |_| {
            Ok(Box::new(std::io::Cursor::new(data.clone())))
        })
        .unwrap();
        let sector = SealingSector {
            id: SectorId {
                miner: MINER,
                number: n,
            },
            size: SIZE,
        };
        let pc1 = Vanilla
            .pre_commit1(&sector, &ticket, &layout, &unsealed, &sealed, &cache)
            .unwrap();
        let comm = Vanilla.pre_commit2(&sector, &pc1, &sealed, &cache).unwrap();
        let info = SectorPreCommitInfo {
            seal_proof: lotus_proofs::seal_proof_type(SIZE).into(),
            sector_number: number,
            sealed_cid: comm.comm_r.sealed_cid(),
            seal_rand_epoch: ticket_epoch.0,
            deal_ids: vec![],
            expiration: head.height.0 + 280 * 2880,
            unsealed_cid: CompactCommD::of(comm.comm_d.unsealed_cid()),
        };
        let params = encode(&PreCommitSectorBatchParams2 {
            sectors: vec![info],
        });
        let fil = TokenAmount::from_whole(1);
        self.send("pre", miner::PRE_COMMIT_SECTOR_BATCH2, params, fil.clone())
            .await;
        let on_chain = node.state_sector_precommit_info(address, n, HEAD).await;
        let seed_epoch = on_chain.unwrap().unwrap().pre_commit_epoch.0 + SEED_DELAY;
        self.follower.wait_height(Epoch(seed_epoch)).await.unwrap();
        let dst = Dst::InteractiveSealChallengeSeed as i64;
        let seed = node
            .state_get_randomness_from_beacon(dst, Epoch(seed_epoch), &entropy, HEAD)
            .await
            .unwrap();
        let proof = Vanilla
            .commit(&sector, &ticket, &seed, &layout, &comm, &sealed, &cache)
            .unwrap();
        let pieces = layout.iter().map(|p| PieceActivationManifest {
            cid: p.piece.cid.cid(),
            size: lotus_actors::PaddedPieceSize(p.piece.size.get()),
            verified_allocation_key: None,
            notify: vec![],
        });
        let params = encode(&ProveCommitSectors3Params {
            sector_activations: vec![SectorActivationManifest {
                sector_number: number,
                pieces: pieces.collect(),
            }],
            sector_proofs: vec![RawBytes::new(proof)],
            aggregate_proof: RawBytes::default(),
            aggregate_proof_type: None,
            require_activation_success: true,
            require_notification_success: true,
        });
        self.send("prove", miner::PROVE_COMMIT_SECTORS3, params, fil)
            .await;
    }

    /// Waits for something that the head brings.
    pub(crate) async fn until<F: Future<Output = bool>>(
        &self,
        what: &str,
        mut done: impl FnMut() -> F,
    ) {
        let mut heads = self.follower.head();
        let all = async {
            while !done().await {
                heads.changed().await.unwrap();
            }
        };
        if tokio::time::timeout(LIMIT, all).await.is_err() {
            panic!(
                "no {what} in {LIMIT:?}; health {:?}, outcomes {:?}, money {:?}, messages {:?}",
                self.health.components(),
                self.post.outcomes(),
                self.sender.money().await,
                self.sender.list().await,
            );
        }
    }

    pub(crate) fn proved(&self) -> usize {
        let all = self.post.outcomes().unwrap();
        let proved = |o: &Outcome| matches!(o, Outcome::Proved { .. });
        all.iter().filter(|r| proved(&r.outcome)).count()
    }
}
