//! What of sealing a restart would cost, and whether that is worth waiting for.

use lotus_workers::{Class, JobInfo};
use serde::{Deserialize, Serialize};

/// `[restart]`: when sealing holds a restart back that the supervisor asks for. Proofs and won
/// elections always do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RestartConfig {
    /// Minutes of one task's work that a restart may cost. A task that has run for longer holds it
    /// back; one that waits for a worker never does.
    pub seal_loss_mins: u64,
    /// Minutes after which sealing alone no longer holds back a restart that is waited for.
    pub seal_hold_mins: u64,
}

impl Default for RestartConfig {
    fn default() -> Self {
        Self {
            seal_loss_mins: 30,
            // A PreCommit1 of 32 GiB that has just become dear ends within this.
            seal_hold_mins: 240,
        }
    }
}

const MINUTE_MS: u64 = 60_000;
/// A question that comes so long after the last one is about another restart.
const FORGOTTEN_MS: u64 = 10 * MINUTE_MS;
/// Progress below which it tells nothing about the end.
const TELLING: f64 = 0.05;

/// A task that a restart would undo.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Held {
    /// For operators.
    pub(crate) what: String,
    /// When it ends, Unix milliseconds, as far as its progress tells.
    pub(crate) until_unix_ms: Option<u64>,
}

/// The tasks whose loss is dear. After the limit there are none.
pub(crate) fn held(jobs: &[JobInfo], waited_ms: u64, now: u64, cfg: &RestartConfig) -> Vec<Held> {
    if waited_ms >= cfg.seal_hold_mins.saturating_mul(MINUTE_MS) {
        return Vec::new();
    }
    let dear = cfg.seal_loss_mins.saturating_mul(MINUTE_MS);
    let running = jobs
        .iter()
        .filter(|j| j.class == Class::Seal && j.worker.is_some());
    running
        .filter_map(|j| {
            let ran = now.saturating_sub(j.since_unix_ms);
            (ran >= dear).then(|| hold(j, ran))
        })
        .collect()
}

fn hold(job: &JobInfo, ran_ms: u64) -> Held {
    let about = job
        .sector
        .map_or_else(String::new, |s| format!("sector {}: ", s.number));
    let at = job
        .progress
        .map_or_else(String::new, |p| format!(" at {:.0} %", p * 100.0));
    Held {
        what: format!(
            "{about}{}{at}, has run for {} minutes",
            job.step,
            ran_ms / MINUTE_MS
        ),
        until_unix_ms: job
            .progress
            .and_then(|p| whole(ran_ms, p))
            .map(|whole| job.since_unix_ms.saturating_add(whole)),
    }
}

/// How long a task takes in all that is so far after so long.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an estimate of a positive time, which saturates"
)]
fn whole(ran_ms: u64, progress: f64) -> Option<u64> {
    (progress >= TELLING).then(|| (ran_ms as f64 / progress.min(1.0)) as u64)
}

/// Since when somebody waits to restart the hub.
#[derive(Debug, Default)]
pub(crate) struct Wish(Option<(u64, u64)>);

impl Wish {
    /// Somebody asks at `now`, Unix milliseconds.
    pub(crate) fn ask(&mut self, now: u64) {
        let first = self.first(now).unwrap_or(now);
        self.0 = Some((first, now));
    }

    /// How long it has been waited for, milliseconds.
    pub(crate) fn waited(&self, now: u64) -> u64 {
        self.first(now).map_or(0, |first| now.saturating_sub(first))
    }

    fn first(&self, now: u64) -> Option<u64> {
        let (first, last) = self.0?;
        (now.saturating_sub(last) < FORGOTTEN_MS).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use lotus_types::{ActorId, SectorId, SectorNumber};

    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn job(class: Class, worker: Option<u64>, mins: u64, progress: Option<f64>) -> JobInfo {
        JobInfo {
            id: "7-pre_commit1".into(),
            step: "pre_commit1".into(),
            class,
            sector: Some(SectorId {
                miner: ActorId(1000),
                number: SectorNumber(7),
            }),
            worker,
            since_unix_ms: NOW - mins * MINUTE_MS,
            progress,
            blocked: None,
        }
    }

    #[test]
    fn only_what_is_dear_holds_a_restart_back() {
        let cfg = RestartConfig::default();
        let seal = Class::Seal;
        for (job, waited_mins, holds, ends_in) in [
            // It waits for a worker, however long.
            (job(seal, None, 600, None), 0, false, None),
            // It lost little.
            (job(seal, Some(1), 29, Some(0.9)), 0, false, None),
            (job(seal, Some(1), 30, Some(0.5)), 0, true, Some(30)),
            (job(seal, Some(1), 120, Some(0.75)), 0, true, Some(40)),
            (job(seal, Some(1), 120, Some(0.01)), 0, true, None),
            (job(seal, Some(1), 120, None), 239, true, None),
            // Long enough: a busy sealer always has such a task.
            (job(seal, Some(1), 120, Some(0.75)), 240, false, None),
            // Proofs are told of by those who make them.
            (job(Class::Prove, Some(1), 120, None), 0, false, None),
        ] {
            let told = format!("{job:?}");
            let held = held(&[job], waited_mins * MINUTE_MS, NOW, &cfg);
            assert_eq!(!held.is_empty(), holds, "{told}");
            if let Some(h) = held.first() {
                assert!(h.what.starts_with("sector 7: pre_commit1"), "{h:?}");
                let left = h.until_unix_ms.map(|at| (at - NOW) / MINUTE_MS);
                assert_eq!(left, ends_in, "{told}");
            }
        }
    }

    #[test]
    fn a_wish_lasts_while_it_is_repeated() {
        let mut wish = Wish::default();
        assert_eq!(wish.waited(NOW), 0);
        for minute in 0..30 {
            wish.ask(NOW + minute * MINUTE_MS);
        }
        assert_eq!(wish.waited(NOW + 30 * MINUTE_MS), 30 * MINUTE_MS);
        assert_eq!(
            wish.waited(NOW + 60 * MINUTE_MS),
            0,
            "nobody waits any more"
        );
        wish.ask(NOW + 61 * MINUTE_MS);
        assert_eq!(wish.waited(NOW + 62 * MINUTE_MS), MINUTE_MS);
    }
}
