//! A hub with a journal that was filled, its spokes, and the peer beside it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hub_proto::v1::{Event, SubscribeRequest};
use hub_proto::{HubClient, HubConfig};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use lotus_e2e::{Failed, Net, NetConfig, secs};
use lotus_identity::{Authority, Caller, HUB_NAME, Held, connect};
use lotus_tokens::{Perm, Tokens};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tonic::Streaming;

use super::pieces;
use crate::markets::processor_time;

/// Longest that a stop of the hub may take.
const STOP: Duration = secs(60);
/// Longest that a start may take: with a long event log it reads nothing of it.
const START: Duration = secs(120);
/// Files that may be open, at least: a thousand connections, and room.
const FILES: u64 = 4096;
/// Longest that anything of the event stream may stay away.
pub(super) const PATIENCE: Duration = secs(60);
/// What makes events here.
const TOPIC: &str = "piece";
/// Limits of the hub that would be measured in place of its work, and a chain that hardly disturbs.
const ENV: [(&str, &str); 3] = [
    ("LOTUS_MINER__API__CALLS_PER_SECOND", "100000000"),
    ("LOTUS_MINER__API__HANDSHAKES_PER_SECOND", "100000"),
    ("LOTUS_MINER__EVENTS__KEEP", "1000000000"),
];
const CHAIN: &str = "--listen 127.0.0.1:0 --sector-size 8MiB --block-time-ms 5000 --deadlines 8 \
                     --deadline-epochs 12 --winning-lookback 10 --seed-delay 4";
/// Longest that a sector may take to be proven.
const SEALING: Duration = secs(600);
/// Its state then, as it holds no data.
pub(super) const SEALED: &str = "Available";

/// A hub on a devnet, without spokes of its own.
pub(super) struct Rig {
    net: Net,
    pub(super) pid: u32,
    addr: SocketAddr,
    authority: Authority,
    identities: PathBuf,
    peer: PathBuf,
    /// Of clients of the Lotus API, which trust its certificate.
    lotus: Arc<rustls::ClientConfig>,
    /// That certificate and its key.
    _pair: TempDir,
}

impl Rig {
    /// With so many pieces that were refused, and so many events.
    pub(super) async fn start(pieces: u64, events: u64) -> Result<Self, Failed> {
        raise_file_limit()?;
        let mut cfg = NetConfig {
            services: Vec::new(),
            devnet_args: CHAIN.split_whitespace().map(str::to_owned).collect(),
            ..NetConfig::default()
        };
        let more = ENV.map(|(k, v)| (k.to_owned(), v.to_owned()));
        cfg.hub_env.extend(BTreeMap::from(more));
        let pair = tempfile::tempdir()?;
        let lotus = https(pair.path(), &mut cfg.hub_env)?;
        let net = Net::start(&cfg).await?;
        net.ready(START).await?;
        let root = net.root().display().to_string();
        let stop = ["stop", "hub", "--force", "--repo", &root];
        net.run("lotus-supervisor", &stop).await?;
        net.wait("the hub to stop", STOP, async |n| {
            let hub = n.process("hub").await.ok()?;
            hub.pid.is_none().then_some(())
        })
        .await?;
        let hub = net.root().join("miner");
        let (journal, peer) = (hub.join("journal.redb"), net.root().join("peer"));
        std::fs::create_dir(&peer)?;
        let copy = peer.join("journal.redb");
        let filled = tokio::task::spawn_blocking(move || {
            pieces::fill(&journal, pieces, events)?;
            std::fs::copy(&journal, &copy)?;
            Ok::<_, Failed>(())
        });
        filled.await.map_err(|e| Failed::at("journal", e))??;
        let start = ["start", "hub", "--repo", &root];
        net.run("lotus-supervisor", &start).await?;
        net.ready(START).await?;
        let pid = net.process("hub").await?.pid;
        let authority = Authority::open(&hub.join("ca"));
        Ok(Self {
            pid: pid.ok_or_else(|| Failed::new("no hub"))?,
            addr: api_addr(&hub)?,
            authority: authority.map_err(|e| Failed::at("authority", e))?,
            identities: net.root().join("identities"),
            peer,
            lotus,
            _pair: pair,
            net,
        })
    }

