//! What only the operator may do: JSON over `control.sock` in the service's folder.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Path as UrlPath, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use cid::Cid;
use http::StatusCode;
use lotus_piece_index::PieceIndex;
use lotus_runtime::peer::Operators;
use lotus_runtime::{CancellationToken, Fault};
use lotus_types::{Kind, PieceCid};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::Mutex;

use crate::addr::Multiaddr;
use crate::announce;
use crate::chain::Chain;

/// Name of the socket in the service's folder.
pub const SOCKET: &str = "control.sock";

/// How large an index is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexStats {
    /// Pieces in it.
    pub pieces: u64,
    /// Multihashes of them, each counted once in a piece.
    pub multihashes: u64,
    /// Pieces that are to be indexed anew.
    pub stale: u64,
    /// Segments.
    pub segments: u64,
    /// Records of pieces that are gone; merges drop them.
    pub records_gone: u64,
    /// Bytes of the segments on disk.
    pub segment_bytes: u64,
    /// Bytes of the sidecars on disk.
    pub sidecar_bytes: u64,
    /// Bytes of directories and filters in memory.
    pub memory_bytes: u64,
    /// Pages that lookups have read since the index was opened.
    pub pages_read: u64,
    /// The newest advertisement; `None` when there is none, or when the service does not run.
    pub head: Option<String>,
    /// The peer id of the provider, likewise.
    pub provider: Option<String>,
}

/// A piece that lists a multihash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The piece.
    pub piece: PieceCid,
    /// Where the block's bytes start in it.
    pub offset: u64,
    /// How many bytes it has.
    pub len: u32,
}

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexVerified {
    /// Nothing is damaged.
    pub ok: bool,
    /// Pieces whose list is good.
    pub pieces: u64,
    /// Multihashes in them.
    pub multihashes: u64,
    /// Segments that were read.
    pub segments: u64,
    /// What is wrong, each with its piece or file.
    pub damaged: Vec<String>,
}

/// Pieces that are indexed anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rebuilding {
    /// How many.
    pub pieces: u64,
}

/// What an indexer said to an announcement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announced {
    /// The indexer.
    pub url: String,
    /// The advertisement that it was told of.
    pub head: String,
    /// Why it did not take it; empty when it did.
    pub error: String,
}

/// A refusal.
#[derive(Debug, Serialize, Deserialize)]
pub struct Refusal {
    /// What happened.
    pub error: String,
    /// Who must act.
    pub kind: Kind,
    /// What to do.
    pub fix: String,
}

/// How large an index is, as far as it tells itself.
pub fn stats(index: &PieceIndex) -> Result<IndexStats, Fault> {
    let (segments, pieces) = (index.stats(), index.pieces()?);
    let mut stale = 0;
    let mut sidecar_bytes = 0;
    for (piece, _) in &pieces {
        stale += u64::from(index.is_stale(piece)?);
        // One that went meanwhile has no bytes.
        sidecar_bytes += std::fs::metadata(index.sidecar_path(piece)).map_or(0, |m| m.len());
    }
    Ok(IndexStats {
        pieces: pieces.len() as u64,
        multihashes: pieces.iter().map(|(_, n)| n).sum(),
        stale,
        segments: segments.segments,
        records_gone: segments.gone,
        segment_bytes: segments.bytes,
        sidecar_bytes,
        memory_bytes: segments.memory,
        pages_read: segments.pages_read,
        head: None,
        provider: None,
    })
}

/// The pieces that list a CID's multihash.
pub fn find(index: &PieceIndex, cid: &Cid) -> Result<Vec<Holder>, Fault> {
    let holders = index.holders(cid.hash())?;
    let places = index.find(cid.hash())?.into_iter();
    Ok(places
        .filter(|at| holders.contains(&at.piece))
        .map(|at| Holder {
            piece: at.piece,
            offset: at.offset,
            len: at.len,
        })
        .collect())
}

/// Reads the whole index and compares its parts, by up to `samples` multihashes of each piece.
pub fn verify(index: &PieceIndex, samples: u64) -> Result<IndexVerified, Fault> {
    let seen = index.verify(samples)?;
    Ok(IndexVerified {
        ok: seen.damaged.is_empty(),
        pieces: seen.pieces,
        multihashes: seen.multihashes,
        segments: seen.segments,
        damaged: seen.damaged,
    })
}

/// Asks for one piece, or all, to be indexed anew.
pub fn rebuild(index: &PieceIndex, piece: Option<&PieceCid>) -> Result<Rebuilding, Fault> {
    let pieces = index.rebuild(piece)?;
    match piece {
        Some(piece) if pieces == 0 => Err(Fault::new(
            Kind::Data,
            format!("piece {piece} is not indexed"),
            "`lotus-markets index stats` shows what is; the hub's deals decide which pieces are",
        )),
        _ => Ok(Rebuilding { pieces }),
    }
}

