use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hub_proto::HubConfig;
use lotus_piece_index::{Follower, PieceIndex, PieceSource, connect};
use lotus_runtime::serve::{Limits, serve};
use lotus_runtime::{Cx, Fault, Service, addr_file, listen};

use tokio::sync::Mutex;

use crate::IndexingConfig;
use crate::addr::Multiaddr;
use crate::chain::Chain;
use crate::control::{Control, SOCKET};
use crate::{announce, http_api, identity};

/// Pieces that are kept open: as many as are indexed at once, and some to come back to.
const LEASES: usize = 8;

/// The indexing spoke.
#[derive(Debug)]
pub struct Indexing {
    cfg: IndexingConfig,
    hub: HubConfig,
    dir: PathBuf,
    run_dir: PathBuf,
}

impl Indexing {
    /// A spoke that keeps its state under `dir` and writes its address to `run_dir`.
    #[must_use]
    pub fn new(cfg: IndexingConfig, hub: HubConfig, dir: PathBuf, run_dir: PathBuf) -> Self {
        Self {
            cfg,
            hub,
            dir,
            run_dir,
        }
    }
}

impl Service for Indexing {
    const NAME: &'static str = "indexing";

    async fn run(self, cx: Cx) -> Result<(), Fault> {
        let Cx {
            ready,
            stop,
            health,
        } = cx;
        let cfg = self.cfg;
        let retrieval = Multiaddr::parse(&cfg.retrieval_url, "indexing.retrieval_url")?;
        let announce_urls = announce::urls(&cfg.announce_urls)?;
        let listener = listen(Self::NAME, cfg.listen).await?;
        let addr = listener.local_addr()?;
        let publisher = match cfg.publisher_url.as_str() {
            "" => Multiaddr::parse(&format!("http://{addr}"), "indexing.listen")?,
            url => Multiaddr::parse(url, "indexing.publisher_url")?,
        };
        std::fs::create_dir_all(&self.dir)?;
        let index = PieceIndex::open(&self.dir.join("index.redb"))?;
        let key = identity::load(&self.dir.join("identity.key"))?;
        let chain = Chain::open(&self.dir.join("chain.redb"), index.clone(), key, retrieval)?;
        let chain = Arc::new(chain);
        addr_file::write(&self.run_dir, Self::NAME, &addr.to_string())?;
        let limits = Limits {
            connections: cfg.max_connections.get().into(),
            headers: Duration::from_secs(cfg.header_secs),
            stall: Duration::from_secs(cfg.stall_secs),
            http2: true,
            drain: Duration::from_secs(cfg.drain_secs),
        };
        let app = http_api::router(chain.clone(), index.clone(), cfg.max_requests.get().into());
        let control = Control {
            index: index.clone(),
            chain: chain.clone(),
            publisher: publisher.clone(),
            announce_urls: announce_urls.clone(),
            verifying: Mutex::default(),
        };
        let socket = self.dir.join(SOCKET);
        // Either part ends the others: lookups that follow nothing would go stale unseen.
        let stop = stop.child_token();
        let follow = async {
            let Some(hub) = connect(&self.hub, Self::NAME, &stop).await? else {
                return Ok(());
            };
            let source = PieceSource::new(hub.clone(), LEASES);
            let component = "indexing.index";
            let follower = Follower::new(hub, index, source, chain.clone(), health, component);
            let listed = || {
                tracing::info!(%addr, provider = chain.provider(), "lookups are answered");
                ready.release(addr);
            };
            follower.run(listed, stop.clone()).await
        };
        let follow = async {
            let ended = follow.await;
            stop.cancel();
            ended
        };
        let control = async {
            let ended = control.serve(&socket, stop.clone()).await;
            stop.cancel();
            ended
        };
        let ((), followed, announced, controlled) = tokio::join!(
            serve(listener, app, limits, stop.clone()),
            follow,
            announce::run(chain.clone(), publisher, announce_urls, stop.clone()),
            control,
        );
        followed.and(announced).and(controlled)
    }
}
