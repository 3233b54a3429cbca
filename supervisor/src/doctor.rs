//! `lotus-supervisor doctor`: everything that a start needs, and what to do about what is missing.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use lotus_runtime::Fault;
use lotus_types::Kind;
use serde::Serialize;

use crate::config::{self, Config, Limits, Process};
use crate::fence::{Fence, FenceError};
use crate::{child, control, image, release};

/// How long a program may take to answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Longest path of a Unix socket (unix(7), `sun_path` without its end).
const SOCKET_PATH: usize = 107;
/// Open files that a busy host needs.
const FILES: u64 = 65_536;

/// How it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Line {
    pub(crate) check: String,
    pub(crate) level: Level,
    pub(crate) detail: String,
    /// What to do; empty when nothing is.
    pub(crate) fix: String,
}

impl Line {
    pub(crate) fn ok(check: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            check: check.into(),
            level: Level::Ok,
            detail: detail.into(),
            fix: String::new(),
        }
    }

    pub(crate) fn warn(
        check: impl Into<String>,
        detail: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Warn,
            fix: fix.into(),
            ..Self::ok(check, detail)
        }
    }

    pub(crate) fn fail(
        check: impl Into<String>,
        detail: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            level: Level::Fail,
            ..Self::warn(check, detail, fix)
        }
    }
}

/// Looks at everything. Fails if something does that a start needs.
pub(crate) fn run(root: &Path, loaded: Result<Config, Fault>, json: bool) -> Result<(), Fault> {
    let lines = examine(root, loaded);
    if json {
        println!("{}", serde_json::json!({ "checks": lines }));
    } else {
        println!("{}", table(&lines));
    }
    let failed: Vec<&str> = lines
        .iter()
        .filter(|l| l.level == Level::Fail)
        .map(|l| l.check.as_str())
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Fault::new(
        Kind::Config,
        format!("a start would fail: {}", failed.join(", ")),
        "see the last column",
    ))
}

fn table(lines: &[Line]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["CHECK", "", "DETAIL", "FIX"]);
    for l in lines {
        let level = match l.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        table.add_row([l.check.as_str(), level, &l.detail, &l.fix]);
    }
    table
}

fn examine(root: &Path, loaded: Result<Config, Fault>) -> Vec<Line> {
    let mut lines = folder(root);
    let fault = |check: &str, e: &Fault| Line::fail(check, e.message.clone(), e.fix.clone());
    let release = match release::read(root) {
        Ok(release) => release,
        Err(e) => {
            lines.push(fault("release", &e));
            release::Release::default()
        }
    };
    lines.extend(of_release(&release));
    let cfg = match loaded {
        Ok(cfg) => cfg,
        Err(e) => {
            lines.push(fault("configuration", &e));
            return lines;
        }
    };
    lines.push(Line::ok(
        "configuration",
        root.join("supervisor.toml").display().to_string(),
    ));
    let running = running(root);
    lines.push(match &running {
        Some(pid) => Line::ok("supervisor", format!("runs, pid {pid}")),
        None => Line::ok("supervisor", "does not run"),
    });
    let bin = release.current.clone().map_or_else(image::own_dir, Ok);
    match bin
        .map_err(Fault::from)
        .and_then(|bin| Ok((config::processes(&cfg, root, &bin)?, bin)))
    {
        Ok((processes, bin)) => {
            lines.extend(binaries(&bin, &processes));
            lines.extend(configurations(root, &processes));
            lines.extend(locks(root, &processes, running.is_some()));
            lines.extend(disk(root, &cfg.limits, processes.len()));
        }
        Err(e) => lines.push(fault("binaries", &e)),
    }
    lines.extend(limits(&cfg));
    lines.extend(ports(&cfg, running.is_some()));
    lines.push(files());
    lines
}

