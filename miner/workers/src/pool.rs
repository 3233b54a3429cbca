use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use lotus_types::SectorId;

use crate::board::{Board, JobInfo, unix_ms};
use crate::fit::Needs;
use crate::queues::{Queues, Taker};
use crate::remote::files::Files;
use crate::remote::identity::Authority;
use crate::remote::listen;
use crate::supervise::ChildHandle;
use crate::{Class, Output, PoolConfig, Task, WorkError, server, supervise};

/// Tasks that may wait per class. A hub has a few per sector in flight.
const QUEUE_LIMIT: usize = 1024;

/// Told how far a task is, 0 to 1, about once a second.
pub type Progress = Arc<dyn Fn(f64) + Send + Sync>;

/// Workers that are attached now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// Seal workers.
    pub seal: u32,
    /// Prove workers of this host. Those of others only help: they read no sector.
    pub prove: u32,
}

impl Attached {
    /// The count of one class.
    #[must_use]
    pub const fn of(&self, class: Class) -> u32 {
        match class {
            Class::Seal => self.seal,
            Class::Prove => self.prove,
        }
    }

    fn of_mut(&mut self, class: Class) -> &mut u32 {
        match class {
            Class::Seal => &mut self.seal,
            Class::Prove => &mut self.prove,
        }
    }
}

/// Where the hub sends heavy work. Clones share one pool.
#[derive(Clone)]
pub struct Pool(pub(crate) Arc<Shared>);

/// Runs the pool's socket and its worker processes.
pub struct Runner(Arc<Shared>);

impl Pool {
    /// A pool and what runs it. Tasks may be queued before the runner starts.
    #[must_use]
    pub fn new(config: PoolConfig) -> (Self, Runner) {
        let shared = Arc::new(Shared {
            files: Files::new(config.generation),
            config,
            queues: Mutex::default(),
            wake: [Notify::new(), Notify::new()],
            attached: watch::Sender::new(Attached::default()),
            children: Mutex::default(),
            board: Board::default(),
            sessions: TaskTracker::new(),
            stop: CancellationToken::new(),
            next_id: AtomicU64::new(1),
        });
        (Self(shared.clone()), Runner(shared))
    }

    /// Runs a task in a worker of its class and waits for its output.
    ///
    /// A worker that dies over a [repeatable](Task::is_repeatable) task is replaced and the task
    /// repeated, a few times; then the error is of kind [`Transport`](lotus_types::Kind::Transport).
    /// Dropping the future withdraws a task that waits; one that runs ends unheard.
    pub async fn run(&self, task: Task, progress: Option<Progress>) -> Result<Output, WorkError> {
        let (job, answer) = self.job(task, None, progress);
        self.submit(job, answer).await.result
    }

    /// [`Pool::run`] for work that is of no use after `limit`: a worker that takes longer over it
    /// is killed, and the task goes to another as if the worker had died.
    pub async fn run_within(&self, task: Task, limit: Duration) -> Result<Output, WorkError> {
        let (job, answer) = self.job(task, Some(limit), None);
        self.submit(job, answer).await.result
    }

    /// A task with a number.
    pub(crate) fn job(
        &self,
        task: Task,
        limit: Option<Duration>,
        progress: Option<Progress>,
    ) -> (Job, oneshot::Receiver<Answer>) {
        let n = self.0.next_id.fetch_add(1, Ordering::Relaxed);
        Job::new(format!("{n}-{}", task.name()), task, limit, progress)
    }

    /// Waits for a worker and for what it makes.
    pub(crate) async fn submit(&self, job: Job, answer: oneshot::Receiver<Answer>) -> Answer {
        let step = job.step;
        let nobody = |e| Answer {
            result: Err(e),
            by: None,
        };
        if let Err(e) = self.0.push(job) {
            return nobody(e);
        }
        let began = Instant::now();
        let answer = answer.await;
        let answer = answer.unwrap_or_else(|_| nobody(WorkError::Stopping { step }));
        let outcome = answer.result.as_ref();
        let outcome = outcome.map_or_else(|e| e.kind().as_str(), |_| "ok");
        metrics::histogram!("lotus_miner_task_seconds", "step" => step, "outcome" => outcome)
            .record(began.elapsed().as_secs_f64());
        answer
    }

    /// How many workers are attached, as it changes. The hub is ready when each class it
    /// configured has one.
    #[must_use]
    pub fn attached(&self) -> watch::Receiver<Attached> {
        self.0.attached.subscribe()
    }

    /// Tasks that wait for a worker of this class.
    #[must_use]
    pub fn waiting(&self, class: Class) -> usize {
        self.0.queues().of(class).len()
    }
}

