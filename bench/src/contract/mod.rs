//! The hub API under a hostile spoke: what it costs the others.

mod hostile;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use hub_proto::v1::ListPiecesRequest;
use hub_proto::{HubClient, HubConfig};
use lotus_e2e::{Failed, Net, NetConfig, demo, secs};
use lotus_identity::{Authority, Caller, Held};
use serde::Serialize;
use tokio::process::Command;

pub(crate) use hostile::Options as Hostile;
use hostile::Tried;

use crate::ratio;

/// Between two calls of the one that is measured.
const PACE: Duration = Duration::from_millis(5);
/// How long nobody disturbs it, before and after.
const QUIET: Duration = secs(20);
/// Until the hostile one is at full speed.
const START: Duration = secs(3);
/// What a call may take at most, by what it takes when it is quiet.
const TARGET: f64 = 1.2;
/// The hub may grow by so many bytes.
const GROWTH: u64 = 256 << 20;

/// How long it is measured.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Seconds for which the hostile spoke tries
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..=3600))]
    hostile_secs: u64,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Every measurement was made, and no call of the other spoke failed.
    ok: bool,
    /// The 99th percentile of another spoke's calls, by that when it is quiet.
    hostile_p99_ratio: f64,
    hostile_target_met: bool,
    /// Calls of the other spoke, milliseconds: quiet, and meanwhile.
    quiet_p50_ms: f64,
    quiet_p99_ms: f64,
    hostile_p50_ms: f64,
    hostile_p99_ms: f64,
    /// Calls of the other spoke that failed meanwhile.
    failed: u64,
    /// Memory of the hub, bytes: before, at most, and after.
    rss_before: u64,
    rss_most: u64,
    rss_after: u64,
    rss_target_met: bool,
    /// Files that the hub has open: before, at most, and after.
    files_before: usize,
    files_most: usize,
    files_after: usize,
    /// Share of one core that the hub used meanwhile.
    hub_cores: f64,
    #[serde(flatten)]
    tried: Tried,
}

pub(crate) async fn hostile(options: Hostile) -> Result<Tried, Failed> {
    hostile::run(&options).await
}

pub(crate) async fn run(options: Options) -> Result<Report, Failed> {
    let cfg = NetConfig::default();
    let net = Net::start(&cfg).await?;
    net.ready(secs(120)).await?;
    let hub = net.root().join("miner");
    let addr = lotus_runtime::addr_file::read(&hub.join("run"), "api");
    let addr: SocketAddr = addr
        .map_err(|e| Failed::at("api", e))?
        .parse()
        .map_err(|e| Failed::at("api", e))?;
    let data = net.root().join("data");
    std::fs::create_dir(&data)?;
    std::fs::write(data.join("file"), vec![3; 100_000])?;
    let car = net.root().join("data.car");
    lotus_car::pack_dir(&data, &car).map_err(|e| Failed::at("pack", e))?;
    let piece = demo::propose(&net, &car).await?.piece_cid;

    let good = identity(&net, &hub, "deals/bench")?;
    let bad = identity(&net, &hub, "retrieval/hostile")?;
    let spoke = HubConfig {
        addr: format!("https://{addr}"),
        identity: good,
        ..HubConfig::default()
    };
    let spoke = HubClient::connect(
        &spoke,
        "deals",
        "bench",
        lotus_runtime::trace::client_interceptor,
    )
    .await
    .map_err(|e| Failed::at("hub", e))?;
    let pid = net.process("hub").await?.pid;
    let pid = pid.ok_or_else(|| Failed::new("no hub"))?;

    eprintln!("quiet, {QUIET:?}");
    calls(&spoke, secs(3)).await;
    let before = calls(&spoke, QUIET).await;
    let (rss_before, files_before) = (rss(pid)?, files(pid)?);
    eprintln!("a hostile spoke, {} s", options.hostile_secs);
    let mut process = attacker(addr, &bad, &piece, options.hostile_secs)?;
    tokio::time::sleep(START).await;
    let (used, began) = (cpu(pid)?, Instant::now());
    let (mut rss_most, mut files_most) = (rss_before, files_before);
    let mut meanwhile = Calls::default();
    while process.try_wait()?.is_none() {
        meanwhile.add(calls(&spoke, secs(1)).await);
        rss_most = rss_most.max(rss(pid)?);
        files_most = files_most.max(files(pid)?);
    }
    let hub_cores = (cpu(pid)? - used) / began.elapsed().as_secs_f64();
    let out = process.wait_with_output().await?;
    let tried: Tried =
        serde_json::from_slice(&out.stdout).map_err(|e| Failed::at("the hostile spoke", e))?;
    eprintln!("quiet, {QUIET:?}");
    let after = calls(&spoke, QUIET).await;
    let (rss_after, files_after) = (rss(pid)?, files(pid)?);
    net.stop().await?;

    let failed = before.failed + meanwhile.failed + after.failed;
    let mut quiet = before;
    quiet.add(after);
    let p99_ratio = ratio("p99", meanwhile.ms(0.99), quiet.ms(0.99))?;
    let report = Report {
        ok: failed == 0,
        hostile_p99_ratio: p99_ratio,
        hostile_target_met: p99_ratio <= TARGET,
        quiet_p50_ms: quiet.ms(0.5),
        quiet_p99_ms: quiet.ms(0.99),
        hostile_p50_ms: meanwhile.ms(0.5),
        hostile_p99_ms: meanwhile.ms(0.99),
        failed,
        rss_before,
        rss_most,
        rss_after,
        rss_target_met: rss_most <= rss_before + GROWTH,
        files_before,
        files_most,
        files_after,
        hub_cores,
        tried,
    };
    report.show();
    Ok(report)
}

