//! Messages that wait for a block.

use std::collections::BTreeMap;
use std::sync::Arc;

use lotus_node_client::api::{
    HeadChange, HeadChangeKind, Message, MessageSendSpec, SignedMessage, TipSetKey,
};
use lotus_types::{Address, TokenAmount};

use super::store::{Entry, Executed};
use super::{Chain, lock};
use crate::error::ChainError;
use crate::keys;
use crate::state::ActorKind;

/// Pending messages of one sender. Source: lotus, chain/messagepool, MaxActorPendingMessages.
const PER_SENDER: usize = 1_000;
/// Bytes of one message: vanilla proofs are long.
const MESSAGE_MAX: usize = 64 << 20;
/// Messages of one block. Source: lotus, build/buildconstants, BlockMessageLimit.
const PER_BLOCK: usize = 10_000;
/// A replacement must raise the premium to this many hundredths.
/// Source: lotus, chain/messagepool, ReplaceByFeePercentageMinimum.
const REPLACE_PERCENT: u64 = 110;

#[derive(Debug, Default)]
pub(super) struct Pool {
    /// By the sender's key address and nonce.
    senders: BTreeMap<Vec<u8>, BTreeMap<u64, Arc<SignedMessage>>>,
    /// Pushes still to refuse, and why.
    refuse: Option<(u64, String)>,
}

impl Pool {
    fn remove(&mut self, sender: &Address, nonce: u64) {
        let key = sender.to_bytes();
        if let Some(of) = self.senders.get_mut(&key) {
            of.remove(&nonce);
            if of.is_empty() {
                self.senders.remove(&key);
            }
        }
    }
}

fn refused(why: impl Into<String>) -> ChainError {
    ChainError::Mempool(why.into())
}

impl Chain {
    /// Refuses the next pushes.
    pub fn refuse_messages(&self, count: u64, why: String) {
        lock(&self.0.pool).refuse = (count > 0).then_some((count, why));
    }

    /// Loads pending messages after a restart.
    pub(super) fn reload_pool(&self) -> Result<(), ChainError> {
        let mut all = self.0.disk.pending()?;
        all.sort_by_key(|m| m.message.nonce);
        for m in all {
            let m = Arc::new(m);
            self.write().note_message(&m);
            // One that meanwhile landed or lost its funds is dropped here.
            if let Err(e) = self.pool_add(&m) {
                tracing::debug!(cid = %m.cid(), "pending message dropped: {e}");
                self.0.disk.remove_pending(&m.cid())?;
            }
        }
        Ok(())
    }

    /// Publishes a signed message. Pushing the same message again is harmless.
    pub fn mpool_push(&self, m: SignedMessage) -> Result<cid::Cid, ChainError> {
        let cid = m.cid();
        {
            let mut pool = lock(&self.0.pool);
            if let Some((left, why)) = &mut pool.refuse {
                let why = why.clone();
                *left -= 1;
                if *left == 0 {
                    pool.refuse = None;
                }
                return Err(ChainError::Fault(why));
            }
        }
        let m = Arc::new(m);
        self.pool_add(&m)?;
        self.0.disk.put_pending(&m)?;
        self.write().note_message(&m);
        Ok(cid)
    }

    fn pool_add(&self, m: &Arc<SignedMessage>) -> Result<(), ChainError> {
        let msg = &m.message;
        if msg.params.len() > MESSAGE_MAX {
            return Err(refused("message too big"));
        }
        if msg.version != 0 {
            return Err(refused("'Version' unsupported"));
        }
        if msg.value.is_negative() || msg.gas_premium.is_negative() {
            return Err(refused(
                "'Value' and 'GasPremium' fields cannot be negative",
            ));
        }
        if msg.gas_fee_cap < msg.gas_premium {
            return Err(refused("'GasFeeCap' less than 'GasPremium'"));
        }
        if msg.gas_limit == 0 || msg.gas_limit > self.0.policy.block_gas_limit {
            return Err(refused(
                "'GasLimit' field must be between 1 and a block's gas limit",
            ));
        }
        if msg.gas_fee_cap < TokenAmount::from_atto(self.0.policy.base_fee_min) {
            return Err(refused("gas fee cap too low"));
        }
        let head = self.read().head.clone();
        let state = &self.execute(&head)?.state;
        let Some(from) = state.lookup(&msg.from) else {
            return Err(refused(format!("actor not found: {}", msg.from)));
        };
        let account = state.account(from).filter(|a| a.kind == ActorKind::Account);
        let Some((account, key)) = account.and_then(|a| Some((a, a.address?))) else {
            return Err(refused(format!(
                "sender {} is not an account actor",
                msg.from
            )));
        };
        if !keys::verify(&m.signature, &msg.cid().to_bytes(), &key) {
            return Err(refused("signature verification failed"));
        }
        if msg.nonce < account.nonce {
            return Err(refused(format!(
                "minimum expected nonce is {}: message nonce too low",
                account.nonce
            )));
        }
        let mut pool = lock(&self.0.pool);
        let of = pool.senders.entry(key.to_bytes()).or_default();
        if let Some(old) = of.get(&msg.nonce) {
            if old.cid() == m.cid() {
                return Ok(());
            }
            let premium = &old.message.gas_premium * REPLACE_PERCENT;
            let least = premium.div_floor(100u64) + TokenAmount::from_atto(1);
            if msg.gas_premium < least {
                return Err(refused(format!(
                    "message from {} with nonce {} already in mpool, increase GasPremium to {} \
                     from {} to trigger replace by fee: replace by fee has too low GasPremium",
                    msg.from,
                    msg.nonce,
                    least.atto(),
                    msg.gas_premium.atto()
                )));
            }
        } else {
            if of.len() >= PER_SENDER {
                return Err(refused("too many pending messages for actor"));
            }
            let mut next = account.nonce;
            while of.contains_key(&next) {
                next += 1;
            }
            if msg.nonce > next {
                return Err(refused(format!(
                    "message nonce {} is {} too high: unfulfilled nonce gap",
                    msg.nonce,
                    msg.nonce - next
                )));
            }
        }
        let mut need = msg.max_fee() + &msg.value;
        for other in of.values().filter(|o| o.message.nonce != msg.nonce) {
            need += other.message.max_fee() + &other.message.value;
        }
        if account.balance < need {
            return Err(refused(format!(
                "not enough funds including pending messages (required: {}, balance: {}): not \
                 enough funds to execute transaction",
                need.atto(),
                account.balance.atto()
            )));
        }
        of.insert(msg.nonce, m.clone());
        Ok(())
    }

