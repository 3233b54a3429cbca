//! A storage provider in a fresh folder, and what an outsider can ask of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lotus_node_client::{Client, Node, NodeConfig};
use serde::Deserialize;
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// Why a run is not ok, in one text.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failed(pub String);

impl Failed {
    /// A failure with this text.
    pub fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }

    /// An error with what was being done.
    pub fn at(what: &str, e: impl std::fmt::Display) -> Self {
        Self(format!("{what}: {e}"))
    }
}

impl From<std::io::Error> for Failed {
    fn from(e: std::io::Error) -> Self {
        Self(e.to_string())
    }
}

/// Seconds.
#[must_use]
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// The chain and the limits of a [`Net`].
#[derive(Debug, Clone)]
pub struct NetConfig {
    /// Arguments of `lotus-devnet run`.
    pub devnet_args: Vec<String>,
    /// Environment of the hub: `LOTUS_MINER__SECTION__KEY`.
    pub hub_env: BTreeMap<String, String>,
    /// Environment of the spokes: `LOTUS_MARKETS__SECTION__KEY`.
    pub spoke_env: BTreeMap<String, String>,
    /// Spokes to run.
    pub services: Vec<String>,
    /// Environment of every process, the client's commands included.
    pub env: BTreeMap<String, String>,
    /// More arguments of `lotus-miner run`.
    pub hub_args: Vec<String>,
    /// `[guard]` of the supervisor.
    pub guard: toml::Table,
    /// `[sandbox]` of the supervisor.
    pub sandbox: toml::Table,
    /// More of `supervisor.toml`: sections other than the devnet's, the hub's, the spokes',
    /// the guard's and the sandbox's.
    pub supervisor: String,
    /// Folder of the binaries that the supervisor runs, if not that of its own.
    pub bin_dir: Option<PathBuf>,
}

impl NetConfig {
    /// `supervisor.toml`.
    fn text(&self) -> String {
        let mut text = toml::toml! {
            [devnet]
            enabled = true
            [spokes]
            [hub]
        };
        set(&mut text, "devnet", "args", self.devnet_args.clone());
        set(&mut text, "spokes", "services", self.services.clone());
        set(&mut text, "spokes", "env", self.spoke_env.clone());
        set(&mut text, "hub", "env", self.hub_env.clone());
        set(&mut text, "hub", "args", self.hub_args.clone());
        text.insert("guard".into(), self.guard.clone().into());
        text.insert("sandbox".into(), self.sandbox.clone().into());
        format!("{text}\n{}", self.supervisor)
    }
}

impl Default for NetConfig {
    /// 8 MiB sectors, short epochs and short deadlines: a sector is proven in its first proving
    /// period within a minute or two.
    fn default() -> Self {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        Self {
            devnet_args: words(
                "--listen 127.0.0.1:0 --sector-size 8MiB --block-time-ms 500 --deadlines 8 \
                 --deadline-epochs 12 --winning-lookback 10",
            ),
            hub_env: BTreeMap::from(
                [
                    ("LOTUS_MINER__API__LISTEN", "127.0.0.1:0"),
                    ("LOTUS_MINER__LOTUS_API__LISTEN", "127.0.0.1:0"),
                    ("LOTUS_MINER__SEALING__WAIT_DEALS_SECS", "5"),
                ]
                .map(|(k, v)| (k.to_owned(), v.to_owned())),
            ),
            spoke_env: ["DEALS", "DEALS__MK12", "RETRIEVAL", "INDEXING"]
                .into_iter()
                .map(|s| {
                    (
                        format!("LOTUS_MARKETS__{s}__LISTEN"),
                        "127.0.0.1:0".to_owned(),
                    )
                })
                .collect(),
            services: words("deals retrieval indexing"),
            env: BTreeMap::new(),
            hub_args: Vec::new(),
            guard: toml::Table::new(),
            sandbox: toml::Table::new(),
            supervisor: String::new(),
            bin_dir: None,
        }
    }
}

/// One row of `lotus-supervisor status --json`.
#[derive(Debug, Clone, Deserialize)]
pub struct ProcessStatus {
    /// Its name.
    pub name: String,
    /// Its state in the supervisor's words.
    pub state: String,
    /// Its pid while it runs.
    pub pid: Option<u32>,
    /// Whether it is ready.
    pub ready: bool,
    /// How often it was started again after it ended by itself.
    pub restarts: u32,
    /// What it waits for.
    pub reason: String,
    /// Its sandbox: `full`, what is missing of it, or nothing.
    #[serde(default)]
    pub sandbox: String,
    /// Its log.
    pub log_file: PathBuf,
    /// What the proving guard has of it.
    pub guard: Option<GuardStatus>,
    /// Sockets that the supervisor owns for it.
    pub sockets: Vec<OwnedSocket>,
}