/// What the commands act on.
pub(crate) struct Control {
    pub(crate) index: PieceIndex,
    pub(crate) chain: Arc<Chain>,
    pub(crate) publisher: Multiaddr,
    pub(crate) announce_urls: Vec<Url>,
    /// One verification at a time: it reads everything. It goes on when the client has left.
    pub(crate) verifying: Arc<Mutex<()>>,
}

struct Failed(Fault);

impl From<Fault> for Failed {
    fn from(f: Fault) -> Self {
        Self(f)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let Fault { kind, message, fix } = self.0;
        let status = match kind {
            Kind::Data | Kind::Config => StatusCode::BAD_REQUEST,
            Kind::Transport | Kind::Capacity => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Chain | Kind::Fatal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let refusal = Refusal {
            error: message,
            kind,
            fix,
        };
        (status, Json(refusal)).into_response()
    }
}

impl Control {
    /// Serves the socket until `stop`.
    pub(crate) async fn serve(self, socket: &Path, stop: CancellationToken) -> Result<(), Fault> {
        let listener = bind(socket).map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("can not listen on {}: {e}", socket.display()),
                "put the repo on a file system with Unix sockets, at a path of under 90 bytes",
            )
        })?;
        let app = Router::new()
            .route("/v1/stats", get(get_stats))
            .route("/v1/find/{cid}", get(get_find))
            .route("/v1/verify", post(post_verify))
            .route("/v1/rebuild", post(post_rebuild))
            .route("/v1/announce", post(post_announce))
            .with_state(Arc::new(self));
        let ended = stop.clone();
        let serve = axum::serve(Operators(listener), app)
            .with_graceful_shutdown(async move { ended.cancelled().await });
        tokio::select! {
            served = serve => served.map_err(Fault::from),
            // A verification may take long, and must not hold the stop.
            () = stop.cancelled() => Ok(()),
        }
    }
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

type Shared = State<Arc<Control>>;

/// Runs what reads the disk on a thread that may wait for it.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<Json<T>, Failed> {
    let done = tokio::task::spawn_blocking(f).await;
    let broken = |e| {
        Fault::new(
            Kind::Fatal,
            format!("the work broke off: {e}"),
            "see the log",
        )
    };
    Ok(Json(done.map_err(broken)??))
}

async fn get_stats(State(c): Shared) -> Result<Json<IndexStats>, Failed> {
    blocking(move || {
        let head = *c.chain.watch().borrow();
        Ok(IndexStats {
            head: head.map(|h| h.to_string()),
            provider: Some(c.chain.provider()),
            ..stats(&c.index)?
        })
    })
    .await
}

async fn get_find(
    State(c): Shared,
    UrlPath(text): UrlPath<String>,
) -> Result<Json<Vec<Holder>>, Failed> {
    let cid = Cid::try_from(text.as_str()).map_err(|e| {
        Fault::new(
            Kind::Data,
            format!("{text:?} is no CID: {e}"),
            "ask with a CID in text form",
        )
    })?;
    blocking(move || find(&c.index, &cid)).await
}

#[derive(Deserialize)]
struct VerifyQuery {
    samples: u64,
}

async fn post_verify(
    State(c): Shared,
    Query(query): Query<VerifyQuery>,
) -> Result<Json<IndexVerified>, Failed> {
    let Ok(alone) = c.verifying.clone().try_lock_owned() else {
        return Err(Failed(Fault::new(
            Kind::Capacity,
            "the index is being verified already",
            "wait until that has ended",
        )));
    };
    let index = c.index.clone();
    blocking(move || {
        let seen = verify(&index, query.samples);
        drop(alone);
        seen
    })
    .await
}

#[derive(Deserialize)]
struct RebuildQuery {
    piece: Option<PieceCid>,
}

async fn post_rebuild(
    State(c): Shared,
    Query(query): Query<RebuildQuery>,
) -> Result<Json<Rebuilding>, Failed> {
    blocking(move || rebuild(&c.index, query.piece.as_ref())).await
}

/// Tells the named indexers, or the configured ones, of the newest advertisement now.
async fn post_announce(
    State(c): Shared,
    Json(urls): Json<Vec<String>>,
) -> Result<Json<Vec<Announced>>, Failed> {
    let urls = match urls.as_slice() {
        [] => c.announce_urls.clone(),
        named => announce::urls(named)?,
    };
    if urls.is_empty() {
        return Err(Failed(Fault::new(
            Kind::Config,
            "there is no indexer to tell",
            "name one with --url, or set indexing.announce_urls",
        )));
    }
    let Some(head) = *c.chain.watch().borrow() else {
        return Err(Failed(Fault::new(
            Kind::Data,
            "there is no advertisement yet",
            "make a deal whose piece is to be announced",
        )));
    };
    let client = announce::client()?;
    let mut out = Vec::new();
    for url in urls {
        let told = announce::send(&client, &url, &head, &c.chain, &c.publisher).await;
        out.push(Announced {
            url: url.to_string(),
            head: head.to_string(),
            error: told.err().unwrap_or_default(),
        });
    }
    Ok(Json(out))
}
