//! `lotus-markets`: hosts the public services of a storage provider, and is their client.

use std::process::ExitCode;

use clap::Parser as _;
use lotus_markets::Args;

fn main() -> ExitCode {
    match lotus_markets::start(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("lotus-markets: {fault}");
            if !fault.fix.is_empty() {
                eprintln!("  fix: {}", fault.fix);
            }
            fault.kind.exit_code()
        }
    }
}
