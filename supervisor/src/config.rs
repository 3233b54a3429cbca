//! `supervisor.toml`.

use std::collections::BTreeMap;
use std::time::Duration;

use lotus_runtime::admin::AdminConfig;
use lotus_runtime::telemetry::TelemetryConfig;
use serde::{Deserialize, Serialize};

use crate::guard::{GuardConfig, Mode};
use crate::logs::Rotation;
pub use crate::sandbox::SandboxConfig;

/// The supervisor's configuration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The full node.
    pub devnet: DevnetConfig,
    /// The hub.
    pub hub: HubProcess,
    /// The spokes.
    pub spokes: SpokesConfig,
    /// What spokes are kept from.
    pub sandbox: SandboxConfig,
    /// Programs of others that belong to this host, by name: a full node, an exporter.
    pub process: BTreeMap<String, ProcessConfig>,
    /// What is squeezed while the hub proves.
    pub guard: GuardConfig,
    /// Time limits.
    pub limits: Limits,
    /// Health and metrics of the supervisor itself.
    pub admin: AdminConfig,
    /// Logs, traces and metrics of the supervisor itself.
    pub telemetry: TelemetryConfig,
}

/// `[devnet]`: an embedded chain on this host instead of a full node elsewhere.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DevnetConfig {
    /// Run `lotus-devnet`. Off: the hub's own `[node]` says where the full node is.
    pub enabled: bool,
    /// More arguments for `lotus-devnet run`.
    pub args: Vec<String>,
    /// Miner actor for which a new hub repo is initialised on the devnet.
    pub actor: String,
    /// Environment of the process.
    pub env: BTreeMap<String, String>,
    /// Seconds that it may take until it is ready; 0 for `limits.start_secs`.
    pub start_secs: u64,
    /// Seconds that it may take to end after SIGTERM; 0 for `limits.stop_secs`.
    pub stop_secs: u64,
}

impl Default for DevnetConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            args: Vec::new(),
            actor: "t01000".into(),
            env: BTreeMap::new(),
            start_secs: 0,
            stop_secs: 0,
        }
    }
}

/// `[hub]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HubProcess {
    /// Run the hub. Off on a host of spokes alone.
    pub enabled: bool,
    /// Names of `[process]` that must be ready before it.
    pub after: Vec<String>,
    /// As `after`, and it is stopped when one of them ends or is stopped.
    pub requires: Vec<String>,
    /// More arguments for `lotus-miner run`.
    pub args: Vec<String>,
    /// Environment of the process; `LOTUS_MINER__SECTION__KEY` sets its configuration.
    pub env: BTreeMap<String, String>,
    /// Seconds that it may take until it is ready; 0 for `limits.start_secs`.
    pub start_secs: u64,
    /// Seconds that it may take to end after SIGTERM; 0 for `limits.stop_secs`.
    pub stop_secs: u64,
}

impl Default for HubProcess {
    fn default() -> Self {
        Self {
            enabled: true,
            after: Vec::new(),
            requires: Vec::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
            start_secs: 0,
            stop_secs: 0,
        }
    }
}

/// `[process.NAME]`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProcessConfig {
    /// Program, as a path, and its arguments.
    pub command: Vec<String>,
    /// Environment of the process.
    pub env: BTreeMap<String, String>,
    /// Names of those that must be ready before it is started.
    pub after: Vec<String>,
    /// As `after`, and it is stopped when one of them ends or is stopped. It is started again when
    /// all are ready.
    pub requires: Vec<String>,
    /// When it counts as ready.
    pub ready: Readiness,
    /// What it does when one of those that it comes after ends.
    pub strategy: Strategy,
    /// Seconds without a sign of life (`WATCHDOG=1` of sd_notify) after which it is killed; 0 for
    /// one that gives none.
    pub watchdog_secs: u64,
    /// What may be done to it while the hub proves: "off", "squeeze" or "freeze".
    pub guard: Mode,
    /// Seconds that it may take until it is ready; 0 for `limits.start_secs`.
    pub start_secs: u64,
    /// Seconds that it may take to end after SIGTERM; 0 for `limits.stop_secs`.
    pub stop_secs: u64,
}

