//! `lotus-worker run`: a worker on another host.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use hub_proto::worker::v1::workers_client::WorkersClient;
use hub_proto::worker::v1::{
    FileEntry, Heartbeat, Task as WireTask, TaskDone, TaskProgress, TaskRef, WorkerHello,
    from_worker, to_worker,
};
use hyper_util::rt::TokioIo;
use lotus_proofs::ProofMode;
use lotus_proofs::params::{self, Circuit};
use lotus_runtime::telemetry::{self, LogFormat, TelemetryConfig};
use lotus_runtime::{Backoff, Fault, signals};
use lotus_types::Kind;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tracing::Instrument as _;

use super::copy::{self, Hash, is_plain};
use super::identity::Bundle;
use super::proof::{self, Failed, Program};
use super::scratch::{Claimed, Scratch};
use super::tasks::Tasks;
use super::transfer::{Hub, Stuck};
use crate::fit::Needs;
use crate::progress::Meter;
use crate::server::{MESSAGE_LIMIT, PING_EVERY, PING_TIMEOUT};
use crate::slots::{Shape, Slot};
use crate::worker::{BEAT, CONNECT_LIMIT, Outbound, failed, lower_priority};
use crate::{Class, Output, Task};

/// Longest wait before the hub is dialed again.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A worker that was attached this long dials again at once.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);
/// Flow-control window of the connection for files, bytes.
const WINDOW: u32 = 8 << 20;

/// A worker on another host than its hub's: seals what the hub sends it, or proves what the hub has
/// opened.
///
/// 1. On the hub, set `workers.listen` in config.toml and restart it.
///
/// 2. On the hub, `lotus-miner workers join-bundle --name sealer-1 -o sealer-1.bundle`.
///
/// 3. Copy the file here, keep it secret, and `lotus-worker run --bundle sealer-1.bundle --dir
///    /fast/disk`.
///
/// The worker brings back all that it makes, and keeps nothing that the hub lacks. Install the
/// same release as the hub's. docs/workers.md has sizes and ports.
#[derive(Debug, Parser)]
#[command(name = "lotus-worker", version, max_term_width = 100)]
pub struct RemoteArgs {
    #[command(subcommand)]
    command: RemoteCommand,
}

#[derive(Debug, Subcommand)]
enum RemoteCommand {
    /// Attach to the hub and do its tasks until SIGTERM or Ctrl-C
    ///
    /// When the hub is away, it dials again and again. When it is stopped, it leaves at once and
    /// the hub gives its tasks to another worker, from their beginning.
    Run(RunArgs),
    /// Do one task that standard input has
    #[command(hide = true)]
    Task {
        #[arg(long, default_value = "info")]
        log: String,
        #[arg(long)]
        proofs: ProofMode,
    },
}

/// Arguments of `lotus-worker run`.
#[derive(Clone, Debug, clap::Args)]
struct RunArgs {
    /// The file that `lotus-miner workers join-bundle` wrote
    #[arg(long, value_name = "FILE")]
    bundle: PathBuf,
    /// Directory for copies, on a large and fast disk: 620 GiB for each task with a 32 GiB sector;
    /// prove tasks need no room. What an earlier worker left in it is deleted
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Which tasks to take: seal, or prove, the SNARKs of WindowPoSt and WinningPoSt, of sectors
    /// that workers on the hub's host open
    #[arg(long, value_enum, default_value = "seal")]
    class: Class,
    /// Tasks at the same time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: u32,
    /// Dial this host:port instead of the one in the bundle
    #[arg(long, value_name = "HOST:PORT")]
    hub: Option<String>,
    /// Directory in which graph parents are kept, about 1.75 times the sector's size
    #[arg(long, value_name = "DIR")]
    parent_cache: Option<PathBuf>,
    /// Nice value, 0 to 19. Without it, 10 for seal and 0 for prove
    #[arg(long, value_parser = clap::value_parser!(i32).range(0..=19))]
    nice: Option<i32>,
    /// Log filter, such as info
    #[arg(long, default_value = "info")]
    log: String,
    /// Write log lines as JSON
    #[arg(long)]
    log_json: bool,
}

