//! A small chain behind `trait FullNode`: a mempool, blocks on demand, receipts, reorgs.

#![allow(
    dead_code,
    reason = "the tests of two crates use it, each another part"
)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use cid::Cid;
use futures::StreamExt as _;
use lotus_node_client::api::{
    Actor, BigInt, BlockHeader, HeadChange, HeadChangeKind, InvocResult, Message, MessageReceipt,
    MessageSendSpec, MinerInfo, MsgGasCost, MsgLookup, Signature, SignatureType, SignedMessage,
    Ticket, TipSet, TipSetKey, cbor_cid,
};
use lotus_node_client::{FullNode, HeadChanges, NodeError};
use lotus_types::{Address, Epoch, EpochDelta, TokenAmount};
use tokio::sync::broadcast;

/// What executing a message would give.
pub(crate) type Judge = Box<dyn FnMut(&Message) -> i64 + Send>;
/// Executes a message: exit code and return value.
pub(crate) type Execute = Box<dyn FnMut(&Message, Epoch) -> (i64, Vec<u8>) + Send>;

/// A tipset and the messages in it with what they gave.
struct Round {
    tipset: TipSet,
    messages: Vec<(SignedMessage, i64, Vec<u8>)>,
}

pub(crate) struct Inner {
    rounds: Vec<Round>,
    pub(crate) mempool: Vec<SignedMessage>,
    /// Every push that arrived, accepted or not.
    pub(crate) pushes: Vec<SignedMessage>,
    signatures: u64,
    forks: u64,
    execute: Execute,
    /// Exit code that `StateCall` gives, with a failing gas estimate, if not 0.
    pub(crate) refuse: i64,
    /// The exit code that single messages would have.
    pub(crate) judge: Option<Judge>,
    /// Gas estimates that were asked for.
    pub(crate) estimates: u64,
    /// Calls that fail with a transport error, by name; each entry fails one call.
    pub(crate) failures: VecDeque<&'static str>,
    /// Control addresses of the miner.
    pub(crate) control: Vec<Address>,
    /// What every account has.
    pub(crate) balance: TokenAmount,
    /// Base fee of blocks to come, and the premium that it takes to get into one.
    pub(crate) base_fee: TokenAmount,
    pub(crate) premium: TokenAmount,
}

/// The chain. Clones share it.
#[derive(Clone)]
pub(crate) struct Fake {
    inner: Arc<Mutex<Inner>>,
    heads: broadcast::Sender<Vec<HeadChange>>,
}

fn tipset(parent: Option<&TipSet>, height: i64, salt: u64, base_fee: TokenAmount) -> TipSet {
    let blank = cbor_cid(b"blank");
    TipSet::new(vec![BlockHeader {
        miner: Address::new_id(1000),
        ticket: Some(Ticket {
            vrf_proof: format!("{height}/{salt}").into_bytes(),
        }),
        election_proof: None,
        beacon_entries: vec![],
        win_post_proof: vec![],
        parents: parent.map(|p| p.cids.clone()).unwrap_or_default(),
        parent_weight: BigInt::from(height),
        height: Epoch(height),
        parent_state_root: blank,
        parent_message_receipts: blank,
        messages: blank,
        bls_aggregate: None,
        timestamp: salt,
        block_sig: None,
        fork_signaling: 0,
        parent_base_fee: base_fee,
    }])
    .unwrap()
}

