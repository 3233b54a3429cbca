//! Getting the data back out of a replica.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use filecoin_proofs::{
    UnpaddedByteIndex, UnpaddedBytesAmount, decode_from_range, unseal_range_mapped,
};
use lotus_types::{Commitment, SectorSize};
use storage_proofs_core::merkle::MerkleTreeTrait;

use super::{library, sub_commitments};
use crate::commp::fr32::{QUAD_PADDED, QUAD_RAW};
use crate::network::{nodes, prover_id, seal_config, with_tree};
use crate::verify::codec::NODE;
use crate::verify::merkle::hash2;
use crate::{ProofError, SealingSector, Ticket, UnpaddedOffset, UpdatedSector};

/// Padded bytes that are decoded at a time.
const STEP: u64 = 4 << 20;

/// Payload bytes of a sector that are asked for.
#[derive(Clone, Copy)]
pub(super) struct Range {
    offset: u64,
    len: u64,
    /// The 127-byte units that hold them.
    first_quad: u64,
    end_quad: u64,
}

impl Range {
    pub(super) fn new(
        size: SectorSize,
        offset: UnpaddedOffset,
        len: u64,
    ) -> Result<Self, ProofError> {
        let payload = size.padded().unpadded().get();
        match offset.0.checked_add(len) {
            Some(end) if end <= payload => Ok(Self {
                offset: offset.0,
                len,
                first_quad: offset.0 / QUAD_RAW as u64,
                end_quad: end.div_ceil(QUAD_RAW as u64),
            }),
            _ => Err(ProofError::OutOfRange {
                offset: offset.0,
                len,
                size: payload,
            }),
        }
    }

    fn window<'a>(&self, out: &'a mut dyn Write) -> Window<'a> {
        Window {
            out,
            skip: self.offset - self.first_quad * QUAD_RAW as u64,
            left: self.len,
        }
    }
}

/// Passes on a part of what is written to it.
struct Window<'a> {
    out: &'a mut dyn Write,
    skip: u64,
    left: u64,
}

impl Write for Window<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let skip = usize::try_from(self.skip).map_or(buf.len(), |s| s.min(buf.len()));
        self.skip -= skip as u64;
        let rest = &buf[skip..];
        let take = usize::try_from(self.left).map_or(rest.len(), |l| l.min(rest.len()));
        self.out.write_all(&rest[..take])?;
        self.left -= take as u64;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A folder that goes away with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path, sector: &SealingSector) -> Result<Self, ProofError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let dir = parent.join(format!(
            "unseal-{}-{}-{}-{}",
            sector.id.miner,
            sector.id.number,
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        super::fresh_dir(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            tracing::warn!(dir = %self.0.display(), error = %e, "scratch folder stays behind");
        }
    }
}

pub(super) fn unseal(
    sector: &SealingSector,
    ticket: &Ticket,
    comm_d: &Commitment,
    sealed: &Path,
    scratch: &Path,
    out: &mut dyn Write,
    range: Range,
) -> Result<(), ProofError> {
    let len = fs::metadata(sealed).map_err(ProofError::io(sealed))?.len();
    if len != sector.size.bytes() {
        return Err(ProofError::BadInput {
            what: "replica",
            why: format!("it has {len} bytes, not {}", sector.size.bytes()),
        });
    }
    super::parents::ensure(sector.size)?;
    // The library writes labels next to the trees that it is told of, and cuts the data tree
    // short: it must never work in the sector's own cache.
    let scratch = Scratch::new(scratch, sector)?;
    with_tree!(
        sector.size,
        decode(sector, ticket, comm_d, sealed, &scratch.0, out, range)
    )
}

fn decode<Tree: 'static + MerkleTreeTrait>(
    sector: &SealingSector,
    ticket: &Ticket,
    comm_d: &Commitment,
    sealed: &Path,
    scratch: &Path,
    out: &mut dyn Write,
    range: Range,
) -> Result<(), ProofError> {
    let quads = range.end_quad - range.first_quad;
    let mut window = range.window(out);
    library("Unseal", || {
        unseal_range_mapped::<_, _, Tree>(
            &seal_config(sector.size),
            scratch.to_owned(),
            sealed.to_owned(),
            &mut window,
            prover_id(sector.id.miner),
            sector.id.number.0.into(),
            comm_d.0,
            *ticket,
            UnpaddedByteIndex(range.first_quad * QUAD_RAW as u64),
            UnpaddedBytesAmount(quads * QUAD_RAW as u64),
        )
    })?;
    Ok(())
}

pub(super) fn unseal_update(
    files: &UpdatedSector<'_>,
    comm_d: &Commitment,
    out: &mut dyn Write,
    range: Range,
) -> Result<(), ProofError> {
    let old = sub_commitments(files.cache)?;
    let old_comm_r = hash2(old.comm_c, old.comm_r_last);
    let mut window = range.window(out);
    let end = range.end_quad * QUAD_PADDED as u64;
    let mut at = range.first_quad * QUAD_PADDED as u64;
    let mut padded = Vec::new();
    while at < end {
        let len = STEP.min(end - at);
        let part = |path: &Path| {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(at))?;
            Ok(BufReader::new(file.take(len)))
        };
        let replica = part(files.updated).map_err(ProofError::io(files.updated))?;
        let key = part(files.sealed).map_err(ProofError::io(files.sealed))?;
        padded.clear();
        library("Unseal of an update", || {
            decode_from_range(
                nodes(files.size),
                comm_d.0,
                old_comm_r.into(),
                replica,
                key,
                &mut padded,
                usize::try_from(at)? / NODE,
                usize::try_from(len)? / NODE,
            )?;
            let raw = len / QUAD_PADDED as u64 * QUAD_RAW as u64;
            fr32::write_unpadded(&padded, &mut window, 0, usize::try_from(raw)?)?;
            Ok(())
        })?;
        at += len;
    }
    Ok(())
}
