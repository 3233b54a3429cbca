use std::collections::HashMap;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bytes::Bytes;
use hub_proto::v1::LeaseRequest;
use hub_proto::{HubClient, HubConfig, HubError};
use lotus_dataplane::{DataError, Dial, Duplex, Far, PieceReader, Plane};
use lotus_runtime::{Backoff, CancellationToken, Fault, trace};
use lotus_types::{Kind, PieceCid};
use tokio::runtime::Handle;

/// Longest lease. Source: hub.v1, `LeaseRequest.ttl_seconds`.
const LEASE: Duration = Duration::from_secs(60);
/// A lease is renewed this long before its end.
const MARGIN: Duration = Duration::from_secs(5);
/// Time for one step of opening a leased piece, and for one read over HTTP.
const DEADLINE: Duration = Duration::from_secs(20);

/// Connects to the hub, waiting for one that does not answer yet. `None` when stopped first.
pub async fn connect(
    cfg: &HubConfig,
    service: &str,
    stop: &CancellationToken,
) -> Result<Option<HubClient>, Fault> {
    let instance = std::process::id().to_string();
    let mut wait = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        let tried = tokio::select! {
            () = stop.cancelled() => return Ok(None),
            r = HubClient::connect(cfg, service, &instance, trace::client_interceptor) => r,
        };
        match tried {
            Ok(hub) => return Ok(Some(hub)),
            Err(e) if e.kind().is_retryable() => {
                let pause = wait.next();
                tracing::info!(error = %e, ?pause, "no hub yet");
                tokio::select! {
                    () = stop.cancelled() => return Ok(None),
                    () = tokio::time::sleep(pause) => {}
                }
            }
            Err(e) => return Err(Fault::new(e.kind(), e.to_string(), e.fix())),
        }
    }
}

/// Why a piece cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The hub gave no lease.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The data plane gave no bytes.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl SourceError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hub(e) => e.kind(),
            // The lease may have ended a moment ago; a new one decides.
            Self::Data(DataError::UnknownToken { .. }) => Kind::Transport,
            Self::Data(e) => e.kind(),
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Hub(e) => e.fix(),
            Self::Data(e) => e.fix(),
        }
    }

    /// Whether the hub does not have the piece.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Hub(e) if e.is_not_found())
    }
}

impl From<SourceError> for Fault {
    fn from(e: SourceError) -> Self {
        Self::new(e.kind(), e.to_string(), e.fix())
    }
}

/// A piece that may be read until its lease ends.
#[derive(Clone, Debug)]
pub struct Leased {
    /// The bytes.
    pub reader: PieceReader,
    /// Payload bytes of the piece.
    pub raw_size: u64,
    /// Padded size of the piece.
    pub piece_size: u64,
    until: Instant,
}

impl Leased {
    /// Whether the lease is good for a while.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        Instant::now() < self.until
    }

    /// Bytes of the piece, for a thread that may block. `runtime` is used when the bytes come
    /// over HTTP.
    pub fn read_blocking(&self, runtime: &Handle, offset: u64, len: usize) -> io::Result<Bytes> {
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|e| e > self.raw_size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(file) = self.reader.file() {
            let mut buf = vec![0; len];
            file.read_exact_at(&mut buf, offset)?;
            return Ok(buf.into());
        }
        runtime
            .block_on(self.reader.read_at(offset, len as u64))
            .map_err(io::Error::other)
    }
}

/// Connections for bytes of pieces, to a hub on another host.
struct ToHub(HubClient);

#[async_trait]
impl Dial for ToHub {
    async fn dial(&self) -> io::Result<Box<dyn Duplex>> {
        Ok(Box::new(self.0.dial(b"http/1.1").await?))
    }
}

type Slot = Arc<tokio::sync::Mutex<Option<Leased>>>;

/// The hub's pieces, read under leases that are renewed when they end. Clones share the leases.
#[derive(Clone, Debug)]
pub struct PieceSource {
    hub: HubClient,
    /// Where the bytes are when the hub is on another host.
    far: Far,
    slots: Arc<Mutex<HashMap<PieceCid, Slot>>>,
    max: usize,
}

