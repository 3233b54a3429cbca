//! Which segments are merged, and the merge.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use crate::SegmentsError;
use crate::page::{RECORDS, Raw};
use crate::segment::{Scan, Segment};
use crate::write::Writer;

/// Segments of one tier that are merged into one of the next.
const FANOUT: usize = 8;
/// Segments of up to 2¹⁶ records (1.3 MB) are the lowest tier; each next one has eight times that.
const LOWEST: u32 = 16;
const STEP: u32 = 3;
/// Most segments that one merge takes: its memory is 1 MiB for each.
pub(crate) const MOST: usize = 256;

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

/// Records that an input of a merge has at hand: those of so many pages and less than one more.
/// With eight inputs they fit into a processor's cache.
const AT_HAND: usize = 16 * RECORDS;

/// What a merge of these segments will have: the records of each piece that is not in `gone`.
pub(crate) fn pieces(from: &[&Segment], gone: &BTreeSet<u32>) -> BTreeMap<u32, u64> {
    let mut all = BTreeMap::new();
    for (piece, records) in from.iter().flat_map(|s| &s.pieces) {
        if !gone.contains(piece) {
            *all.entry(*piece).or_default() += records;
        }
    }
    all
}

/// Writes the records of these pieces, and only those, out of the segments into one.
pub(crate) fn merge(
    from: &[&Segment],
    pieces: &BTreeMap<u32, u64>,
    to: &Path,
    key_sum: u64,
) -> Result<(), SegmentsError> {
    let mut out = Writer::create(to, key_sum)?;
    let mut inputs: Vec<_> = from.iter().map(|s| Input::new(s, pieces)).collect();
    let mut batch = Vec::new();
    loop {
        // One of which nothing stays is not read, and may be damaged.
        let mut upto = None;
        for input in &mut inputs {
            if let Some(last) = input.fill()? {
                upto = Some(upto.map_or(last, |u: Raw| u.min(last)));
            }
        }
        let Some(upto) = upto else {
            return out.finish(pieces);
        };
        batch.clear();
        for input in &mut inputs {
            input.take(upto, &mut batch);
        }
        // The stable sort finds the runs of the inputs, and merges those.
        batch.sort();
        for raw in &batch {
            out.push(raw)?;
        }
    }
}

/// A segment that is merged.
struct Input<'a> {
    scan: Scan<'a>,
    /// Pieces of it that stay, when others do not.
    only: Option<BTreeSet<u32>>,
    /// Records that were read, in order.
    at_hand: Vec<Raw>,
    taken: usize,
    ended: bool,
}

impl<'a> Input<'a> {
    fn new(segment: &'a Segment, stay: &BTreeMap<u32, u64>) -> Self {
        let all = segment.pieces.keys().copied();
        let only: BTreeSet<u32> = all.filter(|p| stay.contains_key(p)).collect();
        Self {
            scan: segment.scan(),
            ended: only.is_empty(),
            only: (only.len() < segment.pieces.len()).then_some(only),
            at_hand: Vec::new(),
            taken: 0,
        }
    }

    /// Reads on when nothing is at hand. The last record at hand; none at the end.
    fn fill(&mut self) -> Result<Option<Raw>, SegmentsError> {
        if self.taken == self.at_hand.len() {
            self.at_hand.clear();
            self.taken = 0;
            while !self.ended && self.at_hand.len() < AT_HAND {
                match (self.scan.next()?, &self.only) {
                    (Some((_, page)), None) => self.at_hand.extend(page.iter()),
                    (Some((_, page)), Some(only)) => {
                        let stays = |raw: &Raw| only.contains(&raw.piece);
                        self.at_hand.extend(page.iter().filter(stays));
                    }
                    (None, _) => self.ended = true,
                }
            }
        }
        Ok(self.at_hand.last().copied())
    }

    /// Moves what is at hand, up to and with `upto`, behind what is in `batch`.
    fn take(&mut self, upto: Raw, batch: &mut Vec<Raw>) {
        let left = &self.at_hand[self.taken..];
        let now = left.partition_point(|raw| *raw <= upto);
        batch.extend_from_slice(&left[..now]);
        self.taken += now;
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

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
