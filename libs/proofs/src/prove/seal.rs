//! Sealing steps.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use filecoin_hashers::poseidon::PoseidonHasher;
use filecoin_proofs::constants::DefaultPieceHasher;
use filecoin_proofs::{
    SealPreCommitPhase1Output, clear_cache, seal_pre_commit_phase1, seal_pre_commit_phase2,
};
use lotus_types::Commitment;
use storage_proofs_core::cache_key::CacheKey;
use storage_proofs_core::merkle::MerkleTreeTrait;
use storage_proofs_porep::stacked::{TemporaryAux, TemporaryAuxCache};

use super::{
    clean_cache, library, library_pieces, parents, put_element, put_opening, put_path,
    sub_commitments, sync, sync_dir,
};
use crate::network::{prover_id, seal_config, with_tree};
use crate::pieces::comm_d;
use crate::verify::seal::SealStatement;
use crate::{PlacedPiece, ProofError, SealedCommitments, SealingSector, Seed, Ticket};

/// What `pre_commit2` adds to a cache.
const PC2_OUTPUT: [CacheKey; 4] = [
    CacheKey::CommCTree,
    CacheKey::CommRLastTree,
    CacheKey::PAux,
    CacheKey::TAux,
];

/// Present in a cache from the moment that `pre_commit2` begins to encode the replica in place.
const ENCODING: &str = "encoding";

pub(super) fn pre_commit1(
    sector: &SealingSector,
    ticket: &Ticket,
    layout: &[PlacedPiece],
    unsealed: &Path,
    sealed: &Path,
    cache: &Path,
) -> Result<Vec<u8>, ProofError> {
    let expected = comm_d(sector.size, layout)?;
    let len = fs::metadata(unsealed)
        .map_err(ProofError::io(unsealed))?
        .len();
    if len != sector.size.bytes() {
        return Err(ProofError::BadInput {
            what: "unsealed file",
            why: format!("it has {len} bytes, not {}", sector.size.bytes()),
        });
    }
    clean_cache(cache, &PC2_OUTPUT)?;
    // The library takes layers that it finds for finished ones.
    finalize(cache)?;
    File::create(sealed).map_err(ProofError::io(sealed))?;
    parents::ensure(sector.size)?;
    let pc1 = with_tree!(
        sector.size,
        label(sector, ticket, layout, unsealed, sealed, cache)
    )?;
    if pc1.0 != expected {
        return Err(ProofError::WrongData {
            expected,
            got: pc1.0,
        });
    }
    sync(sealed)?;
    sync_dir(cache)?;
    Ok(pc1.1)
}

fn label<Tree: 'static + MerkleTreeTrait>(
    sector: &SealingSector,
    ticket: &Ticket,
    layout: &[PlacedPiece],
    unsealed: &Path,
    sealed: &Path,
    cache: &Path,
) -> Result<(Commitment, Vec<u8>), ProofError> {
    let out = library("PreCommit1", || {
        seal_pre_commit_phase1::<_, _, _, Tree>(
            &seal_config(sector.size),
            cache,
            unsealed,
            sealed,
            prover_id(sector.id.miner),
            sector.id.number.0.into(),
            *ticket,
            &library_pieces(layout),
        )
    })?;
    let bytes = serde_json::to_vec(&out).map_err(|e| ProofError::BadInput {
        what: "output of PreCommit1",
        why: e.to_string(),
    })?;
    Ok((Commitment(out.comm_d), bytes))
}

pub(super) fn pre_commit2(
    sector: &SealingSector,
    pc1: &[u8],
    sealed: &Path,
    cache: &Path,
) -> Result<SealedCommitments, ProofError> {
    let mark = cache.join(ENCODING);
    if mark.exists() {
        restore_data(sector, sealed, cache)?;
    }
    clean_cache(cache, &PC2_OUTPUT)?;
    File::create(&mark)
        .and_then(|f| f.sync_all())
        .map_err(ProofError::io(&mark))?;
    sync(cache)?;
    let commitments = with_tree!(sector.size, encode(sector, pc1, sealed, cache))?;
    sync(sealed)?;
    sync_dir(cache)?;
    Ok(commitments)
}

