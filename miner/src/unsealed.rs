//! Reading pieces: short leases on their raw files, and new files from sealed sectors.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use lotus_dataplane::{DataError, OpenToken};
use lotus_journal::JournalError;
use lotus_types::{Generation, Kind, PieceCid, PieceInfo};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::events::unix_ms;
use crate::pieces::machine::Place;
use crate::pieces::{NoPlace, Pieces};

/// Longest lease: a reader that lost its right reads on for no longer than this.
pub const MAX_LEASE: Duration = Duration::from_secs(60);
/// Leases at a time: of all, and of one reader, which has one for each piece and minute.
const MAX_LEASES: usize = 100_000;
const LEASES_OF_ONE: usize = 20_000;
/// How often leases that have ended are taken out, when there are too many.
const SWEEP: Duration = Duration::from_secs(1);
/// Unsealings that wait.
const QUEUE: usize = 64;
/// Unsealings at a time: they compete with sealing.
const AT_ONCE: usize = 1;

/// Writes the raw bytes of a piece from its sealed sector: the worker pool, or a fake in tests.
#[async_trait]
pub trait Unsealer: Send + Sync + 'static {
    /// Writes `piece`, which lies at `place`, to the file `out`.
    async fn unseal(&self, place: Place, piece: PieceInfo, out: &Path) -> Result<(), NoPlace>;
}

/// Why a piece cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum UnsealedError {
    /// The hub never had it.
    #[error("piece {0} is not known here")]
    Unknown(PieceCid),
    /// It has no raw file now.
    #[error("piece {0} has no unsealed copy now")]
    NotReadable(PieceCid),
    /// The caller means another length.
    #[error("piece {cid} has {have} raw bytes, {asked} were asked for")]
    OtherLength {
        /// The piece.
        cid: PieceCid,
        /// Raw bytes here.
        have: u64,
        /// Raw bytes in the CID asked for.
        asked: u64,
    },
    /// Too many readers or too many unsealings.
    #[error("too many {0}")]
    Busy(&'static str),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl UnsealedError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Unknown(_) | Self::OtherLength { .. } => Kind::Data,
            Self::NotReadable(_) | Self::Busy(_) => Kind::Capacity,
            Self::Journal(e) => e.kind(),
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Unknown(_) => "see `Pieces.List` for the pieces of this hub".into(),
            Self::NotReadable(_) => "call RequestUnseal and wait until it can be read".into(),
            Self::OtherLength { .. } => "ask with the piece CID of the deal".into(),
            Self::Busy(_) => "try again later".into(),
            Self::Journal(e) => e.fix(),
        }
    }
}

/// A right to read one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Opens the file on the data plane.
    pub token: String,
    /// The hub's generation.
    pub generation: Generation,
    /// When the token opens nothing any more.
    pub expires_unix_ms: u64,
    /// The piece; its raw size is what may be read.
    pub piece: PieceInfo,
}

/// What is known about reading a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Readable {
    /// The piece and its sizes.
    pub piece: PieceInfo,
    /// A raw file is here.
    pub readable: bool,
    /// One is being made.
    pub unsealing: bool,
    /// A sector that has it.
    pub sector: Option<u64>,
}

#[derive(Default)]
struct Leases {
    by_token: HashMap<String, Granted>,
    /// How many each reader has.
    of: HashMap<String, usize>,
    /// When those that had ended were last taken out.
    swept: Option<Instant>,
}

impl Leases {
    /// Room for one more, or what there is too much of.
    fn room(&mut self, to: &str) -> Result<(), UnsealedError> {
        let now = Instant::now();
        if self.is_full(to) && self.swept.is_none_or(|at| now > at + SWEEP) {
            self.swept = Some(now);
            self.by_token.retain(|_, l| l.expires > now);
            self.of.clear();
            for lease in self.by_token.values() {
                *self.of.entry(lease.to.clone()).or_default() += 1;
            }
        }
        match self.is_full(to) {
            true => Err(UnsealedError::Busy("leases")),
            false => Ok(()),
        }
    }

    fn is_full(&self, to: &str) -> bool {
        let of_one = self.of.get(to).copied().unwrap_or_default();
        self.by_token.len() >= MAX_LEASES || of_one >= LEASES_OF_ONE
    }

    fn put(&mut self, token: String, lease: Granted) {
        *self.of.entry(lease.to.clone()).or_default() += 1;
        self.by_token.insert(token, lease);
    }
}

