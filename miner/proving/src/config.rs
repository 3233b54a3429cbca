use std::time::Duration;

use lotus_types::Epoch;
use serde::{Deserialize, Serialize};

/// `[proving]` in the hub's config.toml: WindowPoSt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProvingConfig {
    /// Whether this hub proves deadlines. Turn it off only while another process does.
    pub enabled: bool,
    /// Partitions of one deadline that are proved at a time.
    pub parallel_partitions: usize,
    /// Whether every sector is read and checked before the fault cut-off of its deadline, so that
    /// bad sectors are declared faulty and readable ones recovered. Costs as much as the proof.
    pub check_before_deadline: bool,
    /// Epochs on top of a submission before its partition counts as proven for good.
    pub confidence_epochs: u64,
    /// Milliseconds before a failed proof is tried again; doubles up to a minute.
    pub retry_ms: u64,
}

impl Default for ProvingConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            parallel_partitions: 1,
            check_before_deadline: true,
            confidence_epochs: 1,
            retry_ms: 500,
        }
    }
}

impl ProvingConfig {
    pub(crate) const fn retry_first(&self) -> Duration {
        Duration::from_millis(self.retry_ms)
    }
}

/// `[mining]` in the hub's config.toml: block production.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MiningConfig {
    /// Whether this hub makes blocks.
    pub enabled: bool,
    /// Milliseconds after the start of an epoch in which its blocks may arrive. 0 is a third of
    /// an epoch, at most 10 s (Lotus: 10 s on mainnet).
    pub propagation_delay_ms: u64,
    /// Blocks of this miner up to this height may be missing from the mined-block log: set it,
    /// after making sure that no other hub or miner runs for this actor, when the hub refuses to
    /// mine because of an unknown block.
    pub accept_foreign_blocks_until: i64,
}

impl Default for MiningConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            propagation_delay_ms: 0,
            accept_foreign_blocks_until: -1,
        }
    }
}

impl MiningConfig {
    pub(crate) fn propagation(&self, block_delay: Duration) -> Duration {
        match self.propagation_delay_ms {
            0 => (block_delay / 3).min(Duration::from_secs(10)),
            ms => Duration::from_millis(ms),
        }
    }

    pub(crate) const fn accepts(&self, height: Epoch) -> bool {
        height.0 <= self.accept_foreign_blocks_until
    }
}