/// The folder: ours, writable, short enough, on a disk of this host.
fn folder(root: &Path) -> Vec<Line> {
    let mut lines = Vec::new();
    let run = root.join("run");
    let probe = run.join("doctor.tmp");
    let written = std::fs::create_dir_all(&run).and_then(|()| std::fs::write(&probe, b"x"));
    lines.push(match written {
        Ok(()) => {
            drop(std::fs::remove_file(&probe));
            Line::ok("folder", root.display().to_string())
        }
        Err(e) => Line::fail(
            "folder",
            format!("{}: {e}", run.display()),
            "give it to the user that runs the supervisor, or name another one with --repo",
        ),
    });
    let remote = rustix::fs::statfs(root).ok().and_then(|s| {
        let kind = u64::try_from(s.f_type).unwrap_or(0);
        remote_kind(kind)
    });
    if let Some(kind) = remote {
        lines.push(Line::fail(
            "file system",
            format!("{} is on {kind}", root.display()),
            "use a disk of this host: locks and sockets of a network folder are not to be trusted",
        ));
    }
    for socket in [
        control::socket(root),
        root.join("run/notify.sock"),
        root.join("miner/run/hub.sock"),
    ] {
        if let Some(line) = socket_path(&socket) {
            lines.push(line);
        }
    }
    lines
}

/// Network file systems by their magic numbers (statfs(2)).
fn remote_kind(magic: u64) -> Option<&'static str> {
    match magic & 0xffff_ffff {
        0x6969 => Some("NFS"),
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => Some("SMB"),
        0x00c3_6400 => Some("Ceph"),
        0x0102_1997 => Some("9p"),
        0x6b41_4653 | 0x5346_414f => Some("AFS"),
        _ => None,
    }
}

fn socket_path(path: &Path) -> Option<Line> {
    let bytes = path.as_os_str().len();
    (bytes > SOCKET_PATH).then(|| {
        Line::fail(
            "socket path",
            format!(
                "{} has {bytes} bytes, a socket has at most {SOCKET_PATH}",
                path.display()
            ),
            "use a shorter --repo",
        )
    })
}

fn of_release(release: &release::Release) -> Vec<Line> {
    let mut lines = Vec::new();
    if let Some(journal) = &release.upgrade {
        lines.push(Line::warn(
            "upgrade",
            format!("to {} is under way", journal.to.display()),
            "`status` says how far it is; the next supervisor moves back what an interrupted one moved",
        ));
    }
    match &release.current {
        None => {}
        Some(dir) if release::supervisor(dir).is_file() => {
            lines.push(Line::ok("release", dir.display().to_string()));
        }
        Some(dir) => lines.push(Line::fail(
            "release",
            format!("{} is the current one and has no supervisor", dir.display()),
            "put it back, or remove release.json to run the binaries beside this one",
        )),
    }
    if let Some(dir) = &release.previous
        && !release::supervisor(dir).is_file()
    {
        lines.push(Line::warn(
            "way back",
            format!("{}, the release before, is gone", dir.display()),
            "keep it until the next upgrade: `upgrade --rollback` needs it",
        ));
    }
    lines
}

/// Pid of the supervisor that holds the folder's lock.
fn running(root: &Path) -> Option<String> {
    let lock = std::fs::File::open(root.join("run/supervisor.lock")).ok()?;
    match lock.try_lock() {
        Ok(()) => None,
        Err(_) => Some(
            crate::fence::holders(&lock)
                .ok()
                .and_then(|pids| pids.first().map(u32::to_string))
                .unwrap_or_else(|| "unknown".into()),
        ),
    }
}

/// Each binary is there, runs, and is of the same version as the others.
fn binaries(bin: &Path, processes: &[Process]) -> Vec<Line> {
    let mut programs: Vec<PathBuf> = processes
        .iter()
        .filter_map(|p| p.command.first().map(PathBuf::from))
        .filter(|p| p.starts_with(bin))
        .chain([release::supervisor(bin)])
        .collect();
    programs.sort_unstable();
    programs.dedup();
    let mut lines = Vec::new();
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for program in programs {
        let name = program
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        match answer(&program, &["--version"], &BTreeMap::new()) {
            Ok(text) => {
                let version = text
                    .trim()
                    .rsplit(' ')
                    .next()
                    .unwrap_or_default()
                    .to_owned();
                versions.entry(version).or_default().push(name);
            }
            Err(e) => lines.push(Line::fail(
                format!("binary {name}"),
                e,
                format!("install {} anew", program.display()),
            )),
        }
    }
    lines.push(of_versions(bin, &versions));
    // Programs of others.
    for p in processes {
        if let Some(program) = p.command.first().map(Path::new)
            && !program.starts_with(bin)
            && !is_program(program)
        {
            lines.push(Line::fail(
                format!("program of {}", p.name),
                format!("{} is no program", program.display()),
                format!("correct process.{}.command", p.name),
            ));
        }
    }
    lines
}