/// The body of the program `lotus-worker`. Call it from `main`'s thread and return from `main`
/// right after.
pub fn remote_main(args: RemoteArgs) -> Result<(), Fault> {
    match args.command {
        RemoteCommand::Task { log, proofs } => proof::task_main(&log, proofs),
        RemoteCommand::Run(args) => {
            let bundle = Bundle::read(&args.bundle)?;
            require_parameters(args.class, &bundle)?;
            let runtime = tokio::runtime::Runtime::new()?;
            let result = runtime.block_on(async {
                let format = if args.log_json {
                    LogFormat::Json
                } else {
                    LogFormat::Text
                };
                let telemetry = TelemetryConfig {
                    log: args.log.clone(),
                    format,
                    ..TelemetryConfig::default()
                };
                let _telemetry = telemetry::init("lotus-worker", &telemetry)?;
                let nice = args.nice.unwrap_or(match args.class {
                    Class::Seal => 10,
                    Class::Prove => 0,
                });
                if nice != 0 {
                    lower_priority(nice);
                }
                signals::run_until_signal(|stop| run(&args, bundle, stop)).await
            });
            runtime.shutdown_background();
            result
        }
    }
}

/// Refuses to start without the parameter files of the proofs that this worker makes.
fn require_parameters(class: Class, bundle: &Bundle) -> Result<(), Fault> {
    let of_class = |c: &Circuit| Circuit::POST.contains(c) == (class == Class::Prove);
    let circuits = Circuit::of(bundle.proofs).iter().copied();
    let circuits: Vec<Circuit> = circuits.filter(of_class).collect();
    params::require(&circuits, bundle.sector_size)
        .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))
}

/// What every session and task of this process shares.
struct Cx {
    bundle: Bundle,
    class: Class,
    hub: String,
    tls: Arc<rustls::ClientConfig>,
    slots: u32,
    scratch: Arc<Scratch>,
    program: Program,
    meters: Mutex<HashMap<String, Meter>>,
}

async fn run(args: &RunArgs, bundle: Bundle, stop: CancellationToken) -> Result<(), Fault> {
    let cx = Arc::new(Cx {
        hub: args.hub.clone().unwrap_or_else(|| bundle.hub.clone()),
        tls: Arc::new(bundle.client_config()?),
        slots: args.slots,
        scratch: Scratch::open(&args.dir)?,
        program: Program {
            exe: std::env::current_exe()?,
            log: args.log.clone(),
            proofs: bundle.proofs,
            parent_cache: args.parent_cache.clone(),
        },
        bundle,
        class: args.class,
        meters: Mutex::default(),
    });
    let mut backoff = Backoff::new(Duration::from_millis(200), LONGEST_WAIT);
    loop {
        let began = Instant::now();
        let ended = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            ended = session(&cx) => ended,
        };
        crate::pool::lock(&cx.meters).clear();
        match ended {
            Ok(()) => tracing::info!("the hub stops; dialing it again"),
            Err(fault) if fault.kind == Kind::Config => return Err(fault),
            Err(fault) => tracing::warn!(fix = fault.fix, "{fault}; dialing again"),
        }
        if began.elapsed() > HEALTHY_AFTER {
            backoff.reset();
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(backoff.next()) => {}
        }
    }
}

impl Cx {
    fn lost(&self, what: &str, why: &str) -> Fault {
        Fault::new(
            Kind::Transport,
            format!("{what} the hub at {}: {why}", self.hub),
            "if it repeats: see whether the hub runs and its workers.listen can be reached, \
             compare the clocks, and make a new bundle if this one has expired",
        )
    }

