//! A segment that is read.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_64;

use crate::SegmentsError;
use crate::disk::{self, Aligned, BUFFER};
use crate::filter::{self, FILTER};
use crate::page::{self, PAGE, Raw, le32, le64};
use crate::write::{FOOTER, MAGIC, PIECE};

/// An open segment, with its directory and filters in memory.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) id: u64,
    pub(crate) records: u64,
    pub(crate) path: PathBuf,
    /// Records of each piece.
    pub(crate) pieces: BTreeMap<u32, u64>,
    file: File,
    /// The same, for who reads all of it.
    whole: File,
    directory: Vec<u64>,
    filters: Vec<u8>,
}

impl Segment {
    /// Opens it; everything but the pages is checked.
    pub(crate) fn open(id: u64, path: &Path, key_sum: u64) -> Result<Self, SegmentsError> {
        let bad = |what: &str| SegmentsError::corrupt(path, what);
        let file = File::open(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => bad("the manifest names it, and it is gone"),
            _ => SegmentsError::io(path)(e),
        })?;
        let size = file.metadata().map_err(SegmentsError::io(path))?.len();
        let read = |at: u64, len: u64| {
            // Not more than the file has: the sizes were compared before.
            let mut bytes = vec![0; usize::try_from(len).map_err(|_| bad("it is too large"))?];
            let read = file.read_exact_at(&mut bytes, at);
            read.map_err(SegmentsError::io(path))?;
            Ok(bytes)
        };
        let end = size.checked_sub(FOOTER as u64);
        let end = end.ok_or_else(|| bad("it is shorter than its footer"))?;
        let footer = read(end, FOOTER as u64)?;
        let field = |n: usize| le64(&footer[n * 8..]);
        if footer[..8] != *MAGIC {
            return Err(bad("it has no footer of a segment"));
        }
        if field(8) != xxh3_64(&footer[..FOOTER - 8]) {
            return Err(bad("the checksum of its footer is wrong"));
        }
        if field(7) != key_sum {
            return Err(bad("it belongs to another store"));
        }
        let (pages, records, pieces) = (field(1), field(2), field(3));
        let wanted = pages
            .checked_mul((PAGE + 8 + FILTER) as u64)
            .zip(pieces.checked_mul(PIECE as u64))
            .and_then(|(a, b)| a.checked_add(b));
        if wanted != Some(end) {
            return Err(bad("its size is not what its footer says"));
        }
        let directory = read(pages * PAGE as u64, pages * 8)?;
        let filters = read(pages * (PAGE + 8) as u64, pages * FILTER as u64)?;
        let list = read(pages * (PAGE + 8 + FILTER) as u64, pieces * PIECE as u64)?;
        for (n, what) in [(4, &directory), (5, &filters), (6, &list)] {
            if field(n) != xxh3_64(what) {
                return Err(bad("a checksum of what is behind its pages is wrong"));
            }
        }
        let list = list.chunks_exact(PIECE);
        let whole = disk::open_direct(File::options().read(true), path);
        Ok(Self {
            whole: whole.map_err(SegmentsError::io(path))?,
            id,
            records,
            path: path.into(),
            pieces: list.map(|p| (le32(p), le64(&p[4..]))).collect(),
            directory: directory.chunks_exact(8).map(le64).collect(),
            filters,
            file,
        })
    }

    /// Bytes of memory.
    pub(crate) fn memory(&self) -> u64 {
        (self.directory.len() * 8 + self.filters.len()) as u64
    }

    pub(crate) fn pages(&self) -> u64 {
        self.directory.len() as u64
    }

    pub(crate) fn size(&self) -> u64 {
        self.pages() * (PAGE + 8 + FILTER) as u64 + (self.pieces.len() * PIECE + FOOTER) as u64
    }

    /// Calls `found` for each record with the key, until it says that it has enough. Counts the
    /// pages that it reads.
    pub(crate) fn find(
        &self,
        key: u64,
        reads: &AtomicU64,
        mut found: impl FnMut(Raw) -> bool,
    ) -> Result<(), SegmentsError> {
        let after = self.directory.partition_point(|first| *first < key);
        // Records of a key that begins a page are in no page before it.
        let mut at = if self.directory.get(after) == Some(&key) {
            after
        } else if let Some(before) = after.checked_sub(1) {
            before
        } else {
            return Ok(());
        };
        if !filter::may_have(self.filters.get(at * FILTER..).unwrap_or(&[]), key) {
            return Ok(());
        }
        let mut bytes = [0; PAGE];
        loop {
            let read = self.file.read_exact_at(&mut bytes, (at * PAGE) as u64);
            read.map_err(SegmentsError::io(&self.path))?;
            reads.fetch_add(1, Ordering::Relaxed);
            let records = self.checked(&bytes, at as u64)?;
            for n in records.lower_bound(key)..records.len() {
                let raw = records.get(n);
                if raw.key != key || !found(raw) {
                    return Ok(());
                }
            }
            at += 1;
            if self.directory.get(at) != Some(&key) {
                return Ok(());
            }
        }
    }

    fn checked<'a>(
        &self,
        bytes: &'a [u8; PAGE],
        number: u64,
    ) -> Result<page::Records<'a>, SegmentsError> {
        page::check(bytes, number)
            .map_err(|what| SegmentsError::corrupt(&self.path, format!("page {number}: {what}")))
    }

    /// All pages in order.
    pub(crate) fn scan(&self) -> Scan<'_> {
        Scan {
            segment: self,
            buffer: Aligned::new(),
            filled: 0,
            taken: 0,
            next_page: 0,
        }
    }

    /// Reads everything and compares it with what is in memory.
    pub(crate) fn verify(&self) -> Result<(), SegmentsError> {
        let bad = |what: String| SegmentsError::corrupt(&self.path, what);
        let mut pieces = BTreeMap::<u32, u64>::new();
        let mut scan = self.scan();
        let mut last = None;
        let mut records = 0;
        while let Some((page, found)) = scan.next()? {
            let at = usize::try_from(page).unwrap_or(usize::MAX);
            if self.directory.get(at) != Some(&found.key(0)) {
                return Err(bad(format!("page {page} is not what the directory says")));
            }
            let filter = self.filters.get(at * FILTER..(at + 1) * FILTER);
            for raw in found.iter() {
                if last > Some(raw) {
                    return Err(bad(format!("page {page} is not in order")));
                }
                if !filter.is_some_and(|f| filter::may_have(f, raw.key)) {
                    return Err(bad(format!("the filter of page {page} lacks a key")));
                }
                last = Some(raw);
                records += 1;
                *pieces.entry(raw.piece).or_default() += 1;
            }
        }
        if (records, &pieces) != (self.records, &self.pieces) {
            return Err(bad("its records are not what its footer counts".into()));
        }
        Ok(())
    }
}

