//! Faults of the connection itself, on command: everything cut at once, nothing accepted for a
//! while, every answer late.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Time for the answer to a command that cuts its own connection.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// Stands between the listener and its connections.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    asked: Notify,
    delay_ms: AtomicU64,
    failing: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Cancelled to cut the connections accepted so far.
    cut: CancellationToken,
    closed_until: Option<Instant>,
    pending: Option<Duration>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts every connection in a moment, and refuses new ones for this long.
    pub(crate) fn drop_connections(&self, down: Duration) {
        self.state().pending = Some(down);
        self.asked.notify_one();
    }

    /// Delays every answer.
    pub(crate) fn set_delay(&self, delay: Duration) {
        let ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.delay_ms.store(ms, Ordering::Relaxed);
    }

    /// Lets the next calls fail.
    pub(crate) fn fail_calls(&self, count: u64) {
        self.failing.store(count, Ordering::Relaxed);
    }

    /// Whether this call is one of those that fail.
    pub(crate) fn fails(&self) -> bool {
        let one_less = |n: u64| n.checked_sub(1);
        self.failing
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less)
            .is_ok()
    }

    /// Waits as [`Gate::set_delay`] says.
    pub(crate) async fn delay(&self) {
        let ms = self.delay_ms.load(Ordering::Relaxed);
        if ms > 0 {
            sleep(Duration::from_millis(ms)).await;
        }
    }

    /// Carries the commands out, for ever.
    pub(crate) async fn run(&self) {
        loop {
            self.asked.notified().await;
            sleep(LAST_WORDS).await;
            let mut state = self.state();
            if let Some(down) = state.pending.take() {
                state.closed_until = Some(Instant::now() + down);
                std::mem::take(&mut state.cut).cancel();
            }
        }
    }

    fn admit(&self) -> Option<CancellationToken> {
        let mut state = self.state();
        match state.closed_until {
            Some(t) if Instant::now() < t => None,
            _ => {
                state.closed_until = None;
                Some(state.cut.clone())
            }
        }
    }
}

/// A listener behind a gate.
pub(crate) struct GatedListener {
    pub(crate) tcp: TcpListener,
    pub(crate) gate: Arc<Gate>,
}

impl Listener for GatedListener {
    type Io = GatedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (GatedStream, SocketAddr) {
        loop {
            // axum's own listener logs and retries failed accepts.
            let (tcp, addr) = Listener::accept(&mut self.tcp).await;
            let Some(cut) = self.gate.admit() else {
                continue;
            };
            if let Err(e) = tcp.set_nodelay(true) {
                tracing::debug!(%e, "no TCP_NODELAY");
            }
            let cut = Box::pin(cut.cancelled_owned());
            return (GatedStream { tcp, cut }, addr);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// A connection that the gate can cut.
pub(crate) struct GatedStream {
    tcp: TcpStream,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl GatedStream {
    fn tcp(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Result<Pin<&mut TcpStream>, io::Error> {
        let this = self.get_mut();
        match this.cut.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionReset.into()),
            Poll::Pending => Ok(Pin::new(&mut this.tcp)),
        }
    }
}

impl AsyncRead for GatedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.tcp(cx)?.poll_read(cx, buf)
    }
}

impl AsyncWrite for GatedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.tcp(cx)?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp(cx)?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp(cx)?.poll_shutdown(cx)
    }
}