impl PieceSource {
    /// Keeps at most `max` leases at once.
    #[must_use]
    pub fn new(hub: HubClient, max: usize) -> Self {
        Self {
            far: Far::new(Arc::new(ToHub(hub.clone()))),
            hub,
            slots: Arc::default(),
            max: max.max(1),
        }
    }

    /// The piece, under a lease that is still good for a while. Many that ask for one piece at
    /// once share one lease.
    pub async fn open(&self, piece: &PieceCid) -> Result<Leased, SourceError> {
        let slot = self.slot(piece);
        let mut slot = slot.lock().await;
        if let Some(leased) = slot.as_ref().filter(|l| l.is_fresh()) {
            return Ok(leased.clone());
        }
        *slot = None;
        let leased = self.lease(piece).await?;
        metrics::counter!("lotus_markets_piece_leases_total").increment(1);
        Ok(slot.insert(leased).clone())
    }

    fn slot(&self, piece: &PieceCid) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= self.max && !slots.contains_key(piece) {
            // One that nobody asks for at this moment: first the expired, then any.
            slots.retain(|_, s| match s.try_lock() {
                Ok(l) => l.as_ref().is_some_and(Leased::is_fresh),
                Err(_) => true,
            });
            if slots.len() >= self.max {
                let idle = slots.iter().find(|(_, s)| s.try_lock().is_ok());
                if let Some(idle) = idle.map(|(p, _)| *p) {
                    slots.remove(&idle);
                }
            }
        }
        slots.entry(*piece).or_default().clone()
    }

    async fn lease(&self, piece: &PieceCid) -> Result<Leased, SourceError> {
        let asked = Instant::now();
        let request = self.hub.request(LeaseRequest {
            piece_cid: piece.to_string(),
            ttl_seconds: u32::try_from(LEASE.as_secs()).unwrap_or(60),
        });
        let lease = self
            .hub
            .unsealed()
            .lease(request)
            .await
            .map_err(HubError::from)?
            .into_inner();
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let left = Duration::from_millis(lease.expires_unix_ms).saturating_sub(now);
        // A hub that was replaced may have another socket.
        let plane = match self.hub.hello().data_socket {
            none if none.is_empty() => Plane::Far(self.far.clone()),
            socket => Plane::Socket(socket.into()),
        };
        let reader = PieceReader::open(&plane, &lease.token, DEADLINE).await?;
        Ok(Leased {
            raw_size: lease.raw_size.min(reader.len()),
            piece_size: lease.piece_size,
            reader,
            until: asked + left.min(LEASE).saturating_sub(MARGIN),
        })
    }
}

/// Reads a leased piece from its start, in a thread that may block.
#[derive(Debug)]
pub struct BlockingReader {
    source: PieceSource,
    piece: PieceCid,
    runtime: Handle,
    stop: CancellationToken,
    at: u64,
}

impl BlockingReader {
    /// Reads `piece` from its first byte on; the lease is renewed on the way. Reading fails once
    /// `stop` is cancelled. Call it within the runtime, use it outside.
    #[must_use]
    pub fn new(source: PieceSource, piece: PieceCid, stop: CancellationToken) -> Self {
        Self {
            source,
            piece,
            runtime: Handle::current(),
            stop,
            at: 0,
        }
    }

    /// Takes the lease, so that its errors keep their kind.
    pub fn open(&self) -> Result<Leased, SourceError> {
        self.runtime.block_on(self.source.open(&self.piece))
    }
}

impl Read for BlockingReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(io::Error::other("the service is stopping"));
        }
        let leased = self.open().map_err(io::Error::other)?;
        let left = usize::try_from(leased.raw_size.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        if len > 0 {
            buf[..len].copy_from_slice(&leased.read_blocking(&self.runtime, self.at, len)?);
            self.at += len as u64;
        }
        Ok(len)
    }
}
