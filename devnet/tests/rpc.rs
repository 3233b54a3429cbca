//! The devnet in process, met by the node client over HTTP and WebSocket.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lotus_chain::{Change, Changes, Follower};
use lotus_devnet::rpc::{Perm, Server, Tokens};
use lotus_devnet::{Chain, ChainConfig, Policy};
use lotus_node_client::api::{Message, TipSet, TipSetKey};
use lotus_node_client::{Client, FullNode, NodeConfig, NodeError};
use lotus_proofs::Vanilla;
use lotus_runtime::{CancellationToken, Fault};
use lotus_types::{Address, Epoch, EpochDelta, Kind, TokenAmount};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::timeout;

const WAIT: Duration = Duration::from_secs(30);
const HEAD: TipSetKey = TipSetKey::HEAD;

struct Devnet {
    repo: TempDir,
    addr: SocketAddr,
    stop: CancellationToken,
    tasks: JoinSet<Result<(), Fault>>,
}

impl Devnet {
    async fn start() -> Self {
        let repo = tempfile::tempdir().unwrap();
        let cfg = ChainConfig {
            policy: Policy::fast().with_block_time_ms(50),
            ..ChainConfig::default()
        };
        let chain = Chain::open(repo.path(), cfg, Arc::new(Vanilla)).unwrap();
        let tokens = Tokens::open(repo.path()).unwrap();
        let server = Server::bind(([127, 0, 0, 1], 0).into(), chain.clone(), tokens).await;
        let server = server.unwrap();
        let addr = server.local_addr().unwrap();
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(server.serve(stop.clone()));
        let clock = stop.clone();
        tasks.spawn(async move {
            chain.run(clock).await.unwrap();
            Ok(())
        });
        Self {
            repo,
            addr,
            stop,
            tasks,
        }
    }

    fn client(&self, token: &str) -> Arc<Client> {
        let api = format!("{token}:http://{}", self.addr);
        Client::connect(&NodeConfig {
            api,
            ..NodeConfig::default()
        })
        .unwrap()
    }

    fn token(&self, perm: Perm) -> String {
        Tokens::open(self.repo.path()).unwrap().issue(&perm.up_to())
    }

    fn admin(&self) -> Arc<Client> {
        self.client(&self.token(Perm::Admin))
    }

    async fn end(mut self) {
        self.stop.cancel();
        let all = async {
            while let Some(part) = self.tasks.join_next().await {
                part.unwrap().unwrap();
            }
        };
        timeout(WAIT, all).await.expect("the devnet stops");
    }

    async fn raw(&self, body: String) -> (u16, Value) {
        let answer = reqwest::Client::builder()
            .no_proxy()
            .build()
            .unwrap()
            .post(format!("http://{}/rpc/v1", self.addr))
            .bearer_auth(self.token(Perm::Admin))
            .body(body)
            .send()
            .await
            .unwrap();
        let status = answer.status().as_u16();
        (status, answer.json().await.unwrap_or_default())
    }
}

/// Keeps the chain by changes alone.
struct Walk {
    changes: Changes,
    chain: Vec<Arc<TipSet>>,
    reverted: usize,
}

impl Walk {
    fn new(follower: &Follower) -> Self {
        Self {
            changes: follower.changes(),
            chain: Vec::new(),
            reverted: 0,
        }
    }

