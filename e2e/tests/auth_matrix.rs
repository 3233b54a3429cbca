//! Every method of the hub API, called by every service with every kind of identity: the code of
//! the answer is known for each.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use hub_proto::GENERATION_HEADER;
use hub_proto::access::{JOINING, METHODS, Method, SERVICES};
use hub_proto::v1::events_client::EventsClient;
use hub_proto::v1::hub_client::HubClient;
use hub_proto::v1::{HelloRequest, SubscribeRequest};
use hyper_util::rt::TokioIo;
use lotus_dataplane::{Duplex, PATH};
use lotus_e2e::{At, Far, Net, NetConfig, secs};
use lotus_identity::{Authority, Caller, Held, connect};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

/// What an empty message is answered with, where the method may be called. What is asked for is
/// not there, or says too little; what needs nothing is answered.
const EMPTY: &[(&str, Code)] = &[
    // Of an API version that nobody has.
    ("Hub/Hello", Code::PermissionDenied),
    ("Hub/Identity", Code::Ok),
    ("Hub/SafeToRestart", Code::Ok),
    ("Hub/WatchProving", Code::Ok),
    ("Capacity/Watch", Code::Ok),
    ("Capacity/Acquire", Code::InvalidArgument),
    ("Capacity/Release", Code::Ok),
    ("Pieces/Offer", Code::InvalidArgument),
    ("Pieces/Status", Code::InvalidArgument),
    ("Pieces/Withdraw", Code::InvalidArgument),
    ("Pieces/List", Code::Ok),
    ("Sectors/List", Code::Ok),
    ("Sectors/Get", Code::NotFound),
    ("Unsealed/Locate", Code::InvalidArgument),
    ("Unsealed/Lease", Code::InvalidArgument),
    ("Unsealed/RequestUnseal", Code::InvalidArgument),
    ("Events/Subscribe", Code::Ok),
    ("Chain/Head", Code::Ok),
    ("Chain/Allocation", Code::InvalidArgument),
    ("Chain/MarketClient", Code::InvalidArgument),
    ("Chain/Publish", Code::InvalidArgument),
    ("Chain/SignAsk", Code::InvalidArgument),
    ("Credentials/Join", Code::Unauthenticated),
    ("Credentials/Renew", Code::Ok),
    ("Credentials/List", Code::Ok),
    ("Credentials/Revoke", Code::InvalidArgument),
];

/// These answer as long as somebody listens.
const STREAMS: [&str; 3] = ["Hub/WatchProving", "Capacity/Watch", "Events/Subscribe"];

const LIMIT: Duration = secs(20);

/// Somebody who dials the hub, anew for each call: connections of those who may not call are
/// closed.
struct Someone {
    who: String,
    addr: String,
    tls: Option<Arc<rustls::ClientConfig>>,
}

impl Someone {
    /// With the certificate that `held` has now.
    fn new(addr: &str, held: &Held) -> Self {
        Self {
            who: held.caller().to_string(),
            addr: addr.into(),
            tls: Some(Arc::new(held.client_config(&[b"h2"]).unwrap())),
        }
    }

    /// A connection, for this protocol.
    async fn dial(&self, alpn: &[u8]) -> std::io::Result<Box<dyn Duplex>> {
        let stream = match self.addr.strip_prefix("unix:") {
            Some(path) => Either::Left(UnixStream::connect(path).await?),
            None => Either::Right(TcpStream::connect(&self.addr).await?),
        };
        let Some(tls) = &self.tls else {
            return Ok(Box::new(stream));
        };
        let mut tls = rustls::ClientConfig::clone(tls);
        tls.alpn_protocols = vec![alpn.to_vec()];
        Ok(Box::new(connect(Arc::new(tls), stream).await?))
    }

