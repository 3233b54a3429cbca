//! Restart after `kill -9`, memory, and what a quiet supervisor costs, side by side.
//!
//! The child says the time as its first act, so the wake-up of this program is in no figure. All
//! are killed in turn, in random order, so all see the same noise.

mod rival;
mod storm;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use comfy_table::Table;
use lotus_e2e::{Failed, Net, NetConfig, secs};
use rand::seq::SliceRandom as _;
use serde::Serialize;

use crate::{median, ratio};
use rival::{Kind, Rival};

/// How long nothing happens before the quiet is measured.
const SETTLE: Duration = secs(75);
/// Runit and s6 hold a process that lived for less than a second.
const AGE: Duration = Duration::from_millis(1300);
/// Targets: p50 over the floor, and memory.
const TARGET_RATIO: f64 = 2.0;
const TARGET_RSS_MB: f64 = 8.0;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often each one's process is killed
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1000))]
    kills: u32,
    /// Seconds in which nothing happens and wake-ups are counted
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
    idle_secs: u64,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Serialize)]
struct Figures {
    p50_ms: f64,
    p99_ms: f64,
    idle_wakeups: u32,
    idle_cpu_ms: f64,
    rss_mb: f64,
    /// Restarts that did not come within 15 s.
    missed: u32,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Everything was measured. Whether a target is met is a field of its own.
    ok: bool,
    #[serde(flatten)]
    sides: Sides,
    /// The supervisor of the whole product while all of it runs.
    full: Full,
    #[serde(flatten)]
    storm: storm::Storm,
}

/// Ours and the others, one process each.
#[derive(Debug, Serialize)]
struct Sides {
    kills: u32,
    idle_seconds: u64,
    /// Ours: one static child, no watchdog, no OTLP.
    #[serde(flatten)]
    ours: Figures,
    floor_p50_ms: f64,
    p50_ratio_to_floor: f64,
    /// Each target, and whether it is met.
    targets: BTreeMap<&'static str, bool>,
    peers: BTreeMap<&'static str, Figures>,
    /// Peers that are not installed, and what installs them.
    skipped: BTreeMap<&'static str, String>,
}