impl Fake {
    pub(crate) fn new(execute: Execute) -> Self {
        let genesis = Round {
            tipset: tipset(None, 0, 0, TokenAmount::from_atto(100)),
            messages: vec![],
        };
        Self {
            inner: Arc::new(Mutex::new(Inner {
                rounds: vec![genesis],
                mempool: vec![],
                pushes: vec![],
                signatures: 0,
                forks: 0,
                execute,
                refuse: 0,
                judge: None,
                estimates: 0,
                failures: VecDeque::new(),
                control: vec![],
                balance: TokenAmount::from_whole(1_000),
                base_fee: TokenAmount::from_atto(100),
                premium: TokenAmount::from_atto(10),
            })),
            heads: broadcast::Sender::new(10_000),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Makes a block with what the mempool holds in nonce order.
    pub(crate) fn mine(&self) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let parent = inner.rounds.last().unwrap().tipset.clone();
        let height = parent.height + EpochDelta(1);
        let mut pool = std::mem::take(&mut inner.mempool);
        pool.sort_by_key(|m| m.message.nonce);
        let mut next = inner.nonces();
        let mut messages = Vec::new();
        for m in pool {
            let expected = next.entry(m.message.from).or_insert(0);
            if m.message.nonce == *expected && m.message.gas_fee_cap >= inner.base_fee {
                *expected += 1;
                let (code, ret) = (inner.execute)(&m.message, height);
                messages.push((m, code, ret));
            } else if m.message.nonce >= *expected {
                inner.mempool.push(m);
            }
        }
        let new = tipset(Some(&parent), height.0, inner.forks, inner.base_fee.clone());
        inner.rounds.push(Round {
            tipset: new.clone(),
            messages,
        });
        let change = HeadChange {
            kind: HeadChangeKind::Apply,
            val: new,
        };
        drop(self.heads.send(vec![change]));
    }

    /// Takes the last `depth` tipsets away and puts empty ones there, one more. Their messages go
    /// back to the mempool, or are forgotten.
    pub(crate) fn reorg(&self, depth: usize, forget: bool) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        inner.forks += 1;
        let at = inner.rounds.len() - depth;
        let gone = inner.rounds.split_off(at);
        let mut changes: Vec<_> = gone
            .iter()
            .rev()
            .map(|r| HeadChange {
                kind: HeadChangeKind::Revert,
                val: r.tipset.clone(),
            })
            .collect();
        if !forget {
            let back = gone
                .iter()
                .flat_map(|r| r.messages.iter().map(|m| m.0.clone()));
            inner.mempool.extend(back);
        }
        for _ in 0..=depth {
            let parent = inner.rounds.last().unwrap().tipset.clone();
            let fee = inner.base_fee.clone();
            let new = tipset(Some(&parent), parent.height.0 + 1, inner.forks, fee);
            inner.rounds.push(Round {
                tipset: new.clone(),
                messages: vec![],
            });
            changes.push(HeadChange {
                kind: HeadChangeKind::Apply,
                val: new,
            });
        }
        drop(self.heads.send(changes));
    }

    /// Puts a message on chain that the hub did not send.
    pub(crate) fn intrude(&self, from: Address) {
        let mut inner = self.lock();
        let nonce = inner.nonces().get(&from).copied().unwrap_or(0);
        let mut message = bare(from);
        message.nonce = nonce;
        let signed = inner.sign(message);
        inner.mempool.retain(|m| m.message.nonce != nonce);
        inner.mempool.push(signed);
        drop(inner);
        self.mine();
    }

    /// Puts a message of another program into the mempool that no block takes.
    pub(crate) fn stick(&self, from: Address) {
        let mut inner = self.lock();
        let nonce = inner.nonces().get(&from).copied().unwrap_or(0);
        let message = Message {
            nonce,
            gas_fee_cap: TokenAmount::default(),
            ..bare(from)
        };
        let signed = inner.sign(message);
        inner.mempool.push(signed);
    }

    fn fails(&self, name: &'static str) -> Result<(), NodeError> {
        let mut inner = self.lock();
        match inner.failures.iter().position(|f| *f == name) {
            Some(i) => {
                inner.failures.remove(i);
                Err(NodeError::Transport {
                    endpoint: "fake".into(),
                    method: name.into(),
                    why: "connection reset".into(),
                })
            }
            None => Ok(()),
        }
    }
}

fn bare(from: Address) -> Message {
    Message {
        version: 0,
        to: Address::new_id(2),
        from,
        nonce: 0,
        value: TokenAmount::default(),
        gas_limit: 1,
        gas_fee_cap: TokenAmount::from_atto(200),
        gas_premium: TokenAmount::from_atto(1),
        method: 0,
        params: vec![],
    }
}

impl Inner {
    pub(crate) fn nonces(&self) -> BTreeMap<Address, u64> {
        let mut nonces = BTreeMap::new();
        for r in &self.rounds {
            for (m, ..) in &r.messages {
                nonces.insert(m.message.from, m.message.nonce + 1);
            }
        }
        nonces
    }

    /// Messages on chain, in order.
    pub(crate) fn landed(&self) -> Vec<SignedMessage> {
        let messages = self.rounds.iter().flat_map(|r| &r.messages);
        messages.map(|m| m.0.clone()).collect()
    }

