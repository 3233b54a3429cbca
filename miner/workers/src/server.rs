use std::collections::HashMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hub_proto::worker::v1::workers_server::{Workers, WorkersServer};
use hub_proto::worker::v1::{
    Abort, FileList, FromWorker, ReadChunk, ReadRequest, Stop, Task as WireTask, TaskDone, TaskRef,
    ToWorker, WorkerHello, WriteChunk, WriteDone, from_worker, to_worker,
};
use lotus_identity::listen::accept;
use lotus_runtime::peer;
use lotus_types::Kind;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, Streaming};

use crate::fit::Host;
use crate::pool::{Job, Shared, lock};
use crate::queues::Taker;
use crate::remote::files::send_file;
use crate::remote::identity::{Authority, WorkerName};
use crate::remote::listen::Peer;
use crate::{Class, Declared, Output, Task, WorkError};

/// Bytes of one message. The vanilla seal proof of a 32 GiB sector has some tens of MiB.
pub(crate) const MESSAGE_LIMIT: usize = 256 << 20;
/// Metadata key of the generation that a worker was started for.
pub(crate) const GENERATION: &str = "lotus-generation";
/// HTTP/2 pings on both sides, so that a stopped peer is noticed.
pub(crate) const PING_EVERY: Duration = Duration::from_secs(10);
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(30);
/// Slots that one worker may claim.
const SLOT_LIMIT: u32 = 64;
/// Names of tasks and proofs, and bytes of a name, that a worker may declare.
const NAMES_LIMIT: usize = 64;
/// Streams that one worker on another host may hold: one, and its files.
const STREAM_LIMIT: u32 = 256;
/// Bytes on their way in one direction of a worker's connection.
const WINDOW: u32 = 8 << 20;
/// Messages of a file between disk and network.
const IN_FLIGHT: usize = 4;
/// Connections that workers of one host may begin in a second.
const CONNECTIONS_PER_SECOND: u32 = 50;

/// Binds the socket, owner-only. The hub holds the repo's lock, so a socket file that is there
/// already is a dead hub's.
pub(crate) fn bind(path: &Path) -> Result<UnixListener, WorkError> {
    let bound = (|| {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    })();
    bound.map_err(|source| WorkError::Socket {
        path: path.into(),
        source,
    })
}

/// Serves the socket until the pool stops.
pub(crate) async fn serve(shared: Arc<Shared>, listener: UnixListener) {
    let stop = shared.stop.clone();
    let service = WorkersServer::new(Attach(shared, None))
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    let ours = |s: &io::Result<_>| s.as_ref().map_or(true, peer::may_order);
    let incoming = UnixListenerStream::new(listener).filter(ours);
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await;
    if let Err(e) = served {
        tracing::error!(error = %e, "the worker socket broke");
    }
}

/// Serves workers on other hosts until the pool stops.
pub(crate) async fn serve_remote(
    shared: Arc<Shared>,
    port: TcpListener,
    authority: Authority,
    tls: rustls::ServerConfig,
) {
    let stop = shared.stop.clone();
    let (to, connections) = mpsc::channel(IN_FLIGHT);
    let accept = accept(
        port,
        Arc::new(tls),
        CONNECTIONS_PER_SECOND,
        "worker",
        to,
        stop.clone(),
    );
    let service = WorkersServer::new(Attach(shared, Some(Arc::new(authority))))
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    let serve = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_concurrent_streams(STREAM_LIMIT)
        .add_service(service)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop.cancelled_owned());
    let ((), served) = tokio::join!(accept, serve);
    if let Err(e) = served {
        tracing::error!(error = %e, "the port for workers on other hosts broke");
    }
}

/// The second is of the port for other hosts.
struct Attach(Arc<Shared>, Option<Arc<Authority>>);

impl Attach {
    /// The peer, if it is on another host.
    fn peer<T>(&self, request: &Request<T>) -> Option<Peer> {
        Some(Peer {
            authority: self.1.clone()?,
            shown: request.extensions().get().cloned()?,
        })
    }

