//! From the start of the hub's process until it is ready, with many sectors in its journal, and
//! the memory that these take.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use lotus_e2e::{Failed, Net, NetConfig, secs};
use lotus_journal::{Journal, JournalError, Machine as _};
use lotus_miner::pieces::machine::PieceMachine;
use lotus_sealing::machine::Sectors;
use lotus_types::SectorNumber;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};

use crate::{median, ratio, records};

/// Seconds to ready that a hub of so many sectors may take.
const TARGET: (u64, f64) = (100_000, 2.0);
/// Starts of each size, of which the median counts.
const STARTS: u32 = 3;
/// Longest that a start may take.
const LIMIT: Duration = secs(300);
/// Longest that a stop may take.
const STOP_LIMIT: Duration = secs(60);
/// Sectors that are written in one transaction.
const BATCH: usize = 10_000;
/// Disk that a sector takes in the journal while it is written, generously.
const DISK_PER_SECTOR: u64 = 8 << 10;
/// CPU time in a second below which the hub has done what a start brings with it, in clock ticks
/// of 10 ms.
const QUIET_TICKS: u64 = 10;

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    starts: Vec<Starts>,
    start_target_sectors: u64,
    start_target_seconds: f64,
    /// `null` when that size was not asked for.
    start_target_met: Option<bool>,
    /// Resident memory that each sector more takes when the hub is quiet; `null` for one size.
    memory_per_idle_sector_bytes: Option<f64>,
    /// The same of the highest that it was.
    peak_memory_per_idle_sector_bytes: Option<f64>,
}

/// The starts with one size.
#[derive(Debug, Serialize)]
struct Starts {
    sectors: u64,
    journal_bytes: u64,
    /// From the start of the process to its word that it is ready, after a clean stop: the median.
    ready_seconds: f64,
    /// The same after `kill -9`.
    ready_after_kill_seconds: f64,
    /// From the start of the process until it had no more to do: the median.
    quiet_seconds: f64,
    /// Resident memory then, and the highest until then.
    memory_bytes: u64,
    peak_memory_bytes: u64,
}

impl Report {
    pub(crate) fn rows(&self, table: &mut Table) {
        for s in &self.starts {
            table.add_row([
                format!("ready with {} sectors", s.sectors),
                format!("{:.2} s", s.ready_seconds),
                format!(
                    "after kill -9 {:.2} s; quiet after {:.1} s; {} MiB, at most {} MiB",
                    s.ready_after_kill_seconds,
                    s.quiet_seconds,
                    s.memory_bytes >> 20,
                    s.peak_memory_bytes >> 20
                ),
            ]);
        }
        if let Some(met) = self.start_target_met {
            table.add_row([
                format!("  target with {} sectors", TARGET.0),
                format!("{} s", TARGET.1),
                if met { "met" } else { "MISSED" }.to_owned(),
            ]);
        }
        if let (Some(quiet), Some(peak)) = (
            self.memory_per_idle_sector_bytes,
            self.peak_memory_per_idle_sector_bytes,
        ) {
            table.add_row([
                "memory per idle sector".to_owned(),
                format!("{quiet:.0} bytes"),
                format!("at most {peak:.0} bytes"),
            ]);
        }
    }
}

pub(crate) async fn run(sizes: &[u64]) -> Result<Report, Failed> {
    let mut sizes = sizes.to_vec();
    sizes.sort_unstable();
    sizes.dedup();
    let cfg = NetConfig {
        services: Vec::new(),
        ..NetConfig::default()
    };
    let net = Net::start(&cfg).await?;
    net.ready(secs(120)).await?;
    let root = net.root().display().to_string();
    let stop = ["stop", "hub", "--force", "--repo", &root];
    net.run("lotus-supervisor", &stop).await?;
    let rig = Rig {
        repo: net.root().join("miner"),
        exe: net.exe("lotus-miner"),
        env: cfg.hub_env,
        net,
    };
    rig.stopped().await?;
    room(rig.net.root(), sizes.last().copied().unwrap_or(0))?;
    let mut starts = Vec::new();
    let mut written = 0;
    for sectors in sizes {
        let journal = rig.repo.join("journal.redb");
        let filled = tokio::task::spawn_blocking(move || fill(&journal, written..sectors));
        filled.await.map_err(|e| Failed::at("journal", e))??;
        written = sectors;
        starts.push(rig.measure(sectors).await?);
    }
    rig.net.stop().await?;
    report(starts)
}

