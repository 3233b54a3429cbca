//! The effects: one task owns every process, and feeds what happens into the table.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lotus_runtime::{CancellationToken, Fault, Health};
use rand::Rng as _;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::child;
use crate::config::{Limits, Process};
use crate::order;
use crate::proto::ProcessStatus;
use crate::table::{Effect, Event, HEALTHY_AFTER, State, restart_delay, step};

/// What the control socket asks for. The answer is the status after it took effect.
#[derive(Debug)]
pub(crate) enum Request {
    /// Nothing but the status.
    Status,
    /// Start the named process.
    Start(String),
    /// Stop the named process.
    Stop(String),
    /// Restart the named process.
    Restart(String),
}

/// A request and where its answer goes.
pub(crate) type Call = (Request, oneshot::Sender<Result<Vec<ProcessStatus>, String>>);

/// Something that happened to one run of a process. Events of an earlier run are dropped.
#[derive(Debug)]
enum Happened {
    Ready,
    Ended(crate::table::Ended, String),
    StartTimeout,
    StopTimeout,
    BackoffOver,
}

struct Slot {
    process: Process,
    state: State,
    log: PathBuf,
    /// Counts the runs, so that a late event of an earlier one is told apart.
    run: u64,
    pid: u32,
    since: Instant,
    restarts: u32,
    crashes_in_a_row: u32,
    reason: String,
    last_exit: String,
}

/// Owns the processes.
pub(crate) struct Runner {
    slots: Vec<Slot>,
    limits: Limits,
    health: Health,
    tasks: JoinSet<()>,
    happened_tx: mpsc::Sender<(usize, u64, Happened)>,
    happened_rx: mpsc::Receiver<(usize, u64, Happened)>,
}

/// Events that may wait for the runner; senders wait for room.
const QUEUE: usize = 256;
/// How often log sizes are looked at.
const ROTATE_EVERY: Duration = Duration::from_secs(60);

impl Runner {
    pub(crate) fn new(
        processes: Vec<Process>,
        limits: Limits,
        log_dir: &Path,
        health: Health,
    ) -> Result<Self, Fault> {
        std::fs::create_dir_all(log_dir)?;
        let (happened_tx, happened_rx) = mpsc::channel(QUEUE);
        let slots = processes
            .into_iter()
            .map(|process| Slot {
                log: log_dir.join(format!("{}.log", process.name)),
                process,
                state: State::Waiting,
                run: 0,
                pid: 0,
                since: Instant::now(),
                restarts: 0,
                crashes_in_a_row: 0,
                reason: String::new(),
                last_exit: String::new(),
            })
            .collect();
        Ok(Self {
            slots,
            limits,
            health,
            tasks: JoinSet::new(),
            happened_tx,
            happened_rx,
        })
    }

