//! Stopping on SIGTERM and SIGINT, and, with more patience, on SIGUSR1.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::Fault;

/// Whether this process was told to drain.
static PATIENT: AtomicBool = AtomicBool::new(false);

/// How long a service that stops may spend on what is open: as configured, or, in a process that
/// was told to drain, for as long as it takes. Whoever told it sets the limit, and ends it with
/// SIGTERM.
#[must_use]
pub fn patience(configured: Duration) -> Duration {
    const NO_LIMIT: Duration = Duration::from_secs(30 * 24 * 3600);
    if PATIENT.load(Ordering::Relaxed) {
        NO_LIMIT
    } else {
        configured
    }
}

/// SIGTERM and SIGINT, from now on: none is lost between two waits.
struct Stops {
    term: Signal,
    int: Signal,
}

impl Stops {
    fn listen() -> Result<Self, Fault> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        let name = tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.int.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "stopping");
    }
}

/// Returns when SIGTERM or SIGINT arrives. Run it beside the work:
/// `select! { _ = signals::wait() => stop.cancel(), ... }`.
pub async fn wait() -> Result<(), Fault> {
    Stops::listen()?.next().await;
    Ok(())
}

/// Runs `work` with a token that is cancelled on the first SIGTERM or SIGINT, or on SIGUSR1: then
/// [`patience`] has no limit. A second SIGTERM or SIGINT ends the wait for `work`.
pub async fn run_until_signal<F, Fut>(work: F) -> Result<(), Fault>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), Fault>>,
{
    let stop = CancellationToken::new();
    let mut stops = Stops::listen()?;
    let mut drain = signal(SignalKind::user_defined1())?;
    let mut work = std::pin::pin!(work(stop.clone()));
    tokio::select! {
        done = &mut work => return done,
        () = stops.next() => {}
        _ = drain.recv() => {
            PATIENT.store(true, Ordering::Relaxed);
            tracing::info!(signal = "SIGUSR1", "draining");
        }
    }
    stop.cancel();
    tokio::select! {
        done = &mut work => done,
        () = stops.next() => {
            tracing::warn!("second signal: not waiting for open work");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, raise};

    // The signals of one process: everything in one test.
    #[tokio::test]
    async fn a_drain_has_no_limit_until_a_stop() {
        let limit = Duration::from_secs(5);
        assert_eq!(patience(limit), limit);
        let (began, begins) = tokio::sync::oneshot::channel();
        let work = run_until_signal(|stop| async move {
            began.send(()).unwrap();
            stop.cancelled().await;
            assert!(patience(limit) > Duration::from_secs(3600));
            raise(Signal::SIGTERM).unwrap();
            std::future::pending().await
        });
        let tell = async {
            begins.await.unwrap();
            raise(Signal::SIGUSR1).unwrap();
        };
        let both = async { tokio::join!(work, tell) };
        let (ended, ()) = tokio::time::timeout(Duration::from_secs(20), both)
            .await
            .unwrap();
        ended.unwrap();
    }
}
