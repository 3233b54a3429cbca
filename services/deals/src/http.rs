//! The HTTP intake, in MK20's shape.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use bytes::Bytes;
use futures::StreamExt as _;
use http::{HeaderMap, Method, StatusCode, header};
use jiff::Timestamp;
use lotus_runtime::Rates;
use lotus_runtime::trace;
use lotus_types::Address;
use tokio::sync::{Semaphore, SemaphorePermit};
use tracing::Instrument as _;

use crate::engine::Engine;
use crate::machine::Record;
use crate::mk20::{
    Accepted, BASE, Code, Deal, Done, Refusal, StartUpload, StatusResponse, SupportedContracts,
    SupportedProducts, SupportedSources, UploadStatus,
};
use crate::openapi::{self, Api, Operation};
use crate::{auth, pdp, validate};

/// Longest time for a request that carries no piece.
const PATIENCE: Duration = Duration::from_secs(45);
/// Bytes of an unwanted upload that are read and dropped, so that the client gets the answer
/// instead of a broken connection.
const DRAIN_BYTES: usize = 64 << 20;
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Shared {
    pub(crate) engine: Arc<Engine>,
    requests: Semaphore,
    transfers: Semaphore,
    /// Chunks are small, and their uploads run in parallel: they have places of their own.
    chunks: Semaphore,
    /// Nobody signs these: they get half of the places of transfers at most.
    pieces: Semaphore,
    rates: Rates<IpAddr>,
}

pub(crate) type App = Arc<Shared>;

/// The service's routes.
pub(crate) fn router(engine: Arc<Engine>) -> Router {
    let shared = Arc::new(Shared {
        requests: Semaphore::new(engine.cfg.max_requests.get().into()),
        transfers: Semaphore::new(engine.cfg.max_transfers.get().into()),
        chunks: Semaphore::new(engine.cfg.max_chunk_uploads.get().into()),
        pieces: Semaphore::new(engine.cfg.max_transfers.get().div_ceil(2).into()),
        rates: Rates::new(engine.cfg.requests_per_second),
        engine,
    });
    let (mut router, document) = pdp::routes(routes(Api::new())).finish();
    let document: Bytes = document.to_string().into();
    for path in openapi::PATHS {
        let document = document.clone();
        let json = [(header::CONTENT_TYPE, "application/json")];
        router = router.route(path, get(|| async move { (json, document) }));
    }
    router
        .fallback(|| async {
            Refusal::new(
                Code::NotFound,
                "there is nothing at this path",
                format!(
                    "see {}: deals are proposed with POST {BASE}/deal",
                    openapi::PATHS[0]
                ),
            )
        })
        .layer(middleware::from_fn_with_state(shared.clone(), admit))
        .with_state(shared)
}

fn routes(api: Api<App>) -> Api<App> {
    let path = |p: &str| format!("{BASE}{p}");
    let done = "It is done";
    api.on(
        &Method::POST,
        &path("/deal"),
        &Operation::new("Propose a deal")
            .signed()
            .takes::<Deal>(true)
            .gives::<Accepted>(200, "The deal is accepted"),
        post(propose),
    )
    .on(
        &Method::POST,
        &path("/update/{id}"),
        &Operation::new("Fill in what a deal lacks; what it has is not replaced")
            .signed()
            .takes::<Deal>(true)
            .gives::<Done>(200, "The deal has all of this"),
        post(update),
    )
    .on(
        &Method::GET,
        &path("/status/{id}"),
        &Operation::new("How far a deal is")
            .signed()
            .gives::<StatusResponse>(200, "How far it is"),
        get(status),
    )
    .on(
        &Method::PUT,
        &path("/upload/{id}"),
        &Operation::new("Upload the whole piece of a deal")
            .signed()
            .takes_bytes()
            .gives::<Done>(200, "The piece is here and is what the deal says"),
        put(upload),
    )
    .on(
        &Method::POST,
        &path("/upload/{id}"),
        &Operation::new("Finish the upload of a whole piece")
            .signed()
            .takes::<Deal>(false)
            .gives::<Done>(200, done),
        post(finalize),
    )
    .on(
        &Method::POST,
        &path("/uploads/{id}"),
        &Operation::new("Begin an upload in chunks")
            .signed()
            .takes::<StartUpload>(true)
            .gives::<Done>(200, done),
        post(start_chunks),
    )
    .on(
        &Method::GET,
        &path("/uploads/{id}"),
        &Operation::new("Which chunks are here")
            .signed()
            .gives::<UploadStatus>(200, "Which chunks are here, and which are missing"),
        get(chunk_status),
    )
    .on(
        &Method::PUT,
        &path("/uploads/{id}/{chunk}"),
        &Operation::new("Upload one chunk; the first is 1, in any order, several at a time")
            .signed()
            .takes_bytes()
            .gives::<Done>(200, "The chunk is here"),
        put(put_chunk),
    )
    .on(
        &Method::POST,
        &path("/uploads/finalize/{id}"),
        &Operation::new("Finish an upload in chunks: the piece is checked now")
            .signed()
            .takes::<Deal>(false)
            .gives::<Done>(200, done),
        post(finalize),
    )
    .on(
        &Method::GET,
        &path("/products"),
        &Operation::new("What the provider does with pieces")
            .gives::<SupportedProducts>(200, "Products"),
        get(products),
    )
    .on(
        &Method::GET,
        &path("/sources"),
        &Operation::new("Where pieces may come from").gives::<SupportedSources>(200, "Sources"),
        get(sources),
    )
    .on(
        &Method::GET,
        &path("/contracts"),
        &Operation::new("Market contracts that deals may belong to")
            .gives::<SupportedContracts>(200, "Contracts: none"),
        get(|| async { axum::Json(SupportedContracts { contracts: vec![] }) }),
    )
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let wait = self.retry_after_secs;
        let mut response = (status, axum::Json(self)).into_response();
        if wait > 0 {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, wait.into());
        }
        response
    }
}

