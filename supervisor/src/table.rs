//! The life of one process, as a table: state and event give the next state and what to do.
//! Nothing here does I/O or reads a clock.

use std::time::Duration;

/// Where a process is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Wanted, but something it must come after is not ready.
    Waiting,
    /// Alive; has not said that it is ready.
    Starting,
    /// Said that it is ready.
    Ready,
    /// Was ready, and says that it is not now.
    Unready,
    /// Ended by itself; will be started again when the timer fires.
    Backoff,
    /// Told to stop; `then_start` when a restart was asked for.
    Stopping {
        /// Whether it is started again once it has ended.
        then_start: bool,
    },
    /// Takes nothing new and finishes what is open; `then_start` as for one that is being stopped.
    Draining {
        /// Whether it is started again once it has ended.
        then_start: bool,
    },
    /// Not wanted.
    Stopped,
    /// A one-shot that ended well.
    Done,
    /// Gave up: a restart would not help until someone acts.
    Failed,
}

impl State {
    /// Name in `status`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Unready => "unready",
            Self::Backoff => "backoff",
            Self::Stopping { .. } => "stopping",
            Self::Draining { .. } => "draining",
            Self::Stopped => "stopped",
            Self::Done => "done",
            Self::Failed => "failed",
        }
    }

    /// Whether those that come after it may start.
    #[must_use]
    pub const fn satisfies(&self) -> bool {
        matches!(self, Self::Ready | Self::Done)
    }

    /// Whether an operating-system process exists.
    #[must_use]
    pub const fn is_alive(&self) -> bool {
        matches!(
            self,
            Self::Starting
                | Self::Ready
                | Self::Unready
                | Self::Stopping { .. }
                | Self::Draining { .. }
        )
    }

    /// Whether an operator, or what it needs, wants it to end.
    #[must_use]
    pub const fn is_ending(&self) -> bool {
        matches!(self, Self::Stopping { .. } | Self::Draining { .. })
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Exit status 0.
    Clean,
    /// Exit status 2 or 78: the command line or the configuration is wrong, a restart does not help.
    BadConfig,
    /// Any other exit status, a signal, a failed spawn, or an end of which the status is unknown.
    Crashed,
    /// Crashed, once more than the limits allow.
    CrashedTooOften,
}

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A supervisor that starts found it alive. `ready` when the one before it knew so.
    Found {
        /// Whether it had said that it is ready.
        ready: bool,
    },
    /// A supervisor that starts found it alive, and draining.
    FoundDraining,
    /// Everything it must come after is ready.
    DependenciesReady,
    /// It said that it is ready.
    SaidReady,
    /// It said that it is not ready any more.
    SaidUnready,
    /// It ended.
    Ended(Ended),
    /// It was not ready in time.
    StartTimeout,
    /// It gave no sign of life in time.
    WatchdogTimeout,
    /// What it needs came back, and it did not become ready again in time.
    ReattachTimeout,
    /// Something that it cannot do without ended or was stopped.
    DependencyGone,
    /// The back-off is over.
    BackoffOver,
    /// It did not end in time after being told to stop or to drain.
    StopTimeout,
    /// An operator, or the supervisor's own stop.
    WantStop,
    /// An operator.
    WantDrain,
    /// An operator.
    WantStart,
    /// An operator.
    WantRestart,
}

/// What the runner must do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Spawn the process and arm the start timer.
    Spawn,
    /// Arm the start timer for one that lives already.
    ArmStart,
    /// Ask it to end (SIGTERM) and arm the stop timer.
    Terminate,
    /// Ask it to finish what is open and to end (SIGUSR1) and arm the drain timer.
    Drain,
    /// Arm the drain timer for one that drains already.
    ArmDrain,
    /// End it and what it started (SIGKILL to the process group).
    Kill,
    /// Arm the back-off timer.
    ArmBackoff,
}

