//! Spawning one process: its log file, its notification descriptor, its process group.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, pipe2};
use tokio::process::{Child, Command};

use crate::config::Process;
use crate::table::Ended;

/// Exit status that means "the configuration is wrong" (sysexits.h, `EX_CONFIG`).
const EX_CONFIG: i32 = 78;

/// A spawned process and the read end of its notification pipe.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) child: Child,
    pub(crate) pid: u32,
    pub(crate) notify: tokio::net::unix::pipe::Receiver,
}

/// Spawns `process` with its output appended to `log`. The log is a file that the child writes
/// itself, so that nothing breaks when the supervisor dies.
pub(crate) fn spawn(process: &Process, log: &Path) -> io::Result<Spawned> {
    let (program, args) = process
        .command
        .split_first()
        .ok_or_else(|| io::Error::other("empty command"))?;
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // The write end goes to this child alone: it is inheritable only until `write` is dropped
    // below, and all spawning happens on one task.
    fcntl(&write, FcntlArg::F_SETFD(FdFlag::empty()))?;
    fcntl(&write, FcntlArg::F_SETFL(OFlag::empty()))?;
    let out = open_log(log)?;
    let err = out.try_clone()?;
    let child = Command::new(program)
        .args(args)
        .envs(&process.env)
        .env(lotus_runtime::notify::FD_VAR, write.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .process_group(0)
        .spawn()?;
    drop::<OwnedFd>(write);
    let pid = child
        .id()
        .ok_or_else(|| io::Error::other("the process ended before it had a pid"))?;
    Ok(Spawned {
        child,
        pid,
        notify: tokio::net::unix::pipe::Receiver::from_owned_fd(read)?,
    })
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Copies a log that has grown over `limit` to `NAME.log.1` and empties it. The child keeps
/// writing to the same file: it appends.
pub(crate) fn rotate_log(path: &Path, limit: u64) -> io::Result<()> {
    let len = match std::fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if len <= limit {
        return Ok(());
    }
    std::fs::copy(path, old_log(path))?;
    OpenOptions::new().write(true).open(path)?.set_len(0)
}

fn old_log(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The end of a log, at most `bytes`, from a line's start.
pub(crate) fn tail(path: &Path, bytes: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let from = len.saturating_sub(bytes);
    file.seek(io::SeekFrom::Start(from))?;
    let mut text = Vec::new();
    file.take(bytes).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    Ok(match text.split_once('\n') {
        Some((_, rest)) if from > 0 => rest.to_owned(),
        _ => text.into_owned(),
    })
}

/// Writes a line of the supervisor's own into a process's log.
pub(crate) fn mark(path: &Path, line: &str) {
    let written = open_log(path).and_then(|mut f| writeln!(f, "--- supervisor: {line}"));
    if let Err(e) = written {
        tracing::warn!(%e, log = %path.display(), "log not written");
    }
}

fn as_pid(pid: u32) -> Option<Pid> {
    i32::try_from(pid)
        .ok()
        .filter(|p| *p > 1)
        .map(Pid::from_raw)
}

/// Asks the process to end.
pub(crate) fn terminate(pid: u32) {
    if let Some(p) = as_pid(pid)
        && let Err(e) = kill(p, Signal::SIGTERM)
    {
        tracing::debug!(pid, %e, "SIGTERM");
    }
}

/// Ends the process and everything in its group.
pub(crate) fn kill_group(pid: u32) {
    if let Some(p) = as_pid(pid)
        && let Err(e) = killpg(p, Signal::SIGKILL)
    {
        tracing::debug!(pid, %e, "SIGKILL");
    }
}

/// What an exit status means for the table, and in words.
pub(crate) fn ended(status: io::Result<std::process::ExitStatus>) -> (Ended, String) {
    match status {
        Ok(s) if s.success() => (Ended::Clean, s.to_string()),
        Ok(s) if s.code() == Some(EX_CONFIG) => (Ended::BadConfig, s.to_string()),
        Ok(s) => (Ended::Crashed, s.to_string()),
        Err(e) => (Ended::Crashed, e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_moves_aside_and_the_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let mut writer = open_log(&path).unwrap();
        writer.write_all(b"first\nsecond\n").unwrap();
        rotate_log(&path, 100).unwrap();
        assert_eq!(tail(&path, 100).unwrap(), "first\nsecond\n");
        rotate_log(&path, 5).unwrap();
        writer.write_all(b"third\n").unwrap();
        assert_eq!(tail(&path, 100).unwrap(), "third\n");
        assert_eq!(tail(&old_log(&path), 100).unwrap(), "first\nsecond\n");
        assert_eq!(tail(&old_log(&path), 9).unwrap(), "second\n", "whole lines");
    }
}
