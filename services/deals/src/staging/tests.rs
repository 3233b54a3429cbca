use lotus_car::CarWriter;
use lotus_types::{Commitment, PaddedSize, PieceCid};
use ulid::Ulid;

use super::*;
use crate::arriving::Arriving;

fn key() -> DealKey {
    DealKey {
        client: "t1abc".into(),
        id: Ulid::from(5u128),
    }
}

fn piece_of(data: &[u8]) -> PieceInfo {
    lotus_proofs::commp(data).unwrap()
}

/// A CARv1 with one raw block.
fn car() -> Vec<u8> {
    // sha2-256 of "hello".
    let cid: cid::Cid = "bafkreibm6jg3ux5qumhcn2b3flc3tyu6dmlb4xa7u5bf44yegnrjhc4yeq"
        .parse()
        .unwrap();
    let mut w = CarWriter::new(Vec::new(), &[cid]).unwrap();
    w.write(&cid, b"hello").unwrap();
    w.finish().unwrap()
}

async fn send(
    staging: &Staging,
    data: &[u8],
    piece: PieceInfo,
    format: Format,
    resume: bool,
) -> Result<u64, IntakeError> {
    let arriving = Arriving::default();
    let lease = arriving.lease(&key()).unwrap();
    assert!(arriving.lease(&key()).is_none(), "one transfer at a time");
    let mut intake = staging.intake(piece, format, resume, lease);
    let start = intake.start().await;
    for chunk in data.chunks(7) {
        if intake
            .sink()
            .unwrap()
            .send(Bytes::copy_from_slice(chunk))
            .await
            .is_err()
        {
            break;
        }
    }
    intake.finish().await?;
    assert!(
        arriving.lease(&key()).is_some(),
        "the lease ends with the transfer"
    );
    Ok(start)
}

#[tokio::test]
async fn only_the_right_bytes_are_taken() {
    let dir = tempfile::tempdir().unwrap();
    let staging = Staging::open(dir.path()).unwrap();
    let car = car();
    let mut corrupt = car.clone();
    *corrupt.last_mut().unwrap() ^= 1;
    let cut = &car[..car.len() - 3];
    let of = piece_of;
    let check = |r: Result<u64, IntakeError>, words: &str| {
        let e = r.unwrap_err();
        assert!(e.to_string().contains(words), "{e}");
        assert!(!e.fix().is_empty());
        assert_eq!(e.kind(), Kind::Data);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            0,
            "{words}: nothing is left"
        );
    };
    check(
        send(&staging, cut, of(&car), Format::Car, false).await,
        "ended after",
    );
    check(
        send(
            &staging,
            &[car.clone(), vec![0]].concat(),
            of(&car),
            Format::Car,
            false,
        )
        .await,
        "more than",
    );
    check(
        send(&staging, &corrupt, of(&car), Format::Car, false).await,
        "the bytes are piece",
    );
    check(
        send(&staging, &corrupt, of(&corrupt), Format::Car, false).await,
        "corrupt",
    );
    check(
        send(&staging, cut, of(cut), Format::Car, false).await,
        "truncated",
    );
    check(
        send(
            &staging,
            b"no car at all",
            of(b"no car at all"),
            Format::Car,
            false,
        )
        .await,
        "not a sound CAR",
    );
    assert_eq!(
        send(&staging, &car, of(&car), Format::Car, false)
            .await
            .unwrap(),
        0
    );
    assert_eq!(fs::read(staging.piece(&key())).unwrap(), car);
    assert!(
        send(&staging, b"raw", of(b"raw"), Format::Raw, false)
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let staging = Staging::open(dir.path()).unwrap();
    let car = car();
    let piece = piece_of(&car);
    let first = send(&staging, &car[..20], piece, Format::Car, true).await;
    assert!(matches!(first, Err(IntakeError::Short { have: 20, .. })));
    // A sweep keeps what an open deal needs.
    staging.sweep(|k| *k == key()).unwrap();
    let start = send(&staging, &car[20..], piece, Format::Car, true)
        .await
        .unwrap();
    assert_eq!(start, 20);
    assert!(staging.has(&key()));
    staging.sweep(|_| false).unwrap();
    assert!(!staging.has(&key()));
}

#[tokio::test]
async fn bytes_that_are_here_are_checked_before_they_count() {
    let dir = tempfile::tempdir().unwrap();
    let staging = Staging::open(dir.path()).unwrap();
    let car = car();
    let arriving = Arriving::default();
    let check = async |bytes: &[u8], format| {
        fs::write(staging.chunks(&key()), bytes).unwrap();
        let lease = arriving.lease(&key()).unwrap();
        staging.check(piece_of(&car), format, lease).await
    };
    let mut wrong = car.clone();
    wrong[3] ^= 1;
    let e = check(&wrong, Format::Raw).await.unwrap_err();
    assert!(matches!(e, IntakeError::WrongPiece { .. }), "{e}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    check(&car, Format::Car).await.unwrap();
    assert_eq!(fs::read(staging.piece(&key())).unwrap(), car);
    staging.remove(&key()).unwrap();

    // A piece that others have too: its removal here takes it from nobody.
    let other = dir.path().join("other");
    fs::write(&other, &car).unwrap();
    staging.adopt(&key(), &other).unwrap();
    staging.adopt(&key(), &other).unwrap();
    let lease = arriving.lease(&key()).unwrap();
    let checked = staging.check(piece_of(&car), Format::Car, lease).await;
    checked.unwrap();
    staging.remove(&key()).unwrap();
    assert_eq!(fs::read(&other).unwrap(), car);
    // Nor does an upload that comes after a kill between the two.
    staging.adopt(&key(), &other).unwrap();
    let begun = send(&staging, &car[..9], piece_of(&car), Format::Car, false).await;
    assert!(matches!(begun, Err(IntakeError::Short { have: 9, .. })));
    assert_eq!(fs::read(other).unwrap(), car);
}

#[test]
fn whole_transfers_and_chunks_keep_each_other_out() {
    let arriving = Arriving::default();
    let one = arriving.chunk(&key(), 1).unwrap();
    let two = arriving.chunk(&key(), 2).unwrap();
    assert!(arriving.chunk(&key(), 1).is_none());
    assert!(arriving.lease(&key()).is_none() && arriving.has(&key()));
    arriving.stop(&key());
    assert!(one.stop.is_cancelled() && two.stop.is_cancelled());
    drop(one);
    assert!(arriving.lease(&key()).is_none());
    drop(two);
    let whole = arriving.lease(&key()).unwrap();
    assert!(arriving.chunk(&key(), 1).is_none() && arriving.lease(&key()).is_none());
    assert!(arriving.takes(&key()).is_some());
    arriving.stop(&key());
    assert!(whole.transfer.stop.is_cancelled());
    drop(whole);
    assert!(!arriving.has(&key()));
}

#[tokio::test]
async fn a_full_disk_is_told_apart() {
    let info = PieceInfo {
        cid: PieceCid::new(Commitment([0; 32])),
        size: PaddedSize::new(128).unwrap(),
        raw_size: 5,
    };
    let dir = tempfile::tempdir().unwrap();
    let staging = Staging::open(dir.path()).unwrap();
    // /dev/full gives ENOSPC for every write.
    std::os::unix::fs::symlink("/dev/full", staging.path(&key(), "part")).unwrap();
    let e = send(&staging, b"12345", info, Format::Raw, false)
        .await
        .unwrap_err();
    assert!(matches!(e, IntakeError::DiskFull), "{e}");
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "the part is removed"
    );
}
