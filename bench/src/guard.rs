//! How long a WindowPoSt takes while 64 clients hammer retrieval and indexing on the same cores:
//! with the proving guard, without it, and with everything in one process, by a quiet machine.
//!
//! The proof is the hub's own (`lotus-miner proving compute windowed-post`), made by its prove
//! worker of real sectors, and timed by the hub, which tells the guard only milliseconds before and
//! not epochs, as it does of a deadline.
//! The clients are on the same cores too, and what they do with the answers is not squeezed; so the
//! guard is also measured with clients whose own work gets what nobody else wants of the processor,
//! as if they were elsewhere.
//! A round is some proofs on the quiet machine and as many under load, right after each other.

mod load;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use lotus_car::CarStore;
use lotus_e2e::sectors::{HEAD, MINER, Worker};
use lotus_e2e::{Failed, Net, NetConfig, demo, secs};
use lotus_types::SectorSize;
use rand::RngCore as _;
use serde::{Deserialize, Serialize};

use crate::{median, ratio};
use load::{Clients, Load, Target, evict};

/// Large enough for pieces of some megabytes.
const SIZE: SectorSize = SectorSize::S8MiB;
/// Bytes of the file that is downloaded.
const DATA: usize = 6_500_000;
const TARGET: f64 = 1.10;
/// Between two proofs, so that none feels what the one before left to do.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest that the load may take to get going, and a piece to be served.
const READY: Duration = secs(120);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds of each kind, after one that does not count
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Clients: half of them download, half look up
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=1000))]
    clients: u32,
    /// Sectors of 8 MiB in the deadline; each takes some seconds to seal
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(2..=1000))]
    sectors: u64,
    /// Proofs of each round, of which the mean counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    proofs: u32,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Everything was measured. Whether a target is met is a field of its own.
    ok: bool,
    rounds: u32,
    proofs: u32,
    clients: u32,
    sectors: u64,
    /// How the guard squeezed.
    guard_rung: String,
    #[serde(flatten)]
    figures: BTreeMap<String, f64>,
    targets: BTreeMap<&'static str, bool>,
    /// Each round under load, in milliseconds.
    each_ms: BTreeMap<String, Vec<f64>>,
    /// What was not measured, and why.
    skipped: BTreeMap<&'static str, String>,
}

/// Where the files are that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    /// In memory, both those of the proof and those that are served.
    Cached,
    /// On the same disk and path: neither is in memory when it is read.
    Same,
}

impl Disk {
    const ALL: [Self; 2] = [Self::Cached, Self::Same];

    const fn suffix(self) -> &'static str {
        match self {
            Self::Cached => "",
            Self::Same => "_same_disk",
        }
    }
}

/// Milliseconds of a proof, by round.
#[derive(Debug, Default)]
struct Measured {
    quiet: Vec<f64>,
    loaded: Vec<f64>,
    /// Requests a second that were answered while proofs were made, by round.
    requests: Vec<f64>,
}

