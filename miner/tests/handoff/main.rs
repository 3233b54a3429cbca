//! The hub API and the hand-off of pieces over real sockets: a hub without chain and sealing, and
//! a spoke that stages bytes.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod events;
mod full_disk;
mod handover;
mod harness;
mod market;
mod owners;
mod restart;

use std::collections::HashMap;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt as _;
use harness::{CLIENT, DEADLINE, Hub, Sectors, Spoke, bytes, fast, key};
use hub_proto::v1::event::What;
use hub_proto::v1::{
    AcquireRequest, GetSectorRequest, HttpSource, LeaseRequest, ListPiecesRequest, LocateRequest,
    OfferRequest, PiecePhase, PieceStatusRequest, Source, SubscribeRequest, UnixSource,
    WatchCapacityRequest, source,
};
use hub_proto::{HubError, events_stream};
use lotus_dataplane::{DataError, PieceReader, Plane};
use lotus_miner::config::PiecesConfig;
use lotus_miner::pieces::SectorFate;
use lotus_miner::pieces::machine::Place;
use lotus_types::Kind;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread")]
async fn a_piece_goes_from_the_offer_to_a_proven_sector_and_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let mut spoke = Spoke::new(dir.path());
    spoke.serve();
    let data = bytes(3_000_000);
    let (piece, mut offer) = spoke.stage("car", &data);

    let acquire = |size| {
        hub.client.request(AcquireRequest {
            key: Some(key(1)),
            piece_size: size,
            ttl_seconds: 60,
        })
    };
    let credit = hub
        .client
        .capacity()
        .acquire(acquire(piece.size.get()))
        .await
        .unwrap()
        .into_inner();
    let again = hub
        .client
        .capacity()
        .acquire(acquire(piece.size.get()))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(credit.id, again.id);
    let mut room = hub
        .client
        .capacity()
        .watch(WatchCapacityRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        room.message().await.unwrap().unwrap().credited_bytes,
        piece.size.get()
    );
    offer.credit = credit.id;

    let mut events = Box::pin(events_stream(hub.client.clone(), 0, &["piece"]));
    hub.offer(offer.clone()).await.unwrap();
    let mut phases = Vec::new();
    while phases.last() != Some(&PiecePhase::Placed) {
        let event = tokio::time::timeout(DEADLINE, events.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(event.seq, phases.len() as u64 + 1);
        let Some(What::Piece(state)) = event.what else {
            panic!("{event:?}")
        };
        assert_eq!(state.piece_cid, piece.cid.to_string());
        phases.push(state.phase());
    }
    use PiecePhase::{Offered, Placed, Pulling, Stored};
    assert_eq!(phases, [Offered, Pulling, Stored, Placed]);
    assert!(std::fs::read(hub.piece_file(&piece)).unwrap() == data);
    assert_eq!(hub.parts(), 0);
    // The credit went into the piece.
    loop {
        let state = tokio::time::timeout(DEADLINE, room.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        if state.credited_bytes == 0 {
            break;
        }
    }

    // A replay changes nothing, and the key is taken.
    let state = hub.offer(offer.clone()).await.unwrap();
    assert_eq!(
        (state.phase(), state.sector, state.offset),
        (Placed, Some(7), Some(0))
    );
    assert_eq!(state.sector_state, "PreCommit1");
    let (_, mut other) = spoke.stage("other", &bytes(1000));
    other.key = Some(key(1));
    let e = hub.offer(other).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Data);
    let e = hub.withdraw(key(1)).await.unwrap_err();
    assert!(e.to_string().contains("in a sector"), "{e}");

    // Sealing tells within its own transaction.
    let deal: lotus_types::DealKey = (&key(1)).try_into().unwrap();
    hub.journal
        .write(|tx| hub.pieces.sector_in(tx, [deal], &SectorFate::Proven))
        .unwrap();
    hub.pieces.woken();
    let event = tokio::time::timeout(DEADLINE, events.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(matches!(event.what, Some(What::Piece(p)) if p.phase() == PiecePhase::Active));

    // A reader gets a descriptor.
    let cid_v2 = piece.cid_v2().to_string();
    let ask = |piece_cid: String| {
        hub.client.request(LeaseRequest {
            piece_cid,
            ttl_seconds: 600,
        })
    };
    let lease = hub
        .client
        .unsealed()
        .lease(ask(cid_v2))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (lease.raw_size, lease.piece_size),
        (data.len() as u64, piece.size.get())
    );
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!(u128::from(lease.expires_unix_ms) <= now.as_millis() + 60_000);
    let hello = hub.client.hello();
    assert_eq!(lease.generation, hello.generation);
    let plane = Plane::Socket(hello.data_socket.into());
    let reader = PieceReader::open(&plane, &lease.token, DEADLINE)
        .await
        .unwrap();
    assert!(reader.read_at(0, reader.len()).await.unwrap() == data);
    let file = reader.file().unwrap();
    assert!(file.write_all_at(b"x", 0).is_err(), "a lease is to read");
    let e = PieceReader::open(&plane, "guess", DEADLINE)
        .await
        .unwrap_err();
    assert!(matches!(e, DataError::UnknownToken { .. }), "{e}");

    // The raw file is lost; the sector has it still.
    let saved = dir.path().join("saved");
    std::fs::rename(hub.piece_file(&piece), &saved).unwrap();
    let locate = || {
        hub.client.request(LocateRequest {
            piece_cid: piece.cid.to_string(),
        })
    };
    let found = hub
        .client
        .unsealed()
        .locate(locate())
        .await
        .unwrap()
        .into_inner();
    assert!(found.known && !found.readable && found.sector == 7);
    let e = hub
        .client
        .unsealed()
        .lease(ask(piece.cid.to_string()))
        .await
        .unwrap_err();
    assert_eq!(HubError::from(e).kind(), Kind::Capacity);
    *sectors.sealed.lock().unwrap() = Some(saved);
    hub.client
        .unsealed()
        .request_unseal(locate())
        .await
        .unwrap();
    let end = tokio::time::Instant::now() + DEADLINE;
    while !hub
        .client
        .unsealed()
        .locate(locate())
        .await
        .unwrap()
        .into_inner()
        .readable
    {
        assert!(tokio::time::Instant::now() < end, "not unsealed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(std::fs::read(hub.piece_file(&piece)).unwrap() == data);
    hub.crash().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_refused_for_good() {
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let mut spoke = Spoke::new(dir.path());
    spoke.serve();

    let (piece, offer) = spoke.stage("flipped", &bytes(500_000));
    let mut data = bytes(500_000);
    data[77] ^= 1;
    std::fs::write(spoke.dir.join("flipped"), data).unwrap();
    hub.offer(offer.clone()).await.unwrap();
    let state = hub.phase(key(1), PiecePhase::Failed).await;
    assert!(
        state.reason.contains(&piece.cid.to_string()),
        "{}",
        state.reason
    );
    // The bytes became right meanwhile: the answer stays.
    std::fs::write(spoke.dir.join("flipped"), bytes(500_000)).unwrap();
    assert_eq!(hub.offer(offer).await.unwrap().phase(), PiecePhase::Failed);

    let (_, mut offer) = spoke.stage("short", &bytes(1000));
    offer.key = Some(key(2));
    std::fs::write(spoke.dir.join("short"), bytes(999)).unwrap();
    hub.offer(offer).await.unwrap();
    let state = hub.phase(key(2), PiecePhase::Failed).await;
    assert!(state.reason.contains("999 bytes"), "{}", state.reason);

    // A padded size that is too large: the commP is that of a smaller piece.
    let (piece, mut offer) = spoke.stage("size", &bytes(1000));
    offer.key = Some(key(3));
    offer.piece_size = piece.size.get() * 2;
    hub.offer(offer).await.unwrap();
    hub.phase(key(3), PiecePhase::Failed).await;

    assert!(sectors.calls.lock().unwrap().is_empty());
    let end = tokio::time::Instant::now() + DEADLINE;
    while hub.parts() > 0 {
        assert!(tokio::time::Instant::now() < end, "parts are left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!hub.piece_file(&piece).exists());
    hub.crash().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_survives_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    sectors.busy.store(true, Ordering::SeqCst);
    let mut spoke = Spoke::new(dir.path());
    let (piece, offer) = spoke.stage("car", &bytes(2_000_000));

    // The spoke is away: the offer stays, with a reason.
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let first = hub.client.hello().generation;
    hub.offer(offer.clone()).await.unwrap();
    let state = hub.until(key(1), "reason", |s| !s.reason.is_empty()).await;
    assert_eq!(state.phase(), PiecePhase::Pulling);
    hub.crash().await;

    // The new hub goes on where the old one stopped, from the bytes that it finds.
    let part = dir
        .path()
        .join(format!("hub/pieces/tmp/{CLIENT}_{}.part", key(1).id));
    std::fs::write(&part, &bytes(2_000_000)[..700_000]).unwrap();
    spoke.serve();
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    assert!(hub.client.hello().generation > first);
    let state = hub
        .until(key(1), "busy sectors", |s| s.reason.contains("busy"))
        .await;
    assert_eq!(state.phase(), PiecePhase::Stored);
    assert!(std::fs::read(hub.piece_file(&piece)).unwrap() == bytes(2_000_000));
    hub.crash().await;

    // The spoke has dropped its copy; the crash came after the placement, before our note of it.
    std::fs::remove_file(spoke.dir.join("car")).unwrap();
    let place = Place {
        sector: 7,
        offset: 4096,
    };
    let name = format!("{CLIENT}/{}", key(1).id);
    sectors.placed.lock().unwrap().insert(name, place);
    sectors.proven.store(true, Ordering::SeqCst);
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let e = hub.withdraw(key(1)).await.unwrap_err();
    assert!(e.to_string().contains("in a sector"), "{e}");
    sectors.busy.store(false, Ordering::SeqCst);
    let state = hub.phase(key(1), PiecePhase::Active).await;
    assert_eq!((state.sector, state.offset), (Some(7), Some(4096)));
    assert_eq!(hub.offer(offer).await.unwrap().phase(), PiecePhase::Active);

    // One unbroken sequence of events over three hubs.
    let request = SubscribeRequest {
        from_seq: 1,
        topics: vec![],
    };
    let mut stream = hub
        .client
        .events()
        .subscribe(request)
        .await
        .unwrap()
        .into_inner();
    let mut seqs = Vec::new();
    loop {
        let event = tokio::time::timeout(DEADLINE, stream.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        seqs.push(event.seq);
        if matches!(event.what, Some(What::Piece(p)) if p.phase() == PiecePhase::Active) {
            break;
        }
    }
    assert_eq!(seqs, (1..=5).collect::<Vec<_>>());
    hub.crash().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_file_for_one_piece_however_often_it_is_offered() {
    let dir = tempfile::tempdir().unwrap();
    let sectors = Arc::new(Sectors::default());
    sectors.busy.store(true, Ordering::SeqCst);
    let hub = Hub::start(dir.path(), &sectors, fast()).await;
    let mut spoke = Spoke::new(dir.path());
    spoke.serve();
    let (piece, offer) = spoke.stage("car", &bytes(1000));
    // The same piece with zeros that another client counts as payload.
    let mut longer = bytes(1000);
    longer.extend([0; 10]);
    let (other, mut second) = spoke.stage("longer", &longer);
    assert_eq!(other.cid, piece.cid);
    second.key = Some(key(2));
    hub.offer(offer).await.unwrap();
    hub.phase(key(1), PiecePhase::Stored).await;
    hub.offer(second).await.unwrap();
    hub.phase(key(2), PiecePhase::Stored).await;
    assert!(std::fs::read(hub.piece_file(&piece)).unwrap() == longer);

    let list = |after: String, limit| hub.client.request(ListPiecesRequest { after, limit });
    let page = hub
        .client
        .pieces()
        .list(list(String::new(), 1))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(page.pieces[0].key, Some(key(1)));
    let page = hub
        .client
        .pieces()
        .list(list(page.next, 10))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (page.pieces.len(), page.pieces[0].key.clone()),
        (1, Some(key(2)))
    );
    assert!(page.next.is_empty());

    let gone = |hub: &Hub| !hub.piece_file(&piece).exists();
    assert_eq!(
        hub.withdraw(key(1)).await.unwrap().phase(),
        PiecePhase::Withdrawn
    );
    assert_eq!(
        hub.withdraw(key(1)).await.unwrap().phase(),
        PiecePhase::Withdrawn
    );
    assert!(!gone(&hub));
    hub.withdraw(key(2)).await.unwrap();
    let end = tokio::time::Instant::now() + DEADLINE;
    while !gone(&hub) {
        assert!(tokio::time::Instant::now() < end, "the file stays");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    hub.crash().await;
}

/// An HTTP source that breaks off, then serves the rest.
#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_http_pull_resumes() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::start(dir.path(), &Arc::new(Sectors::default()), fast()).await;
    let spoke = Spoke::new(dir.path());
    let data = bytes(1_500_000);
    let (piece, mut offer) = spoke.stage("unused", &data);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/piece", listener.local_addr().unwrap());
    let served = data.clone();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut ranges = Vec::new();
        loop {
            let (mut conn, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(conn.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap().to_lowercase();
            assert!(head.contains("authorization: bearer x"), "{head}");
            let from = head.split_once("range: bytes=").map_or(0, |(_, r)| {
                r.split_once('-').unwrap().0.parse::<usize>().unwrap()
            });
            ranges.push(from);
            let len = served.len();
            let reply = format!(
                "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {from}-{}/{len}\r\n\
                 content-length: {}\r\nconnection: close\r\n\r\n",
                len - 1,
                len - from
            );
            conn.write_all(reply.as_bytes()).await.unwrap();
            let until = if ranges.len() == 1 { 600_000 } else { len };
            // The hub may have hung up.
            if conn.write_all(&served[from..until]).await.is_ok() {
                drop(conn.shutdown().await);
            }
            if ranges.len() > 1 {
                return ranges;
            }
        }
    });
    offer.source = Some(Source {
        at: Some(source::At::Http(HttpSource {
            url,
            headers: [("authorization".to_owned(), "Bearer x".to_owned())].into(),
        })),
    });
    hub.offer(offer).await.unwrap();
    hub.phase(key(1), PiecePhase::Placed).await;
    assert!(std::fs::read(hub.piece_file(&piece)).unwrap() == data);
    let ranges = tasks.join_next().await.unwrap().unwrap();
    assert_eq!(ranges[0], 0);
    assert!(ranges[1] > 0, "the second try began anew");
    hub.crash().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let full = PiecesConfig {
        keep_free_bytes: u64::MAX,
        ..fast()
    };
    let hub = Hub::start(dir.path(), &Arc::new(Sectors::default()), full).await;
    let spoke = Spoke::new(dir.path());
    let (piece, good) = spoke.stage("car", &bytes(1000));
    type Change = fn(&mut OfferRequest);
    let table: [(&str, Change); 16] = [
        ("key is missing", |o| o.key = None),
        ("key", |o| o.key.as_mut().unwrap().id = "x".into()),
        ("key.client", |o| {
            o.key.as_mut().unwrap().client = "t1-x".into()
        }),
        ("piece_cid", |o| o.piece_cid = "bafkqaaa".into()),
        ("piece_size", |o| o.piece_size = 1000),
        ("piece_size", |o| o.piece_size = 16 << 20),
        ("raw_size", |o| o.raw_size = 0),
        ("raw_size", |o| o.raw_size = 2000),
        ("source", |o| o.source = None),
        ("source", |o| {
            o.source.as_mut().unwrap().at = Some(source::At::Unix(UnixSource {
                socket: "relative".into(),
                token: "x".into(),
            }));
        }),
        ("source", |o| {
            o.source.as_mut().unwrap().at = Some(source::At::Http(HttpSource {
                url: "file:///etc/passwd".into(),
                headers: HashMap::new(),
            }));
        }),
        ("terms", |o| o.terms.as_mut().unwrap().start_epoch = -1),
        ("terms", |o| o.terms.as_mut().unwrap().end_epoch = 100),
        ("terms", |o| o.terms.as_mut().unwrap().allocation_id = 4),
        ("terms", |o| {
            o.terms.as_mut().unwrap().notify_address = "me".into()
        }),
        ("use.format", |o| {
            o.r#use.as_mut().unwrap().format = "zip".into()
        }),
    ];
    for (what, change) in table {
        let mut offer = good.clone();
        change(&mut offer);
        let e = hub.offer(offer).await.unwrap_err();
        assert_eq!(e.kind(), Kind::Data, "{what}: {e}");
        assert!(e.to_string().contains(what), "{what}: {e}");
        assert!(!e.fix().is_empty(), "{what}");
    }
    let mut offer = good.clone();
    offer.piece_cid = piece.cid_v2().to_string();
    offer.raw_size = 999;
    let e = hub.offer(offer).await.unwrap_err();
    assert!(e.to_string().contains("1000 raw bytes"), "{e}");

    // No room: the caller learns when to come back.
    let e = hub.offer(good).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Capacity);
    assert!(e.retry_after().is_some());
    let acquire = |size| {
        hub.client.request(AcquireRequest {
            key: Some(key(1)),
            piece_size: size,
            ttl_seconds: 1,
        })
    };
    let e = HubError::from(
        hub.client
            .capacity()
            .acquire(acquire(2048))
            .await
            .unwrap_err(),
    );
    assert_eq!(e.kind(), Kind::Capacity);
    let e = HubError::from(
        hub.client
            .capacity()
            .acquire(acquire(16 << 20))
            .await
            .unwrap_err(),
    );
    assert_eq!(e.kind(), Kind::Data);

    let gone = |e: tonic::Status| assert!(HubError::from(e).is_not_found());
    let request = hub.client.request(PieceStatusRequest { key: Some(key(1)) });
    gone(hub.client.pieces().status(request).await.unwrap_err());
    let request = hub.client.request(GetSectorRequest {
        number: 3,
        log: false,
    });
    gone(hub.client.sectors().get(request).await.unwrap_err());
    let lease = LeaseRequest {
        piece_cid: piece.cid.to_string(),
        ttl_seconds: 5,
    };
    gone(hub.client.unsealed().lease(lease).await.unwrap_err());
    let subscribe = |from_seq, topic: &str| SubscribeRequest {
        from_seq,
        topics: vec![topic.to_owned()],
    };
    let e = hub
        .client
        .events()
        .subscribe(subscribe(9, "piece"))
        .await
        .unwrap_err();
    assert_eq!(e.code(), tonic::Code::OutOfRange);
    let e = hub
        .client
        .events()
        .subscribe(subscribe(0, "rumours"))
        .await
        .unwrap_err();
    assert_eq!(e.code(), tonic::Code::InvalidArgument);
    hub.crash().await;
}
