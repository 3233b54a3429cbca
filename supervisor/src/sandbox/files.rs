//! Landlock: which files and TCP ports a process reaches, and whom it may signal.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
    make_bitflags,
};

use super::Profile;

/// Version of Landlock with TCP ports (Linux 6.7).
pub(super) const TCP: i32 = 4;
/// Version of Landlock with signals and abstract Unix sockets (Linux 6.12).
pub(super) const SCOPE: i32 = 6;
/// Flag of landlock_create_ruleset(2) that asks for the version only.
const VERSION: libc::c_uint = 1;

/// The version of Landlock that this kernel has.
pub(super) fn version() -> io::Result<i32> {
    #[expect(
        unsafe_code,
        reason = "with this flag the call reads no memory: the attributes are null and have no length"
    )]
    // SAFETY: see the reason above; landlock_create_ruleset(2).
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            VERSION,
        )
    };
    if version < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(version).map_err(io::Error::other)
}

/// The rules of a profile. The paths are opened now, so it may be another user who is confined by
/// them later. What is not there is left out: it is not there for the process either.
pub(super) fn rules(profile: &Profile) -> Result<RulesetCreated, RulesetError> {
    // Of each kind what this kernel has. Later versions are not asked for before somebody has
    // tried them: a right that is handled is one that is refused.
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    for (paths, access) in [
        (&profile.read, read),
        (&profile.devices, read | AccessFs::WriteFile),
        (&profile.run, read | AccessFs::Execute),
        (&profile.write, read | written()),
    ] {
        for path in paths {
            rules = beneath(rules, path, access)?;
        }
    }
    for port in &profile.connect {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::ConnectTcp))?;
    }
    for port in &profile.bind {
        rules = rules.add_rule(NetPort::new(*port, AccessNet::BindTcp))?;
    }
    Ok(rules)
}

/// What may be done in a folder that is the service's own: anything but to run what is there, and
/// to make what is no file.
fn written() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        WriteFile | Truncate | RemoveDir | RemoveFile | MakeDir | MakeReg | MakeSock | Refer
    })
}

fn beneath(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(fd) = PathFd::new(path) else {
        return Ok(rules);
    };
    // Rights of folders on a file are an error.
    let access = if path.is_dir() {
        access
    } else {
        access & AccessFs::from_file(ABI::V5)
    };
    rules.add_rule(PathBeneath::new(fd, access))
}

/// Confines this thread for good.
pub(super) fn restrict(rules: RulesetCreated) -> Result<RulesetStatus, RulesetError> {
    Ok(rules.restrict_self()?.ruleset)
}