    /// What the hub says. Some of it stays true however often it is asked.
    fn refused(&self, what: &str, status: &Status) -> Fault {
        match status.code() {
            Code::PermissionDenied | Code::FailedPrecondition => Fault::new(
                Kind::Config,
                format!(
                    "the hub at {} refuses this worker: {}",
                    self.hub,
                    status.message()
                ),
                "install the hub's release here, or make a new bundle on the hub with `lotus-miner \
                 workers join-bundle`",
            ),
            _ => self.lost(what, status.message()),
        }
    }

    async fn connect(&self) -> Result<WorkersClient<Channel>, Fault> {
        let (hub, tls) = (self.hub.clone(), self.tls.clone());
        // The address is only a name: the connector below dials the hub.
        let channel = Endpoint::from_static("http://hub")
            .connect_timeout(CONNECT_LIMIT)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .connect_with_connector(tower::service_fn(move |_| {
                let (hub, tls) = (hub.clone(), tls.clone());
                async move {
                    let tcp = TcpStream::connect(&hub).await?;
                    tcp.set_nodelay(true)?;
                    lotus_identity::connect(tls, tcp).await.map(TokioIo::new)
                }
            }))
            .await
            .map_err(|e| self.lost("cannot reach", &causes(&e)))?;
        Ok(WorkersClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT))
    }

    fn hello(&self) -> Result<WorkerHello, Fault> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(WorkerHello {
            class: self.class.as_str().into(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            slots: self.slots,
            host: host_name(),
            steps: Task::remote(self.class)
                .iter()
                .map(|s| (*s).to_owned())
                .collect(),
            cores: u32::try_from(cores).unwrap_or(u32::MAX),
            memory: memory(),
            scratch: self.scratch.room()?,
            gpus: 0,
            proofs: vec![self.bundle.proofs.as_str().into()],
        })
    }
}

/// An error with what caused it.
fn causes(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().into()
}

/// Bytes of memory of this host; 0 if it does not tell.
fn memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib = line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or_default().saturating_mul(1024)
}

/// Attached until the hub stops or is lost. Dropping it ends every task.
async fn session(cx: &Arc<Cx>) -> Result<(), Fault> {
    let mut client = cx.connect().await?;
    // A connection of its own, so that files do not hold up heartbeats.
    let files = cx.connect().await?;
    let (out, outbound) = mpsc::channel(16);
    let out = Outbound(out);
    out.send(from_worker::What::Hello(cx.hello()?)).await?;
    let mut inbound = client
        .attach(Request::new(ReceiverStream::new(outbound)))
        .await
        .map_err(|status| cx.refused("cannot attach to", &status))?
        .into_inner();
    tracing::info!(worker = %cx.bundle.name, hub = cx.hub, "attached to the hub");

    let mut tasks = Tasks::default();
    let mut beat = tokio::time::interval(BEAT);
    loop {
        tokio::select! {
            message = inbound.message() => match message {
                Ok(Some(message)) => match message.what {
                    Some(to_worker::What::Task(task)) => {
                        let span = tracing::info_span!("work", task = task.id);
                        lotus_runtime::trace::set_parent(&span, &task.traceparent);
                        let id = task.id.clone();
                        tasks.start(id, work(cx.clone(), files.clone(), task).instrument(span));
                    }
                    Some(to_worker::What::Abort(abort)) => {
                        tracing::warn!(task = abort.task_id, "the operator of the hub aborts it");
                        tasks.abort(&abort.task_id);
                    }
                    Some(to_worker::What::Stop(_)) => return Ok(()),
                    None => {}
                },
                Ok(None) => return Err(cx.lost("lost", "it closed the stream")),
                Err(status) => return Err(cx.refused("lost", &status)),
            },
            Some(ended) = tasks.next() => {
                let done = ended.map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "report this"))?;
                // One that was aborted had no time to do it itself.
                crate::pool::lock(&cx.meters).remove(&done.task_id);
                out.send(from_worker::What::Done(done)).await?;
            }
            _ = beat.tick() => {
                out.send(from_worker::What::Heartbeat(Heartbeat {})).await?;
                let progress: Vec<TaskProgress> = crate::pool::lock(&cx.meters)
                    .iter_mut()
                    .map(|(id, m)| TaskProgress { task_id: id.clone(), fraction: m.fraction() })
                    .collect();
                for one in progress {
                    out.send(from_worker::What::Progress(one)).await?;
                }
            }
        }
    }
}

