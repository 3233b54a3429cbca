//! The first block, and the facts of a chain that never change.

use std::time::{SystemTime, UNIX_EPOCH};

use fvm_shared::crypto::signature::{Signature, SignatureType};
use lotus_actors::{BigInt, actors};
use lotus_node_client::api::{BeaconEntry, BlockHeader, ElectionProof, Ticket, cbor_cid};
use lotus_proofs::ProofMode;
use lotus_types::{ActorId, Address, Epoch, SectorSize, TokenAmount};
use rand::RngCore;
use serde::{Deserialize, Serialize};

use super::persist::Disk;
use super::store::{Block, StoredState};
use super::{ChainConfig, initial_base_fee, message_root};
use crate::error::ChainError;
use crate::keys::Key;
use crate::policy::Policy;
use crate::state::{Account, ActorKind, State};
use crate::vm;

/// The miner that genesis makes, as Lotus devnets do.
pub(super) const MINER: ActorId = ActorId(1000);
/// The first id that genesis gives to an account.
const FIRST_ACCOUNT: u64 = 100;
/// FIL that rewards are paid from. Source: lotus, build/buildconstants, FilBase and InitialRewardBalance.
const REWARD_FIL: u64 = 1_100_000_000;
/// DataCap of the client's key, bytes.
const CLIENT_DATACAP: u64 = 1 << 50;

/// What the chain was made with.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) policy: Policy,
    pub(super) network_name: String,
    pub(super) sector_size: SectorSize,
    pub(super) proofs: ProofMode,
    pub(super) genesis_ms: u64,
    pub(super) beacon_seed: [u8; 32],
    pub(super) producer: Key,
    pub(super) producer_id: u64,
    pub(super) default_address: Address,
}

#[derive(Serialize, Deserialize)]
struct StoredFacts {
    policy: Policy,
    network_name: String,
    sector_size: SectorSize,
    #[serde(default)]
    proofs: ProofMode,
    genesis_ms: u64,
    beacon_seed: [u8; 32],
    producer: Vec<u8>,
    producer_id: u64,
    default_address: Vec<u8>,
}

impl Facts {
    pub(super) fn load(disk: &Disk) -> Result<Option<Self>, ChainError> {
        let Some(bytes) = disk.meta("facts")? else {
            return Ok(None);
        };
        let damaged = |why: &dyn std::fmt::Display| ChainError::Damaged(format!("facts: {why}"));
        let s: StoredFacts = serde_json::from_slice(&bytes).map_err(|e| damaged(&e))?;
        let default_address = Address::from_bytes(&s.default_address);
        Ok(Some(Self {
            policy: s.policy,
            network_name: s.network_name,
            sector_size: s.sector_size,
            proofs: s.proofs,
            genesis_ms: s.genesis_ms,
            beacon_seed: s.beacon_seed,
            producer: Key::from_bytes(SignatureType::BLS, &s.producer)
                .ok_or_else(|| damaged(&"producer key"))?,
            producer_id: s.producer_id,
            default_address: default_address.map_err(|e| damaged(&e))?,
        }))
    }

    fn store(&self) -> Result<Vec<u8>, ChainError> {
        let s = StoredFacts {
            policy: self.policy.clone(),
            network_name: self.network_name.clone(),
            sector_size: self.sector_size,
            proofs: self.proofs,
            genesis_ms: self.genesis_ms,
            beacon_seed: self.beacon_seed,
            producer: self.producer.to_bytes(),
            producer_id: self.producer_id,
            default_address: self.default_address.to_bytes(),
        };
        serde_json::to_vec(&s).map_err(|e| ChainError::Damaged(format!("facts: {e}")))
    }

    /// Refuses settings that differ from those the chain was made with.
    pub(super) fn check(self, cfg: &ChainConfig) -> Result<Self, ChainError> {
        let differs = |what, stored: String, given: String| {
            if stored == given {
                Ok(())
            } else {
                Err(ChainError::Mismatch {
                    what,
                    stored,
                    given,
                })
            }
        };
        differs(
            "network name",
            self.network_name.clone(),
            cfg.network_name.clone(),
        )?;
        differs(
            "sector size",
            self.sector_size.to_string(),
            cfg.sector_size.to_string(),
        )?;
        differs(
            "proof mode",
            self.proofs.to_string(),
            cfg.proofs.to_string(),
        )?;
        let timeless = |p: &Policy| format!("{:?}", p.clone().with_block_time_ms(1));
        differs("policy", timeless(&self.policy), timeless(&cfg.policy))?;
        Ok(self)
    }
}

