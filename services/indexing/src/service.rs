use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hub_proto::HubConfig;
use lotus_piece_index::{Follower, PieceIndex, PieceSource, connect};
use lotus_runtime::serve::{Limits, serve};
use lotus_runtime::{Cx, Fault, Service, addr_file, listen};
use lotus_types::Kind;

use crate::IndexingConfig;
use crate::ad::Extended;
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
        // Filters of all segments are read, and a command that looks at the files is waited for.
        let (dir, others) = (self.dir.clone(), cfg.extended_providers.clone());
        let open = move || open(&dir, retrieval, &others);
        let broken = |e| Fault::new(Kind::Fatal, format!("no start: {e}"), "see the log");
        let (index, chain) = tokio::task::spawn_blocking(open).await.map_err(broken)??;
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
            verifying: Arc::default(),
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

/// Opens what is on disk.
fn open(
    dir: &Path,
    retrieval: Multiaddr,
    others: &[String],
) -> Result<(PieceIndex, Arc<Chain>), Fault> {
    std::fs::create_dir_all(dir)?;
    let index = PieceIndex::open(&dir.join("index.redb"))?;
    let key = identity::load(&dir.join("identity.key"))?;
    let extended = extended(others, dir)?;
    let path = dir.join("chain.redb");
    let chain = Chain::open(&path, index.clone(), key, retrieval, extended)?;
    Ok((index, Arc::new(chain)))
}

/// Reads the other providers of the configuration, with their keys.
fn extended(texts: &[String], dir: &Path) -> Result<Vec<Extended>, Fault> {
    const KEY: &str = "indexing.extended_providers";
    let mut names = BTreeSet::new();
    let read = |text: &String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let (name, url) = text
            .split_once('=')
            .filter(|(n, _)| !n.is_empty() && *n != "identity" && n.chars().all(plain))
            .filter(|(n, _)| names.insert((*n).to_owned()))
            .ok_or_else(|| {
                Fault::new(
                    Kind::Config,
                    format!("{KEY}: {text:?} is no name and URL, or the name comes twice"),
                    format!("set {KEY} to entries such as cache=https://cache.example"),
                )
            })?;
        Ok(Extended {
            key: identity::load(&dir.join(format!("{name}.key")))?,
            address: Multiaddr::parse(url, KEY)?.text,
        })
    };
    texts.iter().map(read).collect()
}
