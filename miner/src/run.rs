//! `lotus-miner run`: starts every part of the hub, watches over them, stops them.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use hub_proto::v1::HeadChanged;
use lotus_api::LotusApi;
use lotus_audit::Audit;
use lotus_chain::Follower;
use lotus_dataplane::FdServer;
use lotus_identity::Authority;
use lotus_journal::Journal;
use lotus_messages::Sender;
use lotus_node_client::api::TipSetKey;
use lotus_node_client::{Client, FullNode as _, Node, NodeError};
use lotus_proofs::params::{self, Circuit};
use lotus_proving::{
    Activity, Leave, LocalFence, Mining, MiningDeps, ProvingDeps, Rounds, WindowPost,
};
use lotus_runtime::admin::Admin;
use lotus_runtime::{Fault, Health, notify, telemetry};
use lotus_sealing::{Sealing, SealingDeps, Storage};
use lotus_types::{Address, Kind, SectorSize};
use lotus_workers::{Attached, Class, Pool, PoolConfig, WorkersConfig};
use tokio::sync::watch;
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::api::{Access, Api, Listeners, Recorder};
use crate::backup;
use crate::capacity::Capacity;
use crate::config::MinerConfig;
use crate::control::Control;
use crate::control_storage::StorageControl;
use crate::events::EventLog;
use crate::handover::Handover;
use crate::lotus::LotusHub;
use crate::network;
use crate::operations::Operations;
use crate::owner::Published;
use crate::pieces::{PieceRunner, Pieces, Placer, sweep};
use crate::repo::Repo;
use crate::sealer::{Files, Replicas, Sealer, SectorObserver};
use crate::unsealed::Unsealed;

/// How long the parts may take to stop.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How long the first question to the node may take before the hub starts without an answer.
const CHECK_LIMIT: Duration = Duration::from_secs(10);
/// How often the hub looks whether its journal is its own still.
const JOURNAL_LOOK: Duration = Duration::from_secs(1);
/// Components without which the hub is of no use. Mining and proving report on their own.
const NEEDED: [&str; 3] = ["api", "node", "workers"];

/// The parts of the hub that run, by name. One that ends before the stop ends the hub.
struct Parts {
    tasks: JoinSet<Result<(), Fault>>,
    names: HashMap<Id, &'static str>,
}

impl Parts {
    fn spawn(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<(), Fault>> + Send + 'static,
    ) {
        let id = self.tasks.spawn(part).id();
        self.names.insert(id, name);
    }

    fn spawn_endless(
        &mut self,
        name: &'static str,
        part: impl Future<Output = ()> + Send + 'static,
    ) {
        self.spawn(name, async move {
            part.await;
            Ok(())
        });
    }

    /// The next end of a part, as the fault that it is while the hub should run.
    async fn next(&mut self) -> Option<(&'static str, Result<(), Fault>)> {
        let ended = self.tasks.join_next_with_id().await?;
        let (id, result) = match ended {
            Ok((id, result)) => (id, result),
            Err(e) => {
                let why = Fault::new(
                    Kind::Fatal,
                    format!("panicked: {e}"),
                    "report this with the log",
                );
                (e.id(), Err(why))
            }
        };
        Some((self.names.remove(&id).unwrap_or("?"), result))
    }
}

