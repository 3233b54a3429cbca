//! The node's keys.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use fvm_shared::crypto::signature::{Signature, SignatureType};
use lotus_node_client::api::{Message, SignedMessage};
use lotus_types::{Address, TokenAmount};

use super::Chain;
use crate::error::ChainError;
use crate::keys::Key;

#[derive(Debug)]
pub(super) struct Wallet {
    keys: BTreeMap<Vec<u8>, Key>,
    default: Address,
}

impl Wallet {
    pub(super) fn new(keys: Vec<Key>, default: Address) -> Self {
        Self {
            keys: keys
                .into_iter()
                .map(|k| (k.address().to_bytes(), k))
                .collect(),
            default,
        }
    }
}

impl Chain {
    /// The key behind an address, an ID address included.
    fn key(&self, addr: &Address) -> Result<Key, ChainError> {
        let key_addr = self.key_address(addr).unwrap_or(*addr);
        let wallet = self.0.wallet.read().unwrap_or_else(PoisonError::into_inner);
        let found = wallet.keys.get(&key_addr.to_bytes()).cloned();
        found.ok_or(ChainError::NoKey(key_addr))
    }

    /// The key address of an account, as the head's state has it.
    pub(super) fn key_address(&self, addr: &Address) -> Option<Address> {
        let head = self.read().head.clone();
        let state = self.execute(&head).ok()?;
        let id = state.state.lookup(addr)?;
        state.state.account(id)?.address
    }

    /// Addresses whose keys the node holds.
    #[must_use]
    pub fn wallet_list(&self) -> Vec<Address> {
        let wallet = self.0.wallet.read().unwrap_or_else(PoisonError::into_inner);
        wallet.keys.values().map(Key::address).collect()
    }

    /// The address that owns t01000.
    #[must_use]
    pub fn wallet_default_address(&self) -> Address {
        self.0
            .wallet
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .default
    }

    /// Whether the node holds an address' key.
    #[must_use]
    pub fn wallet_has(&self, addr: &Address) -> bool {
        self.key(addr).is_ok()
    }

    /// Balance of any actor, attoFIL; 0 for one that does not exist.
    #[must_use]
    pub fn wallet_balance(&self, addr: &Address) -> TokenAmount {
        let head = self.read().head.clone();
        let state = self.execute(&head).ok();
        let found = state.and_then(|s| s.state.lookup(addr).map(|id| s.state.balance(id)));
        found.unwrap_or_default()
    }

    /// Signs bytes as they are.
    pub fn wallet_sign(&self, addr: &Address, data: &[u8]) -> Result<Signature, ChainError> {
        let sig = self.key(addr)?.sign(data);
        sig.ok_or_else(|| ChainError::Invalid("the key can not sign".into()))
    }

    /// Signs a message.
    pub fn wallet_sign_message(
        &self,
        addr: &Address,
        message: Message,
    ) -> Result<SignedMessage, ChainError> {
        let signature = self.wallet_sign(addr, &message.cid().to_bytes())?;
        Ok(SignedMessage { message, signature })
    }

    /// A new key.
    pub fn wallet_new(&self, kind: SignatureType) -> Result<Address, ChainError> {
        self.add_key(Key::generate(kind))
    }

    /// A key's secret.
    pub fn wallet_export(&self, addr: &Address) -> Result<(SignatureType, Vec<u8>), ChainError> {
        let key = self.key(addr)?;
        Ok((key.kind(), key.to_bytes()))
    }

    /// Adds a key from its secret.
    pub fn wallet_import(&self, kind: SignatureType, secret: &[u8]) -> Result<Address, ChainError> {
        let key = Key::from_bytes(kind, secret);
        self.add_key(key.ok_or_else(|| ChainError::Invalid("not a private key".into()))?)
    }

    fn add_key(&self, key: Key) -> Result<Address, ChainError> {
        self.0.disk.put_key(&key)?;
        let address = key.address();
        let mut wallet = self
            .0
            .wallet
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        wallet.keys.insert(address.to_bytes(), key);
        Ok(address)
    }
}