/// The table. `oneshot` processes are done when they end well; others never end by themselves.
/// A timer belongs to the state that it was armed in and is void after it.
#[must_use]
pub fn step(state: &State, event: Event, oneshot: bool) -> (State, Vec<Effect>) {
    use Effect::{ArmBackoff, ArmDrain, ArmStart, Drain, Kill, Spawn, Terminate};
    use Ended::{BadConfig, Clean, Crashed, CrashedTooOften};
    use Event::{
        BackoffOver, DependenciesReady, DependencyGone, Found, FoundDraining, ReattachTimeout,
        SaidReady, SaidUnready, StartTimeout, StopTimeout, WantDrain, WantRestart, WantStart,
        WantStop, WatchdogTimeout,
    };
    use State::{
        Backoff, Done, Draining, Failed, Ready, Starting, Stopped, Stopping, Unready, Waiting,
    };
    match (state, event) {
        // Found alive by a new supervisor.
        (Waiting, Found { ready: true }) => (Ready, vec![]),
        (Waiting, Found { ready: false }) => (Starting, vec![ArmStart]),
        // It was being stopped when the supervisor before this one died.
        (Stopped, Found { .. }) => (Stopping { then_start: false }, vec![Terminate]),

        (Waiting | Stopped, FoundDraining) => (Draining { then_start: false }, vec![ArmDrain]),

        // Starting.
        (Waiting, DependenciesReady) => (Starting, vec![Spawn]),
        (Starting | Unready, SaidReady) => (Ready, vec![]),
        (Ready, SaidUnready) => (Unready, vec![]),

        // Killed, it comes back through Ended as a crash.
        (Starting, StartTimeout) => (Starting, vec![Kill]),
        (Ready | Unready, WatchdogTimeout) => (state.clone(), vec![Kill]),

        // What it needs.
        (Unready, ReattachTimeout) | (Starting | Ready | Unready, DependencyGone) => {
            (Stopping { then_start: true }, vec![Terminate])
        }

        // Ending by itself.
        (Starting | Ready | Unready, Event::Ended(Clean)) if oneshot => (Done, vec![]),
        (Starting | Ready | Unready, Event::Ended(BadConfig | CrashedTooOften)) => (Failed, vec![]),
        (Starting | Ready | Unready, Event::Ended(Clean | Crashed)) => (Backoff, vec![ArmBackoff]),
        // Not straight to Starting: what it comes after may have gone too.
        (Backoff, BackoffOver) => (Waiting, vec![]),

        // Being stopped.
        (Waiting | Backoff, WantStop | WantDrain) => (Stopped, vec![]),
        (Starting | Ready | Unready, WantStop) => (Stopping { then_start: false }, vec![Terminate]),
        (Starting | Ready | Unready, WantRestart) => {
            (Stopping { then_start: true }, vec![Terminate])
        }
        (Stopping { .. }, WantStop) => (Stopping { then_start: false }, vec![]),
        (Stopping { .. }, WantStart | WantRestart) => (Stopping { then_start: true }, vec![]),
        (Stopping { .. }, StopTimeout) => (state.clone(), vec![Kill]),
        (Stopping { then_start: false } | Draining { then_start: false }, Event::Ended(_)) => {
            (Stopped, vec![])
        }
        (Stopping { then_start: true } | Draining { then_start: true }, Event::Ended(_)) => {
            (Waiting, vec![])
        }

        // Draining: it takes longer, and a stop ends the patience.
        (Starting | Ready | Unready, WantDrain) => (Draining { then_start: false }, vec![Drain]),
        (Draining { then_start }, StopTimeout) => {
            let then_start = *then_start;
            (Stopping { then_start }, vec![Terminate])
        }
        (Draining { .. }, WantStop) => (Stopping { then_start: false }, vec![Terminate]),
        (Draining { .. }, WantRestart) => (Stopping { then_start: true }, vec![Terminate]),
        (Draining { .. }, WantStart) => (Draining { then_start: true }, vec![]),
        (Draining { .. }, WantDrain) => (Draining { then_start: false }, vec![]),

        // Being started again by an operator.
        (Backoff | Stopped | Failed | Done, WantStart | WantRestart) => (Waiting, vec![]),
        (Failed | Done, WantStop | WantDrain) => (Stopped, vec![]),

        // Late or repeated events are normal. No `_`: a new event must not hide here.
        (Waiting, DependencyGone | WantStart | WantRestart | Event::Ended(_))
        | (Starting | Ready | Unready, WantStart)
        | (Starting | Unready, SaidUnready)
        | (Starting, WatchdogTimeout)
        | (Ready, SaidReady)
        | (Ready | Unready, StartTimeout)
        | (Starting | Ready, ReattachTimeout)
        | (Starting | Ready | Unready, DependenciesReady | BackoffOver | StopTimeout)
        | (Backoff, DependenciesReady | DependencyGone | Event::Ended(_))
        // What is being stopped has a shorter limit than what drains.
        | (Stopping { .. }, DependenciesReady | DependencyGone | BackoffOver | WantDrain)
        | (Draining { .. }, DependenciesReady | DependencyGone | BackoffOver)
        | (Stopped, WantStop | WantDrain)
        | (
            Starting
            | Ready
            | Unready
            | Backoff
            | Stopping { .. }
            | Draining { .. }
            | Done
            | Failed,
            Found { .. } | FoundDraining,
        )
        | (
            Stopped | Done | Failed,
            DependenciesReady | DependencyGone | BackoffOver | Event::Ended(_),
        )
        | (
            Waiting | Backoff | Stopping { .. } | Draining { .. } | Stopped | Done | Failed,
            SaidReady | SaidUnready | StartTimeout | WatchdogTimeout | ReattachTimeout,
        )
        | (Waiting, BackoffOver)
        | (Waiting | Backoff | Stopped | Done | Failed, StopTimeout) => (state.clone(), vec![]),
    }
}

