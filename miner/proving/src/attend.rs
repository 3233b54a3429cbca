//! One deadline, from its challenge to its close.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt as _};
use lotus_messages::SendError;
use lotus_node_client::api::{BitField, Partition, TipSet, TipSetKey};
use lotus_runtime::Backoff;
use tokio::time::Instant;

use crate::activity::BusyGuard;
use crate::deadline::{Due, Window};
use crate::memory::free_memory;
use crate::partition::{Batch, batches, per_message, wanted};
use crate::prove::parallel;
use crate::submit::MAX_ATTEMPTS;
use crate::window::{Shared, sleep_if};
use crate::{DeadlineRecord, Outcome, ProvingError, Work};

/// Longest wait between two tries. A new head is a try of its own.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Bytes of one proof, which crosses from the worker to the hub and from there to the node. So do
/// the openings that it is made of, as text a third longer, in messages of at most 256 MiB.
const PROOF_BYTES_MAX: u64 = 128 << 20;
/// A worker has this part of the time that is left over each of the two steps of a proof; one on
/// another host has half of it. So what hangs elsewhere can be made here, and half as much is left.
const PROOF_SHARE: u32 = 3;
/// But never less than this.
const PROOF_LEAST: Duration = Duration::from_secs(30);

/// A message on its way.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) partitions: Vec<u64>,
    pub(crate) attempt: u64,
    pub(crate) key: String,
    /// It waits for a nonce that is not ours, and another address sent the same.
    pub(crate) passed: bool,
}

/// What a look at the deadline leads to.
#[derive(Default)]
struct Step {
    /// Proofs to begin, as far as there is room.
    prove: Vec<Batch>,
    challenge: [u8; 32],
    sent: Vec<Sent>,
}

