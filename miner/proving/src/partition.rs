//! What must be proven of a partition: pure.

use std::collections::{BTreeMap, BTreeSet};

use lotus_node_client::api::{BitField, Partition};

/// The sectors that a proof of this partition vouches for: live ones without the faulty, and the
/// faulty that are declared as recovered. Source: lotus, storage/wdpost, `runPoStCycle`.
pub(crate) fn wanted(p: &Partition) -> BitField {
    &(&p.live_sectors - &p.faulty_sectors) | &p.recovering_sectors
}

/// Neighbouring partitions that one message proves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    /// Their indices, ascending, at least one.
    pub(crate) partitions: Vec<u64>,
    /// Every sector in them, ended ones too.
    pub(crate) all: BitField,
    /// What the proof vouches for.
    pub(crate) wanted: BitField,
}

impl Batch {
    /// Names the batch within its deadline.
    pub(crate) fn first(&self) -> u64 {
        self.partitions.first().copied().unwrap_or_default()
    }

    /// The numbers to prove, in order: every sector, where each that is not `good` is replaced by
    /// the first good one. `None` when there is no good one. Source: builtin-actors,
    /// `load_for_proof`.
    pub(crate) fn substituted(&self, good: &BitField) -> Option<Vec<u64>> {
        let first = good.first()?;
        Some(
            self.all
                .iter()
                .map(|n| if good.get(n) { n } else { first })
                .collect(),
        )
    }
}

/// Groups the partitions `todo` for messages of up to `per_message`. The groups are fixed by
/// index, so that a restart finds the same ones and with them its proofs and messages; those in
/// `alone` get one of their own.
pub(crate) fn batches(
    partitions: &[Partition],
    todo: &BTreeSet<u64>,
    per_message: u64,
    alone: &BTreeSet<u64>,
) -> Vec<Batch> {
    let mut groups: BTreeMap<(u64, Option<u64>), Batch> = BTreeMap::new();
    for (index, p) in (0u64..).zip(partitions) {
        if todo.contains(&index) {
            let own = alone.contains(&index).then_some(index);
            let batch = groups.entry((index / per_message.max(1), own)).or_default();
            batch.partitions.push(index);
            batch.all |= &p.all_sectors;
            batch.wanted |= &wanted(p);
        }
    }
    groups.into_values().collect()
}

/// Partitions per message: what the settings ask for, within the network's limits on partitions
/// and sectors and within `max_bytes` of proof.
pub(crate) fn per_message(asked: u64, fill: u64, partition_bytes: u64, max_bytes: u64) -> u64 {
    asked
        .min(POSTED_PARTITIONS_MAX)
        .min(ADDRESSED_SECTORS_MAX / fill.max(1))
        .min(max_bytes / partition_bytes.max(1))
        .max(1)
}

/// Source: builtin-actors, runtime/src/runtime/policy.rs, POSTED_PARTITIONS_MAX.
const POSTED_PARTITIONS_MAX: u64 = 3;
/// Source: builtin-actors, runtime/src/runtime/policy.rs, ADDRESSED_SECTORS_MAX.
pub(crate) const ADDRESSED_SECTORS_MAX: u64 = 25_000;

/// What a check of the sectors' files says about a partition, given those that are bad.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// To be declared faulty.
    pub(crate) faults: BitField,
    /// To be declared recovered.
    pub(crate) recoveries: BitField,
}

