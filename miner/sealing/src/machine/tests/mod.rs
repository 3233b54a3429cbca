mod table;
mod walk;

use std::collections::BTreeSet;

use cid::Cid;
use lotus_proofs::SealedCommitments;
use lotus_types::{Commitment, Epoch, EpochDelta};

use super::{
    Cause, Claim, Effect, Event, Found, FoundAt, Group, Half, SealSeed, SealTicket, Sector,
    SectorState, Update, returned, step, testing,
};
use SectorState as S;

fn cid(n: u8) -> Cid {
    Commitment([n & 0x3f; 32]).sealed_cid()
}

fn commitments() -> SealedCommitments {
    SealedCommitments {
        comm_r: Commitment([1; 32]),
        comm_d: Commitment([2; 32]),
    }
}

fn seed(n: u8) -> Event {
    Event::SeedReady(SealSeed {
        value: [n; 32],
        epoch: Epoch(n.into()),
    })
}

const fn batched(batch: u64) -> Event {
    seated(batch, 0, 1)
}

const fn seated(batch: u64, place: u32, of: u32) -> Event {
    Event::Batched {
        batch,
        aggregate: false,
        place,
        of,
    }
}

fn refused(spent: bool, cause: Cause) -> Event {
    Event::Refused {
        why: "no".into(),
        spent,
        cause,
    }
}

const PRE_COMMITTED: FoundAt = FoundAt::PreCommitted { epoch: Epoch(20) };
const ACTIVE: FoundAt = FoundAt::Active {
    activation: Epoch(40),
    expiration: Epoch(4_000),
};
const UPDATED: FoundAt = FoundAt::Updated {
    activation: Epoch(40),
    expiration: Epoch(4_000),
    commitments: SealedCommitments {
        comm_r: Commitment([5; 32]),
        comm_d: Commitment([6; 32]),
    },
    seen: Epoch(90),
};

fn found(at: FoundAt, same_pieces: bool) -> Event {
    Event::FoundOnChain(Box::new(Found {
        commitments: commitments(),
        ticket: None,
        at,
        same_pieces,
        has_data: true,
    }))
}

/// One event of each kind.
fn every_event() -> Vec<Event> {
    vec![
        Event::PieceAdded {
            piece: testing::placed(1, testing::piece(1, 1024), 0),
            unix_ms: 5,
        },
        Event::Pledged { unix_ms: 5 },
        Event::StartPacking,
        Event::PiecesWritten,
        Event::Packed { claims: vec![] },
        Event::DealsExpired("late".into()),
        Event::Ticket(SealTicket {
            value: [3; 32],
            epoch: Epoch(9),
        }),
        Event::TicketExpired,
        Event::PreCommit1Done,
        Event::PreCommit2Done {
            commitments: commitments(),
            unix_ms: 6,
        },
        batched(4),
        Event::NotAggregated("no worker".into()),
        Event::PreCommitSent(cid(1)),
        Event::PreCommitLanded { epoch: Epoch(20) },
        Event::PreCommitLost,
        seed(1),
        Event::SeedLost,
        Event::Proved { unix_ms: 7 },
        Event::CommitSent(cid(2)),
        Event::CommitLanded {
            activation: Epoch(40),
            expiration: Epoch(4_000),
        },
        Event::CommitLost,
        found(UPDATED, true),
        Event::Conflict("others".into()),
        Event::Finalized { upgradable: true },
        Event::MarkedForUpdate,
        Event::ReplicaUpdated(commitments()),
        Event::UpdateProved,
        Event::UpdateFinalized,
        Event::UpdateSent(cid(3)),
        Event::DeadlineImmutable,
        Event::DeadlineMutable,
        Event::UpdateLanded { epoch: Epoch(90) },
        Event::UpdateLost,
        Event::KeyReleased,
        Event::AbortUpgrade,
        Event::UpgradeAborted,
        Event::Terminate,
        Event::TerminateSent(cid(4)),
        Event::Terminated,
        Event::TerminateLost,
        Event::Final,
        Event::Failed("broken".into()),
        refused(true, Cause::Other),
        Event::Retry,
        Event::Abandoned("gone".into()),
        Event::NumberSpent("used".into()),
        Event::Remove,
        Event::FilesRemoved,
        Event::ForceState(S::FailedUnrecoverable),
    ]
}

