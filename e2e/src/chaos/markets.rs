//! The deal service dies at writes of its journal and at random moments while deals are made.
//! Every deal that it said yes to is sealed all the same, and no piece is sealed twice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use lotus_e2e::{Failed, Net, NetConfig, secs};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use crate::boundaries::{Boundaries, boundaries};
use crate::die;
use crate::pieces::{self, Entry};

/// Clients that make deals at the same time.
const CLIENTS: usize = 4;
/// Deals of a round that is made because the service did not die at every step yet.
const ROUND: u16 = 10;
/// The last write of a life: a start takes none, a deal takes about ten.
const WRITES: u32 = 12;
/// How long the deals may take to be sealed once the kills are over.
const SETTLED: Duration = secs(900);

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Deals that are made while the service dies
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=2000))]
    markets_deals: u16,
    /// Kills at random moments
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=2000))]
    markets_moments: u32,
    /// Most kills at writes of the journal
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(0..=5000))]
    markets_writes: u32,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) ok: bool,
    seed: u64,
    kills_at_moments: u32,
    /// At a write of the journal (`fdatasync`).
    kills_at_writes: u32,
    /// Steps of the deals, and those of them at which the service did not die once before the
    /// deal's next one. The second must be empty.
    boundaries: usize,
    boundaries_missed: BTreeSet<String>,
    /// Deals that were accepted.
    deals: usize,
    /// Those that are not proven at the end. Must be 0.
    lost: usize,
    /// Pieces that are in more than one place, or that no deal is for. Must be 0.
    doubled: usize,
    seconds: f64,
}

/// A deal of `storage-deals list --json` or `status --json`.
#[derive(Debug, Deserialize)]
struct Deal {
    id: String,
    piece_cid: String,
    checkpoint: String,
    #[serde(default)]
    history: Vec<Step>,
}

#[derive(Debug, Deserialize)]
struct Step {
    unix_ms: u64,
    checkpoint: String,
}

async fn ask<T: serde::de::DeserializeOwned>(net: &Net, words: &[&str]) -> Result<T, Failed> {
    let repo = net.root().join("markets").display().to_string();
    let args = [&["storage-deals"], words, &["--json", "--repo", &repo]].concat();
    let out = net.run("lotus-markets", &args).await?;
    serde_json::from_str(&out).map_err(|e| Failed::at("storage-deals", e))
}

/// The net under kills.
struct Run {
    net: Net,
    random: StdRng,
    made: BTreeSet<String>,
    /// The service that was killed last.
    dead: u32,
    /// When it was, every time, Unix milliseconds.
    deaths: BTreeSet<u64>,
    kills_at_moments: u32,
    kills_at_writes: u32,
}

pub(crate) async fn run(options: &Options, seed: u64) -> Result<Report, Failed> {
    let start = Instant::now();
    if options.markets_writes > 0 {
        die::strace().await?;
    }
    let mut config = NetConfig {
        services: vec!["deals".into()],
        ..NetConfig::default()
    };
    // Blocks are of no matter here.
    let mining = "LOTUS_MINER__MINING__ENABLED";
    config.hub_env.insert(mining.into(), "false".into());
    let net = Net::start(&config).await?;
    net.ready(secs(120)).await?;
    let mut run = Run {
        net,
        random: StdRng::seed_from_u64(seed),
        made: BTreeSet::new(),
        dead: 0,
        deaths: BTreeSet::new(),
        kills_at_moments: 0,
        kills_at_writes: 0,
    };
    let writes = options.markets_writes;
    // Half of the writes beside the random moments, for the rest see what is missing.
    run.round(options.markets_deals, options.markets_moments, writes / 2)
        .await?;
    let mut found = run.settle().await?;
    while !found.missed.is_empty() && run.kills_at_writes < writes {
        let left = writes - run.kills_at_writes;
        eprintln!("not yet at {:?}", found.missed);
        run.round(ROUND, 0, left.min(30)).await?;
        found = run.settle().await?;
    }

    let deals: Vec<Deal> = ask(&run.net, &["list"]).await?;
    let active = |d: &&Deal| d.checkpoint == "Active";
    let proven: BTreeSet<&str> = deals
        .iter()
        .filter(active)
        .map(|d| d.piece_cid.as_str())
        .collect();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for piece in pieces::sectors(&run.net)
        .await?
        .into_iter()
        .flat_map(|s| s.pieces)
    {
        *places.entry(piece.piece_cid).or_default() += 1;
    }
    let lost = |p: &&String| !proven.contains(p.as_str()) || !places.contains_key(*p);
    let report = Report {
        ok: false,
        seed,
        kills_at_moments: run.kills_at_moments,
        kills_at_writes: run.kills_at_writes,
        boundaries: found.hit.len() + found.missed.len(),
        boundaries_missed: found.missed,
        deals: deals.len(),
        lost: run.made.iter().filter(lost).count(),
        doubled: places
            .iter()
            .filter(|(piece, n)| **n > 1 || !run.made.contains(*piece))
            .count(),
        seconds: start.elapsed().as_secs_f64(),
    };
    run.net.stop().await?;
    let ok = report.lost == 0
        && report.doubled == 0
        && report.deals == run.made.len()
        && (report.boundaries_missed.is_empty() || writes == 0);
    Ok(Report { ok, ..report })
}

