//! `lotus-miner` with `run --all-in-one`, to be measured and not to be shipped.

use std::process::ExitCode;

use clap::Parser as _;
use lotus_miner::cli::{self, Args};

fn main() -> ExitCode {
    match cli::start(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("lotus-miner-all-in-one: {fault}\n  fix: {}", fault.fix);
            fault.kind.exit_code()
        }
    }
}
