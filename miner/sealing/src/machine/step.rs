use lotus_journal::{EffectId, Machine, Map};
use lotus_types::SectorNumber;

use super::{
    Cause, Effect, Event, Found, FoundAt, Group, Seat, Sector, SectorPiece, SectorState, Update,
};

/// Failures in a row after which a step is not tried on the same input again, but its input is
/// made anew.
const PATIENCE: u32 = 3;
/// Failures in a row after which a sector that is not on chain is given up, so that its pieces
/// can go into another.
const HOPELESS: u32 = 2 * PATIENCE;
/// Wrong proofs after which the replica itself is made again. Source: lotus,
/// storage/pipeline/states_failed.go.
const BAD_PROOFS: u32 = 2;

/// All sectors of the journal.
#[derive(Debug)]
pub struct Sectors;

impl Machine for Sectors {
    const NAME: &'static str = "sealing";
    const STATES: Map<SectorNumber, Sector> = Map::new("sealing.sectors");
    const EFFECTS: Map<EffectId, (Vec<u8>, Effect)> = Map::new("sealing.effects");
    type Key = SectorNumber;
    type State = Sector;
    type Event = Event;
    type Effect = Effect;

    fn step(state: Option<&Sector>, event: &Event) -> Option<(Sector, Vec<Effect>)> {
        step(state, event)
    }
}

/// The state after an event, with the effect of the new state if it is another one. `None` when
/// the event does not apply: late repeats are normal.
#[must_use]
pub fn step(now: Option<&Sector>, event: &Event) -> Option<(Sector, Vec<Effect>)> {
    let before = now.map(|s| s.state);
    let after = next(now, event)?;
    let mut sector = match now {
        Some(s) => s.clone(),
        None => opened(event, after)?,
    };
    absorb(&mut sector, event);
    // The pieces of an upgrade end with the sector that it was of.
    let upgraded = now.is_some_and(|s| s.update.is_some());
    if gives_back(&sector, event, after) || (upgraded && *event == Event::CommitLost) {
        sector.pieces.clear();
    }
    sector.state = after;
    sector.events += 1;
    let effects = if before == Some(after) {
        Vec::new()
    } else {
        after.effect().into_iter().collect()
    };
    Some((sector, effects))
}

/// The pieces that a step gave back: they are in no sector now.
#[must_use]
pub fn returned<'a>(before: Option<&'a Sector>, after: &Sector) -> &'a [SectorPiece] {
    match before {
        Some(b) if after.pieces.is_empty() => &b.pieces,
        _ => &[],
    }
}

