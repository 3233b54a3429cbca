//! When the epochs of a chain begin: pure.

use std::time::{Duration, SystemTime};

use lotus_node_client::api::{NetworkParams, TipSet};
use lotus_types::{Epoch, EpochDelta};

/// The clock of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pace {
    /// Length of an epoch.
    delay: Duration,
    /// Time after an epoch's start in which its blocks may arrive.
    propagation: Duration,
    /// Whether epochs follow the wall clock, as on every public network. Where epochs may be
    /// shorter than the second in which timestamps count (a devnet, which then says so), they
    /// follow the node: an epoch begins when its tipset arrives.
    by_clock: bool,
}

/// A tipset to mine on, and when it was first seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Base {
    pub(crate) height: Epoch,
    pub(crate) timestamp: u64,
    pub(crate) arrived: SystemTime,
}

impl Base {
    pub(crate) fn of(t: &TipSet, arrived: SystemTime) -> Self {
        Self {
            height: t.height,
            timestamp: t.min_timestamp(),
            arrived,
        }
    }
}

impl Pace {
    pub(crate) fn new(params: &NetworkParams, propagation: Duration) -> Self {
        Self {
            // A node that says 0 must not make the hub spin.
            delay: params.block_delay().max(Duration::from_millis(10)),
            propagation,
            by_clock: params.block_delay_millis.is_none(),
        }
    }

    pub(crate) const fn delay(&self) -> Duration {
        self.delay
    }

    /// When an epoch after `base` begins.
    pub(crate) fn start(&self, base: &Base, epoch: Epoch) -> SystemTime {
        let anchor = if self.by_clock {
            SystemTime::UNIX_EPOCH + Duration::from_secs(base.timestamp)
        } else {
            base.arrived
        };
        let ahead = u32::try_from((epoch - base.height).0.max(0)).unwrap_or(u32::MAX);
        anchor + self.delay.saturating_mul(ahead)
    }

    /// When the round of an epoch is begun: blocks of the epoch before have had time to arrive.
    pub(crate) fn begin(&self, base: &Base, round: Epoch) -> SystemTime {
        self.start(base, round - EpochDelta(1)) + self.propagation
    }

    /// The round to take part in: the first that is not over.
    pub(crate) fn round(&self, base: &Base, tried: Option<Epoch>, now: SystemTime) -> Epoch {
        let next = tried.unwrap_or(base.height).max(base.height) + EpochDelta(1);
        let since = now
            .duration_since(self.begin(base, next))
            .unwrap_or_default();
        // A round lasts an epoch; one whose successor may begin is lost.
        let missed = since.as_nanos() / self.delay.as_nanos();
        next + EpochDelta(i64::try_from(missed).unwrap_or(i64::MAX))
    }

    /// When a block of this round may be published: at its timestamp. Where epochs follow the
    /// node it keeps an early block itself, and waiting here would let the rounds drift.
    pub(crate) fn publish(&self, base: &Base, round: Epoch) -> SystemTime {
        if self.by_clock {
            self.start(base, round)
        } else {
            base.arrived
        }
    }

    /// The timestamp of a block of this round, in Unix seconds: the chain's own arithmetic.
    pub(crate) fn timestamp(&self, base: &Base, round: Epoch) -> u64 {
        let epochs = u128::try_from((round - base.height).0).unwrap_or(0);
        let ms = epochs.saturating_mul(self.delay.as_millis());
        base.timestamp
            .saturating_add(u64::try_from(ms / 1000).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(secs: f64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs_f64(secs)
    }

    const MAINNET: Pace = Pace {
        delay: Duration::from_secs(30),
        propagation: Duration::from_secs(10),
        by_clock: true,
    };

    #[test]
    fn rounds_follow_the_clock() {
        let base = Base {
            height: Epoch(100),
            timestamp: 3000,
            arrived: at(3004.0),
        };
        assert_eq!(MAINNET.begin(&base, Epoch(101)), at(3010.0));
        assert_eq!(MAINNET.start(&base, Epoch(101)), at(3030.0));
        assert_eq!(MAINNET.timestamp(&base, Epoch(103)), 3090);
        assert_eq!(MAINNET.publish(&base, Epoch(103)), at(3090.0));
        for (tried, now, round) in [
            (None, 3005.0, 101),
            (None, 3039.9, 101),
            (None, 3041.0, 102),
            (Some(101), 3015.0, 102),
            (Some(101), 3041.0, 102),
            // The hub was asleep: the rounds between are lost.
            (Some(101), 3341.0, 112),
        ] {
            assert_eq!(
                MAINNET.round(&base, tried.map(Epoch), at(now)),
                Epoch(round),
                "tried {tried:?} at {now}"
            );
        }
    }

    #[test]
    fn fast_devnets_follow_their_node() {
        let pace = Pace {
            delay: Duration::from_millis(500),
            propagation: Duration::from_millis(100),
            by_clock: false,
        };
        // The chain stood still for an hour: its timestamps are of the past.
        let base = Base {
            height: Epoch(7),
            timestamp: 1000,
            arrived: at(4600.0),
        };
        assert_eq!(pace.begin(&base, Epoch(8)), at(4600.1));
        assert_eq!(pace.round(&base, None, at(4600.05)), Epoch(8));
        assert_eq!(pace.round(&base, Some(Epoch(8)), at(4600.7)), Epoch(9));
        assert_eq!(pace.timestamp(&base, Epoch(10)), 1001);
        assert_eq!(pace.publish(&base, Epoch(10)), base.arrived);
    }
}
