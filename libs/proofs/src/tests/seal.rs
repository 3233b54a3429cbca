use super::*;
use crate::verify::codec::Nodes;
use crate::verify::seal::{PARENTS, SealStatement};
use crate::{Check, UpdatedSector};
use storage_proofs_core::merkle::MerkleProofTrait;

#[test]
fn a_seal_proof_survives_no_change() {
    let (sector, proof) = &*SEALED;
    survives_nothing(proof, |p| sector.verify(p));
}

#[test]
fn a_seal_proof_holds_for_one_statement_only() {
    let (s, proof) = &*SEALED;
    let c = &s.commitments;
    let other = Sector::small(2);
    let check = |sector: &SealingSector, ticket, seed, comm_d, comm_r, proof: &[u8]| {
        Vanilla.verify_seal(sector, ticket, seed, comm_d, comm_r, proof)
    };
    let number = SealingSector {
        id: SectorId {
            number: SectorNumber(2),
            ..s.sector.id
        },
        ..s.sector
    };
    let miner = SealingSector {
        id: SectorId {
            miner: ActorId(1001),
            ..s.sector.id
        },
        ..s.sector
    };
    // As an attacker would: with a header for the other miner.
    let mut restamped = proof.clone();
    restamped[12..HEADER].copy_from_slice(&1001u64.to_le_bytes());
    let larger = SealingSector {
        size: SectorSize::S8MiB,
        ..s.sector
    };
    let (d, r) = (&c.comm_d, &c.comm_r);
    let (od, or) = (&other.commitments.comm_d, &other.commitments.comm_r);
    let zero = &Commitment([0; 32]);
    let beyond = &Commitment([0xff; 32]);
    for (what, got) in [
        ("ticket", check(&s.sector, &[8; 32], &SEED, d, r, proof)),
        ("seed", check(&s.sector, &TICKET, &[8; 32], d, r, proof)),
        ("number", check(&number, &TICKET, &SEED, d, r, proof)),
        ("miner", check(&miner, &TICKET, &SEED, d, r, proof)),
        (
            "miner, restamped",
            check(&miner, &TICKET, &SEED, d, r, &restamped),
        ),
        ("size", check(&larger, &TICKET, &SEED, d, r, proof)),
        ("comm_d", check(&s.sector, &TICKET, &SEED, od, r, proof)),
        ("comm_r", check(&s.sector, &TICKET, &SEED, d, or, proof)),
        (
            "zero comm_d",
            check(&s.sector, &TICKET, &SEED, zero, r, proof),
        ),
        (
            "zero comm_r",
            check(&s.sector, &TICKET, &SEED, d, zero, proof),
        ),
        (
            "comm_d beyond the field",
            check(&s.sector, &TICKET, &SEED, beyond, r, proof),
        ),
        (
            "comm_r beyond the field",
            check(&s.sector, &TICKET, &SEED, d, beyond, proof),
        ),
        (
            "another sector's proof",
            check(&s.sector, &TICKET, &SEED, d, r, &other.commit()),
        ),
        (
            "swapped",
            check(&other.sector, &TICKET, &SEED, od, or, proof),
        ),
    ] {
        let refused = got.expect_err(what);
        assert!(
            !matches!(refused, Refused::Internal(_)),
            "{what}: {refused}"
        );
    }
    check(&s.sector, &TICKET, &SEED, d, r, proof).unwrap();
}

/// Openings of an honest sector at the challenges of another ticket: every path is right, and
/// the labels, which depend on the ticket, are not.
#[test]
fn labels_are_recomputed() {
    let (s, _) = &*SEALED;
    let c = &s.commitments;
    let statement = SealStatement::new(&s.sector, &[1; 32], &SEED, &c.comm_d, &c.comm_r).unwrap();
    let made = crate::prove::seal::open::<filecoin_proofs::constants::SectorShapeBase>(
        &statement,
        &s.path("sealed"),
        &s.path("cache"),
    )
    .unwrap();
    let got = statement.verify(&made);
    assert!(
        matches!(
            got,
            Err(Refused::Wrong {
                what: Check::Label,
                ..
            })
        ),
        "{got:?}"
    );
}

