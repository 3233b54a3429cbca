//! Lifecycle and restart order on one host.

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = lotus_supervisor::launched(std::env::args_os()) {
        return code;
    }
    match lotus_supervisor::start(lotus_supervisor::arguments()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lotus-supervisor: {e}\n  fix: {}", e.fix);
            e.kind.exit_code()
        }
    }
}
