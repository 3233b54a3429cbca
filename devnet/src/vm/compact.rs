//! CompactPartitions: what the chain knows of ended sectors is dropped, and the rest of their
//! partitions moves together.

use fvm_ipld_bitfield::BitField;
use lotus_actors::miner::CompactPartitionsParams;

use super::post::deadline_mut;
use super::{Abort, Call, Outcome, abort, sectors};
use crate::policy::Policy;
use crate::state::Miner;

pub(super) fn method(mut call: Call<'_>) -> Outcome {
    let p: CompactPartitionsParams = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    let now = call.epoch();
    compact(&mut m, call.policy(), &p, now)?;
    call.save(m);
    Ok(Vec::new())
}

/// Source: builtin-actors, actors/miner/src/lib.rs, `compact_partitions`, and
/// deadline_state.rs, `remove_partitions`.
fn compact(
    m: &mut Miner,
    policy: &Policy,
    p: &CompactPartitionsParams,
    now: i64,
) -> Result<(), Abort> {
    if p.deadline >= policy.deadlines {
        abort!(USR_ILLEGAL_ARGUMENT, "invalid deadline {}", p.deadline);
    }
    if !policy.is_mutable(m.period_offset, p.deadline, now)
        || policy.is_disputable(m.period_offset, p.deadline, now)
    {
        abort!(
            USR_FORBIDDEN,
            "cannot compact deadline {} during its challenge window, or the prior challenge \
             window, or before {} epochs have passed since its last challenge window ended",
            p.deadline,
            policy.dispute_window
        );
    }
    let fill = Policy::partition_sectors(m.size);
    let limit = (policy.addressed_sectors_max / fill).min(policy.addressed_partitions_max);
    if p.partitions.len() > limit {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "too many partitions {}, limit {limit}",
            p.partitions.len()
        );
    }
    let d = deadline_mut(m, p.deadline)?;
    let count = u64::try_from(d.partitions.len()).unwrap_or(u64::MAX);
    if let Some(outside) = p.partitions.iter().find(|i| *i >= count) {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "partition index {outside} out of range [0, {count})"
        );
    }
    let (mut live, mut dead) = (BitField::new(), BitField::new());
    let mut kept = Vec::new();
    for (i, part) in (0u64..).zip(&d.partitions) {
        if !p.partitions.get(i) {
            kept.push(part.clone());
        } else if !part.faults.is_empty() {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "cannot remove partition {i}: has faults"
            );
        } else if !part.unproven.is_empty() {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "cannot remove partition {i}: has unproven sectors"
            );
        } else {
            live |= &part.live();
            dead |= &part.terminated;
        }
    }
    d.partitions = kept;
    for n in live.iter() {
        sectors::place(d, fill).sectors.set(n);
    }
    for n in dead.iter() {
        m.sectors.remove(&n);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use lotus_types::SectorSize;

    use super::*;
    use crate::state::{Partition, bits};

    /// Two sectors to a partition; the middle one of six is faulty later.
    fn miner(policy: &Policy) -> Miner {
        let mut m = Miner::new(1000, 1, 1, SectorSize::S2KiB, policy);
        m.period_offset = 0;
        m.deadlines[4].partitions = [[1, 2], [3, 4], [5, 6]]
            .map(|two| Partition {
                sectors: bits(two),
                ..Partition::default()
            })
            .into();
        m.deadlines[4].partitions[0].terminate(&bits([2]));
        m.deadlines[4].partitions[2].terminate(&bits([5]));
        m
    }

    fn order(deadline: u64, partitions: &[u64]) -> CompactPartitionsParams {
        CompactPartitionsParams {
            deadline,
            partitions: bits(partitions.iter().copied()),
        }
    }

    #[test]
    fn the_living_move_together_and_the_dead_are_forgotten() {
        let policy = Policy::fast();
        let mut m = miner(&policy);
        // Deadline 4 of 6: closed at -20, disputable until 55, immutable from 60 on.
        compact(&mut m, &policy, &order(4, &[0, 2]), 57).unwrap();
        let all: Vec<_> = m.deadlines[4]
            .partitions
            .iter()
            .map(|p| (p.sectors.iter().collect::<Vec<_>>(), p.active()))
            .collect();
        assert_eq!(
            all,
            [(vec![3, 4], bits([3, 4])), (vec![1, 6], bits([1, 6]))]
        );
    }

    #[test]
    fn what_must_not_move_stays() {
        let policy = Policy::fast();
        for (now, deadline, partitions, why) in [
            (57, 6, &[0][..], "invalid deadline"),
            (54, 4, &[0], "cannot compact"),
            (60, 4, &[0], "cannot compact"),
            (57, 4, &[0, 3], "out of range"),
            (57, 4, &[1], "has faults"),
        ] {
            let mut m = miner(&policy);
            m.deadlines[4].partitions[1].add_faults(&bits([3]), 1_000);
            let before = m.deadlines[4].partitions.len();
            let refused = compact(&mut m, &policy, &order(deadline, partitions), now).unwrap_err();
            assert!(refused.message.contains(why), "{}", refused.message);
            assert_eq!(m.deadlines[4].partitions.len(), before);
        }
    }
}