impl Shared {
    /// Sees a deadline through. At every head it looks at the chain anew, so that nothing is
    /// proved or submitted that the chain has already.
    #[tracing::instrument(name = "window_post", skip_all, fields(deadline = w.index, open = %w.open))]
    pub(crate) async fn attend(&self, w: &Window) {
        let mut heads = self.deps.follower.head();
        let mut progress = Progress::default();
        let mut proofs = FuturesUnordered::new();
        let mut waits = FuturesUnordered::new();
        let mut backoff = Backoff::new(self.deps.cfg.retry_first(), RETRY_MAX);
        let mut busy = None;
        let mut retry = None;
        let mut proving = self.near(w).await;
        loop {
            let Some(head) = heads.borrow_and_update().clone() else {
                // There was a head, or nothing would be due.
                return;
            };
            if head.height >= w.close {
                break;
            }
            let due = w.due(head.height);
            if due != Due::Over {
                match self.step(w, &head, due, &mut progress).await {
                    Ok(step) => {
                        for sent in step.sent {
                            progress.waiting.extend(&sent.partitions);
                            progress.flying.push(sent.clone());
                            waits.push(self.fate(sent));
                        }
                        for sent in self.go_around(w, &head, &mut progress.flying).await {
                            progress.twice.extend(&sent.partitions);
                            waits.push(self.fate(sent));
                        }
                        let room = self.parallel().saturating_sub(proofs.len());
                        let limit = self.proof_limit(w, &head).await;
                        for batch in step.prove.into_iter().take(room) {
                            progress.proving.extend(&batch.partitions);
                            let (challenge, key) = (step.challenge, head.key());
                            proofs.push(self.prove(w, batch, challenge, key, limit));
                        }
                        if progress.held.is_empty() {
                            backoff.reset();
                        } else if retry.is_none() {
                            retry = Some(Instant::now() + backoff.next());
                        }
                    }
                    Err(e) => {
                        tracing::warn!(error = %e, "cannot see what the deadline needs");
                        progress.last_error = e.to_string();
                        retry = Some(Instant::now() + backoff.next());
                    }
                }
            }
            // A deadline that is proven for now needs no waiting for.
            let begin = |work, what| self.deps.activity.begin(work, what, Some(w.close));
            busy = match (progress.is_complete(), busy) {
                (true, _) => None,
                (false, Some(guard)) => Some(guard),
                (false, None) => {
                    let what = format!("deadline {} is not proven yet", w.index);
                    Some(begin(Work::Deadline, what))
                }
            };
            // Waiting for a message to land takes nothing from anybody. The next guard is there
            // before the last one goes, so that nobody sees a pause.
            let makes_proofs = !proofs.is_empty() || !progress.held.is_empty();
            proving = match proving {
                _ if !makes_proofs => None,
                Some((Work::WindowPost, guard)) => Some((Work::WindowPost, guard)),
                _near => {
                    let what = format!(
                        "WindowPoSt of deadline {}, closes at epoch {}",
                        w.index, w.close
                    );
                    Some((Work::WindowPost, begin(Work::WindowPost, what)))
                }
            };
            tokio::select! {
                Some((batch, made)) = proofs.next(), if !proofs.is_empty() => {
                    progress.proved(&batch, made);
                }
                Some((landed, sent)) = waits.next(), if !waits.is_empty() => {
                    progress.waiting.retain(|p| !sent.partitions.contains(p));
                    progress.flying.retain(|s| s.key != sent.key);
                    if let Err(e) = self.judge(w, &sent, landed, &mut progress) {
                        tracing::error!(error = %e, "journal");
                    }
                }
                changed = heads.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    progress.held.clear();
                    retry = None;
                }
                () = sleep_if(retry.map(|at| at.duration_since(Instant::now()))) => {
                    progress.held.clear();
                    retry = None;
                }
            }
        }
        drop((busy, proving));
        self.conclude(w, &progress);
    }

    /// Waits until the challenge is known. If the deadline has something to prove, it is said
    /// meanwhile, and for as long as what is returned lives.
    async fn near(&self, w: &Window) -> Option<(Work, BusyGuard)> {
        let mut heads = self.deps.follower.head();
        let head = heads.borrow_and_update().clone()?;
        let (key, miner) = (head.key(), self.deps.miner.address());
        let partitions = self.deps.node.state_miner_partitions(miner, w.index, &key);
        let ours = match partitions.await {
            Ok(all) => all.iter().any(|p| !wanted(p).is_empty()),
            Err(e) => {
                tracing::debug!(error = %e, "cannot see what the deadline will need");
                false
            }
        };
        let near = ours.then(|| {
            let what = format!("WindowPoSt of deadline {} begins", w.index);
            let work = Work::WindowPostSoon;
            (work, self.deps.activity.begin(work, what, Some(w.close)))
        });
        let known = |h: &Option<_>| {
            h.as_ref()
                .is_none_or(|h: &Arc<TipSet>| w.is_known(h.height))
        };
        if heads.wait_for(known).await.is_err() {
            return None;
        }
        near
    }

    async fn fate(&self, sent: Sent) -> (Result<lotus_messages::Landed, ProvingError>, Sent) {
        (self.landed(&sent.key).await, sent)
    }

    /// How many proofs are made at a time.
    fn parallel(&self) -> usize {
        let fill = lotus_proofs::window_post_partition_sectors(self.deps.size);
        let proof = lotus_proofs::window_post_bytes(self.deps.size, fill * self.per_message());
        let workers = self.deps.pool.attached().borrow().prove;
        parallel(self.deps.cfg.parallel_proofs, workers, free_memory(), proof)
    }

    /// Partitions that go into one message.
    pub(crate) fn per_message(&self) -> u64 {
        let size = self.deps.size;
        let fill = lotus_proofs::window_post_partition_sectors(size);
        let bytes = lotus_proofs::window_post_bytes(size, fill);
        let asked = self.deps.cfg.partitions_per_message;
        per_message(asked, fill, bytes, PROOF_BYTES_MAX)
    }

    /// How long a worker may take over a proof that is begun now.
    async fn proof_limit(&self, w: &Window, head: &TipSet) -> Duration {
        let Ok(delay) = self.block_delay().await else {
            return Duration::MAX;
        };
        let left = u32::try_from((w.close - head.height).0).unwrap_or(0);
        (delay.saturating_mul(left) / PROOF_SHARE).max(PROOF_LEAST)
    }

    /// One look at the deadline: says what to prove, and submits what is proved.
    async fn step(
        &self,
        w: &Window,
        head: &TipSet,
        due: Due,
        progress: &mut Progress,
    ) -> Result<Step, ProvingError> {
        let (key, miner, node) = (head.key(), self.deps.miner.address(), &self.deps.node);
        let partitions = node.state_miner_partitions(miner, w.index, &key).await?;
        // Before it opens, the record of submissions is the last period's.
        let posted = if head.height >= w.open {
            let deadlines = node.state_miner_deadlines(miner, &key).await?;
            let at = usize::try_from(w.index).unwrap_or(usize::MAX);
            deadlines
                .into_iter()
                .nth(at)
                .map(|d| d.post_submissions)
                .ok_or_else(|| ProvingError::Inconsistent {
                    what: "deadlines",
                    why: format!("there is no deadline {}", w.index),
                })?
        } else {
            BitField::new()
        };
        for p in &partitions {
            self.check_size(p)?;
        }
        progress.look(&partitions, &posted);
        let todo = progress.todo();
        if todo.is_empty() {
            return Ok(Step::default());
        }
        let mut attempts = BTreeMap::new();
        for p in &todo {
            attempts.insert(*p, self.records.attempt(w, *p)?);
        }
        let failed = attempts.iter().filter(|(_, n)| **n > 0);
        let alone = failed.map(|(p, _)| *p).collect();
        let mut step = Step {
            challenge: self.challenge(w, &key).await?,
            ..Step::default()
        };
        for batch in batches(&partitions, &todo, self.per_message(), &alone) {
            let attempt = attempts.get(&batch.first()).copied().unwrap_or_default();
            if attempt >= MAX_ATTEMPTS {
                continue;
            }
            let known = progress.known.get(&batch.first());
            let ready = match known {
                Some((of, challenge)) => *of == batch && *challenge == step.challenge,
                // After a restart the proof may be in the journal.
                None => match self.records.proof(w, batch.first())? {
                    Some(old) if old.answers(&batch, &step.challenge) => {
                        progress.skipped.insert(batch.first(), old.skipped.len());
                        let known = (batch.clone(), step.challenge);
                        progress.known.insert(batch.first(), known);
                        true
                    }
                    _ => false,
                },
            };
            if !ready {
                step.prove.push(batch);
            } else if due == Due::Submit {
                match self
                    .submit_batch(w, &batch, attempt, &partitions, &key)
                    .await
                {
                    Ok(sent) => step.sent.push(sent),
                    Err(e) => progress.fail(&batch, &e),
                }
            }
        }
        Ok(step)
    }

    async fn prove(
        &self,
        w: &Window,
        batch: Batch,
        challenge: [u8; 32],
        key: TipSetKey,
        limit: Duration,
    ) -> (Batch, Result<Made, ProvingError>) {
        let made = self.make_proof(w, &batch, challenge, &key, limit).await;
        let made = made.map(|skipped| Made { challenge, skipped });
        (batch, made)
    }

    async fn submit_batch(
        &self,
        w: &Window,
        batch: &Batch,
        attempt: u64,
        partitions: &[Partition],
        head: &TipSetKey,
    ) -> Result<Sent, ProvingError> {
        let record = self.records.proof(w, batch.first())?;
        let record = record.ok_or_else(|| ProvingError::Inconsistent {
            what: "journal",
            why: format!("the proof of partition {} is gone", batch.first()),
        })?;
        let key = self
            .submit(w, attempt, &record, partitions, head, None)
            .await?;
        Ok(Sent {
            partitions: batch.partitions.clone(),
            attempt,
            key,
            passed: false,
        })
    }

    /// Takes the fate of a message into account.
    fn judge(
        &self,
        w: &Window,
        sent: &Sent,
        landed: Result<lotus_messages::Landed, ProvingError>,
        progress: &mut Progress,
    ) -> Result<(), ProvingError> {
        let Sent {
            partitions,
            attempt,
            ..
        } = sent;
        match landed {
            Ok(at) => {
                tracing::info!(?partitions, height = %at.height, cid = %at.cid, "WindowPoSt is on chain");
                progress.landed.extend(partitions);
                progress.messages.insert(at.cid.to_string());
            }
            Err(e) if progress.has_proof_of(partitions) => {
                tracing::info!(?partitions, error = %e, "the chain has their proof already");
            }
            Err(
                e @ (ProvingError::Landed { .. } | ProvingError::Send(SendError::Replaced { .. })),
            ) => {
                tracing::error!(?partitions, attempt, error = %e, "WindowPoSt message failed");
                progress.last_error = format!("partitions {partitions:?}: {e}");
                progress.landed.retain(|p| !partitions.contains(p));
                self.records.next_attempt(w, partitions, *attempt)?;
            }
            Err(e) => tracing::warn!(?partitions, error = %e, "no receipt yet"),
        }
        Ok(())
    }

    fn conclude(&self, w: &Window, progress: &Progress) {
        let outcome = progress.outcome();
        metrics::counter!("lotus_miner_window_post_total", "outcome" => outcome.name())
            .increment(1);
        match &outcome {
            Outcome::Failed { partitions, why } => {
                tracing::error!(?partitions, why, "the deadline closed unproven");
            }
            Outcome::Proved { partitions } => tracing::info!(partitions, "deadline proven"),
            Outcome::Empty => tracing::debug!("nothing was due"),
        }
        let record = DeadlineRecord {
            period_start: w.period_start,
            index: w.index,
            open: w.open,
            close: w.close,
            outcome,
            messages: progress.messages.iter().cloned().collect(),
            skipped: progress.skipped.values().sum(),
            disputed: 0,
        };
        if let Err(e) = self.records.save_outcome(&record) {
            tracing::error!(error = %e, "the deadline's outcome is not journaled");
        }
    }
}