/// The table: which state follows.
fn next(now: Option<&Sector>, event: &Event) -> Option<SectorState> {
    use {Event::*, SectorState::*};
    let Some(s) = now else {
        return match event {
            PieceAdded { .. } => Some(WaitDeals),
            Pledged { .. } => Some(AddPiece),
            _ => None,
        };
    };
    let worn_out = s.failures > PATIENCE;
    let pre_committed = s.pre_commit_epoch.is_some();
    // PreCommit1 needs the sector's data, which is gone when the sector was cleaned up.
    let from_pre_commit1 = if s.bare { AddPiece } else { PreCommit1 };
    let encoded = s.update.as_ref().is_some_and(|u| u.commitments.is_some());
    let update_proved = s.update.as_ref().is_some_and(|u| u.proved);
    Some(match (s.state, event) {
        // The happy path.
        (WaitDeals, PieceAdded { .. }) => WaitDeals,
        (WaitDeals, StartPacking) => AddPiece,
        (AddPiece, PiecesWritten) => Packing,
        (Packing, Packed { .. }) => GetTicket,
        (GetTicket, Ticket(_)) => PreCommit1,
        (PreCommit1, PreCommit1Done) => PreCommit2,
        (PreCommit2, PreCommit2Done { .. }) => SubmitPreCommitBatch,
        (SubmitPreCommitBatch, Batched { .. }) => SubmitPreCommitBatch,
        (SubmitPreCommitBatch, PreCommitSent(_)) => PreCommitBatchWait,
        (SubmitPreCommitBatch | PreCommitBatchWait, PreCommitLanded { .. }) => WaitSeed,
        (WaitSeed, SeedReady(seed)) if s.proved && s.seed == Some(*seed) => SubmitCommitAggregate,
        (WaitSeed, SeedReady(_)) if s.bare => AddPiece,
        (WaitSeed, SeedReady(_)) => Committing,
        (Committing, Proved { .. }) => SubmitCommitAggregate,
        (SubmitCommitAggregate, Batched { .. } | NotAggregated(_)) => SubmitCommitAggregate,
        (SubmitCommitAggregate, CommitSent(_)) => CommitAggregateWait,
        // The chain may know more than this journal, as after a restored backup.
        (
            SubmitPreCommitBatch
            | PreCommitBatchWait
            | WaitSeed
            | SubmitCommitAggregate
            | CommitAggregateWait,
            CommitLanded { .. },
        ) => FinalizeSector,
        (FinalizeSector, Finalized { upgradable: true }) if is_empty(s) => Available,
        (FinalizeSector, Finalized { .. }) => Proving,

        // The same before a step that would overwrite or delete what the chain knows.
        (
            WaitDeals
            | AddPiece
            | PreCommit1
            | PreCommit2
            | SubmitPreCommitBatch
            | WaitSeed
            | SubmitCommitAggregate,
            FoundOnChain(found),
        ) => found_in(found),
        (
            Removing
            | SnapDealsWaitDeals
            | SnapDealsAddPiece
            | UpdateReplica
            | SubmitReplicaUpdate
            | SectorState::AbortUpgrade,
            FoundOnChain(found),
        ) if found_in(found) != WaitSeed => found_in(found),
        (WaitDeals | AddPiece | PreCommit1 | PreCommit2, Conflict(_)) => ChainConflict,
        (
            SnapDealsWaitDeals
            | SnapDealsAddPiece
            | UpdateReplica
            | SubmitReplicaUpdate
            | SectorState::AbortUpgrade,
            Conflict(_),
        ) => SnapDealsChainConflict,

        // The chain moved on without us, or back.
        (FinalizeSector | FinalizeFailed | Proving | Available | UpdateActivating, CommitLost) => {
            WaitSeed
        }
        (SubmitPreCommitBatch, TicketExpired) if s.bare => AddPiece,
        (PreCommit1 | SubmitPreCommitBatch, TicketExpired) => GetTicket,
        (WaitSeed | SubmitCommitAggregate, PreCommitLost) => SubmitPreCommitBatch,
        (SubmitCommitAggregate, SeedLost) => WaitSeed,
        (Packing | SubmitPreCommitBatch, Event::DealsExpired(_)) => SectorState::DealsExpired,
        (SubmitPreCommitBatch | WaitSeed | SubmitCommitAggregate, Abandoned(_))
        | (SubmitPreCommitBatch, NumberSpent(_)) => FailedUnrecoverable,

        // The snap-deal path.
        (Proving, MarkedForUpdate) if is_empty(s) => Available,
        (Available, PieceAdded { .. }) => SnapDealsWaitDeals,
        (SnapDealsWaitDeals, PieceAdded { .. }) => SnapDealsWaitDeals,
        (SnapDealsWaitDeals, StartPacking) => SnapDealsAddPiece,
        (SnapDealsAddPiece, PiecesWritten) => SnapDealsPacking,
        (SnapDealsPacking, Packed { .. }) => UpdateReplica,
        (UpdateReplica, ReplicaUpdated(_)) => ProveReplicaUpdate,
        (ProveReplicaUpdate, UpdateProved) => FinalizeReplicaUpdate,
        (FinalizeReplicaUpdate, UpdateFinalized) => SubmitReplicaUpdate,
        (SubmitReplicaUpdate, DeadlineImmutable) => WaitMutable,
        (WaitMutable, DeadlineMutable) => SubmitReplicaUpdate,
        (SubmitReplicaUpdate, UpdateSent(_)) => ReplicaUpdateWait,
        (
            SubmitReplicaUpdate | ReplicaUpdateWait | SectorState::AbortUpgrade,
            UpdateLanded { .. },
        ) => UpdateActivating,
        (UpdateActivating, UpdateLost) => SubmitReplicaUpdate,
        (UpdateActivating, Final) => ReleaseSectorKey,
        (ReleaseSectorKey, KeyReleased) => Proving,
        (SnapDealsPacking | SubmitReplicaUpdate, Event::DealsExpired(_)) => SnapDealsDealsExpired,
        (from, Event::AbortUpgrade)
            if from.is_upgrading() && !from.is_in_flight() && from != SectorState::AbortUpgrade =>
        {
            SectorState::AbortUpgrade
        }
        // Not `Available`: what made this upgrade fail would meet the next one too.
        (SectorState::AbortUpgrade, UpgradeAborted) => Proving,

        // The end.
        (Proving | Available | UpdateActivating | ReleaseSectorKey, Terminate) => Terminating,
        (Terminating, TerminateSent(_)) => TerminateWait,
        (Terminating | TerminateWait, Terminated) => TerminateFinality,
        (TerminateFinality, TerminateLost) => Terminating,
        (TerminateFinality, Final) => Removing,
        (Removing, FilesRemoved) => Removed,

        // The work failed.
        (AddPiece, Failed(_)) => AddPieceFailed,
        (Packing, Failed(_)) => PackingFailed,
        (PreCommit1, Failed(_)) => SealPreCommit1Failed,
        (PreCommit2, Failed(_)) => SealPreCommit2Failed,
        (Committing, Failed(_)) => ComputeProofFailed,
        (FinalizeSector, Failed(_)) => FinalizeFailed,
        (SnapDealsAddPiece | SnapDealsPacking, Failed(_)) => SnapDealsAddPieceFailed,
        (UpdateReplica | ProveReplicaUpdate | SubmitReplicaUpdate, Failed(_)) => {
            ReplicaUpdateFailed
        }
        (FinalizeReplicaUpdate, Failed(_)) => FinalizeReplicaUpdateFailed,
        (Removing, Failed(_)) => RemoveFailed,

        // The chain refused.
        (SubmitPreCommitBatch | PreCommitBatchWait, Refused { .. }) => PreCommitFailed,
        (SubmitCommitAggregate | CommitAggregateWait, Refused { .. }) => CommitFailed,
        (SubmitReplicaUpdate | ReplicaUpdateWait, Refused { .. }) => ReplicaUpdateFailed,
        (Terminating | TerminateWait, Refused { .. }) => TerminateFailed,

        // The way out of each failure; when the same input failed often, make it anew.
        (AddPieceFailed, Retry) => AddPiece,
        (PackingFailed, Retry) => Packing,
        (SealPreCommit1Failed, Retry) if s.failures > HOPELESS && !pre_committed => Removing,
        (SealPreCommit1Failed, Retry) if worn_out => AddPiece,
        (SealPreCommit1Failed, Retry) => PreCommit1,
        (SealPreCommit2Failed, Retry) if worn_out => PreCommit1,
        (SealPreCommit2Failed, Retry) => PreCommit2,
        (PreCommitFailed, Retry) if worn_out && !pre_committed && s.bare => AddPiece,
        (PreCommitFailed, Retry) if worn_out && !pre_committed => GetTicket,
        (PreCommitFailed, Retry) => SubmitPreCommitBatch,
        (ComputeProofFailed, Retry) if worn_out => from_pre_commit1,
        (CommitFailed, Retry) if s.bad_proofs >= BAD_PROOFS => from_pre_commit1,
        (ComputeProofFailed | CommitFailed, Retry) => WaitSeed,
        (FinalizeFailed, Retry) => FinalizeSector,
        (ChainConflict, Retry) => AddPiece,
        (SnapDealsChainConflict, Retry) => SnapDealsAddPiece,
        (SectorState::DealsExpired, Retry) => Removing,
        (SnapDealsDealsExpired, Retry) => SectorState::AbortUpgrade,
        (SnapDealsAddPieceFailed | ReplicaUpdateFailed, Retry) if worn_out => {
            SectorState::AbortUpgrade
        }
        (SnapDealsAddPieceFailed, Retry) => SnapDealsAddPiece,
        (ReplicaUpdateFailed, Retry) if update_proved => SubmitReplicaUpdate,
        (ReplicaUpdateFailed, Retry) if encoded => ProveReplicaUpdate,
        (ReplicaUpdateFailed, Retry) => UpdateReplica,
        (FinalizeReplicaUpdateFailed, Retry) => FinalizeReplicaUpdate,
        (TerminateFailed, Retry) => Terminating,
        (RemoveFailed, Retry) => Removing,

        // The operator.
        (_, Remove) if may_remove(s) => Removing,
        (_, ForceState(to)) if may_force(s, *to) => *to,

        _ => return None,
    })
}

