use std::fmt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use crate::disk::Faults;
use crate::log::{self, Entry, Log};
use crate::{AuditConfig, AuditError, Call, Head, Opened};

/// Records that are written and synced together at most.
const BATCH: usize = 1024;

/// The hub's audit log, open for appending. One thread writes; it is joined, and everything that was
/// appended is on the disk, when this is dropped.
pub struct Audit {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    opened: Opened,
    wait: Duration,
}

#[derive(Debug)]
struct Job {
    entry: Entry,
    done: oneshot::Sender<Result<Head, AuditError>>,
}

struct Shared {
    head: Mutex<Head>,
    /// Held while a place in the queue is looked for, so that no notice of one is missed.
    room: Mutex<()>,
    freed: Condvar,
}

/// A record that was appended and may not be on the disk yet. It gets there without this, too.
#[derive(Debug)]
#[must_use = "a record that is not awaited may fail unseen"]
pub struct Ticket(oneshot::Receiver<Result<Head, AuditError>>);

impl Ticket {
    /// The record's number and hash, once it is on the disk. Waits as long as the disk takes.
    ///
    /// After an error the record is not in the log. Dropping the future does not take the record back.
    pub async fn durable(self) -> Result<Head, AuditError> {
        self.0.await.unwrap_or(Err(AuditError::Closed))
    }

    /// [`Ticket::durable`] for threads that are not of an async runtime; it panics on those.
    pub fn wait(self) -> Result<Head, AuditError> {
        self.0.blocking_recv().unwrap_or(Err(AuditError::Closed))
    }
}

impl fmt::Debug for Audit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Audit({})", self.head())
    }
}

impl Audit {
    /// Opens the log in a folder, or makes a new one; what a crash left at its end is cut and noted.
    ///
    /// Blocks for a few syncs, and up to two seconds while a process that ends still has the log.
    pub fn open(dir: &Path, config: &AuditConfig) -> Result<Self, AuditError> {
        Self::open_with(dir, config, Faults::default(), log::DYING)
    }

    pub(crate) fn open_with(
        dir: &Path,
        config: &AuditConfig,
        faults: Faults,
        patience: Duration,
    ) -> Result<Self, AuditError> {
        let (log, opened) = Log::open(dir, config, faults, now_unix_ms(), patience)?;
        let head = log.head();
        if let Some(cut) = &opened.recovered {
            tracing::warn!(
                file = cut.file,
                bytes = cut.bytes,
                "cut a part of a record, which a crash left"
            );
        }
        if opened.unsound > 0 {
            let (dir, lines) = (dir.display(), opened.unsound);
            tracing::warn!(%dir, lines, "the audit log is damaged at its end; it goes on after that");
        }
        tracing::info!(%head, "the audit log is open");
        let shared = Arc::new(Shared {
            head: Mutex::new(head),
            room: Mutex::default(),
            freed: Condvar::new(),
        });
        let (jobs, queue) = mpsc::channel(config.queue.clamp(1, MOST));
        let thread = std::thread::Builder::new()
            .name("audit".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || run(log, queue, &shared)
            })
            .map_err(AuditError::io(dir))?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            shared,
            opened,
            wait: config.queue_wait(),
        })
    }

    /// Appends a record. What one caller appends gets numbers in that order.
    ///
    /// Returns at once, unless the queue is full: then this blocks its thread for
    /// [`AuditConfig::queue_wait_ms`] at most. Async callers want [`Audit::append_async`].
    pub fn append(&self, call: &Call) -> Result<Ticket, AuditError> {
        let (mut job, ticket) = job(call);
        let jobs = self.jobs()?;
        match jobs.try_send(job) {
            Ok(()) => return Ok(ticket),
            Err(TrySendError::Closed(_)) => return Err(AuditError::Closed),
            Err(TrySendError::Full(back)) => job = back,
        }
        let end = Instant::now() + self.wait;
        let mut room = locked(&self.shared.room);
        loop {
            match jobs.try_send(job) {
                Ok(()) => return Ok(ticket),
                Err(TrySendError::Closed(_)) => return Err(AuditError::Closed),
                Err(TrySendError::Full(back)) => job = back,
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.full(jobs));
            }
            let waited = self.shared.freed.wait_timeout(room, left);
            (room, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// [`Audit::append`] that waits for a place in the queue without blocking the thread. Whoever drops the
    /// future before it is done has appended nothing.
    pub async fn append_async(&self, call: &Call) -> Result<Ticket, AuditError> {
        let (job, ticket) = job(call);
        let jobs = self.jobs()?;
        let job = match jobs.try_send(job) {
            Ok(()) => return Ok(ticket),
            Err(TrySendError::Closed(_)) => return Err(AuditError::Closed),
            Err(TrySendError::Full(back)) => back,
        };
        match tokio::time::timeout(self.wait, jobs.send(job)).await {
            Ok(Ok(())) => Ok(ticket),
            Ok(Err(_)) => Err(AuditError::Closed),
            Err(_) => Err(self.full(jobs)),
        }
    }

    /// The last record that is on the disk. To be noted where those that may write the log can not write.
    #[must_use]
    pub fn head(&self) -> Head {
        *locked(&self.shared.head)
    }

    /// In which state the log was found.
    #[must_use]
    pub const fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Writes what waits, ends the thread, and returns the head.
    #[must_use = "the head is to be noted"]
    pub fn close(mut self) -> Head {
        self.end();
        self.head()
    }

    fn end(&mut self) {
        drop(self.jobs.take());
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("the thread of the audit log has panicked");
        }
    }

    fn jobs(&self) -> Result<&mpsc::Sender<Job>, AuditError> {
        self.jobs.as_ref().ok_or(AuditError::Closed)
    }

    fn full(&self, jobs: &mpsc::Sender<Job>) -> AuditError {
        AuditError::QueueFull {
            queued: jobs.max_capacity(),
            waited: self.wait,
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.end();
    }
}

/// Longest queue.
const MOST: usize = 1 << 20;

fn job(call: &Call) -> (Job, Ticket) {
    let (done, ticket) = oneshot::channel();
    let entry = Entry::new(now_unix_ms(), call);
    (Job { entry, done }, Ticket(ticket))
}

fn run(mut log: Log, mut queue: mpsc::Receiver<Job>, shared: &Shared) {
    let (mut jobs, mut done) = (Vec::new(), Vec::new());
    let mut failing = false;
    while queue.blocking_recv_many(&mut jobs, BATCH) > 0 {
        drop(locked(&shared.room));
        shared.freed.notify_all();
        let (entries, waiting): (Vec<_>, Vec<_>) =
            jobs.drain(..).map(|j| (j.entry, j.done)).unzip();
        let appended = log.append(&entries, &mut done);
        *locked(&shared.head) = log.head();
        let error = appended.err();
        // Whoever appended has the error; this is for those who did not wait for it.
        if let Some(e) = &error
            && !failing
        {
            tracing::error!(
                "records do not get into the audit log: {e}\n  fix: {}",
                e.fix()
            );
        }
        failing = error.is_some();
        let mut heads = done.drain(..);
        for waiting in waiting {
            let result = match heads.next() {
                Some(head) => Ok(head),
                None => Err(error.clone().unwrap_or(AuditError::Closed)),
            };
            // Not everybody waits.
            drop(waiting.send(result));
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
