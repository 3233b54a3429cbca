use super::*;
use crate::prove::post::read_openings;
use crate::verify::codec::ProofKind;
use crate::verify::post::PostStatement;
use crate::{ProofError, ProofMode, WindowPost, winning_challenge};

const MINER: ActorId = ActorId(1000);
const SIZE: SectorSize = SectorSize::S2KiB;

fn window(sectors: &[&Sector]) -> WindowPost {
    let sectors: Vec<_> = sectors.iter().map(|s| s.post()).collect();
    Vanilla
        .window_post(MINER, SIZE, &RANDOMNESS, &sectors)
        .unwrap()
}

fn proved(sectors: &[&Sector]) -> Vec<u8> {
    match window(sectors) {
        WindowPost::Proved(proof) => proof,
        WindowPost::Faulty(f) => panic!("faulty: {f:?}"),
    }
}

fn check(sectors: &[(SectorNumber, Commitment)], proof: &[u8]) -> Result<(), Refused> {
    Vanilla.verify_window_post(MINER, SIZE, &RANDOMNESS, sectors, proof)
}

#[test]
fn a_window_post_survives_no_change() {
    let (a, b) = (Sector::small(1), Sector::small(2));
    Vanilla.finalize(&a.sector, &a.path("cache")).unwrap();
    let sectors = [a.public(), b.public()];
    let proof = proved(&[&a, &b]);
    survives_nothing(&proof, |p| check(&sectors, p));

    let swapped = [b.public(), a.public()];
    let crossed = [(a.public().0, b.public().1), (b.public().0, a.public().1)];
    let renumbered = [(SectorNumber(9), a.public().1), b.public()];
    for (what, got) in [
        ("swapped sectors", check(&swapped, &proof)),
        ("crossed commitments", check(&crossed, &proof)),
        ("another number", check(&renumbered, &proof)),
        ("one sector of two", check(&sectors[..1], &proof)),
        ("one sector twice", check(&[a.public(), a.public()], &proof)),
        ("no sectors", check(&[], &proof)),
        (
            "other randomness",
            Vanilla.verify_window_post(MINER, SIZE, &[1; 32], &sectors, &proof),
        ),
        (
            "another miner",
            Vanilla.verify_window_post(ActorId(1), SIZE, &RANDOMNESS, &sectors, &proof),
        ),
        (
            "another size",
            Vanilla.verify_window_post(MINER, SectorSize::S32GiB, &RANDOMNESS, &sectors, &proof),
        ),
        (
            "as a WinningPoSt",
            Vanilla.verify_winning_post(MINER, SIZE, &RANDOMNESS, &sectors[..1], &proof),
        ),
    ] {
        let refused = got.expect_err(what);
        assert!(
            !matches!(refused, Refused::Internal(_)),
            "{what}: {refused}"
        );
    }
    // A faulty sector's place is taken by a good one.
    check(&[a.public(), a.public()], &proved(&[&a, &a])).unwrap();
    // The two highest bits of randomness do not count, as on the network.
    let mut masked = RANDOMNESS;
    masked[31] &= 0x3f;
    Vanilla
        .verify_window_post(MINER, SIZE, &masked, &sectors, &proof)
        .unwrap();
}

/// The second step alone takes the openings of its own statement, and no others.
#[test]
fn a_proof_of_opened_sectors_needs_right_openings() {
    let (a, b) = (Sector::small(1), Sector::small(2));
    let sectors = [a.public(), b.public()];
    let openings = proved(&[&a, &b]);
    let of = |mode: ProofMode, randomness, sectors: &[_], openings: &[u8]| {
        mode.window_post_of(MINER, SIZE, randomness, sectors, openings)
    };
    let proof = of(Vanilla, &RANDOMNESS, &sectors, &openings).unwrap();
    assert_eq!(proof, openings);
    survives_nothing(&openings, |o| match of(Vanilla, &RANDOMNESS, &sectors, o) {
        Ok(_) => Ok(()),
        Err(ProofError::Unsound(why)) => Err(why),
        Err(e) => panic!("{e}"),
    });
    assert!(of(Vanilla, &[1; 32], &sectors, &openings).is_err());
    // Before any parameter is looked for.
    let snark = ProofMode::Groth16Post;
    for bad in [
        &openings[..openings.len() - 1],
        &[],
        &[openings.as_slice(), &[0]].concat(),
    ] {
        let got = of(snark, &RANDOMNESS, &sectors, bad);
        assert!(matches!(got, Err(ProofError::Unsound(_))), "{got:?}");
    }
    let one = of(snark, &RANDOMNESS, &sectors[..1], &openings);
    assert!(matches!(one, Err(ProofError::Unsound(_))), "{one:?}");
    let block = Vanilla.winning_post(MINER, SIZE, &RANDOMNESS, &[a.post()]);
    let block = block.unwrap();
    let again = Vanilla.winning_post_of(MINER, SIZE, &RANDOMNESS, &sectors[..1], &block);
    assert_eq!(again.unwrap(), block);
    assert!(of(Vanilla, &RANDOMNESS, &sectors[..1], &block).is_err());
}

