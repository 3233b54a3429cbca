//! The processes of a host, as the configuration asks for them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lotus_runtime::Fault;
use lotus_types::Kind;

use crate::config::{Config, Limits, Readiness, Strategy};
use crate::guard::Mode;
use crate::needs;

/// What to run, and after what.
#[derive(Clone, Debug)]
pub struct Process {
    /// Name in `status` and of the log file.
    pub name: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Added to the supervisor's own environment.
    pub env: BTreeMap<String, String>,
    /// Names of those that must be ready before it is started.
    pub after: Vec<String>,
    /// Those of `after` without which it is stopped.
    pub requires: Vec<String>,
    /// What it does when one of them ends.
    pub strategy: Strategy,
    /// When it counts as ready.
    pub ready: Readiness,
    /// How long it may take until it is ready.
    pub start: Duration,
    /// How long it may take to end after SIGTERM.
    pub stop: Duration,
    /// Whether SIGUSR1 makes it finish what is open and end.
    pub drains: bool,
    /// How long it may give no sign of life once it is ready.
    pub watchdog: Option<Duration>,
    /// Whether it may be given up when it ends by itself too often.
    pub may_fail: bool,
    /// A one-shot is done when it ends well; it is skipped when this path exists.
    pub creates: Option<PathBuf>,
    /// Where its health is served: a file with the address, which it writes at its start.
    pub health: Option<PathBuf>,
    /// Socket of the hub that says whether a stop is safe now.
    pub safety: Option<PathBuf>,
    /// What may be done to it while the hub proves.
    pub guard: Mode,
    /// Command that prints what it needs from its host; empty for one that does not say.
    pub needs: Vec<String>,
    /// Whether the supervisor binds the sockets that it needs, and hands them over.
    pub hand_sockets: bool,
}

impl Process {
    /// A process that starts at once and knows nothing of us.
    #[must_use]
    pub fn new(name: &str, command: Vec<String>) -> Self {
        let limits = Limits::default();
        Self {
            name: name.into(),
            command,
            env: BTreeMap::new(),
            after: Vec::new(),
            requires: Vec::new(),
            strategy: Strategy::OneForOne,
            ready: Readiness::AtOnce,
            start: Duration::from_secs(limits.start_secs),
            stop: Duration::from_secs(limits.stop_secs),
            drains: false,
            watchdog: None,
            may_fail: false,
            creates: None,
            health: None,
            safety: None,
            guard: Mode::Off,
            needs: Vec::new(),
            hand_sockets: false,
        }
    }

    /// Its own time limits, in seconds; 0 for those of all.
    fn within(mut self, start_secs: u64, stop_secs: u64) -> Self {
        if start_secs > 0 {
            self.start = Duration::from_secs(start_secs);
        }
        if stop_secs > 0 {
            self.stop = Duration::from_secs(stop_secs);
        }
        self
    }

    /// Whether it is stopped when `name` ends or is stopped.
    #[must_use]
    pub fn goes_with(&self, name: &str) -> bool {
        let has = |all: &[String]| all.iter().any(|n| n == name);
        has(&self.requires) || (self.strategy == Strategy::RestForOne && has(&self.after))
    }

    /// Whether it ends by itself.
    #[must_use]
    pub const fn is_oneshot(&self) -> bool {
        self.creates.is_some()
    }
}