    /// Keeps the pool in step with the head: what landed leaves, what was reverted comes back.
    pub(super) fn update_pool(&self, path: &[HeadChange]) {
        let mut back = Vec::new();
        let mut pool = lock(&self.0.pool);
        for step in path {
            let Ok(e) = self.read().get(&step.val.key()) else {
                continue;
            };
            for m in e.blocks.iter().flat_map(|b| b.messages.iter()) {
                match step.kind {
                    HeadChangeKind::Revert => back.push(m.clone()),
                    HeadChangeKind::Apply | HeadChangeKind::Current => {
                        back.retain(|b: &Arc<SignedMessage>| b.cid() != m.cid());
                        let from = m.message.from;
                        let sender = self.key_address(&from).unwrap_or(from);
                        pool.remove(&sender, m.message.nonce);
                    }
                }
            }
        }
        drop(pool);
        back.sort_by_key(|m| m.message.nonce);
        for m in back {
            let stored = self.0.disk.put_pending(&m);
            if let Err(e) = self.pool_add(&m).and(stored) {
                tracing::info!(cid = %m.cid(), "reverted message not pending again: {e}");
            }
        }
    }

    /// Next nonce of a sender, its pending messages counted.
    pub fn mpool_get_nonce(&self, addr: &Address) -> Result<u64, ChainError> {
        let head = self.read().head.clone();
        let state = self.execute(&head)?;
        let id = state.state.lookup(addr).ok_or(ChainError::NoActor(*addr))?;
        let account = state.state.account(id).ok_or(ChainError::NoActor(*addr))?;
        let mut next = account.nonce;
        let pool = lock(&self.0.pool);
        if let Some(of) = account
            .address
            .and_then(|a| pool.senders.get(&a.to_bytes()))
        {
            while of.contains_key(&next) {
                next += 1;
            }
        }
        Ok(next)
    }

    /// Messages that wait for a block.
    pub fn mpool_pending(&self, _key: &TipSetKey) -> Result<Vec<SignedMessage>, ChainError> {
        let pool = lock(&self.0.pool);
        Ok(pool
            .senders
            .values()
            .flat_map(|of| of.values())
            .map(|m| (**m).clone())
            .collect())
    }

    /// Fills in nonce and gas, signs and publishes.
    pub fn mpool_push_message(
        &self,
        mut msg: Message,
        spec: Option<&MessageSendSpec>,
    ) -> Result<SignedMessage, ChainError> {
        let _one_at_a_time = lock(&self.0.writer);
        msg = self.gas_estimate_message_gas(msg, spec, &TipSetKey::HEAD)?;
        msg.nonce = self.mpool_get_nonce(&msg.from)?;
        let from = msg.from;
        let signed = self.wallet_sign_message(&from, msg)?;
        self.mpool_push(signed.clone())?;
        Ok(signed)
    }

    /// Messages that a block on top of a tipset should hold, in order.
    pub fn mpool_select(
        &self,
        key: &TipSetKey,
        _quality: f64,
    ) -> Result<Vec<SignedMessage>, ChainError> {
        let e = self.read().get(key)?;
        let x = self.execute(&e)?;
        Ok(self
            .select(&e, &x)
            .into_iter()
            .map(|m| (*m).clone())
            .collect())
    }

    /// Senders take turns by the premium of their next message; nonces stay in order.
    pub(super) fn select(&self, _e: &Entry, x: &Executed) -> Vec<Arc<SignedMessage>> {
        let mut queues = Vec::new();
        {
            let pool = lock(&self.0.pool);
            for of in pool.senders.values() {
                let Some(first) = of.values().next() else {
                    continue;
                };
                let id = x.state.lookup(&first.message.from);
                let Some(account) = id.and_then(|id| x.state.account(id)) else {
                    continue;
                };
                let (mut nonce, mut funds) = (account.nonce, account.balance.clone());
                let mut queue = Vec::new();
                while let Some(m) = of.get(&nonce) {
                    let need = m.message.max_fee() + &m.message.value;
                    if m.message.gas_fee_cap < x.base_fee || funds < need {
                        break;
                    }
                    funds -= need;
                    nonce += 1;
                    queue.push(m.clone());
                }
                queue.reverse();
                queues.push(queue);
            }
        }
        let mut out = Vec::new();
        let mut gas = self.0.policy.block_gas_limit;
        while out.len() < PER_BLOCK {
            let best = queues
                .iter_mut()
                .filter(|q| q.last().is_some_and(|m| m.message.gas_limit <= gas))
                .max_by_key(|q| q.last().map(|m| m.message.gas_premium.clone()));
            let Some(m) = best.and_then(Vec::pop) else {
                break;
            };
            gas -= m.message.gas_limit;
            out.push(m);
        }
        out
    }
}