struct Granted {
    to: String,
    piece: PieceInfo,
    expires: Instant,
}

/// Leases and unsealings.
pub struct Unsealed {
    pieces: Arc<Pieces>,
    generation: Generation,
    leases: Mutex<Leases>,
    unsealing: Mutex<HashSet<PieceCid>>,
    queue: mpsc::Sender<PieceCid>,
    /// Counts unsealings that ended.
    ended: watch::Sender<u64>,
}

impl std::fmt::Debug for Unsealed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unsealed(generation {})", self.generation)
    }
}

/// Performs the unsealings that were asked for.
pub struct UnsealRunner {
    unsealed: Arc<Unsealed>,
    queue: mpsc::Receiver<PieceCid>,
    unsealer: Arc<dyn Unsealer>,
}

impl Unsealed {
    /// Leases on these pieces; `unsealer` restores files that are gone.
    #[must_use]
    pub fn new(
        pieces: Arc<Pieces>,
        generation: Generation,
        unsealer: Arc<dyn Unsealer>,
    ) -> (Arc<Self>, UnsealRunner) {
        let (tx, rx) = mpsc::channel(QUEUE);
        let unsealed = Arc::new(Self {
            pieces,
            generation,
            leases: Mutex::default(),
            unsealing: Mutex::default(),
            queue: tx,
            ended: watch::Sender::new(0),
        });
        let runner = UnsealRunner {
            unsealed: unsealed.clone(),
            queue: rx,
            unsealer,
        };
        (unsealed, runner)
    }

    /// Where a piece is; `None` when the hub never had it.
    pub fn locate(&self, cid: &PieceCid) -> Result<Option<Readable>, UnsealedError> {
        let Some(found) = self.pieces.locate(cid)? else {
            return Ok(None);
        };
        let on_disk =
            std::fs::metadata(self.pieces.path(cid)).is_ok_and(|m| m.len() >= found.piece.raw_size);
        Ok(Some(Readable {
            piece: found.piece,
            readable: found.verified && on_disk,
            unsealing: lock(&self.unsealing).contains(cid),
            sector: found.places.first().map(|p| p.sector),
        }))
    }

    /// A lease of at most [`MAX_LEASE`], for `to` alone where readers show who they are. `raw_size`:
    /// bytes meant, when the caller's CID says so.
    pub fn lease(
        &self,
        to: &str,
        cid: &PieceCid,
        raw_size: Option<u64>,
        life: Duration,
    ) -> Result<Lease, UnsealedError> {
        let found = self.locate(cid)?.ok_or(UnsealedError::Unknown(*cid))?;
        if !found.readable {
            return Err(UnsealedError::NotReadable(*cid));
        }
        let mut piece = found.piece;
        if let Some(asked) = raw_size {
            if asked > piece.raw_size {
                return Err(UnsealedError::OtherLength {
                    cid: *cid,
                    have: piece.raw_size,
                    asked,
                });
            }
            piece.raw_size = asked;
        }
        let life = life.clamp(Duration::from_secs(1), MAX_LEASE);
        let expires = Instant::now() + life;
        let token = token();
        let mut leases = lock(&self.leases);
        leases.room(to)?;
        let to = to.to_owned();
        leases.put(token.clone(), Granted { to, piece, expires });
        Ok(Lease {
            token,
            generation: self.generation,
            expires_unix_ms: unix_ms() + u64::try_from(life.as_millis()).unwrap_or(60_000),
            piece,
        })
    }

    /// Asks for a raw file of a piece that has none.
    pub fn request(&self, cid: &PieceCid) -> Result<Readable, UnsealedError> {
        let mut found = self.locate(cid)?.ok_or(UnsealedError::Unknown(*cid))?;
        if found.readable || found.unsealing {
            return Ok(found);
        }
        let mut unsealing = lock(&self.unsealing);
        self.queue
            .try_send(*cid)
            .map_err(|_| UnsealedError::Busy("unsealings wait"))?;
        unsealing.insert(*cid);
        found.unsealing = true;
        Ok(found)
    }

    /// Asks for a raw file and waits until it is there, or could not be made.
    pub async fn make(&self, cid: &PieceCid) -> Result<(), UnsealedError> {
        let mut ended = self.ended.subscribe();
        let mut now = self.request(cid)?;
        while !now.readable {
            if !now.unsealing || ended.changed().await.is_err() {
                return Err(UnsealedError::NotReadable(*cid));
            }
            now = self.locate(cid)?.ok_or(UnsealedError::Unknown(*cid))?;
        }
        Ok(())
    }