    /// Asks for bytes by a lease that nobody has, and the status of the answer, if there is one.
    async fn read(&self, generation: Option<u64>) -> Option<u16> {
        let generation = generation.map(|g| format!("{GENERATION_HEADER}: {g}\r\n"));
        let request = format!(
            "GET {PATH} HTTP/1.1\r\nhost: hub\r\nauthorization: Bearer guess\r\n\
             connection: close\r\n{}\r\n",
            generation.unwrap_or_default()
        );
        let call = async {
            let mut stream = self.dial(b"http/1.1").await.ok()?;
            stream.write_all(request.as_bytes()).await.ok()?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.ok()?;
            let line = String::from_utf8_lossy(&answer);
            line.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
        };
        let answered = tokio::time::timeout(LIMIT, call).await;
        answered.expect("an answer, or none, in time")
    }

    fn channel(&self) -> Channel {
        let (addr, tls) = (self.addr.clone(), self.tls.clone());
        let Some(tls) = tls else {
            // tonic dials `unix:` by itself.
            let addr = match addr.starts_with("unix:") {
                true => addr,
                false => format!("http://{addr}"),
            };
            let plain = Endpoint::from_shared(addr).unwrap();
            return plain.connect_timeout(LIMIT).connect_lazy();
        };
        let endpoint = Endpoint::from_static("http://hub").connect_timeout(LIMIT);
        let dialer = Self {
            who: String::new(),
            addr,
            tls: Some(tls),
        };
        let dialer = Arc::new(dialer);
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
            let dialer = dialer.clone();
            async move { dialer.dial(b"h2").await.map(TokioIo::new) }
        }))
    }

    /// Calls a method with an empty message, and the code of the answer.
    async fn call(&self, method: &Method, generation: Option<u64>) -> Code {
        let call = async {
            let mut grpc = tonic::client::Grpc::new(self.channel());
            grpc.ready().await.map_err(|_| Code::Unavailable)?;
            let mut request = Request::new(());
            if let Some(g) = generation {
                let value = g.to_string().parse().unwrap();
                request.metadata_mut().insert(GENERATION_HEADER, value);
            }
            let path = http::uri::PathAndQuery::from_static(method.path);
            let codec = tonic_prost::ProstCodec::<(), ()>::default();
            let answer = grpc.server_streaming(request, path, codec).await;
            let mut answer = answer.map_err(code)?.into_inner();
            if !STREAMS.contains(&short(method)) {
                answer.message().await.map_err(code)?;
            }
            Ok(())
        };
        match tokio::time::timeout(LIMIT, call).await {
            Ok(Ok(())) => Code::Ok,
            Ok(Err(code)) => code,
            Err(_) => Code::DeadlineExceeded,
        }
    }

    /// Calls every method, reads as whoever may lease, and compares.
    async fn expects(&self, what: &str, generation: Option<u64>, code: impl Fn(&Method) -> Code) {
        let mut wrong = Vec::new();
        let lease = Method::at("/hub.v1.Unsealed/Lease").unwrap();
        let (got, wanted) = (self.read(generation).await, read(code(lease)));
        if got != wanted {
            wrong.push(format!("bytes: {got:?} and not {wanted:?}"));
        }
        for method in METHODS {
            let (got, wanted) = (self.call(method, generation).await, code(method));
            if got != wanted {
                wrong.push(format!("{}: {got:?} and not {wanted:?}", short(method)));
            }
        }
        assert!(wrong.is_empty(), "{}, {what}: {wrong:#?}", self.who);
    }
}

/// The code of the hub's answer. Whatever this side makes of a connection that was closed on it is
/// no answer: UNAVAILABLE.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn code(status: tonic::Status) -> Code {
    match std::error::Error::source(&status) {
        Some(_) => Code::Unavailable,
        None => status.code(),
    }
}

/// The status of bytes for whoever gets this code for a lease.
fn read(lease: Code) -> Option<u16> {
    match lease {
        Code::Unavailable => None,
        Code::Unauthenticated => Some(401),
        Code::PermissionDenied => Some(403),
        Code::Aborted => Some(409),
        _ => Some(404),
    }
}

fn short(method: &Method) -> &'static str {
    method.path.trim_start_matches("/hub.v1.")
}

