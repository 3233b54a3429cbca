use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Effect;

/// Declares the states, each with the effect that is pending while a sector is in it.
macro_rules! states {
    ($($(#[$doc:meta])* $name:ident => $effect:expr;)*) => {
        /// Sealing state of a sector, under the names of Lotus.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum SectorState {
            $($(#[$doc])* $name,)*
        }

        impl SectorState {
            /// Every state: the commit path, the snap-deal path, the end, failures.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The name as Lotus writes it.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)*
                }
            }

            /// What is done in this state; `None` where nothing is left to do or only the
            /// operator can.
            #[must_use]
            pub const fn effect(self) -> Option<Effect> {
                match self {
                    $(Self::$name => $effect,)*
                }
            }
        }
    };
}

states! {
    // The commit path.

    /// Takes pieces.
    WaitDeals => Some(Effect::WaitForPieces);
    /// The pieces, and zeros between them, are written into the sector's data.
    AddPiece => Some(Effect::WritePieces);
    /// The pieces' allocations are checked against the chain.
    Packing => Some(Effect::CheckPieces);
    /// Takes sealing randomness from the chain.
    GetTicket => Some(Effect::TakeTicket);
    /// Labels the graph.
    PreCommit1 => Some(Effect::PreCommit1);
    /// Encodes the replica and builds its trees.
    PreCommit2 => Some(Effect::PreCommit2);
    /// Waits for others to share a pre-commit message with, and sends it.
    SubmitPreCommitBatch => Some(Effect::SendPreCommit);
    /// Waits for the pre-commit on chain.
    PreCommitBatchWait => Some(Effect::AwaitPreCommit);
    /// Waits for interactive randomness.
    WaitSeed => Some(Effect::AwaitSeed);
    /// Makes the seal proof.
    Committing => Some(Effect::Prove);
    /// Waits for others to share a prove-commit message with, and sends it.
    SubmitCommitAggregate => Some(Effect::SendCommit);
    /// Waits for the prove-commit on chain.
    CommitAggregateWait => Some(Effect::AwaitCommit);
    /// Drops what only sealing needed.
    FinalizeSector => Some(Effect::Finalize);
    /// On chain and proven from now on.
    Proving => None;
    /// As `Proving`, without data: takes pieces as an upgrade (a snap deal).
    Available => None;

    // The snap-deal path: the sector is on chain all the time.

    /// Takes pieces for an upgrade.
    SnapDealsWaitDeals => Some(Effect::WaitForPieces);
    /// The pieces are written into the data of the upgrade.
    SnapDealsAddPiece => Some(Effect::WritePieces);
    /// The pieces' allocations are checked against the chain.
    SnapDealsPacking => Some(Effect::CheckPieces);
    /// Encodes the data into a new replica, with the old one as key.
    UpdateReplica => Some(Effect::UpdateReplica);
    /// Makes the update proof.
    ProveReplicaUpdate => Some(Effect::ProveUpdate);
    /// Drops what only the update needed.
    FinalizeReplicaUpdate => Some(Effect::FinalizeUpdate);
    /// Sends the update message.
    SubmitReplicaUpdate => Some(Effect::SendUpdate);
    /// The sector's deadline is open or opens next: the chain takes no update until it is over.
    WaitMutable => Some(Effect::AwaitMutable);
    /// Waits for the update on chain.
    ReplicaUpdateWait => Some(Effect::AwaitUpdate);
    /// On chain with its data. The old replica is kept until the chain can not ask for it any
    /// more.
    UpdateActivating => Some(Effect::AwaitUpdateFinality);
    /// Deletes the old replica.
    ReleaseSectorKey => Some(Effect::ReleaseKey);
    /// Gives the upgrade up: its pieces go back, its files are deleted.
    AbortUpgrade => Some(Effect::AbortUpgrade);

    // The end.

    /// Sends the termination message.
    Terminating => Some(Effect::SendTerminate);
    /// Waits for the termination on chain.
    TerminateWait => Some(Effect::AwaitTerminate);
    /// Ended. Its files are kept until no reorg can bring it back.
    TerminateFinality => Some(Effect::AwaitTerminateFinality);
    /// Its files are being deleted.
    Removing => Some(Effect::Remove);
    /// Gone from the disk.
    Removed => None;

    // Failures. Each is tried again by itself after a time that grows.

    /// Writing the pieces failed.
    AddPieceFailed => Some(Effect::RetryLater);
    /// The pieces can not be laid out.
    PackingFailed => Some(Effect::RetryLater);
    /// PreCommit1 failed. In the end the sector is removed and its pieces go back.
    SealPreCommit1Failed => Some(Effect::RetryLater);
    /// PreCommit2 failed; in the end it goes on from `PreCommit1`.
    SealPreCommit2Failed => Some(Effect::RetryLater);
    /// The chain refused the pre-commit; what is on chain is looked at, then sent again.
    PreCommitFailed => Some(Effect::RetryLater);
    /// The seal proof could not be made; in the end it goes on from `PreCommit1`.
    ComputeProofFailed => Some(Effect::RetryLater);
    /// The chain refused the prove-commit; what is on chain is looked at, then sent again.
    CommitFailed => Some(Effect::RetryLater);
    /// Cleaning up failed. The sector is on chain already.
    FinalizeFailed => Some(Effect::RetryLater);
    /// The deals began before the sector could be pre-committed; it is removed.
    DealsExpired => Some(Effect::RetryLater);
    /// Writing the pieces of an upgrade failed; in the end the upgrade is given up.
    SnapDealsAddPieceFailed => Some(Effect::RetryLater);
    /// The deals of an upgrade began before it was on chain; the upgrade is given up.
    SnapDealsDealsExpired => Some(Effect::RetryLater);
    /// The update could not be made or proven, or the chain refused it; in the end the upgrade
    /// is given up.
    ReplicaUpdateFailed => Some(Effect::RetryLater);
    /// Cleaning up after the update failed.
    FinalizeReplicaUpdateFailed => Some(Effect::RetryLater);
    /// The chain refused the termination.
    TerminateFailed => Some(Effect::RetryLater);
    /// Deleting the files failed.
    RemoveFailed => Some(Effect::RetryLater);
    /// The chain has this number with another replica than the files here, and making ours would
    /// overwrite them: the operator brings the right ones, or removes the sector. Looked at again.
    ChainConflict => Some(Effect::RetryLater);
    /// As `ChainConflict`, of an upgrade: the chain has another one.
    SnapDealsChainConflict => Some(Effect::RetryLater);
    /// The chain will never take this sector, for the reason that the record gives. Its files
    /// are kept until the operator removes it.
    FailedUnrecoverable => None;
}

impl SectorState {
    /// Whether something went wrong.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        matches!(self.effect(), Some(Effect::RetryLater))
            || matches!(self, Self::FailedUnrecoverable)
    }

    /// Whether the sector takes up sealing room: it takes pieces or is worked on, and is not
    /// done.
    #[must_use]
    pub const fn is_sealing(self) -> bool {
        !matches!(
            self,
            Self::Proving
                | Self::Available
                | Self::UpdateActivating
                | Self::ReleaseSectorKey
                | Self::Terminating
                | Self::TerminateWait
                | Self::TerminateFailed
                | Self::TerminateFinality
                | Self::Removing
                | Self::RemoveFailed
                | Self::Removed
                | Self::ChainConflict
                | Self::FailedUnrecoverable
        )
    }

    /// Whether a message about the sector may be on its way and not yet on chain.
    #[must_use]
    pub const fn is_in_flight(self) -> bool {
        matches!(
            self,
            Self::PreCommitBatchWait
                | Self::CommitAggregateWait
                | Self::ReplicaUpdateWait
                | Self::TerminateWait
        )
    }

    /// Whether the sector is being upgraded and the chain does not have the upgrade yet.
    #[must_use]
    pub const fn is_upgrading(self) -> bool {
        matches!(
            self,
            Self::SnapDealsWaitDeals
                | Self::SnapDealsAddPiece
                | Self::SnapDealsPacking
                | Self::UpdateReplica
                | Self::ProveReplicaUpdate
                | Self::FinalizeReplicaUpdate
                | Self::SubmitReplicaUpdate
                | Self::WaitMutable
                | Self::ReplicaUpdateWait
                | Self::AbortUpgrade
                | Self::SnapDealsAddPieceFailed
                | Self::SnapDealsDealsExpired
                | Self::ReplicaUpdateFailed
                | Self::FinalizeReplicaUpdateFailed
                | Self::SnapDealsChainConflict
        )
    }

    /// Whether the chain has the sector with its pieces.
    #[must_use]
    pub const fn has_data_on_chain(self) -> bool {
        matches!(
            self,
            Self::Proving
                | Self::UpdateActivating
                | Self::ReleaseSectorKey
                | Self::Terminating
                | Self::TerminateWait
                | Self::TerminateFailed
        )
    }

    /// Whether the sector takes pieces.
    #[must_use]
    pub const fn takes_pieces(self) -> bool {
        matches!(self, Self::WaitDeals | Self::SnapDealsWaitDeals)
    }
}

impl fmt::Display for SectorState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No state has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no state of a sector: there are {all}", all = names())]
pub struct BadState(pub String);

fn names() -> String {
    let all: Vec<&str> = SectorState::ALL.iter().map(|s| s.as_str()).collect();
    all.join(", ")
}

impl FromStr for SectorState {
    type Err = BadState;

    fn from_str(s: &str) -> Result<Self, BadState> {
        let found = Self::ALL.iter().find(|state| state.as_str() == s);
        found.copied().ok_or_else(|| BadState(s.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_name_is_answered_with_the_right_ones() {
        let e = "Provin".parse::<SectorState>().unwrap_err().to_string();
        for state in SectorState::ALL {
            assert_eq!(state.as_str().parse(), Ok(*state));
            assert!(e.contains(state.as_str()), "{e}");
        }
    }
}
