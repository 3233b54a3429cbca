//! The fee with which a message replaces itself that does not get on chain: pure.

use lotus_types::TokenAmount;

use crate::fees::Gas;

/// Hundredths to which a replacement raises the premium. A mempool asks for 110 at least. Source:
/// lotus, chain/messagepool, ReplaceByFeePercentageMinimum and ReplaceByFeePercentageDefault.
const RAISE_PERCENT: u64 = 125;
/// Base fees that the new cap has room for: it doubles in six full blocks.
const HEADROOM: u64 = 2;

/// What decides.
#[derive(Clone, Debug)]
pub(crate) struct Market {
    /// Base fee of the next tipset.
    pub(crate) base_fee: TokenAmount,
    /// Premium with which a message lands soon.
    pub(crate) premium: TokenAmount,
}

/// Why a stuck message stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stays {
    /// Its fee is good: something else keeps it off the chain.
    FeeIsGood,
    /// What it would take is above its limit.
    Limit,
}

/// The higher price of a message that may cost `limit`.
pub(crate) fn raised(gas: &Gas, market: &Market, limit: &TokenAmount) -> Result<Gas, Stays> {
    if gas.limit == 0 {
        return Err(Stays::FeeIsGood);
    }
    let tip = (&gas.fee_cap - &market.base_fee).min(gas.premium.clone());
    if !tip.is_negative() && tip >= market.premium {
        return Err(Stays::FeeIsGood);
    }
    let least = (&gas.premium * RAISE_PERCENT).div_ceil(100u64) + TokenAmount::from_atto(1);
    let premium = least.clone().max(market.premium.clone());
    let wanted = (&market.base_fee * HEADROOM + &premium).max(gas.fee_cap.clone());
    let fee_cap = wanted.min(limit.div_floor(gas.limit));
    // Within the limit, a premium that is not the best is better than no landing.
    let premium = premium.min(fee_cap.clone());
    if fee_cap <= market.base_fee || premium < least {
        return Err(Stays::Limit);
    }
    Ok(Gas {
        limit: gas.limit,
        fee_cap,
        premium,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn atto(n: u64) -> TokenAmount {
        TokenAmount::from_atto(n)
    }

    fn gas(cap: u64, premium: u64) -> Gas {
        Gas {
            limit: 10,
            fee_cap: atto(cap),
            premium: atto(premium),
        }
    }

    #[test]
    fn fees_rise_only_where_fees_are_the_trouble() {
        for (cap, premium, base, market, limit, want) in [
            // The fee pays base and premium: the trouble is elsewhere.
            (200, 10, 100, 10, 100_000, Err(Stays::FeeIsGood)),
            // The base fee went above the cap.
            (200, 10, 300, 10, 100_000, Ok((614, 14))),
            // Others pay more.
            (200, 10, 100, 50, 100_000, Ok((250, 50))),
            // What is left above the base fee is less than the premium.
            (105, 10, 100, 10, 100_000, Ok((214, 14))),
            // The limit leaves less headroom, but enough.
            (200, 10, 300, 10, 4_000, Ok((400, 14))),
            (200, 10, 300, 10, 3_000, Err(Stays::Limit)),
            (200, 190, 150, 60, 2_100, Err(Stays::Limit)),
            (200, 0, 300, 0, 100_000, Ok((601, 1))),
        ] {
            let market = Market {
                base_fee: atto(base),
                premium: atto(market),
            };
            let got = raised(&gas(cap, premium), &market, &atto(limit));
            let want = want.map(|(c, p)| gas(c, p));
            assert_eq!(got, want, "cap {cap} premium {premium} base {base}");
        }
    }

    proptest! {
        /// A replacement keeps the mempool's rule, the limit, and can land.
        #[test]
        fn replacements_are_valid(
            limit in 1u64..1 << 34, cap in 0u64..1 << 34, premium in 0u64..1 << 34,
            base in 0u64..1 << 34, market in 0u64..1 << 34, budget in 0u64..u64::MAX,
        ) {
            let old = Gas { limit, fee_cap: atto(cap), premium: atto(premium.min(cap)) };
            let market = Market { base_fee: atto(base), premium: atto(market) };
            if let Ok(new) = raised(&old, &market, &atto(budget)) {
                prop_assert!(new.premium > (&old.premium * 110u64).div_floor(100u64));
                prop_assert!(new.premium <= new.fee_cap);
                prop_assert!(new.fee_cap > market.base_fee);
                prop_assert!(new.max_fee() <= atto(budget));
                prop_assert_eq!(new.limit, old.limit);
            }
        }

        /// A message is replaced a bounded number of times before its limit is reached.
        #[test]
        fn replacing_ends(cap in 1u64..1 << 30, premium in 0u64..1 << 30) {
            let mut now = Gas { limit: 1, fee_cap: atto(cap), premium: atto(premium.min(cap)) };
            let market = Market { base_fee: atto(1 << 20), premium: atto(1 << 62) };
            let mut rounds = 0;
            while let Ok(next) = raised(&now, &market, &atto(1 << 62)) {
                (now, rounds) = (next, rounds + 1);
                prop_assert!(rounds < 200);
            }
        }
    }
}
