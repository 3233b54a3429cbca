//! The deal service dies at writes of its journal and at random moments while deals are made, every
//! other one by proposal (MK1.2). Every deal that it said yes to is sealed all the same, no piece is
//! sealed twice, and no proposal is published twice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use lotus_e2e::history::History;
use lotus_e2e::{Failed, Net, NetConfig, secs};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use crate::boundaries::{Boundaries, boundaries};
use crate::die;
use crate::pieces::{self, Entry};
use crate::proposals::{Files, Proposer, published};

/// Deals that are made at the same time.
const CLIENTS: usize = 4;
/// Deals of a round that is made because the service did not die at every step yet.
const ROUND: u16 = 10;
/// The last write of a life: a start takes none, a deal takes about ten.
const WRITES: u32 = 12;
/// The same in half of the lives: a step that waited for the chain is the first write after a while.
const SOON: u32 = 2;
/// How long the deals may take to be sealed once the kills are over.
const SETTLED: Duration = secs(900);
/// Between two readings of the chain's messages, which the devnet keeps for 900 epochs.
const READ: Duration = secs(30);

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
    /// Checkpoints of the deals, and those of them at which the service did not die once before the
    /// deal's next one. The second must be empty: with few kills at writes it may not be.
    boundaries: BTreeSet<String>,
    boundaries_missed: BTreeSet<String>,
    /// Deals that were accepted.
    deals: usize,
    /// Deals that were not over when the service died: on the average, and the most.
    in_flight: f64,
    in_flight_most: usize,
    /// Those that are not proven at the end. Must be 0.
    lost: usize,
    /// Pieces that are in more than one place, or that no deal is for. Must be 0.
    doubled: usize,
    /// Of the deals, those by proposal, and those of them that the chain has. Must be the same.
    proposals: usize,
    published: usize,
    /// Proposals that are in more than one `PublishStorageDeals` on the chain. Must be 0.
    double_published: usize,
    /// Those messages, and the ones of them that failed.
    publish_messages: usize,
    publish_failed: usize,
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
    proposer: Proposer,
    random: StdRng,
    /// Pieces of the deals so far.
    made: BTreeSet<String>,
    /// Deals by proposal among them.
    proposals: usize,
    /// The service that was killed last.
    dead: u32,
    /// When it was, every time, Unix milliseconds.
    deaths: BTreeSet<u64>,
    kills_at_moments: u32,
    kills_at_writes: u32,
    /// The messages on the chain.
    history: History,
}