/// Runs the hub on `repo` until `stop`.
pub async fn run(
    repo: Repo,
    cfg: MinerConfig,
    stop: CancellationToken,
    #[cfg(feature = "all-in-one")] all_in_one: Option<crate::all_in_one::AllInOne>,
) -> Result<(), Fault> {
    let open = repo.open()?;
    let _telemetry = telemetry::init("lotus-miner", &cfg.telemetry)?;
    let (repo, journal, generation) = (open.repo.clone(), open.journal.clone(), open.generation);
    let (actor, size) = (cfg.actor()?, cfg.sector_size()?);
    let proofs = cfg.proofs.mode;
    params::require(Circuit::of(proofs), size).map_err(|e| network::from_proofs(&e))?;
    tracing::info!(%actor, %size, %proofs, %generation, repo = %repo.root().display(), "hub starts");

    let health = Health::default();
    for part in NEEDED {
        health.set(part, Err("starting".into()));
    }
    let admin = Admin::bind(&cfg.admin, health.clone(), &repo.run(), "admin").await?;
    let listeners = Listeners::bind(&cfg.api, &repo.hub_socket(), &repo.run()).await?;
    let lotus_api = LotusApi::bind(&cfg.lotus_api, repo.root(), &repo.run()).await?;

    let node = Client::connect(&cfg.node).map_err(|e| from_node(&e))?;
    tracing::info!(at = node.endpoint(), by = %cfg.node.named_by(), "full node");
    if let Some(at) = node.wallet() {
        tracing::info!(
            at,
            "remote wallet: messages, elections and the ask are signed there"
        );
    }
    if cfg.node.is_overridden() {
        tracing::warn!("FULLNODE_API_INFO overrides the node in config.toml");
    }
    check_node(&node, actor.address(), size).await?;
    let checked = network::check(&node, proofs, size, CHECK_LIMIT).await?;
    let unchecked = (!checked).then(|| node.clone());
    let node: Node = node;
    let (follower, follow) = Follower::new(node.clone());
    let (sender, send) = Sender::new(
        journal.clone(),
        node.clone(),
        &follower,
        cfg.messages.clone(),
    );
    #[cfg_attr(
        not(feature = "all-in-one"),
        expect(unused_mut, reason = "changed by what this build does not have")
    )]
    let mut pool_config = PoolConfig {
        settings: cfg.workers.clone(),
        run_dir: repo.run(),
        log_dir: repo.logs(),
        exe: std::env::current_exe()?,
        authority: repo.authority(),
        telemetry: cfg.telemetry.clone(),
        proofs,
        generation,
    };
    #[cfg(feature = "all-in-one")]
    let all_in_one = all_in_one.map(|all| {
        let threads = crate::all_in_one::threads_for_processes(&mut pool_config);
        (all, threads)
    });
    let (pool, work) = Pool::new(pool_config);

    let events =
        EventLog::open(journal.clone(), generation, cfg.events.keep).map_err(journal_fault)?;
    let audit = Audit::open(&repo.audit(), &cfg.audit)
        .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
    let recorder = Recorder::new(audit, generation, cfg.api.call());
    let pieces = Pieces::open(
        journal.clone(),
        events.clone(),
        repo.pieces(),
        cfg.pieces.clone(),
    )
    .map_err(journal_fault)?;
    let storage = Storage::open(journal.clone(), &repo.storage(), size, cfg.storage.clone())
        .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
    let (sealing, seal) = Sealing::new(SealingDeps {
        journal: journal.clone(),
        node: node.clone(),
        follower: follower.clone(),
        sender: sender.clone(),
        work: Arc::new(pool.clone()),
        storage: storage.clone(),
        miner: actor,
        size,
        proofs,
        cfg: cfg.sealing.clone(),
        observer: Arc::new(SectorObserver {
            pieces: pieces.clone(),
            events: events.clone(),
        }),
        pieces: Arc::new(Files(pieces.clone())),
    })
    .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
    let files = Arc::new(Replicas(sealing.clone()));
    let activity = Activity::default();
    let window_post = WindowPost::new(ProvingDeps {
        journal: journal.clone(),
        node: node.clone(),
        follower: follower.clone(),
        sender: sender.clone(),
        pool: pool.clone(),
        files: files.clone(),
        miner: actor,
        size,
        cfg: cfg.proving.clone(),
        health: health.clone(),
        activity: activity.clone(),
    });
    let leave = Leave::new(journal.clone());
    let mining = Mining::new(MiningDeps {
        node: node.clone(),
        follower: follower.clone(),
        pool: pool.clone(),
        files,
        fence: Arc::new(LocalFence::new(journal.clone())),
        rounds: Rounds::new(journal.clone()),
        leave: leave.clone(),
        miner: actor,
        size,
        cfg: cfg.mining.clone(),
        health: health.clone(),
        activity: activity.clone(),
    });
    let sealer = Arc::new(Sealer {
        sealing: sealing.clone(),
        pool: pool.clone(),
        storage: storage.clone(),
        miner: actor,
        size,
        restart: cfg.restart.clone(),
        wish: Mutex::default(),
        activity,
        follower: follower.clone(),
        block_delay: Arc::new(OnceLock::new()),
    });
    let (unsealed, unseal) = Unsealed::new(pieces.clone(), generation, sealer.clone());
    let height = watch::Sender::new(0);
    let placer: Arc<dyn Placer> = sealer.clone();
    let (raw_copies, placed, heights) = (pieces.clone(), placer.clone(), height.subscribe());
    let piece_runner = PieceRunner::new(pieces.clone(), placer.clone(), height.subscribe())?;
    let capacity = Capacity::new(pieces.clone(), repo.pieces(), &cfg.pieces, size, generation);
    let capacity = Arc::new(capacity);
    let handover = Handover::new(pieces.clone(), capacity.clone());
    let api = Api {
        actor,
        sector_size: size,
        generation,
        data_socket: repo.data_socket(),
        pieces,
        placer,
        capacity,
        unsealed: unsealed.clone(),
        events: events.clone(),
        sectors: sealer.clone(),
        safety: sealer.clone(),
        node: node.clone(),
        sender: sender.clone(),
        confidence: cfg.messages.confidence_epochs,
        published: Published::new(journal.clone()),
        access: Access::new(
            Arc::new(Authority::open(&repo.authority())?),
            generation,
            cfg.api.calls_per_second,
        ),
        recorder: recorder.clone(),
        stop: stop.clone(),
    };
    let data_socket = FdServer::bind(&repo.data_socket(), unsealed.clone())
        .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;

    let mut parts = Parts {
        tasks: JoinSet::new(),
        names: HashMap::new(),
    };
    parts.spawn("admin", admin.serve(stop.clone()));
    if let Some(node) = unchecked {
        let check = network::check_when_there(node, proofs, size, stop.clone());
        parts.spawn("network", check);
    }
    parts.spawn_endless("follower", follow.run(stop.clone()));
    parts.spawn_endless("sender", send.run(stop.clone()));
    let work = work.run(stop.clone());
    parts.spawn("workers", async move { work.await.map_err(Fault::from) });
    parts.spawn_endless("sealing", seal.run(stop.clone()));
    let look_after = storage.clone().run(health.clone(), stop.clone());
    parts.spawn_endless("storage", look_after);
    parts.spawn_endless("window_post", window_post.clone().run(stop.clone()));
    let quiet = backup::quiet_after_restore(journal.clone(), follower.head(), health.clone());
    let (mining, end) = (mining.run(stop.clone()), stop.clone());
    parts.spawn_endless("mining", async move {
        tokio::select! {
            () = end.cancelled() => return,
            () = quiet => {}
        }
        mining.await;
    });
    parts.spawn_endless("events", events.clone().run(stop.clone()));
    parts.spawn("pieces", piece_runner.run(stop.clone()));
    parts.spawn_endless(
        "unsealed_copies",
        sweep(raw_copies, placed, heights, stop.clone()),
    );
    parts.spawn_endless("unsealing", unseal.run(stop.clone()));
    parts.spawn_endless("data_socket", data_socket.run(stop.clone()));
    if let Some(lotus_api) = lotus_api {
        let hub = LotusHub {
            sealer: sealer.clone(),
            node: node.clone(),
            addresses: cfg.messages.addresses.clone(),
            unsealed,
            handover,
        };
        parts.spawn("lotus_api", lotus_api.serve(Arc::new(hub), stop.clone()));
    }
    let kept = journal.clone();
    let control = Control {
        sealing,
        window_post,
        rounds: Rounds::new(journal.clone()),
        leave,
        follower: follower.clone(),
        health: health.clone(),
        sender,
        storage: StorageControl {
            storage,
            miner: actor,
        },
        operations: Operations {
            pool: pool.clone(),
            journal,
            repo: repo.clone(),
        },
    };
    parts.spawn("journal", watch_journal(kept, stop.clone()));
    let (socket, end) = (repo.control_socket(), stop.clone());
    parts.spawn("control", async move {
        control.serve(&socket, recorder, end).await
    });
    parts.spawn_endless(
        "heads",
        tell_heads(follower.clone(), events, height, stop.clone()),
    );
    parts.spawn_endless(
        "node",
        watch_node(follower, node, sealer, health.clone(), stop.clone()),
    );
    let attached = pool.attached();
    parts.spawn_endless(
        "attached",
        watch_workers(attached, cfg.workers.clone(), health.clone(), stop.clone()),
    );
    parts.spawn_endless("ready", tell_ready(health.clone(), stop.clone()));
    #[cfg(feature = "all-in-one")]
    if let Some((all, threads)) = all_in_one {
        let beside = crate::all_in_one::run(all, threads, stop.clone());
        parts.spawn("all_in_one", beside);
    }
    health.set("api", Ok(listeners.addr().to_string()));
    let (api_cfg, end) = (cfg.api.clone(), stop.clone());
    parts.spawn(
        "api",
        async move { listeners.serve(&api, &api_cfg, end).await },
    );

    supervise(parts, stop).await
}

