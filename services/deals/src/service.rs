use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hub_proto::{HubClient, HubConfig};
use lotus_dataplane::{DataError, FdServer, OpenToken};
use lotus_journal::{Journal, Machines};
use lotus_runtime::serve::{Extras, Limits, serve_with};
use lotus_runtime::{
    CancellationToken, Cx, Fault, PerClient, Service, addr_file, handed, listen, trace,
};
use lotus_types::{DealKey, Kind};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::DealsConfig;
use crate::effects::is_far;
use crate::engine::{Engine, journal_fault};
use crate::operator::Operator;
use crate::pieces::Pieces;
use crate::staging::Staging;
use crate::{effects, follow, http, mk12, pulled};

/// The deal service: takes proposals, gets the bytes, hands them to the hub, and follows them
/// until the sector is proven.
#[derive(Debug)]
pub struct Deals {
    cfg: DealsConfig,
    hub: HubConfig,
    dir: PathBuf,
    run_dir: PathBuf,
}

impl Deals {
    /// A service that keeps its journal and staging area in `dir`, and publishes its address in
    /// `run_dir`.
    #[must_use]
    pub fn new(cfg: DealsConfig, hub: HubConfig, dir: PathBuf, run_dir: PathBuf) -> Self {
        Self {
            cfg,
            hub,
            dir,
            run_dir,
        }
    }

    /// Port 0 picks a free port, and after a restart the same one if it is still free: clients
    /// have its URL. A socket that was handed over has its port already.
    async fn bind(&self) -> Result<TcpListener, Fault> {
        let wanted = self.cfg.listen;
        if wanted.port() == 0
            && handed(Self::NAME)?.is_none()
            && let Ok(last) = addr_file::read(&self.run_dir, Self::NAME)
            && let Ok(last) = last.parse::<SocketAddr>()
            && last.ip() == wanted.ip()
            && let Ok(listener) = TcpListener::bind(last).await
        {
            return Ok(listener);
        }
        listen(Self::NAME, wanted).await
    }

    fn limits(&self) -> Limits {
        Limits {
            connections: self.cfg.max_connections.get().into(),
            headers: self.cfg.header_patience(),
            stall: Duration::from_secs(self.cfg.transfer_idle_secs),
            drain: Duration::from_secs(self.cfg.drain_secs),
            http2: false,
        }
    }

    async fn engine(&self, data_socket: &std::path::Path) -> Result<Arc<Engine>, Fault> {
        std::fs::create_dir_all(&self.dir)?;
        let journal = Journal::open(&self.dir.join("deals.redb")).map_err(|e| journal_fault(&e))?;
        let staging = Staging::open(&self.dir.join("staging"))?;
        let instance = std::process::id().to_string();
        let hub = HubClient::connect(&self.hub, Self::NAME, &instance, trace::client_interceptor)
            .await
            .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
        let (folder, cfg) = (self.dir.join("pieces"), self.cfg.pieces.clone());
        let pieces = Pieces::open(&folder, cfg, journal.clone())
            .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
        let engine = Engine::new(
            self.cfg.clone(),
            hub,
            Machines::new(journal),
            staging,
            pieces,
            data_socket.display().to_string(),
        )?;
        Ok(Arc::new(engine))
    }
}

impl Service for Deals {
    const NAME: &'static str = "deals";