impl Runner {
    /// Serves the socket and keeps the workers running until `stop`. Returns after the workers
    /// have left or were killed.
    pub async fn run(self, stop: CancellationToken) -> Result<(), WorkError> {
        let shared = self.0;
        let listener = server::bind(&shared.config.socket())?;
        let end = shared.stop.clone();
        let mut tasks = tokio::task::JoinSet::new();
        if let Some(addr) = shared.config.settings.address().map_err(WorkError::Port)? {
            let authority = Authority::open(&shared.config.authority).map_err(WorkError::Port)?;
            let tls = authority.server_config().map_err(WorkError::Port)?;
            // Last, as it tells others the address.
            let port = listen::bind(addr, &shared.config.run_dir)
                .await
                .map_err(WorkError::Port)?;
            tracing::info!(addr = %port.local_addr().unwrap_or(addr), "workers on other hosts may attach");
            tasks.spawn(server::serve_remote(shared.clone(), port, authority, tls));
        }
        tasks.spawn(server::serve(shared.clone(), listener));
        for class in Class::ALL {
            for n in 0..shared.config.settings.count(class) {
                tasks.spawn(supervise::keep_one(shared.clone(), class, n));
            }
        }
        stop.cancelled().await;
        end.cancel();
        let all_left = async {
            while let Some(ended) = tasks.join_next().await {
                if let Err(e) = ended {
                    tracing::error!(error = %e, "a part of the worker pool panicked");
                }
            }
            shared.sessions.close();
            shared.sessions.wait().await;
        };
        // Workers have `stop_secs`, then they are killed; the rest takes no time, unless a
        // process that this pool did not start hangs on the socket.
        let limit = Duration::from_secs(shared.config.settings.stop_secs.saturating_add(5));
        if tokio::time::timeout(limit, all_left).await.is_err() {
            tracing::warn!("a worker still hangs on the socket: leaving it behind");
        }
        // Dropping the jobs tells their callers.
        shared.queues().clear();
        Ok(())
    }
}

/// A task on its way to a worker.
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) step: &'static str,
    pub(crate) class: Class,
    pub(crate) needs: Needs,
    rank: u8,
    /// The longest that a worker may take over it, if that is less than its class' limit.
    limit: Option<Duration>,
    pub(crate) sector: Option<SectorId>,
    queued_unix_ms: u64,
    pub(crate) task: Task,
    pub(crate) traceparent: String,
    /// Workers that died over it.
    pub(crate) deaths: u32,
    pub(crate) progress: Option<Progress>,
    /// The worker on another host that has it, or had it last.
    pub(crate) by: Option<String>,
    pub(crate) reply: oneshot::Sender<Answer>,
}

/// What became of a task.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) result: Result<Output, WorkError>,
    /// The worker, if it is on another host.
    pub(crate) by: Option<String>,
}

impl Job {
    /// A task on its way, and where its output will be.
    pub(crate) fn new(
        id: String,
        task: Task,
        limit: Option<Duration>,
        progress: Option<Progress>,
    ) -> (Self, oneshot::Receiver<Answer>) {
        let (reply, answer) = oneshot::channel();
        let job = Self {
            id,
            step: task.name(),
            class: task.class(),
            needs: Needs::of(&task),
            rank: task.rank(),
            limit,
            sector: task.sector(),
            queued_unix_ms: unix_ms(),
            task,
            traceparent: lotus_runtime::trace::current(),
            deaths: 0,
            progress,
            by: None,
            reply,
        };
        (job, answer)
    }

    /// Whether a worker on another host has but one try, as the caller sees to the next.
    const fn has_one_try(&self) -> bool {
        matches!(self.class, Class::Prove) && self.by.is_some()
    }

    /// How long a worker may take over it, of what its class has.
    pub(crate) fn time(&self, of_class: Duration) -> Duration {
        let all = self.limit.map_or(of_class, |l| l.min(of_class));
        if self.has_one_try() { all / 2 } else { all }
    }

    /// Whether another worker may do it after so many were lost over it, this one included.
    pub(crate) fn may_be_repeated(&self, deaths_per_task: u32) -> bool {
        let repeatable = self.task.is_repeatable() || self.by.is_some();
        repeatable && !self.has_one_try() && self.deaths < deaths_per_task
    }

    /// How it is shown while it waits.
    pub(crate) fn info(&self) -> JobInfo {
        JobInfo {
            id: self.id.clone(),
            step: self.step.into(),
            class: self.class,
            sector: self.sector,
            worker: None,
            since_unix_ms: self.queued_unix_ms,
            progress: None,
            blocked: None,
        }
    }

    pub(crate) fn finish(self, result: Result<Output, WorkError>) {
        let answer = Answer {
            result,
            by: self.by,
        };
        if self.reply.send(answer).is_err() {
            tracing::debug!(task = self.id, "the caller no longer waits for this task");
        }
    }
}

