//! The hub dies at every write of its journal that a sector's way takes, and at random moments.
//! Every piece is in one sector all the same, and no message has its effect twice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lotus_actors::miner::PROVE_REPLICA_UPDATES3;
use lotus_e2e::history::{History, Landed};
use lotus_e2e::{Failed, Net, secs};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::Serialize;

use crate::boundaries::{Boundaries, boundaries};
use crate::die;
use crate::pieces;

/// The last write of a life, counted from its start and from when it is ready: a hub that starts
/// goes on with its sectors at once, and a deal that comes later takes some twenty writes.
const WRITES: (u32, u32) = (6, 20);
/// The same in half of the lives that are ready: a step that waited for the chain is the first
/// write after a while.
const SOON: u32 = 2;
/// How long some sectors may take under kills.
const ROUND: Duration = secs(900);
/// How long everything may take to be proven once the kills are over.
const SETTLED: Duration = secs(300);

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Sectors that are sealed at a time while the hub dies at writes of its journal, until it has
    /// died at every step; as many that are upgraded; as many while it dies at random moments
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=50))]
    crash_sectors: u16,
    /// Kills at random moments
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=2000))]
    crash_moments: u32,
    /// Most kills at writes of the journal on each of the two paths
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(0..=5000))]
    crash_writes: u32,
}

/// What the chain says of an upgrade that will not be: the sector is not active, or its deals are
/// over.
const REFUSALS: [&str; 2] = ["SectorChainRefused", "SectorDealsExpired"];
/// Steps of a sector in the report that is not where it belongs.
const LAST_STEPS: usize = 12;

#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) ok: bool,
    seed: u64,
    /// All in all.
    kills: u32,
    /// Of these, at a write of the journal (`fdatasync`) on the commit path.
    kills_at_commit_writes: u32,
    /// Of these, at one on the path of upgrades.
    kills_at_snap_writes: u32,
    /// Of these, at a random moment.
    kills_at_moments: u32,
    /// Steps that the journal keeps of the sectors, and those of them at which the hub did not die
    /// once before the sector's next one. The second must be empty.
    boundaries: usize,
    boundaries_missed: BTreeSet<String>,
    pieces: usize,
    /// Sectors without data that were ordered, those of them that the chain upgraded, those that
    /// still wait for it, and those whose upgrade the chain refused for good, as it does while a
    /// sector is faulty (their pieces are in others). The last three must make the first, and some
    /// be upgraded.
    pledged: usize,
    upgraded: usize,
    available: usize,
    taken_back: usize,
    /// Other sectors that hold nothing, with what happened to them. Must be empty.
    strays: Vec<String>,
    /// Pieces that are not in a proven sector at the end. Must be 0.
    lost: usize,
    /// Pieces that are in more than one place. Must be 0.
    doubled: usize,
    /// Messages on the chain, and those of them with an effect that another had already. The
    /// second must be 0.
    messages: usize,
    duplicate_messages: usize,
    seconds: f64,
}

/// The net under kills.
struct Run {
    net: Net,
    options: Options,
    random: StdRng,
    /// Pieces of the deals so far.
    made: BTreeSet<String>,
    /// Sectors without data that were ordered.
    pledged: usize,
    /// Sectors that are left for upgrades when all is done.
    available: usize,
    /// The hub that was killed last.
    dead: u32,
    /// The messages on the chain.
    history: History,
    /// When it was, every time, Unix milliseconds.
    deaths: BTreeSet<u64>,
}

pub(crate) async fn run(options: &Options, seed: u64) -> Result<Report, Failed> {
    let start = Instant::now();
    die::strace().await?;
    let mut config = pieces::config();
    // Its writes, two for each block, would take most of the deaths. `--mining` kills it.
    let mining = "LOTUS_MINER__MINING__ENABLED";
    config.hub_env.insert(mining.into(), "false".into());
    let net = Net::start(&config).await?;
    net.ready(secs(120)).await?;
    let mut run = Run {
        net,
        options: options.clone(),
        random: StdRng::seed_from_u64(seed),
        made: BTreeSet::new(),
        pledged: 0,
        available: 0,
        dead: 0,
        history: History::default(),
        deaths: BTreeSet::new(),
    };
    let commit = run.at_writes(&[Order::Deals], "FinalizeSector").await?;
    eprintln!("{commit} kills at writes of the journal on the commit path");
    let snap = run
        .at_writes(&[Order::Pledge, Order::Deals], "ReleaseSectorKey")
        .await?;
    eprintln!("{snap} kills at writes of the journal on the path of upgrades");
    run.at_moments().await?;
    run.settle().await.unwrap_or_else(|e| eprintln!("{e}"));

    let found = run.boundaries().await?;
    run.history.read(&run.net.node()?).await?;
    let chain = effects(&run.history.messages())?;
    let Run {
        net, made, pledged, ..
    } = run;
    let all = pieces::sectors(&net).await?;
    let proven = pieces::proven(&all);
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for piece in all.iter().flat_map(|s| &s.pieces) {
        *places.entry(&piece.piece_cid).or_default() += 1;
    }
    let (taken_back, strays) = empty(&net, &all).await?;
    net.stop().await?;
    let report = Report {
        seed,
        kills: commit + snap + options.crash_moments,
        kills_at_commit_writes: commit,
        kills_at_snap_writes: snap,
        kills_at_moments: options.crash_moments,
        boundaries: found.hit.len() + found.missed.len(),
        boundaries_missed: found.missed,
        pieces: made.len(),
        pledged,
        upgraded: chain.upgraded,
        available: all.iter().filter(|s| s.state == "Available").count(),
        taken_back,
        strays,
        lost: made.iter().filter(|p| !proven.contains_key(*p)).count(),
        doubled: places.values().filter(|n| **n > 1).count(),
        messages: chain.messages,
        duplicate_messages: chain.doubled,
        seconds: start.elapsed().as_secs_f64(),
        ok: false,
    };
    let ok = report.lost == 0
        && report.doubled == 0
        && report.duplicate_messages == 0
        && report.boundaries_missed.is_empty()
        && report.upgraded > 0
        && report.strays.is_empty()
        && report.upgraded + report.available + report.taken_back == report.pledged;
    Ok(Report { ok, ..report })
}

