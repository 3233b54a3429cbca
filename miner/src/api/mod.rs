//! The hub API over gRPC: checks what comes in, asks the parts of the hub, tells errors by kind.

mod access;
mod audit;
mod chain;
mod credentials;
mod hub;
mod market;
mod pieces;
mod quotas;
mod sectors;
mod unsealed;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use hub_proto::v1::capacity_server::CapacityServer;
use hub_proto::v1::chain_server::ChainServer;
use hub_proto::v1::credentials_server::CredentialsServer;
use hub_proto::v1::events_server::EventsServer;
use hub_proto::v1::hub_server::HubServer;
use hub_proto::v1::pieces_server::PiecesServer;
use hub_proto::v1::sectors_server::SectorsServer;
use hub_proto::v1::unsealed_server::UnsealedServer;
use hub_proto::v1::{ProvingState, SafeToRestartResponse, SectorInfo};
use hub_proto::{status, with_code};
use lotus_dataplane::{PULL_ALPN, http_router};
use lotus_identity::{dial, listen, local};
use lotus_journal::JournalError;
use lotus_messages::Sender;
use lotus_node_client::{Node, NodeError};
use lotus_runtime::{Fault, addr_file, trace};
use lotus_types::{ActorId, Generation, Kind, SectorSize};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::{Code, Response, Status};

use crate::capacity::Capacity;
use crate::config::ApiConfig;
use crate::events::EventLog;
use crate::owner::Published;
use crate::pieces::{Pieces, Placer};
use crate::unsealed::Unsealed;
pub use access::Access;
pub use audit::Recorder;
pub(crate) use audit::recorded;
pub(crate) use credentials::identified;
pub(crate) use pieces::piece_state;

/// Streams that one connection may hold.
const MAX_STREAMS: u32 = 256;
/// Connections that have shown who they are and wait to be served.
const WAITING: usize = 64;
/// HTTP/2 pings that find dead connections.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Entries of a list in one answer.
pub(crate) const MAX_PAGE: u32 = 1_000;

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Answer<Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>>;

/// Metadata of a `SafeToRestart` that is asked to show the answer. Any other comes from somebody
/// who waits to restart the hub.
pub(crate) const ONLY_LOOKS: &str = "lotus-only-looks";

/// The sectors, for reading.
pub trait SectorBook: Send + Sync + 'static {
    /// Sectors with a number above `after`.
    fn list(&self, after: Option<u64>, limit: usize) -> Result<Vec<SectorInfo>, JournalError>;
    /// One sector, with its log if wanted.
    fn get(&self, number: u64, log: bool) -> Result<Option<SectorInfo>, JournalError>;
}

/// What a restart would interrupt.
pub trait Safety: Send + Sync + 'static {
    /// Whether the hub may be stopped now.
    fn safe_to_restart(&self) -> SafeToRestartResponse;
    /// Ends when a proof or a block is begun or done after this call.
    fn changed(&self) -> BoxFuture<'static, ()>;
    /// The proofs that are being made: now, and at each change.
    fn proving(&self) -> BoxStream<'static, ProvingState>;
    /// Somebody asks because the hub is to be restarted, and not to look.
    fn restart_is_wished(&self) {}
}

/// What the services need. Clones share it.
#[derive(Clone)]
pub struct Api {
    /// The miner.
    pub actor: ActorId,
    /// Size of its sectors.
    pub sector_size: SectorSize,
    /// Of this start.
    pub generation: Generation,
    /// The data plane on this host.
    pub data_socket: PathBuf,
    /// Hand-offs.
    pub pieces: Arc<Pieces>,
    /// Places of pieces.
    pub placer: Arc<dyn Placer>,
    /// Room.
    pub capacity: Arc<Capacity>,
    /// Leases.
    pub unsealed: Arc<Unsealed>,
    /// Events.
    pub events: EventLog,
    /// Sectors.
    pub sectors: Arc<dyn SectorBook>,
    /// Safety of a restart.
    pub safety: Arc<dyn Safety>,
    /// The chain.
    pub node: Node,
    /// Sends messages.
    pub sender: Sender,
    /// Epochs that must lie on a message before a spoke is told that it landed.
    pub confidence: u64,
    /// Who has published which deals.
    pub published: Published,
    /// Who may call.
    pub access: Access,
    /// Where it is written down who changed what.
    pub recorder: Recorder,
    /// Ends streams.
    pub stop: CancellationToken,
}

impl Api {
    /// Every service, with reflection, and the bytes of pieces.
    pub fn routes(&self, cfg: &ApiConfig) -> Result<Routes, Fault> {
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(hub_proto::DESCRIPTORS)
            .build_v1()
            .map_err(|e| Fault::new(Kind::Fatal, format!("gRPC reflection: {e}"), "report this"))?;
        let max = cfg.max_request_bytes;
        let bytes = Routes::from(http_router(self.unsealed.clone()));
        Ok(bytes
            .add_service(reflection)
            .add_service(HubServer::new(self.clone()).max_decoding_message_size(max))
            .add_service(CapacityServer::new(self.clone()).max_decoding_message_size(max))
            .add_service(PiecesServer::new(self.clone()).max_decoding_message_size(max))
            .add_service(SectorsServer::new(self.clone()).max_decoding_message_size(max))
            .add_service(UnsealedServer::new(self.clone()).max_decoding_message_size(max))
            .add_service(EventsServer::new(self.clone()).max_decoding_message_size(max))
            .add_service(ChainServer::new(self.clone()).max_decoding_message_size(max))
            .add_service(CredentialsServer::new(self.clone()).max_decoding_message_size(max)))
    }
}

