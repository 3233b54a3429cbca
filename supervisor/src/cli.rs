//! The command line.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand};
use comfy_table::{Table, presets};
use lotus_runtime::Fault;
use lotus_types::Kind;

use crate::config::Config;
use crate::events::{self, Events};
use crate::handover::Handover;
use crate::image::{self, WayBack};
use crate::proto::{DrainRequest, ProcessRequest, ProcessStatus, StatusRequest, StatusResponse};
use crate::{child, control, doctor, logs, processes, progress, release, run, top, unit};

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
    ///
    /// The hub, and what it needs, is stopped when that loses no proof, no block and no hours of
    /// sealing. Until then the reasons are shown. Ctrl-C ends the waiting here, not the stop:
    /// `start NAME` takes it back.
    Stop {
        /// Its name in `status`.
        name: Option<String>,
        #[command(flatten)]
        how: How,
    },
    /// Restart one process; its spokes keep running and reconnect.
    ///
    /// Waits for a safe moment as `stop` does.
    Restart {
        /// Its name in `status`.
        name: String,
        #[command(flatten)]
        how: How,
    },
    /// Stop one process once it has finished what is open; it takes nothing new meanwhile.
    ///
    /// `stop` does that too, but for seconds only (`drain_secs` of each service).
    Drain {
        /// Its name in `status`.
        name: String,
        /// How long it may take; then it is stopped as by `stop`.
        #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
        limit: Duration,
        #[command(flatten)]
        how: How,
    },
    /// Go on with another release, or with a new image of the supervisor alone.
    ///
    /// Without --from the supervisor is replaced by the file that it was started from, in the same
    /// process: what it runs does not notice. With --from everything moves to the release in that
    /// folder: checks first, then the hub when that is safe, the spokes one at a time, and the
    /// supervisor. If anything fails, all of it goes back.
    Upgrade(progress::Upgrade),
    /// Starts the image before this one if a new one ends before it is ready.
    #[command(hide = true)]
    Heir {
        /// Arguments of that image.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Look at everything that a start needs, and say what to do about what is missing.
    ///
    /// Ends with an error only if a start would fail.
    Doctor {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show each process live: state, processor, memory, restarts. `q` leaves.
    Top,
    /// Print the end of a process's log.
    Logs {
        /// Its name in `status`.
        name: String,
        /// KiB to print.
        #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(..=65_536))]
        kib: u64,
        /// Go on with what is written from now on, until Ctrl-C.
        #[arg(short, long)]
        follow: bool,
    },
    /// Print what happened: starts, ends with the last words, waits, what operators asked for.
    Events {
        /// Of this process only.
        name: Option<String>,
        /// How many.
        #[arg(short = 'n', long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(..=100_000))]
        lines: u32,
        /// Go on with what happens from now on, until Ctrl-C.
        #[arg(short, long)]
        follow: bool,
        /// Print JSON, one object a line; of a crash with the last 200 lines of the log.
        #[arg(long)]
        json: bool,
    },
    /// Print the systemd unit that runs this supervisor on --repo.
    SystemdUnit {
        /// User that runs it, and everything below it.
        #[arg(long, default_value = "lotus")]
        user: String,
    },
    /// Print or check the configuration.
    Config {
        #[command(subcommand)]
        what: ConfigCommand,
    },
}

#[derive(Clone, Copy, Debug, clap::Args)]
struct How {
    /// Do not wait until it is safe. What that costs is written to the logs.
    #[arg(long)]
    force: bool,
    /// Do not wait until it is done.
    #[arg(long)]
    no_wait: bool,
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

/// The arguments of this process. An image that does not understand those of the one before it
/// goes back to that one.
#[must_use]
pub fn arguments() -> Args {
    Args::try_parse().unwrap_or_else(|e| {
        image::refuse("it does not understand the command line");
        e.exit()
    })
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
            drop(runtime);
            child::ignore_hangups()?;
            // First, as this image may be one that is not going to be ready.
            let before = Handover::from_env()?;
            let way_back = before.as_ref().map(WayBack::guard).transpose()?.flatten();
            if before.is_none() {
                image::choose(&root)?;
            }
            let ran = load(&root).and_then(|mut cfg| {
                cfg.devnet.enabled |= devnet;
                if let Some(services) = services {
                    cfg.spokes.services = services;
                }
                run::run(&root, &cfg, bin_dir.as_deref(), before, way_back.as_ref())
            });
            if let (Err(e), Some(way_back)) = (&ran, &way_back) {
                way_back.go(&e.message);
            }
            ran
        }
        Command::Heir { args } => image::heir(&root, &args),
        Command::Drain { name, limit, how } => runtime.block_on(async {
            let mut client = control::client(&root).await?;
            let request = DrainRequest {
                name: name.clone(),
                force: how.force,
                limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            };
            client.drain(request).await.map_err(refused)?;
            if how.no_wait {
                return Ok(());
            }
            until(&root, &name, |p| p.state == "stopped").await
        }),
        Command::Doctor { json } => doctor::run(&root, load(&root), json),
        Command::Top => runtime.block_on(top::run(&root)),
        Command::Upgrade(how) => runtime.block_on(progress::upgrade(&root, how)),
        Command::Status { json } => {
            let status = runtime.block_on(async {
                let mut client = control::client(&root).await?;
                client.status(StatusRequest {}).await.map_err(refused)
            })?;
            print(&status.into_inner(), json);
            Ok(())
        }
        Command::Start { name } => runtime.block_on(async {
            let mut client = control::client(&root).await?;
            let request = ProcessRequest { name, force: false };
            print(
                &client.start(request).await.map_err(refused)?.into_inner(),
                false,
            );
            Ok(())
        }),
        Command::Stop { name, how } => runtime.block_on(async {
            let mut client = control::client(&root).await?;
            let request = ProcessRequest {
                name: name.clone().unwrap_or_default(),
                force: how.force,
            };
            client.stop(request).await.map_err(refused)?;
            match name {
                _ if how.no_wait => Ok(()),
                Some(name) => until(&root, &name, |p| p.state == "stopped").await,
                None => all_stopped(&root).await,
            }
        }),
        Command::Restart { name, how } => runtime.block_on(async {
            let mut client = control::client(&root).await?;
            let before = client.status(StatusRequest {}).await.map_err(refused)?;
            let pid = |all: &StatusResponse| {
                let found = all.processes.iter().find(|p| p.name == name);
                found.map_or(0, |p| p.pid)
            };
            let old = pid(&before.into_inner());
            let request = ProcessRequest {
                name: name.clone(),
                force: how.force,
            };
            client.restart(request).await.map_err(refused)?;
            if how.no_wait {
                return Ok(());
            }
            until(&root, &name, |p| p.ready && p.pid != old).await
        }),
        Command::Logs { name, kib, follow } => {
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
            let end = std::fs::metadata(&log)?.len();
            print!("{}", logs::tail(&log, kib << 10)?);
            if follow {
                logs::follow(&log, end, |text| {
                    std::io::stdout().write_all(text.as_bytes())
                })?;
            }
            Ok(())
        }
        Command::Events {
            name,
            lines,
            follow,
            json,
        } => print_events(&root, name.as_deref(), lines, follow, json),
        Command::SystemdUnit { user } => {
            let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if user.is_empty() || !user.chars().all(valid) {
                return Err(Fault::new(
                    Kind::Data,
                    format!("{user:?} is no name of a user"),
                    "give the user's name: --user lotus",
                ));
            }
            print!("{}", unit::unit(&std::env::current_exe()?, &root, &user));
            Ok(())
        }
        Command::Config { what } => {
            match what {
                ConfigCommand::Default => print!("{}", lotus_settings::default_toml::<Config>()),
                ConfigCommand::Check => {
                    let cfg = load(&root)?;
                    release::read(&root)?;
                    processes::of_host(&cfg, &root, &image::own_dir()?)?;
                    println!("{} is fine", root.join("supervisor.toml").display());
                }
            }
            Ok(())
        }
    }
}

