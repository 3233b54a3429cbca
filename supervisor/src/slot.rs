//! What the runner knows of one process.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::task::AbortHandle;

use crate::guard::{Held, Level};
use crate::needs::Asked;
use crate::plan::What;
use crate::processes::Process;
use crate::proto::ProcessStatus;
use crate::record::{Entry, Identity};
use crate::sandbox::Profile;
use crate::sockets::Sockets;
use crate::table::{Ended, Event, State};

const HOUR: Duration = Duration::from_secs(3600);

/// A stop that waits for the hub's word.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) what: What,
    pub(crate) force: bool,
    /// When the hub is asked again; nothing while a question is out.
    pub(crate) again: Option<Instant>,
    pub(crate) reasons: Vec<String>,
    /// When they are over, as far as the hub knows.
    pub(crate) until: Option<SystemTime>,
}

/// One process.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) process: Process,
    pub(crate) state: State,
    pub(crate) log: PathBuf,
    pub(crate) fence: PathBuf,
    /// Counts the runs, so that a late event of an earlier one is told apart.
    pub(crate) run: u64,
    pub(crate) alive: Option<Identity>,
    pub(crate) since: SystemTime,
    pub(crate) restarts: u32,
    pub(crate) reason: String,
    pub(crate) last_exit: String,
    pub(crate) plan: Option<Plan>,
    /// The file that runs now.
    pub(crate) program: String,
    /// How long it may finish what is open, and until when it does.
    pub(crate) drain: Duration,
    drains_until: Option<SystemTime>,
    /// It runs, and the configuration does not name it any more.
    pub(crate) removed: bool,
    /// What the proving guard has of it.
    pub(crate) guard: Held,
    /// What it needs from its host.
    pub(crate) asked: Asked,
    pub(crate) sockets: Sockets,
    /// What its next run is confined to.
    pub(crate) profile: Option<Profile>,
    /// Its sandbox in words; empty for none.
    pub(crate) sandbox: String,
    crashes_in_a_row: u32,
    /// When it ended by itself, within the last hour.
    crashes: VecDeque<Instant>,
    /// Of the state: start, stop or back-off.
    timer: Option<Instant>,
    watchdog: Option<Instant>,
    reattach: Option<Instant>,
    /// What follows the process while it runs.
    tasks: Vec<AbortHandle>,
}

impl Slot {
    pub(crate) fn new(process: Process, log: PathBuf, fence: PathBuf) -> Self {
        Self {
            guard: Held::new(process.guard),
            process,
            state: State::Waiting,
            log,
            fence,
            run: 0,
            alive: None,
            since: UNIX_EPOCH,
            restarts: 0,
            reason: String::new(),
            last_exit: String::new(),
            plan: None,
            program: String::new(),
            drain: Duration::ZERO,
            drains_until: None,
            removed: false,
            asked: Asked::No,
            sockets: Sockets::default(),
            profile: None,
            sandbox: String::new(),
            crashes_in_a_row: 0,
            crashes: VecDeque::new(),
            timer: None,
            watchdog: None,
            reattach: None,
            tasks: Vec::new(),
        }
    }

    /// A run begins.
    pub(crate) fn begin(&mut self, alive: Option<Identity>, since: SystemTime) -> u64 {
        self.run += 1;
        self.alive = alive;
        self.since = since;
        self.run
    }

    /// Whether what runs is not what would be started now: it is of another release.
    pub(crate) fn is_stale(&self) -> bool {
        self.alive.is_some() && self.process.command.first() != Some(&self.program)
    }

    /// Arms the timer of a drain.
    pub(crate) fn arm_drain(&mut self) {
        let limit = match self.drains_until {
            Some(until) => until.duration_since(SystemTime::now()).unwrap_or_default(),
            None => self.drain,
        };
        self.drains_until = Some(SystemTime::now() + limit);
        self.arm(limit);
    }

    /// Keeps a task for as long as the run lasts.
    pub(crate) fn keep(&mut self, task: AbortHandle) {
        self.tasks.push(task);
    }

    /// A run is over. `by_itself` when nobody asked for it; it was a good one if it lasted for
    /// `healthy`.
    pub(crate) fn end(&mut self, words: &str, by_itself: bool, healthy: Duration) {
        self.alive = None;
        self.drains_until = None;
        self.last_exit = words.into();
        for task in self.tasks.drain(..) {
            task.abort();
        }
        if by_itself {
            if self.since.elapsed().unwrap_or_default() >= healthy {
                self.crashes_in_a_row = 0;
            }
            self.crashes_in_a_row += 1;
            self.crashes.push_back(Instant::now());
        }
    }

    /// A crash, judged by how often that happened. `limit` in an hour; 0 for none.
    pub(crate) fn too_often(&mut self, how: Ended, limit: u32) -> Ended {
        while self.crashes.front().is_some_and(|at| at.elapsed() >= HOUR) {
            self.crashes.pop_front();
        }
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        if how == Ended::Crashed && self.process.may_fail && limit > 0 && self.crashes.len() > limit
        {
            // Whoever starts it again gives it a new hour.
            self.crashes.clear();
            return Ended::CrashedTooOften;
        }
        how
    }

