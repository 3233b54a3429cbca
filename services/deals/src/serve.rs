//! An HTTP/1.1 server that owns its connections: when it is dropped they end, so nothing holds
//! the journal when the service is started again after a failure.

use std::time::Duration;

use axum::extract::ConnectInfo;
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use lotus_runtime::{CancellationToken, Fault};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// Open connections; more wait in the listener's queue.
const MAX_CONNECTIONS: usize = 1_024;
/// Longest time for a request's headers, and for a kept connection without a request.
const HEADER_PATIENCE: Duration = Duration::from_secs(30);

/// Serves until stopped, then lets open requests finish.
pub(crate) async fn http1(
    listener: TcpListener,
    app: Router,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = open.join_next() => continue,
            accepted = listener.accept(), if open.len() < MAX_CONNECTIONS => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(pair) => pair,
            Err(e) => {
                // Out of descriptors, or the peer is gone: wait instead of spinning.
                tracing::warn!(%e, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(app.clone().layer(Extension(ConnectInfo(peer))));
        let stop = stop.clone();
        open.spawn(async move {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(e) = ended {
                tracing::debug!(%e, %peer, "connection");
            }
        });
    }
    drop(listener);
    while open.join_next().await.is_some() {}
    Ok(())
}
