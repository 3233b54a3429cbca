//! A spoke of the gateway against a hub that speaks the real protocol.

use std::path::Path;
use std::time::Duration;

use cid::Cid;
use lotus_car::{Block, CarReader, CarWriter};
use lotus_piece_index::testing::FakeHub;
use lotus_retrieval::{Retrieval, RetrievalConfig};
use lotus_runtime::{CancellationToken, Cx, Fault, Health, Service, addr_file};
use multihash_codetable::{Code, MultihashDigest};
use reqwest::{Method, Response};
use tokio::task::JoinSet;

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) struct Spoke {
    health: Health,
    stop: CancellationToken,
    task: JoinSet<Result<(), Fault>>,
    /// `http://host:port`, or with TLS https.
    pub(crate) url: String,
    /// Takes any certificate.
    pub(crate) http: reqwest::Client,
}

impl Spoke {
    pub(crate) async fn start(hub: &FakeHub, dir: &Path, cfg: RetrievalConfig) -> Self {
        let (health, stop) = (Health::default(), CancellationToken::new());
        let scheme = match cfg.tls_cert.as_os_str().is_empty() {
            true => "http",
            false => "https",
        };
        let cfg = RetrievalConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            ..cfg
        };
        let spoke = Retrieval::new(cfg, hub.config(), dir.join("retrieval"), dir.join("run"));
        let mut task = JoinSet::new();
        task.spawn(spoke.run(Cx::new("retrieval", health.clone(), stop.clone())));
        within("ready", health.ready()).await;
        let addr = addr_file::read(&dir.join("run"), "retrieval").unwrap();
        let http = lotus_runtime::http_client().danger_accept_invalid_certs(true);
        let http = http.build().unwrap();
        Self {
            health,
            stop,
            task,
            url: format!("{scheme}://{addr}"),
            http,
        }
    }

    /// Waits until the index holds this many pieces.
    pub(crate) async fn indexed(&self, pieces: usize) {
        let want = format!("{pieces} pieces");
        let mut parts = self.health.watch();
        let reached =
            parts.wait_for(|p| p.get("retrieval.index").is_some_and(|c| c.detail == want));
        within(&want, async { drop(reached.await.unwrap()) }).await;
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
    ) -> Response {
        let mut request = self.http.request(method, format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        within(path, request.send()).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.send(Method::GET, path, &[]).await
    }

    pub(crate) async fn car(&self, path: &str) -> Vec<Block> {
        let answer = self.get(path).await;
        assert_eq!(answer.status(), 200, "{path}");
        let bytes = answer.bytes().await.unwrap();
        CarReader::new(&bytes[..])
            .unwrap()
            .map(Result::unwrap)
            .collect()
    }

    pub(crate) async fn end(mut self) {
        self.stop.cancel();
        within("the end", self.task.join_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

pub(crate) async fn within<T>(what: &str, f: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, f)
        .await
        .unwrap_or_else(|_| panic!("no {what} in time"))
}

pub(crate) fn header<'a>(r: &'a Response, name: &str) -> &'a str {
    r.headers().get(name).map_or("", |v| v.to_str().unwrap())
}

pub(crate) fn small(text: &str) -> (Cid, Vec<u8>) {
    let cid = Cid::new_v1(0x55, Code::Sha2_256.digest(text.as_bytes()));
    let mut car = CarWriter::new(Vec::new(), &[cid]).unwrap();
    car.write(&cid, text.as_bytes()).unwrap();
    (cid, car.finish().unwrap())
}

/// Why a spoke with this configuration does not start.
pub(crate) async fn fault(hub: &FakeHub, dir: &Path, cfg: RetrievalConfig) -> Fault {
    let dir = dir.join("faulty");
    let spoke = Retrieval::new(cfg, hub.config(), dir.join("retrieval"), dir.join("run"));
    let cx = Cx::new("retrieval", Health::default(), CancellationToken::new());
    within("fault", spoke.run(cx)).await.unwrap_err()
}
