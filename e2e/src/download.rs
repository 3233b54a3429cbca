//! Clients that download in a loop and count what goes wrong, while something is done to the
//! service.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lotus_runtime::CancellationToken;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;

use crate::{Failed, Net, demo, secs};

/// Longest time that one download may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Each time over a new connection.
    New,
    /// Over one connection for as long as the server keeps it.
    Kept,
    /// Over a new connection, and so slowly that much of it is with the server for a second.
    Slow,
}

const KINDS: [Kind; 3] = [Kind::New, Kind::Kept, Kind::Slow];

/// A piece that can be downloaded.
#[derive(Clone, Debug)]
pub struct Stored {
    /// `/piece/{cid}`.
    pub path: String,
    /// What must come back.
    pub bytes: Arc<Vec<u8>>,
}

/// Makes a deal of about `size` bytes, and returns when retrieval serves its piece. Larger than
/// what the kernel buffers for one connection, it keeps a server busy.
pub async fn store(net: &Net, size: usize) -> Result<Stored, Failed> {
    let (dir, car) = (net.root().join("stored"), net.root().join("stored.car"));
    std::fs::create_dir(&dir)?;
    write_noise(&dir.join("noise"), size)?;
    lotus_car::pack_dir(&dir, &car).map_err(|e| Failed::at("packing", e))?;
    let piece = demo::propose(net, &car).await?.piece_cid;
    let stored = Stored {
        path: format!("/piece/{piece}"),
        bytes: Arc::new(std::fs::read(&car)?),
    };
    let http = client(0)?;
    net.wait("the piece to be served", secs(120), async |n| {
        let url = n.spoke_url("retrieval").ok()?;
        whole(&http, &url, &stored).await.ok()
    })
    .await?;
    Ok(stored)
}

/// Bytes that do not compress and are the same in each run.
fn write_noise(path: &Path, size: usize) -> Result<(), Failed> {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    let mut state = 1u64;
    for _ in 0..size / 8 {
        // xorshift64, by G. Marsaglia.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    Ok(file.flush()?)
}

/// What the clients saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Downloads that came back whole, by kind.
    pub good: BTreeMap<Kind, usize>,
    /// Why others did not.
    pub failures: Vec<String>,
    /// How many of the failures were connections that were refused.
    pub refused: usize,
    /// The longest time that a good one of each kind took.
    pub slowest: BTreeMap<Kind, Duration>,
}

/// One client of each kind, in a loop.
#[derive(Debug)]
pub struct Downloads {
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Downloads {
    /// Starts them. `url` is that of the service: `http://host:port`.
    pub fn start(url: &str, stored: &Stored) -> Result<Self, Failed> {
        let mut all = Self {
            seen: Arc::default(),
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
        };
        let addr: SocketAddr = url
            .trim_start_matches("http://")
            .parse()
            .map_err(|e| Failed::at(url, e))?;
        for kind in KINDS {
            let (seen, stop) = (all.seen.clone(), all.stop.clone());
            let (url, stored) = (url.to_owned(), stored.clone());
            let http = client(usize::from(kind == Kind::Kept))?;
            all.tasks.spawn(async move {
                while !stop.is_cancelled() {
                    let start = Instant::now();
                    let got = match kind {
                        Kind::New | Kind::Kept => whole(&http, &url, &stored).await,
                        Kind::Slow => slowly(addr, &stored).await,
                    };
                    note(&seen, kind, start.elapsed(), got);
                }
            });
        }
        Ok(all)
    }

    /// What was seen until now.
    #[must_use]
    pub fn seen(&self) -> Seen {
        lock(&self.seen).clone()
    }

    /// Waits until each kind has had another `n` good downloads, or something failed.
    pub async fn go_on(&self, net: &Net, n: usize) -> Result<(), Failed> {
        let before = self.seen();
        let count = |seen: &Seen, kind| seen.good.get(&kind).copied().unwrap_or(0);
        net.wait("downloads to go on", secs(240), async |_| {
            let now = self.seen();
            let all = |k: &Kind| count(&now, *k) >= count(&before, *k) + n;
            let failed = now.failures.len() > before.failures.len();
            (failed || KINDS.iter().all(all)).then_some(())
        })
        .await
    }

    /// Lets those that run come to their end.
    pub async fn end(mut self) -> Seen {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        lock(&self.seen).clone()
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note(seen: &Mutex<Seen>, kind: Kind, took: Duration, got: Result<(), Broken>) {
    let mut seen = lock(seen);
    match got {
        Ok(()) => {
            *seen.good.entry(kind).or_default() += 1;
            let slowest = seen.slowest.entry(kind).or_default();
            *slowest = took.max(*slowest);
        }
        Err(e) => {
            seen.refused += usize::from(e.refused);
            seen.failures
                .push(format!("{kind:?} after {took:.1?}: {}", e.why));
        }
    }
}

/// A download that failed.
struct Broken {
    refused: bool,
    why: String,
}

fn broken(why: impl Into<String>) -> Broken {
    Broken {
        refused: false,
        why: why.into(),
    }
}

/// The HTTP client sends a request again only if nothing of it has left this process.
fn client(kept: usize) -> Result<reqwest::Client, Failed> {
    lotus_runtime::http_client()
        .pool_max_idle_per_host(kept)
        .timeout(PATIENCE)
        .http1_only()
        .build()
        .map_err(|e| Failed::at("HTTP client", e))
}

async fn whole(http: &reqwest::Client, url: &str, stored: &Stored) -> Result<(), Broken> {
    let failed = |e: reqwest::Error| Broken {
        refused: e.is_connect(),
        why: causes(&e),
    };
    let answer = http
        .get(format!("{url}{}", stored.path))
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(failed)?;
    same(&answer.bytes().await.map_err(failed)?, stored)
}

fn causes(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut at = e;
    while let Some(next) = at.source() {
        text = format!("{text}: {next}");
        at = next;
    }
    text
}

fn same(got: &[u8], stored: &Stored) -> Result<(), Broken> {
    if got == stored.bytes.as_slice() {
        return Ok(());
    }
    let (got, wanted) = (got.len(), stored.bytes.len());
    Err(broken(format!(
        "{got} bytes came that are not the {wanted} of the piece"
    )))
}

/// Takes a piece of it at a time into a buffer that the kernel keeps small.
async fn slowly(addr: SocketAddr, stored: &Stored) -> Result<(), Broken> {
    let all = async {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(16 << 10)?;
        let mut stream = socket.connect(addr).await?;
        let request = format!(
            "GET {} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n\r\n",
            stored.path
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        let mut part = vec![0; 64 << 10];
        loop {
            let n = stream.read(&mut part).await?;
            if n == 0 {
                return Ok(answer);
            }
            answer.extend_from_slice(&part[..n]);
            if answer.len() % (512 << 10) < n {
                // The pace of the client; nothing waits for this to be long enough.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    };
    let answer: Vec<u8> = tokio::time::timeout(PATIENCE, all)
        .await
        .map_err(|_| broken("it took too long"))?
        .map_err(|e: std::io::Error| Broken {
            refused: e.kind() == std::io::ErrorKind::ConnectionRefused,
            why: e.to_string(),
        })?;
    let head = b"\r\n\r\n";
    let body = answer
        .windows(head.len())
        .position(|w| w == head)
        .map(|i| answer.split_at(i + head.len()));
    match body {
        Some((head, body)) if head.starts_with(b"HTTP/1.1 200 ") => same(body, stored),
        _ => {
            let start = String::from_utf8_lossy(&answer[..answer.len().min(200)]).into_owned();
            Err(broken(format!("it is answered with {start:?}")))
        }
    }
}
