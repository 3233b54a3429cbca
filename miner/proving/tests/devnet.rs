//! A miner's life on a real chain that verifies every proof, with proofs from worker processes:
//! this test binary is its own worker, so it has no harness.

#![expect(
    clippy::unwrap_used,
    reason = "clippy sees a test only where it has the harness"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use lotus_actors::miner::{
    self, CompactCommD, PieceActivationManifest, PreCommitSectorBatchParams2,
    ProveCommitSectors3Params, SectorActivationManifest, SectorPreCommitInfo,
};
use lotus_actors::{Dst, RawBytes, address_entropy, encode};
use lotus_chain::Follower;
use lotus_devnet::rpc::{Perm, Server, Tokens};
use lotus_devnet::{Chain, ChainConfig, Policy};
use lotus_journal::{Journal, JournalError};
use lotus_messages::{MessageKind, MessagesConfig, Payer, SendRequest, Sender};
use lotus_node_client::api::TipSetKey;
use lotus_node_client::{Client, Node, NodeConfig};
use lotus_proofs::{Prover as _, SealingSector, Vanilla};
use lotus_proving::{
    Activity, Fence as _, Leave, LocalFence, Mining, MiningConfig, MiningDeps, Outcome,
    ProvingConfig, ProvingDeps, RoundOutcome, Rounds, SectorFiles, WindowPost,
};
use lotus_runtime::{CancellationToken, Health};
use lotus_types::{
    ActorId, Commitment, Epoch, Generation, SectorId, SectorNumber, SectorSize, TokenAmount,
};
use lotus_workers::{Pool, PoolConfig, WorkerArgs, WorkersConfig, worker_main};
use tokio::task::JoinSet;

const MINER: ActorId = ActorId(1000);
const SIZE: SectorSize = SectorSize::S2KiB;
const LIMIT: Duration = Duration::from_secs(180);
const HEAD: &TipSetKey = &TipSetKey::HEAD;

#[derive(Parser)]
enum Cli {
    /// What the pool starts.
    Worker(WorkerArgs),
}

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("worker") => {
            let Cli::Worker(args) = Cli::parse();
            worker_main(&args).map_or_else(|e| e.kind.exit_code(), |()| ExitCode::SUCCESS)
        }
        Some("--list") => ExitCode::SUCCESS,
        _ => {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(a_miner_proves_mines_and_recovers());
            println!("test a_miner_proves_mines_and_recovers ... ok");
            ExitCode::SUCCESS
        }
    }
}

/// Replicas in one directory per sector.
struct Files(PathBuf);

impl SectorFiles for Files {
    fn sealed(&self, sector: SectorNumber, _: &Commitment) -> PathBuf {
        self.0.join(sector.to_string()).join("sealed")
    }
    fn cache(&self, sector: SectorNumber, _: &Commitment) -> PathBuf {
        self.0.join(sector.to_string()).join("cache")
    }
}

/// The chain and its RPC.
struct Devnet {
    chain: Chain,
    node: Node,
    _tasks: JoinSet<()>,
}