/// What is measured again and again.
struct Bench {
    net: Net,
    deadline: String,
    target: Target,
    options: Options,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failed> {
    let (rounds, proofs) = (options.rounds, options.proofs);
    let (clients, sectors) = (options.clients, options.sectors);
    let cfg = config();
    let mut bench = set_up(&cfg, options).await?;
    let guard_rung = bench.rung().await?;
    let mut skipped = BTreeMap::new();
    let mut all = BTreeMap::new();
    all.insert("guard_on", bench.both("guard on", Clients::Here).await?);
    let elsewhere = bench.both("guard on, clients elsewhere", Clients::Elsewhere);
    all.insert("guard_on_clients_elsewhere", elsewhere.await?);
    bench.squeezed()?;

    let mut off = cfg.clone();
    off.guard.insert("enabled".into(), false.into());
    bench.net.again(&off).await?;
    all.insert("guard_off", bench.both("guard off", Clients::Here).await?);

    match lotus_e2e::binary("lotus-miner-all-in-one").map(|f| f.is_file().then_some(f)) {
        Ok(Some(exe)) => {
            let cfg = all_in_one(&cfg, &exe, &bench.net)?;
            bench.net.again(&cfg).await?;
            all.insert("all_in_one", bench.both("all in one", Clients::Here).await?);
        }
        _ => {
            let build = "cargo build --release --workspace --features lotus-miner/all-in-one \
                         --bin lotus-miner-all-in-one";
            skipped.insert("all_in_one", format!("it is not built: {build}"));
        }
    }
    bench.net.stop().await?;

    let mut figures = BTreeMap::new();
    let mut each_ms = BTreeMap::new();
    let mut targets = BTreeMap::new();
    for (i, disk) in Disk::ALL.into_iter().enumerate() {
        let suffix = disk.suffix();
        // Spokes and hub are the same with and without the guard while nobody calls.
        let supervised = ["guard_on", "guard_on_clients_elsewhere", "guard_off"];
        let supervised = supervised.map(|k| &all[k][i].quiet);
        let quiet = median(&supervised.map(Clone::clone).concat());
        figures.insert(format!("quiet_ms{suffix}"), quiet);
        for (name, measured) in &all {
            let m = &measured[i];
            let by_quiet = ratio(name, median(&m.loaded), quiet)?;
            figures.insert(format!("{name}_ratio{suffix}"), by_quiet);
            let requests = median(&m.requests);
            figures.insert(format!("{name}_requests_per_second{suffix}"), requests);
            each_ms.insert(format!("{name}{suffix}"), m.loaded.clone());
            if *name == "guard_on" {
                let target = match disk {
                    Disk::Cached => "guard_on_at_most_1_10_of_quiet",
                    Disk::Same => "guard_on_at_most_1_10_of_quiet_same_disk",
                };
                targets.insert(target, by_quiet <= TARGET);
            }
        }
        if let Some(m) = all.get("all_in_one") {
            figures.insert(format!("all_in_one_quiet_ms{suffix}"), median(&m[i].quiet));
        }
    }
    let report = Report {
        ok: true,
        rounds,
        proofs,
        clients,
        sectors,
        guard_rung,
        figures,
        targets,
        each_ms,
        skipped,
    };
    eprintln!("{}", report.table());
    for (what, why) in &report.skipped {
        eprintln!("SKIPPED: {what}: {why}");
    }
    Ok(report)
}

/// Three deadlines that are so long that no proof and no election but ours happens: new sectors
/// never go into the one that is open or the next, so all go into the third.
fn config() -> NetConfig {
    let mut cfg = NetConfig {
        devnet_args: "--listen 127.0.0.1:0 --sector-size 8MiB --block-time-ms 500 \
                      --deadlines 3 --deadline-epochs 7200 --winning-lookback 10 --seed-delay 3"
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        ..NetConfig::default()
    };
    let workers = "LOTUS_MINER__WORKERS__SEAL_WORKERS";
    cfg.hub_env.insert(workers.into(), "0".into());
    cfg
}

/// Sectors to prove, and a piece to serve.
async fn set_up(cfg: &NetConfig, options: Options) -> Result<Bench, Failed> {
    let net = Net::start(cfg).await?;
    net.ready(READY).await?;
    eprintln!("sealing {} sectors of {SIZE}", options.sectors);
    let worker = Worker::start(&net, SIZE).await?;
    worker.onboard(options.sectors).await?;
    worker.end().await;
    let deadline = deadline(&net, options.sectors).await?;

    let data = net.root().join("data");
    std::fs::create_dir(&data)?;
    let mut bytes = vec![0; DATA];
    rand::rng().fill_bytes(&mut bytes);
    std::fs::write(data.join("file"), bytes)?;
    let car = net.root().join("data.car");
    let root = lotus_car::pack_dir(&data, &car).map_err(|e| Failed::at("pack", e))?;
    let store = CarStore::open(&car).map_err(|e| Failed::at("CAR", e))?;
    let deal = demo::propose(&net, &car).await?;
    // An identity CID carries its own bytes; nobody indexes it.
    let blocks = store.cids().iter().filter(|c| c.hash().code() != 0);
    let target = Target {
        piece: deal.piece_cid,
        root: root.to_string(),
        blocks: blocks.map(|c| c.to_string()).collect(),
    };
    Ok(Bench {
        net,
        deadline,
        target,
        options,
    })
}

/// The deadline that has all the sectors.
async fn deadline(net: &Net, sectors: u64) -> Result<String, Failed> {
    let node = net.node()?;
    for index in 0..3 {
        let all = node.state_miner_partitions(MINER.address(), index, HEAD);
        let all = all.await.map_err(|e| Failed::at("partitions", e))?;
        let live: u64 = all.iter().map(|p| p.live_sectors.len()).sum();
        if live == sectors {
            return Ok(index.to_string());
        }
    }
    Err(Failed::new("the sectors are not all in one deadline"))
}

/// Hub, spokes and prove workers in one process.
fn all_in_one(cfg: &NetConfig, exe: &Path, net: &Net) -> Result<NetConfig, Failed> {
    let bin = net.root().join("bin");
    std::fs::create_dir(&bin)?;
    for name in ["lotus-devnet", "lotus-markets"] {
        std::os::unix::fs::symlink(lotus_e2e::binary(name)?, bin.join(name))?;
    }
    std::os::unix::fs::symlink(exe, bin.join("lotus-miner"))?;
    let mut cfg = cfg.clone();
    cfg.bin_dir = Some(bin);
    cfg.hub_env.extend(cfg.spoke_env.clone());
    let socket = net.root().join("miner/run/hub.sock");
    let addr = format!("unix:{}", socket.display());
    cfg.hub_env.insert("LOTUS_MARKETS__HUB__ADDR".into(), addr);
    cfg.services.clear();
    let markets = net.root().join("markets").display().to_string();
    cfg.hub_args = ["--all-in-one".into(), "--markets-repo".into(), markets].into();
    Ok(cfg)
}

impl Bench {
    /// Measures both kinds.
    async fn both(&self, what: &str, at: Clients) -> Result<[Measured; 2], Failed> {
        self.net.ready(READY).await?;
        Ok([
            self.rounds(what, Disk::Cached, at).await?,
            self.rounds(what, Disk::Same, at).await?,
        ])
    }

