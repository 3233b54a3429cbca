//! The launch shim: this binary, spawned by the supervisor in place of a process that gets
//! sockets or a sandbox. It has one thread and no runtime, so it can do what the supervisor cannot
//! between `fork` and `exec`: `LISTEN_PID` is its own pid, and the sandbox is its own. Then it
//! becomes the program.
//!
//! The supervisor spawns `/proc/self/exe`, which is the image that runs, whatever became of its
//! file.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use lotus_runtime::notify::{FD_VAR, FENCE_VAR};
use lotus_types::Kind;
use serde::{Deserialize, Serialize};

use crate::sandbox;

/// First argument of the shim; the program and its arguments follow.
pub(crate) const COMMAND: &str = "launch";
/// The variable with the [`Launch`], as JSON. The program does not get it.
const VAR: &str = "LOTUS_LAUNCH";
/// First descriptor of `LISTEN_FDS`. Source: sd_listen_fds(3).
const FIRST: RawFd = 3;
/// Most sockets that one process is handed.
const MOST: usize = 64;
/// Exit status that means "the operating system refused" (sysexits.h, `EX_OSERR`).
const EX_OSERR: u8 = 71;

/// What is done before the program runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Launch {
    /// Listening sockets, in the order of `LISTEN_FDS`.
    pub(crate) sockets: Vec<Handed>,
    /// What the program is confined to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sandbox: Option<sandbox::Profile>,
}

/// A socket that the shim inherits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Handed {
    /// Its name in `LISTEN_FDNAMES`.
    pub(crate) name: String,
    /// Its number in the shim.
    pub(crate) fd: RawFd,
}

/// What a process gets beside its command line.
#[derive(Debug, Default)]
pub(crate) struct Extras<'a> {
    /// Listening sockets by name.
    pub(crate) sockets: Vec<(&'a str, BorrowedFd<'a>)>,
    /// What it is confined to.
    pub(crate) sandbox: Option<sandbox::Profile>,
}

impl Extras<'_> {
    /// The command that spawns `program`, through the shim if there is something for it to do. The
    /// descriptors are those that it inherits: to be closed when it is spawned, and before the
    /// next one is.
    pub(crate) fn command(self, program: &str) -> io::Result<(Command, Vec<OwnedFd>)> {
        if self.sockets.is_empty() && self.sandbox.is_none() {
            return Ok((Command::new(program), Vec::new()));
        }
        let mut lent = Vec::new();
        let mut sockets = Vec::new();
        for (name, socket) in self.sockets {
            let fd = inheritable_copy(socket)?;
            sockets.push(Handed {
                name: name.into(),
                fd: fd.as_raw_fd(),
            });
            lent.push(fd);
        }
        let launch = Launch {
            sockets,
            sandbox: self.sandbox,
        };
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(COMMAND)
            .arg(program)
            .env(VAR, serde_json::to_string(&launch)?);
        Ok((command, lent))
    }
}

/// A copy that the next process inherits.
fn inheritable_copy(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let copy = duplicate(fd.as_raw_fd(), libc::F_DUPFD, FIRST)?;
    #[expect(unsafe_code, reason = "the number was made for it a line above")]
    // SAFETY: see the reason above.
    let owned = unsafe { OwnedFd::from_raw_fd(copy) };
    Ok(owned)
}

