//! What a hostile spoke costs the others: their calls, and the hub's memory.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use comfy_table::Table;
use hub_proto::HubClient;
use hub_proto::v1::ListPiecesRequest;
use lotus_e2e::{Failed, Net, NetConfig, demo, secs};
use lotus_identity::Authority;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;
use tokio::process::{Child, Command};

use super::hostile::Tried;
use super::rig::{api_addr, identity, spoke};
use super::{Calls, rss, target};
use crate::markets::processor_time;
use crate::ratio;

/// Between two calls of the one that is measured.
const PACE: Duration = Duration::from_millis(5);
/// The hostile one acts for so long, then is stopped for as long, and so on: what else goes on in the hub,
/// blocks and proofs, is in both.
const TURN: u64 = 5;
/// Until the hostile one is at full speed, and until it is quiet.
const START: Duration = secs(3);
const SETTLE: Duration = Duration::from_millis(500);
/// Longest that the piece may take to be sealed, which would disturb.
const SEALING: Duration = secs(300);
/// What a call may take at most, by what it takes when it is quiet.
const TARGET: f64 = 1.2;
/// The hub may grow by so many bytes.
const GROWTH: u64 = 256 << 20;

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
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

pub(super) async fn run(seconds: u64) -> Result<Report, Failed> {
    let cfg = NetConfig::default();
    let net = Net::start(&cfg).await?;
    net.ready(secs(120)).await?;
    let hub = net.root().join("miner");
    let addr = api_addr(&hub)?;
    let data = net.root().join("data");
    std::fs::create_dir(&data)?;
    std::fs::write(data.join("file"), vec![3; 100_000])?;
    let car = net.root().join("data.car");
    lotus_car::pack_dir(&data, &car).map_err(|e| Failed::at("pack", e))?;
    let piece = demo::propose(&net, &car).await?.piece_cid;

    let authority = Authority::open(&hub.join("ca")).map_err(|e| Failed::at("authority", e))?;
    let good = identity(&authority, net.root(), "deals/bench")?;
    let bad = identity(&authority, net.root(), "retrieval/hostile")?;
    let spoke = spoke(addr, &good).await?;
    let pid = net.process("hub").await?.pid;
    let pid = pid.ok_or_else(|| Failed::new("no hub"))?;

    eprintln!("the piece is sealed");
    let repo = hub.display().to_string();
    let list = ["sectors", "list", "--json", "--repo", &repo];
    net.wait("the piece to be sealed", SEALING, async |net| {
        let all = net.run("lotus-miner", &list).await.ok()?;
        all.contains("\"Proving\"").then_some(())
    })
    .await?;
    calls(&spoke, secs(3)).await;
    let (rss_before, files_before) = (rss(pid)?, files(pid)?);
    eprintln!("a hostile spoke, {seconds} s, and as long without");
    // The turns, with a second of each to settle.
    let life = START.as_secs() + seconds.div_ceil(TURN) * (2 * TURN + 1);
    let process = attacker(addr, &bad, &piece, life)?;
    let hostile = process.id().and_then(|id| i32::try_from(id).ok());
    let hostile = Pid::from_raw(hostile.ok_or_else(|| Failed::new("no hostile spoke"))?);
    let signal = |s| kill(hostile, s).map_err(|e| Failed::at("the hostile spoke", e));
    tokio::time::sleep(START).await;
    let (mut rss_most, mut files_most) = (rss_before, files_before);
    let (mut meanwhile, mut quiet) = (Calls::default(), Calls::default());
    let (mut used, mut time) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..seconds.div_ceil(TURN) {
        let (before, began) = (processor_time(pid)?, Instant::now());
        for _ in 0..TURN {
            meanwhile.add(calls(&spoke, secs(1)).await);
            rss_most = rss_most.max(rss(pid)?);
            files_most = files_most.max(files(pid)?);
        }
        used += processor_time(pid)? - before;
        time += began.elapsed();
        signal(Signal::SIGSTOP)?;
        tokio::time::sleep(SETTLE).await;
        quiet.add(calls(&spoke, secs(TURN)).await);
        signal(Signal::SIGCONT)?;
        tokio::time::sleep(SETTLE).await;
    }
    let hub_cores = used.as_secs_f64() / time.as_secs_f64();
    let out = process.wait_with_output().await?;
    let tried: Tried =
        serde_json::from_slice(&out.stdout).map_err(|e| Failed::at("the hostile spoke", e))?;
    tokio::time::sleep(START).await;
    let (rss_after, files_after) = (rss(pid)?, files(pid)?);
    net.stop().await?;

    let failed = meanwhile.failed + quiet.failed;
    let p99_ratio = ratio("p99", meanwhile.ms(0.99), quiet.ms(0.99))?;
    Ok(Report {
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
    })
}

impl Report {
    /// No call of the other spoke failed.
    pub(super) fn ok(&self) -> bool {
        self.failed == 0
    }

    pub(super) fn rows(&self, table: &mut Table) {
        table.add_row([
            "another spoke's calls, p99".to_owned(),
            format!("{:.2} ms", self.hostile_p99_ms),
            format!(
                "{:.2} times that of quiet{}",
                self.hostile_p99_ratio,
                target(TARGET, self.hostile_target_met)
            ),
        ]);
        let more = format!("{} MB more", GROWTH / 1_000_000);
        table.add_row([
            "memory of the hub".to_owned(),
            format!("{} MB at most", self.rss_most / 1_000_000),
            format!(
                "{} MB before{}",
                self.rss_before / 1_000_000,
                target(more, self.rss_target_met)
            ),
        ]);
        table.add_row([
            "the hub's processor".to_owned(),
            format!("{:.2} cores", self.hub_cores),
            format!("{:?}", self.tried),
        ]);
    }
}

/// The hostile one, which gets what the others leave of the processor: it is to be on another host.
fn attacker(addr: SocketAddr, identity: &Path, piece: &str, seconds: u64) -> Result<Child, Failed> {
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

fn files(pid: u32) -> Result<usize, Failed> {
    Ok(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}
