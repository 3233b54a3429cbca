//! What keeps a spoke from everything that it does not need: another user, no capabilities,
//! Landlock for files and TCP ports, seccomp for system calls.
//!
//! The supervisor makes the [`Profile`] from what the service says it needs. The launch shim
//! [enters](enter) it and becomes the service: nothing of it can be taken back from inside.

mod elf;
mod files;
mod host;
mod profile;
mod rights;
mod seccomp;

use std::fmt;
use std::io;
use std::path::Path;

use landlock::RulesetStatus;
use lotus_runtime::Fault;
use lotus_types::Kind;

pub(crate) use host::{Sandboxes, Who};
pub use profile::SandboxConfig;
pub(crate) use profile::{Account, Profile};
use profile::{Program, profile};

/// A part of the sandbox that a host may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Feature {
    /// Landlock for files.
    Files,
    /// Landlock for TCP ports.
    Ports,
    /// Landlock for signals and abstract Unix sockets.
    Signals,
    /// Seccomp filters.
    Calls,
    /// Capabilities that no `exec` gives back.
    Capabilities,
    /// Users other than the supervisor's.
    Users,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Files => "files",
            Self::Ports => "ports",
            Self::Signals => "signals",
            Self::Calls => "system calls",
            Self::Capabilities => "capabilities",
            Self::Users => "users",
        })
    }
}

/// Each part of the sandbox: how this host has it, or what is missing and what follows from that.
pub(crate) fn support() -> Vec<(Feature, Result<String, String>)> {
    let landlock = files::version().map_err(|e| {
        if e.raw_os_error() == Some(libc::EOPNOTSUPP) {
            "Landlock is not among the kernel's `lsm=`".to_owned()
        } else {
            format!("the kernel has no Landlock: {e}")
        }
    });
    let from = |version: i32, since: &str, lost: &str| match &landlock {
        Ok(v) if *v >= version => Ok(format!("Landlock {v}")),
        Ok(v) => Err(format!(
            "Landlock {v} is too old (Linux {since} has it): {lost}"
        )),
        Err(why) => Err(format!("{why}: {lost}")),
    };
    let bounding = if rights::may_clear_bounding() {
        "none, and none to regain"
    } else {
        "none, and no_new_privs keeps them away"
    };
    vec![
        (
            Feature::Files,
            from(
                1,
                "5.13",
                "a spoke reads what its user may read, the hub's keys too",
            ),
        ),
        (
            Feature::Ports,
            from(
                files::TCP,
                "6.7",
                "a spoke connects to any port, the node's too",
            ),
        ),
        (
            Feature::Signals,
            from(
                files::SCOPE,
                "6.12",
                "abstract Unix sockets are open to a spoke",
            ),
        ),
        (Feature::Calls, calls()),
        (Feature::Capabilities, Ok(bounding.into())),
        (
            Feature::Users,
            if nix::unistd::geteuid().is_root() {
                Ok("sandbox.users may name them".into())
            } else {
                Err("the supervisor is not root: spokes run as its user".into())
            },
        ),
    ]
}

fn calls() -> Result<String, String> {
    let lost = "a spoke may make any system call";
    let arch = std::env::consts::ARCH;
    if seccompiler::TargetArch::try_from(arch).is_err() {
        return Err(format!("there is no filter for {arch}: {lost}"));
    }
    if seccomp::available() {
        Ok("seccomp".into())
    } else {
        Err(format!("the kernel has no seccomp filters: {lost}"))
    }
}

/// What a host lacks of the sandbox.
pub(crate) fn missing() -> Vec<(Feature, String)> {
    support()
        .into_iter()
        .filter_map(|(feature, has)| Some((feature, has.err()?)))
        .collect()
}

/// The sandbox of a process in one line, for people.
pub(crate) fn words(profile: &Profile, missing: &[(Feature, String)]) -> String {
    let user = profile.account.is_some();
    // That it is not root is not a lack of those that were to have no user of their own.
    let without: Vec<String> = missing
        .iter()
        .filter(|(feature, _)| *feature != Feature::Users || user)
        .map(|(feature, _)| feature.to_string())
        .collect();
    match without.as_slice() {
        [] => "full".into(),
        lacks => format!("without {}", lacks.join(", ")),
    }
}

/// Confines this process, and so the program that it becomes. It has one thread, and what fails
/// here ends it: a part that the host has and that fails is no reason to run without.
pub(crate) fn enter(profile: &Profile) -> Result<(), Fault> {
    let step = |what: &'static str, e: &dyn fmt::Display| {
        Fault::new(
            Kind::Fatal,
            format!("{what}: {e}"),
            "report this; `[sandbox] enabled = false` in supervisor.toml runs spokes without",
        )
    };
    rights::limit(profile).map_err(|e| step("limits", &e))?;
    folders(profile)?;
    // The paths are opened as the user who may.
    let rules = files::rules(profile).map_err(|e| step("Landlock", &e))?;
    if rights::may_clear_bounding() {
        rights::clear_bounding().map_err(|e| step("capabilities", &e))?;
    }
    if let Some(account) = profile.account {
        rights::become_user(account).map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("becoming user {}: {e}", account.uid),
                "run the supervisor as root, or empty sandbox.users",
            )
        })?;
    }
    rights::clear_capabilities().map_err(|e| step("capabilities", &e))?;
    nix::sys::prctl::set_no_new_privs().map_err(|e| step("no_new_privs", &e))?;
    let status = files::restrict(rules).map_err(|e| step("Landlock", &e))?;
    if status == RulesetStatus::NotEnforced && files::version().is_ok() {
        return Err(step(
            "Landlock",
            &"the kernel has it and does not enforce it",
        ));
    }
    let arch = seccompiler::TargetArch::try_from(std::env::consts::ARCH);
    if let (Ok(arch), true) = (arch, seccomp::available()) {
        let programs =
            seccomp::programs(std::process::id(), arch).map_err(|e| step("seccomp", &e))?;
        for program in &programs {
            seccompiler::apply_filter(program).map_err(|e| step("seccomp", &e))?;
        }
    }
    Ok(())
}

/// Makes the folders that the service writes in: a rule is for what is there.
fn folders(profile: &Profile) -> Result<(), Fault> {
    let wrong = |dir: &Path, e: io::Error| {
        Fault::new(
            Kind::Config,
            format!("the folder {}: {e}", dir.display()),
            "give the supervisor's user access to it",
        )
    };
    for dir in &profile.write {
        std::fs::create_dir_all(dir).map_err(|e| wrong(dir, e))?;
    }
    if let Some(account) = profile.account {
        for dir in &profile.own {
            rights::give(dir, account).map_err(|e| wrong(dir, e))?;
        }
    }
    Ok(())
}
