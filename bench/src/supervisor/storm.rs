//! A process that dies as soon as it is started, a thousand times, and what the hub's callers see
//! of that: calls one after the other, in windows with and without it in turn.

use std::time::{Duration, Instant};

use hub_proto::HubClient;
use hub_proto::v1::IdentityRequest;
use lotus_e2e::{Failed, Net, NetConfig, secs};
use serde::Serialize;

use super::compile;
use crate::{median, ratio};

/// Deaths in all, and rounds of a quiet window and a stormy one.
const DEATHS: u32 = 1000;
const ROUNDS: u32 = 10;
/// Shortest window.
const WINDOW: Duration = secs(2);
/// Longest time in which a window's deaths must have come.
const LIMIT: Duration = secs(120);
/// Target: latency in a storm over that without.
pub(super) const TARGET_RATIO: f64 = 1.1;

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Storm {
    pub(super) storm_deaths: u32,
    /// Medians of the windows' medians.
    pub(super) hub_call_quiet_us: f64,
    pub(super) hub_call_storm_us: f64,
    pub(super) storm_ratio: f64,
    /// What the storm left: size of the file of events, in KiB.
    pub(super) storm_events_kib: u64,
}

pub(super) async fn run() -> Result<Storm, Failed> {
    let tools = tempfile::tempdir()?;
    compile(tools.path(), "die")?;
    let command = tools.path().join("die").display().to_string();
    let cfg = NetConfig {
        services: Vec::new(),
        // It is never given up, and starts again after 75 to 100 ms: what is the shortest wait by
        // default, for ever.
        supervisor: format!(
            "[limits]\nrestarts_an_hour = 0\nbackoff_first_ms = 100\nbackoff_max_ms = 100\n\
             [process.storm]\ncommand = [{command:?}]\n"
        ),
        ..NetConfig::default()
    };
    let net = Net::start(&cfg).await?;
    let wait = async |n: &Net| n.process("hub").await.ok()?.ready.then_some(());
    net.wait("the hub", secs(180), wait).await?;
    let hub = hub(&net).await?;
    let ask = async |words: &[&str]| {
        let root = net.root().display().to_string();
        let args = [words, &["--repo", &root]].concat();
        net.run("lotus-supervisor", &args).await.map(drop)
    };
    ask(&["stop", "storm"]).await?;
    let first = deaths(&net).await?;
    let (mut quiet, mut stormy) = (Vec::new(), Vec::new());
    let bar = indicatif::ProgressBar::new(ROUNDS.into());
    for round in 1..=ROUNDS {
        quiet.push(window(&hub, WINDOW).await?);
        let wanted = first + DEATHS * round / ROUNDS;
        let begin = Instant::now();
        ask(&["start", "storm"]).await?;
        let mut calls = Vec::new();
        // Counting costs, so it is done seldom.
        loop {
            calls.push(window(&hub, WINDOW).await?);
            if deaths(&net).await? >= wanted {
                break;
            }
            if begin.elapsed() > LIMIT {
                return Err(Failed::new("the storm is too weak"));
            }
        }
        stormy.push(median(&calls));
        ask(&["stop", "storm"]).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let storm_deaths = deaths(&net).await? - first;
    let events = std::fs::metadata(net.root().join("logs/events.jsonl"))?.len();
    let (calm, storm) = (median(&quiet), median(&stormy));
    net.stop().await?;
    Ok(Storm {
        storm_deaths,
        hub_call_quiet_us: calm,
        hub_call_storm_us: storm,
        storm_ratio: ratio("hub calls", storm, calm)?,
        storm_events_kib: events >> 10,
    })
}

async fn hub(net: &Net) -> Result<HubClient, Failed> {
    let socket = net.root().join("miner/run/hub.sock");
    HubClient::on_this_host(&socket, secs(30), "cli", "bench", Ok)
        .await
        .map_err(|e| Failed::at("hub", e))
}

async fn deaths(net: &Net) -> Result<u32, Failed> {
    Ok(net.process("storm").await?.restarts)
}

/// The median of calls one after the other, in microseconds.
async fn window(hub: &HubClient, length: Duration) -> Result<f64, Failed> {
    let mut took = Vec::new();
    let end = Instant::now() + length;
    while Instant::now() < end {
        let start = Instant::now();
        hub.hub()
            .identity(hub.request(IdentityRequest {}))
            .await
            .map_err(|s| Failed::at("hub", s.message()))?;
        took.push(start.elapsed().as_secs_f64() * 1e6);
    }
    took.sort_by(f64::total_cmp);
    Ok(median(&took))
}