    pub(crate) fn head(&self) -> &TipSet {
        &self.rounds.last().unwrap().tipset
    }

    /// The exit code of a message that is executed on the present state, as a real node gives it:
    /// 6 is `SYS_INSUFFICIENT_FUNDS`.
    fn verdict(&mut self, msg: &Message) -> i64 {
        if self.refuse == 0 && msg.value > self.balance {
            return 6;
        }
        match &mut self.judge {
            Some(judge) if self.refuse == 0 => judge(msg),
            _ => self.refuse,
        }
    }

    /// Each signature is another one, as with a randomised signer.
    fn sign(&mut self, message: Message) -> SignedMessage {
        self.signatures += 1;
        let mut bytes = vec![0; 65];
        bytes[..8].copy_from_slice(&self.signatures.to_be_bytes());
        SignedMessage {
            message,
            signature: Signature {
                sig_type: SignatureType::Secp256k1,
                bytes,
            },
        }
    }
}

/// The node of a fake chain, for types that add calls to it.
#[async_trait]
impl FullNode for Fake {
    async fn chain_notify(&self) -> Result<HeadChanges, NodeError> {
        let (rx, head) = {
            let inner = self.lock();
            (self.heads.subscribe(), inner.head().clone())
        };
        let current = vec![HeadChange {
            kind: HeadChangeKind::Current,
            val: head,
        }];
        let rest = futures::stream::unfold(rx, |mut rx| async {
            rx.recv().await.ok().map(|changes| (Ok(changes), rx))
        });
        Ok(futures::stream::once(async { Ok(current) })
            .chain(rest)
            .boxed())
    }

    async fn chain_head(&self) -> Result<TipSet, NodeError> {
        Ok(self.lock().head().clone())
    }

    async fn chain_get_tipset_by_height(
        &self,
        at: Epoch,
        _key: &TipSetKey,
    ) -> Result<TipSet, NodeError> {
        let inner = self.lock();
        let round = inner.rounds.iter().rfind(|r| r.tipset.height <= at);
        Ok(round.unwrap().tipset.clone())
    }

    async fn chain_get_tipset(&self, key: &TipSetKey) -> Result<TipSet, NodeError> {
        let inner = self.lock();
        let found = inner.rounds.iter().find(|r| r.tipset.key() == *key);
        Ok(found.unwrap().tipset.clone())
    }

    async fn state_miner_info(
        &self,
        _miner: Address,
        _key: &TipSetKey,
    ) -> Result<MinerInfo, NodeError> {
        Ok(MinerInfo {
            owner: Address::new_id(1001),
            worker: Address::new_id(1001),
            new_worker: None,
            control_addresses: self.lock().control.clone(),
            worker_change_epoch: Epoch(-1),
            peer_id: None,
            multiaddrs: vec![],
            window_post_proof_type: 10,
            sector_size: 2_048,
            window_post_partition_sectors: 2,
            consensus_fault_elapsed: Epoch(-1),
            pending_owner_address: None,
            beneficiary: None,
            beneficiary_term: None,
            pending_beneficiary_term: None,
        })
    }

    async fn wallet_has(&self, _addr: Address) -> Result<bool, NodeError> {
        Ok(true)
    }

    async fn gas_estimate_gas_premium(
        &self,
        _blocks: u64,
        _sender: Address,
        _gas_limit: i64,
        _key: &TipSetKey,
    ) -> Result<TokenAmount, NodeError> {
        Ok(self.lock().premium.clone())
    }

    async fn state_account_key(
        &self,
        addr: Address,
        _key: &TipSetKey,
    ) -> Result<Address, NodeError> {
        self.fails("StateAccountKey")?;
        Ok(addr)
    }

    async fn state_get_actor(
        &self,
        addr: Address,
        key: &TipSetKey,
    ) -> Result<Option<Actor>, NodeError> {
        let inner = self.lock();
        // State at a tipset: everything below it has been executed.
        let below = inner.rounds.iter().take_while(|r| r.tipset.key() != *key);
        let sent = below.flat_map(|r| &r.messages);
        let nonce = sent.filter(|m| m.0.message.from == addr).count() as u64;
        Ok(Some(Actor {
            code: cbor_cid(b"account"),
            head: cbor_cid(b"state"),
            nonce,
            balance: inner.balance.clone(),
            delegated_address: None,
        }))
    }

