//! Random walks through the table.

use proptest::prelude::*;

use super::*;

/// From every state the effects that are possible lead on: some event of that effect applies.
fn answers(effect: Effect) -> Vec<Event> {
    let fail = Event::Failed("x".into());
    let landed = Event::CommitLanded {
        activation: Epoch(1),
        expiration: Epoch(2),
    };
    let refusals = [
        refused(true, Cause::Other),
        refused(false, Cause::Proof),
        refused(true, Cause::Money),
    ];
    let all = every_event();
    let one = |name: &str| all.iter().find(|e| e.name() == name).cloned().unwrap();
    // What a step finds that looks at the chain before it overwrites anything.
    let ahead = vec![
        found(UPDATED, true),
        found(UPDATED, false),
        one("SectorChainConflict"),
    ];
    let new = vec![
        found(PRE_COMMITTED, true),
        found(ACTIVE, true),
        found(ACTIVE, false),
    ];
    let mut out = match effect {
        Effect::WaitForPieces => [vec![one("SectorStartPacking")], ahead].concat(),
        Effect::WritePieces => [vec![one("SectorPieceAdded"), fail], ahead].concat(),
        Effect::CheckPieces => vec![one("SectorPacked"), one("SectorDealsExpired"), fail],
        Effect::TakeTicket => vec![one("SectorTicket")],
        Effect::PreCommit1 => [
            vec![one("SectorPreCommit1"), one("SectorTicketExpired"), fail],
            ahead,
            new,
        ]
        .concat(),
        Effect::PreCommit2 => [vec![one("SectorPreCommit2"), fail], ahead, new].concat(),
        Effect::SendPreCommit => vec![
            one("SectorPreCommitBatchSent"),
            one("SectorBatched"),
            one("SectorPreCommitLanded"),
            one("SectorTicketExpired"),
            one("SectorDealsExpired"),
            one("SectorAbandoned"),
            one("SectorNumberSpent"),
            found(ACTIVE, false),
            landed,
        ],
        Effect::AwaitPreCommit => vec![one("SectorPreCommitLanded"), landed],
        Effect::AwaitSeed => vec![
            seed(1),
            seed(2),
            one("SectorPreCommitLost"),
            one("SectorAbandoned"),
            found(ACTIVE, true),
            landed,
        ],
        Effect::Prove => vec![one("SectorProofReady"), fail],
        Effect::SendCommit => vec![
            one("SectorCommitAggregateSent"),
            one("SectorBatched"),
            one("SectorNotAggregated"),
            one("SectorPreCommitLost"),
            one("SectorSeedLost"),
            one("SectorAbandoned"),
            found(PRE_COMMITTED, true),
            landed,
        ],
        Effect::AwaitCommit => vec![landed],
        Effect::Finalize => vec![one("SectorFinalized"), fail],
        Effect::UpdateReplica => [vec![one("SectorReplicaUpdate"), fail], ahead].concat(),
        Effect::ProveUpdate => vec![one("SectorProveReplicaUpdate"), fail],
        Effect::FinalizeUpdate => vec![one("SectorUpdateFinalized"), fail],
        Effect::SendUpdate => vec![
            one("SectorReplicaUpdateSubmitted"),
            one("SectorDeadlineImmutable"),
            one("SectorReplicaUpdateLanded"),
            one("SectorDealsExpired"),
            found(UPDATED, true),
            one("SectorChainConflict"),
            fail,
        ],
        Effect::AwaitMutable => vec![one("SectorDeadlineMutable")],
        Effect::AwaitUpdate => vec![one("SectorReplicaUpdateLanded")],
        Effect::AwaitUpdateFinality => vec![one("SectorFinal"), one("SectorReplicaUpdateLost")],
        Effect::ReleaseKey => vec![one("SectorKeyReleased")],
        Effect::AbortUpgrade => [
            vec![
                one("SectorRevertUpgradeToProving"),
                one("SectorReplicaUpdateLanded"),
            ],
            ahead,
        ]
        .concat(),
        Effect::SendTerminate => vec![one("SectorTerminating"), one("SectorTerminated")],
        Effect::AwaitTerminate => vec![one("SectorTerminated")],
        Effect::AwaitTerminateFinality => vec![one("SectorFinal"), one("SectorTerminateLost")],
        Effect::Remove => vec![one("SectorRemoved"), found(ACTIVE, false), fail],
        Effect::RetryLater => vec![one("SectorRetry")],
    };
    let chain = [
        Effect::SendPreCommit,
        Effect::AwaitPreCommit,
        Effect::SendCommit,
        Effect::AwaitCommit,
        Effect::SendUpdate,
        Effect::AwaitUpdate,
        Effect::SendTerminate,
        Effect::AwaitTerminate,
    ];
    if chain.contains(&effect) {
        out.extend(refusals);
    }
    out
}