async fn work(cx: Arc<Cx>, files: WorkersClient<Channel>, wire: WireTask) -> TaskDone {
    let id = wire.id.clone();
    let done = attempt(&cx, files, wire).await;
    crate::pool::lock(&cx.meters).remove(&id);
    match done {
        Ok((output, files)) => match serde_json::to_vec(&output) {
            Ok(result) => {
                tracing::info!("done");
                TaskDone {
                    task_id: id,
                    result,
                    files,
                    ..TaskDone::default()
                }
            }
            Err(e) => failed(id, Kind::Fatal, e.to_string()),
        },
        Err(f) => {
            tracing::warn!(kind = f.kind.as_str(), error = f.message, "failed");
            failed(id, f.kind, f.message)
        }
    }
}

impl From<Stuck> for Failed {
    fn from(e: Stuck) -> Self {
        Self {
            kind: e.kind(),
            message: e.to_string(),
        }
    }
}

/// An error of this host: no evidence against the sector.
fn here(e: &std::io::Error) -> Failed {
    let kind = match e.kind() {
        std::io::ErrorKind::StorageFull => Kind::Capacity,
        _ => Kind::Transport,
    };
    Failed {
        kind,
        message: format!("scratch directory of the worker: {e}"),
    }
}

async fn attempt(
    cx: &Cx,
    client: WorkersClient<Channel>,
    wire: WireTask,
) -> Result<(Output, Vec<FileEntry>), Failed> {
    let unreadable = |why: String| Failed {
        kind: Kind::Config,
        message: format!("this release does not know the task: {why}"),
    };
    let task: Task = serde_json::from_slice(&wire.spec).map_err(|e| unreadable(e.to_string()))?;
    if !task.can_be_remote() {
        return Err(unreadable(task.name().into()));
    }
    let key = task
        .sector()
        .map_or_else(|| format!("task-{}", wire.attempt), |s| s.to_string());
    let (scratch, needs) = (cx.scratch.clone(), Needs::of(&task).scratch);
    let claimed = tokio::task::spawn_blocking(move || scratch.claim(&key, needs)).await;
    let mut claimed = claimed
        .map_err(std::io::Error::other)
        .and_then(|c| c)
        .map_err(|e| here(&e))?;
    let last = task.is_last_remote();
    let hub = Hub {
        client,
        task: TaskRef {
            task_id: wire.id,
            generation: wire.generation,
            attempt: wire.attempt,
        },
    };
    let done = compute(cx, hub, &claimed, task).await;
    if last && done.is_ok() {
        claimed.discard();
    }
    // Before the hub hears of it, and sends a task that needs the room.
    claimed.end().await;
    done
}

/// Gets what the task reads, does it, and brings back what it made.
async fn compute(
    cx: &Cx,
    mut hub: Hub,
    claimed: &Claimed,
    mut task: Task,
) -> Result<(Output, Vec<FileEntry>), Failed> {
    let dir = claimed.dir();
    task.move_slots(|slot| dir.join(slot));
    let slots = task.slots();
    let had = fetch(&mut hub, claimed, &slots).await?;
    tracing::info!(step = task.name(), "the files are here");
    if let Some(growth) = task.growth() {
        let meter = Meter::start(growth);
        crate::pool::lock(&cx.meters).insert(hub.task.task_id.clone(), meter);
    }
    let output = proof::run(&cx.program, &task).await?;
    let made = bring(&mut hub, claimed, &slots, &had).await?;
    Ok((output, made))
}

type Had = BTreeMap<(String, String), Hash>;

