//! The sandboxes of a host's spokes, as the supervisor makes them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use lotus_runtime::{Fault, Needs};
use lotus_types::Kind;

use super::{
    Account, Feature, Profile, Program, SandboxConfig, elf, missing, profile, rights, words,
};

/// What the supervisor knows of sandboxes on this host.
#[derive(Debug)]
pub(crate) struct Sandboxes {
    cfg: SandboxConfig,
    root: PathBuf,
    accounts: BTreeMap<String, Account>,
    missing: Vec<(Feature, String)>,
}

/// A spoke that is to be confined.
#[derive(Debug)]
pub(crate) struct Who<'a> {
    pub(crate) service: &'a str,
    pub(crate) program: &'a Path,
    /// What it is given in the environment beside the supervisor's own.
    pub(crate) env: &'a BTreeMap<String, String>,
    /// Whether the sockets that it listens on are handed to it.
    pub(crate) handed: bool,
}

impl Sandboxes {
    /// Reads the configuration, and finds out what the host lacks.
    pub(crate) fn new(cfg: &SandboxConfig, root: &Path) -> Result<Self, Fault> {
        let accounts = if cfg.enabled {
            accounts(cfg, nix::unistd::geteuid().is_root())?
        } else {
            BTreeMap::new()
        };
        Ok(Self {
            missing: if cfg.enabled { missing() } else { Vec::new() },
            cfg: cfg.clone(),
            root: root.to_owned(),
            accounts,
        })
    }

    /// What is missing and makes the sandboxes of this host weaker, one line each.
    pub(crate) fn lacks(&self) -> Vec<String> {
        self.missing
            .iter()
            .filter(|(feature, _)| *feature != Feature::Users)
            .map(|(feature, why)| format!("{feature}: {why}"))
            .collect()
    }

    /// The profile of a spoke, and what `status` says of it; nothing if spokes are not confined.
    pub(crate) fn of(&self, who: &Who<'_>, needs: &Needs) -> io::Result<Option<(Profile, String)>> {
        if !self.cfg.enabled {
            return Ok(None);
        }
        let program = Program {
            file: who.program,
            loader: elf::loader(who.program)?,
            env: who.env,
            handed: who.handed,
            account: self.accounts.get(who.service).copied(),
            shared: &self.root.join("markets/run"),
        };
        let profile = profile(needs, &self.cfg, &program, |name| std::env::var(name).ok());
        let words = words(&profile, &self.missing);
        Ok(Some((profile, words)))
    }

    /// Lets spokes that have users of their own reach what is the supervisor's: their folder, and
    /// the socket on which they say that they are ready.
    pub(crate) fn open_own(&self) -> io::Result<()> {
        let Some(gid) = self.group() else {
            return Ok(());
        };
        let markets = self.root.join("markets");
        std::fs::create_dir_all(markets.join("run"))?;
        for dir in [&self.root, &self.root.join("run"), &markets] {
            rights::pass(dir, gid)?;
        }
        rights::share(&markets.join("run"), gid, 0o070)?;
        rights::share(&self.root.join("run/notify.sock"), gid, 0o020)?;
        let config = markets.join("config.toml");
        if config.exists() {
            rights::share(&config, gid, 0o040)?;
        }
        Ok(())
    }

    /// The same for the hub's sockets, whenever a hub has made them.
    pub(crate) fn open_hub(&self, socket: &Path) -> io::Result<()> {
        let (Some(gid), Some(run)) = (self.group(), socket.parent()) else {
            return Ok(());
        };
        if let Some(repo) = run.parent() {
            rights::pass(repo, gid)?;
        }
        rights::pass(run, gid)?;
        for socket in [socket, &run.join("data.sock")] {
            rights::share(socket, gid, 0o060)?;
        }
        Ok(())
    }

    fn group(&self) -> Option<u32> {
        self.accounts.values().next().map(|a| a.gid)
    }
}

/// The users and the group that the configuration names.
fn accounts(cfg: &SandboxConfig, root: bool) -> Result<BTreeMap<String, Account>, Fault> {
    if cfg.users.is_empty() {
        return Ok(BTreeMap::new());
    }
    let wrong = |what: String, fix: &str| Fault::new(Kind::Config, what, fix);
    if !root {
        return Err(wrong(
            "sandbox.users names users, and the supervisor is not root".into(),
            "run the supervisor as root, or empty sandbox.users",
        ));
    }
    let unknown = |what: &str, name: &str| {
        wrong(
            format!("there is no {what} {name:?}"),
            "make it with `useradd --system` or `groupadd --system`, or give its number",
        )
    };
    let number = |name: &str| name.parse::<u32>().ok();
    let group = |name: &str| Some(nix::unistd::Group::from_name(name).ok()??.gid.as_raw());
    let user = |name: &str| Some(nix::unistd::User::from_name(name).ok()??.uid.as_raw());
    let gid = number(&cfg.group)
        .or_else(|| group(&cfg.group))
        .ok_or_else(|| unknown("group", &cfg.group))?;
    let mut all = BTreeMap::new();
    for (service, name) in &cfg.users {
        let uid = number(name)
            .or_else(|| user(name))
            .ok_or_else(|| unknown("user", name))?;
        if uid == 0 || gid == 0 {
            return Err(wrong(
                format!("sandbox.users.{service} or sandbox.group is root"),
                "name users and a group that have nothing else",
            ));
        }
        all.insert(service.clone(), Account { uid, gid });
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(users: &[(&str, &str)], group: &str) -> SandboxConfig {
        let users = users.iter().map(|(k, v)| ((*k).into(), (*v).into()));
        SandboxConfig {
            users: users.collect(),
            group: group.into(),
            ..SandboxConfig::default()
        }
    }

    #[test]
    fn users_are_names_or_numbers_and_never_root() {
        assert!(accounts(&named(&[], "nonsense"), false).unwrap().is_empty());
        let both = named(&[("deals", "61001"), ("indexing", "61002")], "61000");
        let found = accounts(&both, true).unwrap();
        assert_eq!((found["deals"].uid, found["deals"].gid), (61001, 61000));
        for (cfg, root, word) in [
            (&both, false, "not root"),
            (&named(&[("deals", "root")], "61000"), true, "is root"),
            (&named(&[("deals", "61001")], "0"), true, "is root"),
            (
                &named(&[("deals", "no-such-user")], "61000"),
                true,
                "no-such-user",
            ),
            (
                &named(&[("deals", "61001")], "no-such-group"),
                true,
                "no-such-group",
            ),
        ] {
            let e = accounts(cfg, root).unwrap_err();
            assert_eq!(e.kind, Kind::Config);
            assert!(e.message.contains(word), "{e}");
        }
    }

    #[test]
    fn what_is_missing_is_said_of_those_whom_it_weakens() {
        let profile = Profile::default();
        let lack = |feature| (feature, String::new());
        assert_eq!(words(&profile, &[]), "full");
        assert_eq!(words(&profile, &[lack(Feature::Users)]), "full");
        let old = [lack(Feature::Ports), lack(Feature::Signals)];
        assert_eq!(words(&profile, &old), "without ports, signals");
    }
}
