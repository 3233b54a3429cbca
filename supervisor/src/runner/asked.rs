//! What operators ask for, and the waiting until it is safe.

use std::time::Instant;

use super::{Force, Happened, Request, Runner, send};
use crate::plan::{self, Safety, Verdict, What};
use crate::proto::StatusResponse;
use crate::slot::{Plan, Slot};
use crate::table::{Event, State};
use crate::{events, logs, upgrade};

impl Runner {
    pub(super) fn handle(&mut self, request: Request) -> Result<StatusResponse, String> {
        let mut patience = None;
        let (name, force, what) = match request {
            Request::Serves => {
                if self.upgrade_step.arrived {
                    self.upgrade_event(upgrade::Event::Done, String::new());
                }
                return Ok(self.status());
            }
            Request::Upgrade { .. } if self.stopping.is_some() => {
                return Err("the supervisor is stopping".into());
            }
            Request::Upgrade { dir, force, back } => {
                self.upgrade(&dir, force, back)?;
                return Ok(self.status());
            }
            Request::Status => return Ok(self.status()),
            Request::Stop {
                name: None,
                force: true,
            } if self.stopping.is_some() => {
                self.stopping = Some(Force::AtOnce);
                // What it costs is written down.
                for i in 0..self.slots.len() {
                    if self.slots[i].plan.is_some() {
                        self.plan(i, What::Stop, true);
                    }
                }
                return Ok(self.status());
            }
            _ if self.stopping.is_some() => return Err("the supervisor is stopping".into()),
            Request::Stop { name: None, force } => {
                tracing::info!(force, "asked to stop everything");
                self.plan_all(force);
                return Ok(self.status());
            }
            Request::Needs { name, needs } => {
                let is = |s: &Slot| s.process.name == name;
                if let Some(i) = self.slots.iter().position(is) {
                    self.told(i, Ok(needs));
                }
                return Ok(self.status());
            }
            Request::Start(name) => (name, false, None),
            Request::Stop {
                name: Some(name),
                force,
            } => (name, force, Some(What::Stop)),
            Request::Restart { name, force } => (name, force, Some(What::Restart)),
            Request::Drain { name, force, limit } => {
                patience = Some(limit);
                (name, force, Some(What::Drain))
            }
        };
        let Some(i) = self.slots.iter().position(|s| s.process.name == name) else {
            let names: Vec<&str> = self.slots.iter().map(|s| s.process.name.as_str()).collect();
            return Err(format!(
                "there is no process {name:?}; there are {}",
                names.join(", ")
            ));
        };
        tracing::info!(process = name, ?what, force, "asked for");
        let asked = events::What::Asked {
            what: what.map_or("start", What::name).into(),
            force,
        };
        self.events.add(&name, asked);
        if let Some(patience) = patience {
            self.slots[i].drain = patience;
        }
        match what {
            Some(what) => self.plan(i, what, force),
            None => {
                self.slots[i].plan = None;
                self.event(i, Event::WantStart);
            }
        }
        self.start_what_can();
        Ok(self.status())
    }

    /// The hub, if it does its work and cannot go on without process `i`.
    pub(super) fn hub_above(&self, i: usize) -> Option<usize> {
        let names = |i: usize| self.slots[i].process.name.as_str();
        let mut below = vec![i];
        while let Some(at) = below.pop() {
            let slot = &self.slots[at];
            let works = matches!(slot.state, State::Ready | State::Unready);
            if works && slot.process.safety.is_some() {
                return Some(at);
            }
            below.extend(
                (0..self.slots.len())
                    .filter(|j| self.slots[*j].process.after.iter().any(|a| a == names(at))),
            );
        }
        None
    }

    pub(super) fn plan_all(&mut self, force: bool) {
        let hub = (0..self.slots.len()).find(|i| self.hub_above(*i) == Some(*i));
        match hub {
            Some(hub) => self.plan(hub, What::StopAll, force),
            None => self.stop_all(force),
        }
    }

    fn stop_all(&mut self, force: bool) {
        self.stopping = Some(if force { Force::AtOnce } else { Force::Waits });
        tracing::info!("stopping every process, spokes first");
    }

    /// Stops process `i`, of which nobody needs anything any more. It was safe for the hub when
    /// the stop of everything began; spokes may have drained for long since.
    pub(super) fn stop_last(&mut self, i: usize, force: Force) {
        let slot = &self.slots[i];
        match (&slot.plan, self.hub_above(i)) {
            (None, Some(hub)) if hub == i && force == Force::Waits => {
                self.plan(i, What::Stop, false);
            }
            // The hub's answer is on its way.
            (Some(_), Some(_)) => {}
            _ => self.event(i, Event::WantStop),
        }
    }

    /// Does `what` to process `i` when it is safe for the hub. To one that is not alive at once:
    /// that takes nothing from the hub.
    pub(super) fn plan(&mut self, i: usize, what: What, force: bool) {
        let alive = self.slots[i].state.is_alive();
        let Some(hub) = self.hub_above(i).filter(|_| alive) else {
            return self.carry_out(i, what, force);
        };
        self.slots[i].plan = Some(Plan {
            what,
            force,
            again: None,
            reasons: Vec::new(),
            until: None,
        });
        self.ask(i, hub);
    }

    pub(super) fn ask(&mut self, i: usize, hub: usize) {
        let Some(socket) = self.slots[hub].process.safety.clone() else {
            return;
        };
        let (run, to_us) = (self.slots[i].run, self.happened_tx.clone());
        // The first answer is to be there at once: it is shown.
        let waits = (self.slots[i].plan.as_ref()).is_some_and(|p| !p.reasons.is_empty());
        self.tasks.spawn(async move {
            let answer = plan::ask(socket, waits).await;
            send(&to_us, i, run, Happened::Safety(answer)).await;
        });
    }

    pub(super) fn answered(&mut self, i: usize, answer: Result<Safety, String>) {
        let slot = &mut self.slots[i];
        let Some(plan) = &mut slot.plan else { return };
        match plan::decide(answer, plan.force) {
            Verdict::Wait { reasons, until } => {
                if plan.reasons != reasons {
                    tracing::info!(process = slot.process.name, ?reasons, "not safe yet");
                    let what = events::What::Waits {
                        reasons: reasons.clone(),
                    };
                    self.events.add(&slot.process.name, what);
                }
                plan.reasons = reasons;
                plan.until = until;
                plan.again = Some(Instant::now() + plan::AGAIN);
            }
            Verdict::Go { cost } => {
                let (what, force) = (plan.what, plan.force);
                if !cost.is_empty() {
                    let forced = events::What::Forced { cost: cost.clone() };
                    self.events.add(&slot.process.name, forced);
                    let cost = cost.join("; ");
                    tracing::warn!(process = slot.process.name, cost, "stopped by force");
                    logs::mark(&slot.log, &format!("stopped by force: {cost}"));
                }
                self.carry_out(i, what, force);
            }
        }
    }

    pub(super) fn carry_out(&mut self, i: usize, what: What, force: bool) {
        self.slots[i].plan = None;
        match what {
            What::Stop => self.event(i, Event::WantStop),
            What::Restart => self.event(i, Event::WantRestart),
            What::Drain => self.event(i, Event::WantDrain),
            What::StopAll => self.stop_all(force),
        }
    }
}
