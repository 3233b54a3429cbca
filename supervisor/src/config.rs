//! `supervisor.toml`, and the processes that it asks for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lotus_runtime::Fault;
use lotus_runtime::admin::AdminConfig;
use lotus_runtime::telemetry::TelemetryConfig;
use lotus_types::Kind;
use serde::{Deserialize, Serialize};

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
}

impl Default for DevnetConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            args: Vec::new(),
            actor: "t01000".into(),
            env: BTreeMap::new(),
        }
    }
}

/// `[hub]`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HubProcess {
    /// More arguments for `lotus-miner run`.
    pub args: Vec<String>,
    /// Environment of the process; `LOTUS_MINER__SECTION__KEY` sets its configuration.
    pub env: BTreeMap<String, String>,
}

/// `[spokes]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpokesConfig {
    /// Services to run, one process each.
    pub services: Vec<String>,
    /// Environment of every spoke; `LOTUS_MARKETS__SECTION__KEY` sets its configuration.
    pub env: BTreeMap<String, String>,
}

impl Default for SpokesConfig {
    fn default() -> Self {
        Self {
            services: ["deals", "retrieval", "indexing"].map(String::from).into(),
            env: BTreeMap::new(),
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
    /// MiB at which a log file is rotated to `NAME.log.1`.
    pub log_mib: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            start_secs: 120,
            stop_secs: 45,
            log_mib: 64,
        }
    }
}

/// What to run, and after what.
#[derive(Clone, Debug)]
pub struct Process {
    /// Name in `status` and of the log file.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Added to the supervisor's own environment.
    pub env: BTreeMap<String, String>,
    /// Names of those that must be ready before it is started.
    pub after: Vec<String>,
    /// A one-shot is done when it ends well; it is skipped when this path exists.
    pub creates: Option<PathBuf>,
}

impl Process {
    /// Whether it ends by itself.
    #[must_use]
    pub const fn is_oneshot(&self) -> bool {
        self.creates.is_some()
    }
}

/// The processes of a host, each after those that it needs.
pub fn processes(cfg: &Config, root: &Path, bin: &Path) -> Result<Vec<Process>, Fault> {
    let exe = |name: &str| -> Result<String, Fault> {
        let path = bin.join(name);
        if !path.is_file() {
            return Err(Fault::new(
                Kind::Config,
                format!("{} does not exist", path.display()),
                "install all binaries in one folder, or name it with --bin-dir",
            ));
        }
        Ok(path.display().to_string())
    };
    let dir = |name: &str| root.join(name).display().to_string();
    let mut out = Vec::new();
    let mut hub_after = Vec::new();
    if cfg.devnet.enabled {
        let mut command = vec![
            exe("lotus-devnet")?,
            "run".into(),
            "--repo".into(),
            dir("devnet"),
        ];
        command.extend(cfg.devnet.args.iter().cloned());
        out.push(Process {
            name: "devnet".into(),
            command,
            env: cfg.devnet.env.clone(),
            after: vec![],
            creates: None,
        });
        out.push(Process {
            name: "hub-init".into(),
            command: vec![
                exe("lotus-miner")?,
                "init".into(),
                "--repo".into(),
                dir("miner"),
                "--actor".into(),
                cfg.devnet.actor.clone(),
                "--node-repo".into(),
                dir("devnet"),
            ],
            env: cfg.hub.env.clone(),
            after: vec!["devnet".into()],
            creates: Some(root.join("miner/config.toml")),
        });
        hub_after = vec!["devnet".into(), "hub-init".into()];
    }
    let mut command = vec![
        exe("lotus-miner")?,
        "run".into(),
        "--repo".into(),
        dir("miner"),
    ];
    command.extend(cfg.hub.args.iter().cloned());
    out.push(Process {
        name: "hub".into(),
        command,
        env: cfg.hub.env.clone(),
        after: hub_after,
        creates: None,
    });
    for service in &cfg.spokes.services {
        if out.iter().any(|p| p.name == *service) {
            return Err(Fault::new(
                Kind::Config,
                format!("service {service:?} is named twice"),
                "name each service once in spokes.services",
            ));
        }
        let mut env = BTreeMap::from([(
            "LOTUS_MARKETS__HUB__ADDR".to_owned(),
            format!("unix:{}", root.join("miner/run/hub.sock").display()),
        )]);
        env.extend(cfg.spokes.env.clone());
        out.push(Process {
            name: service.clone(),
            command: vec![
                exe("lotus-markets")?,
                "run".into(),
                format!("--services={service}"),
                "--repo".into(),
                dir("markets"),
            ],
            env,
            after: vec!["hub".into()],
            creates: None,
        });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_comes_after_what_it_needs() {
        let bin = tempfile::tempdir().unwrap();
        for name in ["lotus-devnet", "lotus-miner", "lotus-markets"] {
            std::fs::write(bin.path().join(name), "").unwrap();
        }
        let mut cfg = Config::default();
        cfg.devnet.enabled = true;
        let all = processes(&cfg, Path::new("/r"), bin.path()).unwrap();
        let names: Vec<&str> = all.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "devnet",
                "hub-init",
                "hub",
                "deals",
                "retrieval",
                "indexing"
            ]
        );
        for (i, p) in all.iter().enumerate() {
            for a in &p.after {
                assert!(names[..i].contains(&a.as_str()), "{} after {a}", p.name);
            }
        }
        cfg.spokes.services = vec!["deals".into(), "deals".into()];
        assert!(processes(&cfg, Path::new("/r"), bin.path()).is_err());
    }

    #[test]
    fn a_missing_binary_is_named() {
        let e = processes(&Config::default(), Path::new("/r"), Path::new("/nowhere")).unwrap_err();
        assert!(e.message.contains("/nowhere/lotus-miner"), "{e}");
    }
}
