use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use lotus_journal::{EffectId, Pending};
use lotus_runtime::{Backoff, trace};
use lotus_types::SectorNumber;
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::SealingError;
use crate::batch::BatchKind;
use crate::machine::{Effect, Event, Sector, Sectors};
use crate::pieces::{Due, due};
use crate::shared::{Also, Live, Shared, unix_ms};

/// First and longest wait before something is asked again that did not answer.
const AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// Wait before an effect is run again that panicked.
const AFTER_PANIC: Duration = Duration::from_secs(60);

/// Runs the journaled effects of all sectors, each in its own task.
pub struct Runner(pub(crate) Arc<Shared>);

impl Runner {
    /// Runs until `stop`. What is not finished then stays journaled and is run at the next
    /// start.
    pub async fn run(self, stop: CancellationToken) {
        let shared = self.0;
        let mut tasks = JoinSet::new();
        let mut running: HashMap<EffectId, Id> = HashMap::new();
        let mut trouble = Backoff::new(AGAIN.0, AGAIN.1);
        tasks.spawn(shared.clone().watch_young());
        loop {
            let reader = shared.clone();
            let pending = shared.blocking(move || Ok(reader.pending()?)).await;
            let pause = match pending {
                Ok(pending) => {
                    trouble.reset();
                    for p in pending {
                        running.entry(p.id).or_insert_with(|| {
                            let work = shared.clone().perform(p);
                            tasks.spawn(work).id()
                        });
                    }
                    None
                }
                Err(e) => {
                    tracing::error!(error = %e, "the journal of sectors can not be read");
                    Some(trouble.next())
                }
            };
            let paused = async {
                match pause {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => break,
                () = shared.wake.notified() => {}
                () = paused => {}
                Some(ended) = tasks.join_next_with_id() => {
                    let id = match ended {
                        Ok((id, ())) => id,
                        Err(e) => {
                            tracing::error!(error = %e, "a sealing step panicked");
                            let id = e.id();
                            let stop = stop.clone();
                            let rest = tokio::time::timeout(AFTER_PANIC, stop.cancelled_owned());
                            let after = tasks.spawn(async { drop(rest.await) }).id();
                            for task in running.values_mut().filter(|t| **t == id) {
                                *task = after;
                            }
                            continue;
                        }
                    };
                    running.retain(|_, task| *task != id);
                }
            }
        }
        shared.stop.cancel();
        while tasks.join_next().await.is_some() {}
        shared.calls.close();
        shared.calls.wait().await;
    }
}

impl Shared {
    /// Runs one effect until it is settled, or until the runner stops.
    async fn perform(self: Arc<Self>, pending: Pending<Sectors>) {
        let number = pending.key;
        let span = tracing::info_span!("seal", sector = %number, effect = ?pending.effect);
        // The trace of the sector's first deal; those of the others link to it.
        let pieces = self.busy(number).map(|s| s.pieces).unwrap_or_default();
        if let Some((first, others)) = pieces.split_first() {
            trace::set_parent(&span, &first.trace);
            for piece in others {
                trace::link(&span, &piece.trace);
            }
        }
        let stop = self.stop.clone();
        let work = async {
            let mut backoff = Backoff::new(AGAIN.0, AGAIN.1);
            while let Err(e) = self.attempt(number, pending.effect, pending.id).await {
                let wait = backoff.next();
                tracing::warn!(error = %e, ?wait, "waiting; tried again");
                self.later(number, &e, wait);
                tokio::time::sleep(wait).await;
                self.live(number, |l| l.next_retry_unix_ms = None);
            }
        };
        tokio::select! {
            () = work.instrument(span) => {}
            () = stop.cancelled() => {}
        }
    }

    /// Tells the operator what a sector waits for.
    fn later(&self, number: SectorNumber, e: &SealingError, wait: Duration) {
        let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.live(number, |l| {
            l.last_error = Some(format!("{e}; {}", e.fix()));
            l.next_retry_unix_ms = Some(unix_ms().saturating_add(wait));
        });
    }

    /// Runs an effect once and journals what came of it. An error is no evidence about the
    /// sector: something did not answer, and it is asked again.
    async fn attempt(
        self: &Arc<Self>,
        number: SectorNumber,
        effect: Effect,
        id: EffectId,
    ) -> Result<(), SealingError> {
        let sector = self.busy(number);
        let Some(sector) = sector.filter(|s| s.state.effect() == Some(effect)) else {
            // The sector moved on by another way, such as `seal_now`.
            let shared = self.clone();
            return self.blocking(move || Ok(shared.machines.settle(id)?)).await;
        };
        let done = tokio::select! {
            done = self.effect(number, &sector, effect) => done?,
            () = self.moved(number, effect) => None,
        };
        let Some((event, also)) = done else {
            let shared = self.clone();
            return self.blocking(move || Ok(shared.machines.settle(id)?)).await;
        };
        self.live(number, |l| *l = Live::default());
        self.apply(number, event, Some(id), also).await?;
        Ok(())
    }