    /// Crashes since the last run that went well.
    pub(crate) const fn crashes_in_a_row(&self) -> u32 {
        self.crashes_in_a_row
    }

    /// Changes the state. Its timer is void; a process that becomes ready is watched.
    pub(crate) fn enter(&mut self, next: State) {
        if std::mem::discriminant(&next) != std::mem::discriminant(&self.state) {
            self.timer = None;
        }
        let watched = matches!(next, State::Ready | State::Unready);
        if watched && self.watchdog.is_none() {
            self.sign_of_life();
        }
        if !watched {
            self.watchdog = None;
        }
        if next != State::Unready {
            self.reattach = None;
        }
        if matches!(next, State::Stopped | State::Done | State::Failed) {
            // Nobody comes to serve who waits in their queues.
            self.sockets.close();
        }
        self.state = next;
    }

    /// Arms the timer of the state.
    pub(crate) fn arm(&mut self, after: Duration) {
        self.timer = Some(Instant::now() + after);
    }

    /// It said that it is alive, or just became ready.
    pub(crate) fn sign_of_life(&mut self) {
        let asleep = self.guard.level == Level::Frozen;
        let limit = self.process.watchdog.filter(|_| !asleep);
        self.watchdog = limit.map(|limit| Instant::now() + limit);
    }

    /// The guard looked at it, which `was` frozen before: whoever is frozen can not say that it
    /// is alive, or come back to its hub.
    pub(crate) fn frozen(&mut self, was: bool) {
        let is = self.guard.level == Level::Frozen;
        if is || was {
            self.reattach = None;
            if matches!(self.state, State::Ready | State::Unready) {
                self.sign_of_life();
            }
        }
    }

    /// Whether what it needs is there, for one that lost it.
    pub(crate) fn can_reattach(&mut self, can: bool, limit: Duration) {
        self.reattach = match self.reattach {
            _ if !can || self.state != State::Unready || self.guard.level == Level::Frozen => None,
            armed @ Some(_) => armed,
            None => Some(Instant::now() + limit),
        };
    }

    /// When something is due next.
    pub(crate) fn due(&self) -> Option<Instant> {
        let again = self.plan.as_ref().and_then(|p| p.again);
        [self.timer, self.watchdog, self.reattach, again]
            .into_iter()
            .flatten()
            .min()
    }

    /// What is due at `now`, once.
    pub(crate) fn fire(&mut self, now: Instant) -> Option<Event> {
        let take = |at: &mut Option<Instant>| at.take_if(|at| *at <= now).is_some();
        if take(&mut self.timer) {
            return match self.state {
                State::Starting => Some(Event::StartTimeout),
                State::Stopping { .. } | State::Draining { .. } => Some(Event::StopTimeout),
                State::Backoff => Some(Event::BackoffOver),
                _ => None,
            };
        }
        if take(&mut self.watchdog) {
            return Some(Event::WatchdogTimeout);
        }
        take(&mut self.reattach).then_some(Event::ReattachTimeout)
    }

    /// Whether the hub is to be asked again at `now`.
    pub(crate) fn ask_again(&mut self, now: Instant) -> bool {
        self.plan
            .as_mut()
            .is_some_and(|p| p.again.take_if(|at| *at <= now).is_some())
    }

    /// For the next supervisor.
    pub(crate) fn entry(&self) -> Entry {
        Entry {
            alive: self.alive,
            since_unix_ms: millis(self.since.duration_since(UNIX_EPOCH).unwrap_or_default()),
            ready: matches!(self.state, State::Ready | State::Unready),
            stopped: matches!(
                self.state,
                State::Stopped
                    | State::Stopping { then_start: false }
                    | State::Draining { then_start: false }
            ),
            restarts: self.restarts,
            crashes_in_a_row: self.crashes_in_a_row,
            last_exit: self.last_exit.clone(),
            squeezed: self.guard.level != Level::Free,
            program: self.program.clone(),
            drains_until_unix_ms: match (&self.state, self.drains_until) {
                (State::Draining { .. }, Some(until)) => {
                    millis(until.duration_since(UNIX_EPOCH).unwrap_or_default())
                }
                _ => 0,
            },
            sockets: self.sockets.known(),
            sandbox: self.sandbox.clone(),
        }
    }

    /// From the supervisor before this one.
    pub(crate) fn restore(&mut self, entry: &Entry) {
        if entry.stopped {
            self.state = State::Stopped;
        }
        self.restarts = entry.restarts;
        self.crashes_in_a_row = entry.crashes_in_a_row;
        self.last_exit.clone_from(&entry.last_exit);
        if entry.drains_until_unix_ms > 0 {
            let until = UNIX_EPOCH + Duration::from_millis(entry.drains_until_unix_ms);
            self.drains_until = Some(until);
        }
        self.sockets = Sockets::restore(&entry.sockets);
        self.sandbox.clone_from(&entry.sandbox);
    }

