//! The effects of an upgrade: checks, units that change their release, and the supervisor itself.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Runner;
use crate::needs::Asked;
use crate::plan::What;
use crate::processes::{self, Process};
use crate::proto::UpgradeStatus;
use crate::release::{self, Journal, Outcome, Unit};
use crate::table::{self, Ended, State};
use crate::upgrade::{self, Event, Next, Phase};
use crate::{child, events, image, logs};

/// How long a check may take.
const CHECK: Duration = Duration::from_secs(60);
/// How often a unit may end by itself before it is not going to be ready.
const TRIES: u32 = 3;
/// How long the supervisor waits until nobody is being started or stopped: what it knows of that
/// is not handed over.
const SETTLE: Duration = Duration::from_secs(900);

/// What is known of the step that is done now, and not written down.
#[derive(Debug, Default)]
pub(super) struct Step {
    check: Option<Check>,
    unit: Option<Begun>,
    settle: Option<Instant>,
    /// This is the new image, and waits for the word that it serves.
    pub(super) arrived: bool,
}

/// A check that runs.
#[derive(Debug)]
struct Check {
    pid: u32,
    until: Instant,
    ended: Option<(Ended, String)>,
}

/// A unit that was told to change its release.
#[derive(Debug, Default)]
struct Begun {
    /// From when its restart is carried out: until when it must be ready, and how often it had
    /// been restarted before.
    running: Option<(Instant, u32)>,
}

/// What looking at a step says.
type Seen = Option<(Event, String)>;

/// A command that a release must pass.
struct Checked {
    words: Vec<String>,
    env: Vec<(String, String)>,
}

impl Runner {
    /// What an operator asks for: to go to the release in `dir`, to replace the supervisor alone
    /// if there is none, or to go back.
    pub(super) fn upgrade(&mut self, dir: &str, force: bool, back: bool) -> Result<(), String> {
        if let Some(running) = &self.release.upgrade {
            if back {
                self.upgrade_event(Event::Abort, "an operator wants it back".into());
                return Ok(());
            }
            return Err(format!(
                "an upgrade to {} is under way; `upgrade --rollback` takes it back",
                running.to.display()
            ));
        }
        let from = self.bin.clone();
        let to =
            match (back, dir) {
                (true, _) => self.release.previous.clone().ok_or(
                    "no release is known before this one: there was no `upgrade --from` yet",
                )?,
                (false, "") => from.clone(),
                (false, dir) => PathBuf::from(dir),
            };
        let alone = !back && dir.is_empty();
        let same = || std::fs::canonicalize(&to).ok() == std::fs::canonicalize(&from).ok();
        if !alone && same() {
            return Err(format!(
                "{} is what runs: the way back needs it, so a new release needs a folder of its own",
                to.display()
            ));
        }
        let image = match self.release.current.is_none() && alone {
            true => image::own_path().map_err(|e| e.to_string())?,
            false => release::supervisor(&to),
        };
        let mut journal = Journal {
            id: millis(
                SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default(),
            ),
            from,
            to,
            image,
            force,
            units: Vec::new(),
            checks: 0,
            phase: Phase::Checking(0),
            why: String::new(),
        };
        if !alone {
            journal.units = self.units(&journal)?;
        }
        journal.checks = self.checks(&journal)?.len();
        tracing::info!(to = %journal.to.display(), image = %journal.image.display(), "upgrade");
        self.upgrade_step = Step::default();
        self.release.upgrade = Some(journal);
        release::write(&self.root, &self.release).map_err(|e| {
            self.release.upgrade = None;
            format!("release.json is not written: {e}")
        })?;
        self.told_of_upgrade(None);
        Ok(())
    }

    /// Those whose program is another one in the new release.
    fn units(&self, journal: &Journal) -> Result<Vec<Unit>, String> {
        let new = self.processes_of(&journal.to)?;
        let changes = |p: &Process| {
            !p.is_oneshot() && (new.iter()).any(|n| n.name == p.name && n.command != p.command)
        };
        let moved = (self.slots.iter()).filter(|s| !s.removed && changes(&s.process));
        Ok(moved
            .map(|s| Unit {
                name: s.process.name.clone(),
                must: matches!(s.state, State::Ready | State::Unready),
            })
            .collect())
    }

    fn processes_of(&self, dir: &Path) -> Result<Vec<Process>, String> {
        processes::of_host(&self.cfg, &self.root, dir).map_err(|e| format!("{e}; {}", e.fix))
    }

