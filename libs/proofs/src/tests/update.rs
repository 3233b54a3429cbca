use super::*;
use crate::verify::merkle::hash2;
use crate::verify::update::UpdateStatement;
use crate::{Check, ProofError, UnpaddedOffset, UpdatedSector, WindowPost};

/// A sector, updated.
struct Updated {
    old: Sector,
    piece: Vec<u8>,
    new: SealedCommitments,
    paths: [PathBuf; 4],
}

impl Updated {
    fn make(number: u64) -> Self {
        // Before the update a sector holds zeros only.
        let old = Sector::seal(SectorSize::S2KiB, number, vec![0; 2032]);
        Vanilla.finalize(&old.sector, &old.path("cache")).unwrap();
        let paths = ["sealed", "cache", "updated", "updated-cache"].map(|n| old.path(n));
        let piece = noise(number + 50, 1800);
        let layout = place(SectorSize::S2KiB, &piece);
        let unsealed = old.path("unsealed-new");
        add_pieces(
            &unsealed,
            SectorSize::S2KiB,
            &layout,
            &mut from_memory(&piece),
        )
        .unwrap();
        let files = files(&paths);
        let new = Vanilla.replica_update(&files, &layout, &unsealed).unwrap();
        // Again, as after a crash.
        let again = Vanilla.replica_update(&files, &layout, &unsealed).unwrap();
        assert_eq!(new, again);
        assert_eq!(
            new.comm_d,
            crate::comm_d(SectorSize::S2KiB, &layout).unwrap()
        );
        Self {
            old,
            piece,
            new,
            paths,
        }
    }

    fn files(&self) -> UpdatedSector<'_> {
        files(&self.paths)
    }

    fn prove(&self) -> Result<Vec<u8>, ProofError> {
        Vanilla.prove_update(&self.files(), &self.old.commitments.comm_r, &self.new)
    }

    fn verify(&self, proof: &[u8]) -> Result<(), Refused> {
        let old = &self.old.commitments.comm_r;
        Vanilla.verify_update(
            SectorSize::S2KiB,
            old,
            &self.new.comm_r,
            &self.new.comm_d,
            proof,
        )
    }
}

fn files(paths: &[PathBuf; 4]) -> UpdatedSector<'_> {
    UpdatedSector {
        size: SectorSize::S2KiB,
        sealed: &paths[0],
        cache: &paths[1],
        updated: &paths[2],
        updated_cache: &paths[3],
    }
}

#[test]
fn an_update_proof_survives_no_change() {
    let u = Updated::make(1);
    let other = Updated::make(2);
    let proof = u.prove().unwrap();
    survives_nothing(&proof, |p| u.verify(p));

    let (old, new) = (&u.old.commitments.comm_r, &u.new);
    let (other_old, other_new) = (&other.old.commitments.comm_r, &other.new);
    let check =
        |old, r, d, proof: &[u8]| Vanilla.verify_update(SectorSize::S2KiB, old, r, d, proof);
    for (what, got) in [
        (
            "old comm_r",
            check(other_old, &new.comm_r, &new.comm_d, &proof),
        ),
        (
            "new comm_r",
            check(old, &other_new.comm_r, &new.comm_d, &proof),
        ),
        (
            "new comm_d",
            check(old, &new.comm_r, &other_new.comm_d, &proof),
        ),
        (
            "old comm_d",
            check(old, &new.comm_r, &u.old.commitments.comm_d, &proof),
        ),
        ("old as new", check(old, old, &new.comm_d, &proof)),
        (
            "another's proof",
            check(old, &new.comm_r, &new.comm_d, &other.prove().unwrap()),
        ),
        (
            "another size",
            Vanilla.verify_update(SectorSize::S64GiB, old, &new.comm_r, &new.comm_d, &proof),
        ),
    ] {
        let refused = got.expect_err(what);
        assert!(
            !matches!(refused, Refused::Internal(_)),
            "{what}: {refused}"
        );
    }
}

#[test]
fn an_updated_sector_is_proven_and_unsealed() {
    let u = Updated::make(3);
    u.verify(&u.prove().unwrap()).unwrap();
    Vanilla
        .finalize(&u.old.sector, u.files().updated_cache)
        .unwrap();
    let sector = PostSector {
        number: u.old.sector.id.number,
        comm_r: u.new.comm_r,
        sealed: u.paths[2].clone(),
        cache: u.paths[3].clone(),
    };
    let public = [(sector.number, sector.comm_r)];
    let miner = u.old.sector.id.miner;
    let size = SectorSize::S2KiB;
    let WindowPost::Proved(proof) = Vanilla
        .window_post(miner, size, &RANDOMNESS, &[sector])
        .unwrap()
    else {
        panic!("the updated replica is good");
    };
    Vanilla
        .verify_window_post(miner, size, &RANDOMNESS, &public, &proof)
        .unwrap();

    let mut whole = u.piece.clone();
    whole.resize(2032, 0);
    for (offset, len) in [(0, 2032), (0, 0), (1, 126), (500, 1000), (2031, 1)] {
        let mut out = Vec::new();
        Vanilla
            .unseal_update(
                &u.files(),
                &u.new.comm_d,
                &mut out,
                UnpaddedOffset(offset as u64),
                len as u64,
            )
            .unwrap();
        assert_eq!(out, whole[offset..offset + len], "{offset}+{len}");
    }
}

