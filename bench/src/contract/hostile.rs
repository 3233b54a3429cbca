//! A spoke that is somebody else's: it has a valid certificate of retrieval, and does with it all that
//! it can. Runs as a process of its own, `lotus-bench hostile`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hub_proto::access::METHODS;
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::rt::Executor as _;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lotus_e2e::Failed;
use lotus_identity::{Held, ToHub, connect};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// One thing that is tried.
const TRY: Duration = Duration::from_secs(10);
/// Streams that are opened on a connection.
const STREAMS: usize = 256;
/// A message that says it has 4 GiB.
const HUGE: [u8; 5] = [0, 0xff, 0xff, 0xff, 0xff];

/// Where it attacks, and as whom.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The hub's port
    #[arg(long)]
    addr: SocketAddr,
    /// Folder of the identity
    #[arg(long)]
    identity: PathBuf,
    /// A piece that may be leased
    #[arg(long)]
    piece: String,
    #[arg(long)]
    seconds: u64,
}

/// How often it tried each thing.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Tried {
    /// Calls of every method with bytes that are no message.
    hostile_calls: u64,
    /// Streams that were opened and not read.
    hostile_streams: u64,
    /// Connections with bytes that are no frames.
    hostile_frames: u64,
    /// Messages that say that they are huge.
    hostile_huge: u64,
    /// Leases of a piece.
    hostile_leases: u64,
    /// Reads of the event log from its start.
    hostile_scans: u64,
    /// Connections that did nothing but shake hands.
    hostile_handshakes: u64,
}

#[derive(Clone, Copy)]
enum Act {
    Calls,
    Streams,
    Frames,
    Huge,
    Leases,
    Scans,
    Handshakes,
}

/// Each, with how many do it at once.
const ACTS: [(Act, usize); 7] = [
    (Act::Calls, 16),
    (Act::Streams, 40),
    (Act::Frames, 4),
    (Act::Huge, 4),
    (Act::Leases, 8),
    (Act::Scans, 8),
    (Act::Handshakes, 4),
];

struct Hostile {
    addr: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    piece: String,
    done: [AtomicU64; ACTS.len()],
}

pub(crate) async fn run(options: &Options) -> Result<Tried, Failed> {
    let held = Held::open(&options.identity, None).map_err(|e| Failed::at("identity", e))?;
    let tls = held.client_config(&[b"h2"]);
    let hostile = Arc::new(Hostile {
        addr: options.addr,
        tls: Arc::new(tls.map_err(|e| Failed::at("identity", e))?),
        piece: options.piece.clone(),
        done: Default::default(),
    });
    let end = Instant::now() + Duration::from_secs(options.seconds);
    let mut all = JoinSet::new();
    for (act, at_once) in ACTS {
        for _ in 0..at_once {
            let hostile = hostile.clone();
            all.spawn(async move {
                while Instant::now() < end {
                    // Whatever comes of it, it goes on.
                    drop(tokio::time::timeout(TRY, hostile.act(act)).await);
                }
            });
        }
    }
    while all.join_next().await.is_some() {}
    let done = |act: Act| hostile.done[act as usize].load(Ordering::Relaxed);
    Ok(Tried {
        hostile_calls: done(Act::Calls),
        hostile_streams: done(Act::Streams),
        hostile_frames: done(Act::Frames),
        hostile_huge: done(Act::Huge),
        hostile_leases: done(Act::Leases),
        hostile_scans: done(Act::Scans),
        hostile_handshakes: done(Act::Handshakes),
    })
}

impl Hostile {
    async fn act(&self, act: Act) -> Result<(), Failed> {
        let count = || self.done[act as usize].fetch_add(1, Ordering::Relaxed);
        match act {
            Act::Calls => {
                let mut hub = self.http2().await?;
                for method in METHODS.iter().cycle().take(2_000) {
                    let mut junk = vec![0, 0, 0, 0, 32];
                    junk.extend((0..32).map(|_| rand::random::<u8>()));
                    count();
                    drop(call(&mut hub, method.path, junk).await?.into_body());
                }
            }
            Act::Streams => {
                let mut hub = self.http2().await?;
                let mut kept = Vec::new();
                for n in 0..STREAMS {
                    let path = ["/hub.v1.Events/Subscribe", "/hub.v1.Capacity/Watch"][n % 2];
                    count();
                    kept.push(call(&mut hub, path, EMPTY.to_vec()).await?);
                }
                tokio::time::sleep(TRY).await;
            }
            Act::Frames => {
                let mut raw = self.dial().await?;
                count();
                raw.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
                for _ in 0..64 {
                    let junk: Vec<u8> = (0..1 << 14).map(|_| rand::random()).collect();
                    raw.write_all(&junk).await?;
                }
            }
            Act::Huge => {
                let mut hub = self.http2().await?;
                let mut huge = HUGE.to_vec();
                huge.resize(64 << 20, 7);
                count();
                call(&mut hub, LEASE, huge).await?;
            }
            Act::Leases => {
                let mut hub = self.http2().await?;
                // Field 1, the piece; field 2, sixty seconds.
                let piece = self.piece.as_bytes();
                let mut message = vec![0x0a, u8::try_from(piece.len()).unwrap_or(0)];
                message.extend_from_slice(piece);
                message.extend_from_slice(&[0x10, 60]);
                let mut framed = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap_or(0)];
                framed.extend(message);
                for _ in 0..1_000 {
                    count();
                    call(&mut hub, LEASE, framed.clone()).await?;
                }
            }
            Act::Scans => {
                let mut hub = self.http2().await?;
                count();
                let answer = call(&mut hub, "/hub.v1.Events/Subscribe", EMPTY.to_vec()).await?;
                let mut body = answer.into_body();
                let pause = Duration::from_millis(500);
                // To the end of what is there.
                while let Ok(Some(Ok(_))) = tokio::time::timeout(pause, body.frame()).await {}
            }
            Act::Handshakes => {
                count();
                self.dial().await?;
            }
        }
        Ok(())
    }

    async fn dial(&self) -> Result<ToHub<TcpStream>, Failed> {
        let tcp = TcpStream::connect(self.addr).await?;
        Ok(connect(self.tls.clone(), tcp).await?)
    }

    async fn http2(&self) -> Result<SendRequest<Full<Bytes>>, Failed> {
        let io = TokioIo::new(self.dial().await?);
        let shaken = http2::handshake(TokioExecutor::new(), io).await;
        let (hub, connection) = shaken.map_err(|e| Failed::at("hub", e))?;
        TokioExecutor::new().execute(async move { drop(connection.await) });
        Ok(hub)
    }
}

const LEASE: &str = "/hub.v1.Unsealed/Lease";
/// A message without fields.
const EMPTY: [u8; 5] = [0; 5];

async fn call(
    hub: &mut SendRequest<Full<Bytes>>,
    path: &str,
    body: Vec<u8>,
) -> Result<Response<Incoming>, Failed> {
    hub.ready().await.map_err(|e| Failed::at("hub", e))?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://hub{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(body.into()))
        .map_err(|e| Failed::at("request", e))?;
    let sent = hub.send_request(request).await;
    sent.map_err(|e| Failed::at("hub", e))
}
