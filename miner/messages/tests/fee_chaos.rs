//! Fees go mad on a real chain that verifies every proof, under a hub that proves: the base fee
//! rises three-hundredfold, a nonce is stuck, the control wallet runs empty. This test binary is its
//! own worker, so it has no harness.

#![expect(
    clippy::unwrap_used,
    reason = "clippy sees a test only where it has the harness"
)]

mod sp;

use std::process::ExitCode;

use clap::Parser;
use lotus_actors::{encode, miner};
use lotus_messages::{
    MessageKind, MessagesConfig, Payer, Purse, SendError, SendRequest, StopReason,
};
use lotus_node_client::api::{Message, SignatureType, TipSet};
use lotus_proving::Outcome;
use lotus_types::{Address, TokenAmount};
use lotus_workers::{WorkerArgs, worker_main};

use sp::{Devnet, HEAD, Hub, MINER};

/// attoFIL per unit of gas before and during the storm.
const CALM: u64 = 100_000_000;
const STORM: u64 = 300 * CALM;
const STORM_EPOCHS: u64 = 200;
/// The day's fees, in nanoFIL: a handful of small messages.
const CAP: u64 = 10_000_000;
/// What one WindowPoSt may cost, in nanoFIL.
const POST_LIMIT: u64 = 2_000_000_000;

#[derive(Parser)]
enum Cli {
    /// What the pool starts.
    Worker(WorkerArgs),
}

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("worker") => {
            let Cli::Worker(args) = Cli::parse();
            worker_main(&args).map_or_else(|e| e.kind.exit_code(), |()| ExitCode::SUCCESS)
        }
        Some("--list") => ExitCode::SUCCESS,
        _ => {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(no_deadline_is_missed_and_the_days_limit_holds());
            println!("test no_deadline_is_missed_and_the_days_limit_holds ... ok");
            runtime.block_on(a_proof_goes_around_a_nonce_that_is_not_ours());
            println!("test a_proof_goes_around_a_nonce_that_is_not_ours ... ok");
            ExitCode::SUCCESS
        }
    }
}

/// A small message that somebody automates.
fn chore(key: &str) -> SendRequest {
    SendRequest {
        key: key.into(),
        from: Payer::Miner(MINER.address()),
        to: MINER.address(),
        method: miner::CHANGE_PEER_ID,
        params: encode(&miner::ChangePeerIDParams {
            new_id: key.as_bytes().to_vec(),
        }),
        value: TokenAmount::default(),
        kind: MessageKind::Other,
        max_fee: None,
    }
}

fn base_fee(head: &TipSet) -> TokenAmount {
    head.min_ticket_block().parent_base_fee.clone()
}

/// Gives the miner a control address with so many nanoFIL.
async fn control_wallet(net: &Devnet, hub: &Hub, nano: u64) -> Address {
    let control = net.chain.wallet_new(SignatureType::Secp256k1).unwrap();
    net.chain
        .fund(&control, TokenAmount::from_nano(nano))
        .unwrap();
    hub.until("funds", || async {
        net.chain.wallet_balance(&control).is_positive()
    })
    .await;
    let change = miner::ChangeWorkerAddressParams {
        new_worker: net.chain.wallet_default_address(),
        new_control_addresses: vec![control],
    };
    let method = miner::CHANGE_WORKER_ADDRESS;
    hub.send("control", method, encode(&change), TokenAmount::default())
        .await;
    control
}

/// A message of another program holds the nonces of the control address up, which pays for
/// WindowPoSt; the worker has funds.
async fn a_proof_goes_around_a_nonce_that_is_not_ours() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // A deadline has as many epochs as on mainnet.
    let net = Devnet::start_with(&dir.join("devnet"), 60).await;
    net.chain
        .raise_base_fee(TokenAmount::from_atto(CALM), 1_000_000);
    let worker = net.chain.wallet_default_address();
    let hub = Hub::start(dir, "easy", &net.node, 1, MessagesConfig::default());
    hub.onboard(dir, 0).await;
    let control = control_wallet(&net, &hub, 10 * POST_LIMIT).await;
    hub.end().await;

    let nonce = net.chain.mpool_get_nonce(&control).unwrap();
    let foreign = Message {
        version: 0,
        to: worker,
        from: control,
        nonce,
        value: TokenAmount::default(),
        gas_limit: 1_000_000,
        // The least that the mempool takes, and far below the base fee.
        gas_fee_cap: TokenAmount::from_atto(100),
        gas_premium: TokenAmount::from_atto(1),
        method: 0,
        params: vec![],
    };
    let signed = net.node.wallet_sign_message(control, &foreign).await;
    net.node.mpool_push(&signed.unwrap()).await.unwrap();

    let cfg = MessagesConfig {
        // Only the nonce is the trouble.
        stuck_epochs: 1_000_000,
        repush_secs: 1,
        ..MessagesConfig::default()
    };
    let hub = Hub::start(dir, "around", &net.node, 2, cfg);
    hub.until("a proof that went around", || async {
        let sent = hub.sender.list().await.unwrap();
        let held = sent
            .iter()
            .any(|m| m.from == control && m.nonce > nonce && m.landed.is_none());
        let around = sent.iter().any(|m| {
            m.key.ends_with(&format!("/{worker}")) && m.from == worker && m.exit_code == Some(0)
        });
        held && around
    })
    .await;
    hub.until("a proven deadline", || async { hub.proved() > 0 })
        .await;
    let outcomes = hub.post.outcomes().unwrap();
    let failed = |o: &Outcome| matches!(o, Outcome::Failed { .. });
    assert!(!outcomes.iter().any(|r| failed(&r.outcome)), "{outcomes:?}");
    hub.end().await;
}

