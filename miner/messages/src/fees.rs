//! What messages cost and may cost: pure.

use lotus_types::{Epoch, TokenAmount};
use serde::{Deserialize, Serialize};

use crate::{FeesConfig, MessageKind};

/// Whose daily limit a message's fee counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purse {
    /// WindowPoSt, and what another message costs more because WindowPoSt waits behind it.
    Post,
    /// Declarations of faults and recoveries: they can not wait for a day on which sealing was
    /// cheaper.
    Declare,
    /// Everything else.
    Rest,
}

impl Purse {
    /// Every purse, the most urgent first.
    pub const ALL: [Self; 3] = [Self::Post, Self::Declare, Self::Rest];

    /// That of a kind of message.
    #[must_use]
    pub const fn of(kind: MessageKind) -> Self {
        match kind {
            MessageKind::Post => Self::Post,
            MessageKind::Declare => Self::Declare,
            _ => Self::Rest,
        }
    }

    /// Name in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Post => "post",
            Self::Declare => "declare",
            Self::Rest => "rest",
        }
    }

    /// Its limit for a day, if it has one.
    pub(crate) fn cap(self, cfg: &FeesConfig) -> Option<TokenAmount> {
        match self {
            Self::Post if cfg.max_window_post_per_day_nanofil == 0 => None,
            Self::Post => Some(cfg.max_window_post_per_day_nanofil),
            Self::Declare => Some(cfg.max_declare_per_day_nanofil),
            Self::Rest => Some(cfg.max_per_day_nanofil),
        }
        .map(TokenAmount::from_nano)
    }
}

/// Fees by purse, attoFIL.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fees {
    pub(crate) post: TokenAmount,
    #[serde(default)]
    pub(crate) declare: TokenAmount,
    pub(crate) rest: TokenAmount,
}

impl Fees {
    pub(crate) const fn of(&self, purse: Purse) -> &TokenAmount {
        match purse {
            Purse::Post => &self.post,
            Purse::Declare => &self.declare,
            Purse::Rest => &self.rest,
        }
    }

    pub(crate) fn add(&mut self, purse: Purse, fee: &TokenAmount) {
        match purse {
            Purse::Post => self.post += fee,
            Purse::Declare => self.declare += fee,
            Purse::Rest => self.rest += fee,
        }
    }
}

/// Number of the chain's day, from genesis.
pub(crate) fn day(cfg: &FeesConfig, now: Epoch) -> u64 {
    u64::try_from(now.0.max(0)).unwrap_or(0) / cfg.day_epochs.max(1)
}

/// First epoch of a day.
pub(crate) fn day_begins(cfg: &FeesConfig, day: u64) -> Epoch {
    Epoch(i64::try_from(day.saturating_mul(cfg.day_epochs.max(1))).unwrap_or(i64::MAX))
}

/// A day's limit that a message would go over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverCap {
    /// The limit.
    pub cap: TokenAmount,
    /// Paid today.
    pub spent: TokenAmount,
    /// The most that messages under way may still cost.
    pub reserved: TokenAmount,
}

/// Whether a message that costs `fee` at most fits the day.
pub(crate) fn fits(
    cfg: &FeesConfig,
    kind: MessageKind,
    spent: &Fees,
    reserved: &Fees,
    fee: &TokenAmount,
) -> Result<(), OverCap> {
    let purse = Purse::of(kind);
    let Some(cap) = purse.cap(cfg) else {
        return Ok(());
    };
    let (spent, reserved) = (spent.of(purse).clone(), reserved.of(purse).clone());
    // What an operator orders was shown before; it counts, but is not held back.
    if kind == MessageKind::Operator || &spent + &reserved + fee <= cap {
        return Ok(());
    }
    Err(OverCap {
        cap,
        spent,
        reserved,
    })
}

/// Gas and its price.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Gas {
    pub(crate) limit: u64,
    pub(crate) fee_cap: TokenAmount,
    pub(crate) premium: TokenAmount,
}

impl Gas {
    /// The most that it can cost.
    pub(crate) fn max_fee(&self) -> TokenAmount {
        &self.fee_cap * self.limit
    }

