use lotus_types::{Commitment, Epoch, PaddedSize, PieceCid, PieceInfo};
use proptest::prelude::*;
use ulid::Ulid;

use super::*;
use crate::validate::{Format, Retrieval};

fn proposal(source: Source) -> Proposal {
    Proposal {
        key: DealKey {
            client: "t1abc".into(),
            id: Ulid::from(1u128),
        },
        piece: PieceInfo {
            cid: PieceCid::new(Commitment([1; 32])),
            size: PaddedSize::new(1024).unwrap(),
            raw_size: 1000,
        },
        format: Format::Raw,
        source,
        start_epoch: Epoch(10),
        end_epoch: Epoch(20),
        allocation: None,
        notify: None,
        retrieval: Retrieval {
            index: false,
            announce_payload: false,
            announce_piece: false,
        },
        digest: [0; 32],
        signed: None,
    }
}

fn accept(source: Source) -> Event {
    Event::Accept {
        proposal: Box::new(proposal(source)),
        unix_ms: 1,
        credit: "c".into(),
        trace: String::new(),
    }
}

fn placed(state: &str) -> Event {
    Event::Hub(HubView::Placed {
        sector: 3,
        offset: 128,
        state: state.into(),
    })
}

fn active() -> Event {
    Event::Hub(HubView::Active {
        sector: 3,
        offset: 128,
    })
}

/// Drives a new deal through the events; refusals by the table change nothing.
fn drive(source: Source, events: &[Event]) -> (Record, Vec<Effect>) {
    let (mut now, mut effects) = DealMachine::step(None, &accept(source)).unwrap();
    for e in events {
        if let Some((next, more)) = DealMachine::step(Some(&now), e) {
            now = next;
            effects.extend(more);
        }
    }
    (now, effects)
}

#[test]
fn the_happy_path_offers_once_and_drops_the_copy_once() {
    let path = [
        Event::Transferred,
        Event::Hub(HubView::Taken),
        Event::Hub(HubView::Stored),
        placed("WaitDeals"),
        placed("PreCommit1"),
        active(),
    ];
    let names: Vec<_> = (0..=path.len())
        .map(|n| drive(Source::Put, &path[..n]).0.checkpoint.name())
        .collect();
    assert_eq!(
        names,
        [
            "Accepted",
            "Transferred",
            "Offered",
            "Offered",
            "AddedPiece",
            "Sealing",
            "Active"
        ]
    );
    let (end, effects) = drive(Source::Put, &path);
    assert_eq!(effects, [Effect::Offer, Effect::DropStaging]);
    assert_eq!(
        (end.place, end.sealing_state.as_str()),
        (Some((3, 128)), "Proving")
    );
    let (_, effects) = drive(Source::Http(vec![]), &path);
    assert_eq!(effects, [Effect::Pull, Effect::Offer, Effect::DropStaging]);
    let again = [Event::TransferFailed("gone".into()), Event::Retry(7)];
    let (now, effects) = drive(Source::Http(vec![]), &again);
    assert_eq!(effects.first(), effects.last(), "pulled anew: {effects:?}");
    assert_eq!((now.accepted_unix_ms, now.reason.as_str()), (7, ""));
}