/// The processes of a host, each after those that it needs.
pub fn of_host(cfg: &Config, root: &Path, bin: &Path) -> Result<Vec<Process>, Fault> {
    let exe = |name: &str| -> Result<String, Fault> {
        let path = bin.join(name);
        if !path.is_file() {
            return Err(Fault::new(
                Kind::Config,
                format!("{} does not exist", path.display()),
                "install all binaries in one folder, or name it with --bin-dir",
            ));
        }
        Ok(path.display().to_string())
    };
    let dir_of = |name: &str| root.join(name).display().to_string();
    let watchdog = |secs: u64| (secs > 0).then(|| Duration::from_secs(secs));
    let process = |name: &str, command: Vec<String>| {
        Process::new(name, command).within(cfg.limits.start_secs, cfg.limits.stop_secs)
    };
    let ours = |name: &str, command: Vec<String>| Process {
        ready: Readiness::Told,
        drains: true,
        watchdog: watchdog(cfg.limits.watchdog_secs),
        ..process(name, command)
    };
    // What one requires it also comes after.
    let both = |after: &[String], requires: &[String]| {
        let more = requires.iter().filter(|r| !after.contains(r));
        after.iter().chain(more).cloned().collect::<Vec<_>>()
    };
    let words = |all: &[&str]| all.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();

    let mut out = Vec::new();
    for (name, p) in &cfg.process {
        out.push(Process {
            env: p.env.clone(),
            after: both(&p.after, &p.requires),
            requires: p.requires.clone(),
            strategy: p.strategy,
            ready: p.ready,
            watchdog: watchdog(p.watchdog_secs),
            may_fail: true,
            guard: cfg.guard.of(p.guard),
            ..process(name, p.command.clone()).within(p.start_secs, p.stop_secs)
        });
    }
    let mut introduced_after = Vec::new();
    let mut hub_after = both(&cfg.hub.after, &cfg.hub.requires);
    if cfg.devnet.enabled {
        let mut command = words(&[&exe("lotus-devnet")?, "run", "--repo", &dir_of("devnet")]);
        command.extend(cfg.devnet.args.iter().cloned());
        out.push(Process {
            env: cfg.devnet.env.clone(),
            ..ours("devnet", command).within(cfg.devnet.start_secs, cfg.devnet.stop_secs)
        });
        let command = words(&[
            &exe("lotus-miner")?,
            "init",
            "--repo",
            &dir_of("miner"),
            "--actor",
            &cfg.devnet.actor,
            "--node-repo",
            &dir_of("devnet"),
        ]);
        out.push(Process {
            env: cfg.hub.env.clone(),
            after: words(&["devnet"]),
            creates: Some(root.join("miner/config.toml")),
            ..process("hub-init", command)
        });
        hub_after.extend(words(&["devnet", "hub-init"]));
        introduced_after = words(&["hub-init"]);
    }
    let socket = root.join("miner/run/hub.sock");
    let mut spokes_after = Vec::new();
    if cfg.hub.enabled {
        let mut command = words(&[&exe("lotus-miner")?, "run", "--repo", &dir_of("miner")]);
        command.extend(cfg.hub.args.iter().cloned());
        out.push(Process {
            env: cfg.hub.env.clone(),
            after: hub_after,
            requires: cfg.hub.requires.clone(),
            safety: Some(socket.clone()),
            ..ours("hub", command).within(cfg.hub.start_secs, cfg.hub.stop_secs)
        });
        spokes_after = words(&["hub"]);
    }
    for service in &cfg.spokes.services {
        let mut env = BTreeMap::new();
        let mut after = spokes_after.clone();
        if cfg.hub.enabled {
            let addr = format!("unix:{}", socket.display());
            env.insert("LOTUS_MARKETS__HUB__ADDR".to_owned(), addr);
            // Where the service looks for it, whatever its settings say of others.
            let identity = root.join(format!("markets/{service}/identity"));
            let dir = identity.display().to_string();
            env.insert("LOTUS_MARKETS__HUB__IDENTITY".to_owned(), dir.clone());
            let name = format!("{service}-identity");
            let command = words(&[
                &exe("lotus-miner")?,
                "join-bundle",
                "--repo",
                &dir_of("miner"),
                "--service",
                service,
                "--identity",
                &dir,
            ]);
            out.push(Process {
                env: cfg.hub.env.clone(),
                after: introduced_after.clone(),
                may_fail: true,
                creates: Some(identity.join("identity.json")),
                ..process(&name, command)
            });
            after.push(name);
        }
        env.extend(cfg.spokes.env.clone());
        let services = format!("--services={service}");
        let command = words(&[
            &exe("lotus-markets")?,
            "run",
            &services,
            "--repo",
            &dir_of("markets"),
        ]);
        out.push(Process {
            env,
            after,
            strategy: Strategy::Reconnect,
            may_fail: true,
            health: Some(root.join(format!("markets/run/{service}-admin.addr"))),
            guard: cfg.guard.of_spoke(service),
            needs: needs::of_spoke(&exe("lotus-markets")?, service, &root.join("markets")),
            hand_sockets: cfg.spokes.hand_sockets,
            ..ours(service, command).within(cfg.spokes.start_secs, cfg.spokes.stop_secs)
        });
    }
    cfg.guard.check(&cfg.spokes.services)?;
    check(&out)?;
    Ok(out)
}

