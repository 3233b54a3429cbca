//! The prover: the proof library's sealing steps, and vanilla proofs in our encoding or SNARKs.

mod parents;
pub(crate) mod post;
pub(crate) mod seal;
mod unseal;
pub(crate) mod update;

use std::any::Any;
use std::fs;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use filecoin_hashers::Hasher;
use filecoin_hashers::poseidon::{PoseidonDomain, PoseidonHasher};
use lotus_types::{ActorId, Commitment, SectorNumber, SectorSize};
use storage_proofs_core::cache_key::CacheKey;
use storage_proofs_core::merkle::MerkleProofTrait;
use storage_proofs_porep::stacked::PersistentAux;

use crate::error::is_disk_full;
use crate::verify::codec::ProofKind;
use crate::verify::merkle::hash2;
use crate::verify::post::PostStatement;
use crate::{
    PlacedPiece, PostSector, ProofError, ProofMode, Prover, SealInputs, SealedCommitments,
    SealingSector, Seed, Ticket, UnpaddedOffset, UpdatedSector, WindowPost, aggregate, snark,
};

impl Prover for ProofMode {
    fn pre_commit1(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        layout: &[PlacedPiece],
        unsealed: &Path,
        sealed: &Path,
        cache: &Path,
    ) -> Result<Vec<u8>, ProofError> {
        seal::pre_commit1(sector, ticket, layout, unsealed, sealed, cache)
    }

    fn pre_commit2(
        &self,
        sector: &SealingSector,
        pc1: &[u8],
        sealed: &Path,
        cache: &Path,
    ) -> Result<SealedCommitments, ProofError> {
        seal::pre_commit2(sector, pc1, sealed, cache)
    }

    fn commit(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        seed: &Seed,
        layout: &[PlacedPiece],
        commitments: &SealedCommitments,
        sealed: &Path,
        cache: &Path,
    ) -> Result<Vec<u8>, ProofError> {
        seal::check_data(sector, layout, commitments)?;
        if self.seal_snarks() {
            return snark::seal(sector, ticket, seed, layout, commitments, sealed, cache);
        }
        seal::commit(sector, ticket, seed, commitments, sealed, cache)
    }

    fn aggregate_seal_proofs(
        &self,
        miner: ActorId,
        size: SectorSize,
        seals: &[SealInputs],
        proofs: &[Vec<u8>],
    ) -> Result<Vec<u8>, ProofError> {
        aggregate::aggregate(*self, miner, size, seals, proofs)
    }

    fn finalize(&self, _sector: &SealingSector, cache: &Path) -> Result<(), ProofError> {
        seal::finalize(cache)
    }

    fn unseal(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        comm_d: &Commitment,
        sealed: &Path,
        _cache: &Path,
        scratch: &Path,
        out: &mut dyn Write,
        offset: UnpaddedOffset,
        len: u64,
    ) -> Result<(), ProofError> {
        let range = unseal::Range::new(sector.size, offset, len)?;
        unseal::unseal(sector, ticket, comm_d, sealed, scratch, out, range)
    }

    fn window_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[PostSector],
    ) -> Result<WindowPost, ProofError> {
        match post::open_window(miner, size, randomness, sectors)? {
            WindowPost::Proved(openings) if self.post_snarks() => self
                .window_post_of(miner, size, randomness, &public(sectors), &openings)
                .map(WindowPost::Proved),
            done => Ok(done),
        }
    }

    fn window_post_of(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        openings: &[u8],
    ) -> Result<Vec<u8>, ProofError> {
        let kind = ProofKind::Window;
        let statement = PostStatement::new(kind, miner, size, randomness, sectors.len())?;
        post::prove(*self, &statement, sectors, openings)
    }

    fn winning_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[PostSector],
    ) -> Result<Vec<u8>, ProofError> {
        let openings = post::open_winning(miner, size, randomness, sectors)?;
        if self.post_snarks() {
            return self.winning_post_of(miner, size, randomness, &public(sectors), &openings);
        }
        Ok(openings)
    }

    fn winning_post_of(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        openings: &[u8],
    ) -> Result<Vec<u8>, ProofError> {
        let kind = ProofKind::Winning;
        let statement = PostStatement::new(kind, miner, size, randomness, sectors.len())?;
        post::prove(*self, &statement, sectors, openings)
    }

    fn replica_update(
        &self,
        files: &UpdatedSector<'_>,
        layout: &[PlacedPiece],
        unsealed: &Path,
    ) -> Result<SealedCommitments, ProofError> {
        update::replica_update(files, layout, unsealed)
    }

    fn prove_update(
        &self,
        files: &UpdatedSector<'_>,
        old_comm_r: &Commitment,
        new: &SealedCommitments,
    ) -> Result<Vec<u8>, ProofError> {
        if self.seal_snarks() {
            snark::update(files, old_comm_r, new)
        } else {
            update::prove_update(files, old_comm_r, new)
        }
    }

    fn unseal_update(
        &self,
        files: &UpdatedSector<'_>,
        comm_d: &Commitment,
        out: &mut dyn Write,
        offset: UnpaddedOffset,
        len: u64,
    ) -> Result<(), ProofError> {
        let range = unseal::Range::new(files.size, offset, len)?;
        unseal::unseal_update(files, comm_d, out, range)
    }
}

