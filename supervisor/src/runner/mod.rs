//! The effects: one task owns every process, and feeds what happens into the table.

mod asked;
mod found;
mod guarding;
mod happens;
mod host;
mod upgrading;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lotus_runtime::{CancellationToken, Fault, Health, Needs};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::config::{Config, Limits, Strategy};
use crate::events::Events;
use crate::guard::{Guard, Work};
use crate::handover::{PlanWords, Words};
use crate::helper::Helpers;
use crate::needs::Told;
use crate::notify::NotifySocket;
use crate::plan::{Safety, What};
use crate::processes::Process;
use crate::proto::StatusResponse;
use crate::record::Record;
use crate::release::Release;
use crate::sandbox::Sandboxes;
use crate::slot::Slot;
use crate::table::{Ended, Event, State};
use crate::{logs, order, upgrade};

/// What the control socket asks for. The answer is the status after it took effect.
#[derive(Debug)]
pub(crate) enum Request {
    /// Nothing but the status.
    Status,
    /// Start the named process.
    Start(String),
    /// Stop the named process, or everything.
    Stop { name: Option<String>, force: bool },
    /// Restart the named process.
    Restart { name: String, force: bool },
    /// Drain the named process.
    Drain {
        name: String,
        force: bool,
        limit: Duration,
    },
    /// Upgrade to the release in a folder, or go back.
    Upgrade {
        dir: String,
        force: bool,
        back: bool,
    },
    /// This image serves its socket: it is ready.
    Serves,
    /// Know what the named process needs from now on.
    Needs { name: String, needs: Needs },
}

/// A request and where its answer goes.
pub(crate) type Call = (Request, oneshot::Sender<Result<StatusResponse, String>>);

/// What to run, and what was known before.
pub(crate) struct Setup<'a> {
    pub(crate) cfg: Config,
    /// It has the folders `logs` and `run`; the caller holds the supervisor's lock.
    pub(crate) root: &'a Path,
    /// Folder of the binaries.
    pub(crate) bin: PathBuf,
    pub(crate) release: Release,
    pub(crate) processes: Vec<Process>,
    pub(crate) helpers: Helpers,
    /// What the image before this one left.
    pub(crate) before: Option<Left>,
}

/// What a runner leaves for the one of another image.
pub(crate) struct Left {
    /// The socket on which processes say how they are.
    pub(crate) notify: OwnedFd,
    /// Their own sockets, by `PROCESS/NAME`.
    pub(crate) listeners: BTreeMap<String, OwnedFd>,
    pub(crate) words: Words,
}

/// Why a runner is over.
pub(crate) enum Over {
    /// Everything is stopped.
    Stopped,
    /// This process is to go on as another image, with this.
    Leave(PathBuf, Left),
}

/// Something that happened to one run of a process. Events of an earlier run are dropped.
#[derive(Debug)]
enum Happened {
    Ready,
    Healthy(bool),
    Ended(Ended, String),
    /// What it needs, or why that is not known.
    Told(Told),
    /// The hub's answer to a stop that is planned for it.
    Safety(Result<Safety, String>),
    /// What the hub proves.
    Proving(Vec<Work>),
}

/// Owns the processes.
pub(crate) struct Runner {
    slots: Vec<Slot>,
    cfg: Config,
    limits: Limits,
    root: PathBuf,
    bin: PathBuf,
    release: Release,
    upgrade_step: upgrading::Step,
    /// The image to go on as.
    leave: Option<PathBuf>,
    health: Health,
    notify: NotifySocket,
    events: Events,
    writes: logs::Writes,
    rotate_at: Option<Instant>,
    guard: Guard,
    record: Record,
    helpers: Helpers,
    sandboxes: Sandboxes,
    /// Everything is to be stopped; whether at once.
    stopping: Option<Force>,
    tasks: JoinSet<()>,
    happened_tx: mpsc::Sender<(usize, u64, Happened)>,
    happened_rx: mpsc::Receiver<(usize, u64, Happened)>,
}

/// Whether a stop waits until it is safe for the hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Force {
    Waits,
    AtOnce,
}

/// Events that may wait for the runner; senders wait for room.
const QUEUE: usize = 256;
/// How long after a write to a log the sizes are looked at.
const ROTATE_AFTER: Duration = Duration::from_secs(60);

