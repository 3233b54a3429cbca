//! What is due at a head: pure functions of `dline.Info`.

use lotus_node_client::api::DeadlineInfo;
use lotus_types::{Epoch, EpochDelta};

/// One proving deadline of one period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First epoch of its proving period.
    pub period_start: Epoch,
    /// Index within the period.
    pub index: u64,
    /// First epoch in which a proof may land.
    pub open: Epoch,
    /// First epoch in which a proof may land no more.
    pub close: Epoch,
    /// The epoch whose randomness is the challenge.
    pub challenge: Epoch,
    /// First epoch at which a declaration for this deadline is too late.
    pub fault_cutoff: Epoch,
}

/// What a window needs at some head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    /// The challenge is not known yet, or not for long enough.
    Nothing,
    /// The challenge is known: prove.
    Prove,
    /// It is open: submit what is proved.
    Submit,
    /// No message can land in it any more.
    Over,
}

/// Epochs on top of the challenge before it is proved against, so that the reorg of a single
/// tipset costs no proof.
const CHALLENGE_CONFIDENCE: EpochDelta = EpochDelta(1);
/// Epochs before that at which others are told that proofs begin.
const NEAR: EpochDelta = EpochDelta(2);
/// Looks at bad sectors in the length of a window.
const LOOKS: i64 = 12;
/// A declaration has at least so many epochs until the cut-off, however short windows are.
const LEAST_NOTICE: i64 = 4;
/// Epochs after the opening at which Lotus submits, in a window of 60. Source: lotus,
/// storage/wdpost, SubmitConfidence.
const SUBMIT_CONFIDENCE: i64 = 4;

impl Window {
    /// The window that the node says is current.
    #[must_use]
    pub fn current(di: &DeadlineInfo) -> Self {
        Self::after(di, 0)
    }

    /// The windows from the current one on, one proving period long.
    pub fn upcoming(di: &DeadlineInfo) -> impl Iterator<Item = Self> + use<> {
        let di = *di;
        (0..di.w_post_period_deadlines).map(move |k| Self::after(&di, k))
    }

    /// The `k`th window after the current one.
    fn after(di: &DeadlineInfo, k: u64) -> Self {
        let n = di.w_post_period_deadlines.max(1);
        let at = di.index.saturating_add(k);
        let signed = |x: u64| i64::try_from(x).unwrap_or(i64::MAX);
        let window = di.w_post_challenge_window.0;
        let period_start =
            di.period_start + EpochDelta(signed(at / n).saturating_mul(di.w_post_proving_period.0));
        let open = period_start + EpochDelta(signed(at % n).saturating_mul(window));
        Self {
            period_start,
            index: at % n,
            open,
            close: open + di.w_post_challenge_window,
            challenge: open - di.w_post_challenge_lookback,
            fault_cutoff: open - di.fault_declaration_cutoff,
        }
    }

    /// Epochs that the window is open.
    #[must_use]
    pub fn length(&self) -> EpochDelta {
        self.close - self.open
    }

    /// First head at which the proof is submitted: a few epochs after the opening, so that the
    /// ticket that the message commits to is not reorganised away; sooner in short windows.
    #[must_use]
    pub fn submit_from(&self) -> Epoch {
        let wait = (self.length().0 / 15).clamp(1, SUBMIT_CONFIDENCE);
        // A window of one or two epochs leaves no time to wait.
        let last_chance = self.close - EpochDelta(2);
        (self.open + EpochDelta(wait))
            .min(last_chance)
            .max(self.open)
    }

    /// What is due when the head is at `head`. A message sent then lands at `head + 1` at the
    /// earliest.
    #[must_use]
    pub fn due(&self, head: Epoch) -> Due {
        if head + EpochDelta(1) >= self.close {
            Due::Over
        } else if head >= self.submit_from() {
            Due::Submit
        } else if head >= self.challenge + CHALLENGE_CONFIDENCE {
            Due::Prove
        } else {
            Due::Nothing
        }
    }

    /// Whether the challenge is known, or a head later than that is there.
    #[must_use]
    pub fn is_known(&self, head: Epoch) -> bool {
        self.due(head) != Due::Nothing
    }

    /// Whether proofs begin within moments, so that room is made for them now.
    #[must_use]
    pub fn is_near(&self, head: Epoch) -> bool {
        !self.is_known(head) && self.is_known(head + NEAR)
    }

    /// Whether its sectors should be checked now: during the last window before the cut-off, as
    /// long as a declaration can still land.
    #[must_use]
    pub fn check_due(&self, head: Epoch) -> bool {
        let from = self.fault_cutoff - self.length();
        head >= from && self.declarable(head)
    }

    /// Whether a declaration that is sent now can still land before the cut-off.
    #[must_use]
    pub fn declarable(&self, head: Epoch) -> bool {
        head + EpochDelta(2) < self.fault_cutoff
    }

    /// What follows a look at its sectors at `head`. What is bad is looked at again until the
    /// cut-off, and declared faulty only in the second half of that time: a disk that comes back
    /// costs nothing then.
    #[must_use]
    pub fn after_look(&self, head: Epoch, bad: bool) -> AfterLook {
        let declare_from = self.fault_cutoff - EpochDelta((self.length().0 / 2).max(LEAST_NOTICE));
        let step = head + EpochDelta(((self.length().0 + LOOKS - 1) / LOOKS).max(1));
        let again = if head < declare_from {
            step.min(declare_from)
        } else {
            step
        };
        // The last look is at the last head that counts.
        let last = self.fault_cutoff - EpochDelta(3);
        let again = again.min(last);
        AfterLook {
            declare: bad && head >= declare_from,
            again: (bad && again > head).then_some(again),
        }
    }
}

