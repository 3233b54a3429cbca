//! Downloads from a peer: HTTP, over streams of libp2p. The client is the usual one; it connects to
//! a socket here, and each of its connections becomes a stream.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lotus_p2p::{Dialed, Keypair, Opener, P2pError, PeerAddress};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use crate::engine::Engine;
use crate::source;

/// The protocol. Source: Boost, transport/types, DataTransferProtocol.
const PROTOCOL: &str = "/fil/storage/transfer/1.0.0";
/// How URLs of such transfers begin; a multiaddress follows.
pub(crate) const SCHEME: &str = "libp2p://";

static SOCKETS: AtomicU64 = AtomicU64::new(0);

/// Why there is no way to a peer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error(transparent)]
    P2p(#[from] P2pError),
    #[error("a socket for the transfer: {0}")]
    Socket(#[from] std::io::Error),
    #[error("HTTP client: {0}")]
    Client(#[from] reqwest::Error),
}

/// An HTTP client whose connections all lead to one peer, as long as this lives.
pub(crate) struct PeerClient {
    pub(crate) http: reqwest::Client,
    /// What to ask for: the peer has one file for each token.
    pub(crate) url: String,
    socket: PathBuf,
    _streams: JoinSet<()>,
}

impl PeerClient {
    /// Dials the peer. The socket is made in `dir`; who connects to it reaches that peer alone.
    pub(crate) async fn connect(
        dir: &Path,
        key: Keypair,
        to: &PeerAddress,
        patience: Duration,
    ) -> Result<Self, PeerError> {
        let dialed = Dialed::connect(key, to, patience).await?;
        let number = SOCKETS.fetch_add(1, Ordering::Relaxed);
        let socket = dir.join(format!("peer-{number}.sock"));
        // That of an earlier process.
        drop(std::fs::remove_file(&socket));
        let listener = UnixListener::bind(&socket)?;
        let opener = dialed.opener(PROTOCOL);
        let mut streams = JoinSet::new();
        streams.spawn(async move {
            // The connection is kept as long as somebody may want a stream.
            let _dialed = dialed;
            bridge(listener, opener).await;
        });
        let http = lotus_runtime::http_client()
            .unix_socket(socket.as_path())
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()?;
        Ok(Self {
            http,
            url: format!("http://{}/", to.peer),
            socket,
            _streams: streams,
        })
    }
}

impl Drop for PeerClient {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.socket));
    }
}

/// Makes a stream of each connection. The client has as many as it fetches ranges at once.
async fn bridge(listener: UnixListener, opener: Opener) {
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = open.join_next() => {}
            accepted = listener.accept() => {
                let Ok((mut local, _)) = accepted else { return };
                let mut opener = opener.clone();
                open.spawn(async move {
                    match opener.open().await {
                        // An end of either side ends both: the client sees what it lacks.
                        Ok(mut remote) => {
                            drop(tokio::io::copy_bidirectional(&mut local, &mut remote).await);
                        }
                        Err(e) => tracing::info!(%e, "no stream for a transfer"),
                    }
                });
            }
        }
    }
}

impl Engine {
    /// The client for a URL of a transfer over libp2p; none for other URLs.
    pub(crate) async fn peer_client(&self, url: &str) -> Result<Option<PeerClient>, String> {
        let Some(peer) = url.strip_prefix(SCHEME) else {
            return Ok(None);
        };
        let to =
            source::check_peer(peer, self.cfg.allow_private_sources).map_err(|e| e.to_string())?;
        let Some(key) = self.mk12.key.get() else {
            return Err("deals.mk12 is not enabled any more".into());
        };
        let dir = Path::new(&self.data_socket)
            .parent()
            .unwrap_or(Path::new("."));
        let patience = Duration::from_secs(self.cfg.transfer_idle_secs.max(1));
        let client = PeerClient::connect(dir, key.clone(), &to, patience).await;
        client.map(Some).map_err(|e| e.to_string())
    }
}
