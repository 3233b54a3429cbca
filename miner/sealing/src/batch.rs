//! Which sectors share a message, and when it goes out. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use lotus_proofs::{AGGREGATE_SEALS, ProofMode, aggregate_bytes};
use lotus_types::{Epoch, EpochDelta, SectorNumber, SectorSize};
use serde::{Deserialize, Serialize};

use crate::SealingConfig;
use crate::machine::{Group, Sector, SectorState};

/// Epochs in which a pre-commit must be proven. Source: builtin-actors,
/// `max_prove_commit_duration`, 30 days; the seed delay on top of it is left as a reserve.
const PROVE_COMMIT_EPOCHS: EpochDelta = EpochDelta(30 * 2_880);

/// Bytes of a sector in a prove-commit message besides its proof and its pieces.
const SECTOR_BYTES: usize = 64;
/// The same, where proofs are aggregated: two array headers and a number in CBOR.
const MANIFEST_BYTES: usize = 16;
/// Bytes of a piece in it.
const PIECE_BYTES: usize = 128;

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

    /// The states from which a sector whose batch was refused comes back to wait for another.
    const fn on_the_way(self) -> &'static [SectorState] {
        match self {
            Self::PreCommit => &[SectorState::PreCommitFailed],
            Self::Commit => &[SectorState::CommitFailed, SectorState::WaitSeed],
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
    /// It shares its message with these alone: those of a part of a refused batch.
    pub group: Option<Group>,
    /// Others of its group are on their way here.
    pub awaited: bool,
    /// Its proof goes as it is: no aggregate of it was to be had.
    pub plain: bool,
}

/// The sectors that wait and are in no batch.
pub(crate) fn waiting(
    cfg: &SealingConfig,
    kind: BatchKind,
    sectors: &BTreeMap<SectorNumber, Sector>,
) -> Vec<Waiting> {
    let coming = |s: &&Sector| kind.on_the_way().contains(&s.state);
    let awaited: BTreeSet<Group> = sectors
        .values()
        .filter(coming)
        .filter_map(|s| s.seat.group)
        .collect();
    let seats = sectors
        .iter()
        .filter(|(_, s)| s.state == kind.state() && s.seat.batch.is_none());
    seats
        .map(|(number, s)| Waiting {
            sector: *number,
            since_unix_ms: s.seat.since_unix_ms,
            cutoff: cutoff(cfg, kind, s),
            alone: s.seat.alone,
            group: s.seat.group,
            awaited: s.seat.group.is_some_and(|g| awaited.contains(&g)),
            plain: s.seat.plain,
        })
        .collect()
}

/// Last epoch at which a sector's message is of use.
pub(crate) fn cutoff(cfg: &SealingConfig, kind: BatchKind, s: &Sector) -> Option<Epoch> {
    let expires = match kind {
        BatchKind::PreCommit => s
            .ticket
            .map(|t| t.epoch + EpochDelta(cfg.ticket_max_age_epochs)),
        BatchKind::Commit => s.pre_commit_epoch.map(|e| e + PROVE_COMMIT_EPOCHS),
    };
    let starts = s.pieces.iter().map(|p| p.terms.start_epoch);
    starts.filter(|e| e.0 > 0).chain(expires).min()
}

/// How many sectors share an aggregate; `None`: none do.
pub(crate) fn aggregates(cfg: &SealingConfig, mode: ProofMode) -> Option<RangeInclusive<usize>> {
    let (least, most) = (*AGGREGATE_SEALS.start(), *AGGREGATE_SEALS.end());
    let from = least.max(cfg.commit_batch_min as usize);
    (cfg.aggregate_commits && mode.seal_snarks()).then_some(from..=most)
}

/// What a commit message may hold.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    pub(crate) bytes: u64,
    pub(crate) size: SectorSize,
    pub(crate) aggregates: Option<RangeInclusive<usize>>,
}

/// A sector's part of a commit message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) sector: SectorNumber,
    /// Bytes of its proof.
    pub(crate) proof: usize,
    pub(crate) pieces: usize,
    /// Its proof goes as it is.
    pub(crate) plain: bool,
}

/// Sectors of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Composed {
    pub(crate) members: Vec<SectorNumber>,
    pub(crate) aggregate: bool,
}

