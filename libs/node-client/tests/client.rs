//! The client against a server that speaks as go-jsonrpc does, byte for byte where it matters.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::ws::{Message as Frame, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{self, get};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::StreamExt;
use lotus_node_client::api::{HeadChangeKind, Message, TipSetKey};
use lotus_node_client::json::address_text;
use lotus_node_client::{Client, FullNode, NodeConfig, NodeError};
use lotus_types::{Address, Epoch, Kind, TokenAmount};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;

const TOKEN: &str = "eyJhbGciOiJIUzI1NiJ9.e30.sig";
const WALLET_TOKEN: &str = "eyJhbGciOiJIUzI1NiJ9.e30.other";
const WAIT: Duration = Duration::from_secs(10);

/// What the channel does after the head.
#[derive(Clone, Copy, PartialEq)]
enum Channel {
    CloseAfterTwo,
    StayOpen,
}

struct Server {
    channel: Channel,
    calls: AtomicUsize,
    requests: Mutex<Vec<Value>>,
}

fn tipset() -> Value {
    serde_json::from_str(include_str!("data/tipset.json")).unwrap()
}

fn answer(server: &Server, request: &Value) -> Value {
    server.calls.fetch_add(1, Ordering::SeqCst);
    server.requests.lock().unwrap().push(request.clone());
    let id = &request["id"];
    let error = |code: i64, message: &str| json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}});
    let result = match request["method"].as_str().unwrap() {
        "Filecoin.ChainHead" => tipset(),
        "Filecoin.MpoolGetNonce" => json!(5),
        "Filecoin.StateAccountKey" => match request["params"][0].as_str().unwrap() {
            "t010" => json!(address_text(&delegated())),
            _ => json!(address_text(&key())),
        },
        "Filecoin.WalletBalance" => json!("7"),
        "Filecoin.WalletDefaultAddress" => json!("t09"),
        "Filecoin.StateMinerPower" => json!("not a power"),
        "Filecoin.WalletSign" => {
            return error(1, "missing permission to invoke 'WalletSign' (need 'sign')");
        }
        "Filecoin.MpoolPush" | "Filecoin.StateMinerInfo" => {
            return error(1, "actor not found: t09");
        }
        "Filecoin.ChainGetGenesis" => {
            // Never answered.
            return Value::Null;
        }
        other => return error(-32601, &format!("method '{other}' not found")),
    };
    json!({"jsonrpc": "2.0", "id": id, "result": result})
}

/// As `lotus-wallet` answers: it knows key addresses alone.
fn answer_of_wallet(server: &Server, request: &Value) -> Value {
    server.requests.lock().unwrap().push(request.clone());
    let id = &request["id"];
    let ours = request["params"][0] == address_text(&key());
    let result = match request["method"].as_str().unwrap() {
        "Filecoin.WalletList" => json!([address_text(&key())]),
        "Filecoin.WalletHas" => json!(ours),
        "Filecoin.WalletSign" if ours => json!({"Type": 1, "Data": "AQID"}),
        _ => {
            let message = "signing using key 't1…': key not found";
            return json!({"jsonrpc": "2.0", "id": id, "error": {"code": 1, "message": message}});
        }
    };
    json!({"jsonrpc": "2.0", "id": id, "result": result})
}

/// A key's address, which the node knows as t09.
fn key() -> Address {
    Address::new_secp256k1(&[4; 65]).unwrap()
}

/// The node knows it as t010.
fn delegated() -> Address {
    Address::new_delegated(10, &[7; 20]).unwrap()
}

fn allowed(headers: &HeaderMap, token: &str) -> bool {
    headers
        .get("authorization")
        .is_some_and(|v| v == &format!("Bearer {token}"))
}

async fn post_wallet(State(s): State<Arc<Server>>, headers: HeaderMap, body: Bytes) -> Response {
    if !allowed(&headers, WALLET_TOKEN) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let request = serde_json::from_slice(&body).unwrap();
    answer_of_wallet(&s, &request).to_string().into_response()
}

async fn post(State(s): State<Arc<Server>>, headers: HeaderMap, body: Bytes) -> Response {
    if !allowed(&headers, TOKEN) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let request: Value = serde_json::from_slice(&body).unwrap();
    match answer(&s, &request) {
        Value::Null => std::future::pending().await,
        // go-jsonrpc's status for calls that do not reach their method.
        v if v["error"]["code"] == -32601 => {
            (StatusCode::INTERNAL_SERVER_ERROR, v.to_string()).into_response()
        }
        v => v.to_string().into_response(),
    }
}

