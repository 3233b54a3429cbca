//! How much of the processors a squeezed process may take.
//!
//! A weight counts for what runs in the process itself. What it causes, in the network's
//! interrupts, in memory and in whoever reads its answers, weighs as usual, so it must do less.

/// Microseconds in which a bound is counted (`sched-bwc.rst`, the kernel's own default).
const PERIOD: u64 = 100_000;

/// Time of all processors together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Microseconds in each period.
    micros: u64,
}

impl Share {
    /// From percent of the processors that the supervisor may use; none for 0, and for all of
    /// them.
    pub(crate) fn new(percent: u32, processors: usize) -> Option<Self> {
        let each = PERIOD / 100 * u64::from(percent);
        let micros = each.saturating_mul(processors as u64);
        (1..100).contains(&percent).then_some(Self { micros })
    }
}

/// The file of a group that bounds its processor's time.
pub(super) struct Quota {
    pub(super) file: &'static str,
    bound: fn(Share) -> String,
    pub(super) free: &'static str,
}

impl Quota {
    pub(super) fn words(&self, share: Share) -> String {
        (self.bound)(share)
    }
}

/// cgroup-v2.rst, "CPU Interface Files".
pub(super) const V2: Quota = Quota {
    file: "cpu.max",
    bound: |s| format!("{} {PERIOD}", s.micros),
    free: "max",
};
/// sched-bwc.rst. New groups have the period of above.
pub(super) const V1: Quota = Quota {
    file: "cpu.cfs_quota_us",
    bound: |s| s.micros.to_string(),
    free: "-1",
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_all_processors() {
        for (percent, processors, words) in [
            (0, 2, None),
            (1, 1, Some("1000 100000")),
            (5, 2, Some("10000 100000")),
            (10, 64, Some("640000 100000")),
            (100, 2, None),
            (u32::MAX, 2, None),
        ] {
            let share = Share::new(percent, processors);
            let got = share.map(|s| V2.words(s));
            assert_eq!(got.as_deref(), words, "{percent} % of {processors}");
        }
        assert_eq!(V1.words(Share::new(5, 2).unwrap()), "10000");
    }
}