/// Waits for the stop, or for the first part that ends without it, and then for all parts.
async fn supervise(mut parts: Parts, stop: CancellationToken) -> Result<(), Fault> {
    let cause = tokio::select! {
        // First, because parts that end on the stop may be seen together with it.
        biased;
        () = stop.cancelled() => Ok(()),
        Some((name, ended)) = parts.next() => Err(match ended {
            Err(fault) => Fault::new(fault.kind, format!("{name}: {fault}"), fault.fix),
            Ok(()) => Fault::new(Kind::Fatal, format!("{name} ended by itself"), "report this with the log"),
        }),
    };
    if let Err(fault) = &cause {
        tracing::error!(fix = fault.fix, "the hub stops: {fault}");
    }
    stop.cancel();
    let rest = async {
        while let Some((name, ended)) = parts.next().await {
            match ended {
                Ok(()) => tracing::debug!("{name} stopped"),
                Err(fault) => tracing::warn!("{name} stopped badly: {fault}"),
            }
        }
    };
    if tokio::time::timeout(STOP_LIMIT, rest).await.is_err() {
        let mut late: Vec<&str> = parts.names.values().copied().collect();
        late.sort_unstable();
        tracing::warn!(
            ?late,
            "not stopped in {STOP_LIMIT:?}; everything is journaled"
        );
        parts.tasks.abort_all();
    }
    tracing::info!("hub stopped");
    cause
}

