//! What only the operator may do: JSON over `run/control.sock`, a socket that no spoke gets.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use lotus_chain::Follower;
use lotus_messages::{SendError, Sender};
use lotus_proving::{Leave, ProvingError, Rounds, WindowPost};
use lotus_runtime::peer::Operators;
use lotus_runtime::{Fault, Health};
use lotus_sealing::{BatchKind, Sealing, SealingError, SectorState, Stake, Waiting};
use lotus_types::{Kind, SectorNumber};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::api::{Recorder, bind_unix, recorded};
use crate::control_storage::StorageControl;
use crate::operations::Operations;
use crate::orders;

/// Longest that a command may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// What the commands act on.
#[derive(Clone)]
pub struct Control {
    /// Sectors.
    pub sealing: Sealing,
    /// Deadlines.
    pub window_post: WindowPost,
    /// The log of rounds.
    pub rounds: Rounds,
    /// What holds mining.
    pub leave: Leave,
    /// The chain's head.
    pub follower: Follower,
    /// What each part of the hub says of itself.
    pub health: Health,
    /// Messages.
    pub sender: Sender,
    /// Storage paths.
    pub(crate) storage: StorageControl,
    /// Workers and backups.
    pub operations: Operations,
}

/// A refusal.
#[derive(Debug, Serialize, Deserialize)]
struct Refusal {
    error: String,
    kind: Kind,
    fix: String,
}

/// A sector that a command opened.
#[derive(Debug, Serialize, Deserialize)]
pub struct Opened {
    /// Its number.
    pub sector: u64,
}

/// A sector that waits for others to share a message with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Seat {
    /// Its number.
    pub sector: u64,
    /// Since when, Unix milliseconds.
    pub since_unix_ms: u64,
    /// Last epoch at which the message is of use; 0 for none.
    pub cutoff_epoch: i64,
    /// Its proof would go as part of an aggregate if the message were made now.
    pub aggregate: bool,
}

impl Seat {
    fn all(sealing: &Sealing, kind: BatchKind, waiting: &[Waiting]) -> Vec<Self> {
        let aggregates = sealing.aggregates(kind, waiting);
        let seat = |w: &Waiting| Self {
            sector: w.sector.0,
            since_unix_ms: w.since_unix_ms,
            cutoff_epoch: w.cutoff.map_or(0, |e| e.0),
            aggregate: aggregates && !w.alone && !w.plain,
        };
        waiting.iter().map(seat).collect()
    }
}

/// A refusal on its way out.
pub(crate) struct Failed(Refusal);

impl Failed {
    pub(crate) fn new(kind: Kind, error: String, fix: impl Into<String>) -> Self {
        Self(Refusal {
            error,
            kind,
            fix: fix.into(),
        })
    }
}

impl From<SendError> for Failed {
    fn from(e: SendError) -> Self {
        Self::new(e.kind(), e.to_string(), e.fix())
    }
}

impl From<Fault> for Failed {
    fn from(f: Fault) -> Self {
        Self::new(f.kind, f.message, f.fix)
    }
}

impl From<SealingError> for Failed {
    fn from(e: SealingError) -> Self {
        Self::new(e.kind(), e.to_string(), e.fix())
    }
}

impl From<ProvingError> for Failed {
    fn from(e: ProvingError) -> Self {
        Self::new(e.kind(), e.to_string(), e.fix())
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let status = match self.0.kind {
            Kind::Data => StatusCode::BAD_REQUEST,
            Kind::Transport | Kind::Capacity => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Chain | Kind::Config | Kind::Fatal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self.0)).into_response()
    }
}

impl Control {
    /// Serves the socket until `stop`.
    pub(crate) async fn serve(
        self,
        socket: &Path,
        recorder: Recorder,
        stop: CancellationToken,
    ) -> Result<(), Fault> {
        let listener = bind_unix(socket)?;
        let messages = orders::routes(self.sender.clone());
        let operations = self.operations.clone().router();
        let storage = self.storage.clone().router();
        let app = Router::new()
            .route("/v1/sectors/pledge", post(pledge))
            .route("/v1/sectors/{number}/seal", post(seal))
            .route("/v1/sectors/{number}/stake", get(stake))
            .route("/v1/sectors/{number}/terminate", post(terminate))
            .route("/v1/sectors/{number}/remove", post(remove))
            .route("/v1/sectors/{number}/snap-up", post(snap_up))
            .route("/v1/sectors/{number}/abort-upgrade", post(abort_upgrade))
            .route("/v1/sectors/{number}/state/{state}", post(force_state))
            .route("/v1/batches/{kind}", get(batch).post(publish))
            .merge(crate::control_proving::routes())
            .with_state(Arc::new(self))
            .merge(messages)
            .merge(operations)
            .merge(storage)
            .layer(from_fn_with_state(recorder, recorded));
        axum::serve(Operators(listener), app)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await
            .map_err(Fault::from)
    }
}

