//! A simple gas schedule under a moving base fee.

use lotus_actors::{METHOD_SEND, miner};
use lotus_node_client::api::Message;
use lotus_types::TokenAmount;

use crate::policy::Policy;

/// Gas of any message.
const BASE: u64 = 500_000;
/// Gas of a parameter byte. Source: FVM price list, on_chain_message_storage.
const PER_BYTE: u64 = 1_300;
/// Bytes that are charged at most: proofs without SNARKs are long, and the devnet lifts the
/// limits on their size only.
const CHARGED_BYTES: u64 = 16 << 10;

/// Gas that a message uses: it depends on its method and its size alone.
pub(super) fn of(msg: &Message) -> u64 {
    let bytes = u64::try_from(msg.params.len()).unwrap_or(u64::MAX);
    let work = match msg.method {
        METHOD_SEND => 0,
        miner::PROVE_COMMIT_SECTORS3 | miner::PROVE_REPLICA_UPDATES3 => 60_000_000,
        miner::SUBMIT_WINDOWED_POST => 30_000_000,
        miner::PRE_COMMIT_SECTOR_BATCH2 => 15_000_000,
        miner::TERMINATE_SECTORS | miner::DISPUTE_WINDOWED_POST => 50_000_000,
        _ => 5_000_000,
    };
    BASE + work + PER_BYTE * bytes.min(CHARGED_BYTES)
}

/// Who pays what for a message, attoFIL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Burnt as base fee.
    pub base_fee_burn: TokenAmount,
    /// Burnt because the limit was far above the use.
    pub over_estimation_burn: TokenAmount,
    /// For the block's miner.
    pub tip: TokenAmount,
    /// Given back.
    pub refund: TokenAmount,
}

impl Cost {
    /// Everything burnt.
    #[must_use]
    pub fn burnt(&self) -> TokenAmount {
        &self.base_fee_burn + &self.over_estimation_burn
    }

    /// Everything that the sender pays.
    #[must_use]
    pub fn total(&self) -> TokenAmount {
        self.burnt() + &self.tip
    }
}

/// Splits a message's fee. Source: FVM, gas/outputs.rs, GasOutputs::compute.
pub(super) fn settle(msg: &Message, used: u64, base_fee: &TokenAmount) -> Cost {
    let fee = base_fee.clone().min(msg.gas_fee_cap.clone());
    let premium = msg.gas_premium.clone().min(&msg.gas_fee_cap - &fee);
    let over = over_estimation(msg.gas_limit, used);
    let mut cost = Cost {
        base_fee_burn: &fee * used,
        over_estimation_burn: &fee * over,
        tip: &premium * msg.gas_limit,
        refund: TokenAmount::default(),
    };
    cost.refund = msg.max_fee() - cost.total();
    cost
}

/// Gas burnt on top, to keep limits honest: nothing up to a tenth above the use, all of the
/// excess from twice the use.
fn over_estimation(limit: u64, used: u64) -> u64 {
    if used == 0 {
        return limit;
    }
    let (limit, used) = (u128::from(limit), u128::from(used));
    let excess = limit.saturating_sub(used * 11 / 10).min(used);
    u64::try_from(limit.saturating_sub(used) * excess / used).unwrap_or(u64::MAX)
}

/// The base fee after a tipset: up to an eighth up or down, by how full its blocks were. Source:
/// lotus, chain/store/basefee.go, ComputeNextBaseFee.
#[must_use]
pub fn next_base_fee(
    policy: &Policy,
    base_fee: &TokenAmount,
    gas_limit: u64,
    blocks: usize,
) -> TokenAmount {
    let target = i128::from(policy.block_gas_limit / 2).max(1);
    let blocks = i128::try_from(blocks.max(1)).unwrap_or(1);
    let delta = (i128::from(gas_limit) / blocks - target).clamp(-target, target);
    let step = base_fee.atto() * delta / target / 8;
    let next = TokenAmount::from_atto(base_fee.atto() + step);
    next.max(TokenAmount::from_atto(policy.base_fee_min))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_types::Address;

    fn msg(limit: u64, cap: u64, premium: u64) -> Message {
        Message {
            version: 0,
            to: Address::new_id(1),
            from: Address::new_id(2),
            nonce: 0,
            value: TokenAmount::default(),
            gas_limit: limit,
            gas_fee_cap: TokenAmount::from_atto(cap),
            gas_premium: TokenAmount::from_atto(premium),
            method: 0,
            params: vec![],
        }
    }

    #[test]
    fn fees_split_without_loss() {
        for (limit, cap, premium, used, base) in [
            (1_000, 100, 10, 1_000, 50),
            (5_000, 100, 10, 1_000, 50),
            (1_050, 100, 10, 1_000, 99),
            (1_000, 20, 10, 1_000, 50),
            (1_000, 100, 100, 0, 50),
        ] {
            let m = msg(limit, cap, premium);
            let c = settle(&m, used, &TokenAmount::from_atto(base));
            assert_eq!(c.total() + &c.refund, m.max_fee());
            assert!(
                !c.refund.is_negative(),
                "{limit} {cap} {premium} {used} {base}"
            );
        }
        assert_eq!(over_estimation(1_100, 1_000), 0);
        assert_eq!(over_estimation(3_000, 1_000), 2_000);
    }

    #[test]
    fn the_base_fee_moves_by_an_eighth_at_most() {
        let p = Policy::devnet_2k();
        let fee = TokenAmount::from_atto(8_000);
        for (gas, want) in [
            (0, 7_000),
            (p.block_gas_limit / 2, 8_000),
            (p.block_gas_limit, 9_000),
            (u64::MAX, 9_000),
        ] {
            assert_eq!(
                next_base_fee(&p, &fee, gas, 1),
                TokenAmount::from_atto(want)
            );
        }
        let least = TokenAmount::from_atto(p.base_fee_min);
        assert_eq!(next_base_fee(&p, &least, 0, 1), least);
    }
}