pub(crate) fn refused(status: tonic::Status) -> Fault {
    match status.code() {
        tonic::Code::InvalidArgument => Fault::new(
            Kind::Data,
            status.message(),
            "`lotus-supervisor status` lists the names",
        ),
        tonic::Code::FailedPrecondition => {
            let said = status.message().split_once("; fix: ");
            let (what, fix) = said.unwrap_or((status.message(), "correct its configuration"));
            Fault::new(Kind::Config, format!("nothing was done: {what}"), fix)
        }
        _ => Fault::new(
            Kind::Transport,
            format!("the supervisor did not answer: {}", status.message()),
            "see whether it still runs: `lotus-supervisor status`",
        ),
    }
}

fn print_events(
    root: &Path,
    name: Option<&str>,
    lines: u32,
    follow: bool,
    json: bool,
) -> Result<(), Fault> {
    let events = Events::new(&root.join("logs"));
    if !events.path().exists() {
        return Err(Fault::new(
            Kind::Data,
            format!("nothing happened yet in {}", root.display()),
            "start `lotus-supervisor run`, or name its folder with --repo",
        ));
    }
    let show = |line: &str| {
        // A line of another version, or one that a crash cut off, is shown as it is.
        let Ok(entry) = serde_json::from_str::<events::Entry>(line) else {
            return Some(line.to_owned());
        };
        if name.is_some_and(|n| n != entry.process) {
            return None;
        }
        Some(if json {
            line.to_owned()
        } else {
            format!("{}  {:<12} {}", entry.at, entry.process, entry.what)
        })
    };
    let end = std::fs::metadata(events.path())?.len();
    let text = logs::tail(events.path(), EVENTS_READ)?;
    let all: Vec<String> = text.lines().filter_map(show).collect();
    let from = all
        .len()
        .saturating_sub(usize::try_from(lines).unwrap_or(usize::MAX));
    for line in &all[from..] {
        println!("{line}");
    }
    if follow {
        logs::follow(events.path(), end, |text| {
            let mut out = std::io::stdout();
            text.lines()
                .filter_map(show)
                .try_for_each(|line| out.write_all(format!("{line}\n").as_bytes()))
        })?;
    }
    Ok(())
}

