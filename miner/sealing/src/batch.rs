//! Which sectors share a message, and when it goes out. Pure.

use std::collections::{BTreeMap, BTreeSet};

use lotus_types::{Epoch, EpochDelta, SectorNumber};
use serde::{Deserialize, Serialize};

use crate::SealingConfig;
use crate::machine::{Sector, SectorState};

/// Epochs in which a pre-commit must be proven. Source: builtin-actors,
/// `max_prove_commit_duration`, 30 days; the seed delay on top of it is left as a reserve.
const PROVE_COMMIT_EPOCHS: EpochDelta = EpochDelta(30 * 2_880);

/// The messages that sectors share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BatchKind {
    /// `PreCommitSectorBatch2`.
    PreCommit,
    /// `ProveCommitSectors3`.
    Commit,
}

impl BatchKind {
    /// The state in which sectors wait for it.
    #[must_use]
    pub const fn state(self) -> SectorState {
        match self {
            Self::PreCommit => SectorState::SubmitPreCommitBatch,
            Self::Commit => SectorState::SubmitCommitAggregate,
        }
    }

    /// The key of a batch's message.
    pub(crate) fn key(self, batch: u64) -> String {
        match self {
            Self::PreCommit => format!("precommit/{batch}"),
            Self::Commit => format!("commit/{batch}"),
        }
    }
}

/// When a batch goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) max: usize,
    pub(crate) wait_ms: u64,
    pub(crate) slack: EpochDelta,
}

impl Rules {
    pub(crate) fn of(cfg: &SealingConfig, kind: BatchKind) -> Self {
        let (max, secs, slack) = match kind {
            BatchKind::PreCommit => (
                cfg.pre_commit_batch_max,
                cfg.pre_commit_batch_wait_secs,
                cfg.pre_commit_batch_slack_epochs,
            ),
            BatchKind::Commit => (
                cfg.commit_batch_max,
                cfg.commit_batch_wait_secs,
                cfg.commit_batch_slack_epochs,
            ),
        };
        Self {
            max: max.max(1) as usize,
            wait_ms: secs.saturating_mul(1_000),
            slack: EpochDelta(slack),
        }
    }
}

/// A sector that waits for its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its number.
    pub sector: SectorNumber,
    /// Since when, Unix milliseconds.
    pub since_unix_ms: u64,
    /// Last epoch at which the message is of use: the ticket or the pre-commit expires, or a
    /// deal begins.
    pub cutoff: Option<Epoch>,
    /// It shares its message with no other.
    pub alone: bool,
}

/// The sectors that wait and are in no batch.
pub(crate) fn waiting(
    cfg: &SealingConfig,
    kind: BatchKind,
    sectors: &BTreeMap<SectorNumber, Sector>,
) -> Vec<Waiting> {
    let seats = sectors
        .iter()
        .filter(|(_, s)| s.state == kind.state() && s.seat.batch.is_none());
    seats
        .map(|(number, s)| {
            let expires = match kind {
                BatchKind::PreCommit => s
                    .ticket
                    .map(|t| t.epoch + EpochDelta(cfg.ticket_max_age_epochs)),
                BatchKind::Commit => s.pre_commit_epoch.map(|e| e + PROVE_COMMIT_EPOCHS),
            };
            let starts = s.pieces.iter().map(|p| p.terms.start_epoch);
            Waiting {
                sector: *number,
                since_unix_ms: s.seat.since_unix_ms,
                cutoff: starts.filter(|e| e.0 > 0).chain(expires).min(),
                alone: s.seat.alone,
            }
        })
        .collect()
}

/// What is to be done with those that wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Flush {
    /// These make a batch, the most urgent first.
    Now(Vec<SectorNumber>),
    /// Nothing before this time, Unix milliseconds, unless something changes.
    At(u64),
}