impl Run {
    /// Makes deals while the service dies.
    async fn round(&mut self, deals: u16, moments: u32, writes: u32) -> Result<(), Failed> {
        let first = self.made.len();
        let seed: u64 = self.random.random();
        let mut when = StdRng::seed_from_u64(self.random.random());
        let Self {
            net, dead, deaths, ..
        } = self;
        let net = &*net;
        let making = stream::iter(first..first + usize::from(deals))
            .map(|n| async move {
                let mut own = StdRng::seed_from_u64(seed.wrapping_add(n as u64));
                pieces::deal(net, n, &mut own).await
            })
            .buffer_unordered(CLIENTS)
            .collect::<Vec<_>>();
        let (mut at_moments, mut at_writes) = (0, 0);
        let dying = async {
            while at_moments < moments || at_writes < writes {
                let by_moment = at_writes >= writes || at_moments < moments && when.random();
                if by_moment {
                    die::started(net, "deals", *dead, true).await?;
                    let wait = when.random_range(0..1_500);
                    tokio::time::sleep(Duration::from_millis(wait)).await;
                    *dead = net.kill9("deals").await?;
                    at_moments += 1;
                } else {
                    let pid = die::started(net, "deals", *dead, true).await?;
                    let which = when.random_range(1..=WRITES);
                    if !die::at_write(pid, which).await? {
                        // Nothing is written any more: the deals of this round are sealed.
                        if moments == at_moments {
                            break;
                        }
                        continue;
                    }
                    *dead = pid;
                    at_writes += 1;
                }
                deaths.insert(die::unix_ms());
            }
            die::started(net, "deals", *dead, true).await?;
            Ok::<_, Failed>(())
        };
        let (cids, died) = tokio::join!(making, dying);
        died?;
        for cid in cids {
            self.made.insert(cid?);
        }
        self.kills_at_moments += at_moments;
        self.kills_at_writes += at_writes;
        eprintln!(
            "{} deals, {} kills at moments, {} at writes",
            self.made.len(),
            self.kills_at_moments,
            self.kills_at_writes
        );
        Ok(())
    }

    /// Lets every deal come to its end. Nothing dies meanwhile. Returns where the service died.
    async fn settle(&self) -> Result<Boundaries, Failed> {
        let wanted = self.made.len();
        let all = self
            .net
            .wait("every deal to be sealed", SETTLED, async |n| {
                let deals: Vec<Deal> = ask(n, &["list", "--checkpoint", "Active"]).await.ok()?;
                (deals.len() == wanted).then_some(deals)
            });
        let mut logs = Vec::new();
        for deal in all.await? {
            let detail: Deal = ask(&self.net, &["status", &deal.id]).await?;
            let mut from = String::new();
            let mut log: Vec<Entry> = Vec::new();
            for step in detail.history {
                if step.checkpoint == from {
                    continue;
                }
                log.push(Entry {
                    unix_ms: step.unix_ms,
                    event: from.clone(),
                    from,
                    to: step.checkpoint.clone(),
                    message: String::new(),
                });
                from = step.checkpoint;
            }
            logs.push(log);
        }
        Ok(boundaries(logs.iter().map(Vec::as_slice), &self.deaths))
    }
}