impl Runner {
    /// Takes over what lives of the supervisor before this one.
    pub(crate) fn new(setup: Setup<'_>, health: Health) -> Result<Self, Fault> {
        let Setup {
            cfg,
            root,
            bin,
            release,
            processes,
            helpers,
            before,
        } = setup;
        let (log_dir, run_dir) = (root.join("logs"), root.join("run"));
        std::fs::create_dir_all(&log_dir)?;
        let socket = run_dir.join("notify.sock");
        let (notify, before) = match before {
            Some(left) => (
                NotifySocket::resume(socket.clone(), left.notify),
                Some((left.listeners, left.words)),
            ),
            None => (NotifySocket::bind(socket.clone()), None),
        };
        let notify = notify.map_err(|e| Fault::bind(&socket.display(), "--repo", &e))?;
        let (happened_tx, happened_rx) = mpsc::channel(QUEUE);
        let (record, known) = Record::open(&run_dir)?;
        // Whoever a process leaves behind becomes our child and not a zombie of nobody's.
        if let Err(e) = nix::sys::prctl::set_child_subreaper(true) {
            tracing::warn!(%e, "processes that ours leave behind go to init");
        }
        let slot = |process: Process| {
            let log = log_dir.join(format!("{}.log", process.name));
            let fence = run_dir.join(format!("{}.lock", process.name));
            Slot::new(process, log, fence)
        };
        let guard = Guard::new(root, &cfg.guard);
        let sandboxes = Sandboxes::new(&cfg.sandbox, root)?;
        let mut runner = Self {
            slots: processes.into_iter().map(slot).collect(),
            limits: cfg.limits.clone(),
            cfg,
            root: root.to_owned(),
            bin,
            release,
            upgrade_step: upgrading::Step::default(),
            leave: None,
            health,
            notify,
            events: Events::new(&log_dir),
            writes: logs::Writes::new()?,
            rotate_at: None,
            guard,
            record,
            helpers,
            sandboxes,
            stopping: None,
            tasks: JoinSet::new(),
            happened_tx,
            happened_rx,
        };
        runner.sandboxes_at_start()?;
        for (name, entry) in &known {
            let named = runner.slots.iter().any(|s| s.process.name == *name);
            if !named && entry.alive.is_some() {
                let mut left = slot(Process::new(name, vec!["(removed)".into()]));
                left.removed = true;
                runner.slots.push(left);
            }
        }
        for i in 0..runner.slots.len() {
            runner.take_over(i, known.get(&runner.slots[i].process.name))?;
        }
        runner.resume(before);
        Ok(runner)
    }

    /// Goes on with what the image before this one, or a supervisor that was killed, left.
    fn resume(&mut self, before: Option<(BTreeMap<String, OwnedFd>, Words)>) {
        let Some((listeners, words)) = before else {
            if self.release.upgrade.is_some() {
                let why = "the supervisor was killed in the middle of it";
                self.upgrade_event(upgrade::Event::Interrupted, why.into());
            }
            return;
        };
        for (key, fd) in listeners {
            let (process, name) = key.split_once('/').unwrap_or((&key, ""));
            let slot = self.slots.iter_mut().find(|s| s.process.name == process);
            if !slot.is_some_and(|s| s.sockets.take_back(name, fd)) {
                tracing::warn!(key, "a socket that nobody wants any more");
            }
        }
        for plan in words.plans {
            let is = |s: &Slot| s.process.name == plan.process;
            let what = What::ALL.into_iter().find(|w| w.name() == plan.what);
            if let (Some(i), Some(what)) = (self.slots.iter().position(is), what) {
                self.plan(i, what, plan.force);
            }
        }
        match words.failed {
            Some(why) => self.upgrade_event(upgrade::Event::Failed, why),
            None => self.upgrade_step.arrived = true,
        }
    }

    /// What another image gets.
    fn left(&self) -> Result<Left, Fault> {
        let mut listeners = BTreeMap::new();
        for slot in &self.slots {
            for (name, fd) in slot.sockets.lent() {
                let key = format!("{}/{name}", slot.process.name);
                listeners.insert(key, fd.try_clone_to_owned()?);
            }
        }
        Ok(Left {
            notify: self.notify.hand_over()?,
            listeners,
            words: self.words(),
        })
    }

    fn words(&self) -> Words {
        let plan = |s: &Slot| {
            let plan = s.plan.as_ref()?;
            Some(PlanWords {
                process: s.process.name.clone(),
                what: plan.what.name().into(),
                force: plan.force,
            })
        };
        Words {
            failed: None,
            plans: self.slots.iter().filter_map(plan).collect(),
        }
    }

