//! Pages as bytes: pure.

use xxhash_rust::xxh3::xxh3_64;

use crate::filter::{self, FILTER};

/// Bytes of a page: what a drive reads at once.
pub(crate) const PAGE: usize = 4096;
/// Bytes of a record.
pub(crate) const RECORD: usize = 20;
/// Records of a page.
pub(crate) const RECORDS: usize = 204;

const COUNT: usize = RECORD * RECORDS;
const NUMBER: usize = COUNT + 4;
const SUM: usize = NUMBER + 4;

/// A record as a page has it: key, piece, place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Raw {
    pub(crate) key: u64,
    pub(crate) piece: u32,
    pub(crate) place: u64,
}

/// Eight bytes as a number. The callers slice within what they have checked.
pub(crate) fn le64(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
}

pub(crate) fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"))
}

/// A page that is filled.
pub(crate) struct Filling {
    bytes: Box<[u8; PAGE]>,
    pub(crate) count: usize,
    /// Where the records of the last key begin.
    run: usize,
    last: u64,
}

impl Filling {
    pub(crate) fn new() -> Self {
        Self {
            bytes: Box::new([0; PAGE]),
            count: 0,
            run: 0,
            last: 0,
        }
    }

    /// Adds a record. False when there is no room.
    pub(crate) fn push(&mut self, raw: &Raw) -> bool {
        if self.count == RECORDS {
            return false;
        }
        if self.count == 0 || raw.key != self.last {
            (self.run, self.last) = (self.count, raw.key);
        }
        let at = self.count * RECORD;
        let slot = &mut self.bytes[at..at + RECORD];
        slot[..8].copy_from_slice(&raw.key.to_le_bytes());
        slot[8..12].copy_from_slice(&raw.piece.to_le_bytes());
        slot[12..].copy_from_slice(&raw.place.to_le_bytes());
        self.count += 1;
        true
    }

    pub(crate) fn first_key(&self) -> u64 {
        le64(&self.bytes[..8])
    }

    /// Of a full page, the records that go to the next one, because a record of `key` follows and
    /// they are of it: none when they fill the page.
    pub(crate) fn moves(&self, key: u64) -> usize {
        if self.last == key && self.run > 0 {
            self.count - self.run
        } else {
            0
        }
    }

    /// Ends the page as number `number`, without its last `moved` records. They begin the next.
    pub(crate) fn seal(&mut self, number: u32, moved: usize) -> ([u8; PAGE], [u8; FILTER]) {
        let keep = self.count - moved;
        let mut page = *self.bytes;
        page[keep * RECORD..].fill(0);
        page[COUNT..COUNT + 2].copy_from_slice(&u16::try_from(keep).expect("204").to_le_bytes());
        page[NUMBER..SUM].copy_from_slice(&number.to_le_bytes());
        let sum = xxh3_64(&page[..SUM]);
        page[SUM..].copy_from_slice(&sum.to_le_bytes());
        let mut bloom = [0; FILTER];
        for record in page[..keep * RECORD].chunks_exact(RECORD) {
            filter::insert(&mut bloom, le64(record));
        }
        self.bytes
            .copy_within(keep * RECORD..self.count * RECORD, 0);
        (self.count, self.run) = (moved, 0);
        (page, bloom)
    }
}

/// The records of a page, once it is known to be page `number` and whole.
pub(crate) fn check(page: &[u8; PAGE], number: u64) -> Result<Records<'_>, &'static str> {
    if le64(&page[SUM..]) != xxh3_64(&page[..SUM]) {
        return Err("a checksum is wrong");
    }
    if u64::from(le32(&page[NUMBER..])) != number {
        return Err("a page is not in its place");
    }
    let count = usize::from(u16::from_le_bytes([page[COUNT], page[COUNT + 1]]));
    if count == 0 || count > RECORDS {
        return Err("a page has an impossible count");
    }
    Ok(Records(&page[..count * RECORD]))
}

/// Record `n` of a page that was checked.
pub(crate) fn record(page: &[u8], n: usize) -> Raw {
    let at = &page[n * RECORD..(n + 1) * RECORD];
    Raw {
        key: le64(at),
        piece: le32(&at[8..]),
        place: le64(&at[12..]),
    }
}

/// Records of a checked page.
#[derive(Clone, Copy)]
pub(crate) struct Records<'a>(&'a [u8]);

impl Records<'_> {
    pub(crate) fn len(&self) -> usize {
        self.0.len() / RECORD
    }

    pub(crate) fn key(&self, n: usize) -> u64 {
        le64(&self.0[n * RECORD..])
    }

    pub(crate) fn get(&self, n: usize) -> Raw {
        record(self.0, n)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Raw> {
        self.0.chunks_exact(RECORD).map(|bytes| record(bytes, 0))
    }

    /// The first record with this key or a later one.
    pub(crate) fn lower_bound(&self, key: u64) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let mid = usize::midpoint(low, high);
            if self.key(mid) < key {
                low = mid + 1;
            } else {
                high = mid;
            }
        }
        low
    }
}
