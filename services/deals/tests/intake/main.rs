//! The deal service over real HTTP, a real journal and a real descriptor socket, against a hub
//! that only pretends to seal.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod api;
mod bytes;
mod hostile;
mod hub;
mod mk12;
mod orders;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hub::FakeHub;
use hub_proto::HubConfig;
use hub_proto::v1::PiecePhase;
use jiff::Timestamp;
use k256::ecdsa::SigningKey;
use lotus_deals::{Deals, DealsConfig, Mk12Config, auth, mk20};
use lotus_runtime::telemetry::{self, TelemetryConfig};
use lotus_runtime::{CancellationToken, Cx, Fault, Health, Service as _, addr_file};
use lotus_types::Address;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use ulid::Ulid;

const DEADLINE: Duration = Duration::from_secs(20);

/// A service in a directory, and who talks to it.
struct Net {
    dir: tempfile::TempDir,
    hub: FakeHub,
    hub_addr: String,
    _hub_task: JoinSet<()>,
    service: JoinSet<Result<(), Fault>>,
    health: Health,
    stop: CancellationToken,
    base: String,
    key: SigningKey,
    http: reqwest::Client,
    change: Box<dyn Fn(&mut DealsConfig) + Send + Sync>,
}

fn address(key: &SigningKey) -> Address {
    Address::new_secp256k1(key.verifying_key().to_encoded_point(false).as_bytes()).unwrap()
}

impl Net {
    async fn new(change: impl Fn(&mut DealsConfig) + Send + Sync + 'static) -> Self {
        let mut tasks = JoinSet::new();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("hub.sock");
        let mut net = Self {
            dir,
            hub: FakeHub::start(&mut tasks, &socket),
            hub_addr: format!("unix:{}", socket.display()),
            _hub_task: tasks,
            service: JoinSet::new(),
            health: Health::default(),
            stop: CancellationToken::new(),
            base: String::new(),
            key: SigningKey::from_slice(&[7; 32]).unwrap(),
            // No connection is used twice: the service ends one that waited for `header_secs`.
            http: lotus_runtime::http_client()
                .pool_max_idle_per_host(0)
                .build()
                .unwrap(),
            change: Box::new(change),
        };
        net.start().await;
        net
    }

    fn staging(&self) -> PathBuf {
        self.dir.path().join("deals/staging")
    }

