//! Landed messages: search, wait, simulate, and what gas to offer.

use cid::Cid;
use lotus_actors::ExitCode;
use lotus_node_client::api::{
    InvocResult, Message, MessageSendSpec, MsgGasCost, MsgLookup, TipSetKey,
};
use lotus_types::{Address, Epoch, TokenAmount};

use super::Chain;
use super::store::LineDraw;
use crate::error::ChainError;
use crate::vm::{self, Applied, Env};

/// Default tip, attoFIL per unit of gas. Source: lotus, node/impl/full/gas.go, MinGasPremium.
const MIN_PREMIUM: u64 = 100_000;
/// Default limit on the fee of one message, attoFIL: 0.07 FIL, as Lotus' default maximum.
const MAX_FEE: u64 = 70_000_000_000_000_000;
/// Hundredths of the estimate that become the limit. Source: lotus, GasLimitOverestimation.
const OVERESTIMATE_PERCENT: u64 = 125;

impl Chain {
    /// Searches the chain of a tipset for a landed message. `limit` is how many epochs to look
    /// back, -1 without limit. With `allow_replaced`, a message that replaced it by fee counts.
    pub fn state_search_msg(
        &self,
        key: &TipSetKey,
        cid: &Cid,
        limit: i64,
        allow_replaced: bool,
    ) -> Result<Option<MsgLookup>, ChainError> {
        let tip = self.read().get(key)?;
        let mut candidates = vec![*cid];
        if allow_replaced {
            let store = self.read();
            if let Some(m) = store.messages.get(cid) {
                let slot = (m.message.from.to_bytes(), m.message.nonce);
                let same = |other: &Message| {
                    let m = &m.message;
                    other.to == m.to
                        && other.value == m.value
                        && other.method == m.method
                        && other.params == m.params
                };
                let others = store.by_nonce.get(&slot).into_iter().flatten();
                candidates.extend(others.filter(|c| {
                    **c != *cid && store.messages.get(*c).is_some_and(|o| same(&o.message))
                }));
            }
        }
        let oldest = if limit < 0 {
            0
        } else {
            tip.height().saturating_sub(limit)
        };
        for c in candidates {
            let at = self.read().included.get(&c).cloned().unwrap_or_default();
            for inclusion in at {
                let e = self.read().get(&inclusion)?;
                if e.height() < oldest || e.height() >= tip.height() {
                    continue;
                }
                let here = self.read().at_or_before(&tip, e.height())?;
                if here.ts.cids != e.ts.cids {
                    continue;
                }
                let child = self.read().at_or_after(&tip, e.height() + 1)?;
                let x = self.execute(&e)?;
                let Some((_, applied)) = x.applied.iter().find(|(id, _)| *id == c) else {
                    continue;
                };
                return Ok(Some(MsgLookup {
                    message: c,
                    receipt: applied.receipt.clone(),
                    return_dec: serde_json::Value::Null,
                    tip_set: child.ts.key(),
                    height: child.ts.height,
                }));
            }
        }
        Ok(None)
    }

    /// Waits until a message has landed and has `confidence` epochs on top. The caller bounds
    /// the wait.
    pub async fn state_wait_msg(
        &self,
        cid: &Cid,
        confidence: u64,
        limit: i64,
        allow_replaced: bool,
    ) -> Result<MsgLookup, ChainError> {
        let mut heads = self.watch_head();
        let confidence = i64::try_from(confidence).unwrap_or(i64::MAX);
        loop {
            heads.borrow_and_update();
            let found = self.state_search_msg(&TipSetKey::HEAD, cid, limit, allow_replaced)?;
            let head = self.head().height.0;
            if let Some(l) = found.filter(|l| head - l.height.0 >= confidence) {
                return Ok(l);
            }
            heads.changed().await.map_err(|_| ChainError::Stopping)?;
        }
    }

    /// Executes a message on top of a tipset without putting it on chain: nonce and funds for
    /// gas are given to it.
    fn simulate(&self, msg: &Message, key: &TipSetKey) -> Result<(Message, Applied), ChainError> {
        let tip = self.read().get(key)?;
        let x = self.execute(&tip)?;
        let mut state = x.state.clone();
        let mut msg = msg.clone();
        let from = state
            .lookup(&msg.from)
            .ok_or(ChainError::NoActor(msg.from))?;
        msg.nonce = state.account(from).map_or(0, |a| a.nonce);
        if msg.gas_limit == 0 {
            msg.gas_limit = self.0.policy.block_gas_limit;
        }
        let (cap, premium) = (msg.gas_fee_cap, msg.gas_premium);
        msg.gas_fee_cap = TokenAmount::default();
        msg.gas_premium = TokenAmount::default();
        let draw = LineDraw {
            store: &self.0.store,
            tip: tip.clone(),
        };
        let env = Env {
            policy: &self.0.policy,
            epoch: tip.height() + 1,
            draw: &draw,
            verifier: &self.0.verifier,
        };
        let free = TokenAmount::default();
        let applied = vm::apply_message(&mut state, &env, &free, &msg);
        msg.gas_fee_cap = cap;
        msg.gas_premium = premium;
        Ok((msg, applied))
    }