/// Names, commands and the graph.
fn check(all: &[Process]) -> Result<(), Fault> {
    let wrong = |what: String, fix: &str| Err(Fault::new(Kind::Config, what, fix));
    for (i, p) in all.iter().enumerate() {
        let valid = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if p.name.is_empty() || p.name.len() > 64 || !p.name.chars().all(valid) {
            return wrong(
                format!("{:?} is no name of a process", p.name),
                "use up to 64 letters, digits and hyphens",
            );
        }
        if all[..i].iter().any(|q| q.name == p.name) {
            return wrong(
                format!("{:?} is named twice", p.name),
                "name each service once in spokes.services, and no [process] like one of ours",
            );
        }
        if p.command.is_empty() {
            return wrong(
                format!("process.{} has no command", p.name),
                "give the program and its arguments as a list: command = [\"/usr/bin/x\", \"-v\"]",
            );
        }
        if let Some(unknown) = p.after.iter().find(|a| !all.iter().any(|q| q.name == **a)) {
            return wrong(
                format!("{} comes after {unknown:?}, which does not exist", p.name),
                "name processes of this supervisor in `after`",
            );
        }
    }
    // Whoever can start is taken away until nobody is left.
    let mut left: Vec<&Process> = all.iter().collect();
    loop {
        let before = left.len();
        let names: Vec<&str> = left.iter().map(|p| p.name.as_str()).collect();
        left.retain(|p| p.after.iter().any(|a| names.contains(&a.as_str())));
        if left.is_empty() {
            return Ok(());
        }
        if left.len() == before {
            return wrong(
                format!("they wait for each other: {}", names.join(", ")),
                "break the circle in `after`",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binaries() -> tempfile::TempDir {
        let bin = tempfile::tempdir().unwrap();
        for name in ["lotus-devnet", "lotus-miner", "lotus-markets"] {
            std::fs::write(bin.path().join(name), "").unwrap();
        }
        bin
    }

    #[test]
    fn each_process_comes_after_what_it_needs() {
        let bin = binaries();
        let mut cfg = Config::default();
        cfg.devnet.enabled = true;
        let all = of_host(&cfg, Path::new("/r"), bin.path()).unwrap();
        let names: Vec<&str> = all.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "devnet",
                "hub-init",
                "hub",
                "deals-identity",
                "deals",
                "retrieval-identity",
                "retrieval",
                "indexing-identity",
                "indexing"
            ]
        );
        for (i, p) in all.iter().enumerate() {
            for a in &p.after {
                assert!(names[..i].contains(&a.as_str()), "{} after {a}", p.name);
            }
        }
    }

    #[test]
    fn spokes_get_an_identity_before_they_start() {
        let all = of_host(&Config::default(), Path::new("/r"), binaries().path()).unwrap();
        let of = |name: &str| all.iter().find(|p| p.name == name).unwrap();
        let made = of("deals-identity");
        let dir = "/r/markets/deals/identity";
        assert_eq!(made.creates, Some(Path::new(dir).join("identity.json")));
        assert_eq!(made.command[1], "join-bundle");
        assert!(made.command.ends_with(&["--identity".into(), dir.into()]));
        assert!(made.after.is_empty(), "the hub need not run");
        assert_eq!(of("deals").after, ["hub", "deals-identity"]);
        assert_eq!(of("deals").env["LOTUS_MARKETS__HUB__IDENTITY"], dir);

        let mut elsewhere = Config::default();
        elsewhere.hub.enabled = false;
        let all = of_host(&elsewhere, Path::new("/r"), binaries().path()).unwrap();
        assert!(all.iter().all(|p| !p.is_oneshot() && p.after.is_empty()));
    }

    #[test]
    fn a_graph_that_cannot_start_is_refused() {
        let bin = binaries();
        let refusal = |text: &str| {
            let cfg: Config = toml::from_str(text).unwrap();
            of_host(&cfg, Path::new("/r"), bin.path())
                .unwrap_err()
                .message
        };
        let twice = refusal("[spokes]\nservices = ['deals', 'deals']");
        assert!(twice.contains("named twice"), "{twice}");
        let ours = refusal("[process.hub]\ncommand = ['x']");
        assert!(ours.contains("named twice"), "{ours}");
        let empty = refusal("[process.a]");
        assert!(empty.contains("no command"), "{empty}");
        let odd = refusal("[process.'../a']\ncommand = ['x']");
        assert!(odd.contains("no name"), "{odd}");
        let unknown = refusal("[process.a]\ncommand = ['x']\nafter = ['b']");
        assert!(unknown.contains("does not exist"), "{unknown}");
        let circle = refusal(
            "[process.a]\ncommand = ['x']\nafter = ['b']\n[process.b]\ncommand = ['x']\nafter = ['a']",
        );
        assert!(circle.contains("wait for each other: a, b"), "{circle}");
    }

    #[test]
    fn the_guard_takes_spokes_and_whoever_asks() {
        let bin = binaries();
        let modes = |text: &str| -> Vec<(String, Mode)> {
            let cfg: Config = toml::from_str(text).unwrap();
            let all = of_host(&cfg, Path::new("/r"), bin.path()).unwrap();
            let guarded = all.into_iter().filter(|p| p.guard != Mode::Off);
            guarded.map(|p| (p.name, p.guard)).collect()
        };
        let named = |all: &[(&str, Mode)]| -> Vec<(String, Mode)> {
            all.iter().map(|(n, m)| ((*n).to_owned(), *m)).collect()
        };
        let others =
            "[process.a]\ncommand = ['x']\n[process.b]\ncommand = ['x']\nguard = 'freeze'\n";
        let (squeeze, freeze) = (Mode::Squeeze, Mode::Freeze);
        let spokes = [
            ("deals", squeeze),
            ("retrieval", squeeze),
            ("indexing", squeeze),
        ];
        assert_eq!(modes(""), named(&spokes));
        assert_eq!(modes(others)[0], ("b".into(), freeze));
        assert_eq!(
            modes("[guard]\nspokes = 'off'\nservices = { retrieval = 'freeze' }"),
            named(&[("retrieval", freeze)])
        );
        assert_eq!(modes(&format!("{others}[guard]\nenabled = false")), []);
        let cfg: Config = toml::from_str("[guard.services]\nretrival = 'off'").unwrap();
        let e = of_host(&cfg, Path::new("/r"), bin.path()).unwrap_err();
        assert!(e.message.contains("retrival"), "{e}");
    }

    #[test]
    fn a_process_has_its_own_limits_and_those_without_which_it_stops() {
        let text = "[spokes]\nservices = ['deals']\nstop_secs = 9\n\
                    [hub]\nrequires = ['node']\nstart_secs = 600\n\
                    [process.node]\ncommand = ['x']\n\
                    [process.extra]\ncommand = ['x']\nafter = ['hub', 'node']\nrequires = ['node']\n\
                    [process.rest]\ncommand = ['x']\nafter = ['hub']\nstrategy = 'rest-for-one'\n";
        let cfg: Config = toml::from_str(text).unwrap();
        let all = of_host(&cfg, Path::new("/r"), binaries().path()).unwrap();
        let of = |name: &str| all.iter().find(|p| p.name == name).unwrap();
        let limits = |name: &str| (of(name).start.as_secs(), of(name).stop.as_secs());
        assert_eq!(limits("node"), (120, 45));
        assert_eq!(limits("hub"), (600, 45));
        assert_eq!(limits("deals"), (120, 9));
        assert_eq!(of("hub").after, ["node"], "it comes after what it requires");
        assert_eq!(of("extra").after, ["hub", "node"], "once");
        let with = |name: &str| {
            let all = all.iter().filter(|p| p.goes_with(name));
            all.map(|p| p.name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(with("node"), ["extra", "hub"]);
        assert_eq!(with("hub"), ["rest"], "an edge at a time");
    }

    #[test]
    fn a_missing_binary_is_named() {
        let e = of_host(&Config::default(), Path::new("/r"), Path::new("/nowhere")).unwrap_err();
        assert!(e.message.contains("/nowhere/lotus-miner"), "{e}");
    }
}