    async fn start(&mut self) {
        let mut cfg = DealsConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            pull_backoff_secs: 0,
            mk12: Mk12Config {
                listen: ([127, 0, 0, 1], 0).into(),
                publish_period_secs: 0,
                ..Mk12Config::default()
            },
            ..DealsConfig::default()
        };
        (self.change)(&mut cfg);
        let hub = HubConfig {
            addr: self.hub_addr.clone(),
            ..HubConfig::default()
        };
        let run_dir = self.dir.path().join("run");
        let end = tokio::time::Instant::now() + DEADLINE;
        loop {
            self.health = Health::default();
            self.stop = CancellationToken::new();
            let dir = self.dir.path().join("deals");
            let service = Deals::new(cfg.clone(), hub.clone(), dir, run_dir.clone());
            let cx = Cx::new("deals", self.health.clone(), self.stop.clone());
            self.service.spawn(service.run(cx));
            tokio::select! {
                // The tasks of a killed service may need a moment to let go of the journal.
                ended = self.service.join_next() => match ended {
                    Some(Ok(Err(e))) if e.message.contains("in use") && tokio::time::Instant::now() < end => {
                        tokio::task::yield_now().await;
                    }
                    other => panic!("the service ended: {other:?}"),
                },
                () = self.health.ready() => break,
                () = tokio::time::sleep_until(end) => panic!("not ready: {:?}", self.health.components()),
            }
        }
        self.base = format!("http://{}", addr_file::read(&run_dir, "deals").unwrap());
    }

    /// Ends every task of the service at once, wherever it is, and starts it again.
    async fn crash(&mut self) {
        let before = self.base.clone();
        self.service.shutdown().await;
        self.start().await;
        assert_eq!(self.base, before, "the URL outlives a crash");
    }

    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let path = format!("/market/mk20{path}");
        let who = address(&self.key);
        let header =
            auth::sign_secp256k1(&self.key, &who, method, &path, Timestamp::now()).unwrap();
        self.http
            .request(method.parse().unwrap(), format!("{}{path}", self.base))
            .header("authorization", header)
    }

    async fn propose(&self, deal: &Value) -> (u16, Value) {
        answer(self.request("POST", "/deal").json(deal)).await
    }

    async fn put(&self, id: Ulid, bytes: &[u8]) -> (u16, Value) {
        let put = self.request("PUT", &format!("/upload/{id}"));
        answer(
            put.header("content-type", "application/octet-stream")
                .body(bytes.to_vec()),
        )
        .await
    }

    async fn finalize(&self, id: Ulid) -> (u16, Value) {
        answer(self.request("POST", &format!("/upload/{id}"))).await
    }

    async fn status(&self, id: Ulid) -> Value {
        let (code, body) = answer(self.request("GET", &format!("/status/{id}"))).await;
        assert_eq!(code, 200, "{body}");
        body
    }

    async fn wait(&self, id: Ulid, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let end = tokio::time::Instant::now() + DEADLINE;
        loop {
            let now = self.status(id).await;
            if is(&now) {
                return now;
            }
            assert!(tokio::time::Instant::now() < end, "{what}: {now}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn checkpoint(&self, id: Ulid, name: &str) -> Value {
        self.wait(id, name, |s| s["deal"]["checkpoint"] == name)
            .await
    }

    fn deal(&self, id: Ulid, data: &[u8]) -> Value {
        let piece = lotus_proofs::commp(data).unwrap();
        json!({
            "identifier": id.to_string(),
            "client": mk20::address_text(&address(&self.key)),
            "data": {
                "piece_cid": {"/": piece.cid_v2().to_string()},
                "format": {"raw": {}},
                "source_http_put": {},
            },
            "products": {
                "ddo_v1": {"provider": "t01000", "start_epoch": 5000, "duration": 518_400},
                "retrieval_v1": {"indexing": false},
            },
        })
    }

    fn hub_key(&self, id: Ulid) -> String {
        format!("{}/{id}", mk20::address_text(&address(&self.key)))
    }
}

/// Sends a request, and checks the answer against the description that the service gives.
async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let (client, request) = request.build_split();
    let request = request.unwrap();
    let (method, url) = (request.method().clone(), request.url().clone());
    let response = client.execute(request).await.unwrap();
    let code = response.status().as_u16();
    let text = response.text().await.unwrap();
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    api::check(&client, &method, &url, code, &body).await;
    (code, body)
}

fn data(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from(i % 251).unwrap() ^ seed)
        .collect()
}

fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[tokio::test]
async fn a_deal_goes_from_proposal_to_proven_sector_over_crashes() {
    let mut net = Net::new(|_| {}).await;
    let id = Ulid::from(1u128);
    let bytes = data(0, 300_000);
    let deal = net.deal(id, &bytes);
    assert_eq!(net.propose(&deal).await.0, 200);
    assert_eq!(net.propose(&deal).await.0, 200, "the same again");
    let (code, refusal) = net.propose(&net.deal(id, b"other")).await;
    assert_eq!((code, &refusal["field"]), (409, &json!("identifier")));
    assert_eq!(net.finalize(id).await.0, 400, "nothing was uploaded");

    net.crash().await;
    assert_eq!(net.status(id).await["ddo_v1"]["status"], "uploading");
    let mut wrong = bytes.clone();
    wrong[7] ^= 1;
    for (body, words) in [
        (&wrong, "the bytes are piece"),
        (&bytes[..9].to_vec(), "has 9 bytes"),
    ] {
        let (code, refusal) = net.put(id, body).await;
        assert_eq!(code, 400, "{refusal}");
        assert!(
            refusal["error"].as_str().unwrap().contains(words),
            "{refusal}"
        );
        assert!(!refusal["fix"].as_str().unwrap().is_empty());
    }
    assert_eq!(files(&net.staging()), 0);
    assert_eq!(net.put(id, &bytes).await, (200, json!({"code": 200})));

    net.crash().await;
    net.hub.state().down = true;
    assert_eq!(net.finalize(id).await.0, 200);
    net.checkpoint(id, "Transferred").await;
    assert_eq!(net.finalize(id).await.0, 200, "the same again");
    let (code, refusal) = net.put(id, &bytes).await;
    assert_eq!(code, 409, "{refusal}");

    net.service.shutdown().await;
    net.hub.state().down = false;
    net.start().await;
    net.checkpoint(id, "Offered").await;
    let key = net.hub_key(id);
    {
        let hub = net.hub.state();
        assert_eq!(hub.offers.len(), 1);
        assert_eq!(hub.bytes[&key], bytes, "the hub pulls what was uploaded");
        let offer = &hub.offers[0];
        let terms = offer.terms.as_ref().unwrap();
        assert_eq!((terms.start_epoch, terms.end_epoch), (5000, 523_400));
        assert_eq!((offer.raw_size, offer.piece_size), (300_000, 512 << 10));
        assert!(!offer.credit.is_empty());
    }
    assert_eq!(
        files(&net.staging()),
        1,
        "the copy stays until the hub has stored it"
    );
    net.hub.advance(&key, PiecePhase::Stored, "");
    net.wait(id, "copy dropped", |_| files(&net.staging()) == 0)
        .await;

    net.hub.advance(&key, PiecePhase::Placed, "WaitDeals");
    net.checkpoint(id, "AddedPiece").await;
    net.hub.sector(4, "PreCommit1");
    let s = net.checkpoint(id, "Sealing").await;
    assert_eq!(s["ddo_v1"]["status"], "sealing");
    assert_eq!(
        (&s["deal"]["sector"], &s["deal"]["offset"]),
        (&json!(4), &json!(2048))
    );
    assert_eq!(s["deal"]["sealing_state"], "PreCommit1");

    // What happens while the service is away is not lost.
    net.service.shutdown().await;
    net.hub.advance(&key, PiecePhase::Active, "Proving");
    net.start().await;
    let s = net.checkpoint(id, "Active").await;
    assert_eq!(s["ddo_v1"], json!({"status": "complete", "errorMsg": ""}));
    assert_eq!(net.hub.state().offers.len(), 1, "one hand-off in all");

    net.stop.cancel();
    let ended = tokio::time::timeout(DEADLINE, net.service.join_next())
        .await
        .unwrap();
    assert!(matches!(ended, Some(Ok(Ok(())))), "{ended:?}");
}

#[tokio::test]
async fn a_hub_that_refuses_a_piece_fails_its_deal_only() {
    let net = Net::new(|_| {}).await;
    let (good, bad) = (Ulid::from(1u128), Ulid::from(2u128));
    for (id, seed) in [(good, 1), (bad, 2)] {
        let bytes = data(seed, 1000);
        assert_eq!(net.propose(&net.deal(id, &bytes)).await.0, 200);
        assert_eq!(net.put(id, &bytes).await.0, 200);
        assert_eq!(net.finalize(id).await.0, 200);
        net.checkpoint(id, "Offered").await;
    }
    let key = net.hub_key(bad);
    net.hub.state().pieces.get_mut(&key).unwrap().reason = "no sector takes it".into();
    net.hub.advance(&key, PiecePhase::Failed, "");
    let s = net.checkpoint(bad, "Failed").await;
    assert_eq!(
        s["ddo_v1"],
        json!({"status": "failed", "errorMsg": "no sector takes it"})
    );
    net.wait(bad, "credit released", |_| {
        net.hub.state().released.len() == 1
    })
    .await;
    net.checkpoint(good, "Offered").await;
    assert_eq!(net.finalize(bad).await.0, 409);
}