/// Gets what the task reads and is not here, and clears away what it will write.
async fn fetch(hub: &mut Hub, claimed: &Claimed, slots: &[Slot]) -> Result<Had, Failed> {
    let inputs = hub.inputs().await?;
    for slot in slots {
        let listed = |name: &str| {
            let mut of_slot = inputs.iter().filter(|e| e.slot == slot.name);
            slot.reads && of_slot.any(|e| e.name == name)
        };
        make_ready(slot, listed).map_err(|e| here(&e))?;
    }
    let mut had = Had::new();
    let (mut bytes, mut reused) = (0_u64, 0_u64);
    for entry in &inputs {
        let slot = slots.iter().find(|s| s.name == entry.slot && s.reads);
        let path = slot
            .and_then(|s| place(s, &entry.name))
            .ok_or_else(|| Failed {
                kind: Kind::Config,
                message: format!("the hub sends {:?}/{:?}", entry.slot, entry.name),
            })?;
        let listed = <Hash>::try_from(&entry.hash[..]).ok();
        let hash = match (listed, claimed.known(&path)) {
            (Some(theirs), Some(ours)) if theirs == ours => {
                reused += entry.len;
                ours
            }
            _ => {
                bytes += entry.len;
                let hash = hub.get(entry, &path).await?;
                claimed.remember(&path, hash);
                hash
            }
        };
        had.insert((entry.slot.clone(), entry.name.clone()), hash);
    }
    tracing::info!(bytes, reused, "inputs");
    Ok(had)
}

/// Where a file of a slot is.
fn place(slot: &Slot, name: &str) -> Option<PathBuf> {
    match slot.shape {
        Shape::File => name.is_empty().then(|| slot.path.clone()),
        Shape::Dir => is_plain(name).then(|| slot.path.join(name)),
    }
}

/// Deletes what is of an earlier task, and makes the slot's directory if the task reads it.
fn make_ready(slot: &Slot, listed: impl Fn(&str) -> bool) -> std::io::Result<()> {
    let missing_is_fine = |done: std::io::Result<()>| match done {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    match slot.shape {
        Shape::File if !slot.reads => missing_is_fine(fs::remove_file(&slot.path)),
        Shape::File => Ok(()),
        Shape::Dir if !slot.reads => missing_is_fine(fs::remove_dir_all(&slot.path)),
        Shape::Dir => {
            fs::create_dir_all(&slot.path)?;
            for (name, path) in files_in(&slot.path)? {
                if !listed(&name) {
                    fs::remove_file(path)?;
                }
            }
            Ok(())
        }
    }
}

fn files_in(dir: &Path) -> std::io::Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        all.push((name, entry.path()));
    }
    all.sort();
    Ok(all)
}

/// Brings what the task made and the hub does not have, and names all of it.
async fn bring(
    hub: &mut Hub,
    claimed: &Claimed,
    slots: &[Slot],
    had: &Had,
) -> Result<Vec<FileEntry>, Failed> {
    let mut made = Vec::new();
    for slot in slots.iter().filter(|s| s.staging.is_some()) {
        let files = match slot.shape {
            Shape::File => vec![(String::new(), slot.path.clone())],
            Shape::Dir => files_in(&slot.path).map_err(|e| here(&e))?,
        };
        for (name, path) in files {
            let mut file = tokio::fs::File::open(&path).await.map_err(|e| here(&e))?;
            let hash = copy::hash(&mut file).await.map_err(|e| here(&e))?;
            let meta = file.metadata().await.map_err(|e| here(&e))?;
            let entry = FileEntry {
                slot: slot.name.into(),
                name: name.clone(),
                len: meta.len(),
                hash: hash.to_vec(),
            };
            if had.get(&(slot.name.to_owned(), name)) != Some(&hash) {
                hub.put(&entry, &path).await?;
            }
            claimed.remember(&path, hash);
            made.push(entry);
        }
    }
    let files = made.len();
    tracing::info!(files, "brought back");
    Ok(made)
}
