use std::io;

use lotus_journal::JournalError;
use lotus_messages::SendError;
use lotus_node_client::NodeError;
use lotus_types::{DealKey, Epoch, Kind, PaddedSize, SectorNumber, SectorSize};
use lotus_workers::WorkError;

use crate::StorageError;
use crate::machine::SectorState;

/// Why sealing could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SealingError {
    /// The journal can not be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The node did not answer, or refused a call.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// A message could not be sent.
    #[error(transparent)]
    Send(Box<SendError>),
    /// A worker failed.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// A file could not be read, written or moved.
    #[error("sector files: {0}")]
    Files(#[from] io::Error),
    /// No path takes files, or the path that has them is not there.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Every sector that takes pieces is full and no more may be opened now.
    #[error("no sector can take the piece now: {sealing} sectors are being sealed")]
    NoRoom {
        /// Sectors between `WaitDeals` and `Proving`.
        sealing: usize,
    },
    /// The piece is larger than a sector.
    #[error("a piece of {piece} padded bytes does not fit a {sector} sector")]
    TooLarge {
        /// Its size.
        piece: PaddedSize,
        /// The sector's.
        sector: SectorSize,
    },
    /// The deal is placed already, with another piece.
    #[error("deal {key} is placed already, with another piece")]
    OtherPiece {
        /// The deal.
        key: DealKey,
    },
    /// The deal should have begun.
    #[error("deal {key} should have begun at epoch {start}, and it is epoch {head}")]
    DealExpired {
        /// The deal.
        key: DealKey,
        /// First epoch of the deal.
        start: Epoch,
        /// The chain's head.
        head: Epoch,
    },
    /// The chain needs the sector.
    #[error("sector {number} can not be removed: {why}")]
    Needed {
        /// The sector.
        number: SectorNumber,
        /// Why.
        why: String,
    },
    /// There is no such sector.
    #[error("there is no sector {0}")]
    NoSector(SectorNumber),
    /// The sector is in a state in which this can not be done.
    #[error("sector {number} is in state {state}, and this is only for sectors {wanted}")]
    WrongState {
        /// The sector.
        number: SectorNumber,
        /// Its state.
        state: SectorState,
        /// Which states are needed.
        wanted: &'static str,
    },
    /// The chain's answer and the journal contradict each other, or an answer does not decode.
    #[error("{0}")]
    Chain(String),
    /// The hub stops.
    #[error("stopping")]
    Stopped,
}

impl From<SendError> for SealingError {
    fn from(e: SendError) -> Self {
        Self::Send(Box::new(e))
    }
}

impl SealingError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Journal(e) => e.kind(),
            Self::Node(e) => e.kind(),
            Self::Send(e) => e.kind(),
            Self::Work(e) => e.kind(),
            Self::Storage(e) => e.kind(),
            Self::Files(e) if e.kind() == io::ErrorKind::StorageFull => Kind::Capacity,
            Self::Files(_) => Kind::Fatal,
            Self::NoRoom { .. } => Kind::Capacity,
            Self::TooLarge { .. }
            | Self::OtherPiece { .. }
            | Self::DealExpired { .. }
            | Self::Needed { .. }
            | Self::NoSector(_)
            | Self::WrongState { .. } => Kind::Data,
            Self::Chain(_) => Kind::Chain,
            Self::Stopped => Kind::Transport,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Journal(e) => e.fix(),
            Self::Node(e) => e.fix(),
            Self::Send(e) => e.fix(),
            Self::Work(e) => e.fix(),
            Self::Storage(e) => e.fix(),
            Self::Files(_) => {
                "check the disk of the sectors: space, permissions, health; it is tried again"
                    .into()
            }
            Self::NoRoom { .. } => {
                "wait until a sector is done, or raise sealing.max_sealing_sectors".into()
            }
            Self::TooLarge { sector, .. } => {
                format!(
                    "split the data into pieces of at most {} padded bytes",
                    sector.bytes()
                )
            }
            Self::OtherPiece { .. } => "give each deal its own id".into(),
            Self::DealExpired { .. } => "make the deal again, with a later start epoch".into(),
            Self::Needed { number, .. } => {
                format!("see `lotus-miner sectors status {number}` and `sectors terminate`")
            }
            Self::NoSector(_) => "see `lotus-miner sectors list`".into(),
            Self::WrongState { number, .. } => {
                format!("see `lotus-miner sectors status {number} --log`")
            }
            Self::Chain(_) => "compare `lotus-miner sectors status` with the chain".into(),
            Self::Stopped => "start the hub again: everything is journaled".into(),
        }
    }
}