    /// The worker on another host that calls, if its certificate counts.
    fn caller<T>(&self, request: &Request<T>) -> Result<WorkerName, Status> {
        let peer = self.peer(request).ok_or_else(|| {
            Status::permission_denied("a worker of this host reads its files where they are")
        })?;
        peer.worker().map_err(Status::permission_denied)
    }
}

#[tonic::async_trait]
impl Workers for Attach {
    type AttachStream = ReceiverStream<Result<ToWorker, Status>>;
    type ReadStream = ReceiverStream<Result<ReadChunk, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<FromWorker>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let remote = match self.peer(&request) {
            Some(peer) => Some((peer.worker().map_err(Status::permission_denied)?, peer)),
            None => None,
        };
        let ours = self.0.config.generation.0.to_string();
        let theirs = request.metadata().get(GENERATION);
        // A worker on another host outlives generations: its tasks carry theirs.
        if remote.is_none() && theirs.is_none_or(|g| g.as_bytes() != ours.as_bytes()) {
            return Err(Status::failed_precondition(format!(
                "this hub is generation {ours}; the worker was started for another"
            )));
        }
        let pid = request
            .extensions()
            .get::<UdsConnectInfo>()
            .and_then(|c| c.peer_cred?.pid())
            .and_then(|pid| u32::try_from(pid).ok());
        let (to_worker, stream) = mpsc::channel(4);
        let session = Session {
            shared: self.0.clone(),
            inbound: request.into_inner(),
            to_worker,
            pid,
            remote,
        };
        self.0.sessions.spawn(session.run());
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn inputs(&self, request: Request<TaskRef>) -> Result<Response<FileList>, Status> {
        let worker = self.caller(&request)?;
        let lent = self.0.files.of(&worker, Some(request.get_ref()))?;
        let shared = self.0.clone();
        let files = tokio::task::spawn_blocking(move || shared.files.inputs(&lent)).await;
        let files = files.map_err(|e| Status::internal(e.to_string()))??;
        Ok(Response::new(FileList { files }))
    }

    async fn read(
        &self,
        request: Request<ReadRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let worker = self.caller(&request)?;
        let wanted = request.into_inner();
        let lent = self.0.files.of(&worker, wanted.task.as_ref())?;
        let file = lent.open(&wanted.slot, &wanted.name).await?;
        let (to, chunks) = mpsc::channel(IN_FLIGHT);
        let shared = self.0.clone();
        self.0.sessions.spawn(async move {
            send_file(&shared.files, &lent, file, wanted.offset, to).await;
        });
        Ok(Response::new(ReceiverStream::new(chunks)))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteChunk>>,
    ) -> Result<Response<WriteDone>, Status> {
        let worker = self.caller(&request)?;
        let mut chunks = request.into_inner();
        let silence = Duration::from_secs(self.0.config.settings.silence_secs);
        let head = next_chunk(&mut chunks, silence).await?.head;
        let head = head.ok_or_else(|| Status::invalid_argument("the first message has no head"))?;
        let lent = self.0.files.of(&worker, head.task.as_ref())?;
        let mut arriving = lent.begin(&head.slot, &head.name, head.len)?;
        let ended = async {
            loop {
                let chunk = next_chunk(&mut chunks, silence).await?;
                arriving.take(&chunk.data).await?;
                if !chunk.hash.is_empty() {
                    return arriving.end(&chunk.hash).await;
                }
            }
        };
        tokio::select! {
            ended = ended => ended.map(|()| Response::new(WriteDone {})),
            () = lent.gone() => Err(Status::failed_precondition("the task is over")),
        }
    }
}

async fn next_chunk(
    chunks: &mut Streaming<WriteChunk>,
    silence: Duration,
) -> Result<WriteChunk, Status> {
    let next = tokio::time::timeout(silence, chunks.message()).await;
    next.map_err(|_| Status::deadline_exceeded("the file stopped coming"))??
        .ok_or_else(|| Status::data_loss("the file ended before its end"))
}

