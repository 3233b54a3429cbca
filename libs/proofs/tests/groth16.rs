//! Sectors are sealed for real and proven by SNARKs, and each proof is then attacked. Needs
//! parameter files: `cargo xtask test --groth16` makes them and runs this.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Cursor;
use std::path::PathBuf;

use lotus_proofs::{
    PlacedPiece, PostSector, ProofMode, Prover as _, Refused, SealInputs, SealedCommitments,
    SealingSector, Seed, Ticket, UpdatedSector, Vanilla, Verifier as _, WindowPost, add_pieces,
    commp, layout,
};
use lotus_types::{ActorId, Commitment, SectorId, SectorNumber, SectorSize};
use tempfile::TempDir;

const TICKET: Ticket = [7; 32];
const SEED: Seed = [9; 32];
const RANDOMNESS: [u8; 32] = [0xc5; 32];
const MINER: ActorId = ActorId(1000);
const SIZE: SectorSize = SectorSize::S2KiB;
const MODE: ProofMode = ProofMode::Groth16Post;

/// A sealed sector with its files.
struct Sector {
    dir: TempDir,
    sector: SealingSector,
    layout: Vec<PlacedPiece>,
    commitments: SealedCommitments,
}

impl Sector {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn seal(number: u64, piece: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let number = SectorNumber(number);
        let sector = SealingSector {
            id: SectorId {
                miner: MINER,
                number,
            },
            size: SIZE,
        };
        let [unsealed, sealed, cache] = ["unsealed", "sealed", "cache"].map(|n| dir.path().join(n));
        let layout = lay_out(&unsealed, piece);
        let pc1 = Vanilla
            .pre_commit1(&sector, &TICKET, &layout, &unsealed, &sealed, &cache)
            .unwrap();
        let commitments = Vanilla.pre_commit2(&sector, &pc1, &sealed, &cache).unwrap();
        Self {
            dir,
            sector,
            layout,
            commitments,
        }
    }

