//! Every constant of the network, in one place, and the deadline arithmetic that follows.

use lotus_node_client::api::DeadlineInfo;
use lotus_types::{Epoch, EpochDelta, SectorSize};
use serde::{Deserialize, Serialize};

/// Epochs of a day at 30 s. The devnet keeps the network's numbers of epochs for lifetimes, so
/// they pass faster. Source: builtin-actors, runtime/src/builtin/network.rs.
const EPOCHS_IN_DAY: i64 = 2_880;

/// The constants of one network. Fixed when the chain is made; only `block_time_ms` may change
/// later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Milliseconds per epoch.
    pub block_time_ms: u64,
    /// Epochs after which the chain is final: no reorg is deeper.
    pub finality: i64,
    /// Deadlines per proving period.
    pub deadlines: u64,
    /// Epochs per deadline.
    pub challenge_window: i64,
    /// Epochs from a deadline's challenge to its opening.
    pub challenge_lookback: i64,
    /// Epochs before its opening from which a deadline's faults and recoveries are fixed.
    pub fault_cutoff: i64,
    /// Epochs that a sector may be faulty before it is terminated.
    pub fault_max_age: i64,
    /// Epochs after its deadline in which a PoSt may be disputed.
    pub dispute_window: i64,
    /// Partitions in one PoSt message.
    pub posted_partitions_max: u64,
    /// Partitions that one message may name otherwise.
    pub addressed_partitions_max: u64,
    /// Partitions in one deadline.
    pub partitions_per_deadline_max: u64,
    /// Sectors that one message may name.
    pub addressed_sectors_max: u64,
    /// Fewest sectors of an aggregate proof.
    pub aggregated_sectors_min: usize,
    /// Most sectors of an aggregate proof.
    pub aggregated_sectors_max: usize,
    /// Most bytes of an aggregate proof.
    pub aggregate_proof_bytes_max: usize,
    /// Epochs from a pre-commit to the seed of its proof.
    pub pre_commit_challenge_delay: i64,
    /// Epochs that a sealing ticket may be old at pre-commit.
    pub pre_commit_randomness_lookback: i64,
    /// Epochs from a pre-commit to the end of its proof's time, the challenge delay not counted.
    pub prove_commit_epochs: i64,
    /// Epochs after that at which an unproven pre-commit loses its deposit.
    pub pre_commit_clean_up_delay: i64,
    /// Least epochs that a sector lives.
    pub sector_lifetime_min: i64,
    /// Most epochs from now to a sector's end.
    pub sector_extension_max: i64,
    /// Most epochs that a sector lives in all.
    pub sector_lifetime_max: i64,
    /// Epochs from a worker key change to its effect.
    pub worker_change_delay: i64,
    /// Control addresses of a miner.
    pub control_addresses_max: usize,
    /// Epochs that an election looks back for power, sectors and the worker key.
    pub winning_lookback: i64,
    /// Bytes of power from which a miner takes part in elections.
    pub min_power: u64,
    /// Reward of an average epoch, whole FIL, over all of its wins.
    pub epoch_reward_fil: u64,
    /// Network power below which deposits, pledges and penalties do not grow further, bytes:
    /// stands in for the mainnet's baseline, which keeps a small devnet's deposits small.
    pub power_floor: u64,
    /// Least base fee, attoFIL per unit of gas.
    pub base_fee_min: u64,
    /// Gas of one block.
    pub block_gas_limit: u64,
    /// Least bytes of an allocation.
    pub allocation_size_min: u64,
    /// Least epochs that an allocation's data must be kept.
    pub allocation_term_min: i64,
    /// Most epochs for which it counts.
    pub allocation_term_max: i64,
    /// Most epochs in which it must be claimed.
    pub allocation_expiration_max: i64,
    /// Least epochs of a market deal.
    pub deal_duration_min: i64,
    /// Most epochs of a market deal.
    pub deal_duration_max: i64,
    /// Null rounds after which the built-in producer takes over from providers who could mine
    /// but do not.
    pub stall_rounds: i64,
}

impl Default for Policy {
    fn default() -> Self {
        Self::devnet_2k()
    }
}

