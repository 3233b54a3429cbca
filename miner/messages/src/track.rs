use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use lotus_node_client::api::TipSet;
use lotus_runtime::Backoff;
use lotus_types::{Address, EpochDelta};
use tokio::time::Instant;

use crate::SendError;
use crate::message::{MESSAGES, OPEN, Record};
use crate::sender::{Shared, lock};

/// Messages looked at in one round. A hub has a few in flight.
const ROUND: usize = 1_000;
/// Time between two rounds at least, however fast the chain is.
const PACE: Duration = Duration::from_millis(500);
/// Time between two rounds at most, however slow it is.
const POLL: Duration = Duration::from_secs(10);

/// When a message is pushed again, or looked at again once it has landed.
struct Watch {
    at: Instant,
    backoff: Backoff,
}

/// What the chain says of a journaled message.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// On chain for good.
    Final,
    /// On chain with the confidence of the settings, at this height.
    Landed(lotus_types::Epoch),
    /// On chain, but not deep enough.
    Shallow,
    /// Not on chain.
    Absent,
    /// Another message has its nonce.
    Replaced,
}

impl Shared {
    /// Pushes what is not on chain, until the runner stops: all of it at once after a start,
    /// then with back-off.
    pub(crate) async fn track(self: Arc<Self>, after: Duration) {
        tokio::select! {
            () = tokio::time::sleep(after) => {}
            () = self.stop.cancelled() => return,
        }
        let mut watches: HashMap<String, Watch> = HashMap::new();
        let mut heads = self.heads();
        loop {
            if let Err(e) = self.round(&mut watches).await {
                tracing::warn!(error = %e, "watching sent messages");
            }
            let pace = tokio::time::sleep(PACE);
            let next = async {
                pace.await;
                tokio::select! {
                    changed = heads.changed() => if changed.is_err() {
                        // No follower any more: the hub is about to stop.
                        tokio::time::sleep(POLL).await;
                    },
                    () = tokio::time::sleep(POLL) => {}
                }
            };
            tokio::select! {
                () = next => {}
                () = self.stop.cancelled() => return,
            }
        }
    }

    async fn round(&self, watches: &mut HashMap<String, Watch>) -> Result<(), SendError> {
        let Some(head) = self.head() else {
            return Ok(());
        };
        // Ordered by address and nonce, which is the order in which a node takes them best.
        let open = self
            .journal(|j| {
                j.read(|v| {
                    let mut open = Vec::new();
                    for ((_, _), key) in v.scan(&OPEN, None, ROUND)? {
                        if let Some(record) = v.get(&MESSAGES, &key)? {
                            open.push((key, record));
                        }
                    }
                    Ok(open)
                })
            })
            .await?;
        metrics::gauge!("lotus_miner_messages_open").set(open.len() as f64);
        watches.retain(|key, _| open.iter().any(|(k, _)| k == key));
        for (key, record) in open {
            if self.stop.is_cancelled() {
                return Ok(());
            }
            let now = Instant::now();
            let due = watches.get(&key).is_none_or(|w| w.at <= now);
            if record.landed.is_some() && !due {
                continue;
            }
            let verdict = self.judge(&record, &head).await?;
            match verdict {
                Verdict::Final => self.close(&key, record, false).await?,
                Verdict::Replaced => self.close(&key, record, true).await?,
                Verdict::Landed(at) => {
                    if record.landed != Some(at) {
                        self.update(&key, record, Some(at)).await?;
                    }
                    watches.insert(key, self.watch());
                }
                Verdict::Shallow => {
                    watches.entry(key).or_insert_with(|| self.watch());
                }
                Verdict::Absent => {
                    if record.landed.is_some() {
                        tracing::warn!(key, cid = %record.cid, "a reorg removed the message");
                        self.update(&key, record.clone(), None).await?;
                    }
                    if due {
                        self.push(&key, &record).await;
                        let w = watches.entry(key).or_insert_with(|| self.watch());
                        w.at = now + w.backoff.next();
                    }
                }
            }
        }
        Ok(())
    }

    fn watch(&self) -> Watch {
        let mut backoff = Backoff::new(self.cfg.repush_first(), self.cfg.repush_max());
        Watch {
            at: Instant::now() + backoff.next(),
            backoff,
        }
    }

    async fn judge(&self, record: &Record, head: &TipSet) -> Result<Verdict, SendError> {
        let depth = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        if let Some(found) = self.locate(record, head).await? {
            let age = (head.height - found.height).0;
            return Ok(if age >= depth(self.cfg.finality_epochs) {
                Verdict::Final
            } else if age >= depth(self.cfg.confidence_epochs) {
                Verdict::Landed(found.height)
            } else {
                Verdict::Shallow
            });
        }
        // Replaced only if the nonce is spent so deep that no reorg is likely to return it.
        let back = EpochDelta(depth(self.cfg.confidence_epochs).min(head.height.0.max(0)));
        let at = head.height - back;
        let past = self
            .node
            .chain_get_tipset_by_height(at, &head.key())
            .await?;
        let Ok(from) = record.from.parse::<Address>() else {
            return Ok(Verdict::Absent);
        };
        let actor = self.node.state_get_actor(from, &past.key()).await?;
        Ok(match actor {
            Some(a) if a.nonce > record.nonce => Verdict::Replaced,
            _ => Verdict::Absent,
        })
    }

    async fn update(
        &self,
        key: &str,
        mut record: Record,
        landed: Option<lotus_types::Epoch>,
    ) -> Result<(), SendError> {
        record.landed = landed;
        let key = key.to_owned();
        self.journal(move |j| j.write(|tx| tx.put(&MESSAGES, &key, &record)))
            .await
    }

    async fn close(&self, key: &str, mut record: Record, replaced: bool) -> Result<(), SendError> {
        if replaced {
            tracing::error!(key, cid = %record.cid, from = record.from, nonce = record.nonce,
                "another program sends from this address: its message took the nonce");
        }
        record.replaced = replaced;
        record.finish();
        lock(&self.push_errors).remove(key);
        let key = key.to_owned();
        self.journal(move |j| {
            j.write(|tx| {
                tx.remove(&OPEN, &(record.from.clone(), record.nonce))?;
                tx.put(&MESSAGES, &key, &record)
            })
        })
        .await
    }
}
