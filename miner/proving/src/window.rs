use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::stream::{self, FuturesUnordered, StreamExt as _};
use lotus_chain::Follower;
use lotus_journal::Journal;
use lotus_messages::{SendError, Sender};
use lotus_node_client::Node;
use lotus_node_client::api::{BitField, Partition, TipSet};
use lotus_runtime::{Backoff, CancellationToken, Health};
use lotus_types::{ActorId, Epoch, SectorSize};
use lotus_workers::Pool;
use tokio::task::{Id, JoinSet};

use crate::deadline::{Due, Window};
use crate::partition::wanted;
use crate::record::Records;
use crate::submit::MAX_ATTEMPTS;
use crate::{Activity, DeadlineRecord, Outcome, ProvingConfig, ProvingError, SectorFiles};

/// Name of the health component.
const COMPONENT: &str = "window_post";

/// What WindowPoSt works with.
#[derive(Clone)]
pub struct ProvingDeps {
    /// The hub's journal.
    pub journal: Journal,
    /// The full node.
    pub node: Node,
    /// Follows its head.
    pub follower: Follower,
    /// Sends messages.
    pub sender: Sender,
    /// Makes proofs.
    pub pool: Pool,
    /// Finds replicas.
    pub files: Arc<dyn SectorFiles>,
    /// The miner.
    pub miner: ActorId,
    /// Size of its sectors.
    pub size: SectorSize,
    /// `[proving]`.
    pub cfg: ProvingConfig,
    /// Gets the component `window_post`.
    pub health: Health,
    /// Shared with mining and `SafeToRestart`.
    pub activity: Activity,
}

/// The WindowPoSt scheduler.
#[derive(Clone)]
pub struct WindowPost(Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) deps: ProvingDeps,
    pub(crate) records: Records,
}

/// Names a window for ever.
type Key = (Epoch, u64);

const fn key(w: &Window) -> Key {
    (w.period_start, w.index)
}

/// What runs for a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Job {
    /// Prove and submit.
    Prove,
    /// Check the sectors and declare.
    Check,
}

impl WindowPost {
    /// A scheduler that does nothing until [`WindowPost::run`].
    #[must_use]
    pub fn new(deps: ProvingDeps) -> Self {
        let records = Records(deps.journal.clone());
        Self(Arc::new(Shared { deps, records }))
    }

    /// Deadlines that are over, oldest first: two months of them.
    pub fn outcomes(&self) -> Result<Vec<DeadlineRecord>, ProvingError> {
        Ok(self.0.records.outcomes()?)
    }

