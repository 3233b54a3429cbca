use cid::Cid;
use lotus_proofs::SealedCommitments;
use lotus_types::{DealKey, Epoch};
use serde::{Deserialize, Serialize};

use super::{Claim, Found, FoundAt, SealSeed, SealTicket, SectorPiece, SectorState};

/// Why the chain refused a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Funds were short: nothing is wrong with the sector.
    Money,
    /// Gas was short: the message may be too large, nothing is wrong with the sector.
    Gas,
    /// The proof.
    Proof,
    /// Anything else.
    Other,
}

/// What happens to a sector.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "an event lives for one step and is never kept"
)]
pub enum Event {
    /// A piece was placed; the first one opens the sector, or its upgrade.
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
    /// Every deal should have begun before the chain knew of the sector.
    DealsExpired(String),
    /// Sealing randomness.
    Ticket(SealTicket),
    /// The chain would not take the ticket any more.
    TicketExpired,
    /// PreCommit1 is done; its output is stored.
    PreCommit1Done,
    /// PreCommit2 is done.
    PreCommit2Done {
        /// What the replica commits to.
        commitments: SealedCommitments,
        /// Now, Unix milliseconds.
        unix_ms: u64,
    },
    /// The sector goes with this batch.
    Batched {
        /// Its number.
        batch: u64,
        /// Its proofs go as one aggregate.
        aggregate: bool,
        /// The sector's place in it.
        place: u32,
        /// How many sectors it has.
        of: u32,
    },
    /// No aggregate could be made of the batch: the sector leaves it, and its proof goes as it is.
    NotAggregated(String),
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
    /// A reorg moved the pre-commit, so that the proof needs another seed.
    SeedLost,
    /// The seal proof is made and stored.
    Proved {
        /// Now, Unix milliseconds.
        unix_ms: u64,
    },
    /// The prove-commit message is journaled and on its way.
    CommitSent(Cid),
    /// The chain has the sector.
    CommitLanded {
        /// Since when.
        activation: Epoch,
        /// Until when.
        expiration: Epoch,
    },
    /// The chain does not have the sector any more: a reorg took its prove-commit away.
    CommitLost,
    /// The chain is ahead of this journal, and the files here are those that it knows.
    FoundOnChain(Box<Found>),
    /// The chain is ahead of this journal, and the files here are not those that it knows.
    Conflict(String),
    /// What only sealing needed is gone from the disk.
    Finalized {
        /// A sector without pieces may be upgraded later.
        upgradable: bool,
    },
    /// The operator offers the sector for upgrades.
    MarkedForUpdate,
    /// The new replica is made.
    ReplicaUpdated(SealedCommitments),
    /// The update proof is made and stored.
    UpdateProved,
    /// What only the update needed is gone from the disk.
    UpdateFinalized,
    /// The update message is journaled and on its way.
    UpdateSent(Cid),
    /// The sector's deadline takes no changes now.
    DeadlineImmutable,
    /// The sector's deadline takes changes again.
    DeadlineMutable,
    /// The chain has the new replica.
    UpdateLanded {
        /// Where it was seen.
        epoch: Epoch,
    },
    /// The chain does not have the new replica any more: a reorg.
    UpdateLost,
    /// The first replica is deleted.
    KeyReleased,
    /// The operator gives the upgrade up.
    AbortUpgrade,
    /// The files of the upgrade are deleted.
    UpgradeAborted,
    /// The operator ends the sector.
    Terminate,
    /// The termination message is journaled and on its way.
    TerminateSent(Cid),
    /// The chain does not have the sector any more.
    Terminated,
    /// The chain has the sector again: a reorg.
    TerminateLost,
    /// No reorg can change any more what the chain has.
    Final,
    /// The work of this state failed: proof, disk, or data.
    Failed(String),
    /// The chain refused the message of this state.
    Refused {
        /// Its reason.
        why: String,
        /// The message is spent: the next needs a new key.
        spent: bool,
        /// What the reason was.
        cause: Cause,
    },
    /// The time of the next try is here.
    Retry,
    /// The chain has another replica under this number.
    Abandoned(String),
    /// The number is used up and the chain has nothing under it: the pieces need another sector.
    NumberSpent(String),
    /// The operator gives the sector up.
    Remove,
    /// Its files are deleted.
    FilesRemoved,
    /// The operator knows better.
    ForceState(SectorState),
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
            Self::DealsExpired(_) => "SectorDealsExpired",
            Self::Ticket(_) => "SectorTicket",
            Self::TicketExpired => "SectorTicketExpired",
            Self::PreCommit1Done => "SectorPreCommit1",
            Self::PreCommit2Done { .. } => "SectorPreCommit2",
            Self::Batched { .. } => "SectorBatched",
            Self::NotAggregated(_) => "SectorNotAggregated",
            Self::PreCommitSent(_) => "SectorPreCommitBatchSent",
            Self::PreCommitLanded { .. } => "SectorPreCommitLanded",
            Self::PreCommitLost => "SectorPreCommitLost",
            Self::SeedReady(_) => "SectorSeedReady",
            Self::SeedLost => "SectorSeedLost",
            Self::Proved { .. } => "SectorProofReady",
            Self::CommitSent(_) => "SectorCommitAggregateSent",
            Self::CommitLanded { .. } => "SectorCommitLanded",
            Self::CommitLost => "SectorCommitLost",
            Self::FoundOnChain(_) => "SectorFoundOnChain",
            Self::Conflict(_) => "SectorChainConflict",
            Self::Finalized { .. } => "SectorFinalized",
            Self::MarkedForUpdate => "SectorMarkForUpdate",
            Self::ReplicaUpdated(_) => "SectorReplicaUpdate",
            Self::UpdateProved => "SectorProveReplicaUpdate",
            Self::UpdateFinalized => "SectorUpdateFinalized",
            Self::UpdateSent(_) => "SectorReplicaUpdateSubmitted",
            Self::DeadlineImmutable => "SectorDeadlineImmutable",
            Self::DeadlineMutable => "SectorDeadlineMutable",
            Self::UpdateLanded { .. } => "SectorReplicaUpdateLanded",
            Self::UpdateLost => "SectorReplicaUpdateLost",
            Self::KeyReleased => "SectorKeyReleased",
            Self::AbortUpgrade => "SectorAbortUpgrade",
            Self::UpgradeAborted => "SectorRevertUpgradeToProving",
            Self::Terminate => "SectorTerminate",
            Self::TerminateSent(_) => "SectorTerminating",
            Self::Terminated => "SectorTerminated",
            Self::TerminateLost => "SectorTerminateLost",
            Self::Final => "SectorFinal",
            Self::Failed(_) => "SectorStepFailed",
            Self::Refused { .. } => "SectorChainRefused",
            Self::Retry => "SectorRetry",
            Self::Abandoned(_) => "SectorAbandoned",
            Self::NumberSpent(_) => "SectorNumberSpent",
            Self::Remove => "SectorRemove",
            Self::FilesRemoved => "SectorRemoved",
            Self::ForceState(_) => "SectorForceState",
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
            Self::PreCommit2Done { commitments: c, .. } | Self::ReplicaUpdated(c) => {
                format!("replica {}", c.comm_r.sealed_cid())
            }
            Self::Batched {
                batch,
                aggregate: false,
                ..
            } => format!("batch {batch}"),
            Self::Batched {
                batch,
                aggregate: true,
                ..
            } => format!("batch {batch}, whose proofs are aggregated"),
            Self::PreCommitSent(cid)
            | Self::CommitSent(cid)
            | Self::UpdateSent(cid)
            | Self::TerminateSent(cid) => format!("message {cid}"),
            Self::PreCommitLanded { epoch } | Self::UpdateLanded { epoch } => {
                format!("on chain since epoch {epoch}")
            }
            Self::SeedReady(s) => format!("seed of epoch {}", s.epoch),
            Self::CommitLanded {
                activation,
                expiration,
            } => format!("active from epoch {activation} to {expiration}"),
            Self::FoundOnChain(found) => found.message(),
            Self::CommitLost => "the chain does not have the sector any more: a reorg".into(),
            Self::Failed(why)
            | Self::Conflict(why)
            | Self::Refused { why, .. }
            | Self::Abandoned(why)
            | Self::NumberSpent(why)
            | Self::NotAggregated(why)
            | Self::DealsExpired(why) => why.clone(),
            Self::ForceState(_) => "by the operator".into(),
            Self::Pledged { .. }
            | Self::StartPacking
            | Self::PiecesWritten
            | Self::TicketExpired
            | Self::PreCommit1Done
            | Self::PreCommitLost
            | Self::SeedLost
            | Self::Proved { .. }
            | Self::Finalized { .. }
            | Self::MarkedForUpdate
            | Self::UpdateProved
            | Self::UpdateFinalized
            | Self::DeadlineImmutable
            | Self::DeadlineMutable
            | Self::UpdateLost
            | Self::KeyReleased
            | Self::AbortUpgrade
            | Self::UpgradeAborted
            | Self::Terminate
            | Self::Terminated
            | Self::TerminateLost
            | Self::Final
            | Self::Retry
            | Self::Remove
            | Self::FilesRemoved => String::new(),
        }
    }
}

