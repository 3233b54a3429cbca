//! The piece commitment: the root of a binary SHA-256 tree over the Fr32-padded piece.
//!
//! The bytes stream through a fixed buffer; of the tree only one node per level is kept. Whole
//! runs of [`CHUNK_RAW`] bytes are subtrees, which several threads can hash at once.

pub(crate) mod fr32;
pub(crate) mod sha256;

use std::io::{self, Read, Write};
use std::num::NonZero;
use std::sync::OnceLock;
use std::thread;

use lotus_types::{Commitment, PaddedSize, PieceCid, PieceInfo};

use fr32::{QUAD_PADDED, QUAD_RAW};
use sha256::{NODE, hash_pair, hash_pairs};

/// Units of one subtree: a power of two whose working set stays in the L2 cache.
const CHUNK_QUADS: usize = 512;
/// Payload bytes of one subtree.
pub(crate) const CHUNK_RAW: usize = CHUNK_QUADS * QUAD_RAW;
/// The same after padding.
pub(crate) const CHUNK_PADDED: usize = CHUNK_QUADS * QUAD_PADDED;
/// Height of one subtree: its leaves have height 0.
const CHUNK_HEIGHT: usize = (CHUNK_PADDED / NODE).trailing_zeros() as usize;
/// Heights of a tree of u64 bytes.
const HEIGHTS: usize = 60;
/// Subtrees that each thread gets at a time: about 1 MiB, so that starting it costs little.
const CHUNKS_PER_THREAD: usize = 16;
/// Threads of [`commp`] at most; reading is then the limit.
const MAX_THREADS: usize = 8;

type Node = [u8; NODE];

/// The root of a tree of zeros of this height.
fn zero_node(height: usize) -> Node {
    static ZEROS: OnceLock<[Node; HEIGHTS]> = OnceLock::new();
    ZEROS.get_or_init(|| {
        let mut zeros = [[0; NODE]; HEIGHTS];
        for h in 1..HEIGHTS {
            zeros[h] = hash_pair(&zeros[h - 1], &zeros[h - 1]);
        }
        zeros
    })[height]
}

/// Height of the tree over a padded size.
fn height(size: PaddedSize) -> usize {
    (size.get() / NODE as u64).trailing_zeros() as usize
}

/// The commitment of a piece of zeros.
#[must_use]
pub fn zero_commitment(size: PaddedSize) -> Commitment {
    Commitment(zero_node(height(size)))
}

/// The commitment of two neighbours of one size.
pub(crate) fn join(left: Commitment, right: Commitment) -> Commitment {
    Commitment(hash_pair(&left.0, &right.0))
}

/// Two buffers between which the levels of a subtree alternate.
struct Levels(Vec<u8>, Vec<u8>);

impl Levels {
    fn new() -> Self {
        Self(vec![0; CHUNK_PADDED / 2], vec![0; CHUNK_PADDED / 4])
    }

    /// Root of padded bytes: a power of two of them, at most [`CHUNK_PADDED`].
    fn root(&mut self, padded: &[u8]) -> Node {
        let mut len = padded.len() / 2;
        hash_pairs(padded, &mut self.0[..len]);
        while len > NODE {
            hash_pairs(&self.0[..len], &mut self.1[..len / 2]);
            std::mem::swap(&mut self.0, &mut self.1);
            len /= 2;
        }
        let mut root = [0; NODE];
        root.copy_from_slice(&self.0[..NODE]);
        // Keep the larger buffer first.
        if self.0.len() < self.1.len() {
            std::mem::swap(&mut self.0, &mut self.1);
        }
        root
    }
}

/// The tree above the subtrees: a binary counter of roots.
pub(crate) struct Tree {
    /// `slots[h]`: the left sibling that waits at height [`CHUNK_HEIGHT`] + h.
    slots: [Option<Node>; HEIGHTS],
    levels: Levels,
}

impl Tree {
    pub(crate) fn new() -> Self {
        Self {
            slots: [None; HEIGHTS],
            levels: Levels::new(),
        }
    }

    /// Appends a whole subtree of padded bytes.
    pub(crate) fn push(&mut self, padded: &[u8]) {
        let root = self.levels.root(padded);
        self.push_root(root);
    }

    fn push_root(&mut self, mut node: Node) {
        for slot in &mut self.slots {
            match slot.take() {
                Some(left) => node = hash_pair(&left, &node),
                None => {
                    *slot = Some(node);
                    return;
                }
            }
        }
    }

