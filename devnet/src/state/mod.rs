//! The state tree: plain data, shared between the states of successive tipsets.

mod miner;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use cid::Cid;
use lotus_actors::market::{DealProposal, DealState};
use lotus_actors::miner::PowerPair;
use lotus_actors::verifreg::{Allocation, Claim};
use lotus_actors::{BigInt, actors};
use lotus_node_client::api::cbor_cid;
use lotus_types::{Address, TokenAmount};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_bytes::ByteBuf;

pub use miner::{Deadline, Miner, Partition, Submission, bits};

/// Maps as lists of pairs: DAG-CBOR allows only text as a map's key.
pub(crate) mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        m: &BTreeMap<K, V>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        s.collect_seq(m.iter())
    }

    pub(crate) fn deserialize<'de, K, V, D>(d: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Ok(Vec::<(K, V)>::deserialize(d)?.into_iter().collect())
    }
}

/// A part of the state that successive states share until one edits it.
#[derive(Debug, Default)]
pub struct Part<T> {
    value: Arc<T>,
    cid: OnceLock<Cid>,
}

impl<T> Clone for Part<T> {
    fn clone(&self) -> Self {
        Self {
            value: self.value.clone(),
            cid: self.cid.clone(),
        }
    }
}

impl<T> From<T> for Part<T> {
    fn from(value: T) -> Self {
        Self {
            value: Arc::new(value),
            cid: OnceLock::new(),
        }
    }
}

impl<T> Deref for Part<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Clone> Part<T> {
    /// The value for editing, copied first if another state shares it.
    pub fn edit(&mut self) -> &mut T {
        self.cid = OnceLock::new();
        Arc::make_mut(&mut self.value)
    }
}

impl<T: Serialize> Part<T> {
    /// CID of the part's CBOR.
    pub fn cid(&self) -> Cid {
        *self.cid.get_or_init(|| cbor_cid(&encode(&*self.value)))
    }
}

impl<T: Serialize> Serialize for Part<T> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.value.serialize(s)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Part<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        T::deserialize(d).map(Self::from)
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    fvm_ipld_encoding::to_vec(value).expect("state is integers, bytes, text and CIDs")
}

/// What an actor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActorKind {
    /// A key holder.
    Account,
    /// A storage provider.
    Miner,
    /// One of [`lotus_actors::actors`].
    Singleton,
}

/// An actor's funds and its place in the address space.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Account {
    /// What it is.
    pub kind: ActorKind,
    /// Its key address (accounts) or robust address (miners).
    pub address: Option<Address>,
    /// Next nonce.
    pub nonce: u64,
    /// attoFIL.
    pub balance: TokenAmount,
}

/// Every actor's account, and the ids of addresses.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Accounts {
    /// By id.
    #[serde(with = "pairs")]
    pub by_id: BTreeMap<u64, Account>,
    /// Ids of key and robust addresses, by the address' bytes: its text depends on the process.
    #[serde(with = "pairs")]
    pub ids: BTreeMap<ByteBuf, u64>,
    /// The next id that the init actor assigns.
    pub next_id: u64,
}

/// Escrow of one participant, attoFIL.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Escrow {
    /// Everything deposited.
    pub total: TokenAmount,
    /// The part bound to deals.
    pub locked: TokenAmount,
}

/// A published deal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Deal {
    /// What the parties agreed, with ID addresses.
    pub proposal: DealProposal,
    /// Where it is stored; absent until a sector holds it.
    pub state: Option<DealState>,
}

/// The market actor.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Market {
    /// By actor id.
    #[serde(with = "pairs")]
    pub escrow: BTreeMap<u64, Escrow>,
    /// By deal id.
    #[serde(with = "pairs")]
    pub deals: BTreeMap<u64, Deal>,
    /// The next deal id.
    pub next_deal: u64,
}

/// The verified registry and the DataCap token.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Registry {
    /// DataCap by actor id, bytes.
    #[serde(with = "pairs")]
    pub datacap: BTreeMap<u64, u64>,
    /// By client and allocation id.
    #[serde(with = "pairs")]
    pub allocations: BTreeMap<(u64, u64), Allocation>,
    /// By provider and claim id, which is the allocation's.
    #[serde(with = "pairs")]
    pub claims: BTreeMap<(u64, u64), Claim>,
    /// The last allocation id; 0 means none.
    pub last_allocation: u64,
}

/// The state of the chain after some tipset.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Funds and addresses.
    pub accounts: Part<Accounts>,
    /// Storage providers by actor id.
    #[serde(with = "pairs")]
    pub miners: BTreeMap<u64, Part<Miner>>,
    /// The market.
    pub market: Part<Market>,
    /// Allocations and claims.
    pub registry: Part<Registry>,
}