/// A proof that is in the journal now.
struct Made {
    challenge: [u8; 32],
    /// Sectors that it skips.
    skipped: u64,
}

/// How far a deadline is.
#[derive(Default)]
struct Progress {
    /// Partitions with something to prove.
    needed: BTreeSet<u64>,
    /// Of these, the ones that the chain has no proof of at the last head.
    missing: BTreeSet<u64>,
    /// Partitions whose proof is being made.
    proving: BTreeSet<u64>,
    /// The journaled proof of each batch: what it proves, and its challenge.
    known: BTreeMap<u64, (Batch, [u8; 32])>,
    /// Partitions whose messages were sent and not seen.
    waiting: BTreeSet<u64>,
    /// These messages.
    flying: Vec<Sent>,
    /// Partitions whose proof two addresses sent.
    twice: BTreeSet<u64>,
    /// Partitions whose messages were seen: the last of them may be later than the last look.
    landed: BTreeSet<u64>,
    /// Partitions that failed and wait for the next try.
    held: BTreeSet<u64>,
    /// Sectors that each batch's proof skips.
    skipped: BTreeMap<u64, u64>,
    /// CIDs of the messages that landed.
    messages: BTreeSet<String>,
    last_error: String,
    looked: bool,
}

impl Progress {
    fn look(&mut self, partitions: &[Partition], posted: &BitField) {
        let proven = |i: &u64| posted.get(*i);
        self.needed = (0u64..)
            .zip(partitions)
            .filter(|(i, p)| proven(i) || !wanted(p).is_empty())
            .map(|(i, _)| i)
            .collect();
        self.missing = self.needed.iter().copied().filter(|i| !proven(i)).collect();
        self.looked = true;
    }

