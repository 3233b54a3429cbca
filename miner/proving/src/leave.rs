//! What stands between this hub and its next block: what an operator allowed, and what the wait
//! before the first block has seen. Journaled.

use std::sync::Arc;

use lotus_journal::{Journal, JournalError, Map};
use lotus_types::{Epoch, EpochDelta};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::MiningConfig;

/// An operator's word that nothing else mines for the miner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowed {
    /// Blocks of the miner up to here may be missing from the mined-block log.
    pub until: Epoch,
    /// Why, in the operator's words.
    pub reason: String,
    /// What the hub had refused, or waited for.
    pub held: String,
    /// When, Unix milliseconds.
    pub at_unix_ms: u64,
}

/// Won rounds in which this hub made no block although it could, to see whether another one does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Given {
    /// Head at the first of them.
    since: Option<Epoch>,
    /// The rounds, ascending.
    rounds: Vec<Epoch>,
}

/// Epochs on top of a round after which a block that another hub made in it would be on chain.
const CONFIRMED: EpochDelta = EpochDelta(5);

impl Given {
    /// Rounds that nobody used, as far as `head` tells. The caller has seen no block of the miner
    /// in them.
    fn unused(&self, head: Epoch) -> usize {
        let old = |r: &&Epoch| **r + CONFIRMED <= head;
        self.rounds.iter().filter(old).count()
    }

    /// How many there must be: what the settings say; one after so long that more would cost too
    /// much.
    fn wanted(&self, cfg: &MiningConfig, head: Epoch) -> usize {
        let long = EpochDelta(cfg.first_block_quiet_epochs);
        let all = usize::try_from(cfg.first_block_quiet_wins).unwrap_or(usize::MAX);
        match self.since {
            Some(since) if since + long <= head => all.min(1),
            _ => all,
        }
    }

    pub(crate) fn is_enough(&self, cfg: &MiningConfig, head: Epoch) -> bool {
        self.unused(head) >= self.wanted(cfg, head)
    }

    /// For operators.
    pub(crate) fn why(&self, cfg: &MiningConfig, head: Epoch) -> String {
        format!(
            "its mined-block log is empty, and the miner has sectors that this hub did not make: \
             another miner may still run. It makes no block in the first rounds that it wins, as \
             the other one would win the same ones: {} of {} went by unused so far",
            self.unused(head),
            self.wanted(cfg, head)
        )
    }

    fn note(&mut self, round: Epoch) {
        self.since.get_or_insert(round);
        if !self.rounds.contains(&round) && self.rounds.len() < GIVEN_MAX {
            self.rounds.push(round);
        }
    }
}

/// Rounds that are kept: more than any setting asks for.
const GIVEN_MAX: usize = 64;
/// Words of operators, oldest first.
const ALLOWED: Map<u64, Allowed> = Map::new("mining.allowed");
/// Of these the newest are kept.
const ALLOWED_MAX: usize = 100;
const GIVEN: Map<u64, Given> = Map::new("mining.given");

/// Whether this hub may make blocks, as far as that is for an operator to say. Clones share it.
#[derive(Clone)]
pub struct Leave {
    journal: Journal,
    /// Why mining is held now, if an operator can end that.
    held: Arc<watch::Sender<Option<String>>>,
}

impl Leave {
    /// What is in this journal.
    #[must_use]
    pub fn new(journal: Journal) -> Self {
        Self {
            journal,
            held: Arc::new(watch::Sender::new(None)),
        }
    }

    /// Why mining is refused or waits, if [`Leave::allow`] ends that.
    #[must_use]
    pub fn held(&self) -> Option<String> {
        self.held.borrow().clone()
    }

    /// Every word of operators, oldest first. The last 100.
    pub fn allowed(&self) -> Result<Vec<Allowed>, JournalError> {
        let all = self.journal.read(|v| v.scan(&ALLOWED, None, usize::MAX))?;
        Ok(all.into_iter().map(|(_, a)| a).collect())
    }

    /// Lets mining go on: blocks of the miner up to `until` may be missing from the log. `None` if
    /// nothing is held that this would end. Blocks for one fsync.
    pub fn allow(
        &self,
        until: Epoch,
        reason: &str,
        at_unix_ms: u64,
    ) -> Result<Option<Allowed>, JournalError> {
        let Some(held) = self.held() else {
            return Ok(None);
        };
        let word = Allowed {
            until,
            reason: reason.to_owned(),
            held,
            at_unix_ms,
        };
        self.journal.write::<_, JournalError>(|tx| {
            let next = tx.last(&ALLOWED)?.map_or(0, |(n, _)| n + 1);
            tx.put(&ALLOWED, &next, &word)?;
            for (old, _) in tx.scan(&ALLOWED, None, 2)? {
                if tx.len(&ALLOWED)? > u64::try_from(ALLOWED_MAX).unwrap_or(u64::MAX) {
                    tx.remove(&ALLOWED, &old)?;
                }
            }
            tx.remove(&GIVEN, &0)?;
            Ok(())
        })?;
        tracing::warn!(%until, reason, held = word.held, "an operator lets mining go on");
        self.held.send_replace(None);
        Ok(Some(word))
    }

