//! What a process needs from its host, before it is spawned: it is asked, and its sockets are
//! opened.

use std::time::SystemTime;

use lotus_types::Kind;

use super::{Happened, Runner, send};
use crate::launch::Extras;
use crate::needs::{self, Asked, Told};
use crate::slot::Slot;
use crate::table::{Ended, State};

impl Runner {
    /// Asks every process that says what it needs.
    pub(super) fn ask_everyone(&mut self) {
        for i in 0..self.slots.len() {
            if !self.slots[i].process.needs.is_empty() {
                self.slots[i].asked = Asked::Waits { then_spawn: false };
                self.ask_needs(i);
            }
        }
    }

    fn ask_needs(&mut self, i: usize) {
        let slot = &self.slots[i];
        let (run, process) = (slot.run, slot.process.clone());
        let (helpers, to_us) = (self.helpers.clone(), self.happened_tx.clone());
        self.tasks.spawn(async move {
            if let Some(told) = needs::ask(&process, &helpers).await {
                send(&to_us, i, run, Happened::Told(told)).await;
            }
        });
    }

    /// Spawns process `i`, as soon as it is known what it needs.
    pub(super) fn spawn(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        match slot.asked {
            Asked::Waits { .. } => slot.asked = Asked::Waits { then_spawn: true },
            Asked::No if !slot.process.needs.is_empty() => {
                slot.asked = Asked::Waits { then_spawn: true };
                self.ask_needs(i);
            }
            Asked::No | Asked::Told(_) => self.spawn_now(i),
        }
    }

    /// Process `i`, or an operator's command for it, has the answer.
    pub(super) fn told(&mut self, i: usize, told: Told) {
        let slot = &mut self.slots[i];
        let waits = matches!(slot.asked, Asked::Waits { then_spawn: true });
        let failed = match told {
            Ok(needs) => {
                slot.asked = Asked::Told(needs);
                None
            }
            Err(unknown) => {
                tracing::warn!(
                    process = slot.process.name,
                    why = unknown.why,
                    "asked what it needs"
                );
                // It is asked again before it is spawned.
                slot.asked = Asked::No;
                let how = if unknown.config {
                    Ended::BadConfig
                } else {
                    Ended::Crashed
                };
                Some((how, unknown.why))
            }
        };
        if !waits {
            return;
        }
        match failed {
            None if slot.state == State::Starting => self.spawn_now(i),
            None => self.ended(i, Ended::Clean, "stopped before it was started"),
            Some((how, why)) => {
                slot.begin(None, SystemTime::now());
                self.ended(i, how, &why);
            }
        }
    }
}

/// Opens the sockets of a process that is to be spawned, as its configuration has them by now.
pub(super) fn open_sockets(slot: &mut Slot) -> Result<(), (Ended, String)> {
    let wanted = match &slot.asked {
        Asked::Told(needs) if slot.process.hand_sockets => needs.sockets.as_slice(),
        _ => &[],
    };
    slot.sockets.want(wanted);
    slot.sockets.open().map_err(|fault| {
        let how = match fault.kind {
            Kind::Config => Ended::BadConfig,
            _ => Ended::Crashed,
        };
        (how, format!("{fault}; fix: {}", fault.fix))
    })
}

/// What the process gets beside its command line.
pub(super) fn extras(slot: &Slot) -> Extras<'_> {
    Extras {
        sockets: slot.sockets.lent(),
        sandbox: None,
    }
}
