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
    /// Deals may open new sectors. Without it they wait for sectors that can be upgraded.
    pub make_new_sector_for_deals: bool,
    /// Deals open a new sector first, and take a sector that can be upgraded only when no more
    /// may be opened.
    pub prefer_new_sectors_for_deals: bool,
    /// A sector without pieces ends as `Available`, where deals can take it; else as `Proving`,
    /// until `lotus-miner sectors snap-up`.
    pub make_cc_sectors_available: bool,
    /// Sectors that may be upgraded at the same time; 0: no limit but that of
    /// `max_sealing_sectors`.
    pub max_upgrading_sectors: u32,
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
    /// Depth at which the chain is final, in epochs: so long after an upgrade the old replica is
    /// kept, and after a termination the files.
    pub finality_epochs: i64,
    /// Most sectors in one pre-commit message.
    pub pre_commit_batch_max: u32,
    /// Seconds that a sector waits for others to share a pre-commit message with.
    pub pre_commit_batch_wait_secs: u64,
    /// A pre-commit message goes out so many epochs before a ticket of its sectors expires or a
    /// deal begins.
    pub pre_commit_batch_slack_epochs: i64,
    /// Prove-commit messages have one aggregate instead of a proof for each sector, where proofs
    /// are SNARKs and there are enough of them.
    pub aggregate_commits: bool,
    /// Sectors from which on the proofs of a prove-commit message are aggregated; at least 4.
    pub commit_batch_min: u32,
    /// Most sectors in one prove-commit message.
    pub commit_batch_max: u32,
    /// Bytes of proofs and pieces in one prove-commit message of several sectors. Networks take
    /// messages of 64 KiB.
    pub commit_batch_max_bytes: u64,
    /// Seconds that a sector waits for others to share a prove-commit message with.
    pub commit_batch_wait_secs: u64,
    /// A prove-commit message goes out so many epochs before a pre-commit of its sectors expires
    /// or a deal begins.
    pub commit_batch_slack_epochs: i64,
    /// Base fee in attoFIL per unit of gas below which no sector waits for others: what sharing
    /// a message saves is not worth the time.
    pub batch_above_base_fee_attofil: u64,
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
            // Lotus: MakeNewSectorForDeals, PreferNewSectorsForDeals, MaxUpgradingSectors.
            make_new_sector_for_deals: true,
            prefer_new_sectors_for_deals: false,
            // Lotus: MakeCCSectorsAvailable is off. Here a deal takes capacity that is on chain
            // before it pays for more.
            make_cc_sectors_available: true,
            max_upgrading_sectors: 0,
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
            finality_epochs: 900,
            // Lotus: MaxPreCommitBatch, PreCommitBatchWait 24 h, PreCommitBatchSlack 3 h.
            pre_commit_batch_max: 256,
            pre_commit_batch_wait_secs: 24 * 3_600,
            pre_commit_batch_slack_epochs: 360,
            // Lotus: AggregateCommits, MinCommitBatch. From 4 on it costs the chain less to check;
            // from 13 on, with 32 GiB sectors, it is smaller.
            aggregate_commits: true,
            commit_batch_min: 4,
            // Lotus: MaxCommitBatch, CommitBatchWait 24 h, CommitBatchSlack 1 h.
            commit_batch_max: 819,
            commit_batch_max_bytes: 60 << 10,
            commit_batch_wait_secs: 24 * 3_600,
            commit_batch_slack_epochs: 120,
            // Lotus: BatchPreCommitAboveBaseFee, 0.32 nanoFIL.
            batch_above_base_fee_attofil: 320_000_000,
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
