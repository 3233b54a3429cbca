use std::collections::BTreeSet;

use cid::Cid;
use lotus_proofs::SealedCommitments;
use lotus_types::{Commitment, Epoch, EpochDelta};
use proptest::prelude::*;

use super::{Claim, Effect, Event, SealSeed, SealTicket, Sector, SectorState, step, testing};
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

fn refused(spent: bool, bad_proof: bool) -> Event {
    Event::Refused {
        why: "no".into(),
        spent,
        bad_proof,
    }
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
        Event::Ticket(SealTicket {
            value: [3; 32],
            epoch: Epoch(9),
        }),
        Event::TicketExpired,
        Event::PreCommit1Done,
        Event::PreCommit2Done(commitments()),
        Event::PreCommitSent(cid(1)),
        Event::PreCommitLanded { epoch: Epoch(20) },
        Event::PreCommitLost,
        seed(1),
        Event::Proved,
        Event::CommitSent(cid(2)),
        Event::CommitLanded {
            activation: Epoch(40),
            expiration: Epoch(4_000),
        },
        Event::Finalized,
        Event::Failed("broken".into()),
        refused(true, false),
        Event::Retry,
        Event::Abandoned("gone".into()),
        Event::Remove,
        Event::FilesRemoved,
    ]
}

fn at(state: S) -> Sector {
    Sector::new(state, 1)
}