    /// The commitment once `tail`, padded whole units short of a subtree, follows, and zeros
    /// after that up to `size`. What was pushed must fit `size`.
    pub(crate) fn finish(mut self, tail: &[u8], size: PaddedSize) -> Commitment {
        let target = height(size);
        if target < CHUNK_HEIGHT {
            let mut padded = tail.to_vec();
            padded.resize(NODE << target, 0);
            return Commitment(self.levels.root(&padded));
        }
        if !tail.is_empty() {
            let mut padded = tail.to_vec();
            padded.resize(CHUNK_PADDED, 0);
            self.push(&padded);
        }
        let mut carry = None;
        for (h, slot) in (CHUNK_HEIGHT..target).zip(self.slots) {
            carry = match (slot, carry) {
                (Some(left), Some(right)) => Some(hash_pair(&left, &right)),
                (Some(left), None) => Some(hash_pair(&left, &zero_node(h))),
                (None, Some(left)) => Some(hash_pair(&left, &zero_node(h))),
                (None, None) => None,
            };
        }
        Commitment(
            carry
                .or(self.slots[target - CHUNK_HEIGHT])
                .unwrap_or_else(|| zero_node(target)),
        )
    }
}

/// Computes the commitment of what is written to it, on the caller's thread.
///
/// About 0.8 GB/s on a Zen 4 core with SHA extensions, as the test `commp_speed` prints.
pub struct CommpWriter {
    tree: Tree,
    raw: Vec<u8>,
    padded: Vec<u8>,
    written: u64,
    threads: usize,
}

impl Default for CommpWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl CommpWriter {
    /// An empty piece so far.
    #[must_use]
    pub fn new() -> Self {
        Self::with_threads(1)
    }

    fn with_threads(threads: usize) -> Self {
        let chunks = if threads == 1 {
            1
        } else {
            threads * CHUNKS_PER_THREAD
        };
        Self {
            tree: Tree::new(),
            raw: Vec::with_capacity(chunks * CHUNK_RAW),
            padded: vec![0; CHUNK_PADDED],
            written: 0,
            threads,
        }
    }

    /// Hashes the whole subtrees in the buffer and keeps the rest.
    fn drain(&mut self) {
        let whole = self.raw.len() / CHUNK_RAW * CHUNK_RAW;
        if self.threads > 1 && whole > CHUNK_RAW {
            let share = (whole / CHUNK_RAW).div_ceil(self.threads) * CHUNK_RAW;
            let roots: Vec<Vec<Node>> = thread::scope(|s| {
                let workers: Vec<_> = self.raw[..whole]
                    .chunks(share)
                    .map(|part| s.spawn(move || subtree_roots(part)))
                    .collect();
                workers
                    .into_iter()
                    .map(|w| w.join().expect("hashing does not panic"))
                    .collect()
            });
            for root in roots.into_iter().flatten() {
                self.tree.push_root(root);
            }
        } else {
            let raw = std::mem::take(&mut self.raw);
            self.push(&raw[..whole]);
            self.raw = raw;
        }
        self.raw.drain(..whole);
    }

    /// Hashes whole subtrees, here.
    fn push(&mut self, raw: &[u8]) {
        for chunk in raw.chunks_exact(CHUNK_RAW) {
            fr32::pad(chunk, &mut self.padded);
            self.tree.push(&self.padded);
        }
    }

    /// Extends what was written with zeros, so that the piece has this padded size. A larger one
    /// stays as it is.
    pub fn extend_to(&mut self, size: PaddedSize) -> io::Result<()> {
        if PaddedSize::to_hold(self.written) >= Some(size) {
            return Ok(());
        }
        // A piece has the smallest size that holds it: zeros up to just above its half are enough.
        let zeros = (size.unpadded().get() / 2 + 1).saturating_sub(self.written);
        io::copy(&mut io::repeat(0).take(zeros), self).map(|_| ())
    }

    /// The piece: its raw size is what was written, its padded size the smallest that holds it,
    /// extended with zeros.
    #[must_use]
    pub fn finish(mut self) -> PieceInfo {
        self.drain();
        let size = PaddedSize::to_hold(self.written).expect("nobody writes 2^62 bytes");
        let tail = fr32::pad_tail(&self.raw, &mut self.padded);
        PieceInfo {
            cid: PieceCid::new(self.tree.finish(&self.padded[..tail], size)),
            size,
            raw_size: self.written,
        }
    }
}

