//! A server is replaced by another on the same socket, and no client sees a failure.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::routing::get;
use lotus_runtime::serve::{Extras, Limits, serve, serve_with};
use lotus_runtime::{CancellationToken, Tls};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(60);
const LIMITS: Limits = Limits {
    connections: 16,
    headers: PATIENCE,
    stall: PATIENCE,
    drain: PATIENCE,
    http2: true,
};

/// A socket that outlives its servers, as the supervisor holds it.
struct Owner(StdListener);

impl Owner {
    fn new() -> Self {
        let listener = StdListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    fn addr(&self) -> SocketAddr {
        self.0.local_addr().unwrap()
    }

    /// Serves `name` at `/`, and at `/slow` when `go` has a permit.
    fn serve(&self, name: &'static str, go: Arc<Semaphore>) -> (CancellationToken, JoinSet<()>) {
        let listener = TcpListener::from_std(self.0.try_clone().unwrap()).unwrap();
        let slow = move || {
            let go = go.clone();
            async move {
                let first = futures::stream::once(async { Ok::<_, std::io::Error>("slow ") });
                let rest = futures::stream::once(async move {
                    go.acquire().await.unwrap().forget();
                    Ok(name)
                });
                axum::body::Body::from_stream(futures::StreamExt::chain(first, rest))
            }
        };
        let whole = move |ConnectInfo(peer): ConnectInfo<SocketAddr>| async move {
            assert!(peer.ip().is_loopback());
            name
        };
        let app = Router::new()
            .route("/", get(whole))
            .route("/slow", get(slow));
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, app, LIMITS, stop.clone()));
        (stop, tasks)
    }
}

/// A client of HTTP/1.1 that keeps its connection.
struct Client(BufReader<TcpStream>);

impl Client {
    async fn new(addr: SocketAddr) -> Self {
        Self(BufReader::new(TcpStream::connect(addr).await.unwrap()))
    }

    async fn ask(&mut self, path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        self.0.write_all(request.as_bytes()).await.unwrap();
    }

    async fn until(&mut self, end: &str) -> String {
        let mut text = Vec::new();
        let read = async {
            while !text.ends_with(end.as_bytes()) {
                text.push(self.0.read_u8().await.unwrap());
            }
        };
        tokio::time::timeout(PATIENCE, read).await.unwrap();
        String::from_utf8(text).unwrap()
    }

    async fn ends(&mut self) {
        let mut byte = [0];
        let read = tokio::time::timeout(PATIENCE, self.0.read(&mut byte)).await;
        assert_eq!(read.unwrap().unwrap(), 0);
    }
}

async fn ended(mut tasks: JoinSet<()>) {
    let joined = tokio::time::timeout(PATIENCE, tasks.join_next()).await;
    joined.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn whoever_keeps_a_connection_is_answered_and_told_that_it_was_the_last_time() {
    let owner = Owner::new();
    let go = Arc::new(Semaphore::new(0));
    let (stop, tasks) = owner.serve("one", go.clone());
    // Accepted before the others are.
    let mut silent = Client::new(owner.addr()).await;
    let mut idle = Client::new(owner.addr()).await;
    let mut busy = Client::new(owner.addr()).await;
    idle.ask("/").await;
    let answer = idle.until("one").await;
    assert!(!answer.contains("connection: close"), "{answer}");
    // Its answer has begun, so nothing in it can say that the connection ends.
    busy.ask("/slow").await;
    busy.until("slow \r\n").await;

    stop.cancel();
    // Sent as if by someone who does not know yet.
    idle.ask("/").await;
    let answer = idle.until("one").await;
    assert!(answer.contains("connection: close"), "{answer}");
    idle.ends().await;
    silent.ends().await;

    go.add_permits(1);
    busy.until("0\r\n\r\n").await;
    busy.ask("/").await;
    let answer = busy.until("one").await;
    assert!(answer.contains("connection: close"), "{answer}");
    busy.ends().await;
    ended(tasks).await;
}

#[tokio::test]
async fn who_comes_while_there_is_no_server_waits_for_the_next_one() {
    let owner = Owner::new();
    let go = Arc::new(Semaphore::new(0));
    let (stop, tasks) = owner.serve("one", go.clone());
    let mut busy = Client::new(owner.addr()).await;
    busy.ask("/slow").await;
    busy.until("slow \r\n").await;
    stop.cancel();
    // The first one still works for somebody, and takes nobody else.
    let mut early = Client::new(owner.addr()).await;
    early.ask("/").await;
    go.add_permits(1);
    busy.until("0\r\n\r\n").await;
    busy.ends().await;
    ended(tasks).await;
    let mut between = Client::new(owner.addr()).await;
    between.ask("/").await;
    let (stop, tasks) = owner.serve("two", go);
    early.until("two").await;
    between.until("two").await;
    stop.cancel();
    drop((early, between));
    ended(tasks).await;
}

#[tokio::test]
async fn http2_is_told_to_go_away_and_ends_its_requests() {
    let owner = Owner::new();
    let go = Arc::new(Semaphore::new(0));
    let (stop, tasks) = owner.serve("one", go.clone());
    let client = lotus_runtime::http_client()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let url = |path: &str| format!("http://{}{path}", owner.addr());
    let answer = client.get(url("/")).send().await.unwrap();
    assert_eq!(answer.text().await.unwrap(), "one");
    let slow = client.get(url("/slow")).send().await.unwrap();
    stop.cancel();
    go.add_permits(1);
    assert_eq!(slow.text().await.unwrap(), "slow one");
    ended(tasks).await;
    let (stop, tasks) = owner.serve("two", go);
    let answer = client.get(url("/")).send().await.unwrap();
    assert_eq!(answer.text().await.unwrap(), "two");
    stop.cancel();
    ended(tasks).await;
}

/// TLS with a certificate that nobody else signed, and clients that know it.
fn tls(dir: &Path) -> (Tls, tokio_rustls::TlsConnector) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (Tls::load(&cert, &key).unwrap(), Arc::new(client).into())
}

#[tokio::test]
async fn who_shakes_hands_while_the_server_stops_is_answered_too() {
    let dir = tempfile::tempdir().unwrap();
    let (tls, connector) = tls(dir.path());
    let owner = Owner::new();
    let app = Router::new().route("/", get(|| async { "one" }));
    let extras = Extras {
        tls: Some(tls),
        per_client: None,
    };
    let stop = CancellationToken::new();
    let listener = TcpListener::from_std(owner.0.try_clone().unwrap()).unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(serve_with(listener, app, LIMITS, extras, stop.clone()));
    let silent = TcpStream::connect(owner.addr()).await.unwrap();
    let late = TcpStream::connect(owner.addr()).await.unwrap();
    let first = TcpStream::connect(owner.addr()).await.unwrap();
    let ask = async |stream: TcpStream| {
        let name = "localhost".try_into().unwrap();
        let mut stream = connector.connect(name, stream).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("one"), "{answer}");
    };
    // By then the two before it were accepted.
    ask(first).await;
    stop.cancel();
    ask(late).await;
    Client(BufReader::new(silent)).ends().await;
    ended(tasks).await;
}
