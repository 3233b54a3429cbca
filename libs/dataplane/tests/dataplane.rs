//! Both transports over real sockets.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Extension;
use lotus_dataplane::{
    Asker, DataError, Dial, Duplex, Far, FdServer, HttpPull, OpenToken, PATH, PieceReader, Plane,
    Pulled, fetch_fd, http_client, http_router, pull_http,
};
use lotus_types::Kind;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(10);

/// Opens `<dir>/<token>`; token "busy" is refused for now, "dir" opens no regular file. Whoever says
/// who they are must be "reader".
struct Dir(PathBuf);

#[async_trait::async_trait]
impl OpenToken for Dir {
    async fn open(&self, token: &str, by: Option<&str>) -> Result<(File, u64), DataError> {
        let unknown = || DataError::UnknownToken { at: "test".into() };
        if by.is_some_and(|who| who != "reader") {
            return Err(unknown());
        }
        match token {
            "busy" => Err(DataError::Refused {
                at: "test".into(),
                kind: Kind::Capacity,
                message: "too many readers".into(),
            }),
            "dir" => Ok((File::open(&self.0).unwrap(), 1)),
            _ => {
                let file = File::open(self.0.join(token)).map_err(|_| unknown())?;
                let len = file.metadata().unwrap().len();
                Ok((file, len))
            }
        }
    }
}

fn payload() -> Vec<u8> {
    (0..3_000_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn dir() -> (tempfile::TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let data = payload();
    std::fs::write(dir.path().join("piece"), &data).unwrap();
    (dir, data)
}

fn serve_fd(dir: &Path, tasks: &mut JoinSet<()>) -> (PathBuf, CancellationToken) {
    let socket = dir.join("data.sock");
    let stop = CancellationToken::new();
    let server = FdServer::bind(&socket, Arc::new(Dir(dir.into()))).unwrap();
    tasks.spawn(server.run(stop.clone()));
    (socket, stop)
}

async fn serve_http(dir: &Path, tasks: &mut JoinSet<()>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let router = http_router(Arc::new(Dir(dir.into())));
    tasks.spawn(async move { axum::serve(listener, router).await.unwrap() });
    addr
}

#[tokio::test]
async fn a_descriptor_crosses_the_socket() {
    let (dir, data) = dir();
    let mut tasks = JoinSet::new();
    let (socket, stop) = serve_fd(dir.path(), &mut tasks);

    let (file, len) = fetch_fd(&socket, "piece", DEADLINE).await.unwrap();
    assert_eq!(len, data.len() as u64);
    let mut got = vec![0; data.len()];
    file.read_exact_at(&mut got, 0).unwrap();
    assert!(got == data);
    assert!(
        (&file).write_all(b"x").is_err(),
        "the descriptor must be read-only"
    );

    let e = fetch_fd(&socket, "nothing", DEADLINE).await.unwrap_err();
    assert!(matches!(e, DataError::UnknownToken { .. }), "{e}");
    let e = fetch_fd(&socket, "busy", DEADLINE).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Capacity);
    assert!(e.to_string().contains("too many readers"), "{e}");
    let e = fetch_fd(&socket, "dir", DEADLINE).await.unwrap_err();
    assert!(e.to_string().contains("not of a regular file"), "{e}");
    let e = fetch_fd(&socket, &"x".repeat(513), DEADLINE)
        .await
        .unwrap_err();
    assert_eq!(e.kind(), Kind::Data);

    stop.cancel();
    tasks.join_next().await.unwrap().unwrap();
    assert!(!socket.exists());
    let e = fetch_fd(&socket, "piece", DEADLINE).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Transport);
}

#[tokio::test]
async fn binding_replaces_a_dead_socket_only() {
    let (dir, _) = dir();
    let open: Arc<dyn OpenToken> = Arc::new(Dir(dir.path().into()));
    let socket = dir.path().join("s");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let first = FdServer::bind(&socket, open.clone()).unwrap();
    let second = FdServer::bind(&socket, open.clone()).err().unwrap();
    assert!(
        second.to_string().contains("another process listens"),
        "{second}"
    );
    drop(first);
    let not_a_socket = FdServer::bind(&dir.path().join("piece"), open.clone())
        .err()
        .unwrap();
    assert_eq!(not_a_socket.kind(), Kind::Config);
    let long = FdServer::bind(&dir.path().join("x".repeat(120)), open)
        .err()
        .unwrap();
    assert!(long.to_string().contains("107"), "{long}");
}

#[tokio::test]
async fn a_silent_peer_costs_the_deadline_only() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let e = fetch_fd(&socket, "piece", Duration::from_millis(50))
        .await
        .unwrap_err();
    assert!(matches!(e, DataError::Silent { .. }), "{e}");
}

async fn pull(
    (url, token): (&str, &str),
    from: u64,
    limit: u64,
    etag: Option<String>,
) -> (Vec<u8>, Result<Pulled, DataError>) {
    let client = http_client(DEADLINE).unwrap();
    let bearer = format!("Bearer {token}");
    let pull = HttpPull {
        url: url.into(),
        headers: HashMap::from([("authorization".into(), bearer)]),
        from,
        limit,
        idle: DEADLINE,
        etag,
    };
    let (tx, mut rx) = mpsc::channel::<bytes::Bytes>(2);
    let collect = async {
        let mut all = Vec::new();
        while let Some(chunk) = rx.recv().await {
            all.extend_from_slice(&chunk);
        }
        all
    };
    let run = async move { pull_http(&client, &pull, &tx).await };
    let (result, all) = tokio::join!(run, collect);
    (all, result)
}

