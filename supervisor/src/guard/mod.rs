//! The proving guard: while the hub makes a proof that must be there in time, processes that can
//! wait get what it leaves of processor and disks.
//!
//! Who is squeezed is a pure function (`decide`); how, is the best of three rungs that the host
//! allows: control groups of version 2, of version 1, or the scheduling of each thread.

mod decide;
mod disks;
mod follow;
mod groups;
mod processor;
mod threads;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lotus_runtime::Fault;
use lotus_types::Kind;
use serde::{Deserialize, Serialize};

pub use decide::Mode;
pub(crate) use decide::{Level, Phase, Work};
pub(crate) use follow::follow;

use disks::Reads;
use groups::{Group, Places};
use processor::Share;

/// `[guard]`: what is squeezed while the hub proves.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GuardConfig {
    /// Squeeze spokes, and each `[process.NAME]` that says so itself, while the hub makes a proof.
    pub enabled: bool,
    /// What is done to spokes: "squeeze", "freeze" or "off".
    pub spokes: Mode,
    /// The same for single spokes, by name.
    pub services: BTreeMap<String, Mode>,
    /// Seconds before the close of a deadline that is not proven yet, at which those set to
    /// "freeze" are stopped altogether until it is.
    pub freeze_secs: u64,
    /// MiB a second that each squeezed process may read of each disk whose scheduler knows no
    /// weights (any but bfq); 0 for no bound. It takes control groups.
    pub disk_mib_per_sec: u32,
    /// Percent of all processors that each squeezed process may take; 0 for no bound. It takes
    /// control groups.
    pub cpu_percent: u32,
}

impl Default for GuardConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            spokes: Mode::Squeeze,
            services: BTreeMap::new(),
            freeze_secs: 300,
            // 32 reads ahead, about a third of what a hard disk seeks.
            disk_mib_per_sec: 4,
            cpu_percent: 5,
        }
    }
}

impl GuardConfig {
    /// What may be done to a process that asks for `mode`.
    pub(crate) const fn of(&self, mode: Mode) -> Mode {
        if self.enabled { mode } else { Mode::Off }
    }

    /// What may be done to a spoke.
    pub(crate) fn of_spoke(&self, service: &str) -> Mode {
        self.of(self.services.get(service).copied().unwrap_or(self.spokes))
    }

    /// Refuses names that are no spokes.
    pub(crate) fn check(&self, spokes: &[String]) -> Result<(), Fault> {
        match self.services.keys().find(|name| !spokes.contains(name)) {
            None => Ok(()),
            Some(unknown) => Err(Fault::new(
                Kind::Config,
                format!("guard.services names {unknown:?}, which is no spoke here"),
                "name spokes of spokes.services; a [process.NAME] has its own `guard`",
            )),
        }
    }
}

/// What a squeezed process may take even if nobody else wants it: where weights do not count.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds {
    /// Of each disk whose scheduler knows no weights.
    reads: Option<Reads>,
    /// Of the processors.
    share: Option<Share>,
}

impl Bounds {
    fn new(cfg: &GuardConfig) -> Self {
        // One processor if nobody can tell: a bound that is too low is over with the proof.
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            reads: Reads::new(cfg.disk_mib_per_sec),
            share: Share::new(cfg.cpu_percent, processors),
        }
    }
}

/// How a process is squeezed.
#[derive(Debug)]
enum Rung {
    Group(Group),
    Threads,
    /// Not at all, and why.
    None(String),
}

impl Rung {
    fn name(&self) -> &'static str {
        match self {
            Self::Group(group) => group.name(),
            Self::Threads => "threads",
            Self::None(_) => "none",
        }
    }
}

/// How a process could be squeezed that this one starts, or why not at all. Changes nothing.
pub(crate) fn rung(root: &Path) -> Result<String, String> {
    Places::find(root).usable().or_else(|first| {
        threads::reversible(std::process::id())
            .map(|()| "threads".to_owned())
            .map_err(|second| format!("{first}; {second}"))
    })
}

/// What the guard has of one process.
#[derive(Debug, Default)]
pub(crate) struct Held {
    mode: Mode,
    /// Chosen when it starts.
    rung: Option<Rung>,
    pub(crate) level: Level,
    /// For what it is squeezed.
    reason: String,
    squeezes: u64,
    /// An event says that it is squeezed.
    told: bool,
}

impl Held {
    pub(crate) fn new(mode: Mode) -> Self {
        Self {
            mode,
            ..Self::default()
        }
    }

    /// The rung, the level and the reason for `status`.
    pub(crate) fn status(&self) -> (String, String, String) {
        let Some(rung) = &self.rung else {
            return Default::default();
        };
        let reason = match rung {
            Rung::None(why) => why.clone(),
            _ => self.reason.clone(),
        };
        (rung.name().into(), self.level.name().into(), reason)
    }

