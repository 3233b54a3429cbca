//! An upgrade, as a table: phase and event give the next phase and what to do. Nothing here does
//! I/O or reads a clock.
//!
//! Everything is checked first, then the units (the node if it is ours, the hub, the spokes) are
//! moved one at a time, and the supervisor last. Whatever fails, those that were moved go back in
//! reverse order, the one that failed first.

use serde::{Deserialize, Serialize};

/// Where an upgrade is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The check with this number runs.
    Checking(usize),
    /// The unit with this number is moved to the new release.
    Moving(usize),
    /// The supervisor replaces itself.
    Executing,
    /// The unit with this number is moved back.
    Undoing(usize),
}

/// What happens to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The check passed, the unit is ready, the new supervisor serves.
    Done,
    /// It is not, and will not be.
    Failed,
    /// Another supervisor was killed in the middle of it.
    Interrupted,
    /// An operator wants it back.
    Abort,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Go on with this phase.
    Go(Phase),
    /// All of the new release runs: it is the current one from now on.
    Commit,
    /// All of the old release runs.
    GiveUp,
}

/// The table, for an upgrade of `checks` checks and `units` units besides the supervisor.
#[must_use]
pub const fn step(phase: Phase, event: Event, checks: usize, units: usize) -> Next {
    use Event::{Abort, Done, Failed, Interrupted};
    use Next::{Commit, GiveUp, Go};
    use Phase::{Checking, Executing, Moving, Undoing};
    match (phase, event) {
        (Checking(n), Done) if n + 1 < checks => Go(Checking(n + 1)),
        (Checking(_), Done) if units > 0 => Go(Moving(0)),
        (Checking(_), Done) => Go(Executing),
        // Nothing was moved.
        (Checking(_), Failed | Interrupted | Abort) => GiveUp,

        (Moving(n), Done) if n + 1 < units => Go(Moving(n + 1)),
        (Moving(_), Done) => Go(Executing),
        // It may run the new release already, so it goes back first.
        (Moving(n), Failed | Interrupted | Abort) => Go(Undoing(n)),

        (Executing, Done) => Commit,
        (Executing, Failed | Interrupted | Abort) if units > 0 => Go(Undoing(units - 1)),
        (Executing, Failed | Interrupted | Abort) => GiveUp,

        // One that does not come back must not keep the others from it.
        (Undoing(0), Done | Failed) => GiveUp,
        (Undoing(n), Done | Failed) => Go(Undoing(n - 1)),
        (Undoing(_), Interrupted | Abort) => Go(phase),
    }
}

/// Steps that are done in a phase, of [`steps`]. One that goes back counts down.
#[must_use]
pub const fn done(phase: Phase, checks: usize, units: usize) -> usize {
    match phase {
        Phase::Checking(n) => n,
        Phase::Moving(n) | Phase::Undoing(n) => checks + n,
        Phase::Executing => checks + units,
    }
}

/// All steps of an upgrade.
#[must_use]
pub const fn steps(checks: usize, units: usize) -> usize {
    checks + units + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs an upgrade in a world of units, each of which runs the old release or the new one.
    /// Says which of them are new at the end, and whether it went well.
    fn live(events: &[Event], checks: usize, units: usize) -> (Vec<bool>, bool, usize) {
        let mut new = vec![false; units];
        let mut phase = Phase::Checking(0);
        let mut steps = 0;
        // When the events are used up all goes well.
        for event in events.iter().copied().chain(std::iter::repeat(Event::Done)) {
            steps += 1;
            match phase {
                // Told to move, whether or not it becomes ready.
                Phase::Moving(n) => {
                    assert!(new[..n].iter().all(|m| *m), "in order");
                    new[n] = true;
                }
                Phase::Undoing(n) => {
                    assert!(new[n + 1..].iter().all(|m| !*m), "in reverse order");
                    new[n] = false;
                }
                Phase::Executing => assert!(new.iter().all(|m| *m), "the supervisor is last"),
                Phase::Checking(_) => assert!(new.iter().all(|m| !*m), "checks are first"),
            }
            match step(phase, event, checks, units) {
                Next::Go(next) => phase = next,
                Next::Commit => return (new, true, steps),
                Next::GiveUp => return (new, false, steps),
            }
        }
        unreachable!("the events have no end")
    }

    proptest! {
        #[test]
        fn all_or_nothing(
            events in prop::collection::vec(prop::sample::select(vec![
                Event::Done, Event::Done, Event::Done, Event::Failed, Event::Interrupted, Event::Abort,
            ]), 0..40),
            checks in 1usize..5,
            units in 0usize..6,
        ) {
            let (new, ok, steps) = live(&events, checks, units);
            prop_assert!(new.iter().all(|m| *m == ok), "{new:?} {ok}");
            prop_assert!(steps <= events.len() + checks + 2 * units + 2, "it ends");
            let failed = events.iter().take(steps).any(|e| *e != Event::Done);
            prop_assert!(ok != failed, "it goes through if and only if nothing fails");
        }
    }

    #[test]
    fn each_failure_has_its_way_back() {
        use Event::{Done, Failed, Interrupted};
        use Next::{Commit, GiveUp, Go};
        use Phase::{Checking, Executing, Moving, Undoing};
        for (phase, event, wanted) in [
            (Checking(0), Done, Go(Checking(1))),
            (Checking(1), Done, Go(Moving(0))),
            (Checking(1), Failed, GiveUp),
            (Moving(0), Done, Go(Moving(1))),
            (Moving(2), Done, Go(Executing)),
            (Moving(1), Failed, Go(Undoing(1))),
            (Moving(1), Interrupted, Go(Undoing(1))),
            (Executing, Done, Commit),
            (Executing, Failed, Go(Undoing(2))),
            (Executing, Interrupted, Go(Undoing(2))),
            (Undoing(2), Done, Go(Undoing(1))),
            (Undoing(1), Failed, Go(Undoing(0))),
            (Undoing(0), Done, GiveUp),
            (Undoing(0), Failed, GiveUp),
            (Undoing(1), Interrupted, Go(Undoing(1))),
        ] {
            assert_eq!(step(phase, event, 2, 3), wanted, "{phase:?} {event:?}");
        }
        // The supervisor alone.
        assert_eq!(step(Checking(1), Done, 2, 0), Go(Executing));
        assert_eq!(step(Executing, Failed, 2, 0), GiveUp);
        assert_eq!(done(Executing, 2, 0), 2);
        assert_eq!(steps(2, 0), 3);
    }
}
