//! What happens to processes: it goes through the table, and what the table says is done.

use std::time::{Duration, Instant};

use rand::Rng as _;

use super::{Happened, Runner};
use crate::notify::Said;
use crate::slot::Slot;
use crate::table::{Effect, Ended, Event, State, restart_delay, step};
use crate::{child, events, logs};

impl Runner {
    /// Everything that is due.
    pub(super) fn fire(&mut self) {
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
                        self.events.add(&slot.process.name, events::What::Silent);
                        tracing::warn!(process = slot.process.name, "gave no sign of life: killed");
                        logs::mark(&slot.log, "it gave no sign of life: killed");
                    }
                    Event::ReattachTimeout => {
                        self.events
                            .add(&slot.process.name, events::What::NotReattached);
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
                        let plan = self.slots[i].plan.as_ref().map(|p| (p.what, p.force));
                        if let Some((what, force)) = plan {
                            self.carry_out(i, what, force);
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

    pub(super) fn watch_logs(&self) {
        self.writes
            .watch(self.slots.iter().map(|s| s.log.as_path()));
    }

    pub(super) fn reap(&mut self) {
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

    pub(super) fn said(&mut self, said: Said) {
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

    pub(super) fn happened(&mut self, i: usize, run: u64, what: Happened) {
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

    pub(super) fn ended(&mut self, i: usize, how: Ended, words: &str) {
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
        let last_lines = match by_itself && self.events.has_room(&slot.process.name) {
            true => events::last_lines(&slot.log),
            false => Vec::new(),
        };
        let what = events::What::Ended {
            exit: words.into(),
            by_itself,
            last_lines,
        };
        self.events.add(&slot.process.name, what);
        let how = if by_itself {
            slot.too_often(how, limit)
        } else {
            how
        };
        match how {
            Ended::BadConfig if by_itself => {
                let last = logs::last_words(&slot.log);
                let silent = last.is_empty() || !ran;
                slot.reason = if silent { words.into() } else { last };
            }
            Ended::CrashedTooOften => {
                slot.reason = format!("ended by itself more than {limit} times in an hour");
            }
            _ => {}
        }
        logs::mark(&slot.log, &format!("{pid}{words}"));
        // A plan was for the run that is over.
        let planned = slot.plan.take().map(|p| (p.what, p.force));
        self.event(i, Event::Ended(how));
        if let Some((what, force)) = planned {
            self.carry_out(i, what, force);
        }
    }

    pub(super) fn event(&mut self, i: usize, event: Event) {
        let slot = &mut self.slots[i];
        let (next, effects) = step(&slot.state, event, slot.process.is_oneshot());
        let was_alive = slot.state.is_alive();
        if next != slot.state {
            let what = events::What::State {
                from: slot.state.name().into(),
                to: next.name().into(),
            };
            self.events.add(&slot.process.name, what);
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
}
