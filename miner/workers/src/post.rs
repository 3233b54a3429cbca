//! Proofs of spacetime, in two steps: sectors are opened beside the disks, and the proof of that is
//! made anywhere.

use std::time::Duration;

use lotus_proofs::{ProofError, Prover, Vanilla, Verifier, WindowPost};
use lotus_types::{ActorId, Commitment, SectorNumber, SectorSize};
use serde::{Deserialize, Serialize};

use crate::execute::post_sectors;
use crate::pool::Answer;
use crate::task::hex32;
use crate::{Output, Pool, PostFile, Task, WorkError};

/// What a proof of spacetime is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PostKind {
    /// The partitions of one message of a deadline.
    Window,
    /// A block.
    Winning,
}

/// A proof of spacetime to make: see [`Pool::prove`](crate::Pool::prove).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Post {
    /// What for.
    pub kind: PostKind,
    /// The miner.
    pub miner: ActorId,
    /// Size of its sectors.
    pub size: SectorSize,
    /// The challenge of the deadline or of the block.
    #[serde(with = "hex32")]
    pub randomness: [u8; 32],
    /// The sectors: of a deadline with bad ones already replaced, of a block those that are
    /// challenged, in the order of the challenge.
    pub sectors: Vec<PostFile>,
}

/// What a proof of spacetime says, files aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostClaim {
    /// What it is for.
    pub kind: PostKind,
    /// The miner.
    pub miner: ActorId,
    /// Size of its sectors.
    pub size: SectorSize,
    /// The challenge.
    #[serde(with = "hex32")]
    pub randomness: [u8; 32],
    /// The sectors, in the order of the proof.
    pub sectors: Vec<(SectorNumber, Commitment)>,
}

impl From<&Post> for PostClaim {
    fn from(post: &Post) -> Self {
        Self {
            kind: post.kind,
            miner: post.miner,
            size: post.size,
            randomness: post.randomness,
            sectors: post.sectors.iter().map(|s| (s.number, s.comm_r)).collect(),
        }
    }
}

impl Post {
    /// Openings are the vanilla proof of the same, whatever the mode.
    pub(crate) fn open(&self) -> Result<Output, ProofError> {
        let sectors = post_sectors(&self.sectors);
        let (miner, size, randomness) = (self.miner, self.size, &self.randomness);
        match self.kind {
            PostKind::Window => Ok(
                match Vanilla.window_post(miner, size, randomness, &sectors)? {
                    WindowPost::Proved(openings) => Output::Proof(openings),
                    WindowPost::Faulty(sectors) => Output::Faulty(sectors),
                },
            ),
            PostKind::Winning => Vanilla
                .winning_post(miner, size, randomness, &sectors)
                .map(Output::Proof),
        }
    }
}

impl PostClaim {
    /// The proof of what was opened.
    pub(crate) fn prove(
        &self,
        prover: &impl Prover,
        openings: &[u8],
    ) -> Result<Output, ProofError> {
        let (miner, size, randomness) = (self.miner, self.size, &self.randomness);
        let made = match self.kind {
            PostKind::Window => {
                prover.window_post_of(miner, size, randomness, &self.sectors, openings)
            }
            PostKind::Winning => {
                prover.winning_post_of(miner, size, randomness, &self.sectors, openings)
            }
        };
        made.map(Output::Proof)
    }

    /// Whether a proof of this is right.
    pub(crate) fn verify(
        &self,
        verifier: &impl Verifier,
        proof: &[u8],
    ) -> Result<Output, ProofError> {
        let (miner, size, randomness) = (self.miner, self.size, &self.randomness);
        match self.kind {
            PostKind::Window => {
                verifier.verify_window_post(miner, size, randomness, &self.sectors, proof)
            }
            PostKind::Winning => {
                verifier.verify_winning_post(miner, size, randomness, &self.sectors, proof)
            }
        }?;
        Ok(Output::Done)
    }
}