impl Found {
    fn message(&self) -> String {
        let replica = match &self.at {
            FoundAt::Updated { commitments, .. } => commitments,
            _ => &self.commitments,
        };
        let how = match self.at {
            FoundAt::PreCommitted { epoch } => format!("pre-committed since epoch {epoch}"),
            FoundAt::Active { activation, .. } => format!("active since epoch {activation}"),
            FoundAt::Updated { seen, .. } => format!("upgraded, as seen at epoch {seen}"),
        };
        let pieces = match (self.same_pieces, self.has_data) {
            (true, _) => "",
            (false, true) => {
                "; it holds other pieces than this journal's, which need another sector"
            }
            (false, false) => "; it holds no data, and this journal's pieces need another sector",
        };
        format!(
            "the chain is ahead of this journal: {how} with replica {}, which is the one on \
             disk{pieces}",
            replica.comm_r.sealed_cid()
        )
    }
}

/// What is done for a sector: one effect for each state, see [`SectorState::effect`]. Each is
/// done again after a restart, and looks first at what it did before.
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
    /// Encode the new replica of an upgrade.
    UpdateReplica,
    /// Prove it.
    ProveUpdate,
    /// Drop what only the update needed.
    FinalizeUpdate,
    /// Send the update, unless the chain has it.
    SendUpdate,
    /// Wait until the sector's deadline takes changes.
    AwaitMutable,
    /// Wait for the receipt of the update.
    AwaitUpdate,
    /// Wait until the chain can not ask for the old replica any more.
    AwaitUpdateFinality,
    /// Delete the old replica.
    ReleaseKey,
    /// Delete the files of the upgrade, unless the chain has it.
    AbortUpgrade,
    /// Send the termination, unless the chain does not have the sector.
    SendTerminate,
    /// Wait for its receipt.
    AwaitTerminate,
    /// Wait until no reorg can bring the sector back.
    AwaitTerminateFinality,
    /// Delete the sector's files.
    Remove,
    /// Wait, longer after each failure, then try again.
    RetryLater,
}
