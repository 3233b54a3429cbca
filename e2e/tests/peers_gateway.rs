//! Clients and test suites of others against the gateway of a storage provider of ours, with
//! content that came in by deals. `cargo xtask peers` runs these tests, or says what is missing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cid::Cid;
use ipld_core::ipld::Ipld;
use lotus_car::{
    ByteRange, CarStore, CarWriter, DAG_CBOR, Scope, Selector, Walk, export, pack_dir,
};
use lotus_e2e::{Net, NetConfig, demo, peers, secs};
use multihash_codetable::{Code, MultihashDigest as _};
use serde_json::Value;
use tokio::process::Command;

/// A storage provider whose gateway has the content of a CAR.
async fn provider(cfg: &NetConfig) -> Net {
    let net = Net::start(cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    net
}

/// Makes a deal for a CAR and waits until the gateway has its last block.
async fn store(net: &Net, car: &Path, http: &reqwest::Client, gateway: &str) -> CarStore {
    let sent = CarStore::open(car).unwrap();
    demo::propose(net, car).await.unwrap();
    let last = sent.cids().iter().rfind(|c| c.hash().code() != 0).unwrap();
    let url = format!("{gateway}/ipfs/{last}?format=raw");
    net.wait("the gateway to have the content", secs(120), async |_| {
        let answer = http.get(&url).send().await.ok()?;
        answer.status().is_success().then_some(())
    })
    .await
    .unwrap();
    sent
}

fn client() -> reqwest::Client {
    lotus_runtime::http_client()
        .timeout(secs(60))
        .danger_accept_invalid_certs(true)
        .build()
        .unwrap()
}

/// A folder of what DAGs have: files of one block and of many, one twice, folders in folders, and
/// one of so many entries that it is sharded.
fn files(dir: &Path) {
    fs::create_dir_all(dir.join("sub/deep")).unwrap();
    fs::create_dir_all(dir.join("many")).unwrap();
    let big: Vec<u8> = (0..3_000_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0])
        .collect();
    fs::write(dir.join("sub/big.bin"), &big).unwrap();
    fs::write(dir.join("sub/deep/part.bin"), &big[..1_500_000]).unwrap();
    fs::write(dir.join("a.txt"), "the same").unwrap();
    fs::write(dir.join("b.txt"), "the same").unwrap();
    fs::write(dir.join("empty"), "").unwrap();
    for i in 0..6000 {
        let name = format!("many/an entry with a longer name, number {i:05}.txt");
        fs::write(dir.join(name), format!("text {i}")).unwrap();
    }
}

