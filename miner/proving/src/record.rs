//! What WindowPoSt journals.

use lotus_journal::{Journal, JournalError, Map, Tx};
use lotus_node_client::api::BitField;
use lotus_types::Epoch;
use serde::{Deserialize, Serialize};

use crate::deadline::Window;
use crate::dispute::Disputable;
use crate::partition::Batch;

/// How a deadline ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every partition with something to prove was proven on chain.
    Proved {
        /// How many partitions.
        partitions: u64,
    },
    /// No live sector was due.
    Empty,
    /// Some partitions were not proven.
    Failed {
        /// Their indices.
        partitions: Vec<u64>,
        /// Why, as far as known.
        why: String,
    },
}

impl Outcome {
    /// Name in logs and metrics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Proved { .. } => "proved",
            Self::Empty => "empty",
            Self::Failed { .. } => "failed",
        }
    }
}

/// A deadline that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadlineRecord {
    /// First epoch of its proving period.
    pub period_start: Epoch,
    /// Index within the period.
    pub index: u64,
    /// When it opened.
    pub open: Epoch,
    /// When it closed.
    pub close: Epoch,
    /// How it ended.
    pub outcome: Outcome,
    /// CIDs of the messages that proved it.
    #[serde(default)]
    pub messages: Vec<String>,
    /// Sectors that could not be proven and were skipped, which makes them faulty.
    #[serde(default)]
    pub skipped: u64,
    /// Proofs that were disputed with success after it closed.
    #[serde(default)]
    pub disputed: u64,
}

/// A proof that was made. Kept so that a restart does not make it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProofRecord {
    /// The partitions that it proves.
    #[serde(default)]
    pub(crate) partitions: Vec<u64>,
    /// The challenge that it answers.
    pub(crate) randomness: [u8; 32],
    /// The sectors that were due when it was made.
    pub(crate) wanted: BitField,
    /// Those of them that could not be read.
    pub(crate) skipped: BitField,
    #[serde(with = "serde_bytes")]
    pub(crate) proof: Vec<u8>,
    /// When its deadline closes: it is of no use after.
    pub(crate) close: Epoch,
}

impl ProofRecord {
    /// Whether it is the proof of this batch against this challenge.
    pub(crate) fn answers(&self, batch: &Batch, randomness: &[u8; 32]) -> bool {
        self.partitions == batch.partitions
            && self.wanted == batch.wanted
            && self.randomness == *randomness
    }
}

/// Period start and deadline, and partition: for a proof the first of its batch.
type PartitionKey = ((Epoch, u64), u64);

const PROOFS: Map<PartitionKey, ProofRecord> = Map::new("wdpost.proofs");
/// Optimistic proofs of each deadline that may still be disputed, as last seen.
const DISPUTABLE: Map<u64, Disputable> = Map::new("wdpost.disputable");
/// How many messages for a partition have failed on chain. The next one gets another key.
const ATTEMPTS: Map<PartitionKey, u64> = Map::new("wdpost.attempts");
const OUTCOMES: Map<(Epoch, u64), DeadlineRecord> = Map::new("wdpost.outcomes");
/// Outcomes that are kept: about two months of mainnet.
const KEEP_OUTCOMES: u64 = 3000;
/// Removed at a time; more than ever come in between.
const PRUNE_BATCH: usize = 256;

const fn key(w: &Window, partition: u64) -> PartitionKey {
    ((w.period_start, w.index), partition)
}

/// WindowPoSt's part of the journal.
#[derive(Clone)]
pub(crate) struct Records(pub(crate) Journal);

impl Records {
    pub(crate) fn proof(&self, w: &Window, p: u64) -> Result<Option<ProofRecord>, JournalError> {
        self.0.read(|v| v.get(&PROOFS, &key(w, p)))
    }

    pub(crate) fn save_proof(
        &self,
        w: &Window,
        p: u64,
        record: &ProofRecord,
    ) -> Result<(), JournalError> {
        self.0.write(|tx| {
            // The challenge is past, so what closed before it is over. The chain keeps what a
            // dispute needs.
            for (old, proof) in tx.scan(&PROOFS, None, PRUNE_BATCH)? {
                if proof.close <= w.challenge {
                    tx.remove(&PROOFS, &old)?;
                    tx.remove(&ATTEMPTS, &old)?;
                }
            }
            tx.put(&PROOFS, &key(w, p), record)
        })
    }

    pub(crate) fn attempt(&self, w: &Window, p: u64) -> Result<u64, JournalError> {
        self.0
            .read(|v| Ok(v.get(&ATTEMPTS, &key(w, p))?.unwrap_or(0)))
    }

    /// Notes that attempt `failed` has failed for good.
    pub(crate) fn next_attempt(
        &self,
        w: &Window,
        partitions: &[u64],
        failed: u64,
    ) -> Result<(), JournalError> {
        self.0.write(|tx: &mut Tx| {
            for p in partitions {
                let now = tx.get(&ATTEMPTS, &key(w, *p))?.unwrap_or(0);
                tx.put(&ATTEMPTS, &key(w, *p), &now.max(failed + 1))?;
            }
            Ok(())
        })
    }