#[test]
fn the_table() {
    use Checkpoint::*;
    let t = || Event::Transferred;
    let failed = || Event::Hub(HubView::Failed("bad".into()));
    let unknown = || Event::Hub(HubView::Unknown);
    let stored = || Event::Hub(HubView::Stored);
    let cancel = || Event::Cancel("enough".into());
    // (events after acceptance, checkpoint, reason, effects of the last event)
    let end = vec![Effect::DropStaging, Effect::ReleaseCredit];
    let table: Vec<(Vec<Event>, Checkpoint, &str, Vec<Effect>)> = vec![
        (
            vec![Event::TransferFailed("gone".into())],
            Failed,
            "gone",
            end.clone(),
        ),
        (
            vec![Event::TooLate("late".into())],
            Expired,
            "late",
            end.clone(),
        ),
        (
            vec![t(), Event::TooLate("late".into())],
            Transferred,
            "",
            vec![],
        ),
        (
            vec![t(), Event::Refused("no".into())],
            Failed,
            "no",
            end.clone(),
        ),
        (vec![t(), failed()], Failed, "bad", end.clone()),
        (vec![t(), active()], Active, "", vec![Effect::DropStaging]),
        (vec![t(), unknown()], Transferred, "", vec![]),
        (
            vec![t(), Event::Hub(HubView::Taken), unknown()],
            Transferred,
            "",
            vec![Effect::Offer],
        ),
        (
            vec![t(), stored(), unknown()],
            Failed,
            "the hub does not know the piece any more, and the staging copy is gone",
            vec![Effect::ReleaseCredit],
        ),
        (
            vec![t(), placed("PreCommit1"), stored()],
            Sealing,
            "",
            vec![],
        ),
        (
            vec![t(), placed("PreCommit1"), placed("WaitDeals")],
            Sealing,
            "",
            vec![],
        ),
        (vec![t(), active(), failed()], Active, "", vec![]),
        (vec![Event::Hub(HubView::Stored)], Accepted, "", vec![]),
        (vec![Event::Uploaded], Accepted, "", vec![Effect::Check]),
        (vec![Event::Uploaded, Event::Uploaded], Accepted, "", vec![]),
        (
            vec![Event::Uploaded, Event::TooLate("late".into())],
            Accepted,
            "",
            vec![],
        ),
        (
            vec![Event::Uploaded, t()],
            Transferred,
            "",
            vec![Effect::Offer],
        ),
        (vec![cancel()], Failed, "enough", end.clone()),
        (
            vec![Event::Uploaded, cancel()],
            Failed,
            "enough",
            end.clone(),
        ),
        // The hub may have it: it is asked, once.
        (vec![t(), cancel()], Transferred, "", vec![Effect::Withdraw]),
        (vec![t(), cancel(), cancel()], Transferred, "", vec![]),
        (
            vec![t(), cancel(), unknown()],
            Failed,
            "enough",
            end.clone(),
        ),
        (vec![t(), cancel(), failed()], Failed, "enough", end.clone()),
        (
            vec![t(), cancel(), placed("WaitDeals")],
            AddedPiece,
            "",
            vec![Effect::DropStaging],
        ),
        (
            vec![t(), cancel(), placed("WaitDeals"), failed()],
            Failed,
            "bad",
            end.clone(),
        ),
        (
            vec![t(), placed("WaitDeals"), cancel()],
            AddedPiece,
            "",
            vec![],
        ),
        (
            vec![Event::TooLate("late".into()), Event::Retry(7)],
            Accepted,
            "",
            vec![],
        ),
        (vec![t(), failed(), Event::Retry(7)], Accepted, "", vec![]),
        (
            vec![t(), stored(), failed(), Event::Retry(7)],
            Failed,
            "bad",
            vec![],
        ),
        (vec![Event::Retry(7)], Accepted, "", vec![]),
        (vec![accept(Source::Put)], Accepted, "", vec![]),
    ];
    for (events, checkpoint, reason, effects) in table {
        let (last, first) = events.split_last().unwrap();
        let (before, _) = drive(Source::Put, first);
        let (after, got) =
            DealMachine::step(Some(&before), last).unwrap_or_else(|| (before.clone(), vec![]));
        assert_eq!(
            (after.checkpoint, after.reason.as_str(), got),
            (checkpoint, reason, effects),
            "{events:?}"
        );
    }
    for e in [
        t(),
        failed(),
        Event::TooLate(String::new()),
        Event::Refused(String::new()),
        Event::Uploaded,
        Event::Length(600),
        Event::Cancel(String::new()),
        Event::Retry(7),
    ] {
        assert!(
            DealMachine::step(None, &e).is_none(),
            "{e:?} creates nothing"
        );
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(accept(Source::Put)),
        Just(Event::Uploaded),
        Just(Event::Length(600)),
        Just(Event::Cancel("c".into())),
        Just(Event::Retry(7)),
        Just(Event::Transferred),
        Just(Event::TransferFailed("t".into())),
        Just(Event::Refused("r".into())),
        Just(Event::TooLate("l".into())),
        Just(Event::Hub(HubView::Taken)),
        Just(Event::Hub(HubView::Stored)),
        Just(Event::Hub(HubView::Unknown)),
        Just(Event::Hub(HubView::Failed("f".into()))),
        Just(active()),
        "(WaitDeals|PreCommit1|WaitSeed)".prop_map(|s| placed(&s)),
    ]
}

