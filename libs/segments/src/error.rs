use std::io;
use std::path::{Path, PathBuf};

use lotus_types::Kind;

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum SegmentsError {
    /// Another process, or another part of this one, has the folder open.
    #[error("the segments in {} are in use", dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// The disk is full; nothing was changed.
    #[error("no space left on the disk of {}", path.display())]
    DiskFull {
        /// What was written.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file is not as it was written.
    #[error("{} is damaged: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A block has no place in a record.
    #[error("a block of {len} bytes at {offset} is out of range: less than 16 MiB within 1 TiB")]
    OutOfRange {
        /// Where it starts.
        offset: u64,
        /// Its length.
        len: u32,
    },
    /// A piece's number is given to another piece.
    #[error("piece number {piece} is in use")]
    Known {
        /// The number.
        piece: u32,
    },
}

impl SegmentsError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io { path, source },
        }
    }

    pub(crate) fn corrupt(path: &Path, what: impl Into<String>) -> Self {
        Self::Corrupt {
            path: path.into(),
            what: what.into(),
        }
    }

    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Locked { .. } => Kind::Config,
            Self::DiskFull { .. } => Kind::Capacity,
            Self::Io { .. } | Self::Corrupt { .. } | Self::Known { .. } => Kind::Fatal,
            Self::OutOfRange { .. } => Kind::Data,
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
            Self::DiskFull { .. } => "free space on that disk; it is retried".into(),
            Self::Io { .. } => "check the disk and the permissions of the folder".into(),
            Self::Corrupt { .. } => {
                "check the disk; the folder can be deleted, it is rebuilt from the pieces".into()
            }
            Self::Known { .. } => "report this, with the log".into(),
            Self::OutOfRange { .. } => "store the data in smaller pieces or blocks".into(),
        }
    }
}
