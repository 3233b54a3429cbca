//! What SNARKs have in common with openings, and what is refused before a key is looked at. With
//! parameter files: `tests/groth16.rs`.

use super::*;
use crate::{ProofError, ProofMode, WindowPost};

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