pub(crate) type Shared = State<Arc<Control>>;

async fn pledge(State(c): Shared) -> Result<Json<Opened>, Failed> {
    let number = c.sealing.pledge().await?;
    Ok(Json(Opened { sector: number.0 }))
}

async fn seal(State(c): Shared, UrlPath(number): UrlPath<u64>) -> Result<Json<Opened>, Failed> {
    c.sealing.seal_now(SectorNumber(number)).await?;
    Ok(Json(Opened { sector: number }))
}

async fn stake(State(c): Shared, UrlPath(number): UrlPath<u64>) -> Result<Json<Stake>, Failed> {
    Ok(Json(c.sealing.stake(SectorNumber(number)).await?))
}

async fn terminate(
    State(c): Shared,
    UrlPath(number): UrlPath<u64>,
) -> Result<Json<Opened>, Failed> {
    c.sealing.terminate(SectorNumber(number)).await?;
    Ok(Json(Opened { sector: number }))
}

async fn remove(State(c): Shared, UrlPath(number): UrlPath<u64>) -> Result<Json<Opened>, Failed> {
    c.sealing.remove(SectorNumber(number)).await?;
    Ok(Json(Opened { sector: number }))
}

async fn snap_up(State(c): Shared, UrlPath(number): UrlPath<u64>) -> Result<Json<Opened>, Failed> {
    c.sealing.snap_up(SectorNumber(number)).await?;
    Ok(Json(Opened { sector: number }))
}

async fn abort_upgrade(
    State(c): Shared,
    UrlPath(number): UrlPath<u64>,
) -> Result<Json<Opened>, Failed> {
    c.sealing.abort_upgrade(SectorNumber(number)).await?;
    Ok(Json(Opened { sector: number }))
}

async fn force_state(
    State(c): Shared,
    UrlPath((number, state)): UrlPath<(u64, String)>,
) -> Result<Json<Opened>, Failed> {
    let state = state.parse::<SectorState>().map_err(|e| {
        Failed(Refusal {
            error: e.to_string(),
            kind: Kind::Data,
            fix: "see `lotus-miner sectors update-state --help` for the states".into(),
        })
    })?;
    c.sealing.force_state(SectorNumber(number), state).await?;
    Ok(Json(Opened { sector: number }))
}

async fn batch(State(c): Shared, UrlPath(kind): UrlPath<BatchKind>) -> Json<Vec<Seat>> {
    let waiting = c.sealing.waiting(kind);
    Json(Seat::all(&c.sealing, kind, &waiting))
}

async fn publish(State(c): Shared, UrlPath(kind): UrlPath<BatchKind>) -> Json<Vec<Seat>> {
    let sent = c.sealing.publish(kind);
    Json(Seat::all(&c.sealing, kind, &sent))
}

/// Calls the control socket of a running hub.
pub async fn call<T: DeserializeOwned>(
    socket: &Path,
    method: reqwest::Method,
    path: &str,
) -> Result<T, Fault> {
    call_with(socket, method, path, None::<&()>, DEADLINE).await
}

/// [`call`] with a JSON body, for as long as the work may take.
pub async fn call_with<T: DeserializeOwned>(
    socket: &Path,
    method: reqwest::Method,
    path: &str,
    body: Option<&impl Serialize>,
    limit: Duration,
) -> Result<T, Fault> {
    let silent = |e: reqwest::Error| {
        Fault::new(
            Kind::Transport,
            format!("no answer from the hub at {}: {e}", socket.display()),
            "start `lotus-miner run`, or name its --repo",
        )
    };
    let client = lotus_dataplane::http_client_on(socket, limit)
        .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
    let mut request = client
        .request(method, format!("http://hub{path}"))
        .timeout(limit);
    if let Some(body) = body {
        request = request.json(body);
    }
    let answer = request.send().await.map_err(silent)?;
    if answer.status().is_success() {
        return answer.json().await.map_err(silent);
    }
    let status = answer.status();
    match answer.json::<Refusal>().await {
        Ok(r) => Err(Fault::new(r.kind, r.error, r.fix)),
        Err(_) => Err(Fault::new(
            Kind::Fatal,
            format!("the hub answered with HTTP status {status}"),
            "use the lotus-miner of the same release as the hub",
        )),
    }
}
