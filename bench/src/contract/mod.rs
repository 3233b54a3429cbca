//! The hub API: what it costs beside JSON-RPC, what it holds, and what a hostile spoke does to it.

mod calls;
mod events;
mod hostile;
mod json_rpc;
mod log;
mod others;
mod pieces;
mod rig;
mod spokes;

use std::fmt::Display;
use std::time::Duration;

use clap::ValueEnum;
use comfy_table::{Table, presets};
use lotus_e2e::Failed;
use serde::Serialize;

pub(crate) use hostile::Options as Hostile;
pub(crate) use json_rpc::Options as JsonRpc;

use hostile::Tried;

/// What is measured, and how long.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Measure only these
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Seconds for which the hostile spoke tries
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..=3600))]
    hostile_secs: u64,
    /// Spokes that are connected at once
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(10..=3_500))]
    spokes: u32,
    /// Events in the log when 50 subscribers begin to read it. A million needs 2 GiB of disk for a
    /// while
    #[arg(long, default_value_t = 1_000_000,
        value_parser = clap::value_parser!(u64).range(1_000..=100_000_000))]
    events: u64,
    /// Where those subscribers break off, to have it again; at random if left out
    #[arg(long)]
    seed: Option<u64>,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What others get while a spoke with a valid certificate is hostile
    Hostile,
    /// Calls beside JSON-RPC over HTTP/1.1, TLS on both sides
    Calls,
    /// The event stream beside polling by JSON-RPC
    Events,
    /// Memory for each connected spoke
    Spokes,
    /// The event log, read by 50 subscribers that reconnect at random
    Log,
}

/// What was measured; what was not asked for is left out.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    /// Every measurement that was asked for was made, no call of a well-behaved spoke failed, and
    /// no event was lost, doubled or out of order. Whether a target is met is a field of its own.
    ok: bool,
    #[serde(flatten)]
    hostile: Option<others::Report>,
    #[serde(flatten)]
    calls: Option<calls::Report>,
    #[serde(flatten)]
    events: Option<events::Report>,
    #[serde(flatten)]
    spokes: Option<spokes::Report>,
    #[serde(flatten)]
    log: Option<log::Report>,
}

pub(crate) async fn hostile(options: Hostile) -> Result<Tried, Failed> {
    hostile::run(&options).await
}

pub(crate) async fn json_rpc(options: JsonRpc) -> Result<(), Failed> {
    json_rpc::run(&options).await
}

pub(crate) async fn run(options: Options) -> Result<Report, Failed> {
    let asked = |part| options.only.is_empty() || options.only.contains(&part);
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mut report = Report {
        ok: true,
        ..Report::default()
    };
    if asked(Part::Calls) {
        let measured = calls::run().await?;
        measured.rows(&mut table);
        report.ok &= measured.ok();
        report.calls = Some(measured);
    }
    if asked(Part::Events) {
        let measured = events::run().await?;
        measured.rows(&mut table);
        report.ok &= measured.ok();
        report.events = Some(measured);
    }
    if asked(Part::Spokes) {
        let measured = spokes::run(options.spokes).await?;
        measured.rows(&mut table);
        report.ok &= measured.ok();
        report.spokes = Some(measured);
    }
    if asked(Part::Log) {
        let seed = options.seed.unwrap_or_else(rand::random);
        let measured = log::run(options.events, seed).await?;
        measured.rows(&mut table);
        report.ok &= measured.ok();
        report.log = Some(measured);
    }
    if asked(Part::Hostile) {
        let measured = others::run(options.hostile_secs).await?;
        measured.rows(&mut table);
        report.ok &= measured.ok();
        report.hostile = Some(measured);
    }
    eprintln!("{table}");
    Ok(report)
}

/// The end of a row whose figure has a target.
fn target(target: impl Display, met: bool) -> String {
    let met = if met { "met" } else { "MISSED" };
    format!("; target {target}: {met}")
}

/// Calls, or anything else that takes time and may fail.
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

/// Resident memory of the hub, bytes.
fn rss(pid: u32) -> Result<u64, Failed> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map(|kib| kib << 10)
        .ok_or_else(|| Failed::new("no VmRSS of the hub"))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes and events, far below 2^52"
)]
const fn float(n: u64) -> f64 {
    n as f64
}
