//! One trace leads from the client's command through the deals spoke and the hub to the worker
//! that seals, as any OTLP collector sees it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use lotus_e2e::{Net, NetConfig, secs};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// Trace id, and for each service the names of its spans with their attributes.
type Traces = BTreeMap<Vec<u8>, BTreeMap<String, BTreeSet<String>>>;

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Traces>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut traces = self.0.lock().unwrap();
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let service = attributes.into_iter().find(|a| a.key == "service.name");
            let service = match service.and_then(|a| a.value).and_then(|v| v.value) {
                Some(Value::StringValue(name)) => name,
                other => panic!("a resource without a service name: {other:?}"),
            };
            for span in resource.scope_spans.into_iter().flat_map(|s| s.spans) {
                let step = span.attributes.into_iter().find(|a| a.key == "step");
                let name = match step.and_then(|a| a.value).and_then(|v| v.value) {
                    Some(Value::StringValue(step)) => format!("{} {step}", span.name),
                    _ => span.name,
                };
                let services = traces.entry(span.trace_id).or_default();
                services.entry(service.clone()).or_default().insert(name);
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_from_the_client_to_the_worker() {
    let collector = Collector::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(collector.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(server);

    let net = Net::start(&NetConfig {
        env: BTreeMap::from([("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), endpoint)]),
        ..NetConfig::default()
    })
    .await
    .unwrap();
    net.ready(secs(120)).await.unwrap();

    let (data, car) = (net.root().join("data"), net.root().join("data.car"));
    std::fs::write(&data, vec![5; 200_000]).unwrap();
    lotus_car::pack_dir(&data, &car).unwrap();
    let key = net.root().join("client.key");
    net.run(
        "lotus-markets",
        &[
            "client",
            "deal",
            "--provider-url",
            &net.spoke_url("deals").unwrap(),
            "--car",
            car.to_str().unwrap(),
            "--key",
            key.to_str().unwrap(),
        ],
    )
    .await
    .unwrap();

    let whole = |services: &BTreeMap<String, BTreeSet<String>>| {
        let worker = services.get("lotus-miner-worker");
        ["lotus-markets-client", "lotus-markets", "lotus-miner"]
            .iter()
            .all(|name| services.contains_key(*name))
            && worker.is_some_and(|spans| spans.iter().any(|s| s == "work pre_commit1"))
    };
    let found = net
        .wait("one trace over all", secs(120), async |_| {
            let traces = collector.0.lock().unwrap();
            traces.values().find(|services| whole(services)).cloned()
        })
        .await
        .unwrap_or_else(|e| panic!("{:#?}\n{e}", collector.0.lock().unwrap()));
    eprintln!("{found:#?}");
    net.stop().await.unwrap();
}
