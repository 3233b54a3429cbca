//! Proofs of spacetime.

use std::fs;

use filecoin_hashers::poseidon::PoseidonHasher;
use filecoin_proofs::constants::SectorShapeBase;
use filecoin_proofs::{
    FallbackPoStSectorProof, PrivateReplicaInfo, generate_single_vanilla_proof,
    generate_winning_post_sector_challenge,
};
use lotus_types::{ActorId, Commitment, SectorNumber, SectorSize};
use storage_proofs_core::cache_key::CacheKey;
use storage_proofs_core::merkle::{MerkleProof, MerkleTreeTrait};
use storage_proofs_post::fallback;

use super::{STORE_PREFIX, library, put_element, put_opening};
use crate::network::{prover_id, winning_config, with_tree};
use crate::verify::codec::{ProofKind, element};
use crate::verify::merkle::library_path;
use crate::verify::post::{PostStatement, field_randomness};
use crate::{PostSector, ProofError, ProofMode, Refused, WindowPost, snark};

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

/// The openings of a partition's sectors: its vanilla proof.
pub(super) fn open_window(
    miner: ActorId,
    size: SectorSize,
    randomness: &[u8; 32],
    sectors: &[PostSector],
) -> Result<WindowPost, ProofError> {
    let statement = PostStatement::new(ProofKind::Window, miner, size, randomness, sectors.len())?;
    let mut openings = statement.header.bytes().to_vec();
    let mut faulty = Vec::new();
    for sector in sectors {
        match with_tree!(size, open_sector(&statement, sector)) {
            Ok(part) => openings.extend_from_slice(&part),
            Err(e) => {
                tracing::warn!(sector = %sector.number, error = %e, "a sector can not be proven");
                if !faulty.contains(&sector.number) {
                    faulty.push(sector.number);
                }
            }
        }
    }
    Ok(if faulty.is_empty() {
        WindowPost::Proved(openings)
    } else {
        WindowPost::Faulty(faulty)
    })
}

/// The openings of a block's sectors: its vanilla proof.
pub(super) fn open_winning(
    miner: ActorId,
    size: SectorSize,
    randomness: &[u8; 32],
    sectors: &[PostSector],
) -> Result<Vec<u8>, ProofError> {
    let statement = PostStatement::new(ProofKind::Winning, miner, size, randomness, sectors.len())?;
    let mut openings = statement.header.bytes().to_vec();
    for sector in sectors {
        let part = with_tree!(size, open_sector(&statement, sector));
        let part = part.map_err(|e| ProofError::Sector {
            number: sector.number,
            why: e.to_string(),
        })?;
        openings.extend_from_slice(&part);
    }
    Ok(openings)
}

/// The proof of sectors that were opened.
pub(super) fn prove(
    mode: ProofMode,
    statement: &PostStatement,
    sectors: &[(SectorNumber, Commitment)],
    openings: &[u8],
) -> Result<Vec<u8>, ProofError> {
    if mode.post_snarks() {
        // They are not verified once more: a SNARK of wrong ones is none, and it is verified.
        return with_tree!(
            statement.header.size,
            compress(statement, sectors, openings)
        );
    }
    statement.verify(sectors, openings)?;
    Ok(openings.to_vec())
}

fn compress<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    statement: &PostStatement,
    sectors: &[(SectorNumber, Commitment)],
    openings: &[u8],
) -> Result<Vec<u8>, ProofError> {
    let opened = read_openings::<Tree>(statement, sectors, openings)?;
    snark::post(statement, sectors, opened)
}

/// Openings as the proof library has them.
pub(crate) fn read_openings<Tree: MerkleTreeTrait<Hasher = PoseidonHasher>>(
    statement: &PostStatement,
    sectors: &[(SectorNumber, Commitment)],
    openings: &[u8],
) -> Result<Vec<FallbackPoStSectorProof<Tree>>, Refused> {
    let mut nodes = statement.open(sectors.len(), openings)?;
    let mut opened = Vec::with_capacity(sectors.len());
    for (number, comm_r) in sectors {
        let comm_c = nodes.element("comm_c")?;
        let comm_r_last = nodes.element("comm_r_last")?;
        let mut inclusion_proofs = Vec::new();
        for leaf in statement.challenges(*number) {
            let index = usize::try_from(leaf).map_err(|_| Refused::PublicInput("leaf index"))?;
            let node = nodes.element("replica leaf")?;
            let path = library_path(index, &statement.arities, &mut nodes)?;
            inclusion_proofs.push(MerkleProof::from_parts(node, comm_r_last, path));
        }
        let sector = fallback::SectorProof {
            inclusion_proofs,
            comm_c,
            comm_r_last,
        };
        opened.push(FallbackPoStSectorProof {
            sector_id: number.0.into(),
            comm_r: element(comm_r.0, "comm_r")?,
            vanilla_proof: fallback::Proof {
                sectors: vec![sector],
            },
        });
    }
    nodes.end()?;
    Ok(opened)
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
    with_tree!(size, open_sector(&statement, sector)).map(drop)
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

/// Opens a sector's challenged leaves, and verifies them.
fn open_sector<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    statement: &PostStatement,
    sector: &PostSector,
) -> Result<Vec<u8>, ProofError> {
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
    Ok(part)
}