/// The whole table: for each state the events that apply and where they lead. Everything that is
/// not listed changes nothing.
fn table() -> Vec<(Option<S>, &'static str, S)> {
    let rows: [(&[S], &'static str, S); 38] = [
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
        (&[S::FinalizeSector], "SectorFinalized", S::Proving),
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
                S::SubmitPreCommitBatch,
                S::WaitSeed,
                S::SubmitCommitAggregate,
            ],
            "SectorAbandoned",
            S::FailedUnrecoverable,
        ),
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
        (&[S::Removing], "SectorStepFailed", S::RemoveFailed),
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
        (&[S::RemoveFailed], "SectorRetry", S::Removing),
        (&[S::FailedUnrecoverable], "SectorRemove", S::Removing),
        (&[S::Removing], "SectorRemoved", S::Removed),
        (&[], "SectorAddPiece", S::WaitDeals),
        (&[], "SectorStartCC", S::AddPiece),
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
    for state in std::iter::once(None).chain(S::ALL.map(Some)) {
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

#[test]
fn states_and_events_have_lotus_names() {
    let names: BTreeSet<_> = S::ALL.iter().map(|s| s.as_str()).collect();
    assert_eq!(names.len(), S::ALL.len());
    for s in S::ALL {
        assert_eq!(format!("{s:?}"), s.as_str());
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
fn a_refused_pre_commit_is_sent_under_a_new_key_only_when_it_is_spent() {
    let s = run(
        at(S::SubmitPreCommitBatch),
        &[refused(false, false), Event::Retry],
    );
    assert_eq!((s.state, s.pre_commit_tries), (S::SubmitPreCommitBatch, 0));
    let s = run(
        s,
        &[
            Event::PreCommitSent(cid(1)),
            refused(true, false),
            Event::Retry,
        ],
    );
    assert_eq!(
        (s.state, s.pre_commit_tries, s.commit_tries),
        (S::SubmitPreCommitBatch, 1, 0)
    );
    // Refused again and again: the ticket may be the reason.
    let s = run(
        s,
        &[
            refused(false, false),
            Event::Retry,
            refused(false, false),
            Event::Retry,
        ],
    );
    assert_eq!(s.state, S::GetTicket);
}

#[test]
fn a_commit_goes_out_again_without_a_new_proof_unless_the_proof_was_wrong() {
    let sealed = run(
        at(S::WaitSeed),
        &[seed(1), Event::Proved, Event::CommitSent(cid(2))],
    );
    let again = run(
        sealed.clone(),
        &[refused(true, false), Event::Retry, seed(1)],
    );
    assert_eq!(
        (again.state, again.commit_tries),
        (S::SubmitCommitAggregate, 1)
    );
    let bad = run(
        sealed.clone(),
        &[refused(true, true), Event::Retry, seed(1)],
    );
    assert_eq!(bad.state, S::Committing);
    let reorg = run(sealed, &[refused(true, false), Event::Retry, seed(2)]);
    assert_eq!((reorg.state, reorg.proved), (S::Committing, false));
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
            Event::PreCommit2Done(commitments()),
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

/// From every state the effects that are possible lead on: some event of that effect applies.
fn answers(effect: Effect) -> Vec<Event> {
    let fail = Event::Failed("x".into());
    let landed = Event::CommitLanded {
        activation: Epoch(1),
        expiration: Epoch(2),
    };
    let refusals = [refused(true, false), refused(false, true)];
    let all = every_event();
    let one = |name: &str| all.iter().find(|e| e.name() == name).cloned().unwrap();
    let mut out = match effect {
        Effect::WaitForPieces => vec![one("SectorStartPacking")],
        Effect::WritePieces => vec![one("SectorPieceAdded"), fail],
        Effect::CheckPieces => vec![one("SectorPacked"), fail],
        Effect::TakeTicket => vec![one("SectorTicket")],
        Effect::PreCommit1 => vec![one("SectorPreCommit1"), one("SectorTicketExpired"), fail],
        Effect::PreCommit2 => vec![one("SectorPreCommit2"), fail],
        Effect::SendPreCommit => vec![
            one("SectorPreCommitBatchSent"),
            one("SectorPreCommitLanded"),
            one("SectorTicketExpired"),
            one("SectorAbandoned"),
            landed,
        ],
        Effect::AwaitPreCommit => vec![one("SectorPreCommitLanded"), landed],
        Effect::AwaitSeed => vec![
            seed(1),
            seed(2),
            one("SectorPreCommitLost"),
            one("SectorAbandoned"),
            landed,
        ],
        Effect::Prove => vec![one("SectorProofReady"), fail],
        Effect::SendCommit => vec![
            one("SectorCommitAggregateSent"),
            one("SectorPreCommitLost"),
            one("SectorAbandoned"),
            landed,
        ],
        Effect::AwaitCommit => vec![landed],
        Effect::Finalize => vec![one("SectorFinalized"), fail],
        Effect::Remove => vec![one("SectorRemoved"), fail],
        Effect::RetryLater => vec![one("SectorRetry")],
    };
    let chain = [
        Effect::SendPreCommit,
        Effect::AwaitPreCommit,
        Effect::SendCommit,
        Effect::AwaitCommit,
    ];
    if chain.contains(&effect) {
        out.extend(refusals);
    }
    out
}

#[test]
fn every_answer_of_every_effect_applies() {
    for state in S::ALL {
        for event in state.effect().map(answers).unwrap_or_default() {
            assert!(
                step(Some(&at(state)), &event).is_some(),
                "{state} + {}",
                event.name()
            );
        }
    }
}

proptest! {
    /// Whatever the effects answer, and whatever stale events come between, exactly one effect
    /// is pending in every state that is not final, and it is the state's own.
    #[test]
    fn there_is_no_dead_end(choices in proptest::collection::vec((any::<u16>(), any::<u16>()), 1..200)) {
        let all = every_event();
        let (mut s, mut pending) = step(None, &all[0]).unwrap();
        for (answer, stale) in choices {
            let Some(effect) = pending.pop() else {
                prop_assert!(matches!(
                    s.state,
                    S::Proving | S::FailedUnrecoverable | S::Removed
                ));
                break;
            };
            prop_assert!(pending.is_empty());
            prop_assert_eq!(s.state.effect(), Some(effect));
            // A stale event without a row changes nothing.
            let noise = &all[usize::from(stale) % all.len()];
            if !answers(effect).iter().any(|e| e.name() == noise.name())
                && !matches!(noise, Event::PieceAdded { .. })
            {
                prop_assert_eq!(step(Some(&s), noise), None);
            }
            let answers = answers(effect);
            let event = &answers[usize::from(answer) % answers.len()];
            (s, pending) = step(Some(&s), event).unwrap();
        }
    }

    /// An intact world always ends in Proving, from wherever it was.
    #[test]
    fn the_first_answers_lead_to_proving(choices in proptest::collection::vec(any::<u16>(), 0..60)) {
        let (mut s, mut pending) = step(None, &every_event()[0]).unwrap();
        for c in choices {
            let Some(effect) = pending.pop() else { break };
            let answers = answers(effect);
            (s, pending) = step(Some(&s), &answers[usize::from(c) % answers.len()]).unwrap();
        }
        for _ in 0..40 {
            let Some(effect) = pending.pop() else { break };
            (s, pending) = step(Some(&s), &answers(effect)[0]).unwrap();
        }
        prop_assert!(pending.is_empty());
        prop_assert!(matches!(s.state, S::Proving | S::FailedUnrecoverable | S::Removed));
    }
}