impl Run {
    /// Sectors, hand-over of their pieces included, while the hub dies at writes of its journal,
    /// until it has died at every step of the path, which ends with the state `last`. A deal may
    /// get a new sector although there is one to upgrade, so a round may walk another path.
    async fn at_writes(&mut self, path: &[Order], last: &str) -> Result<u32, Failed> {
        let most = self.options.crash_writes;
        let mut kills = 0;
        loop {
            for order in path {
                kills += self.round(*order, most.saturating_sub(kills)).await?;
                self.settle().await?;
            }
            let Boundaries { hit, missed } = self.boundaries().await?;
            let walked = hit.iter().any(|step| step.ends_with(last));
            eprintln!("{kills} kills; to its end: {walked}; not yet at {missed:?}");
            if walked && missed.is_empty() || kills >= most {
                return Ok(kills);
            }
        }
    }

    /// Some sectors, and at most so many kills until they are where they belong.
    async fn round(&mut self, order: Order, most: u32) -> Result<u32, Failed> {
        let count = self.options.crash_sectors;
        let (mut pieces, mut available) = (self.made.len(), usize::from(count));
        match order {
            Order::Pledge => {
                self.pledge().await?;
                self.pledged += usize::from(count);
            }
            Order::Deals => (pieces, available) = (pieces + available, 0),
        }
        self.available = available;
        let Self {
            net,
            random,
            made,
            dead,
            deaths,
            history,
            ..
        } = self;
        let node = net.node()?;
        let mut moments = StdRng::seed_from_u64(random.random());
        let deals = async {
            match order {
                Order::Pledge => Ok(Vec::new()),
                Order::Deals => deals(net, made.len(), count, random).await,
            }
        };
        let die = async {
            let mut kills = 0;
            let end = Instant::now() + ROUND;
            while kills < most {
                if Instant::now() > end {
                    return Err(Failed(format!(
                        "{pieces} pieces are not proven in {ROUND:?}"
                    )));
                }
                let died = die_at_write(net, *dead, &mut moments).await?;
                if let Some(pid) = died {
                    kills += 1;
                    *dead = pid;
                    deaths.insert(die::unix_ms());
                }
                // Proven sectors go on writing, for their deadlines.
                if died.is_none() || kills % 10 == 0 {
                    history.read(&node).await?;
                    if at_rest(net, pieces, available).await {
                        break;
                    }
                }
            }
            Ok::<_, Failed>(kills)
        };
        let (cids, kills) = tokio::try_join!(deals, die)?;
        made.extend(cids);
        Ok(kills)
    }

    /// Lets every sector come to where it belongs. Nothing dies meanwhile.
    async fn settle(&self) -> Result<(), Failed> {
        up(&self.net, self.dead).await?;
        let (pieces, available) = (self.made.len(), self.available);
        let proven = "the pieces so far to be proven";
        let settled = self.net.wait(proven, SETTLED, async |n| {
            at_rest(n, pieces, available).await.then_some(())
        });
        settled.await
    }

    /// Committed capacity, which the next deals upgrade.
    async fn pledge(&self) -> Result<(), Failed> {
        let repo = self.net.root().join("miner").display().to_string();
        let count = self.options.crash_sectors.to_string();
        let args = [
            "sectors",
            "pledge",
            "--count",
            &count,
            "--really-do-it",
            "--repo",
            &repo,
        ];
        self.net.run("lotus-miner", &args).await?;
        Ok(())
    }

