use std::path::{Path, PathBuf};

use hub_proto::HubConfig;
use lotus_deals::DealsConfig;
use lotus_indexing::IndexingConfig;
use lotus_retrieval::RetrievalConfig;
use lotus_runtime::Fault;
use lotus_runtime::admin::AdminConfig;
use lotus_runtime::telemetry::TelemetryConfig;
use serde::{Deserialize, Serialize};

/// Prefix of the environment variables that override the file: `LOTUS_MARKETS__DEALS__LISTEN`.
pub(crate) const ENV_PREFIX: &str = "LOTUS_MARKETS";

/// `config.toml` of a markets repo.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MarketsConfig {
    /// The hub that the services work for.
    pub hub: HubConfig,
    /// Health, readiness and metrics.
    pub admin: AdminConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
    /// The deal service.
    pub deals: DealsConfig,
    /// The retrieval service.
    pub retrieval: RetrievalConfig,
    /// The indexing service.
    pub indexing: IndexingConfig,
}

/// A directory with the configuration and the state of the services, one sub-directory each.
#[derive(Clone, Debug)]
pub struct Repo(PathBuf);

impl Repo {
    /// The repo at `dir`, else the default one, `~/.lotus-hub/markets`.
    pub fn at(dir: Option<PathBuf>) -> Result<Self, Fault> {
        match dir.or_else(|| std::env::home_dir().map(|h| h.join(".lotus-hub/markets"))) {
            Some(dir) => Ok(Self(dir)),
            None => Err(Fault::new(
                lotus_types::Kind::Config,
                "there is no home directory for the default repo",
                "name a directory with --repo or LOTUS_HUB_MARKETS",
            )),
        }
    }

    /// The configuration file.
    #[must_use]
    pub fn config_file(&self) -> PathBuf {
        self.0.join("config.toml")
    }

    /// Where addresses are published.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.0.join("run")
    }

    /// The directory of one service.
    #[must_use]
    pub fn of(&self, service: &str) -> PathBuf {
        self.0.join(service)
    }

    /// Where a service keeps who it is at a hub on another host.
    #[must_use]
    pub fn identity(&self, service: &str) -> PathBuf {
        self.of(service).join("identity")
    }

    /// The hub, as a service dials it: with its own identity, unless the settings name another.
    #[must_use]
    pub fn hub(&self, cfg: &MarketsConfig, service: &str) -> HubConfig {
        let mut hub = cfg.hub.clone();
        if hub.identity.as_os_str().is_empty() {
            hub.identity = self.identity(service);
        }
        hub
    }

    /// The directory itself.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// Defaults, file and environment together.
    pub fn config(&self) -> Result<MarketsConfig, Fault> {
        Ok(lotus_settings::load(Some(&self.config_file()), ENV_PREFIX)?)
    }
}
