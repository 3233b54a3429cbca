//! Real processes that are killed at random while the chain goes on. `cargo xtask chaos` builds
//! everything and runs this.

mod boundaries;
mod crash;
mod die;
mod kills;
mod markets;
mod mining;
mod node;
mod pieces;
mod proposals;
mod proving;

use std::process::ExitCode;

use clap::Parser;
use lotus_e2e::Failed;
use serde::Serialize;

/// Kills processes of a storage provider at random, and counts what it cost.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask chaos")]
struct Args {
    #[command(flatten)]
    kind: Kind,
    /// Repeats the moments of an earlier run
    #[arg(long)]
    seed: Option<u64>,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    proving: proving::Options,
    #[command(flatten)]
    mining: mining::Options,
    #[command(flatten)]
    crash: crash::Options,
    #[command(flatten)]
    node: node::Options,
    #[command(flatten)]
    markets: markets::Options,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Kind {
    /// Proving periods under kills, with replicas that are overwritten and later repaired
    #[arg(long)]
    proving: bool,
    /// Epochs under kills, reorgs and null rounds; then a second hub and restored backups
    #[arg(long)]
    mining: bool,
    /// The hub dies at writes of its journal, until it did at every step of sealing and upgrading,
    /// and at random moments
    #[arg(long = "crash")]
    crash: bool,
    /// The full node misbehaves while sectors are sealed
    #[arg(long = "node")]
    node: bool,
    /// The deal service dies at writes of its journal, until it did at every step of a deal, and
    /// at random moments
    #[arg(long = "markets")]
    markets: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(rand::random);
    eprintln!("seed {seed}: repeat with --seed {seed}");
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("lotus-chaos: {e}");
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(async {
        if args.kind.proving {
            let report = proving::run(&args.proving, seed).await?;
            show(&report, report.ok, args.json)
        } else if args.kind.crash {
            let report = crash::run(&args.crash, seed).await?;
            show(&report, report.ok, args.json)
        } else if args.kind.markets {
            let report = markets::run(&args.markets, seed).await?;
            show(&report, report.ok, args.json)
        } else if args.kind.node {
            let report = node::run(&args.node, seed).await?;
            show(&report, report.ok, args.json)
        } else {
            let report = mining::run(&args.mining, seed).await?;
            show(&report, report.ok, args.json)
        }
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failed(why)) => {
            eprintln!("lotus-chaos: {why}");
            if args.json {
                let first = why.lines().next().unwrap_or_default();
                println!("{}", serde_json::json!({ "ok": false, "error": first }));
            }
            ExitCode::FAILURE
        }
    }
}

fn show(report: &impl Serialize, ok: bool, json: bool) -> Result<bool, Failed> {
    let value = serde_json::to_value(report).map_err(|e| Failed::at("report", e))?;
    if json {
        println!("{value}");
    } else if let Some(fields) = value.as_object() {
        for (name, value) in fields {
            println!("{name:>20}  {value}");
        }
    }
    Ok(ok)
}