    async fn rounds(&self, what: &str, disk: Disk, at: Clients) -> Result<Measured, Failed> {
        let mut measured = Measured::default();
        // What was written must not be written now.
        nix::unistd::sync();
        for round in 0..=self.options.rounds {
            let quiet = self.proofs(disk, None).await?.0;
            let load = Load::start(&self.net, &self.target, self.options.clients, at)?;
            let served = (disk == Disk::Same).then(|| load::Evicting::start(&self.net));
            load.goes(READY).await?;
            let (loaded, rate) = self.proofs(disk, Some(&load)).await?;
            drop(served);
            load.stop().await;
            eprintln!(
                "{what}{}, round {round}: quiet {quiet:.0} ms, under load {loaded:.0} ms, \
                 {rate:.0} requests/s",
                disk.suffix()
            );
            // In the first one all fill their caches.
            if round > 0 {
                measured.quiet.push(quiet);
                measured.loaded.push(loaded);
                measured.requests.push(rate);
            }
        }
        Ok(measured)
    }

    /// Makes the deadline's proof some times. Returns the milliseconds that the hub took, and the
    /// answers a second that clients got meanwhile, both on average.
    async fn proofs(&self, disk: Disk, load: Option<&Load>) -> Result<(f64, f64), Failed> {
        let (mut took, mut answered, mut passed) = (0.0, 0, Duration::ZERO);
        for _ in 0..self.options.proofs {
            tokio::time::sleep(PAUSE).await;
            let before = load.map_or(0, Load::answered);
            let began = Instant::now();
            took += self.proof(disk).await?;
            passed += began.elapsed();
            answered += load.map_or(0, Load::answered) - before;
        }
        let rate = load::rate(answered, passed)?;
        Ok((took / f64::from(self.options.proofs), rate))
    }