    /// Spokes that have joined: the folders of their identities. Those of retrieval hear the events
    /// of every spoke's pieces.
    pub(super) fn identities(&self, count: usize) -> Result<Vec<PathBuf>, Failed> {
        (0..count)
            .map(|n| self.identity(&format!("retrieval/r{n}")))
            .collect()
    }

    fn identity(&self, who: &str) -> Result<PathBuf, Failed> {
        identity(&self.authority, &self.identities, who)
    }

    /// The spoke whose deals the pieces are.
    pub(super) async fn seller(&self) -> Result<HubClient, Failed> {
        self.spoke(&self.identity(pieces::OWNER)?).await
    }

    /// A spoke that has said hello over a connection of its own.
    pub(super) async fn spoke(&self, identity: &Path) -> Result<HubClient, Failed> {
        spoke(self.addr, identity).await
    }

    /// Where spokes reach the hub.
    pub(super) const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Offers pieces whose time is over, at a steady pace: each makes two events.
    pub(super) async fn offers(
        &self,
        spoke: &HubClient,
        numbers: std::ops::Range<u64>,
        pace: Duration,
    ) -> Result<(), Failed> {
        let mut pace = tokio::time::interval(pace);
        for n in numbers {
            pace.tick().await;
            let offer = spoke.request(pieces::offer(n)?);
            let offered = spoke.pieces().offer(offer).await;
            offered.map_err(|e| Failed::at("offer", e.message()))?;
        }
        Ok(())
    }

    /// The peer, in a process of its own, with a copy of the journal from before the hub started.
    pub(super) async fn peer(&self) -> Result<Peer, Failed> {
        let exe = std::env::current_exe()?;
        let mut process = Command::new(exe)
            .args(["json-rpc", "--repo"])
            .arg(&self.peer)
            .arg("--authority")
            .arg(self.net.root().join("miner/ca"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Failed::at("json-rpc", e))?;
        let out = process.stdout.take();
        let mut out = BufReader::new(out.ok_or_else(|| Failed::new("no output"))?);
        let mut line = String::new();
        let said = tokio::time::timeout(START, out.read_line(&mut line)).await;
        said.map_err(|e| Failed::at("json-rpc", e))??;
        let token = bearer(&Tokens::open(&self.peer)?)?;
        let identity = self.identity("retrieval/peer")?;
        let held = Held::open(&identity, None).map_err(|e| Failed::at("identity", e))?;
        let tls = held.client_config(&[b"http/1.1"]);
        Ok(Peer {
            addr: line.trim().parse().map_err(|e| Failed::at("json-rpc", e))?,
            tls: Arc::new(tls.map_err(|e| Failed::at("identity", e))?),
            token,
            pid: process.id().ok_or_else(|| Failed::new("no json-rpc"))?,
            _process: process,
        })
    }

    /// Seals a sector without data. Returns its number.
    pub(super) async fn sector(&self) -> Result<u64, Failed> {
        let repo = self.net.root().join("miner").display().to_string();
        let pledge = ["sectors", "pledge", "--really-do-it", "--repo", &repo];
        self.net.run("lotus-miner", &pledge).await?;
        let list = ["sectors", "list", "--json", "--repo", &repo];
        self.net
            .wait("a sector to be proven", SEALING, async |net| {
                let all = net.run("lotus-miner", &list).await.ok()?;
                let all: serde_json::Value = serde_json::from_str(&all).ok()?;
                let first = all.as_array()?.first()?;
                (first["state"] == SEALED).then(|| first["number"].as_u64())?
            })
            .await
    }

    /// Connections to the Lotus API of the hub itself.
    pub(super) async fn lotus(&self, count: usize) -> Result<Vec<JsonRpc>, Failed> {
        let hub = self.net.root().join("miner");
        let addr = lotus_runtime::addr_file::read(&hub.join("run"), "lotus-api");
        let addr = addr.map_err(|e| Failed::at("lotus-api", e))?;
        let token = bearer(&Tokens::open(&hub)?)?;
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            let tcp = TcpStream::connect(&addr).await?;
            all.push(JsonRpc::over(self.lotus.clone(), tcp, token.clone()).await?);
        }
        Ok(all)
    }

