//! The client: what someone without a provider of their own runs.

mod deal;
mod error;
mod fetch;
mod files;
mod key;
mod market;
mod status;

use std::path::PathBuf;

use clap::Subcommand;
use lotus_runtime::telemetry::{self, TelemetryConfig};
use lotus_runtime::{Fault, trace};
use tracing::Instrument as _;

pub(crate) use error::ClientError;

/// Whom to deal with, and as whom.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Who {
    /// Base URL of the provider's deal service.
    #[arg(long, env = "LOTUS_HUB_PROVIDER_URL")]
    provider_url: String,
    /// File of the client's key, as `lotus wallet export` writes it; made when it does not exist
    /// [default: ~/.lotus-hub/client/key].
    #[arg(long, env = "LOTUS_HUB_CLIENT_KEY")]
    key: Option<PathBuf>,
    /// Seconds to keep trying while the provider does not answer or has no room.
    #[arg(long, default_value_t = 30)]
    patience_secs: u64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Pack a folder or a file into a CAR (UnixFS; the same content gives the same bytes).
    Pack(files::Pack),
    /// Compute a file's piece CID.
    PieceCid(files::PieceCid),
    /// Show the client's address.
    Address(key::ShowAddress),
    /// Propose a deal and send its data.
    Deal(deal::Deal),
    /// Show how far a deal is.
    Status(status::Status),
    /// Fetch a piece or a DAG from a retrieval service, and verify every byte.
    Fetch(fetch::Fetch),
}

/// Runs a client command.
pub(crate) async fn run(command: ClientCommand) -> Result<(), Fault> {
    // Results go to standard output; the log stays quiet unless RUST_LOG asks.
    let quiet = TelemetryConfig {
        log: "warn,lotus_markets=info".into(),
        ..TelemetryConfig::default()
    };
    let _telemetry = telemetry::init("lotus-markets-client", &quiet)?;
    // Already installed by another part of the process: just as good.
    drop(rustls::crypto::ring::default_provider().install_default());
    let span = tracing::info_span!("client");
    tracing::debug!(parent: &span, trace = trace::of(&span), "trace");
    let work = async {
        match command {
            ClientCommand::Pack(c) => c.run().await,
            ClientCommand::PieceCid(c) => c.run().await,
            ClientCommand::Address(c) => c.run(),
            ClientCommand::Deal(c) => c.run().await,
            ClientCommand::Status(c) => c.run().await,
            ClientCommand::Fetch(c) => c.run().await,
        }
    };
    work.instrument(span).await.map_err(Fault::from)
}