    fn small(number: u64) -> Self {
        Self::seal(number, &noise(number, 1500))
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
}

/// Writes a piece as the data of a sector.
fn lay_out(unsealed: &std::path::Path, piece: &[u8]) -> Vec<PlacedPiece> {
    let layout = layout(SIZE, &[commp(piece).unwrap()]).unwrap();
    add_pieces(unsealed, SIZE, &layout, &mut |_| {
        Ok(Box::new(Cursor::new(piece.to_vec())))
    })
    .unwrap();
    layout
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

fn posts(sectors: &[&Sector]) -> Vec<PostSector> {
    sectors.iter().map(|s| s.post()).collect()
}

fn proved(sectors: &[&Sector]) -> Vec<u8> {
    match MODE.window_post(MINER, SIZE, &RANDOMNESS, &posts(sectors)) {
        Ok(WindowPost::Proved(proof)) => proof,
        other => panic!("{other:?}"),
    }
}

fn refused(what: &str, got: Result<(), Refused>) {
    if let Refused::Internal(why) = got.expect_err(what) {
        panic!("{what}: {why}");
    }
}

/// One bit of each byte flipped, in turn; other lengths; noise; zeros.
fn no_change_survives(proof: &[u8], verify: impl Fn(&[u8]) -> Result<(), Refused>) {
    verify(proof).unwrap();
    let mut bytes = proof.to_vec();
    for i in 0..proof.len() {
        let bit = 1 << (i * 5 % 8);
        bytes[i] ^= bit;
        refused(&format!("byte {i}"), verify(&bytes));
        bytes[i] ^= bit;
    }
    for len in [0, 1, proof.len() - 1] {
        refused("truncation", verify(&proof[..len]));
    }
    refused("extension", verify(&[proof, &[0]].concat()));
    refused("twice", verify(&[proof, proof].concat()));
    refused("noise", verify(&noise(3, proof.len())));
    refused("zeros", verify(&vec![0; proof.len()]));
    refused("ones", verify(&vec![0xff; proof.len()]));
}

#[test]
#[ignore = "needs parameters: cargo xtask test --groth16"]
fn a_window_post_is_a_snark() {
    let (a, b, c) = (Sector::small(1), Sector::small(2), Sector::small(3));
    Vanilla.finalize(&a.sector, &a.path("cache")).unwrap();
    let proof = proved(&[&a, &b]);
    assert_eq!(proof.len(), 192);
    let sectors = [a.public(), b.public()];
    let check = |sectors: &[_], proof: &[u8]| {
        MODE.verify_window_post(MINER, SIZE, &RANDOMNESS, sectors, proof)
    };
    no_change_survives(&proof, |p| check(&sectors, p));
    ProofMode::Groth16
        .verify_window_post(MINER, SIZE, &RANDOMNESS, &sectors, &proof)
        .unwrap();
    // As on the network, the order does not count.
    check(&[b.public(), a.public()], &proof).unwrap();
    let crossed = [(a.public().0, b.public().1), (b.public().0, a.public().1)];
    for (what, got) in [
        ("crossed commitments", check(&crossed, &proof)),
        (
            "another number",
            check(&[(SectorNumber(9), a.public().1), b.public()], &proof),
        ),
        ("one sector of two", check(&sectors[..1], &proof)),
        ("another sector", check(&[a.public(), c.public()], &proof)),
        (
            "a sector more",
            check(&[a.public(), b.public(), c.public()], &proof),
        ),
        (
            "other randomness",
            MODE.verify_window_post(MINER, SIZE, &[1; 32], &sectors, &proof),
        ),
        (
            "as a WinningPoSt",
            MODE.verify_winning_post(MINER, SIZE, &RANDOMNESS, &sectors[..1], &proof),
        ),
        (
            "as a vanilla proof",
            Vanilla.verify_window_post(MINER, SIZE, &RANDOMNESS, &sectors, &proof),
        ),
    ] {
        refused(what, got);
    }

    // The circuit knows the miner by the randomness alone, which chains draw with its address.
    MODE.verify_window_post(ActorId(1), SIZE, &RANDOMNESS, &sectors, &proof)
        .unwrap();

    // A damaged sector is named; a good one takes its place, and then stands there twice.
    fs::write(b.path("sealed"), noise(5, 2048)).unwrap();
    assert_eq!(
        MODE.window_post(MINER, SIZE, &RANDOMNESS, &posts(&[&a, &b]))
            .unwrap(),
        WindowPost::Faulty(vec![SectorNumber(2)])
    );
    check(&[a.public(), a.public()], &proved(&[&a, &a])).unwrap();

    // Three sectors are two partitions of the circuit.
    let d = Sector::small(4);
    let proof = proved(&[&d, &a, &c]);
    assert_eq!(proof.len(), 384);
    let sectors = [a.public(), c.public(), d.public()];
    check(&sectors, &proof).unwrap();
    let swapped = [&proof[192..], &proof[..192]].concat();
    refused("swapped partitions", check(&sectors, &swapped));
}

#[test]
#[ignore = "needs parameters: cargo xtask test --groth16"]
fn a_winning_post_is_a_snark() {
    let (s, other) = (Sector::small(1), Sector::small(2));
    let proof = MODE
        .winning_post(MINER, SIZE, &RANDOMNESS, &posts(&[&s]))
        .unwrap();
    assert_eq!(proof.len(), 192);
    let check = |randomness, sector, proof: &[u8]| {
        MODE.verify_winning_post(MINER, SIZE, randomness, &[sector], proof)
    };
    no_change_survives(&proof, |p| check(&RANDOMNESS, s.public(), p));
    refused("randomness", check(&[1; 32], s.public(), &proof));
    refused("sector", check(&RANDOMNESS, other.public(), &proof));
    let renumbered = (SectorNumber(2), s.public().1);
    refused("number", check(&RANDOMNESS, renumbered, &proof));
}

#[test]
#[ignore = "needs all parameters, of minutes and gigabytes: cargo xtask test --groth16 --porep"]
fn a_porep_is_a_snark() {
    let mode = ProofMode::Groth16;
    let s = Sector::small(1);
    let c = &s.commitments;
    let (sealed, cache) = (s.path("sealed"), s.path("cache"));
    let proof = mode
        .commit(&s.sector, &TICKET, &SEED, &s.layout, c, &sealed, &cache)
        .unwrap();
    let check = |seed: &Seed, comm_d: &Commitment, proof: &[u8]| {
        mode.verify_seal(&s.sector, &TICKET, seed, comm_d, &c.comm_r, proof)
    };
    no_change_survives(&proof, |p| check(&SEED, &c.comm_d, p));
    refused("seed", check(&[1; 32], &c.comm_d, &proof));
    refused("data", check(&SEED, &c.comm_r, &proof));
}

#[test]
#[ignore = "needs all parameters, of minutes and gigabytes: cargo xtask test --groth16 --porep"]
fn a_porep_update_is_a_snark() {
    let mode = ProofMode::Groth16;
    let old = Sector::seal(1, &[0; 2032]);
    Vanilla.finalize(&old.sector, &old.path("cache")).unwrap();
    let [sealed, cache, updated, updated_cache, unsealed] =
        ["sealed", "cache", "updated", "updated-cache", "new"].map(|n| old.path(n));
    let files = UpdatedSector {
        size: SIZE,
        sealed: &sealed,
        cache: &cache,
        updated: &updated,
        updated_cache: &updated_cache,
    };
    let layout = lay_out(&unsealed, &noise(9, 1800));
    let new = mode.replica_update(&files, &layout, &unsealed).unwrap();
    let old_r = &old.commitments.comm_r;
    let proof = mode.prove_update(&files, old_r, &new).unwrap();
    let check = |old_r, r, d, proof: &[u8]| mode.verify_update(SIZE, old_r, r, d, proof);
    no_change_survives(&proof, |p| check(old_r, &new.comm_r, &new.comm_d, p));
    refused("old", check(&new.comm_r, &new.comm_r, &new.comm_d, &proof));
    refused(
        "data",
        check(old_r, &new.comm_r, &old.commitments.comm_d, &proof),
    );
}

/// Four seals in one proof, which knows each of them, their order and their number.
#[test]
#[ignore = "needs all parameters, of minutes and gigabytes: cargo xtask test --groth16 --porep"]
fn a_porep_aggregate_is_of_these_seals() {
    let mode = ProofMode::Groth16;
    let (mut seals, mut proofs) = (Vec::new(), Vec::new());
    for number in 1..=5 {
        let s = Sector::small(number);
        let c = &s.commitments;
        let (sealed, cache) = (s.path("sealed"), s.path("cache"));
        let seed = noise_32(number);
        proofs.push(
            mode.commit(&s.sector, &TICKET, &seed, &s.layout, c, &sealed, &cache)
                .unwrap(),
        );
        seals.push(SealInputs {
            number: s.sector.id.number,
            ticket: TICKET,
            seed,
            commitments: *c,
        });
    }
    let make = |seals: &[SealInputs], proofs: &[Vec<u8>]| {
        mode.aggregate_seal_proofs(MINER, SIZE, seals, proofs)
    };
    let start = std::time::Instant::now();
    let proof = make(&seals[..4], &proofs[..4]).unwrap();
    println!("aggregate of four: {:?}", start.elapsed());
    assert_eq!(proof.len(), 8_212);
    let check = |seals: &[SealInputs], proof: &[u8]| {
        mode.verify_aggregate_seal_proofs(MINER, SIZE, seals, proof)
    };
    let start = std::time::Instant::now();
    check(&seals[..4], &proof).unwrap();
    println!("verified: {:?}", start.elapsed());

    let four: [SealInputs; 4] = seals[..4].try_into().unwrap();
    for at in 0..4 {
        let changed = |change: fn(&mut SealInputs, &SealInputs)| {
            let mut seals = four;
            change(&mut seals[at], &four[(at + 1) % 4]);
            check(&seals, &proof)
        };
        refused("number", changed(|s, _| s.number.0 += 10));
        refused("ticket", changed(|s, _| s.ticket[0] ^= 1));
        refused("seed", changed(|s, other| s.seed = other.seed));
        refused(
            "comm_r",
            changed(|s, other| s.commitments.comm_r = other.commitments.comm_r),
        );
        refused(
            "comm_d",
            changed(|s, other| s.commitments.comm_d = other.commitments.comm_d),
        );
        refused("another sector", changed(|s, other| *s = *other));
        let mut swapped = four;
        swapped.swap(at, (at + 1) % 4);
        refused("order", check(&swapped, &proof));
    }
    refused("fewer", check(&four[..3], &proof));
    refused("more", check(&seals, &proof));
    let miner = mode.verify_aggregate_seal_proofs(ActorId(1001), SIZE, &four, &proof);
    refused("miner", miner);
    // Bytes of every part: the points, the number of SNARKs, the folding, the openings.
    for at in (0..proof.len()).step_by(97).chain(1_488..1_492) {
        let mut bytes = proof.clone();
        bytes[at] ^= 1 << (at % 8);
        refused(&format!("byte {at}"), check(&four, &bytes));
    }
    refused("a byte more", check(&four, &[&proof[..], &[0]].concat()));
    refused("noise", check(&four, &noise(3, proof.len())));
    refused("zeros", check(&four, &vec![0; proof.len()]));
    refused("as a seal", {
        let sector = SealingSector {
            id: SectorId {
                miner: MINER,
                number: four[0].number,
            },
            size: SIZE,
        };
        let (c, ticket, seed) = (&four[0].commitments, &four[0].ticket, &four[0].seed);
        mode.verify_seal(&sector, ticket, seed, &c.comm_d, &c.comm_r, &proof)
    });

    // Five are padded to eight; the padding is no sector.
    let five = make(&seals, &proofs).unwrap();
    check(&seals, &five).unwrap();
    refused(
        "the padding",
        check(&[&seals[..], &seals[4..]].concat(), &five),
    );
    // A proof at another's place makes no aggregate.
    let mut crossed = proofs[..4].to_vec();
    crossed.swap(0, 1);
    make(&four, &crossed).unwrap_err();
}

fn noise_32(seed: u64) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(&noise(seed, 32));
    bytes
}