/// Refuses to start on what waiting cannot mend: a wrong token, an actor that is not ours.
async fn check_node(node: &Client, actor: Address, size: SectorSize) -> Result<(), Fault> {
    let head = TipSetKey::default();
    let answer = tokio::time::timeout(CHECK_LIMIT, node.state_miner_info(actor, &head)).await;
    match answer {
        Ok(Ok(info)) if info.sector_size != size.bytes() => Err(Fault::new(
            Kind::Config,
            format!(
                "{actor} has sectors of {} bytes, miner.sector_size is {size}",
                info.sector_size
            ),
            "correct miner.sector_size, or connect to the right chain",
        )),
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) if e.kind() == Kind::Config => Err(from_node(&e)),
        Ok(Err(e)) => {
            tracing::warn!("the full node does not tell about {actor} yet: {e}; going on");
            Ok(())
        }
        Err(_) => {
            tracing::warn!("no answer from the full node within {CHECK_LIMIT:?}; going on");
            Ok(())
        }
    }
}

/// Tells spokes and hand-offs every new head.
async fn tell_heads(
    follower: Follower,
    events: EventLog,
    height: watch::Sender<i64>,
    stop: CancellationToken,
) {
    let mut head = follower.head();
    loop {
        let now = head.borrow_and_update().clone();
        if let Some(tipset) = now {
            height.send_replace(tipset.height.0);
            #[expect(clippy::cast_precision_loss, reason = "a height is far below 2^52")]
            metrics::gauge!("lotus_miner_chain_height").set(tipset.height.0 as f64);
            events.set_head(HeadChanged {
                height: tipset.height.0,
                tipset: tipset.cids.iter().map(ToString::to_string).collect(),
            });
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = head.changed() => if changed.is_err() {
                // The follower has ended, which ends the hub.
                stop.cancelled().await;
                return;
            }
        }
    }
}

