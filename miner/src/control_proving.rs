//! The control socket's part of proving and mining.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use lotus_proving::{CheckedPartition, Computed, DeadlineRecord, Recovery, RoundRecord};
use serde::{Deserialize, Serialize};

use crate::control::{Control, Failed, Shared};

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

pub(crate) fn routes() -> Router<Arc<Control>> {
    Router::new()
        .route("/v1/deadlines", get(deadlines))
        .route("/v1/deadlines/{index}/check", post(check))
        .route("/v1/deadlines/{index}/compute", post(compute))
        .route("/v1/faults/recover", post(recover))
        .route("/v1/mining", get(rounds))
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
