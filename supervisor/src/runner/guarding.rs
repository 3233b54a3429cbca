//! The proving guard's part of the runner: squeezes and releases between two things that happen.

use std::time::Instant;

use super::{Happened, Runner, send};
use crate::events;
use crate::guard::{self, Change, Level, Mode, Phase};
use crate::slot::Slot;
use crate::table::State;

impl Runner {
    /// Follows what the hub proves, from when it is ready until it ends.
    pub(super) fn follow_proving(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        let Some(socket) = slot.process.safety.clone() else {
            return;
        };
        let (run, to_us) = (slot.run, self.happened_tx.clone());
        if self.slots.iter().all(|s| s.process.guard == Mode::Off) {
            return;
        }
        let task = self.tasks.spawn(async move {
            let told = |work| send(&to_us, i, run, Happened::Proving(work));
            guard::follow(socket, told).await;
        });
        self.slots[i].keep(task);
    }

    /// Squeezes, freezes and releases what is to be.
    pub(super) fn guard(&mut self) {
        let mut changes: Vec<(usize, Change)> = Vec::new();
        for (i, slot) in self.slots.iter_mut().enumerate() {
            let phase = phase(slot);
            changes.extend(self.guard.decide(&mut slot.guard, phase).map(|c| (i, c)));
        }
        if changes.is_empty() {
            return;
        }
        // A supervisor that is killed now leaves word of it.
        self.save();
        for (i, change) in changes {
            let slot = &mut self.slots[i];
            let name = slot.process.name.clone();
            if let Some(id) = slot.alive.filter(|_| change.from != change.to) {
                self.guard.apply(&slot.guard, &name, id.pid);
            }
            slot.frozen(change.from == Level::Frozen);
            let Change {
                to,
                rung,
                reason,
                event,
                ..
            } = change;
            let what = if to == Level::Free {
                tracing::debug!(process = name, "released");
                events::What::Released
            } else {
                tracing::debug!(process = name, rung, reason, "{}", to.name());
                events::What::Squeezed {
                    level: to.name().into(),
                    rung: rung.into(),
                    reason,
                }
            };
            if event {
                tracing::info!(process = name, "guard: {what}");
                self.events.add(&name, what);
            }
        }
    }

    /// When the guard has to look again without anything happening.
    pub(super) fn guard_due(&self) -> Option<Instant> {
        let freezes = self.slots.iter().any(|s| s.process.guard == Mode::Freeze);
        self.guard.due(freezes)
    }
}

fn phase(slot: &Slot) -> Phase {
    match slot.state {
        _ if slot.alive.is_none() => Phase::Gone,
        State::Ready | State::Unready if slot.plan.is_none() => Phase::Working,
        _ => Phase::Moving,
    }
}