/// A sector in a state, with what it has when it comes there by the table.
fn at(state: S) -> Sector {
    use S::*;
    let mut s = Sector::new(state, 1);
    let ended = matches!(
        state,
        Terminating | TerminateWait | TerminateFinality | TerminateFailed
    );
    let rests = matches!(
        state,
        FinalizeSector | FinalizeFailed | Proving | Available | UpdateActivating | ReleaseSectorKey
    );
    if ended || rests || state.is_upgrading() {
        s.activation = Some(Epoch(40));
        s.expiration = Some(Epoch(4_000));
    }
    let landed = matches!(state, UpdateActivating | ReleaseSectorKey);
    if landed || state.is_upgrading() {
        s.update = Some(Update {
            landed: landed.then_some(Epoch(90)),
            ..Update::default()
        });
    }
    s
}

#[test]
fn states_and_events_have_lotus_names() {
    let names: BTreeSet<_> = S::ALL.iter().map(|s| s.as_str()).collect();
    assert_eq!(names.len(), S::ALL.len());
    for s in S::ALL {
        assert_eq!(format!("{s:?}"), s.as_str());
        assert_eq!(s.as_str().parse(), Ok(*s));
    }
    let events: BTreeSet<_> = every_event().iter().map(Event::name).collect();
    assert_eq!(events.len(), every_event().len());
}

fn run(mut s: Sector, events: &[Event]) -> Sector {
    for e in events {
        s = step(Some(&s), e)
            .unwrap_or_else(|| panic!("{} in {}", e.name(), s.state))
            .0;
    }
    s
}

#[test]
fn failing_often_remakes_the_input() {
    let fail = Event::Failed("x".into());
    for (work, failed, remake) in [
        (S::PreCommit1, S::SealPreCommit1Failed, S::AddPiece),
        (S::PreCommit2, S::SealPreCommit2Failed, S::PreCommit1),
    ] {
        let mut s = at(work);
        for n in 1..=4 {
            s = run(s, std::slice::from_ref(&fail));
            assert_eq!((s.state, s.failures), (failed, n));
            assert_eq!(s.reason.as_deref(), Some("x"));
            s = run(s, &[Event::Retry]);
            assert_eq!(s.state, if n < 4 { work } else { remake });
        }
    }
    let mut s = at(S::Committing);
    for _ in 0..3 {
        s = run(s, &[fail.clone(), Event::Retry, seed(1)]);
        assert_eq!(s.state, S::Committing);
    }
    assert_eq!(run(s, &[fail, Event::Retry]).state, S::PreCommit1);
}

#[test]
fn a_hopeless_sector_gives_its_pieces_back() {
    let mut s = at(S::PreCommit1);
    s.pieces
        .push(testing::placed(1, testing::piece(1, 1024), 0));
    for n in 1..=7 {
        s.state = S::PreCommit1;
        s = run(s, &[Event::Failed("x".into())]);
        let after = run(s.clone(), &[Event::Retry]);
        let want = [S::PreCommit1, S::AddPiece, S::Removing];
        assert_eq!(after.state, want[usize::from(n > 3) + usize::from(n > 6)]);
        assert_eq!(returned(Some(&s), &after).len(), usize::from(n > 6));
    }
    // With a deposit at stake it goes on.
    s.pre_commit_epoch = Some(Epoch(5));
    assert_eq!(run(s, &[Event::Retry]).state, S::AddPiece);
}

#[test]
fn short_money_remakes_nothing() {
    let mut s = at(S::SubmitPreCommitBatch);
    for _ in 0..20 {
        s = run(s, &[refused(false, Cause::Money), Event::Retry]);
        assert_eq!((s.state, s.seat.alone), (S::SubmitPreCommitBatch, true));
    }
    // The ticket may be the reason of other refusals.
    let s = run(s, &[refused(false, Cause::Other), Event::Retry]);
    assert_eq!(s.state, S::GetTicket);
}

