//! What a process needs from its host, before it is spawned: it is asked, and its sockets are
//! opened.

use std::path::Path;
use std::time::SystemTime;

use lotus_runtime::Fault;
use lotus_types::Kind;
use tokio::io::AsyncReadExt as _;

use super::{Happened, Runner, send};
use crate::config::Readiness;
use crate::launch::Extras;
use crate::needs::{self, Asked, Told};
use crate::record::{self, Identity};
use crate::sandbox::{Sandboxes, Who};
use crate::slot::Slot;
use crate::table::{Ended, Event, State};
use crate::{child, events, health, logs};

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

    /// Spawns process `i`: what it needs is known.
    fn spawn_now(&mut self, i: usize) {
        let slot = &mut self.slots[i];
        // The address of the run before may be somebody else's by now.
        if let Some(file) = &slot.process.health
            && let Err(e) = std::fs::remove_file(file)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%e, file = %file.display(), "an old address stays");
        }
        let made = open_sockets(slot).and_then(|()| confine(slot, &self.sandboxes));
        let spawned = made.and_then(|()| {
            let (notify, extras) = (self.notify.path(), extras(slot));
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
            .add(&slot.process.name, events::What::Spawned { pid });
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

    pub(super) fn follow_health(&mut self, i: usize) {
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

impl Runner {
    /// Says once what this host lacks, and lets spokes of other users reach the supervisor.
    pub(super) fn sandboxes_at_start(&mut self) -> Result<(), Fault> {
        for lack in self.sandboxes.lacks() {
            tracing::warn!(lack, "the sandboxes of spokes are weaker on this host");
            let what = events::What::Lacks { what: lack };
            self.events.add("supervisor", what);
        }
        self.sandboxes.open_own().map_err(|e| {
            Fault::new(
                Kind::Config,
                format!(
                    "sandbox.group does not reach {}: {e}",
                    self.notify.path().display()
                ),
                "name a group in sandbox.group, or empty sandbox.users",
            )
        })
    }

    /// The hub made its sockets anew: spokes of other users are to reach them.
    pub(super) fn sandboxes_at_state(&self, i: usize) {
        let slot = &self.slots[i];
        let Some(socket) = slot
            .process
            .safety
            .as_ref()
            .filter(|_| slot.state == State::Ready)
        else {
            return;
        };
        if let Err(e) = self.sandboxes.open_hub(socket) {
            tracing::warn!(%e, "spokes with users of their own do not reach the hub");
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

/// Makes the sandbox of a process that said what it needs.
pub(super) fn confine(slot: &mut Slot, sandboxes: &Sandboxes) -> Result<(), (Ended, String)> {
    let (Asked::Told(needs), Some(program)) = (&slot.asked, slot.process.command.first()) else {
        return Ok(());
    };
    let who = Who {
        service: &slot.process.name,
        program: Path::new(program),
        env: &slot.process.env,
        handed: slot.process.hand_sockets,
    };
    let made = sandboxes.of(&who, needs);
    let made = made.map_err(|e| (Ended::Crashed, format!("its sandbox: {program}: {e}")))?;
    (slot.profile, slot.sandbox) = made.map_or_else(Default::default, |(p, w)| (Some(p), w));
    Ok(())
}

/// What the process gets beside its command line.
pub(super) fn extras(slot: &Slot) -> Extras<'_> {
    Extras {
        sockets: slot.sockets.lent(),
        sandbox: slot.profile.clone(),
    }
}
