use std::fmt;

use serde::{Deserialize, Serialize};

use super::Effect;

/// Sealing state of a sector, under the names of Lotus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum SectorState {
    /// Takes pieces.
    WaitDeals,
    /// The pieces, and zeros between them, are written into the sector's data.
    AddPiece,
    /// The pieces' allocations are checked against the chain.
    Packing,
    /// Takes sealing randomness from the chain.
    GetTicket,
    /// Labels the graph.
    PreCommit1,
    /// Encodes the replica and builds its trees.
    PreCommit2,
    /// Sends the pre-commit message.
    SubmitPreCommitBatch,
    /// Waits for the pre-commit on chain.
    PreCommitBatchWait,
    /// Waits for interactive randomness.
    WaitSeed,
    /// Makes the seal proof.
    Committing,
    /// Sends the prove-commit message.
    SubmitCommitAggregate,
    /// Waits for the prove-commit on chain.
    CommitAggregateWait,
    /// Drops what only sealing needed.
    FinalizeSector,
    /// On chain and proven from now on.
    Proving,
    /// Writing the pieces failed; tried again.
    AddPieceFailed,
    /// The pieces can not be laid out; tried again.
    PackingFailed,
    /// PreCommit1 failed; tried again, in the end from `AddPiece`.
    SealPreCommit1Failed,
    /// PreCommit2 failed; tried again, in the end from `PreCommit1`.
    SealPreCommit2Failed,
    /// The chain refused the pre-commit; what is on chain is looked at, then sent again.
    PreCommitFailed,
    /// The seal proof could not be made; tried again, in the end from `PreCommit1`.
    ComputeProofFailed,
    /// The chain refused the prove-commit; what is on chain is looked at, then sent again.
    CommitFailed,
    /// Cleaning up failed; tried again. The sector is on chain already.
    FinalizeFailed,
    /// The chain will never take this sector, for the reason that the record gives. The operator
    /// removes it; its deals must be made again.
    FailedUnrecoverable,
    /// The operator asked to remove it; its files are being deleted.
    Removing,
    /// Deleting the files failed; tried again.
    RemoveFailed,
    /// Gone from the disk.
    Removed,
}

impl SectorState {
    /// Every state, in the order of the happy path, failures last.
    pub const ALL: [Self; 26] = [
        Self::WaitDeals,
        Self::AddPiece,
        Self::Packing,
        Self::GetTicket,
        Self::PreCommit1,
        Self::PreCommit2,
        Self::SubmitPreCommitBatch,
        Self::PreCommitBatchWait,
        Self::WaitSeed,
        Self::Committing,
        Self::SubmitCommitAggregate,
        Self::CommitAggregateWait,
        Self::FinalizeSector,
        Self::Proving,
        Self::AddPieceFailed,
        Self::PackingFailed,
        Self::SealPreCommit1Failed,
        Self::SealPreCommit2Failed,
        Self::PreCommitFailed,
        Self::ComputeProofFailed,
        Self::CommitFailed,
        Self::FinalizeFailed,
        Self::FailedUnrecoverable,
        Self::Removing,
        Self::RemoveFailed,
        Self::Removed,
    ];

    /// The name as Lotus writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WaitDeals => "WaitDeals",
            Self::AddPiece => "AddPiece",
            Self::Packing => "Packing",
            Self::GetTicket => "GetTicket",
            Self::PreCommit1 => "PreCommit1",
            Self::PreCommit2 => "PreCommit2",
            Self::SubmitPreCommitBatch => "SubmitPreCommitBatch",
            Self::PreCommitBatchWait => "PreCommitBatchWait",
            Self::WaitSeed => "WaitSeed",
            Self::Committing => "Committing",
            Self::SubmitCommitAggregate => "SubmitCommitAggregate",
            Self::CommitAggregateWait => "CommitAggregateWait",
            Self::FinalizeSector => "FinalizeSector",
            Self::Proving => "Proving",
            Self::AddPieceFailed => "AddPieceFailed",
            Self::PackingFailed => "PackingFailed",
            Self::SealPreCommit1Failed => "SealPreCommit1Failed",
            Self::SealPreCommit2Failed => "SealPreCommit2Failed",
            Self::PreCommitFailed => "PreCommitFailed",
            Self::ComputeProofFailed => "ComputeProofFailed",
            Self::CommitFailed => "CommitFailed",
            Self::FinalizeFailed => "FinalizeFailed",
            Self::FailedUnrecoverable => "FailedUnrecoverable",
            Self::Removing => "Removing",
            Self::RemoveFailed => "RemoveFailed",
            Self::Removed => "Removed",
        }
    }

    /// What is done in this state; `None` where nothing is left to do or only the operator can.
    #[must_use]
    pub const fn effect(self) -> Option<Effect> {
        match self {
            Self::WaitDeals => Some(Effect::WaitForPieces),
            Self::AddPiece => Some(Effect::WritePieces),
            Self::Packing => Some(Effect::CheckPieces),
            Self::GetTicket => Some(Effect::TakeTicket),
            Self::PreCommit1 => Some(Effect::PreCommit1),
            Self::PreCommit2 => Some(Effect::PreCommit2),
            Self::SubmitPreCommitBatch => Some(Effect::SendPreCommit),
            Self::PreCommitBatchWait => Some(Effect::AwaitPreCommit),
            Self::WaitSeed => Some(Effect::AwaitSeed),
            Self::Committing => Some(Effect::Prove),
            Self::SubmitCommitAggregate => Some(Effect::SendCommit),
            Self::CommitAggregateWait => Some(Effect::AwaitCommit),
            Self::FinalizeSector => Some(Effect::Finalize),
            Self::Removing => Some(Effect::Remove),
            Self::AddPieceFailed
            | Self::PackingFailed
            | Self::SealPreCommit1Failed
            | Self::SealPreCommit2Failed
            | Self::PreCommitFailed
            | Self::ComputeProofFailed
            | Self::CommitFailed
            | Self::FinalizeFailed
            | Self::RemoveFailed => Some(Effect::RetryLater),
            Self::Proving | Self::FailedUnrecoverable | Self::Removed => None,
        }
    }

    /// Whether something went wrong.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        matches!(self.effect(), Some(Effect::RetryLater))
            || matches!(self, Self::FailedUnrecoverable)
    }

    /// Whether the sector takes up sealing room: it has begun and is not done.
    #[must_use]
    pub const fn is_sealing(self) -> bool {
        self.effect().is_some() && !matches!(self, Self::WaitDeals)
    }
}

impl fmt::Display for SectorState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
