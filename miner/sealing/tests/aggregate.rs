//! Which sectors share an aggregate, and what becomes of them when the hub stops or no aggregate
//! is to be had: over a real journal, real 2 KiB proofs and a small chain that verifies them.

#![expect(clippy::unwrap_used, reason = "a failed test panics")]

#[path = "../../messages/tests/fake/mod.rs"]
mod fake;
mod worker;
#[expect(dead_code, reason = "two tests use it, each another part")]
mod world;

use std::time::Duration;

use lotus_proofs::ProofMode;
use lotus_sealing::{BatchKind, SealingConfig, SectorState};
use lotus_types::SectorNumber;
use world::{Hub, World};

const PATIENCE: Duration = Duration::from_secs(60);
/// No ticket comes so near its end that its sector can not wait for the others.
const TICKET_AGE: i64 = 10_000_000;
const WAITS: SectorState = SectorState::SubmitCommitAggregate;
const DONE: SectorState = SectorState::Available;

fn world() -> World {
    let world = World::new();
    world.miner().max_ticket_age = TICKET_AGE;
    world
}

/// A hub whose sectors wait for each other until the operator sends them.
fn hub(world: &World, sectors: u32) -> Hub {
    Hub::start_in(world, ProofMode::Groth16, settings(sectors))
}

fn settings(sectors: u32) -> impl FnOnce(&mut SealingConfig) {
    move |cfg| {
        cfg.ticket_max_age_epochs = TICKET_AGE;
        cfg.batch_above_base_fee_attofil = 0;
        cfg.commit_batch_max_bytes = 64 << 20;
        cfg.pre_commit_batch_max = sectors;
    }
}

/// Sectors that wait for their commit message.
async fn proven(hub: &Hub, count: u32) -> Vec<SectorNumber> {
    let mut sectors = Vec::new();
    for _ in 0..count {
        sectors.push(hub.sealing.pledge().await.unwrap());
    }
    all(hub, &sectors, WAITS).await;
    sectors
}

async fn all(hub: &Hub, sectors: &[SectorNumber], state: SectorState) {
    for n in sectors {
        hub.until(*n, state).await;
    }
}

fn aggregates(world: &World) -> Vec<Vec<u64>> {
    world.miner().aggregates.clone()
}

