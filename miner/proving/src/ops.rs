//! What operators ask of WindowPoSt by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lotus_actors::miner::RecoveryDeclaration;
use lotus_node_client::api::{BitField, Partition, TipSetKey};
use lotus_types::{Epoch, EpochDelta, SectorNumber};
use serde::{Deserialize, Serialize};

use crate::config::CheckLevel;
use crate::deadline::Window;
use crate::partition::{batches, wanted};
use crate::window::{Shared, WindowPost};
use crate::{ProvingError, Work};

/// Sectors that one command may name.
const RECOVER_MAX: usize = 10_000;
/// From the word that a proof by hand is made until it is: whoever gives way to proofs does so.
const NOTICE: Duration = Duration::from_millis(250);
/// Longest that a proof may take which nobody waits for on chain.
const COMPUTE_LIMIT: Duration = Duration::from_secs(1800);

/// What a check of a partition found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckedPartition {
    /// Deadline index.
    pub deadline: u64,
    /// Partition index.
    pub partition: u64,
    /// Live sectors, all of which were checked.
    pub sectors: u64,
    /// Those that can not be proven.
    pub bad: Vec<BadSector>,
    /// Sectors that are faulty on chain but can be proven: recover them.
    pub repaired: Vec<u64>,
}

/// A sector that can not be proven.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadSector {
    /// Its number.
    pub sector: u64,
    /// What is wrong with it.
    pub why: String,
    /// Whether it is faulty on chain already.
    pub faulty: bool,
}

/// A proof that was made for a try.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Computed {
    /// The partitions that it proves.
    pub partitions: Vec<u64>,
    /// Sectors in them that had to be proven.
    pub sectors: u64,
    /// Sectors that could not be proven.
    pub skipped: Vec<u64>,
    /// Bytes of the proof.
    pub proof_bytes: u64,
    /// Seconds that it took.
    pub seconds: f64,
    /// Epoch of the challenge that it answers.
    pub challenge: Epoch,
    /// Why there is no proof.
    pub error: Option<String>,
}

/// A sector that is, or is not, declared as recovered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// Its number.
    pub sector: u64,
    /// Where it is proven.
    pub deadline: u64,
    /// Its partition there.
    pub partition: u64,
    /// First epoch at which a declaration is too late for its next window.
    pub fault_cutoff: Epoch,
    /// Why it is not declared; `None` if it is, or would be.
    pub refused: Option<String>,
}

impl WindowPost {
    /// Checks a deadline's sectors: their files or, with `slow`, that each proves a random
    /// challenge. Declares nothing.
    pub async fn check(
        &self,
        deadline: u64,
        slow: bool,
    ) -> Result<Vec<CheckedPartition>, ProvingError> {
        let shared = self.shared();
        let key = shared.head_key().await?;
        let partitions = shared.partitions(deadline, &key).await?;
        let level = if slow {
            CheckLevel::Proof
        } else {
            CheckLevel::Files
        };
        let mut out = Vec::new();
        for (partition, p) in (0u64..).zip(&partitions) {
            shared.check_size(p)?;
            if p.live_sectors.is_empty() {
                continue;
            }
            let bad = shared.bad_sectors(p, level, &key).await?;
            let faulty = &(&p.faulty_sectors & &p.live_sectors) - &p.recovering_sectors;
            let bad_sector = |(sector, why)| BadSector {
                sector,
                why,
                faulty: p.faulty_sectors.get(sector),
            };
            out.push(CheckedPartition {
                deadline,
                partition,
                sectors: p.live_sectors.len(),
                repaired: faulty.iter().filter(|n| !bad.contains_key(n)).collect(),
                bad: bad.into_iter().map(bad_sector).collect(),
            });
        }
        Ok(out)
    }

    /// Makes the proofs of a deadline against its newest challenge, and submits nothing.
    pub async fn compute(&self, deadline: u64) -> Result<Vec<Computed>, ProvingError> {
        let shared = self.shared();
        let what = format!("WindowPoSt of deadline {deadline}, made by hand");
        let _busy = shared.deps.activity.begin(Work::WindowPost, what, None);
        let key = shared.head_key().await?;
        let partitions = shared.partitions(deadline, &key).await?;
        for p in &partitions {
            shared.check_size(p)?;
        }
        let (window, period) = shared.window(deadline, &key).await?;
        let head = shared.height();
        let last = challenged(window, period, head);
        let challenge = shared.challenge(&last, &key).await?;
        // Before a deadline others give way epochs ahead; a proof by hand is to take as long.
        tokio::time::sleep(NOTICE).await;
        let todo: BTreeSet<u64> = (0u64..)
            .zip(&partitions)
            .filter(|(_, p)| !wanted(p).is_empty())
            .map(|(i, _)| i)
            .collect();
        let mut out = Vec::new();
        for batch in batches(&partitions, &todo, shared.per_message(), &BTreeSet::new()) {
            let began = Instant::now();
            let made = shared.compute(&batch, challenge, &key, COMPUTE_LIMIT).await;
            let seconds = began.elapsed().as_secs_f64();
            let (proof_bytes, skipped, error) = match made {
                Ok((proof, skipped)) => (proof.len() as u64, skipped.iter().collect(), None),
                Err(e) => (0, Vec::new(), Some(format!("{e}; {}", e.fix()))),
            };
            out.push(Computed {
                partitions: batch.partitions,
                sectors: batch.wanted.len(),
                skipped,
                proof_bytes,
                seconds,
                challenge: last.challenge,
                error,
            });
        }
        Ok(out)
    }

