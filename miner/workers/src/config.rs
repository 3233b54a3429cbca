use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use lotus_proofs::ProofMode;
use lotus_runtime::Fault;
use lotus_runtime::telemetry::TelemetryConfig;
use lotus_types::{Generation, Kind};
use serde::{Deserialize, Serialize};

use crate::Class;

/// `[workers]` in the hub's config.toml: the processes that do the heavy work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkersConfig {
    /// Address for workers on other hosts, such as 10.0.0.5:2347; empty: off. Port 0 picks a free
    /// one; `run/workers.addr` has the one in use. Only workers with a bundle of this hub are
    /// let in (`lotus-miner workers join-bundle`), and all traffic is encrypted.
    pub listen: String,
    /// Whether seal workers of this host take the steps that workers on other hosts can do
    /// (PreCommit1, PreCommit2, the proofs). If not, they do the rest: they write pieces, clean up
    /// and unseal.
    pub seal_locally: bool,
    /// Seal worker processes. Each seals one sector step at a time on all cores it gets.
    pub seal_workers: u32,
    /// Prove worker processes. Two, so that a block's proof does not wait for a deadline's.
    pub prove_workers: u32,
    /// Nice value of seal workers, 0 to 19. Prove workers run at normal priority.
    pub seal_nice: i32,
    /// Seconds without a heartbeat after which a worker is killed.
    pub silence_secs: u64,
    /// Seconds that one seal task may take before its worker is killed.
    pub seal_task_secs: u64,
    /// Seconds that one prove task may take before its worker is killed.
    pub prove_task_secs: u64,
    /// How many workers may die over one task before its caller hears of it.
    pub deaths_per_task: u32,
    /// Seconds that workers get to leave when the hub stops.
    pub stop_secs: u64,
    /// Threads of one seal worker; 0 is one per CPU.
    pub seal_threads: u32,
    /// Directory in which workers keep graph parents, about 1.75 times the sector's size; may be
    /// shared by repos. Empty is /var/tmp/filecoin-parents.
    pub parent_cache: PathBuf,
}

impl Default for WorkersConfig {
    fn default() -> Self {
        Self {
            listen: String::new(),
            seal_locally: true,
            seal_workers: 1,
            prove_workers: 2,
            seal_nice: 10,
            silence_secs: 60,
            seal_task_secs: 24 * 3600,
            prove_task_secs: 1800,
            deaths_per_task: 3,
            stop_secs: 5,
            seal_threads: 0,
            parent_cache: PathBuf::new(),
        }
    }
}

impl WorkersConfig {
    /// The address for workers on other hosts, if they may come.
    pub fn address(&self) -> Result<Option<SocketAddr>, Fault> {
        if self.listen.is_empty() {
            return Ok(None);
        }
        self.listen.parse().map(Some).map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("workers.listen {:?}: {e}", self.listen),
                "set workers.listen to an address such as 10.0.0.5:2347, or to \"\" for off",
            )
        })
    }

    pub(crate) const fn count(&self, class: Class) -> u32 {
        match class {
            Class::Seal => self.seal_workers,
            Class::Prove => self.prove_workers,
        }
    }

    pub(crate) const fn task_limit(&self, class: Class) -> Duration {
        Duration::from_secs(match class {
            Class::Seal => self.seal_task_secs,
            Class::Prove => self.prove_task_secs,
        })
    }
}

/// What a [`Pool`](crate::Pool) needs beside its settings.
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// `[workers]`.
    pub settings: WorkersConfig,
    /// Directory of the socket `workers.sock`.
    pub run_dir: PathBuf,
    /// Directory of the workers' logs, `worker-<class>-<n>.log`.
    pub log_dir: PathBuf,
    /// The program that runs as `<exe> worker --class <class> --socket <path> ...`.
    pub exe: PathBuf,
    /// Directory of the authority that workers on other hosts are known by.
    pub authority: PathBuf,
    /// The hub's telemetry settings, which its workers take over.
    pub telemetry: TelemetryConfig,
    /// Which proofs the workers make.
    pub proofs: ProofMode,
    /// The hub's generation: workers of another one are refused.
    pub generation: Generation,
}

impl PoolConfig {
    /// The socket that workers attach to.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("workers.sock")
    }
}
