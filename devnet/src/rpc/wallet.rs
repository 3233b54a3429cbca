//! A wallet of its own, behind the API of Lotus' `lotus-wallet`: keys that no node has. Methods,
//! permissions and refusals are those of lotus, api/api_wallet.go and cmd/lotus-wallet.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use cid::Cid;
use lotus_journal::Journal;
use lotus_node_client::api::{Message, Signature};
use lotus_node_client::json::{Lotus, address_text};
use lotus_runtime::{CancellationToken, Fault};
use lotus_tokens::{Perm, Tokens};
use lotus_types::Address;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpListener;

use super::call::{Args, Request, RpcError, to_json};
use super::methods::{export, exported, key_type};
use crate::ChainError;
use crate::chain::{keys, put_key};
use crate::keys::Key;

/// Keys in a folder.
pub struct Wallet {
    journal: Journal,
    keys: RwLock<BTreeMap<Vec<u8>, Key>>,
}

/// What a caller says of the bytes that it wants signed.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Meta {
    r#type: String,
    extra: Lotus<Vec<u8>>,
}

impl Wallet {
    /// Reads the keys of a folder.
    pub fn open(dir: &Path) -> Result<Self, ChainError> {
        let journal = Journal::open(&dir.join("wallet.redb"))?;
        let keys = keys(&journal)?.into_iter();
        let keys = keys.map(|k| (k.address().to_bytes(), k)).collect();
        Ok(Self {
            journal,
            keys: RwLock::new(keys),
        })
    }

    fn key(&self, address: &Address) -> Result<Key, ChainError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let key = keys.get(&address.to_bytes()).cloned();
        key.ok_or(ChainError::NoKey(*address))
    }

    fn add(&self, key: Key) -> Result<Address, ChainError> {
        put_key(&self.journal, &key)?;
        let address = key.address();
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        keys.insert(address.to_bytes(), key);
        Ok(address)
    }

    fn addresses(&self) -> Vec<Address> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.values().map(Key::address).collect()
    }

    fn sign(&self, address: &Address, data: &[u8], meta: &Meta) -> Result<Signature, RpcError> {
        let message = match meta.r#type.as_str() {
            "message" => Some(message(&meta.extra.0, data)?),
            _ => None,
        };
        let signature = self.key(address)?.sign(data);
        let signature = signature.ok_or_else(|| RpcError::failed("the key can not sign"))?;
        tracing::info!(
            r#type = meta.r#type,
            address = address_text(address),
            cid = message.map(tracing::field::display),
            "signed"
        );
        Ok(signature)
    }

    fn call(&self, method: &str, params: Vec<Value>) -> Result<Value, RpcError> {
        let args = |want| Args::new(method, params, want);
        match super::short(method) {
            "WalletNew" => {
                let kind: Value = args(1)?.next()?;
                to_json(&self.add(Key::generate(key_type(&kind)?))?)
            }
            "WalletHas" => to_json(&self.key(&args(1)?.next()?).is_ok()),
            "WalletList" => args(0).and_then(|_| to_json(&self.addresses())),
            "WalletSign" => {
                let mut args = args(3)?;
                let (address, data): (Address, Vec<u8>) = (args.next()?, args.next()?);
                let meta: Meta = serde_json::from_value(args.next()?)
                    .map_err(|e| RpcError::failed(format!("meta: {e}")))?;
                to_json(&self.sign(&address, &data, &meta)?)
            }
            "WalletExport" => {
                let key = self.key(&args(1)?.next()?)?;
                export(key.kind(), &key.to_bytes())
            }
            "WalletImport" => {
                let (kind, secret) = exported(&args(1)?.next()?)?;
                let key = Key::from_bytes(kind, &secret);
                let key = key.ok_or_else(|| RpcError::failed("not a private key"))?;
                to_json(&self.add(key)?)
            }
            _ => Err(RpcError::no_method(method)),
        }
    }
}

/// The message whose CID is to be signed. Source: lotus, cmd/lotus-wallet/interactive.go.
fn message(extra: &[u8], data: &[u8]) -> Result<Cid, RpcError> {
    let message = Message::from_cbor(extra);
    let message = message.map_err(|e| RpcError::failed(format!("unmarshalling message: {e}")))?;
    let cid = message.cid();
    if cid.to_bytes() != data {
        return Err(RpcError::failed("cid(meta.Extra).bytes() != msg"));
    }
    Ok(cid)
}

struct Context {
    wallet: Wallet,
    tokens: Tokens,
}

/// The wallet's server, bound.
pub struct WalletServer {
    listener: TcpListener,
    cx: Arc<Context>,
}

