//! The log of rounds: what became of every round that was won, and which rounds were not
//! attended. The blocks themselves are in the mined-block log.

use lotus_journal::{Journal, JournalError, Map, Tx};
use lotus_types::{Epoch, EpochDelta};
use serde::{Deserialize, Serialize};

/// What became of a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoundOutcome {
    /// Won, and its block is being made. After a crash this is settled at the next start.
    Open,
    /// Its block is published.
    Mined {
        /// The block.
        cid: String,
    },
    /// Its block is signed, and the node's answer to it was lost: it may be out, or not.
    Unsure {
        /// The block.
        cid: String,
        /// What happened.
        why: String,
    },
    /// There is no block.
    NoBlock {
        /// Why.
        why: String,
    },
    /// The hub took no part in these rounds, so nobody knows whether they were won.
    NotAttended {
        /// The last of them.
        through: Epoch,
        /// Why.
        why: String,
    },
}

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundRecord {
    /// The round's epoch; the first of several that were not attended.
    pub height: Epoch,
    /// Wins of its election; `None` if it is not known whether it was won.
    pub wins: Option<i64>,
    /// What became of it.
    pub outcome: RoundOutcome,
    /// Where its time went, in order.
    pub steps: Vec<RoundStep>,
}

/// A part of a round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundStep {
    /// Its name.
    pub step: String,
    /// Milliseconds that it took.
    pub ms: u64,
}

const ROUNDS: Map<Epoch, RoundRecord> = Map::new("mining.rounds");
/// The last round that was seen through.
const ATTENDED: Map<u64, Epoch> = Map::new("mining.attended");
/// Entries that are kept: over a year of a provider that wins twenty blocks a day.
const KEEP: u64 = 10_000;
const PRUNE: usize = 16;

/// The log of rounds.
#[derive(Clone, Debug)]
pub struct Rounds(Journal);

impl Rounds {
    /// The log in this journal.
    #[must_use]
    pub const fn new(journal: Journal) -> Self {
        Self(journal)
    }

    /// The newest `limit` entries, newest first.
    pub fn list(&self, limit: usize) -> Result<Vec<RoundRecord>, JournalError> {
        let mut all = self.all()?;
        all.reverse();
        all.truncate(limit);
        Ok(all)
    }

    fn all(&self) -> Result<Vec<RoundRecord>, JournalError> {
        let all = self.0.read(|v| v.scan(&ROUNDS, None, usize::MAX))?;
        Ok(all.into_iter().map(|(_, r)| r).collect())
    }

    /// The last round that was seen through.
    pub(crate) fn attended(&self) -> Result<Option<Epoch>, JournalError> {
        self.0.read(|v| v.get(&ATTENDED, &0))
    }

    /// The rounds that were won and then interrupted.
    pub(crate) fn open(&self) -> Result<Vec<RoundRecord>, JournalError> {
        let mut all = self.all()?;
        all.retain(|r| r.outcome == RoundOutcome::Open);
        Ok(all)
    }

    /// Notes that a round is won, before anything is made of it.
    pub(crate) fn won(&self, height: Epoch, wins: i64) -> Result<(), JournalError> {
        self.0.write(|tx| {
            // A second try at the same round, after a restart, must not forget the first.
            let open = RoundOutcome::Open;
            if says_more(tx, height, &open)? {
                return Ok(());
            }
            let record = RoundRecord {
                height,
                wins: Some(wins),
                outcome: open,
                steps: Vec::new(),
            };
            tx.put(&ROUNDS, &height, &record)
        })
    }

    /// Notes that a round is over, with a record if there is something to tell; the rounds since
    /// the last one that nothing is known of were `missed` for this reason.
    pub(crate) fn over(
        &self,
        height: Epoch,
        record: Option<RoundRecord>,
        missed: &str,
    ) -> Result<(), JournalError> {
        self.0.write(|tx| {
            if let Some(record) = record
                && !says_more(tx, height, &record.outcome)?
            {
                tx.put(&ROUNDS, &height, &record)?;
            }
            let last = tx.get(&ATTENDED, &0)?;
            if last.is_some_and(|last| last >= height) {
                return Ok(());
            }
            if let Some(last) = last {
                let told = tx.scan(&ROUNDS, Some(&last), usize::MAX)?;
                let told = told.into_iter().map(|(h, _)| h);
                for (from, through) in gaps(last, height, told) {
                    let gap = RoundRecord {
                        height: from,
                        wins: None,
                        outcome: RoundOutcome::NotAttended {
                            through,
                            why: missed.into(),
                        },
                        steps: Vec::new(),
                    };
                    tx.put(&ROUNDS, &from, &gap)?;
                }
            }
            tx.put(&ATTENDED, &0, &height)?;
            if tx.len(&ROUNDS)? > KEEP {
                for (old, _) in tx.scan(&ROUNDS, None, PRUNE)? {
                    tx.remove(&ROUNDS, &old)?;
                }
            }
            Ok(())
        })
    }
}