#[test]
fn a_batch_that_waits_for_money_stays_together_and_another_is_halved() {
    use Half::{Both, First, Second};
    for (place, of, cause, want) in [
        (0, 4, Cause::Money, Some(Both)),
        (3, 4, Cause::Money, Some(Both)),
        (0, 4, Cause::Other, Some(First)),
        (1, 4, Cause::Gas, Some(First)),
        (2, 4, Cause::Other, Some(Second)),
        (1, 3, Cause::Other, Some(Second)),
        // What is left is one sector: it goes alone.
        (0, 3, Cause::Other, None),
        (1, 2, Cause::Other, None),
        (0, 1, Cause::Money, None),
        // A batch of an older journal.
        (0, 0, Cause::Other, None),
    ] {
        for state in [S::SubmitPreCommitBatch, S::SubmitCommitAggregate] {
            let s = run(at(state), &[seated(7, place, of), refused(false, cause)]);
            let group = want.map(|half| Group { batch: 7, half });
            let got = (s.seat.batch, s.seat.group, s.seat.alone);
            assert_eq!(got, (None, group, want.is_none()), "{place}/{of} {cause:?}");
            // The next batch has its own parts.
            let s = run(at(state), &[seated(8, 0, 2)]);
            assert_eq!(s.seat.group, None);
        }
    }
    // However often its batches are refused, a sector is not made anew for another's fault.
    let mut s = at(S::SubmitPreCommitBatch);
    for batch in 0..8 {
        s = run(
            s,
            &[
                seated(batch, 1, 4),
                refused(false, Cause::Other),
                Event::Retry,
            ],
        );
        assert_eq!((s.state, s.failures), (S::SubmitPreCommitBatch, 1));
    }
}

#[test]
fn a_batch_is_remembered_until_its_message_is_of_no_use() {
    let sent = run(
        at(S::SubmitPreCommitBatch),
        &[batched(7), Event::PreCommitSent(cid(1))],
    );
    assert_eq!(sent.seat.batch, Some(7));
    let again = run(sent.clone(), &[refused(true, Cause::Other), Event::Retry]);
    assert_eq!((again.seat.batch, again.seat.alone), (None, true));
    // A reorg takes the pre-commit away: the message is still on its way.
    let lost = run(
        sent,
        &[
            Event::PreCommitLanded { epoch: Epoch(5) },
            seed(1),
            Event::Proved { unix_ms: 3 },
            batched(8),
            Event::PreCommitLost,
        ],
    );
    assert_eq!(
        (lost.state, lost.seat.batch),
        (S::SubmitPreCommitBatch, Some(7))
    );
}

#[test]
fn a_batch_without_its_aggregate_sends_each_proof_as_it_is() {
    let aggregated = Event::Batched {
        batch: 3,
        aggregate: true,
        place: 1,
        of: 4,
    };
    let s = run(at(S::SubmitCommitAggregate), &[aggregated]);
    assert_eq!((s.seat.batch, s.seat.aggregate), (Some(3), true));
    let s = run(s, &[Event::NotAggregated("no worker".into())]);
    assert_eq!((s.state, s.failures), (S::SubmitCommitAggregate, 0));
    assert!(s.seat.batch.is_none() && s.seat.plain && !s.seat.alone);
    let four = Group {
        batch: 3,
        half: Half::Both,
    };
    assert_eq!(s.seat.group, Some(four), "they still share their message");
    let s = run(s, &[batched(4)]);
    assert!(s.seat.batch == Some(4) && !s.seat.aggregate);
    // A new proof may be aggregated again.
    let s = run(s, &[Event::SeedLost, seed(2), Event::Proved { unix_ms: 1 }]);
    assert!(s.state == S::SubmitCommitAggregate && !s.seat.plain);
}

#[test]
fn a_commit_goes_out_again_without_a_new_proof_unless_the_proof_was_wrong() {
    let sealed = run(
        at(S::WaitSeed),
        &[
            seed(1),
            Event::Proved { unix_ms: 1 },
            Event::CommitSent(cid(2)),
        ],
    );
    let again = run(
        sealed.clone(),
        &[refused(true, Cause::Money), Event::Retry, seed(1)],
    );
    assert_eq!(again.state, S::SubmitCommitAggregate);
    let bad = run(
        sealed.clone(),
        &[refused(true, Cause::Proof), Event::Retry, seed(1)],
    );
    assert_eq!((bad.state, bad.bad_proofs), (S::Committing, 1));
    // The second wrong proof: the replica is made again.
    let worse = run(
        bad,
        &[
            Event::Proved { unix_ms: 1 },
            refused(false, Cause::Proof),
            Event::Retry,
        ],
    );
    assert_eq!(worse.state, S::PreCommit1);
    let reorg = run(
        sealed,
        &[refused(true, Cause::Other), Event::Retry, seed(2)],
    );
    assert_eq!((reorg.state, reorg.proved), (S::Committing, false));
}