    /// Partitions that nothing is under way for.
    fn todo(&self) -> BTreeSet<u64> {
        let busy =
            |p: &u64| self.waiting.contains(p) || self.proving.contains(p) || self.held.contains(p);
        self.missing.iter().copied().filter(|p| !busy(p)).collect()
    }

    fn proved(&mut self, batch: &Batch, made: Result<Made, ProvingError>) {
        self.proving.retain(|p| !batch.partitions.contains(p));
        match made {
            Ok(made) => {
                self.skipped.insert(batch.first(), made.skipped);
                let known = (batch.clone(), made.challenge);
                self.known.insert(batch.first(), known);
            }
            Err(e) => self.fail(batch, &e),
        }
    }

    fn fail(&mut self, batch: &Batch, e: &ProvingError) {
        let partitions = &batch.partitions;
        tracing::error!(?partitions, error = %e, fix = e.fix(), "partitions are not proven");
        self.last_error = format!("partitions {partitions:?}: {e}");
        self.held.extend(partitions);
    }

    /// Whether the message of one of two addresses landed: the other one fails.
    fn has_proof_of(&self, partitions: &[u64]) -> bool {
        let all = |set: &BTreeSet<u64>| partitions.iter().all(|p| set.contains(p));
        all(&self.landed) && all(&self.twice)
    }

