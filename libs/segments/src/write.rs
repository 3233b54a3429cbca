//! Writes a segment from records in order.

use std::collections::BTreeMap;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use crate::SegmentsError;
use crate::disk::OutFile;
use crate::filter::FILTER;
use crate::page::{Filling, Raw};

pub(crate) const MAGIC: &[u8; 8] = b"LHsegm01";
/// Bytes of the footer.
pub(crate) const FOOTER: usize = 72;
/// Bytes of a piece in the list of pieces.
pub(crate) const PIECE: usize = 12;

/// A segment that is written. Memory: what of it is kept in memory later, too.
pub(crate) struct Writer {
    out: OutFile,
    key_sum: u64,
    page: Filling,
    directory: Vec<u8>,
    filters: Vec<u8>,
    records: u64,
    pages: u32,
    last: Option<Raw>,
}

impl Writer {
    pub(crate) fn create(path: &Path, key_sum: u64) -> Result<Self, SegmentsError> {
        Ok(Self {
            out: OutFile::create(path)?,
            key_sum,
            page: Filling::new(),
            directory: Vec::new(),
            filters: Vec::new(),
            records: 0,
            pages: 0,
            last: None,
        })
    }

    /// Adds a record, which must not be less than the last.
    pub(crate) fn push(&mut self, raw: &Raw) -> Result<(), SegmentsError> {
        debug_assert!(self.last.replace(*raw) <= Some(*raw), "records in order");
        if !self.page.push(raw) {
            let moved = self.page.moves(raw.key);
            self.seal(moved)?;
            let fits = self.page.push(raw);
            debug_assert!(fits, "a page has room after it was written");
        }
        self.records += 1;
        Ok(())
    }

    fn seal(&mut self, moved: usize) -> Result<(), SegmentsError> {
        self.directory
            .extend_from_slice(&self.page.first_key().to_le_bytes());
        let (page, filter) = self.page.seal(self.pages, moved);
        debug_assert_eq!(filter.len(), FILTER);
        self.filters.extend_from_slice(&filter);
        // 2³² pages have 16 TiB; a disk is full long before.
        self.pages += 1;
        self.out.write(&page)
    }

    /// Ends the segment, which has so many records of each of these pieces.
    pub(crate) fn finish(mut self, counts: &BTreeMap<u32, u64>) -> Result<(), SegmentsError> {
        if counts.values().sum::<u64>() != self.records {
            let what = format!("it has {} records, not those of its pieces", self.records);
            return Err(SegmentsError::corrupt(self.out.path(), what));
        }
        if self.page.count > 0 {
            self.seal(0)?;
        }
        let mut pieces = Vec::with_capacity(counts.len() * PIECE);
        for (piece, records) in counts {
            pieces.extend_from_slice(&piece.to_le_bytes());
            pieces.extend_from_slice(&records.to_le_bytes());
        }
        let mut footer = Vec::with_capacity(FOOTER);
        footer.extend_from_slice(MAGIC);
        for n in [
            u64::from(self.pages),
            self.records,
            counts.len() as u64,
            xxh3_64(&self.directory),
            xxh3_64(&self.filters),
            xxh3_64(&pieces),
            self.key_sum,
        ] {
            footer.extend_from_slice(&n.to_le_bytes());
        }
        footer.extend_from_slice(&xxh3_64(&footer).to_le_bytes());
        for part in [&self.directory, &self.filters, &pieces, &footer] {
            self.out.write(part)?;
        }
        self.out.finish()
    }
}

/// What a footer keeps of the manifest's key.
pub(crate) fn key_sum(key: &[u8; 16]) -> u64 {
    xxh3_64(key)
}
