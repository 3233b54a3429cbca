//! `config.toml` of a devnet's repo.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use lotus_devnet::ChainConfig;
use lotus_runtime::Fault;
use lotus_runtime::admin::AdminConfig;
use lotus_runtime::telemetry::TelemetryConfig;
use lotus_types::Kind;
use serde::{Deserialize, Serialize};

/// Prefix of the variables that overlay the file: `LOTUS_DEVNET__CHAIN__NETWORK_NAME`.
const ENV: &str = "LOTUS_DEVNET";

/// Settings of a devnet.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Config {
    /// Address of the Lotus JSON-RPC (HTTP and WebSocket, path `/rpc/v1`). Port 0 picks a free
    /// one; the repo's file `api` has the one in use.
    pub(crate) listen: SocketAddr,
    /// Health and metrics.
    pub(crate) admin: AdminConfig,
    /// Logs and traces.
    pub(crate) telemetry: TelemetryConfig,
    /// The chain. All but its block time is fixed once the chain is made.
    pub(crate) chain: ChainConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 1234).into(),
            admin: AdminConfig::default(),
            telemetry: TelemetryConfig::default(),
            chain: ChainConfig::default(),
        }
    }
}

impl Config {
    /// Reads `<repo>/config.toml`, if there is one, and the environment.
    pub(crate) fn load(repo: &Path) -> Result<Self, Fault> {
        Ok(lotus_settings::load(Some(&repo.join("config.toml")), ENV)?)
    }

    /// Keeps the settings that a chain is made with, so that later runs need no options.
    pub(crate) fn save_first(&self, repo: &Path) -> Result<(), Fault> {
        let path = repo.join("config.toml");
        if path.exists() {
            return Ok(());
        }
        let text = toml::to_string_pretty(self)
            .map_err(|e| Fault::new(Kind::Fatal, format!("settings: {e}"), "report this"))?;
        Ok(fs::write(path, text)?)
    }
}
