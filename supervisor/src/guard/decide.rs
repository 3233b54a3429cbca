//! Who is squeezed now: pure functions of what the hub says and of the time.

use serde::{Deserialize, Serialize};

/// What may be done to a process while the hub proves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Nothing.
    #[default]
    Off,
    /// It gets what the hub leaves of processor and disks.
    Squeeze,
    /// That, and it is stopped altogether when a deadline is about to close unproven.
    Freeze,
}

/// A proof that is made, or will be within moments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    /// Of a deadline; else of a block.
    pub(crate) window: bool,
    /// For operators.
    pub(crate) what: String,
    /// Unix milliseconds at which it is too late; none if nobody knows.
    pub(crate) closes: Option<u64>,
}

/// What is done to a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Nothing.
    #[default]
    Free,
    Squeezed,
    Frozen,
}

impl Level {
    /// Name in `status`; empty for nothing.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Free => "",
            Self::Squeezed => "squeezed",
            Self::Frozen => "frozen",
        }
    }
}

/// How far a process may be squeezed in the state that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It does not run.
    Gone,
    /// It starts or stops: within its time, so it must go on.
    Moving,
    /// It does its work.
    Working,
}

/// What is to be done to a process at `now`. A deadline that is not proven `freeze_before`
/// milliseconds before it closes freezes those that may be frozen. Work that is too late counts
/// no more, even if the hub should hang and not say so.
pub(crate) fn level(
    mode: Mode,
    phase: Phase,
    work: &[Work],
    now: u64,
    freeze_before: u64,
) -> Level {
    let open = |w: &&Work| w.closes.is_none_or(|closes| now < closes);
    let last_moments = |w: &Work| {
        let from = |closes: u64| closes.saturating_sub(freeze_before);
        w.window && w.closes.is_some_and(|closes| now >= from(closes))
    };
    if mode == Mode::Off || phase == Phase::Gone || !work.iter().any(|w| open(&w)) {
        return Level::Free;
    }
    let freeze = work.iter().filter(open).any(last_moments);
    if freeze && mode == Mode::Freeze && phase == Phase::Working {
        return Level::Frozen;
    }
    Level::Squeezed
}

/// When something changes by itself, after `now`; nothing when it does not.
pub(crate) fn next(freezes: bool, work: &[Work], now: u64, freeze_before: u64) -> Option<u64> {
    let moments = |w: &Work| {
        let closes = w.closes;
        let last = closes.filter(|_| freezes && w.window);
        [closes, last.map(|c| c.saturating_sub(freeze_before))]
    };
    let all = work.iter().flat_map(moments).flatten();
    all.filter(|at| *at > now).min()
}

/// For what, in one line.
pub(crate) fn reason(work: &[Work], now: u64) -> String {
    let open = work.iter().filter(|w| w.closes.is_none_or(|c| now < c));
    let words: Vec<&str> = open.map(|w| w.what.as_str()).collect();
    words.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn window(closes: impl Into<Option<u64>>) -> Work {
        Work {
            window: true,
            what: "WindowPoSt".into(),
            closes: closes.into(),
        }
    }

    fn block(closes: u64) -> Work {
        Work {
            window: false,
            ..window(closes)
        }
    }

    #[test]
    fn who_is_squeezed() {
        use Level::{Free, Frozen, Squeezed};
        use Mode::{Freeze, Off, Squeeze};
        use Phase::{Gone, Moving, Working};
        // Frozen in the last 300 before the close.
        for (mode, phase, work, now, wanted) in [
            (Squeeze, Working, vec![], 0, Free),
            (Freeze, Working, vec![], 0, Free),
            (Squeeze, Working, vec![window(1000)], 0, Squeezed),
            (Squeeze, Working, vec![window(1000)], 999, Squeezed),
            (Squeeze, Working, vec![window(None)], 999, Squeezed),
            (Off, Working, vec![window(1000)], 999, Free),
            (Squeeze, Gone, vec![window(1000)], 0, Free),
            (Squeeze, Moving, vec![window(1000)], 0, Squeezed),
            // Too late: the hub may hang.
            (Squeeze, Working, vec![window(1000)], 1000, Free),
            (Freeze, Working, vec![window(1000)], 1000, Free),
            // The last step, and nothing but a deadline leads to it.
            (Freeze, Working, vec![window(1000)], 699, Squeezed),
            (Freeze, Working, vec![window(1000)], 700, Frozen),
            (Freeze, Moving, vec![window(1000)], 700, Squeezed),
            (Freeze, Working, vec![block(1000)], 999, Squeezed),
            (Freeze, Working, vec![window(None)], 999, Squeezed),
            (
                Freeze,
                Working,
                vec![window(5000), window(1000)],
                800,
                Frozen,
            ),
            (
                Freeze,
                Working,
                vec![window(5000), window(1000)],
                1000,
                Squeezed,
            ),
            // A deadline that is shorter than that.
            (Freeze, Working, vec![window(100)], 0, Frozen),
        ] {
            let got = level(mode, phase, &work, now, 300);
            assert_eq!(got, wanted, "{mode:?} {phase:?} {work:?} at {now}");
        }
    }

    fn works() -> impl Strategy<Value = Vec<Work>> {
        let one = (any::<bool>(), prop::option::of(0u64..1000)).prop_map(|(window, closes)| Work {
            window,
            what: "x".into(),
            closes,
        });
        prop::collection::vec(one, 0..5)
    }

    proptest! {
        /// Whoever sleeps until `next` misses no change of any level.
        #[test]
        fn nothing_changes_between(work in works(), now in 0u64..1000, before in 0u64..500) {
            let until = next(true, &work, now, before).unwrap_or(2000);
            for mode in [Mode::Off, Mode::Squeeze, Mode::Freeze] {
                let at = |t| level(mode, Phase::Working, &work, t, before);
                for t in now..until {
                    prop_assert_eq!(at(t), at(now), "{:?} at {} of {}..{}", mode, t, now, until);
                }
            }
        }

        /// More may never mean less, and what was not asked for never happens.
        #[test]
        fn modes_are_limits(work in works(), more in works(), now in 0u64..1000, before in 0u64..500) {
            let both = [work.clone(), more].concat();
            for phase in [Phase::Gone, Phase::Moving, Phase::Working] {
                let at = |mode, w: &[Work]| level(mode, phase, w, now, before);
                prop_assert_eq!(at(Mode::Off, &both), Level::Free);
                prop_assert!(at(Mode::Squeeze, &both) <= Level::Squeezed);
                prop_assert!(at(Mode::Squeeze, &work) <= at(Mode::Freeze, &work));
                for mode in [Mode::Squeeze, Mode::Freeze] {
                    prop_assert!(at(mode, &work) <= at(mode, &both));
                    prop_assert_eq!(at(mode, &[]), Level::Free);
                }
                if phase != Phase::Working {
                    prop_assert!(at(Mode::Freeze, &both) <= Level::Squeezed);
                }
            }
        }
    }
}
