//! The hub dies at every write of its journal that a sector's way takes, and at random moments.
//! Every piece is in one sector all the same, and no message has its effect twice.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::time::{Duration, Instant};

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

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Sectors that are sealed while the hub dies at every write of its journal, and as many
    /// again while it dies at random moments
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=50))]
    crash_sectors: u16,
    /// Kills at random moments
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=2000))]
    crash_moments: u32,
    /// Most kills at writes of the journal
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(0..=5000))]
    crash_writes: u32,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) ok: bool,
    seed: u64,
    /// All in all.
    kills: u32,
    /// Of these, at a write of the journal (`fdatasync`).
    kills_at_writes: u32,
    /// Of these, at a random moment.
    kills_at_moments: u32,
    pieces: usize,
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

pub(crate) async fn run(options: &Options, seed: u64) -> Result<Report, Failed> {
    let start = Instant::now();
    strace().await?;
    let net = Net::start(&pieces::config()).await?;
    net.ready(secs(120)).await?;
    let mut random = StdRng::seed_from_u64(seed);

    // The first half of the deals, hand-over included, under kills at writes.
    let mut made = BTreeSet::new();
    let mut kills_at_writes = 0;
    let mut dead = 0;
    {
        let mut client = StdRng::seed_from_u64(seed.wrapping_add(1));
        let deals = deals(&net, 0..options.crash_sectors, &mut client);
        let die = async {
            while kills_at_writes < options.crash_writes {
                if let Some(pid) = die_at_write(&net, dead).await? {
                    kills_at_writes += 1;
                    dead = pid;
                }
                // Proven sectors go on writing: rounds, deadlines.
                let look = kills_at_writes % 10 == 0;
                if look && all_proven(&net, options.crash_sectors).await {
                    break;
                }
            }
            Ok::<(), Failed>(())
        };
        let (cids, ()) = tokio::try_join!(deals, die)?;
        made.extend(cids);
    }
    eprintln!("{kills_at_writes} kills at writes of the journal");

    // The second half at random moments.
    {
        let mut client = StdRng::seed_from_u64(seed.wrapping_add(2));
        let deals = deals(
            &net,
            options.crash_sectors..2 * options.crash_sectors,
            &mut client,
        );
        let die = async {
            for _ in 0..options.crash_moments {
                up(&net, dead).await?;
                let moment = random.random_range(0..3_000);
                tokio::time::sleep(Duration::from_millis(moment)).await;
                dead = net.kill9("hub").await?;
            }
            Ok::<(), Failed>(())
        };
        let (cids, ()) = tokio::try_join!(deals, die)?;
        made.extend(cids);
    }

    up(&net, dead).await?;
    let wanted = made.len();
    let settled = net.wait("every piece to be proven", SETTLED, async |n| {
        let all = pieces::sectors(n).await.ok()?;
        (pieces::proven(&all).len() == wanted).then_some(())
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
    let (messages, duplicate_messages) = effects(&net).await?;
    let report = Report {
        seed,
        kills: kills_at_writes + options.crash_moments,
        kills_at_writes,
        kills_at_moments: options.crash_moments,
        pieces: wanted,
        lost: made.iter().filter(|p| !proven.contains_key(*p)).count(),
        doubled: places.values().filter(|n| **n > 1).count(),
        messages,
        duplicate_messages,
        seconds: start.elapsed().as_secs_f64(),
        ok: false,
    };
    net.stop().await?;
    Ok(Report {
        ok: report.lost == 0 && report.doubled == 0 && report.duplicate_messages == 0,
        ..report
    })
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
    numbers: std::ops::Range<u16>,
    random: &mut StdRng,
) -> Result<Vec<String>, Failed> {
    let mut cids = Vec::new();
    for n in numbers {
        cids.push(pieces::deal(net, n, random).await?);
    }
    Ok(cids)
}

async fn all_proven(net: &Net, sectors: u16) -> bool {
    match pieces::sectors(net).await {
        Ok(all) => pieces::proven(&all).len() == usize::from(sectors),
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

/// Messages on the chain, and how often one had an effect that another had before it.
async fn effects(net: &Net) -> Result<(usize, usize), Failed> {
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
    Ok((landed.len(), doubled))
}