/// The state of a sector that was found on chain.
const fn found_in(found: &Found) -> SectorState {
    match found.at {
        FoundAt::PreCommitted { .. } => SectorState::WaitSeed,
        FoundAt::Active { .. } => SectorState::FinalizeSector,
        FoundAt::Updated { .. } => SectorState::UpdateActivating,
    }
}

/// On chain, and without data.
fn is_empty(s: &Sector) -> bool {
    s.activation.is_some() && s.pieces.is_empty() && s.update.is_none() && !s.unlisted
}

/// A sector on chain is removed from a state of rest; whether the chain still needs it is for
/// the caller to ask. One that is not on chain may be removed unless a message could put it
/// there.
fn may_remove(s: &Sector) -> bool {
    use SectorState::*;
    match s.state {
        Removing | Removed => false,
        FailedUnrecoverable => true,
        Proving | Available => s.activation.is_some(),
        state => s.activation.is_none() && !state.is_in_flight(),
    }
}

/// Whether the operator may put a sector into a state: it must have what the state works on.
fn may_force(s: &Sector, to: SectorState) -> bool {
    use SectorState::*;
    if to == s.state || matches!(s.state, Removing | RemoveFailed | Removed) {
        return false;
    }
    let on_chain = s.activation.is_some();
    let landed = s.update.as_ref().is_some_and(|u| u.landed.is_some());
    match to {
        // Files are deleted by `Remove` and `AbortUpgrade` alone, which look first.
        Removing | RemoveFailed | Removed | AbortUpgrade => false,
        WaitDeals => false,
        Proving => on_chain && (s.update.is_none() || landed),
        Available => is_empty(s),
        Terminating | TerminateWait | TerminateFinality | TerminateFailed => {
            on_chain && (s.update.is_none() || landed)
        }
        UpdateActivating | ReleaseSectorKey => landed,
        SnapDealsWaitDeals | ReplicaUpdateWait => false,
        to if to.is_upgrading() => on_chain && s.update.is_some() && !landed,
        FinalizeSector | FinalizeFailed => on_chain && s.update.is_none(),
        FailedUnrecoverable => !on_chain,
        _ => !on_chain,
    }
}

