//! `lotus-worker`: seals for a hub on another host.

use std::process::ExitCode;

use clap::Parser as _;
use lotus_workers::{RemoteArgs, remote_main};

fn main() -> ExitCode {
    match remote_main(RemoteArgs::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("lotus-worker: {fault}\n  fix: {}", fault.fix);
            fault.kind.exit_code()
        }
    }
}