    /// Up to which height an operator vouched for.
    pub(crate) fn until(&self) -> Result<Option<Epoch>, JournalError> {
        let last = self.journal.read(|v| v.last(&ALLOWED))?;
        Ok(last.map(|(_, a)| a.until))
    }

    pub(crate) fn given(&self) -> Result<Given, JournalError> {
        let given = self.journal.read(|v| v.get(&GIVEN, &0))?;
        Ok(given.unwrap_or_default())
    }

    /// Notes a won round in which no block is made.
    pub(crate) fn give(&self, round: Epoch) -> Result<(), JournalError> {
        self.journal.write(|tx| {
            let mut given = tx.get(&GIVEN, &0)?.unwrap_or_default();
            given.note(round);
            tx.put(&GIVEN, &0, &given)
        })
    }

    /// Forgets the rounds: nobody watched since.
    pub(crate) fn forget(&self) -> Result<(), JournalError> {
        self.journal.write(|tx| tx.remove(&GIVEN, &0).map(drop))
    }

    /// Says what holds mining, or that nothing does.
    pub(crate) fn hold(&self, why: Option<String>) {
        self.held.send_replace(why);
    }

    /// Waits until nothing holds mining any more.
    pub(crate) async fn go_on(&self) {
        let mut held = self.held.subscribe();
        if held.wait_for(Option::is_none).await.is_err() {
            // The sender lives in self.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leave(dir: &std::path::Path) -> Leave {
        Leave::new(Journal::open(&dir.join("journal")).unwrap())
    }

    #[test]
    fn the_first_block_waits_for_won_rounds_that_nobody_used() {
        let cfg = |wins, epochs| MiningConfig {
            first_block_quiet_wins: wins,
            first_block_quiet_epochs: epochs,
            ..MiningConfig::default()
        };
        let day = 2880;
        for (wins, rounds, head, enough) in [
            (2, &[][..], 1_000, false),
            (2, &[1_000], 1_004, false),
            (2, &[1_000], 1_005, false),
            (2, &[1_000, 1_003], 1_007, false),
            (2, &[1_000, 1_003], 1_008, true),
            // It wins once a month: one round is given up, however long that takes.
            (2, &[1_000], 1_000 + day - 1, false),
            (2, &[1_000], 1_000 + day, true),
            (5, &[1_000 + day - 1], 1_000 + day + 4, false),
            (0, &[], 1_000, true),
        ] {
            let mut given = Given::default();
            for r in rounds {
                given.note(Epoch(*r));
                given.note(Epoch(*r));
            }
            let cfg = cfg(wins, day);
            assert_eq!(
                given.is_enough(&cfg, Epoch(head)),
                enough,
                "{wins} wins, {rounds:?} at {head}"
            );
            assert!(given.why(&cfg, Epoch(head)).contains(" of "));
        }
    }

    #[test]
    fn given_rounds_outlive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        leave(dir.path()).give(Epoch(7)).unwrap();
        let leave = leave(dir.path());
        leave.give(Epoch(9)).unwrap();
        let given = leave.given().unwrap();
        assert_eq!(given.since, Some(Epoch(7)));
        assert_eq!(given.rounds, [Epoch(7), Epoch(9)]);
        leave.forget().unwrap();
        assert_eq!(leave.given().unwrap(), Given::default());
    }

    #[tokio::test]
    async fn an_operator_ends_a_refusal_with_a_reason_that_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        {
            let leave = leave(dir.path());
            // Nothing is held, so there is nothing to allow.
            assert_eq!(leave.allow(Epoch(9), "why not", 1).unwrap(), None);
            assert_eq!(leave.until().unwrap(), None);
            leave.give(Epoch(8)).unwrap();
            leave.hold(Some("refused: a block".into()));
            let waits = leave.clone();
            let mut going = tokio::task::JoinSet::new();
            going.spawn(async move { waits.go_on().await });
            let word = leave.allow(Epoch(9), "the old host is scrapped", 1);
            let word = word.unwrap().unwrap();
            assert_eq!(word.held, "refused: a block");
            going.join_all().await;
            assert_eq!(leave.held(), None);
            assert_eq!(leave.given().unwrap(), Given::default());
            for n in 0..150 {
                leave.hold(Some("again".into()));
                leave.allow(Epoch(10 + n), "still", 2).unwrap();
            }
        }
        let leave = leave(dir.path());
        assert_eq!(leave.until().unwrap(), Some(Epoch(159)));
        let all = leave.allowed().unwrap();
        assert_eq!(all.len(), ALLOWED_MAX);
        assert_eq!(all[99].until, Epoch(159));
    }
}
