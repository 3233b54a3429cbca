//! Publishing: deals whose bytes are here go on chain in batches, by one `PublishStorageDeals`
//! each.
//!
//! A batch is journaled before it is sent, with its deals in order. The hub makes one message of
//! the same deals in the same order, however often it is asked, so a crash at any moment publishes
//! once. A batch ends in the same transaction in which each of its deals learns what became of it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::join_all;
use hub_proto::HubError;
use hub_proto::v1::{PublishRequest, PublishState};
use lotus_journal::{JournalError, Map};
use lotus_runtime::{Backoff, CancellationToken, Fault};
use lotus_types::{DealKey, Kind};
use serde::{Deserialize, Serialize};

use crate::config::Mk12Config;
use crate::engine::{Engine, blocking, journal_fault, unix_ms};
use crate::machine::{Checkpoint, Event};
use crate::operator::{PublishBatch, Publishing};

/// Batches that are on their way.
const BATCHES: Map<u64, Batch> = Map::new("deals.mk12_batches");
/// The number of the next batch.
const NEXT: Map<String, u64> = Map::new("deals.mk12_next_batch");
/// Key of the one entry of [`NEXT`].
const NUMBER: &str = "number";
/// Batches that may be on their way at the same time.
const MAX_BATCHES: usize = 16;
/// How long the hub may let one question wait for the chain.
const LONG_POLL_MS: u64 = 5_000;
/// Between two looks at what is to be published.
const TICK: Duration = Duration::from_secs(1);
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Deals that are published by one message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Batch {
    deals: Vec<DealKey>,
    /// Raised when the chain has seen the last message of the batch fail, or never will see it.
    attempt: u32,
}

/// What is to be done with a batch after an answer about it.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Ask again.
    Wait,
    /// The message is under way.
    Sent(String),
    /// Each deal, in order: its id on chain, or why it is not there.
    Done(String, Vec<Result<u64, String>>),
    /// Send the same deals by another message.
    Again,
    /// Send each deal by itself.
    Split(String),
}

/// Reads the hub's answer.
fn judge(batch: &Batch, state: &PublishState) -> Next {
    if state.replaced {
        return Next::Again;
    }
    if !state.landed {
        return Next::Sent(state.cid.clone());
    }
    if state.exit_code != 0 {
        let why = format!(
            "PublishStorageDeals {} failed with exit code {} ({})",
            state.cid, state.exit_code, state.exit_name
        );
        return refused(batch, why);
    }
    if state.outcomes.len() != batch.deals.len() {
        return Next::Wait;
    }
    let outcome = |id: &Option<u64>| {
        id.ok_or_else(|| "the market actor refused the deal when it was published".to_owned())
    };
    let outcomes = state.outcomes.iter().map(|o| outcome(&o.deal_id)).collect();
    Next::Done(state.cid.clone(), outcomes)
}

/// The chain does not take the batch.
fn refused(batch: &Batch, why: String) -> Next {
    if batch.deals.len() > 1 {
        Next::Split(why)
    } else {
        Next::Done(String::new(), vec![Err(why)])
    }
}

fn period_ms(cfg: &Mk12Config) -> u64 {
    cfg.publish_period_secs.saturating_mul(1000)
}

/// Which deals make the next batch: up to `max`, oldest first, once there are as many or the
/// oldest was accepted `period_ms` ago.
fn choose(
    mut waiting: Vec<(u64, DealKey)>,
    max: usize,
    period_ms: u64,
    now_ms: u64,
) -> Vec<DealKey> {
    waiting.sort();
    let Some((oldest, _)) = waiting.first() else {
        return Vec::new();
    };
    if waiting.len() < max && now_ms.saturating_sub(*oldest) < period_ms {
        return Vec::new();
    }
    waiting.truncate(max);
    waiting.into_iter().map(|(_, key)| key).collect()
}