fn report(starts: Vec<Starts>) -> Result<Report, Failed> {
    let per_sector = |of: fn(&Starts) -> u64| match (starts.first(), starts.last()) {
        (Some(few), Some(many)) if many.sectors > few.sectors => {
            let more = of(many).saturating_sub(of(few));
            let by = many.sectors - few.sectors;
            ratio("memory", float(more), float(by)).map(Some)
        }
        _ => Ok(None),
    };
    let at_target = starts.iter().find(|s| s.sectors == TARGET.0);
    Ok(Report {
        start_target_sectors: TARGET.0,
        start_target_seconds: TARGET.1,
        start_target_met: at_target.map(|s| s.ready_seconds < TARGET.1),
        memory_per_idle_sector_bytes: per_sector(|s| s.memory_bytes)?,
        peak_memory_per_idle_sector_bytes: per_sector(|s| s.peak_memory_bytes)?,
        starts,
    })
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of memory, far below 2^52"
)]
const fn float(n: u64) -> f64 {
    n as f64
}

/// Refuses what the disk has no room for.
fn room(dir: &Path, sectors: u64) -> Result<(), Failed> {
    let disk = nix::sys::statvfs::statvfs(dir).map_err(|e| Failed::at("statvfs", e))?;
    let free = disk.blocks_available() * disk.fragment_size();
    let needed = sectors * DISK_PER_SECTOR;
    if free >= needed {
        return Ok(());
    }
    Err(Failed(format!(
        "{sectors} sectors take up to {} GiB and {} has {} GiB: set TMPDIR, or ask for fewer with \
         --sectors",
        needed >> 30,
        dir.display(),
        free >> 30
    )))
}

