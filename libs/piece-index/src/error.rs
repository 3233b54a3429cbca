use std::io;
use std::path::{Path, PathBuf};

use lotus_car::CarError;
use lotus_segments::SegmentsError;
use lotus_types::{Kind, PieceCid};

/// Why the index failed.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Another process has the file open.
    #[error("the index {} is in use by another process", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The index has the format of an older version.
    #[error("the index {} has an older format", path.display())]
    Old {
        /// The file.
        path: PathBuf,
    },
    /// The disk is full; nothing was changed.
    #[error("no space left on the disk of the index")]
    DiskFull,
    /// The table of pieces cannot be read or written.
    #[error("index: {0}")]
    Store(Box<redb::Error>),
    /// The segments, or a sidecar, cannot be read or written.
    #[error("index: {0}")]
    Segments(Box<SegmentsError>),
    /// A file cannot be read or written.
    #[error("index: {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// All numbers of pieces were used.
    #[error("the index has had 4,294,967,295 pieces")]
    Full,
    /// A piece mixes too many hash functions and digest lengths.
    #[error("a piece has more than {max} kinds of multihashes")]
    Kinds {
        /// The limit.
        max: usize,
    },
    /// The piece is no CAR that can be indexed.
    #[error("piece {piece} cannot be indexed: {source}")]
    Car {
        /// The piece.
        piece: PieceCid,
        /// What is wrong with it.
        source: Box<CarError>,
    },
}

impl IndexError {
    /// A file that fails.
    pub(crate) fn file(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull,
            _ => Self::File {
                path: path.into(),
                source,
            },
        }
    }

    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Locked { .. } | Self::Old { .. } => Kind::Config,
            Self::DiskFull => Kind::Capacity,
            Self::Store(_) | Self::File { .. } | Self::Full => Kind::Fatal,
            Self::Segments(e) => e.kind(),
            Self::Kinds { .. } => Kind::Data,
            // Reading a leased piece can fail for reasons that pass.
            Self::Car { source, .. } if matches!(**source, CarError::Read { .. }) => {
                Kind::Transport
            }
            Self::Car { source, .. } => source.kind(),
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Locked { path } => format!(
                "stop the other process (`fuser {}` names it), or give this one its own --repo",
                path.display()
            ),
            Self::Old { .. } => "start the service: it rebuilds the index from the pieces".into(),
            Self::DiskFull => "free space on the disk that holds the repo; it is retried".into(),
            Self::Store(_) | Self::File { .. } => {
                "check the disk; the index can be deleted, it is rebuilt from the pieces".into()
            }
            Self::Segments(e) => match **e {
                SegmentsError::Corrupt { .. } => {
                    "check the disk, then `lotus-markets index rebuild`".into()
                }
                _ => e.fix(),
            },
            Self::Full => "delete the index; it is rebuilt from the pieces".into(),
            Self::Kinds { .. } => "pack the data with one hash function".into(),
            Self::Car { source, .. } => source.fix(),
        }
    }
}

impl From<redb::Error> for IndexError {
    fn from(e: redb::Error) -> Self {
        match e {
            redb::Error::Io(io) if io.kind() == io::ErrorKind::StorageFull => Self::DiskFull,
            other => Self::Store(Box::new(other)),
        }
    }
}

macro_rules! of_redb {
    ($($error:ident),*) => {$(
        impl From<redb::$error> for IndexError {
            fn from(e: redb::$error) -> Self {
                redb::Error::from(e).into()
            }
        }
    )*};
}

of_redb!(
    DatabaseError,
    TransactionError,
    TableError,
    StorageError,
    CommitError
);

impl From<SegmentsError> for IndexError {
    fn from(e: SegmentsError) -> Self {
        match e {
            SegmentsError::Locked { dir } => Self::Locked {
                path: dir.join("LOCK"),
            },
            SegmentsError::DiskFull { .. } => Self::DiskFull,
            e => Self::Segments(Box::new(e)),
        }
    }
}
