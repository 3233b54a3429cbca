//! Programs of others against the index and its advertisements: see `peers.rs`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cid::Cid;
use cid::multibase::Base;
use hub_proto::v1::PiecePhase;
use lotus_car::{CarWriter, section_prefix};
use lotus_e2e::{binary, peers, secs};
use lotus_piece_index::PieceIndex;
use lotus_piece_index::testing::{FakeHub, fake_hub, indexed};
use lotus_runtime::addr_file;
use lotus_types::{Commitment, PieceCid, PieceInfo};
use multihash_codetable::{Code, MultihashDigest};
use serde_json::Value;
use tokio::process::{Child, Command};

/// The lists of what pieces hold are CARv2 indexes that go-car reads, with the offsets that it would
/// find itself.
#[tokio::test]
#[ignore = "needs go: cargo xtask peers"]
async fn go_car() {
    let Some(reader) = peers::installed("go-car", peers::go_here("go-car").await) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let index = PieceIndex::open(&dir.path().join("index.redb")).unwrap();
    for (n, blocks) in [0u32, 1, 7, 40_000].into_iter().enumerate() {
        // Two hash functions, and each block twice.
        let data: Vec<_> = (0..blocks).map(|b| [b.to_be_bytes(); 9].concat()).collect();
        let cid = |b: &Vec<u8>| {
            let code = if b[3].is_multiple_of(3) {
                Code::Blake2b256
            } else {
                Code::Sha2_256
            };
            Cid::new_v1(0x55, code.digest(b))
        };
        let root = cid(&vec![0; 36]);
        let mut car = CarWriter::new(Vec::new(), &[root]).unwrap();
        for block in data.iter().chain(&data) {
            car.write(&cid(block), block).unwrap();
        }
        let car = car.finish().unwrap();
        let piece = PieceCid::new(Commitment([u8::try_from(n).unwrap(); 32]));
        assert_eq!(index.add_car(&piece, &car[..]).unwrap(), u64::from(blocks));

        let list = index.sidecar_path(&piece);
        let printed = peers::run(Command::new(&reader).arg(&list), peers::RUN)
            .await
            .unwrap();
        let read: BTreeMap<&str, usize> = printed
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(hash, at)| (hash, at.parse().unwrap()))
            .collect();
        assert_eq!(printed.lines().count(), data.len());
        assert_eq!(read.len(), data.len());
        for block in &data {
            let cid = cid(block);
            let hex: String = cid
                .hash()
                .to_bytes()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            let at = read[&hex[..]];
            let section = [section_prefix(&cid, block.len()), block.clone()].concat();
            assert_eq!(car[at..at + section.len()], section, "{cid}");
        }
    }
}

/// Time for a thousand advertisements on two busy cores.
const LONG: Duration = secs(600);
/// Pieces, with two advertisements each.
const PIECES: u32 = 350;
/// Pieces that go again, with two removals each.
const GONE: u32 = 150;

