//! The binaries, and what they say of their configuration.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lotus_runtime::Needs;

use super::Line;
use super::host::port;
use crate::processes::Process;
use crate::{child, release};

/// How long a program may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Each binary is there, runs, and is of the same version as the others.
pub(super) fn binaries(bin: &Path, processes: &[Process]) -> Vec<Line> {
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
pub(super) fn configurations(root: &Path, processes: &[Process]) -> Vec<Line> {
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
        let config = repo.join("config.toml");
        if check.ends_with("hub") && !config.exists() {
            let is_made = |p: &Process| p.creates.as_ref() == Some(&config);
            lines.push(if processes.iter().any(is_made) {
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
            Err(e) => wrong(check, &e),
        });
    }
    lines
}

/// The ports of those that do not run yet, as they say themselves.
pub(super) fn ports(processes: &[Process], runs: impl Fn(&Process) -> bool) -> Vec<Line> {
    let mut lines = Vec::new();
    for p in processes.iter().filter(|p| !runs(p)) {
        let Some((program, args)) = p.needs.split_first() else {
            continue;
        };
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let said = answer(Path::new(program), &args, &p.env);
        let needs = said.and_then(|text| {
            serde_json::from_str::<Needs>(&text).map_err(|e| format!("{program}: {e}"))
        });
        match needs {
            Ok(needs) => {
                let fixed = needs.sockets.iter().filter(|s| s.address.port() != 0);
                lines.extend(fixed.map(|s| port(&format!("{}.listen", s.name), s.address)));
            }
            Err(e) => lines.push(wrong(&format!("needs of {}", p.name), &e)),
        }
    }
    lines
}

/// A program's complaint, which says itself what to do.
fn wrong(check: &str, said: &str) -> Line {
    let (what, fix) = said.split_once("fix: ").unwrap_or((said, "correct it"));
    Line::fail(check, what.trim(), fix.trim())
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