/// A replica under the same labels that encodes other data: the updated replica of a snap deal.
/// Its comm_r is consistent, every path and label is right, the encoding is not.
#[test]
fn the_encoding_is_recomputed() {
    let s = Sector::small(3);
    let (updated, updated_cache) = (s.path("updated"), s.path("updated-cache"));
    let (sealed, cache, unsealed) = (s.path("sealed"), s.path("cache"), s.path("unsealed-2"));
    let piece = noise(99, 2000);
    let new_layout = place(s.sector.size, &piece);
    add_pieces(
        &unsealed,
        s.sector.size,
        &new_layout,
        &mut from_memory(&piece),
    )
    .unwrap();
    let files = UpdatedSector {
        size: s.sector.size,
        sealed: &sealed,
        cache: &cache,
        updated: &updated,
        updated_cache: &updated_cache,
    };
    let new = Vanilla
        .replica_update(&files, &new_layout, &unsealed)
        .unwrap();
    for file in ["p_aux", "sc-02-data-tree-r-last.dat"] {
        fs::copy(updated_cache.join(file), cache.join(file)).unwrap();
    }
    let comm_d = &s.commitments.comm_d;
    let statement = SealStatement::new(&s.sector, &TICKET, &SEED, comm_d, &new.comm_r).unwrap();
    let made = crate::prove::seal::open::<filecoin_proofs::constants::SectorShapeBase>(
        &statement, &updated, &cache,
    )
    .unwrap();
    let got = statement.verify(&made);
    assert!(
        matches!(
            got,
            Err(Refused::Wrong {
                what: Check::Encoding,
                ..
            })
        ),
        "{got:?}"
    );
}

/// The library opens the same leaves with the same siblings, and its own check accepts them.
#[test]
fn the_library_makes_the_same_openings() {
    let (s, proof) = &*SEALED;
    let pieces: Vec<_> = s
        .layout
        .iter()
        .map(|p| filecoin_proofs::PieceInfo {
            commitment: p.piece.cid.commitment().0,
            size: filecoin_proofs::UnpaddedBytesAmount(p.piece.size.unpadded().get()),
        })
        .collect();
    let theirs =
        filecoin_proofs::seal_commit_phase1::<_, filecoin_proofs::constants::SectorShapeBase>(
            &crate::network::seal_config(s.sector.size),
            s.path("cache"),
            s.path("sealed"),
            crate::network::prover_id(s.sector.id.miner),
            s.sector.id.number.0.into(),
            TICKET,
            SEED,
            filecoin_proofs::SealPreCommitOutput {
                comm_r: s.commitments.comm_r.0,
                comm_d: s.commitments.comm_d.0,
            },
            &pieces,
        )
        .unwrap();
    let mut nodes = Nodes::new(&proof[HEADER..]);
    let all = theirs.vanilla_proofs.concat();
    let mut next = || nodes.raw().unwrap();
    assert_eq!(next(), <[u8; 32]>::from(all[0].comm_c()));
    assert_eq!(next(), <[u8; 32]>::from(all[0].comm_r_last()));
    for p in &all {
        assert_eq!(next(), <[u8; 32]>::from(p.comm_d_proofs.leaf()));
        for (siblings, _) in p.comm_d_proofs.path() {
            assert_eq!(next(), <[u8; 32]>::from(siblings[0]));
        }
        assert_eq!(next(), <[u8; 32]>::from(p.comm_r_last_proof.leaf()));
        for (siblings, _) in p.comm_r_last_proof.path() {
            for sibling in siblings {
                assert_eq!(next(), <[u8; 32]>::from(sibling));
            }
        }
        let columns = &p.replica_column_proofs;
        let mut count = 0;
        for column in [&columns.c_x]
            .into_iter()
            .chain(&columns.drg_parents)
            .chain(&columns.exp_parents)
        {
            for layer in 1..=2 {
                assert_eq!(
                    next(),
                    <[u8; 32]>::from(*column.get_node_at_layer(layer).unwrap())
                );
            }
            // The library hides these paths; the verifier recomputes them.
            for _ in 0..14 {
                next();
            }
            count += 1;
        }
        assert_eq!(count, 1 + PARENTS);
    }
    nodes.end().unwrap();
}