impl Verdict {
    pub(crate) fn of(p: &Partition, bad: &BitField) -> Self {
        let healthy = &(&p.live_sectors - &p.faulty_sectors) | &p.recovering_sectors;
        Self {
            faults: &healthy & bad,
            recoveries: &(&(&p.faulty_sectors & &p.live_sectors) - &p.recovering_sectors) - bad,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(ns: &[u64]) -> BitField {
        BitField::try_from_bits(ns.iter().copied()).unwrap()
    }

    fn list(b: &BitField) -> Vec<u64> {
        b.iter().collect()
    }

    /// 1 terminated, 2 active, 3 faulty, 4 recovering, 5 unproven.
    fn partition() -> Partition {
        Partition {
            all_sectors: bits(&[1, 2, 3, 4, 5]),
            live_sectors: bits(&[2, 3, 4, 5]),
            faulty_sectors: bits(&[3, 4]),
            recovering_sectors: bits(&[4]),
            active_sectors: bits(&[2]),
        }
    }

    #[test]
    fn a_proof_vouches_for_live_and_recovering_sectors() {
        let p = partition();
        let want = wanted(&p);
        assert_eq!(list(&want), [2, 4, 5]);
        let batch = &batches(&[p], &BTreeSet::from([0]), 3, &BTreeSet::new())[0];
        assert_eq!(batch.wanted, want);
        assert_eq!(batch.substituted(&want), Some(vec![2, 2, 2, 4, 5]));
        assert_eq!(
            batch.substituted(&(&want - &bits(&[2]))),
            Some(vec![4, 4, 4, 4, 5])
        );
        assert_eq!(batch.substituted(&bits(&[])), None);
    }

    #[test]
    fn groups_stay_the_same_whatever_is_left_to_do() {
        let partitions: Vec<Partition> = (0..7)
            .map(|i| Partition {
                all_sectors: bits(&[10 * i, 10 * i + 1]),
                live_sectors: bits(&[10 * i]),
                ..Partition::default()
            })
            .collect();
        let grouped = |todo: &[u64], per_message, alone: &[u64]| -> Vec<Vec<u64>> {
            let (todo, alone) = (todo.iter().copied(), alone.iter().copied());
            let (todo, alone) = (todo.collect(), alone.collect());
            let all = batches(&partitions, &todo, per_message, &alone);
            all.into_iter().map(|b| b.partitions).collect()
        };
        let all = [0, 1, 2, 3, 4, 5, 6];
        assert_eq!(
            grouped(&all, 3, &[]),
            [vec![0, 1, 2], vec![3, 4, 5], vec![6]]
        );
        assert_eq!(
            grouped(&[1, 2, 5, 6], 3, &[]),
            [vec![1, 2], vec![5], vec![6]]
        );
        assert_eq!(
            grouped(&all[..4], 3, &[1]),
            [vec![0, 2], vec![1], vec![3]],
            "one that failed goes alone"
        );
        assert_eq!(grouped(&[0, 1], 1, &[]), [vec![0], vec![1]]);
        assert!(grouped(&[], 3, &[]).is_empty());
        let two = &batches(&partitions, &BTreeSet::from([3, 4]), 3, &BTreeSet::new())[0];
        assert_eq!(
            (list(&two.all), list(&two.wanted)),
            (vec![30, 31, 40, 41], vec![30, 40])
        );
    }

    #[test]
    fn messages_stay_within_every_limit() {
        for (asked, fill, bytes, max, want) in [
            (3, 2349, 1, 1 << 30, 3),
            (9, 2349, 1, 1 << 30, 3),
            (1, 2349, 1, 1 << 30, 1),
            (0, 2349, 1, 1 << 30, 1),
            (3, 10_000, 1, 1 << 30, 2),
            // The vanilla proof of a 32 GiB partition.
            (3, 2349, 60 << 20, 128 << 20, 2),
            (3, 2349, 200 << 20, 128 << 20, 1),
        ] {
            assert_eq!(
                per_message(asked, fill, bytes, max),
                want,
                "{asked} {fill} {bytes}"
            );
        }
    }

    #[test]
    fn a_check_declares_what_changed() {
        let p = partition();
        for (bad, faults, recoveries) in [
            (vec![], vec![], vec![3]),
            (vec![3], vec![], vec![]),
            (vec![2, 3], vec![2], vec![]),
            (vec![4], vec![4], vec![3]),
            (vec![1], vec![], vec![3]),
        ] {
            let v = Verdict::of(&p, &bits(&bad));
            assert_eq!(
                (list(&v.faults), list(&v.recoveries)),
                (faults, recoveries),
                "{bad:?}"
            );
        }
    }
}
