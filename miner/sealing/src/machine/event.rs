use cid::Cid;
use lotus_proofs::SealedCommitments;
use lotus_types::{DealKey, Epoch};
use serde::{Deserialize, Serialize};

use super::{Claim, SealSeed, SealTicket, SectorPiece};

/// What happens to a sector.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "an event lives for one step and is never kept"
)]
pub enum Event {
    /// A piece was placed; the first one opens the sector.
    PieceAdded {
        /// The piece at its offset.
        piece: SectorPiece,
        /// Now, Unix milliseconds.
        unix_ms: u64,
    },
    /// The operator asked for a sector without pieces.
    Pledged {
        /// Now, Unix milliseconds.
        unix_ms: u64,
    },
    /// The sector takes no more pieces.
    StartPacking,
    /// The sector's data is complete.
    PiecesWritten,
    /// The allocations were looked up.
    Packed {
        /// Those that the chain has, by deal.
        claims: Vec<(DealKey, Claim)>,
    },
    /// Sealing randomness.
    Ticket(SealTicket),
    /// The chain would not take the ticket any more.
    TicketExpired,
    /// PreCommit1 is done; its output is stored.
    PreCommit1Done,
    /// PreCommit2 is done.
    PreCommit2Done(SealedCommitments),
    /// The pre-commit message is journaled and on its way.
    PreCommitSent(Cid),
    /// The chain has the pre-commit, with this replica.
    PreCommitLanded {
        /// Since when.
        epoch: Epoch,
    },
    /// The chain does not have the pre-commit any more: a reorg.
    PreCommitLost,
    /// Interactive randomness.
    SeedReady(SealSeed),
    /// The seal proof is made and stored.
    Proved,
    /// The prove-commit message is journaled and on its way.
    CommitSent(Cid),
    /// The chain has the sector.
    CommitLanded {
        /// Since when.
        activation: Epoch,
        /// Until when.
        expiration: Epoch,
    },
    /// What only sealing needed is gone from the disk.
    Finalized,
    /// The work of this state failed: proof, disk, or data.
    Failed(String),
    /// The chain refused the message of this state.
    Refused {
        /// Its reason.
        why: String,
        /// The message with the present number is spent: the next needs a new one.
        spent: bool,
        /// The proof was the reason.
        bad_proof: bool,
    },
    /// The time of the next try is here.
    Retry,
    /// The chain will never take this sector.
    Abandoned(String),
    /// The operator gives the sector up.
    Remove,
    /// Its files are deleted.
    FilesRemoved,
}

impl Event {
    /// Name in the sector's log, after Lotus.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::PieceAdded { .. } => "SectorAddPiece",
            Self::Pledged { .. } => "SectorStartCC",
            Self::StartPacking => "SectorStartPacking",
            Self::PiecesWritten => "SectorPieceAdded",
            Self::Packed { .. } => "SectorPacked",
            Self::Ticket(_) => "SectorTicket",
            Self::TicketExpired => "SectorTicketExpired",
            Self::PreCommit1Done => "SectorPreCommit1",
            Self::PreCommit2Done(_) => "SectorPreCommit2",
            Self::PreCommitSent(_) => "SectorPreCommitBatchSent",
            Self::PreCommitLanded { .. } => "SectorPreCommitLanded",
            Self::PreCommitLost => "SectorPreCommitLost",
            Self::SeedReady(_) => "SectorSeedReady",
            Self::Proved => "SectorProofReady",
            Self::CommitSent(_) => "SectorCommitAggregateSent",
            Self::CommitLanded { .. } => "SectorCommitLanded",
            Self::Finalized => "SectorFinalized",
            Self::Failed(_) => "SectorStepFailed",
            Self::Refused { .. } => "SectorChainRefused",
            Self::Retry => "SectorRetry",
            Self::Abandoned(_) => "SectorAbandoned",
            Self::Remove => "SectorRemove",
            Self::FilesRemoved => "SectorRemoved",
        }
    }

    /// One line for the sector's log.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Self::PieceAdded { piece, .. } => format!(
                "piece {} of deal {} at {}",
                piece.piece.cid, piece.key, piece.offset
            ),
            Self::Packed { claims } => format!("{} allocations on chain", claims.len()),
            Self::Ticket(t) => format!("ticket of epoch {}", t.epoch),
            Self::PreCommit2Done(c) => format!("replica {}", c.comm_r.sealed_cid()),
            Self::PreCommitSent(cid) | Self::CommitSent(cid) => format!("message {cid}"),
            Self::PreCommitLanded { epoch } => format!("on chain since epoch {epoch}"),
            Self::SeedReady(s) => format!("seed of epoch {}", s.epoch),
            Self::CommitLanded {
                activation,
                expiration,
            } => format!("active from epoch {activation} to {expiration}"),
            Self::Failed(why) | Self::Refused { why, .. } | Self::Abandoned(why) => why.clone(),
            Self::Pledged { .. }
            | Self::StartPacking
            | Self::PiecesWritten
            | Self::TicketExpired
            | Self::PreCommit1Done
            | Self::PreCommitLost
            | Self::Proved
            | Self::Finalized
            | Self::Retry
            | Self::Remove
            | Self::FilesRemoved => String::new(),
        }
    }
}

/// What is done for a sector: one effect for each state, see [`SectorState::effect`]. Each is
/// done again after a restart, and looks first at what it did before.
///
/// [`SectorState::effect`]: super::SectorState::effect
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// Watch the clock and the chain until the sector must close.
    WaitForPieces,
    /// Write the pieces and zeros into the sector's data.
    WritePieces,
    /// Look the allocations up.
    CheckPieces,
    /// Take sealing randomness.
    TakeTicket,
    /// Label the graph.
    PreCommit1,
    /// Encode the replica.
    PreCommit2,
    /// Send the pre-commit, unless the chain has it.
    SendPreCommit,
    /// Wait for its receipt.
    AwaitPreCommit,
    /// Wait for interactive randomness.
    AwaitSeed,
    /// Make the seal proof.
    Prove,
    /// Send the prove-commit, unless the chain has the sector.
    SendCommit,
    /// Wait for its receipt.
    AwaitCommit,
    /// Drop what only sealing needed.
    Finalize,
    /// Delete the sector's files.
    Remove,
    /// Wait, longer after each failure, then try again.
    RetryLater,
}
