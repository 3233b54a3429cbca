//! Follows what the hub proves: a stream, so nothing is asked while nothing changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hub_proto::HubClient;
use hub_proto::v1::WatchProvingRequest;

use super::Work;

/// After a stream that broke. A hub that ended is followed no more.
const AGAIN: Duration = Duration::from_secs(1);
const ANSWER: Duration = Duration::from_secs(5);

/// Calls `told` with each change, and with nothing when the stream breaks, for as long as it is
/// polled. Ends at a hub that is too old to say.
pub(crate) async fn follow<F: Future<Output = ()>>(socket: PathBuf, told: impl Fn(Vec<Work>) -> F) {
    loop {
        let why = stream(&socket, &told).await;
        told(Vec::new()).await;
        match why {
            Ok(()) => tracing::debug!("the hub ended its word on proving"),
            Err(s) if s.code() == tonic::Code::Unimplemented => {
                tracing::warn!("this hub does not say when it proves: nobody is squeezed for it");
                return;
            }
            Err(s) => tracing::debug!(why = s.message(), "the hub's word on proving"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn stream<F: Future<Output = ()>>(
    socket: &Path,
    told: &impl Fn(Vec<Work>) -> F,
) -> Result<(), tonic::Status> {
    let no_trace = |request| Ok(request);
    let hub = HubClient::on_this_host(socket, ANSWER, "supervisor", "guard", no_trace)
        .await
        .map_err(|e| tonic::Status::unavailable(e.to_string()))?;
    let mut changes = hub
        .hub()
        .watch_proving(WatchProvingRequest {})
        .await?
        .into_inner();
    while let Some(now) = changes.message().await? {
        let work = now.work.into_iter().map(|w| Work {
            window: w.kind == "window",
            what: w.what,
            closes: (w.closes_unix_ms > 0).then_some(w.closes_unix_ms),
        });
        told(work.collect()).await;
    }
    Ok(())
}