/// As many of these as one message holds, but at least the first, which is the most urgent: as an
/// aggregate, where it may and there are enough of them. One whose proof goes as it is takes none
/// of the others out of their aggregate.
pub(crate) fn compose(room: &Room, waiting: &[Share]) -> Composed {
    let plain = waiting.first().is_some_and(|s| s.plain);
    let alike: Vec<_> = waiting.iter().filter(|s| s.plain == plain).collect();
    let fitting = |own: &dyn Fn(&Share) -> usize, shared: &dyn Fn(usize) -> usize| {
        let (mut bytes, mut count) = (0, 0);
        for s in &alike {
            bytes += own(s) + s.pieces * PIECE_BYTES;
            if (bytes + shared(count + 1)) as u64 > room.bytes {
                break;
            }
            count += 1;
        }
        count
    };
    let together = fitting(&|_| MANIFEST_BYTES, &|n| aggregate_bytes(room.size, n));
    let apart = fitting(&|s| s.proof + SECTOR_BYTES, &|_| 0).max(1);
    let range = room.aggregates.as_ref().filter(|_| !plain);
    let (count, aggregate) = match range {
        Some(range) if together >= *range.start() => (together.min(*range.end()), true),
        _ => (apart, false),
    };
    Composed {
        members: alike.iter().take(count).map(|s| s.sector).collect(),
        aggregate,
    }
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
/// its sectors must soon be on chain, when the operator says so, or when messages are cheap. The
/// parts of a refused batch go as soon as they are complete, each for itself.
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
    let pressing = |w: &Waiting| {
        published.contains(&w.sector) || w.cutoff.is_some_and(|c| c - rules.slack <= head)
    };
    let first_of = |mut order: Vec<&Waiting>| {
        order.sort_by_key(|w| (w.cutoff.is_none(), w.cutoff, w.sector));
        let first = order.into_iter().take(rules.max).map(|w| w.sector);
        Flush::Now(first.collect())
    };
    let complete = |w: &&Waiting| w.group.is_some() && (!w.awaited || pressing(w));
    if let Some(w) = waiting.iter().find(complete) {
        return first_of(waiting.iter().filter(|o| o.group == w.group).collect());
    }
    let free: Vec<_> = waiting.iter().filter(|w| w.group.is_none()).collect();
    let ripe =
        |w: &&Waiting| pressing(w) || w.since_unix_ms.saturating_add(rules.wait_ms) <= now_unix_ms;
    if free.len() >= rules.max || (cheap && !free.is_empty()) || free.iter().any(ripe) {
        return first_of(free);
    }
    let oldest = free.iter().map(|w| w.since_unix_ms).min();
    Flush::At(oldest.unwrap_or(now_unix_ms).saturating_add(rules.wait_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Half;
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
            group: None,
            awaited: false,
            plain: false,
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

    #[test]
    fn the_parts_of_a_refused_batch_go_apart_and_complete() {
        let none = BTreeSet::new();
        let at = |ws: &[Waiting], head| flush(RULES, ws, Epoch(head), true, &none, 5_000);
        let part = |n, cutoff, half, awaited| Waiting {
            group: Some(Group { batch: 7, half }),
            awaited,
            ..w(n, 0, cutoff)
        };
        let (first, second) = (Half::First, Half::Second);
        let halves = [
            part(1, 900, first, false),
            part(2, 800, first, false),
            part(3, 700, second, true),
            w(4, 0, 0),
        ];
        assert_eq!(at(&halves, 0), numbers(&[2, 1]), "complete");
        // The second half is awaited; others do not wait for it, and it takes none of them.
        assert_eq!(at(&halves[2..], 0), numbers(&[4]));
        assert_eq!(at(&halves[2..3], 0), Flush::At(6_000));
        assert_eq!(at(&halves[2..], 690), numbers(&[3]), "no time to wait");
    }

    /// The sectors of groups, by bisecting a batch in which some are bad: messages until each
    /// bad one is alone, and how many good ones were sent alone.
    fn bisect(count: u32, bad: &BTreeSet<u32>) -> (usize, usize) {
        let mut open = vec![(0..count).collect::<Vec<u32>>()];
        let (mut messages, mut good_alone) = (0, 0);
        while let Some(batch) = open.pop() {
            messages += 1;
            if !batch.iter().any(|n| bad.contains(n)) {
                good_alone += usize::from(batch.len() == 1);
                continue;
            }
            let of = u32::try_from(batch.len()).unwrap();
            let mut parts: BTreeMap<Group, Vec<u32>> = BTreeMap::new();
            for (place, n) in (0u32..).zip(&batch) {
                let (group, size) = Group::of(0, place, of, false);
                assert!(of < 2 || size < of, "each part is smaller");
                if of > 1 {
                    parts.entry(group).or_default().push(*n);
                }
            }
            open.extend(parts.into_values());
        }
        (messages, good_alone)
    }

    #[test]
    fn a_bad_sector_is_found_in_few_messages() {
        for place in [0, 1, 127, 128, 255] {
            let (messages, good_alone) = bisect(256, &BTreeSet::from([place]));
            assert_eq!((messages, good_alone), (1 + 2 * 8, 1), "{place}");
        }
        assert_eq!(bisect(256, &BTreeSet::new()), (1, 0));
        assert_eq!(Group::of(3, 1, 4, true).1, 4, "money: all of them");
    }

    fn share(n: u64, proof: usize, pieces: usize, plain: bool) -> Share {
        Share {
            sector: SectorNumber(n),
            proof,
            pieces,
            plain,
        }
    }

    fn room(aggregates: Option<RangeInclusive<usize>>) -> Room {
        Room {
            bytes: 60 << 10,
            size: SectorSize::S32GiB,
            aggregates,
        }
    }

    #[test]
    fn enough_sectors_share_an_aggregate() {
        let many = |n: u64| {
            (0..n)
                .map(|n| share(n, 1_920, 0, false))
                .collect::<Vec<_>>()
        };
        let composed = |n, aggregates| {
            let c = compose(&room(aggregates), &many(n));
            (c.members.len(), c.aggregate)
        };
        let on = || Some(4..=819);
        assert_eq!(composed(3, on()), (3, false));
        assert_eq!(composed(4, on()), (4, true));
        assert_eq!(composed(819, on()), (819, true), "one message holds them");
        assert_eq!(composed(2_000, on()), (819, true));
        assert_eq!(composed(819, None), (30, false));
        assert_eq!(composed(12, Some(13..=819)), (12, false));
        // Pieces count.
        let full = vec![share(1, 1_920, 100, false); 9];
        let c = compose(&room(on()), &full);
        assert!(!c.aggregate && c.members.len() == 4);
        // What is larger than a message goes alone: the chain has the last word.
        let large = compose(&room(on()), &[share(1, 1 << 20, 0, false); 2]);
        assert_eq!((large.members.len(), large.aggregate), (1, false));
    }

    #[test]
    fn a_proof_that_goes_as_it_is_breaks_up_no_aggregate() {
        let mut waiting: Vec<_> = (0..8).map(|n| share(n, 1_920, 0, n % 2 == 0)).collect();
        let numbers = |ns: [u64; 4]| ns.map(SectorNumber).to_vec();
        let plain = compose(&room(Some(4..=819)), &waiting);
        assert_eq!(
            (plain.members, plain.aggregate),
            (numbers([0, 2, 4, 6]), false)
        );
        waiting.remove(0);
        let rest = compose(&room(Some(4..=819)), &waiting);
        assert_eq!(
            (rest.members, rest.aggregate),
            (numbers([1, 3, 5, 7]), true)
        );
    }

    #[test]
    fn only_snarks_are_aggregated() {
        let cfg = |aggregate_commits, commit_batch_min| SealingConfig {
            aggregate_commits,
            commit_batch_min,
            ..SealingConfig::default()
        };
        let on = cfg(true, 4);
        assert_eq!(aggregates(&on, ProofMode::Groth16), Some(4..=819));
        assert_eq!(aggregates(&on, ProofMode::Groth16Post), None);
        assert_eq!(aggregates(&on, ProofMode::Vanilla), None);
        assert_eq!(aggregates(&cfg(false, 4), ProofMode::Groth16), None);
        assert_eq!(aggregates(&cfg(true, 0), ProofMode::Groth16), Some(4..=819));
        assert_eq!(
            aggregates(&cfg(true, 13), ProofMode::Groth16),
            Some(13..=819)
        );
    }

    proptest! {
        /// Every sector gets into one message, in a message that the chain takes.
        #[test]
        fn messages_hold_what_they_may(
            sectors in proptest::collection::vec((0usize..3_000, 0usize..20, any::<bool>()), 1..900),
            bytes in 0u64..100_000,
            on in any::<bool>(),
        ) {
            let room = Room { bytes, ..room(on.then_some(4..=819)) };
            let mut waiting: Vec<_> = (0u64..).zip(&sectors)
                .map(|(n, (proof, pieces, plain))| share(n, *proof, *pieces, *plain)).collect();
            let mut gone = BTreeSet::new();
            while let Some(head) = waiting.first().copied() {
                let c = compose(&room, &waiting);
                prop_assert_eq!(c.members.first(), Some(&head.sector), "the most urgent goes");
                let is_in = |s: &&Share| c.members.contains(&s.sector);
                let members: Vec<_> = waiting.iter().filter(is_in).copied().collect();
                prop_assert_eq!(members.len(), c.members.len());
                prop_assert!(members.iter().all(|s| s.plain == head.plain));
                let proofs: usize = if c.aggregate {
                    prop_assert!(on && !head.plain && AGGREGATE_SEALS.contains(&members.len()));
                    aggregate_bytes(room.size, members.len())
                } else {
                    members.iter().map(|s| s.proof).sum()
                };
                let pieces: usize = members.iter().map(|s| s.pieces * PIECE_BYTES).sum();
                prop_assert!(members.len() == 1 || (proofs + pieces) as u64 <= bytes);
                for n in &c.members {
                    prop_assert!(gone.insert(*n));
                }
                waiting.retain(|s| !c.members.contains(&s.sector));
            }
            prop_assert_eq!(gone.len(), sectors.len());
        }

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