/// See [`Window::after_look`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AfterLook {
    /// What is bad is declared now.
    pub declare: bool,
    /// Head from which on to look again.
    pub again: Option<Epoch>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(at: i64, start: i64, n: u64, window: i64, lookback: i64, cutoff: i64) -> DeadlineInfo {
        let index = (at - start) / window;
        let open = start + index * window;
        DeadlineInfo {
            current_epoch: Epoch(at),
            period_start: Epoch(start),
            index: u64::try_from(index).unwrap(),
            open: Epoch(open),
            close: Epoch(open + window),
            challenge: Epoch(open - lookback),
            fault_cutoff: Epoch(open - cutoff),
            w_post_period_deadlines: n,
            w_post_proving_period: EpochDelta(window * i64::try_from(n).unwrap()),
            w_post_challenge_window: EpochDelta(window),
            w_post_challenge_lookback: EpochDelta(lookback),
            fault_declaration_cutoff: EpochDelta(cutoff),
        }
    }

    fn mainnet(at: i64) -> DeadlineInfo {
        info(at, 1000, 48, 60, 20, 70)
    }

    #[test]
    fn the_first_window_is_the_nodes() {
        let di = mainnet(1000 + 47 * 60 + 5);
        let w = Window::current(&di);
        assert_eq!(
            (w.index, w.open, w.close, w.challenge, w.fault_cutoff),
            (di.index, di.open, di.close, di.challenge, di.fault_cutoff)
        );
        let next = Window::upcoming(&di).nth(1).unwrap();
        assert_eq!(next.index, 0);
        assert_eq!(next.period_start, di.next_period_start());
        assert_eq!(next.open, di.close);
        assert_eq!(Window::upcoming(&di).count(), 48);
    }

    #[test]
    fn mainnet_deadlines_are_proved_at_challenge_and_submitted_after_opening() {
        // The deadline that opens at 1060 and closes at 1120; its challenge is 1040.
        let w = Window::upcoming(&mainnet(1000)).nth(1).unwrap();
        for (head, due) in [
            (1039, Due::Nothing),
            (1040, Due::Nothing),
            (1041, Due::Prove),
            (1059, Due::Prove),
            (1063, Due::Prove),
            (1064, Due::Submit),
            (1118, Due::Submit),
            (1119, Due::Over),
            (1200, Due::Over),
        ] {
            assert_eq!(w.due(Epoch(head)), due, "head {head}");
        }
        let near: Vec<i64> = (1000..1130).filter(|h| w.is_near(Epoch(*h))).collect();
        assert_eq!(near, [1039, 1040], "just before the challenge is known");
    }

    #[test]
    fn tiny_windows_leave_time_to_submit() {
        for length in 2..40 {
            let di = info(0, 0, 6, length, 2, 4);
            let w = Window::current(&di);
            let at = w.submit_from();
            assert_eq!(w.due(at), Due::Submit, "window of {length}");
            assert!(at >= w.open && at < w.close);
        }
    }

    #[test]
    fn what_is_bad_is_looked_at_again_and_declared_while_that_counts() {
        for length in 3..=60 {
            let w = Window::current(&info(0, 0, 6, length, 2, 4));
            let heads = || (w.fault_cutoff.0 - length..w.fault_cutoff.0).map(Epoch);
            let due: Vec<Epoch> = heads().filter(|h| w.check_due(*h)).collect();
            let (mut next, mut looks, mut declared) = (due.first().copied(), Vec::new(), None);
            for head in due {
                if next.is_some_and(|at| head >= at) {
                    let after = w.after_look(head, true);
                    looks.push(head);
                    if after.declare && declared.is_none() {
                        declared = Some(head);
                    }
                    next = after.again;
                    // Repaired: nothing is declared, and nothing more to look at.
                    let good = w.after_look(head, false);
                    assert!(!good.declare && good.again.is_none());
                }
            }
            let declared = declared.expect("what stays bad is declared");
            assert!(w.declarable(declared), "window of {length}");
            assert!(looks.len() <= 14, "{looks:?}");
            if length >= 12 {
                let before = looks.iter().filter(|h| **h < declared).count();
                assert!(before >= 3, "a disk has time to come back: {looks:?}");
                let left = w.fault_cutoff - declared;
                assert!(left.0 >= length / 2, "and a declaration to land");
                let after = looks.iter().filter(|h| **h > declared).count();
                assert!(after >= 2, "and what is declared to be repaired: {looks:?}");
            }
        }
    }

    #[test]
    fn every_deadline_is_checked_once_a_period_before_its_cutoff() {
        for di in [
            mainnet(1000),
            info(0, 0, 6, 20, 20, 70),
            info(0, 0, 6, 20, 10, 25),
        ] {
            let (period, window) = (di.w_post_proving_period.0, di.w_post_challenge_window.0);
            let n = di.w_post_period_deadlines;
            let mut seen = vec![0; usize::try_from(n).unwrap()];
            // One steady period, head by head, with the deadline that the node would report.
            for at in period..2 * period {
                let base = di.period_start.0;
                let di = info(
                    base + at,
                    base + period,
                    n,
                    window,
                    di.w_post_challenge_lookback.0,
                    di.fault_declaration_cutoff.0,
                );
                for w in Window::upcoming(&di).filter(|w| w.check_due(Epoch(base + at))) {
                    assert!(base + at + 1 < w.fault_cutoff.0);
                    seen[usize::try_from(w.index).unwrap()] += 1;
                }
            }
            assert!(seen.iter().all(|n| *n == window - 2), "{seen:?}");
        }
    }
}
