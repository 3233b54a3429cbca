use std::path::PathBuf;

use lotus_runtime::Fault;
use lotus_types::Kind;

/// Why a task gave no output.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The worker died, fell silent or was too slow. The task may be run again, unless it is not
    /// [repeatable](crate::Task::is_repeatable).
    #[error("the {class} worker was lost during {step}: {why}")]
    Lost {
        /// Class of the worker.
        class: &'static str,
        /// Name of the task.
        step: &'static str,
        /// What was seen.
        why: String,
    },
    /// The hub is stopping.
    #[error("the hub is stopping; {step} was not finished")]
    Stopping {
        /// Name of the task.
        step: &'static str,
    },
    /// More tasks wait than the queue holds.
    #[error("{limit} {class} tasks are waiting already")]
    QueueFull {
        /// Class of the queue.
        class: &'static str,
        /// Its limit.
        limit: usize,
    },
    /// The operator gave the task up for now.
    #[error("the operator aborted {step}")]
    Aborted {
        /// Name of the task.
        step: &'static str,
    },
    /// There is no such task.
    #[error("no task {task} waits or runs")]
    NoTask {
        /// What was asked for.
        task: String,
    },
    /// The task may not be aborted.
    #[error("{task} is a proof with a deadline: it is not aborted")]
    Guarded {
        /// Its id.
        task: String,
    },
    /// The proof code or the disk says no. `kind` is the worker's.
    #[error("{step}: {message}")]
    Failed {
        /// Name of the task.
        step: &'static str,
        /// Who must act.
        kind: Kind,
        /// What happened.
        message: String,
    },
    /// The worker answered something that this hub does not understand.
    #[error("{step}: unreadable answer from the worker: {why}")]
    BadAnswer {
        /// Name of the task.
        step: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// What a worker on another host brought was not taken.
    #[error("{step}: what the worker brought is not taken: {why}")]
    NotTaken {
        /// Name of the task.
        step: &'static str,
        /// Who must act.
        kind: Kind,
        /// What is wrong with it, or with the hub's disk.
        why: String,
    },
    /// The port for workers on other hosts cannot be served.
    #[error("workers on other hosts: {0}")]
    Port(Fault),
    /// The worker socket cannot be served.
    #[error("worker socket {path:?}: {source}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

impl WorkError {
    /// Who must act.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Lost { .. } | Self::Stopping { .. } | Self::Aborted { .. } => Kind::Transport,
            Self::NoTask { .. } | Self::Guarded { .. } => Kind::Data,
            Self::QueueFull { .. } => Kind::Capacity,
            Self::Failed { kind, .. } | Self::NotTaken { kind, .. } => *kind,
            Self::Port(fault) => fault.kind,
            Self::BadAnswer { .. } => Kind::Fatal,
            Self::Socket { .. } => Kind::Config,
        }
    }

    /// What the operator can do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Lost { .. } => {
                "nothing: another worker takes over; if it repeats, see the worker's log and the \
                 machine's free memory"
                    .into()
            }
            Self::Aborted { .. } => "nothing: the step is done again after a while".into(),
            Self::NoTask { .. } => {
                "see `lotus-miner sealing jobs`: a task that is done is not listed".into()
            }
            Self::Guarded { .. } => "let it end: a missed proof costs more than waiting".into(),
            Self::Stopping { .. } => "start the hub again: it goes on where it stopped".into(),
            Self::QueueFull { .. } => {
                "wait, or raise the number of workers in [workers] of config.toml".into()
            }
            Self::Failed { .. } => {
                "see the worker's log; check free space and the health of the storage".into()
            }
            Self::NotTaken { .. } => {
                "nothing: the step is done again; if it repeats, check the hub's free space and \
                 the worker's log"
                    .into()
            }
            Self::Port(fault) => fault.fix.clone(),
            Self::BadAnswer { .. } => {
                "install hub and workers from one release of lotus-miner".into()
            }
            Self::Socket { path, .. } => format!(
                "make {:?} writable for this user, on a file system with Unix sockets and a path \
                 of under 100 bytes",
                path.parent().unwrap_or(path)
            ),
        }
    }
}

impl From<WorkError> for Fault {
    fn from(e: WorkError) -> Self {
        Self::new(e.kind(), e.to_string(), e.fix())
    }
}
