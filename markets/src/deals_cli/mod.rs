//! `lotus-markets storage-deals`: the operator's side of the deal service, over the socket in its
//! folder.

mod filter;
mod import;
mod link;
mod publish;
mod show;

use std::path::PathBuf;

use clap::Subcommand;
use lotus_runtime::Fault;
use lotus_runtime::telemetry::{self, TelemetryConfig};

use crate::Repo;

/// Which service.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Where {
    /// Directory of configuration and state [default: ~/.lotus-hub/markets].
    #[arg(long, env = "LOTUS_HUB_MARKETS")]
    repo: Option<PathBuf>,
}

impl Where {
    fn dir(&self) -> Result<PathBuf, Fault> {
        Ok(Repo::at(self.repo.clone())?.of("deals"))
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum DealsCommand {
    /// List deals.
    List(show::List),
    /// Show one deal, with its steps.
    Status(show::Status),
    /// Show the transfers that are under way, with their progress.
    Transfers(show::Transfers),
    /// Show the deals by proposal (MK1.2) that are on their way to the chain or wait for a message.
    PendingPublish(publish::PendingPublish),
    /// Give files to the offline deals that wait for them.
    ///
    /// A file belongs to the deal whose id or piece CID is its name, else to the one whose piece
    /// it is. What was imported stays imported: run the same command again after an interruption.
    ImportData(import::ImportData),
    /// Give a deal up whose piece is in no sector yet.
    Cancel(show::Cancel),
    /// Try a deal again: the next attempt of one that waits for it, or a deal that failed before
    /// the hub had its piece.
    Retry(show::Retry),
    /// Run a command as the filter of deals.
    ///
    /// The command gets each proposal as JSON on its standard input. Exit status 0 takes the deal;
    /// any other refuses it, and the first line of its output is the reason. Set deals.filter_url
    /// to the address. This runs outside of the service, whose sandbox starts no programs.
    Filter(filter::Filter),
}

/// Runs a command.
pub(crate) async fn run(command: DealsCommand) -> Result<(), Fault> {
    // Results go to standard output; the log stays quiet unless RUST_LOG asks.
    let quiet = TelemetryConfig {
        log: "warn,lotus_markets=info".into(),
        ..TelemetryConfig::default()
    };
    let _telemetry = telemetry::init("lotus-markets-deals", &quiet)?;
    match command {
        DealsCommand::List(c) => c.run().await,
        DealsCommand::Status(c) => c.run().await,
        DealsCommand::Transfers(c) => c.run().await,
        DealsCommand::PendingPublish(c) => c.run().await,
        DealsCommand::ImportData(c) => c.run().await,
        DealsCommand::Cancel(c) => c.run().await,
        DealsCommand::Retry(c) => c.run().await,
        DealsCommand::Filter(c) => c.run().await,
    }
}
