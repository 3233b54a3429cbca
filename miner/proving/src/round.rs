//! One round of the election, from the base to a signed block.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use lotus_actors::{
    Dst, address_entropy, draw_randomness, post_randomness, ticket_digest, win_count,
};
use lotus_node_client::api::{
    BlockMsg, BlockTemplate, ElectionProof, MinerSector, MiningBaseInfo, PoStProof, Ticket, TipSet,
};
use lotus_types::{Commitment, Epoch, EpochDelta};
use lotus_workers::{Output, Post, PostFile, PostKind};

use crate::first::First;
use crate::mining::Shared;
use crate::pace::{Base, Pace};
use crate::publish::publish;
use crate::{ProvingError, RoundStep, Work};

/// Epochs between a ticket's round and the randomness that it is drawn from.
/// Source: lotus, build/buildconstants, TicketRandomnessLookback.
const TICKET_LOOKBACK: EpochDelta = EpochDelta(1);
/// Waits between two tries to have the same block assembled. What was reserved can only be used
/// for this one round.
const CREATE_RETRIES: u32 = 3;

/// A worker has at least this long over a step of a WinningPoSt: short epochs must not kill workers.
const PROOF_LEAST: Duration = Duration::from_secs(10);

/// What a round came to.
#[derive(Debug)]
pub(crate) enum Round {
    /// The miner has no power, or not enough, or is being punished.
    NotEligible,
    /// The miner took part and did not win.
    Lost,
    /// The chain went on before the block was ready.
    TooLate,
    /// The fence refuses: a block would be a consensus fault.
    Fenced(String),
    /// A hub that never made a block makes none, to see whether another one does.
    Given(String),
    /// The block is published.
    Mined {
        /// Its CID.
        cid: String,
        /// Election wins it counts for.
        wins: i64,
    },
}

impl Round {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::NotEligible => "not_eligible",
            Self::Lost => "lost",
            Self::TooLate => "too_late",
            Self::Fenced(_) => "fenced",
            Self::Given(_) => "given_up",
            Self::Mined { .. } => "mined",
        }
    }
}

/// Where the time of a round went, and how far it came.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    began: Option<Instant>,
    steps: Vec<(&'static str, Duration)>,
    /// Wins of the election; `None` as long as there was none.
    pub(crate) wins: Option<i64>,
}

impl Budget {
    /// The steps for the log of rounds.
    pub(crate) fn steps(&self) -> Vec<RoundStep> {
        let step = |(step, took): &(&str, Duration)| RoundStep {
            step: (*step).to_owned(),
            ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        };
        self.steps.iter().map(step).collect()
    }

    fn lap(&mut self, step: &'static str) {
        let now = Instant::now();
        let took = now - self.began.replace(now).unwrap_or(now);
        metrics::histogram!("lotus_miner_mining_step_seconds", "step" => step)
            .record(took.as_secs_f64());
        self.steps.push((step, took));
    }
}

impl std::fmt::Display for Budget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (step, took)) in self.steps.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{step} {} ms", took.as_millis())?;
        }
        Ok(())
    }
}