/// Pages of a segment, in order.
pub(crate) struct Scan<'a> {
    segment: &'a Segment,
    buffer: Aligned,
    /// Bytes of the buffer that were filled, and of those the ones that were taken.
    filled: usize,
    taken: usize,
    next_page: u64,
}

impl Scan<'_> {
    /// The next page, with its number.
    pub(crate) fn next(&mut self) -> Result<Option<(u64, page::Records<'_>)>, SegmentsError> {
        let s = self.segment;
        let number = self.next_page;
        if number == s.pages() {
            return Ok(None);
        }
        if self.taken == self.filled {
            let pages = ((s.pages() - number) * PAGE as u64).min(BUFFER as u64);
            self.filled = usize::try_from(pages).unwrap_or(BUFFER);
            self.taken = 0;
            let buffer = &mut self.buffer.get_mut()[..self.filled];
            let read = s.whole.read_exact_at(buffer, number * PAGE as u64);
            read.map_err(SegmentsError::io(&s.path))?;
        }
        let (page, _) = self.buffer.get()[self.taken..]
            .split_first_chunk()
            .ok_or_else(|| SegmentsError::corrupt(&s.path, "half a page was read"))?;
        self.taken += PAGE;
        self.next_page += 1;
        Ok(Some((number, s.checked(page, number)?)))
    }
}