    /// Lets a process go on that is to end.
    pub(crate) fn thaw(&mut self) {
        if self.level != Level::Frozen {
            return;
        }
        self.level = Level::Squeezed;
        if let Some(Rung::Group(group)) = &self.rung
            && let Err(e) = group.thaw()
        {
            tracing::error!(%e, "not thawed");
        }
    }

    /// The process is gone.
    pub(crate) fn gone(&mut self) {
        if let Some(Rung::Group(group)) = &self.rung {
            if self.level != Level::Free
                && let Err(e) = group.release()
            {
                tracing::warn!(%e, "the group of a process that ended is not released");
            }
            group.remove();
        }
        self.rung = None;
        self.level = Level::Free;
        self.told = false;
        self.reason.clear();
    }

    /// Does to process `pid` what `level` says.
    fn apply(&self, pid: u32, bounds: Bounds) -> std::io::Result<()> {
        match (&self.rung, self.level) {
            (Some(Rung::Group(group)), Level::Free) => {
                let released = group.release();
                released.and(threads::release(pid, threads::What::Disk))
            }
            (Some(Rung::Group(group)), level) => {
                group.add(pid)?;
                group.squeeze(bounds)?;
                // Weights need a scheduler of the disk that knows them; the class of a thread is
                // known by more of them.
                if !group.has_disk_class() {
                    threads::squeeze(pid, threads::What::Disk)?;
                }
                if level == Level::Frozen {
                    group.freeze()
                } else {
                    group.thaw()
                }
            }
            (Some(Rung::Threads), Level::Free) => threads::release(pid, threads::What::All),
            (Some(Rung::Threads), _) => threads::squeeze(pid, threads::What::All),
            (Some(Rung::None(_)) | None, _) => Ok(()),
        }
    }

    pub(crate) fn publish(&self, name: &str) {
        let Some(rung) = &self.rung else { return };
        let level = match self.level {
            Level::Free => 0.0,
            Level::Squeezed => 1.0,
            Level::Frozen => 2.0,
        };
        metrics::gauge!("lotus_supervisor_guard_level",
            "process" => name.to_owned(), "rung" => rung.name())
        .set(level);
        metrics::counter!("lotus_supervisor_guard_squeezes_total", "process" => name.to_owned())
            .absolute(self.squeezes);
    }
}

/// A change that was made, for logs and events.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) from: Level,
    pub(crate) to: Level,
    pub(crate) rung: &'static str,
    pub(crate) reason: String,
    /// Whether an event tells it. Deadlines are rare enough; blocks may be won all the time, and
    /// are counted.
    pub(crate) event: bool,
}

/// What the guard knows.
#[derive(Debug)]
pub(crate) struct Guard {
    root: PathBuf,
    freeze_before: u64,
    bounds: Bounds,
    places: Option<Places>,
    work: Vec<Work>,
}

impl Guard {
    /// The guard of the supervisor on `root`. What a dead one squeezed is released at once; if
    /// the hub still proves, it says so and they are squeezed again.
    pub(crate) fn new(root: &Path, cfg: &GuardConfig) -> Self {
        let places = Places::find(root);
        places.sweep();
        Self {
            root: root.to_path_buf(),
            freeze_before: cfg.freeze_secs.saturating_mul(1000),
            bounds: Bounds::new(cfg),
            places: None,
            work: Vec::new(),
        }
    }

    /// The hub said what it proves.
    pub(crate) fn told(&mut self, work: Vec<Work>) {
        self.work = work;
    }

    /// Chooses the rung of a process that runs, and makes its group. Not for one that is left
    /// alone.
    pub(crate) fn take(&mut self, held: &mut Held, name: &str, pid: u32) {
        if held.mode == Mode::Off {
            return;
        }
        let places = self.places.get_or_insert_with(|| Places::find(&self.root));
        let grouped = places.group(name, held.mode == Mode::Freeze).and_then(|g| {
            let made = g.add(pid).and_then(|()| g.release());
            made.map_err(|e| format!("{}: {e}", g.name()))?;
            Ok(g)
        });
        let rung = match grouped {
            Ok(group) => Rung::Group(group),
            Err(first) => match threads::reversible(pid) {
                Ok(()) => Rung::Threads,
                Err(second) => Rung::None(format!("{first}; {second}")),
            },
        };
        if let Rung::None(why) = &rung {
            tracing::warn!(
                process = name,
                why,
                "it can not be squeezed while the hub proves"
            );
        } else {
            tracing::debug!(process = name, rung = rung.name(), "guarded");
        }
        let freezes = matches!(&rung, Rung::Group(group) if group.freezes());
        if held.mode == Mode::Freeze && !freezes {
            tracing::warn!(
                process = name,
                "nothing can freeze it here: it is only squeezed"
            );
            held.mode = Mode::Squeeze;
        }
        held.rung = Some(rung);
        held.level = Level::Free;
    }