/// When a process counts as ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Readiness {
    /// As soon as it runs.
    #[default]
    AtOnce,
    /// When it says so: `READY=1` of sd_notify, or a newline on the descriptor LOTUS_NOTIFY_FD.
    Told,
}

/// What a process does when one of those that it comes after ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Nothing.
    #[default]
    OneForOne,
    /// It is stopped, and started when the other is ready again.
    RestForOne,
    /// It runs on. It is restarted if the other came back and it does not become ready again
    /// within `limits.reattach_secs`.
    Reconnect,
}

/// `[spokes]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpokesConfig {
    /// Services to run, one process each.
    pub services: Vec<String>,
    /// Environment of every spoke; `LOTUS_MARKETS__SECTION__KEY` sets its configuration.
    pub env: BTreeMap<String, String>,
    /// Seconds that it may take until it is ready; 0 for `limits.start_secs`.
    pub start_secs: u64,
    /// Seconds that it may take to end after SIGTERM; 0 for `limits.stop_secs`.
    pub stop_secs: u64,
    /// Bind the addresses that spokes listen on here, and hand them over: connections wait while a
    /// spoke is replaced, and are not refused. Off: each spoke binds its own.
    pub hand_sockets: bool,
}

impl Default for SpokesConfig {
    fn default() -> Self {
        Self {
            services: ["deals", "retrieval", "indexing"].map(String::from).into(),
            env: BTreeMap::new(),
            start_secs: 0,
            stop_secs: 0,
            hand_sockets: true,
        }
    }
}

/// `[limits]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Seconds that a process may take until it is ready; then it is killed and tried again.
    pub start_secs: u64,
    /// Seconds that a process may take to end after SIGTERM; then it is killed.
    pub stop_secs: u64,
    /// Seconds after which a run counts as healthy: the crashes before it are forgotten, and the
    /// next restart is immediate.
    pub healthy_secs: u64,
    /// Seconds without a sign of life after which a process of ours is killed; 0 for no limit.
    pub watchdog_secs: u64,
    /// Seconds that a spoke has to become ready again after its hub did; then it is restarted.
    pub reattach_secs: u64,
    /// A spoke that ended by itself this often within an hour is given up. 0 for never. The hub
    /// and the node are never given up.
    pub restarts_an_hour: u32,
    /// Milliseconds before the second restart in a row; the first one is immediate, and each one
    /// after that waits twice as long.
    pub backoff_first_ms: u64,
    /// Longest of these waits, in milliseconds.
    pub backoff_max_ms: u64,
    /// MiB at which a log is moved aside to `NAME.log.1`.
    pub log_mib: u64,
    /// Days after which a log is moved aside, even if it is small.
    pub log_days: u64,
    /// Old logs of a process that are kept.
    pub log_keep: u32,
}

impl Limits {
    /// The wait before the second restart in a row, and the longest one.
    pub(crate) const fn backoff(&self) -> (Duration, Duration) {
        (
            Duration::from_millis(self.backoff_first_ms),
            Duration::from_millis(self.backoff_max_ms),
        )
    }

    pub(crate) const fn rotation(&self) -> Rotation {
        Rotation {
            limit: self.log_mib << 20,
            age: Duration::from_secs(self.log_days.saturating_mul(24 * 3600)),
            keep: self.log_keep,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            start_secs: 120,
            stop_secs: 45,
            healthy_secs: 60,
            watchdog_secs: 120,
            reattach_secs: 60,
            restarts_an_hour: 100,
            backoff_first_ms: 100,
            backoff_max_ms: 30_000,
            log_mib: 64,
            log_days: 30,
            log_keep: 5,
        }
    }
}