#[test]
fn an_upgrade_that_fails_goes_on_from_what_it_has() {
    let piece = every_event().remove(0);
    let encoded = run(
        at(S::Available),
        &[
            piece,
            Event::StartPacking,
            Event::PiecesWritten,
            Event::Packed { claims: vec![] },
            Event::ReplicaUpdated(commitments()),
        ],
    );
    assert_eq!(encoded.state, S::ProveReplicaUpdate);
    let failed = run(encoded.clone(), &[Event::Failed("x".into()), Event::Retry]);
    assert_eq!(failed.state, S::UpdateReplica, "the replica may be damaged");
    let ready = run(encoded, &[Event::UpdateProved, Event::UpdateFinalized]);
    let funds = run(ready.clone(), &[refused(false, Cause::Money), Event::Retry]);
    assert_eq!(funds.state, S::SubmitReplicaUpdate);
    let bad = run(
        ready.clone(),
        &[
            Event::UpdateSent(cid(1)),
            refused(true, Cause::Proof),
            Event::Retry,
        ],
    );
    assert_eq!(bad.state, S::UpdateReplica);
    assert_eq!(bad.update.as_ref().map(|u| u.tries), Some(1));
    // In the end the pieces go back, and the sector is what it was.
    let mut s = ready;
    for _ in 0..4 {
        assert_eq!(s.state, S::SubmitReplicaUpdate);
        s = run(s, &[refused(false, Cause::Other), Event::Retry]);
    }
    assert_eq!(s.state, S::AbortUpgrade);
    let after = run(s.clone(), &[Event::UpgradeAborted]);
    assert_eq!(returned(Some(&s), &after).len(), 1);
    assert_eq!((after.state, after.update.clone()), (S::Proving, None));
    assert_eq!(run(after, &[Event::MarkedForUpdate]).state, S::Available);
}

#[test]
fn a_sector_with_data_is_not_offered_for_upgrades() {
    let mut s = at(S::FinalizeSector);
    s.pieces
        .push(testing::placed(1, testing::piece(1, 1024), 0));
    let s = run(s, &[Event::Finalized { upgradable: true }]);
    assert_eq!(s.state, S::Proving);
    assert_eq!(step(Some(&s), &Event::MarkedForUpdate), None);
    // Its deals end with it.
    let ended = run(
        s.clone(),
        &[Event::Terminate, Event::Terminated, Event::Final],
    );
    assert_eq!((ended.state, ended.pieces.len()), (S::Removing, 1));
}

#[test]
fn the_ticket_of_a_pre_commit_on_chain_is_kept() {
    let ticket = |n: u8| {
        Event::Ticket(SealTicket {
            value: [n; 32],
            epoch: Epoch(n.into()),
        })
    };
    let mut s = run(
        at(S::GetTicket),
        &[
            ticket(1),
            Event::PreCommit1Done,
            Event::PreCommit2Done {
                commitments: commitments(),
                unix_ms: 2,
            },
            Event::PreCommitLanded { epoch: Epoch(5) },
        ],
    );
    s.state = S::GetTicket;
    assert_eq!(
        run(s.clone(), &[ticket(2)]).ticket.map(|t| t.epoch),
        Some(Epoch(1))
    );
    s.pre_commit_epoch = None;
    assert_eq!(run(s, &[ticket(2)]).ticket.map(|t| t.epoch), Some(Epoch(2)));
}

#[test]
fn claims_are_noted_at_their_pieces() {
    let mut s = at(S::Packing);
    for n in 1..=2 {
        s.pieces
            .push(testing::placed(n, testing::piece(1, 1024), 0));
    }
    let claim = Claim {
        term_min: EpochDelta(1),
        term_max: EpochDelta(2),
    };
    let claims = vec![(s.pieces[1].key.clone(), claim)];
    let s = run(s, &[Event::Packed { claims }]);
    assert_eq!((s.pieces[0].claim, s.pieces[1].claim), (None, Some(claim)));
}

#[test]
fn the_chain_is_followed_where_it_is_ahead() {
    let ahead = [
        S::WaitDeals,
        S::AddPiece,
        S::PreCommit1,
        S::PreCommit2,
        S::SubmitPreCommitBatch,
        S::WaitSeed,
        S::SubmitCommitAggregate,
    ];
    for state in ahead {
        for (found_at, to) in [
            (PRE_COMMITTED, S::WaitSeed),
            (ACTIVE, S::FinalizeSector),
            (UPDATED, S::UpdateActivating),
        ] {
            let mut s = at(state);
            s.failures = 5;
            s.pieces
                .push(testing::placed(1, testing::piece(1, 1024), 0));
            let same = run(s.clone(), &[found(found_at, true)]);
            assert_eq!((same.state, same.pieces.len()), (to, 1), "{state}");
            assert_eq!((same.failures, same.unlisted), (0, false));
            assert_eq!(same.commitments, Some(commitments()));
            // It holds what this journal does not know: the piece goes into another sector.
            let other = run(s.clone(), &[found(found_at, false)]);
            assert_eq!((other.state, other.unlisted), (to, true));
            assert_eq!(returned(Some(&s), &other).len(), 1);
            let landed = other.update.and_then(|u| u.landed);
            assert_eq!(landed.is_some(), found_at == UPDATED);
        }
    }
    // What it holds must not be upgraded away.
    let s = run(at(S::AddPiece), &[found(ACTIVE, false)]);
    let s = run(s, &[Event::Finalized { upgradable: true }]);
    assert_eq!(s.state, S::Proving);
    assert_eq!(step(Some(&s), &Event::MarkedForUpdate), None);
}