#[tokio::test]
async fn http_pulls_resume() {
    let (dir, data) = dir();
    let mut tasks = JoinSet::new();
    let addr = serve_http(dir.path(), &mut tasks).await;
    let url = format!("http://{addr}{PATH}");
    let piece = (&*url, "piece");
    let len = data.len() as u64;

    let (all, done) = pull(piece, 0, len, None).await;
    assert!(all == data);
    let done = done.unwrap();
    assert_eq!(done.end, len);
    assert!(done.etag.is_some());

    let (rest, again) = pull(piece, 1_234_567, len, done.etag.clone()).await;
    assert!(rest == data[1_234_567..]);
    assert_eq!(again.unwrap(), done);
    let (none, end) = pull(piece, len, len, done.etag.clone()).await;
    assert!(none.is_empty());
    assert_eq!(end.unwrap().end, len);

    let (_, e) = pull(piece, 0, len - 1, None).await;
    assert!(matches!(e, Err(DataError::TooLong { .. })), "{e:?}");
    let (_, e) = pull(piece, 5, len, Some("\"other\"".into())).await;
    assert!(matches!(e, Err(DataError::Changed { .. })), "{e:?}");
    let (_, e) = pull(piece, len + 5, len + 9, done.etag).await;
    assert!(matches!(e, Err(DataError::Changed { .. })), "{e:?}");
    let (_, e) = pull((&url, "piecex"), 0, len, None).await;
    assert!(matches!(e, Err(DataError::UnknownToken { .. })), "{e:?}");
    let (_, e) = pull((&url, "busy"), 0, len, None).await;
    assert_eq!(e.unwrap_err().kind(), Kind::Transport);
    let (_, e) = pull(("http://127.0.0.1:1/", "piece"), 0, len, None).await;
    assert_eq!(e.unwrap_err().kind(), Kind::Transport);
}

/// A server that cuts the connection in the middle, and one that knows no ranges.
#[tokio::test]
async fn a_broken_transfer_goes_on_where_it_stopped() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        for sent in [4usize, 10] {
            let (mut conn, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(conn.read_u8().await.unwrap());
            }
            let head = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\nconnection: close\r\n\r\n";
            conn.write_all(head.as_bytes()).await.unwrap();
            conn.write_all(&b"0123456789"[..sent]).await.unwrap();
            conn.shutdown().await.unwrap();
        }
    });
    let (part, e) = pull((&url, ""), 0, 10, None).await;
    assert_eq!(part, b"0123");
    assert_eq!(e.unwrap_err().kind(), Kind::Transport);
    let (rest, done) = pull((&url, ""), 4, 10, None).await;
    assert_eq!(rest, b"456789");
    assert_eq!(done.unwrap().end, 10);
}

#[tokio::test]
async fn one_reader_for_both_transports() {
    let (dir, data) = dir();
    let mut tasks = JoinSet::new();
    let (socket, _stop) = serve_fd(dir.path(), &mut tasks);
    let addr = serve_http(dir.path(), &mut tasks).await;
    let dialed = Arc::new(AtomicUsize::new(0));
    let near = Plane::Socket(socket);
    let far = Plane::Far(Far::new(Arc::new(Counted(addr, dialed.clone()))));
    let by_fd = PieceReader::open(&near, "piece", DEADLINE).await.unwrap();
    let by_http = PieceReader::open(&far, "piece", DEADLINE).await.unwrap();
    assert!(by_fd.file().is_some() && by_http.file().is_none());
    for reader in [by_fd, by_http] {
        assert_eq!(reader.len(), data.len() as u64);
        for (offset, len) in [(0, 10), (0, data.len() as u64), (2_999_999, 1), (5, 0)] {
            let got = reader.read_at(offset, len).await.unwrap();
            let from = usize::try_from(offset).unwrap();
            assert!(got == data[from..from + usize::try_from(len).unwrap()]);
        }
        let e = reader.read_at(2_999_999, 2).await.unwrap_err();
        assert!(matches!(e, DataError::OutOfRange { .. }), "{e}");
    }
    let open = async |token| PieceReader::open(&far, token, DEADLINE).await.unwrap_err();
    let e = open("none").await;
    assert!(matches!(e, DataError::UnknownToken { .. }), "{e}");
    assert_eq!(open("busy").await.kind(), Kind::Transport);
    assert_eq!(dialed.load(Ordering::Relaxed), 1, "connections are kept");
}

/// Dials, and counts it.
struct Counted(SocketAddr, Arc<AtomicUsize>);

#[async_trait::async_trait]
impl Dial for Counted {
    async fn dial(&self) -> std::io::Result<Box<dyn Duplex>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(tokio::net::TcpStream::connect(self.0).await?))
    }
}

#[tokio::test]
async fn a_token_is_for_whoever_it_was_given_to() {
    let (dir, _) = dir();
    let mut tasks = JoinSet::new();
    for (who, reads) in [("reader", true), ("thief", false)] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let router = http_router(Arc::new(Dir(dir.path().into())));
        let router = router.layer(Extension(Asker(who.into())));
        tasks.spawn(async move { axum::serve(listener, router).await.unwrap() });
        let far = Plane::Far(Far::new(Arc::new(Counted(addr, Arc::default()))));
        let opened = PieceReader::open(&far, "piece", DEADLINE).await;
        assert_eq!(opened.is_ok(), reads, "{who}");
        let unknown = |e| matches!(e, DataError::UnknownToken { .. });
        assert!(opened.err().is_none_or(unknown), "{who}");
    }
}