#[test]
fn damaged_files_yield_no_update_proof() {
    let u = Updated::make(4);
    let statement = UpdateStatement::new(
        SectorSize::S2KiB,
        &u.old.commitments.comm_r,
        &u.new.comm_r,
        &u.new.comm_d,
    )
    .unwrap();
    let leaf = statement.challenges[0] * NODE;
    for (file, at) in [
        (u.paths[0].clone(), leaf),
        (u.paths[2].clone(), leaf),
        (u.paths[3].join("sc-02-data-tree-d.dat"), leaf),
        (u.paths[3].join("p_aux"), 40),
        (u.paths[1].join("p_aux"), 1),
    ] {
        let good = fs::read(&file).unwrap();
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&file, bad).unwrap();
        assert!(u.prove().is_err(), "{}", file.display());
        fs::write(&file, good).unwrap();
    }
    u.prove().unwrap();
}

/// The library accepts what it opens for us.
#[test]
fn the_library_accepts_the_same_update() {
    use filecoin_proofs::constants::SectorShapeBase as Tree;
    use filecoin_proofs::{SectorUpdateConfig, generate_partition_proofs, verify_partition_proofs};
    let u = Updated::make(5);
    let config =
        SectorUpdateConfig::from_porep_config(&crate::network::update_config(SectorSize::S2KiB));
    let (old, new) = (u.old.commitments.comm_r.0, u.new);
    let [sealed, cache, updated, updated_cache] = &u.paths;
    let proofs = generate_partition_proofs::<Tree>(
        config,
        old,
        new.comm_r.0,
        new.comm_d.0,
        sealed,
        cache,
        updated,
        updated_cache,
    )
    .unwrap();
    assert!(
        verify_partition_proofs::<Tree>(config, &proofs, old, new.comm_r.0, new.comm_d.0).unwrap()
    );
}

/// Openings of a true update, claimed for another new replica: every path, the encoding and the
/// old replica are right.
#[test]
fn the_new_replica_is_bound_to_its_commitment() {
    let u = Updated::make(6);
    let claimed = SealedCommitments {
        comm_r: SEALED.0.commitments.comm_r,
        ..u.new
    };
    assert_eq!(
        forged(&u, &u.old.commitments.comm_r, &claimed),
        Check::CommR
    );
}

/// Which replica a cache is of, the cache says itself.
#[test]
fn both_replicas_tell_what_they_commit_to() {
    let u = Updated::make(8);
    let told = |dir: &PathBuf| crate::replica_commitment(dir);
    assert_eq!(told(&u.paths[1]).unwrap(), Some(u.old.commitments.comm_r));
    assert_eq!(told(&u.paths[3]).unwrap(), Some(u.new.comm_r));
    fs::write(u.paths[3].join("p_aux"), b"half").unwrap();
    assert!(told(&u.paths[3]).is_err());
    fs::remove_file(u.paths[3].join("p_aux")).unwrap();
    assert_eq!(told(&u.paths[3]).unwrap(), None);
}

/// New data encoded with a key commitment that the old replica does not have.
#[test]
fn the_key_is_bound_to_the_old_commitment() {
    let mut u = Updated::make(7);
    let aux = u.paths[1].join("p_aux");
    let good = fs::read(&aux).unwrap();
    let mut bad = good.clone();
    bad[NODE] ^= 1;
    fs::write(&aux, &bad).unwrap();
    let layout = place(SectorSize::S2KiB, &u.piece);
    let unsealed = u.old.path("unsealed-new");
    u.new = Vanilla
        .replica_update(&u.files(), &layout, &unsealed)
        .unwrap();
    fs::write(&aux, &good).unwrap();
    let half = |from: usize| {
        <[u8; NODE]>::try_from(&bad[from..from + NODE])
            .unwrap()
            .into()
    };
    let claimed = Commitment(hash2(half(0), half(NODE)).into());
    assert_eq!(forged(&u, &claimed, &u.new), Check::OldCommR);
}

/// What refuses openings of these files for these commitments.
fn forged(u: &Updated, old_comm_r: &Commitment, new: &SealedCommitments) -> Check {
    let size = SectorSize::S2KiB;
    let statement = UpdateStatement::new(size, old_comm_r, &new.comm_r, &new.comm_d).unwrap();
    let made = crate::prove::update::open::<filecoin_proofs::constants::SectorShapeBase>(
        &statement,
        &u.files(),
        old_comm_r,
        new,
    )
    .unwrap();
    match statement.verify(&made) {
        Err(Refused::Wrong { what, .. }) => what,
        other => panic!("{other:?}"),
    }
}

/// A replica of some data, claimed for other data of which every path is right.
#[test]
fn the_encoding_of_an_update_is_recomputed() {
    let (u, other) = (Updated::make(8), Updated::make(9));
    let tree_d = "sc-02-data-tree-d.dat";
    fs::copy(other.paths[3].join(tree_d), u.paths[3].join(tree_d)).unwrap();
    let claimed = SealedCommitments {
        comm_d: other.new.comm_d,
        ..u.new
    };
    assert_eq!(
        forged(&u, &u.old.commitments.comm_r, &claimed),
        Check::Encoding
    );
}
