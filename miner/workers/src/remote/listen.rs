//! The hub's port for workers on other hosts.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use lotus_runtime::{Fault, addr_file};
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::identity::{Authority, WorkerName};

/// How long a peer may take to say who it is.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Peers that are saying who they are at the same time.
const HANDSHAKES: usize = 64;
/// Wait after an error of the listener itself, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Binds the address and tells it in `run/workers.addr`.
pub(crate) async fn bind(addr: SocketAddr, run_dir: &Path) -> Result<TcpListener, Fault> {
    let listener = TcpListener::bind(addr)
        .await
        .map_err(|e| Fault::bind(&addr, "workers.listen", &e))?;
    addr_file::write(run_dir, "workers", &listener.local_addr()?.to_string())?;
    Ok(listener)
}

/// Who is at the other end of a connection. The handshake has checked that the certificate is of
/// our authority; whether it counts is looked up at each call, so that revoking takes effect at
/// once.
#[derive(Clone)]
pub(crate) struct Peer {
    authority: Arc<Authority>,
    certificate: CertificateDer<'static>,
    pub(crate) addr: SocketAddr,
}

impl Peer {
    /// The worker, if its certificate counts now.
    pub(crate) fn worker(&self) -> Result<WorkerName, String> {
        self.authority.worker(&self.certificate)
    }
}

/// A connection with a client's certificate.
pub(crate) struct Secured {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

impl Connected for Secured {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Shakes hands with whoever connects, and passes on those of our authority, until `stop`.
pub(crate) async fn accept(
    listener: TcpListener,
    authority: Arc<Authority>,
    acceptor: TlsAcceptor,
    to: mpsc::Sender<io::Result<Secured>>,
    stop: CancellationToken,
) {
    let room = Arc::new(Semaphore::new(HANDSHAKES));
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = async {
                let permit = room.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        let (permit, (tcp, addr)) = match accepted {
            (Ok(permit), Ok(tcp)) => (permit, tcp),
            (_, Err(e)) => {
                tracing::warn!(error = %e, "can not accept a worker");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
            // The semaphore is never closed.
            (Err(_), _) => return,
        };
        let (acceptor, authority, to) = (acceptor.clone(), authority.clone(), to.clone());
        handshakes.spawn(async move {
            let _permit = permit;
            let shaken = tokio::time::timeout(HANDSHAKE_LIMIT, handshake(&acceptor, tcp)).await;
            match shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok((stream, certificate)) => {
                    let peer = Peer {
                        authority,
                        certificate,
                        addr,
                    };
                    // Nobody takes it when the hub stops.
                    to.send(Ok(Secured { stream, peer }))
                        .await
                        .unwrap_or_default();
                }
                Err(e) => tracing::warn!(%addr, error = %e, "refused a connection of a worker"),
            }
        });
    }
}

async fn handshake(
    acceptor: &TlsAcceptor,
    tcp: TcpStream,
) -> io::Result<(TlsStream<TcpStream>, CertificateDer<'static>)> {
    tcp.set_nodelay(true)?;
    let stream = acceptor.accept(tcp).await?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(|c| c.clone().into_owned())
        .ok_or_else(|| io::Error::other("no certificate"))?;
    Ok((stream, certificate))
}