#[test]
fn the_length_of_a_proof_is_known_before() {
    let (a, b) = (Sector::small(1), Sector::small(2));
    let proof = proved(&[&a, &b]);
    assert_eq!(proof.len() as u64, crate::window_post_bytes(SIZE, 2));
}

#[test]
fn a_check_reads_files_or_leaves() {
    let good = Sector::small(1);
    let files = |s: &Sector| crate::check_sector(MINER, SIZE, None, &s.post());
    let leaves = |s: &Sector| crate::check_sector(MINER, SIZE, Some(&RANDOMNESS), &s.post());
    assert!(files(&good).is_ok() && leaves(&good).is_ok());

    // Overwritten throughout: its length tells nothing.
    let sealed = good.path("sealed");
    let bytes = std::fs::read(&sealed).unwrap();
    std::fs::write(&sealed, vec![0x5a; bytes.len()]).unwrap();
    assert!(files(&good).is_ok() && leaves(&good).is_err());
    // Cut short, gone, or without its trees.
    std::fs::write(&sealed, &bytes[1..]).unwrap();
    assert!(files(&good).is_err());
    std::fs::remove_file(&sealed).unwrap();
    assert!(files(&good).is_err());
    std::fs::write(&sealed, &bytes).unwrap();
    assert!(files(&good).is_ok());
    for entry in std::fs::read_dir(good.path("cache")).unwrap() {
        let path = entry.unwrap().path();
        if path.to_string_lossy().contains("tree-r-last") {
            std::fs::remove_file(path).unwrap();
        }
    }
    assert!(files(&good).is_err());
}

#[test]
fn damaged_replicas_are_faulty() {
    let good = Sector::small(1);
    let number = SectorNumber(6);
    let faulty = |what: &str, damage: &dyn Fn(&Sector)| {
        let bad = Sector::small(number.0);
        proved(&[&bad]);
        damage(&bad);
        assert_eq!(
            window(&[&good, &bad]),
            WindowPost::Faulty(vec![number]),
            "{what}"
        );
        let alone = Vanilla.winning_post(MINER, SIZE, &RANDOMNESS, &[bad.post()]);
        assert!(
            matches!(alone, Err(ProofError::Sector { number: n, .. }) if n == number),
            "{what}"
        );
    };
    faulty("a challenged leaf", &|s| {
        let statement = |kind| PostStatement::new(kind, MINER, SIZE, &RANDOMNESS, 1).unwrap();
        s.damage_leaf(statement(ProofKind::Window).challenges(number)[3]);
        s.damage_leaf(statement(ProofKind::Winning).challenges(number)[0]);
    });
    faulty("overwritten throughout", &|s| {
        fs::write(s.path("sealed"), noise(5, 2048)).unwrap();
    });
    faulty("all zeros", &|s| {
        fs::write(s.path("sealed"), [0; 2048]).unwrap()
    });
    faulty("beyond the field", &|s| {
        fs::write(s.path("sealed"), [0xff; 2048]).unwrap()
    });
    faulty("missing replica", &|s| {
        fs::remove_file(s.path("sealed")).unwrap()
    });
    faulty("short replica", &|s| {
        fs::write(s.path("sealed"), [1; 100]).unwrap()
    });
    faulty("empty replica", &|s| {
        fs::write(s.path("sealed"), []).unwrap()
    });
    faulty("missing cache", &|s| {
        fs::remove_dir_all(s.path("cache")).unwrap()
    });
    faulty("short replica tree", &|s| {
        fs::write(s.path("cache").join("sc-02-data-tree-r-last.dat"), [1]).unwrap();
    });
    faulty("wrong aux", &|s| {
        let aux = s.path("cache").join("p_aux");
        let mut bytes = fs::read(&aux).unwrap();
        bytes[0] ^= 1;
        fs::write(aux, bytes).unwrap();
    });
    faulty("another sector's files", &|s| {
        fs::copy(good.path("sealed"), s.path("sealed")).unwrap();
        for file in fs::read_dir(good.path("cache")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), s.path("cache").join(file.file_name())).unwrap();
        }
    });
}