/// The bound listeners of the API.
#[derive(Debug)]
pub struct Listeners {
    tcp: TcpListener,
    unix: UnixListener,
    addr: SocketAddr,
}

impl Listeners {
    /// Binds TCP and the Unix socket, and writes `run/api.addr`.
    pub async fn bind(cfg: &ApiConfig, socket: &Path, run_dir: &Path) -> Result<Self, Fault> {
        let tcp = TcpListener::bind(cfg.listen)
            .await
            .map_err(|e| Fault::bind(&cfg.listen, "api.listen", &e))?;
        let addr = tcp.local_addr()?;
        let unix = bind_unix(socket)?;
        addr_file::write(run_dir, "api", &addr.to_string())?;
        Ok(Self { tcp, unix, addr })
    }

    /// The TCP address.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `stop`.
    pub async fn serve(
        self,
        api: &Api,
        cfg: &ApiConfig,
        stop: CancellationToken,
    ) -> Result<(), Fault> {
        let routes = api.routes(cfg)?;
        // Calls over HTTP/2, bytes of pieces over HTTP/1.1, which costs a third as much.
        let tls =
            Arc::new(
                api.access
                    .authority()
                    .server_config(&[b"h2", b"http/1.1", PULL_ALPN])?,
            );
        let (to, shaken) = mpsc::channel(WAITING);
        let each = cfg.handshakes_per_second;
        let dialed = dial(cfg.dial.clone(), tls.clone(), to.clone(), stop.clone());
        let remote = listen::accept(self.tcp, tls.clone(), each, "spoke", to, stop.clone());
        let (access, pieces) = (api.access.clone(), api.pieces.clone());
        let incoming = ReceiverStream::new(shaken).filter_map(move |shaken| {
            let stream = shaken.ok().filter(|s| access.admit(s))?;
            if stream.alpn() != Some(PULL_ALPN) {
                return Some(Ok::<_, std::io::Error>(stream));
            }
            // This side asks on it.
            if let Some(spoke) = access.offers(stream.peer()) {
                pieces.far().put(&spoke, stream);
            }
            None
        });
        let tcp = server(cfg)
            .layer(api.access.clone())
            .layer(api.recorder.clone())
            .add_routes(routes.clone())
            .serve_with_incoming_shutdown(incoming, stop.cancelled());
        let (to, looked) = mpsc::channel(WAITING);
        let local = local::accept(self.unix, tls, each, to, stop.clone());
        let access = api.access.clone();
        let incoming = ReceiverStream::new(looked)
            .filter(move |s| s.as_ref().is_ok_and(|s| access.admit_local(s)));
        let unix = server(cfg)
            .layer(api.access.clone())
            .layer(api.recorder.clone())
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, stop.cancelled());
        let helpers = async {
            tokio::join!(remote, dialed, local, api.access.clone().run(stop.clone()));
            // They end on a stop; what is being served then is served to its end.
            std::future::pending().await
        };
        let served = tokio::select! {
            served = async { tokio::try_join!(tcp, unix) } => served,
            never = helpers => never,
        };
        served
            .map(|_| ())
            .map_err(|e| Fault::new(Kind::Fatal, format!("hub API: {e}"), "see the log"))
    }
}

/// Binds a Unix socket for this user alone. The repo's lock says that who was there is dead.
pub(crate) fn bind_unix(path: &Path) -> Result<UnixListener, Fault> {
    use std::os::unix::fs::PermissionsExt as _;
    let bind = || {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    bind().map_err(|e| {
        Fault::new(
            Kind::Config,
            format!("can not listen on {}: {e}", path.display()),
            "put the repo on a file system with Unix sockets, at a path of under 90 bytes",
        )
    })
}

/// A server with this API's limits.
fn server(cfg: &ApiConfig) -> Server {
    Server::builder()
        .accept_http1(true)
        .timeout(cfg.call())
        .concurrency_limit_per_connection(cfg.calls_per_connection)
        .max_concurrent_streams(Some(MAX_STREAMS))
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .trace_fn(|request| {
            let span = tracing::info_span!("hub_api", call = request.uri().path());
            trace::set_parent(&span, &trace::from_headers(request.headers()));
            span
        })
}

// ---- errors

fn not_found(what: impl Into<String>, fix: &str) -> Status {
    with_code(Code::NotFound, Kind::Data, what, fix, None)
}

fn not_yours(what: impl Into<String>, fix: &str) -> Status {
    with_code(Code::AlreadyExists, Kind::Data, what, fix, None)
}

fn invalid(what: impl Into<String>, fix: impl Into<String>) -> Status {
    status(Kind::Data, what, fix, None)
}

fn from_journal(e: &JournalError) -> Status {
    status(e.kind(), e.to_string(), e.fix(), None)
}

fn from_node(e: &NodeError) -> Status {
    // The node's credentials are the hub's affair: to a spoke they are an outage.
    let kind = match e.kind() {
        Kind::Config => Kind::Transport,
        kind => kind,
    };
    status(kind, e.to_string(), e.fix(), None)
}
