//! What a supervisor that starts finds alive.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lotus_runtime::Fault;

use super::{Happened, Runner, send};
use crate::child::{self, Adopted};
use crate::config::Readiness;
use crate::fence::{Fence, FenceError};
use crate::record::{self, Entry, Found, Identity};
use crate::table::{Event, State};
use crate::{events, logs};

impl Runner {
    /// Finds out whether a process lives, and takes hold of it.
    pub(super) fn take_over(&mut self, i: usize, known: Option<&Entry>) -> Result<(), Fault> {
        let slot = &mut self.slots[i];
        if let Some(known) = known {
            slot.restore(known);
        }
        if slot.removed {
            slot.state = State::Stopped;
        }
        let recorded = known.and_then(|k| k.alive);
        let holders = match Fence::take(&slot.fence) {
            Ok(free) => {
                drop(free);
                Vec::new()
            }
            Err(FenceError::Held(pids)) => pids,
            Err(FenceError::Io(e)) => return Err(e.into()),
        };
        let pid = match record::found(recorded, record::start_time, &holders, record::is_leader) {
            Found::Nobody => return Ok(()),
            Found::Leftovers(pids) => {
                for pid in pids {
                    child::kill_leftover(pid);
                }
                return Ok(());
            }
            Found::Alive(pid) => pid,
        };
        let Some(start_time) = record::start_time(pid) else {
            return Ok(());
        };
        let id = Identity { pid, start_time };
        // A child of ours, if this process replaced its image: it is reaped as any other.
        let ours = record::is_child(pid);
        let adopted = if ours { None } else { Adopted::new(id)? };
        if adopted.is_none() && !ours {
            return Ok(());
        }
        let known = known.filter(|k| k.alive == Some(id));
        let since = known.map_or_else(SystemTime::now, |k| {
            UNIX_EPOCH + Duration::from_millis(k.since_unix_ms)
        });
        let slot = &mut self.slots[i];
        let run = slot.begin(Some(id), since);
        let squeezed = known.is_some_and(|k| k.squeezed);
        let name = slot.process.name.clone();
        self.guard.found(&mut slot.guard, &name, pid, squeezed);
        let ready = slot.process.ready == Readiness::AtOnce || known.is_some_and(|k| k.ready);
        tracing::info!(process = slot.process.name, pid, ready, "found alive");
        let name = &slot.process.name;
        self.events.add(name, events::What::Found { pid, ready });
        logs::mark(
            &slot.log,
            &format!("pid {pid} lives on under a new supervisor"),
        );
        // Of a record without it, or none: it is not known what runs.
        slot.program = known.map_or_else(String::new, |k| k.program.clone());
        if let Some(adopted) = adopted {
            let to_us = self.happened_tx.clone();
            self.tasks.spawn(async move {
                let (how, words) = adopted.ended().await;
                send(&to_us, i, run, Happened::Ended(how, words)).await;
            });
        }
        self.follow_health(i);
        let draining = known.is_some_and(|k| k.drains_until_unix_ms > 0);
        let event = match draining {
            true => Event::FoundDraining,
            false => Event::Found { ready },
        };
        self.event(i, event);
        Ok(())
    }
}
