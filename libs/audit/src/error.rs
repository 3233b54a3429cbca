use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lotus_types::Kind;

/// Why the log failed. One failure is told to all that waited for it, so it can be cloned.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AuditError {
    /// Another process, or another part of this one, has the log open.
    #[error("the audit log in {} is in use", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// The disk is full; nothing of the record is in the log.
    #[error("no space left on the disk of {}", path.display())]
    DiskFull {
        /// What was written.
        path: PathBuf,
    },
    /// A file can not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: Arc<io::Error>,
    },
    /// The disk is too slow for what is appended.
    #[error(
        "{queued} records wait for the disk of the audit log, and none was written in {waited:?}"
    )]
    QueueFull {
        /// How many wait.
        queued: usize,
        /// How long this one waited for a place.
        waited: Duration,
    },
    /// The thread that writes has ended. Only a bug ends it.
    #[error("the audit log takes no records any more")]
    Closed,
    /// There is no log.
    #[error("no audit log in {}", dir.display())]
    NoLog {
        /// The folder.
        dir: PathBuf,
    },
    /// A text is no head of a log.
    #[error("{text:?} is no head of an audit log: a number, a colon, and 64 hexadecimal digits")]
    BadHead {
        /// The text.
        text: String,
    },
}

impl AuditError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |e| match e.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io {
                path,
                source: Arc::new(e),
            },
        }
    }

    /// Who must act.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Locked { .. } => Kind::Config,
            Self::DiskFull { .. } | Self::QueueFull { .. } => Kind::Capacity,
            Self::Io { .. } | Self::Closed => Kind::Fatal,
            Self::NoLog { .. } | Self::BadHead { .. } => Kind::Data,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Locked { dir } => format!(
                "stop the other process (`fuser {}` names it)",
                dir.join("LOCK").display()
            ),
            Self::DiskFull { .. } => "free space on that disk; the next call tries again".into(),
            Self::Io { .. } => "check the disk and the permissions of the folder".into(),
            Self::QueueFull { .. } => {
                "try again; if it stays so, see what keeps that disk busy".into()
            }
            Self::Closed => "restart the hub, and report this, with the log".into(),
            Self::NoLog { .. } => {
                "name the folder of the log: `audit` in the repo of a hub that ran".into()
            }
            Self::BadHead { .. } => "give it as it was printed, as in 17:63b1…".into(),
        }
    }
}
