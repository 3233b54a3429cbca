//! Committed capacity that takes deals, proves them, and ends: on the embedded chain, with real
//! proofs.

#![expect(clippy::unwrap_used, reason = "a failed test panics")]

mod net;
mod worker;

use lotus_devnet::{AllocationOrder, Policy};
use lotus_proofs::{Prover as _, UnpaddedOffset, UpdatedSector, Vanilla, WindowPost};
use lotus_sealing::machine::{Allocation, Terms};
use lotus_sealing::{SealingConfig, SealingError, SectorState};
use lotus_types::{ActorId, Epoch, PieceInfo, SectorNumber};
use net::{HEAD, Hub, MINER, Net, PATIENCE, SIZE, deal};

const SNAP: [&str; 10] = [
    "SnapDealsWaitDeals",
    "SnapDealsAddPiece",
    "SnapDealsPacking",
    "UpdateReplica",
    "ProveReplicaUpdate",
    "FinalizeReplicaUpdate",
    "SubmitReplicaUpdate",
    "ReplicaUpdateWait",
    "UpdateActivating",
    "ReleaseSectorKey",
];

fn policy() -> Policy {
    Policy::fast()
        .with_deadlines(4, 12)
        .with_block_time_ms(250)
        .with_seed_delay(3)
}

fn terms(allocation: Option<Allocation>) -> Terms {
    Terms {
        start_epoch: Epoch(0),
        end_epoch: Epoch(300 * 2_880),
        allocation,
        notify: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn committed_capacity_takes_a_deal_and_ends() {
    let net = Net::start(policy()).await;
    let quick = |cfg: &mut lotus_sealing::SealingConfig| cfg.finality_epochs = 40;
    let hub = Hub::start(&net, quick);
    let n = hub.sealing.pledge().await.unwrap();
    hub.until(n, SectorState::Available).await;

    // A deal with an allocation. While the sector is not proven, it would take a new one.
    let piece = net.piece(1_500);
    let own = net.chain.wallet_default_address();
    let clients = net.node.wallet_list().await.unwrap();
    let client = clients.into_iter().find(|a| *a != own).unwrap();
    let order = AllocationOrder {
        provider: MINER.address(),
        piece: piece.cid.cid(),
        size: piece.size.get(),
        term_min: 200 * 2_880,
        term_max: 600 * 2_880,
        claim_within: 10_000,
    };
    net.chain.order_allocation(&client, &order).unwrap();
    let client = net.node.state_lookup_id(client, HEAD).await.unwrap();
    let ready = async {
        loop {
            let all = net.node.state_get_allocations(client, HEAD).await.unwrap();
            let active = net
                .node
                .state_miner_active_sectors(MINER.address(), HEAD)
                .await
                .unwrap();
            if let (Some(id), 1) = (all.into_keys().next(), active.len()) {
                return id;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    let allocation = Allocation {
        client: ActorId(client.id().unwrap()),
        id: tokio::time::timeout(PATIENCE, ready)
            .await
            .expect("a proven sector"),
    };
    let at = hub
        .sealing
        .add_piece(deal(1), piece, terms(Some(allocation)))
        .await
        .unwrap();
    assert_eq!((at.sector, at.offset), (n, 0), "the proven sector takes it");
    let gate = hub.work.hold("replica_update");
    hub.sealing.seal_now(n).await.unwrap();

    // The hub dies while the update is made, and goes on.
    hub.until(n, SectorState::UpdateReplica).await;
    hub.stop().await;
    drop(gate);
    let hub = Hub::start(&net, quick);
    hub.until(n, SectorState::UpdateActivating).await;
    let info = || net.node.state_sector_get_info(MINER.address(), n, HEAD);
    let on_chain = info().await.unwrap().unwrap();
    assert!(on_chain.sector_key_cid.is_some() && on_chain.verified_deal_weight > 0u8.into());
    let id = Hub::id(n);
    assert!(hub.storage.sealed(id).exists(), "a block may ask for it");

    // What the chain has now is what the files give, and they hold the piece.
    let sector = hub.sealing.sector(n).unwrap().unwrap().sector;
    let new = sector.current_commitments().unwrap();
    assert_eq!(new.comm_r.sealed_cid(), on_chain.sealed_cid);
    let mut raw = Vec::new();
    let files = UpdatedSector {
        size: SIZE,
        sealed: &hub.storage.sealed(id),
        cache: &hub.storage.cache(id),
        updated: &hub.storage.updated(id),
        updated_cache: &hub.storage.updated_cache(id),
    };
    Vanilla
        .unseal_update(&files, &new.comm_d, &mut raw, UnpaddedOffset(0), 1_500)
        .unwrap();
    let expected: Vec<u8> = (0..1_500usize)
        .map(|i| (i % 251).to_le_bytes()[0])
        .collect();
    assert!(raw == expected, "the piece comes back");

    hub.until(n, SectorState::Proving).await;
    assert!(!hub.storage.sealed(id).exists() && !hub.storage.scratch(id).exists());
    let walked = hub.walked(n);
    for state in SNAP {
        assert!(walked.iter().any(|w| w == state), "{state} in {walked:?}");
    }
    let failed = walked.iter().any(|w| w.ends_with("Failed"));
    assert!(!failed, "{walked:?}");
    let files = hub.sealing.replica(n, &new.comm_r);
    let post = lotus_proofs::PostSector {
        number: n,
        comm_r: new.comm_r,
        sealed: files.sealed,
        cache: files.cache,
    };
    let proved = Vanilla.window_post(MINER, SIZE, &[7; 32], &[post]).unwrap();
    assert!(matches!(proved, WindowPost::Proved(_)));
    let faults = net.node.state_miner_faults(MINER.address(), HEAD).await;
    assert!(faults.unwrap().is_empty(), "proven in every deadline");

    // The end: what it costs, the message, and the files only when the chain forgot it.
    let early = hub.sealing.remove(n).await.unwrap_err();
    assert!(matches!(early, SealingError::Needed { .. }), "{early}");
    let stake = hub.sealing.stake(n).await.unwrap();
    let fee: u128 = stake.termination_fee_attofil.unwrap().parse().unwrap();
    assert_eq!((stake.deals, stake.deposit_attofil), (1, None));
    assert!(fee > 0, "the commitment ends long before its time");
    hub.sealing.terminate(n).await.unwrap();
    hub.until(n, SectorState::TerminateFinality).await;
    let kept = info().await.unwrap();
    assert!(kept.is_some(), "until its partition is compacted");
    assert!(
        hub.storage.updated(id).exists(),
        "a reorg may bring it back"
    );
    hub.until(n, SectorState::Removed).await;
    assert!(!hub.storage.updated(id).exists() && !hub.storage.updated_cache(id).exists());
    hub.stop().await;
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_that_is_given_up_leaves_the_sector_as_it_was() {
    let net = Net::start(policy()).await;
    let hub = Hub::start(&net, |cfg| cfg.finality_epochs = 40);
    let n = hub.sealing.pledge().await.unwrap();
    hub.until(n, SectorState::Available).await;
    let active = async {
        let miner = MINER.address();
        while net
            .node
            .state_miner_active_sectors(miner, HEAD)
            .await
            .unwrap()
            .is_empty()
        {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, active)
        .await
        .expect("proven");
    let gate = hub.work.hold("prove_update");
    let piece = net.piece(900);
    let at = hub.sealing.add_piece(deal(1), piece, terms(None)).await;
    assert_eq!(at.unwrap().sector, n);
    hub.sealing.seal_now(n).await.unwrap();
    hub.until(n, SectorState::ProveReplicaUpdate).await;
    assert!(hub.storage.updated(Hub::id(n)).exists());
    hub.sealing.abort_upgrade(n).await.unwrap();
    hub.until(n, SectorState::Proving).await;
    drop(gate);
    assert!(!hub.storage.updated(Hub::id(n)).exists());
    assert_eq!(hub.sealing.placement(&deal(1)).unwrap(), None);
    let sector = hub.sealing.sector(n).unwrap().unwrap().sector;
    assert!(sector.pieces.is_empty() && sector.update.is_none());

    // Offered again, it takes the deal.
    hub.sealing.snap_up(n).await.unwrap();
    let again = hub.sealing.add_piece(deal(1), piece, terms(None)).await;
    assert_eq!(again.unwrap().sector, n);
    hub.sealing.seal_now(n).await.unwrap();
    hub.until(n, SectorState::UpdateActivating).await;
    hub.stop().await;
    net.stop().await;
}

/// Puts a piece into an upgrade, as soon as the hub has seen a sector proven that takes it.
async fn upgrade(hub: &Hub, piece: PieceInfo) -> SectorNumber {
    let placed = async {
        loop {
            match hub.sealing.add_piece(deal(1), piece, terms(None)).await {
                Ok(at) => return at.sector,
                Err(SealingError::NoRoom { .. }) => {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                Err(e) => panic!("{e}"),
            }
        }
    };
    let placed = tokio::time::timeout(PATIENCE, placed).await;
    placed.expect("a sector is proven")
}

/// A backup from before the new replica is restored after the chain has taken the upgrade.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_harms_no_upgrade_on_chain() {
    let net = Net::start(policy()).await;
    let upgrades = |cfg: &mut SealingConfig| cfg.make_new_sector_for_deals = false;
    let hub = Hub::start(&net, upgrades);
    let n = hub.sealing.pledge().await.unwrap();
    hub.until(n, SectorState::Available).await;
    let gate = hub.work.hold("replica_update");
    let piece = net.piece(900);
    assert_eq!(upgrade(&hub, piece).await, n);
    hub.sealing.seal_now(n).await.unwrap();
    hub.until(n, SectorState::UpdateReplica).await;
    hub.stop().await;
    drop(gate);
    let backup = net.back_up();
    let hub = Hub::start(&net, upgrades);
    hub.until(n, SectorState::UpdateActivating).await;
    let updated = hub.storage.updated(Hub::id(n));
    let before = std::fs::read(&updated).unwrap();
    hub.stop().await;

    net.restore(&backup);
    let hub = Hub::start(&net, upgrades);
    // The operator's order to give the upgrade up does no harm either, whichever is first.
    drop(hub.sealing.abort_upgrade(n).await);
    hub.until(n, SectorState::UpdateActivating).await;
    assert_eq!(hub.work.begun("replica_update"), 0);
    assert!(std::fs::read(&updated).unwrap() == before);
    let record = hub.sealing.sector(n).unwrap().unwrap();
    assert_eq!(record.sector.pieces.len(), 1, "it is in the upgrade");
    let info = net.node.state_sector_get_info(MINER.address(), n, HEAD);
    let sealed = info.await.unwrap().unwrap().sealed_cid;
    let known = record.sector.current_commitments().unwrap();
    assert_eq!(known.comm_r.sealed_cid(), sealed);
    hub.stop().await;
    net.stop().await;
}
