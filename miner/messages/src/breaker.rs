//! When sending one kind of message stops, and when it is tried again: pure.

use lotus_types::{Epoch, EpochDelta};
use serde::{Deserialize, Serialize};

use crate::{BreakerConfig, MessageKind};

/// Why a kind of message is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The chain would refuse one after the other.
    Refusals,
    /// One after the other failed on chain.
    Failures,
    /// The day's fees are spent.
    DailyCap,
    /// No address that may pay has the funds, or would go below its floor.
    Balance,
}

impl StopReason {
    /// Every reason.
    pub const ALL: [Self; 4] = [
        Self::Refusals,
        Self::Failures,
        Self::DailyCap,
        Self::Balance,
    ];

    /// Name in logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Refusals => "refusals",
            Self::Failures => "failures",
            Self::DailyCap => "daily_cap",
            Self::Balance => "balance",
        }
    }
}

/// A stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// Why, as a class.
    pub reason: StopReason,
    /// Why, in words.
    pub why: String,
    /// When it began.
    pub since: Epoch,
    /// First epoch in which a message is tried again.
    pub next_try: Epoch,
}

/// What happened to a message of the kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// It was signed: the chain would take it, and somebody can pay for it.
    Signed,
    /// Executed on the present state it fails.
    Refused(String),
    /// It succeeded on chain.
    Landed,
    /// It failed on chain, and its fee is gone.
    Failed(String),
    /// It would go over the day's fees; the next day begins then.
    DailyCap(String, Epoch),
    /// Nobody has the funds for it.
    Balance(String),
    /// An operator says: go on.
    Resume,
}

/// The breaker of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Breaker {
    /// Refused in a row.
    refusals: u32,
    /// Failed on chain in a row.
    failures: u32,
    /// Stops in a row for refusals or failures: each is twice as long as the one before.
    trips: u32,
    pub(crate) stop: Option<Stop>,
}

impl Breaker {
    /// The stop that is in force. One whose time has come lets messages through, and ends with
    /// the first that succeeds.
    pub(crate) fn stopped(&self, now: Epoch) -> Option<&Stop> {
        self.stop.as_ref().filter(|s| now < s.next_try)
    }

    pub(crate) fn step(
        mut self,
        cfg: &BreakerConfig,
        kind: MessageKind,
        now: Epoch,
        event: Event,
    ) -> Self {
        let stops = !matches!(kind, MessageKind::Post | MessageKind::Operator);
        match event {
            Event::Resume => self = Self::default(),
            Event::Signed => {
                self.refusals = 0;
                // Whether failures are over shows on chain alone.
                if self.stop_is(|r| r != StopReason::Failures) {
                    self.stop = None;
                }
            }
            Event::Landed => {
                self.failures = 0;
                self.trips = 0;
                if self.stop_is(|r| r == StopReason::Failures) {
                    self.stop = None;
                }
            }
            Event::Refused(why) => {
                self.refusals = self.refusals.saturating_add(1);
                if stops && self.refusals >= cfg.max_refusals.max(1) {
                    self.trip(cfg, kind, now, StopReason::Refusals, why);
                }
            }
            Event::Failed(why) => {
                self.failures = self.failures.saturating_add(1);
                if stops && self.failures >= cfg.max_failures.max(1) {
                    self.trip(cfg, kind, now, StopReason::Failures, why);
                }
            }
            // WindowPoSt has a limit of its own only where an operator sets one.
            Event::DailyCap(why, next_day) if kind != MessageKind::Operator => {
                self.open(now, StopReason::DailyCap, why, next_day);
            }
            Event::Balance(why) if stops => {
                let next = now + pause(cfg, kind, 0);
                self.open(now, StopReason::Balance, why, next);
            }
            Event::DailyCap(..) | Event::Balance(_) => {}
        }
        self
    }

    fn stop_is(&self, f: impl Fn(StopReason) -> bool) -> bool {
        self.stop.as_ref().is_some_and(|s| f(s.reason))
    }

    /// Stops after a row of bad ends. Those of messages that were already on their way when it
    /// stopped do not make it longer.
    fn trip(
        &mut self,
        cfg: &BreakerConfig,
        kind: MessageKind,
        now: Epoch,
        reason: StopReason,
        why: String,
    ) {
        if self.stopped(now).is_some_and(|s| s.reason == reason) {
            return;
        }
        let next = now + pause(cfg, kind, self.trips);
        self.trips = self.trips.saturating_add(1);
        self.open(now, reason, why, next);
    }

    /// A stop that goes on keeps its beginning.
    fn open(&mut self, now: Epoch, reason: StopReason, why: String, next_try: Epoch) {
        let before = self.stop.take().filter(|s| s.reason == reason);
        self.stop = Some(Stop {
            reason,
            why,
            since: before.map_or(now, |s| s.since),
            next_try,
        });
    }
}