/// Packs [`files`], and a dag-cbor node that links to the folder. Returns the CIDs of both.
fn packed(dir: &Path) -> (Cid, Cid) {
    files(&dir.join("files"));
    let root = pack_dir(&dir.join("files"), &dir.join("files.car")).unwrap();
    let node = Ipld::Map([("tree".to_owned(), Ipld::Link(root))].into());
    let node = serde_ipld_dagcbor::to_vec(&node).unwrap();
    let top = Cid::new_v1(DAG_CBOR, Code::Sha2_256.digest(&node));
    let all = CarStore::open(&dir.join("files.car")).unwrap();
    let out = fs::File::create(dir.join("data.car")).unwrap();
    let mut car = CarWriter::new(std::io::BufWriter::new(out), &[top]).unwrap();
    car.write(&top, &node).unwrap();
    for cid in all.cids() {
        car.write(cid, &all.get(cid).unwrap().unwrap()).unwrap();
    }
    car.finish().unwrap();
    (top, root)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs go: cargo xtask peers"]
async fn gateway_conformance() {
    let module = "github.com/ipfs/gateway-conformance";
    let suite = peers::go(module, "v0.13.2", "cmd/gateway-conformance");
    let Some(suite) = peers::installed("gateway-conformance", suite.await) else {
        return;
    };
    let net = provider(&NetConfig::default()).await;
    let gateway = net.spoke_url("retrieval").unwrap();
    let dir = net.root().join("fixtures");
    let words = "extract-fixtures --merged --ipns=false --dnslink=false --dir";
    let mut extract = Command::new(&suite);
    extract.args(words.split(' ')).arg(&dir);
    peers::run(&mut extract, peers::RUN).await.unwrap();
    store(&net, &dir.join("fixtures.car"), &client(), &gateway).await;

    let report = net.root().join("conformance.json");
    let words = "--specs trustless-gateway,-trustless-ipns-gateway --json-output";
    let mut test = Command::new(&suite);
    test.args(["test", "--gateway-url", &gateway])
        .args(words.split(' '))
        .arg(&report);
    // The suite is compiled first.
    peers::run(&mut test, secs(900)).await.unwrap();
    let lines = fs::read_to_string(report).unwrap();
    let events = lines.lines().map(serde_json::from_str::<Value>);
    let mut passed = BTreeSet::new();
    for event in events {
        let event = event.unwrap();
        let name = event["Test"].as_str().unwrap_or_default().to_owned();
        match event["Action"].as_str().unwrap() {
            "pass" => drop(passed.insert(name)),
            "fail" => panic!("{name} failed"),
            _ => {}
        }
    }
    // A suite that finds nothing to test passes too.
    for group in [
        "TestTrustlessCarPathing",
        "TestTrustlessCarDagScopeBlock",
        "TestTrustlessCarDagScopeEntity",
        "TestTrustlessCarDagScopeAll",
        "TestTrustlessCarEntityBytes",
        "TestTrustlessCarOrderAndDuplicates",
        "TestTrustlessCarFormatPrecedence",
        "TestTrustlessRaw",
        "TestTrustlessRawRanges",
    ] {
        assert!(passed.contains(group), "{group} did not run");
    }
    assert!(passed.len() > 100, "only {} cases", passed.len());
    eprintln!("gateway-conformance: {} cases passed", passed.len());
    net.stop().await.unwrap();
}

/// A way to ask lassie for a part of a DAG.
struct Way {
    args: &'static [&'static str],
    select: Selector,
}

fn ways() -> Vec<Way> {
    let scope = |args, scope| Way {
        args,
        select: Selector {
            scope,
            ..Selector::default()
        },
    };
    vec![
        scope(&["--dag-scope", "all"], Scope::All),
        scope(&["--dag-scope", "entity"], Scope::Entity),
        scope(&["--dag-scope", "block"], Scope::Block),
    ]
}

