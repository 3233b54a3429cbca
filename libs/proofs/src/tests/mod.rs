//! Sectors are sealed for real; each proof is then attacked.

mod groth16;
mod large;
mod post;
mod seal;
mod update;

use std::fs;
use std::io::{Cursor, Read};
use std::path::PathBuf;
use std::sync::LazyLock;

use lotus_types::{ActorId, Commitment, PieceInfo, SectorId, SectorNumber, SectorSize};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::verify::codec::{HEADER, NODE};
use crate::{
    CommpWriter, PlacedPiece, PostSector, Prover, Refused, SealedCommitments, SealingSector, Seed,
    Ticket, Vanilla, Verifier, add_pieces, commp, layout,
};

const TICKET: Ticket = [7; 32];
const SEED: Seed = [9; 32];
const RANDOMNESS: [u8; 32] = [0xc5; 32];

/// A sector with its files.
struct Sector {
    dir: TempDir,
    sector: SealingSector,
    layout: Vec<PlacedPiece>,
    piece: Vec<u8>,
    commitments: SealedCommitments,
    pc1: Vec<u8>,
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x.to_le_bytes()[5]
        })
        .collect()
}

fn place(size: SectorSize, piece: &[u8]) -> Vec<PlacedPiece> {
    layout(size, &[commp(piece).unwrap()]).unwrap()
}

fn from_memory(piece: &[u8]) -> impl FnMut(&PieceInfo) -> std::io::Result<Box<dyn Read>> + '_ {
    |_| Ok(Box::new(Cursor::new(piece.to_vec())))
}

impl Sector {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Seals a sector up to PreCommit2.
    fn seal(size: SectorSize, number: u64, piece: Vec<u8>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sector = SealingSector {
            id: SectorId {
                miner: ActorId(1000),
                number: SectorNumber(number),
            },
            size,
        };
        let layout = place(size, &piece);
        let path = |name: &str| dir.path().join(name);
        let (unsealed, sealed, cache) = (path("unsealed"), path("sealed"), path("cache"));
        add_pieces(&unsealed, size, &layout, &mut from_memory(&piece)).unwrap();
        let start = std::time::Instant::now();
        let pc1 = Vanilla
            .pre_commit1(&sector, &TICKET, &layout, &unsealed, &sealed, &cache)
            .unwrap();
        println!("PreCommit1 of {size}: {:?}", start.elapsed());
        let start = std::time::Instant::now();
        let commitments = Vanilla.pre_commit2(&sector, &pc1, &sealed, &cache).unwrap();
        println!("PreCommit2 of {size}: {:?}", start.elapsed());
        Self {
            sector,
            layout,
            piece,
            commitments,
            pc1,
            dir,
        }
    }

    fn small(number: u64) -> Self {
        Self::seal(SectorSize::S2KiB, number, noise(number, 1500))
    }

    fn commit(&self) -> Vec<u8> {
        Vanilla
            .commit(
                &self.sector,
                &TICKET,
                &SEED,
                &self.layout,
                &self.commitments,
                &self.path("sealed"),
                &self.path("cache"),
            )
            .unwrap()
    }

    fn verify(&self, proof: &[u8]) -> Result<(), Refused> {
        let c = &self.commitments;
        Vanilla.verify_seal(&self.sector, &TICKET, &SEED, &c.comm_d, &c.comm_r, proof)
    }

    fn post(&self) -> PostSector {
        PostSector {
            number: self.sector.id.number,
            comm_r: self.commitments.comm_r,
            sealed: self.path("sealed"),
            cache: self.path("cache"),
        }
    }

    fn public(&self) -> (SectorNumber, Commitment) {
        (self.sector.id.number, self.commitments.comm_r)
    }

    fn unseal(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut out = Vec::new();
        Vanilla
            .unseal(
                &self.sector,
                &TICKET,
                &self.commitments.comm_d,
                &self.path("sealed"),
                &self.path("cache"),
                self.dir.path(),
                &mut out,
                crate::UnpaddedOffset(offset),
                len,
            )
            .unwrap();
        out
    }