    pub(crate) fn status(&self) -> ProcessStatus {
        let reason = match &self.plan {
            Some(plan) if plan.reasons.is_empty() => "asks the hub whether it is safe".into(),
            Some(plan) => {
                let what = match plan.what {
                    What::StopAll => What::Stop,
                    what => what,
                };
                let what = what.name();
                let left = plan
                    .until
                    .and_then(|u| u.duration_since(SystemTime::now()).ok());
                let left = left.map_or_else(String::new, |l| format!("; {} s more", l.as_secs()));
                format!(
                    "waits to {what} it safely: {}{left}",
                    plan.reasons.join("; ")
                )
            }
            None if self.state.satisfies() => String::new(),
            None if matches!(self.state, State::Draining { .. }) => {
                let left = self.drains_until.unwrap_or(UNIX_EPOCH);
                let left = left.duration_since(SystemTime::now()).unwrap_or_default();
                format!("finishes what is open, {} s at most", left.as_secs())
            }
            None => self.reason.clone(),
        };
        let (guard, guard_state, guard_reason) = self.guard.status();
        ProcessStatus {
            guard,
            guard_state,
            guard_reason,
            name: self.process.name.clone(),
            state: self.state.name().into(),
            pid: self.alive.map_or(0, |id| id.pid),
            ready: self.state.satisfies(),
            restarts: self.restarts,
            uptime_ms: match self.alive {
                Some(_) => millis(self.since.elapsed().unwrap_or_default()),
                None => 0,
            },
            reason,
            log_file: self.log.display().to_string(),
            last_exit: self.last_exit.clone(),
            sockets: self.sockets.addresses(),
            sandbox: self.sandbox.clone(),
        }
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> Slot {
        let process = Process {
            watchdog: Some(Duration::from_secs(10)),
            may_fail: true,
            ..Process::new("x", vec!["x".into()])
        };
        Slot::new(process, "log".into(), "lock".into())
    }

    #[test]
    fn a_timer_belongs_to_its_state() {
        let far = Instant::now() + HOUR;
        let mut s = slot();
        s.enter(State::Starting);
        s.arm(Duration::ZERO);
        assert_eq!(s.fire(far), Some(Event::StartTimeout));
        assert_eq!(s.fire(far), None, "once");
        s.arm(Duration::ZERO);
        s.enter(State::Ready);
        assert_eq!(s.fire(Instant::now()), None, "the start is over");
        assert_eq!(s.fire(far), Some(Event::WatchdogTimeout));
        s.enter(State::Stopping { then_start: true });
        s.arm(Duration::ZERO);
        s.enter(State::Stopping { then_start: false });
        assert_eq!(s.fire(far), Some(Event::StopTimeout), "still stopping");
        assert_eq!(s.due(), None, "whoever is being stopped is not watched");
    }

    #[test]
    fn whoever_is_frozen_is_not_watched() {
        let mut s = slot();
        s.enter(State::Ready);
        assert!(s.due().is_some());
        s.guard.level = Level::Frozen;
        s.frozen(false);
        s.enter(State::Unready);
        s.can_reattach(true, HOUR);
        assert_eq!(s.due(), None);
        s.guard.level = Level::Free;
        s.frozen(true);
        let far = Instant::now() + HOUR;
        assert_eq!(s.fire(far), Some(Event::WatchdogTimeout), "watched again");
    }

    #[test]
    fn a_spoke_has_time_to_come_back_once_its_hub_is() {
        let mut s = slot();
        let limit = Duration::from_secs(60);
        s.enter(State::Ready);
        s.can_reattach(true, limit);
        s.enter(State::Unready);
        s.sign_of_life();
        s.can_reattach(false, limit);
        let soon = Instant::now() + Duration::from_secs(61);
        assert_eq!(s.fire(soon), Some(Event::WatchdogTimeout));
        assert_eq!(s.fire(soon), None, "its hub is away");
        s.can_reattach(true, limit);
        assert_eq!(s.fire(soon), Some(Event::ReattachTimeout));
    }

    #[test]
    fn a_spoke_that_crashes_too_often_is_given_up() {
        let mut s = slot();
        for n in 1..=4 {
            s.begin(None, SystemTime::now());
            s.end("exit status 1", true, HOUR);
            let wanted = if n > 3 {
                Ended::CrashedTooOften
            } else {
                Ended::Crashed
            };
            assert_eq!(s.too_often(Ended::Crashed, 3), wanted, "{n}");
            assert_eq!(s.crashes_in_a_row(), n);
        }
        s.process.may_fail = false;
        for _ in 0..9 {
            s.end("exit status 1", true, HOUR);
        }
        assert_eq!(s.too_often(Ended::Crashed, 3), Ended::Crashed);
    }
}
