use std::fmt;
use std::ops::{Add, Sub};

use serde::{Deserialize, Serialize};

/// A chain height: the number of epochs since genesis. One epoch lasts 30 s on mainnet, a
/// setting on the devnet. Negative values appear on chain as "never".
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub i64);

/// A number of epochs.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct EpochDelta(pub i64);

impl Add<EpochDelta> for Epoch {
    type Output = Self;
    fn add(self, d: EpochDelta) -> Self {
        Self(self.0.saturating_add(d.0))
    }
}

impl Sub<EpochDelta> for Epoch {
    type Output = Self;
    fn sub(self, d: EpochDelta) -> Self {
        Self(self.0.saturating_sub(d.0))
    }
}

impl Sub for Epoch {
    type Output = EpochDelta;
    fn sub(self, other: Self) -> EpochDelta {
        EpochDelta(self.0.saturating_sub(other.0))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for EpochDelta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_and_deltas_combine() {
        assert_eq!(Epoch(10) + EpochDelta(5), Epoch(15));
        assert_eq!(Epoch(10) - EpochDelta(15), Epoch(-5));
        assert_eq!(Epoch(10) - Epoch(4), EpochDelta(6));
        assert_eq!(Epoch(i64::MAX) + EpochDelta(1), Epoch(i64::MAX));
    }
}