    async fn run(self, cx: Cx) -> Result<(), Fault> {
        let listener = self.bind().await?;
        // The hub opens the socket by this path, whatever its working directory is.
        let data_socket = std::path::absolute(self.dir.join("data.sock"))?;
        let engine = self.engine(&data_socket).await?;
        let (hub, staged) = (engine.hub.clone(), Arc::new(Staged(engine.clone())));
        let data = FdServer::bind(&data_socket, staged.clone())
            .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
        let addr = listener.local_addr()?;
        let operator = Operator::bind(&self.dir, engine.clone())?;

        // The descriptor server outlives the others, so that a hub that pulls can finish.
        let stop = CancellationToken::new();
        let mut tasks: JoinSet<Result<(), Fault>> = JoinSet::new();
        tasks.spawn(operator.serve(stop.clone()));
        tasks.spawn(follow::events(engine.clone(), stop.clone()));
        tasks.spawn(follow::ticks(
            engine.clone(),
            cx.health.clone(),
            stop.clone(),
        ));
        let mut routes = http::router(engine.clone());
        if self.cfg.mk12.enabled {
            let host = mk12::net::bind(&engine, &self.dir).await?;
            let at = host.address();
            tracing::info!(%at, "deals are taken over libp2p");
            addr_file::write(&self.run_dir, "deals-p2p", &at.to_string())?;
            tasks.spawn(mk12::net::run(host, engine.clone(), stop.clone()));
            routes = routes.merge(mk12::http::router(engine.clone()));
        }
        // Some of them are fetched as the peer that was made above.
        tasks.spawn(effects::run(engine.clone(), stop.clone()));
        // Deals that were accepted are published even if no more are.
        tasks.spawn(mk12::publish::run(engine, stop.clone()));
        let per_client = self.cfg.max_connections_per_client.get().into();
        let extras = Extras {
            per_client: Some(PerClient::new(per_client, self.cfg.trusted_proxies.clone())),
            ..Extras::default()
        };
        let serving = serve_with(listener, routes, self.limits(), extras, stop.clone());
        tasks.spawn(async {
            serving.await;
            Ok(())
        });
        let data_stop = CancellationToken::new();
        let until = data_stop.clone();
        let mut data_task = JoinSet::new();
        if is_far(&hub) {
            data_task.spawn(pulled::serve(hub, staged, until));
        } else {
            data_task.spawn(data.run(until));
        }

        addr_file::write(&self.run_dir, Self::NAME, &addr.to_string())?;
        tracing::info!(%addr, "deals are taken");
        cx.ready.release(addr);

        let mut outcome = tokio::select! {
            () = cx.stop.cancelled() => Ok(()),
            Some(ended) = tasks.join_next() => ended_early(ended),
        };
        stop.cancel();
        let drain = lotus_runtime::signals::patience(Duration::from_secs(self.cfg.drain_secs));
        let drained = tokio::time::timeout(drain, async {
            while let Some(ended) = tasks.join_next().await {
                if let Ok(Err(fault)) = ended {
                    outcome = outcome.clone().and(Err(fault));
                }
            }
        });
        if drained.await.is_err() {
            tracing::warn!(?drain, "open requests are broken off");
        }
        data_stop.cancel();
        drop(tokio::time::timeout(Duration::from_secs(2), data_task.join_next()).await);
        outcome
    }
}

fn ended_early(ended: Result<Result<(), Fault>, tokio::task::JoinError>) -> Result<(), Fault> {
    match ended {
        Ok(Err(fault)) => Err(fault),
        Ok(Ok(())) => Err(Fault::new(
            Kind::Fatal,
            "a part of the service ended by itself",
            "see the log",
        )),
        Err(e) => Err(Fault::new(
            Kind::Fatal,
            format!("a part of the service panicked: {e}"),
            "see the log",
        )),
    }
}

/// Opens staged pieces for the hub.
struct Staged(Arc<Engine>);

#[async_trait::async_trait]
impl OpenToken for Staged {
    async fn open(&self, token: &str, _: Option<&str>) -> Result<(File, u64), DataError> {
        let unknown = || DataError::UnknownToken {
            at: "the staging area of deals".into(),
        };
        let key: DealKey = token.parse().map_err(|_| unknown())?;
        let record = self.0.deals.get(&key).ok().flatten().ok_or_else(unknown)?;
        match File::open(self.0.staging.piece(&key)) {
            Ok(file) => Ok((file, record.proposal.piece.raw_size)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(unknown()),
            Err(e) => Err(DataError::io("opening a staged piece")(e)),
        }
    }
}
