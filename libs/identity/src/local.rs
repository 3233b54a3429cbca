//! The hub's socket on its own host. The operator's processes speak as they are; spokes show a
//! certificate, as they do from elsewhere. The first byte tells which: TLS begins with a record of
//! the handshake, HTTP/2 with a letter.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use lotus_runtime::Rates;
use lotus_runtime::peer::is_confined;
use rustix::net::{RecvFlags, recv};
use rustix::process::geteuid;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::listen::{ACCEPT_PAUSE, HANDSHAKES, secure};
use crate::tls::HANDSHAKE_LIMIT;
use crate::{Peer, Secured};

/// First byte of a TLS connection: a record of the handshake. Source: RFC 8446, 5.1.
const TLS: u8 = 22;

/// Connections of those that show nothing, and are told so at each call.
const NOBODIES: usize = 16;

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
pub struct Local {
    stream: Either<UnixStream, Secured<UnixStream>>,
    shown: Shown,
    /// The place of one who shows nothing.
    _place: Option<OwnedSemaphorePermit>,
}

impl Local {
    /// The connection of one who shows a certificate.
    #[must_use]
    pub fn secured(&self) -> Option<&Secured<UnixStream>> {
        match &self.stream {
            Either::Left(_) => None,
            Either::Right(secured) => Some(secured),
        }
    }
}

impl Connected for Local {
    type ConnectInfo = Shown;

    fn connect_info(&self) -> Shown {
        self.shown.clone()
    }
}

impl AsyncRead for Local {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Local {
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

/// Passes on who connects, once it is known what they show, until `stop`. A process that is no
/// operator's may connect `per_second` times, and twice as often at once.
pub async fn accept(
    listener: UnixListener,
    tls: Arc<ServerConfig>,
    per_second: u32,
    to: mpsc::Sender<io::Result<Local>>,
    stop: CancellationToken,
) {
    // Whoever is in a sandbox does not keep an operator waiting.
    let (operators, others) = (room(HANDSHAKES), room(HANDSHAKES));
    let nobodies = room(NOBODIES);
    let rates = Rates::new(per_second);
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
        let operator = stream.peer_cred().is_ok_and(|c| ours(c.uid())) && !is_confined(&stream);
        let (room, place) = match operator {
            true => (&operators, None),
            false => (&others, Some(nobodies.clone())),
        };
        let pid = stream.peer_cred().ok().and_then(|c| c.pid());
        if !operator && !rates.allow(pid, Instant::now()) {
            metrics::counter!("lotus_hub_handshakes_refused_total").increment(1);
            continue;
        }
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::debug!("too many processes connect at once");
            continue;
        };
        let (tls, to) = (tls.clone(), to.clone());
        handshakes.spawn(async move {
            let _permit = permit;
            match look(tls, stream, place).await {
                // Nobody takes it when the hub stops.
                Ok(local) => to.send(Ok(local)).await.unwrap_or_default(),
                Err(e) => tracing::debug!(error = %e, "refused a process of this host"),
            }
        });
    }
}

/// Waits for what shows who it is. `nobodies` has the places of those who show nothing; None for
/// an operator.
async fn look(
    tls: Arc<ServerConfig>,
    stream: UnixStream,
    nobodies: Option<Arc<Semaphore>>,
) -> io::Result<Local> {
    let first = tokio::time::timeout(HANDSHAKE_LIMIT, first_byte(&stream)).await;
    if first.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))? == TLS {
        let secured = secure(tls, stream, None).await?;
        return Ok(Local {
            shown: Shown::Certificate(secured.peer().clone()),
            stream: Either::Right(secured),
            _place: None,
        });
    }
    let place = nobodies.map(Semaphore::try_acquire_owned).transpose();
    let place = place.map_err(|_| io::Error::other("too many without a certificate"))?;
    Ok(Local {
        shown: match place {
            Some(_) => Shown::Nothing,
            None => Shown::Operator,
        },
        stream: Either::Left(stream),
        _place: place,
    })
}

fn room(places: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(places))
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