/// Puts the data back where an interrupted run began to encode it: the leaves of the data tree
/// are the data.
fn restore_data(sector: &SealingSector, sealed: &Path, cache: &Path) -> Result<(), ProofError> {
    let tree_d = store_path(cache, CacheKey::CommDTree);
    let data = File::open(&tree_d).map_err(ProofError::io(&tree_d))?;
    let mut replica = File::create(sealed).map_err(ProofError::io(sealed))?;
    let copied = io::copy(&mut data.take(sector.size.bytes()), &mut replica)
        .map_err(ProofError::io(sealed))?;
    if copied != sector.size.bytes() {
        return Err(ProofError::BadInput {
            what: "data tree",
            why: format!("it has {copied} bytes of data"),
        });
    }
    sync(sealed)
}

fn store_path(cache: &Path, key: CacheKey) -> PathBuf {
    filecoin_proofs::StoreConfig::data_path(cache, &key.to_string())
}

fn encode<Tree: 'static + MerkleTreeTrait>(
    sector: &SealingSector,
    pc1: &[u8],
    sealed: &Path,
    cache: &Path,
) -> Result<SealedCommitments, ProofError> {
    let phase1: SealPreCommitPhase1Output<Tree> =
        serde_json::from_slice(pc1).map_err(|e| ProofError::BadInput {
            what: "output of PreCommit1",
            why: e.to_string(),
        })?;
    let out = library("PreCommit2", || {
        seal_pre_commit_phase2(&seal_config(sector.size), phase1, cache, sealed)
    })?;
    Ok(SealedCommitments {
        comm_r: Commitment(out.comm_r),
        comm_d: Commitment(out.comm_d),
    })
}

/// Refuses commitments to other data than the layout's.
pub(super) fn check_data(
    sector: &SealingSector,
    layout: &[PlacedPiece],
    commitments: &SealedCommitments,
) -> Result<(), ProofError> {
    let expected = comm_d(sector.size, layout)?;
    if expected == commitments.comm_d {
        return Ok(());
    }
    Err(ProofError::WrongData {
        expected,
        got: commitments.comm_d,
    })
}

pub(super) fn commit(
    sector: &SealingSector,
    ticket: &Ticket,
    seed: &Seed,
    commitments: &SealedCommitments,
    sealed: &Path,
    cache: &Path,
) -> Result<Vec<u8>, ProofError> {
    let statement = SealStatement::new(
        sector,
        ticket,
        seed,
        &commitments.comm_d,
        &commitments.comm_r,
    )?;
    let proof = with_tree!(sector.size, open(&statement, sealed, cache))?;
    statement.verify(&proof)?;
    Ok(proof)
}

/// Opens the challenged leaves of the data, the replica and the columns.
pub(crate) fn open<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    statement: &SealStatement,
    sealed: &Path,
    cache: &Path,
) -> Result<Vec<u8>, ProofError> {
    let roots = sub_commitments(cache)?;
    let mut aux = temporary_aux::<Tree>(cache)?;
    aux.set_cache_path(cache);
    library("Commit", || {
        let trees = TemporaryAuxCache::new(&aux, sealed.to_owned(), false)?;
        let (Some(tree_d), Some(tree_c)) = (&trees.tree_d, &trees.tree_c) else {
            unreachable!("only synthetic proofs go without these trees");
        };
        let mut out = statement.header.bytes().to_vec();
        put_element(&mut out, &roots.comm_c);
        put_element(&mut out, &roots.comm_r_last);
        for &challenge in &statement.challenges {
            put_opening(&mut out, &tree_d.gen_proof(challenge)?);
            let rows = Some(trees.tree_r_last_config_rows_to_discard);
            put_opening(
                &mut out,
                &trees.tree_r_last.gen_cached_proof(challenge, rows)?,
            );
            let own = u32::try_from(challenge)?;
            for node in [own].into_iter().chain(statement.parents(challenge)?) {
                for label in trees.column(node)?.rows() {
                    put_element(&mut out, label);
                }
                put_path(&mut out, &tree_c.gen_proof(node as usize)?);
            }
        }
        Ok(out)
    })
}

fn temporary_aux<Tree: MerkleTreeTrait>(
    cache: &Path,
) -> Result<TemporaryAux<Tree, DefaultPieceHasher>, ProofError> {
    let path = cache.join(CacheKey::TAux.to_string());
    let bytes = fs::read(&path).map_err(ProofError::io(&path))?;
    bincode::deserialize(&bytes).map_err(|e| ProofError::BadInput {
        what: "cache",
        why: format!("{}: {e}", path.display()),
    })
}

pub(super) fn finalize(cache: &Path) -> Result<(), ProofError> {
    library("FinalizeSector", || clear_cache(cache))?;
    match fs::remove_file(cache.join(ENCODING)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ProofError::io(cache)(e)),
        _ => Ok(()),
    }
}