    async fn until(&mut self, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let change = timeout(WAIT, self.changes.next())
                .await
                .expect("heads go on");
            match change.unwrap() {
                Change::Apply(t) => {
                    if let Some(top) = self.chain.last() {
                        assert_eq!(t.parents(), top.key());
                    }
                    self.chain.push(t);
                }
                Change::Revert(t) => {
                    assert_eq!(self.chain.pop(), Some(t));
                    self.reverted += 1;
                }
            }
        }
    }

    fn height(&self) -> i64 {
        self.chain.last().map_or(0, |t| t.height.0)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_are_followed_through_every_fault() {
    let net = Devnet::start().await;
    let node = net.admin();
    let stop = net.stop.child_token();
    let (follower, runner) = Follower::new(node.clone());
    let mut tasks = JoinSet::new();
    tasks.spawn(runner.run(stop.clone()));
    follower.wait_height(Epoch(0)).await.unwrap();
    let mut walk = Walk::new(&follower);
    let fault = async |method: &str, params: Value| {
        let params = params.as_array().unwrap().clone();
        node.request(method, params).await.unwrap()
    };

    let start = node.chain_head().await.unwrap().height.0;
    walk.until(|w| w.height() >= start + 6).await;
    fault("Devnet.Reorg", json!([3])).await;
    walk.until(|w| w.reverted >= 3).await;
    let at = walk.height();
    walk.until(|w| w.height() >= at + 4).await;

    fault("Devnet.NullRounds", json!([3])).await;
    let gap = |w: &Walk| {
        let heights: Vec<_> = w.chain.iter().map(|t| t.height.0).collect();
        heights.windows(2).any(|p| p[1] - p[0] >= 4)
    };
    walk.until(gap).await;

    let at = walk.height();
    fault("Devnet.DropConnections", json!([300])).await;
    timeout(WAIT, follower.connection().wait_for(Result::is_err))
        .await
        .unwrap()
        .unwrap();
    walk.until(|w| w.height() >= at + 10).await;

    fault("Devnet.StopBlocks", json!([])).await;
    let still = node.chain_head().await.unwrap();
    fault("Devnet.ResumeBlocks", json!([])).await;
    walk.until(|w| w.height() > still.height.0).await;

    // What was walked is the chain.
    let head = walk.chain.last().unwrap().key();
    for t in &walk.chain {
        let there = node
            .chain_get_tipset_by_height(t.height, &head)
            .await
            .unwrap();
        assert_eq!(there.cids, t.cids);
    }
    stop.cancel();
    timeout(WAIT, tasks.join_all()).await.unwrap();
    net.end().await;
}

fn transfer(from: Address, to: Address, nonce: u64) -> Message {
    Message {
        version: 0,
        to,
        from,
        nonce,
        value: TokenAmount::from_atto(7),
        gas_limit: 0,
        gas_fee_cap: TokenAmount::default(),
        gas_premium: TokenAmount::default(),
        method: 0,
        params: vec![],
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_are_sent_and_found() {
    let net = Devnet::start().await;
    let node = net.admin();
    let from = node.wallet_default_address().await.unwrap();
    let to = node
        .request("Filecoin.WalletNew", vec![json!("secp256k1")])
        .await
        .unwrap();
    let to = lotus_node_client::json::parse_address(to.as_str().unwrap()).unwrap();
    assert!(node.wallet_has(to).await.unwrap());

    let nonce = node.mpool_get_nonce(from).await.unwrap();
    let send = async |nonce| -> Result<_, NodeError> {
        let msg = transfer(from, to, nonce);
        let msg = node.gas_estimate_message_gas(&msg, None, &HEAD).await?;
        let signed = node.wallet_sign_message(from, &msg).await?;
        let cid = node.mpool_push(&signed).await?;
        assert_eq!(cid, signed.cid());
        Ok(signed)
    };
    let signed = send(nonce).await.unwrap();
    let found = timeout(
        WAIT,
        node.state_wait_msg(signed.cid(), 2, EpochDelta(-1), false),
    );
    let found = found.await.unwrap().unwrap();
    assert_eq!(found.receipt.exit_code, 0);
    assert_eq!(found.message, signed.cid());
    assert_eq!(
        node.wallet_balance(to).await.unwrap(),
        TokenAmount::from_atto(7)
    );
    let again = node
        .state_search_msg(&HEAD, signed.cid(), EpochDelta(-1), false)
        .await;
    assert_eq!(again.unwrap().unwrap().tip_set, found.tip_set);
    assert_eq!(
        node.chain_get_message(signed.cid()).await.unwrap(),
        signed.message
    );

    // The mempool's words.
    let e = send(nonce).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Chain);
    assert!(e.to_string().contains("nonce"), "{e}");
    node.request("Devnet.RefuseMessages", vec![json!(1), json!("go away")])
        .await
        .unwrap();
    let e = send(nonce + 1).await.unwrap_err();
    assert!(e.to_string().contains("go away"), "{e}");
    send(nonce + 1).await.unwrap();
    net.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_miner_and_the_network_answer() {
    let net = Devnet::start().await;
    let node = net.admin();
    let miner = Address::new_id(1000);
    let info = node.state_miner_info(miner, &HEAD).await.unwrap();
    assert_eq!(
        (info.sector_size, info.window_post_partition_sectors),
        (2048, 2)
    );
    let d = node
        .state_miner_proving_deadline(miner, &HEAD)
        .await
        .unwrap();
    assert_eq!(
        (d.w_post_period_deadlines, d.w_post_challenge_window),
        (6, EpochDelta(20))
    );
    assert_eq!(
        node.state_miner_deadlines(miner, &HEAD)
            .await
            .unwrap()
            .len(),
        6
    );
    let params = node.state_get_network_params().await.unwrap();
    assert_eq!(params.block_delay(), Duration::from_millis(50));
    let worker = node.state_account_key(info.worker, &HEAD).await.unwrap();
    assert!(node.wallet_has(worker).await.unwrap());
    assert_eq!(
        node.state_lookup_id(worker, &HEAD).await.unwrap(),
        info.worker
    );
    assert!(
        node.state_list_miners(&HEAD)
            .await
            .unwrap()
            .contains(&miner)
    );
    let sectors = node.state_miner_sectors(miner, None, &HEAD).await.unwrap();
    assert!(sectors.is_empty());
    let genesis = node.chain_get_genesis().await.unwrap();
    assert_eq!(genesis.height, Epoch(0));
    let obj = node.chain_read_obj(genesis.cids[0]).await.unwrap();
    assert_eq!(obj, genesis.blocks[0].to_cbor());
    let random = async |epoch| {
        let at = Epoch(epoch);
        node.state_get_randomness_from_tickets(5, at, b"x", &genesis.key())
            .await
    };
    assert_eq!(random(0).await.unwrap(), random(0).await.unwrap());
    assert!(random(1_000_000).await.is_err());
    let e = node
        .state_get_actor(Address::new_id(9_999_999), &HEAD)
        .await;
    assert!(
        matches!(e, Ok(None) | Err(NodeError::Rpc { code: 1, .. })),
        "{e:?}"
    );
    net.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_decide() {
    let net = Devnet::start().await;
    // A token of another devnet.
    let other = tempfile::tempdir().unwrap();
    let foreign = Tokens::open(other.path()).unwrap().issue(&Perm::ALL);
    for token in ["nonsense", &foreign] {
        let node = net.client(token);
        let call = node.chain_head().await.unwrap_err();
        let channel = node.chain_notify().await.err().unwrap();
        for e in [call, channel] {
            assert!(matches!(e, NodeError::Auth { .. }), "{e}");
            assert_eq!(e.kind().code(), 78);
        }
    }
    let from = net.admin().wallet_default_address().await.unwrap();
    for (token, may_sign) in [
        (String::new(), false),
        (net.token(Perm::Write), false),
        (net.token(Perm::Sign), true),
    ] {
        let node = net.client(&token);
        node.chain_head().await.unwrap();
        drop(node.chain_notify().await.unwrap());
        match node.wallet_sign(from, b"x").await {
            Ok(_) => assert!(may_sign),
            Err(e) => assert!(!may_sign && matches!(e, NodeError::Auth { .. }), "{e}"),
        }
        assert!(node.request("Devnet.StopBlocks", vec![]).await.is_err());
    }
    net.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wire_is_that_of_lotus() {
    let net = Devnet::start().await;
    let call = |method: &str, params: Value| {
        json!({"jsonrpc": "2.0", "id": "a", "method": method, "params": params}).to_string()
    };
    let (status, answer) = net.raw(call("Filecoin.StateNetworkName", json!([]))).await;
    assert_eq!(
        (status, &answer["id"], &answer["jsonrpc"]),
        (200, &json!("a"), &json!("2.0"))
    );
    assert!(answer["result"].is_string());
    for (body, status, code, words) in [
        ("{".to_owned(), 500, -32_700, "unmarshaling request"),
        ("[]".to_owned(), 500, -32_600, "invalid request"),
        (
            call("Filecoin.Nothing", json!([])),
            500,
            -32_601,
            "method 'Filecoin.Nothing' not found",
        ),
        (
            call("Filecoin.StateMinerInfo", json!(["t01000"])),
            500,
            -32_602,
            "wrong param count (method 'StateMinerInfo'): 1 != 2",
        ),
        (
            call("Filecoin.StateMinerInfo", json!(["t9", []])),
            500,
            -32_700,
            "unmarshaling params for 'StateMinerInfo' (param: 1)",
        ),
        (
            call("Filecoin.ChainNotify", json!([])),
            500,
            -32_601,
            "not supported in this mode",
        ),
        (
            call("Filecoin.StateMinerInfo", json!(["t09999", []])),
            200,
            1,
            "actor not found",
        ),
    ] {
        let (got, answer) = net.raw(body.clone()).await;
        assert_eq!(
            (got, &answer["error"]["code"]),
            (status, &json!(code)),
            "{body}: {answer}"
        );
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{message}");
    }
    let (status, _) = net.raw(" ".repeat(65 << 20)).await;
    assert_eq!(status, 413);
    // Error answers.
    let node = net.admin();
    node.request("Devnet.FailCalls", vec![json!(2)])
        .await
        .unwrap();
    for fails in [true, true, false] {
        assert_eq!(node.chain_head().await.is_err(), fails);
    }
    // Late answers.
    node.request("Devnet.Delay", vec![json!(400)])
        .await
        .unwrap();
    let begin = std::time::Instant::now();
    node.chain_head().await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(400));
    net.end().await;
}
