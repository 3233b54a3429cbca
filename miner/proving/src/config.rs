use std::time::Duration;

use lotus_types::EpochDelta;
use serde::{Deserialize, Serialize};

/// Depth at which the chain is final: nothing below is slashed.
pub(crate) const FINALITY: EpochDelta = EpochDelta(900);

/// How sectors are checked without being challenged by the chain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckLevel {
    /// Not at all.
    Off,
    /// Their files are looked for; nothing is read.
    #[default]
    Files,
    /// A random challenge is proven.
    Proof,
}

/// `[proving]` in the hub's config.toml: WindowPoSt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProvingConfig {
    /// Whether this hub proves deadlines. Turn it off only while another process does.
    pub enabled: bool,
    /// Proofs that are made at a time. 0 is one less than there are prove workers, so that a
    /// block's proof finds a free one. Never more than there are workers, or than fit into the
    /// free memory.
    pub parallel_proofs: usize,
    /// Partitions that one message proves: 1 to 3, the network's limit. Fewer where a proof would
    /// grow too large. After a failed message each partition goes alone.
    pub partitions_per_message: u64,
    /// How the sectors that are not faulty are checked in the last deadline before their fault
    /// cut-off, so that bad ones are declared before they are challenged: "off", "files" (the
    /// files are there), or "proof" (a random challenge is proven, which costs as much as the
    /// proof itself). Faulty sectors are always checked by a proof, and declared as recovered when
    /// it succeeds.
    pub check_before_deadline: CheckLevel,
    /// Epochs on top of a submission before its partition counts as proven for good.
    pub confidence_epochs: u64,
    /// Milliseconds before a failed proof is tried again; doubles up to a minute.
    pub retry_ms: u64,
}

impl Default for ProvingConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            parallel_proofs: 0,
            partitions_per_message: 3,
            check_before_deadline: CheckLevel::Files,
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
    /// mine because of an unknown block. `lotus-miner mining allow` does the same without a
    /// restart.
    pub accept_foreign_blocks_until: i64,
    /// A hub whose mined-block log is empty looks so many epochs back for blocks of its miner
    /// before it makes its first one, and refuses if there is one: 900 is finality, and the most.
    pub first_block_look_back_epochs: i64,
    /// And if the miner has sectors that this hub did not make, it makes no block in the first so
    /// many rounds that it wins: another miner for the same actor wins the same rounds, and so
    /// would be seen. 0: off.
    pub first_block_quiet_wins: u32,
    /// After so many epochs of that one such round is enough.
    pub first_block_quiet_epochs: i64,
}

impl Default for MiningConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            propagation_delay_ms: 0,
            accept_foreign_blocks_until: -1,
            first_block_look_back_epochs: FINALITY.0,
            first_block_quiet_wins: 2,
            first_block_quiet_epochs: 2_880,
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

    /// How far back a hub looks that never made a block.
    pub(crate) fn look_back(&self) -> EpochDelta {
        EpochDelta(self.first_block_look_back_epochs.clamp(0, FINALITY.0))
    }
}