fn of_versions(bin: &Path, versions: &BTreeMap<String, Vec<String>>) -> Line {
    let all: Vec<String> = versions
        .iter()
        .map(|(version, names)| format!("{version}: {}", names.join(", ")))
        .collect();
    let detail = format!("{}, {}", bin.display(), all.join("; "));
    if versions.len() > 1 {
        return Line::warn(
            "binaries",
            detail,
            "install all binaries of one release in one folder",
        );
    }
    Line::ok("binaries", detail)
}

/// A name with a slash is a path; another one is looked for in PATH.
fn is_program(program: &Path) -> bool {
    let runs = |p: &Path| {
        std::fs::metadata(p).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    if program.components().count() > 1 {
        return runs(program);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| runs(&dir.join(program)))
}

/// The configuration of what is run, as the binaries themselves read it.
fn configurations(root: &Path, processes: &[Process]) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut seen = Vec::new();
    for p in processes.iter().filter(|p| !p.is_oneshot()) {
        let Some(program) = p.command.first().map(Path::new) else {
            continue;
        };
        let (check, repo) = match program.file_name().and_then(|n| n.to_str()) {
            Some("lotus-miner") => ("configuration of the hub", root.join("miner")),
            Some("lotus-markets") => ("configuration of spokes", root.join("markets")),
            _ => continue,
        };
        if seen.contains(&check) {
            continue;
        }
        seen.push(check);
        if check.ends_with("hub") && !repo.join("config.toml").exists() {
            let one_shot = processes.iter().any(Process::is_oneshot);
            lines.push(if one_shot {
                Line::ok(check, "is made at the first start")
            } else {
                Line::fail(
                    check,
                    format!("{} is not initialised", repo.display()),
                    format!("lotus-miner init --repo {} --actor ...", repo.display()),
                )
            });
            continue;
        }
        let repo = repo.display().to_string();
        let args = ["config", "check", "--repo", &repo];
        lines.push(match answer(program, &args, &p.env) {
            Ok(_) => Line::ok(check, format!("{repo}/config.toml")),
            Err(e) => {
                // The program says itself what to do.
                let (what, fix) = e.split_once("fix: ").unwrap_or((&e, "correct it"));
                Line::fail(check, what.trim(), fix.trim())
            }
        });
    }
    lines
}

/// Runs a program to its end, at most for [`ANSWER`]; what it says, or why it does not.
fn answer(program: &Path, args: &[&str], env: &BTreeMap<String, String>) -> Result<String, String> {
    let mut command = Command::new(program);
    child::own_variables(&mut command);
    let spawned = command
        .args(args)
        .envs(env)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut running = spawned.map_err(|e| format!("{}: {e}", program.display()))?;
    let end = Instant::now() + ANSWER;
    let status = loop {
        match running.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(10)),
            Ok(None) => {
                child::kill_group(running.id());
                drop(running.wait());
                return Err(format!("no answer within {ANSWER:?}"));
            }
            Err(e) => return Err(e.to_string()),
        }
    };
    // It ended, so its pipes do; they hold more than it says.
    let read = |from: Option<&mut dyn std::io::Read>| {
        let mut text = String::new();
        if let Some(from) = from {
            drop(from.take(64 << 10).read_to_string(&mut text));
        }
        text
    };
    let out = read(running.stdout.as_mut().map(|o| o as _));
    let err = read(running.stderr.as_mut().map(|o| o as _));
    if status.success() {
        return Ok(out);
    }
    let words: Vec<&str> = err.split_whitespace().collect();
    Err(format!("{status}: {}", words.join(" ")))
}