/// Whether the pieces go back: the sector will never hold them. Pieces of a sector that was on
/// chain and has ended do not.
fn gives_back(s: &Sector, event: &Event, after: SectorState) -> bool {
    if let Event::FoundOnChain(found) = event {
        return !found.same_pieces;
    }
    match after {
        SectorState::Removing => s.activation.is_none(),
        SectorState::FailedUnrecoverable => matches!(event, Event::NumberSpent(_)),
        SectorState::Proving => s.state == SectorState::AbortUpgrade,
        _ => false,
    }
}

fn opened(event: &Event, state: SectorState) -> Option<Sector> {
    match event {
        Event::PieceAdded { unix_ms, .. } | Event::Pledged { unix_ms } => {
            Some(Sector::new(state, *unix_ms))
        }
        _ => None,
    }
}

/// What the sector remembers of an event that applies.
fn absorb(s: &mut Sector, event: &Event) {
    s.reason = None;
    match event {
        Event::PieceAdded { piece, unix_ms } => {
            if s.state == SectorState::Available {
                s.update = Some(Update::default());
                s.opened_unix_ms = *unix_ms;
                s.failures = 0;
            }
            s.pieces.push(piece.clone());
        }
        Event::Packed { claims } => {
            for p in &mut s.pieces {
                p.claim = claims.iter().find(|(k, _)| *k == p.key).map(|(_, c)| *c);
            }
        }
        // A sector that was sent back after its pre-commit must get the same replica again, so
        // it keeps the ticket that it was pre-committed with.
        Event::Ticket(ticket) if s.pre_commit_epoch.is_none() => s.ticket = Some(*ticket),
        Event::TicketExpired => {
            s.ticket = None;
            s.commitments = None;
            s.seat = Seat::default();
        }
        Event::PreCommit2Done {
            commitments,
            unix_ms,
        } => {
            s.commitments = Some(*commitments);
            s.bare = false;
            s.bad_proofs = 0;
            s.seat = seat(*unix_ms);
            if s.pre_commit_epoch.is_none() {
                s.failures = 0;
            }
        }
        Event::Batched {
            batch,
            aggregate,
            place,
            of,
        } => {
            s.seat = Seat {
                batch: Some(*batch),
                aggregate: *aggregate,
                place: *place,
                of: *of,
                group: None,
                ..s.seat
            };
        }
        Event::NotAggregated(_) => {
            s.seat.plain = true;
            let alone = s.seat.alone;
            regroup(s, true);
            s.seat.alone = alone;
        }
        Event::PreCommitSent(cid) => {
            s.pre_commit = Some(*cid);
            s.pre_commit_batch = s.seat.batch;
        }
        Event::PreCommitLanded { epoch } => {
            if s.pre_commit_epoch != Some(*epoch) {
                s.failures = 0;
            }
            s.pre_commit_epoch = Some(*epoch);
            s.seat = Seat::default();
        }
        Event::PreCommitLost => {
            s.pre_commit_epoch = None;
            alone(s);
            // The message is pushed until it is on chain again.
            s.seat.batch = s.pre_commit_batch;
        }
        Event::SeedReady(seed) => {
            if s.seed != Some(*seed) {
                s.proved = false;
            }
            s.seed = Some(*seed);
        }
        Event::SeedLost => s.seat.batch = None,
        Event::Proved { unix_ms } => {
            s.proved = true;
            s.seat = seat(*unix_ms);
        }
        Event::CommitSent(cid) => {
            s.commit = Some(*cid);
            s.commit_batch = s.seat.batch;
        }
        Event::CommitLanded {
            activation,
            expiration,
        } => {
            s.activation = Some(*activation);
            s.expiration = Some(*expiration);
            s.seat = Seat::default();
            s.failures = 0;
        }
        Event::CommitLost => {
            s.activation = None;
            s.expiration = None;
            s.update = None;
            s.failures = 0;
            // The message may land again; one that was cleaned up is of no use for another proof.
            s.seat = Seat {
                batch: s.commit_batch,
                ..Seat::default()
            };
            s.bare = true;
        }
        Event::FoundOnChain(found) => absorb_found(s, found),
        Event::Finalized { .. } => {
            s.failures = 0;
            s.bare = true;
        }
        Event::Failed(why) => {
            failed(s, why, Cause::Other);
            if let (SectorState::ProveReplicaUpdate, Some(u)) = (s.state, &mut s.update) {
                u.commitments = None;
            }
        }
        Event::Abandoned(why) | Event::NumberSpent(why) | Event::DealsExpired(why) => {
            failed(s, why, Cause::Other);
        }
        // It waits longer, but nothing is made anew for it.
        Event::Conflict(why) => failed(s, why, Cause::Money),
        Event::Refused { why, spent, cause } => {
            failed(s, why, *cause);
            refused(s, *spent, *cause);
        }
        Event::TerminateSent(cid) => s.terminate = Some(*cid),
        Event::Terminated => s.failures = 0,
        Event::UpgradeAborted => s.update = None,
        Event::ForceState(_) => {
            s.failures = 0;
            s.seat.batch = None;
            s.seat.group = None;
        }
        Event::ReplicaUpdated(_)
        | Event::UpdateProved
        | Event::UpdateSent(_)
        | Event::UpdateLanded { .. }
        | Event::UpdateLost => absorb_update(s, event),
        Event::Ticket(_)
        | Event::Pledged { .. }
        | Event::StartPacking
        | Event::PiecesWritten
        | Event::PreCommit1Done
        | Event::MarkedForUpdate
        | Event::UpdateFinalized
        | Event::DeadlineImmutable
        | Event::DeadlineMutable
        | Event::KeyReleased
        | Event::AbortUpgrade
        | Event::Terminate
        | Event::TerminateLost
        | Event::Final
        | Event::Retry
        | Event::Remove
        | Event::FilesRemoved => {}
    }
}