async fn upgrade(
    State(s): State<Arc<Server>>,
    headers: HeaderMap,
    ws: WebSocketUpgrade,
) -> Response {
    if !allowed(&headers, TOKEN) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    ws.on_upgrade(move |socket| serve_channel(s, socket))
}

async fn serve_channel(s: Arc<Server>, mut ws: WebSocket) {
    let Some(Ok(Frame::Text(text))) = ws.recv().await else {
        return;
    };
    let request: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(request["method"], "Filecoin.ChainNotify");
    assert_eq!(request["params"], json!([]));
    let chan = 3;
    let item = |kind: &str| {
        json!({"jsonrpc": "2.0", "method": "xrpc.ch.val",
               "params": [chan, [{"Type": kind, "Val": tipset()}]]})
    };
    let mut out = vec![
        json!({"jsonrpc": "2.0", "result": chan, "id": request["id"]}),
        item("current"),
        item("apply"),
    ];
    if s.channel == Channel::CloseAfterTwo {
        out.push(json!({"jsonrpc": "2.0", "method": "xrpc.ch.close", "params": [chan]}));
    }
    for v in out {
        if ws.send(Frame::Text(v.to_string().into())).await.is_err() {
            return;
        }
    }
    // Until the client leaves.
    while let Some(Ok(_)) = ws.recv().await {}
}

/// A node, and at the wallet's path a wallet.
async fn serve(at: &str, channel: Channel) -> (SocketAddr, Arc<Server>, JoinSet<()>) {
    let listener = TcpListener::bind(at).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = Arc::new(Server {
        channel,
        calls: AtomicUsize::new(0),
        requests: Mutex::default(),
    });
    let app = Router::new()
        .route("/rpc/v1", get(upgrade).post(post))
        .route("/rpc/v0", routing::post(post_wallet))
        .with_state(server.clone());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
    (addr, server, tasks)
}

fn client(addr: SocketAddr, token: &str) -> Arc<Client> {
    Client::connect(&NodeConfig {
        api: format!("{token}:/ip4/{}/tcp/{}/http", addr.ip(), addr.port()),
        call_secs: 1,
        ..NodeConfig::default()
    })
    .unwrap()
}

fn with_wallet(addr: SocketAddr, wallet: String) -> Arc<Client> {
    Client::connect(&NodeConfig {
        api: format!("{TOKEN}:http://{addr}"),
        wallet,
        call_secs: 1,
        ..NodeConfig::default()
    })
    .unwrap()
}

/// Method and parameters of what was asked since the last time.
fn asked(server: &Server) -> Vec<(String, Value)> {
    let requests = std::mem::take(&mut *server.requests.lock().unwrap());
    let part = |r: &Value| {
        let method = r["method"].as_str().unwrap();
        let name = method.strip_prefix("Filecoin.").unwrap();
        (name.to_owned(), r["params"].clone())
    };
    requests.iter().map(part).collect()
}

#[tokio::test]
async fn calls_and_their_errors() {
    let (addr, server, _tasks) = serve("127.0.0.1:0", Channel::StayOpen).await;
    let node = client(addr, TOKEN);
    let t09 = Address::new_id(9);
    assert_eq!(node.chain_head().await.unwrap().height, Epoch(3));
    assert_eq!(node.mpool_get_nonce(t09).await.unwrap(), 5);
    let request = server.requests.lock().unwrap().pop().unwrap();
    assert_eq!(request["method"], "Filecoin.MpoolGetNonce");
    assert_eq!(request["params"], json!(["t09"]));

    let head = TipSetKey::HEAD;
    let e = node.state_miner_info(t09, &head).await.unwrap_err();
    assert_eq!(
        (e.kind(), e.to_string().contains("actor not found")),
        (Kind::Chain, true)
    );
    let request = server.requests.lock().unwrap().pop().unwrap();
    assert_eq!(request["params"], json!(["t09", []]));
    let e = node.state_miner_power(t09, &head).await.unwrap_err();
    assert!(matches!(e, NodeError::Decode { .. }), "{e}");
    let e = node.wallet_sign(t09, b"x").await.unwrap_err();
    assert!(matches!(e, NodeError::Auth { .. }), "{e}");
    let e = node.state_network_name().await.unwrap_err();
    assert_eq!(e.kind(), Kind::Config, "{e}");
    let e = node.chain_get_genesis().await.unwrap_err();
    assert!(matches!(e, NodeError::Timeout { .. }), "{e}");
}