impl Policy {
    /// The Lotus 2k devnet: mainnet's constants with blocks every 4 s, a seed delay of 10 epochs
    /// and a minimum power of 2 KiB. Sources: builtin-actors, runtime/src/runtime/policy.rs;
    /// lotus, build/buildconstants/params_2k.go.
    #[must_use]
    pub const fn devnet_2k() -> Self {
        Self {
            block_time_ms: 4_000,
            finality: 900,
            deadlines: 48,
            challenge_window: 60,
            challenge_lookback: 20,
            fault_cutoff: 70,
            fault_max_age: 42 * EPOCHS_IN_DAY,
            dispute_window: 1_800,
            posted_partitions_max: 3,
            addressed_partitions_max: 3_000,
            partitions_per_deadline_max: 3_000,
            addressed_sectors_max: 25_000,
            aggregated_sectors_min: 4,
            aggregated_sectors_max: 819,
            aggregate_proof_bytes_max: 81_960,
            pre_commit_challenge_delay: 10,
            pre_commit_randomness_lookback: EPOCHS_IN_DAY + 900,
            prove_commit_epochs: 30 * EPOCHS_IN_DAY,
            pre_commit_clean_up_delay: 8 * 120,
            sector_lifetime_min: 180 * EPOCHS_IN_DAY,
            sector_extension_max: 1_278 * EPOCHS_IN_DAY,
            sector_lifetime_max: 5 * 1_051_897,
            worker_change_delay: 900,
            control_addresses_max: 10,
            winning_lookback: 900,
            min_power: 2 << 10,
            epoch_reward_fil: 5,
            power_floor: 1 << 50,
            base_fee_min: 100,
            block_gas_limit: 10_000_000_000,
            allocation_size_min: 256,
            allocation_term_min: 180 * EPOCHS_IN_DAY,
            allocation_term_max: 5 * 1_051_897,
            allocation_expiration_max: 60 * EPOCHS_IN_DAY,
            deal_duration_min: 180 * EPOCHS_IN_DAY,
            deal_duration_max: 1_278 * EPOCHS_IN_DAY,
            stall_rounds: 5,
        }
    }

    /// A devnet for tests and demonstrations: 6 deadlines of 20 epochs, and elections that look
    /// back 10 epochs, so that a new provider mines soon after its first WindowPoSt.
    #[must_use]
    pub const fn fast() -> Self {
        let mut p = Self::devnet_2k().with_deadlines(6, 20);
        p.winning_lookback = 10;
        p
    }

    /// Another proving period. Challenge look-back and fault cut-off keep their share of a
    /// deadline (20 and 70 of 60 epochs), the dispute window its share of the period (1,800 of
    /// 2,880), and none exceeds mainnet's numbers; a fault may last 42 periods. At least 3 deadlines of at least 6 epochs.
    #[must_use]
    pub const fn with_deadlines(mut self, deadlines: u64, window: i64) -> Self {
        self.deadlines = if deadlines < 3 { 3 } else { deadlines };
        self.challenge_window = if window < 6 { 6 } else { window };
        let w = self.challenge_window;
        self.challenge_lookback = if w < 60 { w / 3 } else { 20 };
        self.fault_cutoff = if w < 60 { w * 7 / 6 } else { 70 };
        self.fault_max_age = 42 * self.proving_period();
        let share = self.proving_period() * 5 / 8;
        self.dispute_window = if share < 1_800 { share } else { 1_800 };
        self
    }

    /// Another block time.
    #[must_use]
    pub const fn with_block_time_ms(mut self, ms: u64) -> Self {
        self.block_time_ms = if ms == 0 { 1 } else { ms };
        self
    }

    /// Another seed delay.
    #[must_use]
    pub const fn with_seed_delay(mut self, epochs: i64) -> Self {
        self.pre_commit_challenge_delay = if epochs < 1 { 1 } else { epochs };
        self
    }

    /// Epochs in a proving period.
    #[must_use]
    pub const fn proving_period(&self) -> i64 {
        self.deadlines.cast_signed() * self.challenge_window
    }

    /// Last epoch, counted from its pre-commit, in which a sector may be proven.
    #[must_use]
    pub const fn prove_commit_limit(&self) -> i64 {
        self.prove_commit_epochs + self.pre_commit_challenge_delay
    }

    /// Sectors in a partition.
    #[must_use]
    pub const fn partition_sectors(size: SectorSize) -> u64 {
        lotus_proofs::window_post_partition_sectors(size)
    }