    /// Replaces what is known of disputable proofs; adds the disputes that were lost since to the
    /// records of their deadlines, and returns them: deadline and proofs.
    pub(crate) fn disputable(&self, now: &[Disputable]) -> Result<Vec<(u64, u64)>, JournalError> {
        self.0.write(|tx: &mut Tx| {
            let mut lost = Vec::new();
            for (index, now) in (0u64..).zip(now) {
                let before = tx.get(&DISPUTABLE, &index)?;
                let n = now.lost_since(before.as_ref());
                if n > 0 {
                    lost.push((index, n));
                    let all = tx.scan(&OUTCOMES, None, usize::MAX)?;
                    let of = all
                        .into_iter()
                        .find(|(_, r)| r.index == index && r.close == now.closed);
                    if let Some((k, mut record)) = of {
                        record.disputed += n;
                        tx.put(&OUTCOMES, &k, &record)?;
                    }
                }
                if before != Some(*now) {
                    tx.put(&DISPUTABLE, &index, now)?;
                }
            }
            Ok(lost)
        })
    }

    pub(crate) fn save_outcome(&self, record: &DeadlineRecord) -> Result<(), JournalError> {
        self.0.write(|tx| {
            tx.put(&OUTCOMES, &(record.period_start, record.index), record)?;
            let extra = tx.len(&OUTCOMES)?.saturating_sub(KEEP_OUTCOMES);
            let extra = usize::try_from(extra)
                .unwrap_or(usize::MAX)
                .min(PRUNE_BATCH);
            for (old, _) in tx.scan(&OUTCOMES, None, extra)? {
                tx.remove(&OUTCOMES, &old)?;
            }
            Ok(())
        })
    }

    pub(crate) fn outcomes(&self) -> Result<Vec<DeadlineRecord>, JournalError> {
        let limit = usize::try_from(KEEP_OUTCOMES).unwrap_or(usize::MAX);
        self.0.read(|v| {
            let all = v.scan(&OUTCOMES, None, limit)?;
            Ok(all.into_iter().map(|(_, r)| r).collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(period: i64, index: u64) -> Window {
        let open = Epoch(period + i64::try_from(index).unwrap() * 60);
        Window {
            period_start: Epoch(period),
            index,
            open,
            close: Epoch(open.0 + 60),
            challenge: Epoch(open.0 - 20),
            fault_cutoff: Epoch(open.0 - 70),
        }
    }

    #[test]
    fn proofs_survive_a_restart_and_go_with_their_period() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let batch = Batch {
            partitions: vec![0, 1],
            all: BitField::try_from_bits([1, 2, 3]).unwrap(),
            wanted: BitField::try_from_bits([1, 2]).unwrap(),
        };
        let record = ProofRecord {
            partitions: batch.partitions.clone(),
            randomness: [7; 32],
            wanted: BitField::try_from_bits([1, 2]).unwrap(),
            skipped: BitField::try_from_bits([2]).unwrap(),
            proof: vec![9; 1000],
            close: window(0, 3).close,
        };
        let old = window(0, 3);
        {
            let r = Records(Journal::open(&path).unwrap());
            r.save_proof(&old, 0, &record).unwrap();
            r.next_attempt(&old, &[0, 1], 0).unwrap();
            r.next_attempt(&old, &[0], 0).unwrap();
        }
        let r = Records(Journal::open(&path).unwrap());
        assert_eq!(r.proof(&old, 0).unwrap(), Some(record.clone()));
        assert!(record.answers(&batch, &[7; 32]));
        assert!(!record.answers(&batch, &[8; 32]), "another challenge");
        let mut other = batch.clone();
        other.partitions.pop();
        assert!(!record.answers(&other, &[7; 32]), "another batch");
        assert_eq!(r.attempt(&old, 1).unwrap(), 1);
        assert_eq!(
            r.attempt(&old, 0).unwrap(),
            1,
            "the same failure counts once"
        );
        r.save_proof(&window(2880, 3), 0, &record).unwrap();
        assert_eq!(r.proof(&old, 0).unwrap(), None);
        assert_eq!(r.attempt(&old, 0).unwrap(), 0);
    }

    #[test]
    fn a_lost_dispute_is_noted_with_its_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let r = Records(Journal::open(&dir.path().join("journal")).unwrap());
        let w = window(0, 1);
        r.save_outcome(&DeadlineRecord {
            period_start: w.period_start,
            index: w.index,
            open: w.open,
            close: w.close,
            outcome: Outcome::Proved { partitions: 2 },
            messages: vec!["bafy".into()],
            skipped: 0,
            disputed: 0,
        })
        .unwrap();
        let seen = |proofs| {
            let none = Disputable {
                closed: Epoch(60),
                proofs: 0,
            };
            let one = Disputable {
                closed: w.close,
                proofs,
            };
            r.disputable(&[none, one]).unwrap()
        };
        assert!(seen(2).is_empty() && seen(2).is_empty());
        assert_eq!(seen(1), [(1, 1)]);
        assert!(seen(1).is_empty(), "once");
        assert_eq!(r.outcomes().unwrap()[0].disputed, 1);
    }
}
