//! `lotus-miner`: the hub of a storage provider, and the commands that ask it.

use std::process::ExitCode;

use clap::Parser as _;
use lotus_miner::cli::{self, Args};

fn main() -> ExitCode {
    match cli::start(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("lotus-miner: {fault}\n  fix: {}", fault.fix);
            fault.kind.exit_code()
        }
    }
}
