//! Making the proof of one partition.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lotus_actors::{Dst, address_entropy, post_randomness};
use lotus_node_client::api::{BitField, Partition, TipSetKey};
use lotus_types::{Commitment, SectorNumber};
use lotus_workers::{Output, Post, PostFile, PostKind, Task};
use rand::RngCore as _;

use crate::ProvingError;
use crate::deadline::Window;
use crate::partition::Batch;
use crate::record::ProofRecord;
use crate::window::Shared;

/// How often a proof is begun anew because it met further bad sectors. The prover names all that
/// it meets, so more than a few means that storage is failing under our hands.
const MAX_PASSES: usize = 8;
/// Sectors that one task checks by a proof: some thousand random reads.
const CHECK_PROOFS: usize = 64;
/// Sectors whose files one task looks for.
const CHECK_FILES: usize = 1024;
/// Longest that a task of a check may take.
const CHECK_LIMIT: Duration = Duration::from_secs(600);
/// How often the bytes of a sector's openings are in memory while a proof is made, at most: in the
/// hub, in the worker that makes the proof of them, and in that proof where it is vanilla, each with
/// its text form on the socket.
const PROOF_COPIES: u64 = 10;

/// How many proofs are made at a time: what the settings ask for (0: leave one worker to blocks),
/// at most one per worker, and as many as fit into the free memory, but at least one.
pub(crate) fn parallel(asked: usize, workers: u32, free: Option<u64>, proof_bytes: u64) -> usize {
    let workers = usize::try_from(workers).unwrap_or(usize::MAX);
    let asked = match asked {
        0 => workers.saturating_sub(1),
        n => n,
    };
    let each = proof_bytes.saturating_mul(PROOF_COPIES).max(1);
    let fit = free.map_or(usize::MAX, |f| {
        usize::try_from(f / each).unwrap_or(usize::MAX)
    });
    asked.min(workers).min(fit).max(1)
}

fn strange(answer: &Output) -> ProvingError {
    ProvingError::Inconsistent {
        what: "answer of the prove worker",
        why: format!("{answer:?}").chars().take(64).collect(),
    }
}

impl Shared {
    /// The challenge of a deadline on the chain of `key`.
    pub(crate) async fn challenge(
        &self,
        w: &Window,
        key: &TipSetKey,
    ) -> Result<[u8; 32], ProvingError> {
        let miner = self.deps.miner.address();
        let seed = self
            .deps
            .node
            .state_get_randomness_from_beacon(
                Dst::WindowedPoStChallengeSeed as i64,
                w.challenge,
                &address_entropy(&miner),
                key,
            )
            .await?;
        Ok(post_randomness(seed))
    }

    /// Makes the proof of a batch and journals it. Returns how many sectors it skips.
    pub(crate) async fn make_proof(
        &self,
        w: &Window,
        batch: &Batch,
        randomness: [u8; 32],
        key: &TipSetKey,
        limit: Duration,
    ) -> Result<u64, ProvingError> {
        let began = Instant::now();
        let (proof, skipped) = self.compute(batch, randomness, key, limit).await?;
        let count = skipped.len();
        let record = ProofRecord {
            partitions: batch.partitions.clone(),
            randomness,
            wanted: batch.wanted.clone(),
            skipped,
            proof,
            close: w.close,
        };
        self.records.save_proof(w, batch.first(), &record)?;
        metrics::histogram!("lotus_miner_window_proof_seconds")
            .record(began.elapsed().as_secs_f64());
        tracing::info!(
            deadline = w.index,
            partitions = ?batch.partitions,
            skipped = count,
            took = ?began.elapsed(),
            "proof is made"
        );
        Ok(count)
    }

    /// A proof of a batch, and the sectors that it skips because they can not be proven.
    pub(crate) async fn compute(
        &self,
        batch: &Batch,
        randomness: [u8; 32],
        key: &TipSetKey,
        limit: Duration,
    ) -> Result<(Vec<u8>, BitField), ProvingError> {
        let comm_rs = self.comm_rs(&batch.wanted, key).await?;
        let mut good = batch.wanted.clone();
        for _ in 0..MAX_PASSES {
            let Some(numbers) = batch.substituted(&good) else {
                return Err(ProvingError::Unreadable {
                    count: usize::try_from(batch.wanted.len()).unwrap_or(usize::MAX),
                    first: SectorNumber(batch.wanted.first().unwrap_or_default()),
                });
            };
            let made = self.run_post(&numbers, &comm_rs, randomness, limit).await?;
            match made {
                Ok(proof) => return Ok((proof, &batch.wanted - &good)),
                Err(bad) => {
                    tracing::error!(
                        partitions = ?batch.partitions,
                        sectors = ?bad.iter().take(32).collect::<Vec<_>>(),
                        count = bad.len(),
                        "sectors can not be proven and are skipped"
                    );
                    good -= &bad;
                }
            }
        }
        Err(ProvingError::Inconsistent {
            what: "window proof",
            why: format!("further sectors turned bad in each of {MAX_PASSES} passes"),
        })
    }