impl State {
    /// CID of the whole state.
    #[must_use]
    pub fn root(&self) -> Cid {
        let miners: Vec<_> = self.miners.iter().map(|(id, m)| (id, m.cid())).collect();
        cbor_cid(&encode(&(
            self.accounts.cid(),
            miners,
            self.market.cid(),
            self.registry.cid(),
        )))
    }

    /// The id of an address, if the chain knows it.
    #[must_use]
    pub fn lookup(&self, addr: &Address) -> Option<u64> {
        match addr.id() {
            Ok(id) => self.accounts.by_id.contains_key(&id).then_some(id),
            Err(_) => self
                .accounts
                .ids
                .get(&ByteBuf::from(addr.to_bytes()))
                .copied(),
        }
    }

    /// An actor's account.
    #[must_use]
    pub fn account(&self, id: u64) -> Option<&Account> {
        self.accounts.by_id.get(&id)
    }

    /// attoFIL of an actor; 0 for one that does not exist.
    #[must_use]
    pub fn balance(&self, id: u64) -> TokenAmount {
        self.account(id)
            .map(|a| a.balance.clone())
            .unwrap_or_default()
    }

    /// Makes an actor with the next id.
    pub fn create(&mut self, kind: ActorKind, address: Address) -> u64 {
        let accounts = self.accounts.edit();
        let id = accounts.next_id;
        accounts.next_id += 1;
        accounts.ids.insert(address.to_bytes().into(), id);
        accounts.by_id.insert(
            id,
            Account {
                kind,
                address: Some(address),
                nonce: 0,
                balance: TokenAmount::default(),
            },
        );
        id
    }

    /// Adds to a balance out of nothing: genesis, and one half of a transfer.
    pub fn credit(&mut self, id: u64, amount: &TokenAmount) {
        if let Some(a) = self.accounts.edit().by_id.get_mut(&id) {
            a.balance += amount;
        }
    }

    /// Moves funds. `false`, and nothing moved, if the sender has too little or an actor is
    /// missing.
    #[must_use]
    pub fn transfer(&mut self, from: u64, to: u64, amount: &TokenAmount) -> bool {
        if amount.is_negative() || self.balance(from) < *amount || self.account(to).is_none() {
            return false;
        }
        if !amount.is_zero() {
            let debit = -amount.clone();
            self.credit(from, &debit);
            self.credit(to, amount);
        }
        true
    }

    /// Burns as much of `amount` as the actor has, and returns how much that was.
    pub fn burn(&mut self, from: u64, amount: &TokenAmount) -> TokenAmount {
        let burnt = self.balance(from).min(amount.clone());
        if burnt.is_positive() && self.transfer(from, actors::BURNT_FUNDS.0, &burnt) {
            burnt
        } else {
            TokenAmount::default()
        }
    }

    /// Power of all miners.
    #[must_use]
    pub fn total_power(&self) -> PowerPair {
        let mut total = PowerPair::zero();
        for m in self.miners.values() {
            total += &m.power;
        }
        total
    }

    /// Quality-adjusted power of one miner; 0 for one that does not exist.
    #[must_use]
    pub fn qa_power(&self, miner: u64) -> BigInt {
        self.miners
            .get(&miner)
            .map(|m| m.power.qa.clone())
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_follows_every_part_and_survives_encoding() {
        let mut s = State::default();
        let empty = s.root();
        s.accounts.edit().next_id = 100;
        let id = s.create(ActorKind::Account, Address::new_bls(&[7; 48]).unwrap());
        assert_ne!(s.root(), empty);
        let shared = s.clone();
        s.credit(id, &TokenAmount::from_whole(3));
        assert_ne!(s.root(), shared.root());
        assert_eq!(shared.balance(id), TokenAmount::default());
        let back: State = fvm_ipld_encoding::from_slice(&encode(&s)).unwrap();
        assert_eq!(back.root(), s.root());
        assert_eq!(back.lookup(&Address::new_bls(&[7; 48]).unwrap()), Some(id));
    }

    #[test]
    fn money_moves_and_is_never_made() {
        let mut s = State::default();
        let a = s.create(ActorKind::Account, Address::new_bls(&[1; 48]).unwrap());
        let b = s.create(ActorKind::Account, Address::new_bls(&[2; 48]).unwrap());
        s.credit(a, &TokenAmount::from_whole(5));
        assert!(!s.transfer(a, b, &TokenAmount::from_whole(6)));
        assert!(!s.transfer(a, 77, &TokenAmount::from_whole(1)));
        assert!(!s.transfer(a, b, &TokenAmount::from_whole(-1)));
        assert!(s.transfer(a, b, &TokenAmount::from_whole(2)));
        assert!(s.transfer(a, a, &TokenAmount::from_whole(3)));
        assert_eq!(s.balance(a), TokenAmount::from_whole(3));
        assert_eq!(s.balance(b), TokenAmount::from_whole(2));
    }
}
