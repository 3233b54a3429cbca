//! Connections on which a hub on another host pulls what is staged here. They are opened from here,
//! as all between a spoke and its hub.

use std::sync::Arc;
use std::time::Duration;

use hub_proto::HubClient;
use lotus_dataplane::{OpenToken, PULL_ALPN, serve_on};
use lotus_runtime::{Backoff, CancellationToken};
use tokio::task::JoinSet;

/// So many wait for the hub, or are in use.
const CONNECTIONS: usize = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Keeps them open until `stop`.
pub(crate) async fn serve(hub: HubClient, open: Arc<dyn OpenToken>, stop: CancellationToken) {
    let mut all = JoinSet::new();
    for _ in 0..CONNECTIONS {
        all.spawn(keep(hub.clone(), open.clone()));
    }
    stop.cancelled().await;
}

/// One after the other.
async fn keep(hub: HubClient, open: Arc<dyn OpenToken>) {
    let mut pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let ended = match hub.dial(PULL_ALPN).await {
            Ok(connection) => {
                pauses.reset();
                serve_on(connection, open.clone()).await
            }
            Err(e) => Err(e),
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection for the hub to pull on is gone");
        }
        tokio::time::sleep(pauses.next()).await;
    }
}