/// What lassie got is exactly what the source has for the same question.
async fn fetched(lassie: &Path, gateway: &str, path: &str, way: &Way, sent: &CarStore) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.car");
    let mut fetch = Command::new(lassie);
    fetch
        .args(["fetch", "--protocols", "http", "--providers", gateway])
        .args(way.args)
        .arg("--tempdir")
        .arg(dir.path())
        .arg("--output")
        .args([&out])
        .arg(path);
    peers::run(&mut fetch, peers::RUN).await.unwrap();
    // Opening it checks every block against its CID.
    let got = CarStore::open(&out).unwrap();
    let mut segments = path.split('/');
    let root: Cid = segments.next().unwrap().parse().unwrap();
    let segments: Vec<String> = segments.map(str::to_owned).collect();
    let walk = Walk::new(&root, &segments, way.select, |c| sent.get(c)).unwrap();
    let want: BTreeSet<Cid> = walk.map(|b| b.unwrap().0).collect();
    let came: BTreeSet<Cid> = got.cids().iter().copied().collect();
    assert_eq!(came, want, "{path} {:?}", way.args);
    assert_eq!(got.roots(), [root], "{path}");
    for cid in &came {
        assert_eq!(got.get(cid).unwrap(), sent.get(cid).unwrap(), "{cid}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs go: cargo xtask peers"]
async fn lassie() {
    let module = "github.com/filecoin-project/lassie";
    let lassie = peers::go(module, "v0.25.0", "cmd/lassie").await;
    let Some(lassie) = peers::installed("lassie", lassie) else {
        return;
    };
    let net = provider(&NetConfig::default()).await;
    let gateway = net.spoke_url("retrieval").unwrap();
    let dir = net.root().join("data");
    fs::create_dir(&dir).unwrap();
    let (top, root) = packed(&dir);
    let sent = store(&net, &dir.join("data.car"), &client(), &gateway).await;

    // Twenty of all kinds: the two roots, what stands at the start (leaves), and nodes.
    let of = |codec| {
        let all = sent.cids().iter().filter(move |c| c.codec() == codec);
        all.copied().collect::<Vec<Cid>>()
    };
    let mut cids = vec![top, root];
    cids.extend(of(lotus_car::DAG_PB).into_iter().rev().take(12));
    cids.extend(of(lotus_car::RAW).into_iter().take(20));
    let mut seen = BTreeSet::new();
    cids.retain(|c| seen.insert(*c));
    cids.truncate(20);
    assert_eq!(cids.len(), 20);
    for cid in &cids {
        for way in ways() {
            fetched(&lassie, &gateway, &cid.to_string(), &way, &sent).await;
        }
    }
    // Paths through folders, a sharded one and dag-cbor, and bytes of a file.
    let bytes = |args, from, to| Way {
        args,
        select: Selector {
            scope: Scope::Entity,
            bytes: Some(ByteRange { from, to }),
            duplicates: false,
        },
    };
    let big = format!("{root}/sub/big.bin");
    let entry = "an entry with a longer name, number 04321.txt";
    for path in [
        big.clone(),
        format!("{root}/many/{entry}"),
        format!("{top}/tree/sub/deep"),
    ] {
        for way in ways() {
            fetched(&lassie, &gateway, &path, &way, &sent).await;
        }
    }
    // Lassie follows the bytes only when it is told the scope that they imply.
    for way in [
        bytes(
            &["--dag-scope=entity", "--entity-bytes=0:1048575"],
            0,
            Some(1_048_575),
        ),
        bytes(
            &["--dag-scope=entity", "--entity-bytes=1500000:*"],
            1_500_000,
            None,
        ),
        bytes(&["--dag-scope=entity", "--entity-bytes=-10:*"], -10, None),
    ] {
        fetched(&lassie, &gateway, &big, &way, &sent).await;
    }
    net.stop().await.unwrap();
}

/// A certificate that nobody else signed, and its key, in PEM.
fn certificate(dir: &Path) -> (String, String) {
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    let write = |name: &str, what: &str, der: &[u8]| {
        let text = STANDARD.encode(der);
        let pem = format!("-----BEGIN {what}-----\n{text}\n-----END {what}-----\n");
        let path = dir.join(name);
        fs::write(&path, pem).unwrap();
        path.display().to_string()
    };
    let key = made.signing_key.serialized_der();
    (
        write("cert.pem", "CERTIFICATE", made.cert.der()),
        write("key.pem", "PRIVATE KEY", key),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs go: cargo xtask peers"]
async fn kubo() {
    let ipfs = peers::go("github.com/ipfs/kubo", "v0.42.0", "cmd/ipfs").await;
    let Some(ipfs) = peers::installed("kubo", ipfs) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = certificate(dir.path());
    // The address is advertised, so it is chosen before anything starts.
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = free.local_addr().unwrap();
    drop(free);
    let mut cfg = NetConfig::default();
    let gateway = format!("https://{addr}");
    for (name, value) in [
        ("RETRIEVAL__LISTEN", addr.to_string()),
        ("RETRIEVAL__TLS_CERT", cert),
        ("RETRIEVAL__TLS_KEY", key),
        ("INDEXING__RETRIEVAL_URL", gateway.clone()),
    ] {
        cfg.spoke_env
            .insert(format!("LOTUS_MARKETS__{name}"), value);
    }
    let net = provider(&cfg).await;
    let (_, root) = packed(dir.path());
    let sent = store(&net, &dir.path().join("data.car"), &client(), &gateway).await;

    let repo = dir.path().join("ipfs");
    let command = |words: &[&str]| {
        let mut command = Command::new(&ipfs);
        command.args(words).env("IPFS_PATH", &repo);
        command.env("IPFS_TELEMETRY", "off");
        command
    };
    let run = async |words: &[&str]| peers::run(&mut command(words), peers::RUN).await.unwrap();
    run(&["init", "--empty-repo", "--profile=test,autoconf-off"]).await;
    // It knows of content from our delegated routing alone, and takes our own certificate.
    let router = format!("[\"{}\"]", net.spoke_url("indexing").unwrap());
    for (key, value) in [
        ("Routing.Type", "\"delegated\""),
        ("Routing.DelegatedRouters", &router),
        ("HTTPRetrieval.Enabled", "true"),
        ("HTTPRetrieval.TLSInsecureSkipVerify", "true"),
        // Such a router is asked only.
        ("Provide.Enabled", "false"),
    ] {
        run(&["config", "--json", key, value]).await;
    }
    let log = fs::File::create(dir.path().join("daemon.log")).unwrap();
    let mut daemon = command(&["daemon"])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    net.wait("kubo to answer", secs(60), async |_| {
        let id = command(&["id"]).output().await.ok()?;
        (id.status.success() && repo.join("api").exists()).then_some(())
    })
    .await
    .unwrap();

    // The folder with its sharded one, one block at a time.
    let root = root.to_string();
    let out = dir.path().join("kubo.car").display().to_string();
    let mut fetch = command(&["pin", "add", &root]);
    fetch.stdin(Stdio::null()).kill_on_drop(true);
    let done = tokio::time::timeout(secs(400), fetch.status()).await;
    let log = || fs::read_to_string(dir.path().join("daemon.log")).unwrap();
    assert!(
        done.is_ok_and(|s| s.unwrap().success()),
        "{}\n{}",
        log(),
        net.logs()
    );
    // It exports what it has, and no more.
    let mut export_all = command(&["dag", "export", "--progress=false", &root]);
    export_all.stdout(fs::File::create(&out).unwrap());
    let done = tokio::time::timeout(secs(60), export_all.status()).await;
    assert!(done.unwrap().unwrap().success());
    let got = CarStore::open(Path::new(&out)).unwrap();
    let root: Cid = root.parse().unwrap();
    let came: BTreeSet<Cid> = got.cids().iter().copied().collect();
    let want = lotus_car::walk(&root, Scope::All, |c| sent.get(c)).unwrap();
    let want: BTreeSet<Cid> = want.map(|b| b.unwrap().0).collect();
    assert_eq!(came, want);
    // And its files, byte for byte.
    export(&root, &mut |c| got.get(c), &dir.path().join("back")).unwrap();
    let mut diff = Command::new("diff");
    diff.arg("-r");
    diff.args([dir.path().join("files"), dir.path().join("back")]);
    peers::run(&mut diff, peers::RUN).await.unwrap();

    // All of it went over HTTP/2: the gateway counts by version.
    let admin = lotus_runtime::addr_file::read(&net.root().join("markets/run"), "retrieval-admin");
    let metrics = reqwest::get(format!("http://{}/metrics", admin.unwrap()));
    let metrics = metrics.await.unwrap().text().await.unwrap();
    let served: u64 = metrics
        .lines()
        .filter(|l| l.starts_with("lotus_markets_retrieval_requests_total"))
        .filter(|l| l.contains("http=\"2\"") && l.contains("status=\"200\""))
        .filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok())
        .sum();
    assert!(served >= want.len() as u64, "{served} of {}", want.len());
    run(&["shutdown"]).await;
    let ended = tokio::time::timeout(secs(60), daemon.wait()).await;
    ended.unwrap().unwrap();
    net.stop().await.unwrap();
}