proptest! {
    /// Whatever comes in whatever order: a final deal stays, the copy is never dropped while it
    /// is the only one, and a deal that is not final either waits for someone or has an effect.
    #[test]
    fn no_order_of_events_loses_a_deal(events in proptest::collection::vec(any_event(), 0..40)) {
        let (mut now, _) = DealMachine::step(None, &accept(Source::Put)).unwrap();
        let mut dropped = false;
        for e in &events {
            let before = now.clone();
            let Some((next, effects)) = DealMachine::step(Some(&now), e) else { continue };
            if before.checkpoint.is_final() {
                // The operator alone brings a deal back, and only one that the hub never had.
                prop_assert!(matches!(e, Event::Retry(_)), "{before:?} {e:?}");
                prop_assert!(!before.stored && before.place.is_none());
                prop_assert_ne!(before.checkpoint, Checkpoint::Active);
                dropped = false;
            }
            dropped |= effects.contains(&Effect::DropStaging);
            if effects.contains(&Effect::Offer) {
                prop_assert!(!dropped, "an offer needs the copy: {e:?}");
                prop_assert_eq!(next.checkpoint, Checkpoint::Transferred);
            }
            if dropped && !next.checkpoint.is_final() {
                prop_assert!(next.stored, "{next:?}");
            }
            prop_assert!(!next.checking || next.checkpoint == Checkpoint::Accepted);
            prop_assert!(
                next.cancel.is_empty()
                    || matches!(next.checkpoint, Checkpoint::Transferred | Checkpoint::Offered)
            );
            if next.checkpoint == Checkpoint::Failed || next.checkpoint == Checkpoint::Expired {
                prop_assert!(!next.reason.is_empty());
                prop_assert!(effects.contains(&Effect::ReleaseCredit));
            }
            now = next;
        }
    }
}

/// A deal by proposal, through the events.
fn drive_signed(events: &[Event]) -> (Record, Vec<Effect>) {
    let mut p = proposal(Source::Http(vec![]));
    p.signed = Some(Box::new(crate::mk12::check::Signed {
        deal: vec![1],
        offline: false,
        transfer_size: 1000,
    }));
    let accept = Event::Accept {
        proposal: Box::new(p),
        unix_ms: 1,
        credit: "c".into(),
        trace: String::new(),
    };
    let (mut now, mut effects) = DealMachine::step(None, &accept).unwrap();
    for e in events {
        if let Some((next, more)) = DealMachine::step(Some(&now), e) {
            now = next;
            effects.extend(more);
        }
    }
    (now, effects)
}

