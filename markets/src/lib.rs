//! Hosts the public services of a storage provider, and is a client of them.
//!
//! A service is a crate of its own with one line in [`registry`]. Each runs behind its own panic
//! boundary: when one fails, it is started again with back-off while the others go on.

mod cli;
mod client;
mod config;
mod deals_cli;
mod host;
mod index;
mod needs;
pub mod registry;

pub use cli::{Args, start};
pub use config::{MarketsConfig, Repo};

/// The named services on the caller's runtime, until `stop`: for whoever hosts them in a process
/// that is not `lotus-markets run`.
pub fn host(
    repo: Repo,
    names: Option<&[String]>,
    stop: lotus_runtime::CancellationToken,
) -> Result<
    impl Future<Output = Result<(), lotus_runtime::Fault>> + Send + use<>,
    lotus_runtime::Fault,
> {
    let services = registry::select(names)?;
    let cfg = repo.config()?;
    std::fs::create_dir_all(repo.run_dir())?;
    Ok(host::run(services, cfg, repo, stop))
}