    pub(super) async fn stop(self) -> Result<(), Failed> {
        self.net.stop().await
    }
}

/// The JSON-RPC server.
pub(super) struct Peer {
    pub(super) pid: u32,
    addr: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
    token: HeaderValue,
    _process: Child,
}

impl Peer {
    /// A connection, which is kept.
    pub(super) async fn connect(&self) -> Result<JsonRpc, Failed> {
        let tcp = TcpStream::connect(self.addr).await?;
        JsonRpc::over(self.tls.clone(), tcp, self.token.clone()).await
    }

    pub(super) async fn connections(&self, count: usize) -> Result<Vec<JsonRpc>, Failed> {
        let mut all = Vec::with_capacity(count);
        for _ in 0..count {
            all.push(self.connect().await?);
        }
        Ok(all)
    }
}

/// A client of JSON-RPC that does no more than it must.
pub(super) struct JsonRpc {
    peer: SendRequest<Full<Bytes>>,
    token: HeaderValue,
    _driver: JoinSet<()>,
}

#[derive(Serialize)]
struct Call<'a, P> {
    jsonrpc: &'static str,
    id: u64,
    method: &'a str,
    params: P,
}

#[derive(Deserialize)]
struct Answer<T> {
    result: Option<T>,
    error: Option<serde_json::Value>,
}

impl JsonRpc {
    async fn over(
        tls: Arc<rustls::ClientConfig>,
        tcp: TcpStream,
        token: HeaderValue,
    ) -> Result<Self, Failed> {
        tcp.set_nodelay(true)?;
        let stream = connect(tls, tcp).await?;
        let shaken = http1::handshake(TokioIo::new(stream)).await;
        let (peer, connection) = shaken.map_err(|e| Failed::at("json-rpc", e))?;
        let mut driver = JoinSet::new();
        driver.spawn(async move { drop(connection.await) });
        Ok(Self {
            peer,
            token,
            _driver: driver,
        })
    }

    pub(super) async fn call<T: DeserializeOwned>(
        &mut self,
        method: &str,
        params: impl Serialize + Send,
    ) -> Result<T, Failed> {
        let failed = |e: hyper::Error| Failed::at("json-rpc", e);
        let call = Call {
            jsonrpc: "2.0",
            id: 1,
            method,
            params,
        };
        let body = serde_json::to_vec(&call).map_err(|e| Failed::at("call", e))?;
        let request = Request::builder()
            .method(Method::POST)
            .uri("/rpc/v0")
            .header(HOST, "hub")
            .header(CONTENT_TYPE, "application/json")
            .header(AUTHORIZATION, &self.token)
            .body(Full::from(body))
            .map_err(|e| Failed::at("call", e))?;
        self.peer.ready().await.map_err(failed)?;
        let answer = self.peer.send_request(request).await.map_err(failed)?;
        let status = answer.status();
        let body = answer.into_body().collect().await.map_err(failed)?;
        let body = body.to_bytes();
        if status != StatusCode::OK {
            return Err(Failed(format!("json-rpc: {status}")));
        }
        let answer: Answer<T> =
            serde_json::from_slice(&body).map_err(|e| Failed::at("json-rpc", e))?;
        answer
            .result
            .ok_or_else(|| Failed(format!("json-rpc: {:?}", answer.error)))
    }
}

fn bearer(tokens: &Tokens) -> Result<HeaderValue, Failed> {
    let token = tokens.issue(&Perm::Write.up_to());
    format!("Bearer {token}")
        .parse()
        .map_err(|e| Failed::at("token", e))
}

/// A spoke that joined, as the hub's authority has it.
pub(super) fn identity(authority: &Authority, dir: &Path, who: &str) -> Result<PathBuf, Failed> {
    let caller: Caller = who.parse().map_err(|e| Failed::at(who, e))?;
    let failed = |e: lotus_runtime::Fault| Failed::at(who, e);
    let bundle = authority
        .invite(&caller, "hub:1", secs(3600))
        .map_err(failed)?;
    let certificate = bundle.certificate().clone();
    let dir = dir.join(who.replace('/', "-"));
    std::fs::create_dir_all(&dir)?;
    let mut held = Held::start(&dir, Some(bundle)).map_err(failed)?;
    let joined = authority.join(&certificate, &held.public_key());
    let joined = joined.map_err(|e| Failed::at(who, e))?;
    held.accept(joined).map_err(failed)?;
    Ok(dir)
}

