//! An embedded Filecoin chain behind Lotus JSON-RPC that verifies every proof.

mod cli;
mod config;
mod remote;
mod run;
mod wallet;

use std::process::ExitCode;

use clap::Parser;
use fvm_shared::address::{Network, set_current_network};

fn main() -> ExitCode {
    // Addresses print as t…, as on every network but mainnet.
    set_current_network(Network::Testnet);
    match cli::execute(cli::Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lotus-devnet: {e}\n  fix: {}", e.fix);
            e.kind.exit_code()
        }
    }
}
