//! What the operator asks of the workers and of the journal: routes of `run/control.sock`.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Path as UrlPath, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use lotus_journal::Journal;
use lotus_runtime::Fault;
use lotus_types::Kind;
use lotus_workers::{JobInfo, Pool, WorkerInfo};
use serde::{Deserialize, Serialize};

use crate::backup::{self, Made};
use crate::control::Failed;
use crate::repo::Repo;

/// What the routes act on.
#[derive(Clone)]
pub struct Operations {
    /// The workers.
    pub pool: Pool,
    /// What a backup copies.
    pub journal: Journal,
    /// Whose files a backup takes along.
    pub repo: Repo,
}

/// What the workers do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Work {
    /// The attached workers.
    pub workers: Vec<WorkerInfo>,
    /// Tasks with a worker, then those that wait.
    pub jobs: Vec<JobInfo>,
}

/// Where a backup goes.
#[derive(Debug, Serialize, Deserialize)]
pub struct BackupRequest {
    /// A path that the hub can write and that does not exist.
    pub file: PathBuf,
}

type Shared = State<Arc<Operations>>;

impl Operations {
    /// The routes.
    pub(crate) fn router(self) -> Router {
        Router::new()
            .route("/v1/work", get(work))
            .route("/v1/work/{task}/abort", post(abort))
            .route("/v1/backup", post(make_backup))
            .with_state(Arc::new(self))
    }
}

async fn work(State(o): Shared) -> Json<Work> {
    Json(Work {
        workers: o.pool.workers(),
        jobs: o.pool.jobs(),
    })
}

async fn abort(State(o): Shared, UrlPath(task): UrlPath<String>) -> Result<Json<()>, Failed> {
    tracing::warn!(task, "the operator aborts a task");
    o.pool.abort(&task).map_err(Fault::from)?;
    Ok(Json(()))
}

async fn make_backup(
    State(o): Shared,
    Json(wanted): Json<BackupRequest>,
) -> Result<Json<Made>, Failed> {
    let made = tokio::task::spawn_blocking(move || backup::make(&o.journal, &o.repo, &wanted.file));
    let made = made
        .await
        .map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "see the hub's log"))??;
    tracing::info!(file = %made.file.display(), sha256 = made.manifest.sha256, "backup made");
    Ok(Json(made))
}
