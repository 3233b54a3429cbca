//! The hub's socket on its own host. The operator's processes speak as they are; spokes show a
//! certificate, as they do from elsewhere. The first byte tells which: TLS begins with a record of
//! the handshake, HTTP/2 with a letter.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use lotus_runtime::peer::may_order;
use rustix::net::{RecvFlags, recv};
use rustix::process::geteuid;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::listen::{ACCEPT_PAUSE, HANDSHAKES, secure};
use crate::tls::HANDSHAKE_LIMIT;
use crate::{Peer, Secured};

/// First byte of a TLS connection: a record of the handshake. Source: RFC 8446, 5.1.
const TLS: u8 = 22;

/// What somebody on this host shows.
#[derive(Clone, Debug)]
pub enum Shown {
    /// A certificate, as from another host.
    Certificate(Peer),
    /// Nothing, and need not: it is of the hub's user, and in no sandbox.
    Operator,
    /// Nothing, from a sandbox.
    Nothing,
}

/// A connection to the socket.
#[derive(Debug)]
pub enum Local {
    /// As it is.
    Plain(UnixStream, Shown),
    /// With a certificate.
    Secured(Secured<UnixStream>),
}

impl Connected for Local {
    type ConnectInfo = Shown;

    fn connect_info(&self) -> Shown {
        match self {
            Self::Plain(_, shown) => shown.clone(),
            Self::Secured(stream) => Shown::Certificate(stream.peer().clone()),
        }
    }
}

impl AsyncRead for Local {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream, _) => Pin::new(stream).poll_read(cx, buf),
            Self::Secured(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Local {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream, _) => Pin::new(stream).poll_write(cx, buf),
            Self::Secured(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream, _) => Pin::new(stream).poll_flush(cx),
            Self::Secured(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream, _) => Pin::new(stream).poll_shutdown(cx),
            Self::Secured(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Passes on who connects, once it is known what they show, until `stop`.
pub async fn accept(
    listener: UnixListener,
    tls: Arc<ServerConfig>,
    to: mpsc::Sender<io::Result<Local>>,
    stop: CancellationToken,
) {
    let room = || Arc::new(Semaphore::new(HANDSHAKES));
    // Whoever is in a sandbox does not keep an operator waiting.
    let (operators, others) = (room(), room());
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                tracing::warn!(error = %e, "can not accept a process of this host");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Spokes that are users of their own may open the socket too.
        let ours = |uid: u32| uid == 0 || uid == geteuid().as_raw();
        let operator = stream.peer_cred().is_ok_and(|c| ours(c.uid())) && may_order(&stream);
        let shown = if operator {
            Shown::Operator
        } else {
            Shown::Nothing
        };
        let room = match shown {
            Shown::Operator => &operators,
            _ => &others,
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::debug!("too many processes connect at once");
            continue;
        };
        let (tls, to) = (tls.clone(), to.clone());
        handshakes.spawn(async move {
            let _permit = permit;
            match look(tls, stream, shown).await {
                // Nobody takes it when the hub stops.
                Ok(local) => to.send(Ok(local)).await.unwrap_or_default(),
                Err(e) => tracing::debug!(error = %e, "refused a process of this host"),
            }
        });
    }
}

async fn look(tls: Arc<ServerConfig>, stream: UnixStream, shown: Shown) -> io::Result<Local> {
    let first = tokio::time::timeout(HANDSHAKE_LIMIT, first_byte(&stream)).await;
    match first.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))? {
        TLS => secure(tls, stream, None).await.map(Local::Secured),
        _ => Ok(Local::Plain(stream, shown)),
    }
}

/// The first byte that comes, which stays to be read.
async fn first_byte(stream: &UnixStream) -> io::Result<u8> {
    let mut byte = [0];
    let (_, read) = stream
        .async_io(Interest::READABLE, || {
            Ok(recv(stream, &mut byte, RecvFlags::PEEK)?)
        })
        .await?;
    if read == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(byte[0])
}