fn absorb_found(s: &mut Sector, found: &Found) {
    s.commitments = Some(found.commitments);
    s.ticket = found.ticket;
    s.unlisted = found.has_data && !found.same_pieces;
    s.seat = Seat::default();
    s.seed = None;
    s.proved = false;
    s.failures = 0;
    s.bad_proofs = 0;
    let old = s.update.take();
    match found.at {
        FoundAt::PreCommitted { epoch } => s.pre_commit_epoch = Some(epoch),
        FoundAt::Active {
            activation,
            expiration,
        } => {
            s.activation = Some(activation);
            s.expiration = Some(expiration);
        }
        FoundAt::Updated {
            activation,
            expiration,
            commitments,
            seen,
        } => {
            s.activation = Some(activation);
            s.expiration = Some(expiration);
            s.update = Some(Update {
                commitments: Some(commitments),
                proved: false,
                landed: Some(seen),
                ..old.unwrap_or_default()
            });
        }
    }
}

fn absorb_update(s: &mut Sector, event: &Event) {
    let Some(u) = &mut s.update else {
        return;
    };
    match event {
        Event::ReplicaUpdated(c) => {
            u.commitments = Some(*c);
            u.proved = false;
        }
        Event::UpdateProved => u.proved = true,
        Event::UpdateSent(cid) => u.message = Some(*cid),
        Event::UpdateLanded { epoch } => {
            u.landed = Some(*epoch);
            s.failures = 0;
        }
        Event::UpdateLost => u.landed = None,
        _ => {}
    }
}

