//! Making the proof of one partition.

use std::collections::BTreeMap;

use lotus_actors::{Dst, address_entropy, post_randomness};
use lotus_node_client::api::{BitField, Partition, TipSetKey};
use lotus_types::{Commitment, SectorNumber};
use lotus_workers::{Output, PostFile, Task};
use rand::RngCore as _;

use crate::ProvingError;
use crate::deadline::Window;
use crate::partition::{substituted, wanted};
use crate::record::ProofRecord;
use crate::window::Shared;

/// How often a proof is begun anew because it met further bad sectors. The prover names all that
/// it meets, so more than a few means that storage is failing under our hands.
const MAX_PASSES: usize = 8;

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

    /// The proof of a partition: the journaled one if it still answers the chain, else a new one.
    /// `None` when the partition has nothing to prove.
    pub(crate) async fn proof(
        &self,
        w: &Window,
        index: u64,
        partition: &Partition,
        randomness: [u8; 32],
        key: &TipSetKey,
    ) -> Result<Option<ProofRecord>, ProvingError> {
        let due = wanted(partition);
        let Some(first) = due.first() else {
            return Ok(None);
        };
        if let Some(old) = self.records.proof(w, index)?
            && old.randomness == randomness
            && old.wanted == due
        {
            return Ok(Some(old));
        }
        self.check_size(partition)?;
        let comm_rs = self.comm_rs(&due, key).await?;
        let mut good = due.clone();
        for _ in 0..MAX_PASSES {
            let Some(numbers) = substituted(partition, &good) else {
                return Err(ProvingError::Unreadable {
                    count: usize::try_from(due.len()).unwrap_or(usize::MAX),
                    first: SectorNumber(first),
                });
            };
            match self.run_post(&numbers, &comm_rs, randomness).await? {
                Ok(proof) => {
                    let record = ProofRecord {
                        randomness,
                        skipped: &due - &good,
                        wanted: due,
                        proof,
                        close: w.close,
                    };
                    self.records.save_proof(w, index, &record)?;
                    return Ok(Some(record));
                }
                Err(bad) => {
                    tracing::error!(
                        deadline = w.index,
                        partition = index,
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

    /// Reads and checks sectors against a random challenge; returns those that are bad.
    pub(crate) async fn check_sectors(
        &self,
        sectors: &BitField,
        key: &TipSetKey,
    ) -> Result<BitField, ProvingError> {
        let comm_rs = self.comm_rs(sectors, key).await?;
        let mut randomness = [0; 32];
        rand::rng().fill_bytes(&mut randomness);
        let mut bad = BitField::new();
        for _ in 0..MAX_PASSES {
            let left: Vec<u64> = (sectors - &bad).iter().collect();
            if left.is_empty() {
                break;
            }
            match self
                .run_post(&left, &comm_rs, post_randomness(randomness))
                .await?
            {
                Ok(_) => break,
                Err(more) => bad |= &more,
            }
        }
        Ok(bad)
    }

    /// A proof over these sectors, or the bad ones among them: never an empty set.
    async fn run_post(
        &self,
        numbers: &[u64],
        comm_rs: &BTreeMap<u64, Commitment>,
        randomness: [u8; 32],
    ) -> Result<Result<Vec<u8>, BitField>, ProvingError> {
        let sectors = numbers
            .iter()
            .map(|n| {
                let comm_r = comm_rs.get(n).ok_or_else(|| ProvingError::Inconsistent {
                    what: "sectors of the partition",
                    why: format!("the node does not know sector {n}"),
                })?;
                let number = SectorNumber(*n);
                Ok(PostFile {
                    number,
                    comm_r: *comm_r,
                    sealed: self.deps.files.sealed(number),
                    cache: self.deps.files.cache(number),
                })
            })
            .collect::<Result<_, ProvingError>>()?;
        let task = Task::WindowPost {
            miner: self.deps.miner,
            size: self.deps.size,
            randomness,
            sectors,
        };
        let strange = |why: String| ProvingError::Inconsistent {
            what: "answer of the prove worker",
            why,
        };
        match self.deps.pool.run(task, None).await? {
            Output::Proof(proof) => Ok(Ok(proof)),
            Output::Faulty(bad) => {
                let ours = bad.iter().map(|s| s.0).filter(|n| numbers.contains(n));
                let bad = BitField::try_from_bits(ours).map_err(|e| strange(e.to_string()))?;
                if bad.is_empty() {
                    return Err(strange("neither a proof nor a bad sector".into()));
                }
                Ok(Err(bad))
            }
            other => Err(strange(format!("{other:?}").chars().take(64).collect())),
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