    /// Runs until `stop`, then stops everything in reverse order and returns.
    pub(crate) async fn run(mut self, mut calls: mpsc::Receiver<Call>, stop: CancellationToken) {
        let mut rotate = tokio::time::interval(ROTATE_EVERY);
        let mut stopping = false;
        loop {
            if stopping {
                for name in self.may_stop() {
                    self.event_by_name(&name, Event::WantStop);
                }
                if self.slots.iter().all(|s| s.state == State::Stopped) {
                    break;
                }
            } else {
                self.start_what_can();
            }
            self.publish();
            tokio::select! {
                Some((i, run, what)) = self.happened_rx.recv() => self.happened(i, run, what),
                Some((request, answer)) = calls.recv() => {
                    let reply = self.handle(request, stopping);
                    if answer.send(reply).is_err() {
                        tracing::debug!("the caller went away");
                    }
                }
                _ = rotate.tick() => self.rotate_logs(),
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    tracing::info!("stopping every process, spokes first");
                }
                Some(_) = self.tasks.join_next() => {}
            }
        }
        self.publish();
        self.tasks.shutdown().await;
    }

    fn states(&self) -> HashMap<String, State> {
        self.slots
            .iter()
            .map(|s| (s.process.name.clone(), s.state.clone()))
            .collect()
    }

    fn may_stop(&self) -> Vec<String> {
        let processes: Vec<Process> = self.slots.iter().map(|s| s.process.clone()).collect();
        order::may_stop(&processes, &self.states())
            .into_iter()
            .map(str::to_owned)
            .collect()
    }

    fn start_what_can(&mut self) {
        // A one-shot that has nothing to do lets others start in the same round.
        loop {
            let states = self.states();
            let mut skipped = false;
            for i in 0..self.slots.len() {
                let slot = &mut self.slots[i];
                if slot.state != State::Waiting {
                    continue;
                }
                let unmet = order::unmet(&slot.process, &states);
                if !unmet.is_empty() {
                    slot.reason = format!("waits for {}", unmet.join(", "));
                    continue;
                }
                slot.reason.clear();
                if slot.process.creates.as_ref().is_some_and(|p| p.exists()) {
                    slot.state = State::Done;
                    skipped = true;
                } else {
                    self.event(i, Event::DependenciesReady);
                }
            }
            if !skipped {
                return;
            }
        }
    }

    fn handle(&mut self, request: Request, stopping: bool) -> Result<Vec<ProcessStatus>, String> {
        let (name, event) = match request {
            Request::Status => return Ok(self.status()),
            Request::Start(name) => (name, Event::WantStart),
            Request::Stop(name) => (name, Event::WantStop),
            Request::Restart(name) => (name, Event::WantRestart),
        };
        if stopping {
            return Err("the supervisor is stopping".into());
        }
        if !self.slots.iter().any(|s| s.process.name == name) {
            let names: Vec<&str> = self.slots.iter().map(|s| s.process.name.as_str()).collect();
            return Err(format!(
                "there is no process {name:?}; there are {}",
                names.join(", ")
            ));
        }
        tracing::info!(process = name, ?event, "asked for");
        self.event_by_name(&name, event);
        self.start_what_can();
        Ok(self.status())
    }

    fn happened(&mut self, i: usize, run: u64, what: Happened) {
        if self.slots[i].run != run {
            return;
        }
        match what {
            Happened::Ready => self.event(i, Event::SaidReady),
            Happened::StartTimeout => {
                if self.slots[i].state == State::Starting {
                    let reason = format!("not ready after {} s", self.limits.start_secs);
                    self.slots[i].reason = reason;
                }
                self.event(i, Event::StartTimeout);
            }
            Happened::StopTimeout => self.event(i, Event::StopTimeout),
            Happened::BackoffOver => self.event(i, Event::BackoffOver),
            Happened::Ended(how, words) => {
                let slot = &mut self.slots[i];
                let wanted =
                    matches!(slot.state, State::Stopping { .. }) || slot.process.is_oneshot();
                let name = slot.process.name.clone();
                child::mark(&slot.log, &format!("pid {} ended: {words}", slot.pid));
                slot.last_exit.clone_from(&words);
                slot.pid = 0;
                if wanted {
                    tracing::info!(process = name, exit = words, "ended");
                } else {
                    if slot.since.elapsed() >= HEALTHY_AFTER {
                        slot.crashes_in_a_row = 0;
                    }
                    slot.crashes_in_a_row += 1;
                    let last = last_words(&slot.log);
                    tracing::warn!(process = name, exit = words, last, "ended by itself");
                    if how == crate::table::Ended::BadConfig {
                        slot.reason = last;
                    }
                }
                self.event(i, Event::Ended(how));
            }
        }
    }

    fn event_by_name(&mut self, name: &str, event: Event) {
        if let Some(i) = self.slots.iter().position(|s| s.process.name == name) {
            self.event(i, event);
        }
    }

    fn event(&mut self, i: usize, event: Event) {
        let slot = &mut self.slots[i];
        let (next, effects) = step(&slot.state, event, slot.process.is_oneshot());
        if next != slot.state {
            tracing::info!(
                process = slot.process.name,
                from = slot.state.name(),
                to = next.name(),
                "state"
            );
            slot.state = next;
        }
        for effect in effects {
            match effect {
                Effect::Spawn => self.spawn(i),
                Effect::Terminate => {
                    child::terminate(self.slots[i].pid);
                    self.timer(
                        i,
                        Duration::from_secs(self.limits.stop_secs),
                        Happened::StopTimeout,
                    );
                }
                Effect::Kill => child::kill_group(self.slots[i].pid),
                Effect::ArmBackoff => {
                    self.slots[i].restarts += 1;
                    let wait = restart_delay(self.slots[i].crashes_in_a_row);
                    let wait = wait.mul_f64(rand::rng().random_range(0.75..=1.0));
                    self.slots[i].reason = format!("ended by itself; starts again in {wait:.1?}");
                    self.timer(i, wait, Happened::BackoffOver);
                }
            }
        }
    }

    fn spawn(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        slot.run += 1;
        slot.since = Instant::now();
        let run = slot.run;
        let to_us = self.happened_tx.clone();
        match child::spawn(&slot.process, &slot.log) {
            Ok(spawned) => {
                slot.pid = spawned.pid;
                child::mark(
                    &slot.log,
                    &format!("pid {}: {}", spawned.pid, slot.process.command.join(" ")),
                );
                self.tasks.spawn(watch(i, run, spawned, to_us));
                self.timer(
                    i,
                    Duration::from_secs(self.limits.start_secs),
                    Happened::StartTimeout,
                );
            }
            Err(e) => {
                let words = format!("does not start: {e}");
                self.tasks.spawn(async move {
                    let ended = Happened::Ended(crate::table::Ended::Crashed, words);
                    send(&to_us, i, run, ended).await;
                });
            }
        }
    }

    fn timer(&mut self, i: usize, after: Duration, what: Happened) {
        let (run, to_us) = (self.slots[i].run, self.happened_tx.clone());
        self.tasks.spawn(async move {
            tokio::time::sleep(after).await;
            send(&to_us, i, run, what).await;
        });
    }

    fn rotate_logs(&self) {
        for slot in &self.slots {
            if let Err(e) = child::rotate_log(&slot.log, self.limits.log_mib << 20) {
                tracing::warn!(process = slot.process.name, %e, "log not rotated");
            }
        }
    }

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
            metrics::counter!("lotus_supervisor_process_restarts_total", "process" => name)
                .absolute(u64::from(slot.restarts));
        }
    }

    fn status(&self) -> Vec<ProcessStatus> {
        self.slots
            .iter()
            .map(|s| ProcessStatus {
                name: s.process.name.clone(),
                state: s.state.name().into(),
                pid: s.pid,
                ready: s.state.satisfies(),
                restarts: s.restarts,
                uptime_ms: if s.pid == 0 {
                    0
                } else {
                    u64::try_from(s.since.elapsed().as_millis()).unwrap_or(u64::MAX)
                },
                reason: if s.state.satisfies() {
                    String::new()
                } else {
                    s.reason.clone()
                },
                log_file: s.log.display().to_string(),
                last_exit: s.last_exit.clone(),
            })
            .collect()
    }
}