impl Shared {
    /// Takes part in one round on top of `base`, and publishes a block if it wins.
    pub(crate) async fn round(
        &self,
        pace: &Pace,
        base: &Arc<TipSet>,
        clock: &Base,
        round: Epoch,
        budget: &mut Budget,
    ) -> Result<Round, ProvingError> {
        let (deps, miner) = (&self.deps, self.deps.miner.address());
        budget.began = Some(Instant::now());
        let info = deps
            .node
            .miner_get_base_info(miner, round, &base.key())
            .await?;
        budget.lap("base info");
        let Some(info) = info.filter(|i| i.eligible_for_mining) else {
            return Ok(Round::NotEligible);
        };
        let election = self.election(&info, round).await?;
        budget.lap("election");
        budget.wins = Some(election.as_ref().map_or(0, |e| e.win_count));
        let Some(election) = election else {
            return Ok(Round::Lost);
        };
        let wins = election.win_count;
        self.log(move |log| log.won(round, wins)).await?;
        if let First::Waits(why) = self.first(base).await? {
            deps.leave.give(round)?;
            return Ok(Round::Given(why));
        }
        let over = Some(round + EpochDelta(1));
        let what = format!("won the election of epoch {round} and makes its block");
        let _busy = deps.activity.begin(Work::Block, what, over);
        let what = format!("WinningPoSt of epoch {round}");
        let proving = deps.activity.begin(Work::WinningPost, what, over);
        tracing::info!(%round, wins = election.win_count, "won the election");
        let ticket = self.ticket(&info, base, round).await?;
        let key = base.key();
        let (proof, messages) = tokio::join!(
            self.winning_post(&info, round, pace.delay()),
            deps.node.mpool_select(&key, quality(&ticket)),
        );
        let proof = proof?;
        // An empty block is better than none.
        let messages = messages.unwrap_or_else(|e| {
            tracing::warn!(error = %e, "no messages for the block");
            Vec::new()
        });
        budget.lap("proof and messages");

        let parents = match self.parents(base, round) {
            Some(parents) => parents,
            None => return Ok(Round::TooLate),
        };
        if let Err(e) = deps.fence.reserve(round, &parents).await {
            use crate::FenceError as F;
            return match e {
                F::Journal(_) | F::Store(_) | F::NotReserved { .. } => Err(e.into()),
                F::Height { .. } | F::Parents { .. } | F::Grinding { .. } | F::TooOld { .. } => {
                    Ok(Round::Fenced(e.to_string()))
                }
            };
        }
        budget.lap("fence");
        let template = BlockTemplate {
            miner,
            parents: parents.key(),
            ticket,
            beacon_values: info.beacon_entries,
            messages,
            epoch: round,
            timestamp: pace.timestamp(clock, round),
            winning_post_proof: vec![proof],
            eproof: election.clone(),
        };
        let block = self.create(&template).await?;
        deps.fence.signed(round, &block).await?;
        budget.lap("block");
        // What is left is a wait and a call.
        drop(proving);
        sleep_until(pace.publish(clock, round)).await;
        budget.lap("wait");
        publish(&deps.node, &block, pace.delay()).await?;
        budget.lap("submit");
        Ok(Round::Mined {
            cid: block.header.cid().to_string(),
            wins: election.win_count,
        })
    }

    /// The election proof, if the miner wins. Source: lotus, chain/gen, IsRoundWinner.
    async fn election(
        &self,
        info: &MiningBaseInfo,
        round: Epoch,
    ) -> Result<Option<ElectionProof>, ProvingError> {
        let miner = self.deps.miner.address();
        let seed = draw_randomness(
            beacon(info),
            Dst::ElectionProofProduction,
            round,
            &address_entropy(&miner),
        );
        let vrf = self.deps.node.wallet_sign(info.worker_key, &seed).await?;
        let wins = win_count(&vrf.bytes, &info.miner_power, &info.network_power);
        Ok((wins > 0).then_some(ElectionProof {
            win_count: wins,
            vrf_proof: vrf.bytes,
        }))
    }

    /// The block's ticket. Source: lotus, miner/miner.go, computeTicket.
    async fn ticket(
        &self,
        info: &MiningBaseInfo,
        base: &TipSet,
        round: Epoch,
    ) -> Result<Ticket, ProvingError> {
        let mut entropy = address_entropy(&self.deps.miner.address());
        if let Some(parent) = &base.min_ticket_block().ticket {
            entropy.extend_from_slice(&parent.vrf_proof);
        }
        let seed = draw_randomness(
            beacon(info),
            Dst::TicketProduction,
            round - TICKET_LOOKBACK,
            &entropy,
        );
        let vrf = self.deps.node.wallet_sign(info.worker_key, &seed).await?;
        Ok(Ticket {
            vrf_proof: vrf.bytes,
        })
    }