#[tokio::test]
async fn requests_that_are_wrong_are_told_so() {
    let net = Net::new(|c| c.max_proposal_bytes = 4096).await;
    let id = Ulid::from(9u128);
    let bytes = data(3, 500);
    let deal = net.deal(id, &bytes);
    let post = || net.request("POST", "/deal");
    let json_type = "application/json";
    let refused = |r: (u16, Value)| (r.0, r.1["error"].as_str().unwrap_or_default().to_owned());

    let url = format!("{}/market/mk20/deal", net.base);
    let (code, error) = refused(answer(net.http.post(&url).json(&deal)).await);
    assert_eq!((code, error.contains("missing")), (401, true), "{error}");
    let (code, error) =
        refused(answer(post().header("content-type", "text/plain").body("{}")).await);
    assert_eq!((code, error.contains("text/plain")), (415, true), "{error}");
    let (code, error) =
        refused(answer(post().header("content-type", json_type).body("{\"a\":")).await);
    assert_eq!(
        (code, error.contains("no proposal")),
        (400, true),
        "{error}"
    );
    let huge = format!("{{\"identifier\": \"{}\"}}", "x".repeat(5000));
    let (code, error) = refused(answer(post().header("content-type", json_type).body(huge)).await);
    assert_eq!((code, error.contains("4096")), (413, true), "{error}");
    let nothing = net.request("GET", "/nothing").send().await.unwrap();
    assert_eq!(nothing.status(), 404);
    let (code, _) = answer(net.request("GET", "/status/nope")).await;
    assert_eq!(code, 400);
    let (code, _) = answer(net.request("GET", &format!("/status/{id}"))).await;
    assert_eq!(code, 404);

    net.hub.state().full = true;
    let response = post().json(&deal).send().await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(response.headers()["retry-after"], "7");
    net.hub.state().full = false;
    net.hub.state().down = true;
    let (code, _) = net.propose(&deal).await;
    assert_eq!(code, 503);
    net.hub.state().down = false;

    let mut verified = deal.clone();
    verified["products"]["ddo_v1"]["allocation_id"] = json!(5);
    let (code, refusal) = net.propose(&verified).await;
    assert_eq!(
        (code, &refusal["field"]),
        (425, &json!("products.ddo_v1.allocation_id"))
    );

    assert_eq!(net.propose(&deal).await.0, 200);
    let put = net
        .request("PUT", &format!("/upload/{id}"))
        .header("content-type", "text/plain");
    assert_eq!(answer(put.body(bytes.clone())).await.0, 415);
    // A disk that takes nothing: every write to /dev/full gives ENOSPC.
    let part = net
        .staging()
        .join(format!("{}.part", net.hub_key(id).replace('/', "_")));
    std::os::unix::fs::symlink("/dev/full", &part).unwrap();
    let (code, refusal) = net.put(id, &bytes).await;
    assert_eq!(code, 507, "{refusal}");
    assert_eq!(files(&net.staging()), 0);
    assert_eq!(net.put(id, &bytes).await.0, 200, "and the service goes on");

    let no_car = Ulid::from(10u128);
    let mut deal = net.deal(no_car, &bytes);
    deal["data"]["format"] = json!({"car": {}});
    assert_eq!(net.propose(&deal).await.0, 200);
    let (code, error) = refused(net.put(no_car, &bytes).await);
    assert_eq!(
        (code, error.contains("not a sound CAR")),
        (400, true),
        "{error}"
    );
    net.checkpoint(no_car, "Failed").await;

    let mut other = Net {
        key: SigningKey::from_slice(&[8; 32]).unwrap(),
        ..Net::new(|_| {}).await
    };
    other.base.clone_from(&net.base);
    let (code, _) = answer(other.request("GET", &format!("/status/{id}"))).await;
    assert_eq!(code, 404, "another client's deal is not shown");
}

