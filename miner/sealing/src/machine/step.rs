use lotus_journal::{EffectId, Machine, Map};
use lotus_types::SectorNumber;

use super::{Effect, Event, Sector, SectorState};

/// Failures in a row after which a step is not tried on the same input again, but its input is
/// made anew.
const PATIENCE: u32 = 3;

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
    sector.state = after;
    sector.events += 1;
    let effects = if before == Some(after) {
        Vec::new()
    } else {
        after.effect().into_iter().collect()
    };
    Some((sector, effects))
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
    Some(match (s.state, event) {
        // The happy path.
        (WaitDeals, PieceAdded { .. }) => WaitDeals,
        (WaitDeals, StartPacking) => AddPiece,
        (AddPiece, PiecesWritten) => Packing,
        (Packing, Packed { .. }) => GetTicket,
        (GetTicket, Ticket(_)) => PreCommit1,
        (PreCommit1, PreCommit1Done) => PreCommit2,
        (PreCommit2, PreCommit2Done(_)) => SubmitPreCommitBatch,
        (SubmitPreCommitBatch, PreCommitSent(_)) => PreCommitBatchWait,
        (SubmitPreCommitBatch | PreCommitBatchWait, PreCommitLanded { .. }) => WaitSeed,
        (WaitSeed, SeedReady(seed)) if s.proved && s.seed == Some(*seed) => SubmitCommitAggregate,
        (WaitSeed, SeedReady(_)) => Committing,
        (Committing, Proved) => SubmitCommitAggregate,
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
        (FinalizeSector, Finalized) => Proving,

        // The chain moved on without us, or back.
        (PreCommit1 | SubmitPreCommitBatch, TicketExpired) => GetTicket,
        (WaitSeed | SubmitCommitAggregate, PreCommitLost) => SubmitPreCommitBatch,
        (SubmitPreCommitBatch | WaitSeed | SubmitCommitAggregate, Abandoned(_)) => {
            FailedUnrecoverable
        }

        // The work failed.
        (AddPiece, Failed(_)) => AddPieceFailed,
        (Packing, Failed(_)) => PackingFailed,
        (PreCommit1, Failed(_)) => SealPreCommit1Failed,
        (PreCommit2, Failed(_)) => SealPreCommit2Failed,
        (Committing, Failed(_)) => ComputeProofFailed,
        (FinalizeSector, Failed(_)) => FinalizeFailed,
        (Removing, Failed(_)) => RemoveFailed,

        // The chain refused.
        (SubmitPreCommitBatch | PreCommitBatchWait, Refused { .. }) => PreCommitFailed,
        (SubmitCommitAggregate | CommitAggregateWait, Refused { .. }) => CommitFailed,

        // The way out of each failure; when the same input failed often, make it anew.
        (AddPieceFailed, Retry) => AddPiece,
        (PackingFailed, Retry) => Packing,
        (SealPreCommit1Failed, Retry) if worn_out => AddPiece,
        (SealPreCommit1Failed, Retry) => PreCommit1,
        (SealPreCommit2Failed, Retry) if worn_out => PreCommit1,
        (SealPreCommit2Failed, Retry) => PreCommit2,
        (PreCommitFailed, Retry) if worn_out && s.pre_commit_epoch.is_none() => GetTicket,
        (PreCommitFailed, Retry) => SubmitPreCommitBatch,
        (ComputeProofFailed, Retry) if worn_out => PreCommit1,
        (CommitFailed, Retry) if worn_out && !s.proved => PreCommit1,
        (ComputeProofFailed | CommitFailed, Retry) => WaitSeed,
        (FinalizeFailed, Retry) => FinalizeSector,
        (RemoveFailed, Retry) => Removing,

        // The operator.
        (FailedUnrecoverable, Remove) => Removing,
        (Removing, FilesRemoved) => Removed,

        _ => return None,
    })
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
        Event::PieceAdded { piece, .. } => s.pieces.push(piece.clone()),
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
        }
        Event::PreCommit2Done(c) => {
            s.commitments = Some(*c);
            if s.pre_commit_epoch.is_none() {
                s.failures = 0;
            }
        }
        Event::PreCommitSent(cid) => s.pre_commit = Some(*cid),
        Event::PreCommitLanded { epoch } => {
            if s.pre_commit_epoch != Some(*epoch) {
                s.failures = 0;
            }
            s.pre_commit_epoch = Some(*epoch);
        }
        Event::PreCommitLost => s.pre_commit_epoch = None,
        Event::SeedReady(seed) => {
            if s.seed != Some(*seed) {
                s.proved = false;
            }
            s.seed = Some(*seed);
        }
        Event::Proved => s.proved = true,
        Event::CommitSent(cid) => s.commit = Some(*cid),
        Event::CommitLanded {
            activation,
            expiration,
        } => {
            s.activation = Some(*activation);
            s.expiration = Some(*expiration);
            s.failures = 0;
        }
        Event::Finalized => s.failures = 0,
        Event::Failed(why) | Event::Abandoned(why) => {
            s.failures = s.failures.saturating_add(1);
            s.reason = Some(why.clone());
        }
        Event::Refused {
            why,
            spent,
            bad_proof,
        } => {
            s.failures = s.failures.saturating_add(1);
            s.reason = Some(why.clone());
            let tries = match s.state {
                SectorState::SubmitPreCommitBatch | SectorState::PreCommitBatchWait => {
                    &mut s.pre_commit_tries
                }
                _ => &mut s.commit_tries,
            };
            *tries = tries.saturating_add(u32::from(*spent));
            if *bad_proof {
                s.proved = false;
            }
        }
        Event::Ticket(_)
        | Event::Pledged { .. }
        | Event::StartPacking
        | Event::PiecesWritten
        | Event::PreCommit1Done
        | Event::Retry
        | Event::Remove
        | Event::FilesRemoved => {}
    }
}
