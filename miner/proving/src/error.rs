use lotus_journal::JournalError;
use lotus_messages::SendError;
use lotus_node_client::NodeError;
use lotus_types::{Kind, SectorNumber};
use lotus_workers::WorkError;

use crate::FenceError;

/// Why a proof, a declaration or a block was not made this time.
#[derive(Debug, thiserror::Error)]
pub enum ProvingError {
    /// The node.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The worker, or the proof code in it.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// The message.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The fence around block production.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// No sector of the partition can be proven.
    #[error("none of the {count} sectors can be read, first {first}")]
    Unreadable {
        /// Sectors that had to be proven.
        count: usize,
        /// The lowest of them.
        first: SectorNumber,
    },
    /// The chain's data do not fit together.
    #[error("{what}: {why}")]
    Inconsistent {
        /// What was looked at.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The chain executed the message and refused it.
    #[error("{what} landed with {exit}")]
    Landed {
        /// The message's key.
        what: String,
        /// Name of the exit code.
        exit: String,
    },
}

impl ProvingError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Node(e) => e.kind(),
            Self::Work(e) => e.kind(),
            Self::Send(e) => e.kind(),
            Self::Journal(e) => e.kind(),
            Self::Fence(e) => e.kind(),
            Self::Unreadable { .. } => Kind::Fatal,
            Self::Inconsistent { .. } | Self::Landed { .. } => Kind::Chain,
        }
    }

    /// What the operator can do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Node(e) => e.fix(),
            Self::Work(e) => e.fix(),
            Self::Send(e) => e.fix(),
            Self::Journal(e) => e.fix(),
            Self::Fence(e) => e.fix(),
            Self::Unreadable { .. } => {
                "attach the storage that holds these sectors, or restore it; they are proven again \
                 as soon as they can be read"
                    .into()
            }
            Self::Inconsistent { .. } => {
                "see whether the node is in sync; it is tried again".into()
            }
            Self::Landed { .. } => "it is sent anew; report it with the log if it repeats".into(),
        }
    }
}
