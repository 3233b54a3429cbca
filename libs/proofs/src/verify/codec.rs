//! The encoding of a vanilla proof: one header, then 32-byte nodes, nothing else.
//!
//! A proof holds only what the verifier can not compute: leaves, labels, siblings and the two
//! sub-commitments. Counts, challenges, parents, positions in a tree and roots follow from the
//! public inputs, so a proof can not state them wrongly, and its length is one exact number.
//! Each proof has one encoding and each encoding is one proof.
//!
//! Header, 20 bytes: `LHVP`, version, kind, log2 of the sector's bytes, zero, the number of
//! partitions (seal, update) or sectors (PoSt) as u32, the miner's actor id as u64 (zero in an
//! update), little-endian.

use filecoin_hashers::poseidon::PoseidonDomain;
use lotus_types::{ActorId, SectorSize};

use crate::Refused;

/// Bytes of a node.
pub(crate) const NODE: usize = 32;
/// Bytes of the header.
pub(crate) const HEADER: usize = 20;
const MAGIC: [u8; 4] = *b"LHVP";
const VERSION: u8 = 1;

/// What a proof is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProofKind {
    Seal = 1,
    Window = 2,
    Winning = 3,
    Update = 4,
}

/// What the header says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) kind: ProofKind,
    pub(crate) size: SectorSize,
    pub(crate) count: u32,
    pub(crate) miner: ActorId,
}

impl Header {
    pub(crate) fn bytes(&self) -> [u8; HEADER] {
        let mut h = [0u8; HEADER];
        h[..4].copy_from_slice(&MAGIC);
        h[4] = VERSION;
        h[5] = self.kind as u8;
        h[6] = self.size.bytes().trailing_zeros().to_le_bytes()[0];
        h[8..12].copy_from_slice(&self.count.to_le_bytes());
        h[12..].copy_from_slice(&self.miner.0.to_le_bytes());
        h
    }

    /// Checks the header and the length, and returns the nodes behind it.
    pub(crate) fn open<'a>(&self, proof: &'a [u8], nodes: usize) -> Result<Nodes<'a>, Refused> {
        let expected = HEADER as u64 + nodes as u64 * NODE as u64;
        let got = proof.len() as u64;
        let Some((header, rest)) = proof.split_at_checked(HEADER) else {
            return Err(Refused::Length { expected, got });
        };
        let ours = self.bytes();
        let fields = [
            (0..4, "format"),
            (4..5, "version"),
            (5..6, "kind of proof"),
            (6..8, "sector size"),
            (8..12, "count"),
            (12..HEADER, "miner"),
        ];
        for (at, what) in fields {
            if header[at.clone()] != ours[at] {
                return Err(Refused::Header(what));
            }
        }
        if expected != got {
            return Err(Refused::Length { expected, got });
        }
        Ok(Nodes { rest })
    }
}

/// Reads nodes in order.
pub(crate) struct Nodes<'a> {
    rest: &'a [u8],
}

impl<'a> Nodes<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next node, whatever its bytes.
    pub(crate) fn raw(&mut self) -> Result<[u8; NODE], Refused> {
        let (node, rest) = self.rest.split_first_chunk().ok_or(Refused::Length {
            expected: NODE as u64,
            got: self.rest.len() as u64,
        })?;
        self.rest = rest;
        Ok(*node)
    }

    /// The next node, which must be a canonical field element.
    pub(crate) fn element(&mut self, what: &'static str) -> Result<PoseidonDomain, Refused> {
        element(self.raw()?, what)
    }

    /// All nodes are read.
    pub(crate) fn end(self) -> Result<(), Refused> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(Refused::Length {
                expected: 0,
                got: self.rest.len() as u64,
            })
        }
    }
}

/// Bytes as a canonical field element: below the modulus.
pub(crate) fn element(bytes: [u8; NODE], what: &'static str) -> Result<PoseidonDomain, Refused> {
    let canonical: Option<blstrs::Scalar> = blstrs::Scalar::from_bytes_le(&bytes).into();
    canonical
        .map(|_| PoseidonDomain::from(bytes))
        .ok_or(Refused::NotInField(what))
}