/// A place among the uploads that run now.
fn place(of: &Semaphore) -> Result<SemaphorePermit<'_>, Refusal> {
    of.try_acquire()
        .map_err(|_| overloaded("too many uploads are running").retry_after(10))
}

impl Shared {
    /// Places for an upload that nobody signs.
    pub(crate) fn unsigned(&self) -> Result<[SemaphorePermit<'_>; 2], Refusal> {
        Ok([place(&self.pieces)?, place(&self.transfers)?])
    }
}

fn overloaded(what: &str) -> Refusal {
    Refusal::new(Code::Overloaded, what, "come back later").retry_after(1)
}

/// Limits, the trace, and a record of every request.
async fn admit(
    State(shared): State<App>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = tracing::info_span!("http", %method, path, peer = %peer);
    trace::set_parent(&span, &trace::from_headers(request.headers()));
    async {
        let client = lotus_runtime::client(peer.ip());
        if !shared.rates.allow(client, Instant::now()) {
            return overloaded("too many requests from this address").into_response();
        }
        // An upload takes its place when it is known to be wanted, and gives it back before the
        // rest of a refused body is read: whoever may not upload keeps nobody out.
        let response = if method == Method::PUT {
            next.run(request).await
        } else {
            let Ok(_slot) = shared.requests.try_acquire() else {
                return overloaded("too many requests are running").into_response();
            };
            tokio::time::timeout(PATIENCE, next.run(request)).await.unwrap_or_else(|_| {
                Refusal::new(Code::Unavailable, "the request took too long", "try again").retry_after(5).into_response()
            })
        };
        let status = response.status().as_u16();
        if method == Method::GET && status < 400 {
            tracing::debug!(status, "answered");
        } else {
            tracing::info!(status, "answered");
        }
        metrics::counter!("lotus_markets_deal_requests_total", "method" => method.to_string(), "status" => status.to_string())
            .increment(1);
        response
    }
    .instrument(span)
    .await
}

/// Who signed the request.
fn signer(method: &Method, path: &str, headers: &HeaderMap) -> Result<Address, Refusal> {
    let header = headers
        .get(header::AUTHORIZATION)
        .map(|v| v.to_str().unwrap_or_default());
    auth::verify(header, method.as_str(), path, Timestamp::now())
        .map_err(|e| Refusal::new(Code::Unauthorized, &e, e.fix()).at("Authorization"))
}

fn content_type(headers: &HeaderMap, wanted: &str) -> Result<(), Refusal> {
    let is = headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split(';').next())
        .unwrap_or_default()
        .trim();
    if is.eq_ignore_ascii_case(wanted) {
        return Ok(());
    }
    Err(Refusal::new(
        Code::UnsupportedMedia,
        format!("the content type is {is:?}"),
        format!("send Content-Type: {wanted}"),
    )
    .at("Content-Type"))
}

