//! One proof for the sectors of a commit batch, instead of one for each.
//!
//! That a batch is aggregated is journaled with it, in the seats of its sectors. The aggregate is
//! journaled before the message is made of it, with the seals that it is of: after a crash it is
//! not made again, and where a sector has left the batch meanwhile, it is not used.

use std::sync::Arc;
use std::time::Duration;

use lotus_journal::{JournalError, Map};
use lotus_proofs::{AGGREGATE_SEALS, SealInputs};
use lotus_runtime::Backoff;
use lotus_types::{EpochDelta, Kind, SectorNumber};
use lotus_workers::{Output, SealProof, Task, WorkError};
use serde::{Deserialize, Serialize};

use crate::SealingError;
use crate::batch::{BatchKind, cutoff};
use crate::heavy::unexpected;
use crate::machine::{Event, Sector};
use crate::shared::{Shared, StoredBytes, lock};

/// How long a batch waits for its aggregate: half of the time that the default settings leave
/// between a batch and its cut-off. Making one takes seconds, but other work may be before it.
const WITHIN: Duration = Duration::from_secs(1_800);
/// First and longest time before a lost worker's work is given to another.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(60));
/// Aggregates that are looked through for those of batches that are gone.
const LOOKED_THROUGH: usize = 64;

/// The aggregates of batches that were not sent yet.
pub(crate) const AGGREGATES: Map<u64, Aggregate> = Map::new("sealing.aggregates");

/// The aggregate of a batch.
#[derive(Serialize, Deserialize)]
pub(crate) struct Aggregate {
    seals: Vec<SealInputs>,
    proof: StoredBytes,
}

/// An aggregate that is to be made before its batch can be sent.
pub(crate) struct Wanted {
    batch: u64,
    seals: Vec<SealProof>,
}

/// How a batch's proofs go.
pub(crate) enum Proofs {
    /// Each as it is.
    Apart,
    /// In this aggregate.
    Together(Vec<u8>),
    /// In one that is not there yet.
    Wanted(Wanted),
    /// Not together after all.
    GivenUp(String),
}

impl Shared {
    /// How the proofs of these sectors go, which are what the chain would take of a batch. Those
    /// of pre-commits have none.
    pub(crate) async fn proofs(
        self: &Arc<Self>,
        batch: u64,
        ready: &[(SectorNumber, Sector)],
        proofs: Vec<&[u8]>,
    ) -> Result<Proofs, SealingError> {
        // Those who left may have left too few.
        let together = ready.iter().any(|(_, s)| s.seat.aggregate);
        if !together || proofs.len() != ready.len() || !AGGREGATE_SEALS.contains(&ready.len()) {
            return Ok(Proofs::Apart);
        }
        let seals: Option<Vec<_>> = ready
            .iter()
            .zip(proofs)
            .map(|((number, s), proof)| {
                let (ticket, seed) = (s.ticket?, s.seed?);
                Some(SealProof {
                    number: *number,
                    ticket: ticket.value,
                    seed: seed.value,
                    commitments: s.commitments?,
                    proof: proof.to_vec(),
                })
            })
            .collect();
        let Some(seals) = seals else {
            return Ok(Proofs::GivenUp("a sector lacks its randomness".into()));
        };
        let shared = self.clone();
        let kept = self
            .blocking(move || {
                let journal = shared.machines.journal();
                let kept = journal.read(|v| v.get(&AGGREGATES, &batch));
                Ok(kept.map_err(|e: JournalError| e)?)
            })
            .await?;
        match kept {
            Some(kept)
                if kept
                    .seals
                    .iter()
                    .copied()
                    .eq(seals.iter().map(SealProof::inputs)) =>
            {
                return Ok(Proofs::Together(kept.proof.0));
            }
            _ => {}
        }
        let head = self.chain_head()?.height;
        let slack = EpochDelta(self.cfg.commit_batch_slack_epochs / 2);
        let ends = ready
            .iter()
            .filter_map(|(_, s)| cutoff(&self.cfg, BatchKind::Commit, s));
        if let Some(end) = ends.min().filter(|end| *end - slack <= head) {
            return Ok(Proofs::GivenUp(format!(
                "there is no time for an aggregate: a sector must be on chain by epoch {end}"
            )));
        }
        Ok(Proofs::Wanted(Wanted { batch, seals }))
    }

    /// Has an aggregate made by a worker and journals it; without one, the sectors leave the
    /// batch. Not for those who hold the lock of batches: other messages do not wait for a worker.
    pub(crate) async fn aggregate(self: &Arc<Self>, wanted: Wanted) -> Result<(), SealingError> {
        let Wanted { batch, seals } = wanted;
        let inputs: Vec<_> = seals.iter().map(SealProof::inputs).collect();
        let task = Task::Aggregate {
            miner: self.miner,
            size: self.size,
            seals,
        };
        let made = tokio::time::timeout(WITHIN, self.aggregate_of(&task)).await;
        let why = match made {
            Ok(Ok(Output::Proof(proof))) => return self.keep_aggregate(batch, inputs, proof).await,
            Ok(Ok(other)) => unexpected(&other).message(),
            Ok(Err(e @ WorkError::Stopping { .. })) => return Err(e.into()),
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("no worker made it in {WITHIN:?}"),
        };
        let _turn = self.batching.lock().await;
        self.give_up_aggregate(batch, why).await
    }

    /// What the workers say of a task; those that are lost or busy say nothing of it.
    async fn aggregate_of(&self, task: &Task) -> Result<Output, WorkError> {
        let mut backoff = Backoff::new(AGAIN.0, AGAIN.1);
        loop {
            match self.work.run(task.clone(), Arc::new(|_| {})).await {
                Err(e)
                    if matches!(e.kind(), Kind::Transport | Kind::Capacity)
                        && !matches!(e, WorkError::Stopping { .. }) =>
                {
                    let wait = backoff.next();
                    tracing::warn!(error = %e, ?wait, "no aggregate yet; tried again");
                    tokio::time::sleep(wait).await;
                }
                done => return done,
            }
        }
    }

    /// The sectors of a batch go without an aggregate. Call it with the lock of batches.
    pub(crate) async fn give_up_aggregate(
        self: &Arc<Self>,
        batch: u64,
        why: String,
    ) -> Result<(), SealingError> {
        // A message that is on its way must stay the only one.
        let key = BatchKind::Commit.key(batch);
        if self.sender.status(&key).await?.is_some() {
            return Ok(());
        }
        tracing::warn!(batch, why, "the proofs of a batch go as they are");
        let event = Event::NotAggregated(format!("its proof goes as it is: {why}"));
        let members = self.members(BatchKind::Commit, batch).into_iter();
        let all = members.map(|(n, _)| (n, event.clone())).collect();
        self.apply_all(all, None, |_| Ok(())).await?;
        Ok(())
    }

    async fn keep_aggregate(
        self: &Arc<Self>,
        batch: u64,
        seals: Vec<SealInputs>,
        proof: Vec<u8>,
    ) -> Result<(), SealingError> {
        let shared = self.clone();
        let proof = StoredBytes(proof);
        self.blocking(move || {
            let journal = shared.machines.journal();
            journal.write(|tx| {
                for (old, _) in tx.scan(&AGGREGATES, None, LOOKED_THROUGH)? {
                    if lock(&shared.mirror)
                        .busy()
                        .values()
                        .all(|s| s.seat.batch != Some(old))
                    {
                        tx.remove(&AGGREGATES, &old)?;
                    }
                }
                tx.put(&AGGREGATES, &batch, &Aggregate { seals, proof })
            })?;
            Ok::<_, SealingError>(())
        })
        .await
    }
}
