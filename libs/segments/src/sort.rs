//! Sorting more than fits into memory: runs are sorted, written to an unnamed file, and merged.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::SegmentsError;

/// Longest record that is sorted.
const MAX_WIDTH: usize = 96;
/// Records of this width take no more room than an order of them would, and are moved themselves.
const MOVED: usize = 16;
/// Such records are dealt out by so many of their first bits before they are sorted.
const DEAL: u32 = 11;
/// Memory for the read buffers of a merge, shared among the runs.
const READ: usize = 16 << 20;

/// Sorts records of one width by their bytes.
///
/// Memory: the limit for the records, and at most as much again while a run is sorted.
#[derive(Debug)]
pub struct Sorter {
    dir: PathBuf,
    width: usize,
    /// Bytes of a run.
    limit: usize,
    arena: Vec<u8>,
    spilled: Option<File>,
    /// Bytes of each run in the file, in order.
    runs: Vec<u64>,
}

impl Sorter {
    /// A sorter for records of `width` bytes (8 to 96) that keeps at most `limit` bytes of them in
    /// memory and others in `dir`.
    ///
    /// # Panics
    /// When the width is out of range.
    #[must_use]
    pub fn new(dir: &Path, width: usize, limit: usize) -> Self {
        assert!((8..=MAX_WIDTH).contains(&width), "a width of {width}");
        Self {
            dir: dir.into(),
            width,
            limit: (limit / width).max(1) * width,
            arena: Vec::new(),
            spilled: None,
            runs: Vec::new(),
        }
    }

    /// Adds a record.
    ///
    /// # Panics
    /// When it does not have the width.
    pub fn push(&mut self, record: &[u8]) -> Result<(), SegmentsError> {
        assert_eq!(record.len(), self.width, "the width of a record");
        if self.arena.len() == self.limit {
            self.spill()?;
        }
        self.arena.extend_from_slice(record);
        Ok(())
    }

    /// The records in order.
    pub fn finish(mut self) -> Result<Sorted, SegmentsError> {
        if self.runs.is_empty() {
            return Ok(Sorted {
                width: self.width,
                from: From::Memory {
                    order: self.order(),
                    arena: self.arena,
                    at: 0,
                },
            });
        }
        self.spill()?;
        let file = self.spilled.take().ok_or_else(|| self.lost())?;
        let buffer = (READ / self.runs.len()).max(4096) / self.width * self.width;
        let mut at = 0;
        let mut runs = Vec::with_capacity(self.runs.len());
        let mut heads = BinaryHeap::with_capacity(self.runs.len());
        for (n, len) in self.runs.iter().enumerate() {
            let mut run = Run {
                at,
                end: at + len,
                buffer: Vec::with_capacity(buffer),
                read: 0,
            };
            at = run.end;
            if let Some(head) = run.next(&file, &self.dir, self.width, buffer)? {
                heads.push(Reverse((head, n)));
            }
            runs.push(run);
        }
        Ok(Sorted {
            width: self.width,
            from: From::Disk {
                file,
                dir: self.dir,
                buffer,
                runs,
                heads,
                last: [0; MAX_WIDTH],
            },
        })
    }

    /// The places of the records, in order: sorted by the first eight bytes, which nearly always
    /// decide, without going back to the record. `None` when the records themselves are in order
    /// now.
    fn order(&mut self) -> Option<Vec<(u64, u32)>> {
        let width = self.width;
        if width == MOVED {
            self.arena = dealt(&self.arena);
            return None;
        }
        let records = self.arena.chunks_exact(width).zip(0u32..);
        let mut order: Vec<(u64, u32)> = records.map(|(r, n)| (prefix(r), n)).collect();
        order.sort_unstable();
        let record = |n: u32| &self.arena[n as usize * width..][..width];
        for equal in order.chunk_by_mut(|a, b| a.0 == b.0) {
            if equal.len() > 1 {
                equal.sort_unstable_by(|a, b| record(a.1).cmp(record(b.1)));
            }
        }
        Some(order)
    }

    fn spill(&mut self) -> Result<(), SegmentsError> {
        let order = self.order();
        let failed = SegmentsError::io(&self.dir);
        let written = || {
            let file = match &mut self.spilled {
                Some(file) => file,
                none => none.insert(tempfile::tempfile_in(&self.dir)?),
            };
            let Some(order) = order else {
                return file.write_all(&self.arena);
            };
            let mut out = Vec::with_capacity(1 << 20);
            for (_, n) in order {
                out.extend_from_slice(&self.arena[n as usize * self.width..][..self.width]);
                if out.len() + self.width > out.capacity() {
                    file.write_all(&out)?;
                    out.clear();
                }
            }
            file.write_all(&out)
        };
        written().map_err(failed)?;
        self.runs.push(self.arena.len() as u64);
        self.arena.clear();
        Ok(())
    }