impl Report {
    fn show(&self) {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_BORDERS_ONLY);
        let met = |met: bool| if met { "met" } else { "MISSED" };
        table.add_row([
            "another spoke's calls, p99".to_owned(),
            format!("{:.2} ms", self.hostile_p99_ms),
            format!(
                "{:.2} times that of quiet; target {TARGET}: {}",
                self.hostile_p99_ratio,
                met(self.hostile_target_met)
            ),
        ]);
        table.add_row([
            "memory of the hub".to_owned(),
            format!("{} MB at most", self.rss_most / 1_000_000),
            format!(
                "{} MB before; target {} MB more: {}",
                self.rss_before / 1_000_000,
                GROWTH / 1_000_000,
                met(self.rss_target_met)
            ),
        ]);
        table.add_row([
            "the hub's processor".to_owned(),
            format!("{:.2} cores", self.hub_cores),
            format!("{:?}", self.tried),
        ]);
        eprintln!("{table}");
    }
}

/// A spoke that joined, as the hub's authority has it.
fn identity(net: &Net, hub: &Path, who: &str) -> Result<PathBuf, Failed> {
    let caller: Caller = who.parse().map_err(|e| Failed::at(who, e))?;
    let failed = |e: lotus_runtime::Fault| Failed::at(who, e);
    let authority = Authority::open(&hub.join("ca")).map_err(failed)?;
    let bundle = authority
        .invite(&caller, "hub:1", secs(3600))
        .map_err(failed)?;
    let certificate = bundle.certificate().clone();
    let dir = net.root().join(who.replace('/', "-"));
    let mut held = Held::start(&dir, Some(bundle)).map_err(failed)?;
    let joined = authority.join(&certificate, &held.public_key());
    let joined = joined.map_err(|e| Failed::at(who, e))?;
    held.accept(joined).map_err(failed)?;
    Ok(dir)
}

/// The hostile one, which gets what the others leave of the processor: it is to be on another host.
fn attacker(
    addr: SocketAddr,
    identity: &Path,
    piece: &str,
    seconds: u64,
) -> Result<tokio::process::Child, Failed> {
    let mut command = Command::new("chrt");
    command
        .args(["--idle", "0"])
        .arg(std::env::current_exe()?)
        .args(["hostile", "--addr", &addr.to_string(), "--piece", piece])
        .args(["--seconds", &seconds.to_string(), "--identity"])
        .arg(identity)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command.spawn().map_err(|e| Failed::at("chrt", e))
}

/// Calls of a spoke.
#[derive(Default)]
struct Calls {
    took: Vec<Duration>,
    failed: u64,
}

impl Calls {
    fn add(&mut self, other: Self) {
        self.took.extend(other.took);
        self.failed += other.failed;
    }

    /// Milliseconds of the call at this place of all, by time.
    fn ms(&self, place: f64) -> f64 {
        let mut took = self.took.clone();
        took.sort_unstable();
        let at = f64::from(u32::try_from(took.len()).unwrap_or(u32::MAX)) * place;
        #[expect(clippy::cast_possible_truncation, reason = "an index")]
        #[expect(clippy::cast_sign_loss, reason = "an index")]
        let at = (at as usize).min(took.len().saturating_sub(1));
        took.get(at).map_or(0.0, |t| t.as_secs_f64() * 1e3)
    }
}

/// Calls at a steady pace, for so long.
async fn calls(spoke: &HubClient, time: Duration) -> Calls {
    let mut calls = Calls::default();
    let end = Instant::now() + time;
    let mut pace = tokio::time::interval(PACE);
    while Instant::now() < end {
        pace.tick().await;
        let began = Instant::now();
        let list = spoke.request(ListPiecesRequest::default());
        match spoke.pieces().list(list).await {
            Ok(_) => calls.took.push(began.elapsed()),
            Err(e) => {
                eprintln!("a call failed: {e}");
                calls.failed += 1;
            }
        }
    }
    calls
}

fn rss(pid: u32) -> Result<u64, Failed> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| Failed::new("no VmRSS of the hub"))
}

fn files(pid: u32) -> Result<usize, Failed> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// Seconds of processor time of a process.
fn cpu(pid: u32) -> Result<f64, Failed> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Behind the name, which may have spaces: fields 14 and 15 of all, in hundredths of a second.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: Option<u32> = ticks.map(|t| t.parse::<u32>().ok()).sum();
    let ticks = ticks.ok_or_else(|| Failed::new("no processor time of the hub"))?;
    Ok(f64::from(ticks) / 100.0)
}