    /// The raw file of a piece, if it is complete.
    #[must_use]
    pub fn raw_file(&self, cid: &PieceCid) -> Option<PathBuf> {
        let found = self.locate(cid).ok()??;
        found.readable.then(|| self.pieces.path(cid))
    }
}

#[async_trait]
impl OpenToken for Unsealed {
    async fn open(&self, token: &str, by: Option<&str>) -> Result<(File, u64), DataError> {
        let unknown = || DataError::UnknownToken {
            at: "the hub".into(),
        };
        let piece = {
            let leases = lock(&self.leases);
            let lease = leases.by_token.get(token).ok_or_else(unknown)?;
            if lease.expires <= Instant::now() {
                return Err(unknown());
            }
            if by.is_some_and(|by| by != lease.to) {
                return Err(unknown());
            }
            lease.piece
        };
        let path = self.pieces.path(&piece.cid);
        let file = File::open(&path).map_err(DataError::io(format!("open {}", path.display())))?;
        Ok((file, piece.raw_size))
    }
}

impl UnsealRunner {
    /// Unseals until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(cid) = self.queue.recv(), if tasks.len() < AT_ONCE => {
                    let (unsealed, unsealer) = (self.unsealed.clone(), self.unsealer.clone());
                    tasks.spawn(async move {
                        if let Err(e) = restore(&unsealed.pieces, &*unsealer, &cid).await {
                            tracing::warn!(piece = %cid, "cannot unseal: {e}");
                        }
                        lock(&unsealed.unsealing).remove(&cid);
                        unsealed.ended.send_modify(|n| *n = n.wrapping_add(1));
                    });
                }
                Some(_) = tasks.join_next() => {}
            }
        }
        tasks.shutdown().await;
    }
}

/// Makes the raw file of a piece anew, from the first of its sectors that gives the right bytes.
async fn restore(
    pieces: &Arc<Pieces>,
    unsealer: &dyn Unsealer,
    cid: &PieceCid,
) -> Result<(), String> {
    let found = pieces
        .locate(cid)
        .map_err(|e| e.to_string())?
        .ok_or("unknown piece")?;
    let out: PathBuf = pieces.tmp().join(format!("{cid}.unsealed"));
    let mut last = String::from("it is in no sector");
    for place in found.places {
        tracing::info!(piece = %cid, sector = place.sector, "unsealing");
        match unsealer.unseal(place, found.piece, &out).await {
            Ok(()) => match pieces.restore(found.piece, out.clone()).await {
                Ok(()) => return Ok(()),
                Err(e) => last = format!("sector {}: {e}", place.sector),
            },
            Err(e) => last = format!("sector {}: {e}", place.sector),
        }
    }
    Err(last)
}

/// 32 random bytes.
fn token() -> String {
    use std::fmt::Write as _;
    rand::random::<[u8; 32]>()
        .iter()
        .fold(String::with_capacity(64), |mut s, b| {
            write!(s, "{b:02x}").expect("a string takes all");
            s
        })
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use lotus_types::{Commitment, PaddedSize};

    use super::*;

    #[test]
    fn whoever_hoards_leases_keeps_nobody_from_theirs() {
        let piece = PieceInfo {
            cid: PieceCid::new(Commitment([0; 32])),
            size: PaddedSize::to_hold(1).unwrap(),
            raw_size: 1,
        };
        let mut leases = Leases::default();
        let mut give = |to: &str, n: usize, life: Duration| {
            leases.room(to)?;
            let expires = Instant::now() + life;
            let to = to.to_owned();
            let lease = Granted { to, piece, expires };
            leases.put(format!("{n}"), lease);
            Ok::<_, UnsealedError>(())
        };
        for n in 0..LEASES_OF_ONE {
            give("retrieval/greedy", n, MAX_LEASE).unwrap();
        }
        assert!(give("retrieval/greedy", LEASES_OF_ONE, MAX_LEASE).is_err());
        for n in LEASES_OF_ONE..2 * LEASES_OF_ONE {
            give("retrieval/other", n, Duration::ZERO).unwrap();
        }
        // What has ended does not count; looking for it costs, and is not done at every call.
        assert!(give("retrieval/other", 2 * LEASES_OF_ONE, MAX_LEASE).is_err());
        leases.swept = None;
        leases.room("retrieval/other").unwrap();
        assert_eq!(leases.by_token.len(), LEASES_OF_ONE);
    }
}