/// Bytes of a piece as they lie in a sector: Fr32-padded, and extended with zeros to whole units of
/// 127.
#[must_use]
pub fn fr32_pad(raw: &[u8]) -> Vec<u8> {
    let mut out = vec![0; raw.len().div_ceil(QUAD_RAW) * QUAD_PADDED];
    fr32::pad_tail(raw, &mut out);
    out
}

fn subtree_roots(raw: &[u8]) -> Vec<Node> {
    let mut levels = Levels::new();
    let mut padded = vec![0; CHUNK_PADDED];
    raw.chunks_exact(CHUNK_RAW)
        .map(|chunk| {
            fr32::pad(chunk, &mut padded);
            levels.root(&padded)
        })
        .collect()
}

impl Write for CommpWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.raw.len() == self.raw.capacity() {
            self.drain();
        }
        // What comes in large parts is mostly hashed where it lies.
        if self.threads == 1 && self.raw.is_empty() && buf.len() >= CHUNK_RAW {
            let whole = buf.len() / CHUNK_RAW * CHUNK_RAW;
            self.push(&buf[..whole]);
            self.written += whole as u64;
            return Ok(whole);
        }
        let n = buf.len().min(self.raw.capacity() - self.raw.len());
        self.raw.extend_from_slice(&buf[..n]);
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The commitment of everything that `r` gives, on as many threads as there are CPUs (eight at
/// most). Memory is bounded: about 1 MiB for each thread.
pub fn commp(mut r: impl Read) -> io::Result<PieceInfo> {
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let mut w = CommpWriter::with_threads(cpus.min(MAX_THREADS));
    io::copy(&mut r, &mut w)?;
    Ok(w.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use filecoin_proofs::{UnpaddedBytesAmount, generate_piece_commitment};
    use proptest::prelude::*;

    fn bytes(seed: u64, len: usize) -> Vec<u8> {
        let mut x = seed | 1;
        (0..len)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x.to_le_bytes()[3]
            })
            .collect()
    }

    /// The library's answer for the zero-extended piece.
    fn oracle(raw: &[u8]) -> [u8; 32] {
        let size = PaddedSize::to_hold(raw.len() as u64).unwrap().unpadded();
        let mut extended = raw.to_vec();
        extended.resize(usize::try_from(size.get()).unwrap(), 0);
        generate_piece_commitment(extended.as_slice(), UnpaddedBytesAmount(size.get()))
            .unwrap()
            .commitment
    }

    fn agrees(raw: &[u8]) {
        let expected = oracle(raw);
        let ours = commp(raw).unwrap();
        assert_eq!(ours.cid.commitment().0, expected, "{} bytes", raw.len());
        assert_eq!(ours.raw_size, raw.len() as u64);
        // Copied, hashed where it lies, and both in turns.
        for size in [1009, CHUNK_RAW, CHUNK_RAW + 1009, usize::MAX] {
            let mut w = CommpWriter::new();
            for part in raw.chunks(size) {
                w.write_all(part).unwrap();
            }
            assert_eq!(w.finish(), ours, "in parts of {size}");
        }
    }

    #[test]
    fn agrees_with_the_library_around_every_boundary() {
        for quads in [
            1,
            2,
            4,
            CHUNK_QUADS / 2,
            CHUNK_QUADS,
            2 * CHUNK_QUADS,
            3 * CHUNK_QUADS,
        ] {
            let edge = quads * QUAD_RAW;
            for len in [edge - 1, edge, edge + 1] {
                agrees(&bytes(len as u64, len));
            }
        }
        agrees(&bytes(1, CHUNK_RAW * CHUNKS_PER_THREAD * 2 + 77));
        agrees(&bytes(2, CHUNK_RAW * CHUNKS_PER_THREAD * 2));
    }

    #[test]
    fn the_empty_piece_is_zeros() {
        let empty = CommpWriter::new().finish();
        assert_eq!((empty.size.get(), empty.raw_size), (128, 0));
        assert_eq!(empty.cid.commitment(), zero_commitment(empty.size));
        for shift in 7..25 {
            let size = PaddedSize::new(1 << shift).unwrap();
            let zeros = commp(io::repeat(0).take(size.unpadded().get())).unwrap();
            assert_eq!(zeros.cid.commitment(), zero_commitment(size));
            assert_eq!(zeros.size, size);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn agrees_with_the_library(seed: u64, len in 0usize..300_000) {
            agrees(&bytes(seed, len));
        }
    }
}