async fn send(to: &mpsc::Sender<(usize, u64, Happened)>, i: usize, run: u64, what: Happened) {
    if to.send((i, run, what)).await.is_err() {
        tracing::debug!("the runner is gone");
    }
}

/// Follows one run: the readiness line, then the end.
async fn watch(
    i: usize,
    run: u64,
    spawned: child::Spawned,
    to: mpsc::Sender<(usize, u64, Happened)>,
) {
    let child::Spawned {
        mut child,
        mut notify,
        ..
    } = spawned;
    let ready = async {
        let mut byte = [0u8; 1];
        match notify.read(&mut byte).await {
            Ok(1) => send(&to, i, run, Happened::Ready).await,
            // Closed without a word: it ended, or it never will say.
            _ => std::future::pending().await,
        }
    };
    let mut waiting = std::pin::pin!(ready);
    let mut told = false;
    let status = loop {
        tokio::select! {
            // A process that says it is ready and then ends must be seen in this order.
            biased;
            () = &mut waiting, if !told => told = true,
            status = child.wait() => break status,
        }
    };
    let (how, words) = child::ended(status);
    send(&to, i, run, Happened::Ended(how, words)).await;
}

/// The last lines of a log that are not ours, for a message.
fn last_words(log: &Path) -> String {
    let text = child::tail(log, 4096).unwrap_or_default();
    let lines: Vec<&str> = text
        .lines()
        .filter(|l| !l.starts_with("--- supervisor:") && !l.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(2)..].join(" | ")
}
