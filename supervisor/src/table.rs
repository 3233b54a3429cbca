//! The life of one process, as a table: state and event give the next state and what to do.
//! Nothing here does I/O or reads a clock.

use std::time::Duration;

/// Where a process is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Wanted, but something it must come after is not ready.
    Waiting,
    /// Spawned; has not said that it is ready.
    Starting,
    /// Said that it is ready.
    Ready,
    /// Ended by itself; will be started again when the timer fires.
    Backoff,
    /// Told to stop; `then_start` when a restart was asked for.
    Stopping {
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
            Self::Backoff => "backoff",
            Self::Stopping { .. } => "stopping",
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
        matches!(self, Self::Starting | Self::Ready | Self::Stopping { .. })
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Exit status 0.
    Clean,
    /// Exit status 78: the configuration is wrong, a restart does not help.
    BadConfig,
    /// Any other exit status, a signal, or a failed spawn.
    Crashed,
}

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Everything it must come after is ready.
    DependenciesReady,
    /// It said that it is ready.
    SaidReady,
    /// It ended.
    Ended(Ended),
    /// It was not ready in time.
    StartTimeout,
    /// The back-off is over.
    BackoffOver,
    /// It did not end in time after being told to stop.
    StopTimeout,
    /// An operator, or the supervisor's own stop.
    WantStop,
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
    /// Ask it to end (SIGTERM) and arm the stop timer.
    Terminate,
    /// End it and what it started (SIGKILL to the process group).
    Kill,
    /// Arm the back-off timer.
    ArmBackoff,
}

/// The table. `oneshot` processes are done when they end well; others never end by themselves.
#[must_use]
pub fn step(state: &State, event: Event, oneshot: bool) -> (State, Vec<Effect>) {
    use Effect::{ArmBackoff, Kill, Spawn, Terminate};
    use Event::{
        BackoffOver, DependenciesReady, SaidReady, StartTimeout, StopTimeout, WantRestart,
        WantStart, WantStop,
    };
    use State::{Backoff, Done, Failed, Ready, Starting, Stopped, Stopping, Waiting};
    match (state, event) {
        // Starting.
        (Waiting, DependenciesReady) => (Starting, vec![Spawn]),
        (Starting, SaidReady) => (Ready, vec![]),
        // It is killed and comes back through Ended as a crash.
        (Starting, StartTimeout) => (Starting, vec![Kill]),

        // Ending by itself.
        (Starting | Ready, Event::Ended(Ended::Clean)) if oneshot => (Done, vec![]),
        (Starting | Ready, Event::Ended(Ended::BadConfig)) => (Failed, vec![]),
        (Starting | Ready, Event::Ended(Ended::Clean | Ended::Crashed)) => {
            (Backoff, vec![ArmBackoff])
        }
        // Not straight to Starting: what it comes after may have gone too.
        (Backoff, BackoffOver) => (Waiting, vec![]),

        // Being stopped.
        (Waiting | Backoff, WantStop) => (Stopped, vec![]),
        (Starting | Ready, WantStop) => (Stopping { then_start: false }, vec![Terminate]),
        (Starting | Ready, WantRestart) => (Stopping { then_start: true }, vec![Terminate]),
        (Stopping { .. }, WantStop) => (Stopping { then_start: false }, vec![]),
        (Stopping { .. }, WantStart | WantRestart) => (Stopping { then_start: true }, vec![]),
        (Stopping { then_start }, StopTimeout) => (
            Stopping {
                then_start: *then_start,
            },
            vec![Kill],
        ),
        (Stopping { then_start: false }, Event::Ended(_)) => (Stopped, vec![]),
        (Stopping { then_start: true }, Event::Ended(_)) => (Waiting, vec![]),

        // Being started again by an operator.
        (Backoff | Stopped | Failed | Done, WantStart | WantRestart) => (Waiting, vec![]),
        (Failed | Done, WantStop) => (Stopped, vec![]),

        // Late or repeated events are normal. No `_`: a new event must not hide here.
        (Waiting, SaidReady | Event::Ended(_) | StartTimeout | BackoffOver | StopTimeout)
        | (Waiting | Starting | Ready, WantStart)
        | (Waiting, WantRestart)
        | (Starting, DependenciesReady | BackoffOver | StopTimeout)
        | (Ready, DependenciesReady | SaidReady | StartTimeout | BackoffOver | StopTimeout)
        | (Backoff, DependenciesReady | SaidReady | Event::Ended(_) | StartTimeout | StopTimeout)
        | (Stopping { .. }, DependenciesReady | SaidReady | StartTimeout | BackoffOver)
        | (
            Stopped,
            DependenciesReady
            | SaidReady
            | Event::Ended(_)
            | StartTimeout
            | BackoffOver
            | StopTimeout
            | WantStop,
        )
        | (
            Done | Failed,
            DependenciesReady
            | SaidReady
            | Event::Ended(_)
            | StartTimeout
            | BackoffOver
            | StopTimeout,
        ) => (state.clone(), vec![]),
    }
}

