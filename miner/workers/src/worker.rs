use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use hub_proto::worker::v1::workers_client::WorkersClient;
use hub_proto::worker::v1::{
    FromWorker, Heartbeat, Task as WireTask, TaskDone, TaskProgress, WorkerHello, from_worker,
    to_worker,
};
use hyper_util::rt::TokioIo;
use lotus_proofs::ProofMode;
use lotus_runtime::telemetry::{self, LogFormat, TelemetryConfig};
use lotus_runtime::{Fault, trace};
use lotus_types::Kind;
use rustix::process::{getpriority_process, setpriority_process};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::progress::Meter;
use crate::server::{GENERATION, MESSAGE_LIMIT, PING_EVERY, PING_TIMEOUT};
use crate::{Class, Output, Task, execute};

/// How often a worker says that it lives and how far its tasks are.
pub(crate) const BEAT: Duration = Duration::from_secs(1);
/// A hub that does not answer by then is gone.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Arguments of `lotus-miner worker`. The hub fills them in.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    /// Which tasks this process takes
    #[arg(long, value_enum)]
    pub class: Class,
    /// The hub's worker socket, <repo>/run/workers.sock
    #[arg(long)]
    pub socket: PathBuf,
    /// The hub's generation: a hub of another one refuses this worker
    #[arg(long)]
    pub generation: u64,
    /// Which proofs this process makes
    #[arg(long)]
    pub proofs: ProofMode,
    /// Name in logs
    #[arg(long, default_value = "worker")]
    pub name: String,
    /// Nice value, 0 to 19
    #[arg(long, default_value_t = 0)]
    pub nice: i32,
    /// Log filter, such as info
    #[arg(long, default_value = "info")]
    pub log: String,
    /// Write log lines as JSON
    #[arg(long)]
    pub log_json: bool,
    /// OTLP endpoint for traces
    #[arg(long, default_value = "")]
    pub otlp_endpoint: String,
}

/// Runs a worker until its hub stops it, dies, or is unreachable. The body of
/// `lotus-miner worker`; call it from `main`'s thread, outside any async runtime and before any
/// telemetry is set up, and return from `main` right after.
///
/// A proof cannot be interrupted, so its thread is left behind: returning from `main` ends it,
/// within milliseconds of the hub's death and in the middle of work.
pub fn worker_main(args: &WorkerArgs) -> Result<(), Fault> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let result = runtime.block_on(async {
        let format = if args.log_json {
            LogFormat::Json
        } else {
            LogFormat::Text
        };
        let _telemetry = telemetry::init(
            "lotus-miner-worker",
            &TelemetryConfig {
                log: args.log.clone(),
                format,
                otlp_endpoint: args.otlp_endpoint.clone(),
            },
        )?;
        // Before the proof library starts its threads, which inherit the priority.
        if args.nice != 0 {
            lower_priority(args.nice);
        }
        attach(args).await
    });
    runtime.shutdown_background();
    result
}

pub(crate) fn lower_priority(nice: i32) {
    let result = getpriority_process(None)
        .and_then(|now| setpriority_process(None, now.max(nice.clamp(0, 19))));
    if let Err(e) = result {
        tracing::warn!(error = %e, "cannot lower the priority of this worker");
    }
}