    /// What a release must pass before anything is moved: each binary is there and runs, and
    /// understands the configuration.
    fn checks(&self, journal: &Journal) -> Result<Vec<Checked>, String> {
        let image = journal.image.display().to_string();
        let root = self.root.display().to_string();
        let checked = |words: &[&str], env: Vec<(String, String)>| Checked {
            words: words.iter().map(|w| (*w).to_owned()).collect(),
            env,
        };
        let mut all = vec![checked(&[&image, "--version"], Vec::new())];
        let new = self.processes_of(&journal.to)?;
        let mut programs: Vec<String> = Vec::new();
        let worker = "lotus-worker";
        if journal.from.join(worker).is_file() {
            programs.push(journal.to.join(worker).display().to_string());
        }
        for unit in &journal.units {
            let process = new.iter().find(|p| p.name == unit.name);
            programs.extend(process.and_then(|p| p.command.first().cloned()));
        }
        programs.sort_unstable();
        programs.dedup();
        for program in &programs {
            all.push(checked(&[program, "--version"], Vec::new()));
        }
        let mut asked: Vec<&str> = Vec::new();
        for p in new
            .iter()
            .filter(|p| journal.units.iter().any(|u| u.name == p.name))
        {
            let Some(program) = p.command.first() else {
                continue;
            };
            let repo = match Path::new(program).file_name().and_then(|n| n.to_str()) {
                Some("lotus-miner") => self.root.join("miner"),
                Some("lotus-markets") => self.root.join("markets"),
                _ => continue,
            };
            // A hub that is not initialised yet has nothing to check.
            let checkable = repo.ends_with("markets") || repo.join("config.toml").exists();
            if !checkable || asked.contains(&program.as_str()) {
                continue;
            }
            asked.push(program);
            let repo = repo.display().to_string();
            let words = [program.as_str(), "config", "check", "--repo", &repo];
            let env = p.env.clone().into_iter().collect();
            all.push(checked(&words, env));
        }
        all.push(checked(
            &[&image, "--repo", &root, "config", "check"],
            Vec::new(),
        ));
        Ok(all)
    }

    /// Looks at the step that is done, and goes on for as long as there is something to do.
    pub(super) fn upgrade_on(&mut self) {
        while let Some((event, why)) = self.look() {
            self.upgrade_event(event, why);
        }
    }

    /// When something of it is due.
    pub(super) fn upgrade_due(&self) -> Option<Instant> {
        let step = &self.upgrade_step;
        let check = step
            .check
            .as_ref()
            .filter(|c| c.ended.is_none())
            .map(|c| c.until);
        let unit = step
            .unit
            .as_ref()
            .and_then(|b| b.running)
            .map(|(until, _)| until);
        check.into_iter().chain(unit).chain(step.settle).min()
    }

    fn look(&mut self) -> Seen {
        match self.release.upgrade.as_ref()?.phase {
            Phase::Checking(n) => self.look_at_check(n),
            Phase::Moving(n) => self.lost(n).or_else(|| self.look_at_unit(n, false)),
            Phase::Undoing(n) => self.look_at_unit(n, true),
            Phase::Executing => self.look_at_all(),
        }
    }

    fn look_at_check(&mut self, n: usize) -> Seen {
        let log = self.root.join("run/upgrade-check.log");
        let journal = self.release.upgrade.as_ref()?;
        let failed = |why: String| Some((Event::Failed, why));
        let checks = match self.checks(journal) {
            Ok(all) => all,
            Err(e) => return failed(e),
        };
        let Some(wanted) = checks.get(n) else {
            return Some((Event::Done, String::new()));
        };
        let words = wanted.words.join(" ");
        let Some(check) = &self.upgrade_step.check else {
            return match run_check(wanted, &log) {
                Ok(pid) => {
                    let until = Instant::now() + CHECK;
                    let ended = None;
                    self.upgrade_step.check = Some(Check { pid, until, ended });
                    None
                }
                Err(e) => failed(format!("{words}: {e}")),
            };
        };
        match &check.ended {
            Some((Ended::Clean, _)) => Some((Event::Done, String::new())),
            Some((_, how)) => failed(format!("{words}: {how}: {}", logs::last_words(&log))),
            None if Instant::now() >= check.until => {
                child::kill_group(check.pid);
                failed(format!("{words}: no end within {CHECK:?}"))
            }
            None => None,
        }
    }