    /// Runs until everything is to be stopped, then stops it in reverse order and returns; or
    /// until another image is to go on.
    pub(crate) async fn run(
        mut self,
        mut calls: mpsc::Receiver<Call>,
        stop: CancellationToken,
    ) -> Result<Over, Fault> {
        let mut child_ended = signal(SignalKind::child())?;
        // Those that ended while nobody listened: their parent was another image of ours.
        self.reap();
        let mut told = false;
        self.watch_logs();
        self.ask_everyone();
        loop {
            self.fire();
            if let Some(force) = self.stopping {
                for i in self.may_stop() {
                    self.stop_last(i, force);
                }
                if self.slots.iter().all(|s| s.state == State::Stopped) {
                    break;
                }
            } else {
                self.start_what_can();
                self.upgrade_on();
            }
            self.guard();
            self.publish();
            self.save();
            self.events.flush();
            if let Some(image) = self.leave.take() {
                let left = self.left()?;
                self.tasks.shutdown().await;
                return Ok(Over::Leave(image, left));
            }
            let due = self
                .slots
                .iter()
                .filter_map(Slot::due)
                .chain(self.rotate_at)
                .chain(self.guard_due())
                .chain(self.upgrade_due())
                .min();
            tokio::select! {
                _ = child_ended.recv() => self.reap(),
                Some((i, run, what)) = self.happened_rx.recv() => self.happened(i, run, what),
                said = self.notify.recv() => self.said(said?),
                Some((request, answer)) = calls.recv() => {
                    let reply = self.handle(request);
                    // Who asks for the events next finds what this did.
                    self.events.flush();
                    if answer.send(reply).is_err() {
                        tracing::debug!("the caller went away");
                    }
                }
                () = sleep_until(due) => {}
                written = self.writes.written(), if self.rotate_at.is_none() => {
                    written?;
                    self.rotate_at = Some(Instant::now() + ROTATE_AFTER);
                }
                () = stop.cancelled(), if !told => {
                    told = true;
                    tracing::info!("told to stop");
                    self.plan_all(true);
                }
                Some(_) = self.tasks.join_next() => {}
            }
        }
        self.publish();
        self.events.flush();
        self.record.write(BTreeMap::new())?;
        self.tasks.shutdown().await;
        Ok(Over::Stopped)
    }

    fn save(&mut self) {
        // In a stop of everything each one is stopped, but not for good.
        if self.stopping.is_some() {
            return;
        }
        let all = self
            .slots
            .iter()
            .filter(|s| !s.removed || s.alive.is_some())
            .map(|s| (s.process.name.clone(), s.entry()))
            .collect();
        if let Err(e) = self.record.write(all) {
            tracing::warn!(%e, "the next supervisor will know less: processes.json not written");
        }
    }

    // The graph.

    fn states(&self) -> HashMap<String, State> {
        self.slots
            .iter()
            .map(|s| (s.process.name.clone(), s.state.clone()))
            .collect()
    }

    fn may_stop(&self) -> Vec<usize> {
        let processes: Vec<Process> = self.slots.iter().map(|s| s.process.clone()).collect();
        let states = self.states();
        let names = order::may_stop(&processes, &states);
        (0..self.slots.len())
            .filter(|i| names.contains(&processes[*i].name.as_str()))
            .collect()
    }

    fn start_what_can(&mut self) {
        // A one-shot that has nothing to do lets others start in the same round.
        loop {
            let states = self.states();
            let mut again = false;
            for i in 0..self.slots.len() {
                let slot = &mut self.slots[i];
                let unmet = order::unmet(&slot.process, &states).join(", ");
                if slot.process.strategy == Strategy::Reconnect {
                    let limit = Duration::from_secs(self.limits.reattach_secs);
                    slot.can_reattach(unmet.is_empty(), limit);
                }
                if slot.state != State::Waiting {
                    continue;
                }
                if !unmet.is_empty() {
                    slot.reason = format!("waits for {unmet}");
                    continue;
                }
                slot.reason.clear();
                if slot.process.creates.as_ref().is_some_and(|p| p.exists()) {
                    slot.enter(State::Done);
                } else {
                    self.event(i, Event::DependenciesReady);
                }
                again |= self.slots[i].state.satisfies();
            }
            if !again {
                return;
            }
        }
    }

    // What others see.

    /// Health and metrics follow the table.
    fn publish(&self) {
        for slot in &self.slots {
            let name = slot.process.name.clone();
            let state = slot.state.name();
            self.health.set(
                &name,
                if slot.state.satisfies() {
                    Ok(state.into())
                } else {
                    Err(format!("{state} {}", slot.reason).trim_end().to_owned())
                },
            );
            metrics::gauge!("lotus_supervisor_process_ready", "process" => name.clone())
                .set(f64::from(u8::from(slot.state.satisfies())));
            slot.guard.publish(&name);
            metrics::counter!("lotus_supervisor_process_restarts_total", "process" => name)
                .absolute(u64::from(slot.restarts));
        }
    }

    fn status(&self) -> StatusResponse {
        StatusResponse {
            processes: self
                .slots
                .iter()
                .filter(|s| !s.removed || s.state != State::Stopped)
                .map(Slot::status)
                .collect(),
            upgrade: self.upgrade_status(),
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

async fn send(to: &mpsc::Sender<(usize, u64, Happened)>, i: usize, run: u64, what: Happened) {
    if to.send((i, run, what)).await.is_err() {
        tracing::debug!("the runner is gone");
    }
}
