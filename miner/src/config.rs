//! `config.toml`: every section, its defaults, and what a parser cannot check.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use lotus_api::LotusApiConfig;
use lotus_audit::AuditConfig;
use lotus_messages::MessagesConfig;
use lotus_node_client::NodeConfig;
use lotus_proofs::ProofMode;
use lotus_proving::{MiningConfig, ProvingConfig};
use lotus_runtime::Fault;
use lotus_runtime::admin::AdminConfig;
use lotus_runtime::telemetry::TelemetryConfig;
use lotus_sealing::{SealingConfig, StorageConfig};
use lotus_types::{ActorId, Kind, SectorSize};
use lotus_workers::WorkersConfig;
use serde::{Deserialize, Serialize};

use crate::pieces::KeepUnsealed;
use crate::restart::RestartConfig;

/// Prefix of the variables that overlay config.toml: `LOTUS_MINER__API__LISTEN`.
pub const ENV_PREFIX: &str = "LOTUS_MINER";

/// The hub's config.toml.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MinerConfig {
    /// Whose hub this is.
    pub miner: ActorConfig,
    /// The hub API.
    pub api: ApiConfig,
    /// Lotus' JSON-RPC for existing tools.
    pub lotus_api: LotusApiConfig,
    /// The full node.
    pub node: NodeConfig,
    /// Pieces on their way into sectors.
    pub pieces: PiecesConfig,
    /// The event log.
    pub events: EventsConfig,
    /// The audit log: every call of the hub API that changed something.
    pub audit: AuditConfig,
    /// Messages to the chain.
    pub messages: MessagesConfig,
    /// Sealing.
    pub sealing: SealingConfig,
    /// Storage paths.
    pub storage: StorageConfig,
    /// WindowPoSt.
    pub proving: ProvingConfig,
    /// Block production.
    pub mining: MiningConfig,
    /// Proofs.
    pub proofs: ProofsConfig,
    /// Worker processes.
    pub workers: WorkersConfig,
    /// Restarts.
    pub restart: RestartConfig,
    /// Health and metrics.
    pub admin: AdminConfig,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

/// `[miner]`: written by `lotus-miner init`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActorConfig {
    /// The miner actor, such as t01000.
    pub actor: String,
    /// Its sector size, such as 32GiB.
    pub sector_size: String,
}

/// `[proofs]`: how proofs are made. `lotus-miner init` writes what the node's network takes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProofsConfig {
    /// vanilla: full Merkle openings, for a lotus-devnet; no parameter files. groth16-post: SNARKs
    /// for WindowPoSt and WinningPoSt. groth16: SNARKs for everything, as every other network
    /// wants. SNARKs need parameter files: see `lotus-miner params`.
    pub mode: ProofMode,
}

/// `[api]`: gRPC, beside the Unix socket `run/hub.sock`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// TCP address for spokes on other hosts, with TLS on both sides: each starts from a file of
    /// `lotus-miner join-bundle`. Port 0 picks a free one; `run/api.addr` has the one in use.
    pub listen: SocketAddr,
    /// Spokes to which the hub opens the connections, as `host:port`: those that may open none to
    /// the hub. They start from a file of `lotus-miner join-bundle --hub listen:IP:PORT`.
    pub dial: Vec<String>,
    /// Seconds after which a unary call is given up.
    pub call_secs: u64,
    /// Calls in progress on one connection.
    pub calls_per_connection: usize,
    /// Calls a second of one spoke, twice as many at once; more wait. Of requests for bytes it may
    /// make five times as many.
    pub calls_per_second: u32,
    /// Connections a second from one address, or of one process of this host; twice as many at once.
    pub handshakes_per_second: u32,
    /// Largest request, bytes.
    pub max_request_bytes: usize,
}

impl ApiConfig {
    /// How long a unary call may take.
    #[must_use]
    pub fn call(&self) -> Duration {
        Duration::from_secs(self.call_secs.max(1))
    }
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 2344).into(),
            dial: Vec::new(),
            call_secs: 30,
            calls_per_connection: 128,
            calls_per_second: 1_000,
            handshakes_per_second: 50,
            max_request_bytes: 1 << 20,
        }
    }
}

