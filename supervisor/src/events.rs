//! What happened to each process, one JSON object a line in `logs/events.jsonl`.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::logs;

/// Most lines of a crashed process's log that are kept with the crash, and most bytes of them.
const LAST_LINES: usize = 200;
const LAST_BYTES: u64 = 32 << 10;

/// One thing that happened.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// RFC 3339, to the millisecond.
    pub(crate) at: String,
    pub(crate) process: String,
    #[serde(flatten)]
    pub(crate) what: What,
}

/// What happened.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum What {
    /// Its state changed.
    State { from: String, to: String },
    /// It was spawned.
    Spawned { pid: u32 },
    /// A new supervisor found it alive.
    Found { pid: u32, ready: bool },
    /// It ended. Of one that ended by itself with the end of its log.
    Ended {
        exit: String,
        by_itself: bool,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        last_lines: Vec<String>,
    },
    /// It gave no sign of life, and was killed.
    Silent,
    /// Its hub is back and it is not ready: restarted.
    NotReattached,
    /// An operator asked.
    Asked { what: String, force: bool },
    /// A stop waits until it is safe.
    Waits { reasons: Vec<String> },
    /// This host lacks a part of the sandbox of spokes.
    Lacks { what: String },
    /// It was stopped although it was not safe.
    Forced { cost: Vec<String> },
    /// It gets what the hub leaves, or nothing at all, while the hub proves.
    Squeezed {
        level: String,
        rung: String,
        reason: String,
    },
    /// The hub has proven.
    Released,
    /// More happened than is written down: a process that ends as soon as it is started.
    LeftOut { events: u32 },
    /// A step of an upgrade, of the supervisor's own.
    Upgrade {
        to: String,
        step: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        failed: Option<String>,
    },
}

impl What {
    /// Whether it is of what operators do, or wait for: that happens seldom, and is always kept.
    const fn is_rare(&self) -> bool {
        match self {
            Self::Asked { .. }
            | Self::Waits { .. }
            | Self::Forced { .. }
            | Self::LeftOut { .. }
            | Self::Lacks { .. }
            | Self::Upgrade { .. } => true,
            Self::State { .. }
            | Self::Spawned { .. }
            | Self::Found { .. }
            | Self::Ended { .. }
            | Self::Silent
            | Self::NotReattached
            | Self::Squeezed { .. }
            | Self::Released => false,
        }
    }
}

impl What {
    /// A line in the supervisor's own log, of what is not said there in other words.
    fn log(&self, process: &str) {
        match self {
            Self::State { from, to } => tracing::info!(process, from, to, "state"),
            Self::Ended {
                exit,
                by_itself: true,
                last_lines,
            } => {
                let last = logs::words(last_lines);
                tracing::warn!(process, exit, last, "ended by itself");
            }
            Self::Ended { exit, .. } => tracing::info!(process, exit, "ended"),
            _ => {}
        }
    }
}

/// The end of a log, for the event of a process that ended by itself.
pub(crate) fn last_lines(log: &Path) -> Vec<String> {
    logs::last_lines(log, LAST_LINES, LAST_BYTES).unwrap_or_default()
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State { from, to } => write!(f, "{from} -> {to}"),
            Self::Spawned { pid } => write!(f, "spawned, pid {pid}"),
            Self::Found { pid, ready } => {
                let ready = if *ready { "ready" } else { "not ready" };
                write!(f, "found alive by a new supervisor, pid {pid}, {ready}")
            }
            Self::Ended {
                exit,
                by_itself,
                last_lines,
            } => {
                let by_itself = if *by_itself { " by itself" } else { "" };
                write!(f, "ended{by_itself}: {exit}")?;
                match last_lines.last() {
                    Some(line) => write!(f, ": {line}"),
                    None => Ok(()),
                }
            }
            Self::Silent => write!(f, "gave no sign of life: killed"),
            Self::NotReattached => write!(f, "not ready although its hub is: restarted"),
            Self::Asked { what, force } => {
                let force = if *force { ", by force" } else { "" };
                write!(f, "asked to {what}{force}")
            }
            Self::Waits { reasons } => write!(f, "waits: {}", reasons.join("; ")),
            Self::Lacks { what } => write!(f, "a part of the sandbox is missing: {what}"),
            Self::Forced { cost } => write!(f, "stopped by force: {}", cost.join("; ")),
            Self::Squeezed {
                level,
                rung,
                reason,
            } => write!(f, "{level} ({rung}): {reason}"),
            Self::Released => write!(f, "released"),
            Self::LeftOut { events } => write!(f, "{events} events are left out"),
            Self::Upgrade { to, step, failed } => {
                let failed = failed
                    .as_ref()
                    .map_or_else(String::new, |w| format!("{w}: "));
                write!(f, "upgrade to {to}: {failed}{step}")
            }
        }
    }
}

/// Most events of one process that are written down in a window of time. A crash has up to six.
const MOST: u32 = 120;
const WINDOW: Duration = Duration::from_secs(20);

