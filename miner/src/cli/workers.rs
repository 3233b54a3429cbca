use std::path::PathBuf;

use clap::Subcommand;
use lotus_runtime::Fault;
use lotus_types::Kind;
use lotus_workers::{Authority, WorkerName};
use serde::Serialize;

use super::credentials::{host_port, new_file, reachable};
use super::{Cx, print, print_json};
use crate::config::MinerConfig;
use crate::repo::Repo;

#[derive(Debug, Subcommand)]
pub(super) enum WorkersCommand {
    /// Write the one file that a worker on another host starts from
    ///
    /// Copy it there, and `lotus-worker run --bundle FILE --dir /fast/disk`, with `--class prove` for
    /// proofs of deadlines and blocks. Whoever has the file can take the hub's tasks and their
    /// files: keep it secret. A new bundle makes an earlier one of the same name void.
    JoinBundle {
        /// Name of the worker: a-z, 0-9 and -
        #[arg(long, default_value = "worker")]
        name: WorkerName,
        /// Where the worker reaches the hub, host:port. Without it, the address of workers.listen
        #[arg(long, value_name = "HOST:PORT")]
        hub: Option<String>,
        /// Days that the bundle is good for
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3_650))]
        days: u32,
        /// File to write; it must not exist
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
    /// List the workers that have a bundle that counts; `sealing workers` lists those attached
    Bundles,
    /// Make a worker's bundle void, at once
    ///
    /// If the worker is attached, it is turned away and its tasks go to others.
    Revoke {
        /// The name in `workers bundles`
        name: WorkerName,
    },
}

#[derive(Serialize)]
struct Made {
    name: WorkerName,
    hub: String,
    file: PathBuf,
    days: u32,
}

/// Works without a running hub: the authority is in the repo.
pub(super) fn workers(cx: &Cx, command: &WorkersCommand) -> Result<(), Fault> {
    let repo = cx.repo()?;
    if !repo.is_initialised() {
        return Err(repo.no_hub());
    }
    let authority = Authority::open(&repo.authority())?;
    match command {
        WorkersCommand::JoinBundle {
            name,
            hub,
            days,
            output,
        } => {
            let hub = match hub {
                Some(hub) => host_port(hub)?,
                None => address(&repo)?,
            };
            let file = new_file(output)?;
            let cfg = MinerConfig::load(&repo.config())?;
            let proofs = (cfg.proofs.mode, cfg.sector_size()?);
            authority.issue(name, &hub, proofs, *days)?.write(&file)?;
            let made = Made {
                name: name.clone(),
                hub,
                file,
                days: *days,
            };
            if cx.json {
                return print_json(&made);
            }
            print(&format!(
                "{} is for the worker {} of the hub at {}, and good for {days} days.\n\
                 Copy it to the worker's host and keep it secret; then, there:\n  \
                 lotus-worker run --bundle {} --dir /fast/disk",
                made.file.display(),
                made.name,
                made.hub,
                output.display()
            ))
        }
        WorkersCommand::Bundles => {
            let names = authority.workers()?;
            if cx.json {
                return print_json(&names);
            }
            let lines: Vec<&str> = names.iter().map(WorkerName::as_str).collect();
            if lines.is_empty() {
                return print("no worker has a bundle; `workers join-bundle` makes one");
            }
            print(&lines.join("\n"))
        }
        WorkersCommand::Revoke { name } => {
            if !authority.revoke(name)? {
                return Err(Fault::new(
                    Kind::Data,
                    format!("{name} has no bundle that counts"),
                    "see `lotus-miner workers bundles`",
                ));
            }
            if cx.json {
                return print_json(name);
            }
            print(&format!("the bundle of {name} does not count any more"))
        }
    }
}

/// Where workers on other hosts reach this hub, as far as the hub can know.
fn address(repo: &Repo) -> Result<String, Fault> {
    let cfg = MinerConfig::load(&repo.config())?;
    let Some(wanted) = cfg.workers.address()? else {
        return Err(Fault::new(
            Kind::Config,
            "this hub lets no worker of another host attach: workers.listen is empty",
            "set workers.listen to an address of this host such as 10.0.0.5:2347 and restart the \
             hub, or name the address that is to come with --hub",
        ));
    };
    reachable(repo, wanted, "workers")
}