    /// What it cost in a tipset of this base fee. Source: FVM, gas/outputs.rs.
    pub(crate) fn paid(&self, used: u64, base_fee: &TokenAmount) -> TokenAmount {
        let base = base_fee.clone().min(self.fee_cap.clone());
        let tip = self.premium.clone().min(&self.fee_cap - &base);
        let burnt = used.min(self.limit) + over_estimation(self.limit, used);
        base * burnt + tip * self.limit
    }
}

/// Gas that is burnt because the limit was too far above the use: nothing up to a tenth, all of
/// the excess from twice the use.
fn over_estimation(limit: u64, used: u64) -> u64 {
    if used == 0 {
        return limit;
    }
    let (limit, used) = (u128::from(limit), u128::from(used));
    let excess = limit.saturating_sub(used * 11 / 10).min(used);
    u64::try_from(limit.saturating_sub(used) * excess / used).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn atto(n: u64) -> TokenAmount {
        TokenAmount::from_atto(n)
    }

    #[test]
    fn a_day_has_its_limit() {
        let cfg = FeesConfig {
            max_per_day_nanofil: 10,
            max_window_post_per_day_nanofil: 0,
            max_declare_per_day_nanofil: 5,
            day_epochs: 100,
            ..FeesConfig::default()
        };
        let fees = |post, rest| Fees {
            post: TokenAmount::from_nano(post),
            declare: TokenAmount::from_nano(3),
            rest: TokenAmount::from_nano(rest),
        };
        for (kind, spent, reserved, fee, ok) in [
            (MessageKind::Commit, (0, 4), (0, 4), 2, true),
            (MessageKind::Commit, (0, 4), (0, 4), 3, false),
            (MessageKind::Commit, (99, 4), (99, 4), 2, true),
            (MessageKind::Post, (99, 10), (99, 10), 99, true),
            (MessageKind::Operator, (0, 10), (0, 0), 9, true),
            // Of declarations 3 are spent; a dear day of sealing takes nothing from them.
            (MessageKind::Declare, (0, 10), (0, 10), 3, false),
        ] {
            let (spent, reserved) = (fees(spent.0, spent.1), fees(reserved.0, reserved.1));
            let fits = fits(&cfg, kind, &spent, &reserved, &TokenAmount::from_nano(fee));
            assert_eq!(fits.is_ok(), ok, "{kind:?} {spent:?} {reserved:?} {fee}");
        }
        let mut quiet = fees(0, 10);
        quiet.declare = TokenAmount::default();
        let two = TokenAmount::from_nano(2);
        assert!(fits(&cfg, MessageKind::Declare, &fees(0, 10), &quiet, &two).is_ok());
        let own = FeesConfig {
            max_window_post_per_day_nanofil: 5,
            ..cfg.clone()
        };
        let all = fees(5, 0);
        let one = TokenAmount::from_nano(1);
        let over = fits(&own, MessageKind::Post, &all, &fees(0, 0), &one).unwrap_err();
        assert_eq!(over.cap, TokenAmount::from_nano(5));
        for (epoch, number) in [(-1, 0), (0, 0), (99, 0), (100, 1), (250, 2)] {
            assert_eq!(day(&cfg, Epoch(epoch)), number);
        }
        assert_eq!(day_begins(&cfg, 3), Epoch(300));
    }

    proptest! {
        /// No message costs more than was reserved for it, nor less than its base fee.
        #[test]
        fn the_price_is_within_the_limit(
            limit in 1u64..10_000_000_000, share in 0u64..=100, cap in 0u64..1 << 40,
            premium in 0u64..1 << 40, base in 0u64..1 << 41,
        ) {
            let gas = Gas { limit, fee_cap: atto(cap), premium: atto(premium.min(cap)) };
            let used = limit / 100 * share;
            let paid = gas.paid(used, &atto(base));
            prop_assert!(paid <= gas.max_fee());
            prop_assert!(paid >= atto(base.min(cap)) * used);
        }
    }
}
