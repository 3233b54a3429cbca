use std::io;
use std::path::{Path, PathBuf};

use lotus_journal::JournalError;
use lotus_types::{Kind, SectorId};

use super::meta::PathId;
use super::place::Refusal;

/// Why files of sectors are not where they should be.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The journal can not be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A file could not be read, written or moved.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// No path takes the files.
    #[error("no storage path takes the files of {sector}{}", listed(refusals))]
    NoPlace {
        /// The sector.
        sector: SectorId,
        /// Why not, for each path.
        refusals: Vec<(PathId, Refusal)>,
    },
    /// The path with the files is not there.
    #[error("files of {sector} are in storage path {path}: {why}")]
    Gone {
        /// The sector.
        sector: SectorId,
        /// The path.
        path: PathId,
        /// What is wrong with it.
        why: String,
    },
    /// The files were replaced or deleted while they were copied.
    #[error("the files of {0} changed while they were copied")]
    Changed(SectorId),
    /// There is no such path.
    #[error("there is no storage path {0}")]
    NoPath(PathId),
    /// What the operator asked for would do harm.
    #[error("{why}")]
    Refused {
        /// Why.
        why: String,
        /// What to do.
        fix: String,
    },
    /// The hub stops.
    #[error("stopping")]
    Stopped,
}

fn listed(refusals: &[(PathId, Refusal)]) -> String {
    let each = refusals.iter();
    each.map(|(path, why)| format!("; {path}: {why}")).collect()
}

impl StorageError {
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(super) fn refused(why: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Refused {
            why: why.into(),
            fix: fix.into(),
        }
    }

    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Journal(e) => e.kind(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Kind::Capacity
            }
            Self::Io { .. } => Kind::Fatal,
            Self::NoPlace { .. } => Kind::Capacity,
            Self::Gone { .. } | Self::Changed(_) | Self::Stopped => Kind::Transport,
            Self::NoPath(_) | Self::Refused { .. } => Kind::Data,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Journal(e) => e.fix(),
            Self::Io { .. } => {
                "check the disk of the sectors: space, permissions, health; it is tried again"
                    .into()
            }
            Self::NoPlace { .. } => "see `lotus-miner storage list`; free space, or attach a path \
                 with `lotus-miner storage attach`; it is tried again"
                .into(),
            Self::Gone { .. } => "mount it again; if it is lost, `lotus-miner storage detach` \
                 forgets its sectors; it is tried again"
                .into(),
            Self::Changed(_) => "it is tried again".into(),
            Self::NoPath(_) => "see `lotus-miner storage list`".into(),
            Self::Refused { fix, .. } => fix.clone(),
            Self::Stopped => "start the hub again: everything is journaled".into(),
        }
    }
}
