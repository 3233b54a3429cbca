//! The table as a reader proofreads it.

use super::*;

/// The whole table: for each state the events that apply and where they lead. Everything that is
/// not listed changes nothing.
fn table() -> Vec<(Option<S>, &'static str, S)> {
    let rows: Vec<(&[S], &'static str, S)> = vec![
        // The commit path.
        (&[], "SectorAddPiece", S::WaitDeals),
        (&[], "SectorStartCC", S::AddPiece),
        (&[S::WaitDeals], "SectorAddPiece", S::WaitDeals),
        (&[S::WaitDeals], "SectorStartPacking", S::AddPiece),
        (&[S::AddPiece], "SectorPieceAdded", S::Packing),
        (&[S::Packing], "SectorPacked", S::GetTicket),
        (&[S::GetTicket], "SectorTicket", S::PreCommit1),
        (&[S::PreCommit1], "SectorPreCommit1", S::PreCommit2),
        (
            &[S::PreCommit2],
            "SectorPreCommit2",
            S::SubmitPreCommitBatch,
        ),
        (
            &[S::SubmitPreCommitBatch],
            "SectorBatched",
            S::SubmitPreCommitBatch,
        ),
        (
            &[S::SubmitPreCommitBatch],
            "SectorPreCommitBatchSent",
            S::PreCommitBatchWait,
        ),
        (
            &[S::SubmitPreCommitBatch, S::PreCommitBatchWait],
            "SectorPreCommitLanded",
            S::WaitSeed,
        ),
        (&[S::WaitSeed], "SectorSeedReady", S::Committing),
        (
            &[S::Committing],
            "SectorProofReady",
            S::SubmitCommitAggregate,
        ),
        (
            &[S::SubmitCommitAggregate],
            "SectorBatched",
            S::SubmitCommitAggregate,
        ),
        (
            &[S::SubmitCommitAggregate],
            "SectorNotAggregated",
            S::SubmitCommitAggregate,
        ),
        (
            &[S::SubmitCommitAggregate],
            "SectorCommitAggregateSent",
            S::CommitAggregateWait,
        ),
        (
            &[
                S::SubmitPreCommitBatch,
                S::PreCommitBatchWait,
                S::WaitSeed,
                S::SubmitCommitAggregate,
                S::CommitAggregateWait,
            ],
            "SectorCommitLanded",
            S::FinalizeSector,
        ),
        (&[S::FinalizeSector], "SectorFinalized", S::Available),
        (
            &[S::PreCommit1, S::SubmitPreCommitBatch],
            "SectorTicketExpired",
            S::GetTicket,
        ),
        (
            &[S::WaitSeed, S::SubmitCommitAggregate],
            "SectorPreCommitLost",
            S::SubmitPreCommitBatch,
        ),
        (
            &[
                S::FinalizeSector,
                S::FinalizeFailed,
                S::Proving,
                S::Available,
                S::UpdateActivating,
            ],
            "SectorCommitLost",
            S::WaitSeed,
        ),
        // As the listed event has an upgraded sector; others lead elsewhere, see the tests.
        (
            &[
                S::WaitDeals,
                S::AddPiece,
                S::PreCommit1,
                S::PreCommit2,
                S::SubmitPreCommitBatch,
                S::WaitSeed,
                S::SubmitCommitAggregate,
                S::Removing,
                S::SnapDealsWaitDeals,
                S::SnapDealsAddPiece,
                S::UpdateReplica,
                S::SubmitReplicaUpdate,
                S::AbortUpgrade,
            ],
            "SectorFoundOnChain",
            S::UpdateActivating,
        ),
        (
            &[S::WaitDeals, S::AddPiece, S::PreCommit1, S::PreCommit2],
            "SectorChainConflict",
            S::ChainConflict,
        ),
        (
            &[
                S::SnapDealsWaitDeals,
                S::SnapDealsAddPiece,
                S::UpdateReplica,
                S::SubmitReplicaUpdate,
                S::AbortUpgrade,
            ],
            "SectorChainConflict",
            S::SnapDealsChainConflict,
        ),
        (&[S::SubmitCommitAggregate], "SectorSeedLost", S::WaitSeed),
        (
            &[S::Packing, S::SubmitPreCommitBatch],
            "SectorDealsExpired",
            S::DealsExpired,
        ),
        (
            &[
                S::SubmitPreCommitBatch,
                S::WaitSeed,
                S::SubmitCommitAggregate,
            ],
            "SectorAbandoned",
            S::FailedUnrecoverable,
        ),
        (
            &[S::SubmitPreCommitBatch],
            "SectorNumberSpent",
            S::FailedUnrecoverable,
        ),
        // The snap-deal path.
        (&[S::Proving], "SectorMarkForUpdate", S::Available),
        (
            &[S::Available, S::SnapDealsWaitDeals],
            "SectorAddPiece",
            S::SnapDealsWaitDeals,
        ),
        (
            &[S::SnapDealsWaitDeals],
            "SectorStartPacking",
            S::SnapDealsAddPiece,
        ),
        (
            &[S::SnapDealsAddPiece],
            "SectorPieceAdded",
            S::SnapDealsPacking,
        ),
        (&[S::SnapDealsPacking], "SectorPacked", S::UpdateReplica),
        (
            &[S::UpdateReplica],
            "SectorReplicaUpdate",
            S::ProveReplicaUpdate,
        ),
        (
            &[S::ProveReplicaUpdate],
            "SectorProveReplicaUpdate",
            S::FinalizeReplicaUpdate,
        ),
        (
            &[S::FinalizeReplicaUpdate],
            "SectorUpdateFinalized",
            S::SubmitReplicaUpdate,
        ),
        (
            &[S::SubmitReplicaUpdate],
            "SectorDeadlineImmutable",
            S::WaitMutable,
        ),
        (
            &[S::WaitMutable],
            "SectorDeadlineMutable",
            S::SubmitReplicaUpdate,
        ),
        (
            &[S::SubmitReplicaUpdate],
            "SectorReplicaUpdateSubmitted",
            S::ReplicaUpdateWait,
        ),
        (
            &[
                S::SubmitReplicaUpdate,
                S::ReplicaUpdateWait,
                S::AbortUpgrade,
            ],
            "SectorReplicaUpdateLanded",
            S::UpdateActivating,
        ),
        (
            &[S::UpdateActivating],
            "SectorReplicaUpdateLost",
            S::SubmitReplicaUpdate,
        ),
        (&[S::UpdateActivating], "SectorFinal", S::ReleaseSectorKey),
        (&[S::ReleaseSectorKey], "SectorKeyReleased", S::Proving),
        (
            &[S::SnapDealsPacking, S::SubmitReplicaUpdate],
            "SectorDealsExpired",
            S::SnapDealsDealsExpired,
        ),
        (
            &[
                S::SnapDealsWaitDeals,
                S::SnapDealsAddPiece,
                S::SnapDealsPacking,
                S::UpdateReplica,
                S::ProveReplicaUpdate,
                S::FinalizeReplicaUpdate,
                S::SubmitReplicaUpdate,
                S::WaitMutable,
                S::SnapDealsAddPieceFailed,
                S::SnapDealsDealsExpired,
                S::ReplicaUpdateFailed,
                S::FinalizeReplicaUpdateFailed,
                S::SnapDealsChainConflict,
            ],
            "SectorAbortUpgrade",
            S::AbortUpgrade,
        ),
        (
            &[S::AbortUpgrade],
            "SectorRevertUpgradeToProving",
            S::Proving,
        ),
        // The end.
        (
            &[
                S::Proving,
                S::Available,
                S::UpdateActivating,
                S::ReleaseSectorKey,
            ],
            "SectorTerminate",
            S::Terminating,
        ),
        (&[S::Terminating], "SectorTerminating", S::TerminateWait),
        (
            &[S::Terminating, S::TerminateWait],
            "SectorTerminated",
            S::TerminateFinality,
        ),
        (
            &[S::TerminateFinality],
            "SectorTerminateLost",
            S::Terminating,
        ),
        (&[S::TerminateFinality], "SectorFinal", S::Removing),
        (&[S::Removing], "SectorRemoved", S::Removed),
        // The work failed.
        (&[S::AddPiece], "SectorStepFailed", S::AddPieceFailed),
        (&[S::Packing], "SectorStepFailed", S::PackingFailed),
        (
            &[S::PreCommit1],
            "SectorStepFailed",
            S::SealPreCommit1Failed,
        ),
        (
            &[S::PreCommit2],
            "SectorStepFailed",
            S::SealPreCommit2Failed,
        ),
        (&[S::Committing], "SectorStepFailed", S::ComputeProofFailed),
        (&[S::FinalizeSector], "SectorStepFailed", S::FinalizeFailed),
        (
            &[S::SnapDealsAddPiece, S::SnapDealsPacking],
            "SectorStepFailed",
            S::SnapDealsAddPieceFailed,
        ),
        (
            &[
                S::UpdateReplica,
                S::ProveReplicaUpdate,
                S::SubmitReplicaUpdate,
            ],
            "SectorStepFailed",
            S::ReplicaUpdateFailed,
        ),
        (
            &[S::FinalizeReplicaUpdate],
            "SectorStepFailed",
            S::FinalizeReplicaUpdateFailed,
        ),
        (&[S::Removing], "SectorStepFailed", S::RemoveFailed),
        // The chain refused.
        (
            &[S::SubmitPreCommitBatch, S::PreCommitBatchWait],
            "SectorChainRefused",
            S::PreCommitFailed,
        ),
        (
            &[S::SubmitCommitAggregate, S::CommitAggregateWait],
            "SectorChainRefused",
            S::CommitFailed,
        ),
        (
            &[S::SubmitReplicaUpdate, S::ReplicaUpdateWait],
            "SectorChainRefused",
            S::ReplicaUpdateFailed,
        ),
        (
            &[S::Terminating, S::TerminateWait],
            "SectorChainRefused",
            S::TerminateFailed,
        ),
        // The ways out.
        (&[S::AddPieceFailed], "SectorRetry", S::AddPiece),
        (&[S::PackingFailed], "SectorRetry", S::Packing),
        (&[S::SealPreCommit1Failed], "SectorRetry", S::PreCommit1),
        (&[S::SealPreCommit2Failed], "SectorRetry", S::PreCommit2),
        (
            &[S::PreCommitFailed],
            "SectorRetry",
            S::SubmitPreCommitBatch,
        ),
        (
            &[S::ComputeProofFailed, S::CommitFailed],
            "SectorRetry",
            S::WaitSeed,
        ),
        (&[S::FinalizeFailed], "SectorRetry", S::FinalizeSector),
        (&[S::ChainConflict], "SectorRetry", S::AddPiece),
        (
            &[S::SnapDealsChainConflict],
            "SectorRetry",
            S::SnapDealsAddPiece,
        ),
        (&[S::DealsExpired], "SectorRetry", S::Removing),
        (&[S::SnapDealsDealsExpired], "SectorRetry", S::AbortUpgrade),
        (
            &[S::SnapDealsAddPieceFailed],
            "SectorRetry",
            S::SnapDealsAddPiece,
        ),
        (&[S::ReplicaUpdateFailed], "SectorRetry", S::UpdateReplica),
        (
            &[S::FinalizeReplicaUpdateFailed],
            "SectorRetry",
            S::FinalizeReplicaUpdate,
        ),
        (&[S::TerminateFailed], "SectorRetry", S::Terminating),
        (&[S::RemoveFailed], "SectorRetry", S::Removing),
        // The operator.
        (
            &[
                S::WaitDeals,
                S::AddPiece,
                S::Packing,
                S::GetTicket,
                S::PreCommit1,
                S::PreCommit2,
                S::SubmitPreCommitBatch,
                S::WaitSeed,
                S::Committing,
                S::SubmitCommitAggregate,
                S::Proving,
                S::Available,
                S::AddPieceFailed,
                S::PackingFailed,
                S::SealPreCommit1Failed,
                S::SealPreCommit2Failed,
                S::PreCommitFailed,
                S::ComputeProofFailed,
                S::CommitFailed,
                S::DealsExpired,
                S::ChainConflict,
                S::RemoveFailed,
                S::FailedUnrecoverable,
            ],
            "SectorRemove",
            S::Removing,
        ),
        (
            &[
                S::WaitDeals,
                S::AddPiece,
                S::Packing,
                S::GetTicket,
                S::PreCommit1,
                S::PreCommit2,
                S::SubmitPreCommitBatch,
                S::PreCommitBatchWait,
                S::WaitSeed,
                S::Committing,
                S::SubmitCommitAggregate,
                S::CommitAggregateWait,
                S::AddPieceFailed,
                S::PackingFailed,
                S::SealPreCommit1Failed,
                S::SealPreCommit2Failed,
                S::PreCommitFailed,
                S::ComputeProofFailed,
                S::CommitFailed,
                S::DealsExpired,
                S::ChainConflict,
            ],
            "SectorForceState",
            S::FailedUnrecoverable,
        ),
    ];
    rows.into_iter()
        .flat_map(|(states, event, to)| {
            if states.is_empty() {
                vec![(None, event, to)]
            } else {
                states.iter().map(|s| (Some(*s), event, to)).collect()
            }
        })
        .collect()
}

#[test]
fn every_state_and_event_is_as_listed() {
    let table = table();
    let mut seen = 0;
    for state in std::iter::once(None).chain(S::ALL.iter().copied().map(Some)) {
        for event in every_event() {
            let listed = table
                .iter()
                .find(|(s, e, _)| *s == state && *e == event.name())
                .map(|(_, _, to)| *to);
            let sector = state.map(at);
            let stepped = step(sector.as_ref(), &event);
            let got = stepped.as_ref().map(|(s, _)| s.state);
            assert_eq!(got, listed, "{state:?} + {}", event.name());
            seen += usize::from(got.is_some());
            if let Some((after, effects)) = stepped {
                let expected: Vec<Effect> = if state == Some(after.state) {
                    vec![]
                } else {
                    after.state.effect().into_iter().collect()
                };
                assert_eq!(effects, expected);
                assert_eq!(after.events, 1);
            }
        }
    }
    assert_eq!(seen, table.len(), "every row was met once");
}
