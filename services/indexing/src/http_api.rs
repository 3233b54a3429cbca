//! The advertisement chain for indexers, and lookups for everybody.

use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cid::Cid;
use http::header::{
    ACCEPT, ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, StatusCode};
use lotus_piece_index::PieceIndex;
use lotus_runtime::{Fault, trace};
use lotus_types::{PieceCid, PieceInfo};
use multihash::Multihash;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tracing::Instrument as _;

use crate::ad;
use crate::chain::{Chain, Side};

const IMMUTABLE: HeaderValue = HeaderValue::from_static("public, max-age=29030400, immutable");
/// Names of the two transports in delegated routing. Source: multiformats/multicodec.
const GATEWAY_NAME: &str = "transport-ipfs-gateway-http";
const PIECE_NAME: &str = "transport-filecoin-piece-http";

#[derive(Clone)]
struct Api {
    chain: Arc<Chain>,
    index: PieceIndex,
    places: Arc<Semaphore>,
}

pub(crate) fn router(chain: Arc<Chain>, index: PieceIndex, max_requests: usize) -> Router {
    let api = Api {
        chain,
        index,
        places: Arc::new(Semaphore::new(max_requests)),
    };
    Router::new()
        .route("/", get(about))
        .route("/ipni/v1/ad/head", get(head))
        .route("/ipni/v1/ad/{cid}", get(block))
        .route("/cid/{cid}", get(by_cid))
        .route("/multihash/{hash}", get(by_hash))
        .route("/routing/v1/providers/{cid}", get(providers))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "nothing is served here", "see GET /"))
        .layer(from_fn_with_state(api.clone(), admit))
        .with_state(api)
}

/// Limits, traces and counts every request.
async fn admit(State(api): State<Api>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let span = tracing::info_span!("lookup", path);
    trace::set_parent(&span, &trace::from_headers(request.headers()));
    let kind = match path.split('/').nth(1) {
        Some("ipni") => "chain",
        Some("cid" | "multihash" | "routing") => "lookup",
        _ => "other",
    };
    let mut response = match api.places.try_acquire() {
        Ok(_place) => next.run(request).instrument(span).await,
        Err(_) => {
            let mut busy = refuse(
                StatusCode::TOO_MANY_REQUESTS,
                "too many requests at once",
                "ask again later",
            )
            .into_response();
            busy.headers_mut().insert(RETRY_AFTER, 1.into());
            busy
        }
    };
    let status = response.status().as_u16().to_string();
    metrics::counter!("lotus_markets_indexing_requests_total", "kind" => kind, "status" => status)
        .increment(1);
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    response
}

/// Why a request gets no answer.
struct Refused {
    status: StatusCode,
    error: String,
    fix: &'static str,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let body = json!({ "error": self.error, "fix": self.fix });
        (self.status, Json(body)).into_response()
    }
}

fn refuse(status: StatusCode, error: impl Into<String>, fix: &'static str) -> Refused {
    Refused {
        status,
        error: error.into(),
        fix,
    }
}

/// Runs what reads the disk on a thread that may wait for it.
async fn read<T: Send + 'static>(
    f: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Refused> {
    let failed = |what: String| {
        tracing::warn!(error = what, "lookup failed");
        refuse(StatusCode::INTERNAL_SERVER_ERROR, what, "tell the provider")
    };
    match tokio::task::spawn_blocking(f).await {
        Ok(Ok(t)) => Ok(t),
        Ok(Err(e)) => Err(failed(e.message)),
        Err(e) => Err(failed(e.to_string())),
    }
}

fn parse_cid(text: &str) -> Result<Cid, Refused> {
    Cid::try_from(text).map_err(|e| {
        let shown: String = text.chars().take(128).collect();
        refuse(
            StatusCode::BAD_REQUEST,
            format!("{shown:?} is no CID: {e}"),
            "ask with a CID in text form",
        )
    })
}

async fn about(State(api): State<Api>) -> Result<Response, Refused> {
    let index = api.index.clone();
    let pieces = read(move || Ok(index.pieces()?)).await?;
    let entries: u64 = pieces.iter().map(|(_, n)| n).sum();
    let head = *api.chain.watch().borrow();
    Ok(Json(json!({
        "provider": api.chain.provider(),
        "addresses": [api.chain.retrieval.text],
        "head": head.map(|c| c.to_string()),
        "pieces": pieces.len(),
        "entries": entries,
        "endpoints": ["/ipni/v1/ad/head", "/ipni/v1/ad/{cid}", "/cid/{cid}", "/multihash/{hash}", "/routing/v1/providers/{cid}"],
    }))
    .into_response())
}

async fn head(State(api): State<Api>) -> Result<Response, Refused> {
    let Some(cid) = *api.chain.watch().borrow() else {
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    let signed = ad::head(&cid, &api.chain.key).map_err(|e| {
        refuse(
            StatusCode::INTERNAL_SERVER_ERROR,
            e.message,
            "tell the provider",
        )
    })?;
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    Ok((headers, signed).into_response())
}

async fn block(State(api): State<Api>, Path(text): Path<String>) -> Result<Response, Refused> {
    let cid = parse_cid(&text)?;
    let chain = api.chain.clone();
    let Some(bytes) = read(move || chain.block(&cid)).await? else {
        return Err(refuse(
            StatusCode::NOT_FOUND,
            format!("{cid} is not part of this chain, or was taken back"),
            "start from /ipni/v1/ad/head",
        ));
    };
    let kind = if cid.codec() == 0x71 {
        "application/vnd.ipld.dag-cbor"
    } else {
        "application/json"
    };
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static(kind)),
        (CACHE_CONTROL, IMMUTABLE),
    ];
    Ok((headers, bytes).into_response())
}