/// Who lives without a supervisor.
fn locks(root: &Path, processes: &[Process], supervised: bool) -> Vec<Line> {
    if supervised {
        return Vec::new();
    }
    let mut lines = Vec::new();
    for p in processes {
        let path = root.join("run").join(format!("{}.lock", p.name));
        if !path.exists() {
            continue;
        }
        match Fence::take(&path) {
            Ok(_) => {}
            Err(FenceError::Held(pids)) => {
                let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
                lines.push(Line::warn(
                    format!("lock of {}", p.name),
                    format!("it runs without a supervisor, pid {}", pids.join(", ")),
                    "`lotus-supervisor run` takes it over",
                ));
            }
            Err(FenceError::Io(e)) => lines.push(Line::fail(
                format!("lock of {}", p.name),
                format!("{}: {e}", path.display()),
                "give the folder to the user that runs the supervisor",
            )),
        }
    }
    if lines.is_empty() {
        lines.push(Line::ok("locks", "nothing runs"));
    }
    lines
}

/// Time limits that contradict each other.
fn limits(cfg: &Config) -> Vec<Line> {
    let mut lines = Vec::new();
    let l = &cfg.limits;
    // Signs of life come every 5 s at most.
    if (1..10).contains(&l.watchdog_secs) {
        lines.push(Line::warn(
            "limits.watchdog_secs",
            format!("{} s: a busy process is killed", l.watchdog_secs),
            "set 30 or more, or 0 for none",
        ));
    }
    for (key, secs) in [("start_secs", l.start_secs), ("stop_secs", l.stop_secs)] {
        if secs == 0 {
            lines.push(Line::fail(
                format!("limits.{key}"),
                "0: every process is killed at once",
                "remove it for its default",
            ));
        }
    }
    if l.backoff_first_ms > l.backoff_max_ms {
        lines.push(Line::warn(
            "limits.backoff_first_ms",
            format!("{} ms is longer than the longest wait", l.backoff_first_ms),
            "set backoff_max_ms to more",
        ));
    }
    if l.restarts_an_hour == 0 && l.backoff_max_ms < 1000 {
        lines.push(Line::warn(
            "limits.restarts_an_hour",
            "0, with short waits: a process that fails is started for ever, many times a second",
            "set a limit, or longer waits",
        ));
    }
    if lines.is_empty() {
        lines.push(Line::ok(
            "limits",
            format!("start {} s, stop {} s", l.start_secs, l.stop_secs),
        ));
    }
    lines
}

/// The supervisor's own port.
fn ports(cfg: &Config, running: bool) -> Vec<Line> {
    let addr = cfg.admin.listen;
    if running || addr.port() == 0 {
        return Vec::new();
    }
    vec![match std::net::TcpListener::bind(addr) {
        Ok(_) => Line::ok("admin.listen", format!("{addr} is free")),
        Err(e) => Line::fail(
            "admin.listen",
            format!("{addr}: {e}"),
            "free the port (`ss -ltnp` shows who has it), or set another one",
        ),
    }]
}