    /// A child ended that is no process of ours to keep.
    pub(super) fn check_ended(&mut self, pid: u32, how: Ended, words: String) {
        if let Some(check) = &mut self.upgrade_step.check
            && check.pid == pid
        {
            check.ended = Some((how, words));
        }
    }

    /// A unit that was moved, and gave up after that.
    fn lost(&self, n: usize) -> Seen {
        let moved = &self.release.upgrade.as_ref()?.units[..n];
        let lost = |s: &&crate::slot::Slot| {
            s.state == State::Failed && moved.iter().any(|u| u.must && u.name == s.process.name)
        };
        let slot = self.slots.iter().find(lost)?;
        let why = format!(
            "{} failed after it was moved: {}",
            slot.process.name, slot.reason
        );
        Some((Event::Failed, why))
    }

    fn look_at_unit(&mut self, n: usize, back: bool) -> Seen {
        let done = Some((Event::Done, String::new()));
        let failed = |why: String| Some((Event::Failed, why));
        let journal = self.release.upgrade.as_ref()?;
        let Some(unit) = journal.units.get(n).cloned() else {
            return done;
        };
        let dir = if back { &journal.from } else { &journal.to };
        let force = journal.force;
        let is = |p: &Process| p.name == unit.name;
        // The configuration does not name it any more.
        let Some(i) = self.slots.iter().position(|s| is(&s.process)) else {
            return done;
        };
        if self.upgrade_step.unit.is_none() {
            let process = match self.processes_of(dir) {
                Ok(all) => all.into_iter().find(is),
                Err(e) => return failed(e),
            };
            let Some(process) = process else { return done };
            self.upgrade_step.unit = Some(Begun::default());
            self.change_release(i, process, force);
        }
        let slot = &self.slots[i];
        if slot.plan.is_some() {
            return None;
        }
        let name = &unit.name;
        let words = || logs::last_words(&slot.log);
        let is_new = slot.alive.is_some() && !slot.is_stale();
        match slot.state {
            State::Stopped => return done,
            State::Ready if is_new => return done,
            State::Waiting | State::Starting | State::Unready | State::Backoff | State::Failed
                if !unit.must && !slot.is_stale() =>
            {
                return done;
            }
            State::Failed => return failed(format!("{name} failed: {}", slot.reason)),
            _ => {}
        }
        if slot.is_stale() && slot.state.is_alive() && !slot.state.is_ending() {
            return failed(format!("the restart of {name} was taken back"));
        }
        let patience = slot.process.stop + slot.process.start;
        let begun = self.upgrade_step.unit.get_or_insert_default();
        let (until, before) =
            *(begun.running).get_or_insert((Instant::now() + patience, slot.restarts));
        if slot.restarts.saturating_sub(before) >= TRIES {
            let how = &slot.last_exit;
            return failed(format!(
                "{name} ended by itself {TRIES} times: {how}: {}",
                words()
            ));
        }
        if Instant::now() >= until {
            let secs = patience.as_secs();
            return failed(format!("{name} is not ready within {secs} s: {}", words()));
        }
        None
    }

    /// Process `i` is to run as `process` from its next start on, which is now.
    fn change_release(&mut self, i: usize, process: Process, force: bool) {
        let slot = &mut self.slots[i];
        slot.process = process;
        // It may need something else than the release before.
        slot.asked = Asked::No;
        match slot.state {
            State::Starting | State::Ready | State::Unready if slot.is_stale() => {
                self.plan(i, What::Restart, force);
            }
            State::Backoff | State::Failed => self.event(i, table::Event::WantRestart),
            _ => {}
        }
        self.start_what_can();
    }

    /// The supervisor itself is next, once nobody is being started or stopped.
    fn look_at_all(&mut self) -> Seen {
        if self.upgrade_step.arrived || self.leave.is_some() {
            return None;
        }
        let units = self.release.upgrade.as_ref()?.units.len();
        if let lost @ Some(_) = self.lost(units) {
            return lost;
        }
        let busy = (self.slots.iter()).find(|s| s.state == State::Starting || s.state.is_ending());
        let Some(busy) = busy else {
            self.leave = Some(self.release.upgrade.as_ref()?.image.clone());
            return None;
        };
        let now = Instant::now();
        if now >= *self.upgrade_step.settle.get_or_insert(now + SETTLE) {
            let (name, state) = (&busy.process.name, busy.state.name());
            let why = format!("{name} is {state} for over {} s", SETTLE.as_secs());
            return Some((Event::Failed, why));
        }
        None
    }

