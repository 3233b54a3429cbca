//! The same questions over HTTP, as Curio takes them: CBOR bodies at `/market/mk12`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use http::{HeaderMap, StatusCode, header};
use lotus_runtime::Rates;
use lotus_runtime::trace;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tracing::Instrument as _;

use super::wire::{self, AskRequest, DealParams, DealStatusRequest, MAX_MESSAGE};
use crate::engine::Engine;

/// Path below which everything is served.
const BASE: &str = "/market/mk12";
/// Media type of every body.
const CBOR: &str = "application/cbor";
/// Longest time for an answer.
const PATIENCE: Duration = Duration::from_secs(45);
/// Requests in work; each may hold a body of [`MAX_MESSAGE`] bytes.
const MAX_REQUESTS: usize = 32;

struct Shared {
    engine: Arc<Engine>,
    requests: Semaphore,
    rates: Rates<IpAddr>,
}

type App = State<Arc<Shared>>;
type Peer = ConnectInfo<SocketAddr>;

/// The routes.
pub(crate) fn router(engine: Arc<Engine>) -> Router {
    let shared = Arc::new(Shared {
        rates: Rates::new(engine.cfg.requests_per_second),
        requests: Semaphore::new(MAX_REQUESTS),
        engine,
    });
    let path = |p: &str| format!("{BASE}{p}");
    Router::new()
        .route(&path("/store"), post(store))
        .route(&path("/status"), get(status))
        .route(&path("/ask"), get(ask))
        .with_state(shared)
}

async fn store(State(shared): App, peer: Peer, request: Request) -> Response {
    answer(&shared, peer, request, async |params: DealParams| {
        Ok(shared.engine.mk12_deal(params).await)
    })
    .await
}

async fn status(State(shared): App, peer: Peer, request: Request) -> Response {
    answer(&shared, peer, request, async |asked: DealStatusRequest| {
        Ok(shared.engine.mk12_status(asked).await)
    })
    .await
}

async fn ask(State(shared): App, peer: Peer, request: Request) -> Response {
    answer(&shared, peer, request, async |asked: AskRequest| {
        shared.engine.mk12_ask(&asked).await.map_err(|e| {
            tracing::warn!(%e, "no ask");
            "the provider can not sign its ask now"
        })
    })
    .await
}

/// Limits, the trace, the two bodies.
async fn answer<Q: DeserializeOwned, A: Serialize>(
    shared: &Shared,
    ConnectInfo(peer): Peer,
    request: Request,
    handle: impl AsyncFnOnce(Q) -> Result<A, &'static str>,
) -> Response {
    let (parts, body) = request.into_parts();
    let span = tracing::info_span!("http", method = %parts.method, path = parts.uri.path(), %peer);
    trace::set_parent(&span, &trace::from_headers(&parts.headers));
    async {
        if !shared
            .rates
            .allow(lotus_runtime::client(peer.ip()), Instant::now())
        {
            return refuse(
                StatusCode::TOO_MANY_REQUESTS,
                "too many requests from this address",
            );
        }
        let Ok(_slot) = shared.requests.try_acquire() else {
            return refuse(
                StatusCode::TOO_MANY_REQUESTS,
                "too many requests are running",
            );
        };
        let patience = shared.engine.cfg.header_patience();
        let question: Q = match read(&parts.headers, body, patience).await {
            Ok(question) => question,
            Err((code, why)) => return refuse(code, &why),
        };
        match tokio::time::timeout(PATIENCE, handle(question)).await {
            Ok(Ok(answer)) => {
                ([(header::CONTENT_TYPE, CBOR)], wire::encode(&answer)).into_response()
            }
            Ok(Err(why)) => refuse(StatusCode::SERVICE_UNAVAILABLE, why),
            Err(_) => refuse(StatusCode::SERVICE_UNAVAILABLE, "the request took too long"),
        }
    }
    .instrument(span)
    .await
}

fn refuse(code: StatusCode, why: &str) -> Response {
    let mut response = (code, why.to_owned()).into_response();
    if matches!(
        code,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        response.headers_mut().insert(header::RETRY_AFTER, 1.into());
    }
    response
}

async fn read<Q: DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    patience: Duration,
) -> Result<Q, (StatusCode, String)> {
    let is = headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.split(';').next())
        .unwrap_or_default()
        .trim();
    if !is.eq_ignore_ascii_case(CBOR) {
        let why = format!("the content type is {is:?}: send Content-Type: {CBOR}");
        return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
    }
    let whole = axum::body::to_bytes(body, MAX_MESSAGE);
    match tokio::time::timeout(patience, whole).await {
        Ok(Ok(bytes)) => wire::decode(&bytes).map_err(|e| {
            let why = format!("{e}: {}", e.fix());
            (StatusCode::BAD_REQUEST, why)
        }),
        Ok(Err(e))
            if std::error::Error::source(&e)
                .is_some_and(|s| s.is::<http_body_util::LengthLimitError>()) =>
        {
            let why = format!("the body has more than {MAX_MESSAGE} bytes");
            Err((StatusCode::PAYLOAD_TOO_LARGE, why))
        }
        Ok(Err(e)) => Err((StatusCode::BAD_REQUEST, format!("the body broke off: {e}"))),
        Err(_) => Err((
            StatusCode::REQUEST_TIMEOUT,
            "the body came too slowly".into(),
        )),
    }
}