#[test]
fn every_answer_of_every_effect_applies() {
    for state in S::ALL.iter().copied() {
        for event in state.effect().map(answers).unwrap_or_default() {
            assert!(
                step(Some(&at(state)), &event).is_some(),
                "{state} + {}",
                event.name()
            );
        }
    }
}

/// What comes from elsewhere: what the operator can do, and what a reorg does.
fn orders() -> Vec<Event> {
    let mut orders = vec![
        Event::Terminate,
        Event::Remove,
        Event::AbortUpgrade,
        Event::MarkedForUpdate,
        Event::CommitLost,
    ];
    orders.extend(S::ALL.iter().map(|s| Event::ForceState(*s)));
    orders
}

/// Follows a sector, its pending effect, and where its pieces are.
struct Walk {
    s: Sector,
    pending: Vec<Effect>,
    /// Pieces that were put into it, less those that it gave back.
    holds: usize,
}

impl Walk {
    fn start(event: &Event) -> Self {
        let (s, pending) = step(None, event).unwrap();
        let holds = s.pieces.len();
        Self { s, pending, holds }
    }

    /// Whether the event applied.
    fn take(&mut self, event: &Event) -> bool {
        let Some((after, effects)) = step(Some(&self.s), event) else {
            return false;
        };
        self.holds += usize::from(matches!(event, Event::PieceAdded { .. }));
        self.holds -= returned(Some(&self.s), &after).len();
        if self.s.state != after.state {
            self.pending = effects;
        }
        self.s = after;
        true
    }

    fn check(&self) {
        // A piece is in the sector, or it was given back.
        assert_eq!(self.s.pieces.len(), self.holds);
        // Where work is left, exactly the state's own effect is pending.
        let own: Vec<_> = self.s.state.effect().into_iter().collect();
        assert_eq!(self.pending, own, "{}", self.s.state);
        // Whoever fails says why.
        if self.s.state.is_failure() {
            let forced = self.s.reason.is_none();
            assert!(forced || !self.s.reason.as_ref().unwrap().is_empty());
        }
        // What the chain does not have is never shown as proven, nor dropped as ended.
        if matches!(self.s.state, S::Proving | S::Available) {
            assert!(self.s.activation.is_some());
        }
    }

    fn at_rest(&self) -> bool {
        self.pending.is_empty()
    }
}

proptest! {
    /// Whatever the effects answer, whatever the operator does, and whatever stale events come
    /// between: nothing panics, no state is without its effect, and no piece is lost.
    #[test]
    fn any_sequence_keeps_the_pieces_and_a_way_out(
        pledged: bool,
        choices in proptest::collection::vec((any::<u16>(), any::<u16>(), 0u8..8), 1..300),
    ) {
        let (all, orders) = (every_event(), orders());
        let mut w = Walk::start(&all[usize::from(pledged)]);
        w.check();
        for (answer, other, kind) in choices {
            let pick = |list: &[Event]| list[usize::from(other) % list.len()].clone();
            match (kind, w.pending.first().copied()) {
                (0, _) => {
                    w.take(&pick(&orders));
                }
                // A piece comes whenever the sector takes one.
                (1, _) => {
                    w.take(&all[0]);
                }
                // A late repeat of another step's answer: only those of its own state apply.
                (2, Some(effect)) => {
                    let noise = pick(&all);
                    let own = answers(effect).iter().any(|e| e.name() == noise.name());
                    if !own && !orders.iter().any(|o| o.name() == noise.name())
                        && !matches!(noise, Event::PieceAdded { .. })
                    {
                        prop_assert!(!w.take(&noise), "{} + {}", w.s.state, noise.name());
                    }
                }
                (_, Some(effect)) => {
                    let answers = answers(effect);
                    let event = &answers[usize::from(answer) % answers.len()];
                    prop_assert!(w.take(event), "{} + {}", w.s.state, event.name());
                }
                (_, None) => {}
            }
            w.check();
        }
    }

    /// An intact world always leads to rest, from wherever it was.
    #[test]
    fn the_first_answers_lead_to_rest(choices in proptest::collection::vec((any::<u16>(), 0u8..6), 0..80)) {
        let (all, orders) = (every_event(), orders());
        let mut w = Walk::start(&all[0]);
        for (c, kind) in choices {
            match w.pending.first().copied() {
                Some(effect) if kind > 0 => {
                    let answers = answers(effect);
                    w.take(&answers[usize::from(c) % answers.len()]);
                }
                _ => {
                    w.take(&orders[usize::from(c) % orders.len()]);
                }
            }
        }
        for _ in 0..60 {
            let Some(effect) = w.pending.first().copied() else { break };
            prop_assert!(w.take(&answers(effect)[0]));
        }
        prop_assert!(w.at_rest(), "{}", w.s.state);
        prop_assert!(matches!(
            w.s.state,
            S::Proving | S::Available | S::FailedUnrecoverable | S::Removed
        ));
    }
}