#[test]
fn a_deal_by_proposal_is_on_chain_before_it_is_handed_over() {
    let confirmed = || Event::PublishConfirmed {
        cid: "m".into(),
        deal_id: 5,
    };
    let sent = || Event::Published("m".into());
    let path = [
        Event::Transferred,
        sent(),
        // The same news twice, and the hub's before the hand-off.
        sent(),
        Event::Hub(HubView::Stored),
        confirmed(),
        confirmed(),
        Event::Hub(HubView::Unknown),
        Event::Hub(HubView::Taken),
        Event::Hub(HubView::Stored),
        placed("PreCommit1"),
        active(),
    ];
    let names: Vec<_> = (0..=path.len())
        .map(|n| drive_signed(&path[..n]).0.checkpoint.name())
        .collect();
    assert_eq!(
        names,
        [
            "Accepted",
            "Transferred",
            "Published",
            "Published",
            "Published",
            "PublishConfirmed",
            "PublishConfirmed",
            "PublishConfirmed",
            "Offered",
            "Offered",
            "Sealing",
            "Active"
        ]
    );
    let (end, effects) = drive_signed(&path);
    assert_eq!(effects, [Effect::Pull, Effect::Offer, Effect::DropStaging]);
    assert_eq!(end.published.unwrap().deal_id, Some(5));
    // From its bytes on nobody gives it up: what is on chain stays there.
    for n in 1..=path.len() {
        let (before, _) = drive_signed(&path[..n]);
        assert!(DealMachine::step(Some(&before), &Event::Cancel("c".into())).is_none());
    }
    // Confirmed without having been seen under way: the hub was quick.
    let (quick, _) = drive_signed(&[Event::Transferred, confirmed()]);
    assert_eq!(quick.checkpoint, Checkpoint::PublishConfirmed);
    // The hub lost the offer: it is handed over again, not published again.
    let lost = [
        Event::Transferred,
        confirmed(),
        Event::Hub(HubView::Taken),
        Event::Hub(HubView::Unknown),
    ];
    let (again, effects) = drive_signed(&lost);
    assert_eq!(again.checkpoint, Checkpoint::PublishConfirmed);
    assert_eq!(effects, [Effect::Pull, Effect::Offer, Effect::Offer]);
}

#[test]
fn a_deal_that_the_chain_refuses_ends() {
    let failed = || Event::PublishFailed("no funds".into());
    for path in [
        vec![Event::Transferred, failed()],
        vec![Event::Transferred, Event::Published("m".into()), failed()],
    ] {
        let (end, effects) = drive_signed(&path);
        assert_eq!(
            (end.checkpoint, end.reason.as_str()),
            (Checkpoint::Failed, "no funds")
        );
        assert_eq!(
            effects,
            [Effect::Pull, Effect::DropStaging, Effect::ReleaseCredit]
        );
    }
    // Once it is on chain it can not fail to be published; and others are never published.
    let (confirmed, _) = drive_signed(&[
        Event::Transferred,
        Event::PublishConfirmed {
            cid: "m".into(),
            deal_id: 5,
        },
        failed(),
    ]);
    assert_eq!(confirmed.checkpoint, Checkpoint::PublishConfirmed);
    let (other, _) = drive(
        Source::Put,
        &[Event::Transferred, Event::Published("m".into())],
    );
    assert_eq!(other.checkpoint, Checkpoint::Transferred);
}

#[test]
fn an_offline_deal_that_names_no_length_takes_that_of_the_file() {
    let mut p = proposal(Source::Offline);
    p.signed = Some(Box::new(crate::mk12::check::Signed {
        deal: vec![1],
        offline: true,
        transfer_size: 0,
    }));
    p.piece.raw_size = 1016;
    let accept = |p: &Proposal| Event::Accept {
        proposal: Box::new(p.clone()),
        unix_ms: 1,
        credit: "c".into(),
        trace: String::new(),
    };
    let length = |now: &Record, len| {
        let (next, effects) = DealMachine::step(Some(now), &Event::Length(len))?;
        assert!(effects.is_empty() && next.checkpoint == Checkpoint::Accepted);
        Some(next.proposal.piece.raw_size)
    };
    let (now, _) = DealMachine::step(None, &accept(&p)).unwrap();
    // What 1 KiB holds, and 512 bytes do not.
    for (len, taken) in [
        (508, None),
        (509, Some(509)),
        (1015, Some(1015)),
        (1017, None),
    ] {
        assert_eq!(length(&now, len), taken, "{len}");
    }
    let (here, _) = DealMachine::step(Some(&now), &Event::Transferred).unwrap();
    assert_eq!(length(&here, 900), None);
    // One that names it keeps it.
    p.signed.as_mut().unwrap().transfer_size = 1000;
    let (named, _) = DealMachine::step(None, &accept(&p)).unwrap();
    assert_eq!(length(&named, 900), None);
}