    async fn winning_post(
        &self,
        info: &MiningBaseInfo,
        round: Epoch,
        limit: Duration,
    ) -> Result<PoStProof, ProvingError> {
        let (miner, size) = (self.deps.miner, self.deps.size);
        let randomness = post_randomness(draw_randomness(
            beacon(info),
            Dst::WinningPoStChallengeSeed,
            round,
            &address_entropy(&miner.address()),
        ));
        let file = |s: &MinerSector| {
            let comm_r = Commitment::from_sealed_cid(&s.sealed_cid).map_err(|e| {
                ProvingError::Inconsistent {
                    what: "sealed CID",
                    why: e.to_string(),
                }
            })?;
            Ok(PostFile {
                number: s.sector_number,
                comm_r,
                sealed: self.deps.files.sealed(s.sector_number, &comm_r),
                cache: self.deps.files.cache(s.sector_number, &comm_r),
            })
        };
        let sectors = info
            .sectors
            .iter()
            .map(file)
            .collect::<Result<_, ProvingError>>()?;
        let post = Post {
            kind: PostKind::Winning,
            miner,
            size,
            randomness,
            sectors,
        };
        match self.deps.pool.prove(post, limit.max(PROOF_LEAST)).await? {
            Output::Proof(proof_bytes) => Ok(PoStProof {
                post_proof: lotus_proofs::winning_post_proof_type(size),
                proof_bytes,
            }),
            other => Err(ProvingError::Inconsistent {
                what: "answer of the prove worker",
                why: format!("{other:?}").chars().take(64).collect(),
            }),
        }
    }

    /// The parents to build on, after a last look at the head: blocks that joined the base's
    /// tipset meanwhile are taken in, as long as they change nothing that the round was computed
    /// from. `None` when the chain has reached the round already.
    fn parents(&self, base: &Arc<TipSet>, round: Epoch) -> Option<Arc<TipSet>> {
        let head = self.deps.follower.head().borrow().clone()?;
        if head.height >= round {
            return None;
        }
        let ticket = |t: &TipSet| t.min_ticket_block().ticket.clone();
        let wider = head.height == base.height
            && head.parents() == base.parents()
            && ticket(&head) == ticket(base);
        Some(if wider { head } else { base.clone() })
    }

    /// The same template gives the same block, so asking again after a lost answer is safe.
    async fn create(&self, template: &BlockTemplate) -> Result<BlockMsg, ProvingError> {
        let mut tries = 0;
        loop {
            match self.deps.node.miner_create_block(template).await {
                Ok(block) if fits(&block, template) => return Ok(block),
                Ok(_) => {
                    return Err(ProvingError::Inconsistent {
                        what: "created block",
                        why: "it is not the one that was asked for".into(),
                    });
                }
                Err(e) if tries < CREATE_RETRIES && e.kind().is_retryable() => {
                    tries += 1;
                    tracing::warn!(error = %e, "asking for the block again");
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn fits(block: &BlockMsg, template: &BlockTemplate) -> bool {
    let h = &block.header;
    h.miner == template.miner && h.height == template.epoch && h.parents == template.parents.0
}

/// The randomness of a round: its newest beacon entry.
fn beacon(info: &MiningBaseInfo) -> &[u8] {
    let entry = info
        .beacon_entries
        .last()
        .unwrap_or(&info.prev_beacon_entry);
    &entry.data
}

/// How good a ticket is, from 0 to 1: the smaller its digest, the more likely its block comes
/// first. Source: lotus, chain/types, Ticket.Quality.
fn quality(ticket: &Ticket) -> f64 {
    let digest = ticket_digest(&ticket.vrf_proof);
    let (head, _) = digest
        .split_first_chunk::<8>()
        .expect("a digest has 32 bytes");
    #[expect(
        clippy::cast_precision_loss,
        reason = "a heuristic of message selection"
    )]
    let share = u64::from_be_bytes(*head) as f64 / 2f64.powi(64);
    1.0 - share
}

async fn sleep_until(at: SystemTime) {
    if let Ok(left) = at.duration_since(SystemTime::now()) {
        tokio::time::sleep(left).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_is_a_share() {
        let mut all: Vec<f64> = (0u8..100)
            .map(|i| quality(&Ticket { vrf_proof: vec![i] }))
            .collect();
        assert!(all.iter().all(|q| (0.0..=1.0).contains(q)));
        all.sort_by(f64::total_cmp);
        assert!(all[0] < 0.1 && all[99] > 0.9, "tickets are spread evenly");
    }
}