    async fn mpool_get_nonce(&self, addr: Address) -> Result<u64, NodeError> {
        self.fails("MpoolGetNonce")?;
        let inner = self.lock();
        let mut next = inner.nonces().get(&addr).copied().unwrap_or(0);
        let pool = || inner.mempool.iter().filter(|m| m.message.from == addr);
        while pool().any(|m| m.message.nonce == next) {
            next += 1;
        }
        Ok(next)
    }

    async fn mpool_push(&self, msg: &SignedMessage) -> Result<Cid, NodeError> {
        self.lock().pushes.push(msg.clone());
        self.fails("MpoolPush")?;
        let mut inner = self.lock();
        let next = inner.nonces().get(&msg.message.from).copied().unwrap_or(0);
        if msg.message.nonce < next {
            return Err(NodeError::Rpc {
                method: "MpoolPush".into(),
                code: 1,
                message: "message nonce too low".into(),
            });
        }
        let (from, nonce) = (msg.message.from, msg.message.nonce);
        let same = |m: &SignedMessage| m.message.from == from && m.message.nonce == nonce;
        if let Some(old) = inner.mempool.iter_mut().find(|m| same(m)) {
            let least = (&old.message.gas_premium * 110u64).div_floor(100u64);
            if old != msg && msg.message.gas_premium <= least {
                return Err(NodeError::Rpc {
                    method: "MpoolPush".into(),
                    code: 1,
                    message: "replace by fee has too low GasPremium".into(),
                });
            }
            *old = msg.clone();
        } else {
            inner.mempool.push(msg.clone());
        }
        Ok(msg.cid())
    }

    async fn wallet_sign_message(
        &self,
        _addr: Address,
        msg: &Message,
    ) -> Result<SignedMessage, NodeError> {
        self.fails("WalletSignMessage")?;
        Ok(self.lock().sign(msg.clone()))
    }

    async fn gas_estimate_message_gas(
        &self,
        msg: &Message,
        _spec: Option<&MessageSendSpec>,
        _key: &TipSetKey,
    ) -> Result<Message, NodeError> {
        self.fails("GasEstimateMessageGas")?;
        self.lock().estimates += 1;
        let exit = self.lock().verdict(msg);
        if exit != 0 {
            return Err(NodeError::Rpc {
                method: "GasEstimateMessageGas".into(),
                code: 1,
                message: format!("estimating gas used: message execution failed (exit=[{exit}])"),
            });
        }
        Ok(Message {
            gas_limit: 1_000_000,
            gas_fee_cap: TokenAmount::from_atto(1_000),
            gas_premium: TokenAmount::from_atto(10),
            ..msg.clone()
        })
    }

    async fn state_call(&self, msg: &Message, _key: &TipSetKey) -> Result<InvocResult, NodeError> {
        Ok(InvocResult {
            msg_cid: msg.cid(),
            msg: msg.clone(),
            msg_rct: Some(MessageReceipt {
                exit_code: self.lock().verdict(msg),
                r#return: vec![],
                gas_used: 1,
                events_root: None,
            }),
            gas_cost: MsgGasCost::default(),
            error: "by order".into(),
            duration: 1,
        })
    }

    async fn state_search_msg(
        &self,
        _key: &TipSetKey,
        cid: Cid,
        _lookback: EpochDelta,
        _allow_replaced: bool,
    ) -> Result<Option<MsgLookup>, NodeError> {
        self.fails("StateSearchMsg")?;
        let inner = self.lock();
        // A receipt is in the tipset after the message's.
        for pair in inner.rounds.windows(2) {
            for (m, code, ret) in &pair[0].messages {
                if m.cid() == cid {
                    return Ok(Some(MsgLookup {
                        message: cid,
                        receipt: MessageReceipt {
                            exit_code: *code,
                            r#return: ret.clone(),
                            gas_used: 1,
                            events_root: None,
                        },
                        return_dec: serde_json::Value::Null,
                        tip_set: pair[1].tipset.key(),
                        height: pair[1].tipset.height,
                    }));
                }
            }
        }
        Ok(None)
    }
}
