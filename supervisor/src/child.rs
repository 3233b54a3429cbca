//! Processes of the operating system: spawning one with its lock, its log and what it says;
//! following one of which this supervisor is not the parent; ending one.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::{SigHandler, Signal, kill, killpg, signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;

use crate::fence::{Fence, FenceError};
use crate::launch::Extras;
use crate::processes::Process;
use crate::table::Ended;
use crate::{fd, handover, logs, record};

/// Exit status that means "the command line is wrong".
const EX_COMMAND_LINE: i32 = 2;
/// Exit status that means "the configuration is wrong" (sysexits.h, `EX_CONFIG`).
const EX_CONFIG: i32 = 78;

/// A spawned process and the read end of its notification pipe.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pid: u32,
    pub(crate) notify: pipe::Receiver,
}

/// Why a process was not spawned.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    #[error(transparent)]
    Fence(#[from] FenceError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Spawns `process` under the lock `fence`, with its output appended to `log`.
pub(crate) fn spawn(
    process: &Process,
    log: &Path,
    fence: &Path,
    notify_socket: &Path,
    extras: Extras<'_>,
) -> Result<Spawned, SpawnError> {
    let (program, args) = process
        .command
        .split_first()
        .ok_or_else(|| io::Error::other("empty command"))?;
    let fence = take_fence(fence)?;
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(io::Error::from)?;
    fcntl(&write, FcntlArg::F_SETFL(OFlag::empty())).map_err(io::Error::from)?;
    inheritable(fence.fd())?;
    inheritable(write.as_fd())?;
    let out = logs::open(log)?;
    let err = out.try_clone()?;
    let (mut command, lent) = extras.command(program)?;
    own_variables(&mut command);
    command
        .args(args)
        .envs(&process.env)
        .env(lotus_runtime::notify::FD_VAR, write.as_raw_fd().to_string())
        .env(
            lotus_runtime::notify::FENCE_VAR,
            fence.fd().as_raw_fd().to_string(),
        )
        .env("NOTIFY_SOCKET", notify_socket)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .process_group(0);
    if let Some(limit) = process.watchdog {
        command.env("WATCHDOG_USEC", limit.as_micros().to_string());
    }
    // Nobody but `reaped` waits for it.
    let pid = command.spawn()?.id();
    drop::<OwnedFd>(write);
    drop(lent);
    if let Err(e) = fence.hand_over(pid) {
        tracing::warn!(%e, process = process.name, "the pid is not in the lock's file");
    }
    Ok(Spawned {
        pid,
        notify: pipe::Receiver::from_owned_fd(read)?,
    })
}

/// What a service manager, or the image before this one, told the supervisor is not meant for its
/// processes.
pub(crate) fn own_variables(command: &mut Command) {
    for name in [
        "WATCHDOG_PID",
        "WATCHDOG_USEC",
        "LISTEN_PID",
        "LISTEN_FDS",
        "LISTEN_FDNAMES",
        handover::VAR,
        handover::CHOSEN_VAR,
    ] {
        command.env_remove(name);
    }
}

/// From now on a hangup ends neither this process nor those that it starts, which inherit it: a
/// terminal that is closed stops no proofs. And when a supervisor dies, the kernel hangs up on each
/// of its processes that is stopped just then (setpgid(2), orphaned process groups).
pub(crate) fn ignore_hangups() -> io::Result<()> {
    #[expect(unsafe_code, reason = "nothing is installed that could be called")]
    // SAFETY: see the reason above.
    unsafe { signal(Signal::SIGHUP, SigHandler::SigIgn) }?;
    Ok(())
}

/// How long a killed process may take to let go of the lock of one that is gone.
const LEFTOVER: Duration = Duration::from_secs(2);

/// Takes the lock. Nobody lives whom it is for, so whoever still has it inherited it.
fn take_fence(path: &Path) -> Result<Fence, FenceError> {
    match Fence::take(path) {
        Err(FenceError::Held(pids)) => {
            for pid in pids {
                kill_leftover(pid);
            }
            Fence::take(path)
        }
        taken => taken,
    }
}

/// Lets the next spawned process have a descriptor. All spawning happens on one task, which
/// closes its own copy before it spawns the next.
fn inheritable(fd: BorrowedFd<'_>) -> io::Result<()> {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}

/// Every child that ended since the last call, and how.
pub(crate) fn reaped() -> BTreeMap<u32, (Ended, String)> {
    reap(None)
}

/// For tests that start processes: an inheritable descriptor of one must not get into those that
/// another one starts at the same time.
#[cfg(test)]
pub(crate) static FORKS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// How a child ended, if it did.
#[cfg(test)]
pub(crate) fn reaped_one(pid: u32) -> Option<(Ended, String)> {
    reap(as_pid(pid)).remove(&pid)
}

fn reap(which: Option<Pid>) -> BTreeMap<u32, (Ended, String)> {
    let mut all = BTreeMap::new();
    loop {
        match waitpid(which, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => {
                let how = match code {
                    0 => Ended::Clean,
                    EX_COMMAND_LINE | EX_CONFIG => Ended::BadConfig,
                    _ => Ended::Crashed,
                };
                all.insert(as_u32(pid), (how, format!("exit status {code}")));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) => {
                all.insert(as_u32(pid), (Ended::Crashed, signal.to_string()));
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return all,
            // Stopped and continued ones are not asked for.
            Ok(_) => {}
        }
    }
}

fn as_u32(pid: Pid) -> u32 {
    u32::try_from(pid.as_raw()).unwrap_or_default()
}

/// A process that the supervisor before this one spawned.
#[derive(Debug)]
pub(crate) struct Adopted(AsyncFd<OwnedFd>);

impl Adopted {
    /// Takes hold of a process; none if it is gone.
    pub(crate) fn new(id: record::Identity) -> io::Result<Option<Self>> {
        let Some(pid) = as_rustix(id.pid) else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // The descriptor means one process for good; the number may have been used again before.
        if record::start_time(id.pid) != Some(id.start_time) {
            return Ok(None);
        }
        Ok(Some(Self(fd::readable(fd)?)))
    }

    /// Returns when it has ended. Its exit status is its parent's to know.
    pub(crate) async fn ended(&self) -> (Ended, String) {
        match self.0.readable().await {
            Ok(_) => (
                Ended::Crashed,
                "exit status unknown, as another supervisor started it".into(),
            ),
            Err(e) => (Ended::Crashed, e.to_string()),
        }
    }
}

fn as_rustix(pid: u32) -> Option<rustix::process::Pid> {
    rustix::process::Pid::from_raw(i32::try_from(pid).ok()?)
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

/// Asks the process to finish what is open and to end. One that does not know the signal would be
/// ended by it: see [`Process::drains`].
pub(crate) fn drain(pid: u32) {
    if let Some(p) = as_pid(pid)
        && let Err(e) = kill(p, Signal::SIGUSR1)
    {
        tracing::debug!(pid, %e, "SIGUSR1");
    }
}

/// Ends the process and everything in its group. Of one that just ended too: a number is not used
/// again while a group has it, and not soon after.
pub(crate) fn kill_group(pid: u32) {
    if let Some(p) = as_pid(pid)
        && let Err(e) = killpg(p, Signal::SIGKILL)
        && e != Errno::ESRCH
    {
        tracing::warn!(pid, %e, "SIGKILL");
    }
}

/// Ends a process that holds the lock of one that is gone, and returns when it is.
pub(crate) fn kill_leftover(pid: u32) {
    let Some(p) = as_pid(pid) else { return };
    tracing::warn!(pid, "it outlived the process that started it: killed");
    if let Err(e) = kill(p, Signal::SIGKILL) {
        if e != Errno::ESRCH {
            tracing::warn!(pid, %e, "SIGKILL");
        }
        return;
    }
    let Some(fd) = as_rustix(pid).and_then(|p| pidfd_open(p, PidfdFlags::empty()).ok()) else {
        return;
    };
    let timeout = nix::poll::PollTimeout::try_from(LEFTOVER).unwrap_or(nix::poll::PollTimeout::MAX);
    let mut fds = [nix::poll::PollFd::new(
        fd.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    if nix::poll::poll(&mut fds, timeout) != Ok(1) {
        tracing::warn!(pid, "it does not end");
    }
}
