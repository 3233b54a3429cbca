//! The folder of a supervisor: its disk, its sockets, and who holds its locks.

use std::path::{Path, PathBuf};

use super::Line;
use crate::config::Limits;
use crate::control;
use crate::fence::{Fence, FenceError};
use crate::processes::Process;

/// Longest path of a Unix socket (unix(7), `sun_path` without its end).
const SOCKET_PATH: usize = 107;

/// The folder: ours, writable, short enough, on a disk of this host.
pub(super) fn folder(root: &Path) -> Vec<Line> {
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
pub(super) fn remote_kind(magic: u64) -> Option<&'static str> {
    match magic & 0xffff_ffff {
        0x6969 => Some("NFS"),
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => Some("SMB"),
        0x00c3_6400 => Some("Ceph"),
        0x0102_1997 => Some("9p"),
        0x6b41_4653 | 0x5346_414f => Some("AFS"),
        _ => None,
    }
}

pub(super) fn socket_path(path: &Path) -> Option<Line> {
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

/// Whether a process has its lock.
pub(super) fn held(root: &Path, process: &Process) -> bool {
    let path = lock(root, process);
    path.exists() && matches!(Fence::take(&path), Err(FenceError::Held(_)))
}

fn lock(root: &Path, process: &Process) -> PathBuf {
    root.join("run").join(format!("{}.lock", process.name))
}

/// Who lives without a supervisor.
pub(super) fn locks(root: &Path, processes: &[Process], supervised: bool) -> Vec<Line> {
    if supervised {
        return Vec::new();
    }
    let mut lines = Vec::new();
    for p in processes {
        let path = lock(root, p);
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

/// Room for the logs that are kept.
pub(super) fn disk(root: &Path, limits: &Limits, processes: usize) -> Vec<Line> {
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