    fn lost(&self) -> SegmentsError {
        SegmentsError::corrupt(&self.dir, "the file of a sort is gone")
    }
}

/// Sorts records that begin with a hash, and so are spread evenly: first into as many groups as
/// their first bits have values, then each group, which is in the processor's cache.
fn dealt(arena: &[u8]) -> Vec<u8> {
    let (records, _) = arena.as_chunks::<MOVED>();
    let group = |r: &[u8; MOVED]| usize::from(u16::from_be_bytes([r[0], r[1]]) >> (16 - DEAL));
    let mut ends = [0usize; 1 << DEAL];
    for record in records {
        ends[group(record)] += 1;
    }
    let mut sum = 0;
    for end in &mut ends {
        (*end, sum) = (sum, sum + *end);
    }
    // Each end is the beginning of its group, until the group is full.
    let mut sorted = vec![0; arena.len()];
    let (places, _) = sorted.as_chunks_mut::<MOVED>();
    for record in records {
        let at = &mut ends[group(record)];
        places[*at] = *record;
        *at += 1;
    }
    let mut from = 0;
    for end in ends {
        places[from..end].sort_unstable_by_key(|r| u128::from_be_bytes(*r));
        from = end;
    }
    sorted
}

fn prefix(record: &[u8]) -> u64 {
    u64::from_be_bytes(record[..8].try_into().expect("eight bytes"))
}

/// Records in order.
#[derive(Debug)]
pub struct Sorted {
    width: usize,
    from: From,
}

#[derive(Debug)]
enum From {
    Memory {
        /// `None` when the records lie in order.
        order: Option<Vec<(u64, u32)>>,
        arena: Vec<u8>,
        /// Records that were lent.
        at: usize,
    },
    Disk {
        file: File,
        dir: PathBuf,
        buffer: usize,
        runs: Vec<Run>,
        heads: BinaryHeap<Reverse<([u8; MAX_WIDTH], usize)>>,
        last: [u8; MAX_WIDTH],
    },
}

/// A run that is read.
#[derive(Debug)]
struct Run {
    at: u64,
    end: u64,
    buffer: Vec<u8>,
    read: usize,
}

impl Run {
    fn next(
        &mut self,
        file: &File,
        dir: &Path,
        width: usize,
        buffer: usize,
    ) -> Result<Option<[u8; MAX_WIDTH]>, SegmentsError> {
        if self.read == self.buffer.len() {
            let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
            self.buffer.resize(left.min(buffer), 0);
            let read = file.read_exact_at(&mut self.buffer, self.at);
            read.map_err(SegmentsError::io(dir))?;
            self.at += self.buffer.len() as u64;
            self.read = 0;
        }
        let Some(record) = self.buffer.get(self.read..self.read + width) else {
            return Ok(None);
        };
        self.read += width;
        let mut head = [0; MAX_WIDTH];
        head[..width].copy_from_slice(record);
        Ok(Some(head))
    }
}

impl Sorted {
    /// Whether there are no records at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match &self.from {
            From::Memory { arena, .. } => arena.is_empty(),
            From::Disk { .. } => false,
        }
    }

    /// The next record.
    #[expect(clippy::should_implement_trait, reason = "it lends what it returns")]
    pub fn next(&mut self) -> Result<Option<&[u8]>, SegmentsError> {
        match &mut self.from {
            From::Memory { order, arena, at } => {
                let n = match order {
                    Some(order) => order.get(*at).map(|(_, n)| *n as usize),
                    None => Some(*at),
                };
                *at += 1;
                Ok(n.and_then(|n| arena.get(n * self.width..(n + 1) * self.width)))
            }
            From::Disk {
                file,
                dir,
                buffer,
                runs,
                heads,
                last,
            } => {
                let Some(Reverse((head, n))) = heads.pop() else {
                    return Ok(None);
                };
                if let Some(next) = runs[n].next(file, dir, self.width, *buffer)? {
                    heads.push(Reverse((next, n)));
                }
                *last = head;
                Ok(Some(&last[..self.width]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_sorts_within_its_limit(
            records in proptest::collection::vec(proptest::array::uniform20(0u8..3), 0..200),
            width in prop_oneof![Just(12usize), Just(MOVED), Just(20)],
            limit in 12usize..4000,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut sorter = Sorter::new(dir.path(), width, limit);
            for r in &records {
                sorter.push(&r[..width]).unwrap();
                prop_assert!(sorter.arena.len() <= limit.max(width));
            }
            let mut sorted = sorter.finish().unwrap();
            let mut got = Vec::new();
            while let Some(r) = sorted.next().unwrap() {
                got.push(r.to_vec());
            }
            let mut want: Vec<_> = records.iter().map(|r| r[..width].to_vec()).collect();
            want.sort_unstable();
            prop_assert_eq!(got, want);
            prop_assert!(sorted.next().unwrap().is_none());
        }
    }
}
