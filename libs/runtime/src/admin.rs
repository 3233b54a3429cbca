//! The admin endpoint: liveness, readiness with reasons, metrics, and gRPC health, in plain text
//! on a loopback port of its own, away from mTLS, because kubelet probes speak no TLS.

use std::net::SocketAddr;
use std::path::Path;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;

use crate::{Fault, Health, addr_file, notify, telemetry};

/// `[admin]` of every process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// Address of `/livez`, `/readyz`, `/metrics` and gRPC health. Keep it on loopback. Port 0
    /// picks a free port; `run/admin.addr` has the one in use.
    pub listen: SocketAddr,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 0).into(),
        }
    }
}

/// A bound admin endpoint.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    health: Health,
}

impl Admin {
    /// Binds the endpoint and writes `run_dir/NAME.addr`. To be called before the process starts
    /// others: what its supervisor handed over stays with it.
    pub async fn bind(
        cfg: &AdminConfig,
        health: Health,
        run_dir: &Path,
        name: &str,
    ) -> Result<Self, Fault> {
        notify::keep_descriptors();
        let listener = TcpListener::bind(cfg.listen)
            .await
            .map_err(|e| Fault::bind(&cfg.listen, "admin.listen", &e))?;
        addr_file::write(run_dir, name, &listener.local_addr()?.to_string())?;
        Ok(Self { listener, health })
    }

    /// The bound address.
    pub fn local_addr(&self) -> Result<SocketAddr, Fault> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves until stopped, and gives the supervisor signs of life.
    pub async fn serve(self, stop: CancellationToken) -> Result<(), Fault> {
        let (reporter, grpc) = tonic_health::server::health_reporter();
        let http = Router::new()
            .route("/livez", get(|| async { "ok\n" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self.health.clone());
        let app = tonic::service::Routes::new(grpc)
            .into_axum_router()
            .merge(http);
        let mut changes = self.health.watch();
        let follow = async {
            loop {
                let parts = changes.borrow_and_update().clone();
                let status = |ready| {
                    if ready {
                        ServingStatus::Serving
                    } else {
                        ServingStatus::NotServing
                    }
                };
                for (name, part) in &parts {
                    reporter.set_service_status(name, status(part.ready)).await;
                }
                let all = !parts.is_empty() && parts.values().all(|c| c.ready);
                reporter.set_service_status("", status(all)).await;
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        let shutdown = stop.clone();
        let serve = axum::serve(self.listener, app)
            .with_graceful_shutdown(async move { shutdown.cancelled().await });
        tokio::select! {
            served = serve => served.map_err(Fault::from),
            () = follow => Ok(()),
            () = notify::keep_alive() => Ok(()),
            // A health watch never ends by itself, so it must not hold the stop.
            () = stop.cancelled() => Ok(()),
        }
    }
}

async fn readyz(State(health): State<Health>) -> impl IntoResponse {
    let status = if health.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = serde_json::json!({ "ready": health.is_ready(), "components": health.components() });
    (status, axum::Json(body))
}

async fn metrics() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        telemetry::render_metrics(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;

    #[tokio::test]
    async fn readiness_is_told_with_its_reasons() {
        let dir = tempfile::tempdir().unwrap();
        let health = Health::default();
        let admin = Admin::bind(&AdminConfig::default(), health.clone(), dir.path(), "admin")
            .await
            .unwrap();
        let addr = admin.local_addr().unwrap();
        assert_eq!(
            addr_file::read(dir.path(), "admin").unwrap(),
            addr.to_string()
        );
        let stop = CancellationToken::new();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(admin.serve(stop.clone()));

        let client = crate::http_client().build().unwrap();
        let get = async |path: &'static str| {
            let url = format!("http://{addr}{path}");
            let answer = client.get(url).send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        };
        assert_eq!(get("/livez").await.0, 200);
        health.set("node", Err("no answer for 12 s".into()));
        let (code, body) = get("/readyz").await;
        assert_eq!(code, 503);
        assert!(body.contains("no answer for 12 s"), "{body}");
        health.set("node", Ok("height 5".into()));
        assert_eq!(get("/readyz").await.0, 200);

        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{addr}")).unwrap();
        let mut client = HealthClient::new(endpoint.connect().await.unwrap());
        let mut watch = client
            .watch(HealthCheckRequest::default())
            .await
            .unwrap()
            .into_inner();
        let serving = tokio::time::timeout(std::time::Duration::from_secs(5), async {
            while let Ok(Some(m)) = watch.message().await {
                if m.status == 1 {
                    return true;
                }
            }
            false
        });
        assert_eq!(serving.await, Ok(true));

        stop.cancel();
        tasks.join_next().await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_occupied_port_is_the_operators_to_fix() {
        let dir = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cfg = AdminConfig {
            listen: taken.local_addr().unwrap(),
        };
        let e = Admin::bind(&cfg, Health::default(), dir.path(), "admin")
            .await
            .unwrap_err();
        assert_eq!(e.kind, lotus_types::Kind::Config);
        assert!(e.fix.contains("admin.listen"), "{}", e.fix);
    }
}