/// Writes sectors with a deal each into the journal. Their logs are left out: no start reads them.
fn fill(path: &Path, numbers: Range<u64>) -> Result<(), Failed> {
    let bar = ProgressBar::new(numbers.end - numbers.start).with_message("sectors are written");
    if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:34}] {human_pos} {eta}") {
        bar.set_style(style);
    }
    let journal = Journal::open(path).map_err(|e| Failed::at("journal", e))?;
    let mut numbers = numbers.peekable();
    while numbers.peek().is_some() {
        let records = numbers.by_ref().take(BATCH);
        let records = records.map(|n| Ok((n, records::proving(n)?, records::offer(n)?)));
        let records = records.collect::<Result<Vec<_>, Failed>>()?;
        let put = journal.write(|tx| {
            for (n, sector, offer) in &records {
                tx.put(&Sectors::STATES, &SectorNumber(*n), sector)?;
                tx.put(&PieceMachine::STATES, &records::deal(*n), offer)?;
            }
            Ok::<_, JournalError>(())
        });
        put.map_err(|e| Failed::at("journal", e))?;
        bar.inc(records.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// A repo on a devnet, whose hub is started here and not by the supervisor.
struct Rig {
    net: Net,
    repo: PathBuf,
    exe: PathBuf,
    env: std::collections::BTreeMap<String, String>,
}

/// A hub that is ready.
struct Hub {
    child: Child,
    pid: Pid,
    began: Instant,
    ready: Duration,
}

#[derive(Deserialize)]
struct Status {
    state: String,
}

impl Rig {
    /// Waits until the supervisor's hub is gone.
    async fn stopped(&self) -> Result<(), Failed> {
        let gone = self.net.wait("the hub to stop", STOP_LIMIT, async |n| {
            let hub = n.process("hub").await.ok()?;
            hub.pid.is_none().then_some(())
        });
        gone.await
    }

    async fn measure(&self, sectors: u64) -> Result<Starts, Failed> {
        let (mut ready, mut quiet) = (Vec::new(), Vec::new());
        let (mut memory, mut peak) = (Vec::new(), 0);
        for _ in 0..STARTS {
            let hub = self.start().await?;
            self.look(sectors - 1).await?;
            quiet.push(hub.quiet().await?);
            ready.push(hub.ready.as_secs_f64());
            memory.push(hub.memory("VmRSS:")?);
            peak = peak.max(hub.memory("VmHWM:")?);
            eprintln!(
                "{sectors} sectors: ready after {:.2} s, {} MiB",
                hub.ready.as_secs_f64(),
                peak >> 20
            );
            self.stop(hub, Signal::SIGTERM).await?;
        }
        let killed = self.start().await?;
        self.stop(killed, Signal::SIGKILL).await?;
        let after_kill = self.start().await?;
        self.look(sectors - 1).await?;
        let ready_after_kill_seconds = after_kill.ready.as_secs_f64();
        self.stop(after_kill, Signal::SIGTERM).await?;
        memory.sort_unstable();
        Ok(Starts {
            sectors,
            journal_bytes: std::fs::metadata(self.repo.join("journal.redb"))?.len(),
            ready_seconds: median(&ready),
            ready_after_kill_seconds,
            quiet_seconds: median(&quiet),
            memory_bytes: memory[memory.len() / 2],
            peak_memory_bytes: peak,
        })
    }

    /// Starts the hub and waits for its word that it is ready.
    async fn start(&self) -> Result<Hub, Failed> {
        let path = self.net.root().join("ready.sock");
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        let socket = UnixDatagram::bind(&path)?;
        let log = std::fs::File::create(self.net.root().join("logs/measured-hub.log"))?;
        let began = Instant::now();
        let mut child = Command::new(&self.exe)
            .args(["run", "--repo"])
            .arg(&self.repo)
            .envs(&self.env)
            .env("NOTIFY_SOCKET", &path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| Failed::at("lotus-miner", e))?;
        let mut word = [0; 64];
        let why = tokio::select! {
            said = socket.recv(&mut word) => match said {
                Ok(n) if word[..n].starts_with(b"READY=1") => None,
                Ok(_) => Some("it said something else".to_owned()),
                Err(e) => Some(e.to_string()),
            },
            ended = child.wait() => Some(format!("it ended: {ended:?}")),
            () = tokio::time::sleep(LIMIT) => Some(format!("not ready in {LIMIT:?}")),
        };
        let ready = began.elapsed();
        if let Some(why) = why {
            return Err(Failed(format!("the hub: {why}\n{}", self.net.logs())));
        }
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| Failed::new("the hub ended"))?;
        Ok(Hub {
            child,
            pid: Pid::from_raw(pid),
            began,
            ready,
        })
    }

    async fn stop(&self, mut hub: Hub, signal: Signal) -> Result<(), Failed> {
        kill(hub.pid, signal).map_err(|e| Failed::at("kill", e))?;
        let ended = tokio::time::timeout(STOP_LIMIT, hub.child.wait()).await;
        let status = ended.map_err(|_| Failed(format!("{signal} had no effect")))??;
        if status.success() || signal == Signal::SIGKILL {
            return Ok(());
        }
        let logs = self.net.logs();
        Err(Failed(format!("the hub ended with {status}\n{logs}")))
    }

    /// Asks the hub for a sector that was written.
    async fn look(&self, number: u64) -> Result<(), Failed> {
        let (number, repo) = (number.to_string(), self.repo.display().to_string());
        let ask = ["sectors", "status", &number, "--json", "--repo", &repo];
        let out = self.net.run("lotus-miner", &ask).await?;
        let status: Status = serde_json::from_str(&out).map_err(|e| Failed::at("status", e))?;
        if status.state == "Proving" {
            return Ok(());
        }
        Err(Failed(format!("sector {number} is in {}", status.state)))
    }
}

impl Hub {
    /// Seconds from its start until it took hardly any CPU time for a second.
    async fn quiet(&self) -> Result<f64, Failed> {
        let mut before = self.ticks()?;
        loop {
            let at = self.began.elapsed();
            tokio::time::sleep(secs(1)).await;
            let now = self.ticks()?;
            if now.saturating_sub(before) <= QUIET_TICKS {
                return Ok(at.as_secs_f64());
            }
            if at > LIMIT {
                return Err(Failed(format!("the hub is not quiet after {LIMIT:?}")));
            }
            before = now;
        }
    }

    fn proc(&self, name: &str) -> Result<String, Failed> {
        let path = format!("/proc/{}/{name}", self.pid);
        std::fs::read_to_string(&path).map_err(|e| Failed::at(&path, e))
    }

    /// CPU time so far: fields 14 and 15 of `stat`, counted behind the name in parentheses.
    fn ticks(&self) -> Result<u64, Failed> {
        let stat = self.proc("stat")?;
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let ticks: Vec<u64> = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|t| t.parse().ok())
            .collect();
        match ticks[..] {
            [user, system] => Ok(user + system),
            _ => Err(Failed(format!("stat has another form: {stat}"))),
        }
    }

    /// Bytes of a line of `status`.
    fn memory(&self, line: &str) -> Result<u64, Failed> {
        let status = self.proc("status")?;
        let kib = status.lines().find_map(|l| l.strip_prefix(line));
        kib.and_then(|v| v.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
            .map(|kib| kib << 10)
            .ok_or_else(|| Failed(format!("status has no {line}")))
    }
}