/// Why the program does not run.
#[derive(Debug, thiserror::Error)]
enum LaunchError {
    #[error("`{COMMAND}` is for the supervisor itself, which says in {VAR} what to do: {0}")]
    NotForPeople(String),
    #[error("its sockets: {0}")]
    Sockets(#[source] io::Error),
    #[error("its sandbox: {0}; fix: {fix}", fix = .0.fix)]
    Sandbox(lotus_runtime::Fault),
    #[error("{program}: {source}")]
    Program { program: String, source: io::Error },
}

impl LaunchError {
    /// docs/exit-codes.md: 78 does not change by itself, 71 may.
    const fn code(&self) -> u8 {
        match self {
            Self::NotForPeople(_) => Kind::Config.code(),
            Self::Sandbox(fault) if matches!(fault.kind, Kind::Config) => fault.kind.code(),
            Self::Sockets(_) | Self::Sandbox(_) | Self::Program { .. } => EX_OSERR,
        }
    }
}

/// Becomes the program if the command line is that of the shim. To be called before anything
/// else: no thread and no runtime may be there.
#[must_use]
pub fn launched(mut args: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    if args.nth(1)? != *COMMAND {
        return None;
    }
    let e = match launch(args) {
        Ok(never) => match never {},
        Err(e) => e,
    };
    eprintln!("lotus-supervisor: does not start: {e}");
    Some(ExitCode::from(e.code()))
}

fn launch(
    mut words: impl Iterator<Item = OsString>,
) -> Result<std::convert::Infallible, LaunchError> {
    let wrong = |e: &dyn std::fmt::Display| LaunchError::NotForPeople(e.to_string());
    let text = std::env::var(VAR).map_err(|e| wrong(&e))?;
    let launch: Launch = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
    let program = words.next().ok_or_else(|| wrong(&"no program"))?;
    if launch.sockets.len() > MOST {
        return Err(wrong(&"too many sockets"));
    }

    let mut command = Command::new(&program);
    command.args(words).env_remove(VAR);
    let kept = [FD_VAR, FENCE_VAR].map(|var| Some((var, std::env::var(var).ok()?.parse().ok()?)));
    let kept: Vec<(&str, RawFd)> = kept.into_iter().flatten().collect();
    for (var, fd) in move_sockets(&launch.sockets, &kept).map_err(LaunchError::Sockets)? {
        command.env(var, fd.to_string());
    }
    if !launch.sockets.is_empty() {
        let names: Vec<&str> = launch.sockets.iter().map(|s| s.name.as_str()).collect();
        command
            .env("LISTEN_PID", std::process::id().to_string())
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
    }
    if let Some(profile) = &launch.sandbox {
        for (name, _) in std::env::vars_os().filter(|(name, _)| !profile.keeps(name)) {
            command.env_remove(name);
        }
        sandbox::enter(profile).map_err(LaunchError::Sandbox)?;
    }
    let source = command.exec();
    let program = program.to_string_lossy().into_owned();
    Err(LaunchError::Program { program, source })
}

/// Moves the sockets to the numbers from 3 on. What is `kept` and has one of these numbers goes
/// elsewhere; its new number is returned.
fn move_sockets<'a>(
    sockets: &[Handed],
    kept: &[(&'a str, RawFd)],
) -> io::Result<Vec<(&'a str, RawFd)>> {
    let end = FIRST + RawFd::try_from(sockets.len()).map_err(io::Error::other)?;
    let mut moved = Vec::new();
    for (var, fd) in kept {
        if (FIRST..end).contains(fd) {
            moved.push((*var, duplicate(*fd, libc::F_DUPFD, end)?));
        }
    }
    // Out of the way first: one may have the number that another is to get.
    let mut aside = Vec::new();
    for socket in sockets {
        let copy = duplicate(socket.fd, libc::F_DUPFD_CLOEXEC, end)?;
        aside.push(copy);
    }
    for socket in sockets {
        // The program has it once. What is in the range is replaced below.
        if socket.fd >= end {
            close_on_exec(socket.fd)?;
        }
    }
    for (to, from) in (FIRST..end).zip(aside) {
        replace(from, to)?;
    }
    Ok(moved)
}

/// A copy of `fd` with the lowest free number from `least` on.
fn duplicate(fd: RawFd, how: libc::c_int, least: RawFd) -> io::Result<RawFd> {
    #[expect(unsafe_code, reason = "numbers go in and out; no memory is touched")]
    // SAFETY: see the reason above. A number that is no open descriptor fails with EBADF.
    let copy = unsafe { libc::fcntl(fd, how, least) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(copy)
}

fn close_on_exec(fd: RawFd) -> io::Result<()> {
    #[expect(unsafe_code, reason = "a number goes in; no memory is touched")]
    // SAFETY: see the reason above.
    let done = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes `to` a copy of `from` that the program inherits.
fn replace(from: RawFd, to: RawFd) -> io::Result<()> {
    #[expect(
        unsafe_code,
        reason = "nothing in this process owns a descriptor at `to`: it has one thread and opened none before"
    )]
    // SAFETY: see the reason above.
    let done = unsafe { libc::dup2(from, to) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
