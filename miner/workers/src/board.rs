use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use lotus_types::SectorId;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::pool::{Job, lock};
use crate::{Class, Declared, Pool, WorkError};

/// A task that waits for a worker or is being done, as operators see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its number since the hub started, and its step: `12-pre_commit1`.
    pub id: String,
    /// [`Task::name`](crate::Task::name).
    pub step: String,
    /// Which workers do it.
    pub class: Class,
    /// The sector, where the task is about one.
    pub sector: Option<SectorId>,
    /// The worker that does it; `None` while it waits.
    pub worker: Option<u64>,
    /// Since when it waits, or is being done, Unix milliseconds.
    pub since_unix_ms: u64,
    /// How far it is, 0 to 1, if its worker can tell.
    pub progress: Option<f64>,
    /// Why no attached worker can do it, if it waits for that.
    pub blocked: Option<String>,
}

/// An attached worker, as operators see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// Counts up with each worker that attaches to this hub.
    pub id: u64,
    /// What it does.
    pub class: Class,
    /// Tasks that it takes at a time.
    pub slots: usize,
    /// Its process, if it is on this host.
    pub pid: Option<u32>,
    /// Its name, host and address, if it is on another host.
    pub host: Option<String>,
    /// What a worker on another host says that it has.
    pub declared: Option<Declared>,
    /// When it attached, Unix milliseconds.
    pub since_unix_ms: u64,
}

/// What the workers are doing. It decides nothing.
#[derive(Default)]
pub(crate) struct Board(Mutex<Notes>);

#[derive(Default)]
struct Notes {
    last_worker: u64,
    workers: BTreeMap<u64, (WorkerInfo, mpsc::UnboundedSender<String>)>,
    tasks: BTreeMap<String, Started>,
}

struct Started {
    info: JobInfo,
    aborted: bool,
}

impl Board {
    /// Notes a worker. The channel has the tasks that it must give up, each once.
    pub(crate) fn join(
        &self,
        class: Class,
        slots: usize,
        pid: Option<u32>,
        remote: Option<(String, Declared)>,
    ) -> (u64, mpsc::UnboundedReceiver<String>) {
        let mut notes = lock(&self.0);
        notes.last_worker += 1;
        let (host, declared) = remote.unzip();
        let info = WorkerInfo {
            id: notes.last_worker,
            class,
            slots,
            pid,
            host,
            declared,
            since_unix_ms: unix_ms(),
        };
        // No more than the tasks that it has.
        let (abort, aborts) = mpsc::unbounded_channel();
        let id = info.id;
        notes.workers.insert(id, (info, abort));
        (id, aborts)
    }

    /// A worker is gone. Its tasks are ended one by one.
    pub(crate) fn leave(&self, worker: u64) {
        lock(&self.0).workers.remove(&worker);
    }

    /// A worker begins with a task.
    pub(crate) fn begin(&self, worker: u64, job: &Job) {
        let info = JobInfo {
            worker: Some(worker),
            since_unix_ms: unix_ms(),
            ..job.info()
        };
        let started = Started {
            info,
            aborted: false,
        };
        lock(&self.0).tasks.insert(job.id.clone(), started);
    }

    pub(crate) fn progress(&self, task: &str, fraction: f64) {
        if let Some(started) = lock(&self.0).tasks.get_mut(task) {
            started.info.progress = Some(fraction);
        }
    }

    /// A task is no longer with its worker. True if the operator aborted it.
    pub(crate) fn end(&self, task: &str) -> bool {
        let ended = lock(&self.0).tasks.remove(task);
        ended.is_some_and(|s| s.aborted)
    }

    /// Takes a task away from its worker. `None`: no worker has it.
    fn abort(&self, task: &str) -> Option<Result<(), WorkError>> {
        let mut notes = lock(&self.0);
        let started = notes.tasks.get_mut(task)?;
        if started.info.class == Class::Prove {
            return Some(Err(guarded(task)));
        }
        let before = std::mem::replace(&mut started.aborted, true);
        let worker = started.info.worker?;
        let abort = &notes.workers.get(&worker)?.1;
        // One that is gone already gives up all of its tasks.
        if !before && abort.send(task.to_owned()).is_err() {
            tracing::debug!(task, "its worker was gone");
        }
        Some(Ok(()))
    }
}

/// Proofs have deadlines, and giving one up costs more than waiting for it.
fn guarded(task: &str) -> WorkError {
    WorkError::Guarded { task: task.into() }
}

impl Pool {
    /// Every task: those being done, then those that wait, each in the order of its class' queue.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobInfo> {
        let running = lock(&self.0.board.0);
        let mut jobs: Vec<JobInfo> = running.tasks.values().map(|s| s.info.clone()).collect();
        drop(running);
        jobs.sort_by_key(|j| j.since_unix_ms);
        let waiting = self.0.waiting();
        // One that just went from the queue to a worker is listed once.
        for job in waiting {
            if !jobs.iter().any(|j| j.id == job.id) {
                jobs.push(job);
            }
        }
        jobs
    }

    /// The attached workers.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerInfo> {
        let notes = lock(&self.0.board.0);
        notes.workers.values().map(|(w, _)| w.clone()).collect()
    }

    /// Gives up a seal task for now: its caller hears of [`WorkError::Aborted`], which is a lost
    /// worker to it, and does the step again later. A worker on this host has one task and is killed; one on another host
    /// gives up this task and goes on with its others. Proofs are never given up.
    pub fn abort(&self, task: &str) -> Result<(), WorkError> {
        if let Some(done) = self.0.board.abort(task) {
            return done;
        }
        let waiting = self.0.waiting();
        match waiting.iter().find(|j| j.id == task) {
            Some(job) if job.class == Class::Prove => return Err(guarded(task)),
            _ => {}
        }
        let Some(job) = self.0.withdraw(task) else {
            return Err(WorkError::NoTask { task: task.into() });
        };
        let step = job.step;
        job.finish(Err(WorkError::Aborted { step }));
        Ok(())
    }
}

pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