/// Whether the log has a block of this round which a new outcome does not speak of.
fn says_more(tx: &Tx, height: Epoch, new: &RoundOutcome) -> Result<bool, JournalError> {
    use RoundOutcome as O;
    Ok(match (tx.get(&ROUNDS, &height)?.map(|r| r.outcome), new) {
        (Some(O::Mined { .. }), _) => true,
        (Some(O::Unsure { .. }), O::Mined { .. } | O::Unsure { .. }) => false,
        (Some(O::Unsure { .. }), _) => true,
        _ => false,
    })
}

/// The rounds between two that were attended, without those that have entries: first and last of
/// each run.
fn gaps(
    after: Epoch,
    before: Epoch,
    told: impl Iterator<Item = Epoch>,
) -> impl Iterator<Item = (Epoch, Epoch)> {
    let one = EpochDelta(1);
    let ends = told.filter(move |h| *h < before).chain([before]);
    let mut from = after + one;
    ends.filter_map(move |end| {
        let gap = (from, end - one);
        from = end + one;
        (gap.0 <= gap.1).then_some(gap)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(dir: &std::path::Path) -> Rounds {
        Rounds::new(Journal::open(&dir.join("journal")).unwrap())
    }

    fn no_block(height: i64, why: &str) -> Option<RoundRecord> {
        Some(RoundRecord {
            height: Epoch(height),
            wins: Some(1),
            outcome: RoundOutcome::NoBlock { why: why.into() },
            steps: vec![RoundStep {
                step: "election".into(),
                ms: 3,
            }],
        })
    }

    fn mined(height: i64) -> Option<RoundRecord> {
        let outcome = RoundOutcome::Mined { cid: "b".into() };
        no_block(height, "").map(|r| RoundRecord { outcome, ..r })
    }

    #[test]
    fn gaps_are_the_rounds_without_entries() {
        let of = |after, before, told: &[i64]| -> Vec<(i64, i64)> {
            let told = told.iter().map(|h| Epoch(*h));
            let all = gaps(Epoch(after), Epoch(before), told);
            all.map(|(a, b)| (a.0, b.0)).collect()
        };
        assert_eq!(of(4, 5, &[]), []);
        assert_eq!(of(4, 6, &[]), [(5, 5)]);
        assert_eq!(of(4, 10, &[7]), [(5, 6), (8, 9)]);
        assert_eq!(of(4, 10, &[5, 9]), [(6, 8)]);
        assert_eq!(of(4, 7, &[5, 6]), []);
        assert_eq!(of(4, 7, &[5, 7, 9]), [(6, 6)]);
    }

    #[test]
    fn every_round_is_told_over_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        {
            let log = log(dir.path());
            log.over(Epoch(10), None, "").unwrap();
            log.won(Epoch(11), 2).unwrap();
        }
        // Killed in round 11; back in round 14.
        let log = log(dir.path());
        let open = log.open().unwrap();
        assert_eq!(
            (open.len(), open[0].height, open[0].wins),
            (1, Epoch(11), Some(2))
        );
        log.over(Epoch(11), no_block(11, "died"), "down").unwrap();
        log.over(Epoch(14), None, "down").unwrap();
        let all = log.list(9).unwrap();
        let heights: Vec<i64> = all.iter().map(|r| r.height.0).collect();
        assert_eq!(heights, [12, 11], "newest first");
        assert!(
            matches!(&all[0].outcome, RoundOutcome::NotAttended { through, .. } if through.0 == 13)
        );
        assert!(log.open().unwrap().is_empty());
        assert_eq!(log.list(1).unwrap().len(), 1);
    }

    #[test]
    fn a_block_is_never_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(dir.path());
        log.won(Epoch(5), 1).unwrap();
        log.over(Epoch(5), mined(5), "").unwrap();
        // The same round again after a restart: the fence refuses.
        log.won(Epoch(5), 1).unwrap();
        log.over(Epoch(5), no_block(5, "in the log already"), "")
            .unwrap();
        assert_eq!(log.list(9).unwrap(), [mined(5).unwrap()]);
        // A block that may be out is not forgotten either, but its fate may become known.
        let unsure = RoundOutcome::Unsure {
            cid: "b".into(),
            why: "lost".into(),
        };
        let unsure = no_block(7, "").map(|r| RoundRecord {
            outcome: unsure,
            ..r
        });
        log.over(Epoch(7), unsure.clone(), "").unwrap();
        log.won(Epoch(7), 1).unwrap();
        log.over(Epoch(7), no_block(7, "in the log already"), "")
            .unwrap();
        assert_eq!(log.list(1).unwrap(), [unsure.unwrap()]);
        log.over(Epoch(7), mined(7), "").unwrap();
        assert_eq!(log.list(1).unwrap(), [mined(7).unwrap()]);
        // But a second try that succeeds counts.
        log.over(Epoch(6), no_block(6, "died"), "").unwrap();
        log.over(Epoch(6), mined(6), "").unwrap();
        assert_eq!(log.list(2).unwrap()[1], mined(6).unwrap());
    }
}
