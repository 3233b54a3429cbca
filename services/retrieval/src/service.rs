use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hub_proto::HubConfig;
use lotus_piece_index::serve::{Limits, serve};
use lotus_piece_index::{Follower, PieceIndex, PieceSource, connect};
use lotus_runtime::{Cx, Fault, Service, addr_file};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::RetrievalConfig;
use crate::gateway::{Gateway, router};

/// The retrieval spoke.
#[derive(Debug)]
pub struct Retrieval {
    cfg: RetrievalConfig,
    hub: HubConfig,
    dir: PathBuf,
    run_dir: PathBuf,
}

impl Retrieval {
    /// A spoke that keeps its state under `dir` and writes its address to `run_dir`.
    #[must_use]
    pub fn new(cfg: RetrievalConfig, hub: HubConfig, dir: PathBuf, run_dir: PathBuf) -> Self {
        Self {
            cfg,
            hub,
            dir,
            run_dir,
        }
    }
}

impl Service for Retrieval {
    const NAME: &'static str = "retrieval";

    async fn run(self, cx: Cx) -> Result<(), Fault> {
        let Cx {
            ready,
            stop,
            health,
        } = cx;
        let listener = TcpListener::bind(self.cfg.listen)
            .await
            .map_err(|e| Fault::bind(&self.cfg.listen, "retrieval.listen", &e))?;
        let addr = listener.local_addr()?;
        std::fs::create_dir_all(&self.dir)?;
        let index = PieceIndex::open(&self.dir.join("index.redb"))?;
        let gateway = Arc::new(Gateway {
            index: index.clone(),
            source: OnceLock::new(),
            places: Arc::new(Semaphore::new(self.cfg.max_requests.get().into())),
            walks: TaskTracker::new(),
        });
        addr_file::write(&self.run_dir, Self::NAME, &addr.to_string())?;
        let limits = Limits {
            connections: self.cfg.max_connections.get().into(),
            headers: Duration::from_secs(self.cfg.header_secs),
            stall: Duration::from_secs(self.cfg.stall_secs),
            drain: Duration::from_secs(self.cfg.drain_secs),
        };
        // Either part ends the other: a gateway that follows nothing would go stale unseen.
        let stop = stop.child_token();
        let follow = async {
            let Some(hub) = connect(&self.hub, Self::NAME, &stop).await? else {
                return Ok(());
            };
            let source = PieceSource::new(hub.clone(), self.cfg.max_leases.get().into());
            drop(gateway.source.set(source.clone()));
            let follower =
                Follower::new(hub, index, source, Arc::new(()), health, "retrieval.index");
            let listed = || {
                tracing::info!(%addr, "content is served");
                ready.release(addr);
            };
            follower.run(listed, stop.clone()).await
        };
        let follow = async {
            let ended = follow.await;
            stop.cancel();
            ended
        };
        let ((), followed) = tokio::join!(
            serve(listener, router(gateway.clone()), limits, stop.clone()),
            follow
        );
        // Their clients are gone, so the walks end at their next block.
        gateway.walks.close();
        gateway.walks.wait().await;
        followed
    }
}