/// The entry of a beacon round: deterministic, and unknown to whoever does not have the repo.
pub(super) fn beacon_entry(seed: &[u8; 32], round: u64) -> BeaconEntry {
    let data = lotus_actors::ticket_digest(&[seed.as_slice(), &round.to_be_bytes()].concat());
    BeaconEntry {
        round,
        data: data.to_vec(),
    }
}

/// Makes the chain: keys, state, the genesis block.
pub(super) fn found(disk: &Disk, cfg: &ChainConfig) -> Result<Facts, ChainError> {
    let owner = Key::generate(SignatureType::BLS);
    let client = Key::generate(SignatureType::Secp256k1);
    let mut beacon_seed = [0; 32];
    rand::rng().fill_bytes(&mut beacon_seed);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut facts = Facts {
        policy: cfg.policy.clone(),
        network_name: cfg.network_name.clone(),
        sector_size: cfg.sector_size,
        proofs: cfg.proofs,
        genesis_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        beacon_seed,
        producer: Key::generate(SignatureType::BLS),
        producer_id: 0,
        default_address: owner.address(),
    };
    let mut state = State::default();
    singletons(&mut state);
    let fil = TokenAmount::from_whole;
    state.credit(actors::REWARD.0, &fil(REWARD_FIL));
    let owner_id = state.create(ActorKind::Account, owner.address());
    let client_id = state.create(ActorKind::Account, client.address());
    facts.producer_id = state.create(ActorKind::Account, facts.producer.address());
    state.credit(owner_id, &fil(cfg.wallet_fil));
    state.credit(client_id, &fil(cfg.wallet_fil));
    state
        .registry
        .edit()
        .datacap
        .insert(client_id, CLIENT_DATACAP);
    state.accounts.edit().next_id = MINER.0;
    let miner = vm::create_miner(&mut state, &cfg.policy, owner_id, owner_id, cfg.sector_size);
    state.credit(miner, &fil(cfg.miner_fil));
    let header = header(&facts, &state);
    let block = Block {
        cid: header.cid(),
        header,
        messages: std::sync::Arc::default(),
    };
    let stored = StoredState {
        tipset: vec![block.cid],
        receipts_root: block.header.parent_message_receipts,
        base_fee: initial_base_fee(),
        state,
    };
    let meta = [("facts", facts.store()?)];
    disk.found(&meta, &block, stored, &[owner, client])?;
    Ok(facts)
}

fn singletons(state: &mut State) {
    let all = [
        actors::SYSTEM,
        actors::INIT,
        actors::REWARD,
        actors::CRON,
        actors::POWER,
        actors::MARKET,
        actors::VERIFREG,
        actors::DATACAP,
        actors::BURNT_FUNDS,
    ];
    let accounts = state.accounts.edit();
    for id in all {
        accounts.by_id.insert(
            id.0,
            Account {
                kind: ActorKind::Singleton,
                address: None,
                nonce: 0,
                balance: TokenAmount::default(),
            },
        );
    }
    accounts.next_id = FIRST_ACCOUNT;
}

fn header(facts: &Facts, state: &State) -> BlockHeader {
    let vrf_proof = facts.beacon_seed.to_vec();
    BlockHeader {
        miner: Address::new_id(actors::SYSTEM.0),
        ticket: Some(Ticket {
            vrf_proof: lotus_actors::ticket_digest(&vrf_proof).to_vec(),
        }),
        election_proof: Some(ElectionProof {
            win_count: 0,
            vrf_proof: Vec::new(),
        }),
        beacon_entries: vec![beacon_entry(&facts.beacon_seed, 0)],
        win_post_proof: Vec::new(),
        parents: Vec::new(),
        parent_weight: BigInt::default(),
        height: Epoch(0),
        parent_state_root: state.root(),
        parent_message_receipts: cbor_cid(&lotus_actors::encode(&Vec::<u8>::new())),
        messages: message_root(&[], &[]),
        bls_aggregate: None,
        timestamp: facts.genesis_ms / 1000,
        block_sig: Some(Signature::new_bls(vec![0; 96])),
        fork_signaling: 0,
        parent_base_fee: initial_base_fee(),
    }
}