/// Ends this hub when its journal is taken from it: another hub may run on the repo by now.
async fn watch_journal(journal: Journal, stop: CancellationToken) -> Result<(), Fault> {
    loop {
        journal.check().map_err(journal_fault)?;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(JOURNAL_LOOK) => {}
        }
    }
}

/// Keeps the health component `node`.
async fn watch_node(
    follower: Follower,
    node: Node,
    sealer: Arc<Sealer>,
    health: Health,
    stop: CancellationToken,
) {
    let mut connection = follower.connection();
    loop {
        let state = match &*connection.borrow_and_update() {
            Ok(()) => Ok(String::new()),
            Err(e) => Err(format!("{e} ({})", e.fix())),
        };
        let connected = state.is_ok();
        health.set("node", state);
        if connected && sealer.block_delay.get().is_none() {
            match node.state_get_network_params().await {
                Ok(params) => drop(sealer.block_delay.set(params.block_delay())),
                Err(e) => tracing::debug!("network parameters: {e}"),
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = connection.changed() => if changed.is_err() {
                stop.cancelled().await;
                return;
            }
        }
    }
}

/// Keeps the health component `workers`: each class that is configured has a worker.
async fn watch_workers(
    mut attached: watch::Receiver<Attached>,
    cfg: WorkersConfig,
    health: Health,
    stop: CancellationToken,
) {
    loop {
        let now = *attached.borrow_and_update();
        let wanted = [
            (Class::Seal, cfg.seal_workers),
            (Class::Prove, cfg.prove_workers),
        ];
        let missing: Vec<&str> = wanted
            .iter()
            .filter(|(class, n)| *n > 0 && now.of(*class) == 0)
            .map(|(class, _)| class.as_str())
            .collect();
        health.set(
            "workers",
            if missing.is_empty() {
                Ok(format!("{} seal, {} prove", now.seal, now.prove))
            } else {
                Err(format!(
                    "no {} worker is attached; see logs/worker-*.log",
                    missing.join(" and no ")
                ))
            },
        );
        tokio::select! {
            () = stop.cancelled() => return,
            changed = attached.changed() => if changed.is_err() {
                stop.cancelled().await;
                return;
            }
        }
    }
}

/// Tells whoever started the hub when it became ready for the first time.
async fn tell_ready(health: Health, stop: CancellationToken) {
    let mut parts = health.watch();
    let ready = parts.wait_for(|parts| {
        NEEDED
            .iter()
            .all(|name| parts.get(*name).is_some_and(|c| c.ready))
    });
    tokio::select! {
        () = stop.cancelled() => return,
        _ = ready => {
            tracing::info!("hub is ready");
            notify::ready();
        }
    }
    stop.cancelled().await;
}

fn journal_fault(e: lotus_journal::JournalError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

pub(crate) fn from_node(e: &NodeError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}
