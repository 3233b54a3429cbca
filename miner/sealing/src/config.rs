use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `[sealing]` in the hub's config.toml.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SealingConfig {
    /// Seconds that a sector waits for more pieces after its first one.
    pub wait_deals_secs: u64,
    /// Sectors that may take pieces at the same time. A piece that fits none of them closes the
    /// fullest.
    pub max_wait_deals_sectors: u32,
    /// Sectors that may be between `WaitDeals` and `Proving` at the same time; 0: as many as the
    /// disk holds. With all in use, pieces wait.
    pub max_sealing_sectors: u32,
    /// Pieces that one sector may hold.
    pub max_pieces_per_sector: u32,
    /// A sector closes when one of its pieces must be proven within this many epochs.
    pub start_epoch_buffer_epochs: i64,
    /// How far before the head the sealing ticket is taken, so that no reorg changes it.
    pub ticket_lookback_epochs: i64,
    /// Age at which a ticket is given up before its pre-commit. The network's limit less some
    /// time for the message to land.
    pub ticket_max_age_epochs: i64,
    /// Epochs that must lie on top of the seed's epoch, so that no reorg changes the seed.
    pub seed_confidence_epochs: i64,
    /// Epochs on top of a message's receipt before the next step begins.
    pub message_confidence_epochs: u64,
    /// How long a sector lives at least, in epochs from its pre-commit. Pieces can make it
    /// longer.
    pub expected_sector_duration_epochs: i64,
    /// Longest life that the network allows, in epochs from now, less some time for the message.
    pub max_sector_duration_epochs: i64,
    /// Seconds before the first retry of a step that failed; doubles after each failure.
    pub retry_first_secs: u64,
    /// Longest time between two retries, in seconds.
    pub retry_max_secs: u64,
}

impl Default for SealingConfig {
    fn default() -> Self {
        Self {
            // Lotus: WaitDealsDelay.
            wait_deals_secs: 6 * 3_600,
            // Lotus: MaxWaitDealsSectors.
            max_wait_deals_sectors: 2,
            max_sealing_sectors: 0,
            // builtin-actors: the smaller of the limits of 32 GiB and 64 GiB sectors.
            max_pieces_per_sector: 256,
            // Lotus: StartEpochSealingBuffer.
            start_epoch_buffer_epochs: 480,
            // builtin-actors: chain finality.
            ticket_lookback_epochs: 900,
            // builtin-actors: MAX_PRE_COMMIT_RANDOMNESS_LOOKBACK is one day and finality, 3,780.
            ticket_max_age_epochs: 3_780 - 60,
            // Lotus: InteractivePoRepConfidence.
            seed_confidence_epochs: 6,
            message_confidence_epochs: 5,
            // 540 days of 2,880 epochs; builtin-actors: 180 to 1,278 days.
            expected_sector_duration_epochs: 540 * 2_880,
            max_sector_duration_epochs: 1_277 * 2_880,
            retry_first_secs: 60,
            retry_max_secs: 3_600,
        }
    }
}

impl SealingConfig {
    /// Time before the retry after this many failures in a row, without jitter.
    pub(crate) fn retry_after(&self, failures: u32) -> Duration {
        let doubled = self
            .retry_first_secs
            .saturating_mul(1 << failures.saturating_sub(1).min(20));
        Duration::from_secs(doubled.min(self.retry_max_secs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_back_off_to_the_limit() {
        let cfg = SealingConfig::default();
        let secs = |n| cfg.retry_after(n).as_secs();
        assert_eq!([secs(1), secs(2), secs(3)], [60, 120, 240]);
        assert_eq!([secs(0), secs(7), secs(u32::MAX)], [60, 3_600, 3_600]);
    }
}