/// First restart after a crash: at once. Then 0.1 s, doubling, up to 30 s.
#[must_use]
pub fn restart_delay(crashes_in_a_row: u32) -> Duration {
    const FIRST: Duration = Duration::from_millis(100);
    const MAX: Duration = Duration::from_secs(30);
    match crashes_in_a_row {
        0 | 1 => Duration::ZERO,
        n => lotus_runtime::Backoff::nominal(FIRST, MAX, n - 2),
    }
}

/// A run that lasted this long forgets the crashes before it.
pub const HEALTHY_AFTER: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event() -> impl Strategy<Value = Event> {
        prop::sample::select(vec![
            Event::DependenciesReady,
            Event::SaidReady,
            Event::Ended(Ended::Clean),
            Event::Ended(Ended::BadConfig),
            Event::Ended(Ended::Crashed),
            Event::StartTimeout,
            Event::BackoffOver,
            Event::StopTimeout,
            Event::WantStop,
            Event::WantStart,
            Event::WantRestart,
        ])
    }

    proptest! {
        /// The world answers as a real one does: a process ends only if it lives.
        #[test]
        fn there_are_never_two(events in prop::collection::vec(event(), 0..200), oneshot: bool) {
            let mut state = State::Waiting;
            let mut alive = false;
            for event in events {
                if matches!(event, Event::Ended(_)) {
                    if !alive {
                        continue;
                    }
                    alive = false;
                }
                let (next, effects) = step(&state, event, oneshot);
                for effect in effects {
                    match effect {
                        Effect::Spawn => {
                            prop_assert!(!alive, "{state:?} {event:?} spawned a second one");
                            alive = true;
                        }
                        Effect::Terminate | Effect::Kill => {
                            prop_assert!(alive, "{state:?} {event:?} signals nobody");
                        }
                        Effect::ArmBackoff => prop_assert!(!alive),
                    }
                }
                prop_assert_eq!(next.is_alive(), alive, "{:?} {:?} -> {:?}", state, event, next);
                state = next;
            }
        }

        #[test]
        fn a_stop_always_ends_in_stopped(events in prop::collection::vec(event(), 0..50), oneshot: bool) {
            let mut state = State::Waiting;
            for event in events {
                if matches!(event, Event::Ended(_)) && !state.is_alive() {
                    continue;
                }
                state = step(&state, event, oneshot).0;
            }
            state = step(&state, Event::WantStop, oneshot).0;
            if state.is_alive() {
                state = step(&state, Event::Ended(Ended::Crashed), oneshot).0;
            }
            prop_assert_eq!(state, State::Stopped);
        }
    }

    #[test]
    fn restarts_slow_down() {
        let secs: Vec<f64> = (1..=12).map(|n| restart_delay(n).as_secs_f64()).collect();
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
}
