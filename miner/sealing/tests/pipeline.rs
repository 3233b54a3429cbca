//! The whole pipeline over a real journal, real 2 KiB proofs and a small chain that verifies them.

#![expect(clippy::unwrap_used, reason = "a failed test panics")]

#[path = "../../messages/tests/fake/mod.rs"]
mod fake;
mod worker;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lotus_actors::decode;
use lotus_actors::miner::PreCommitSectorBatchParams2;
use lotus_sealing::{BatchKind, SealingError, SectorState};
use lotus_types::{Kind, SectorNumber, TokenAmount};
use world::{Hub, World, deal, terms};

/// States of a sector's log, in order, repeats removed.
fn walked(hub: &Hub, n: SectorNumber) -> Vec<String> {
    let record = hub.sealing.sector(n).unwrap().unwrap();
    let mut states: Vec<_> = record.log.into_iter().map(|e| e.to).collect();
    states.dedup();
    states
}

const HAPPY: [&str; 14] = [
    "WaitDeals",
    "AddPiece",
    "Packing",
    "GetTicket",
    "PreCommit1",
    "PreCommit2",
    "SubmitPreCommitBatch",
    "PreCommitBatchWait",
    "WaitSeed",
    "Committing",
    "SubmitCommitAggregate",
    "CommitAggregateWait",
    "FinalizeSector",
    "Proving",
];

