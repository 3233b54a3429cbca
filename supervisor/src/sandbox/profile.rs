//! What a spoke is confined to: from what it says it needs, and what the operator adds.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use lotus_runtime::Needs;
use serde::{Deserialize, Serialize};

/// `[sandbox]`: spokes reach what they need, and nothing else.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SandboxConfig {
    /// Confine spokes.
    pub enabled: bool,
    /// TCP ports that spokes may connect to, beside those that their configuration names.
    pub connect: Vec<u16>,
    /// Files and folders that spokes may read, beside those that they need.
    pub read: Vec<PathBuf>,
    /// User of a spoke by its name, as a name or a number: `deals = "lotus-deals"`. Those that
    /// are not named run as the supervisor's user. Needs a supervisor that runs as root.
    pub users: BTreeMap<String, String>,
    /// Group, as a name or a number, through which spokes with a user of their own reach the
    /// hub's sockets.
    pub group: String,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            connect: Vec::new(),
            read: Vec::new(),
            users: BTreeMap::new(),
            group: "lotus-spokes".into(),
        }
    }
}

/// A user of the operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    /// Its only group.
    pub(crate) gid: u32,
}

/// What a process is confined to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Profile {
    /// Files and folders to read.
    pub(crate) read: Vec<PathBuf>,
    /// Folders to write in.
    pub(crate) write: Vec<PathBuf>,
    /// Those of them that belong to its account alone.
    pub(crate) own: Vec<PathBuf>,
    /// Devices to read and write.
    pub(crate) devices: Vec<PathBuf>,
    /// Programs to run: itself and its loader.
    pub(crate) run: Vec<PathBuf>,
    /// TCP ports to connect to.
    pub(crate) connect: Vec<u16>,
    /// TCP ports to bind; 0 is one that the system picks.
    pub(crate) bind: Vec<u16>,
    /// Variables of the environment that it gets beside [`VARIABLES`].
    pub(crate) variables: Vec<String>,
    /// Another user than the supervisor's.
    pub(crate) account: Option<Account>,
}

/// What a program needs that is linked to shared libraries, on any host. Not `/etc`: it has the
/// password hashes and private keys of others, and a spoke of a supervisor that is root is root to
/// the file system. Not `/proc`: it has the memory and the environment of every process, and a
/// rule on `/proc/self` would have to be made before that is the program's.
const SYSTEM: &[&str] = &[
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/passwd",
    "/etc/group",
    "/sys/devices/system/cpu/online",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
];

/// Whom a spoke may write to that is no file of its own.
const DEVICES: &[&str] = &["/dev/null"];

/// Variables that a spoke gets from the supervisor's environment. The others stay outside: a
/// token of the node is often in one of them.
const VARIABLES: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LANGUAGE",
    "TZ",
    "TMPDIR",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "LOTUS_NOTIFY_FD",
    "LOTUS_FENCE_FD",
    "LOTUS_HUB_MARKETS",
    "NO_COLOR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "LD_LIBRARY_PATH",
    "INVOCATION_ID",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
];
/// The same, by how their names begin.
const PREFIXES: &[&str] = &[
    "LC_",
    "RUST_",
    "OTEL_",
    "TOKIO_",
    "MALLOC_",
    "LISTEN_",
    "LOTUS_MARKETS__",
];

/// Variables that name files to read, separated by colons.
const PATHS: &[&str] = &["SSL_CERT_FILE", "SSL_CERT_DIR", "LD_LIBRARY_PATH"];

/// What is known of the program that is to be confined.
#[derive(Debug)]
pub(crate) struct Program<'a> {
    /// Its file.
    pub(crate) file: &'a Path,
    /// The loader that it asks for.
    pub(crate) loader: Option<PathBuf>,
    /// What it is given in the environment beside the supervisor's own.
    pub(crate) env: &'a BTreeMap<String, String>,
    /// Whether the sockets that it listens on are handed to it.
    pub(crate) handed: bool,
    /// Another user than the supervisor's.
    pub(crate) account: Option<Account>,
    /// The folder that spokes share for their addresses.
    pub(crate) shared: &'a Path,
}

/// The profile of a program that says it needs `needs`. `inherited` looks up the supervisor's
/// environment.
pub(crate) fn profile(
    needs: &Needs,
    cfg: &SandboxConfig,
    program: &Program<'_>,
    inherited: impl Fn(&str) -> Option<String>,
) -> Profile {
    let paths = |all: &[&str]| all.iter().map(PathBuf::from).collect::<Vec<_>>();
    let variable = |name: &str| program.env.get(name).cloned().or_else(|| inherited(name));
    let mut read = paths(SYSTEM);
    for name in PATHS {
        let value = variable(name).unwrap_or_default();
        let named = value.split(':').filter(|p| p.starts_with('/'));
        read.extend(named.map(PathBuf::from));
    }
    read.extend(needs.read.iter().chain(&cfg.read).cloned());
    let mut run = vec![program.file.to_owned()];
    run.extend(program.loader.clone());
    let mut connect: Vec<u16> = needs.connect.iter().chain(&cfg.connect).copied().collect();
    let mut bind = needs.bind.clone();
    if !program.handed {
        bind.extend(needs.sockets.iter().map(|s| s.address.port()));
    }
    for ports in [&mut connect, &mut bind] {
        ports.sort_unstable();
        ports.dedup();
    }
    // Connecting to port 0 is no connection.
    connect.retain(|port| *port != 0);
    for paths in [&mut read, &mut run] {
        paths.sort();
        paths.dedup();
    }
    let own = needs.write.iter().filter(|dir| *dir != program.shared);
    Profile {
        read,
        own: own.cloned().collect(),
        write: needs.write.clone(),
        devices: paths(DEVICES),
        run,
        connect,
        bind,
        variables: program.env.keys().cloned().collect(),
        account: program.account,
    }
}

