use std::convert::Infallible;

use super::*;

const IDLE: Duration = Duration::from_secs(5);

fn body(bytes: &[u8]) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin {
    let parts: Vec<_> = bytes
        .chunks(100)
        .map(|c| Ok(Bytes::copy_from_slice(c)))
        .collect();
    futures::stream::iter(parts)
}

fn open(dir: &Path, change: impl Fn(&mut PiecesConfig)) -> Arc<Pieces> {
    let mut cfg = PiecesConfig::default();
    change(&mut cfg);
    let journal = Journal::open(&dir.join("j")).unwrap();
    Arc::new(Pieces::open(&dir.join("pieces"), cfg, journal).unwrap())
}

fn files(dir: &Path) -> usize {
    fs::read_dir(dir.join("pieces")).unwrap().count()
}

#[tokio::test]
async fn both_ways_of_uploading_keep_the_piece_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (vec![1; 1_000], vec![2; 2_000]);
    let (pa, pb) = (
        lotus_proofs::commp(&a[..]).unwrap(),
        lotus_proofs::commp(&b[..]).unwrap(),
    );
    {
        let pieces = open(dir.path(), |_| {});
        let id = pieces.begin("x", Some(pa)).unwrap();
        let wrong = pieces
            .receive(id, true, None, body(&b[..1_000]), IDLE)
            .await;
        assert!(wrong.unwrap_err().error.contains("the bytes are piece"));
        assert_eq!((files(dir.path()), lock(&pieces.state).total), (0, 0));
        assert_eq!(
            pieces
                .receive(id, false, None, body(&a), IDLE)
                .await
                .unwrap_err()
                .code,
            404,
            "the two kinds are apart"
        );
        pieces
            .receive(id, true, Some(1_000), body(&a), IDLE)
            .await
            .unwrap();
        assert_eq!(
            pieces
                .receive(id, true, None, body(&a), IDLE)
                .await
                .unwrap_err()
                .code,
            404,
            "it is over"
        );

        let id = pieces.begin("x", None).unwrap();
        assert_eq!(pieces.finalize(id, pb).await.unwrap_err().code, 409);
        pieces
            .receive(id, false, None, body(&b), IDLE)
            .await
            .unwrap();
        assert_eq!(
            pieces
                .receive(id, false, None, body(&b), IDLE)
                .await
                .unwrap_err()
                .code,
            409
        );
        assert_eq!(pieces.file(&pb), None);
        assert!(pieces.finalize(id, pa).await.is_err());
        pieces.finalize(id, pb).await.unwrap();
        assert_eq!(lock(&pieces.state).total, 3_000);
    }
    fs::write(dir.path().join("pieces/left.part"), b"x").unwrap();
    let pieces = open(dir.path(), |_| {});
    assert_eq!(fs::read(pieces.file(&pa).unwrap()).unwrap(), a);
    assert_eq!(fs::read(pieces.file(&pb).unwrap()).unwrap(), b);
    assert_eq!((files(dir.path()), lock(&pieces.state).total), (2, 3_000));
    // A deal's own link outlives the piece.
    let link = dir.path().join("link");
    fs::hard_link(pieces.file(&pa).unwrap(), &link).unwrap();
    pieces.expire(unix_ms() + 7 * 3_600_000).await;
    assert_eq!(pieces.file(&pa), None);
    assert_eq!((files(dir.path()), lock(&pieces.state).total), (0, 0));
    assert_eq!(fs::read(link).unwrap(), a);
}

#[tokio::test]
async fn room_is_bounded_in_all_and_for_each() {
    let dir = tempfile::tempdir().unwrap();
    let pieces = open(dir.path(), |c| {
        (c.max_bytes, c.max_bytes_per_client) = (2_500, 1_500);
    });
    let code = async |owner: &str, bytes: &[u8], announced| {
        let id = pieces.begin(owner, None).unwrap();
        let out = pieces
            .receive(id, false, announced, body(bytes), IDLE)
            .await;
        out.map_or_else(|e| e.code, |()| 0)
    };
    assert_eq!(code("x", &[1; 1_000], Some(1_000)).await, 0);
    assert_eq!(code("x", &[2; 600], Some(600)).await, 429, "of one client");
    assert_eq!(
        code("y", &[3; 1_000], None).await,
        429,
        "its size is not known"
    );
    assert_eq!(code("y", &[3; 1_000], Some(1_000)).await, 0);
    assert_eq!(code("z", &[4; 600], Some(600)).await, 429, "in all");
    assert_eq!(code("z", &[4; 100], Some(100)).await, 413);
    assert_eq!(
        code("z", &[4; 300], Some(200)).await,
        413,
        "more than announced"
    );
    assert_eq!(lock(&pieces.state).total, 2_000);
    pieces.expire(unix_ms() + 2 * UPLOAD_TTL).await;
    assert_eq!((files(dir.path()), lock(&pieces.state).total), (0, 0));
    for _ in 0..MAX_UPLOADS_OF_ONE {
        pieces.begin("w", None).unwrap();
    }
    assert_eq!(pieces.begin("w", None).unwrap_err().code, 429);
    let off = tempfile::tempdir().unwrap();
    let off = open(off.path(), |c| c.enabled = false);
    assert_eq!(off.begin("w", None).unwrap_err().code, 404);
}

#[tokio::test]
async fn whoever_goes_before_the_end_leaves_nothing_that_is_not_counted() {
    let dir = tempfile::tempdir().unwrap();
    let pieces = open(dir.path(), |_| {});
    let bytes = vec![7; 1_000];
    let piece = lotus_proofs::commp(&bytes[..]).unwrap();
    // Gone after so many looks at the upload, each of which may be anywhere in it.
    for looks in 0..200 {
        let id = pieces.begin("x", Some(piece)).unwrap();
        let receiving = pieces.receive(id, true, None, body(&bytes), IDLE);
        let mut receiving = Box::pin(tokio::task::unconstrained(receiving));
        for _ in 0..looks {
            if futures::poll!(&mut receiving).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(receiving);
        let end = tokio::time::Instant::now() + IDLE;
        // What blocks goes on by itself, until the upload is done or begins anew.
        while lock(&pieces.state).uploads.get(&id).is_some_and(|u| u.busy) {
            assert!(tokio::time::Instant::now() < end);
            tokio::task::yield_now().await;
        }
        let (here, total) = {
            let state = lock(&pieces.state);
            (state.stored.len(), state.total)
        };
        assert_eq!((files(dir.path()), total), (here, here as u64 * 1_000));
        pieces.expire(unix_ms() + 7 * 3_600_000).await;
        assert_eq!((files(dir.path()), lock(&pieces.state).total), (0, 0));
    }
}