/// Publishes until stopped.
pub(crate) async fn run(engine: Arc<Engine>, stop: CancellationToken) -> Result<(), Fault> {
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    loop {
        let round = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            round = engine.publish_round() => round,
        };
        let wait = match round.map_err(|e| journal_fault(&e))? {
            Ok(()) => {
                backoff.reset();
                TICK
            }
            Err(e) => {
                let wait = e.retry_after().unwrap_or_else(|| backoff.next());
                tracing::warn!(%e, ?wait, "publishing is tried again");
                wait.min(LONGEST_WAIT)
            }
        };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = engine.mk12.ready.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

impl Engine {
    /// Makes batches, and brings each of them on. The inner error is the hub's.
    async fn publish_round(&self) -> Result<Result<(), HubError>, JournalError> {
        let open = self.batches()?;
        let new = self.form(&open).await?;
        let mut all = open;
        all.extend(new);
        let answers = join_all(all.iter().map(|(id, batch)| self.drive(*id, batch))).await;
        let mut first = Ok(());
        for answer in answers {
            first = first.and(answer?);
        }
        Ok(first)
    }

    fn batches(&self) -> Result<Vec<(u64, Batch)>, JournalError> {
        self.deals
            .journal()
            .read(|v| v.scan(&BATCHES, None, MAX_BATCHES))
    }

    /// Deals that are to be published and are in no batch, with the time of their acceptance.
    fn unpublished(&self, open: &[(u64, Batch)]) -> Result<Vec<(u64, DealKey)>, JournalError> {
        let taken: HashSet<&DealKey> = open.iter().flat_map(|(_, b)| &b.deals).collect();
        let mut waiting = Vec::new();
        for (key, checkpoint, _) in self.open_deals() {
            if checkpoint != Checkpoint::Transferred || taken.contains(&key) {
                continue;
            }
            let Some(record) = self.deals.get(&key)? else {
                continue;
            };
            if record.proposal.signed.is_some() && record.checkpoint == Checkpoint::Transferred {
                waiting.push((record.accepted_unix_ms, key));
            }
        }
        Ok(waiting)
    }

    /// What is on its way to the chain, and what waits for it.
    pub(crate) fn publishing(&self) -> Result<Publishing, JournalError> {
        let open = self.batches()?;
        let mut waiting = self.unpublished(&open)?;
        waiting.sort();
        let cfg = &self.cfg.mk12;
        let due = waiting.first().map(|(oldest, _)| {
            let full = waiting.len() >= usize::from(cfg.max_deals_per_publish.get());
            let wait = if full { 0 } else { period_ms(cfg) };
            oldest.saturating_add(wait)
        });
        let mut batches = Vec::with_capacity(open.len());
        for (number, batch) in open {
            let first = batch.deals.first().map(|key| self.deals.get(key));
            let record = first.transpose()?.flatten();
            batches.push(PublishBatch {
                number,
                attempt: batch.attempt,
                message: record.and_then(|r| r.published).map(|p| p.cid),
                deals: batch.deals.iter().map(ToString::to_string).collect(),
            });
        }
        Ok(Publishing {
            batches,
            waiting: waiting.iter().map(|(_, key)| key.to_string()).collect(),
            due_unix_ms: due,
        })
    }

    /// Publishes what waits, without waiting for more.
    pub(crate) fn publish_now(&self) {
        self.mk12.now.store(true, Ordering::Relaxed);
        self.mk12.ready.notify_one();
    }

    /// Makes a batch of deals that wait for one.
    async fn form(&self, open: &[(u64, Batch)]) -> Result<Option<(u64, Batch)>, JournalError> {
        if open.len() >= MAX_BATCHES {
            return Ok(None);
        }
        let waiting = self.unpublished(open)?;
        let cfg = &self.cfg.mk12;
        let now = self.mk12.now.load(Ordering::Relaxed);
        let max = cfg.max_deals_per_publish.get().into();
        if now && waiting.len() <= max {
            self.mk12.now.store(false, Ordering::Relaxed);
        }
        let period = if now { 0 } else { period_ms(cfg) };
        let chosen = choose(waiting, max, period, unix_ms());
        let mut deals = Vec::new();
        for key in chosen {
            // Nothing is published that the hub has no room for.
            let Some(record) = self.deals.get(&key)? else {
                continue;
            };
            match self.acquire(&key, record.proposal.piece.size.get()).await {
                Ok(_) => deals.push(key),
                Err(e) => tracing::info!(deal = %key, %e, "not published yet"),
            }
        }
        if deals.is_empty() {
            return Ok(None);
        }
        let batch = Batch { deals, attempt: 0 };
        let id = self.put_batches(None, vec![batch.clone()]).await?;
        tracing::info!(batch = id, deals = batch.deals.len(), "deals are published");
        Ok(Some((id, batch)))
    }

    /// Writes new batches in place of an old one. Returns the number of the last.
    async fn put_batches(
        &self,
        instead_of: Option<u64>,
        batches: Vec<Batch>,
    ) -> Result<u64, JournalError> {
        let journal = self.deals.journal().clone();
        blocking(move || {
            journal.write(|tx| {
                if let Some(old) = instead_of {
                    tx.remove(&BATCHES, &old)?;
                }
                let key = NUMBER.to_owned();
                let mut next = tx.get(&NEXT, &key)?.unwrap_or(0);
                for batch in &batches {
                    next += 1;
                    tx.put(&BATCHES, &next, batch)?;
                }
                tx.put(&NEXT, &key, &next)?;
                Ok(next)
            })
        })
        .await
    }

    /// Asks the hub about a batch and takes what it says.
    async fn drive(&self, id: u64, batch: &Batch) -> Result<Result<(), HubError>, JournalError> {
        let mut deals = Vec::with_capacity(batch.deals.len());
        let mut sent = true;
        for key in &batch.deals {
            let record = self.deals.get(key)?;
            sent &= record
                .as_ref()
                .is_some_and(|r| r.checkpoint >= Checkpoint::Published);
            let signed = record.and_then(|r| r.proposal.signed);
            // Every deal of a batch has one: it was chosen for it.
            deals.extend(signed.map(|s| s.deal));
        }
        let request = PublishRequest {
            deals,
            attempt: batch.attempt,
            // The deals are to have their message as soon as the hub has it.
            wait_ms: if sent { LONG_POLL_MS } else { 0 },
        };
        let answer = self
            .hub
            .chain()
            .publish(self.hub.request(request))
            .await
            .map_err(HubError::from);
        let next = match answer {
            Ok(state) => judge(batch, &state.into_inner()),
            Err(e) if matches!(e.kind(), Kind::Chain | Kind::Data) => refused(batch, e.to_string()),
            Err(e) => return Ok(Err(e)),
        };
        match next {
            Next::Wait => {}
            Next::Sent(cid) => self.sent(batch, &cid).await?,
            Next::Done(cid, outcomes) => self.done(id, batch, &cid, outcomes).await?,
            Next::Again => {
                let attempt = batch.attempt.saturating_add(1);
                let again = Batch {
                    attempt,
                    ..batch.clone()
                };
                tracing::warn!(
                    batch = id,
                    attempt,
                    "another message took the nonce; deals are published anew"
                );
                self.put_batches(Some(id), vec![again]).await?;
                self.mk12.ready.notify_one();
            }
            Next::Split(why) => {
                tracing::warn!(batch = id, why, "deals are published one by one");
                let apart = batch.deals.iter().map(|key| Batch {
                    deals: vec![key.clone()],
                    attempt: 0,
                });
                self.put_batches(Some(id), apart.collect()).await?;
                self.mk12.ready.notify_one();
            }
        }
        Ok(Ok(()))
    }

    /// The message is journaled by the hub.
    async fn sent(&self, batch: &Batch, cid: &str) -> Result<(), JournalError> {
        for key in &batch.deals {
            self.apply(key, Event::Published(cid.to_owned()), None, None)
                .await?;
        }
        Ok(())
    }

    /// The chain has spoken: each deal learns it in the transaction that ends the batch.
    async fn done(
        &self,
        id: u64,
        batch: &Batch,
        cid: &str,
        outcomes: Vec<Result<u64, String>>,
    ) -> Result<(), JournalError> {
        let events: Vec<(DealKey, Event)> = batch
            .deals
            .iter()
            .cloned()
            .zip(outcomes.into_iter().map(|o| match o {
                Ok(deal_id) => Event::PublishConfirmed {
                    cid: cid.to_owned(),
                    deal_id,
                },
                Err(why) => Event::PublishFailed(why),
            }))
            .collect();
        self.apply_all(events, move |tx| tx.remove(&BATCHES, &id).map(drop))
            .await
    }
}

#[cfg(test)]
mod tests {
    use hub_proto::v1::PublishOutcome;
    use ulid::Ulid;

    use super::*;

    fn key(n: u128) -> DealKey {
        DealKey {
            client: "t1abc".into(),
            id: Ulid::from(n),
        }
    }

    fn batch(deals: u128) -> Batch {
        Batch {
            deals: (0..deals).map(key).collect(),
            attempt: 0,
        }
    }

    fn landed(exit_code: i64, ids: &[Option<u64>]) -> PublishState {
        PublishState {
            cid: "c".into(),
            landed: true,
            exit_code,
            exit_name: "WHY".into(),
            outcomes: ids
                .iter()
                .map(|&deal_id| PublishOutcome { deal_id })
                .collect(),
            ..PublishState::default()
        }
    }

    #[test]
    fn an_answer_is_read() {
        let under_way = PublishState {
            cid: "c".into(),
            ..PublishState::default()
        };
        assert_eq!(judge(&batch(2), &under_way), Next::Sent("c".into()));
        let replaced = PublishState {
            replaced: true,
            ..under_way
        };
        assert_eq!(judge(&batch(2), &replaced), Next::Again);
        let Next::Done(cid, outcomes) = judge(&batch(2), &landed(0, &[Some(7), None])) else {
            panic!("it is done")
        };
        assert_eq!((cid.as_str(), &outcomes[0]), ("c", &Ok(7)));
        assert!(outcomes[1].is_err());
        // An answer about other deals is none.
        assert_eq!(judge(&batch(2), &landed(0, &[Some(7)])), Next::Wait);
        // What fails together is tried apart, and what fails alone has failed.
        assert!(matches!(judge(&batch(2), &landed(16, &[])), Next::Split(_)));
        let Next::Done(_, alone) = judge(&batch(1), &landed(16, &[])) else {
            panic!("it is done")
        };
        let why = alone[0].clone().unwrap_err();
        assert!(why.contains("exit code 16 (WHY)"), "{why}");
    }

    #[test]
    fn a_batch_is_full_or_old() {
        let at = |times: &[u64]| -> Vec<(u64, DealKey)> {
            times.iter().map(|&t| (t, key(t.into()))).collect()
        };
        let some = |times: &[u64], now| choose(at(times), 3, 1_000, now).len();
        assert_eq!(some(&[], 5_000), 0);
        assert_eq!(some(&[10, 20], 1_009), 0);
        assert_eq!(some(&[20, 10], 1_010), 2);
        assert_eq!(some(&[10, 20, 30], 30), 3);
        let chosen = choose(at(&[40, 10, 30, 20]), 3, 1_000, 40);
        assert_eq!(chosen, [key(10), key(20), key(30)], "the oldest first");
    }
}
