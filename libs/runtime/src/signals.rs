//! Stopping on SIGTERM and SIGINT.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::Fault;

/// Returns when SIGTERM or SIGINT arrives. Run it beside the work:
/// `select! { _ = signals::wait() => stop.cancel(), ... }`.
pub async fn wait() -> Result<(), Fault> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let name = tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    };
    tracing::info!(signal = name, "stopping");
    Ok(())
}

/// Runs `work` with a token that is cancelled on the first SIGTERM or SIGINT. A second signal
/// ends the wait for `work`.
pub async fn run_until_signal<F, Fut>(work: F) -> Result<(), Fault>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = Result<(), Fault>>,
{
    let stop = CancellationToken::new();
    let mut work = std::pin::pin!(work(stop.clone()));
    tokio::select! {
        done = &mut work => return done,
        signal = wait() => signal?,
    }
    stop.cancel();
    tokio::select! {
        done = &mut work => done,
        signal = wait() => {
            signal?;
            tracing::warn!("second signal: not waiting for open work");
            Ok(())
        }
    }
}