const fn seat(since_unix_ms: u64) -> Seat {
    Seat {
        since_unix_ms,
        batch: None,
        aggregate: false,
        alone: false,
        place: 0,
        of: 0,
        group: None,
        plain: false,
    }
}

const fn alone(s: &mut Sector) {
    s.seat.batch = None;
    s.seat.aggregate = false;
    s.seat.group = None;
    s.seat.alone = true;
}

/// The sector leaves its batch with those who go together next: all of it, or its half.
fn regroup(s: &mut Sector, whole: bool) {
    let Seat {
        batch, place, of, ..
    } = s.seat;
    alone(s);
    if let Some(batch) = batch {
        let (group, size) = Group::of(batch, place, of, whole);
        s.seat.group = (size > 1).then_some(group);
        s.seat.alone = size <= 1;
    }
}

/// Short money is no failure of the sector: it waits longer, but nothing is made anew. Nor is the
/// refusal of a batch, which does not say which sector is meant.
fn failed(s: &mut Sector, why: &str, cause: Cause) {
    let more = s.failures.saturating_add(1);
    s.failures = match cause {
        Cause::Money | Cause::Gas => more.min(PATIENCE).max(s.failures),
        Cause::Other if s.seat.batch.is_some() && s.seat.of > 1 => more.min(1).max(s.failures),
        Cause::Proof | Cause::Other => more,
    };
    s.reason = Some(why.to_owned());
}

fn refused(s: &mut Sector, spent: bool, cause: Cause) {
    use SectorState::*;
    let bad_proof = cause == Cause::Proof;
    match s.state {
        Terminating | TerminateWait => s.terminate_tries += u32::from(spent),
        SubmitReplicaUpdate | ReplicaUpdateWait => {
            if let Some(u) = &mut s.update {
                u.tries += u32::from(spent);
                if bad_proof {
                    u.proved = false;
                    u.commitments = None;
                }
            }
        }
        _ => {
            regroup(s, cause == Cause::Money);
            if bad_proof {
                s.proved = false;
                s.bad_proofs += 1;
            }
        }
    }
}
