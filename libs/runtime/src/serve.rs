//! An HTTP server for the public: bounded connections, no slow clients, and a drain at the end
//! that breaks no request. It owns its connections: when it is dropped they end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use axum::http::{Request, Version};
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::drain::Activity;
use crate::splice::{Holes, Spliced};
use crate::streams::{self, Streams};
use crate::{PerClient, Share, Tls};

/// Requests that one HTTP/2 connection may have open.
const STREAMS: u32 = 64;
/// How long a kept connection without a request stays open while the server drains: whoever sends
/// one at that moment, not knowing better, gets an answer.
const GRACE: Duration = Duration::from_millis(500);

/// What a client may use up.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Open connections; more wait in the listen queue.
    pub connections: usize,
    /// Time for the headers of a request, idle time before them included.
    pub headers: Duration,
    /// Time in which a client must take something of what is sent to it, in each stream of HTTP/2
    /// too.
    pub stall: Duration,
    /// Time that open requests get at the end.
    pub drain: Duration,
    /// Whether clients may speak HTTP/2 too.
    pub http2: bool,
}

/// What only some servers have.
#[derive(Debug, Clone, Default)]
pub struct Extras {
    /// TLS for every connection; `None`: plain.
    pub tls: Option<Tls>,
    /// Connections that one client may have open; more are closed at once.
    pub per_client: Option<Arc<PerClient>>,
}

/// Serves until stopped. Then it accepts nobody any more, and lets open requests finish. Handlers
/// find the client's address as `ConnectInfo<SocketAddr>`, and [`Holes`] where the kernel can send
/// bytes of files.
pub async fn serve(listener: TcpListener, app: Router, limits: Limits, stop: CancellationToken) {
    serve_with(listener, app, limits, Extras::default(), stop).await;
}

/// [`serve`], with what only some servers have.
pub async fn serve_with(
    listener: TcpListener,
    app: Router,
    limits: Limits,
    extras: Extras,
    stop: CancellationToken,
) {
    let follow = async {
        if let Some(tls) = &extras.tls {
            tls.follow(&stop).await;
        }
    };
    let accept = accept(listener, app, limits, &extras, stop.clone());
    tokio::join!(follow, accept);
}

async fn accept(
    listener: TcpListener,
    app: Router,
    limits: Limits,
    extras: &Extras,
    stop: CancellationToken,
) {
    let builder = builder(&limits);
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut open = JoinSet::new();
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            // What waits in the queue is for the next one.
            biased;
            () = stop.cancelled() => break,
            Some(_) = open.join_next() => continue,
            next = next => next,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of descriptors, or a client that went away: both pass.
                tracing::debug!(error = %e, "connection not accepted");
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let share = extras.per_client.as_ref().map(|all| all.take(peer.ip()));
        if matches!(share, Some(None)) {
            metrics::counter!("lotus_connections_refused_total").increment(1);
            continue;
        }
        let connection = Connection {
            builder: builder.clone(),
            peer,
            app: app.clone(),
            limits,
            stop: stop.clone(),
            _share: share.flatten(),
        };
        let acceptor = extras.tls.as_ref().map(Tls::acceptor);
        open.spawn(async move {
            connection.serve(stream, acceptor).await;
            drop(place);
        });
    }
    drop(listener);
    let all = async { while open.join_next().await.is_some() {} };
    let drain = crate::signals::patience(limits.drain);
    if tokio::time::timeout(drain, all).await.is_err() {
        tracing::warn!(open = open.len(), "open requests are broken off");
    }
    open.shutdown().await;
}

fn builder(limits: &Limits) -> Builder<Streams> {
    let mut builder = Builder::new(Streams {
        patience: limits.stall,
    });
    if !limits.http2 {
        builder = builder.http1_only();
    }
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.headers);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .keep_alive_interval(limits.stall)
        .keep_alive_timeout(limits.stall);
    builder
}

/// A connection that was accepted.
struct Connection {
    builder: Builder<Streams>,
    peer: SocketAddr,
    app: Router,
    limits: Limits,
    stop: CancellationToken,
    /// Of what its client may have.
    _share: Option<Share>,
}