    /// Declares faulty sectors as recovered, those that can be proven; without `really`, says
    /// what it would do. Returns when the messages are journaled.
    pub async fn recover(
        &self,
        sectors: &BTreeSet<u64>,
        really: bool,
    ) -> Result<Vec<Recovery>, ProvingError> {
        let shared = self.shared();
        if sectors.len() > RECOVER_MAX {
            return Err(ProvingError::Inconsistent {
                what: "command",
                why: format!(
                    "{} sectors, at most {RECOVER_MAX} go together",
                    sectors.len()
                ),
            });
        }
        let key = shared.head_key().await?;
        let (node, actor) = (&shared.deps.node, shared.deps.miner.address());
        let mut places: BTreeMap<u64, BTreeMap<u64, BTreeSet<u64>>> = BTreeMap::new();
        for n in sectors {
            let at = node.state_sector_partition(actor, SectorNumber(*n), &key);
            let at = at.await?;
            let deadline = places.entry(at.deadline).or_default();
            deadline.entry(at.partition).or_default().insert(*n);
        }
        let mut out = Vec::new();
        for (deadline, by_partition) in places {
            let (window, _) = shared.window(deadline, &key).await?;
            let partitions = shared.partitions(deadline, &key).await?;
            let late = !window.declarable(shared.height());
            let mut declarations = Vec::new();
            for (partition, numbers) in by_partition {
                let at = usize::try_from(partition).unwrap_or(usize::MAX);
                let p = partitions.get(at).cloned().unwrap_or_default();
                let faulty = |n: &u64| p.faulty_sectors.get(*n) && !p.recovering_sectors.get(*n);
                let ask = numbers.iter().copied().filter(faulty);
                let ask = BitField::try_from_bits(ask).unwrap_or_default();
                let bad = if ask.is_empty() {
                    BTreeMap::new()
                } else {
                    shared.check_sectors(&ask, true, &key).await?
                };
                let mut good = Vec::new();
                for n in numbers {
                    let refused = if late {
                        Some(format!(
                            "the cut-off of its window has passed: try again from epoch {}",
                            window.close
                        ))
                    } else if p.recovering_sectors.get(n) {
                        Some("it is declared as recovered already".into())
                    } else if !p.faulty_sectors.get(n) {
                        Some("it is not faulty".into())
                    } else {
                        bad.get(&n)
                            .map(|why| format!("it can not be proven: {why}"))
                    };
                    if refused.is_none() {
                        good.push(n);
                    }
                    out.push(Recovery {
                        sector: n,
                        deadline,
                        partition,
                        fault_cutoff: window.fault_cutoff,
                        refused,
                    });
                }
                if !good.is_empty() {
                    declarations.push(RecoveryDeclaration {
                        deadline,
                        partition,
                        sectors: BitField::try_from_bits(good).unwrap_or_default(),
                    });
                }
            }
            if really && !declarations.is_empty() {
                shared.declare_recovered(&window, declarations).await?;
            }
        }
        Ok(out)
    }
}

/// The newest window of a deadline whose challenge is known at `head`, given its next one.
fn challenged(mut next: Window, period: EpochDelta, head: Epoch) -> Window {
    if next.challenge >= head {
        next.challenge = next.challenge - period;
    }
    next
}

impl Shared {
    async fn head_key(&self) -> Result<TipSetKey, ProvingError> {
        let followed = self.deps.follower.head().borrow().clone();
        match followed {
            Some(head) => Ok(head.key()),
            None => Ok(self.deps.node.chain_head().await?.key()),
        }
    }

    fn height(&self) -> Epoch {
        let head = self.deps.follower.head().borrow().clone();
        head.map_or(Epoch(0), |h| h.height)
    }

    async fn partitions(
        &self,
        deadline: u64,
        key: &TipSetKey,
    ) -> Result<Vec<Partition>, ProvingError> {
        let (node, actor) = (&self.deps.node, self.deps.miner.address());
        Ok(node.state_miner_partitions(actor, deadline, key).await?)
    }

    /// The current or next window of a deadline, and the length of the proving period.
    async fn window(
        &self,
        deadline: u64,
        key: &TipSetKey,
    ) -> Result<(Window, EpochDelta), ProvingError> {
        let (node, actor) = (&self.deps.node, self.deps.miner.address());
        let di = node.state_miner_proving_deadline(actor, key).await?;
        let found = Window::upcoming(&di).find(|w| w.index == deadline);
        let found = found.ok_or_else(|| ProvingError::Inconsistent {
            what: "deadline",
            why: format!(
                "there are {} of them, from 0 on",
                di.w_post_period_deadlines
            ),
        })?;
        Ok((found, di.w_post_proving_period))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_try_answers_the_newest_known_challenge() {
        let w = Window {
            period_start: Epoch(1000),
            index: 1,
            open: Epoch(1060),
            close: Epoch(1120),
            challenge: Epoch(1040),
            fault_cutoff: Epoch(990),
        };
        let at = |head| challenged(w, EpochDelta(2880), Epoch(head)).challenge.0;
        assert_eq!(at(1041), 1040);
        assert_eq!(at(1040), 1040 - 2880);
        assert_eq!(at(1000), 1040 - 2880);
    }
}
