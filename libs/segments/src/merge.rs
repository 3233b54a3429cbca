//! Which segments are merged, and the merge.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::path::Path;
use std::time::Duration;

use crate::SegmentsError;
use crate::segment::Segment;
use crate::write::Writer;

/// Segments of one tier that are merged into one of the next.
const FANOUT: usize = 8;
/// Segments of up to 2¹⁶ records (1.3 MB) are the lowest tier; each next one has eight times that.
const LOWEST: u32 = 16;
const STEP: u32 = 3;
/// Most segments that one merge takes: its memory is 1 MiB for each.
const MOST: usize = 256;

fn tier(records: u64) -> u32 {
    match records.max(1).ilog2().checked_sub(LOWEST) {
        Some(above) => above / STEP + 1,
        None => 0,
    }
}

/// The segments to merge now, of those with so many records, and so many of them of pieces that
/// are gone: when a tier is full, it and all below; else one of which more than half is gone.
pub(crate) fn due(sizes: &[(u64, u64)]) -> Vec<usize> {
    let live = |&(all, gone): &(u64, u64)| all.saturating_sub(gone);
    let tiers: Vec<u32> = sizes.iter().map(|s| tier(live(s))).collect();
    let highest = tiers.iter().copied().max().unwrap_or(0);
    let full = (0..=highest).rev().find(|t| {
        let count = tiers.iter().filter(|u| *u == t).count();
        count >= FANOUT
    });
    if let Some(full) = full {
        let mut chosen: Vec<usize> = (0..sizes.len()).filter(|n| tiers[*n] <= full).collect();
        chosen.sort_by_key(|n| sizes[*n]);
        chosen.truncate(MOST);
        return chosen;
    }
    let hollow = |&(all, gone): &(u64, u64)| gone * 2 > all;
    sizes.iter().position(hollow).into_iter().collect()
}

/// A store at rest becomes one segment when what lies beside the largest has an eighth of it, or
/// when the largest is so old. So what is taken in bit by bit is not rewritten for each bit.
const BESIDE: u64 = 8;
const OLD: Duration = Duration::from_secs(24 * 3600);

/// Whether all segments, of those sizes, are to become one while nothing is taken in. The largest
/// has that age.
pub(crate) fn at_rest(sizes: &[(u64, u64)], age: Duration) -> bool {
    let all: u64 = sizes.iter().map(|s| s.0).sum();
    let gone: u64 = sizes.iter().map(|s| s.1).sum();
    let largest = sizes.iter().map(|s| s.0).max().unwrap_or(0);
    let pays = |part: u64, whole: u64| part > 0 && (part * BESIDE >= whole || age >= OLD);
    pays(all - largest, largest) || pays(gone, all)
}

/// Writes the records of the segments into one, without those of the pieces in `gone`. Returns
/// how many there are.
pub(crate) fn merge(
    from: &[&Segment],
    gone: &BTreeSet<u32>,
    to: &Path,
    key_sum: u64,
) -> Result<u64, SegmentsError> {
    let mut out = Writer::create(to, key_sum)?;
    // One of which nothing stays need not be read, and may be damaged.
    let stays = |s: &&&Segment| s.pieces.keys().any(|p| !gone.contains(p));
    let mut scans: Vec<_> = from.iter().filter(stays).map(|s| s.scan()).collect();
    let mut heads = BinaryHeap::with_capacity(scans.len());
    for (n, scan) in scans.iter_mut().enumerate() {
        if let Some(head) = scan.next()? {
            heads.push(Reverse((head, n)));
        }
    }
    while let Some(mut top) = heads.peek_mut() {
        let Reverse((raw, n)) = *top;
        if gone.is_empty() || !gone.contains(&raw.piece) {
            out.push(&raw)?;
        }
        match scans[n].next()? {
            Some(next) => top.0.0 = next,
            None => drop(std::collections::binary_heap::PeekMut::pop(top)),
        }
    }
    out.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_at_rest_becomes_one_segment_when_that_pays() {
        let (young, old) = (OLD - Duration::from_secs(1), OLD);
        for (sizes, when_young, when_old) in [
            (&[][..], false, false),
            (&[(10, 0)], false, false),
            (&[(80, 0), (9, 0)], false, true),
            (&[(80, 0), (10, 0)], true, true),
            (&[(80, 0), (5, 0), (5, 0)], true, true),
            (&[(80, 9)], false, true),
            (&[(80, 10)], true, true),
        ] {
            assert_eq!(at_rest(sizes, young), when_young, "{sizes:?}");
            assert_eq!(at_rest(sizes, old), when_old, "{sizes:?}");
        }
    }

    #[test]
    fn tiers_fill_and_merge() {
        assert_eq!((tier(0), tier(65_535), tier(65_536)), (0, 0, 1));
        assert_eq!((tier(1 << 19), tier(1 << 30)), (2, 5));
        assert_eq!(due(&[]), [0usize; 0]);
        assert_eq!(due(&[(10, 0); 7]), [0usize; 0]);
        assert_eq!(due(&[(10, 0); 8]).len(), 8);
        // A full tier takes what is below it, and leaves what is above.
        let mut sizes = vec![(1 << 24, 0)];
        sizes.extend([(100_000, 0); 8]);
        sizes.extend([(5, 0); 3]);
        let chosen = due(&sizes);
        assert_eq!(chosen.len(), 11);
        assert!(!chosen.contains(&0));
        // Half gone is not enough.
        assert_eq!(due(&[(10, 5), (10, 6)]), [1]);
        // However many come, few stay, and each record is written a few times only.
        let (mut segments, mut written) = (Vec::new(), 0u64);
        for _ in 0..4096 {
            segments.push((50_000u64, 0u64));
            let mut chosen = due(&segments);
            if !chosen.is_empty() {
                let sum = chosen.iter().map(|n| segments[*n].0).sum();
                written += sum;
                chosen.sort_unstable_by_key(|n| Reverse(*n));
                for n in chosen {
                    segments.swap_remove(n);
                }
                segments.push((sum, 0));
            }
            assert!(segments.len() < 40, "{segments:?}");
        }
        assert!(written < 5 * 4096 * 50_000, "{written}");
    }
}