/// The same as a client of the hub, over a connection of its own.
pub(super) async fn spoke(addr: SocketAddr, identity: &Path) -> Result<HubClient, Failed> {
    let held = Held::open(identity, None).map_err(|e| Failed::at("identity", e))?;
    let service = held.caller().service.to_string();
    let cfg = HubConfig {
        addr: format!("https://{addr}"),
        identity: identity.to_owned(),
        ..HubConfig::default()
    };
    let trace = lotus_runtime::trace::client_interceptor;
    let spoke = HubClient::connect(&cfg, &service, "bench", trace).await;
    spoke.map_err(|e| Failed::at("hub", e))
}

/// Lets the Lotus API speak HTTPS, with a certificate that is made in this folder, and returns how
/// clients connect that trust it.
fn https(
    dir: &Path,
    env: &mut BTreeMap<String, String>,
) -> Result<Arc<rustls::ClientConfig>, Failed> {
    let failed = |e: &dyn std::fmt::Display| Failed::at("certificate", e);
    let made = rcgen::generate_simple_self_signed([HUB_NAME.to_owned()]);
    let made = made.map_err(|e| failed(&e))?;
    for (name, pem) in [
        ("cert", made.cert.pem()),
        ("key", made.signing_key.serialize_pem()),
    ] {
        let path = dir.join(name);
        std::fs::write(&path, pem)?;
        let setting = format!("LOTUS_MINER__LOTUS_API__TLS_{}", name.to_uppercase());
        env.insert(setting, path.display().to_string());
    }
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).map_err(|e| failed(&e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| failed(&e))?;
    let tls = tls.with_root_certificates(roots).with_no_client_auth();
    Ok(Arc::new(tls))
}

/// Where the hub with this folder listens.
pub(super) fn api_addr(hub: &Path) -> Result<SocketAddr, Failed> {
    let addr = lotus_runtime::addr_file::read(&hub.join("run"), "api");
    let addr = addr.map_err(|e| Failed::at("api", e))?;
    addr.parse().map_err(|e| Failed::at("api", e))
}

/// The events of the log from this number on.
pub(super) async fn subscribe(
    spoke: &HubClient,
    from_seq: u64,
) -> Result<Streaming<Event>, tonic::Status> {
    let topics = vec![TOPIC.to_owned()];
    let request = SubscribeRequest { from_seq, topics };
    Ok(spoke.events().subscribe(request).await?.into_inner())
}

/// Number of the last event that the hub has.
pub(super) async fn last_event(spoke: &HubClient) -> Result<u64, Failed> {
    let request = SubscribeRequest {
        from_seq: 0,
        // It is told at once, with the number of the last event.
        topics: vec!["head".into()],
    };
    let failed = |e: tonic::Status| Failed::at("events", e.message());
    let mut heads = spoke.events().subscribe(request).await.map_err(failed)?;
    let head = tokio::time::timeout(PATIENCE, heads.get_mut().message()).await;
    let head = head.map_err(|e| Failed::at("head", e))?.map_err(failed)?;
    head.map(|h| h.seq).ok_or_else(|| Failed::new("no head"))
}

/// Processor time that the hub takes for nothing, in each second.
pub(super) async fn idle(pid: u32, time: Duration) -> Result<f64, Failed> {
    let (before, began) = (processor_time(pid)?, Instant::now());
    tokio::time::sleep(time).await;
    let used = processor_time(pid)? - before;
    Ok(used.as_secs_f64() / began.elapsed().as_secs_f64())
}

/// As many open files as the system lets this process have; the hub inherits it.
fn raise_file_limit() -> Result<(), Failed> {
    let failed = |e| Failed::at("limit of open files", e);
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    if most < FILES {
        return Err(Failed(format!(
            "this process may open {most} files, and needs {FILES}: raise `ulimit -Hn`"
        )));
    }
    setrlimit(Resource::RLIMIT_NOFILE, most, most).map_err(failed)
}