#[tokio::test(flavor = "multi_thread")]
async fn pieces_become_proven_sectors() {
    let world = World::new();
    let hub = Hub::start(&world);
    let pieces: Vec<_> = [1_000, 400, 900].iter().map(|n| world.piece(*n)).collect();
    let mut placed = Vec::new();
    for (i, p) in pieces.iter().enumerate() {
        let at = hub.sealing.add_piece(deal(i), *p, terms()).await.unwrap();
        // Asked again, it answers the same.
        let again = hub.sealing.add_piece(deal(i), *p, terms()).await.unwrap();
        assert_eq!(at, again);
        assert_eq!(hub.sealing.placement(&deal(i)).unwrap(), Some(at));
        placed.push(at);
    }
    let other = hub
        .sealing
        .add_piece(deal(0), pieces[1], terms())
        .await
        .unwrap_err();
    assert!(matches!(other, SealingError::OtherPiece { .. }), "{other}");
    let huge = world.piece(3_000);
    let huge = hub
        .sealing
        .add_piece(deal(9), huge, terms())
        .await
        .unwrap_err();
    assert_eq!(
        (huge.kind(), huge.to_string().contains("2KiB")),
        (Kind::Data, true)
    );

    let sectors: BTreeSet<_> = placed.iter().map(|p| p.sector).collect();
    assert_eq!(sectors.len(), 2, "1,024 + 512 bytes and 1,024 bytes");
    for n in &sectors {
        hub.sealing.seal_now(*n).await.unwrap();
        hub.until(*n, SectorState::Proving).await;
        assert_eq!(walked(&hub, *n), HAPPY);
        let record = hub.sealing.sector(*n).unwrap().unwrap();
        assert!(record.sector.expiration > record.sector.activation);
        assert!(record.sector.pre_commit.is_some() && record.sector.commit.is_some());
        assert_eq!((record.last_error, record.progress), (None, None));
        let id = world.id(*n);
        assert!(hub.storage.sealed(id).is_file() && hub.storage.cache(id).is_dir());
        assert!(!hub.storage.scratch(id).exists(), "only sealing needed it");
    }
    let active: BTreeSet<_> = world
        .miner()
        .active
        .keys()
        .map(|n| SectorNumber(*n))
        .collect();
    assert_eq!(active, sectors);
    // One pre-commit and one commit each, and no other message.
    assert_eq!(world.chain.lock().landed().len(), 4);
    // The observer saw every change, in the same transactions.
    let seen = hub.observed();
    assert!(
        HAPPY
            .iter()
            .all(|s| seen.iter().filter(|x| x == s).count() >= 2)
    );
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_stops_anywhere_goes_on_where_it_was() {
    let world = World::new();
    let piece = world.piece(1_500);
    let hub = Hub::start(&world);
    let at = hub
        .sealing
        .add_piece(deal(0), piece, terms())
        .await
        .unwrap();
    let n = at.sector;
    hub.sealing.seal_now(n).await.unwrap();
    hub.stop().await;
    let mut restarts = 0;
    loop {
        let hub = Hub::start(&world);
        assert_eq!(
            hub.sealing
                .add_piece(deal(0), piece, terms())
                .await
                .unwrap(),
            at
        );
        // Stops as soon as the sector has moved.
        let state = hub.moved(n).await;
        hub.stop().await;
        if state == SectorState::Proving {
            break;
        }
        restarts += 1;
        assert!(restarts < 60, "stuck in {state}");
    }
    assert!(restarts >= 3, "only {restarts} restarts");
    assert_eq!(
        world.chain.lock().landed().len(),
        2,
        "each message had effect once"
    );
    let hub = Hub::start(&world);
    assert_eq!(hub.sealing.states().len(), 1);
    // A state may be skipped when the chain knows already what it would wait for.
    let walked = walked(&hub, n);
    let happy: Vec<_> = HAPPY
        .iter()
        .filter(|s| walked.iter().any(|w| w == *s))
        .collect();
    assert!(walked.iter().eq(happy) && walked.len() >= 12, "{walked:?}");
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_work_and_chain_are_overcome() {
    let world = World::new();
    let hub = Hub::start(&world);
    hub.work.lose("pre_commit2", 2);
    hub.work.fail("add_pieces", 1);
    hub.work.fail("pre_commit1", 2);
    hub.work.fail("pre_commit2", 1);
    hub.work.fail("commit", 1);
    hub.work.fail("finalize", 1);
    // The first pre-commit runs out of gas, the first commit is called wrong.
    world.miner().exits.extend([(28, 7), (34, 16)]);
    world
        .chain
        .lock()
        .failures
        .extend(["MpoolGetNonce", "GasEstimateMessageGas"]);
    let piece = world.piece(1_500);
    let at = hub
        .sealing
        .add_piece(deal(0), piece, terms())
        .await
        .unwrap();
    hub.sealing.seal_now(at.sector).await.unwrap();
    hub.until(at.sector, SectorState::Proving).await;
    let walked = walked(&hub, at.sector);
    for failed in [
        "AddPieceFailed",
        "SealPreCommit1Failed",
        "SealPreCommit2Failed",
        "PreCommitFailed",
        "ComputeProofFailed",
        "CommitFailed",
        "FinalizeFailed",
    ] {
        assert!(walked.iter().any(|s| s == failed), "{failed} in {walked:?}");
    }
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_ticket_is_replaced_before_the_pre_commit() {
    let world = World::new();
    let hub = Hub::start(&world);
    let piece = world.piece(1_500);
    let at = hub
        .sealing
        .add_piece(deal(0), piece, terms())
        .await
        .unwrap();
    // PreCommit1 hangs until the chain is far ahead.
    let gate = hub.work.hold("pre_commit1");
    hub.sealing.seal_now(at.sector).await.unwrap();
    hub.until(at.sector, SectorState::PreCommit1).await;
    let start = world.height();
    world
        .until("the ticket is old", |w| w.height() > start + 500)
        .await;
    drop(gate);
    hub.until(at.sector, SectorState::Proving).await;
    let log = hub.sealing.sector(at.sector).unwrap().unwrap().log;
    let expired = log
        .iter()
        .filter(|e| e.event == "SectorTicketExpired")
        .count();
    assert_eq!(expired, 1);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_the_chain_knows_is_not_used() {
    let world = World::new();
    world.miner().allocated.extend([0, 1, 3]);
    let hub = Hub::start(&world);
    let mut numbers = Vec::new();
    for _ in 0..3 {
        numbers.push(hub.sealing.pledge().await.unwrap().0);
    }
    assert_eq!(numbers, [2, 4, 5]);
    hub.until(SectorNumber(2), SectorState::Available).await;
    // Another program pre-commits our next number: the chain will never take the sector.
    let gate = hub.work.hold("pre_commit2");
    let lost = hub.sealing.pledge().await.unwrap();
    world.miner().allocated.insert(lost.0);
    drop(gate);
    hub.until(lost, SectorState::FailedUnrecoverable).await;
    let record = hub.sealing.sector(lost).unwrap().unwrap();
    assert!(
        record
            .last_error
            .unwrap()
            .contains("never takes a number twice")
    );
    hub.sealing.remove(lost).await.unwrap();
    hub.until(lost, SectorState::Removed).await;
    assert!(!hub.storage.sealed(world.id(lost)).exists());
    let wrong = hub.sealing.remove(SectorNumber(2)).await.unwrap_err();
    assert!(matches!(wrong, SealingError::Needed { .. }), "{wrong}");
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_outlive_the_sector_that_they_were_put_into() {
    let world = World::new();
    let hub = Hub::start(&world);
    let piece = world.piece(1_500);
    let at = hub
        .sealing
        .add_piece(deal(0), piece, terms())
        .await
        .unwrap();
    // Another program takes the number.
    let gate = hub.work.hold("pre_commit2");
    hub.sealing.seal_now(at.sector).await.unwrap();
    hub.until(at.sector, SectorState::PreCommit2).await;
    world.miner().allocated.insert(at.sector.0);
    drop(gate);
    hub.until(at.sector, SectorState::FailedUnrecoverable).await;
    assert_eq!(hub.sealing.placement(&deal(0)).unwrap(), None);
    assert_eq!(hub.returned(), [deal(0)]);
    // The intake places it again.
    let again = hub
        .sealing
        .add_piece(deal(0), piece, terms())
        .await
        .unwrap();
    assert_ne!(again.sector, at.sector);
    // Removed by the operator before it is on chain: the same.
    hub.sealing.remove(again.sector).await.unwrap();
    hub.until(again.sector, SectorState::Removed).await;
    assert_eq!(hub.returned(), [deal(0), deal(0)]);
    let late = lotus_types::Epoch(1);
    let mut terms = terms();
    terms.start_epoch = late;
    let refused = hub.sealing.add_piece(deal(0), piece, terms).await;
    assert_eq!(refused.unwrap_err().kind(), Kind::Data);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sectors_share_their_messages() {
    // No ticket comes so near its end that its sector can not wait for the others.
    const TICKET_AGE: i64 = 10_000_000;
    let world = World::new();
    world.miner().max_ticket_age = TICKET_AGE;
    let batched = |cfg: &mut lotus_sealing::SealingConfig| {
        cfg.ticket_max_age_epochs = TICKET_AGE;
        cfg.batch_above_base_fee_attofil = 0;
        cfg.commit_batch_max_bytes = 64 << 20;
        cfg.pre_commit_batch_max = 3;
    };
    let mut hub = Hub::start_with(&world, batched);
    let mut sectors = Vec::new();
    for _ in 0..3 {
        sectors.push(hub.sealing.pledge().await.unwrap());
    }
    // The batch is full with the third. The hub stops whenever a sector has moved.
    let there = SectorState::SubmitCommitAggregate;
    loop {
        let mut changes = hub.sealing.changes();
        if sectors.iter().all(|n| hub.state(*n) == there) {
            break;
        }
        let moved = tokio::time::timeout(PATIENCE, changes.changed()).await;
        moved.expect("a sector moves").unwrap();
        hub = hub.restart_with(&world, batched).await;
    }
    assert_eq!(world.chain.lock().landed().len(), 1, "one pre-commit");
    assert_eq!(hub.sealing.waiting(BatchKind::Commit).len(), 3);
    // The commit batch would wait for a day: the operator does not.
    let hub = hub.restart_with(&world, batched).await;
    world.miner().exits.push((34, 7));
    assert_eq!(hub.sealing.publish(BatchKind::Commit).len(), 3);
    for n in &sectors {
        hub.until(*n, SectorState::Available).await;
    }
    // It ran out of gas once; after that it went in two parts.
    assert_eq!(world.chain.lock().landed().len(), 1 + 1 + 2);
    hub.stop().await;
}

/// Sectors whose pre-commits wait until there are enough of them.
fn together(sectors: u32) -> impl Fn(&mut lotus_sealing::SealingConfig) {
    move |cfg| {
        cfg.ticket_max_age_epochs = 10_000_000;
        cfg.batch_above_base_fee_attofil = 0;
        cfg.pre_commit_batch_max = sectors;
    }
}

fn fails(hub: &Hub, n: SectorNumber) -> usize {
    let log = hub.sealing.sector(n).unwrap().unwrap().log;
    log.iter().filter(|e| e.to == "PreCommitFailed").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn sectors_wait_for_money_together_and_say_how_much() {
    let world = World::new();
    world.miner().max_ticket_age = 10_000_000;
    // Less than three deposits, which a real node calls a failed message.
    world.chain.lock().balance = TokenAmount::from_atto(2_500);
    let hub = Hub::start_with(&world, together(3));
    let mut sectors = Vec::new();
    for _ in 0..3 {
        sectors.push(hub.sealing.pledge().await.unwrap());
    }
    for n in &sectors {
        hub.until(*n, SectorState::SubmitPreCommitBatch).await;
        let says = |_: &World| {
            let trouble = hub.sealing.sector(*n).unwrap().unwrap().last_error;
            trouble.is_some_and(|t| t.contains("are missing"))
        };
        world.until("each says what is missing", says).await;
    }
    assert_eq!(world.chain.lock().estimates, 0, "the node was not asked");
    // It waits over a restart, and goes out as one message once there is money.
    let hub = hub.restart_with(&world, together(3)).await;
    world.chain.lock().balance = TokenAmount::from_whole(1_000);
    for n in &sectors {
        hub.until(*n, SectorState::SubmitCommitAggregate).await;
        assert_eq!(fails(&hub, *n), 0);
    }
    assert_eq!(world.chain.lock().landed().len(), 1);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_sector_holds_up_no_good_one() {
    let world = World::new();
    world.miner().max_ticket_age = 10_000_000;
    // Sector 2 is refused with others, and once alone.
    let mut alone = 0;
    world.chain.lock().judge = Some(Box::new(move |msg| {
        let batch: PreCommitSectorBatchParams2 = decode(&msg.params).unwrap();
        if batch.sectors.iter().all(|s| s.sector_number != 2) {
            return 0;
        }
        alone += u32::from(batch.sectors.len() == 1);
        16 * i64::from(alone < 2)
    }));
    let hub = Hub::start_with(&world, together(4));
    let mut sectors = Vec::new();
    for _ in 0..4 {
        sectors.push(hub.sealing.pledge().await.unwrap());
    }
    let bad = sectors.remove(2);
    for n in &sectors {
        hub.until(*n, SectorState::SubmitCommitAggregate).await;
        assert!((1..=2).contains(&fails(&hub, *n)), "{n}");
    }
    hub.until(bad, SectorState::SubmitCommitAggregate).await;
    // One half as it was, and the sectors of the other.
    assert_eq!(world.chain.lock().landed().len(), 3);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_sectors_none_loses_a_step() {
    let world = World::new();
    let hub = Hub::start_with(&world, |cfg| cfg.max_sealing_sectors = 0);
    let mut sectors = Vec::new();
    for _ in 0..150 {
        sectors.push(hub.sealing.pledge().await.unwrap());
    }
    for n in &sectors {
        hub.until(*n, SectorState::Available).await;
    }
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sector_closes_by_itself() {
    let world = World::new();
    let hub = Hub::start_with(&world, |cfg| cfg.wait_deals_secs = 1);
    let at = hub
        .sealing
        .add_piece(deal(0), world.piece(100), terms())
        .await
        .unwrap();
    hub.until(at.sector, SectorState::Proving).await;
    let soon = world.height() + 100;
    let hub2 = hub.restart_with(&world, |cfg| {
        cfg.wait_deals_secs = 3_600;
        cfg.start_epoch_buffer_epochs = 50;
    });
    let hub = hub2.await;
    let mut pressing = terms();
    pressing.start_epoch = lotus_types::Epoch(soon);
    let at = hub
        .sealing
        .add_piece(deal(1), world.piece(101), pressing)
        .await
        .unwrap();
    hub.until(at.sector, SectorState::Proving).await;
    hub.stop().await;
}

const PATIENCE: Duration = Duration::from_secs(60);

/// Every file of a folder with its bytes.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(contents(&path));
        } else {
            all.insert(path.clone(), std::fs::read(path).unwrap());
        }
    }
    all
}

/// A backup of a sector in PreCommit1 is restored after the chain has taken the sector.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_harms_no_sector_on_chain() {
    let world = World::new();
    let hub = Hub::start(&world);
    let _gate = hub.work.hold("pre_commit1");
    let n = hub.sealing.pledge().await.unwrap();
    hub.until(n, SectorState::PreCommit1).await;
    hub.stop().await;
    let backup = world.back_up();
    let hub = Hub::start(&world);
    hub.until(n, SectorState::Available).await;
    let id = world.id(n);
    let (sealed, cache) = (hub.storage.sealed(id), hub.storage.cache(id));
    let files = || (std::fs::read(&sealed).unwrap(), contents(&cache));
    let before = files();
    hub.stop().await;

    // So late that the ticket of the backup would be replaced.
    let end = world.height();
    let late = |w: &World| w.height() > end + 500;
    world.until("the ticket is old", late).await;
    world.restore(&backup);
    let hub = Hub::start(&world);
    hub.until(n, SectorState::Available).await;
    let begun = ["add_pieces", "pre_commit1", "pre_commit2"].map(|step| hub.work.begun(step));
    assert_eq!((begun, files() == before), ([0; 3], true));
    let record = hub.sealing.sector(n).unwrap().unwrap();
    let found = record.log.iter().find(|e| e.event == "SectorFoundOnChain");
    assert!(found.is_some_and(|e| e.message.contains("ahead of this journal")));
    let on_chain = world.miner().active[&n.0].clone();
    let known = record.sector.commitments.unwrap();
    assert_eq!(known.comm_r.sealed_cid(), on_chain.sealed_cid);
    assert_eq!(record.sector.activation, Some(on_chain.activation));
    hub.stop().await;

    // Its files are not back yet: it waits, and makes none of its own.
    world.restore(&backup);
    let away = cache.with_file_name("away");
    std::fs::rename(&cache, &away).unwrap();
    let hub = Hub::start(&world);
    hub.until(n, SectorState::ChainConflict).await;
    let record = hub.sealing.sector(n).unwrap().unwrap();
    let why = record.last_error.unwrap();
    assert!(why.contains("bring the sector's files back"), "{why}");
    // Nor when it is tried again and again.
    let tries = || {
        let log = hub.sealing.sector(n).unwrap().unwrap().log;
        log.iter().filter(|e| e.event == "SectorRetry").count()
    };
    world.until("a retry", |_| tries() > 2).await;
    assert!(sealed.is_file() && hub.work.begun("add_pieces") == 0);
    std::fs::rename(&away, &cache).unwrap();
    hub.storage.redeclare(None).unwrap();
    hub.until(n, SectorState::Available).await;
    assert!(files() == before);
    let begun = ["add_pieces", "pre_commit1", "pre_commit2"].map(|step| hub.work.begun(step));
    assert_eq!(begun, [0; 3]);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sector_that_the_chain_lost_for_good_gives_its_pieces_back() {
    let world = World::new();
    let hub = Hub::start(&world);
    let piece = world.piece(1_500);
    let at = hub.sealing.add_piece(deal(0), piece, terms()).await;
    let n = at.unwrap().sector;
    hub.sealing.seal_now(n).await.unwrap();
    hub.until(n, SectorState::Proving).await;
    let needed = hub.sealing.remove(n).await.unwrap_err();
    assert!(matches!(needed, SealingError::Needed { .. }), "{needed}");
    // A reorg, after which the number is spent and nothing is under it.
    world.miner().active.remove(&n.0);
    hub.until(n, SectorState::FailedUnrecoverable).await;
    let log = hub.sealing.sector(n).unwrap().unwrap().log;
    let lost = log.iter().find(|e| e.event == "SectorCommitLost").unwrap();
    assert_eq!((&*lost.from, &*lost.to), ("Proving", "WaitSeed"));
    assert_eq!(hub.returned(), [deal(0)]);
    hub.sealing.remove(n).await.unwrap();
    hub.until(n, SectorState::Removed).await;
    hub.stop().await;
}