/// The words with which sectors left their aggregates.
fn left(hub: &Hub, n: SectorNumber) -> Vec<String> {
    let log = hub.sealing.sector(n).unwrap().unwrap().log;
    let left = log.into_iter().filter(|e| e.event == "SectorNotAggregated");
    left.map(|e| e.message).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn enough_sectors_share_an_aggregate() {
    let world = world();
    let hub = hub(&world, 5);
    let five = proven(&hub, 5).await;
    let waiting = hub.sealing.waiting(BatchKind::Commit);
    assert_eq!(waiting.len(), 5);
    assert!(hub.sealing.aggregates(BatchKind::Commit, &waiting));
    assert!(!hub.sealing.aggregates(BatchKind::PreCommit, &waiting));
    assert!(!hub.sealing.aggregates(BatchKind::Commit, &waiting[..3]));
    assert_eq!(hub.sealing.publish(BatchKind::Commit).len(), 5);
    all(&hub, &five, DONE).await;
    assert_eq!(aggregates(&world), [[0, 1, 2, 3, 4]]);
    assert_eq!(world.chain.lock().landed().len(), 2);
    assert_eq!(hub.work.begun("aggregate"), 1);

    // Too few, and in another mode.
    hub.stop().await;
    let hub = Hub::start_in(&world, ProofMode::Groth16, settings(3));
    let three = proven(&hub, 3).await;
    assert_eq!(hub.sealing.publish(BatchKind::Commit).len(), 3);
    all(&hub, &three, DONE).await;
    let hub = hub.restart_with(&world, settings(4)).await;
    let four = proven(&hub, 4).await;
    assert_eq!(hub.sealing.publish(BatchKind::Commit).len(), 4);
    all(&hub, &four, DONE).await;
    assert_eq!(aggregates(&world).len(), 1);
    assert_eq!(world.chain.lock().landed().len(), 6);
    assert_eq!(hub.work.begun("aggregate"), 0);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_stops_neither_loses_nor_doubles_an_aggregate() {
    let world = world();
    let first = hub(&world, 4);
    let sectors = proven(&first, 4).await;
    // It stops while a worker makes the aggregate.
    let gate = first.work.hold("aggregate");
    assert_eq!(first.sealing.publish(BatchKind::Commit).len(), 4);
    let begins = tokio::time::timeout(PATIENCE, first.work.begins("aggregate"));
    begins.await.expect("an aggregate is begun");
    first.stop().await;
    drop(gate);

    // The next has the batch: it makes it again. No message gets out.
    let second = hub(&world, 4);
    let refused = std::iter::repeat_n("GasEstimateMessageGas", 1_000);
    world.chain.lock().failures.extend(refused);
    let tried = |w: &World| w.chain.lock().failures.len() < 1_000;
    world.until("the message is tried", tried).await;
    assert_eq!(second.work.begun("aggregate"), 1);
    second.stop().await;
    world.chain.lock().failures.clear();

    // The third sends what is journaled.
    let third = hub(&world, 4);
    third.work.fail("aggregate", 100);
    all(&third, &sectors, DONE).await;
    assert_eq!(third.work.begun("aggregate"), 0);
    assert_eq!(aggregates(&world), [[0, 1, 2, 3]]);
    assert_eq!(world.chain.lock().landed().len(), 2);
    third.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_aggregate_each_proof_goes_as_it_is() {
    let world = world();
    let hub = hub(&world, 4);
    let sectors = proven(&hub, 4).await;
    // A lost worker says nothing of the proofs, a failed task does.
    hub.work.lose("aggregate", 1);
    hub.work.fail("aggregate", 1);
    assert_eq!(hub.sealing.publish(BatchKind::Commit).len(), 4);
    all(&hub, &sectors, DONE).await;
    assert_eq!(hub.work.begun("aggregate"), 2);
    assert!(aggregates(&world).is_empty());
    for n in &sectors {
        let left = left(&hub, *n);
        assert!(left.len() == 1 && left[0].contains("by order"), "{left:?}");
    }
    // They still share their message.
    assert_eq!(world.chain.lock().landed().len(), 2);

    // With the next sectors it is tried again.
    let more = proven(&hub, 4).await;
    hub.work.lose("aggregate", 2);
    assert_eq!(hub.sealing.publish(BatchKind::Commit).len(), 4);
    all(&hub, &more, DONE).await;
    assert_eq!(aggregates(&world), [[4, 5, 6, 7]]);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_pre_commit_does_not_drag_the_others() {
    // Of five, four are left; of four, too few.
    for (count, together) in [(5, true), (4, false)] {
        let world = world();
        let hub = hub(&world, count);
        let mut sectors = proven(&hub, count).await;
        let gate = hub.work.hold("aggregate");
        assert_eq!(hub.sealing.publish(BatchKind::Commit).len(), sectors.len());
        let begins = tokio::time::timeout(PATIENCE, hub.work.begins("aggregate"));
        begins.await.expect("an aggregate of all is begun");
        // A reorg takes the pre-commit of one while it is made.
        let lost = sectors.remove(1);
        world.miner().pre_commits.remove(&lost.0).unwrap();
        drop(gate);
        all(&hub, &sectors, DONE).await;
        let rest: Vec<Vec<u64>> = vec![sectors.iter().map(|n| n.0).collect()];
        assert_eq!(aggregates(&world), if together { rest } else { vec![] });
        assert_ne!(hub.state(lost), DONE);
        assert!(left(&hub, sectors[0]).is_empty());
        hub.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aggregate_that_the_chain_refuses_is_taken_apart() {
    let world = world();
    let hub = hub(&world, 4);
    let sectors = proven(&hub, 4).await;
    world.miner().exits.push((34, 16));
    assert_eq!(hub.sealing.publish(BatchKind::Commit).len(), 4);
    all(&hub, &sectors, DONE).await;
    assert!(aggregates(&world).is_empty());
    // The refused one, and its halves, which are too small for an aggregate.
    assert_eq!(world.chain.lock().landed().len(), 1 + 1 + 2);
    assert_eq!(hub.work.begun("aggregate"), 1);
    hub.stop().await;
}