pub use post::{check_sector, winning_challenge};

/// What the verifier knows of sectors.
fn public(sectors: &[PostSector]) -> Vec<(SectorNumber, Commitment)> {
    sectors.iter().map(|s| (s.number, s.comm_r)).collect()
}

/// Calls the proof library: its errors and its panics become ours.
pub(crate) fn library<T>(
    step: &'static str,
    f: impl FnOnce() -> anyhow::Result<T>,
) -> Result<T, ProofError> {
    let failed = |why, disk_full| ProofError::Library {
        step,
        why,
        disk_full,
    };
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(t)) => Ok(t),
        Ok(Err(e)) => Err(failed(format!("{e:#}"), is_disk_full(&e))),
        Err(panic) => Err(failed(panic_text(panic.as_ref()), false)),
    }
}

/// The message of a panic.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "panicked".into())
}

/// The pieces of a layout, as the proof library wants them.
pub(crate) fn library_pieces(layout: &[PlacedPiece]) -> Vec<filecoin_proofs::PieceInfo> {
    layout
        .iter()
        .map(|p| filecoin_proofs::PieceInfo {
            commitment: p.piece.cid.commitment().0,
            size: filecoin_proofs::UnpaddedBytesAmount(p.piece.size.unpadded().get()),
        })
        .collect()
}

/// comm_c and comm_r_last of a replica, from its cache.
fn sub_commitments(cache: &Path) -> Result<PersistentAux<PoseidonDomain>, ProofError> {
    let path = cache.join(CacheKey::PAux.to_string());
    let bytes = fs::read(&path).map_err(ProofError::io(&path))?;
    bincode::deserialize(&bytes).map_err(|e| ProofError::BadInput {
        what: "cache",
        why: format!("{}: {e}", path.display()),
    })
}

/// What a replica commits to by its own record, which lies in its cache folder. `None`: there is no
/// record, as before PreCommit2 has ended.
pub fn replica_commitment(cache: &Path) -> Result<Option<Commitment>, ProofError> {
    let path = cache.join(CacheKey::PAux.to_string());
    if !path.try_exists().map_err(ProofError::io(&path))? {
        return Ok(None);
    }
    let aux = sub_commitments(cache)?;
    Ok(Some(Commitment(hash2(aux.comm_c, aux.comm_r_last).into())))
}

/// Appends the siblings of a path, from the leaf up.
pub(crate) fn put_path<P>(out: &mut Vec<u8>, path: &P)
where
    P: MerkleProofTrait,
{
    for (siblings, _) in path.path() {
        for sibling in siblings {
            put::<P::Hasher>(out, &sibling);
        }
    }
}

/// Appends a leaf and its path.
fn put_opening<P: MerkleProofTrait>(out: &mut Vec<u8>, path: &P) {
    put::<P::Hasher>(out, &path.leaf());
    put_path(out, path);
}

fn put<H: Hasher>(out: &mut Vec<u8>, node: &H::Domain) {
    let bytes: &[u8] = node.as_ref();
    out.extend_from_slice(bytes);
}

fn put_element(out: &mut Vec<u8>, node: &PoseidonDomain) {
    put::<PoseidonHasher>(out, node);
}

/// An empty folder at `dir`, whatever was there.
fn fresh_dir(dir: &Path) -> Result<(), ProofError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(ProofError::io(dir)(e)),
        _ => {}
    }
    fs::create_dir_all(dir).map_err(ProofError::io(dir))
}

/// Makes a cache folder, or removes from an existing one the library's files that `stale` picks.
fn clean_cache(cache: &Path, stale: &[CacheKey]) -> Result<(), ProofError> {
    fs::create_dir_all(cache).map_err(ProofError::io(cache))?;
    for entry in fs::read_dir(cache).map_err(ProofError::io(cache))? {
        let entry = entry.map_err(ProofError::io(cache))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let picked = stale.iter().any(|key| match key {
            CacheKey::PAux | CacheKey::TAux => *name == key.to_string(),
            // Split into several files in the large sectors.
            CacheKey::CommDTree | CacheKey::CommCTree | CacheKey::CommRLastTree => {
                name.starts_with(&format!("{STORE_PREFIX}{key}"))
            }
        });
        if picked {
            fs::remove_file(entry.path()).map_err(ProofError::io(&entry.path()))?;
        }
    }
    Ok(())
}

/// How the names of the library's stores begin (`StoreConfig::data_path`).
const STORE_PREFIX: &str = "sc-02-data-";

/// Flushes a file to the disk.
pub(crate) fn sync(path: &Path) -> Result<(), ProofError> {
    fs::File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(ProofError::io(path))
}

/// Flushes the files of a folder, and the folder itself.
fn sync_dir(dir: &Path) -> Result<(), ProofError> {
    for entry in fs::read_dir(dir).map_err(ProofError::io(dir))? {
        sync(&entry.map_err(ProofError::io(dir))?.path())?;
    }
    sync(dir)
}