/// A batch goes out when it is full, when its oldest sector has waited long enough, when one of
/// its sectors must soon be on chain, when the operator says so, or when messages are cheap.
pub(crate) fn flush(
    rules: Rules,
    waiting: &[Waiting],
    head: Epoch,
    cheap: bool,
    published: &BTreeSet<SectorNumber>,
    now_unix_ms: u64,
) -> Flush {
    if let Some(w) = waiting.iter().find(|w| w.alone) {
        return Flush::Now(vec![w.sector]);
    }
    let ripe = |w: &Waiting| {
        published.contains(&w.sector)
            || w.since_unix_ms.saturating_add(rules.wait_ms) <= now_unix_ms
            || w.cutoff.is_some_and(|c| c - rules.slack <= head)
    };
    if waiting.len() >= rules.max || cheap || waiting.iter().any(ripe) {
        let mut order: Vec<_> = waiting.iter().collect();
        order.sort_by_key(|w| (w.cutoff.is_none(), w.cutoff, w.sector));
        let first = order.into_iter().take(rules.max).map(|w| w.sector);
        return Flush::Now(first.collect());
    }
    let oldest = waiting.iter().map(|w| w.since_unix_ms).min();
    Flush::At(oldest.unwrap_or(now_unix_ms).saturating_add(rules.wait_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RULES: Rules = Rules {
        max: 3,
        wait_ms: 1_000,
        slack: EpochDelta(10),
    };

    fn w(n: u64, since: u64, cutoff: i64) -> Waiting {
        Waiting {
            sector: SectorNumber(n),
            since_unix_ms: since,
            cutoff: (cutoff > 0).then_some(Epoch(cutoff)),
            alone: false,
        }
    }

    fn numbers(ns: &[u64]) -> Flush {
        Flush::Now(ns.iter().map(|n| SectorNumber(*n)).collect())
    }

    #[test]
    fn each_reason_sends_a_batch() {
        let none = BTreeSet::new();
        let two = [w(1, 100, 900), w(2, 50, 500)];
        let at =
            |ws: &[Waiting], head, cheap, now| flush(RULES, ws, Epoch(head), cheap, &none, now);
        assert_eq!(at(&two, 0, false, 200), Flush::At(1_050));
        assert_eq!(at(&two, 0, false, 1_050), numbers(&[2, 1]), "age");
        assert_eq!(at(&two, 489, false, 200), Flush::At(1_050));
        assert_eq!(at(&two, 490, false, 200), numbers(&[2, 1]), "cut-off");
        assert_eq!(at(&two, 0, true, 200), numbers(&[2, 1]), "cheap");
        let now = BTreeSet::from([SectorNumber(1)]);
        let asked = flush(RULES, &two, Epoch(0), false, &now, 200);
        assert_eq!(asked, numbers(&[2, 1]), "the operator");
        let four = [w(1, 100, 0), w(2, 100, 700), w(3, 100, 600), w(4, 100, 0)];
        assert_eq!(at(&four, 0, false, 100), numbers(&[3, 2, 1]), "full");
    }

    #[test]
    fn a_refused_sector_goes_alone_and_first() {
        let mut three = [w(1, 0, 0), w(2, 0, 0), w(3, 0, 0)];
        three[1].alone = true;
        let got = flush(RULES, &three, Epoch(0), false, &BTreeSet::new(), 5_000);
        assert_eq!(got, numbers(&[2]));
    }

    proptest! {
        /// No sector waits longer than the rules say, and none is in two batches.
        #[test]
        fn everyone_goes_in_time(sectors in proptest::collection::vec((0u64..5_000, 0i64..400, any::<bool>()), 1..30)) {
            let mut waiting: Vec<_> = (0u64..).zip(&sectors).map(|(n, (since, cutoff, alone))| Waiting {
                alone: *alone, ..w(n, *since, *cutoff)
            }).collect();
            let none = BTreeSet::new();
            let (mut now, mut head, mut gone) = (0u64, 0i64, BTreeSet::new());
            while !waiting.is_empty() {
                match flush(RULES, &waiting, Epoch(head), false, &none, now) {
                    Flush::Now(batch) => {
                        prop_assert!(!batch.is_empty() && batch.len() <= RULES.max);
                        for n in &batch {
                            prop_assert!(gone.insert(*n));
                        }
                        waiting.retain(|w| !batch.contains(&w.sector));
                    }
                    Flush::At(at) => {
                        prop_assert!(at > now);
                        for w in &waiting {
                            prop_assert!(w.since_unix_ms + RULES.wait_ms > now);
                            prop_assert!(w.cutoff.is_none_or(|c| c.0 - RULES.slack.0 > head));
                        }
                        (now, head) = (now + 100, head + 1);
                    }
                }
            }
            prop_assert_eq!(gone.len(), sectors.len());
        }
    }
}
