//! What the host allows.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use super::Line;
use crate::config::Config;
use crate::guard;
use crate::sandbox::{self, Feature};

/// Open files that a busy host needs.
const FILES: u64 = 65_536;

/// Time limits that contradict each other.
pub(super) fn limits(cfg: &Config) -> Vec<Line> {
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
pub(super) fn own_port(cfg: &Config, running: bool) -> Option<Line> {
    let addr = cfg.admin.listen;
    (!running && addr.port() != 0).then(|| port("admin.listen", addr))
}

/// A port on which somebody is to listen.
pub(super) fn port(key: &str, addr: SocketAddr) -> Line {
    match TcpListener::bind(addr) {
        Ok(_) => Line::ok(key, format!("{addr} is free")),
        Err(e) => Line::fail(
            key,
            format!("{addr}: {e}"),
            "free the port (`ss -ltnp` shows who has it), or set another one",
        ),
    }
}

/// What the sandboxes of spokes are made of on this host.
pub(super) fn sandboxes(cfg: &Config) -> Vec<Line> {
    if !cfg.sandbox.enabled {
        return vec![Line::warn(
            "sandbox",
            "off: a spoke may do what the supervisor's user may",
            "remove sandbox.enabled",
        )];
    }
    let line = |(feature, has): (Feature, Result<String, String>)| {
        let check = format!("sandbox, {feature}");
        match has {
            Ok(how) => Line::ok(check, how),
            // Users of their own are a choice.
            Err(why) if feature == Feature::Users && cfg.sandbox.users.is_empty() => {
                Line::ok(check, why)
            }
            Err(why) if feature == Feature::Users => {
                Line::warn(check, why, "run it as root, or empty sandbox.users")
            }
            Err(why) => Line::warn(check, why, "a newer kernel, or another setting of it"),
        }
    };
    sandbox::support().into_iter().map(line).collect()
}

/// How spokes could be squeezed. A supervisor that runs has groups of its own, and `status` has
/// the rung of each process.
pub(super) fn guard(cfg: &Config, root: &Path, running: bool) -> Option<Line> {
    if running {
        return None;
    }
    let check = "guard";
    if !cfg.guard.enabled {
        let detail = "off: spokes take what they get while the hub proves";
        return Some(Line::warn(check, detail, "remove guard.enabled"));
    }
    Some(match guard::rung(root) {
        Ok(rung) => Line::ok(check, format!("{rung}, as far as it can be seen from here")),
        Err(why) => Line::warn(
            check,
            format!("nothing can be squeezed while the hub proves: {why}"),
            "run it by the unit that `systemd-unit` prints, or as root",
        ),
    })
}

/// Files that a process may open.
pub(super) fn files() -> Line {
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