    /// Proves deadlines until `stop`. What is interrupted goes on after a restart: proofs and
    /// messages are journaled, and what the chain has is not sent again.
    pub async fn run(self, stop: CancellationToken) {
        let shared = self.0;
        if !shared.deps.cfg.enabled {
            shared
                .deps
                .health
                .set(COMPONENT, Ok("off by [proving] enabled".into()));
            stop.cancelled().await;
            return;
        }
        let mut heads = shared.deps.follower.head();
        let mut jobs = JoinSet::new();
        // A job that ended well is not begun again; one that failed or panicked is, at the next
        // head: a panic is never "nothing to prove".
        let mut begun: BTreeMap<(Key, Job), State> = BTreeMap::new();
        let mut ids: HashMap<Id, (Key, Job)> = HashMap::new();
        let mut backoff = Backoff::new(shared.deps.cfg.retry_first(), Duration::from_secs(30));
        loop {
            let mut retry = None;
            let head = heads.borrow_and_update().clone();
            if let Some(head) = head {
                match shared.due(&head).await {
                    Ok(due) => {
                        backoff.reset();
                        shared.deps.health.set(COMPONENT, Ok(String::new()));
                        begun.retain(|(k, _), s| *s == State::Running || due.contains_window(*k));
                        for (w, job) in due.jobs {
                            let name = (key(&w), job);
                            if begun.contains_key(&name) {
                                continue;
                            }
                            begun.insert(name, State::Running);
                            let work = shared.clone().work(w, job, head.clone());
                            ids.insert(jobs.spawn(work).id(), name);
                        }
                    }
                    Err(e) => {
                        tracing::warn!(error = %e, "cannot see which deadlines are due");
                        let why = format!("{e}; {}", e.fix());
                        shared.deps.health.set(COMPONENT, Err(why));
                        retry = Some(backoff.next());
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                changed = heads.changed() => if changed.is_err() {
                    // The follower ended, so the hub is stopping.
                    stop.cancelled().await;
                    break;
                },
                Some(ended) = jobs.join_next_with_id() => {
                    let (id, ok) = match ended {
                        Ok((id, ok)) => (id, ok),
                        Err(e) => {
                            tracing::error!(error = %e, "a proving job panicked; it is begun anew");
                            (e.id(), false)
                        }
                    };
                    if let Some(name) = ids.remove(&id) {
                        if ok {
                            begun.insert(name, State::Done);
                        } else {
                            begun.remove(&name);
                        }
                    }
                }
                () = sleep_if(retry) => {}
            }
        }
        jobs.shutdown().await;
    }
}

async fn sleep_if(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Done,
}

/// What a head asks for.
struct DueNow {
    jobs: Vec<(Window, Job)>,
    windows: BTreeSet<Key>,
}

impl DueNow {
    fn contains_window(&self, k: Key) -> bool {
        self.windows.contains(&k)
    }
}

impl Shared {
    async fn due(&self, head: &TipSet) -> Result<DueNow, ProvingError> {
        let miner = self.deps.miner.address();
        let node = &self.deps.node;
        let di = node
            .state_miner_proving_deadline(miner, &head.key())
            .await?;
        let mut jobs = Vec::new();
        for w in Window::upcoming(&di) {
            if matches!(w.due(head.height), Due::Prove | Due::Submit) {
                jobs.push((w, Job::Prove));
            }
            if self.deps.cfg.check_before_deadline && w.check_due(head.height) {
                jobs.push((w, Job::Check));
            }
        }
        Ok(DueNow {
            jobs,
            windows: Window::upcoming(&di).map(|w| key(&w)).collect(),
        })
    }

    /// Does a job; says whether it is done for good.
    async fn work(self: Arc<Self>, w: Window, job: Job, head: Arc<TipSet>) -> bool {
        match job {
            Job::Prove => {
                self.attend(&w).await;
                true
            }
            Job::Check => match self.check_deadline(&w, &head).await {
                Ok(()) => true,
                Err(e) => {
                    tracing::warn!(deadline = w.index, error = %e, fix = e.fix(), "checking sectors failed");
                    false
                }
            },
        }
    }

    /// Sees a deadline through from its challenge to its close.
    #[tracing::instrument(name = "window_post", skip_all, fields(deadline = w.index, open = %w.open))]
    async fn attend(&self, w: &Window) {
        let mut heads = self.deps.follower.head();
        let mut progress = Progress::default();
        let mut waits = FuturesUnordered::new();
        let mut backoff = Backoff::new(self.deps.cfg.retry_first(), Duration::from_secs(60));
        let mut busy = None;
        loop {
            let Some(head) = heads.borrow_and_update().clone() else {
                // There was a head, or nothing would be due.
                return;
            };
            if head.height >= w.close {
                break;
            }
            let due = w.due(head.height);
            let mut retry = None;
            if due != Due::Over {
                match self.step(w, &head, due, &mut progress).await {
                    Ok(sent) => {
                        for (partition, attempt, key) in sent {
                            progress.waiting.insert(partition);
                            waits.push(async move {
                                let landed = self.landed(&key).await;
                                (partition, attempt, landed)
                            });
                        }
                        if progress.errors.is_empty() {
                            backoff.reset();
                        } else {
                            retry = Some(backoff.next());
                        }
                    }
                    Err(e) => {
                        tracing::warn!(error = %e, "cannot see what the deadline needs");
                        progress.last_error = e.to_string();
                        retry = Some(backoff.next());
                    }
                }
            }
            // A deadline that is proven for now needs no waiting for.
            busy = match (progress.is_complete(), busy) {
                (true, _) => None,
                (false, Some(guard)) => Some(guard),
                (false, None) => Some(self.deps.activity.begin(
                    format!("wdpost {}", w.index),
                    format!("deadline {} is not proven yet", w.index),
                    Some(w.close),
                )),
            };
            tokio::select! {
                Some((partition, attempt, landed)) = waits.next(), if !waits.is_empty() => {
                    progress.waiting.remove(&partition);
                    if let Err(e) = self.judge(w, partition, attempt, landed, &mut progress) {
                        tracing::error!(error = %e, "journal");
                    }
                }
                changed = heads.changed() => if changed.is_err() {
                    return;
                },
                () = sleep_if(retry) => {}
            }
        }
        drop(busy);
        self.conclude(w, progress.outcome());
    }

    /// One look at the deadline: proves what is not proved, submits what is not submitted.
    /// Returns partition, attempt and key of the messages to wait for.
    async fn step(
        &self,
        w: &Window,
        head: &TipSet,
        due: Due,
        progress: &mut Progress,
    ) -> Result<Vec<(u64, u64, String)>, ProvingError> {
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
        progress.look(&partitions, &posted);
        let todo: Vec<(u64, &Partition)> = (0u64..)
            .zip(&partitions)
            .filter(|(i, _)| progress.missing.contains(i) && !progress.waiting.contains(i))
            .collect();
        if todo.is_empty() {
            return Ok(Vec::new());
        }
        let randomness = self.challenge(w, &key).await?;
        // Boxed, because the compiler loses track of the lifetimes in a closure here.
        let mut work = Vec::new();
        for (index, partition) in todo {
            let advance = self.advance(w, index, partition, randomness, head, due);
            work.push(async move { (index, advance.await) }.boxed());
        }
        let mut done =
            stream::iter(work).buffer_unordered(self.deps.cfg.parallel_partitions.clamp(1, 64));
        let mut sent = Vec::new();
        while let Some((partition, result)) = done.next().await {
            match result {
                Ok(Some((attempt, key))) => sent.push((partition, attempt, key)),
                Ok(None) => {}
                Err(e) => {
                    tracing::error!(partition, error = %e, fix = e.fix(), "partition is not proven");
                    progress.last_error = format!("partition {partition}: {e}");
                    progress.errors.insert(partition);
                }
            }
        }
        Ok(sent)
    }

    /// Proves a partition and, if it is time, submits.
    async fn advance(
        &self,
        w: &Window,
        index: u64,
        partition: &Partition,
        randomness: [u8; 32],
        head: &TipSet,
        due: Due,
    ) -> Result<Option<(u64, String)>, ProvingError> {
        let attempt = self.records.attempt(w, index)?;
        if attempt >= MAX_ATTEMPTS {
            return Ok(None);
        }
        let key = head.key();
        let Some(record) = self.proof(w, index, partition, randomness, &key).await? else {
            return Ok(None);
        };
        if due != Due::Submit {
            return Ok(None);
        }
        let key = self.submit(w, index, attempt, &record, &key).await?;
        Ok(Some((attempt, key)))
    }

    /// Takes the fate of a message into account.
    fn judge(
        &self,
        w: &Window,
        partition: u64,
        attempt: u64,
        landed: Result<lotus_messages::Landed, ProvingError>,
        progress: &mut Progress,
    ) -> Result<(), ProvingError> {
        match landed {
            Ok(at) => {
                tracing::info!(partition, height = %at.height, cid = %at.cid, "WindowPoSt is on chain");
                progress.landed.insert(partition);
            }
            Err(
                e @ (ProvingError::Landed { .. } | ProvingError::Send(SendError::Replaced { .. })),
            ) => {
                tracing::error!(partition, attempt, error = %e, "WindowPoSt message failed");
                progress.last_error = format!("partition {partition}: {e}");
                progress.landed.remove(&partition);
                self.records.next_attempt(w, partition, attempt)?;
            }
            Err(e) => tracing::warn!(partition, error = %e, "no receipt yet"),
        }
        Ok(())
    }

    fn conclude(&self, w: &Window, outcome: Outcome) {
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
        };
        if let Err(e) = self.records.save_outcome(&record) {
            tracing::error!(error = %e, "the deadline's outcome is not journaled");
        }
    }
}

/// How far a deadline is.
#[derive(Default)]
struct Progress {
    /// Partitions with something to prove.
    needed: BTreeSet<u64>,
    /// Of these, the ones that the chain has no proof of at the last head.
    missing: BTreeSet<u64>,
    /// Messages that were sent and not seen.
    waiting: BTreeSet<u64>,
    /// Messages that were seen: the last of them may be later than the last look.
    landed: BTreeSet<u64>,
    /// Partitions that failed in the last look.
    errors: BTreeSet<u64>,
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
        self.errors.clear();
        self.looked = true;
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
}
