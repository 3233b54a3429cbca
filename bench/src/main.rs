//! Measurements, each side by side with a peer or the physical limit in the same run.
//! `cargo xtask bench` builds everything and runs this.

mod commits;
mod contract;
mod guard;
mod markets;
mod overhead;
mod records;
mod start;
mod supervisor;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use comfy_table::{Table, presets};
use lotus_e2e::Failed;
use serde::Serialize;

/// Measures this build on this machine. Keep the machine quiet.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench")]
enum Args {
    /// What the hub costs over the proof library and the disk, and how it starts with many sectors
    Sealing(Options),
    /// Restart after kill -9, memory and idle cost of the supervisor, beside runit, s6, supervisord
    Supervisor(supervisor::Options),
    /// A WindowPoSt while clients hammer the spokes: guard on, guard off, all in one process
    Guard(guard::Options),
    /// What the spokes can do: the index, retrieval and commP, each beside a peer
    Markets(markets::Options),
    /// The hub API: calls and events beside JSON-RPC, a thousand spokes, a long event log, and a
    /// hostile spoke with a valid certificate
    Contract(contract::Options),
    /// That spoke
    #[command(hide = true)]
    Hostile(contract::Hostile),
    /// The peer that answers by JSON-RPC
    #[command(hide = true)]
    JsonRpc(contract::JsonRpc),
}

#[derive(Debug, clap::Args)]
struct Options {
    /// Measure only these
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Sectors that are sealed in each way, after one that does not count
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// How many sectors the journal has when the hub starts. 1,500,000 need 12 GiB of disk for a while
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 100_000, 1_500_000],
        value_parser = clap::value_parser!(u64).range(1..=2_000_000))]
    sectors: Vec<u64>,
    /// Print one JSON object as the last line of standard output
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The hub against the proof library
    Overhead,
    /// The journal against the disk
    Commits,
    /// From start to ready
    Start,
}

/// What was measured; what was not asked for is left out.
#[derive(Debug, Serialize)]
struct Report {
    /// Every measurement that was asked for was made. Whether a target is met is a field of its
    /// own: a slow disk is no failure.
    ok: bool,
    #[serde(flatten)]
    overhead: Option<overhead::Report>,
    #[serde(flatten)]
    commits: Option<commits::Report>,
    #[serde(flatten)]
    start: Option<start::Report>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let json = match &args {
        Args::Sealing(options) => options.json,
        Args::Supervisor(options) => options.json,
        Args::Guard(options) => options.json,
        Args::Markets(options) => options.json,
        Args::Contract(options) => options.json,
        Args::Hostile(_) => true,
        Args::JsonRpc(_) => false,
    };
    let done = tokio::runtime::Runtime::new()
        .map_err(Error::from)
        .and_then(|runtime| runtime.block_on(measure(args)));
    let (value, code) = match done {
        Ok(value) => (value, ExitCode::SUCCESS),
        Err(e) => {
            eprintln!("lotus-bench: {e}");
            let why = e.to_string();
            let first = why.lines().next().unwrap_or_default();
            let value = serde_json::json!({ "ok": false, "error": first });
            (value, ExitCode::FAILURE)
        }
    };
    if json {
        println!("{value}");
    }
    code
}

async fn measure(args: Args) -> Result<serde_json::Value, Error> {
    Ok(match args {
        Args::Sealing(options) => serde_json::to_value(run(&options).await?)?,
        Args::Supervisor(options) => serde_json::to_value(supervisor::run(options).await?)?,
        Args::Guard(options) => serde_json::to_value(guard::run(options).await?)?,
        Args::Markets(options) => serde_json::to_value(markets::run(options).await?)?,
        Args::Contract(options) => serde_json::to_value(contract::run(options).await?)?,
        Args::Hostile(options) => serde_json::to_value(contract::hostile(options).await?)?,
        Args::JsonRpc(options) => serde_json::to_value(contract::json_rpc(options).await?)?,
    })
}

async fn run(options: &Options) -> Result<Report, Error> {
    let asked = |part| options.only.is_empty() || options.only.contains(&part);
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mut report = Report {
        ok: false,
        overhead: None,
        commits: None,
        start: None,
    };
    if asked(Part::Commits) {
        let measured = tokio::task::spawn_blocking(commits::run).await??;
        measured.rows(&mut table);
        report.commits = Some(measured);
    }
    if asked(Part::Overhead) {
        let measured = overhead::run(options.rounds).await?;
        measured.rows(&mut table);
        report.overhead = Some(measured);
    }
    if asked(Part::Start) {
        let measured = start::run(&options.sectors).await?;
        measured.rows(&mut table);
        report.start = Some(measured);
    }
    eprintln!("{table}");
    report.ok = true;
    Ok(report)
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Failed(#[from] Failed),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("a measurement panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
    #[error("report: {0}")]
    Report(#[from] serde_json::Error),
}

/// The middle value; of an even number the upper one.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Two figures, one by the other; an error when that says nothing.
fn ratio(what: &str, over: f64, under: f64) -> Result<f64, Failed> {
    let ratio = over / under;
    if ratio.is_finite() && ratio > 0.0 {
        return Ok(ratio);
    }
    Err(Failed(format!("{what}: {over} by {under} is no figure")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_sane() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!(median(&[]).is_nan());
        assert!(ratio("x", 1.0, 0.0).is_err() && ratio("x", 0.0, 1.0).is_err());
        assert!(ratio("x", median(&[]), 1.0).is_err());
    }
}
