//! Lotus JSON-RPC over HTTP and WebSocket.

mod call;
mod channel;
mod gate;
mod methods;
mod wallet;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use lotus_runtime::Fault;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::call::{Request, RpcError, response};
use self::gate::{Gate, GatedListener};
pub use self::wallet::{Wallet, WalletServer};
use crate::Chain;
pub use lotus_tokens::{Perm, Tokens};

/// Largest request, bytes: a message with the vanilla proofs of a full batch.
const MAX_REQUEST: usize = 64 << 20;
/// How long open answers may take once the server stops.
const DRAIN: Duration = Duration::from_secs(2);
/// How long `StateWaitMsg` may wait.
const WAIT_MSG: Duration = Duration::from_secs(3_600);

pub(crate) struct Context {
    chain: Chain,
    tokens: Tokens,
    gate: Arc<Gate>,
    stop: CancellationToken,
}

/// The RPC server, bound.
pub struct Server {
    listener: TcpListener,
    cx: Arc<Context>,
}

impl Server {
    /// Binds the address.
    pub async fn bind(listen: SocketAddr, chain: Chain, tokens: Tokens) -> Result<Self, Fault> {
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|e| Fault::bind(&listen, "listen (--listen)", &e))?;
        let cx = Arc::new(Context {
            chain,
            tokens,
            gate: Arc::new(Gate::default()),
            stop: CancellationToken::new(),
        });
        Ok(Self { listener, cx })
    }

    /// The bound address.
    pub fn local_addr(&self) -> Result<SocketAddr, Fault> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves until stopped.
    pub async fn serve(self, stop: CancellationToken) -> Result<(), Fault> {
        let app = Router::new()
            .route("/rpc/v1", get(upgrade).post(post))
            .route("/rpc/v0", get(upgrade).post(post))
            .layer(DefaultBodyLimit::max(MAX_REQUEST))
            .with_state(self.cx.clone());
        let gate = self.cx.gate.clone();
        let listener = GatedListener {
            tcp: self.listener,
            gate: gate.clone(),
        };
        let stopping = self.cx.stop.clone();
        let graceful = stopping.clone();
        let mut serve = std::pin::pin!(
            axum::serve(listener, app)
                .with_graceful_shutdown(async move { graceful.cancelled().await })
                .into_future()
        );
        tokio::select! {
            done = &mut serve => return done.map_err(Fault::from),
            () = gate.run() => {}
            () = stop.cancelled() => {}
        }
        stopping.cancel();
        // Answers that are still open then are for calls that wait; their callers ask again.
        timeout(DRAIN, serve)
            .await
            .unwrap_or(Ok(()))
            .map_err(Fault::from)
    }
}

/// The caller's permissions; `None` for a token that is not ours. Without a token: read.
/// Source: go-jsonrpc, auth/handler.go; lotus, api/permissioned.go.
fn authenticate(tokens: &Tokens, headers: &HeaderMap) -> Option<Vec<Perm>> {
    match headers.get(header::AUTHORIZATION) {
        None => Some(vec![Perm::Read]),
        Some(v) => tokens.verify(v.to_str().ok()?.strip_prefix("Bearer ")?.trim()),
    }
}

async fn post(State(cx): State<Arc<Context>>, headers: HeaderMap, body: Bytes) -> Response {
    let Some(perms) = authenticate(&cx.tokens, &headers) else {
        return StatusCode::UNAUTHORIZED.into_response();
    };
    let (id, result) = match Request::parse(&body) {
        Ok(request) => {
            let id = request.id.clone();
            tokio::select! {
                result = call(&cx, &perms, request) => (id, result),
                () = cx.stop.cancelled() => {
                    return StatusCode::SERVICE_UNAVAILABLE.into_response();
                }
            }
        }
        Err(e) => (Some(Value::Null), Err(e)),
    };
    answer(id, result)
}

/// An answer over HTTP; a notification has no `id` and gets the status alone.
fn answer(id: Option<Value>, result: Result<Value, RpcError>) -> Response {
    let status = match &result {
        Err(e) if !e.is_of_call() => StatusCode::INTERNAL_SERVER_ERROR,
        _ => StatusCode::OK,
    };
    let Some(id) = id else {
        return status.into_response();
    };
    let body = response(&id, result).to_string();
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

async fn upgrade(
    State(cx): State<Arc<Context>>,
    headers: HeaderMap,
    ws: WebSocketUpgrade,
) -> Response {
    let Some(perms) = authenticate(&cx.tokens, &headers) else {
        return StatusCode::UNAUTHORIZED.into_response();
    };
    ws.max_message_size(MAX_REQUEST)
        .max_frame_size(MAX_REQUEST)
        .on_upgrade(move |socket| channel::serve(cx, perms, socket))
}

/// The method's name in our table.
fn short(method: &str) -> &str {
    method.strip_prefix("Filecoin.").unwrap_or(method)
}

fn permitted(perms: &[Perm], name: &str) -> Result<(), RpcError> {
    let need = methods::permission(name).ok_or_else(|| RpcError::no_method(name))?;
    holds(perms, need, name)
}

fn holds(perms: &[Perm], need: Perm, name: &str) -> Result<(), RpcError> {
    if perms.contains(&need) {
        return Ok(());
    }
    Err(RpcError::failed(format!(
        "missing permission to invoke '{name}' (need '{}')",
        need.name()
    )))
}

/// Makes a call.
async fn call(cx: &Arc<Context>, perms: &[Perm], request: Request) -> Result<Value, RpcError> {
    let name = short(&request.method);
    if methods::permission(name).is_none() {
        return Err(RpcError::no_method(&request.method));
    }
    permitted(perms, name)?;
    cx.gate.delay().await;
    if !name.starts_with("Devnet.") && cx.gate.fails() {
        return Err(RpcError::failed("failed by command"));
    }
    let params = request.params.unwrap_or_default();
    match name {
        "ChainNotify" => Err(RpcError::no_channel(&request.method)),
        "StateWaitMsg" => {
            let wait = methods::wait_msg(cx, params);
            let late = |_| RpcError::failed("the message did not land in time");
            timeout(WAIT_MSG, wait).await.map_err(late)?
        }
        _ => {
            // Signatures and proofs take a while.
            let (cx, method) = (cx.clone(), request.method.clone());
            let work = move || methods::call(&cx, short(&method), params);
            tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
                tracing::error!(error = %e, method = request.method, "a call failed");
                Err(RpcError::failed(format!(
                    "panic in rpc method '{}'",
                    request.method
                )))
            })
        }
    }
}