/// A small body, within size and time.
pub(crate) async fn small_body(shared: &Shared, body: Body) -> Result<Bytes, Refusal> {
    let limit = shared.engine.cfg.max_proposal_bytes;
    let read = axum::body::to_bytes(body, limit.saturating_add(1));
    let patience = shared.engine.cfg.header_patience();
    match tokio::time::timeout(patience, read).await {
        Ok(Ok(bytes)) if bytes.len() <= limit => Ok(bytes),
        Ok(Ok(_)) => Err(too_large(limit)),
        Ok(Err(e))
            if std::error::Error::source(&e)
                .is_some_and(|s| s.is::<http_body_util::LengthLimitError>()) =>
        {
            Err(too_large(limit))
        }
        Ok(Err(e)) => Err(Refusal::new(
            Code::BadProposal,
            format!("the body broke off: {e}"),
            "send it again",
        )),
        Err(_) => Err(Refusal::new(
            Code::BadProposal,
            "the body came too slowly",
            "send it again",
        )),
    }
}

fn too_large(limit: usize) -> Refusal {
    Refusal::new(
        Code::TooLarge,
        format!("the body has more than {limit} bytes"),
        "a proposal is small; bytes go to PUT /market/mk20/upload/{id}",
    )
}

fn parse(body: &[u8]) -> Result<Deal, Refusal> {
    serde_json::from_slice(body).map_err(|e| {
        Refusal::new(
            Code::BadProposal,
            format!("the body is no proposal: {e}"),
            "send a deal as JSON: identifier, client, data, products",
        )
    })
}

async fn propose(
    State(shared): State<App>,
    request: Request,
) -> Result<axum::Json<Accepted>, Refusal> {
    let (parts, body) = request.into_parts();
    let client = signer(&parts.method, parts.uri.path(), &parts.headers)?;
    content_type(&parts.headers, "application/json")?;
    let deal = parse(&small_body(&shared, body).await?)?;
    match shared.engine.propose(&deal, &client).await {
        Ok(key) => {
            tracing::info!(deal = %key, "proposal accepted");
            Ok(axum::Json(Accepted {
                code: 200,
                identifier: key.id.to_string(),
                client: key.client,
            }))
        }
        Err(refusal) => {
            tracing::info!(client = %crate::mk20::address_text(&client), refusal = refusal.error, field = refusal.field, "proposal refused");
            Err(refusal)
        }
    }
}

/// The deal in the path, if the signer may see it.
fn lookup(
    shared: &Shared,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    id: &str,
) -> Result<Record, Refusal> {
    let client = signer(method, path, headers)?;
    shared.engine.deal_of(&client, validate::identifier(id)?)
}

