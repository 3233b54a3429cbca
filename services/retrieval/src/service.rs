use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hub_proto::HubConfig;
use lotus_car::WalkMemory;
use lotus_piece_index::{Follower, PieceIndex, PieceSource, connect};
use lotus_runtime::serve::{Extras, Limits, serve_with};
use lotus_runtime::{CancellationToken, Cx, Fault, PerClient, Service, addr_file, listen};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::RetrievalConfig;
use crate::gateway::{Gateway, Hub, router};
use crate::unseal::Unseals;

/// How long connections wait for a hub that is not there when the service starts.
const HUB_PATIENCE: Duration = Duration::from_secs(5);

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
        let tls = self.cfg.tls()?;
        let per_client =
            |most: NonZeroU16| PerClient::new(most.get().into(), self.cfg.trusted_proxies.clone());
        let listener = listen(Self::NAME, self.cfg.listen).await?;
        let addr = listener.local_addr()?;
        std::fs::create_dir_all(&self.dir)?;
        let index = PieceIndex::open(&self.dir.join("index.redb"))?;
        let gateway = Arc::new(Gateway {
            index: index.clone(),
            hub: OnceLock::new(),
            places: Arc::new(Semaphore::new(self.cfg.max_requests.get().into())),
            clients: per_client(self.cfg.max_requests_per_client),
            memory: WalkMemory::new(usize::from(self.cfg.walk_memory_mib.get()) << 20),
            walks: TaskTracker::new(),
        });
        addr_file::write(&self.run_dir, Self::NAME, &addr.to_string())?;
        let limits = Limits {
            connections: self.cfg.max_connections.get().into(),
            headers: Duration::from_secs(self.cfg.header_secs),
            stall: Duration::from_secs(self.cfg.stall_secs),
            http2: true,
            drain: Duration::from_secs(self.cfg.drain_secs),
        };
        let extras = Extras {
            tls,
            per_client: Some(per_client(self.cfg.max_connections_per_client)),
        };
        // Either part ends the other: a gateway that follows nothing would go stale unseen.
        let stop = stop.child_token();
        // Connections wait in the queue for as long as it takes to know the hub, but not for one
        // that is away: then they are told to come back.
        let hub_known = CancellationToken::new();
        let serving = async {
            tokio::select! {
                () = hub_known.cancelled() => {}
                () = tokio::time::sleep(HUB_PATIENCE) => {}
                () = stop.cancelled() => {}
            }
            let app = router(gateway.clone());
            serve_with(listener, app, limits, extras, stop.clone()).await;
        };
        let follow = async {
            let Some(hub) = connect(&self.hub, Self::NAME, &stop).await? else {
                return Ok(());
            };
            let source = PieceSource::new(hub.clone(), self.cfg.max_leases.get().into());
            drop(gateway.hub.set(Hub {
                source: source.clone(),
                unseals: Arc::new(Unseals::new(hub.clone())),
            }));
            hub_known.cancel();
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
        let ((), followed) = tokio::join!(serving, follow);
        // Their clients are gone, so the walks end at their next block.
        gateway.walks.close();
        gateway.walks.wait().await;
        followed
    }
}
