//! Replica updates.

use std::fs::File;
use std::path::Path;

use filecoin_hashers::poseidon::PoseidonHasher;
use filecoin_proofs::{SectorUpdateConfig, encode_into, generate_partition_proofs};
use lotus_types::Commitment;
use storage_proofs_core::cache_key::CacheKey;
use storage_proofs_core::merkle::MerkleTreeTrait;

use super::{
    clean_cache, library, library_pieces, put_element, put_opening, sub_commitments, sync, sync_dir,
};
use crate::network::{update_config, with_tree};
use crate::pieces::comm_d;
use crate::verify::update::UpdateStatement;
use crate::{PlacedPiece, ProofError, SealedCommitments, UpdatedSector};

pub(super) fn replica_update(
    files: &UpdatedSector<'_>,
    layout: &[PlacedPiece],
    unsealed: &Path,
) -> Result<SealedCommitments, ProofError> {
    let expected = comm_d(files.size, layout)?;
    clean_cache(
        files.updated_cache,
        &[
            CacheKey::CommDTree,
            CacheKey::CommRLastTree,
            CacheKey::PAux,
            CacheKey::TAux,
        ],
    )?;
    File::create(files.updated)
        .and_then(|f| f.set_len(files.size.bytes()))
        .map_err(ProofError::io(files.updated))?;
    let new = with_tree!(files.size, encode(files, layout, unsealed))?;
    if new.comm_d != expected {
        return Err(ProofError::WrongData {
            expected,
            got: new.comm_d,
        });
    }
    sync(files.updated)?;
    sync_dir(files.updated_cache)?;
    Ok(new)
}

pub(crate) fn config(files: &UpdatedSector<'_>) -> SectorUpdateConfig {
    SectorUpdateConfig::from_porep_config(&update_config(files.size))
}

fn encode<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    files: &UpdatedSector<'_>,
    layout: &[PlacedPiece],
    unsealed: &Path,
) -> Result<SealedCommitments, ProofError> {
    let out = library("ReplicaUpdate", || {
        encode_into::<Tree>(
            &config(files),
            files.updated,
            files.updated_cache,
            files.sealed,
            files.cache,
            unsealed,
            &library_pieces(layout),
        )
    })?;
    Ok(SealedCommitments {
        comm_r: Commitment(out.comm_r_new),
        comm_d: Commitment(out.comm_d_new),
    })
}

pub(super) fn prove_update(
    files: &UpdatedSector<'_>,
    old_comm_r: &Commitment,
    new: &SealedCommitments,
) -> Result<Vec<u8>, ProofError> {
    let statement = UpdateStatement::new(files.size, old_comm_r, &new.comm_r, &new.comm_d)?;
    let proof = with_tree!(files.size, open(&statement, files, old_comm_r, new))?;
    statement.verify(&proof)?;
    Ok(proof)
}

pub(crate) fn open<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    statement: &UpdateStatement,
    files: &UpdatedSector<'_>,
    old_comm_r: &Commitment,
    new: &SealedCommitments,
) -> Result<Vec<u8>, ProofError> {
    let partitions = library("ProveReplicaUpdate", || {
        generate_partition_proofs::<Tree>(
            config(files),
            old_comm_r.0,
            new.comm_r.0,
            new.comm_d.0,
            files.sealed,
            files.cache,
            files.updated,
            files.updated_cache,
        )
    })?;
    let mut out = statement.header.bytes().to_vec();
    let old = sub_commitments(files.cache)?;
    put_element(&mut out, &old.comm_c);
    put_element(&mut out, &old.comm_r_last);
    put_element(&mut out, &sub_commitments(files.updated_cache)?.comm_r_last);
    for challenge in partitions.iter().flat_map(|p| &p.challenge_proofs) {
        put_opening(&mut out, &challenge.proof_r_old);
        put_opening(&mut out, &challenge.proof_d_new);
        put_opening(&mut out, &challenge.proof_r_new);
    }
    Ok(out)
}