impl WalletServer {
    /// Binds the address.
    pub async fn bind(listen: SocketAddr, wallet: Wallet, tokens: Tokens) -> Result<Self, Fault> {
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|e| Fault::bind(&listen, "--listen", &e))?;
        let cx = Arc::new(Context { wallet, tokens });
        Ok(Self { listener, cx })
    }

    /// The bound address.
    pub fn local_addr(&self) -> Result<SocketAddr, Fault> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves until stopped. `/rpc/v1` is for the commands, which ask a wallet as they ask a node.
    pub async fn serve(self, stop: CancellationToken) -> Result<(), Fault> {
        let app = Router::new()
            .route("/rpc/v0", post(answer))
            .route("/rpc/v1", post(answer))
            .with_state(self.cx);
        let stopped = async move { stop.cancelled().await };
        axum::serve(self.listener, app)
            .with_graceful_shutdown(stopped)
            .await
            .map_err(Fault::from)
    }
}

async fn answer(State(cx): State<Arc<Context>>, headers: HeaderMap, body: Bytes) -> Response {
    let Some(perms) = super::authenticate(&cx.tokens, &headers) else {
        return StatusCode::UNAUTHORIZED.into_response();
    };
    let request = match Request::parse(&body) {
        Ok(request) => request,
        Err(e) => return super::answer(Some(Value::Null), Err(e)),
    };
    let Request { id, method, params } = request;
    // A new key is written to disk.
    let work = move || {
        super::holds(&perms, Perm::Admin, super::short(&method))?;
        cx.wallet.call(&method, params.unwrap_or_default())
    };
    let done = tokio::task::spawn_blocking(work).await;
    let done = done.unwrap_or_else(|e| Err(RpcError::failed(e.to_string())));
    super::answer(id, done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::verify;
    use lotus_node_client::json::parse_address;
    use lotus_types::TokenAmount;
    use serde_json::json;

    fn call(wallet: &Wallet, method: &str, params: Value) -> Result<Value, RpcError> {
        wallet.call(method, serde_json::from_value(params).unwrap())
    }

    #[test]
    fn only_the_message_that_is_shown_is_signed() {
        let dir = tempfile::tempdir().unwrap();
        let wallet = Wallet::open(dir.path()).unwrap();
        let text = call(&wallet, "Filecoin.WalletNew", json!(["bls"])).unwrap();
        let from = parse_address(text.as_str().unwrap()).unwrap();
        let message = Message {
            version: 0,
            to: Address::new_id(1000),
            from,
            nonce: 1,
            value: TokenAmount::from_atto(2),
            gas_limit: 3,
            gas_fee_cap: TokenAmount::from_atto(4),
            gas_premium: TokenAmount::from_atto(5),
            method: 6,
            params: vec![7],
        };
        let (cid, cbor) = (message.cid().to_bytes(), Lotus(message.to_cbor()));
        let sign = |signer: &Value, data: &[u8], kind: &str, extra: Value| {
            let meta = json!({"Type": kind, "Extra": extra});
            let params = json!([signer, Lotus(data.to_vec()), meta]);
            let signature: Lotus<Signature> =
                serde_json::from_value(call(&wallet, "WalletSign", params)?).unwrap();
            Ok::<_, RpcError>(verify(&signature.0, data, &from))
        };
        assert_eq!(sign(&text, &cid, "message", json!(cbor)), Ok(true));
        assert_eq!(sign(&text, b"drawn", "unknown", Value::Null), Ok(true));
        for (signer, data, extra) in [
            (&text, &cid[1..], json!(cbor)),
            (&text, &cid[..], Value::Null),
            (&json!("t0100"), &cid[..], json!(cbor)),
        ] {
            sign(signer, data, "message", extra).unwrap_err();
        }
    }

    #[test]
    fn keys_stay_and_move() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let new = |kind: &str| {
            let wallet = Wallet::open(dirs[0].path()).unwrap();
            call(&wallet, "WalletNew", json!([kind])).unwrap()
        };
        let mut all = vec![new("bls"), new("secp256k1")];
        let [from, to] = dirs.each_ref().map(|d| Wallet::open(d.path()).unwrap());
        for a in &all {
            assert_eq!(call(&to, "WalletHas", json!([a])).unwrap(), false);
            let key = call(&from, "WalletExport", json!([a])).unwrap();
            assert_eq!(&call(&to, "WalletImport", json!([key])).unwrap(), a);
            assert_eq!(call(&to, "WalletHas", json!([a])).unwrap(), true);
        }
        all.sort_by_key(|a| a.as_str().map(str::to_owned));
        assert_eq!(call(&to, "WalletList", json!([])).unwrap(), json!(all));
        call(&to, "WalletBalance", json!(["t0100"])).unwrap_err();
    }
}