/// `[pieces]`: the hand-off.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PiecesConfig {
    /// Pieces pulled at the same time.
    pub pulls: usize,
    /// Pieces that may wait for their bytes or for a sector. More offers are refused for now.
    pub max_waiting: usize,
    /// Bytes of the repo's disk that pieces leave free.
    pub keep_free_bytes: u64,
    /// Seconds that a source may be silent during a pull.
    pub idle_secs: u64,
    /// Milliseconds before the first retry of a pull or a placement; doubles up to
    /// `retry_max_ms`.
    pub retry_first_ms: u64,
    /// Longest time between two retries, milliseconds.
    pub retry_max_ms: u64,
    /// Longest life of a capacity credit, seconds.
    pub max_credit_secs: u32,
    /// How long the raw copy of a piece stays beside its sealed sector: `always`, `until-proven`
    /// or `until-deal-ends`. A deal that says itself whether it wants one is asked first. A copy is
    /// deleted when its sector is proven for 900 epochs, and can be unsealed again.
    pub keep_unsealed: KeepUnsealed,
}

impl Default for PiecesConfig {
    fn default() -> Self {
        Self {
            pulls: 4,
            max_waiting: 1_000,
            keep_free_bytes: 1 << 30,
            idle_secs: 30,
            retry_first_ms: 200,
            retry_max_ms: 30_000,
            max_credit_secs: 3_600,
            keep_unsealed: KeepUnsealed::Always,
        }
    }
}

/// `[events]`: the durable event log.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventsConfig {
    /// Events kept. A spoke that is further behind lists the state anew.
    pub keep: u64,
}

impl Default for EventsConfig {
    fn default() -> Self {
        Self { keep: 100_000 }
    }
}

impl MinerConfig {
    /// Reads `file` and the environment, and checks what a parser cannot.
    pub fn load(file: &Path) -> Result<Self, Fault> {
        let cfg: Self = lotus_settings::load(Some(file), ENV_PREFIX)?;
        cfg.actor()?;
        cfg.sector_size()?;
        cfg.messages
            .check()
            .map_err(|why| wrong(why, "correct [messages] in config.toml".into()))?;
        cfg.lotus_api.address()?;
        cfg.workers.address()?;
        if let Some(bad) = cfg.api.dial.iter().find(|a| !is_host_port(a)) {
            return Err(wrong(
                format!("api.dial has {bad:?}, which is no address"),
                "give host:port of each spoke to dial, such as 10.0.0.9:2345".into(),
            ));
        }
        let positive = [
            ("api.calls_per_connection", cfg.api.calls_per_connection),
            ("api.max_request_bytes", cfg.api.max_request_bytes),
            ("api.calls_per_second", cfg.api.calls_per_second as usize),
            ("pieces.pulls", cfg.pieces.pulls),
            ("pieces.max_waiting", cfg.pieces.max_waiting),
        ];
        match positive.iter().find(|(_, n)| *n == 0) {
            Some((key, _)) => Err(wrong(
                format!("{key} is 0"),
                format!("set {key} to 1 or more"),
            )),
            None => Ok(cfg),
        }
    }

    /// The miner actor.
    pub fn actor(&self) -> Result<ActorId, Fault> {
        self.miner.actor.parse().map_err(|e| {
            wrong(
                format!("miner.actor: {e}"),
                "set miner.actor, or run `lotus-miner init --actor t01000`".into(),
            )
        })
    }

    /// Size of its sectors.
    pub fn sector_size(&self) -> Result<SectorSize, Fault> {
        self.miner.sector_size.parse().map_err(|e| {
            wrong(
                format!("miner.sector_size: {e}"),
                "run `lotus-miner init` again: it asks the chain".into(),
            )
        })
    }
}

/// Whether it is a host and a port.
pub(crate) fn is_host_port(text: &str) -> bool {
    let good = |(host, port): (&str, &str)| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|p| p > 0)
    };
    text.rsplit_once(':').is_some_and(good)
}

fn wrong(message: String, fix: String) -> Fault {
    Fault::new(Kind::Config, message, fix)
}
