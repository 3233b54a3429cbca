//! `lotus-supervisor doctor`: everything that a start needs, and what to do about what is missing.

mod binaries;
mod folder;
mod host;

use std::path::Path;

use comfy_table::{Table, presets};
use lotus_runtime::Fault;
use lotus_types::Kind;
use serde::Serialize;

use crate::config::Config;
use crate::processes::{self, Process};
use crate::{fence, image, release};

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
    let mut lines = folder::folder(root);
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
        .and_then(|bin| Ok((processes::of_host(&cfg, root, &bin)?, bin)))
    {
        Ok((processes, bin)) => {
            let lives = |p: &Process| running.is_some() || folder::held(root, p);
            lines.extend(binaries::binaries(&bin, &processes));
            let read = binaries::configurations(root, &processes);
            // One that cannot be read has no ports, and each spoke would say so.
            let failed = |l: &Line| l.level == Level::Fail && l.check.ends_with("spokes");
            if !read.iter().any(failed) {
                lines.extend(binaries::ports(&processes, lives));
            }
            lines.extend(read);
            lines.extend(folder::locks(root, &processes, running.is_some()));
            lines.extend(folder::disk(root, &cfg.limits, processes.len()));
        }
        Err(e) => lines.push(fault("binaries", &e)),
    }
    lines.extend(host::limits(&cfg));
    lines.extend(host::own_port(&cfg, running.is_some()));
    lines.extend(host::guard(&cfg, root, running.is_some()));
    lines.extend(host::sandboxes(&cfg));
    lines.push(host::files());
    lines
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
            fence::holders(&lock)
                .ok()
                .and_then(|pids| pids.first().map(u32::to_string))
                .unwrap_or_else(|| "unknown".into()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::binaries::{binaries, configurations, ports};
    use super::folder::{folder, held, locks, remote_kind, socket_path};
    use super::host::{limits, own_port};
    use super::*;
    use crate::fence::Fence;

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
        let all = processes::of_host(&cfg, &root, &bin).unwrap();

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
        assert!(held(&root, &all[0]) && !held(&root, &all[1]));
        let lines = locks(&root, &all, false);
        assert_eq!(level(&lines, "lock of hub"), Some(Level::Warn), "{lines:?}");
        assert!(running(&root).is_none());
        let lock = std::fs::File::create(root.join("run/supervisor.lock")).unwrap();
        lock.try_lock().unwrap();
        assert!(running(&root).is_some());
    }

    #[test]
    fn the_ports_of_those_that_do_not_run_are_tried() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let busy = taken.local_addr().unwrap();
        let says = |name: &str, text: &str| Process {
            needs: ["sh", "-c", text].map(String::from).into(),
            ..Process::new(name, vec!["x".into()])
        };
        let socket = |name: &str, addr: &str| format!(r#"{{"name":"{name}","address":"{addr}"}}"#);
        let sockets = [
            socket("retrieval", &busy.to_string()),
            socket("indexing", "127.0.0.1:0"),
        ];
        let all = [
            says(
                "a",
                &format!("echo '{{\"sockets\":[{}]}}'", sockets.join(",")),
            ),
            says(
                "b",
                "echo 'b: bad key' >&2; echo '  fix: remove it' >&2; exit 78",
            ),
            Process::new("c", vec!["x".into()]),
        ];
        let lines = ports(&all, |_| false);
        let seen: Vec<_> = lines.iter().map(|l| (l.check.as_str(), l.level)).collect();
        assert_eq!(
            seen,
            [
                ("retrieval.listen", Level::Fail),
                ("needs of b", Level::Fail)
            ],
            "port 0 is always free: {lines:?}"
        );
        assert_eq!(lines[1].fix, "remove it");
        assert_eq!(ports(&all, |_| true), []);
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
        let line = own_port(&cfg(&text), false).unwrap();
        assert_eq!(
            (line.check.as_str(), line.level),
            ("admin.listen", Level::Fail)
        );
        assert_eq!(own_port(&cfg(&text), true), None, "it is ours");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(level(&folder(&file), "folder"), Some(Level::Fail));
    }
}
