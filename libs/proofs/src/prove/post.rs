//! Proofs of spacetime.

use std::fs;

use filecoin_hashers::poseidon::PoseidonHasher;
use filecoin_proofs::constants::SectorShapeBase;
use filecoin_proofs::{
    FallbackPoStSectorProof, PrivateReplicaInfo, generate_single_vanilla_proof,
    generate_winning_post_sector_challenge,
};
use lotus_types::{ActorId, SectorSize};
use storage_proofs_core::cache_key::CacheKey;
use storage_proofs_core::merkle::MerkleTreeTrait;

use super::{STORE_PREFIX, library, put_element, put_opening};
use crate::network::{prover_id, winning_config, with_tree};
use crate::verify::codec::ProofKind;
use crate::verify::post::{PostStatement, field_randomness};
use crate::{PostSector, ProofError, ProofMode, WindowPost, snark};

/// Which of the miner's `eligible` sectors a WinningPoSt must prove: indices into them, in order.
pub fn winning_challenge(
    miner: ActorId,
    size: SectorSize,
    randomness: &[u8; 32],
    eligible: u64,
) -> Result<Vec<u64>, ProofError> {
    library("choosing the sectors of a WinningPoSt", || {
        generate_winning_post_sector_challenge::<SectorShapeBase>(
            &winning_config(size),
            &field_randomness(randomness).into(),
            eligible,
            prover_id(miner),
        )
    })
}

pub(super) fn window_post(
    mode: ProofMode,
    miner: ActorId,
    size: SectorSize,
    randomness: &[u8; 32],
    sectors: &[PostSector],
) -> Result<WindowPost, ProofError> {
    let statement = PostStatement::new(ProofKind::Window, miner, size, randomness, sectors.len())?;
    with_tree!(size, window(mode, &statement, sectors))
}

fn window<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    mode: ProofMode,
    statement: &PostStatement,
    sectors: &[PostSector],
) -> Result<WindowPost, ProofError> {
    let mut opened = Vec::with_capacity(sectors.len());
    let mut faulty = Vec::new();
    for sector in sectors {
        match open_sector::<Tree>(statement, sector) {
            Ok(one) => opened.push(one),
            Err(e) => {
                tracing::warn!(sector = %sector.number, error = %e, "a sector can not be proven");
                if !faulty.contains(&sector.number) {
                    faulty.push(sector.number);
                }
            }
        }
    }
    if !faulty.is_empty() {
        return Ok(WindowPost::Faulty(faulty));
    }
    finish(mode, statement, sectors, opened).map(WindowPost::Proved)
}

pub(super) fn winning_post(
    mode: ProofMode,
    miner: ActorId,
    size: SectorSize,
    randomness: &[u8; 32],
    sectors: &[PostSector],
) -> Result<Vec<u8>, ProofError> {
    let statement = PostStatement::new(ProofKind::Winning, miner, size, randomness, sectors.len())?;
    with_tree!(size, winning(mode, &statement, sectors))
}

fn winning<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    mode: ProofMode,
    statement: &PostStatement,
    sectors: &[PostSector],
) -> Result<Vec<u8>, ProofError> {
    let open = |sector: &PostSector| {
        open_sector::<Tree>(statement, sector).map_err(|e| ProofError::Sector {
            number: sector.number,
            why: e.to_string(),
        })
    };
    let opened = sectors.iter().map(open).collect::<Result<_, _>>()?;
    finish(mode, statement, sectors, opened)
}

/// The proof of opened sectors.
fn finish<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    mode: ProofMode,
    statement: &PostStatement,
    sectors: &[PostSector],
    opened: Vec<Opened<Tree>>,
) -> Result<Vec<u8>, ProofError> {
    if mode.post_snarks() {
        let proofs = opened.into_iter().map(|o| o.proof).collect();
        let public: Vec<_> = sectors.iter().map(|s| (s.number, s.comm_r)).collect();
        return snark::post(statement, &public, proofs);
    }
    let mut proof = statement.header.bytes().to_vec();
    for one in opened {
        proof.extend_from_slice(&one.part);
    }
    Ok(proof)
}

/// Whether a sector can be proven: its files are there and, with `randomness`, the leaves that
/// this randomness challenges open to the commitment on chain. Without, nothing is read.
pub fn check_sector(
    miner: ActorId,
    size: SectorSize,
    randomness: Option<&[u8; 32]>,
    sector: &PostSector,
) -> Result<(), ProofError> {
    check_files(size, sector)?;
    let Some(randomness) = randomness else {
        return Ok(());
    };
    let statement = PostStatement::new(ProofKind::Window, miner, size, randomness, 1)?;
    with_tree!(size, opens(&statement, sector))
}

/// The replica has its size, and the cache holds what a PoSt opens.
fn check_files(size: SectorSize, sector: &PostSector) -> Result<(), ProofError> {
    check_replica(size, sector)?;
    let aux = sector.cache.join(CacheKey::PAux.to_string());
    fs::metadata(&aux).map_err(ProofError::io(&aux))?;
    // Split into several files in the large sectors.
    let tree = format!("{STORE_PREFIX}{}", CacheKey::CommRLastTree);
    let entries = fs::read_dir(&sector.cache).map_err(ProofError::io(&sector.cache))?;
    let found = entries
        .filter_map(Result::ok)
        .any(|e| e.file_name().to_string_lossy().starts_with(&tree));
    if found {
        return Ok(());
    }
    Err(ProofError::BadInput {
        what: "cache",
        why: format!("{} has no {tree}*", sector.cache.display()),
    })
}

fn check_replica(size: SectorSize, sector: &PostSector) -> Result<(), ProofError> {
    let len = fs::metadata(&sector.sealed)
        .map_err(ProofError::io(&sector.sealed))?
        .len();
    if len == size.bytes() {
        return Ok(());
    }
    Err(ProofError::BadInput {
        what: "replica",
        why: format!("it has {len} bytes, not {}", size.bytes()),
    })
}

/// What a sector shows in a PoSt.
struct Opened<Tree: MerkleTreeTrait> {
    /// As the library has it.
    proof: FallbackPoStSectorProof<Tree>,
    /// In our encoding.
    part: Vec<u8>,
}

/// Opens a sector's challenged leaves, and verifies them.
fn open_sector<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    statement: &PostStatement,
    sector: &PostSector,
) -> Result<Opened<Tree>, ProofError> {
    check_replica(statement.header.size, sector)?;
    let proof = library("proving a sector", || {
        let replica = PrivateReplicaInfo::<Tree>::new(
            sector.sealed.clone(),
            sector.comm_r.0,
            sector.cache.clone(),
        )?;
        generate_single_vanilla_proof(
            &statement.config,
            sector.number.0.into(),
            &replica,
            &statement.challenges(sector.number),
        )
    })?;
    let mut part = Vec::new();
    for opened in &proof.vanilla_proof.sectors {
        put_element(&mut part, &opened.comm_c);
        put_element(&mut part, &opened.comm_r_last);
        for path in &opened.inclusion_proofs {
            put_opening(&mut part, path);
        }
    }
    statement.verify_sector(sector.number, &sector.comm_r, &part)?;
    Ok(Opened { proof, part })
}

/// Whether a sector's challenged leaves open.
fn opens<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    statement: &PostStatement,
    sector: &PostSector,
) -> Result<(), ProofError> {
    open_sector::<Tree>(statement, sector).map(drop)
}
