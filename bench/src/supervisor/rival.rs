//! One supervisor with one process that it keeps running.

use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lotus_e2e::{Failed, secs};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// How long a restart may take, back-off of the others included.
const RESTART: Duration = secs(15);

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A loop of spawn and wait: the floor.
    Floor,
    Ours,
    Runit,
    S6,
    Supervisord,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] = [
        Self::Floor,
        Self::Ours,
        Self::Runit,
        Self::S6,
        Self::Supervisord,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Ours => "lotus-supervisor",
            Self::Runit => "runit",
            Self::S6 => "s6",
            Self::Supervisord => "supervisord",
        }
    }

    /// Program that must be installed, and the Debian package that has it.
    const fn needs(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Floor | Self::Ours => None,
            Self::Runit => Some(("runsv", "runit")),
            Self::S6 => Some(("s6-supervise", "s6")),
            Self::Supervisord => Some(("supervisord", "supervisor")),
        }
    }

    /// What installs a peer that is missing.
    pub(crate) fn missing(self) -> Option<String> {
        let (program, package) = self.needs()?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
        (!found).then(|| format!("apt-get install {package}"))
    }
}

/// What was measured of one.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// From the kill to the first act of the next process, in milliseconds.
    pub(crate) restarts_ms: Vec<f64>,
    /// Restarts that took longer than anybody waits.
    pub(crate) missed: u32,
    pub(crate) idle_wakeups: u32,
    pub(crate) idle_cpu_ms: f64,
    pub(crate) rss_mb: f64,
}

/// A running one.
#[derive(Debug)]
pub(crate) struct Rival {
    pub(crate) kind: Kind,
    pub(crate) measured: Measured,
    process: Child,
    socket: UnixDatagram,
    child: i32,
    /// When the process that runs now said that it does.
    since: Instant,
}

impl Rival {
    /// Starts one in a folder of its own below `base`, which has `tick` and `floor`.
    pub(crate) fn start(kind: Kind, base: &Path, ours: &Path) -> Result<Self, Failed> {
        let dir = base.join(format!("run-{}", kind.name()));
        std::fs::create_dir_all(&dir)?;
        let path = dir.join("socket");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(RESTART))?;
        let mut command = command(kind, base, &dir, ours)?;
        let log = File::create(dir.join("log"))?;
        let process = command
            .env("TICK_SOCKET", &path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|e| Failed::at(kind.name(), e))?;
        let mut rival = Self {
            kind,
            measured: Measured::default(),
            process,
            socket,
            child: 0,
            since: Instant::now(),
        };
        let (pid, _) = rival
            .hear()?
            .ok_or_else(|| Failed(format!("{} starts nothing", kind.name())))?;
        rival.child = pid;
        Ok(rival)
    }

    /// Pid and nanoseconds of the monotonic clock that a new process says; none in time.
    fn hear(&mut self) -> Result<Option<(i32, i64)>, Failed> {
        let mut said = [0u8; 16];
        match self.socket.recv(&mut said) {
            Ok(16) => {}
            Ok(n) => return Err(Failed(format!("{n} bytes from a process"))),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        self.since = Instant::now();
        let word = |at: usize| {
            let mut bytes = [0u8; 8];
            bytes.copy_from_slice(&said[at..at + 8]);
            i64::from_ne_bytes(bytes)
        };
        let pid = i32::try_from(word(0)).map_err(|e| Failed::at("pid", e))?;
        Ok(Some((pid, word(8))))
    }

    /// How old the process is that runs now.
    pub(crate) fn age(&self) -> Duration {
        self.since.elapsed()
    }

    /// Kills the process and takes the time until there is another one.
    pub(crate) fn strike(&mut self) -> Result<(), Failed> {
        let clock = nix::time::ClockId::CLOCK_MONOTONIC;
        let before = clock.now().map_err(|e| Failed::at("clock", e))?;
        kill(Pid::from_raw(self.child), Signal::SIGKILL)
            .map_err(|e| Failed::at(self.kind.name(), e))?;
        let Some((pid, at)) = self.hear()? else {
            self.measured.missed += 1;
            return Ok(());
        };
        self.child = pid;
        let before = before.tv_sec() * 1_000_000_000 + before.tv_nsec();
        let took = Duration::from_nanos(u64::try_from(at - before).unwrap_or(0));
        self.measured.restarts_ms.push(took.as_secs_f64() * 1e3);
        Ok(())
    }

    /// Wake-ups and processor time until now.
    pub(crate) fn cost(&self) -> Result<(u32, f64), Failed> {
        let (mut wakeups, mut nanos) = (0, 0.0);
        let tasks = PathBuf::from(format!("/proc/{}/task", self.process.id()));
        for task in std::fs::read_dir(tasks)? {
            let task = task?.path();
            wakeups += status(&task, "voluntary_ctxt_switches:")?;
            let stat = std::fs::read_to_string(task.join("schedstat"))?;
            let ran = stat
                .split_whitespace()
                .next()
                .and_then(|n| n.parse::<f64>().ok());
            nanos += ran.ok_or_else(|| Failed::new("/proc/PID/schedstat has no time"))?;
        }
        Ok((wakeups, nanos / 1e6))
    }

    /// Resident memory, in MB.
    pub(crate) fn rss_mb(&self) -> Result<f64, Failed> {
        rss_mb(self.process.id())
    }
}

