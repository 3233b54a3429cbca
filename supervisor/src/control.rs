//! The control socket: gRPC over a Unix socket that only this user may open.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lotus_runtime::{CancellationToken, Fault, peer};
use lotus_types::Kind;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Endpoint;
use tonic::{Request as Grpc, Response, Status};

use crate::needs::Asks;
use crate::proto::supervisor_client::SupervisorClient;
use crate::proto::supervisor_server::{Supervisor, SupervisorServer};
use crate::proto::{DrainRequest, ProcessRequest, StatusRequest, StatusResponse, UpgradeRequest};
use crate::runner::{Call, Request};

/// Where the socket is.
pub(crate) fn socket(root: &Path) -> PathBuf {
    root.join("run/supervisor.sock")
}

struct Control {
    calls: mpsc::Sender<Call>,
    asks: Asks,
}

impl Control {
    async fn ask(&self, request: Request) -> Result<Response<StatusResponse>, Status> {
        let (tx, rx) = oneshot::channel();
        let gone = || Status::unavailable("the supervisor is stopping");
        self.calls.send((request, tx)).await.map_err(|_| gone())?;
        let status = rx
            .await
            .map_err(|_| gone())?
            .map_err(Status::invalid_argument)?;
        Ok(Response::new(status))
    }

    /// Asks a process that is to be started what it needs by now, before anything is done to it:
    /// with a wrong configuration the one that runs goes on.
    async fn learn(&self, name: &str) -> Result<(), Status> {
        let name = name.to_owned();
        match self.asks.ask(&name).await {
            Some(Ok(needs)) => self.ask(Request::Needs { name, needs }).await.map(drop),
            Some(Err(unknown)) if unknown.config => Err(Status::failed_precondition(unknown.why)),
            // Asked again when it is spawned.
            Some(Err(_)) | None => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl Supervisor for Control {
    async fn status(&self, _: Grpc<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.ask(Request::Status).await
    }

    async fn start(&self, r: Grpc<ProcessRequest>) -> Result<Response<StatusResponse>, Status> {
        let name = r.into_inner().name;
        self.learn(&name).await?;
        self.ask(Request::Start(name)).await
    }

    async fn stop(&self, r: Grpc<ProcessRequest>) -> Result<Response<StatusResponse>, Status> {
        let ProcessRequest { name, force } = r.into_inner();
        let name = (!name.is_empty()).then_some(name);
        self.ask(Request::Stop { name, force }).await
    }

    async fn restart(&self, r: Grpc<ProcessRequest>) -> Result<Response<StatusResponse>, Status> {
        let ProcessRequest { name, force } = r.into_inner();
        self.learn(&name).await?;
        self.ask(Request::Restart { name, force }).await
    }

    async fn drain(&self, r: Grpc<DrainRequest>) -> Result<Response<StatusResponse>, Status> {
        let DrainRequest {
            name,
            force,
            limit_ms,
        } = r.into_inner();
        let limit = Duration::from_millis(limit_ms).min(LONGEST_DRAIN);
        self.ask(Request::Drain { name, force, limit }).await
    }

    async fn upgrade(&self, r: Grpc<UpgradeRequest>) -> Result<Response<StatusResponse>, Status> {
        let UpgradeRequest { dir, force, back } = r.into_inner();
        self.ask(Request::Upgrade { dir, force, back }).await
    }
}

/// Longest time that a drain may be given.
const LONGEST_DRAIN: Duration = Duration::from_secs(7 * 24 * 3600);

/// Binds the socket. The caller holds the supervisor's lock, so a socket file that is there is a
/// dead one.
pub(crate) fn bind(root: &Path) -> Result<std::os::unix::net::UnixListener, Fault> {
    let path = socket(root);
    if path.exists() {
        std::fs::remove_file(&path)?;
    }
    let listener = std::os::unix::net::UnixListener::bind(&path)
        .map_err(|e| Fault::bind(&path.display(), "--repo", &e))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the socket until `done`, and what is open then for a moment longer.
pub(crate) async fn serve(
    listener: std::os::unix::net::UnixListener,
    calls: mpsc::Sender<Call>,
    asks: Asks,
    done: CancellationToken,
) -> Result<(), Fault> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let ours = nix::unistd::geteuid().as_raw();
    // File permissions are one lock, the peer's credentials a second one.
    let incoming = UnixListenerStream::new(listener).filter(move |stream| match stream {
        Ok(s) => s.peer_cred().is_ok_and(|c| c.uid() == ours || c.uid() == 0) && peer::may_order(s),
        Err(_) => true,
    });
    let served = tonic::transport::Server::builder()
        .timeout(Duration::from_secs(30))
        .add_service(SupervisorServer::new(Control { calls, asks }))
        .serve_with_incoming_shutdown(incoming, done.clone().cancelled_owned());
    // A client that does not hang up must not hold an upgrade.
    let limit = async {
        done.cancelled().await;
        tokio::time::sleep(HANG_UP).await;
    };
    tokio::select! {
        served = served => served.map_err(|e| {
            Fault::new(Kind::Fatal, format!("control socket: {e}"), "report this")
        }),
        () = limit => Ok(()),
    }
}

/// How long open calls are finished once the supervisor ends.
const HANG_UP: Duration = Duration::from_secs(2);

/// A client of the supervisor that runs on `root`.
pub(crate) async fn client(
    root: &Path,
) -> Result<SupervisorClient<tonic::transport::Channel>, Fault> {
    let path = socket(root);
    let dial = path.clone();
    let connector = tower::service_fn(move |_| {
        let dial = dial.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(dial).await?)) }
    });
    let channel = Endpoint::from_static("http://supervisor")
        .connect_timeout(Duration::from_secs(5))
        .timeout(Duration::from_secs(30))
        .connect_with_connector(connector)
        .await
        .map_err(|e| {
            let why =
                std::error::Error::source(&e).map_or_else(|| e.to_string(), |s| s.to_string());
            Fault::new(
                Kind::Transport,
                format!("no supervisor answers on {}: {why}", path.display()),
                "start `lotus-supervisor run`, or name its folder with --repo",
            )
        })?;
    Ok(SupervisorClient::new(channel))
}