/// What one process has written in this window.
#[derive(Clone, Copy, Debug)]
struct Budget {
    since: Instant,
    written: u32,
    left_out: u32,
}

impl Budget {
    const fn new(now: Instant) -> Self {
        Self {
            since: now,
            written: 0,
            left_out: 0,
        }
    }

    /// Whether one more fits at `now`; and how many of the window before did not.
    fn take(&mut self, now: Instant) -> (bool, u32) {
        let mut before = 0;
        if now.duration_since(self.since) >= WINDOW {
            before = self.left_out;
            *self = Self::new(now);
        }
        let fits = self.written < MOST;
        if fits {
            self.written += 1;
        } else {
            self.left_out = self.left_out.saturating_add(1);
        }
        (fits, before)
    }
}

/// The file.
#[derive(Debug)]
pub(crate) struct Events {
    path: PathBuf,
    budgets: BTreeMap<String, Budget>,
    /// What is not in the file yet: when, to which process, what.
    new: Vec<(Timestamp, String, What)>,
}

impl Events {
    pub(crate) fn new(log_dir: &Path) -> Self {
        Self {
            path: log_dir.join("events.jsonl"),
            budgets: BTreeMap::new(),
            new: Vec::new(),
        }
    }

    /// Whether a process may still say what happens to it, or does so too often for now.
    pub(crate) fn has_room(&self, process: &str) -> bool {
        let fits = |b: &Budget| b.written < MOST || b.since.elapsed() >= WINDOW;
        self.budgets.get(process).is_none_or(fits)
    }

    fn take(&mut self, process: &str) -> (bool, u32) {
        let now = Instant::now();
        match self.budgets.get_mut(process) {
            Some(budget) => budget.take(now),
            // Names are those of the configuration, so there are few.
            None => self
                .budgets
                .entry(process.into())
                .or_insert(Budget::new(now))
                .take(now),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Something that happened now. The next [`Events::flush`] says it: whoever died is started
    /// again before anybody writes about it.
    pub(crate) fn add(&mut self, process: &str, what: What) {
        let now = Timestamp::now();
        if !what.is_rare() {
            let (fits, events) = self.take(process);
            if events > 0 {
                self.new
                    .push((now, process.into(), What::LeftOut { events }));
            }
            if !fits {
                return;
            }
        }
        self.new.push((now, process.into(), what));
    }

    /// Says what happened since the last call, here and in the supervisor's own log.
    pub(crate) fn flush(&mut self) {
        let mut lines = Vec::new();
        for (at, process, what) in self.new.drain(..) {
            what.log(&process);
            let at = format!("{at:.3}");
            match serde_json::to_vec(&Entry { at, process, what }) {
                Ok(line) => lines.extend(line),
                Err(e) => tracing::warn!(%e, "event not written"),
            }
            lines.push(b'\n');
        }
        if lines.is_empty() {
            return;
        }
        let written = logs::open(&self.path).and_then(|mut file| file.write_all(&lines));
        if let Err(e) = written {
            tracing::warn!(%e, path = %self.path.display(), "events not written");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(exit: &str, by_itself: bool, last_lines: Vec<String>) -> What {
        What::Ended {
            exit: exit.into(),
            by_itself,
            last_lines,
        }
    }

    #[test]
    fn a_storm_is_counted_and_not_written() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        for _ in 0..MOST {
            assert_eq!(budget.take(start), (true, 0));
        }
        for _ in 0..7 {
            assert_eq!(budget.take(start), (false, 0));
        }
        assert_eq!(budget.take(start + WINDOW), (true, 7));
        assert_eq!(budget.take(start + WINDOW), (true, 0), "said once");

        let dir = tempfile::tempdir().unwrap();
        let mut events = Events::new(dir.path());
        for pid in 0..5000 {
            events.add("stormy", What::Spawned { pid });
        }
        assert!(!events.has_room("stormy") && events.has_room("calm"));
        events.add("calm", What::Silent);
        events.add(
            "stormy",
            What::Asked {
                what: "stop".into(),
                force: false,
            },
        );
        events.flush();
        let text = std::fs::read_to_string(events.path()).unwrap();
        assert_eq!(text.lines().count(), MOST as usize + 2);
    }

    #[test]
    fn events_are_lines_that_can_be_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = Events::new(dir.path());
        let log = dir.path().join("hub.log");
        logs::open(&log)
            .unwrap()
            .write_all(b"one\nlast words\n")
            .unwrap();
        events.add("hub", What::Spawned { pid: 7 });
        events.add("hub", ended("SIGKILL", true, last_lines(&log)));
        events.add("hub", ended("exit status 0", false, Vec::new()));
        events.flush();
        let text = std::fs::read_to_string(events.path()).unwrap();
        let all: Vec<Entry> = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        let words: Vec<String> = all.iter().map(|e| e.what.to_string()).collect();
        assert_eq!(
            words,
            [
                "spawned, pid 7",
                "ended by itself: SIGKILL: last words",
                "ended: exit status 0"
            ]
        );
    }
}