/// Resident memory of a process, in MB.
pub(crate) fn rss_mb(pid: u32) -> Result<f64, Failed> {
    let kb = status(Path::new(&format!("/proc/{pid}")), "VmRSS:")?;
    Ok(f64::from(kb) * 1024.0 / 1e6)
}

/// The number behind a name in the status of a process or of a thread of it.
pub(crate) fn status(dir: &Path, name: &str) -> Result<u32, Failed> {
    std::fs::read_to_string(dir.join("status"))?
        .lines()
        .find_map(|l| {
            l.strip_prefix(name)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .ok_or_else(|| Failed(format!("{} has no {name}", dir.display())))
}

impl Drop for Rival {
    fn drop(&mut self) {
        // Some start their process in a group of its own.
        let ours = [self.process.id().cast_signed(), self.child];
        for pid in ours.into_iter().filter(|pid| *pid > 1) {
            let group = killpg(Pid::from_raw(pid), Signal::SIGKILL);
            if let Err(e) = group.or_else(|_| kill(Pid::from_raw(pid), Signal::SIGKILL))
                && e != nix::errno::Errno::ESRCH
            {
                eprintln!("{} {pid}: {e}", self.kind.name());
            }
        }
        drop(self.process.wait());
    }
}

/// How each is told to keep one process running: its defaults, but for what is said here.
fn command(kind: Kind, base: &Path, dir: &Path, ours: &Path) -> Result<Command, Failed> {
    let tick = base.join("tick");
    let service = dir.join("service");
    Ok(match kind {
        Kind::Floor => {
            let mut c = Command::new(base.join("floor"));
            c.arg(tick);
            c
        }
        Kind::Ours => {
            // A process that lived for a second counts as well: a kill each second is the test
            // here, and in life a loop of crashes. Runit and s6 hold one that lived shorter, and
            // give up nobody.
            let text = format!(
                "[hub]\nenabled = false\n[spokes]\nservices = []\n\
                 [limits]\nhealthy_secs = 1\nrestarts_an_hour = 0\n\
                 [process.tick]\ncommand = [{:?}]\n",
                tick.display().to_string()
            );
            std::fs::write(dir.join("supervisor.toml"), text)?;
            let mut c = Command::new(ours);
            c.args(["run", "--repo"]).arg(dir);
            c
        }
        Kind::Runit | Kind::S6 => {
            std::fs::create_dir_all(&service)?;
            std::fs::copy(&tick, service.join("run"))?;
            let program = if kind == Kind::Runit {
                "runsv"
            } else {
                // Without readiness s6 waits a second after every death.
                std::fs::write(service.join("notification-fd"), "3\n")?;
                "s6-supervise"
            };
            let mut c = Command::new(program);
            c.arg(service);
            if kind == Kind::S6 {
                c.env("TICK_NOTIFY_FD", "3");
            }
            c
        }
        Kind::Supervisord => {
            let conf = dir.join("supervisord.conf");
            let text = format!(
                "[supervisord]\nnodaemon=true\nlogfile=/dev/null\nlogfile_maxbytes=0\npidfile={}\n\
                 [program:tick]\ncommand={}\nautorestart=true\n",
                dir.join("pid").display(),
                tick.display()
            );
            std::fs::write(&conf, text)?;
            let mut c = Command::new("supervisord");
            c.args(["-n", "-c"]).arg(conf);
            c
        }
    })
}
