use std::collections::HashMap;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hub_proto::worker::v1::workers_server::{Workers, WorkersServer};
use hub_proto::worker::v1::{
    FromWorker, Stop, Task as WireTask, TaskDone, ToWorker, from_worker, to_worker,
};
use lotus_types::Kind;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, Streaming};

use crate::pool::{Job, Shared, lock};
use crate::{Class, Output, WorkError};

/// Bytes of one message. The vanilla seal proof of a 32 GiB sector has some tens of MiB.
pub(crate) const MESSAGE_LIMIT: usize = 256 << 20;
/// Metadata key of the generation that a worker was started for.
pub(crate) const GENERATION: &str = "lotus-generation";
/// HTTP/2 pings on both sides, so that a stopped peer is noticed.
pub(crate) const PING_EVERY: Duration = Duration::from_secs(10);
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(30);
/// Slots that one worker may claim.
const SLOT_LIMIT: u32 = 64;

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
    let service = WorkersServer::new(Attach(shared))
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned())
        .await;
    if let Err(e) = served {
        tracing::error!(error = %e, "the worker socket broke");
    }
}

struct Attach(Arc<Shared>);

#[tonic::async_trait]
impl Workers for Attach {
    type AttachStream = ReceiverStream<Result<ToWorker, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<FromWorker>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let ours = self.0.config.generation.0.to_string();
        let theirs = request.metadata().get(GENERATION);
        if theirs.is_none_or(|g| g.as_bytes() != ours.as_bytes()) {
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
        };
        self.0.sessions.spawn(session.run());
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// One attached worker.
struct Session {
    shared: Arc<Shared>,
    inbound: Streaming<FromWorker>,
    to_worker: mpsc::Sender<Result<ToWorker, Status>>,
    /// The process at the other end, as the kernel tells.
    pid: Option<u32>,
}

struct Running {
    job: Job,
    deadline: Instant,
}

impl Session {
    async fn run(mut self) {
        let (class, slots) = match self.hello().await {
            Ok(hello) => hello,
            Err(why) => {
                tracing::warn!(pid = self.pid, why, "refused a worker");
                return;
            }
        };
        let child = self
            .pid
            .and_then(|pid| lock(&self.shared.children).get(&pid).cloned());
        if let Some(child) = &child {
            child.attached.cancel();
        }
        tracing::info!(%class, pid = self.pid, "worker attached");
        self.shared.count_attached(class, true);
        let (worker, abort) = self.shared.board.join(class, slots, self.pid);
        let mut running = HashMap::new();
        let why = tokio::select! {
            why = self.work(worker, class, slots, &mut running) => why,
            () = abort.cancelled() => "the operator aborted its task".into(),
        };
        self.shared.board.leave(worker);
        self.shared.count_attached(class, false);
        // The process must be gone before its task may go to another. It leaves by itself when
        // the stream breaks; one that hangs is killed.
        drop(self.to_worker);
        drop(self.inbound);
        if let Some(child) = child {
            child.kill.cancel();
            child.exited.cancelled().await;
        }
        for (_, Running { mut job, .. }) in running {
            job.deaths += 1;
            let again = job.repeatable && job.deaths < self.shared.config.settings.deaths_per_task;
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

    async fn hello(&mut self) -> Result<(Class, usize), String> {
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
            return Err(format!("worker is version {}", hello.version));
        }
        let class = Class::named(&hello.class).ok_or(format!("unknown class {:?}", hello.class))?;
        Ok((class, hello.slots.clamp(1, SLOT_LIMIT) as usize))
    }

    /// Hands out tasks and takes answers until the worker is lost or the pool stops. Says why it
    /// ended.
    async fn work(
        &mut self,
        worker: u64,
        class: Class,
        slots: usize,
        running: &mut HashMap<String, Running>,
    ) -> String {
        let shared = self.shared.clone();
        let silence = Duration::from_secs(shared.config.settings.silence_secs);
        let limit = shared.config.settings.task_limit(class);
        let mut heard = Instant::now();
        loop {
            let overdue = running.values().map(|r| r.deadline).min();
            tokio::select! {
                job = shared.next(class), if running.len() < slots => {
                    let task = WireTask {
                        id: job.id.clone(),
                        generation: shared.config.generation.0,
                        spec: job.spec.clone(),
                        traceparent: job.traceparent.clone(),
                    };
                    let deadline = Instant::now() + job.limit.map_or(limit, |l| l.min(limit));
                    shared.board.begin(worker, &job);
                    running.insert(job.id.clone(), Running { job, deadline });
                    if !self.send(to_worker::What::Task(task), silence).await {
                        return "it took no task".into();
                    }
                }
                message = self.inbound.message() => {
                    heard = Instant::now();
                    match message {
                        Ok(Some(FromWorker { what: Some(what) })) => answer(&shared, what, running),
                        Ok(Some(FromWorker { what: None })) => {}
                        Ok(None) => return "it left".into(),
                        Err(e) => return format!("its stream broke: {}", e.message()),
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

    async fn send(&self, what: to_worker::What, limit: Duration) -> bool {
        let message = Ok(ToWorker { what: Some(what) });
        self.to_worker.send_timeout(message, limit).await.is_ok()
    }
}

fn answer(shared: &Shared, what: from_worker::What, running: &mut HashMap<String, Running>) {
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
            if let Some(Running { job, .. }) = running.remove(&done.task_id) {
                shared.board.end(&job.id);
                let result = read(job.step, done);
                job.finish(result);
            }
        }
        from_worker::What::Heartbeat(_) | from_worker::What::Hello(_) => {}
    }
}

fn read(step: &'static str, done: TaskDone) -> Result<Output, WorkError> {
    if done.error_kind.is_empty() {
        return serde_json::from_slice(&done.result).map_err(|e| WorkError::BadAnswer {
            step,
            why: e.to_string(),
        });
    }
    let kind = serde_json::from_value(done.error_kind.into()).unwrap_or(Kind::Fatal);
    Err(WorkError::Failed {
        step,
        kind,
        message: done.error,
    })
}
