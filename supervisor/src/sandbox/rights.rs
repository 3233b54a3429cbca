//! The user, the capabilities and the limits of a process.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown};
use std::path::Path;

use caps::CapSet;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::{Account, Profile};

/// Most descriptors that a spoke may have open.
const FILES: u64 = 65_536;
/// Most threads of a user who is a spoke's alone.
const THREADS: u64 = 4_096;

/// No core dumps: they would have the memory of the process in a file. Descriptors as many as the
/// host allows, within reason.
pub(super) fn limit(profile: &Profile) -> io::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    let lower = |what, most: u64| {
        let (_, hard) = getrlimit(what)?;
        setrlimit(what, hard.min(most), hard.min(most))
    };
    lower(Resource::RLIMIT_NOFILE, FILES)?;
    // It counts everything that the user runs: of a shared one the hub's threads too.
    if profile.account.is_some() {
        lower(Resource::RLIMIT_NPROC, THREADS)?;
    }
    Ok(())
}

/// Becomes another user for good.
pub(super) fn become_user(account: Account) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    setgroups(&[gid])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    Ok(())
}

/// Takes away what a program could regain by `exec`. Root alone may.
pub(super) fn clear_bounding() -> Result<(), caps::errors::CapsError> {
    caps::clear(None, CapSet::Bounding)
}

/// Whether [`clear_bounding`] is allowed.
pub(super) fn may_clear_bounding() -> bool {
    caps::has_cap(None, CapSet::Effective, caps::Capability::CAP_SETPCAP).unwrap_or(false)
}

/// Gives up every capability.
pub(super) fn clear_capabilities() -> Result<(), caps::errors::CapsError> {
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::clear(None, CapSet::Permitted)
}

/// Gives a folder and what is in it to a user, who alone may look into it. Links are given
/// themselves, not what they lead to. The folder comes last, so one that is given is all given.
pub(super) fn give(dir: &Path, account: Account) -> io::Result<()> {
    if std::fs::symlink_metadata(dir)?.uid() == account.uid {
        return Ok(());
    }
    let mut left = vec![(dir.to_owned(), false)];
    while let Some((path, seen)) = left.pop() {
        if !seen && std::fs::symlink_metadata(&path)?.is_dir() {
            left.push((path.clone(), true));
            for entry in std::fs::read_dir(&path)? {
                left.push((entry?.path(), false));
            }
            continue;
        }
        lchown(&path, Some(account.uid), Some(account.gid))?;
    }
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// Lets a group through a folder that not everybody may pass.
pub(super) fn pass(dir: &Path, gid: u32) -> io::Result<()> {
    let mode = std::fs::metadata(dir)?.mode();
    if mode & 0o001 == 0 {
        share(dir, gid, 0o010)?;
    }
    Ok(())
}

/// Gives `bits` of a file's mode to a group: these, and no others of the group's.
pub(super) fn share(path: &Path, gid: u32, bits: u32) -> io::Result<()> {
    let mode = std::fs::metadata(path)?.mode();
    chown(path, None, Some(gid))?;
    std::fs::set_permissions(path, Permissions::from_mode((mode & 0o7707) | bits))
}