    /// One step on, or back.
    pub(super) fn upgrade_event(&mut self, event: Event, why: String) {
        let Some(journal) = &mut self.release.upgrade else {
            return;
        };
        if let Some(check) = self.upgrade_step.check.take()
            && check.ended.is_none()
        {
            child::kill_group(check.pid);
        }
        self.upgrade_step = Step::default();
        self.leave = None;
        if event != Event::Done {
            tracing::warn!(?event, why, "upgrade");
            if !journal.why.is_empty() {
                journal.why.push_str("; ");
            }
            journal.why.push_str(&why);
        }
        let before = journal.phase;
        match upgrade::step(before, event, journal.checks, journal.units.len()) {
            Next::Go(phase) => journal.phase = phase,
            over @ (Next::Commit | Next::GiveUp) => {
                let outcome = Outcome {
                    id: journal.id,
                    to: journal.to.clone(),
                    ok: over == Next::Commit,
                    moved: !matches!(before, Phase::Checking(_)),
                    reason: journal.why.clone(),
                };
                let runs = if outcome.ok {
                    &journal.to
                } else {
                    &journal.from
                };
                self.bin.clone_from(runs);
                if outcome.ok && journal.from != journal.to {
                    self.release.previous = Some(journal.from.clone());
                    self.release.current = Some(journal.to.clone());
                }
                self.release.upgrade = None;
                self.release.last = Some(outcome);
            }
        }
        if let Err(e) = release::write(&self.root, &self.release) {
            tracing::error!(%e, "release.json is not written: the next supervisor knows less");
        }
        self.told_of_upgrade((event != Event::Done).then_some(why));
    }

    /// Writes down where it is.
    fn told_of_upgrade(&mut self, failed: Option<String>) {
        let Some(status) = self.upgrade_status() else {
            return;
        };
        let step = match (status.running, status.ok) {
            (true, _) => status.step,
            (false, true) => "done".into(),
            (false, false) => "not done".into(),
        };
        tracing::info!(to = status.to, step, "upgrade");
        let what = events::What::Upgrade {
            to: status.to,
            step,
            failed,
        };
        self.events.add("supervisor", what);
    }

    /// For operators: the upgrade that is under way, else the last one.
    pub(super) fn upgrade_status(&self) -> Option<UpgradeStatus> {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let Some(journal) = &self.release.upgrade else {
            let last = self.release.last.as_ref()?;
            return Some(UpgradeStatus {
                id: last.id,
                to: last.to.display().to_string(),
                ok: last.ok,
                reason: last.reason.clone(),
                moved: last.moved,
                ..UpgradeStatus::default()
            });
        };
        let name = |n: usize| journal.units.get(n).map_or("", |u| u.name.as_str());
        let words = |n: usize| {
            let checks = self.checks(journal).unwrap_or_default();
            checks
                .get(n)
                .map_or_else(String::new, |c| c.words.join(" "))
        };
        let (checks, units) = (journal.checks, journal.units.len());
        let (to, done) = (
            if journal.units.is_empty() {
                journal.image.display().to_string()
            } else {
                journal.to.display().to_string()
            },
            upgrade::done(journal.phase, checks, units),
        );
        Some(UpgradeStatus {
            id: journal.id,
            to,
            running: true,
            step: match journal.phase {
                Phase::Checking(n) => format!("checks {}", words(n)),
                Phase::Moving(n) => format!("moves {}", name(n)),
                Phase::Undoing(n) => format!("moves {} back", name(n)),
                Phase::Executing => "replaces the supervisor".into(),
            },
            done: count(done),
            steps: count(upgrade::steps(checks, units)),
            reason: journal.why.clone(),
            moved: !matches!(journal.phase, Phase::Checking(_)),
            ..UpgradeStatus::default()
        })
    }
}

/// Starts a check, with what it says in `log`. Who reaps children tells how it ended.
fn run_check(check: &Checked, log: &Path) -> io::Result<u32> {
    let (program, args) = (check.words.split_first()).ok_or_else(|| io::Error::other("empty"))?;
    let out = std::fs::File::create(log)?;
    let mut command = Command::new(program);
    child::own_variables(&mut command);
    Ok(command
        .args(args)
        .envs(check.env.iter().map(|(k, v)| (k, v)))
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(out)
        .process_group(0)
        .spawn()?
        .id())
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}
