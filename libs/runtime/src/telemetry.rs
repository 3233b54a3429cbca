//! Logs, traces and metrics of a process.

use std::io::IsTerminal as _;
use std::sync::OnceLock;
use std::time::Duration;

use lotus_types::Kind;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::{Deserialize, Serialize};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::Fault;

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// `[telemetry]` of every process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Log filter, such as `info` or `info,lotus_sealing=debug`. `RUST_LOG` wins over it. The
    /// proof libraries are held to `warn` unless it names them, as in `info,filecoin_proofs=info`.
    pub log: String,
    /// `text` or `json`.
    pub format: LogFormat,
    /// OTLP endpoint (gRPC) for traces, such as `http://127.0.0.1:4317`; empty exports none.
    /// `OTEL_EXPORTER_OTLP_ENDPOINT` is taken when this is empty.
    pub otlp_endpoint: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log: "info".into(),
            format: LogFormat::Text,
            otlp_endpoint: String::new(),
        }
    }
}

/// Where traces go; empty for nowhere.
#[must_use]
pub fn endpoint(cfg: &TelemetryConfig) -> String {
    match cfg.otlp_endpoint.as_str() {
        "" => std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").unwrap_or_default(),
        set => set.to_owned(),
    }
}

/// Libraries that log every step of every proof.
const QUIET: &str = "filecoin_proofs=warn,storage_proofs_core=warn,storage_proofs_porep=warn,\
                     storage_proofs_post=warn,storage_proofs_update=warn";

/// Keeps telemetry going; flushes open spans when dropped.
#[derive(Debug)]
pub struct Guard {
    provider: SdkTracerProvider,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(e) = self.provider.shutdown_with_timeout(Duration::from_secs(2)) {
            tracing::debug!(%e, "open spans were not exported");
        }
    }
}

static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();

/// The metrics of this process in Prometheus' text form; empty before [`init`].
#[must_use]
pub fn render_metrics() -> String {
    METRICS
        .get()
        .map(PrometheusHandle::render)
        .unwrap_or_default()
}

/// Starts logs (on standard error), traces and metrics. Call once, inside the tokio runtime.
///
/// Spans are always made, so that one trace id runs through the logs of every process; they are
/// exported when an OTLP endpoint is set.
pub fn init(process: &'static str, cfg: &TelemetryConfig) -> Result<Guard, Fault> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => text,
        _ => cfg.log.clone(),
    };
    let filter = EnvFilter::try_new(format!("{QUIET},{filter}")).map_err(|e| {
        Fault::new(
            Kind::Config,
            format!("log filter {filter:?}: {e}"),
            "set telemetry.log (or RUST_LOG) to a filter such as info,lotus_sealing=debug",
        )
    })?;

    let endpoint = endpoint(cfg);
    let mut provider = SdkTracerProvider::builder()
        .with_resource(Resource::builder().with_service_name(process).build());
    if !endpoint.is_empty() {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(&endpoint)
            .with_timeout(Duration::from_secs(5))
            .build()
            .map_err(|e| {
                Fault::new(
                    Kind::Config,
                    format!("OTLP endpoint {endpoint:?}: {e}"),
                    "set telemetry.otlp_endpoint to a gRPC endpoint such as http://127.0.0.1:4317",
                )
            })?;
        provider = provider.with_batch_exporter(exporter);
    }
    let provider = provider.build();

    let ansi = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match cfg.format {
        LogFormat::Text => lines.with_ansi(ansi).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(tracing_opentelemetry::layer().with_tracer(provider.tracer(process)))
        .try_init()
        .map_err(|e| Fault::new(Kind::Fatal, format!("telemetry: {e}"), "report this"))?;

    let recorder = PrometheusBuilder::new().build_recorder();
    if METRICS.set(recorder.handle()).is_ok() {
        metrics::set_global_recorder(recorder)
            .map_err(|e| Fault::new(Kind::Fatal, format!("metrics: {e}"), "report this"))?;
    }
    metrics::gauge!("lotus_build_info", "process" => process, "version" => env!("CARGO_PKG_VERSION"))
        .set(1.0);
    Ok(Guard { provider })
}
