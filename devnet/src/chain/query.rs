//! What a node says about the chain and the network.

use std::sync::Arc;

use cid::Cid;
use fvm_shared::crypto::signature::SignatureType;
use lotus_actors::{BigInt, Dst, NETWORK_VERSION, draw_randomness_from_digest, ticket_digest};
use lotus_node_client::api::{
    Actor, BeaconEntry, BlockHeader, HeadChange, Message, NetworkParams, SignedMessage, TipSet,
    TipSetKey, Version, cbor_cid,
};
use lotus_types::{Address, Epoch, EpochDelta, TokenAmount};

use super::{Chain, genesis};
use crate::error::ChainError;
use crate::state::ActorKind;
use crate::vm;

/// EIP-155 id of Lotus' 2k devnets.
const CHAIN_ID: i64 = 31_415_926;
/// API version 1.5, as Lotus' v1 API says.
const API_VERSION: u32 = 0x0001_0500;
/// Objects that `ChainPutObj` keeps, and their size.
const OBJECTS_MAX: usize = 1_024;
const OBJECT_BYTES_MAX: usize = 1 << 20;

/// BLS messages, secp256k1 messages, and the CIDs of both, in the block's order.
pub type BlockMessageLists = (Vec<Message>, Vec<SignedMessage>, Vec<Cid>);

impl Chain {
    /// A tipset by its key; the head for the empty key.
    pub fn chain_get_tipset(&self, key: &TipSetKey) -> Result<Arc<TipSet>, ChainError> {
        Ok(self.read().get(key)?.ts.clone())
    }

    /// The tipset at a height on the chain of `key`; before a null round, the one below it.
    pub fn chain_get_tipset_by_height(
        &self,
        at: Epoch,
        key: &TipSetKey,
    ) -> Result<Arc<TipSet>, ChainError> {
        let store = self.read();
        let tip = store.get(key)?;
        if at.0 > tip.height() {
            return Err(ChainError::Invalid(format!(
                "looking for tipset with height greater than start point: {at} > {}",
                tip.height()
            )));
        }
        Ok(store.at_or_before(&tip, at.0)?.ts.clone())
    }

    /// The first tipset at or after a height on the chain of `key`.
    pub fn chain_get_tipset_after_height(
        &self,
        at: Epoch,
        key: &TipSetKey,
    ) -> Result<Arc<TipSet>, ChainError> {
        let store = self.read();
        let tip = store.get(key)?;
        if at.0 > tip.height() {
            return Err(ChainError::Invalid(format!(
                "looking for tipset with height greater than start point: {at} > {}",
                tip.height()
            )));
        }
        Ok(store.at_or_after(&tip, at.0)?.ts.clone())
    }

    /// The reverts, then the applies, that lead from one tipset to another.
    pub fn chain_get_path(
        &self,
        from: &TipSetKey,
        to: &TipSetKey,
    ) -> Result<Vec<HeadChange>, ChainError> {
        let store = self.read();
        let (from, to) = (store.get(from)?, store.get(to)?);
        store.path(&from, &to)
    }

    /// A block's header.
    pub fn chain_get_block(&self, cid: &Cid) -> Result<BlockHeader, ChainError> {
        let store = self.read();
        let found = store.blocks.get(cid).map(|b| b.header.clone());
        found.ok_or(ChainError::NoObject(*cid))
    }

    /// A block's messages.
    pub fn chain_get_block_messages(&self, cid: &Cid) -> Result<BlockMessageLists, ChainError> {
        let found = self.read().blocks.get(cid).cloned();
        let block = found.ok_or(ChainError::NoObject(*cid))?;
        let all = &block.messages;
        if all.is_empty() && block.header.messages != super::message_root(&[], &[]) {
            return Err(ChainError::PrunedMessages(block.header.height.0));
        }
        let is_bls = |m: &SignedMessage| m.signature.sig_type == SignatureType::BLS;
        let bls = all.iter().filter(|m| is_bls(m)).map(|m| m.message.clone());
        let secp = all.iter().filter(|m| !is_bls(m)).map(|m| (**m).clone());
        Ok((
            bls.collect(),
            secp.collect(),
            all.iter().map(|m| m.cid()).collect(),
        ))
    }

    fn object(&self, cid: &Cid) -> Option<Vec<u8>> {
        let store = self.read();
        if let Some(b) = store.blocks.get(cid) {
            return Some(b.header.to_cbor());
        }
        if let Some(m) = store.messages.get(cid) {
            return Some(match m.signature.sig_type {
                SignatureType::BLS => m.message.to_cbor(),
                SignatureType::Secp256k1 => m.to_cbor(),
            });
        }
        store.objects.get(cid).cloned()
    }

    /// CBOR of a header, a message, or an object that was put.
    pub fn chain_read_obj(&self, cid: &Cid) -> Result<Vec<u8>, ChainError> {
        self.object(cid).ok_or(ChainError::NoObject(*cid))
    }

    /// Whether [`Chain::chain_read_obj`] has it.
    #[must_use]
    pub fn chain_has_obj(&self, cid: &Cid) -> bool {
        self.object(cid).is_some()
    }

    /// Keeps an object in memory.
    pub fn chain_put_obj(&self, data: Vec<u8>, cid: Cid) -> Result<(), ChainError> {
        let mut store = self.write();
        if data.len() > OBJECT_BYTES_MAX || store.objects.len() >= OBJECTS_MAX {
            return Err(ChainError::Invalid(
                "object too large, or too many objects".into(),
            ));
        }
        store.objects.insert(cid, data);
        Ok(())
    }

