//! The sender over a real journal and a small chain.

#![expect(clippy::unwrap_used, reason = "a failed test panics")]

mod fake;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fake::Fake;
use lotus_chain::Follower;
use lotus_journal::Journal;
use lotus_messages::{Landed, MessageKind, MessagesConfig, SendError, SendRequest, Sender};
use lotus_types::{Address, Epoch, Kind, TokenAmount};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

fn worker() -> Address {
    Address::new_id(1001)
}

fn request(key: &str) -> SendRequest {
    SendRequest {
        key: key.into(),
        from: worker(),
        to: Address::new_id(1000),
        method: 5,
        params: key.as_bytes().to_vec(),
        value: TokenAmount::from_atto(7),
        kind: MessageKind::Other,
        max_fee: None,
    }
}

/// A hub's message part over the journal in `dir`.
struct Hub {
    sender: Sender,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Hub {
    fn start(dir: &Path, chain: &Fake) -> Self {
        let journal = Journal::open(&dir.join("journal")).unwrap();
        let node = Arc::new(chain.clone());
        let (follower, walk) = Follower::new(node.clone());
        let cfg = MessagesConfig {
            confidence_epochs: 3,
            finality_epochs: 20,
            repush_secs: 1,
            send_secs: 10,
            wait_secs: 20,
            ..MessagesConfig::default()
        };
        let (sender, runner) = Sender::new(journal, node, &follower, cfg);
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let end = stop.clone();
        tasks.spawn(async move {
            walk.run(end).await;
        });
        tasks.spawn(runner.run(stop.clone()));
        Self {
            sender,
            stop,
            tasks,
        }
    }

    /// Stops and gives the journal back.
    async fn stop(mut self) {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Mines until the future is done.
async fn while_mining<T>(chain: &Fake, work: impl Future<Output = T>) -> T {
    let mine = async {
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            chain.mine();
        }
    };
    tokio::select! {
        done = tokio::time::timeout(PATIENCE, work) => done.expect("done in time"),
        () = mine => unreachable!("mining never ends"),
    }
}

/// Waits for a condition of the chain.
async fn until(what: &str, f: impl Fn() -> bool) {
    let poll = async {
        while !f() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, poll)
        .await
        .unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_makes_one_message_and_nonces_have_no_gap() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![0xf6])));
    let hub = Hub::start(dir.path(), &chain);
    let mut sends = JoinSet::new();
    for i in 0..40 {
        let sender = hub.sender.clone();
        sends.spawn(async move { sender.send(request(&format!("k{}", i % 10))).await.unwrap() });
    }
    let cids: HashSet<_> = sends.join_all().await.into_iter().collect();
    assert_eq!(cids.len(), 10);
    while_mining(&chain, async {
        for i in 0..10 {
            let landed = hub.sender.wait(&format!("k{i}"), 3).await.unwrap();
            assert_eq!(
                (landed.exit_code, landed.return_data.as_slice()),
                (0, &[0xf6][..])
            );
        }
    })
    .await;
    let nonces: Vec<_> = chain
        .lock()
        .landed()
        .iter()
        .map(|m| m.message.nonce)
        .collect();
    assert_eq!(nonces, (0..10).collect::<Vec<_>>());
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_pushes_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    chain.lock().failures.extend(["MpoolPush"; 3]);
    let hub = Hub::start(dir.path(), &chain);
    let cid = hub.sender.send(request("only")).await.unwrap();
    assert!(chain.lock().mempool.is_empty(), "the push failed");
    let status = hub.sender.status("only").await.unwrap().unwrap();
    assert!(status.last_error.unwrap().contains("connection reset"));
    hub.stop().await;

    let hub = Hub::start(dir.path(), &chain);
    assert_eq!(hub.sender.send(request("only")).await.unwrap(), cid);
    let landed = while_mining(&chain, hub.sender.wait("only", 3))
        .await
        .unwrap();
    assert_eq!(landed.cid, cid);
    hub.stop().await;
    let inner = chain.lock();
    let distinct: HashSet<_> = inner.pushes.iter().collect();
    assert_eq!(distinct.len(), 1, "only ever the same signed bytes");
    assert!(inner.pushes.len() >= 4);
    assert_eq!(inner.landed().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_that_a_reorg_removes_is_waited_for_again() {
    for forget in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let chain = Fake::new(Box::new(|_, _| (0, vec![])));
        let hub = Hub::start(dir.path(), &chain);
        let cid = hub.sender.send(request("k")).await.unwrap();
        let sender = hub.sender.clone();
        let mut waits = JoinSet::new();
        waits.spawn(async move { sender.wait("k", 5).await });
        for _ in 0..4 {
            chain.mine();
        }
        assert_eq!(chain.lock().landed().len(), 1);
        chain.reorg(4, forget);
        assert!(chain.lock().landed().is_empty());
        let landed: Landed = while_mining(&chain, waits.join_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(landed.cid, cid);
        assert!(landed.height > Epoch(5), "{}", landed.height);
        assert_eq!(chain.lock().landed().len(), 1);
        hub.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nonce_that_another_program_took_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    let hub = Hub::start(dir.path(), &chain);
    hub.sender.send(request("mine")).await.unwrap();
    chain.intrude(worker());
    let lost = while_mining(&chain, hub.sender.wait("mine", 3))
        .await
        .unwrap_err();
    assert!(
        matches!(lost, SendError::Replaced { nonce: 0, .. }),
        "{lost}"
    );
    assert_eq!(lost.kind(), Kind::Chain);
    // A new key gets a new nonce and lands.
    hub.sender.send(request("mine/1")).await.unwrap();
    let landed = while_mining(&chain, hub.sender.wait("mine/1", 3))
        .await
        .unwrap();
    assert_eq!(landed.exit_code, 0);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_chain_would_refuse_is_not_signed() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    let hub = Hub::start(dir.path(), &chain);
    chain.lock().refuse = 16;
    let refused = hub.sender.send(request("k")).await.unwrap_err();
    assert!(
        matches!(refused, SendError::Refused { exit_code: 16, .. }),
        "{refused}"
    );
    assert!(
        refused.to_string().contains("USR_ILLEGAL_ARGUMENT"),
        "{refused}"
    );
    assert_eq!(hub.sender.status("k").await.unwrap(), None);
    chain.lock().refuse = 0;

    let dear = SendRequest {
        max_fee: Some(TokenAmount::from_atto(1_000)),
        ..request("k")
    };
    let dear = hub.sender.send(dear).await.unwrap_err();
    assert!(matches!(dear, SendError::FeeLimit { .. }), "{dear}");
    let poor = SendRequest {
        value: TokenAmount::from_whole(2_000),
        ..request("k")
    };
    let poor = hub.sender.send(poor).await.unwrap_err();
    assert!(matches!(poor, SendError::Funds { .. }), "{poor}");
    let unknown = hub.sender.wait("k", 1).await.unwrap_err();
    assert!(matches!(unknown, SendError::Unknown(_)), "{unknown}");
    let bad = hub.sender.send(request("")).await.unwrap_err();
    assert!(matches!(bad, SendError::BadKey(_)), "{bad}");
    assert!(chain.lock().pushes.is_empty());
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_comes_back_is_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    chain.lock().failures.extend([
        "GasEstimateMessageGas",
        "MpoolGetNonce",
        "WalletSignMessage",
        "StateSearchMsg",
    ]);
    let hub = Hub::start(dir.path(), &chain);
    hub.sender.send(request("k")).await.unwrap();
    while_mining(&chain, hub.sender.wait("k", 3)).await.unwrap();
    until("every failure was met", || chain.lock().failures.is_empty()).await;
    hub.stop().await;
}