/// What the pool's handle, its socket and its supervisors share.
pub(crate) struct Shared {
    pub(crate) config: PoolConfig,
    queues: Mutex<Queues>,
    wake: [Notify; 2],
    attached: watch::Sender<Attached>,
    /// Worker processes that this pool started, by pid.
    pub(crate) children: Mutex<HashMap<u32, ChildHandle>>,
    pub(crate) board: Board,
    /// Files of tasks that workers on other hosts have.
    pub(crate) files: Files,
    /// Attached streams.
    pub(crate) sessions: TaskTracker,
    pub(crate) stop: CancellationToken,
    next_id: AtomicU64,
}

/// A poisoned lock means that a thread panicked in a few lines that keep no invariant open.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn queues(&self) -> MutexGuard<'_, Queues> {
        lock(&self.queues)
    }

    fn wake(&self, class: Class) -> &Notify {
        match class {
            Class::Seal => &self.wake[0],
            Class::Prove => &self.wake[1],
        }
    }

    fn push(&self, job: Job) -> Result<(), WorkError> {
        let class = job.class;
        {
            let mut queues = self.queues();
            // Under the lock, as the runner cancels first and empties the queues after.
            if self.stop.is_cancelled() {
                return Err(WorkError::Stopping { step: job.step });
            }
            let queue = queues.of_mut(class);
            if queue.len() >= QUEUE_LIMIT {
                return Err(WorkError::QueueFull {
                    class: class.as_str(),
                    limit: QUEUE_LIMIT,
                });
            }
            let after = queue.iter().position(|j| j.rank > job.rank);
            queue.insert(after.unwrap_or(queue.len()), job);
        }
        // All: which worker it is for is seen when they look.
        self.wake(class).notify_waiters();
        Ok(())
    }

    /// The tasks that wait.
    pub(crate) fn waiting(&self) -> Vec<JobInfo> {
        let queues = self.queues();
        let waiting = queues.of(Class::Prove).iter().chain(queues.of(Class::Seal));
        let waiting = waiting.filter(|j| !j.reply.is_closed());
        let info = |job: &Job| JobInfo {
            blocked: queues.blocked(job),
            ..job.info()
        };
        waiting.map(info).collect()
    }

    /// Takes a waiting task out of its queue.
    pub(crate) fn withdraw(&self, id: &str) -> Option<Job> {
        let mut queues = self.queues();
        Class::ALL.into_iter().find_map(|class| {
            let queue = queues.of_mut(class);
            let at = queue.iter().position(|j| j.id == id)?;
            queue.remove(at)
        })
    }

    /// Puts a task whose worker died before all others.
    pub(crate) fn push_back(&self, job: Job) {
        let class = job.class;
        self.queues().of_mut(class).push_front(job);
        self.wake(class).notify_waiters();
    }

    /// The next task for a worker. Cancel-safe: a task leaves the queue only when it is returned.
    pub(crate) async fn next(&self, class: Class, worker: u64) -> Job {
        loop {
            let mut notified = std::pin::pin!(self.wake(class).notified());
            // Before the look, or a task that comes between look and wait would be missed.
            notified.as_mut().enable();
            let taken = self.queues().take(worker);
            if let Some(job) = taken {
                // This worker is less free now: what was left to it may go to others.
                self.wake(class).notify_waiters();
                return job;
            }
            notified.await;
        }
    }

    /// A worker is there.
    pub(crate) fn join(&self, worker: u64, taker: Taker) {
        let counts = taker.counts();
        let class = taker.class;
        self.queues().join(worker, taker);
        self.count_attached(class, counts, true);
    }

    /// A worker is gone: what waited for it may go to others.
    pub(crate) fn leave(&self, worker: u64, class: Class) {
        let taker = self.queues().leave(worker);
        self.count_attached(class, taker.is_some_and(|t| t.counts()), false);
        self.wake(class).notify_waiters();
    }

    /// A worker has done a task, and has room for another.
    pub(crate) fn done(&self, worker: u64, class: Class, job: &str) {
        self.queues().end(worker, job);
        self.wake(class).notify_waiters();
    }

    /// Counts a worker of `class` in or out, if it counts.
    fn count_attached(&self, class: Class, counts: bool, joins: bool) {
        if !counts {
            return;
        }
        self.attached.send_modify(|a| {
            let n = a.of_mut(class);
            *n = if joins {
                n.saturating_add(1)
            } else {
                n.saturating_sub(1)
            };
            metrics::gauge!("lotus_miner_workers_attached", "class" => class.as_str()).set(*n);
        });
    }
}