/// What whoever may call the method gets for an empty message.
fn empty(method: &Method) -> Code {
    let row = EMPTY.iter().find(|(name, _)| *name == short(method));
    row.unwrap_or_else(|| panic!("{} is new: say what it answers", method.path))
        .1
}

/// A spoke of this service that joined, as an authority with this clock sees it.
fn joined(dir: &Path, authority: &Authority, caller: &Caller) -> Held {
    let bundle = dir.join(format!("{}-{}.bundle", caller.service, caller.instance));
    let day = secs(24 * 3600);
    let invitation = authority.invite(caller, "hub:1", day).unwrap();
    invitation.write(&bundle).unwrap();
    let mut held = Held::open(&bundle.with_extension("held"), Some(&bundle)).unwrap();
    let credential = authority
        .join(invitation.certificate(), &held.public_key())
        .unwrap();
    held.accept(credential).unwrap();
    held
}

fn hello(service: &str) -> HelloRequest {
    HelloRequest {
        major: hub_proto::API_VERSION.0,
        service: service.into(),
        ..HelloRequest::default()
    }
}

fn caller(service: &str, instance: &str) -> Caller {
    format!("{service}/{instance}").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_by_every_service() {
    let mut cfg = NetConfig::default();
    // Each call is made on a connection of its own.
    let many = [("HANDSHAKES", "1000000"), ("CALLS", "1000000")];
    for (key, value) in many.map(|(k, v)| (format!("LOTUS_MINER__API__{k}_PER_SECOND"), v)) {
        cfg.hub_env.insert(key, value.into());
    }
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let hub = net.root().join("miner");
    let addr = lotus_runtime::addr_file::read(&hub.join("run"), "api").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let now = Authority::open(&hub.join("ca")).unwrap();
    let hour_ago = || SystemTime::now() - secs(3600);
    let before = Authority::with_clock(&hub.join("ca"), Arc::new(hour_ago)).unwrap();
    let month_ago = || SystemTime::now() - secs(30 * 24 * 3600);
    let month = Authority::with_clock(&hub.join("ca"), Arc::new(month_ago)).unwrap();
    let socket = format!("unix:{}", hub.join("run/hub.sock").display());
    let stranger = Authority::open(&dir.path().join("another-hub")).unwrap();

    let first = Someone::new(&addr, &joined(dir.path(), &now, &caller("deals", "hello")));
    let there = HubClient::new(first.channel())
        .hello(hello("deals"))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(there.data_socket, "", "of no use on another host");
    let client = Someone::new(&socket, &joined(dir.path(), &now, &caller("deals", "here")));
    let here = HubClient::new(client.channel())
        .hello(hello("deals"))
        .await
        .unwrap()
        .into_inner();
    assert!(here.data_socket.ends_with("data.sock"), "{here:?}");
    let generation = there.generation;

    for service in SERVICES {
        let allowed = |m: &Method| m.may(service);
        let held = joined(dir.path(), &now, &caller(service, "good"));
        let good = Someone::new(&addr, &held);
        let of_its_own = |m: &Method| match allowed(m) {
            true => empty(m),
            false => Code::PermissionDenied,
        };
        good.expects("in force", Some(generation), of_its_own).await;
        good.expects("no generation", None, of_its_own).await;
        let here = Someone::new(&socket, &held);
        here.expects("on the hub's host", None, of_its_own).await;
        let stale = |m: &Method| match allowed(m) {
            true => Code::Aborted,
            false => Code::PermissionDenied,
        };
        good.expects("stale", Some(generation - 1), stale).await;

        let late = joined(dir.path(), &before, &caller(service, "late"));
        let late = Someone::new(&addr, &late);
        // In the order of the list: a connection whose identity was renewed is as good as before.
        let renews = |m: &Method| match short(m) {
            "Credentials/Renew" => Code::Ok,
            "Credentials/List" | "Credentials/Revoke" => of_its_own(m),
            _ => Code::Unauthenticated,
        };
        late.expects("expired", None, renews).await;
        let long_ago = joined(dir.path(), &month, &caller(service, "long-ago"));
        let renews_here_alone = |addr: &str, code| {
            let late = Someone::new(addr, &long_ago);
            async move {
                let renew = Method::at("/hub.v1.Credentials/Renew").unwrap();
                assert_eq!(
                    late.call(renew, None).await,
                    code,
                    "{service} at {}",
                    late.addr
                );
            }
        };
        renews_here_alone(&addr, Code::Unauthenticated).await;
        renews_here_alone(&socket, Code::Ok).await;

        let subscribe = Method::at("/hub.v1.Events/Subscribe").unwrap();
        for topic in ["piece", "sector", "head"]
            .into_iter()
            .filter(|_| allowed(subscribe))
        {
            let request = SubscribeRequest {
                topics: vec![topic.into()],
                ..SubscribeRequest::default()
            };
            let asked = EventsClient::new(good.channel()).subscribe(request).await;
            let wanted = match hub_proto::access::topics(service).contains(&topic) {
                true => Code::Ok,
                false => Code::PermissionDenied,
            };
            let got = asked.map_or_else(|s| s.code(), |_| Code::Ok);
            assert_eq!(got, wanted, "{service} about {topic}");
        }
        // Each says what it is, and the certificate says so too.
        let other = SERVICES.into_iter().find(|s| *s != service).unwrap();
        for (claimed, wanted) in [(service, Code::Ok), (other, Code::PermissionDenied)] {
            let said = HubClient::new(good.channel()).hello(hello(claimed)).await;
            let got = said.map_or_else(|s| s.code(), |_| Code::Ok);
            assert_eq!(got, wanted, "{service} says {claimed}");
        }

        assert!(now.revoke(&caller(service, "good")).unwrap());
        good.expects("revoked", None, |_| Code::Unauthenticated)
            .await;

        let theirs = joined(
            &dir.path().join("another-hub"),
            &stranger,
            &caller(service, "good"),
        );
        let theirs = Someone::new(&addr, &theirs);
        theirs
            .expects("of another hub", None, |_| Code::Unavailable)
            .await;
    }

    // Whoever comes with a bundle can join, and nothing else.
    let bundle = dir.path().join("joining.bundle");
    let invitation = now.invite(&caller("deals", "new"), "hub:1", LIMIT).unwrap();
    invitation.write(&bundle).unwrap();
    let held = Held::open(&dir.path().join("joining"), Some(&bundle)).unwrap();
    let joining = |m: &Method| match m.callers.contains(&JOINING) {
        // An empty key is none.
        true => Code::Unauthenticated,
        false => Code::PermissionDenied,
    };
    Someone::new(&addr, &held)
        .expects("a bundle", None, joining)
        .await;

    // The operator's processes need none.
    let operator = Someone {
        who: "operator".into(),
        addr: socket,
        tls: None,
    };
    let any = |m: &Method| match short(m) {
        "Credentials/Join" | "Credentials/Renew" => Code::PermissionDenied,
        _ => empty(m),
    };
    operator.expects("on the hub's host", None, any).await;

    // Without a certificate nobody gets as far as a call.
    let nobody = |tls| Someone {
        who: "nobody".into(),
        addr: addr.clone(),
        tls,
    };
    nobody(None)
        .expects("without TLS", None, |_| Code::Unavailable)
        .await;
    let text: serde_json::Value = serde_json::from_slice(&std::fs::read(&bundle).unwrap()).unwrap();
    let authority = base64::engine::general_purpose::STANDARD
        .decode(text["authority"].as_str().unwrap())
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.into()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut bare = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    bare.alpn_protocols = vec![b"h2".to_vec()];
    nobody(Some(Arc::new(bare)))
        .expects("without a certificate", None, |_| Code::Unavailable)
        .await;

    net.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spoke_joins_and_is_sent_away() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let hub = net.root().join("miner").display().to_string();
    let miner = async |words: &[&str]| {
        let args = [words, &["--json", "--repo", &hub]].concat();
        let out = net.run("lotus-miner", &args).await.unwrap();
        serde_json::from_str::<serde_json::Value>(&out).unwrap()
    };

    let (repo, bundle) = Far::join(&net, "retrieval", "far", At::Here).await.unwrap();
    // Another host that got hold of the file.
    let bundle = bundle.display().to_string();
    let thief = net.root().join("thief").display().to_string();
    let refused = net
        .run("lotus-markets", &["join", &bundle, "--repo", &thief])
        .await;
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("was used already"), "{refused}");

    let far = Far::run(&net, "retrieval", repo, At::Here).await.unwrap();
    let state = async |who: &str| {
        let listed = miner(&["credentials", "list"]).await;
        let rows = listed.as_array().unwrap();
        let row = rows.iter().find(|r| r["who"] == who).unwrap();
        row["state"].as_str().unwrap().to_owned()
    };
    // Those of this host have theirs from the supervisor.
    for who in [
        "retrieval/far",
        "retrieval/local",
        "deals/local",
        "indexing/local",
    ] {
        assert_eq!(state(who).await, "joined", "{who}");
    }

    miner(&["credentials", "revoke", "retrieval/far"]).await;
    net.wait("the spoke to hear of it", secs(30), async |_| {
        far.log().contains("was revoked").then_some(())
    })
    .await
    .unwrap_or_else(|e| panic!("{e}: {}", far.log()));
    assert!(!far.ready().await);
    far.kill().await.unwrap();
    assert_eq!(state("retrieval/far").await, "revoked");
    assert_eq!(state("retrieval/local").await, "joined");

    // All of that is written down, by a log that goes on after the hub was killed.
    let before = miner(&["audit", "verify"]).await;
    let hub_was = net.kill9("hub").await.unwrap();
    net.wait("another hub", secs(60), async |net| {
        let hub = net.process("hub").await.ok()?;
        (hub.ready && hub.pid != Some(hub_was)).then_some(())
    })
    .await
    .unwrap();
    let noted = format!(
        "{}:{}",
        before["head"]["seq"],
        before["head"]["hash"].as_str().unwrap()
    );
    let after = miner(&["audit", "verify", "--head", &noted]).await;
    assert!(after["records"].as_u64() >= before["records"].as_u64());
    let listed = miner(&["audit", "list", "-n", "1000"]).await;
    let has = |who: &str, method: &str, key: &str, outcome: &str| {
        let same = |r: &serde_json::Value| {
            r["who"] == who && r["method"] == method && r["key"] == key && r["outcome"] == outcome
        };
        let all = listed.as_array().unwrap();
        assert!(all.iter().any(same), "{who} {method}: {listed:#}");
    };
    has(
        "retrieval/far (joining)",
        "/hub.v1.Credentials/Join",
        "",
        "ok",
    );
    has(
        "retrieval/far (joining)",
        "/hub.v1.Credentials/Join",
        "",
        "Unauthenticated",
    );
    let revoke = "/hub.v1.Credentials/Revoke";
    has("operator", revoke, "retrieval/far", "ok");
    // Somebody makes another one of it.
    let copy = net.root().join("audit-copy");
    std::fs::create_dir(&copy).unwrap();
    let file = "00000001.jsonl";
    let text = std::fs::read_to_string(net.root().join("miner/audit").join(file)).unwrap();
    let at = copy.display().to_string();
    let changed = text.replace("\"retrieval/far\"", "\"deals/local\"");
    assert_ne!(text, changed);
    for (text, sound) in [(text, true), (changed, false)] {
        std::fs::write(copy.join(file), text).unwrap();
        let args = ["audit", "verify", "--dir", &at, "--repo", &hub];
        let said = net.run("lotus-miner", &args).await;
        assert_eq!(said.is_ok(), sound, "{said:?}");
    }
    net.stop().await.unwrap();
}