    /// `StateCall`.
    pub fn state_call(&self, msg: &Message, key: &TipSetKey) -> Result<InvocResult, ChainError> {
        let begun = std::time::Instant::now();
        let (_, applied) = self.simulate(msg, key)?;
        let cost = MsgGasCost {
            message: Some(msg.cid()),
            gas_used: TokenAmount::from_atto(applied.receipt.gas_used),
            ..MsgGasCost::default()
        };
        Ok(InvocResult {
            msg_cid: msg.cid(),
            msg: msg.clone(),
            msg_rct: Some(applied.receipt),
            gas_cost: cost,
            error: applied.error,
            duration: i64::try_from(begun.elapsed().as_nanos()).unwrap_or(i64::MAX),
        })
    }

    /// Gas that a message uses; an error if it would fail.
    pub fn gas_estimate_gas_limit(
        &self,
        msg: &Message,
        key: &TipSetKey,
    ) -> Result<u64, ChainError> {
        let (_, applied) = self.simulate(msg, key)?;
        let code = applied.receipt.exit_code;
        if code != 0 {
            let code = ExitCode::new(u32::try_from(code).unwrap_or(u32::MAX));
            return Err(ChainError::Mempool(format!(
                "message execution failed: exit {code}, reason: {}",
                applied.error
            )));
        }
        Ok(u64::try_from(applied.receipt.gas_used).unwrap_or(0))
    }

    /// Fills in gas limit, premium and fee cap where they are zero.
    pub fn gas_estimate_message_gas(
        &self,
        mut msg: Message,
        spec: Option<&MessageSendSpec>,
        key: &TipSetKey,
    ) -> Result<Message, ChainError> {
        if msg.gas_limit == 0 {
            let used = self.gas_estimate_gas_limit(&msg, key)?;
            msg.gas_limit = used * OVERESTIMATE_PERCENT / 100;
        }
        if msg.gas_premium.is_zero() {
            msg.gas_premium = self.gas_estimate_gas_premium(10, &msg.from, 0, key);
        }
        if msg.gas_fee_cap.is_zero() {
            msg.gas_fee_cap = self.gas_estimate_fee_cap(&msg, 20, key)?;
        }
        let max = spec.map(|s| s.max_fee.clone()).filter(|m| !m.is_zero());
        let max = max.unwrap_or_else(|| TokenAmount::from_atto(MAX_FEE));
        if msg.max_fee() > max {
            msg.gas_fee_cap = max.div_floor(msg.gas_limit.max(1));
            msg.gas_premium = msg.gas_premium.min(msg.gas_fee_cap.clone());
        }
        Ok(msg)
    }

    /// Fee cap that survives `max_queue_blocks` full blocks. Source: lotus,
    /// node/impl/full/gas.go, GasEstimateFeeCap.
    pub fn gas_estimate_fee_cap(
        &self,
        msg: &Message,
        max_queue_blocks: i64,
        key: &TipSetKey,
    ) -> Result<TokenAmount, ChainError> {
        let tip = self.read().get(key)?;
        let mut fee = self.execute(&tip)?.base_fee.clone();
        for _ in 0..max_queue_blocks.clamp(0, 60) {
            fee = (fee * 9u64).div_floor(8u64);
        }
        Ok(fee + &msg.gas_premium)
    }

    /// Premium with which a message lands: blocks are rarely full here.
    #[must_use]
    pub fn gas_estimate_gas_premium(
        &self,
        _blocks: u64,
        _sender: &Address,
        _gas_limit: i64,
        _key: &TipSetKey,
    ) -> TokenAmount {
        TokenAmount::from_atto(MIN_PREMIUM)
    }

    /// A pending or landed message.
    pub fn chain_get_message(&self, cid: &Cid) -> Result<Message, ChainError> {
        let store = self.read();
        let found = store.messages.get(cid).map(|m| m.message.clone());
        // A secp256k1 message is also known by the CID without its signature.
        let found = found.or_else(|| {
            let mut all = store.messages.values();
            all.find(|m| m.message.cid() == *cid)
                .map(|m| m.message.clone())
        });
        found.ok_or(ChainError::NoObject(*cid))
    }

    /// Height of the current epoch's tipset or above: what messages execute at next.
    #[must_use]
    pub fn next_epoch(&self) -> Epoch {
        Epoch(self.head().height.0 + 1)
    }
}