async fn status(
    State(shared): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<axum::Json<StatusResponse>, Refusal> {
    let record = lookup(
        &shared,
        request.method(),
        request.uri().path(),
        request.headers(),
        &id,
    )?;
    Ok(axum::Json(shared.engine.status(&record).await))
}

async fn upload(
    State(shared): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<axum::Json<Done>, Refusal> {
    let (parts, body) = request.into_parts();
    let mut body = body.into_data_stream();
    let checked = lookup(
        &shared,
        &parts.method,
        parts.uri.path(),
        &parts.headers,
        &id,
    )
    .and_then(|record| content_type(&parts.headers, "application/octet-stream").map(|()| record));
    let announced = content_length(&parts.headers);
    let outcome = match checked.and_then(|record| Ok((record, place(&shared.transfers)?))) {
        Ok((record, _place)) => shared.engine.upload(&record, announced, &mut body).await,
        Err(refusal) => Err(refusal),
    };
    drained(outcome, body).await?;
    Ok(axum::Json(Done::OK))
}

/// `Content-Length`, if it says something.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

/// Before a refusal the rest of the body is read, within limits, so that the client gets to see
/// it.
pub(crate) async fn drained(
    outcome: Result<(), Refusal>,
    mut body: axum::body::BodyDataStream,
) -> Result<(), Refusal> {
    if outcome.is_err() {
        let drain = async {
            let mut left = DRAIN_BYTES;
            while let Some(Ok(chunk)) = body.next().await {
                left = left.saturating_sub(chunk.len());
                if left == 0 {
                    break;
                }
            }
        };
        drop(tokio::time::timeout(DRAIN_PATIENCE, drain).await);
    }
    outcome
}

async fn start_chunks(
    State(shared): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<axum::Json<Done>, Refusal> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let record = lookup(&shared, &parts.method, path, &parts.headers, &id)?;
    content_type(&parts.headers, "application/json")?;
    let body = small_body(&shared, body).await?;
    let want = serde_json::from_slice(&body).map_err(|e| {
        Refusal::new(
            Code::BadProposal,
            format!("the body does not begin an upload: {e}"),
            "send raw_size and chunk_size as JSON",
        )
    })?;
    shared.engine.start_chunks(&record, want).await?;
    Ok(axum::Json(Done::OK))
}

async fn chunk_status(
    State(shared): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<axum::Json<UploadStatus>, Refusal> {
    let path = request.uri().path();
    let record = lookup(&shared, request.method(), path, request.headers(), &id)?;
    Ok(axum::Json(shared.engine.chunk_status(&record)?))
}

async fn put_chunk(
    State(shared): State<App>,
    Path((id, chunk)): Path<(String, String)>,
    request: Request,
) -> Result<axum::Json<Done>, Refusal> {
    let (parts, body) = request.into_parts();
    let mut body = body.into_data_stream();
    let checked = || {
        let path = parts.uri.path();
        let record = lookup(&shared, &parts.method, path, &parts.headers, &id)?;
        content_type(&parts.headers, "application/octet-stream")?;
        let chunk: u32 = chunk.parse().map_err(|_| {
            Refusal::new(Code::BadProposal, "the chunk has no number", "count from 1")
        })?;
        Ok((record, chunk, place(&shared.chunks)?))
    };
    let announced = content_length(&parts.headers);
    let outcome = match checked() {
        Ok((record, chunk, _place)) => {
            let engine = &shared.engine;
            engine.put_chunk(&record, chunk, announced, &mut body).await
        }
        Err(refusal) => Err(refusal),
    };
    drained(outcome, body).await?;
    Ok(axum::Json(Done::OK))
}

/// What a deal has is not replaced, and ours lack nothing: a deal is accepted with its data and
/// both products, or not at all.
async fn update(
    State(shared): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<axum::Json<Done>, Refusal> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path();
    let record = lookup(&shared, &parts.method, path, &parts.headers, &id)?;
    content_type(&parts.headers, "application/json")?;
    let deal = parse(&small_body(&shared, body).await?)?;
    if validate::digest(&deal) != record.proposal.digest {
        return Err(Refusal::new(
            Code::BadProposal,
            "the deal has its data and products, and they are not replaced",
            "propose a new deal for other terms",
        ));
    }
    Ok(axum::Json(Done::OK))
}

async fn finalize(
    State(shared): State<App>,
    Path(id): Path<String>,
    request: Request,
) -> Result<axum::Json<Done>, Refusal> {
    let (parts, body) = request.into_parts();
    let record = lookup(
        &shared,
        &parts.method,
        parts.uri.path(),
        &parts.headers,
        &id,
    )?;
    let body = small_body(&shared, body).await?;
    let again = if body.trim_ascii().is_empty() {
        None
    } else {
        content_type(&parts.headers, "application/json")?;
        Some(parse(&body)?)
    };
    shared.engine.finalize(&record, again.as_ref()).await?;
    Ok(axum::Json(Done::OK))
}

async fn products(State(shared): State<App>) -> Result<axum::Json<SupportedProducts>, Refusal> {
    let p = shared.engine.provider().await.map_err(|_| {
        Refusal::new(
            Code::Unavailable,
            "the provider's hub does not answer",
            "try again later",
        )
        .retry_after(10)
    })?;
    Ok(axum::Json(SupportedProducts {
        products: ["ddo_v1", "retrieval_v1"].map(str::to_owned).into(),
        provider: p.actor.to_string(),
        sector_size: p.sector_size.bytes(),
        height: p.height.0,
    }))
}

async fn sources(State(shared): State<App>) -> axum::Json<SupportedSources> {
    let cfg = &shared.engine.cfg;
    let all = [
        ("http", cfg.accept_online),
        ("put", cfg.accept_online),
        ("offline", cfg.accept_offline),
    ];
    let taken = all.iter().filter(|(_, taken)| *taken);
    axum::Json(SupportedSources {
        sources: taken.map(|(name, _)| (*name).to_owned()).collect(),
    })
}