/// The proving guard's part of a row.
#[derive(Debug, Clone, Deserialize)]
pub struct GuardStatus {
    /// How it squeezes: "cgroup2", "cgroup1", "threads" or "none".
    pub rung: String,
    /// "squeezed", "frozen", or empty.
    pub state: String,
    /// For what.
    pub reason: String,
}

/// A listening socket of the supervisor's.
#[derive(Debug, Clone, Deserialize)]
pub struct OwnedSocket {
    /// Its name.
    pub name: String,
    /// Where it is bound.
    pub address: String,
}

#[derive(Deserialize)]
struct StatusDocument {
    processes: Vec<ProcessStatus>,
}

/// A running storage provider. Dropping it kills what is left of it, and keeps its folder only
/// when a test fails.
#[derive(Debug)]
pub struct Net {
    root: TempDir,
    bin: PathBuf,
    env: BTreeMap<String, String>,
    bin_dir: Option<PathBuf>,
    supervisor: Mutex<Child>,
}

impl Net {
    /// Starts the supervisor in a fresh folder and returns when it answers.
    pub async fn start(cfg: &NetConfig) -> Result<Self, Failed> {
        let bin = binaries()?;
        // Short, because the path of a Unix socket has at most 107 bytes.
        let root = tempfile::Builder::new().prefix("lotus-").tempdir()?;
        std::fs::write(root.path().join("supervisor.toml"), cfg.text())?;
        let supervisor = supervisor(&bin, root.path(), cfg.bin_dir.as_deref(), &cfg.env)?;
        let net = Self {
            root,
            bin,
            env: cfg.env.clone(),
            bin_dir: cfg.bin_dir.clone(),
            supervisor: Mutex::new(supervisor),
        };
        net.answers().await?;
        Ok(net)
    }

    async fn answers(&self) -> Result<(), Failed> {
        self.wait("the supervisor to answer", secs(20), async |n| {
            n.status().await.ok().map(|_| ())
        })
        .await
    }