/// Room for the logs that are kept.
fn disk(root: &Path, limits: &Limits, processes: usize) -> Vec<Line> {
    let Ok(stat) = rustix::fs::statvfs(root) else {
        return Vec::new();
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
    let files = u64::from(limits.log_keep) + 1;
    let wanted = limits
        .log_mib
        .saturating_mul(files)
        .saturating_mul(processes as u64);
    let detail = format!("{free} MiB free, logs take up to {wanted} MiB");
    vec![if free < 64 {
        Line::fail("disk", detail, "free some space")
    } else if free < wanted {
        Line::warn(
            "disk",
            detail,
            "free some space, or set limits.log_mib lower",
        )
    } else {
        Line::ok("disk", detail)
    }]
}

/// Files that a process may open.
fn files() -> Line {
    use nix::sys::resource::{Resource, getrlimit};
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard < FILES => Line::warn(
            "open files",
            format!("at most {hard}"),
            format!("raise the hard limit to {FILES} or more (LimitNOFILE of the unit)"),
        ),
        Ok((soft, hard)) => Line::ok("open files", format!("{soft}, at most {hard}")),
        Err(e) => Line::warn("open files", e.to_string(), "see getrlimit(2)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(lines: &[Line], check: &str) -> Option<Level> {
        lines.iter().find(|l| l.check == check).map(|l| l.level)
    }

    fn program(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn what_a_start_needs_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let (bin, root) = (dir.path().join("bin"), dir.path().join("root"));
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::create_dir_all(root.join("miner")).unwrap();
        program(&bin, "lotus-miner", "echo lotus-miner 1.0");
        program(
            &bin,
            "lotus-markets",
            "[ $1 = --version ] && echo lotus-markets 1.0 && exit 0\n\
             echo 'lotus-markets: bad key' >&2; echo '  fix: remove it' >&2; exit 78",
        );
        program(&bin, "lotus-supervisor", "echo lotus-supervisor 2.0");
        let cfg = Config::default();
        let all = config::processes(&cfg, &root, &bin).unwrap();

        let lines = binaries(&bin, &all);
        assert_eq!(
            level(&lines, "binaries"),
            Some(Level::Warn),
            "two versions: {lines:?}"
        );
        program(&bin, "lotus-supervisor", "echo lotus-supervisor 1.0");
        assert_eq!(level(&binaries(&bin, &all), "binaries"), Some(Level::Ok));
        program(&bin, "lotus-miner", "exit 1");
        let lines = binaries(&bin, &all);
        assert_eq!(
            level(&lines, "binary lotus-miner"),
            Some(Level::Fail),
            "{lines:?}"
        );

        let lines = configurations(&root, &all);
        let hub = "configuration of the hub";
        assert_eq!(level(&lines, hub), Some(Level::Fail), "not initialised");
        let spokes = lines
            .iter()
            .find(|l| l.check == "configuration of spokes")
            .unwrap();
        assert_eq!(spokes.level, Level::Fail);
        assert!(spokes.detail.contains("bad key"), "{spokes:?}");
        assert_eq!(spokes.fix, "remove it");

        assert_eq!(level(&folder(&root), "folder"), Some(Level::Ok));
        assert_eq!(level(&locks(&root, &all, false), "locks"), Some(Level::Ok));
        let _held = Fence::take(&root.join("run/hub.lock")).unwrap();
        let lines = locks(&root, &all, false);
        assert_eq!(level(&lines, "lock of hub"), Some(Level::Warn), "{lines:?}");
        assert!(running(&root).is_none());
        let lock = std::fs::File::create(root.join("run/supervisor.lock")).unwrap();
        lock.try_lock().unwrap();
        assert!(running(&root).is_some());
    }

    #[test]
    fn paths_of_sockets_have_a_limit() {
        assert_eq!(socket_path(Path::new("/short.sock")), None);
        let long = PathBuf::from(format!("/{}", "x".repeat(107)));
        assert_eq!(socket_path(&long).unwrap().level, Level::Fail);
        let fits = PathBuf::from(format!("/{}", "x".repeat(106)));
        assert_eq!(socket_path(&fits), None);
    }

    #[test]
    fn limits_and_file_systems_are_judged() {
        let cfg = |text: &str| toml::from_str::<Config>(text).unwrap();
        assert_eq!(level(&limits(&cfg("")), "limits"), Some(Level::Ok));
        let lines = limits(&cfg("[limits]\nstop_secs = 0\nwatchdog_secs = 3"));
        assert_eq!(level(&lines, "limits.stop_secs"), Some(Level::Fail));
        assert_eq!(level(&lines, "limits.watchdog_secs"), Some(Level::Warn));
        assert_eq!(remote_kind(0x6969), Some("NFS"));
        assert_eq!(remote_kind(0xef53), None, "ext4");
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let text = format!("[admin]\nlisten = '{}'", taken.local_addr().unwrap());
        let lines = ports(&cfg(&text), false);
        assert_eq!(level(&lines, "admin.listen"), Some(Level::Fail));
        assert!(ports(&cfg(&text), true).is_empty(), "it is ours");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(level(&folder(&file), "folder"), Some(Level::Fail));
    }
}