    /// Checks sectors: their files or, with `proof`, that they prove a random challenge. Returns
    /// those that are bad, and why.
    pub(crate) async fn check_sectors(
        &self,
        sectors: &BitField,
        proof: bool,
        key: &TipSetKey,
    ) -> Result<BTreeMap<u64, String>, ProvingError> {
        let comm_rs = self.comm_rs(sectors, key).await?;
        let randomness = proof.then(|| {
            let mut bytes = [0; 32];
            rand::rng().fill_bytes(&mut bytes);
            post_randomness(bytes)
        });
        let all: Vec<u64> = sectors.iter().collect();
        let mut bad = BTreeMap::new();
        // Small tasks, so that a proof never waits long for a worker.
        for some in all.chunks(if proof { CHECK_PROOFS } else { CHECK_FILES }) {
            let task = Task::CheckSectors {
                miner: self.deps.miner,
                size: self.deps.size,
                randomness,
                sectors: self.post_files(some, &comm_rs)?,
            };
            match self.deps.pool.run_within(task, CHECK_LIMIT).await? {
                Output::Checked(found) => {
                    bad.extend(found.into_iter().map(|(n, why)| (n.0, why)));
                }
                other => return Err(strange(&other)),
            }
        }
        bad.retain(|n, _| sectors.get(*n));
        Ok(bad)
    }

    fn post_files(
        &self,
        numbers: &[u64],
        comm_rs: &BTreeMap<u64, Commitment>,
    ) -> Result<Vec<PostFile>, ProvingError> {
        let file = |n: &u64| {
            let comm_r = comm_rs.get(n).ok_or_else(|| ProvingError::Inconsistent {
                what: "sectors of the partition",
                why: format!("the node does not know sector {n}"),
            })?;
            let number = SectorNumber(*n);
            Ok(PostFile {
                number,
                comm_r: *comm_r,
                sealed: self.deps.files.sealed(number, comm_r),
                cache: self.deps.files.cache(number, comm_r),
            })
        };
        numbers.iter().map(file).collect()
    }

    /// A proof over these sectors, or the bad ones among them: never an empty set.
    async fn run_post(
        &self,
        numbers: &[u64],
        comm_rs: &BTreeMap<u64, Commitment>,
        randomness: [u8; 32],
        limit: Duration,
    ) -> Result<Result<Vec<u8>, BitField>, ProvingError> {
        let post = Post {
            kind: PostKind::Window,
            miner: self.deps.miner,
            size: self.deps.size,
            randomness,
            sectors: self.post_files(numbers, comm_rs)?,
        };
        match self.deps.pool.prove(post, limit).await? {
            Output::Proof(proof) => Ok(Ok(proof)),
            Output::Faulty(bad) => {
                let ours = bad.iter().map(|s| s.0).filter(|n| numbers.contains(n));
                match BitField::try_from_bits(ours) {
                    Ok(bad) if !bad.is_empty() => Ok(Err(bad)),
                    _ => Err(strange(&Output::Faulty(bad))),
                }
            }
            other => Err(strange(&other)),
        }
    }

    /// The replica commitments of sectors, from the chain.
    async fn comm_rs(
        &self,
        sectors: &BitField,
        key: &TipSetKey,
    ) -> Result<BTreeMap<u64, Commitment>, ProvingError> {
        let miner = self.deps.miner.address();
        let infos = self
            .deps
            .node
            .state_miner_sectors(miner, Some(sectors), key)
            .await?;
        infos
            .iter()
            .map(|i| {
                let comm_r = Commitment::from_sealed_cid(&i.sealed_cid).map_err(|e| {
                    ProvingError::Inconsistent {
                        what: "sealed CID",
                        why: e.to_string(),
                    }
                })?;
                Ok((i.sector_number.0, comm_r))
            })
            .collect()
    }

    /// Bit fields are compressed: a few bytes can stand for 2^60 sectors.
    pub(crate) fn check_size(&self, p: &Partition) -> Result<(), ProvingError> {
        let limit = lotus_proofs::window_post_partition_sectors(self.deps.size);
        let sectors = p.all_sectors.len().max(p.live_sectors.len());
        if sectors > limit {
            return Err(ProvingError::Inconsistent {
                what: "partition",
                why: format!("{sectors} sectors, the network allows {limit}"),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parallel_proofs_are_bounded_by_workers_and_memory() {
        let mib = 1 << 20;
        for (asked, workers, free, proof, want) in [
            (0, 2, None, mib, 1),
            (0, 5, None, mib, 4),
            (0, 1, None, mib, 1),
            (0, 0, None, mib, 1),
            (9, 4, None, mib, 4),
            (2, 4, None, mib, 2),
            (8, 8, Some(150 * mib), 5 * mib, 3),
            (8, 8, Some(mib), 5 * mib, 1),
            (8, 8, Some(u64::MAX), 5 * mib, 8),
        ] {
            assert_eq!(
                parallel(asked, workers, free, proof),
                want,
                "{asked} {workers} {free:?}"
            );
        }
    }
}
