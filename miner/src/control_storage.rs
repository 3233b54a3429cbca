//! The control socket's part of storage paths.

use std::sync::Arc;

use axum::extract::{Path as UrlPath, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use lotus_runtime::Fault;
use lotus_sealing::{HeldView, MoveView, NewPath, PathId, PathView, Storage, StorageError};
use lotus_types::{ActorId, Kind, SectorId, SectorNumber};
use serde::{Deserialize, Serialize};

use crate::control::Failed;

/// What the routes act on.
#[derive(Clone, Debug)]
pub(crate) struct StorageControl {
    pub(crate) storage: Storage,
    pub(crate) miner: ActorId,
}

/// Which path is detached.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Detach {
    pub(crate) id: PathId,
    /// Also when sectors are lost to this hub.
    pub(crate) really: bool,
}

/// Which paths are read anew.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Redeclare {
    /// One, or all.
    pub(crate) id: Option<PathId>,
}

/// Which sector goes where.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct MoveOrder {
    pub(crate) sector: u64,
    pub(crate) to: PathId,
}

type Shared = State<Arc<StorageControl>>;

impl StorageControl {
    /// The routes.
    pub(crate) fn router(self) -> Router {
        Router::new()
            .route("/v1/storage", get(list))
            .route("/v1/storage/attach", post(attach))
            .route("/v1/storage/detach", post(detach))
            .route("/v1/storage/redeclare", post(redeclare))
            .route("/v1/storage/only/{id}", get(only))
            .route("/v1/storage/find/{number}", get(find))
            .route("/v1/storage/moves", get(moves).post(order_move))
            .with_state(Arc::new(self))
    }

    /// Runs what blocks on a thread that may.
    async fn on_disk<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Storage) -> Result<R, StorageError> + Send + 'static,
    ) -> Result<R, Failed> {
        let storage = self.storage.clone();
        let done = tokio::task::spawn_blocking(move || f(&storage)).await;
        let panicked = |e: tokio::task::JoinError| {
            Failed::from(Fault::new(Kind::Fatal, e.to_string(), "see the hub's log"))
        };
        let refused = |e: StorageError| Failed::new(e.kind(), e.to_string(), e.fix());
        done.map_err(panicked)?.map_err(refused)
    }
}

async fn list(State(c): Shared) -> Json<Vec<PathView>> {
    Json(c.storage.paths())
}

async fn attach(
    State(c): Shared,
    Json(new): Json<NewPath>,
) -> Result<Json<Option<PathView>>, Failed> {
    tracing::info!(dir = %new.dir.display(), "the operator attaches a storage path");
    let id = c.on_disk(move |s| s.attach(&new)).await?;
    let mut paths = c.storage.paths().into_iter();
    Ok(Json(paths.find(|p| p.id == id)))
}

async fn detach(State(c): Shared, Json(what): Json<Detach>) -> Result<Json<()>, Failed> {
    tracing::warn!(path = %what.id, really = what.really, "the operator detaches a storage path");
    c.on_disk(move |s| s.detach(&what.id, what.really)).await?;
    Ok(Json(()))
}

async fn only(State(c): Shared, UrlPath(id): UrlPath<PathId>) -> Result<Json<Vec<u64>>, Failed> {
    let only = c.on_disk(move |s| s.only_on(&id)).await?;
    Ok(Json(only.into_iter().map(|s| s.number.0).collect()))
}

async fn redeclare(
    State(c): Shared,
    Json(what): Json<Redeclare>,
) -> Result<Json<Vec<PathView>>, Failed> {
    c.on_disk(move |s| s.redeclare(what.id.as_ref())).await?;
    Ok(Json(c.storage.paths()))
}

async fn find(State(c): Shared, UrlPath(number): UrlPath<u64>) -> Json<Vec<HeldView>> {
    Json(c.storage.find(SectorNumber(number)))
}

async fn moves(State(c): Shared) -> Json<Vec<MoveView>> {
    Json(c.storage.moves())
}

async fn order_move(
    State(c): Shared,
    Json(order): Json<MoveOrder>,
) -> Result<Json<MoveView>, Failed> {
    let sector = SectorId {
        miner: c.miner,
        number: SectorNumber(order.sector),
    };
    tracing::info!(%sector, to = %order.to, "the operator moves a sector");
    let ordered = c.on_disk(move |s| s.order_move(sector, &order.to)).await?;
    Ok(Json(ordered))
}