    /// A process that was found alive: what the dead supervisor did to its threads is undone.
    pub(crate) fn found(&mut self, held: &mut Held, name: &str, pid: u32, squeezed: bool) {
        self.take(held, name, pid);
        if (squeezed || held.mode != Mode::Off)
            && let Err(e) = threads::release(pid, threads::What::All)
        {
            tracing::warn!(process = name, %e, "not released");
        }
    }

    /// Notes what is to be done to a process now. What there is to do or to tell, if anything.
    pub(crate) fn decide(&self, held: &mut Held, phase: Phase) -> Option<Change> {
        let rung = match &held.rung {
            Some(Rung::None(_)) | None => return None,
            Some(rung) => rung.name(),
        };
        let now = unix_ms();
        let to = decide::level(held.mode, phase, &self.work, now, self.freeze_before);
        let from = std::mem::replace(&mut held.level, to);
        held.reason = match to {
            Level::Free => String::new(),
            _ => decide::reason(&self.work, now),
        };
        let window = self.work.iter().any(|w| w.window);
        let untold = to != Level::Free && window && !held.told;
        if from == to && !untold {
            return None;
        }
        held.squeezes += u64::from(from == Level::Free && to != Level::Free);
        let event = if to == Level::Free { held.told } else { window };
        held.told = to != Level::Free && (held.told || window);
        Some(Change {
            from,
            to,
            rung,
            reason: held.reason.clone(),
            event,
        })
    }

    /// Does what was decided.
    pub(crate) fn apply(&self, held: &Held, name: &str, pid: u32) {
        if let Err(e) = held.apply(pid, self.bounds) {
            tracing::warn!(process = name, level = held.level.name(), %e, "the guard failed");
        }
    }

    /// When something changes without anybody saying so.
    pub(crate) fn due(&self, freezes: bool) -> Option<Instant> {
        if self.work.is_empty() {
            return None;
        }
        let now = unix_ms();
        let next = decide::next(freezes, &self.work, now, self.freeze_before)?;
        Some(Instant::now() + Duration::from_millis(next - now))
    }
}

fn unix_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_are_told_and_blocks_are_counted() {
        let mut guard = Guard {
            root: PathBuf::new(),
            freeze_before: 0,
            bounds: Bounds::default(),
            places: None,
            work: Vec::new(),
        };
        let mut held = Held {
            rung: Some(Rung::Threads),
            ..Held::new(Mode::Squeeze)
        };
        let work = |window, what: &str| Work {
            window,
            what: what.into(),
            closes: None,
        };
        let (block, deadline) = (work(false, "block"), work(true, "deadline"));
        let mut step = |now: &[&Work], held: &mut Held| {
            guard.told(now.iter().copied().cloned().collect());
            let change = guard.decide(held, Phase::Working);
            change.map(|c| (c.from, c.to, c.event))
        };
        use Level::{Free, Squeezed};
        for (now, wanted) in [
            (vec![&block], Some((Free, Squeezed, false))),
            (vec![], Some((Squeezed, Free, false))),
            (vec![&deadline], Some((Free, Squeezed, true))),
            (vec![&deadline, &block], None),
            (vec![&block], None),
            (vec![], Some((Squeezed, Free, true))),
            // The deadline comes while a block is made.
            (vec![&block], Some((Free, Squeezed, false))),
            (vec![&block, &deadline], Some((Squeezed, Squeezed, true))),
            (vec![&deadline], None),
            (vec![], Some((Squeezed, Free, true))),
        ] {
            assert_eq!(step(&now, &mut held), wanted, "{now:?}");
        }
        assert_eq!(held.squeezes, 3);
        step(&[&deadline], &mut held);
        let (rung, level, reason) = held.status();
        assert_eq!(
            (&*rung, &*level, &*reason),
            ("threads", "squeezed", "deadline")
        );
        held.gone();
        assert_eq!(held.status(), Default::default());
    }

    #[test]
    fn nobody_is_squeezed_without_a_way() {
        let mut guard = Guard {
            root: PathBuf::new(),
            freeze_before: 0,
            bounds: Bounds::default(),
            places: None,
            work: Vec::new(),
        };
        guard.told(vec![Work {
            window: true,
            what: "deadline".into(),
            closes: None,
        }]);
        let mut held = Held {
            rung: Some(Rung::None("no rights".into())),
            ..Held::new(Mode::Squeeze)
        };
        assert!(guard.decide(&mut held, Phase::Working).is_none());
        assert_eq!(
            held.status(),
            ("none".into(), String::new(), "no rights".into())
        );
        // One that is left alone has no rung.
        let mut held = Held::new(Mode::Off);
        assert!(guard.decide(&mut held, Phase::Working).is_none());
        assert!(guard.due(true).is_none(), "nothing wakes for it");
    }
}
