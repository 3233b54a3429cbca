//! How often somebody may ask.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Callers that are remembered.
const MAX_CALLERS: usize = 10_000;

/// Tokens of each caller: one is spent for each request, `per_second` come back, and twice as many
/// are kept.
#[derive(Debug)]
pub struct Rates<K> {
    per_second: f64,
    callers: Mutex<HashMap<K, (f64, Instant)>>,
}

impl<K: Hash + Eq> Rates<K> {
    /// So many a second for each.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        Self {
            per_second: f64::from(per_second.max(1)),
            callers: Mutex::default(),
        }
    }

    /// Whether this caller may ask once more at this time.
    pub fn allow(&self, who: K, now: Instant) -> bool {
        self.spend(who, now, |tokens| tokens >= 1.0)
    }

    /// How long this caller, who asks once more at this time, is to wait for it. Bound how many of
    /// its questions wait at once.
    pub fn due(&self, who: K, now: Instant) -> Duration {
        let mut missing = 0.0;
        self.spend(who, now, |tokens| {
            missing = 1.0 - tokens;
            true
        });
        Duration::try_from_secs_f64(missing / self.per_second).unwrap_or_default()
    }

    fn spend(&self, who: K, now: Instant, may: impl FnOnce(f64) -> bool) -> bool {
        let burst = self.per_second * 2.0;
        let refill = |(tokens, at): (f64, Instant)| {
            let since = now.saturating_duration_since(at).as_secs_f64();
            (tokens + since * self.per_second).min(burst)
        };
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= MAX_CALLERS {
            // A bucket that is full again says nothing.
            callers.retain(|_, c| refill(*c) < burst);
            if callers.len() >= MAX_CALLERS {
                callers.clear();
            }
        }
        let slot = callers.entry(who).or_insert((burst, now));
        let tokens = refill(*slot);
        let allowed = may(tokens);
        *slot = (if allowed { tokens - 1.0 } else { tokens }, now);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_then_a_trickle() {
        let rates = Rates::new(2);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let passed = |ms, n: usize| (0..n).filter(|_| rates.allow("a", at(ms))).count();
        assert_eq!(passed(0, 10), 4);
        assert_eq!(passed(500, 10), 1);
        assert_eq!(passed(60_000, 10), 4, "the burst comes back");
        assert!(rates.allow("b", at(0)), "another caller is not held up");
    }

    #[test]
    fn whoever_may_wait_is_let_through_at_the_rate() {
        let rates = Rates::new(10);
        let now = Instant::now();
        let waits: Vec<_> = (0..22).map(|_| rates.due("a", now).as_millis()).collect();
        assert!(waits[..20].iter().all(|w| *w == 0), "{waits:?}");
        assert_eq!(waits[20..], [100, 200]);
        let later = now + Duration::from_millis(300);
        assert_eq!(rates.due("a", later).as_millis(), 0);
        assert_eq!(rates.due("b", now), Duration::ZERO);
    }

    #[test]
    fn callers_are_forgotten() {
        let rates = Rates::new(1);
        let now = Instant::now();
        for n in 0..MAX_CALLERS * 2 {
            rates.allow(n, now);
        }
        assert!(rates.callers.lock().unwrap().len() <= MAX_CALLERS);
    }
}