impl Profile {
    /// Whether the program gets a variable of the environment.
    pub(crate) fn keeps(&self, name: &OsStr) -> bool {
        let Some(name) = name.to_str() else {
            return false;
        };
        VARIABLES.contains(&name)
            || PREFIXES.iter().any(|p| name.starts_with(p))
            || self.variables.iter().any(|v| v == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_runtime::Socket;

    fn needs() -> Needs {
        Needs {
            sockets: vec![Socket {
                name: "deals".into(),
                address: ([127, 0, 0, 1], 7780).into(),
            }],
            read: vec!["/r/markets/config.toml".into()],
            write: vec!["/r/markets/deals".into(), "/r/markets/run".into()],
            connect: vec![443, 80],
            bind: vec![0],
        }
    }

    fn made(cfg: &SandboxConfig, env: &[(&str, &str)]) -> Profile {
        let env = env
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        let program = Program {
            file: Path::new("/opt/lotus/lotus-markets"),
            loader: Some("/lib64/ld.so".into()),
            env: &env,
            handed: cfg.connect.is_empty(),
            account: None,
            shared: Path::new("/r/markets/run"),
        };
        let inherited = |name: &str| (name == "SSL_CERT_DIR").then(|| "/a:/b:relative".into());
        profile(&needs(), cfg, &program, inherited)
    }

    #[test]
    fn a_profile_has_what_is_needed_and_what_the_operator_adds() {
        let p = made(&SandboxConfig::default(), &[]);
        assert_eq!(p.write, needs().write);
        assert_eq!(p.own, ["/r/markets/deals"].map(PathBuf::from));
        assert_eq!(p.connect, [80, 443]);
        assert_eq!(p.bind, [0], "its socket is handed to it");
        let run: Vec<PathBuf> = vec!["/lib64/ld.so".into(), "/opt/lotus/lotus-markets".into()];
        assert_eq!(p.run, run);
        for path in ["/r/markets/config.toml", "/usr/lib", "/a", "/b"] {
            assert!(p.read.contains(&path.into()), "{path}");
        }
        let cfg = SandboxConfig {
            connect: vec![8080, 0],
            read: vec!["/srv".into()],
            ..SandboxConfig::default()
        };
        let p = made(&cfg, &[("SSL_CERT_DIR", "/c")]);
        assert_eq!(p.connect, [80, 443, 8080]);
        assert_eq!(p.bind, [0, 7780], "it binds its socket");
        assert!(p.read.contains(&"/srv".into()) && p.read.contains(&"/c".into()));
        assert!(!p.read.contains(&"/a".into()), "its own setting counts");
        let text = serde_json::to_string(&p).unwrap();
        assert_eq!(serde_json::from_str::<Profile>(&text).unwrap(), p);
    }

    /// No profile has a folder above what is to be kept from spokes.
    #[test]
    fn no_profile_has_a_folder_of_secrets() {
        let p = made(&SandboxConfig::default(), &[]);
        let secrets = [
            "/etc/shadow",
            "/etc/ssl/private/key.pem",
            "/proc/1/environ",
            "/root/.ssh/id_ed25519",
            "/home/u/x",
            "/r/supervisor.toml",
            "/r/run/supervisor.sock",
            "/r/miner/config.toml",
            "/r/miner/keystore/x",
            "/r/markets/retrieval/x",
            "/r/devnet/token",
            "/sys/fs/cgroup/x",
            "/dev/mem",
            "/bin/sh",
            "/usr/bin/env",
        ];
        let all = [&p.read, &p.write, &p.devices, &p.run];
        for secret in secrets {
            for path in all.iter().flat_map(|paths| paths.iter()) {
                assert!(
                    !Path::new(secret).starts_with(path),
                    "{path:?} has {secret}"
                );
            }
        }
    }

    #[test]
    fn the_environment_of_the_supervisor_stays_outside() {
        let p = made(&SandboxConfig::default(), &[("MINE", "1")]);
        for (name, kept) in [
            ("PATH", true),
            ("RUST_LOG", true),
            ("LOTUS_MARKETS__DEALS__LISTEN", true),
            ("LISTEN_FDS", true),
            ("MINE", true),
            ("FULLNODE_API_INFO", false),
            ("LOTUS_MINER__NODE__TOKEN", false),
            ("AWS_SECRET_ACCESS_KEY", false),
            ("LD_PRELOAD", false),
            ("PATHS", false),
        ] {
            assert_eq!(p.keeps(OsStr::new(name)), kept, "{name}");
        }
    }
}
