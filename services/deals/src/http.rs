//! The HTTP intake, in MK20's shape.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
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
use lotus_runtime::trace;
use lotus_types::Address;
use tokio::sync::Semaphore;
use tracing::Instrument as _;

use crate::engine::Engine;
use crate::machine::Record;
use crate::mk20::{BASE, Code, Deal, Refusal};
use crate::{auth, validate};

/// Longest time for a request that carries no piece.
const PATIENCE: Duration = Duration::from_secs(45);
/// Longest time for a proposal's body to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of an unwanted upload that are read and dropped, so that the client gets the answer
/// instead of a broken connection.
const DRAIN_BYTES: usize = 64 << 20;
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
/// Clients whose request rates are remembered.
const MAX_RATES: usize = 10_000;

struct Shared {
    engine: Arc<Engine>,
    requests: Semaphore,
    transfers: Semaphore,
    rates: Mutex<HashMap<IpAddr, Rate>>,
}

type App = State<Arc<Shared>>;

/// The service's routes.
pub(crate) fn router(engine: Arc<Engine>) -> Router {
    let shared = Arc::new(Shared {
        requests: Semaphore::new(engine.cfg.max_requests.get().into()),
        transfers: Semaphore::new(engine.cfg.max_transfers.get().into()),
        rates: Mutex::default(),
        engine,
    });
    let path = |p: &str| format!("{BASE}{p}");
    Router::new()
        .route(&path("/deal"), post(propose))
        .route(&path("/status/{id}"), get(status))
        .route(&path("/upload/{id}"), put(upload).post(finalize))
        .route(&path("/products"), get(products))
        .route(
            &path("/sources"),
            get(|| async { axum::Json(serde_json::json!({"sources": ["http", "put"]})) }),
        )
        .route(
            &path("/contracts"),
            get(|| async { axum::Json(serde_json::json!({"contracts": []})) }),
        )
        .fallback(|| async {
            Refusal::new(
                Code::NotFound,
                "there is nothing at this path",
                format!("deals are proposed with POST {BASE}/deal"),
            )
        })
        .layer(middleware::from_fn_with_state(shared.clone(), admit))
        .with_state(shared)
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

/// Tokens of one address: one is spent for each request.
struct Rate {
    tokens: f64,
    at: Instant,
}

impl Shared {
    /// Whether this address may ask once more now.
    fn within_rate(&self, ip: IpAddr) -> bool {
        let per_second = f64::from(self.engine.cfg.requests_per_second.max(1));
        let burst = per_second * 2.0;
        let now = Instant::now();
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        if rates.len() >= MAX_RATES {
            // A bucket that would be full again says nothing.
            rates.retain(|_, r| now.duration_since(r.at).as_secs_f64() * per_second < burst);
            if rates.len() >= MAX_RATES {
                rates.clear();
            }
        }
        let rate = rates.entry(ip).or_insert(Rate {
            tokens: burst,
            at: now,
        });
        let refill = now.duration_since(rate.at).as_secs_f64() * per_second;
        rate.tokens = (rate.tokens + refill).min(burst);
        rate.at = now;
        let allowed = rate.tokens >= 1.0;
        if allowed {
            rate.tokens -= 1.0;
        }
        allowed
    }
}

fn overloaded(what: &str) -> Refusal {
    Refusal::new(Code::Overloaded, what, "come back later").retry_after(1)
}

/// Limits, the trace, and a record of every request.
async fn admit(
    State(shared): App,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = tracing::info_span!("http", %method, path, peer = %peer);
    trace::set_parent(&span, &trace::from_headers(request.headers()));
    async {
        if !shared.within_rate(peer.ip()) {
            return overloaded("too many requests from this address").into_response();
        }
        let response = if method == Method::PUT {
            let Ok(_slot) = shared.transfers.try_acquire() else {
                return overloaded("too many uploads are running").retry_after(10).into_response();
            };
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
async fn small_body(shared: &Shared, body: Body) -> Result<Bytes, Refusal> {
    let limit = shared.engine.cfg.max_proposal_bytes;
    let read = axum::body::to_bytes(body, limit.saturating_add(1));
    match tokio::time::timeout(BODY_PATIENCE, read).await {
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

async fn propose(State(shared): App, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let client = signer(&parts.method, parts.uri.path(), &parts.headers)?;
    content_type(&parts.headers, "application/json")?;
    let deal = parse(&small_body(&shared, body).await?)?;
    match shared.engine.propose(&deal, &client).await {
        Ok(key) => {
            tracing::info!(deal = %key, "proposal accepted");
            Ok(axum::Json(
                serde_json::json!({"code": 200, "identifier": key.id, "client": key.client}),
            )
            .into_response())
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
    State(shared): App,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Refusal> {
    let record = lookup(
        &shared,
        request.method(),
        request.uri().path(),
        request.headers(),
        &id,
    )?;
    Ok(axum::Json(shared.engine.status(&record).await).into_response())
}

async fn upload(
    State(shared): App,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Refusal> {
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
    let announced = parts
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse().ok());
    let outcome = match checked {
        Ok(record) => shared.engine.upload(&record, announced, &mut body).await,
        Err(refusal) => Err(refusal),
    };
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
    outcome.map(|()| axum::Json(serde_json::json!({"code": 200})).into_response())
}

async fn finalize(
    State(shared): App,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Refusal> {
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
    Ok(axum::Json(serde_json::json!({"code": 200})).into_response())
}

/// MK20's list of products, and what a client needs to make a proposal here.
async fn products(State(shared): App) -> Result<Response, Refusal> {
    let p = shared.engine.provider().await.map_err(|_| {
        Refusal::new(
            Code::Unavailable,
            "the provider's hub does not answer",
            "try again later",
        )
        .retry_after(10)
    })?;
    Ok(axum::Json(serde_json::json!({
        "products": ["ddo_v1", "retrieval_v1"],
        "provider": p.actor.to_string(),
        "sector_size": p.sector_size.bytes(),
        "height": p.height,
    }))
    .into_response())
}