    /// Deals while the hub dies at random moments.
    async fn at_moments(&mut self) -> Result<(), Failed> {
        let Self {
            net,
            options,
            random,
            made,
            dead,
            deaths,
            history,
            ..
        } = self;
        let node = net.node()?;
        let mut moments = StdRng::seed_from_u64(random.random());
        let deals = deals(net, made.len(), options.crash_sectors, random);
        let die = async {
            for _ in 0..options.crash_moments {
                up(net, *dead).await?;
                let moment = moments.random_range(0..3_000);
                tokio::time::sleep(Duration::from_millis(moment)).await;
                *dead = net.kill9("hub").await?;
                deaths.insert(die::unix_ms());
                history.read(&node).await?;
            }
            Ok::<(), Failed>(())
        };
        let (cids, ()) = tokio::try_join!(deals, die)?;
        made.extend(cids);
        Ok(())
    }

    /// The steps that the sectors have gone, and at which of them the hub died.
    async fn boundaries(&self) -> Result<Boundaries, Failed> {
        let mut logs = Vec::new();
        for sector in pieces::sectors(&self.net).await? {
            logs.push(pieces::status(&self.net, sector.number).await?.log);
        }
        Ok(boundaries(logs.iter().map(Vec::as_slice), &self.deaths))
    }
}

/// Sectors that hold nothing and are not available: how many are proven and were not upgraded in
/// the end, and the last steps of each other one.
async fn empty(net: &Net, all: &[pieces::Sector]) -> Result<(usize, Vec<String>), Failed> {
    let (mut taken_back, mut strays) = (0, Vec::new());
    for s in all.iter().filter(|s| s.pieces.is_empty()) {
        if s.state == "Available" {
            continue;
        }
        let log = pieces::status(net, s.number).await?.log;
        let refused = log.iter().any(|e| REFUSALS.contains(&e.event.as_str()));
        let given_up = log.iter().any(|e| e.to == "AbortUpgrade");
        if s.state == "Proving" && refused && given_up {
            taken_back += 1;
            continue;
        }
        let steps = log.iter().rev().take(LAST_STEPS).rev();
        let steps: Vec<String> = steps
            .map(|e| format!("{} -> {}: {} {}", e.from, e.to, e.event, e.message))
            .collect();
        strays.push(format!("sector {}: {}", s.number, steps.join("; ")));
    }
    Ok((taken_back, strays))
}

/// Where sectors come from.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// Deals: into new sectors, or as upgrades of those that are available.
    Deals,
    /// Committed capacity, which becomes available.
    Pledge,
}

async fn deals(
    net: &Net,
    first: usize,
    count: u16,
    random: &mut StdRng,
) -> Result<Vec<String>, Failed> {
    let mut cids = Vec::new();
    for n in first..first + usize::from(count) {
        cids.push(pieces::deal(net, n, random).await?);
    }
    Ok(cids)
}

/// Whether so many pieces are in proven sectors, and at least so many sectors wait for an upgrade:
/// a deal that comes before a sector's first WindowPoSt gets a new one.
async fn at_rest(net: &Net, pieces: usize, available: usize) -> bool {
    let Ok(all) = pieces::sectors(net).await else {
        return false;
    };
    let waiting = all.iter().filter(|s| s.state == "Available").count();
    pieces::proven(&all).len() == pieces && waiting >= available
}

/// Starts the hub, however often it died, and waits until it is ready. Returns its pid.
/// `before` is the pid of the one that died, which the supervisor may not have noticed yet.
async fn up(net: &Net, before: u32) -> Result<u32, Failed> {
    die::started(net, "hub", before, true).await
}

/// Lets the hub die as it enters an `fdatasync`, one of the first of its life: the write itself is
/// in the file, nothing after it was done. `None` when it wrote too little for a while, else the
/// pid that it had.
async fn die_at_write(net: &Net, before: u32, moments: &mut StdRng) -> Result<Option<u32>, Failed> {
    let ready = moments.random();
    let pid = die::started(net, "hub", before, ready).await?;
    let last = match (ready, moments.random()) {
        (false, _) => WRITES.0,
        (true, false) => WRITES.1,
        (true, true) => SOON,
    };
    let which = moments.random_range(1..=last);
    Ok(die::at_write(pid, which).await?.then_some(pid))
}

struct Chain {
    messages: usize,
    upgraded: usize,
    /// Effects that another message had before.
    doubled: usize,
}

/// What the messages on the chain did.
fn effects(landed: &[Landed]) -> Result<Chain, Failed> {
    let mut nonces = BTreeSet::new();
    let mut sectors = BTreeSet::new();
    let mut doubled = 0;
    for one in landed {
        let m = &one.message;
        if !nonces.insert((m.from, m.nonce)) {
            doubled += 1;
        }
        for sector in one.sectors()? {
            if !sectors.insert((m.method, sector)) {
                doubled += 1;
            }
        }
    }
    let upgrades = sectors.iter().filter(|(m, _)| *m == PROVE_REPLICA_UPDATES3);
    Ok(Chain {
        messages: landed.len(),
        upgraded: upgrades.count(),
        doubled,
    })
}