async fn no_deadline_is_missed_and_the_days_limit_holds() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let net = Devnet::start(&dir.join("devnet")).await;
    net.chain
        .raise_base_fee(TokenAmount::from_atto(CALM), 1_000_000);
    let worker = net.chain.wallet_default_address();

    // A hub without worries brings a sector on chain and names a control address. It has what a
    // PoSt may cost and a little more: two PoSts of the storm, at nearly 1 FIL each.
    let hub = Hub::start(dir, "easy", &net.node, 1, MessagesConfig::default());
    hub.onboard(dir, 0).await;
    let control = control_wallet(&net, &hub, POST_LIMIT + 100_000_000).await;
    hub.end().await;

    let mut cfg = MessagesConfig {
        stuck_epochs: 3,
        repush_secs: 1,
        ..MessagesConfig::default()
    };
    cfg.fees.max_per_day_nanofil = CAP;
    cfg.fees.max_window_post_nanofil = POST_LIMIT;
    cfg.fees.day_epochs = 1_000_000;
    let hub = Hub::start(dir, "tight", &net.node, 2, cfg);
    hub.until("a deadline proven by the control wallet", || async {
        hub.proved() > 0 && net.chain.mpool_get_nonce(&control).unwrap() > 0
    })
    .await;

    // The worker's next message is signed at a calm fee and reaches the mempool in the storm.
    let (from_control, from_worker) = (
        net.chain.mpool_get_nonce(&control).unwrap(),
        net.chain.mpool_get_nonce(&worker).unwrap(),
    );
    net.chain.refuse_messages(u64::MAX, "not yet".into());
    hub.sender.send(chore("stuck")).await.unwrap();
    net.chain
        .raise_base_fee(TokenAmount::from_atto(STORM), STORM_EPOCHS);
    hub.until("storm", || async {
        base_fee(&net.chain.head()) >= TokenAmount::from_atto(STORM)
    })
    .await;
    net.chain.refuse_messages(0, String::new());
    let began = net.chain.head().height;
    let over = i64::try_from(STORM_EPOCHS).unwrap() + began.0 - 10;

    // What is not urgent waits for better days.
    let dear = hub.sender.send(chore("dear")).await.unwrap_err();
    assert!(matches!(dear, SendError::FeeLimit { .. }), "{dear}");

    let cap = TokenAmount::from_nano(CAP);
    hub.until("end of the storm", || async {
        let money = hub.sender.money().await.unwrap();
        let rest = money
            .purses
            .iter()
            .find(|p| p.purse == Purse::Rest)
            .unwrap();
        assert!(&rest.spent + &rest.reserved <= cap, "{rest:?}");
        assert!(money.waiting.iter().any(|w| w.key == "dear"), "{money:?}");
        net.chain.head().height.0 >= over
    })
    .await;
    let outcomes = hub.post.outcomes().unwrap();
    let in_storm: Vec<_> = outcomes
        .iter()
        .filter(|r| r.open >= began && matches!(r.outcome, Outcome::Proved { .. }))
        .collect();
    assert!(in_storm.len() >= 4, "{outcomes:?}");
    assert!(
        !outcomes
            .iter()
            .any(|r| matches!(r.outcome, Outcome::Failed { .. })),
        "{outcomes:?}"
    );
    assert!(
        net.chain
            .state_miner_faults(&MINER.address(), HEAD)
            .unwrap()
            .is_empty()
    );

    // The control wallet paid until it could not, because the worker is blocked; then the worker,
    // whose stuck message WindowPoSt cleared out of its own purse.
    assert!(net.chain.mpool_get_nonce(&control).unwrap() > from_control);
    assert!(net.chain.mpool_get_nonce(&worker).unwrap() > from_worker + 1);
    assert!(net.chain.wallet_balance(&control) < TokenAmount::from_whole(1));
    let stuck = hub.sender.status("stuck").await.unwrap().unwrap();
    assert!(
        stuck.replacements > 0 && stuck.exit_code == Some(0),
        "{stuck:?}"
    );
    assert!(stuck.fee.unwrap() > TokenAmount::from_nano(50_000_000));

    // Calm again: the day's limit stops what is automated, says why, and leaves WindowPoSt alone.
    let calm = TokenAmount::from_atto(CALM);
    net.chain.raise_base_fee(calm.clone(), 1_000_000);
    hub.until("calm", || async { base_fee(&net.chain.head()) <= calm })
        .await;
    let mut sent = 0;
    let stop = loop {
        let key = format!("chore {sent}");
        match hub.sender.send(chore(&key)).await {
            Ok(_) => {
                sent += 1;
                hub.sender.wait(&key, 1).await.unwrap();
            }
            Err(SendError::Halted { stop, .. }) => break *stop,
            Err(SendError::DailyCap { .. }) => {}
            Err(e) => panic!("{e}"),
        }
        assert!(sent < 1_000, "no limit");
    };
    assert_eq!(stop.reason, StopReason::DailyCap);
    assert!(stop.why.contains("limited to 0.01"), "{}", stop.why);
    assert!(sent > 0);
    let money = hub.sender.money().await.unwrap();
    assert!(
        money
            .purses
            .iter()
            .all(|p| p.purse == Purse::Post || p.spent <= cap),
        "{money:?}"
    );
    assert!(
        money
            .stops
            .iter()
            .any(|(k, s)| *k == MessageKind::Other && *s == stop)
    );
    let before = hub.proved();
    hub.until("deadline proven while others are stopped", || async {
        hub.proved() > before
    })
    .await;
    hub.end().await;
}