#[test]
fn a_winning_post_survives_no_change() {
    let s = Sector::small(1);
    let proof = Vanilla
        .winning_post(MINER, SIZE, &RANDOMNESS, &[s.post()])
        .unwrap();
    let check = |miner, randomness, sectors: &[_], proof: &[u8]| {
        Vanilla.verify_winning_post(miner, SIZE, randomness, sectors, proof)
    };
    let own = [s.public()];
    survives_nothing(&proof, |p| check(MINER, &RANDOMNESS, &own, p));
    let other = Sector::small(2);
    assert!(check(MINER, &[1; 32], &own, &proof).is_err());
    assert!(check(ActorId(2), &RANDOMNESS, &own, &proof).is_err());
    assert!(check(MINER, &RANDOMNESS, &[other.public()], &proof).is_err());
    assert!(check(MINER, &RANDOMNESS, &[(SectorNumber(2), own[0].1)], &proof).is_err());
    assert!(check(MINER, &RANDOMNESS, &[own[0], own[0]], &proof).is_err());
    assert!(check(MINER, &RANDOMNESS, &[], &proof).is_err());
    let window = Vanilla.verify_window_post(MINER, SIZE, &RANDOMNESS, &own, &proof);
    assert!(window.is_err());
}

#[test]
fn a_winning_challenge_names_one_eligible_sector() {
    let pick = |miner, randomness: &[u8; 32], eligible| {
        winning_challenge(ActorId(miner), SIZE, randomness, eligible)
    };
    for eligible in [1, 2, 1000] {
        let picked = pick(1000, &RANDOMNESS, eligible).unwrap();
        assert_eq!(picked.len(), 1);
        assert!(picked[0] < eligible);
    }
    assert!(pick(1000, &RANDOMNESS, 0).is_err());
    let many = u64::MAX;
    let base = pick(1000, &RANDOMNESS, many).unwrap();
    assert_eq!(pick(1000, &RANDOMNESS, many).unwrap(), base);
    assert_ne!(pick(1001, &RANDOMNESS, many).unwrap(), base);
    assert_ne!(pick(1000, &[0; 32], many).unwrap(), base);
}

/// The library's own challenges and its own check agree with ours.
#[test]
fn the_library_accepts_the_same_openings() {
    use filecoin_proofs::constants::SectorShapeBase as Tree;
    use filecoin_proofs::{
        PrivateReplicaInfo, generate_fallback_sector_challenges, generate_single_vanilla_proof,
        parameters::{window_post_public_params, winning_post_public_params},
        partition_vanilla_proofs,
    };
    use storage_proofs_post::fallback::{PublicInputs, PublicSector};

    let (s, _) = &*SEALED;
    let mut randomness = RANDOMNESS;
    randomness[31] &= 0x3f;
    let prover = crate::network::prover_id(MINER);
    let id = s.sector.id.number;
    for kind in [ProofKind::Window, ProofKind::Winning] {
        let ours = PostStatement::new(kind, MINER, SIZE, &RANDOMNESS, 1).unwrap();
        let theirs = generate_fallback_sector_challenges::<Tree>(
            &ours.config,
            &randomness,
            &[id.0.into()],
            prover,
        )
        .unwrap();
        assert_eq!(theirs[&id.0.into()], ours.challenges(id));
        let replica = PrivateReplicaInfo::<Tree>::new(
            s.path("sealed"),
            s.commitments.comm_r.0,
            s.path("cache"),
        )
        .unwrap();
        let proof = generate_single_vanilla_proof(
            &ours.config,
            id.0.into(),
            &replica,
            &ours.challenges(id),
        )
        .unwrap();
        let winning = kind == ProofKind::Winning;
        // What crosses to another process and back is what the library made.
        let openings = if winning {
            Vanilla
                .winning_post(MINER, SIZE, &RANDOMNESS, &[s.post()])
                .unwrap()
        } else {
            proved(&[s])
        };
        let read = read_openings::<Tree>(&ours, &[s.public()], &openings).unwrap();
        assert_eq!(
            bincode::serialize(&read[0]).unwrap(),
            bincode::serialize(&proof).unwrap()
        );
        let params = if winning {
            winning_post_public_params::<Tree>(&ours.config)
        } else {
            window_post_public_params::<Tree>(&ours.config)
        }
        .unwrap();
        let sector = PublicSector {
            id: id.0.into(),
            comm_r: s.commitments.comm_r.0.into(),
        };
        let inputs = PublicInputs {
            randomness: randomness.into(),
            prover_id: prover.into(),
            sectors: vec![sector; if winning { params.sector_count } else { 1 }],
            k: None,
        };
        // It verifies what it partitions.
        partition_vanilla_proofs(&ours.config, &params, &inputs, 1, &[proof]).unwrap();
    }
}