/// What the deals' steps say.
struct Settled {
    found: Boundaries,
    /// Open deals at each death.
    in_flight: Vec<usize>,
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
    for (key, value) in [
        // Sectors wait for a while, so that deals are in flight as long as the service dies.
        ("SEALING__WAIT_DEALS_SECS", "60"),
        // And so do proposals that are published.
        ("MESSAGES__CONFIDENCE_EPOCHS", "16"),
        // Blocks are of no matter here.
        ("MINING__ENABLED", "false"),
    ] {
        let key = format!("LOTUS_MINER__{key}");
        config.hub_env.insert(key, value.into());
    }
    let files = Files::bind().await?;
    files.allow(&mut config);
    let net = Net::start(&config).await?;
    net.ready(secs(120)).await?;
    let mut run = Run {
        proposer: Proposer::new(&net, files).await?,
        net,
        random: StdRng::seed_from_u64(seed),
        made: BTreeSet::new(),
        proposals: 0,
        dead: 0,
        deaths: BTreeSet::new(),
        kills_at_moments: 0,
        kills_at_writes: 0,
        history: History::default(),
    };
    let writes = options.markets_writes;
    // Half of the writes beside the random moments, for the rest see what is missing.
    run.round(options.markets_deals, options.markets_moments, writes / 2)
        .await?;
    let mut settled = run.settle().await?;
    while !settled.found.missed.is_empty() && run.kills_at_writes < writes {
        let left = writes - run.kills_at_writes;
        eprintln!("not yet at {:?}", settled.found.missed);
        run.round(ROUND, 0, left.min(30)).await?;
        settled = run.settle().await?;
    }
    let Settled { found, in_flight } = settled;

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
    let chain = published(&run.history.messages())?;
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let mean = in_flight.iter().sum::<usize>() as f64 / in_flight.len().max(1) as f64;
    let report = Report {
        ok: false,
        seed,
        kills_at_moments: run.kills_at_moments,
        kills_at_writes: run.kills_at_writes,
        boundaries: found.hit.union(&found.missed).cloned().collect(),
        boundaries_missed: found.missed,
        deals: deals.len(),
        in_flight: mean,
        in_flight_most: in_flight.into_iter().max().unwrap_or(0),
        lost: run.made.iter().filter(lost).count(),
        doubled: places
            .iter()
            .filter(|(piece, n)| **n > 1 || !run.made.contains(*piece))
            .count(),
        proposals: run.proposals,
        published: chain.deals,
        double_published: chain.doubled,
        publish_messages: chain.messages,
        publish_failed: chain.failed,
        seconds: start.elapsed().as_secs_f64(),
    };
    run.net.stop().await?;
    let ok = report.lost == 0
        && report.doubled == 0
        && report.deals == run.made.len()
        && report.published == report.proposals
        && report.double_published == 0
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
            net,
            proposer,
            dead,
            deaths,
            history,
            ..
        } = self;
        let (net, proposer) = (&*net, &*proposer);
        let node = net.node()?;
        let making = stream::iter(first..first + usize::from(deals))
            .map(|n| async move {
                let mut own = StdRng::seed_from_u64(seed.wrapping_add(n as u64));
                if by_proposal(n) {
                    proposer.deal(net, n, &mut own).await
                } else {
                    pieces::deal(net, n, &mut own).await
                }
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
                    let last = if when.random() { SOON } else { WRITES };
                    let which = when.random_range(1..=last);
                    if !die::at_write(pid, which).await? {
                        // Nothing is written: the chain is waited for, or every deal is sealed.
                        let open = ask::<Vec<Deal>>(net, &["list", "--open"]).await;
                        if moments == at_moments && open.is_ok_and(|all| all.is_empty()) {
                            break;
                        }
                        continue;
                    }
                    *dead = pid;
                    at_writes += 1;
                }
                deaths.insert(die::unix_ms());
                if (at_moments + at_writes).is_multiple_of(10) {
                    history.read(&node).await?;
                }
            }
            die::started(net, "deals", *dead, true).await?;
            Ok::<_, Failed>(())
        };
        let (cids, died) = tokio::join!(making, dying);
        died?;
        for cid in cids {
            self.made.insert(cid?);
        }
        self.proposals += (first..first + usize::from(deals))
            .filter(|n| by_proposal(*n))
            .count();
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

    /// Lets every deal come to its end. Nothing dies meanwhile.
    async fn settle(&mut self) -> Result<Settled, Failed> {
        let wanted = self.made.len();
        let (net, history) = (&self.net, &mut self.history);
        let all = net.wait("every deal to be sealed", SETTLED, async |n| {
            let deals: Vec<Deal> = ask(n, &["list", "--checkpoint", "Active"]).await.ok()?;
            (deals.len() == wanted).then_some(deals)
        });
        let node = net.node()?;
        let read = async {
            loop {
                if let Err(e) = history.read(&node).await {
                    return e;
                }
                tokio::time::sleep(READ).await;
            }
        };
        let all = tokio::select! {
            all = all => all?,
            e = read => return Err(e),
        };
        history.read(&node).await?;
        let mut logs = Vec::new();
        for deal in all {
            let detail: Deal = ask(&self.net, &["status", &deal.id]).await?;
            let mut log: Vec<Entry> = Vec::new();
            for step in detail.history {
                let from = log.last().map(|e| e.to.clone()).unwrap_or_default();
                if step.checkpoint == from {
                    continue;
                }
                log.push(Entry {
                    unix_ms: step.unix_ms,
                    // What counts is the checkpoint: a deal whose hub went on while the service
                    // was dead has skipped some, which may not come a second time.
                    event: "deal".into(),
                    from,
                    to: step.checkpoint,
                    message: String::new(),
                });
            }
            logs.push(log);
        }
        let open = |log: &&Vec<Entry>, at: u64| {
            let ends = [log.first(), log.last()].map(|e| e.map_or(0, |e| e.unix_ms));
            (ends[0]..ends[1]).contains(&at)
        };
        let deaths = self.deaths.iter();
        Ok(Settled {
            found: boundaries(logs.iter().map(Vec::as_slice), &self.deaths),
            in_flight: deaths
                .map(|at| logs.iter().filter(|log| open(log, *at)).count())
                .collect(),
        })
    }
}

/// Every other deal is.
const fn by_proposal(n: usize) -> bool {
    n % 2 == 1
}