#[test]
fn what_was_sealed_is_unsealed_and_nothing_is_harmed() {
    let s = Sector::small(4);
    let payload = s.sector.size.padded().unpadded().get();
    let mut whole = s.piece.clone();
    whole.resize(usize::try_from(payload).unwrap(), 0);
    assert_eq!(s.unseal(0, payload), whole);
    for (offset, len) in [
        (0u64, 0u64),
        (0, 1),
        (126, 2),
        (127, 127),
        (1, 1499),
        (payload - 1, 1),
    ] {
        let from = usize::try_from(offset).unwrap();
        let to = usize::try_from(offset + len).unwrap();
        assert_eq!(s.unseal(offset, len), whole[from..to], "{offset}+{len}");
    }
    // The cache still proves, before and after finalizing, and unseals after it.
    s.verify(&s.commit()).unwrap();
    Vanilla.finalize(&s.sector, &s.path("cache")).unwrap();
    assert_eq!(s.unseal(0, payload), whole);
    let left: Vec<_> = fs::read_dir(s.dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .filter(|n| n.to_string_lossy().starts_with("unseal-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let beyond = Vanilla.unseal(
        &s.sector,
        &TICKET,
        &s.commitments.comm_d,
        &s.path("sealed"),
        &s.path("cache"),
        s.dir.path(),
        &mut Vec::new(),
        crate::UnpaddedOffset(payload),
        1,
    );
    assert!(matches!(beyond, Err(crate::ProofError::OutOfRange { .. })));
}

#[test]
fn every_step_may_be_interrupted_and_done_again() {
    let (reference, _) = &*SEALED;
    let s = Sector::small(1);
    assert_eq!(s.commitments, reference.commitments);
    let (sealed, cache) = (s.path("sealed"), s.path("cache"));
    // PreCommit2 after one that was killed halfway, or finished unnoticed.
    let again = || Vanilla.pre_commit2(&s.sector, &s.pc1, &sealed, &cache);
    assert_eq!(again().unwrap(), reference.commitments);
    let mut half = fs::read(&sealed).unwrap();
    half[..1024].fill(0xaa);
    fs::write(&sealed, half).unwrap();
    fs::write(cache.join("sc-02-data-tree-c.dat"), b"half").unwrap();
    fs::write(cache.join("p_aux"), b"half").unwrap();
    assert_eq!(again().unwrap(), reference.commitments);
    // PreCommit1 over everything.
    fs::write(cache.join("sc-02-data-layer-1.dat"), vec![1u8; 2048]).unwrap();
    let pc1 = Vanilla
        .pre_commit1(
            &s.sector,
            &TICKET,
            &s.layout,
            &s.path("unsealed"),
            &sealed,
            &cache,
        )
        .unwrap();
    assert_eq!(
        Vanilla
            .pre_commit2(&s.sector, &pc1, &sealed, &cache)
            .unwrap(),
        reference.commitments
    );
    s.verify(&s.commit()).unwrap();
    Vanilla.finalize(&s.sector, &cache).unwrap();
    Vanilla.finalize(&s.sector, &cache).unwrap();
}

#[test]
fn damaged_files_yield_no_proof() {
    let s = Sector::small(5);
    let c = &s.commitments;
    let statement = SealStatement::new(&s.sector, &TICKET, &SEED, &c.comm_d, &c.comm_r).unwrap();
    let commit = || {
        Vanilla.commit(
            &s.sector,
            &TICKET,
            &SEED,
            &s.layout,
            c,
            &s.path("sealed"),
            &s.path("cache"),
        )
    };
    commit().unwrap();
    let damage = |file: PathBuf, at: usize| {
        let good = fs::read(&file).unwrap();
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&file, bad).unwrap();
        let got = commit();
        fs::write(&file, good).unwrap();
        assert!(got.is_err(), "{} at {at}", file.display());
    };
    let leaf = statement.challenges[0] * NODE;
    damage(s.path("sealed"), leaf);
    damage(s.path("cache").join("sc-02-data-tree-d.dat"), leaf);
    damage(s.path("cache").join("sc-02-data-layer-2.dat"), leaf);
    damage(s.path("cache").join("p_aux"), 0);
    commit().unwrap();

    // Unsealed bytes that are not the layout's.
    let unsealed = s.path("unsealed");
    let mut bytes = fs::read(&unsealed).unwrap();
    bytes[3] ^= 1;
    fs::write(&unsealed, bytes).unwrap();
    let (sealed, cache) = (s.path("sealed"), s.path("cache"));
    let got = Vanilla.pre_commit1(&s.sector, &TICKET, &s.layout, &unsealed, &sealed, &cache);
    assert!(got.is_err());
    let got = Vanilla.pre_commit2(&s.sector, b"{}", &sealed, &cache);
    assert!(matches!(got, Err(crate::ProofError::BadInput { .. })));
}