/// Asks until `ask` gives an answer, at most for [`LONG`]; then fails with `log`.
async fn until<T>(what: &str, log: &Path, ask: impl AsyncFn() -> Option<T>) -> T {
    let end = Instant::now() + LONG;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        let said = || fs::read_to_string(log).unwrap_or_default();
        assert!(Instant::now() < end, "{what}: in vain\n{}", said());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Starts a program that ends with the test, and writes what it says to a file.
fn daemon(command: &mut Command, log: &Path) -> Child {
    let log = fs::File::create(log).unwrap();
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// A free address, for a program that does not say which one it took.
fn free() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// An indexer of IPNI that knows nothing yet.
struct Indexer {
    find: String,
    ingest: String,
    http: reqwest::Client,
    log: PathBuf,
    _daemon: Child,
}

impl Indexer {
    async fn start(exe: &Path, dir: &Path) -> Self {
        let (find, ingest) = (free(), free());
        let maddr = |port: u16| format!("/ip4/127.0.0.1/tcp/{port}");
        let command = || {
            let mut command = Command::new(exe);
            command.env("STORETHEINDEX_PATH", dir);
            command
        };
        let mut init = command();
        init.args(["init", "--store", "pebble", "--no-bootstrap"])
            .args(["--listen-admin", "none", "--listen-p2p", &maddr(0)])
            .args(["--listen-finder", &maddr(find.port())])
            .args(["--listen-ingest", &maddr(ingest.port())]);
        peers::run(&mut init, peers::RUN).await.unwrap();
        let log = dir.join("log");
        let daemon = daemon(command().arg("daemon"), &log);
        let ingest = format!("http://{ingest}");
        let health = format!("{ingest}/health");
        let http = lotus_runtime::http_client()
            .timeout(secs(20))
            .build()
            .unwrap();
        until("the indexer to answer", &log, async || {
            let answer = http.get(&health).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
        Self {
            find: format!("http://{find}"),
            ingest,
            http,
            log,
            _daemon: daemon,
        }
    }

    /// Waits until it has taken in all of a chain.
    async fn has(&self, provider: &str, head: &str) {
        let url = format!("{}/providers/{provider}", self.find);
        until("the chain to be taken in", &self.log, async || {
            let answer = self.http.get(&url).send().await.ok()?;
            let known: Value = answer.json().await.ok()?;
            (known["LastAdvertisement"]["/"] == head).then_some(())
        })
        .await;
    }
}

/// The spoke of indexing, for a hub with pieces.
struct Spoke {
    exe: PathBuf,
    repo: PathBuf,
    log: PathBuf,
    _service: Child,
}

impl Spoke {
    fn start(hub: &FakeHub, repo: PathBuf, announce: &str) -> Self {
        fs::create_dir(&repo).unwrap();
        let addr = hub.config().addr;
        let config = format!(
            "[hub]\naddr = {addr:?}\n[indexing]\nlisten = \"127.0.0.1:0\"\n\
             announce_urls = [{announce:?}]\nextended_providers = [\"cache={CACHE}\"]\n"
        );
        fs::write(repo.join("config.toml"), config).unwrap();
        let (exe, log) = (binary("lotus-markets").unwrap(), repo.join("log"));
        let mut run = Command::new(&exe);
        run.args(["run", "--services=indexing", "--repo"])
            .arg(&repo);
        let service = daemon(&mut run, &log);
        Self {
            exe,
            repo,
            log,
            _service: service,
        }
    }

    async fn index(&self, args: &[&str]) -> Value {
        let mut command = Command::new(&self.exe);
        command.arg("index").args(args).args(["--json", "--repo"]);
        let printed = peers::run(command.arg(&self.repo), peers::RUN).await;
        serde_json::from_str(&printed.unwrap()).unwrap()
    }

    /// Waits until it has so many pieces, all advertised. Returns the provider and the newest
    /// advertisement.
    async fn pieces(&self, count: u32, http: &reqwest::Client) -> (String, String) {
        let want = format!("\"{count} pieces\"");
        until("the pieces to be indexed", &self.log, async || {
            let admin = addr_file::read(&self.repo.join("run"), "indexing-admin").ok()?;
            let answer = http
                .get(format!("http://{admin}/readyz"))
                .send()
                .await
                .ok()?;
            answer.text().await.ok()?.contains(&want).then_some(())
        })
        .await;
        let stats = self.index(&["stats"]).await;
        let text = |key: &str| stats[key].as_str().unwrap().to_owned();
        (text("provider"), text("head"))
    }
}

/// Another provider of everything.
const CACHE: &str = "https://cache.example";

/// By multihash in base 58: address, context and metadata of each answer, the latter in base 64.
type Found = BTreeMap<String, BTreeSet<[String; 3]>>;

fn base58(cid: &Cid) -> String {
    Base::Base58Btc.encode(cid.hash().to_bytes())
}

/// What an indexer must answer about a piece.
fn advertised(piece: &PieceInfo, blocks: &[Cid], found: &mut Found) {
    let (v1, v2) = (piece.cid.cid(), piece.cid_v2());
    let sides = [(v1, "oBIA", blocks), (v2, "sBIA", &[v1, v2])];
    for (context, metadata, cids) in sides {
        let context = STANDARD.encode(context.to_bytes());
        for cid in cids {
            let of = found.entry(base58(cid)).or_default();
            // The other one has the metadata of each: "none" stands for that.
            for (address, metadata) in [
                ("/ip4/127.0.0.1/tcp/7777/http", metadata),
                ("/dns/cache.example/tcp/443/https", "none"),
            ] {
                of.insert([address, &context, metadata].map(str::to_owned));
            }
        }
    }
}

/// A piece of three blocks (one is a large one), and one that its neighbour has, too.
fn piece(hub: &FakeHub, n: u32) -> (PieceInfo, Vec<Cid>) {
    // More than one chunk of multihashes.
    let own = if n == PIECES - 1 { 17_000 } else { 3 };
    let data = |b: u32| format!("piece {n}, block {b}").into_bytes();
    let shared = format!("pieces {} and the next", n & !1).into_bytes();
    let data: Vec<_> = (0..own).map(data).chain([shared]).collect();
    let cid = |b: &Vec<u8>| Cid::new_v1(0x55, Code::Sha2_256.digest(b));
    let cids: Vec<_> = data.iter().map(cid).collect();
    let mut car = CarWriter::new(Vec::new(), &cids[..1]).unwrap();
    for (cid, data) in cids.iter().zip(&data) {
        car.write(cid, data).unwrap();
    }
    (hub.add(&car.finish().unwrap(), indexed()), cids)
}

/// What `ipni find` finds of multihashes is as wanted.
async fn finds(ipni: &Path, indexer: &Indexer, hashes: &[String], want: &Found) {
    let mut all = Found::new();
    for some in hashes.chunks(1000) {
        let mut find = Command::new(ipni);
        find.args(["find", "--indexer", &indexer.find]);
        for hash in some {
            find.args(["--mh", hash]);
        }
        let printed = peers::run(&mut find, LONG).await.unwrap();
        let (mut hash, mut address, mut context) = (String::new(), String::new(), String::new());
        for line in printed.lines() {
            match line.trim().split_once(": ") {
                Some(("Multihash", text)) => text.clone_into(&mut hash),
                Some(("Provider", text)) => {
                    // {id: [address]}
                    let text = text.split_once('[').unwrap().1;
                    text.trim_end_matches("]}").clone_into(&mut address);
                }
                Some(("ContextID", text)) => text.clone_into(&mut context),
                Some(("Metadata", text)) => {
                    let answer = [&*address, &*context, text].map(str::to_owned);
                    all.entry(hash.clone()).or_default().insert(answer);
                }
                _ => {}
            }
        }
    }
    for hash in hashes {
        assert_eq!(all.get(hash), want.get(hash), "{hash}");
    }
}

/// Runs `ipni verify ingest` on all of a chain: every multihash of every advertisement that was not
/// taken back is with the indexer. Returns how many advertisements and removals it saw, and how many
/// multihashes it checked.
async fn verified(ipni: &Path, indexer: &Indexer, provider: &str) -> [usize; 3] {
    let mut verify = Command::new(ipni);
    verify
        .args(["verify", "ingest", "--print-unindexed-mhs"])
        .args(["--provider-id", provider, "--indexer", &indexer.find])
        .args(["--ad-depth-limit", "5000", "--entries-depth-limit", "0"]);
    let printed = peers::run(&mut verify, LONG).await.unwrap();
    assert!(printed.contains("Passed verification"), "{printed}");
    let number = |key: &str| {
        let line = printed.lines().find_map(|l| l.trim().strip_prefix(key));
        line.unwrap().trim().parse::<usize>().unwrap()
    };
    let checked = number("total Multihashes checked:");
    assert_eq!(number("# indexed with expected provider ID:"), checked);
    let lines = |words: &str| printed.lines().filter(|l| l.contains(words)).count();
    [
        lines("Advertisement ID:") - lines("Previous Advertisement ID:"),
        lines("Removal advertisement"),
        checked,
    ]
}

/// An indexer of IPNI takes in a long chain while it grows, with removals, and another one takes in
/// all of it later. What they answer is exactly what is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs go: cargo xtask peers"]
async fn storetheindex() {
    let exe = peers::go("github.com/ipni/storetheindex", "v0.12.1", "").await;
    let ipni = peers::go("github.com/ipni/ipni-cli", "v0.5.2", "cmd/ipni").await;
    let there = |done| peers::installed("storetheindex", done);
    let (Some(exe), Some(ipni)) = (there(exe), there(ipni)) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let indexer = Indexer::start(&exe, &dir.path().join("indexer")).await;
    let hub = fake_hub();
    let pieces: Vec<_> = (0..PIECES).map(|n| piece(&hub, n)).collect();
    let spoke = Spoke::start(&hub, dir.path().join("repo"), &indexer.ingest);
    let (provider, head) = spoke.pieces(PIECES, &indexer.http).await;
    indexer.has(&provider, &head).await;

    let mut want = Found::new();
    for (piece, blocks) in &pieces {
        advertised(piece, blocks, &mut want);
    }
    let entries = |pieces: &[&(PieceInfo, Vec<Cid>)]| -> usize {
        pieces.iter().map(|(_, blocks)| blocks.len() + 2).sum()
    };
    let all: Vec<_> = pieces.iter().collect();
    // One more says who else has all of it.
    let ads = 2 * PIECES as usize + 1;
    assert_eq!(
        verified(&ipni, &indexer, &provider).await,
        [ads, 0, entries(&all)]
    );
    let hashes: Vec<String> = want.keys().cloned().collect();
    finds(&ipni, &indexer, &hashes, &want).await;

    // Every other of the first pieces goes.
    let goes = |n: u32| n < 2 * GONE && n % 2 == 1;
    let (gone, left): (Vec<_>, Vec<_>) = pieces.iter().zip(0..).partition(|(_, n)| goes(*n));
    for ((piece, _), _) in &gone {
        hub.set_phase(&piece.cid, PiecePhase::Withdrawn);
    }
    let (_, head) = spoke.pieces(PIECES - GONE, &indexer.http).await;
    indexer.has(&provider, &head).await;
    let left: Vec<_> = left.into_iter().map(|(p, _)| p).collect();
    let mut want = Found::new();
    for (piece, blocks) in &left {
        advertised(piece, blocks, &mut want);
    }
    // 150 pieces less, each with two removals.
    let seen = [ads + gone.len() * 2, gone.len() * 2, entries(&left)];
    assert_eq!(verified(&ipni, &indexer, &provider).await, seen);
    finds(&ipni, &indexer, &hashes, &want).await;

    // An indexer that hears of it only now.
    let late = Indexer::start(&exe, &dir.path().join("late")).await;
    spoke.index(&["announce", "--url", &late.ingest]).await;
    late.has(&provider, &head).await;
    assert_eq!(verified(&ipni, &late, &provider).await, seen);
    finds(&ipni, &late, &hashes, &want).await;
    let [ads, removals, checked] = seen;
    eprintln!("storetheindex: {ads} advertisements, {removals} removals, {checked} multihashes");
}
