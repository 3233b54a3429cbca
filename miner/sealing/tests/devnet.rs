//! Sealing on the embedded chain, over its RPC: verified data, and reorgs while messages land.

#![expect(clippy::unwrap_used, reason = "a failed test panics")]

mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lotus_chain::Follower;
use lotus_devnet::rpc::{Perm, Server, Tokens};
use lotus_devnet::{AllocationOrder, Chain, ChainConfig, Policy};
use lotus_journal::{Journal, JournalError, Tx};
use lotus_messages::{MessagesConfig, Sender};
use lotus_node_client::api::TipSetKey;
use lotus_node_client::{Client, Node, NodeConfig};
use lotus_proofs::{Vanilla, commp};
use lotus_sealing::machine::Allocation;
use lotus_sealing::{
    Observer, PieceFiles, Sealing, SealingConfig, SealingDeps, SectorChange, SectorState, Storage,
    Terms,
};
use lotus_types::{ActorId, DealKey, Epoch, PieceCid, PieceInfo, SectorSize};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use worker::Worker;

const MINER: ActorId = ActorId(1000);
const SIZE: SectorSize = SectorSize::S2KiB;
const PATIENCE: Duration = Duration::from_secs(90);
const HEAD: &TipSetKey = &TipSetKey::HEAD;
/// Reorgs are shallower than what sealing waits for.
const DEPTH: u64 = 3;

struct Files(PathBuf);

impl PieceFiles for Files {
    fn path(&self, cid: &PieceCid) -> PathBuf {
        self.0.join(cid.to_string())
    }
}

impl Files {
    fn make(&self, len: u8) -> PieceInfo {
        let bytes = vec![len; usize::from(len) * 4];
        let piece = commp(bytes.as_slice()).unwrap();
        std::fs::write(self.path(&piece.cid), bytes).unwrap();
        piece
    }
}

struct Nobody;

impl Observer for Nobody {
    fn in_tx(&self, _tx: &mut Tx, _change: &SectorChange<'_>) -> Result<(), JournalError> {
        Ok(())
    }
    fn committed(&self) {}
}

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
    let dir = tempfile::tempdir().unwrap();
    let cfg = ChainConfig {
        policy: Policy::fast().with_block_time_ms(100).with_seed_delay(4),
        sector_size: SIZE,
        ..ChainConfig::default()
    };
    let repo = dir.path().join("devnet");
    std::fs::create_dir(&repo).unwrap();
    let chain = Chain::open(&repo, cfg, Arc::new(Vanilla)).unwrap();
    let tokens = Tokens::open(&repo).unwrap();
    let token = tokens.issue(&Perm::Admin.up_to());
    let any = ([127, 0, 0, 1], 0).into();
    let server = Server::bind(any, chain.clone(), tokens).await.unwrap();
    let api = format!("{token}:http://{}", server.local_addr().unwrap());
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let serve = server.serve(stop.clone());
    tasks.spawn(async move { serve.await.unwrap() });
    let clock = chain.clone();
    let end = stop.clone();
    tasks.spawn(async move { clock.run(end).await.unwrap() });
    let node: Node = Client::connect(&NodeConfig {
        api,
        ..NodeConfig::default()
    })
    .unwrap();

    let journal = Journal::open(&dir.path().join("journal")).unwrap();
    let (follower, walk) = Follower::new(node.clone());
    tasks.spawn(walk.run(stop.clone()));
    let messages = MessagesConfig {
        confidence_epochs: 4,
        repush_secs: 1,
        ..MessagesConfig::default()
    };
    let (sender, runner) = Sender::new(journal.clone(), node.clone(), &follower, messages);
    tasks.spawn(runner.run(stop.clone()));
    let pieces = Files(dir.path().join("pieces"));
    std::fs::create_dir(&pieces.0).unwrap();
    let plain = pieces.make(100);
    let verified = pieces.make(200);
    let work = Arc::new(Worker::default());
    let (sealing, runner) = Sealing::new(SealingDeps {
        journal,
        node: node.clone(),
        follower,
        sender,
        work: work.clone(),
        storage: Storage::open(dir.path().join("sectors")).unwrap(),
        miner: MINER,
        size: SIZE,
        cfg: SealingConfig {
            ticket_lookback_epochs: 8,
            seed_confidence_epochs: 4,
            message_confidence_epochs: 4,
            retry_first_secs: 1,
            ..SealingConfig::default()
        },
        observer: Arc::new(Nobody),
        pieces: Arc::new(pieces),
    })
    .unwrap();
    tasks.spawn(runner.run(stop.clone()));

    let allocation = allocate(&chain, &node, &verified).await;
    let missing = Allocation {
        id: allocation.id + 1_000,
        ..allocation
    };
    let mut sectors = Vec::new();
    for (i, piece, allocation) in [(1u8, plain, missing), (2, verified, allocation)] {
        let key = DealKey {
            client: "t1client".into(),
            id: u128::from(i).into(),
        };
        let at = sealing
            .add_piece(key, piece, terms(Some(allocation)))
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
    assert_eq!(
        (record.sector.pre_commit_tries, record.sector.commit_tries),
        (0, 0)
    );
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    work.end().await;
}