#[derive(Debug, Serialize)]
struct Full {
    processes: usize,
    rss_mb: f64,
    /// Voluntary context switches a second, signs of life of the processes included.
    wakeups_per_second: f64,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failed> {
    let (kills, idle) = (options.kills, options.idle_secs);
    let mut sides = tokio::task::spawn_blocking(move || side_by_side(kills, idle))
        .await
        .map_err(|e| Failed::at("supervisors", e))??;
    let storm = storm::run().await?;
    sides.targets.insert(
        "hub_calls_in_a_storm_at_most_1_1",
        storm.storm_ratio <= storm::TARGET_RATIO,
    );
    let report = Report {
        ok: true,
        sides,
        full: full(idle).await?,
        storm,
    };
    eprintln!("{}", report.table());
    for (name, install) in &report.sides.skipped {
        eprintln!("SKIPPED: {name} is not installed: {install}");
    }
    Ok(report)
}

fn side_by_side(kills: u32, idle_seconds: u64) -> Result<Sides, Failed> {
    let base = tempfile::tempdir()?;
    for name in ["tick", "floor"] {
        compile(base.path(), name)?;
    }
    let ours = lotus_e2e::binary("lotus-supervisor")?;
    let mut skipped = BTreeMap::new();
    let mut rivals = Vec::new();
    for kind in Kind::ALL {
        match kind.missing() {
            Some(install) => drop(skipped.insert(kind.name(), install)),
            None => rivals.push(Rival::start(kind, base.path(), &ours)?),
        }
    }
    let bar = indicatif::ProgressBar::new(u64::from(kills));
    let mut order: Vec<usize> = (0..rivals.len()).collect();
    for _ in 0..kills {
        order.shuffle(&mut rand::rng());
        for i in &order {
            if let Some(early) = AGE.checked_sub(rivals[*i].age()) {
                std::thread::sleep(early);
            }
            rivals[*i].strike()?;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    // Timers of the last restart run out before the quiet is measured: ours looks at the sizes of
    // logs a minute after they were written to.
    std::thread::sleep(SETTLE);
    let costs = |all: &[Rival]| all.iter().map(Rival::cost).collect::<Result<Vec<_>, _>>();
    let before = costs(&rivals)?;
    eprintln!("nothing happens for {idle_seconds} s: wake-ups are counted");
    std::thread::sleep(secs(idle_seconds));
    let after = costs(&rivals)?;
    let mut all = BTreeMap::new();
    for (rival, (before, after)) in rivals.iter_mut().zip(before.iter().zip(&after)) {
        rival.measured.idle_wakeups = after.0 - before.0;
        rival.measured.idle_cpu_ms = after.1 - before.1;
        rival.measured.rss_mb = rival.rss_mb()?;
        all.insert(rival.kind.name(), figures(rival));
    }
    let take = |all: &mut BTreeMap<_, _>, kind: Kind| {
        all.remove(kind.name())
            .ok_or_else(|| Failed(format!("{} was not measured", kind.name())))
    };
    let floor = take(&mut all, Kind::Floor)?;
    let ours = take(&mut all, Kind::Ours)?;
    let p50_ratio_to_floor = ratio("restart", ours.p50_ms, floor.p50_ms)?;
    let mut targets = BTreeMap::from([
        (
            "p50_at_most_twice_the_floor",
            p50_ratio_to_floor <= TARGET_RATIO,
        ),
        ("no_idle_wakeups", ours.idle_wakeups == 0),
        ("rss_at_most_8_mb", ours.rss_mb <= TARGET_RSS_MB),
    ]);
    if let Some(runit) = all.get(Kind::Runit.name()) {
        targets.insert("p50_below_runit", ours.p50_ms < runit.p50_ms);
    }
    Ok(Sides {
        kills,
        idle_seconds,
        floor_p50_ms: floor.p50_ms,
        p50_ratio_to_floor,
        targets,
        ours,
        peers: all,
        skipped,
    })
}

fn figures(rival: &Rival) -> Figures {
    let m = &rival.measured;
    let mut sorted = m.restarts_ms.clone();
    sorted.sort_by(f64::total_cmp);
    let p99 = sorted.get((sorted.len() * 99).div_ceil(100).saturating_sub(1));
    Figures {
        p50_ms: median(&sorted),
        p99_ms: p99.copied().unwrap_or(f64::NAN),
        idle_wakeups: m.idle_wakeups,
        idle_cpu_ms: m.idle_cpu_ms,
        rss_mb: m.rss_mb,
        missed: m.missed,
    }
}

/// Compiles one of the C programs beside this file, without libraries to be found at run time.
fn compile(dir: &Path, name: &str) -> Result<(), Failed> {
    let source = match name {
        "tick" => include_str!("tick.c"),
        "die" => include_str!("die.c"),
        _ => include_str!("floor.c"),
    };
    let file = dir.join(format!("{name}.c"));
    std::fs::write(&file, source)?;
    let status = Command::new("cc")
        .args(["-O2", "-static", "-o"])
        .args([dir.join(name), file])
        .status()
        .map_err(|e| Failed::at("cc (apt-get install gcc libc6-dev)", e))?;
    if status.success() {
        return Ok(());
    }
    Err(Failed(format!("cc {name}.c: {status}")))
}

/// The whole product under one supervisor, once it is quiet.
async fn full(idle_seconds: u64) -> Result<Full, Failed> {
    let net = Net::start(&NetConfig::default()).await?;
    net.ready(secs(120)).await?;
    let pid = net.supervisor_pid()?;
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let switches = || rival::status(&dir, "voluntary_ctxt_switches:").map(f64::from);
    let before = switches()?;
    tokio::time::sleep(secs(idle_seconds)).await;
    let woken = switches()? - before;
    let full = Full {
        processes: net.status().await?.len(),
        rss_mb: rival::rss_mb(pid)?,
        wakeups_per_second: ratio("wake-ups", woken, secs(idle_seconds).as_secs_f64())?,
    };
    net.stop().await?;
    Ok(full)
}

impl Report {
    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(comfy_table::presets::UTF8_BORDERS_ONLY);
        table.set_header(["", "p50 ms", "p99 ms", "wake-ups", "CPU ms", "RSS MB"]);
        let mut row = |name: &str, f: &Figures| {
            table.add_row([
                name.to_owned(),
                format!("{:.2}", f.p50_ms),
                format!("{:.2}", f.p99_ms),
                f.idle_wakeups.to_string(),
                format!("{:.1}", f.idle_cpu_ms),
                format!("{:.1}", f.rss_mb),
            ]);
        };
        row("lotus-supervisor", &self.sides.ours);
        for (name, f) in &self.sides.peers {
            row(name, f);
        }
        table.add_row([
            "floor".to_owned(),
            format!("{:.2}", self.sides.floor_p50_ms),
        ]);
        let s = &self.storm;
        table.add_row([format!(
            "hub calls, {} deaths: {:.0} us, without {:.0} us, {:.2}x",
            s.storm_deaths, s.hub_call_storm_us, s.hub_call_quiet_us, s.storm_ratio
        )]);
        for (target, met) in &self.sides.targets {
            let met = if *met { "met" } else { "MISSED" };
            table.add_row([target.replace('_', " "), met.to_owned()]);
        }
        table.add_row([
            format!("whole product, {} processes", self.full.processes),
            String::new(),
            String::new(),
            format!("{:.1}/s", self.full.wakeups_per_second),
            String::new(),
            format!("{:.1}", self.full.rss_mb),
        ]);
        table
    }
}
