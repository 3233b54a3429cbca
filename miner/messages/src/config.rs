use std::collections::BTreeMap;
use std::time::Duration;

use lotus_types::{Address, TokenAmount};
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
    /// Epochs after which the next message of an address that is not on chain is replaced by one
    /// with a higher fee, if fees are what keeps it off the chain.
    pub stuck_epochs: u64,
    /// What messages may cost.
    pub fees: FeesConfig,
    /// Which address pays for what.
    pub addresses: AddressConfig,
    /// When a kind of message is stopped.
    pub breaker: BreakerConfig,
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
            stuck_epochs: 10,
            fees: FeesConfig::default(),
            addresses: AddressConfig::default(),
            breaker: BreakerConfig::default(),
        }
    }
}

impl MessagesConfig {
    pub(crate) const fn repush_first(&self) -> Duration {
        Duration::from_secs(self.repush_secs)
    }

    pub(crate) const fn repush_max(&self) -> Duration {
        Duration::from_secs(self.repush_secs.saturating_mul(16))
    }

    /// What a parser cannot check.
    ///
    /// # Errors
    /// The key and what is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        if self.fees.day_epochs == 0 {
            return Err("messages.fees.day_epochs is 0".into());
        }
        let parse = |key: &str, text: &str| {
            lotus_node_client::json::parse_address(text)
                .map(drop)
                .map_err(|e| format!("messages.{key}: {text:?} is no address: {e}"))
        };
        let a = &self.addresses;
        for (key, list) in [
            ("addresses.pre_commit_control", &a.pre_commit_control),
            ("addresses.commit_control", &a.commit_control),
            ("addresses.terminate_control", &a.terminate_control),
            ("addresses.deal_publish_control", &a.deal_publish_control),
        ] {
            for text in list {
                parse(key, text)?;
            }
        }
        for text in self.fees.floors_nanofil.keys() {
            parse("fees.floors_nanofil", text)?;
        }
        Ok(())
    }
}

/// `[messages.fees]`: limits in nanoFIL. A message's limit is on its gas limit times its fee cap,
/// the most that it can cost besides the value that it carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FeesConfig {
    /// Highest network fee of a WindowPoSt message, in nanoFIL.
    pub max_window_post_nanofil: u64,
    /// Highest network fee of a fault or recovery declaration, in nanoFIL.
    pub max_declare_nanofil: u64,
    /// Highest network fee of a pre-commit message, in nanoFIL.
    pub max_pre_commit_nanofil: u64,
    /// Fixed part of the limit of a batch of pre-commits, in nanoFIL.
    pub max_pre_commit_batch_base_nanofil: u64,
    /// What each sector of a batch of pre-commits adds to its limit, in nanoFIL.
    pub max_pre_commit_batch_per_sector_nanofil: u64,
    /// Highest network fee of a prove-commit message, in nanoFIL.
    pub max_commit_nanofil: u64,
    /// Fixed part of the limit of a batch of prove-commits, in nanoFIL.
    pub max_commit_batch_base_nanofil: u64,
    /// What each sector of a batch of prove-commits adds to its limit, in nanoFIL.
    pub max_commit_batch_per_sector_nanofil: u64,
    /// Highest network fee of a termination, in nanoFIL.
    pub max_terminate_nanofil: u64,
    /// Highest network fee of a message that publishes deals, in nanoFIL.
    pub max_publish_deals_nanofil: u64,
    /// Highest network fee of any other message, in nanoFIL.
    pub max_other_nanofil: u64,
    /// Network fees of one day of everything but WindowPoSt and declarations, in nanoFIL. Messages
    /// that are under way count with the most that they can cost.
    pub max_per_day_nanofil: u64,
    /// Network fees of one day of fault and recovery declarations, in nanoFIL: theirs alone, so
    /// that a dear day of sealing leaves no sector faulty.
    pub max_declare_per_day_nanofil: u64,
    /// Network fees of one day of WindowPoSt, in nanoFIL; 0 for no limit but that of each
    /// message, because a missed deadline costs more than any fee.
    pub max_window_post_per_day_nanofil: u64,
    /// Epochs of a day. Days are counted on the chain's time from genesis, so that a clock that
    /// is set back, a restart or a chain that stands still never gives a second allowance.
    pub day_epochs: u64,
    /// What every sending address keeps for WindowPoSt and declarations, in nanoFIL: no other
    /// message may take the balance below it.
    pub floor_nanofil: u64,
    /// The part of it that is for WindowPoSt alone, in nanoFIL: no fault or recovery declaration
    /// may take the balance below it.
    pub declare_floor_nanofil: u64,
    /// What single addresses keep instead of `floor_nanofil`, in nanoFIL, by address.
    pub floors_nanofil: BTreeMap<String, u64>,
}

impl Default for FeesConfig {
    fn default() -> Self {
        Self {
            // Lotus, node/config/def.go, MinerFeeConfig.
            max_window_post_nanofil: 5_000_000_000,
            max_declare_nanofil: 500_000_000,
            max_pre_commit_nanofil: 25_000_000,
            max_pre_commit_batch_base_nanofil: 0,
            max_pre_commit_batch_per_sector_nanofil: 20_000_000,
            max_commit_nanofil: 50_000_000,
            max_commit_batch_base_nanofil: 0,
            max_commit_batch_per_sector_nanofil: 30_000_000,
            max_terminate_nanofil: 500_000_000,
            max_publish_deals_nanofil: 50_000_000,
            max_other_nanofil: 50_000_000,
            // Ours: about 200 sectors at the limits above.
            max_per_day_nanofil: 10_000_000_000,
            // Ours: each deadline of a day once, at the limit above.
            max_declare_per_day_nanofil: 24_000_000_000,
            max_window_post_per_day_nanofil: 0,
            day_epochs: 2_880,
            floor_nanofil: 100_000_000,
            declare_floor_nanofil: 50_000_000,
            floors_nanofil: BTreeMap::new(),
        }
    }
}

