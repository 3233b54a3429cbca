//! The devnet's sector size, and the speeds that the documentation states.

use super::*;
use crate::{UpdatedSector, WindowPost, winning_challenge};
use std::time::Instant;

#[test]
fn an_8_mib_sector_goes_all_the_way() {
    let size = SectorSize::S8MiB;
    let miner = ActorId(1000);
    let mut at = Instant::now();
    let mut lap = |what: &str| {
        println!("{what}: {:?}", at.elapsed());
        at = Instant::now();
    };
    let s = Sector::seal(size, 7, noise(7, 5_000_001));
    lap("all of it up to PreCommit2");
    let proof = s.commit();
    lap("commit");
    s.verify(&proof).unwrap();
    lap("verify seal");
    println!("seal proof: {} bytes", proof.len());
    let mut wrong = proof.clone();
    *wrong.last_mut().unwrap() ^= 1;
    assert!(s.verify(&wrong).is_err());

    Vanilla.finalize(&s.sector, &s.path("cache")).unwrap();
    let public = [s.public()];
    at = Instant::now();
    let mut lap = |what: &str| {
        println!("{what}: {:?}", at.elapsed());
        at = Instant::now();
    };
    let WindowPost::Proved(proof) = Vanilla
        .window_post(miner, size, &RANDOMNESS, &[s.post()])
        .unwrap()
    else {
        panic!("the replica is good");
    };
    lap("window post");
    Vanilla
        .verify_window_post(miner, size, &RANDOMNESS, &public, &proof)
        .unwrap();
    lap("verify window post");
    println!("window post: {} bytes a sector", proof.len());
    assert_eq!(winning_challenge(miner, size, &RANDOMNESS, 1).unwrap(), [0]);
    let proof = Vanilla
        .winning_post(miner, size, &RANDOMNESS, &[s.post()])
        .unwrap();
    lap("winning post");
    Vanilla
        .verify_winning_post(miner, size, &RANDOMNESS, &public, &proof)
        .unwrap();
    lap("verify winning post");
    println!("winning post: {} bytes", proof.len());

    let paths = ["sealed", "cache", "updated", "updated-cache"].map(|n| s.path(n));
    let files = UpdatedSector {
        size,
        sealed: &paths[0],
        cache: &paths[1],
        updated: &paths[2],
        updated_cache: &paths[3],
    };
    let piece = noise(8, 7_000_000);
    let new_layout = place(size, &piece);
    let unsealed = s.path("unsealed");
    add_pieces(&unsealed, size, &new_layout, &mut from_memory(&piece)).unwrap();
    lap("add pieces");
    let new = Vanilla
        .replica_update(&files, &new_layout, &unsealed)
        .unwrap();
    lap("replica update");
    let old = &s.commitments.comm_r;
    let proof = Vanilla.prove_update(&files, old, &new).unwrap();
    lap("prove update");
    Vanilla
        .verify_update(size, old, &new.comm_r, &new.comm_d, &proof)
        .unwrap();
    lap("verify update");
    println!("update proof: {} bytes", proof.len());
    let mut out = Vec::new();
    Vanilla
        .unseal_update(
            &files,
            &new.comm_d,
            &mut out,
            crate::UnpaddedOffset(1000),
            6_000_000,
        )
        .unwrap();
    lap("unseal update");
    assert!(out == piece[1000..6_001_000]);

    assert!(s.unseal(1, 5_000_000) == s.piece[1..]);
    lap("unseal");
}

/// Prints commP's throughput, the best of five runs.
#[test]
fn commp_speed() {
    use std::io::Write;
    let bytes = noise(1, 127 << 18);
    let best = |what: &str, f: &dyn Fn() -> PieceInfo| {
        let runs = (0..5).map(|_| {
            let start = Instant::now();
            (f(), start.elapsed())
        });
        let (piece, time) = runs.min_by_key(|(_, time)| *time).unwrap();
        println!(
            "{what}: {:.2} GB/s",
            bytes.len() as f64 / 1e9 / time.as_secs_f64()
        );
        piece
    };
    let one = best("commP, one thread", &|| {
        let mut w = CommpWriter::new();
        w.write_all(&bytes).unwrap();
        w.finish()
    });
    let all = best("commP, all threads", &|| commp(bytes.as_slice()).unwrap());
    assert_eq!(one, all);
}

/// The sizes that a test can not seal have the network's counts, and total verifiers.
#[test]
fn every_size_has_its_statements() {
    use crate::verify::codec::ProofKind;
    use crate::verify::{post::PostStatement, seal::SealStatement, update::UpdateStatement};
    let zero = Commitment([0; 32]);
    let miner = ActorId(1000);
    for (size, seal, update) in [
        (SectorSize::S2KiB, 2, 10),
        (SectorSize::S8MiB, 2, 40),
        (SectorSize::S512MiB, 2, 1376),
        (SectorSize::S32GiB, 180, 1376),
        (SectorSize::S64GiB, 180, 1376),
    ] {
        let leaves = size.bytes() / 32;
        let id = SectorId {
            miner,
            number: SectorNumber(u64::MAX),
        };
        let sector = SealingSector { id, size };
        let s = SealStatement::new(&sector, &TICKET, &SEED, &zero, &zero).unwrap();
        assert_eq!(s.challenges.len(), seal, "{size}");
        for &c in &s.challenges {
            assert!(c > 0 && (c as u64) < leaves);
            assert!(s.parents(c).unwrap().iter().all(|&p| u64::from(p) < leaves));
        }
        let u = UpdateStatement::new(size, &zero, &zero, &zero).unwrap();
        assert_eq!(u.challenges.len(), update, "{size}");
        for (kind, count) in [(ProofKind::Window, 10), (ProofKind::Winning, 66)] {
            let p = PostStatement::new(kind, miner, size, &RANDOMNESS, 1).unwrap();
            let challenges = p.challenges(id.number);
            assert_eq!(challenges.len(), count, "{size}");
            assert!(challenges.iter().all(|&c| c < leaves));
        }
        // A proof of zeros, at the right length, is refused by the first binding.
        let expected =
            match Vanilla.verify_seal(&sector, &TICKET, &SEED, &zero, &zero, &s.header.bytes()) {
                Err(Refused::Length { expected, .. }) => usize::try_from(expected).unwrap(),
                other => panic!("{other:?}"),
            };
        println!("{size}: a seal proof has {expected} bytes");
        let mut zeros = s.header.bytes().to_vec();
        zeros.resize(expected, 0);
        assert!(matches!(
            Vanilla.verify_seal(&sector, &TICKET, &SEED, &zero, &zero, &zeros),
            Err(Refused::Wrong {
                what: crate::Check::CommR,
                ..
            })
        ));
    }
}
