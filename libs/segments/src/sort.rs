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
/// Memory for the read buffers of a merge, shared among the runs.
const READ: usize = 16 << 20;

/// Sorts records of one width by their bytes.
///
/// Memory: the limit for the records, and as much again for their order while a run is sorted.
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
                    order: self.order().into_iter(),
                    arena: self.arena,
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
    /// decide, without going back to the record.
    fn order(&self) -> Vec<(u64, u32)> {
        let width = self.width;
        let records = self.arena.chunks_exact(width).zip(0u32..);
        let mut order: Vec<(u64, u32)> = records.map(|(r, n)| (prefix(r), n)).collect();
        order.sort_unstable();
        let record = |n: u32| &self.arena[n as usize * width..][..width];
        for equal in order.chunk_by_mut(|a, b| a.0 == b.0) {
            if equal.len() > 1 {
                equal.sort_unstable_by(|a, b| record(a.1).cmp(record(b.1)));
            }
        }
        order
    }

    fn spill(&mut self) -> Result<(), SegmentsError> {
        let failed = SegmentsError::io(&self.dir);
        let order = self.order();
        let written = || {
            let file = match &mut self.spilled {
                Some(file) => file,
                none => none.insert(tempfile::tempfile_in(&self.dir)?),
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
        order: std::vec::IntoIter<(u64, u32)>,
        arena: Vec<u8>,
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
    /// The next record.
    #[expect(clippy::should_implement_trait, reason = "it lends what it returns")]
    pub fn next(&mut self) -> Result<Option<&[u8]>, SegmentsError> {
        match &mut self.from {
            From::Memory { order, arena } => Ok(order
                .next()
                .map(|(_, n)| &arena[n as usize * self.width..][..self.width])),
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
            records in proptest::collection::vec(proptest::array::uniform12(0u8..3), 0..200),
            limit in 12usize..400,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut sorter = Sorter::new(dir.path(), 12, limit);
            for r in &records {
                sorter.push(r).unwrap();
                prop_assert!(sorter.arena.len() <= limit.max(12));
            }
            let mut sorted = sorter.finish().unwrap();
            let mut got = Vec::new();
            while let Some(r) = sorted.next().unwrap() {
                got.push(<[u8; 12]>::try_from(r).unwrap());
            }
            let mut want = records;
            want.sort_unstable();
            prop_assert_eq!(got, want);
        }
    }
}