/// Most bytes of events that are looked through.
const EVENTS_READ: u64 = 64 << 20;

/// How often the status is looked at while something is waited for.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

/// Waits until `name` is as wanted, and says why it is not. It ends when the process fails, and
/// otherwise has no limit: the hub may have to prove first.
async fn until(
    root: &Path,
    name: &str,
    wanted: impl Fn(&ProcessStatus) -> bool,
) -> Result<(), Fault> {
    let mut client = control::client(root).await?;
    let mut said = String::new();
    loop {
        let all = client.status(StatusRequest {}).await.map_err(refused)?;
        let all = all.into_inner();
        // One that the configuration does not name any more is gone once it is stopped.
        let Some(p) = all.processes.iter().find(|p| p.name == name) else {
            return Ok(());
        };
        if wanted(p) {
            print(&all, false);
            return Ok(());
        }
        if p.state == "failed" {
            return Err(Fault::new(
                Kind::Config,
                format!("{name} failed: {}", p.reason),
                format!("`lotus-supervisor logs {name}` shows why; then `start {name}`"),
            ));
        }
        say(&mut said, format!("{name}: {} {}", p.state, p.reason));
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until the supervisor is gone, and says what it waits for.
async fn all_stopped(root: &Path) -> Result<(), Fault> {
    let mut said = String::new();
    // A supervisor that ends does not answer any more.
    while let Ok(mut client) = control::client(root).await {
        let Ok(all) = client.status(StatusRequest {}).await else {
            break;
        };
        let all = all.into_inner().processes;
        let waits = all.iter().filter(|p| p.state != "stopped");
        let words: Vec<String> = waits
            .filter(|p| p.reason.starts_with("waits to stop") || p.state == "stopping")
            .map(|p| format!("{}: {} {}", p.name, p.state, p.reason))
            .collect();
        if !words.is_empty() {
            say(&mut said, words.join(", "));
        }
        tokio::time::sleep(LOOK).await;
    }
    println!("everything is stopped");
    Ok(())
}

/// Says something once.
pub(crate) fn say(before: &mut String, now: String) {
    let now = now.trim_end().to_owned();
    if *before != now {
        eprintln!("{now}");
        *before = now;
    }
}

/// A socket of a status, as JSON.
fn socket(text: &str) -> serde_json::Value {
    let (name, address) = text.split_once(' ').unwrap_or((text, ""));
    serde_json::json!({"name": name, "address": address})
}

pub(crate) fn print(status: &StatusResponse, json: bool) {
    if json {
        let processes: Vec<_> = status
            .processes
            .iter()
            .map(|p| {
                serde_json::json!({
                    "name": p.name, "state": p.state, "pid": (p.pid > 0).then_some(p.pid),
                    "ready": p.ready, "restarts": p.restarts, "uptime_ms": p.uptime_ms,
                    "reason": p.reason, "log_file": p.log_file, "last_exit": p.last_exit,
                    "guard": (!p.guard.is_empty()).then(|| serde_json::json!({
                        "rung": p.guard, "state": p.guard_state, "reason": p.guard_reason,
                    })),
                    "sandbox": p.sandbox,
                    "sockets": p.sockets.iter().map(|s| socket(s)).collect::<Vec<_>>(),
                })
            })
            .collect();
        let upgrade = status.upgrade.as_ref().map(progress::json);
        println!(
            "{}",
            serde_json::json!({ "processes": processes, "upgrade": upgrade })
        );
        return;
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "PROCESS", "PID", "STATE", "READY", "RESTARTS", "UPTIME", "GUARD", "REASON",
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
            match (p.guard.as_str(), p.guard_state.as_str()) {
                ("", _) => "-".into(),
                (rung, "") => rung.to_owned(),
                (rung, state) => format!("{state} ({rung})"),
            },
            [p.reason.as_str(), p.guard_reason.as_str()]
                .into_iter()
                .filter(|r| !r.is_empty())
                .collect::<Vec<_>>()
                .join("; "),
        ]);
    }
    println!("{table}");
    if let Some(line) = status.upgrade.as_ref().and_then(progress::line) {
        println!("{line}");
    }
}