impl Connection {
    /// Serves it to its end.
    async fn serve(self, stream: TcpStream, tls: Option<TlsAcceptor>) {
        if let Err(e) = stream.set_nodelay(true) {
            tracing::debug!(error = %e, "connection without TCP_NODELAY");
        }
        let activity = Activity::new();
        let patience = self.limits.stall;
        let Some(tls) = tls else {
            let holes = Holes::default();
            let stream = Spliced::new(stream, holes.clone());
            let stream = Impatient::new(stream, patience, activity.clone());
            return self.requests(stream, activity, Some(holes)).await;
        };
        let stream = Impatient::new(stream, patience, activity.clone());
        // As long as the headers of a request may take, which wait for it.
        let shaken = tokio::time::timeout(self.limits.headers, tls.accept(stream));
        let shaken = tokio::select! {
            () = quiet(&self.stop, &activity) => return,
            shaken = shaken => shaken,
        };
        match shaken {
            Ok(Ok(stream)) => self.requests(stream, activity, None).await,
            Ok(Err(e)) => tracing::debug!(error = %e, peer = %self.peer, "no TLS"),
            Err(_) => tracing::debug!(peer = %self.peer, "no TLS in time"),
        }
    }

    async fn requests<S>(self, stream: S, activity: Activity, holes: Option<Holes>)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (peer, stop) = (self.peer, self.stop);
        let app = TowerToHyperService::new(self.app);
        let (seen, drains) = (activity.clone(), stop.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let open = seen.request(request.version());
            request.extensions_mut().insert(ConnectInfo(peer));
            if let Some(holes) = holes
                .clone()
                .filter(|_| request.version() < Version::HTTP_2)
            {
                request.extensions_mut().insert(holes);
            }
            let (answer, drains) = (app.call(request), drains.clone());
            async move {
                let answer = streams::watched(answer.await?);
                Ok::<_, std::convert::Infallible>(open.answer(answer, drains.is_cancelled()))
            }
        });
        let stream = TokioIo::new(Opening::new(stream, self.limits.headers));
        let conn = self.builder.serve_connection(stream, service);
        let mut conn = std::pin::pin!(conn);
        let ended = tokio::select! {
            ended = conn.as_mut() => ended,
            () = quiet(&stop, &activity) => {
                conn.as_mut().graceful_shutdown();
                conn.await
            }
        };
        if let Err(e) = ended {
            tracing::debug!(error = %e, %peer, "connection ended early");
        }
    }
}

/// Returns when the server drains and the connection may be told to end.
async fn quiet(stop: &CancellationToken, activity: &Activity) {
    stop.cancelled().await;
    activity.quiet(GRACE).await;
}

/// How a connection of HTTP/2 begins. Source: RFC 9113, 3.4.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream whose reads fail when it takes the peer too long to show which HTTP it speaks: until
/// then nothing else bounds the wait.
struct Opening<S> {
    stream: S,
    /// Until it is known.
    limit: Option<Pin<Box<Sleep>>>,
    /// Bytes of the preface that came so far.
    matched: usize,
}

impl<S> Opening<S> {
    fn new(stream: S, limit: Duration) -> Self {
        Self {
            stream,
            limit: Some(Box::pin(tokio::time::sleep(limit))),
            matched: 0,
        }
    }

    /// Looks at bytes that came before it was known.
    fn look(&mut self, bytes: &[u8]) {
        let rest = &PREFACE[self.matched..];
        let n = bytes.len().min(rest.len());
        self.matched += n;
        if bytes.get(..n) != rest.get(..n) || self.matched == PREFACE.len() {
            self.limit = None;
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Opening<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if let Some(limit) = &mut self.limit {
            if read.is_ready() {
                let new = buf.filled().get(before..).unwrap_or_default();
                self.look(new);
            } else if limit.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Opening<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A stream whose writes fail when the peer takes nothing for too long.
struct Impatient<S> {
    stream: S,
    patience: Duration,
    activity: Activity,
    /// Set while a write waits.
    limit: Option<Pin<Box<Sleep>>>,
}

impl<S> Impatient<S> {
    fn new(stream: S, patience: Duration, activity: Activity) -> Self {
        Self {
            stream,
            patience,
            activity,
            limit: None,
        }
    }

    fn bound<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        self.activity.stuck(write.is_pending());
        if write.is_ready() {
            self.activity.moved();
            self.limit = None;
            return write;
        }
        let limit = self.limit.get_or_insert_with(|| {
            Box::pin(tokio::time::sleep_until(Instant::now() + self.patience))
        });
        ready!(limit.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() {
            self.activity.moved();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let write = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bound(cx, write)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let write = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bound(cx, write)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flush = Pin::new(&mut self.stream).poll_flush(cx);
        self.bound(cx, flush)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shutdown = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.bound(cx, shutdown)
    }
}
