//! Keys: in the node's wallet, or in a remote one that speaks the API of Lotus' `lotus-wallet`.
//!
//! A remote wallet knows no chain: it is asked by key addresses. It has one call that signs, and is
//! told what it signs, so that it can check and log it. Source: lotus, api/api_wallet.go and
//! node/impl/full/wallet.go.

use fvm_shared::address::Protocol;
use lotus_types::Address;
use serde_json::{Value, json};

use crate::api::{Message, Signature, SignedMessage, TipSetKey};
use crate::client::Conn;
use crate::json::{FromLotus, Lotus, address_text};
use crate::{Client, FullNode as _, NodeError};

impl Client {
    pub(crate) async fn keys(&self) -> Result<Vec<Address>, NodeError> {
        match &self.wallet {
            Some(wallet) => self.ask(wallet, "WalletList", vec![]).await,
            None => self.call("WalletList", vec![]).await,
        }
    }

    pub(crate) async fn has_key(&self, addr: Address) -> Result<bool, NodeError> {
        let method = "WalletHas";
        let Some(wallet) = &self.wallet else {
            return self.call(method, vec![self.param(method, &addr)?]).await;
        };
        let key = self.key_address(addr).await?;
        self.ask(wallet, method, vec![self.param(method, &key)?])
            .await
    }

    pub(crate) async fn sign(&self, addr: Address, data: &[u8]) -> Result<Signature, NodeError> {
        let method = "WalletSign";
        let Some(wallet) = &self.wallet else {
            let params = vec![self.param(method, &addr)?, self.param(method, &data)?];
            return self.call(method, params).await;
        };
        let meta = json!({"Type": "unknown", "Extra": null});
        self.sign_as(wallet, addr, data, meta).await
    }

    pub(crate) async fn sign_message(
        &self,
        addr: Address,
        msg: &Message,
    ) -> Result<SignedMessage, NodeError> {
        let Some(wallet) = &self.wallet else {
            let method = "WalletSignMessage";
            let params = vec![self.param(method, &addr)?, self.param(method, &msg)?];
            return self.call(method, params).await;
        };
        let meta = json!({"Type": "message", "Extra": Lotus(msg.to_cbor())});
        let cid = msg.cid().to_bytes();
        let signed = self.sign_as(wallet, addr, &cid, meta);
        Ok(SignedMessage {
            signature: signed.await?,
            message: msg.clone(),
        })
    }

    async fn sign_as(
        &self,
        wallet: &Conn,
        addr: Address,
        data: &[u8],
        meta: Value,
    ) -> Result<Signature, NodeError> {
        let method = "WalletSign";
        let key = self.key_address(addr).await?;
        if key.protocol() == Protocol::Delegated {
            let address = address_text(&key);
            return Err(NodeError::WalletAddress { address });
        }
        let params = vec![self.param(method, &key)?, self.param(method, &data)?, meta];
        self.ask(wallet, method, params).await
    }

    /// The address that a wallet knows a key by.
    async fn key_address(&self, addr: Address) -> Result<Address, NodeError> {
        match addr.protocol() {
            Protocol::ID => self.state_account_key(addr, &TipSetKey::HEAD).await,
            _ => Ok(addr),
        }
    }

    /// Asks the remote wallet. Like the node it may be asked twice without harm.
    async fn ask<R: FromLotus>(
        &self,
        wallet: &Conn,
        method: &str,
        params: Vec<Value>,
    ) -> Result<R, NodeError> {
        let (name, waited) = (format!("Filecoin.{method}"), self.call_timeout());
        let mut answer = wallet.call(method, &name, params.clone(), waited).await;
        if let Err(NodeError::Transport { .. }) = answer {
            answer = wallet.call(method, &name, params, waited).await;
        }
        answer.map_err(|e| of_wallet(wallet, method, e))
    }
}

/// The error of a call, as one of the remote wallet.
fn of_wallet(wallet: &Conn, method: &str, e: NodeError) -> NodeError {
    let (answered, why) = match e {
        NodeError::Transport { why, .. } => (false, why),
        NodeError::Timeout { waited, .. } => (false, format!("no answer within {waited:?}")),
        NodeError::Rpc { message, .. } => (true, message),
        NodeError::Auth { why, .. } => (true, format!("the token: {why}")),
        NodeError::Decode { why, .. } => (true, format!("unexpected answer: {why}")),
        other => return other,
    };
    let (endpoint, method) = (wallet.endpoint.to_string(), method.to_owned());
    if answered {
        NodeError::WalletRefused {
            endpoint,
            method,
            why,
        }
    } else {
        NodeError::WalletSilent {
            endpoint,
            method,
            why,
        }
    }
}