    /// Returns when the sector has left the state of this effect: the operator took it elsewhere.
    async fn moved(&self, number: SectorNumber, effect: Effect) {
        let mut changes = self.changes.subscribe();
        while self
            .busy(number)
            .is_some_and(|s| s.state.effect() == Some(effect))
        {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Does what a state asks for. `None`: another sector's effect did it, or the operator took
    /// the sector elsewhere.
    async fn effect(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
        effect: Effect,
    ) -> Result<Option<(Event, Also)>, SealingError> {
        if let Some(event) = self.ahead(n, s, effect).await? {
            return Ok(Some((event, Also::Nothing)));
        }
        let event = match effect {
            Effect::WaitForPieces => match self.wait_for_pieces(n).await {
                Some(event) => event,
                None => return Ok(None),
            },
            Effect::WritePieces => self.write_pieces(n, s).await?,
            Effect::CheckPieces => self.check_pieces(s).await?,
            Effect::TakeTicket => self.take_ticket(s).await?,
            Effect::PreCommit1 => return self.pre_commit1(n, s).await.map(Some),
            Effect::PreCommit2 => self.pre_commit2(n, s).await?,
            Effect::SendPreCommit => {
                let sent = self.send_batched(BatchKind::PreCommit, n).await?;
                return Ok(sent.map(|event| (event, Also::Nothing)));
            }
            Effect::AwaitPreCommit => self.await_pre_commit(n, s).await?,
            Effect::AwaitSeed => self.await_seed(n, s).await?,
            Effect::Prove => return self.prove(n, s).await.map(Some),
            Effect::SendCommit => {
                let sent = self.send_batched(BatchKind::Commit, n).await?;
                return Ok(sent.map(|event| (event, Also::Nothing)));
            }
            Effect::AwaitCommit => self.await_commit(n, s).await?,
            Effect::Finalize => return self.finalize(n).await.map(Some),
            Effect::UpdateReplica => self.update_replica(n, s).await?,
            Effect::ProveUpdate => return self.prove_update(n, s).await.map(Some),
            Effect::FinalizeUpdate => self.finalize_update(n).await?,
            Effect::SendUpdate => self.send_update(n, s).await?,
            Effect::AwaitMutable => self.await_mutable(n, s).await?,
            Effect::AwaitUpdate => self.await_update(n, s).await?,
            Effect::AwaitUpdateFinality => self.await_update_finality(n, s).await?,
            Effect::ReleaseKey => return self.release_key(n).await.map(Some),
            Effect::AbortUpgrade => return self.abort_upgrade(n, s).await.map(Some),
            Effect::SendTerminate => self.send_terminate(n, s).await?,
            Effect::AwaitTerminate => self.await_terminate(n, s).await?,
            Effect::AwaitTerminateFinality => self.await_terminate_finality(n, s).await?,
            Effect::Remove => return self.remove(n).await.map(Some),
            Effect::RetryLater => self.retry_later(n, s).await,
        };
        Ok(Some((event, Also::Nothing)))
    }

    async fn wait_for_pieces(&self, n: SectorNumber) -> Option<Event> {
        let mut changes = self.changes.subscribe();
        let mut head = self.head.clone();
        loop {
            changes.mark_unchanged();
            let height = head.borrow_and_update().as_ref().map(|h| h.height);
            let now = unix_ms();
            let wait = match self.busy(n) {
                Some(s) if s.state.takes_pieces() => {
                    match due(self.size, &self.cfg, &s, height, now) {
                        Due::Now => return Some(Event::StartPacking),
                        Due::At(at) => Duration::from_millis(at.saturating_sub(now)),
                    }
                }
                // Closed by another way.
                _ => return None,
            };
            // Changes of other sectors wake this too; looking is cheap.
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = changes.changed() => {}
                Ok(()) = head.changed() => {}
            }
        }
    }

    async fn retry_later(&self, n: SectorNumber, s: &Sector) -> Event {
        let wait = Backoff::new(self.cfg.retry_after(s.failures), Duration::MAX).next();
        let ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.live(n, |l| {
            l.next_retry_unix_ms = Some(unix_ms().saturating_add(ms));
        });
        tokio::time::sleep(wait).await;
        Event::Retry
    }
}
