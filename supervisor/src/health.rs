//! Follows the health that a process serves (gRPC health v1, `Watch`): a stream, so nothing is
//! asked while nothing changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::Endpoint;
use tonic_health::ServingStatus;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// After a stream that broke. A process that ended is followed no more.
const AGAIN: Duration = Duration::from_secs(1);
const CONNECT: Duration = Duration::from_secs(5);

/// Calls `told` with each change, for as long as it is polled. `file` holds the address.
pub(crate) async fn follow<F: Future<Output = ()>>(file: PathBuf, told: impl Fn(bool) -> F) {
    loop {
        if let Err(e) = stream(&file, &told).await {
            tracing::debug!(e, file = %file.display(), "health");
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn stream<F: Future<Output = ()>>(
    file: &Path,
    told: &impl Fn(bool) -> F,
) -> Result<(), String> {
    let addr = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
    let channel = Endpoint::from_shared(format!("http://{}", addr.trim()))
        .map_err(|e| e.to_string())?
        .connect_timeout(CONNECT)
        .connect()
        .await
        .map_err(|e| e.to_string())?;
    let mut changes = HealthClient::new(channel)
        .watch(HealthCheckRequest::default())
        .await
        .map_err(|s| s.to_string())?
        .into_inner();
    while let Some(change) = changes.message().await.map_err(|s| s.to_string())? {
        told(change.status == ServingStatus::Serving as i32).await;
    }
    Ok(())
}
