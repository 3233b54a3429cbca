//! What is committed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

use crate::SegmentsError;
use crate::disk::{self, OutFile};
use crate::page::{le32, le64};

const MAGIC: &[u8; 8] = b"LHmani01";
/// Bytes before the lists.
const HEAD: usize = 40;
/// Largest manifest that is read: 64 MiB, room for 16 million tombstones.
const MAX: u64 = 64 << 20;

/// The committed state of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    /// Key of the hash.
    pub(crate) key: [u8; 16],
    pub(crate) next_id: u64,
    pub(crate) segments: Vec<u64>,
    pub(crate) tombstones: BTreeSet<u32>,
}

impl Manifest {
    fn encode(&self) -> Vec<u8> {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
        let mut out =
            Vec::with_capacity(HEAD + self.segments.len() * 8 + self.tombstones.len() * 4 + 8);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&self.key);
        out.extend_from_slice(&self.next_id.to_le_bytes());
        out.extend_from_slice(&count(self.segments.len()));
        out.extend_from_slice(&count(self.tombstones.len()));
        for id in &self.segments {
            out.extend_from_slice(&id.to_le_bytes());
        }
        for piece in &self.tombstones {
            out.extend_from_slice(&piece.to_le_bytes());
        }
        out.extend_from_slice(&xxh3_64(&out).to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let (body, sum) = bytes
            .split_last_chunk::<8>()
            .filter(|(body, _)| body.len() >= HEAD)
            .ok_or("it is too short")?;
        if body[..8] != *MAGIC {
            return Err("it is no manifest of this version");
        }
        if le64(sum) != xxh3_64(body) {
            return Err("its checksum is wrong");
        }
        let (segments, tombstones) = (le32(&body[32..]) as usize, le32(&body[36..]) as usize);
        // Two times 2³² times 8 fits.
        if body.len() != HEAD + segments * 8 + tombstones * 4 {
            return Err("its size is not what it says");
        }
        let (ids, gone) = body[HEAD..].split_at(segments * 8);
        Ok(Self {
            key: body[8..24].try_into().expect("16 bytes"),
            next_id: le64(&body[24..]),
            segments: ids.chunks_exact(8).map(le64).collect(),
            tombstones: gone.chunks_exact(4).map(le32).collect(),
        })
    }

    /// Reads it; `None` when there is none.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, SegmentsError> {
        match fs::metadata(path) {
            Ok(m) if m.len() > MAX => return Err(SegmentsError::corrupt(path, "it is too large")),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(SegmentsError::io(path)(e)),
        }
        let bytes = fs::read(path).map_err(SegmentsError::io(path))?;
        Self::decode(&bytes)
            .map(Some)
            .map_err(|what| SegmentsError::corrupt(path, what))
    }

    /// Puts it in the place of the one before.
    pub(crate) fn write(&self, path: &Path) -> Result<(), SegmentsError> {
        let fresh = path.with_extension("new");
        let mut out = OutFile::create(&fresh)?;
        out.write(&self.encode())?;
        out.finish()?;
        disk::replace(&fresh, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_whole_or_not_at_all() {
        let manifest = Manifest {
            key: [7; 16],
            next_id: 9,
            segments: vec![3, 8],
            tombstones: BTreeSet::from([1, 5, 6]),
        };
        let bytes = manifest.encode();
        assert_eq!(Manifest::decode(&bytes), Ok(manifest));
        for len in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert!(Manifest::decode(&other).is_err(), "byte {at}");
        }
    }
}
