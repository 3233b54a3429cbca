//! The hub dies at every write of its journal that a sector's way takes, and at random moments.
//! Every piece is in one sector all the same, and no message has its effect twice.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::time::{Duration, Instant};

use lotus_actors::miner::PROVE_REPLICA_UPDATES3;
use lotus_e2e::{Failed, Net, history, secs};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::Serialize;
use tokio::process::Command;

use crate::pieces;

/// A hub that writes nothing for so long waits for the chain.
const QUIET: Duration = secs(20);
/// How long everything may take to be proven once the kills are over.
const SETTLED: Duration = secs(300);

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Sectors that are sealed while the hub dies at every write of its journal, as many that are
    /// upgraded meanwhile, and as many that are sealed while it dies at random moments
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=50))]
    crash_sectors: u16,
    /// Kills at random moments
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=2000))]
    crash_moments: u32,
    /// Most kills at writes of the journal on each of the two paths
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(0..=5000))]
    crash_writes: u32,
}

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
    pieces: usize,
    /// Sectors that the chain upgraded: one for each piece of that path.
    upgraded: usize,
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
    /// The hub that was killed last.
    dead: u32,
}

pub(crate) async fn run(options: &Options, seed: u64) -> Result<Report, Failed> {
    let start = Instant::now();
    strace().await?;
    let net = Net::start(&pieces::config()).await?;
    net.ready(secs(120)).await?;
    let mut run = Run {
        net,
        options: options.clone(),
        random: StdRng::seed_from_u64(seed),
        made: BTreeSet::new(),
        dead: 0,
    };
    let commit = run.at_writes().await?;
    eprintln!("{commit} kills at writes of the journal on the commit path");
    run.pledge().await?;
    let snap = run.at_writes().await?;
    eprintln!("{snap} kills at writes of the journal on the path of upgrades");
    run.at_moments().await?;
    let Run {
        net, made, dead, ..
    } = run;

    up(&net, dead).await?;
    let settled = net.wait("every piece to be proven", SETTLED, async |n| {
        all_proven(n, made.len()).await.then_some(())
    });
    if let Err(e) = settled.await {
        eprintln!("{e}");
    }
    let all = pieces::sectors(&net).await?;
    let proven = pieces::proven(&all);
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for piece in all.iter().flat_map(|s| &s.pieces) {
        *places.entry(&piece.piece_cid).or_default() += 1;
    }
    let chain = effects(&net).await?;
    net.stop().await?;
    let report = Report {
        seed,
        kills: commit + snap + options.crash_moments,
        kills_at_commit_writes: commit,
        kills_at_snap_writes: snap,
        kills_at_moments: options.crash_moments,
        pieces: made.len(),
        upgraded: chain.upgraded,
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
        && report.upgraded == usize::from(options.crash_sectors);
    Ok(Report { ok, ..report })
}

impl Run {
    /// Deals, hand-over included, while the hub dies at each write of its journal.
    async fn at_writes(&mut self) -> Result<u32, Failed> {
        let Self {
            net,
            options,
            random,
            made,
            dead,
        } = self;
        let wanted = made.len() + usize::from(options.crash_sectors);
        let deals = deals(net, made.len(), options.crash_sectors, random);
        let die = async {
            let mut kills = 0;
            while kills < options.crash_writes {
                if let Some(pid) = die_at_write(net, *dead).await? {
                    kills += 1;
                    *dead = pid;
                }
                // Proven sectors go on writing: rounds, deadlines.
                if kills % 10 == 0 && all_proven(net, wanted).await {
                    break;
                }
            }
            Ok::<_, Failed>(kills)
        };
        let (cids, kills) = tokio::try_join!(deals, die)?;
        made.extend(cids);
        Ok(kills)
    }

    /// Committed capacity, which the next deals upgrade. Nothing dies meanwhile.
    async fn pledge(&mut self) -> Result<(), Failed> {
        up(&self.net, self.dead).await?;
        let wanted = self.made.len();
        let proven = "the pieces so far to be proven";
        let settled = self.net.wait(proven, SETTLED, async |n| {
            all_proven(n, wanted).await.then_some(())
        });
        settled.await?;
        let repo = self.net.root().join("miner").display().to_string();
        let count = self.options.crash_sectors.to_string();
        let args = ["sectors", "pledge", "--count", &count, "--repo", &repo];
        self.net.run("lotus-miner", &args).await?;
        let wanted = usize::from(self.options.crash_sectors);
        let there = "committed capacity to be available";
        let available = self.net.wait(there, SETTLED, async |n| {
            let all = pieces::sectors(n).await.ok()?;
            let available = all.iter().filter(|s| s.state == "Available");
            (available.count() == wanted).then_some(())
        });
        available.await
    }

    /// Deals while the hub dies at random moments.
    async fn at_moments(&mut self) -> Result<(), Failed> {
        let Self {
            net,
            options,
            random,
            made,
            dead,
        } = self;
        let mut moments = StdRng::seed_from_u64(random.random());
        let deals = deals(net, made.len(), options.crash_sectors, random);
        let die = async {
            for _ in 0..options.crash_moments {
                up(net, *dead).await?;
                let moment = moments.random_range(0..3_000);
                tokio::time::sleep(Duration::from_millis(moment)).await;
                *dead = net.kill9("hub").await?;
            }
            Ok::<(), Failed>(())
        };
        let (cids, ()) = tokio::try_join!(deals, die)?;
        made.extend(cids);
        Ok(())
    }
}

/// Whether the tool is there by which a process dies just as it writes.
async fn strace() -> Result<(), Failed> {
    let there = Command::new("strace").arg("--version").output().await;
    if there.is_ok_and(|out| out.status.success()) {
        return Ok(());
    }
    Err(Failed::new(
        "strace is needed to kill the hub at a write: apt-get install strace",
    ))
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

async fn all_proven(net: &Net, pieces: usize) -> bool {
    match pieces::sectors(net).await {
        Ok(all) => pieces::proven(&all).len() == pieces,
        Err(_) => false,
    }
}

/// Starts the hub, however often it died, and waits until it is ready. Returns its pid.
/// `before` is the pid of the one that died, which the supervisor may not have noticed yet.
async fn up(net: &Net, before: u32) -> Result<u32, Failed> {
    let root = net.root().display().to_string();
    let ask = ["start", "hub", "--repo", &root];
    net.wait("the hub to be ready", secs(60), async |n| {
        let hub = n.process("hub").await.ok()?;
        if hub.ready && hub.pid != Some(before) {
            return hub.pid;
        }
        if hub.state == "backoff" {
            // It may have been started in between, which is an error of the command.
            drop(n.run("lotus-supervisor", &ask).await);
        }
        None
    })
    .await
}

/// Lets the hub die as it enters its next `fdatasync`: the write itself is in the file, nothing
/// after it was done. `None` when it wrote nothing for a while, else the pid that it had.
async fn die_at_write(net: &Net, before: u32) -> Result<Option<u32>, Failed> {
    let pid = up(net, before).await?;
    let strace = Command::new("strace")
        .args([
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=fsync,fdatasync",
        ])
        .args(["-e", "inject=fsync,fdatasync:signal=SIGKILL:when=1"])
        .args(["-p", &pid.to_string()])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let Ok(out) = tokio::time::timeout(QUIET, strace).await else {
        return Ok(None);
    };
    let out = out.map_err(|e| Failed::at("strace", e))?;
    if !out.status.success() {
        let why = String::from_utf8_lossy(&out.stderr);
        return Err(Failed(format!("strace: {}: {why}", out.status)));
    }
    Ok(Some(pid))
}

struct Chain {
    messages: usize,
    upgraded: usize,
    /// Effects that another message had before.
    doubled: usize,
}

/// What the messages on the chain did.
async fn effects(net: &Net) -> Result<Chain, Failed> {
    let landed = history::landed(&net.node()?).await?;
    let mut nonces = BTreeSet::new();
    let mut sectors = BTreeSet::new();
    let mut doubled = 0;
    for one in &landed {
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
