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
use lotus_messages::{
    Landed, MessageKind, MessagesConfig, Payer, SendError, SendRequest, Sender, StopReason,
};
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
        from: Payer::Address(worker()),
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
        Self::start_with(dir, chain, |_| {})
    }

    fn start_with(dir: &Path, chain: &Fake, change: impl FnOnce(&mut MessagesConfig)) -> Self {
        let journal = Journal::open(&dir.join("journal")).unwrap();
        let node = Arc::new(chain.clone());
        let (follower, walk) = Follower::new(node.clone());
        let mut cfg = MessagesConfig {
            confidence_epochs: 3,
            finality_epochs: 20,
            repush_secs: 1,
            send_secs: 10,
            wait_secs: 20,
            ..MessagesConfig::default()
        };
        change(&mut cfg);
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
    assert!(
        poor.to_string().contains("1000.05 FIL are missing"),
        "{poor}"
    );
    let unknown = hub.sender.wait("k", 1).await.unwrap_err();
    assert!(matches!(unknown, SendError::Unknown(_)), "{unknown}");
    let bad = hub.sender.send(request("")).await.unwrap_err();
    assert!(matches!(bad, SendError::BadKey(_)), "{bad}");
    assert!(chain.lock().pushes.is_empty());
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn money_that_is_missing_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    let hub = Hub::start_with(dir.path(), &chain, |cfg| {
        cfg.breaker.pause_epochs = 100_000;
        cfg.breaker.max_refusals = 1;
    });
    let deposit = |key: &str, kind| SendRequest {
        from: Payer::Miner(Address::new_id(1000)),
        value: TokenAmount::from_whole(2),
        kind,
        ..request(key)
    };
    // The balance is short of the value, which a node calls a failed message.
    chain.lock().balance = TokenAmount::from_whole(1);
    let short = deposit("batch", MessageKind::PreCommit);
    let e = hub.sender.send(short.clone()).await.unwrap_err();
    assert!(matches!(e, SendError::Funds { .. }) && e.is_short(), "{e}");
    assert_eq!(e.kind(), Kind::Capacity);
    // Enough by our count, but others' messages wait in the mempool (6), or the receiver is in
    // debt (19).
    chain.lock().balance = TokenAmount::from_whole(1_000);
    for (exit, kind, who) in [
        (6, MessageKind::Commit, worker()),
        (19, MessageKind::Terminate, Address::new_id(1000)),
    ] {
        chain.lock().refuse = exit;
        let e = hub.sender.send(deposit("k", kind)).await.unwrap_err();
        assert!(e.is_short() && e.fix().contains(&who.to_string()), "{e}");
    }
    chain.lock().refuse = 0;
    let stops = hub.sender.money().await.unwrap().stops;
    assert_eq!(stops.len(), 3);
    for (kind, stop) in stops {
        assert_eq!(stop.reason, StopReason::Balance, "{kind:?}");
    }
    // The same key goes out once there is money.
    hub.sender.resume(MessageKind::PreCommit).await.unwrap();
    hub.sender.send(short).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_message_is_replaced_by_fee_over_restarts_and_lands_once() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    let stuck = |cfg: &mut MessagesConfig| cfg.stuck_epochs = 4;
    let hub = Hub::start_with(dir.path(), &chain, stuck);
    // Signed with a cap of 1,000 attoFIL per gas; then the base fee goes far above it.
    let first = hub.sender.send(request("k")).await.unwrap();
    chain.lock().base_fee = TokenAmount::from_atto(50_000);
    let replaced = async {
        loop {
            let s = hub.sender.status("k").await.unwrap().unwrap();
            if s.replacements > 0 {
                return s;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let status = while_mining(&chain, replaced).await;
    assert_ne!(status.cid, first);
    assert!(
        status.max_fee <= TokenAmount::from_nano(50_000_000),
        "within the limit"
    );
    hub.stop().await;

    // The replacement was journaled: a restart pushes it, and no other.
    let before = chain.lock().pushes.len();
    chain.lock().mempool.clear();
    let hub = Hub::start_with(dir.path(), &chain, stuck);
    let landed = while_mining(&chain, hub.sender.wait("k", 3)).await.unwrap();
    assert_eq!(hub.sender.send(request("k")).await.unwrap(), landed.cid);
    hub.stop().await;
    let inner = chain.lock();
    assert_eq!(inner.landed().len(), 1);
    let nonces: HashSet<_> = inner.pushes.iter().map(|m| m.message.nonce).collect();
    assert_eq!(nonces, HashSet::from([0]));
    let of_restart = inner.pushes.get(before).unwrap();
    assert_eq!(of_restart.cid(), status.cid, "recovery pushes the newest");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_day_has_a_limit_and_the_kind_says_so_until_it_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    // A message reserves 1 nanoFIL (a million gas at 1,000) and costs 0.11: base fee and tip.
    let hub = Hub::start_with(dir.path(), &chain, |cfg| {
        cfg.fees.max_per_day_nanofil = 2;
        cfg.fees.day_epochs = 10_000;
        cfg.breaker.pause_epochs = 1_000;
    });
    hub.sender.send(request("a")).await.unwrap();
    hub.sender.send(request("b")).await.unwrap();
    let full = hub.sender.send(request("c")).await.unwrap_err();
    assert!(matches!(full, SendError::DailyCap { .. }), "{full}");
    assert_eq!(full.kind(), Kind::Capacity);
    let stopped = hub.sender.send(request("d")).await.unwrap_err();
    assert!(matches!(stopped, SendError::Halted { .. }), "{stopped}");
    assert!(stopped.to_string().contains("limited to"), "{stopped}");
    // WindowPoSt has a purse of its own.
    let post = SendRequest {
        kind: MessageKind::Post,
        ..request("post")
    };
    hub.sender.send(post).await.unwrap();
    let money = hub.sender.money().await.unwrap();
    assert_eq!(money.stops.len(), 1);
    let waiting: Vec<_> = money.waiting.iter().map(|w| w.key.as_str()).collect();
    assert_eq!(waiting, ["c", "d"]);
    assert_eq!(money.purses[2].reserved, TokenAmount::from_nano(2));
    hub.stop().await;

    // It holds over a restart; when messages have landed for less there is room again.
    let hub = Hub::start_with(dir.path(), &chain, |cfg| {
        cfg.fees.max_per_day_nanofil = 2;
        cfg.fees.day_epochs = 10_000;
    });
    let still = hub.sender.send(request("d")).await.unwrap_err();
    assert!(matches!(still, SendError::Halted { .. }), "{still}");
    let settled = async {
        loop {
            let money = hub.sender.money().await.unwrap();
            if money.purses.iter().all(|p| p.reserved.is_zero()) {
                return money;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let money = while_mining(&chain, settled).await;
    let cost = TokenAmount::from_atto(110u64 * 1_000_000);
    assert!(money.purses[2].spent.is_positive() && money.purses[2].spent <= &cost * 2u64);
    assert!(money.purses[0].spent.is_positive() && money.purses[0].spent <= cost);
    hub.sender.resume(MessageKind::Other).await.unwrap();
    hub.sender.send(request("c")).await.unwrap();
    assert!(hub.sender.money().await.unwrap().stops.is_empty());
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_in_a_row_stop_a_kind() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (16, vec![])));
    let hub = Hub::start_with(dir.path(), &chain, |cfg| {
        cfg.breaker.max_failures = 2;
        cfg.breaker.pause_epochs = 100_000;
        cfg.breaker.pause_max_epochs = 100_000;
    });
    for key in ["a", "b"] {
        hub.sender.send(request(key)).await.unwrap();
    }
    let stopped = async {
        loop {
            if let Some((kind, stop)) = hub.sender.money().await.unwrap().stops.pop() {
                return (kind, stop);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let (kind, stop) = while_mining(&chain, stopped).await;
    assert_eq!(kind, MessageKind::Other);
    assert!(stop.why.contains("USR_ILLEGAL_ARGUMENT"), "{}", stop.why);
    let halted = hub.sender.send(request("c")).await.unwrap_err();
    assert!(matches!(halted, SendError::Halted { .. }), "{halted}");
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recoveries_do_not_wait_for_sealing() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (16, vec![])));
    let hub = Hub::start_with(dir.path(), &chain, |cfg| {
        cfg.fees.max_per_day_nanofil = 1;
        cfg.fees.day_epochs = 1_000_000;
        cfg.breaker.max_failures = 1;
        cfg.breaker.pause_epochs = 100_000;
        cfg.breaker.pause_max_epochs = 100_000;
    });
    let of = |key: &str, kind| SendRequest {
        from: Payer::Miner(Address::new_id(1000)),
        value: TokenAmount::default(),
        kind,
        ..request(key)
    };
    // The day's fees are spent, and pre-commits stop.
    let seal = of("seal", MessageKind::PreCommit);
    hub.sender.send(seal).await.unwrap();
    let full = of("more", MessageKind::PreCommit);
    let full = hub.sender.send(full).await.unwrap_err();
    assert!(matches!(full, SendError::DailyCap { .. }), "{full}");
    // Recoveries have a purse of their own, and a floor below that of the others.
    chain.lock().balance = TokenAmount::from_nano(60_000_000);
    let first = of("recover/0", MessageKind::Declare);
    hub.sender.send(first).await.unwrap();
    let low = of("low", MessageKind::Publish);
    let low = hub.sender.send(low).await.unwrap_err();
    assert!(low.is_short(), "{low}");
    // It fails on chain: the next is tried after a few epochs, not after hours.
    let stopped = async {
        loop {
            let stops = hub.sender.money().await.unwrap().stops;
            if let Some((_, stop)) = stops.iter().find(|(k, _)| *k == MessageKind::Declare) {
                return stop.clone();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let stop = while_mining(&chain, stopped).await;
    assert_eq!(stop.reason, StopReason::Failures);
    assert!((stop.next_try - stop.since).0 <= 5, "{stop:?}");
    let again = async {
        loop {
            match hub.sender.send(of("recover/1", MessageKind::Declare)).await {
                Ok(_) => return,
                Err(SendError::Halted { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
                Err(e) => panic!("{e}"),
            }
        }
    };
    while_mining(&chain, again).await;
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn window_post_goes_around_a_nonce_that_is_not_ours() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    let (miner, control) = (Address::new_id(1000), Address::new_id(1002));
    chain.lock().control = vec![control];
    chain.stick(control);
    let hub = Hub::start(dir.path(), &chain);
    let post = |key: &str, from| SendRequest {
        from,
        value: TokenAmount::default(),
        kind: MessageKind::Post,
        ..request(key)
    };
    hub.sender
        .send(post("post", Payer::Miner(miner)))
        .await
        .unwrap();
    let stuck = hub.sender.status("post").await.unwrap().unwrap();
    assert_eq!((stuck.from, stuck.nonce), (control, 1));
    let around = |key: &'static str| {
        let sender = hub.sender.clone();
        async move { sender.way_around(key, miner).await.unwrap() }
    };
    assert_eq!(around("post").await, None, "it may land yet");
    let found = async {
        loop {
            if let Some(way) = around("post").await {
                return way;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let way = while_mining(&chain, found).await;
    assert_eq!(way, worker());
    hub.sender
        .send(post("post/around", Payer::Address(way)))
        .await
        .unwrap();
    let landed = hub.sender.wait("post/around", 3);
    while_mining(&chain, landed).await.unwrap();
    assert_eq!(around("post/around").await, None);
    // The next goes by the free address at once.
    hub.sender
        .send(post("next", Payer::Miner(miner)))
        .await
        .unwrap();
    let next = hub.sender.status("next").await.unwrap().unwrap();
    assert_eq!(next.from, worker());
    // Nobody else has funds: it stays where it is.
    chain.lock().balance = TokenAmount::default();
    assert_eq!(around("post").await, None);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_funds_are_for_window_post() {
    let dir = tempfile::tempdir().unwrap();
    let chain = Fake::new(Box::new(|_, _| (0, vec![])));
    chain.lock().balance = TokenAmount::from_nano(100_000_000);
    let hub = Hub::start(dir.path(), &chain);
    let low = hub.sender.send(request("k")).await.unwrap_err();
    assert!(matches!(low, SendError::Floor { .. }), "{low}");
    // Less than its limit, and less than what the node would bid: enough for the base fee.
    chain.lock().balance = TokenAmount::from_atto(500u64 * 1_000_000);
    let post = SendRequest {
        kind: MessageKind::Post,
        value: TokenAmount::default(),
        ..request("post")
    };
    hub.sender.send(post.clone()).await.unwrap();
    while_mining(&chain, hub.sender.wait("post", 3))
        .await
        .unwrap();
    chain.lock().balance = TokenAmount::from_atto(99u64 * 1_000_000);
    let poor = SendRequest {
        key: "poor".into(),
        ..post
    };
    let poor = hub.sender.send(poor).await.unwrap_err();
    assert!(matches!(poor, SendError::Funds { .. }), "{poor}");
    hub.stop().await;
}