/// One attached worker.
struct Session {
    shared: Arc<Shared>,
    inbound: Streaming<FromWorker>,
    to_worker: mpsc::Sender<Result<ToWorker, Status>>,
    /// The process at the other end, as the kernel tells.
    pid: Option<u32>,
    /// Who is at the other end on another host.
    remote: Option<(WorkerName, Peer)>,
}

struct Running {
    job: Job,
    deadline: Instant,
    /// Under which a worker on another host has the task's files.
    attempt: Option<u64>,
}

/// What the first message says.
struct Hello {
    class: Class,
    slots: usize,
    host: Host,
    /// Where a worker on another host is, and what it has.
    remote: Option<(String, Declared)>,
}

impl Session {
    async fn run(mut self) {
        let hello = match self.hello().await {
            Ok(hello) => hello,
            Err(why) => {
                tracing::warn!(pid = self.pid, why, "refused a worker");
                let refusal = Err(Status::failed_precondition(why));
                // It may have left.
                self.to_worker.send(refusal).await.unwrap_or_default();
                return;
            }
        };
        let child = self
            .pid
            .and_then(|pid| lock(&self.shared.children).get(&pid).cloned());
        if let Some(child) = &child {
            child.attached.cancel();
        }
        let (class, slots) = (hello.class, hello.slots);
        let host = hello.remote.as_ref().map(|(host, _)| host.clone());
        tracing::info!(%class, pid = self.pid, host, "worker attached");
        let (worker, aborts) = self.shared.board.join(class, slots, self.pid, hello.remote);
        self.shared
            .join(worker, Taker::new(class, slots, hello.host));
        let mut running = HashMap::new();
        let why = self.work(worker, class, slots, aborts, &mut running).await;
        if host.is_some() {
            tracing::info!(%class, host, why, "a worker on another host is gone");
        }
        self.shared.board.leave(worker);
        self.shared.leave(worker, class);
        // The process must be gone before its task may go to another. It leaves by itself when
        // the stream breaks; one that hangs is killed. One on another host has no files of the
        // hub: it is enough that nothing is taken from it any more.
        drop(self.to_worker);
        drop(self.inbound);
        if let Some(child) = child {
            child.kill.cancel();
            child.exited.cancelled().await;
        }
        for (_, running) in running {
            let Running {
                mut job, attempt, ..
            } = running;
            if let Some(attempt) = attempt {
                let shared = self.shared.clone();
                let closed = tokio::task::spawn_blocking(move || shared.files.close(attempt));
                if let Err(e) = closed.await {
                    tracing::error!(error = %e, "closing the files of a task panicked");
                }
            }
            job.deaths += 1;
            let again = job.may_be_repeated(self.shared.config.settings.deaths_per_task);
            let aborted = self.shared.board.end(&job.id);
            if self.shared.stop.is_cancelled() {
                let step = job.step;
                job.finish(Err(WorkError::Stopping { step }));
            } else if aborted {
                let step = job.step;
                job.finish(Err(WorkError::Aborted { step }));
            } else if again {
                tracing::warn!(task = job.id, why, "worker lost: its task goes to another");
                self.shared.push_back(job);
            } else {
                let (step, why) = (job.step, why.clone());
                let class = class.as_str();
                job.finish(Err(WorkError::Lost { class, step, why }));
            }
        }
    }

