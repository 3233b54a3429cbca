//! The control socket's part of proving and mining.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use lotus_proving::{Allowed, CheckedPartition, Computed, DeadlineRecord, Recovery, RoundRecord};
use lotus_runtime::{Component, Fault};
use lotus_types::{Epoch, Kind};
use serde::{Deserialize, Serialize};

use crate::control::{Control, Failed, Shared};
use crate::events::unix_ms;

/// How a deadline is checked.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct HowToCheck {
    /// Prove a random challenge instead of looking for files.
    pub(crate) slow: bool,
}

/// Sectors to declare as recovered.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Recover {
    /// Their numbers.
    pub(crate) sectors: BTreeSet<u64>,
    /// Send the messages; else only say what would be sent.
    pub(crate) really: bool,
}

/// Which rounds to list.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Newest {
    /// How many of the newest.
    pub(crate) limit: usize,
}

/// What a part of the hub says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PartView {
    /// Whether it does its job now.
    pub(crate) ready: bool,
    /// Why not, or a detail.
    pub(crate) detail: String,
}

impl From<Component> for PartView {
    fn from(c: Component) -> Self {
        Self {
            ready: c.ready,
            detail: c.detail,
        }
    }
}

/// Whether blocks are made, and what an operator said to that.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct MiningView {
    /// Why mining is refused or waits, if `mining allow` ends that.
    pub(crate) held: Option<String>,
    /// What the hub says of mining.
    pub(crate) state: PartView,
    /// Words of operators, oldest first.
    pub(crate) allowed: Vec<Allowed>,
}

/// An operator's word that nothing else mines for the miner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Allow {
    /// Why.
    pub(crate) reason: String,
}

/// Longest reason, bytes.
const REASON_MAX: usize = 500;

pub(crate) fn routes() -> Router<Arc<Control>> {
    Router::new()
        .route("/v1/deadlines", get(deadlines))
        .route("/v1/deadlines/{index}/check", post(check))
        .route("/v1/deadlines/{index}/compute", post(compute))
        .route("/v1/faults/recover", post(recover))
        .route("/v1/mining", get(rounds))
        .route("/v1/mining/state", get(mining))
        .route("/v1/mining/allow", post(allow))
        .route("/v1/health", get(health))
}

async fn deadlines(State(c): Shared) -> Result<Json<Vec<DeadlineRecord>>, Failed> {
    Ok(Json(c.window_post.outcomes()?))
}

async fn check(
    State(c): Shared,
    Path(index): Path<u64>,
    Json(how): Json<HowToCheck>,
) -> Result<Json<Vec<CheckedPartition>>, Failed> {
    Ok(Json(c.window_post.check(index, how.slow).await?))
}

async fn compute(State(c): Shared, Path(index): Path<u64>) -> Result<Json<Vec<Computed>>, Failed> {
    Ok(Json(c.window_post.compute(index).await?))
}

async fn recover(
    State(c): Shared,
    Json(what): Json<Recover>,
) -> Result<Json<Vec<Recovery>>, Failed> {
    let done = c.window_post.recover(&what.sectors, what.really).await?;
    Ok(Json(done))
}

async fn rounds(
    State(c): Shared,
    Query(newest): Query<Newest>,
) -> Result<Json<Vec<RoundRecord>>, Failed> {
    let all = c.rounds.list(newest.limit.min(10_000));
    Ok(Json(all.map_err(lotus_proving::ProvingError::from)?))
}

async fn health(State(c): Shared) -> Json<BTreeMap<String, PartView>> {
    let parts = c.health.components().into_iter();
    Json(parts.map(|(name, c)| (name, c.into())).collect())
}

async fn mining(State(c): Shared) -> Result<Json<MiningView>, Failed> {
    let told = c.health.components().remove("mining");
    let allowed = c.leave.allowed();
    Ok(Json(MiningView {
        held: c.leave.held(),
        state: told.map_or_else(
            || PartView {
                ready: false,
                detail: "starting".into(),
            },
            PartView::from,
        ),
        allowed: allowed.map_err(lotus_proving::ProvingError::from)?,
    }))
}

/// Ends a refusal to mine, or the wait before the first block.
async fn allow(State(c): Shared, Json(word): Json<Allow>) -> Result<Json<Allowed>, Failed> {
    let reason = word.reason.trim().to_owned();
    if reason.is_empty() || reason.len() > REASON_MAX {
        return Err(Failed::new(
            Kind::Data,
            format!("a reason of {} bytes", reason.len()),
            format!("say in 1 to {REASON_MAX} bytes why nothing else mines: it is kept"),
        ));
    }
    let head = c.follower.head().borrow().clone();
    let until = head.map_or(Epoch(0), |h| h.height);
    let done = tokio::task::spawn_blocking(move || c.leave.allow(until, &reason, unix_ms()));
    let done = done
        .await
        .map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "see the hub's log"))?;
    match done.map_err(lotus_proving::ProvingError::from)? {
        Some(word) => Ok(Json(word)),
        None => Err(Failed::new(
            Kind::Data,
            "mining is not held by anything that this ends".into(),
            "see `lotus-miner info` for what mining does",
        )),
    }
}