/// Who has a multihash: the advertisements that name it.
fn find(api: &Api, hash: &Multihash<64>) -> Result<Vec<(PieceInfo, Side)>, Fault> {
    let mut found = Vec::new();
    for piece in api.index.holders(hash)? {
        let known = api.chain.advertised(&piece)?;
        // Indexed is what counts here; what is advertised elsewhere is the deal's choice.
        let info = known.map(|k| k.info);
        found.push((info.unwrap_or_else(|| unknown_size(piece)), Side::Payload));
    }
    // A piece is found by its own CID, whatever codec the question had.
    let as_piece = [0xf101, 0x55]
        .into_iter()
        .find_map(|codec| PieceCid::from_cid(&Cid::new_v1(codec, *hash)).ok());
    if let Some(known) = as_piece
        .map(|p| api.chain.advertised(&p))
        .transpose()?
        .flatten()
    {
        found.push((known.info, Side::Piece));
    }
    Ok(found)
}

/// A piece that is indexed but not advertised. Its size does not show in an answer about its
/// blocks.
fn unknown_size(cid: PieceCid) -> PieceInfo {
    PieceInfo {
        cid,
        size: lotus_types::PaddedSize::to_hold(0).expect("0 bytes fit"),
        raw_size: 0,
    }
}

async fn by_cid(State(api): State<Api>, Path(text): Path<String>) -> Result<Response, Refused> {
    let cid = parse_cid(&text)?;
    results(api, *cid.hash()).await
}

async fn by_hash(State(api): State<Api>, Path(text): Path<String>) -> Result<Response, Refused> {
    let bytes = data_encoding::HEXLOWER_PERMISSIVE
        .decode(text.as_bytes())
        .ok()
        .or_else(|| multibase::Base::Base58Btc.decode(&text).ok());
    let hash = bytes
        .and_then(|b| Multihash::from_bytes(&b).ok())
        .ok_or_else(|| {
            refuse(
                StatusCode::BAD_REQUEST,
                "this is no multihash",
                "ask with a multihash in base 58 or hexadecimal",
            )
        })?;
    results(api, hash).await
}

/// Source: ipni/go-libipni, `find/model`.
async fn results(api: Api, hash: Multihash<64>) -> Result<Response, Refused> {
    let provider = json!({
        "ID": api.chain.provider(),
        "Addrs": [api.chain.retrieval.text],
    });
    let found = read(move || find(&api, &hash)).await?;
    if found.is_empty() {
        return Err(refuse(
            StatusCode::NOT_FOUND,
            "no piece here holds it",
            "ask another indexer",
        ));
    }
    let results: Vec<Value> = found
        .iter()
        .map(|(info, side)| {
            json!({
                "ContextID": STANDARD.encode(side.context(info)),
                "Metadata": STANDARD.encode(side.metadata()),
                "Provider": provider,
            })
        })
        .collect();
    Ok(Json(json!({
        "MultihashResults": [{
            "Multihash": STANDARD.encode(hash.to_bytes()),
            "ProviderResults": results,
        }],
    }))
    .into_response())
}

/// Filters of IPIP-484.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Filters {
    filter_addrs: String,
    filter_protocols: String,
}

impl Filters {
    fn protocols(&self, ours: &[&str]) -> bool {
        self.filter_protocols.is_empty()
            || self.filter_protocols.split(',').any(|p| ours.contains(&p))
    }

    /// `!name` excludes; of the other names one must be in the address.
    fn addrs(&self, addr: &str) -> bool {
        let has = |name: &str| addr.split('/').any(|part| part == name);
        let (not, any): (Vec<&str>, Vec<&str>) = self
            .filter_addrs
            .split(',')
            .filter(|f| !f.is_empty())
            .partition(|f| f.starts_with('!'));
        !not.iter().any(|n| has(&n[1..])) && (any.is_empty() || any.iter().any(|n| has(n)))
    }
}

/// Delegated routing: one provider, or none; never 404 (IPIP-513).
async fn providers(
    State(api): State<Api>,
    Path(text): Path<String>,
    Query(filters): Query<Filters>,
    headers: HeaderMap,
) -> Result<Response, Refused> {
    let cid = parse_cid(&text)?;
    let (id, addr) = (api.chain.provider(), api.chain.retrieval.text.clone());
    let found = read(move || find(&api, cid.hash())).await?;
    let protocols: Vec<&str> = [(Side::Payload, GATEWAY_NAME), (Side::Piece, PIECE_NAME)]
        .into_iter()
        .filter(|(side, _)| found.iter().any(|(_, s)| s == side))
        .map(|(_, name)| name)
        .collect();
    let shown = !protocols.is_empty() && filters.protocols(&protocols) && filters.addrs(&addr);
    let record = shown
        .then(|| json!({ "Schema": "peer", "ID": id, "Addrs": [addr], "Protocols": protocols }));
    let lines = headers
        .get_all(ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .any(|v| v.contains("application/x-ndjson"));
    let cache = HeaderValue::from_static("public, max-age=15");
    if lines {
        let body = record.map(|r| format!("{r}\n")).unwrap_or_default();
        let kind = HeaderValue::from_static("application/x-ndjson");
        return Ok(([(CONTENT_TYPE, kind), (CACHE_CONTROL, cache)], body).into_response());
    }
    let body = Json(json!({ "Providers": Vec::from_iter(record) }));
    Ok(([(CACHE_CONTROL, cache)], body).into_response())
}
