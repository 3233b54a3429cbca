//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use lotus_runtime::admin::Admin;
use lotus_runtime::{CancellationToken, Fault, Health, notify, signals, telemetry};
use lotus_types::Kind;
use tokio::sync::mpsc;

use crate::config::{self, Config};
use crate::proto::{ProcessRequest, StatusRequest, StatusResponse};
use crate::{child, control, runner::Runner};

/// Starts, orders, watches and restarts the hub and its spokes on one host.
///
/// `lotus-supervisor run --devnet` is a whole storage provider on an embedded chain; without
/// `--devnet` the hub talks to the full node that its own configuration names.
#[derive(Debug, Parser)]
#[command(name = "lotus-supervisor", version)]
pub struct Args {
    /// Folder of the supervisor: its configuration, logs and sockets, and the repos of what it runs.
    #[arg(long, global = true, env = "LOTUS_HUB_SUPERVISOR", default_value_os_t = default_repo())]
    repo: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run everything until SIGTERM, then stop it in reverse order.
    Run {
        /// Run an embedded devnet, and initialise the hub on it.
        #[arg(long)]
        devnet: bool,
        /// Spokes to run, one process each. Default: deals,retrieval,indexing.
        #[arg(long, value_delimiter = ',')]
        services: Option<Vec<String>>,
        /// Folder with the other binaries. Default: the folder of this one.
        #[arg(long)]
        bin_dir: Option<PathBuf>,
    },
    /// Show each process: pid, state, readiness, restarts, uptime.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Start a process that was stopped or that gave up.
    Start {
        /// Its name in `status`.
        name: String,
    },
    /// Stop one process, or everything when no name is given.
    Stop {
        /// Its name in `status`.
        name: Option<String>,
    },
    /// Restart one process; those that depend on it keep running and reconnect.
    Restart {
        /// Its name in `status`.
        name: String,
    },
    /// Print the end of a process's log.
    Logs {
        /// Its name in `status`.
        name: String,
        /// KiB to print.
        #[arg(long, default_value_t = 16)]
        kib: u64,
    },
    /// Print or check the configuration.
    Config {
        #[command(subcommand)]
        what: ConfigCommand,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default.
    Default,
    /// Read the configuration and say what is wrong with it.
    Check,
}

fn default_repo() -> PathBuf {
    std::env::home_dir()
        .unwrap_or_else(|| PathBuf::from("."))
        .join(".lotus-hub")
}

fn load(root: &Path) -> Result<Config, Fault> {
    let file = root.join("supervisor.toml");
    Ok(lotus_settings::load(Some(&file), "LOTUS_SUPERVISOR")?)
}

/// Runs a command.
pub fn start(args: Args) -> Result<(), Fault> {
    let root = std::path::absolute(&args.repo)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match args.command {
        Command::Run {
            devnet,
            services,
            bin_dir,
        } => {
            let mut cfg = load(&root)?;
            cfg.devnet.enabled |= devnet;
            if let Some(services) = services {
                cfg.spokes.services = services;
            }
            runtime.block_on(run(&root, cfg, bin_dir))
        }
        Command::Status { json } => {
            let status = runtime.block_on(async {
                let mut client = control::client(&root).await?;
                client.status(StatusRequest {}).await.map_err(refused)
            })?;
            print(&status.into_inner(), json);
            Ok(())
        }
        Command::Start { name } => ask(&root, &runtime, "start", &name),
        Command::Stop { name: Some(name) } => ask(&root, &runtime, "stop", &name),
        Command::Stop { name: None } => runtime.block_on(stop_all(&root)),
        Command::Restart { name } => ask(&root, &runtime, "restart", &name),
        Command::Logs { name, kib } => {
            let valid = |c: char| c.is_ascii_alphanumeric() || c == '-';
            let log = root.join("logs").join(format!("{name}.log"));
            if !name.chars().all(valid) || !log.exists() {
                return Err(Fault::new(
                    Kind::Data,
                    format!(
                        "there is no log of {name:?} in {}",
                        root.join("logs").display()
                    ),
                    "`lotus-supervisor status` lists the names",
                ));
            }
            print!("{}", child::tail(&log, kib << 10)?);
            Ok(())
        }
        Command::Config { what } => {
            match what {
                ConfigCommand::Default => print!("{}", lotus_settings::default_toml::<Config>()),
                ConfigCommand::Check => {
                    load(&root)?;
                    println!("{} is fine", root.join("supervisor.toml").display());
                }
            }
            Ok(())
        }
    }
}

async fn run(root: &Path, cfg: Config, bin_dir: Option<PathBuf>) -> Result<(), Fault> {
    let _telemetry = telemetry::init("lotus-supervisor", &cfg.telemetry)?;
    let run_dir = root.join("run");
    std::fs::create_dir_all(&run_dir)?;
    let lock = std::fs::File::create(run_dir.join("supervisor.lock"))?;
    lock.try_lock().map_err(|_| {
        Fault::new(
            Kind::Config,
            format!("another supervisor runs on {}", root.display()),
            "`lotus-supervisor status` shows what it runs; stop it first, or give another --repo",
        )
    })?;
    let bin = match bin_dir {
        Some(dir) => dir,
        None => std::env::current_exe()?
            .parent()
            .map_or_else(PathBuf::new, Path::to_path_buf),
    };
    let processes = config::processes(&cfg, root, &bin)?;
    let health = Health::default();
    let admin = Admin::bind(&cfg.admin, health.clone(), &run_dir, "supervisor").await?;
    let runner = Runner::new(processes, cfg.limits, &root.join("logs"), health.clone())?;
    let (calls_tx, calls_rx) = mpsc::channel(64);
    signals::run_until_signal(|stop| async move {
        // Status is served until the last process has stopped.
        let done = CancellationToken::new();
        let work = async {
            runner.run(calls_rx, stop.clone()).await;
            done.cancel();
            Ok(())
        };
        let ready = async {
            tokio::select! {
                () = health.ready() => {
                    tracing::info!("every process is ready");
                    notify::ready();
                }
                () = done.cancelled() => {}
            }
            Ok(())
        };
        tokio::try_join!(
            work,
            ready,
            control::serve(root, calls_tx, stop.clone(), done.clone()),
            admin.serve(done.clone()),
        )?;
        Ok(())
    })
    .await
}

fn refused(status: tonic::Status) -> Fault {
    match status.code() {
        tonic::Code::InvalidArgument => Fault::new(
            Kind::Data,
            status.message(),
            "`lotus-supervisor status` lists the names",
        ),
        _ => Fault::new(
            Kind::Transport,
            format!("the supervisor did not answer: {}", status.message()),
            "see whether it still runs: `lotus-supervisor status`",
        ),
    }
}

fn ask(
    root: &Path,
    runtime: &tokio::runtime::Runtime,
    what: &str,
    name: &str,
) -> Result<(), Fault> {
    let status = runtime.block_on(async {
        let mut client = control::client(root).await?;
        let request = ProcessRequest { name: name.into() };
        match what {
            "start" => client.start(request).await,
            "stop" => client.stop(request).await,
            _ => client.restart(request).await,
        }
        .map_err(refused)
    })?;
    print(&status.into_inner(), false);
    Ok(())
}

/// Asks for the stop and waits until the supervisor is gone, within its own limits.
async fn stop_all(root: &Path) -> Result<(), Fault> {
    let limits = load(root)?.limits;
    let mut client = control::client(root).await?;
    client
        .stop(ProcessRequest::default())
        .await
        .map_err(refused)?;
    // Four levels at most: spokes, hub, init, node.
    let patience = Duration::from_secs(limits.stop_secs.saturating_mul(4).saturating_add(10));
    let gone = async {
        while client.status(StatusRequest {}).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(patience, gone).await.map_err(|_| {
        Fault::new(
            Kind::Transport,
            format!("still stopping after {patience:?}"),
            "`lotus-supervisor status` shows what it waits for",
        )
    })?;
    println!("everything is stopped");
    Ok(())
}

fn print(status: &StatusResponse, json: bool) {
    if json {
        let processes: Vec<_> = status
            .processes
            .iter()
            .map(|p| {
                serde_json::json!({
                    "name": p.name, "state": p.state, "pid": (p.pid > 0).then_some(p.pid),
                    "ready": p.ready, "restarts": p.restarts, "uptime_ms": p.uptime_ms,
                    "reason": p.reason, "log_file": p.log_file, "last_exit": p.last_exit,
                })
            })
            .collect();
        println!("{}", serde_json::json!({ "processes": processes }));
        return;
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "PROCESS", "PID", "STATE", "READY", "RESTARTS", "UPTIME", "REASON",
    ]);
    for p in &status.processes {
        let uptime = Duration::from_secs(p.uptime_ms / 1000);
        table.add_row([
            p.name.clone(),
            if p.pid > 0 {
                p.pid.to_string()
            } else {
                "-".into()
            },
            p.state.clone(),
            if p.ready { "yes" } else { "no" }.into(),
            p.restarts.to_string(),
            if p.pid > 0 {
                humantime::format_duration(uptime).to_string()
            } else {
                "-".into()
            },
            p.reason.clone(),
        ]);
    }
    println!("{table}");
}