#[tokio::test]
async fn one_trace_reaches_the_hub() {
    let quiet = TelemetryConfig {
        log: "error,lotus_deals=info".into(),
        ..TelemetryConfig::default()
    };
    let _telemetry = telemetry::init("deals-test", &quiet).unwrap();
    let net = Net::new(|_| {}).await;
    let id = Ulid::from(4u128);
    let bytes = data(5, 200);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let propose = net.request("POST", "/deal").json(&net.deal(id, &bytes));
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    assert_eq!(answer(propose.header("traceparent", parent)).await.0, 200);
    // The hand-off comes much later, and out of another request.
    assert_eq!(net.put(id, &bytes).await.0, 200);
    assert_eq!(net.finalize(id).await.0, 200);
    net.checkpoint(id, "Offered").await;
    let traces = net.hub.state().traces.clone();
    assert!(traces[0].contains(trace), "{traces:?}");
}

#[tokio::test]
async fn a_download_resumes_and_wrong_bytes_fail_the_deal() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let from = server.local_addr().unwrap();
    let net = Net::new(move |c| {
        c.allow_private_sources = true;
        c.pull_ports = vec![from.port()];
    })
    .await;
    let bytes = data(6, 200_000);
    let served = bytes.clone();
    let (ranges, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut first = true;
        loop {
            let (mut s, _) = server.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(s.read_u8().await.unwrap());
            }
            let text = String::from_utf8(request).unwrap().to_ascii_lowercase();
            let at: usize = text
                .split("range: bytes=")
                .nth(1)
                .map_or(0, |r| r.split('-').next().unwrap().parse().unwrap());
            ranges.send(at).unwrap();
            let len = served.len();
            let head = if at == 0 {
                format!("HTTP/1.1 200 OK\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n")
            } else {
                let left = len - at;
                let last = len - 1;
                format!("HTTP/1.1 206 Partial\r\ncontent-length: {left}\r\ncontent-range: bytes {at}-{last}/{len}\r\nconnection: close\r\n\r\n")
            };
            s.write_all(head.as_bytes()).await.unwrap();
            // The first connection breaks in the middle.
            let end = if first { len / 2 } else { len };
            first = false;
            s.write_all(&served[at..end]).await.unwrap();
            s.shutdown().await.unwrap();
        }
    });
    let pulled = |id: Ulid, bytes: &[u8]| {
        let mut deal = net.deal(id, bytes);
        let data = deal["data"].as_object_mut().unwrap();
        data.remove("source_http_put");
        data.insert(
            "source_http".into(),
            json!({"urls": [{"url": format!("http://{from}/x")}]}),
        );
        deal
    };
    let good = Ulid::from(1u128);
    assert_eq!(net.propose(&pulled(good, &bytes)).await.0, 200);
    net.checkpoint(good, "Offered").await;
    assert_eq!(net.hub.state().bytes[&net.hub_key(good)], bytes);
    assert_eq!(seen.recv().await, Some(0));
    assert_eq!(
        seen.recv().await,
        Some(100_000),
        "goes on where the connection broke"
    );

    let bad = Ulid::from(2u128);
    assert_eq!(net.propose(&pulled(bad, &data(7, 200_000))).await.0, 200);
    let s = net.checkpoint(bad, "Failed").await;
    assert!(
        s["ddo_v1"]["errorMsg"]
            .as_str()
            .unwrap()
            .contains("the bytes are piece"),
        "{s}"
    );
    let short = Ulid::from(3u128);
    assert_eq!(net.propose(&pulled(short, &data(6, 200_001))).await.0, 200);
    let s = net.checkpoint(short, "Failed").await;
    assert!(
        s["ddo_v1"]["errorMsg"]
            .as_str()
            .unwrap()
            .contains("ended after 200000"),
        "{s}"
    );
    assert_eq!(net.put(good, &bytes).await.0, 409);
}

#[tokio::test]
async fn a_deal_without_bytes_expires() {
    let net = Net::new(|c| c.upload_ttl_secs = 0).await;
    let id = Ulid::from(1u128);
    assert_eq!(net.propose(&net.deal(id, &data(0, 10))).await.0, 200);
    let s = net.checkpoint(id, "Expired").await;
    assert_eq!(s["ddo_v1"]["status"], "failed");
    assert!(
        s["ddo_v1"]["errorMsg"]
            .as_str()
            .unwrap()
            .contains("no bytes came"),
        "{s}"
    );
}
