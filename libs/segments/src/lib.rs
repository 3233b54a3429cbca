//! Immutable sorted segments: which piece holds a multihash, and where in it, in one page read.
//!
//! A store is a folder with one owner. [`Segments::ingest`] sorts what it is given, in runs of
//! bounded memory, and writes one segment; [`Segments::find`] asks each segment's filter, which is
//! in memory, and reads a page where it says yes; merges keep the number of segments small. What
//! is committed is in the manifest, and only there: a crash leaves the store as it was before the
//! change or as it is after it.
//!
//! The store knows a multihash by a keyed 64-bit hash of it. **So what it finds are candidates**:
//! the caller compares the multihash in the piece, or hashes the bytes.
//!
//! # Memory
//!
//! 264 bytes for each page of 204 records: 8 of the directory and 256 of the filter, about 1.3 GB
//! for 10⁹ records, which take 21 GB of disk. An ingest takes 64 MiB while it sorts 2,097,152 records,
//! a merge 1 MiB for each segment that goes into it. Both go past the page cache, where the file
//! system can: what is written and read once does not drive out the pages that lookups read.
//!
//! # Format
//!
//! All numbers are little-endian. Checksums are XXH3-64.
//!
//! A **segment**, `<id as 16 hex digits>.seg`: pages, then what is kept in memory, then a footer.
//!
//! | bytes | what |
//! |---|---|
//! | 4096 × pages | pages |
//! | 8 × pages | directory: the key of each page's first record, never falling |
//! | 256 × pages | filters: a Bloom filter of each page's keys, 2048 bits, 7 of them for a key |
//! | 12 × pieces | pieces: number (u32) and count of records (u64), rising |
//! | 72 | footer |
//!
//! A **page**. Records are sorted by key, piece, place. Records of one key begin a new page when
//! the rest of the page is too small for them, so that a key that begins a page is in no page
//! before it.
//!
//! | from | bytes | what |
//! |---|---|---|
//! | 0 | 20 × 204 | records; behind the last one zeros |
//! | 4080 | 2 | count of records, 1 to 204 |
//! | 4082 | 2 | zero |
//! | 4084 | 4 | number of the page, from 0 |
//! | 4088 | 8 | checksum of bytes 0 to 4088 |
//!
//! A **record**.
//!
//! | from | bytes | what |
//! |---|---|---|
//! | 0 | 8 | key: SipHash-1-3 of the multihash's bytes, under the key of the manifest |
//! | 8 | 4 | number of the piece |
//! | 12 | 8 | offset of the block's bytes in the piece (upper 40 bits), length (lower 24 bits) |
//!
//! The **footer**.
//!
//! | from | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `LHsegm01` |
//! | 8 | 8 | count of pages |
//! | 16 | 8 | count of records |
//! | 24 | 8 | count of pieces |
//! | 32 | 8 | checksum of the directory |
//! | 40 | 8 | checksum of the filters |
//! | 48 | 8 | checksum of the pieces |
//! | 56 | 8 | checksum of the manifest's key: a segment of another store is none of this one |
//! | 64 | 8 | checksum of bytes 0 to 64 |
//!
//! The **manifest**, `MANIFEST`, replaced by a rename.
//!
//! | from | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `LHmani01` |
//! | 8 | 16 | key of the hash, random |
//! | 24 | 8 | next segment id |
//! | 32 | 4 | count of segments |
//! | 36 | 4 | count of tombstones |
//! | 40 | 8 × segments | ids |
//! | | 4 × tombstones | numbers of pieces that are gone and still have records |
//! | | 8 | checksum of everything before it |

mod disk;
mod error;
mod filter;
mod manifest;
mod merge;
mod page;
mod segment;
mod sort;
mod store;
mod write;

#[cfg(test)]
mod tests;

pub use error::SegmentsError;
pub use sort::{Sorted, Sorter};
pub use store::{Ingest, Segments, Stats, Verified};

/// Where a block may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Record {
    /// Number of the piece.
    pub piece: u32,
    /// Where its bytes start in the piece. Less than 2⁴⁰ (1 TiB).
    pub offset: u64,
    /// How many bytes it has. Less than 2²⁴ (16 MiB).
    pub len: u32,
}

/// Bits of a length; those of the offset are above them.
const LEN_BITS: u32 = 24;
/// Bits of an offset.
const OFFSET_BITS: u32 = 40;

/// Packs offset and length.
fn place(offset: u64, len: u32) -> Option<u64> {
    let fits = offset >> OFFSET_BITS == 0 && len >> LEN_BITS == 0;
    fits.then(|| (offset << LEN_BITS) | u64::from(len))
}

/// Unpacks them.
fn unplace(place: u64) -> (u64, u32) {
    (place >> LEN_BITS, (place & ((1 << LEN_BITS) - 1)) as u32)
}
