//! The hub's ports: connections whose peers have shown a certificate.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use lotus_runtime::{Rates, client};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::outgoing::keep_alive;
use crate::tls::HANDSHAKE_LIMIT;

/// Peers that are saying who they are at the same time.
pub(crate) const HANDSHAKES: usize = 64;
/// Wait after an error of the listener itself, such as too many open files.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Rest after connections that were refused, once nobody waits any more: those that come meanwhile are
/// taken together, so that a flood of them wakes the hub a hundred times a second and no more.
const REST: Duration = Duration::from_millis(10);

/// Who is at the other end of a connection. The handshake has verified that the certificate is of
/// the authority, and that the peer has its key; whether it counts is to be asked at each call.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The certificate that it showed.
    pub certificate: CertificateDer<'static>,
    /// Where it connected from. None: this host, by a socket with a path.
    pub addr: Option<SocketAddr>,
}

/// A connection with a client's certificate.
#[derive(Debug)]
pub struct Secured<S = TcpStream> {
    stream: TlsStream<S>,
    peer: Peer,
    end: DropGuard,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Secured<S> {
    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The protocol that the peer chose.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.stream.get_ref().1.alpn_protocol()
    }

    /// Closes the connection when it is cancelled, and is cancelled when the connection is closed.
    pub fn end(&self) -> CancellationToken {
        self.end.token().clone()
    }
}

impl<S> Connected for Secured<S> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Secured<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.ended.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Secured<S> {
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

/// Shakes hands with whoever connects, and passes on those with a certificate that `tls` takes,
/// until `stop`. `whom` the port is for is said in the log. An address may begin `per_second`
/// handshakes, and twice as many at once: each costs as much as many calls.
pub async fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    per_second: u32,
    whom: &'static str,
    to: mpsc::Sender<io::Result<Secured>>,
    stop: CancellationToken,
) {
    let room = Arc::new(Semaphore::new(HANDSHAKES));
    let rates = Rates::new(per_second);
    let mut handshakes = JoinSet::new();
    let mut refused = false;
    loop {
        while handshakes.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = async {
                let permit = room.clone().acquire_owned().await;
                if std::mem::take(&mut refused) {
                    tokio::select! {
                        biased;
                        waiting = listener.accept() => {
                            refused = true;
                            return (permit, waiting);
                        }
                        () = std::future::ready(()) => tokio::time::sleep(REST).await,
                    }
                }
                (permit, listener.accept().await)
            } => accepted,
        };
        let (permit, (tcp, addr)) = match accepted {
            (Ok(permit), Ok(tcp)) => (permit, tcp),
            (_, Err(e)) => {
                tracing::warn!(error = %e, "can not accept a {whom}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
            // The semaphore is never closed.
            (Err(_), _) => return,
        };
        if !rates.allow(client(addr.ip()), Instant::now()) {
            metrics::counter!("lotus_hub_handshakes_refused_total").increment(1);
            refused = true;
            continue;
        }
        let (tls, to) = (tls.clone(), to.clone());
        handshakes.spawn(async move {
            let _permit = permit;
            let set = tcp.set_nodelay(true).and_then(|()| keep_alive(&tcp));
            let shaken = match set {
                Ok(()) => secure(tls, tcp, Some(addr)).await,
                Err(e) => Err(e),
            };
            match shaken {
                // Nobody takes it when the hub stops.
                Ok(secured) => to.send(Ok(secured)).await.unwrap_or_default(),
                Err(e) => tracing::warn!(%addr, error = %e, "refused a connection of a {whom}"),
            }
        });
    }
}

/// Shakes hands, as the hub, over one connection, whoever dialed it.
pub async fn secure<S: AsyncRead + AsyncWrite + Unpin>(
    tls: Arc<ServerConfig>,
    stream: S,
    addr: Option<SocketAddr>,
) -> io::Result<Secured<S>> {
    let shaking = TlsAcceptor::from(tls).accept(stream);
    let shaken = tokio::time::timeout(HANDSHAKE_LIMIT, shaking).await;
    let stream = shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(|c| c.clone().into_owned())
        .ok_or_else(|| io::Error::other("no certificate"))?;
    let end = CancellationToken::new();
    Ok(Secured {
        stream,
        peer: Peer { certificate, addr },
        ended: Box::pin(end.clone().cancelled_owned()),
        end: end.drop_guard(),
    })
}
