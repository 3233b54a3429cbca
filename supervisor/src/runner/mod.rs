//! The effects: one task owns every process, and feeds what happens into the table.

mod asked;
mod found;
mod guarding;
mod host;
mod upgrading;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use lotus_runtime::{CancellationToken, Fault, Health, Needs};
use rand::Rng as _;
use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::config::{Config, Limits, Process, Readiness, Strategy};
use crate::events::{self, Events};
use crate::guard::{Guard, Work};
use crate::handover::{PlanWords, Words};
use crate::helper::Helpers;
use crate::needs::Told;
use crate::notify::{NotifySocket, Said};
use crate::plan::{Safety, What};
use crate::proto::StatusResponse;
use crate::record::{self, Identity, Record};
use crate::release::Release;
use crate::sandbox::Sandboxes;
use crate::slot::Slot;
use crate::table::{Effect, Ended, Event, State, restart_delay, step};
use crate::{child, health, logs, order, upgrade};

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
    stopping: bool,
    tasks: JoinSet<()>,
    happened_tx: mpsc::Sender<(usize, u64, Happened)>,
    happened_rx: mpsc::Receiver<(usize, u64, Happened)>,
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
            stopping: false,
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
            if self.stopping {
                for i in self.may_stop() {
                    self.event(i, Event::WantStop);
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
        self.record.write(BTreeMap::new())?;
        self.tasks.shutdown().await;
        Ok(Over::Stopped)
    }

    fn save(&mut self) {
        // In a stop of everything each one is stopped, but not for good.
        if self.stopping {
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

    // What happens.

    /// Everything that is due.
    fn fire(&mut self) {
        let now = Instant::now();
        for i in 0..self.slots.len() {
            while let Some(event) = self.slots[i].fire(now) {
                let slot = &mut self.slots[i];
                match event {
                    Event::StartTimeout => {
                        let secs = slot.process.start.as_secs();
                        slot.reason = format!("not ready after {secs} s");
                    }
                    Event::WatchdogTimeout => {
                        slot.reason = "gave no sign of life".into();
                        self.events.write(&slot.process.name, events::What::Silent);
                        tracing::warn!(process = slot.process.name, "gave no sign of life: killed");
                        logs::mark(&slot.log, "it gave no sign of life: killed");
                    }
                    Event::ReattachTimeout => {
                        self.events
                            .write(&slot.process.name, events::What::NotReattached);
                        tracing::warn!(
                            process = slot.process.name,
                            "is not ready although the hub is: restarted"
                        );
                    }
                    _ => {}
                }
                self.event(i, event);
            }
            if self.slots[i].ask_again(now) {
                match self.hub_above(i) {
                    Some(hub) => self.ask(i, hub),
                    None => {
                        let what = self.slots[i].plan.as_ref().map(|p| p.what);
                        if let Some(what) = what {
                            self.carry_out(i, what);
                        }
                    }
                }
            }
        }
        if self.rotate_at.take_if(|at| *at <= now).is_some() {
            let rules = self.limits.rotation();
            let logs = self.slots.iter().map(|s| s.log.as_path());
            for log in logs.chain([self.events.path()]) {
                if let Err(e) = logs::rotate(log, rules) {
                    tracing::warn!(log = %log.display(), %e, "log not rotated");
                }
            }
            self.watch_logs();
        }
    }

    fn watch_logs(&self) {
        self.writes
            .watch(self.slots.iter().map(|s| s.log.as_path()));
    }

    fn reap(&mut self) {
        for (pid, (how, words)) in child::reaped() {
            let is = |s: &Slot| s.alive.is_some_and(|id| id.pid == pid);
            match self.slots.iter().position(is) {
                Some(i) => self.ended(i, how, &words),
                None => {
                    self.helpers.ended(pid, how, &words);
                    self.check_ended(pid, how, words);
                }
            }
        }
    }

    fn said(&mut self, said: Said) {
        let is = |s: &Slot| s.alive.is_some_and(|id| id.pid == said.pid);
        // Others have the socket's name too: what a process starts inherits it.
        let Some(i) = self.slots.iter().position(is) else {
            return;
        };
        let slot = &mut self.slots[i];
        if let Some((name, fd)) = said.stored
            && slot.sockets.take_back(&name, fd)
        {
            tracing::info!(
                process = slot.process.name,
                name,
                "its socket is here again"
            );
        }
        if said.alive && matches!(slot.state, State::Ready | State::Unready) {
            slot.sign_of_life();
        }
        if said.ready && slot.state == State::Starting {
            self.event(i, Event::SaidReady);
        }
    }

    fn happened(&mut self, i: usize, run: u64, what: Happened) {
        if let Happened::Told(told) = what {
            // Of no run: it is asked before one.
            return self.told(i, told);
        }
        if self.slots[i].run != run {
            return;
        }
        match what {
            Happened::Told(_) => {}
            Happened::Ready => {
                if self.slots[i].state == State::Starting {
                    self.event(i, Event::SaidReady);
                }
            }
            Happened::Healthy(true) => self.event(i, Event::SaidReady),
            Happened::Healthy(false) => {
                self.slots[i].reason = "says that it is not ready; see its /readyz".into();
                self.event(i, Event::SaidUnready);
            }
            Happened::Ended(how, words) => self.ended(i, how, &words),
            Happened::Safety(answer) => self.answered(i, answer),
            Happened::Proving(work) => self.guard.told(work),
        }
    }

    fn ended(&mut self, i: usize, how: Ended, words: &str) {
        // Its last words may be its sockets.
        for said in self.notify.said_already() {
            self.said(said);
        }
        let limit = self.limits.restarts_an_hour;
        let slot = &mut self.slots[i];
        if !slot.state.is_alive() {
            return;
        }
        let mut pid = String::new();
        slot.guard.thaw();
        if slot.process.safety.is_some() {
            self.guard.told(Vec::new());
        }
        let ran = slot.alive.is_some();
        if let Some(id) = slot.alive {
            pid = format!("pid {} ended: ", id.pid);
            // What it started ends with it.
            child::kill_group(id.pid);
        }
        let wanted = slot.state.is_ending();
        let done = slot.process.is_oneshot() && how == Ended::Clean;
        let by_itself = !wanted && !done;
        let healthy = Duration::from_secs(self.limits.healthy_secs);
        slot.end(words, by_itself, healthy);
        slot.guard.gone();
        // Nobody reads the last words of a thousand.
        let told = self.events.has_room(&slot.process.name);
        let what = events::What::ended(words, by_itself && told, &slot.log);
        self.events.write(&slot.process.name, what);
        let how = if by_itself {
            slot.too_often(how, limit)
        } else {
            how
        };
        let name = slot.process.name.clone();
        if by_itself {
            let last = match told || how == Ended::BadConfig {
                true => logs::last_words(&slot.log),
                false => String::new(),
            };
            if told {
                tracing::warn!(process = name, exit = words, last, "ended by itself");
            }
            match how {
                Ended::BadConfig if last.is_empty() || !ran => slot.reason = words.into(),
                Ended::BadConfig => slot.reason = last,
                Ended::CrashedTooOften => {
                    slot.reason = format!("ended by itself more than {limit} times in an hour");
                }
                Ended::Clean | Ended::Crashed => {}
            }
        } else {
            tracing::info!(process = name, exit = words, "ended");
        }
        logs::mark(&slot.log, &format!("{pid}{words}"));
        // A plan was for the run that is over.
        let planned = slot.plan.take().map(|p| p.what);
        self.event(i, Event::Ended(how));
        if let Some(what) = planned {
            self.carry_out(i, what);
        }
    }

    fn event(&mut self, i: usize, event: Event) {
        let slot = &mut self.slots[i];
        let (next, effects) = step(&slot.state, event, slot.process.is_oneshot());
        let was_alive = slot.state.is_alive();
        if next != slot.state {
            if self.events.has_room(&slot.process.name) {
                tracing::info!(
                    process = slot.process.name,
                    from = slot.state.name(),
                    to = next.name(),
                    "state"
                );
            }
            let what = events::What::State {
                from: slot.state.name().into(),
                to: next.name().into(),
            };
            self.events.write(&slot.process.name, what);
            let before = slot.state.clone();
            slot.enter(next);
            if slot.state == State::Ready && matches!(before, State::Waiting | State::Starting) {
                self.follow_proving(i);
            }
            self.sandboxes_at_state(i);
        }
        let slot = &self.slots[i];
        let stays = matches!(
            slot.state,
            State::Starting | State::Ready | State::Unready | State::Done
        );
        for effect in effects {
            self.carry(i, effect);
        }
        if was_alive && !stays {
            self.gone(i);
        }
    }

    fn carry(&mut self, i: usize, effect: Effect) {
        let pid = self.slots[i].alive.map(|id| id.pid);
        let slot = &mut self.slots[i];
        match effect {
            Effect::Spawn => self.spawn(i),
            Effect::ArmStart => slot.arm(slot.process.start),
            Effect::ArmDrain => slot.arm_drain(),
            Effect::Drain => {
                slot.arm_drain();
                slot.guard.thaw();
                match pid {
                    Some(pid) if slot.process.drains => child::drain(pid),
                    Some(pid) => child::terminate(pid),
                    None => {}
                }
            }
            Effect::Terminate => {
                slot.arm(slot.process.stop);
                // One that is frozen does not hear it.
                slot.guard.thaw();
                if let Some(pid) = pid {
                    child::terminate(pid);
                }
            }
            Effect::Kill => {
                slot.guard.thaw();
                if let Some(pid) = pid {
                    child::kill_group(pid);
                }
            }
            Effect::ArmBackoff => {
                slot.restarts += 1;
                let (first, max) = self.limits.backoff();
                let wait = restart_delay(slot.crashes_in_a_row(), first, max);
                let wait = wait.mul_f64(rand::rng().random_range(0.75..=1.0));
                slot.reason = format!("ended by itself; starts again in {wait:.1?}");
                slot.arm(wait);
            }
        }
    }

    /// Process `i` is gone or going: tells those that cannot do without it.
    fn gone(&mut self, i: usize) {
        let name = self.slots[i].process.name.clone();
        for j in 0..self.slots.len() {
            if self.slots[j].process.goes_with(&name) {
                self.event(j, Event::DependencyGone);
            }
        }
    }

    fn spawn_now(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        // The address of the run before may be somebody else's by now.
        if let Some(file) = &slot.process.health
            && let Err(e) = std::fs::remove_file(file)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%e, file = %file.display(), "an old address stays");
        }
        let made = host::open_sockets(slot).and_then(|()| host::confine(slot, &self.sandboxes));
        let spawned = made.and_then(|()| {
            let (notify, extras) = (self.notify.path(), host::extras(slot));
            child::spawn(&slot.process, &slot.log, &slot.fence, notify, extras)
                .map_err(|e| (Ended::Crashed, e.to_string()))
        });
        let spawned = match spawned {
            Ok(spawned) => spawned,
            Err((how, e)) => {
                let run = slot.begin(None, SystemTime::now());
                tracing::warn!(process = slot.process.name, e, "does not start");
                let words = format!("does not start: {e}");
                let to_us = self.happened_tx.clone();
                self.tasks.spawn(async move {
                    send(&to_us, i, run, Happened::Ended(how, words)).await;
                });
                return;
            }
        };
        let pid = spawned.pid;
        // Its first log was not there to be watched before.
        if self.rotate_at.is_none() {
            self.writes.watch(std::iter::once(slot.log.as_path()));
        }
        // One that ended already is a zombie until it is reaped, so it has a start time.
        let start_time = record::start_time(pid).unwrap_or_default();
        let run = slot.begin(Some(Identity { pid, start_time }), SystemTime::now());
        self.guard.take(&mut slot.guard, &slot.process.name, pid);
        slot.program = slot.process.command.first().cloned().unwrap_or_default();
        slot.arm(slot.process.start);
        self.events
            .write(&slot.process.name, events::What::Spawned { pid });
        let command = slot.process.command.join(" ");
        logs::mark(&slot.log, &format!("pid {pid}: {command}"));
        if slot.process.ready == Readiness::AtOnce && !slot.process.is_oneshot() {
            return self.event(i, Event::SaidReady);
        }
        let to_us = self.happened_tx.clone();
        let mut pipe = spawned.notify;
        let task = self.tasks.spawn(async move {
            let mut byte = [0u8; 1];
            // Closed without a word: it ended, or it says it on the socket, or never.
            if let Ok(1) = pipe.read(&mut byte).await {
                send(&to_us, i, run, Happened::Ready).await;
            }
        });
        self.slots[i].keep(task);
        self.follow_health(i);
    }

    fn follow_health(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        let Some(file) = slot.process.health.clone() else {
            return;
        };
        let (run, to_us) = (slot.run, self.happened_tx.clone());
        let task = self.tasks.spawn(async move {
            let told = |healthy| send(&to_us, i, run, Happened::Healthy(healthy));
            health::follow(file, told).await;
        });
        self.slots[i].keep(task);
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