impl Devnet {
    async fn start(repo: &Path) -> Self {
        let policy = Policy::fast()
            .with_deadlines(3, 12)
            .with_block_time_ms(150)
            .with_seed_delay(3);
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

/// A write that was under way when the hub before was stopped ends by itself.
fn open(path: &Path) -> Journal {
    let end = std::time::Instant::now() + LIMIT;
    loop {
        match Journal::open(path) {
            Err(JournalError::Locked { .. }) if std::time::Instant::now() < end => {
                std::thread::yield_now();
            }
            opened => return opened.unwrap(),
        }
    }
}

/// The parts of a hub that prove and mine.
struct Hub {
    follower: Follower,
    sender: Sender,
    post: WindowPost,
    fence: LocalFence,
    rounds: Rounds,
    leave: Leave,
    health: Health,
    activity: Activity,
    stop: CancellationToken,
    tasks: JoinSet<()>,
    node: Node,
}

impl Hub {
    fn start(dir: &Path, journal: &str, node: &Node, generation: u64) -> Self {
        let journal = open(&dir.join(journal));
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let (follower, runner) = Follower::new(node.clone());
        tasks.spawn(runner.run(stop.clone()));
        let cfg = MessagesConfig {
            confidence_epochs: 1,
            ..MessagesConfig::default()
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
        let pool_stop = stop.clone();
        tasks.spawn(async move { runner.run(pool_stop).await.unwrap() });
        let (health, activity) = (Health::default(), Activity::default());
        let files = Arc::new(Files(dir.join("sectors")));
        let fence = LocalFence::new(journal.clone());
        let rounds = Rounds::new(journal.clone());
        let leave = Leave::new(journal.clone());
        let post = WindowPost::new(ProvingDeps {
            journal,
            node: node.clone(),
            follower: follower.clone(),
            sender: sender.clone(),
            pool: pool.clone(),
            files: files.clone(),
            miner: MINER,
            size: SIZE,
            cfg: ProvingConfig::default(),
            health: health.clone(),
            activity: activity.clone(),
        });
        tasks.spawn(post.clone().run(stop.clone()));
        let mining = Mining::new(MiningDeps {
            node: node.clone(),
            follower: follower.clone(),
            pool,
            files,
            fence: Arc::new(fence.clone()),
            rounds: rounds.clone(),
            leave: leave.clone(),
            miner: MINER,
            size: SIZE,
            cfg: MiningConfig::default(),
            health: health.clone(),
            activity: activity.clone(),
        });
        tasks.spawn(mining.run(stop.clone()));
        Self {
            follower,
            sender,
            post,
            fence,
            rounds,
            leave,
            health,
            activity,
            stop,
            tasks,
            node: node.clone(),
        }
    }

    async fn end(mut self) {
        self.stop.cancel();
        while let Some(part) = self.tasks.join_next().await {
            part.unwrap();
        }
    }

    async fn send(&self, key: String, method: u64, params: Vec<u8>, value: TokenAmount) {
        let address = MINER.address();
        let request = SendRequest {
            key: key.clone(),
            from: Payer::Miner(address),
            to: address,
            method,
            params,
            value,
            kind: MessageKind::Other,
            max_fee: None,
        };
        self.sender.send(request).await.unwrap();
        let landed = self.sender.wait(&key, 1).await.unwrap();
        assert_eq!(landed.exit_code, 0, "{key}");
    }

    /// Seals a sector and brings it on chain, as the sealing pipeline does.
    async fn onboard(&self, dir: &Path, number: u64) {
        let (node, address) = (&self.node, MINER.address());
        let entropy = address_entropy(&address);
        let head = self.follower.wait_height(Epoch(5)).await.unwrap();
        let ticket_epoch = Epoch(head.height.0 - 2);
        let ticket = node
            .state_get_randomness_from_tickets(
                Dst::SealRandomness as i64,
                ticket_epoch,
                &entropy,
                HEAD,
            )
            .await
            .unwrap();
        let files = Files(dir.join("sectors"));
        let n = SectorNumber(number);
        let (sealed, cache) = (
            files.sealed(n, &Commitment([0; 32])),
            files.cache(n, &Commitment([0; 32])),
        );
        std::fs::create_dir_all(&cache).unwrap();
        let unsealed = cache.with_file_name("unsealed");
        let data = vec![u8::try_from(number).unwrap(); 1016];
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
        let method = miner::PRE_COMMIT_SECTOR_BATCH2;
        let fil = TokenAmount::from_whole(1);
        self.send(format!("pre/{number}"), method, params, fil)
            .await;
        let on_chain = node.state_sector_precommit_info(address, n, HEAD).await;
        let seed_epoch = on_chain.unwrap().unwrap().pre_commit_epoch.0 + 3;
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
        let method = miner::PROVE_COMMIT_SECTORS3;
        let fil = TokenAmount::from_whole(1);
        self.send(format!("prove/{number}"), method, params, fil)
            .await;
    }

    /// Waits for something that the head brings.
    async fn until<F: Future<Output = bool>>(&self, what: &str, mut done: impl FnMut() -> F) {
        let mut heads = self.follower.head();
        let all = async {
            while !done().await {
                heads.changed().await.unwrap();
            }
        };
        if tokio::time::timeout(LIMIT, all).await.is_err() {
            panic!(
                "no {what} in {LIMIT:?}; health {:?}, outcomes {:?}, busy {:?}",
                self.health.components(),
                self.post.outcomes(),
                self.activity.busy(),
            );
        }
    }

    /// Waits until it refuses to mine because of a block that its log lacks.
    async fn refuses(&self) {
        self.until("refusal to mine", || {
            let mining = self.health.components().remove("mining");
            let refused = |c: lotus_runtime::Component| {
                !c.ready && c.detail.contains("not in the mined-block log")
            };
            std::future::ready(mining.is_some_and(refused))
        })
        .await;
        assert!(self.fence.last().await.unwrap().is_none());
    }

    async fn faults(&self) -> Vec<u64> {
        let faults = self
            .node
            .state_miner_faults(MINER.address(), HEAD)
            .await
            .unwrap();
        faults.iter().collect()
    }

    fn proved(&self) -> usize {
        let all = self.post.outcomes().unwrap();
        let proved = |o: &Outcome| matches!(o, Outcome::Proved { .. });
        all.iter().filter(|r| proved(&r.outcome)).count()
    }

    /// Waits until the chain has a block of this miner above a height; gives its height.
    async fn mined_above(&self, above: Epoch) -> Epoch {
        let mut found = Epoch(-1);
        let mut heads = self.follower.head();
        self.until("own block", || {
            let head = heads.borrow_and_update().clone();
            let own = head
                .filter(|h| h.height > above)
                .filter(|h| h.blocks.iter().any(|b| b.miner == MINER.address()));
            if let Some(h) = &own {
                found = h.height;
            }
            std::future::ready(own.is_some())
        })
        .await;
        found
    }
}

/// Mining of the same actor from another repo of this host.
async fn refused_beside(dir: &Path, node: &Node) {
    let journal = Journal::open(&dir.join("beside")).unwrap();
    let (follower, runner) = Follower::new(node.clone());
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(runner.run(stop.clone()));
    let (pool, _never_runs) = Pool::new(PoolConfig {
        settings: WorkersConfig::default(),
        run_dir: dir.join("beside-run"),
        log_dir: dir.join("beside-log"),
        exe: std::env::current_exe().unwrap(),
        authority: dir.join("worker-ca"),
        telemetry: Default::default(),
        proofs: Default::default(),
        generation: Generation(1),
    });
    let health = Health::default();
    let fence = LocalFence::new(journal.clone());
    let mining = Mining::new(MiningDeps {
        node: node.clone(),
        follower,
        pool,
        files: Arc::new(Files(dir.join("sectors"))),
        fence: Arc::new(fence.clone()),
        rounds: Rounds::new(journal.clone()),
        leave: Leave::new(journal),
        miner: MINER,
        size: SIZE,
        cfg: MiningConfig::default(),
        health: health.clone(),
        activity: Activity::default(),
    });
    tasks.spawn(mining.run(stop.clone()));
    let own = format!("(pid {})", std::process::id());
    let mut parts = health.watch();
    let refused = parts.wait_for(|parts| {
        let mining = parts.get("mining");
        mining.is_some_and(|c| c.detail.contains("another hub") && c.detail.contains(&own))
    });
    let refused = tokio::time::timeout(LIMIT, refused).await;
    assert!(
        refused.is_ok_and(|r| r.is_ok()),
        "{:?}",
        health.components()
    );
    assert!(fence.last().await.unwrap().is_none());
    stop.cancel();
    while let Some(part) = tasks.join_next().await {
        part.unwrap();
    }
}

async fn a_miner_proves_mines_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let net = Devnet::start(&dir.join("devnet")).await;
    let hub = Hub::start(dir, "journal", &net.node, 1);
    hub.onboard(dir, 0).await;
    hub.onboard(dir, 1).await;

    // Proven: the chain verifies every proof, and disputes a wrong one.
    hub.until("proven deadline", || std::future::ready(hub.proved() > 0))
        .await;
    hub.until("power", || async {
        let power = hub
            .node
            .state_miner_power(MINER.address(), HEAD)
            .await
            .unwrap();
        power.miner_power.raw_byte_power == (2 * SIZE.bytes()).into()
    })
    .await;
    assert!(hub.faults().await.is_empty());

    // Mined: the log has what the chain has.
    let first = hub.mined_above(Epoch(0)).await;
    let logged = hub
        .fence
        .at(first)
        .await
        .unwrap()
        .and_then(|m| m.cid)
        .unwrap();
    let on_chain = net.chain.chain_get_tipset_by_height(first, HEAD).unwrap();
    assert!(on_chain.cids.iter().any(|c| c.to_string() == logged));

    // Before that, as it did not make these sectors itself and its log was empty, it gave up two
    // rounds to see whether another miner uses them.
    let given = hub.rounds.list(1000).unwrap().into_iter().filter(
        |r| matches!(&r.outcome, RoundOutcome::NoBlock { why } if why.contains("log is empty")),
    );
    let given: Vec<Epoch> = given.map(|r| r.height).collect();
    assert!(given.len() >= 2, "{given:?}");
    assert!(given.iter().all(|h| *h < first), "{given:?}, {first}");

    // And the log of rounds says so, with where the time went.
    let mut round = None;
    hub.until("logged round", || {
        let rounds = hub.rounds.list(1000).unwrap();
        round = rounds.into_iter().find(|r| r.height == first);
        let over = round
            .as_ref()
            .is_some_and(|r| r.outcome != RoundOutcome::Open);
        std::future::ready(over)
    })
    .await;
    let round = round.unwrap();
    assert_eq!(round.outcome, RoundOutcome::Mined { cid: logged });
    assert!(round.wins.is_some_and(|w| w > 0), "{round:?}");
    assert!(round.steps.iter().any(|s| s.step == "fence"), "{round:?}");
    refused_beside(dir, &net.node).await;

    // Operators can try all of it.
    let place = net
        .node
        .state_sector_partition(MINER.address(), SectorNumber(1), HEAD)
        .await
        .unwrap();
    let checked = hub.post.check(place.deadline, true).await.unwrap();
    assert!(!checked.is_empty() && checked.iter().all(|p| p.bad.is_empty()));
    let computed = hub.post.compute(place.deadline).await.unwrap();
    assert!(
        computed
            .iter()
            .all(|c| c.error.is_none() && c.proof_bytes > 0)
    );
    let recover = hub.post.recover(&BTreeSet::from([1]), true).await.unwrap();
    assert!(
        recover[0].refused.is_some(),
        "it is not faulty: {recover:?}"
    );

    // A replica that is overwritten throughout is declared or skipped; the other stays proven.
    let sealed = Files(dir.join("sectors")).sealed(SectorNumber(1), &Commitment([0; 32]));
    let good = std::fs::read(&sealed).unwrap();
    std::fs::write(&sealed, vec![0x5a; good.len()]).unwrap();
    hub.until("faulty sector", || async { hub.faults().await == [1u64] })
        .await;
    let checked = hub.post.check(place.deadline, false).await.unwrap();
    assert!(
        checked
            .iter()
            .any(|p| p.bad.iter().any(|b| b.sector == 1 && b.faulty)),
        "a faulty sector is checked by a proof: {checked:?}"
    );
    let before = hub.proved();
    hub.until("deadline proven without it", || {
        std::future::ready(hub.proved() > before)
    })
    .await;
    assert_eq!(hub.faults().await, [1u64]);

    // Readable again, it is declared recovered and proven.
    std::fs::write(&sealed, &good).unwrap();
    hub.until("recovery", || async { hub.faults().await.is_empty() })
        .await;

    // A restart goes on where it stopped.
    hub.end().await;
    let hub = Hub::start(dir, "journal", &net.node, 2);
    let before = hub.proved();
    hub.until("proven deadline after the restart", || {
        std::future::ready(hub.proved() > before)
    })
    .await;
    let head = hub.follower.wait_height(Epoch(0)).await.unwrap();
    hub.mined_above(head.height).await;
    assert!(hub.faults().await.is_empty());
    hub.end().await;

    // A hub whose log lacks the miner's blocks refuses to mine, and says what to do.
    let restored = Journal::open(&dir.join("restored")).unwrap();
    LocalFence::new(restored)
        .complete_since(Epoch(1))
        .await
        .unwrap();
    let hub = Hub::start(dir, "restored", &net.node, 3);
    hub.refuses().await;
    hub.end().await;

    // So does one in a fresh repo: another miner may be alive.
    let hub = Hub::start(dir, "fresh", &net.node, 4);
    hub.refuses().await;
    // Until an operator says that there is none.
    let head = hub.follower.wait_height(Epoch(0)).await.unwrap();
    let word = hub.leave.allow(head.height, "the other hub is gone", 1);
    assert!(word.unwrap().is_some());
    hub.mined_above(head.height).await;
    hub.until("health", || {
        std::future::ready(hub.health.components()["mining"].ready)
    })
    .await;
    hub.end().await;
}