#[test]
fn a_conflict_makes_nothing_anew_and_is_looked_at_again() {
    let mut s = at(S::PreCommit1);
    s.pieces
        .push(testing::placed(1, testing::piece(1, 1024), 0));
    for _ in 0..20 {
        s = run(s, &[Event::Conflict("others".into())]);
        assert_eq!((s.state, s.pieces.len()), (S::ChainConflict, 1));
        assert!(s.reason.is_some() && s.failures <= 3);
        s = run(s, &[Event::Retry]);
        assert_eq!(s.state, S::AddPiece);
    }
    let mut s = at(S::UpdateReplica);
    for _ in 0..20 {
        s = run(s, &[Event::Conflict("others".into())]);
        assert_eq!(s.state, S::SnapDealsChainConflict);
        s = run(s, &[Event::Retry]);
        assert_eq!(s.state, S::SnapDealsAddPiece);
    }
}

#[test]
fn a_lost_commit_is_made_good() {
    let committed = [
        seed(1),
        Event::Proved { unix_ms: 1 },
        batched(7),
        Event::CommitSent(cid(2)),
        Event::CommitLanded {
            activation: Epoch(40),
            expiration: Epoch(4_000),
        },
        Event::Finalized { upgradable: true },
    ];
    let mut s = at(S::WaitSeed);
    s.pre_commit_epoch = Some(Epoch(20));
    s.pre_commit_batch = Some(6);
    s.pieces
        .push(testing::placed(1, testing::piece(1, 1024), 0));
    let proven = run(s, &committed);
    assert_eq!(proven.state, S::Proving);
    let lost = run(proven.clone(), &[Event::CommitLost]);
    assert_eq!((lost.state, lost.activation), (S::WaitSeed, None));
    assert_eq!(lost.pieces.len(), 1, "they are still in it");
    // The same seed: the same proof, and first the same message.
    let same = run(lost.clone(), &[seed(1)]);
    assert_eq!(same.state, S::SubmitCommitAggregate);
    assert_eq!(same.seat.batch, Some(7));
    // Another: the replica is made again, with the ticket that the chain has.
    let other = run(lost.clone(), &[seed(2)]);
    assert_eq!(other.state, S::AddPiece);
    let remade = run(
        other,
        &[
            Event::PiecesWritten,
            Event::Packed { claims: vec![] },
            Event::Ticket(SealTicket {
                value: [9; 32],
                epoch: Epoch(99),
            }),
            Event::PreCommit1Done,
            Event::PreCommit2Done {
                commitments: commitments(),
                unix_ms: 2,
            },
            Event::PreCommitLanded { epoch: Epoch(20) },
            seed(2),
        ],
    );
    assert_eq!(remade.state, S::Committing);
    assert_eq!(remade.ticket, proven.ticket);
    // The pre-commit is gone too: its message goes out again.
    let deeper = run(lost.clone(), &[Event::PreCommitLost]);
    assert_eq!(deeper.seat.batch, Some(6));
    let late = run(deeper, &[Event::TicketExpired]);
    assert_eq!(late.state, S::AddPiece, "its data was deleted");
    // The operator may do what he may with one that never was on chain.
    let forced = Event::ForceState(S::SubmitPreCommitBatch);
    assert!(step(Some(&proven), &forced).is_none());
    assert!(step(Some(&lost), &forced).is_some());
    let removed = run(lost.clone(), &[Event::Remove]);
    assert_eq!(returned(Some(&lost), &removed).len(), 1);
    // An upgrade goes with its sector.
    let mut upgraded = at(S::UpdateActivating);
    upgraded.pieces = proven.pieces;
    let after = run(upgraded.clone(), &[Event::CommitLost]);
    assert_eq!((after.state, &after.update), (S::WaitSeed, &None));
    assert_eq!(returned(Some(&upgraded), &after).len(), 1);
}
