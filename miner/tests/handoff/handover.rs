//! Pieces that come over Lotus' JSON-RPC, and raw copies that nobody needs any more.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lotus_api::NewPiece;
use lotus_miner::config::PiecesConfig;
use lotus_miner::pieces::{KeepUnsealed, Placer};
use lotus_types::{ActorId, Epoch, Kind, PieceInfo, SectorNumber};
use tokio::sync::mpsc;
use ulid::Ulid;

use crate::harness::{DEADLINE, Hub, Sectors, bytes, fast};

/// Data of a whole piece, as Boost sends it.
const LEN: usize = 127 << 10;

fn new(deal: u64, data: &[u8]) -> NewPiece {
    NewPiece {
        key: lotus_types::DealKey {
            client: "t01004".into(),
            id: Ulid::from(u128::from(deal)),
        },
        piece: lotus_proofs::commp(data).unwrap(),
        start_epoch: Epoch(100),
        end_epoch: Epoch(600_000),
        allocation: Some((ActorId(1004), deal)),
        notify: None,
        keep_unsealed: false,
    }
}

/// A stream of these bytes, in pieces.
fn stream(data: &[u8]) -> lotus_api::Data {
    let (to, from) = mpsc::channel(1_000);
    for chunk in data.chunks(10_000) {
        to.try_send(Ok(chunk.to_vec().into())).unwrap();
    }
    from
}

async fn take(hub: &Hub, new: NewPiece, data: &[u8]) -> Result<(SectorNumber, u64), Kind> {
    let taken = hub.handover.take(new, stream(data));
    let taken = tokio::time::timeout(DEADLINE, taken).await.unwrap();
    taken.map_err(|e| e.kind)
}

fn file(hub: &Hub, piece: &PieceInfo) -> bool {
    hub.piece_file(piece).exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deal_that_is_handed_over_again_keeps_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let data = bytes(LEN);
    let deal = new(1, &data);
    let place = (SectorNumber(7), 0);
    assert_eq!(take(&hub, deal.clone(), &data).await, Ok(place));
    assert!(std::fs::read(hub.piece_file(&deal.piece)).unwrap() == data);
    // Again, as after a crash of the caller: its data is not read.
    assert_eq!(take(&hub, deal.clone(), &[]).await, Ok(place));
    // Another deal for the same piece: the bytes are here.
    assert_eq!(
        take(&hub, new(2, &data), &[]).await,
        Ok((SectorNumber(7), 128 << 10))
    );
    assert_eq!(hub.parts(), 0);
    // The key with another piece.
    let mut other = deal.clone();
    other.piece = lotus_proofs::commp(&bytes(LEN / 2)[..]).unwrap();
    assert_eq!(take(&hub, other, &bytes(LEN / 2)).await, Err(Kind::Data));

    // After a crash the place is the same, and what a call had brought by then is gone.
    std::fs::write(hub.dir.join("pieces/tmp/t01004_x.part"), "half").unwrap();
    hub.crash().await;
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    assert_eq!(hub.parts(), 0);
    assert_eq!(take(&hub, deal, &[]).await, Ok(place));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_data_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let data = bytes(LEN);
    let deal = new(1, &data);
    let mut wrong = data.clone();
    wrong[5] ^= 1;
    let long = [data.clone(), vec![0]].concat();
    for sent in [&wrong[..], &data[..LEN - 1], &data[..0], &long[..]] {
        assert!(take(&hub, deal.clone(), sent).await.is_err());
        assert_eq!(hub.parts(), 0);
        assert!(!file(&hub, &deal.piece));
    }
    assert!(sectors.calls.lock().unwrap().is_empty());
    // The right bytes are taken after all that.
    let place = (SectorNumber(7), 0);
    assert_eq!(take(&hub, deal, &data).await, Ok(place));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_copy_goes_when_the_policy_says_so_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    let cfg = PiecesConfig {
        keep_unsealed: KeepUnsealed::UntilProven,
        ..fast()
    };
    let hub = Hub::start(dir.path(), &sectors, cfg).await;
    let placer: Arc<dyn Placer> = sectors.clone();
    let data = bytes(LEN);
    sectors.proven.store(true, Ordering::SeqCst);
    let unwanted = new(1, &data);
    let mut wanted = new(2, &bytes(LEN - 127));
    wanted.piece.raw_size = LEN as u64 - 127;
    wanted.keep_unsealed = true;
    take(&hub, unwanted.clone(), &data).await.unwrap();
    take(&hub, wanted.clone(), &bytes(LEN - 127)).await.unwrap();
    let active = hub.phase_of(&unwanted.key);
    tokio::time::timeout(DEADLINE, active).await.unwrap();
    tokio::time::timeout(DEADLINE, hub.phase_of(&wanted.key))
        .await
        .unwrap();

    let (day, none) = (Duration::from_secs(86_400), Duration::ZERO);
    // Its sector may still be lost; then, somebody may be reading it; then it goes.
    assert_eq!(hub.pieces.drop_idle(&placer, 500, none).await.unwrap(), 0);
    sectors.is_final.store(true, Ordering::SeqCst);
    assert_eq!(hub.pieces.drop_idle(&placer, 500, day).await.unwrap(), 0);
    assert_eq!(hub.pieces.drop_idle(&placer, 500, none).await.unwrap(), 1);
    assert!(!file(&hub, &unwanted.piece) && file(&hub, &wanted.piece));
    assert_eq!(hub.unsealed.raw_file(&unwanted.piece.cid), None);
    // It can be read again.
    let sealed = dir.path().join("sealed");
    std::fs::write(&sealed, &data).unwrap();
    *sectors.sealed.lock().unwrap() = Some(sealed);
    let made = hub.unsealed.make(&unwanted.piece.cid);
    tokio::time::timeout(DEADLINE, made).await.unwrap().unwrap();
    assert!(hub.unsealed.raw_file(&unwanted.piece.cid).is_some());
    // And the other goes with its deal.
    assert_eq!(
        hub.pieces.drop_idle(&placer, 600_001, none).await.unwrap(),
        2
    );
}
