//! Never two: each process holds a lock for as long as it lives, on a descriptor that it inherits.
//!
//! The lock is an open-file-description lock (`F_OFD_SETLK`, fcntl(2)): it belongs to the open
//! file and not to a process, so it passes from the supervisor to the child, outlives the
//! supervisor, and ends with the last process that has the descriptor. A supervisor that starts
//! asks the lock, and not a pid file, whether a process lives.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// A lock that is held through this descriptor.
#[derive(Debug)]
pub(crate) struct Fence {
    file: File,
}

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FenceError {
    /// Another process has it. The pids are of those that have the file open.
    #[error("its lock is held by {}", pids(.0))]
    Held(Vec<u32>),
    #[error("its lock: {0}")]
    Io(#[from] io::Error),
}

fn pids(all: &[u32]) -> String {
    if all.is_empty() {
        return "a process that this user may not look into".into();
    }
    let all: Vec<String> = all.iter().map(|pid| format!("pid {pid}")).collect();
    all.join(", ")
}

impl Fence {
    /// Takes the lock at `path` on a descriptor opened for it, without waiting.
    pub(crate) fn take(path: &Path) -> Result<Self, FenceError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let whole = whole();
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)) {
            Ok(_) => Ok(Self { file }),
            Err(Errno::EAGAIN | Errno::EACCES) => Err(FenceError::Held(holders(&file)?)),
            Err(e) => Err(io::Error::from(e).into()),
        }
    }

    /// The descriptor that the child inherits.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes the holder's pid into the file, for people, and closes this end.
    pub(crate) fn hand_over(mut self, pid: u32) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        writeln!(self.file, "{pid}")
    }
}

/// A write lock on the whole file, as fcntl(2) wants it.
#[expect(
    clippy::cast_possible_truncation,
    reason = "both constants are 0 or 1; the field is a short"
)]
const fn whole() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Pids of the other processes that have this very file open, lowest first. Only holders of a lock
/// and their children have a lock's file open.
pub(crate) fn holders(file: &File) -> io::Result<Vec<u32>> {
    let wanted = file.metadata()?;
    let us = std::process::id();
    let has_it = |pid: &u32| {
        let Ok(open) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            return false;
        };
        open.flatten().any(|fd| {
            std::fs::metadata(fd.path())
                .is_ok_and(|m| m.ino() == wanted.ino() && m.dev() == wanted.dev())
        })
    };
    let mut pids: Vec<u32> = std::fs::read_dir("/proc")?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != us)
        .filter(has_it)
        .collect();
    pids.sort_unstable();
    Ok(pids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::FdFlag;
    use std::process::{Command, Stdio};

    #[test]
    fn a_lock_lives_as_long_as_the_process_that_inherits_it() {
        let _alone = crate::child::FORKS.blocking_lock();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub.lock");
        let fence = Fence::take(&path).unwrap();
        assert!(
            matches!(Fence::take(&path), Err(FenceError::Held(_))),
            "one at a time"
        );
        fcntl(fence.fd(), FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        fence.hand_over(child.id()).unwrap();
        match Fence::take(&path) {
            Err(FenceError::Held(pids)) => assert_eq!(pids, [child.id()]),
            other => panic!("{other:?}"),
        }
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            format!("{}\n", child.id())
        );
        child.kill().unwrap();
        child.wait().unwrap();
        Fence::take(&path).unwrap();
    }
}