#[tokio::test]
async fn a_wrong_token_is_named_with_its_fix() {
    let (addr, server, _tasks) = serve("127.0.0.1:0", Channel::StayOpen).await;
    let node = client(addr, "wrong");
    let by_call = node.check().await.unwrap_err();
    let by_channel = node.chain_notify().await.err().unwrap();
    for e in [by_call, by_channel] {
        assert!(matches!(e, NodeError::Auth { .. }), "{e}");
        assert_eq!(e.kind(), Kind::Config);
        assert!(e.fix().contains("auth create-token"));
        assert!(!e.to_string().contains("wrong"));
    }
    assert_eq!(server.calls.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_lotus_channel_is_a_stream_that_ends_when_closed() {
    let (addr, _server, _tasks) = serve("127.0.0.1:0", Channel::CloseAfterTwo).await;
    let mut heads = client(addr, TOKEN).chain_notify().await.unwrap();
    for kind in [HeadChangeKind::Current, HeadChangeKind::Apply] {
        let item = timeout(WAIT, heads.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(item[0].kind, kind);
        assert_eq!(item[0].val.height, Epoch(3));
    }
    let end = timeout(WAIT, heads.next()).await.unwrap().unwrap();
    assert!(matches!(end, Err(NodeError::Transport { .. })), "{end:?}");
    assert!(timeout(WAIT, heads.next()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_node_that_was_away_is_met_again() {
    let (addr, _server, tasks) = serve("127.0.0.1:0", Channel::StayOpen).await;
    let node = client(addr, TOKEN);
    node.chain_head().await.unwrap();
    let mut heads = node.chain_notify().await.unwrap();
    timeout(WAIT, heads.next()).await.unwrap().unwrap().unwrap();

    drop(tasks);
    let e = node.chain_head().await.unwrap_err();
    assert_eq!(e.kind(), Kind::Transport);
    assert!(e.fix().contains("start the full node"));

    let (_, _server, _tasks) = serve(&addr.to_string(), Channel::StayOpen).await;
    node.chain_head().await.unwrap();
    let mut heads = node.chain_notify().await.unwrap();
    timeout(WAIT, heads.next()).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_repo_is_read_again_when_the_node_moved() {
    let repo = tempfile::tempdir().unwrap();
    let node = Client::connect(&NodeConfig {
        repo: repo.path().into(),
        call_secs: 1,
        ..NodeConfig::default()
    })
    .unwrap();
    assert_eq!(node.check().await.unwrap_err().kind(), Kind::Transport);
    for _ in 0..2 {
        let (addr, _server, _tasks) = serve("127.0.0.1:0", Channel::StayOpen).await;
        let api = format!("/ip4/{}/tcp/{}/http\n", addr.ip(), addr.port());
        std::fs::write(repo.path().join("token"), TOKEN).unwrap();
        std::fs::write(repo.path().join("api"), api).unwrap();
        node.chain_head().await.unwrap();
    }
}

#[tokio::test]
async fn a_remote_wallet_is_asked_for_keys_and_the_node_for_all_else() {
    let (addr, server, _tasks) = serve("127.0.0.1:0", Channel::StayOpen).await;
    let (at, wallet, _tasks_too) = serve("127.0.0.1:0", Channel::StayOpen).await;
    let node = with_wallet(addr, format!("{WALLET_TOKEN}:http://{at}"));
    assert_eq!(node.wallet(), Some(format!("http://{at}/rpc/v0")));
    let (t09, key) = (Address::new_id(9), key());
    let message = Message {
        version: 0,
        to: Address::new_id(1000),
        from: key,
        nonce: 3,
        value: TokenAmount::from_atto(5),
        gas_limit: 6,
        gas_fee_cap: TokenAmount::from_atto(7),
        gas_premium: TokenAmount::from_atto(8),
        method: 9,
        params: vec![1, 2],
    };

    assert_eq!(node.wallet_list().await.unwrap(), [key]);
    assert!(node.wallet_has(key).await.unwrap());
    let drawn = node.wallet_sign(key, b"drawn").await.unwrap();
    let signed = node.wallet_sign_message(key, &message).await.unwrap();
    assert_eq!((&signed.message, &signed.signature), (&message, &drawn));
    let (text, base64) = (address_text(&key), |bytes: &[u8]| {
        BASE64_STANDARD.encode(bytes)
    });
    let sign = |data: &[u8], meta: Value| {
        let params = json!([text.clone(), base64(data), meta]);
        ("WalletSign".to_owned(), params)
    };
    let extra = base64(&message.to_cbor());
    let calls = [
        ("WalletList".to_owned(), json!([])),
        ("WalletHas".to_owned(), json!([text.clone()])),
        sign(b"drawn", json!({"Type": "unknown", "Extra": null})),
        sign(
            &message.cid().to_bytes(),
            json!({"Type": "message", "Extra": extra}),
        ),
    ];
    assert_eq!(asked(&wallet), calls);
    assert_eq!(asked(&server), []);

    // The wallet knows no chain: the node says whose key it is.
    assert!(node.wallet_has(t09).await.unwrap());
    node.wallet_sign(t09, b"drawn").await.unwrap();
    node.wallet_sign_message(t09, &message).await.unwrap();
    assert_eq!(asked(&wallet), calls[1..]);
    let account = ("StateAccountKey".to_owned(), json!(["t09", []]));
    assert_eq!(asked(&server), [account.clone(), account.clone(), account]);

    node.wallet_balance(key).await.unwrap();
    node.wallet_default_address().await.unwrap();
    assert_eq!(asked(&wallet), []);
    assert_eq!(asked(&server).len(), 2);
}

#[tokio::test]
async fn what_a_remote_wallet_does_not_do_is_named_without_its_token() {
    let (addr, server, _tasks) = serve("127.0.0.1:0", Channel::StayOpen).await;
    let (at, wallet, tasks) = serve("127.0.0.1:0", Channel::StayOpen).await;
    let node = with_wallet(addr, format!("{WALLET_TOKEN}:http://{at}"));
    let named = |e: &NodeError, fix: &str| {
        let text = format!("{e}: {}", e.fix());
        assert!(text.contains("remote wallet"), "{text}");
        assert!(e.fix().contains(fix), "{text}");
        assert!(
            !text.contains(TOKEN) && !text.contains(WALLET_TOKEN),
            "{text}"
        );
        text
    };
    let place = format!("http://{at}/rpc/v0");

    let other = Address::new_secp256k1(&[5; 65]).unwrap();
    let e = node.wallet_sign(other, b"x").await.unwrap_err();
    assert!(matches!(e, NodeError::WalletRefused { .. }), "{e}");
    assert_eq!(e.kind(), Kind::Config);
    let text = named(&e, "import the key");
    assert!(
        text.contains(&place) && text.contains("key not found"),
        "{text}"
    );

    // Another form of signatures.
    asked(&wallet);
    for f4 in [delegated(), Address::new_id(10)] {
        let e = node.wallet_sign(f4, b"x").await.unwrap_err();
        assert!(matches!(e, NodeError::WalletAddress { .. }), "{e}");
        named(&e, "f1 or f3");
    }
    assert_eq!(asked(&wallet), []);

    let wrong = with_wallet(addr, format!("{TOKEN}:http://{at}"));
    let e = wrong.wallet_has(key()).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Config);
    named(&e, "get-api-key");

    // Away, and back.
    drop(tasks);
    let e = node.wallet_has(key()).await.unwrap_err();
    assert!(matches!(e, NodeError::WalletSilent { .. }), "{e}");
    assert_eq!(e.kind(), Kind::Transport);
    let text = named(&e, "start the remote wallet");
    assert!(text.contains(&place), "{text}");
    let (_, _wallet, _tasks_too) = serve(&at.to_string(), Channel::StayOpen).await;
    assert!(node.wallet_has(key()).await.unwrap());

    // The node has no part in it but for ID addresses.
    asked(&server);
    node.wallet_sign(key(), b"x").await.unwrap();
    assert_eq!(asked(&server), []);

    let bad = NodeConfig {
        api: format!("{TOKEN}:http://{addr}"),
        wallet: "secret:127.0.0.1:1777".into(),
        ..NodeConfig::default()
    };
    let e = Client::connect(&bad).err().unwrap();
    assert!(matches!(e, NodeError::BadWallet { .. }), "{e}");
    assert!(!named(&e, "[node] wallet").contains("secret"));
}