fn pause(cfg: &BreakerConfig, kind: MessageKind, trips: u32) -> EpochDelta {
    let longest = match kind {
        MessageKind::Declare => cfg.declare_pause_max_epochs.min(cfg.pause_max_epochs),
        _ => cfg.pause_max_epochs,
    };
    let factor = 1u64.checked_shl(trips.min(32)).unwrap_or(u64::MAX);
    let long = cfg.pause_epochs.max(1).saturating_mul(factor);
    let epochs = long.min(longest.max(1));
    EpochDelta(i64::try_from(epochs).unwrap_or(i64::MAX / 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CFG: BreakerConfig = BreakerConfig {
        max_refusals: 3,
        max_failures: 2,
        pause_epochs: 10,
        pause_max_epochs: 35,
        declare_pause_max_epochs: 4,
    };

    fn event(name: char) -> Event {
        match name {
            's' => Event::Signed,
            'r' => Event::Refused("r".into()),
            'l' => Event::Landed,
            'f' => Event::Failed("f".into()),
            'd' => Event::DailyCap("d".into(), Epoch(1_000)),
            'b' => Event::Balance("b".into()),
            _ => Event::Resume,
        }
    }

    /// Plays events, each at its epoch; gives the stop's reason, beginning and next try.
    fn play(kind: MessageKind, script: &[(i64, char)]) -> Option<(StopReason, i64, i64)> {
        let mut b = Breaker::default();
        for (at, e) in script {
            b = b.step(&CFG, kind, Epoch(*at), event(*e));
        }
        b.stop.map(|s| (s.reason, s.since.0, s.next_try.0))
    }

    #[test]
    fn stops_and_goes_on() {
        use StopReason::{Balance, DailyCap, Failures, Refusals};
        let commit = MessageKind::Commit;
        let three = [(1, 'r'), (2, 'r'), (3, 'r')];
        let two = [(1, 'f'), (2, 'f')];
        for (more, want) in [
            (&[][..], Some((Refusals, 3, 13))),
            // Still stopped: another one changes nothing.
            (&[(4, 'r')], Some((Refusals, 3, 13))),
            // Tried again and refused: twice as long, up to the limit.
            (&[(13, 'r')], Some((Refusals, 3, 33))),
            (&[(13, 'r'), (33, 'r')], Some((Refusals, 3, 68))),
            // Tried again and signed.
            (&[(13, 's')], None),
            (&[(4, 'x')], None),
        ] {
            assert_eq!(play(commit, &[&three[..], more].concat()), want, "{more:?}");
        }
        for (more, want) in [
            (&[][..], Some((Failures, 2, 12))),
            (&[(3, 'f')], Some((Failures, 2, 12))),
            // Signed is not yet success.
            (&[(12, 's')], Some((Failures, 2, 12))),
            (&[(12, 's'), (20, 'l')], None),
            (&[(12, 's'), (20, 'f')], Some((Failures, 2, 40))),
        ] {
            assert_eq!(play(commit, &[&two[..], more].concat()), want, "{more:?}");
        }
        for (script, want) in [
            // Not in a row.
            (&[(1, 'r'), (2, 'r'), (3, 's'), (4, 'r')][..], None),
            (&[(1, 'f'), (2, 'l'), (3, 'f')], None),
            // The cap ends with the day, the balance is looked at again.
            (&[(1, 'd')], Some((DailyCap, 1, 1_000))),
            (&[(1, 'd'), (1_000, 's')], None),
            (&[(1, 'b')], Some((Balance, 1, 11))),
            (&[(1, 'b'), (11, 'b')], Some((Balance, 1, 21))),
            (&[(1, 'b'), (11, 's')], None),
        ] {
            assert_eq!(play(commit, script), want, "{script:?}");
        }
    }

    #[test]
    fn window_post_goes_on_whatever_happens() {
        let bad: Vec<_> = (0..40).zip("rfb".chars().cycle()).collect();
        assert_eq!(play(MessageKind::Post, &bad), None);
        assert_eq!(play(MessageKind::Operator, &bad), None);
        // Its own cap is an operator's wish.
        assert!(play(MessageKind::Post, &[(1, 'd')]).is_some());
        assert!(play(MessageKind::Operator, &[(1, 'd')]).is_none());
    }

    #[test]
    fn declarations_go_on_soon() {
        let failed: Vec<_> = [1, 2, 6, 10, 14].map(|at| (at, 'f')).into();
        for (script, want) in [
            (&failed[..2], (StopReason::Failures, 2, 6)),
            // As often as they fail, they are tried again as soon.
            (&failed[..], (StopReason::Failures, 2, 18)),
            (&[(1, 'b')], (StopReason::Balance, 1, 5)),
        ] {
            assert_eq!(play(MessageKind::Declare, script), Some(want));
        }
    }

    proptest! {
        /// Whatever happens, a stop ends by itself within the longest pause or with the day.
        #[test]
        fn no_stop_is_for_ever(script in proptest::collection::vec((0i64..5, 0usize..7), 0..60)) {
            let (mut b, mut now) = (Breaker::default(), 0);
            for (wait, e) in script {
                now += wait;
                let e = event(['s', 'r', 'l', 'f', 'd', 'b', 'x'][e]);
                b = b.step(&CFG, MessageKind::PreCommit, Epoch(now), e);
                if let Some(s) = &b.stop {
                    let longest = if s.reason == StopReason::DailyCap { 1_000 } else { now + 35 };
                    prop_assert!(s.next_try.0 <= longest);
                    prop_assert!(b.stopped(s.next_try).is_none());
                }
            }
        }
    }
}