    /// Makes the deadline's proof and returns the milliseconds that the hub took.
    async fn proof(&self, disk: Disk) -> Result<f64, Failed> {
        #[derive(Deserialize)]
        struct Computed {
            sectors: u64,
            skipped: Vec<u64>,
            seconds: f64,
            error: Option<String>,
        }
        let repo = self.net.root().join("miner");
        if disk == Disk::Same {
            evict(&repo.join("storage"))?;
        }
        let repo = repo.display().to_string();
        let words = ["proving", "compute", "windowed-post", &self.deadline];
        let words = words.into_iter().chain(["--repo", &repo, "--json"]);
        let out = self
            .net
            .run("lotus-miner", &words.collect::<Vec<_>>())
            .await?;
        let made: Vec<Computed> =
            serde_json::from_str(&out).map_err(|e| Failed::at("compute --json", e))?;
        let sectors: u64 = made.iter().map(|c| c.sectors).sum();
        let whole = made
            .iter()
            .all(|c| c.skipped.is_empty() && c.error.is_none());
        if !whole || sectors != self.options.sectors {
            return Err(Failed(format!("the proof is not whole: {out}")));
        }
        Ok(made.iter().map(|c| c.seconds).sum::<f64>() * 1000.0)
    }

    /// How the guard squeezes.
    async fn rung(&self) -> Result<String, Failed> {
        let status = self.net.process("retrieval").await?;
        let guard = status
            .guard
            .ok_or_else(|| Failed::new("nobody is guarded"))?;
        match guard.rung.as_str() {
            "none" => Err(Failed(format!(
                "the guard can do nothing: {}",
                guard.reason
            ))),
            _ => Ok(guard.rung),
        }
    }

    /// Fails if the guard never squeezed: then the figures say nothing.
    fn squeezed(&self) -> Result<(), Failed> {
        let events = self.net.root().join("logs/events.jsonl");
        let text = std::fs::read_to_string(events)?;
        let of = |name: &str| {
            let is = |l: &&str| l.contains("\"squeezed\"") && l.contains(&format!("\"{name}\""));
            text.lines().filter(is).count()
        };
        let least = usize::try_from(self.options.rounds).unwrap_or(usize::MAX);
        if of("retrieval") < least || of("indexing") < least {
            return Err(Failed::new("the guard did not squeeze for each proof"));
        }
        Ok(())
    }
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_BORDERS_ONLY);
        table.set_header(["WindowPoSt under load", "in memory", "same disk"]);
        let get = |key: &str, suffix: &str| {
            let value = self.figures.get(&format!("{key}{suffix}"));
            value.map_or("-".into(), |v| format!("{v:.2}"))
        };
        for (name, key) in [
            ("quiet, ms", "quiet_ms"),
            ("guard off, by quiet", "guard_off_ratio"),
            ("guard on, by quiet", "guard_on_ratio"),
            (
                "the same, clients elsewhere",
                "guard_on_clients_elsewhere_ratio",
            ),
            ("all in one, by quiet", "all_in_one_ratio"),
            ("requests/s, guard off", "guard_off_requests_per_second"),
            ("requests/s, guard on", "guard_on_requests_per_second"),
            ("requests/s, all in one", "all_in_one_requests_per_second"),
        ] {
            table.add_row([name.to_owned(), get(key, ""), get(key, "_same_disk")]);
        }
        for (target, met) in &self.targets {
            let met = if *met { "met" } else { "MISSED" };
            table.add_row([target.replace('_', " "), met.to_owned()]);
        }
        table.add_row(["rung".to_owned(), self.guard_rung.clone()]);
        table
    }
}