    /// Digest of the ticket that seeds randomness at an epoch.
    pub fn state_get_randomness_digest_from_tickets(
        &self,
        at: Epoch,
        key: &TipSetKey,
    ) -> Result<[u8; 32], ChainError> {
        let store = self.read();
        let tip = store.get(key)?;
        store.ticket_digest(&tip, at.0)
    }

    /// Digest of the beacon entry of an epoch.
    pub fn state_get_randomness_digest_from_beacon(
        &self,
        at: Epoch,
        key: &TipSetKey,
    ) -> Result<[u8; 32], ChainError> {
        let store = self.read();
        let tip = store.get(key)?;
        Ok(ticket_digest(&store.beacon_entry(&tip, at.0)?.data))
    }

    /// Ticket-chain randomness for an epoch.
    pub fn state_get_randomness_from_tickets(
        &self,
        dst: i64,
        at: Epoch,
        entropy: &[u8],
        key: &TipSetKey,
    ) -> Result<[u8; 32], ChainError> {
        let digest = self.state_get_randomness_digest_from_tickets(at, key)?;
        Ok(draw_randomness_from_digest(&digest, tag(dst)?, at, entropy))
    }

    /// Beacon randomness for an epoch.
    pub fn state_get_randomness_from_beacon(
        &self,
        dst: i64,
        at: Epoch,
        entropy: &[u8],
        key: &TipSetKey,
    ) -> Result<[u8; 32], ChainError> {
        let digest = self.state_get_randomness_digest_from_beacon(at, key)?;
        Ok(draw_randomness_from_digest(&digest, tag(dst)?, at, entropy))
    }

    /// The beacon entry of an epoch: known before the chain reaches it.
    pub fn state_get_beacon_entry(&self, at: Epoch) -> Result<BeaconEntry, ChainError> {
        let round = u64::try_from(at.0);
        let round = round.map_err(|_| ChainError::Invalid(format!("no epoch {at}")))?;
        if at > self.epoch() + EpochDelta(1) {
            return Err(ChainError::Randomness(format!(
                "beacon entry of epoch {at} is to come"
            )));
        }
        Ok(genesis::beacon_entry(&self.0.beacon_seed, round))
    }

    /// The network version, the same at every height.
    #[must_use]
    pub fn state_network_version(&self, _key: &TipSetKey) -> u32 {
        NETWORK_VERSION
    }

    /// The network's name.
    #[must_use]
    pub fn state_network_name(&self) -> String {
        self.0.network_name.clone()
    }

    /// The network's constants.
    #[must_use]
    pub fn state_get_network_params(&self) -> NetworkParams {
        let ms = self.block_time_ms();
        NetworkParams {
            network_name: self.state_network_name(),
            block_delay_secs: ms.div_ceil(1000),
            block_delay_millis: Some(ms),
            consensus_miner_min_power: BigInt::from(self.0.policy.min_power),
            pre_commit_challenge_delay: EpochDelta(self.0.policy.pre_commit_challenge_delay),
            fork_upgrade_params: serde_json::json!({}),
            eip155_chain_id: CHAIN_ID,
            genesis_timestamp: self.genesis().min_timestamp(),
        }
    }

    /// Who this node is, and which proofs it takes: `lotus-devnet-0.1.0+vanilla`.
    #[must_use]
    pub fn version(&self) -> Version {
        let number = env!("CARGO_PKG_VERSION");
        let version = format!("lotus-devnet-{number}+{}", self.0.proofs);
        Version {
            version: version.clone(),
            api_version: API_VERSION,
            block_delay: self.block_time_ms().div_ceil(1000),
            agent: version,
        }
    }

    /// An actor's entry in the state tree; `None` if there is no such actor.
    pub fn state_get_actor(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<Option<Actor>, ChainError> {
        let (_, x) = self.state_at(key)?;
        let id = x.state.lookup(addr);
        let Some((id, account)) = id.and_then(|id| Some((id, x.state.account(id)?))) else {
            return Ok(None);
        };
        let head = match x.state.miners.get(&id) {
            Some(m) => m.cid(),
            None => cbor_cid(&lotus_actors::encode(&(id, account.address))),
        };
        let delegated = (account.kind == ActorKind::Account).then_some(account.address);
        Ok(Some(Actor {
            code: vm::code_cid(account.kind),
            head,
            nonce: account.nonce,
            balance: account.balance.clone(),
            delegated_address: delegated.flatten(),
        }))
    }

    /// The ID address of an address.
    pub fn state_lookup_id(&self, addr: &Address, key: &TipSetKey) -> Result<Address, ChainError> {
        let (_, x) = self.state_at(key)?;
        let id = x.state.lookup(addr).ok_or(ChainError::NoActor(*addr))?;
        Ok(Address::new_id(id))
    }

    /// The key address of an account.
    pub fn state_account_key(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<Address, ChainError> {
        let (_, x) = self.state_at(key)?;
        let id = x.state.lookup(addr).ok_or(ChainError::NoActor(*addr))?;
        let account = x.state.account(id).filter(|a| a.kind == ActorKind::Account);
        account
            .and_then(|a| a.address)
            .ok_or_else(|| ChainError::Invalid(format!("actor {addr} is not an account")))
    }

    /// Funds outside of the reward actor, not burnt.
    pub fn state_vm_circulating_supply_internal(
        &self,
        key: &TipSetKey,
    ) -> Result<TokenAmount, ChainError> {
        let (_, x) = self.state_at(key)?;
        Ok(vm::circulating(&x.state))
    }
}

fn tag(n: i64) -> Result<Dst, ChainError> {
    Dst::try_from(n).map_err(|n| ChainError::Invalid(format!("no domain separation tag {n}")))
}
