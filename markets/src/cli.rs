use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use hub_proto::{HubClient, HubConfig};
use lotus_identity::{Bundle, Held};
use lotus_runtime::{Fault, signals, telemetry, trace};

use crate::client::{self, ClientCommand};
use crate::config::Repo;
use crate::deals_cli::{self, DealsCommand};
use crate::index::{self, IndexCommand};
use crate::{MarketsConfig, host, needs, registry};

/// Public services of a storage provider, and their client.
#[derive(Debug, Parser)]
#[command(
    name = "lotus-markets",
    version,
    after_help = "\
Examples:
  lotus-markets run                                   run every service
  lotus-markets run --services=indexing,retrieval     run these two
  lotus-markets index find CID                        which pieces hold a block
  lotus-markets storage-deals list --open             deals that are not over
  lotus-markets storage-deals import-data --dir ./cars
  lotus-markets client pack ./data -o data.car        pack a folder as a CAR
  lotus-markets client deal --provider-url http://127.0.0.1:7780 --car data.car
  lotus-markets client status --provider-url http://127.0.0.1:7780 DEAL_ID --watch"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run services until stopped by SIGTERM or SIGINT.
    Run {
        /// Directory of configuration and state [default: ~/.lotus-hub/markets].
        #[arg(long, env = "LOTUS_HUB_MARKETS")]
        repo: Option<PathBuf>,
        /// Services to run, separated by commas; all when left out. `services` lists them.
        #[arg(long, value_delimiter = ',')]
        services: Option<Vec<String>>,
    },
    /// Print what services need from their host, from their configuration: sockets that may be
    /// handed to them, files, and TCP ports.
    Needs {
        /// Directory of configuration and state [default: ~/.lotus-hub/markets].
        #[arg(long, env = "LOTUS_HUB_MARKETS")]
        repo: Option<PathBuf>,
        /// Services, separated by commas; all when left out.
        #[arg(long, value_delimiter = ',')]
        services: Option<Vec<String>>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Join a hub on another host, with the file that `lotus-miner join-bundle` made there
    ///
    /// The file is good for one spoke, once; it can be deleted then. The service keeps who it is in
    /// its own folder and renews that by itself: `run` needs nothing more.
    Join {
        /// The file
        bundle: PathBuf,
        /// Directory of configuration and state [default: ~/.lotus-hub/markets].
        #[arg(long, env = "LOTUS_HUB_MARKETS")]
        repo: Option<PathBuf>,
    },
    /// List the services of this binary.
    Services {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The index of blocks: how large it is, which piece holds a block, whether it is sound.
    #[command(subcommand)]
    Index(IndexCommand),
    /// Storage deals, for the provider's operator: list, import data, cancel, retry.
    #[command(subcommand)]
    StorageDeals(DealsCommand),
    /// Act as a client of a storage provider: pack data, make deals, follow them, fetch.
    #[command(subcommand)]
    Client(ClientCommand),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default, as TOML.
    Default,
    /// Check the repo's configuration, environment included.
    Check {
        /// Directory of configuration and state [default: ~/.lotus-hub/markets].
        #[arg(long, env = "LOTUS_HUB_MARKETS")]
        repo: Option<PathBuf>,
    },
}

/// Runs a command line.
pub fn start(args: Args) -> Result<(), Fault> {
    match args.command {
        Command::Run { repo, services } => run(Repo::at(repo)?, services.as_deref()),
        Command::Needs {
            repo,
            services,
            json,
        } => {
            let repo = Repo::at(repo)?;
            let services = registry::select(services.as_deref())?;
            let needs = needs::of(&services, &repo.config()?, &repo)?;
            needs::print(&needs, json)
        }
        Command::Join { bundle, repo } => runtime()?.block_on(join(&bundle, &Repo::at(repo)?)),
        Command::Services { json } => {
            list(json);
            Ok(())
        }
        Command::Config(ConfigCommand::Default) => {
            print!("{}", lotus_settings::default_toml::<MarketsConfig>());
            Ok(())
        }
        Command::Config(ConfigCommand::Check { repo }) => {
            let repo = Repo::at(repo)?;
            repo.config()?;
            println!("{} is fine", repo.config_file().display());
            Ok(())
        }
        Command::Index(command) => runtime()?.block_on(index::run(command)),
        Command::StorageDeals(command) => runtime()?.block_on(deals_cli::run(command)),
        Command::Client(command) => runtime()?.block_on(client::run(command)),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime, Fault> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?)
}

fn run(repo: Repo, names: Option<&[String]>) -> Result<(), Fault> {
    let services = registry::select(names)?;
    let cfg = repo.config()?;
    std::fs::create_dir_all(repo.run_dir())?;
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let _telemetry = telemetry::init("lotus-markets", &cfg.telemetry)?;
        let names: Vec<_> = services.iter().map(|e| e.name).collect();
        tracing::info!(repo = %repo.dir().display(), ?names, "starting");
        signals::run_until_signal(|stop| host::run(services, cfg, repo, stop)).await
    });
    // Blocking work of a broken-off request must not hold the exit.
    runtime.shutdown_background();
    outcome
}

/// Makes a key for the identity that a bundle gives, and gets its first credential.
async fn join(bundle: &Path, repo: &Repo) -> Result<(), Fault> {
    let caller = Bundle::read(bundle)?.caller().clone();
    let service = caller.service.as_str();
    registry::select(Some(&[service.to_owned()]))?;
    let cfg = repo.config()?;
    let held = Held::open(&repo.hub(&cfg, service).identity, Some(bundle))?;
    let hub = HubConfig {
        // Where the bundle says, whatever the settings say.
        addr: String::new(),
        ..repo.hub(&cfg, service)
    };
    match HubClient::connect(&hub, service, "", trace::client_interceptor).await {
        Ok(_) => println!("{caller} joined the hub at {}", held.hub()),
        Err(e) if e.kind().is_retryable() => println!(
            "{caller} has an identity to be; the hub at {} does not answer now ({e}). \
             `lotus-markets run --services={service}` joins it as soon as it does",
            held.hub()
        ),
        Err(e) => return Err(Fault::new(e.kind(), e.to_string(), e.fix())),
    }
    if !cfg.hub.addr.is_empty() {
        println!(
            "hub.addr in {} names another hub: empty it",
            repo.config_file().display()
        );
    }
    Ok(())
}

fn list(json: bool) {
    if json {
        let names: Vec<_> = registry::SERVICES
            .iter()
            .map(|e| serde_json::json!({"name": e.name, "about": e.about}))
            .collect();
        println!("{}", serde_json::Value::from(names));
        return;
    }
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["SERVICE", "WHAT IT DOES"]);
    for e in registry::SERVICES {
        table.add_row([e.name, e.about]);
    }
    println!("{table}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }
}