/// Works for a hub until it stops this worker, dies, or is unreachable. [`worker_main`] is this in
/// a process of its own, which is where it belongs.
pub async fn attach(args: &WorkerArgs) -> Result<(), Fault> {
    let lost = |what: &str, e: &dyn std::fmt::Display| {
        Fault::new(
            Kind::Transport,
            format!("{what} the hub at {}: {e}", args.socket.display()),
            "nothing: the hub starts its workers itself",
        )
    };
    let mut client = WorkersClient::new(connect(args).await.map_err(|e| lost("cannot reach", &e))?)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    let (out, outbound) = mpsc::channel(16);
    let out = Outbound(out);
    out.send(from_worker::What::Hello(WorkerHello {
        class: args.class.as_str().into(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        slots: 1,
        ..WorkerHello::default()
    }))
    .await?;
    let mut request = Request::new(ReceiverStream::new(outbound));
    request
        .metadata_mut()
        .insert(GENERATION, args.generation.into());
    let mut inbound = client
        .attach(request)
        .await
        .map_err(|e| lost("cannot attach to", &e))?
        .into_inner();
    tracing::info!(worker = args.name, class = %args.class, "attached to the hub");

    let mut tasks = JoinSet::new();
    let mut meters: HashMap<String, Meter> = HashMap::new();
    let mut beat = tokio::time::interval(BEAT);
    loop {
        tokio::select! {
            message = inbound.message() => match message {
                Ok(Some(message)) => match message.what {
                    Some(to_worker::What::Task(task)) if task.generation == args.generation => {
                        start(task, args.proofs, &mut tasks, &mut meters);
                    }
                    Some(to_worker::What::Task(task)) => {
                        let (id, stale) = (task.id, task.generation);
                        let why = format!("the task is of generation {stale}, this worker of {}", args.generation);
                        out.send(from_worker::What::Done(failed(id, Kind::Fatal, why))).await?;
                    }
                    Some(to_worker::What::Stop(_)) => return Ok(()),
                    // A proof can not be interrupted: the hub kills this process instead.
                    Some(to_worker::What::Abort(_)) | None => {}
                },
                Ok(None) => return Ok(()),
                Err(e) => return Err(lost("lost", &e.message())),
            },
            Some(ended) = tasks.join_next() => match ended {
                Ok(done) => {
                    let done: TaskDone = done;
                    meters.remove(&done.task_id);
                    out.send(from_worker::What::Done(done)).await?;
                }
                // Cannot happen, as panics are caught inside; a dead worker is the honest answer.
                Err(e) => return Err(Fault::new(Kind::Fatal, e.to_string(), "see the worker's log")),
            },
            _ = beat.tick() => {
                out.send(from_worker::What::Heartbeat(Heartbeat {})).await?;
                for (id, meter) in &mut meters {
                    let progress = TaskProgress { task_id: id.clone(), fraction: meter.fraction() };
                    out.send(from_worker::What::Progress(progress)).await?;
                }
            }
        }
    }
}

async fn connect(args: &WorkerArgs) -> Result<Channel, tonic::transport::Error> {
    let socket = args.socket.clone();
    // The address is only a name: the connector below dials the socket.
    Endpoint::from_static("http://hub")
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
}

fn start(
    task: WireTask,
    proofs: ProofMode,
    tasks: &mut JoinSet<TaskDone>,
    meters: &mut HashMap<String, Meter>,
) {
    let spec = match serde_json::from_slice::<Task>(&task.spec) {
        Ok(spec) => spec,
        Err(e) => {
            let done = failed(task.id, Kind::Fatal, format!("unreadable task: {e}"));
            tasks.spawn(std::future::ready(done));
            return;
        }
    };
    if let Some(growth) = spec.growth() {
        meters.insert(task.id.clone(), Meter::start(growth));
    }
    let span = tracing::info_span!("work", step = spec.name(), task = task.id);
    trace::set_parent(&span, &task.traceparent);
    tasks.spawn_blocking(move || {
        span.in_scope(|| {
            let result = std::panic::catch_unwind(|| execute(&proofs, &spec));
            report(task.id, spec.name(), result)
        })
    });
}

fn report(
    id: String,
    step: &str,
    result: std::thread::Result<Result<Output, lotus_proofs::ProofError>>,
) -> TaskDone {
    match result {
        Ok(Ok(output)) => {
            tracing::info!("done");
            match serde_json::to_vec(&output) {
                Ok(result) => TaskDone {
                    task_id: id,
                    result,
                    ..TaskDone::default()
                },
                Err(e) => failed(id, Kind::Fatal, e.to_string()),
            }
        }
        Ok(Err(e)) => {
            tracing::warn!(error = %e, "failed");
            failed(id, e.kind(), e.to_string())
        }
        Err(panic) => {
            let text = panic_text(&*panic);
            tracing::error!(panic = text, "the proof code panicked");
            failed(id, Kind::Fatal, format!("{step} panicked: {text}"))
        }
    }
}

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

pub(crate) fn failed(id: String, kind: Kind, error: String) -> TaskDone {
    TaskDone {
        task_id: id,
        error,
        error_kind: kind.as_str().into(),
        ..TaskDone::default()
    }
}

/// The stream to the hub.
pub(crate) struct Outbound(pub(crate) mpsc::Sender<FromWorker>);

impl Outbound {
    pub(crate) async fn send(&self, what: from_worker::What) -> Result<(), Fault> {
        self.0
            .send(FromWorker { what: Some(what) })
            .await
            .map_err(|_| {
                Fault::new(
                    Kind::Transport,
                    "the stream to the hub is closed",
                    "nothing: the hub starts its workers itself",
                )
            })
    }
}
