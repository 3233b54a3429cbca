//! Sealing on the embedded chain, over its RPC: verified data, and reorgs while messages land.

#![expect(clippy::unwrap_used, reason = "a failed test panics")]

mod net;
mod worker;

use std::time::Duration;

use lotus_devnet::{AllocationOrder, Chain, Policy};
use lotus_node_client::Node;
use lotus_sealing::machine::Allocation;
use lotus_sealing::{NewMeta, NewPath, SectorState, Terms};
use lotus_types::{ActorId, Epoch, PieceInfo};
use net::{HEAD, Hub, MINER, Net, PATIENCE, deal};

/// Reorgs are shallower than what sealing waits for.
const DEPTH: u64 = 3;

/// An allocation on chain for this piece.
async fn allocate(chain: &Chain, node: &Node, piece: &PieceInfo) -> Allocation {
    let own = chain.wallet_default_address();
    let client = node
        .wallet_list()
        .await
        .unwrap()
        .into_iter()
        .find(|a| *a != own)
        .unwrap();
    let order = AllocationOrder {
        provider: MINER.address(),
        piece: piece.cid.cid(),
        size: piece.size.get(),
        term_min: 200 * 2_880,
        term_max: 600 * 2_880,
        claim_within: 10_000,
    };
    chain.order_allocation(&client, &order).unwrap();
    let client = node.state_lookup_id(client, HEAD).await.unwrap();
    let found = async {
        loop {
            let all = node.state_get_allocations(client, HEAD).await.unwrap();
            if let Some(id) = all.into_keys().next() {
                return id;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    Allocation {
        client: ActorId(client.id().unwrap()),
        id: tokio::time::timeout(PATIENCE, found).await.unwrap(),
    }
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
async fn verified_pieces_are_sealed_through_reorgs() {
    let policy = Policy::fast().with_block_time_ms(100).with_seed_delay(4);
    let net = Net::start(policy).await;
    let (chain, node) = (&net.chain, &net.node);
    let hub = Hub::start(&net, |_| {});
    let sealing = &hub.sealing;
    let plain = net.piece(400);
    let verified = net.piece(800);
    let allocation = allocate(chain, node, &verified).await;
    let missing = Allocation {
        id: allocation.id + 1_000,
        ..allocation
    };
    let mut sectors = Vec::new();
    for (i, piece, allocation) in [(1, plain, missing), (2, verified, allocation)] {
        let at = sealing
            .add_piece(deal(i), piece, terms(Some(allocation)))
            .await
            .unwrap();
        sectors.push(at.sector);
    }
    assert_eq!(sectors[0], sectors[1], "512 and 1,024 bytes share a sector");
    let n = sectors[0];
    sealing.seal_now(n).await.unwrap();

    let mut changes = sealing.changes();
    let mut heads = node.chain_head().await.unwrap().height;
    let mut shaken = Vec::new();
    let sealed = async {
        loop {
            let record = sealing.sector(n).unwrap().unwrap();
            let state = record.sector.state;
            if state == SectorState::Proving {
                return record;
            }
            let shakes = matches!(
                state,
                SectorState::PreCommitBatchWait
                    | SectorState::WaitSeed
                    | SectorState::CommitAggregateWait
            );
            let height = node.chain_head().await.unwrap().height;
            // Once in each of these states, when its message has had time to be in a block.
            if shakes && !shaken.contains(&state) && (height - heads).0 >= 2 {
                shaken.push(state);
                chain.reorg(DEPTH).unwrap();
            }
            tokio::select! {
                Ok(()) = changes.changed() => heads = height,
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
        }
    };
    let record = tokio::time::timeout(PATIENCE, sealed).await;
    let record = record.unwrap_or_else(|_| panic!("{:#?}", sealing.sector(n)));
    assert_eq!(shaken.len(), 3, "{shaken:?}");
    let claims: Vec<_> = record
        .sector
        .pieces
        .iter()
        .map(|p| p.claim.is_some())
        .collect();
    assert_eq!(claims, [false, true], "only what is on chain is claimed");

    let info = node
        .state_sector_get_info(MINER.address(), n, HEAD)
        .await
        .unwrap()
        .unwrap();
    assert!(info.verified_deal_weight > 0u8.into() && info.deal_weight > 0u8.into());
    assert_eq!(Some(info.expiration), record.sector.expiration);
    assert!(info.expiration.0 >= 540 * 2_880);
    let left = node
        .state_get_allocation(allocation.client.address(), allocation.id, HEAD)
        .await;
    assert_eq!(left.unwrap(), None, "the allocation is claimed");
    let failures: Vec<_> = record
        .log
        .iter()
        .filter(|e| e.to.ends_with("Failed"))
        .collect();
    assert!(failures.is_empty(), "{failures:?}");
    hub.stop().await;
    net.stop().await;
}

/// A folder beside the repo, as a path that seals or keeps.
fn disk(net: &Net, name: &str, can_seal: bool) -> NewPath {
    let dir = net.dir.path().join(name);
    std::fs::create_dir(&dir).unwrap();
    NewPath {
        dir,
        init: Some(NewMeta {
            weight: 10,
            can_seal,
            can_store: !can_seal,
            max_storage: 0,
            groups: Vec::new(),
            allow_to: Vec::new(),
        }),
        read_only: false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sector_is_sealed_here_kept_there_moved_on_and_proven_throughout() {
    let policy = Policy::fast()
        .with_deadlines(4, 12)
        .with_block_time_ms(250)
        .with_seed_delay(3);
    let net = Net::start(policy).await;
    let hub = Hub::start(&net, |_| {});
    // The repo's own path does neither.
    let home = net.dir.path().join("sectors");
    let meta = std::fs::read_to_string(home.join("sectorstore.json")).unwrap();
    let meta = meta.replace("true", "false");
    std::fs::write(home.join("sectorstore.json"), meta).unwrap();
    let attach = [("ssd", true), ("hdd", false), ("new-hdd", false)].map(|(name, seals)| {
        let storage = hub.storage.clone();
        let new = disk(&net, name, seals);
        move || storage.attach(&new).unwrap()
    });
    let storage = hub.storage.clone();
    let ids = tokio::task::spawn_blocking(move || {
        storage.redeclare(None).unwrap();
        attach.map(|attach| attach())
    });
    let [ssd, hdd, new_hdd] = ids.await.unwrap();
    let gate = hub.work.hold("commit");
    let n = hub.sealing.pledge().await.unwrap();
    let id = Hub::id(n);
    hub.until(n, SectorState::Committing).await;
    let held = hub.storage.find(n);
    assert!(held.iter().all(|h| h.path == ssd), "{held:?}");
    hub.stop().await;
    drop(gate);
    let hub = Hub::start(&net, |_| {});
    hub.until(n, SectorState::Available).await;
    let kept = hub.storage.find(n);
    let used: Vec<_> = kept.iter().filter(|h| !h.in_use.is_empty()).collect();
    assert_eq!(used.len(), 1, "{kept:?}");
    assert!(used[0].path == hdd || used[0].path == new_hdd, "{kept:?}");
    assert!(!hub.storage.scratch(id).exists());
    let to = if used[0].path == hdd { new_hdd } else { hdd };
    let from = used[0].dir.clone();

    let proven = async |what: &str| {
        let miner = MINER.address();
        let begin = node_height(&net.node).await;
        let through = async {
            loop {
                let active = net.node.state_miner_active_sectors(miner, HEAD).await;
                let faults = net.node.state_miner_faults(miner, HEAD).await.unwrap();
                assert!(faults.is_empty(), "{what}: {faults:?}");
                // Each deadline of a period and more has passed.
                if active.unwrap().len() == 1 && node_height(&net.node).await > begin + 60 {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let done = tokio::time::timeout(PATIENCE, through).await;
        done.unwrap_or_else(|_| panic!("{what}: not proven"));
    };
    proven("where it is kept").await;
    let (storage, target) = (hub.storage.clone(), to.clone());
    let ordered = tokio::task::spawn_blocking(move || storage.order_move(id, &target));
    ordered.await.unwrap().unwrap();
    proven("while and after it is moved").await;
    assert!(hub.storage.moves().is_empty(), "{:?}", hub.storage.moves());
    let held = hub.storage.find(n);
    assert!(held.len() == 1 && held[0].path == to, "{held:?}");
    assert!(!from.join("sealed").join(id.to_string()).exists());
    hub.stop().await;
    net.stop().await;
}

async fn node_height(node: &Node) -> i64 {
    node.chain_head().await.unwrap().height.0
}

/// A reorg takes a commit away that everybody thought was settled, and with it the seed.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_a_reorg_took_away_is_made_good() {
    // Deep enough for the pre-commit too.
    const DEEP: u64 = 30;
    let policy = Policy::fast().with_block_time_ms(150).with_seed_delay(4);
    let net = Net::start(policy).await;
    // As with real lookbacks, the reorg leaves the ticket as it is.
    let hub = Hub::start(&net, |cfg| cfg.ticket_lookback_epochs = 32);
    let tall = async {
        while node_height(&net.node).await < 45 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, tall).await.expect("blocks");
    let piece = net.piece(1_500);
    let at = hub.sealing.add_piece(deal(1), piece, terms(None)).await;
    let n = at.unwrap().sector;
    hub.sealing.seal_now(n).await.unwrap();
    hub.until(n, SectorState::Proving).await;
    net.chain.reorg(DEEP).unwrap();
    let info = async || {
        let info = net.node.state_sector_get_info(MINER.address(), n, HEAD);
        info.await.unwrap()
    };
    assert!(info().await.is_none(), "the chain has lost it");
    hub.until(n, SectorState::WaitSeed).await;
    let sector = hub.sealing.sector(n).unwrap().unwrap().sector;
    assert_eq!((sector.activation, sector.pieces.len()), (None, 1));
    hub.until(n, SectorState::Proving).await;
    let on_chain = info().await.expect("the chain has it again");
    let record = hub.sealing.sector(n).unwrap().unwrap();
    assert_eq!(record.sector.activation, Some(on_chain.activation));
    assert_eq!(record.sector.pieces.len(), 1);
    let commitments = record.sector.commitments.unwrap();
    assert_eq!(commitments.comm_r.sealed_cid(), on_chain.sealed_cid);
    hub.stop().await;
    net.stop().await;
}
