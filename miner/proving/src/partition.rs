//! What must be proven of a partition: pure.

use lotus_node_client::api::{BitField, Partition};

/// The sectors that a proof of this partition vouches for: live ones without the faulty, and the
/// faulty that are declared as recovered. Source: lotus, storage/wdpost, `runPoStCycle`.
pub(crate) fn wanted(p: &Partition) -> BitField {
    &(&p.live_sectors - &p.faulty_sectors) | &p.recovering_sectors
}

/// The numbers to prove, in order: every sector of the partition, where each that is not `good`
/// is replaced by the first good one. `None` when there is no good one. Source: builtin-actors,
/// `load_for_proof`.
pub(crate) fn substituted(p: &Partition, good: &BitField) -> Option<Vec<u64>> {
    let first = good.first()?;
    Some(
        p.all_sectors
            .iter()
            .map(|n| if good.get(n) { n } else { first })
            .collect(),
    )
}

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
        assert_eq!(substituted(&p, &want), Some(vec![2, 2, 2, 4, 5]));
        assert_eq!(
            substituted(&p, &(&want - &bits(&[2]))),
            Some(vec![4, 4, 4, 4, 5])
        );
        assert_eq!(substituted(&p, &bits(&[])), None);
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