impl Pool {
    /// Makes a proof of spacetime in two steps of at most `limit` each: a worker beside the sectors
    /// opens them, and any worker makes the proof of that. [`Output::Proof`] or, of a deadline,
    /// [`Output::Faulty`].
    ///
    /// A worker on another host has half of the limit and one try. What it makes is verified on
    /// this host; if it makes nothing, or nothing good, a worker of this host makes the proof.
    pub async fn prove(&self, post: Post, limit: Duration) -> Result<Output, WorkError> {
        let claim = PostClaim::from(&post);
        let openings = match self.run_within(Task::OpenPost(post), limit).await? {
            Output::Proof(openings) => openings.into(),
            other => return Ok(other),
        };
        let task = Task::ProvePost { claim, openings };
        let (job, answer) = self.job(task.clone(), Some(limit), None);
        let Answer { result, by } = self.submit(job, answer).await;
        let Some(worker) = by else {
            return result;
        };
        let step = task.name();
        let why = match self.verified(&task, result, limit).await {
            Ok(proof) => {
                tracing::info!(step, worker, "a proof came from another host");
                count_elsewhere(step, "taken");
                return Ok(proof);
            }
            Err(e @ WorkError::Stopping { .. }) => return Err(e),
            Err(why) => why,
        };
        tracing::warn!(step, worker, error = %why, "no proof from another host: making it on this one");
        count_elsewhere(step, "not_taken");
        let (mut job, answer) = self.job(task, Some(limit), None);
        job.needs = job.needs.kept_here();
        self.submit(job, answer).await.result
    }

    /// What another host made of a [`Task::ProvePost`], if a worker of this host finds it right.
    async fn verified(
        &self,
        task: &Task,
        made: Result<Output, WorkError>,
        limit: Duration,
    ) -> Result<Output, WorkError> {
        let (Task::ProvePost { claim, .. }, Output::Proof(proof)) = (task, made?) else {
            return Err(WorkError::BadAnswer {
                step: task.name(),
                why: "it is no proof".into(),
            });
        };
        let verify = Task::VerifyPost {
            claim: claim.clone(),
            proof: proof.clone(),
        };
        self.run_within(verify, limit).await?;
        Ok(Output::Proof(proof))
    }
}

/// Counts proofs that a worker on another host had in its hands.
fn count_elsewhere(step: &'static str, outcome: &'static str) {
    metrics::counter!("lotus_miner_proofs_elsewhere_total", "step" => step, "outcome" => outcome)
        .increment(1);
}

#[cfg(test)]
mod tests {
    use lotus_types::SectorId;

    use super::*;
    use crate::pool::Job;

    #[test]
    fn its_tasks_cross_a_process_boundary() {
        let post = Post {
            kind: PostKind::Window,
            miner: ActorId(1000),
            size: SectorSize::S2KiB,
            randomness: [5; 32],
            sectors: vec![PostFile {
                number: SectorNumber(4),
                comm_r: Commitment([1; 32]),
                sealed: "/s".into(),
                cache: "/c".into(),
            }],
        };
        let claim = PostClaim::from(&post);
        for task in [
            Task::OpenPost(post),
            Task::ProvePost {
                claim: claim.clone(),
                openings: vec![7; 100].into(),
            },
            Task::VerifyPost {
                claim,
                proof: vec![8; 100],
            },
        ] {
            let text = serde_json::to_string(&task).unwrap();
            assert_eq!(serde_json::from_str::<Task>(&text).unwrap(), task);
        }
    }

    #[test]
    fn a_worker_elsewhere_has_half_the_time_and_one_try() {
        let secs = Duration::from_secs;
        let post = Post {
            kind: PostKind::Winning,
            miner: ActorId(1000),
            size: SectorSize::S2KiB,
            randomness: [5; 32],
            sectors: Vec::new(),
        };
        let prove = Task::ProvePost {
            claim: PostClaim::from(&post),
            openings: Vec::new().into(),
        };
        let seal = Task::Finalize {
            sector: SectorId {
                miner: ActorId(1000),
                number: SectorNumber(1),
            },
            size: SectorSize::S2KiB,
            cache: "c".into(),
        };
        for (task, by, limit, time, again) in [
            (&prove, None, Some(20), 20, true),
            (&prove, Some("w"), Some(20), 10, false),
            (&prove, Some("w"), None, 30, false),
            (&prove, None, Some(90), 60, true),
            (&seal, Some("w"), None, 60, true),
        ] {
            let (mut job, _answer) = Job::new("1".into(), task.clone(), limit.map(secs), None);
            job.by = by.map(str::to_owned);
            job.deaths = 1;
            let got = (job.time(secs(60)), job.may_be_repeated(3));
            assert_eq!(got, (secs(time), again), "{} {by:?}", job.step);
            job.deaths = 3;
            assert!(!job.may_be_repeated(3));
        }
    }
}