/// First restart after a crash: at once. Then `first`, doubling, up to `max`.
#[must_use]
pub fn restart_delay(crashes_in_a_row: u32, first: Duration, max: Duration) -> Duration {
    match crashes_in_a_row {
        0 | 1 => Duration::ZERO,
        n => lotus_runtime::Backoff::nominal(first, max, n - 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event() -> impl Strategy<Value = Event> {
        prop::sample::select(vec![
            Event::DependenciesReady,
            Event::SaidReady,
            Event::SaidUnready,
            Event::Ended(Ended::Clean),
            Event::Ended(Ended::BadConfig),
            Event::Ended(Ended::Crashed),
            Event::Ended(Ended::CrashedTooOften),
            Event::StartTimeout,
            Event::WatchdogTimeout,
            Event::ReattachTimeout,
            Event::DependencyGone,
            Event::BackoffOver,
            Event::StopTimeout,
            Event::WantStop,
            Event::WantDrain,
            Event::WantStart,
            Event::WantRestart,
        ])
    }

    /// What a supervisor knows of a process when it starts.
    fn first() -> impl Strategy<Value = (State, Option<Event>)> {
        let found = prop::sample::select(vec![
            None,
            Some(Event::Found { ready: true }),
            Some(Event::Found { ready: false }),
            Some(Event::FoundDraining),
        ]);
        (
            prop::sample::select(vec![State::Waiting, State::Stopped]),
            found,
        )
    }

    /// Runs events through the table in a world that answers as a real one does: a process ends
    /// only if it lives. Says each step.
    fn live(
        (mut state, found): (State, Option<Event>),
        events: Vec<Event>,
        oneshot: bool,
        mut each: impl FnMut(&State, Event, &State, &[Effect], bool),
    ) -> State {
        let mut alive = found.is_some();
        for event in found.into_iter().chain(events) {
            if matches!(event, Event::Ended(_)) {
                if !alive {
                    continue;
                }
                alive = false;
            }
            let (next, effects) = step(&state, event, oneshot);
            each(&state, event, &next, &effects, alive);
            if effects.contains(&Effect::Spawn) {
                alive = true;
            }
            assert_eq!(next.is_alive(), alive, "{state:?} {event:?} -> {next:?}");
            state = next;
        }
        state
    }

    proptest! {
        #[test]
        fn there_are_never_two(
            first in first(),
            events in prop::collection::vec(event(), 0..200),
            oneshot: bool,
        ) {
            live(first, events, oneshot, |state, event, _, effects, alive| {
                for effect in effects {
                    let fits = match effect {
                        Effect::Spawn | Effect::ArmBackoff => !alive,
                        Effect::Terminate
                        | Effect::Drain
                        | Effect::ArmDrain
                        | Effect::Kill
                        | Effect::ArmStart => alive,
                    };
                    assert!(fits, "{state:?} {event:?} {effect:?}, alive: {alive}");
                }
            });
        }

        /// Whoever is told to stop, or waits for nobody but the clock, has a timer.
        #[test]
        fn every_wait_has_a_budget(
            first in first(),
            events in prop::collection::vec(event(), 0..200),
            oneshot: bool,
        ) {
            live(first, events, oneshot, |state, event, next, effects, _| {
                let armed = match next {
                    State::Starting => effects.iter().any(|e| matches!(e, Effect::Spawn | Effect::ArmStart)),
                    State::Stopping { .. } => effects.contains(&Effect::Terminate),
                    State::Draining { .. } => {
                        effects.iter().any(|e| matches!(e, Effect::Drain | Effect::ArmDrain))
                    }
                    State::Backoff => effects.contains(&Effect::ArmBackoff),
                    _ => true,
                };
                let same = std::mem::discriminant(state) == std::mem::discriminant(next);
                assert!(armed || same, "{state:?} {event:?} -> {next:?} {effects:?}");
            });
        }

        #[test]
        fn a_stop_always_ends_in_stopped(
            first in first(),
            events in prop::collection::vec(event(), 0..50),
            oneshot: bool,
        ) {
            let mut state = live(first, events, oneshot, |_, _, _, _, _| {});
            state = step(&state, Event::WantStop, oneshot).0;
            if state.is_alive() {
                state = step(&state, Event::Ended(Ended::Crashed), oneshot).0;
            }
            prop_assert_eq!(state, State::Stopped);
        }
    }

    #[test]
    fn restarts_slow_down() {
        let (first, max) = (Duration::from_millis(100), Duration::from_secs(30));
        let delay = |n| restart_delay(n, first, max).as_secs_f64();
        let secs: Vec<f64> = (1..=12).map(delay).collect();
        assert_eq!(
            secs,
            [
                0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0
            ]
        );
    }

    #[test]
    fn a_wrong_configuration_is_not_retried() {
        let (state, effects) = step(&State::Ready, Event::Ended(Ended::BadConfig), false);
        assert_eq!((state, effects), (State::Failed, vec![]));
    }

    #[test]
    fn a_drain_ends_in_a_stop_when_its_time_is_over() {
        let (state, effects) = step(&State::Ready, Event::WantDrain, false);
        assert_eq!(state, State::Draining { then_start: false });
        assert_eq!(effects, [Effect::Drain]);
        assert_eq!(
            step(&state, Event::Ended(Ended::Clean), false).0,
            State::Stopped
        );
        for late in [Event::StopTimeout, Event::WantStop] {
            let (state, effects) = step(&state, late, false);
            assert_eq!(state, State::Stopping { then_start: false });
            assert_eq!(effects, [Effect::Terminate]);
        }
        let again = step(&state, Event::WantStart, false).0;
        assert_eq!(
            step(&again, Event::Ended(Ended::Clean), false).0,
            State::Waiting
        );
    }

    #[test]
    fn a_spoke_that_does_not_come_back_to_its_hub_is_restarted() {
        let unready = step(&State::Ready, Event::SaidUnready, false).0;
        let (state, effects) = step(&unready, Event::ReattachTimeout, false);
        assert_eq!(state, State::Stopping { then_start: true });
        assert_eq!(effects, [Effect::Terminate]);
        assert_eq!(step(&unready, Event::SaidReady, false).0, State::Ready);
    }
}