    /// Stops everything, by force, and starts it again on the same folder with another
    /// configuration.
    pub async fn again(&mut self, cfg: &NetConfig) -> Result<(), Failed> {
        let root = self.root().display().to_string();
        let words = ["stop", "--force", "--repo", &root];
        self.run("lotus-supervisor", &words).await?;
        let before = self
            .supervisor
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        tokio::time::timeout(secs(30), before.wait())
            .await
            .map_err(|_| Failed::new("the supervisor did not end"))??;
        std::fs::write(self.root().join("supervisor.toml"), cfg.text())?;
        self.env.clone_from(&cfg.env);
        self.bin_dir.clone_from(&cfg.bin_dir);
        let next = supervisor(&self.bin, self.root(), cfg.bin_dir.as_deref(), &cfg.env)?;
        *self
            .supervisor
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner) = next;
        self.answers().await
    }

    /// The folder of everything.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The folder of what the supervisor runs.
    #[must_use]
    pub fn programs(&self) -> &Path {
        self.bin_dir.as_deref().unwrap_or(&self.bin)
    }

    /// A built binary.
    #[must_use]
    pub fn exe(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// What the supervisor says of its processes.
    pub async fn status(&self) -> Result<Vec<ProcessStatus>, Failed> {
        let root = self.root().display().to_string();
        let out = self
            .run("lotus-supervisor", &["status", "--json", "--repo", &root])
            .await?;
        let document: StatusDocument =
            serde_json::from_str(&out).map_err(|e| Failed::at("status --json", e))?;
        Ok(document.processes)
    }

    /// One process.
    pub async fn process(&self, name: &str) -> Result<ProcessStatus, Failed> {
        self.status()
            .await?
            .into_iter()
            .find(|p| p.name == name)
            .ok_or_else(|| Failed(format!("there is no process {name}")))
    }

    /// Waits until every process is ready.
    pub async fn ready(&self, limit: Duration) -> Result<(), Failed> {
        self.wait("every process to be ready", limit, async |n| {
            let all = n.status().await.ok()?;
            all.iter().all(|p| p.ready).then_some(())
        })
        .await
    }

    /// Kills a process of the supervisor's with SIGKILL and returns its pid.
    pub async fn kill9(&self, name: &str) -> Result<u32, Failed> {
        let pid = self
            .process(name)
            .await?
            .pid
            .ok_or_else(|| Failed(format!("{name} does not run")))?;
        kill9(pid)?;
        Ok(pid)
    }

    /// Pid of the supervisor.
    pub fn supervisor_pid(&self) -> Result<u32, Failed> {
        self.supervisor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .id()
            .ok_or_else(|| Failed::new("the supervisor ended"))
    }

    /// Kills the supervisor with SIGKILL and starts another one, which finds the processes alive.
    pub fn replace_supervisor(&self) -> Result<(), Failed> {
        // Held throughout: whoever waits for something must not see the gap.
        let mut current = self
            .supervisor
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let pid = current
            .id()
            .ok_or_else(|| Failed::new("the supervisor ended"))?;
        kill9(pid)?;
        let deadline = Instant::now() + secs(10);
        while current.try_wait()?.is_none() {
            if Instant::now() > deadline {
                return Err(Failed::new("a killed supervisor does not end"));
            }
            std::thread::yield_now();
        }
        let bin_dir = self.bin_dir.as_deref();
        *current = supervisor(&self.bin, self.root(), bin_dir, &self.env)?;
        Ok(())
    }

    /// Pids of the processes that run exactly this binary with these first arguments.
    #[must_use]
    pub fn copies(&self, exe: &str, args: &[&str]) -> Vec<u32> {
        let exe = self.exe(exe).display().to_string();
        self.processes()
            .into_iter()
            .filter(|(_, words)| {
                words.first() == Some(&exe) && words[1..].iter().zip(args).all(|(a, b)| a == b)
            })
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Pids of the hub's workers of a class, `seal` or `prove`.
    #[must_use]
    pub fn workers(&self, class: &str) -> Vec<u32> {
        self.processes()
            .into_iter()
            .filter(|(_, words)| words.windows(2).any(|w| w == ["--class", class]))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Kills a worker of a class with SIGKILL, the `n`-th of those that run, counted around.
    /// Returns its pid.
    pub fn kill9_worker(&self, class: &str, n: usize) -> Result<u32, Failed> {
        let pids = self.workers(class);
        let pid = *n
            .checked_rem(pids.len())
            .and_then(|i| pids.get(i))
            .ok_or_else(|| Failed(format!("no {class} worker runs")))?;
        kill9(pid)?;
        Ok(pid)
    }

    /// Pid and command line of every process that works in the folder.
    fn processes(&self) -> Vec<(u32, Vec<String>)> {
        let root = self.root().display().to_string();
        std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| *pid != std::process::id())
            .filter_map(|pid| Some((pid, std::fs::read(format!("/proc/{pid}/cmdline")).ok()?)))
            .map(|(pid, line)| {
                let words = line.split(|b| *b == 0);
                let words = words.map(|w| String::from_utf8_lossy(w).into_owned());
                (pid, words.collect::<Vec<_>>())
            })
            .filter(|(_, words)| words.iter().any(|w| w.contains(&root)))
            .collect()
    }

    /// Asks until `ask` gives an answer, at most for `limit`; then fails with every log.
    pub async fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        ask: impl AsyncFn(&Self) -> Option<T>,
    ) -> Result<T, Failed> {
        let end = Instant::now() + limit;
        loop {
            if let Some(answer) = ask(self).await {
                return Ok(answer);
            }
            let ended = self
                .supervisor
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .try_wait();
            if let Ok(Some(status)) = ended {
                return Err(Failed(format!(
                    "the supervisor ended ({status}) while waiting for {what}\n{}",
                    self.logs()
                )));
            }
            if Instant::now() >= end {
                return Err(Failed(format!(
                    "waited {limit:?} in vain for {what}\n{}",
                    self.logs()
                )));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Runs one of the binaries to its end and returns its standard output.
    pub async fn run(&self, exe: &str, args: &[&str]) -> Result<String, Failed> {
        let command = Command::new(self.exe(exe))
            .args(args)
            .envs(&self.env)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let out = tokio::time::timeout(secs(120), command)
            .await
            .map_err(|_| Failed(format!("{exe} {} took over 120 s", args.join(" "))))?
            .map_err(|e| Failed::at(exe, e))?;
        if out.status.success() {
            return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
        }
        Err(Failed(format!(
            "{exe} {}: {}\n{}",
            args.join(" "),
            out.status,
            String::from_utf8_lossy(&out.stderr)
        )))
    }

    /// `http://host:port` of a spoke.
    pub fn spoke_url(&self, service: &str) -> Result<String, Failed> {
        let addr = lotus_runtime::addr_file::read(&self.root().join("markets/run"), service)
            .map_err(|e| Failed::at(service, e))?;
        Ok(format!("http://{addr}"))
    }

    /// A client of the devnet.
    pub fn node(&self) -> Result<Node, Failed> {
        let cfg = NodeConfig {
            repo: self.root().join("devnet"),
            ..NodeConfig::default()
        };
        Ok(Client::connect(&cfg).map_err(|e| Failed::at("node", e))?)
    }

    /// Every log: the supervisor's, those of its processes, those of the hub's workers.
    #[must_use]
    pub fn log_files(&self) -> Vec<PathBuf> {
        let mut files = vec![self.root().join("supervisor.log")];
        for dir in ["logs", "miner/logs"] {
            let dir = std::fs::read_dir(self.root().join(dir));
            files.extend(
                dir.into_iter()
                    .flatten()
                    .filter_map(|e| Some(e.ok()?.path())),
            );
        }
        files
    }

    /// Whether some log has these words.
    #[must_use]
    pub fn has_logged(&self, words: &str) -> bool {
        self.log_files()
            .iter()
            .any(|file| std::fs::read_to_string(file).is_ok_and(|text| text.contains(words)))
    }

    /// The ends of all logs, for a failure.
    #[must_use]
    pub fn logs(&self) -> String {
        let files = self.log_files();
        let mut text = String::new();
        for file in files {
            let all = std::fs::read_to_string(&file).unwrap_or_default();
            let lines: Vec<&str> = all.lines().collect();
            let last = &lines[lines.len().saturating_sub(40)..];
            // Writing to a String does not fail.
            let _infallible = write!(text, "=== {}\n{}\n", file.display(), last.join("\n"));
        }
        text
    }

    /// Kills everything, and leaves the folder for a look.
    pub fn keep(mut self) {
        eprintln!("the folder is kept: {}", self.root().display());
        self.root.disable_cleanup(true);
    }

    /// Stops everything in order and returns the supervisor's exit status.
    pub async fn stop(mut self) -> Result<(), Failed> {
        let root = self.root().display().to_string();
        self.run("lotus-supervisor", &["stop", "--repo", &root])
            .await?;
        let supervisor = self
            .supervisor
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let status = tokio::time::timeout(secs(30), supervisor.wait())
            .await
            .map_err(|_| Failed::new("the supervisor did not end"))??;
        if status.success() {
            Ok(())
        } else {
            Err(Failed(format!("the supervisor ended with {status}")))
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // After a failure the processes are still there; they are ours alone.
        for (pid, _) in self.processes() {
            drop(kill9(pid));
        }
        if std::thread::panicking() {
            eprintln!("the folder is kept: {}", self.root().display());
            self.root.disable_cleanup(true);
        }
    }
}

/// Starts a supervisor. Those after the first append to the same log.
fn supervisor(
    bin: &Path,
    root: &Path,
    bin_dir: Option<&Path>,
    env: &BTreeMap<String, String>,
) -> Result<Child, Failed> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(root.join("supervisor.log"))?;
    Command::new(bin.join("lotus-supervisor"))
        .args(["run", "--repo"])
        .arg(root)
        .args(
            bin_dir
                .into_iter()
                .flat_map(|d| [Path::new("--bin-dir"), d]),
        )
        .envs(env)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Failed::at("lotus-supervisor", e))
}

fn set(text: &mut toml::Table, section: &str, key: &str, value: impl serde::Serialize) {
    let value = toml::Value::try_from(value).expect("strings, lists and tables of strings");
    if let Some(table) = text.get_mut(section).and_then(toml::Value::as_table_mut) {
        table.insert(key.into(), value);
    }
}

/// Sends SIGKILL.
pub(crate) fn kill9(pid: u32) -> Result<(), Failed> {
    let pid = i32::try_from(pid).map_err(|e| Failed::at("pid", e))?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .map_err(|e| Failed::at("kill -9", e))
}

/// One of the built binaries.
pub fn binary(name: &str) -> Result<PathBuf, Failed> {
    Ok(binaries()?.join(name))
}

/// The folder of the built binaries: that of this program, or the one above for a test.
fn binaries() -> Result<PathBuf, Failed> {
    let exe = std::env::current_exe()?;
    exe.ancestors()
        .skip(1)
        .take(2)
        .find(|dir| dir.join("lotus-supervisor").is_file())
        .map(Path::to_path_buf)
        .ok_or_else(|| {
            Failed::new("the binaries are not built: run `cargo build --release --workspace`")
        })
}
