use std::time::Duration;

use lotus_types::TokenAmount;
use serde::{Deserialize, Serialize};

use crate::MessageKind;

/// `[messages]` in the hub's config.toml.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MessagesConfig {
    /// Epochs that must lie on top of a message's receipt before it counts.
    pub confidence_epochs: u64,
    /// Epochs after which a receipt is taken for permanent and its message is no longer watched.
    pub finality_epochs: u64,
    /// Seconds that one request may take until its message is journaled.
    pub send_secs: u64,
    /// Seconds that one wait for a receipt may take before its caller is told to ask again.
    pub wait_secs: u64,
    /// Seconds between two pushes of a message that is not on chain yet; doubles up to sixteen
    /// times this.
    pub repush_secs: u64,
    /// Requests that may wait for their writer.
    pub max_queued: u64,
    /// Highest network fee (gas limit times fee cap) of a WindowPoSt message, in nanoFIL.
    pub max_post_fee_nanofil: u64,
    /// Highest network fee of a pre-commit message, in nanoFIL.
    pub max_pre_commit_fee_nanofil: u64,
    /// Highest network fee of a prove-commit message, in nanoFIL.
    pub max_commit_fee_nanofil: u64,
    /// Highest network fee of a fault or recovery declaration, in nanoFIL.
    pub max_declare_fee_nanofil: u64,
    /// Highest network fee of any other message, in nanoFIL.
    pub max_other_fee_nanofil: u64,
}

impl Default for MessagesConfig {
    fn default() -> Self {
        Self {
            confidence_epochs: 5,
            finality_epochs: 900,
            send_secs: 60,
            wait_secs: 3_600,
            repush_secs: 30,
            max_queued: 1_024,
            // Lotus: MaxWindowPoStGasFee 5 FIL, MaxPreCommitGasFee 0.025, MaxCommitGasFee 0.05,
            // plus what its batches add per sector.
            max_post_fee_nanofil: 5_000_000_000,
            max_pre_commit_fee_nanofil: 50_000_000,
            max_commit_fee_nanofil: 100_000_000,
            max_declare_fee_nanofil: 500_000_000,
            max_other_fee_nanofil: 50_000_000,
        }
    }
}

impl MessagesConfig {
    /// The fee limit of a kind.
    #[must_use]
    pub fn max_fee(&self, kind: MessageKind) -> TokenAmount {
        TokenAmount::from_nano(match kind {
            MessageKind::Post => self.max_post_fee_nanofil,
            MessageKind::PreCommit => self.max_pre_commit_fee_nanofil,
            MessageKind::Commit => self.max_commit_fee_nanofil,
            MessageKind::Declare => self.max_declare_fee_nanofil,
            MessageKind::Other => self.max_other_fee_nanofil,
        })
    }

    pub(crate) const fn repush_first(&self) -> Duration {
        Duration::from_secs(self.repush_secs)
    }

    pub(crate) const fn repush_max(&self) -> Duration {
        Duration::from_secs(self.repush_secs.saturating_mul(16))
    }
}