    /// Flips one bit of a replica's leaf.
    fn damage_leaf(&self, leaf: u64) {
        let path = self.path("sealed");
        let mut replica = fs::read(&path).unwrap();
        replica[usize::try_from(leaf).unwrap() * NODE] ^= 1;
        fs::write(&path, replica).unwrap();
    }
}

/// A sealed small sector and its proof, made once.
static SEALED: LazyLock<(Sector, Vec<u8>)> = LazyLock::new(|| {
    let sector = Sector::small(1);
    let proof = sector.commit();
    (sector, proof)
});

/// Attacks that no proof survives: one bit flipped in each node and each bit of the header,
/// random bits, truncation at each node, extension, the header alone, nothing.
fn survives_nothing(proof: &[u8], verify: impl Fn(&[u8]) -> Result<(), Refused>) {
    verify(proof).unwrap();
    let refused = |bytes: &[u8], what: &str| {
        match verify(bytes) {
            Ok(()) => panic!("accepted with {what}"),
            Err(Refused::Internal(e)) => panic!("panicked with {what}: {e}"),
            Err(_) => {}
        };
    };
    let mut bytes = proof.to_vec();
    let mut flip = |bit: usize, what: &str| {
        bytes[bit / 8] ^= 1 << (bit % 8);
        refused(&bytes, &format!("bit {bit} flipped: {what}"));
        bytes[bit / 8] ^= 1 << (bit % 8);
    };
    for bit in 0..HEADER * 8 {
        flip(bit, "header");
    }
    for (i, node) in (HEADER..proof.len()).step_by(NODE).enumerate() {
        flip(node * 8 + (i * 37) % 256, "one of each node");
    }
    let bits = proof.len() * 8;
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(200)
    });
    runner
        .run(&(0..bits), |bit| {
            let mut bytes = proof.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(verify(&bytes).is_err(), "bit {} flipped", bit);
            Ok(())
        })
        .unwrap();
    // Whole nodes: zero, the modulus, all ones, another node.
    let node = HEADER + NODE * 5;
    let modulus = {
        let mut minus_one = blstrs::Scalar::to_bytes_le(&-blstrs::Scalar::from(1u64));
        minus_one[0] += 1;
        minus_one
    };
    for value in [[0; NODE], modulus, [0xff; NODE]] {
        let mut bytes = proof.to_vec();
        bytes[node..node + NODE].copy_from_slice(&value);
        refused(&bytes, "a node replaced");
    }
    for len in (HEADER..proof.len()).step_by(NODE) {
        refused(&proof[..len], "truncation");
    }
    for len in [0, 1, HEADER - 1, HEADER + 1, proof.len() - 1] {
        refused(&proof[..len], "truncation");
    }
    for extra in [1, NODE, proof.len()] {
        let longer = [proof, &proof[..extra]].concat();
        refused(&longer, "extension");
        // The count raised to match.
        let mut counted = longer;
        let count = u32::from_le_bytes(counted[8..12].try_into().unwrap()) + 1;
        counted[8..12].copy_from_slice(&count.to_le_bytes());
        refused(&counted, "extension and count");
    }
    let mut none = proof[..HEADER].to_vec();
    none[8..12].fill(0);
    refused(&none, "an empty list");
}

proptest! {
    #[test]
    fn noise_is_no_proof(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        let (sector, proof) = &*SEALED;
        prop_assert!(sector.verify(&bytes).is_err());
        // Behind an honest header and at the right length as well.
        let mut long = proof[..HEADER].to_vec();
        long.extend(bytes.iter().cycle().take(proof.len() - HEADER));
        if bytes.is_empty() {
            return Ok(());
        }
        prop_assert!(sector.verify(&long).is_err());
    }
}

#[test]
fn the_writer_and_the_reader_agree() {
    use std::io::Write;
    let mut w = CommpWriter::new();
    w.write_all(&SEALED.0.piece).unwrap();
    assert_eq!(w.finish(), SEALED.0.layout[0].piece);
}