    fn is_complete(&self) -> bool {
        self.looked && self.missing.is_subset(&self.landed)
    }

    fn outcome(&self) -> Outcome {
        let partitions: Vec<u64> = self.missing.difference(&self.landed).copied().collect();
        if !partitions.is_empty() || !self.looked {
            return Outcome::Failed {
                partitions,
                why: if self.last_error.is_empty() {
                    "no message landed in time".into()
                } else {
                    self.last_error.clone()
                },
            };
        }
        match self.needed.len() {
            0 => Outcome::Empty,
            n => Outcome::Proved {
                partitions: u64::try_from(n).unwrap_or(u64::MAX),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(ns: &[u64]) -> BitField {
        BitField::try_from_bits(ns.iter().copied()).unwrap()
    }

    fn partition(live: &[u64], faulty: &[u64]) -> Partition {
        Partition {
            all_sectors: bits(live),
            live_sectors: bits(live),
            faulty_sectors: bits(faulty),
            ..Partition::default()
        }
    }

    #[test]
    fn outcomes_are_what_the_chain_and_the_receipts_say() {
        let two = [partition(&[1, 2], &[]), partition(&[3], &[])];
        let empty = [partition(&[], &[]), partition(&[5], &[5])];
        for (partitions, posted, landed, want) in [
            (&two, vec![0, 1], vec![], Outcome::Proved { partitions: 2 }),
            (&two, vec![0], vec![1], Outcome::Proved { partitions: 2 }),
            (&empty, vec![], vec![], Outcome::Empty),
            (
                &two,
                vec![1],
                vec![],
                Outcome::Failed {
                    partitions: vec![0],
                    why: "no message landed in time".into(),
                },
            ),
        ] {
            let mut p = Progress::default();
            assert!(!p.is_complete());
            p.look(partitions, &bits(&posted));
            p.landed = landed.into_iter().collect();
            assert_eq!(p.outcome(), want);
            assert_eq!(p.is_complete(), !matches!(want, Outcome::Failed { .. }));
        }
        let unseen = Progress::default().outcome();
        assert!(
            matches!(unseen, Outcome::Failed { .. }),
            "not seeing is not empty"
        );
    }

    #[test]
    fn a_reorg_that_drops_a_submission_reopens_the_partition() {
        let one = [partition(&[1], &[])];
        let mut p = Progress::default();
        p.look(&one, &bits(&[0]));
        assert!(p.is_complete());
        p.look(&one, &bits(&[]));
        assert!(!p.is_complete());
    }

    #[test]
    fn nothing_is_begun_twice() {
        let three = [
            partition(&[1], &[]),
            partition(&[2], &[]),
            partition(&[3], &[]),
        ];
        let mut p = Progress::default();
        p.look(&three, &bits(&[]));
        let todo = |p: &Progress| p.todo().into_iter().collect::<Vec<_>>();
        assert_eq!(todo(&p), [0, 1, 2]);
        p.proving.insert(0);
        p.waiting.insert(1);
        assert_eq!(todo(&p), [2]);
        let batch = Batch {
            partitions: vec![0],
            ..Batch::default()
        };
        let lost = ProvingError::Inconsistent {
            what: "worker",
            why: "died".into(),
        };
        p.proved(&batch, Err(lost));
        assert_eq!(todo(&p), [2], "a failure waits for the next try");
        p.held.clear();
        assert_eq!(todo(&p), [0, 2]);
        p.look(&three, &bits(&[0, 2]));
        assert!(todo(&p).is_empty(), "the chain has it");
    }
}
