//! What SNARKs have in common with openings, and what is refused before a key is looked at. With
//! parameter files: `tests/groth16.rs`.

use super::*;
use crate::{AGGREGATE_SEALS, ProofError, ProofMode, SealInputs, WindowPost, aggregate_bytes};

const MINER: ActorId = ActorId(1000);
const SIZE: SectorSize = SectorSize::S2KiB;
const MODE: ProofMode = ProofMode::Groth16Post;

fn posts(sectors: &[&Sector]) -> Vec<PostSector> {
    sectors.iter().map(|s| s.post()).collect()
}

#[test]
fn modes_have_one_name_each() {
    for mode in ProofMode::ALL {
        assert_eq!(mode.to_string().parse(), Ok(mode));
        let json = serde_json::to_string(&mode).unwrap();
        assert_eq!(json, format!("\"{mode}\""));
        assert_eq!(serde_json::from_str::<ProofMode>(&json).unwrap(), mode);
    }
    let unknown = "none".parse::<ProofMode>().unwrap_err();
    assert!(unknown.to_string().contains("groth16-post"), "{unknown}");
    assert_eq!(ProofMode::default(), Vanilla);
}

/// What is refused before any parameter is looked at.
#[test]
fn a_snark_has_one_length_and_sound_public_inputs() {
    let (s, vanilla) = &*SEALED;
    let c = &s.commitments;
    let length = |got: Result<(), Refused>| match got {
        Err(Refused::Length { expected, .. }) => expected,
        other => panic!("{other:?}"),
    };
    let seal = |size, comm_r: &Commitment, proof: &[u8]| {
        let sector = SealingSector { size, ..s.sector };
        ProofMode::Groth16.verify_seal(&sector, &TICKET, &SEED, &c.comm_d, comm_r, proof)
    };
    assert_eq!(length(seal(SIZE, &c.comm_r, vanilla)), 192);
    assert_eq!(length(seal(SectorSize::S32GiB, &c.comm_r, &[0; 192])), 1920);
    let beyond = Commitment([0xff; 32]);
    let wrong = seal(SIZE, &beyond, &[0; 192]);
    assert!(matches!(wrong, Err(Refused::NotInField(_))), "{wrong:?}");

    let update =
        |size| ProofMode::Groth16.verify_update(size, &c.comm_r, &c.comm_r, &c.comm_d, &[]);
    assert_eq!(length(update(SIZE)), 192);
    assert_eq!(length(update(SectorSize::S32GiB)), 16 * 192);

    let window = |size, n: u64, proof: &[u8]| {
        let sectors: Vec<_> = (0..n).map(|n| (SectorNumber(n), c.comm_r)).collect();
        MODE.verify_window_post(MINER, size, &RANDOMNESS, &sectors, proof)
    };
    for (size, sectors, bytes) in [
        (SIZE, 1, 192),
        (SIZE, 2, 192),
        (SIZE, 3, 384),
        (SectorSize::S32GiB, 2349, 192),
        (SectorSize::S32GiB, 2350, 384),
    ] {
        assert_eq!(
            length(window(size, sectors, &[])),
            bytes,
            "{size} {sectors}"
        );
    }
    let none = window(SIZE, 0, &[]);
    assert!(matches!(none, Err(Refused::PublicInput(_))), "{none:?}");
    let own = s.public();
    for comm_r in [beyond, Commitment([0; 32]), c.comm_d] {
        let twice = [own, (own.0, comm_r)];
        let got = MODE.verify_window_post(MINER, SIZE, &RANDOMNESS, &twice, &[0; 192]);
        assert!(
            matches!(got, Err(Refused::PublicInput(_) | Refused::NotInField(_))),
            "{got:?}"
        );
    }
    let winning = MODE.verify_winning_post(MINER, SIZE, &RANDOMNESS, &[own], &[0; 384]);
    assert_eq!(length(winning), 192);
    let two = MODE.verify_winning_post(MINER, SIZE, &RANDOMNESS, &[own, own], &[0; 192]);
    assert!(matches!(two, Err(Refused::PublicInput(_))), "{two:?}");
}

/// The modes agree on what they do not make SNARKs of, and on who is faulty.
#[test]
fn what_is_no_snark_is_vanilla() {
    let (s, proof) = &*SEALED;
    let c = &s.commitments;
    MODE.verify_seal(&s.sector, &TICKET, &SEED, &c.comm_d, &c.comm_r, proof)
        .unwrap();
    let bad = Sector::small(6);
    fs::write(bad.path("sealed"), noise(5, 2048)).unwrap();
    for mode in ProofMode::ALL {
        assert_eq!(
            mode.window_post(MINER, SIZE, &RANDOMNESS, &posts(&[s, &bad]))
                .unwrap(),
            WindowPost::Faulty(vec![SectorNumber(6)]),
            "{mode}"
        );
        let winning = mode.winning_post(MINER, SIZE, &RANDOMNESS, &posts(&[&bad]));
        assert!(
            matches!(
                winning,
                Err(ProofError::Sector {
                    number: SectorNumber(6),
                    ..
                })
            ),
            "{mode}"
        );
    }
}

/// What is refused of aggregates before any parameter is looked at.
#[test]
fn an_aggregate_has_snarks_and_one_length() {
    let (s, vanilla) = &*SEALED;
    let mode = ProofMode::Groth16;
    let seal = SealInputs {
        number: s.sector.id.number,
        ticket: TICKET,
        seed: SEED,
        commitments: s.commitments,
    };
    let (min, max) = (*AGGREGATE_SEALS.start(), *AGGREGATE_SEALS.end());
    let make = |mode: ProofMode, seals: usize, proofs: usize, proof: &[u8]| {
        let (seals, proofs) = (vec![seal; seals], vec![proof.to_vec(); proofs]);
        mode.aggregate_seal_proofs(MINER, SIZE, &seals, &proofs)
            .unwrap_err()
    };
    for mode in [Vanilla, MODE] {
        let e = make(mode, min, min, vanilla);
        assert!(matches!(e, ProofError::NoAggregates(m) if m == mode), "{e}");
        let e = mode.verify_aggregate_seal_proofs(MINER, SIZE, &[seal; 4], vanilla);
        assert_eq!(e, Err(Refused::NoAggregates(mode)));
    }
    for (seals, proofs, proof) in [
        (0, 0, 192),
        (min - 1, min - 1, 192),
        (min, min + 1, 192),
        (max + 1, max + 1, 192),
        (min, min, 191),
    ] {
        let e = make(mode, seals, proofs, &vec![0; proof]);
        assert!(matches!(e, ProofError::BadInput { .. }), "{e}");
    }

    let check = |seals: &[SealInputs], bytes: usize| {
        mode.verify_aggregate_seal_proofs(MINER, SIZE, seals, &vec![0; bytes])
            .unwrap_err()
    };
    for count in [min - 1, max + 1] {
        let e = check(&vec![seal; count], aggregate_bytes(SIZE, count));
        assert!(matches!(e, Refused::PublicInput(_)), "{e}");
    }
    for (count, bytes) in [(min, 0), (min, 8_211), (min, 8_213), (min + 1, 8_212)] {
        let e = check(&vec![seal; count], bytes);
        assert!(matches!(e, Refused::Length { .. }), "{e}");
    }
    let mut beyond = [seal; 4];
    beyond[3].commitments.comm_r = Commitment([0xff; 32]);
    let e = check(&beyond, 8_212);
    assert!(matches!(e, Refused::NotInField(_)), "{e}");
}