    /// What is wrong with the values, if anything.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("block_time_ms", self.block_time_ms.cast_signed()),
            ("finality", self.finality),
            ("challenge_window", self.challenge_window),
            ("challenge_lookback", self.challenge_lookback),
            (
                "pre_commit_challenge_delay",
                self.pre_commit_challenge_delay,
            ),
            ("stall_rounds", self.stall_rounds),
            ("winning_lookback", self.winning_lookback),
        ];
        if let Some((name, v)) = positive.iter().find(|(_, v)| *v < 1) {
            return Err(format!("{name} is {v}, must be at least 1"));
        }
        if self.deadlines < 3 || self.deadlines > 1_000 {
            return Err(format!(
                "deadlines is {}, must be 3 to 1000",
                self.deadlines
            ));
        }
        if self.challenge_lookback > self.fault_cutoff {
            return Err(
                "fault_cutoff must not be below challenge_lookback, or faults could be \
                        declared with the challenge known"
                    .into(),
            );
        }
        if self.winning_lookback > self.finality {
            return Err("winning_lookback must not exceed finality: older state is gone".into());
        }
        Ok(())
    }

    /// Deadline `index` of the proving period that begins at `period_start`, seen at `now`.
    #[must_use]
    pub fn deadline(&self, period_start: i64, index: u64, now: i64) -> DeadlineInfo {
        let open = period_start + index.cast_signed() * self.challenge_window;
        DeadlineInfo {
            current_epoch: Epoch(now),
            period_start: Epoch(period_start),
            index,
            open: Epoch(open),
            close: Epoch(open + self.challenge_window),
            challenge: Epoch(open - self.challenge_lookback),
            fault_cutoff: Epoch(open - self.fault_cutoff),
            w_post_period_deadlines: self.deadlines,
            w_post_proving_period: EpochDelta(self.proving_period()),
            w_post_challenge_window: EpochDelta(self.challenge_window),
            w_post_challenge_lookback: EpochDelta(self.challenge_lookback),
            fault_declaration_cutoff: EpochDelta(self.fault_cutoff),
        }
    }

    /// The deadline that is open at `now` for a miner whose periods begin at `offset` modulo the
    /// period.
    #[must_use]
    pub fn current_deadline(&self, offset: i64, now: i64) -> DeadlineInfo {
        let progress = (now - offset).rem_euclid(self.proving_period());
        let index = (progress / self.challenge_window).cast_unsigned();
        self.deadline(now - progress, index, now)
    }

    /// Deadline `index` in the current proving period, or in the next one if it has elapsed.
    #[must_use]
    pub fn next_deadline(&self, offset: i64, index: u64, now: i64) -> DeadlineInfo {
        let start = self.current_deadline(offset, now).period_start.0;
        let this = self.deadline(start, index, now);
        if now < this.close.0 {
            this
        } else {
            self.deadline(start + self.proving_period(), index, now)
        }
    }

    /// Whether sectors may be put into or taken out of a deadline: it neither is open nor opens
    /// next.
    #[must_use]
    pub fn is_mutable(&self, offset: i64, index: u64, now: i64) -> bool {
        now < self.next_deadline(offset, index, now).open.0 - self.challenge_window
    }

    /// Whether the PoSts of a deadline's last window may be disputed.
    #[must_use]
    pub fn is_disputable(&self, offset: i64, index: u64, now: i64) -> bool {
        let d = self.next_deadline(offset, index, now);
        !d.is_open() && now < d.close.0 - self.proving_period() + self.dispute_window
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn deadlines_are_those_of_the_network() {
        let p = Policy::devnet_2k();
        assert_eq!(p.proving_period(), 2_880);
        // (offset, now) -> (period start, index, open, close, challenge, cut-off)
        for (offset, now, want) in [
            (0, 0, (0, 0, 0, 60, -20, -70)),
            (0, 59, (0, 0, 0, 60, -20, -70)),
            (0, 60, (0, 1, 60, 120, 40, -10)),
            (0, 2_879, (0, 47, 2_820, 2_880, 2_800, 2_750)),
            (0, 2_880, (2_880, 0, 2_880, 2_940, 2_860, 2_810)),
            (100, 99, (-2_780, 47, 40, 100, 20, -30)),
            (100, 100, (100, 0, 100, 160, 80, 30)),
            (5_000, 3_000, (2_120, 14, 2_960, 3_020, 2_940, 2_890)),
        ] {
            let d = p.current_deadline(offset, now);
            let got = (
                d.period_start.0,
                d.index,
                d.open.0,
                d.close.0,
                d.challenge.0,
                d.fault_cutoff.0,
            );
            assert_eq!(got, want, "offset {offset} now {now}");
            assert!(d.is_open());
        }
    }

    #[test]
    fn the_open_and_the_next_deadline_are_immutable() {
        let p = Policy::fast();
        let open: Vec<_> = (0..p.deadlines)
            .filter(|i| !p.is_mutable(0, *i, 45))
            .collect();
        assert_eq!(open, [2, 3]);
        let disputable: Vec<_> = (0..p.deadlines)
            .filter(|i| p.is_disputable(0, *i, 45))
            .collect();
        assert_eq!(disputable, [0, 1, 4, 5]);
    }

    #[test]
    fn shorter_deadlines_keep_their_proportions() {
        for (window, lookback, cutoff) in [(6, 2, 7), (20, 6, 23), (60, 20, 70), (120, 20, 70)] {
            let p = Policy::devnet_2k().with_deadlines(6, window);
            assert_eq!((p.challenge_lookback, p.fault_cutoff), (lookback, cutoff));
            p.check().unwrap();
        }
        assert!(
            Policy {
                winning_lookback: 901,
                ..Policy::devnet_2k()
            }
            .check()
            .is_err()
        );
        assert!(
            Policy {
                fault_cutoff: 3,
                ..Policy::devnet_2k()
            }
            .check()
            .is_err()
        );
    }

    proptest! {
        #[test]
        fn exactly_one_deadline_is_open(
            n in 3u64..60, w in 6i64..80, offset in -5_000i64..5_000, now in 0i64..20_000,
        ) {
            let p = Policy::devnet_2k().with_deadlines(n, w);
            let d = p.current_deadline(offset, now);
            prop_assert!(d.is_open() && d.index < n);
            prop_assert_eq!((d.period_start.0 - offset).rem_euclid(p.proving_period()), 0);
            let open = (0..n).filter(|i| p.next_deadline(offset, *i, now).is_open()).count();
            prop_assert_eq!(open, 1);
            for i in 0..n {
                let next = p.next_deadline(offset, i, now);
                prop_assert!(now < next.close.0 && next.close.0 <= now + p.proving_period() + w);
            }
        }
    }
}