    async fn hello(&mut self) -> Result<Hello, String> {
        let silence = Duration::from_secs(self.shared.config.settings.silence_secs);
        let first = tokio::time::timeout(silence, self.inbound.message())
            .await
            .map_err(|_| "no hello in time".to_owned())?
            .map_err(|e| e.to_string())?;
        let Some(FromWorker {
            what: Some(from_worker::What::Hello(hello)),
        }) = first
        else {
            return Err("the first message was no hello".into());
        };
        if hello.version != env!("CARGO_PKG_VERSION") {
            return Err(format!(
                "the worker is version {}, the hub {}: install one release on both",
                hello.version,
                env!("CARGO_PKG_VERSION")
            ));
        }
        let class = Class::named(&hello.class).ok_or(format!("unknown class {:?}", hello.class))?;
        let slots = hello.slots.clamp(1, SLOT_LIMIT) as usize;
        let remote = match &self.remote {
            Some((name, peer)) => {
                let proofs = self.shared.config.proofs.as_str();
                if !hello.proofs.iter().any(|p| p == proofs) {
                    return Err(format!(
                        "this hub's network takes {proofs} proofs, the worker makes {}: make a \
                         new bundle for it",
                        hello.proofs.join(", ")
                    ));
                }
                let host: String = hello.host.chars().take(NAMES_LIMIT).collect();
                let addr = peer
                    .shown
                    .addr
                    .map_or_else(String::new, |a| format!(" ({a})"));
                Some((format!("{name} on {host:?}{addr}"), declared(hello)))
            }
            None => None,
        };
        let host = match &remote {
            Some((_, declared)) => Host::Remote(declared.clone()),
            None => Host::Local {
                rest_only: class == Class::Seal && !self.shared.config.settings.seal_locally,
            },
        };
        Ok(Hello {
            class,
            slots,
            host,
            remote,
        })
    }

    /// Hands out tasks and takes answers until the worker is lost or the pool stops. Says why it
    /// ended.
    async fn work(
        &mut self,
        worker: u64,
        class: Class,
        slots: usize,
        mut aborts: mpsc::UnboundedReceiver<String>,
        running: &mut HashMap<String, Running>,
    ) -> String {
        let shared = self.shared.clone();
        let silence = Duration::from_secs(shared.config.settings.silence_secs);
        let limit = shared.config.settings.task_limit(class);
        let mut heard = Instant::now();
        loop {
            let overdue = running.values().map(|r| r.deadline).min();
            tokio::select! {
                mut job = shared.next(class, worker), if running.len() < slots => {
                    job.by = self.remote.as_ref().map(|(name, _)| name.to_string());
                    let deadline = Instant::now() + job.time(limit);
                    let (task, attempt) = self.wire(&job);
                    shared.board.begin(worker, &job);
                    running.insert(job.id.clone(), Running { job, deadline, attempt });
                    if !self.send(to_worker::What::Task(task), silence).await {
                        return "it took no task".into();
                    }
                }
                message = self.inbound.message() => {
                    heard = Instant::now();
                    if let Some((_, peer)) = &self.remote
                        && let Err(why) = peer.worker()
                    {
                        let refusal = Err(Status::permission_denied(why.clone()));
                        // It may have left.
                        self.to_worker.send_timeout(refusal, silence).await.unwrap_or_default();
                        return why;
                    }
                    match message {
                        Ok(Some(FromWorker { what: Some(what) })) => {
                            answer(&shared, worker, what, running).await;
                        }
                        Ok(Some(FromWorker { what: None })) => {}
                        Ok(None) => return "it left".into(),
                        Err(e) => return format!("its stream broke: {}", e.message()),
                    }
                }
                Some(task_id) = aborts.recv() => {
                    let Some(task) = running.get_mut(&task_id) else {
                        continue;
                    };
                    // A worker on this host computes in its own process, and has one task.
                    if self.remote.is_none() {
                        return "the operator aborted its task".into();
                    }
                    task.deadline = task.deadline.min(Instant::now() + silence);
                    if !self.send(to_worker::What::Abort(Abort { task_id }), silence).await {
                        return "it took no message".into();
                    }
                }
                () = tokio::time::sleep_until(heard + silence) => {
                    return format!("no heartbeat in {silence:?}");
                }
                () = tokio::time::sleep_until(overdue.unwrap_or(heard)), if overdue.is_some() => {
                    return "a task took longer than its limit".into();
                }
                () = shared.stop.cancelled() => {
                    self.send(to_worker::What::Stop(Stop {}), Duration::from_secs(1)).await;
                    return "the hub stops".into();
                }
            }
        }
    }