impl FeesConfig {
    /// The fee limit of a message of this kind about so many sectors.
    #[must_use]
    pub fn max_fee(&self, kind: MessageKind, sectors: u64) -> TokenAmount {
        let batch = |single: u64, base: u64, each: u64| {
            single.max(base.saturating_add(each.saturating_mul(sectors)))
        };
        TokenAmount::from_nano(match kind {
            MessageKind::Post => self.max_window_post_nanofil,
            MessageKind::Declare => self.max_declare_nanofil,
            MessageKind::PreCommit => batch(
                self.max_pre_commit_nanofil,
                self.max_pre_commit_batch_base_nanofil,
                self.max_pre_commit_batch_per_sector_nanofil,
            ),
            MessageKind::Commit => batch(
                self.max_commit_nanofil,
                self.max_commit_batch_base_nanofil,
                self.max_commit_batch_per_sector_nanofil,
            ),
            MessageKind::Terminate => self.max_terminate_nanofil,
            MessageKind::Publish => self.max_publish_deals_nanofil,
            MessageKind::Operator | MessageKind::Other => self.max_other_nanofil,
        })
    }

    /// What an address keeps when it pays for a message of this kind. It is known by its ID and
    /// its key form.
    #[must_use]
    pub fn floor(&self, kind: MessageKind, forms: &[Address]) -> TokenAmount {
        let own = self.floors_nanofil.iter().find(|(text, _)| {
            lotus_node_client::json::parse_address(text).is_ok_and(|a| forms.contains(&a))
        });
        let floor = own.map_or(self.floor_nanofil, |(_, n)| *n);
        TokenAmount::from_nano(match kind {
            MessageKind::Post | MessageKind::Operator => 0,
            MessageKind::Declare => floor.min(self.declare_floor_nanofil),
            _ => floor,
        })
    }
}

/// `[messages.addresses]`: addresses that pay, beside the worker and the owner. They must be
/// control addresses of the miner (`lotus-miner actor control set`), and the node's wallet must
/// hold their keys. The first with enough funds pays. Control addresses that are named nowhere
/// here are for WindowPoSt and for declarations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AddressConfig {
    /// Addresses that pay for pre-commits.
    pub pre_commit_control: Vec<String>,
    /// Addresses that pay for prove-commits.
    pub commit_control: Vec<String>,
    /// Addresses that pay for terminations.
    pub terminate_control: Vec<String>,
    /// Addresses that pay for publishing deals.
    pub deal_publish_control: Vec<String>,
    /// Leave the owner's funds alone. WindowPoSt takes them all the same when nothing else has
    /// funds and the node's wallet holds the owner's key.
    pub disable_owner_fallback: bool,
    /// Leave the worker's funds alone where a control address is named. WindowPoSt takes them all
    /// the same when nothing else has funds.
    pub disable_worker_fallback: bool,
}

/// `[messages.breaker]`: when sending one kind of message stops by itself. WindowPoSt and what an
/// operator orders never stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerConfig {
    /// Messages of one kind in a row that the chain would refuse, before the kind stops.
    pub max_refusals: u32,
    /// Messages of one kind in a row that failed on chain, before the kind stops.
    pub max_failures: u32,
    /// Epochs of the first stop; each further one lasts twice as long.
    pub pause_epochs: u64,
    /// Longest stop, in epochs.
    pub pause_max_epochs: u64,
    /// Longest stop of fault and recovery declarations, in epochs: they have a cut-off, and what
    /// is not declared recovered pays fees.
    pub declare_pause_max_epochs: u64,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            max_refusals: 10,
            max_failures: 3,
            // 10 minutes to 6 hours at 30 s.
            pause_epochs: 20,
            pause_max_epochs: 720,
            declare_pause_max_epochs: 5,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_have_room_for_each_sector() {
        let fees = FeesConfig::default();
        for (kind, sectors, nano) in [
            (MessageKind::Post, 9, 5_000_000_000u64),
            (MessageKind::PreCommit, 1, 25_000_000),
            (MessageKind::PreCommit, 256, 5_120_000_000),
            (MessageKind::Commit, 0, 50_000_000),
            (MessageKind::Commit, 2, 60_000_000),
        ] {
            assert_eq!(fees.max_fee(kind, sectors), TokenAmount::from_nano(nano));
        }
    }

    #[test]
    fn mistakes_name_the_key() {
        let mut cfg = MessagesConfig::default();
        cfg.check().unwrap();
        cfg.addresses.commit_control = vec!["t0100".into(), "nobody".into()];
        let why = cfg.check().unwrap_err();
        assert!(why.contains("commit_control") && why.contains("nobody"));
        cfg.addresses = AddressConfig::default();
        cfg.fees.floors_nanofil.insert("t0100".into(), 7);
        cfg.check().unwrap();
        for (kind, id, nano) in [
            (MessageKind::Commit, 100, 7u64),
            (MessageKind::Commit, 101, 100_000_000),
            // The last funds are for WindowPoSt, the last but one for declarations.
            (MessageKind::Declare, 100, 7),
            (MessageKind::Declare, 101, 50_000_000),
            (MessageKind::Post, 101, 0),
            (MessageKind::Operator, 101, 0),
        ] {
            let floor = cfg.fees.floor(kind, &[Address::new_id(id)]);
            assert_eq!(floor, TokenAmount::from_nano(nano), "{kind:?} {id}");
        }
    }
}
