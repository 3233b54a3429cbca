use std::time::Duration;

use rand::Rng as _;

/// Waiting times between tries: doubling, jittered, capped.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    tries: u32,
}

impl Backoff {
    /// Starts at `first` and grows to `max`.
    #[must_use]
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self {
            first,
            max,
            tries: 0,
        }
    }

    /// The wait before the next try: between half and all of the doubled time, so that many
    /// that failed together do not come back together.
    #[expect(
        clippy::should_implement_trait,
        reason = "an endless sequence with a reset, not an iterator to adapt"
    )]
    pub fn next(&mut self) -> Duration {
        let full = Self::nominal(self.first, self.max, self.tries);
        self.tries = self.tries.saturating_add(1);
        full.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// The wait after `tries` failures, without jitter.
    #[must_use]
    pub fn nominal(first: Duration, max: Duration, tries: u32) -> Duration {
        first.saturating_mul(1u32 << tries.min(20)).min(max)
    }

    /// Failures so far.
    #[must_use]
    pub const fn tries(&self) -> u32 {
        self.tries
    }

    /// Starts over after a success.
    pub const fn reset(&mut self) {
        self.tries = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap() {
        let (first, max) = (Duration::from_millis(100), Duration::from_secs(5));
        let mut b = Backoff::new(first, max);
        for tries in 0..40 {
            let nominal = Backoff::nominal(first, max, tries);
            let wait = b.next();
            assert!(wait >= nominal / 2 && wait <= nominal, "{tries}: {wait:?}");
        }
        assert_eq!(Backoff::nominal(first, max, 3), first * 8);
        assert_eq!(Backoff::nominal(first, max, u32::MAX), max);
        b.reset();
        assert!(b.next() <= first);
    }
}