    /// A task as this worker gets it: to another host it goes without the hub's paths.
    fn wire(&self, job: &Job) -> (WireTask, Option<u64>) {
        let lend =
            |(name, _): &(WorkerName, Peer)| self.shared.files.lend(name, &job.id, &job.task);
        let attempt = self.remote.as_ref().map(lend);
        let spec = if attempt.is_some() {
            let mut task = job.task.clone();
            task.move_slots(|slot| slot.into());
            to_json(&task)
        } else {
            to_json(&job.task)
        };
        let task = WireTask {
            id: job.id.clone(),
            generation: self.shared.config.generation.0,
            spec,
            traceparent: job.traceparent.clone(),
            attempt: attempt.unwrap_or_default(),
        };
        (task, attempt)
    }

    async fn send(&self, what: to_worker::What, limit: Duration) -> bool {
        let message = Ok(ToWorker { what: Some(what) });
        self.to_worker.send_timeout(message, limit).await.is_ok()
    }
}

/// What a worker may say of itself is bounded.
fn declared(hello: WorkerHello) -> Declared {
    let names = |all: Vec<String>| -> Vec<String> {
        let short = all.into_iter().filter(|n| n.len() <= NAMES_LIMIT);
        short.take(NAMES_LIMIT).collect()
    };
    Declared {
        steps: names(hello.steps),
        cores: hello.cores,
        memory: hello.memory,
        scratch: hello.scratch,
        gpus: hello.gpus,
    }
}

/// A task as text. Plain data always has one; a worker refuses an empty one.
fn to_json(task: &Task) -> Vec<u8> {
    serde_json::to_vec(task).unwrap_or_default()
}

async fn answer(
    shared: &Arc<Shared>,
    worker: u64,
    what: from_worker::What,
    running: &mut HashMap<String, Running>,
) {
    match what {
        from_worker::What::Progress(p) => {
            shared
                .board
                .progress(&p.task_id, p.fraction.clamp(0.0, 1.0));
            if let Some(Running { job, .. }) = running.get(&p.task_id)
                && let Some(tell) = &job.progress
            {
                tell(p.fraction.clamp(0.0, 1.0));
            }
        }
        from_worker::What::Done(done) => {
            let Some(Running { job, attempt, .. }) = running.get(&done.task_id) else {
                return;
            };
            // Still among the running, should this be given up halfway.
            let result = match attempt {
                Some(attempt) => take(shared, *attempt, job.step, done).await,
                None => read(job.step, &done),
            };
            let id = job.id.clone();
            if let Some(Running { job, .. }) = running.remove(&id) {
                let aborted = shared.board.end(&id);
                shared.done(worker, job.class, &id);
                // One that was done meanwhile is done.
                let step = job.step;
                job.finish(match result {
                    Err(_) if aborted => Err(WorkError::Aborted { step }),
                    result => result,
                });
            }
        }
        from_worker::What::Heartbeat(_) | from_worker::What::Hello(_) => {}
    }
}

/// Reads the answer of a worker on another host and puts what it brought in its place.
async fn take(
    shared: &Arc<Shared>,
    attempt: u64,
    step: &'static str,
    done: TaskDone,
) -> Result<Output, WorkError> {
    let result = read(step, &done);
    let good = result.is_ok();
    let shared = shared.clone();
    let placed = tokio::task::spawn_blocking(move || {
        if good {
            return shared.files.place(attempt, &done.files);
        }
        shared.files.close(attempt);
        Ok(())
    });
    match placed.await {
        Ok(Ok(())) => result,
        Ok(Err(e)) => Err(WorkError::NotTaken {
            step,
            kind: e.kind(),
            why: e.to_string(),
        }),
        Err(e) => Err(WorkError::NotTaken {
            step,
            kind: Kind::Fatal,
            why: e.to_string(),
        }),
    }
}

fn read(step: &'static str, done: &TaskDone) -> Result<Output, WorkError> {
    if done.error_kind.is_empty() {
        return serde_json::from_slice(&done.result).map_err(|e| WorkError::BadAnswer {
            step,
            why: e.to_string(),
        });
    }
    let kind = serde_json::from_value(done.error_kind.as_str().into()).unwrap_or(Kind::Fatal);
    Err(WorkError::Failed {
        step,
        kind,
        message: done.error.clone(),
    })
}
