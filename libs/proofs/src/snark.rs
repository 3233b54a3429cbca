//! SNARKs: the openings of [`crate::prove`] compressed by Groth16, and their verification.
//!
//! The proof library does both. Around it: parameter files are looked for first, so that their
//! lack is not taken for a wrong proof; a proof has one exact length; and what is proven is
//! verified before it is returned.

use std::collections::BTreeMap;
use std::path::Path;

use filecoin_hashers::poseidon::PoseidonHasher;
use filecoin_proofs::{
    FallbackPoStSectorProof, PublicReplicaInfo, SealPreCommitOutput,
    generate_empty_sector_update_proof, generate_window_post_with_vanilla,
    generate_winning_post_with_vanilla, seal_commit_phase1, seal_commit_phase2,
    verify_empty_sector_update_proof,
};
use lotus_types::{Commitment, SectorNumber, SectorSize};
use storage_proofs_core::merkle::MerkleTreeTrait;
use storage_proofs_core::sector::SectorId as LibrarySector;
use storage_proofs_update::constants::partition_count;

use crate::network::{nodes, prover_id, seal_config, update_config, with_tree};
use crate::params::{self, Circuit};
use crate::prove::{library, library_pieces};
use crate::verify::codec::{ProofKind, element};
use crate::verify::post::PostStatement;
use crate::{
    PlacedPiece, ProofError, Refused, SealedCommitments, SealingSector, Seed, Ticket, UpdatedSector,
};

/// Bytes of the SNARK of one partition: two points of G1 and one of G2, compressed.
const SNARK: usize = 192;

/// The SNARK of a seal. `layout` leads to the commitments' data.
pub(crate) fn seal(
    sector: &SealingSector,
    ticket: &Ticket,
    seed: &Seed,
    layout: &[PlacedPiece],
    commitments: &SealedCommitments,
    sealed: &Path,
    cache: &Path,
) -> Result<Vec<u8>, ProofError> {
    params::require(&[Circuit::Seal], sector.size)?;
    with_tree!(
        sector.size,
        seal_of(sector, ticket, seed, layout, commitments, sealed, cache)
    )
}

fn seal_of<Tree: 'static + MerkleTreeTrait>(
    sector: &SealingSector,
    ticket: &Ticket,
    seed: &Seed,
    layout: &[PlacedPiece],
    commitments: &SealedCommitments,
    sealed: &Path,
    cache: &Path,
) -> Result<Vec<u8>, ProofError> {
    let config = seal_config(sector.size);
    let (prover, number) = (prover_id(sector.id.miner), sector.id.number.0.into());
    let opened = library("Commit1", || {
        seal_commit_phase1::<_, Tree>(
            &config,
            cache,
            sealed,
            prover,
            number,
            *ticket,
            *seed,
            SealPreCommitOutput {
                comm_r: commitments.comm_r.0,
                comm_d: commitments.comm_d.0,
            },
            &library_pieces(layout),
        )
    })?;
    // It verifies what it returns.
    let out = library("Commit2", || {
        seal_commit_phase2(&config, opened, prover, number)
    })?;
    Ok(out.proof)
}

pub(crate) fn verify_seal(
    sector: &SealingSector,
    ticket: &Ticket,
    seed: &Seed,
    comm_d: &Commitment,
    comm_r: &Commitment,
    proof: &[u8],
) -> Result<(), Refused> {
    element(comm_d.0, "comm_d")?;
    element(comm_r.0, "comm_r")?;
    let config = seal_config(sector.size);
    check_length(usize::from(config.partitions), proof)?;
    ready(Circuit::Seal, sector.size)?;
    let holds = with_tree!(
        sector.size,
        seal_holds(sector, ticket, seed, comm_d, comm_r, proof)
    );
    verdict(holds)
}

fn seal_holds<Tree: 'static + MerkleTreeTrait>(
    sector: &SealingSector,
    ticket: &Ticket,
    seed: &Seed,
    comm_d: &Commitment,
    comm_r: &Commitment,
    proof: &[u8],
) -> anyhow::Result<bool> {
    filecoin_proofs::verify_seal::<Tree>(
        &seal_config(sector.size),
        comm_r.0,
        comm_d.0,
        prover_id(sector.id.miner),
        sector.id.number.0.into(),
        *ticket,
        *seed,
        proof,
    )
}

/// The SNARK of a PoSt over opened sectors.
pub(crate) fn post<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    statement: &PostStatement,
    sectors: &[(SectorNumber, Commitment)],
    mut proofs: Vec<FallbackPoStSectorProof<Tree>>,
) -> Result<Vec<u8>, ProofError> {
    params::require(&[circuit(statement)], statement.header.size)?;
    // As the network's verifier has them: each sector once, by number. A sector comes twice where
    // it stands in for a faulty one.
    proofs.sort_by_key(|p| p.sector_id);
    proofs.dedup_by_key(|p| p.sector_id);
    let (config, randomness) = (&statement.config, &statement.randomness());
    let prover = prover_id(statement.header.miner);
    let proof = if statement.header.kind == ProofKind::Winning {
        library("the SNARK of a WinningPoSt", || {
            generate_winning_post_with_vanilla(config, randomness, prover, proofs)
        })
    } else {
        library("the SNARK of a WindowPoSt", || {
            generate_window_post_with_vanilla(config, randomness, prover, proofs)
        })
    }?;
    verify_post(statement, sectors, &proof)?;
    Ok(proof)
}

pub(crate) fn verify_post(
    statement: &PostStatement,
    sectors: &[(SectorNumber, Commitment)],
    proof: &[u8],
) -> Result<(), Refused> {
    let mut replicas = BTreeMap::new();
    for (number, comm_r) in sectors {
        element(comm_r.0, "comm_r")?;
        let replica =
            PublicReplicaInfo::new(comm_r.0).map_err(|_| Refused::PublicInput("comm_r is zero"))?;
        let earlier = replicas.insert(LibrarySector::from(number.0), replica.clone());
        if earlier.is_some_and(|e| e != replica) {
            return Err(Refused::PublicInput("one sector with two commitments"));
        }
    }
    let partitions = if statement.header.kind == ProofKind::Winning {
        1
    } else {
        replicas.len().div_ceil(statement.config.sector_count)
    };
    check_length(partitions, proof)?;
    ready(circuit(statement), statement.header.size)?;
    let holds = with_tree!(
        statement.header.size,
        post_holds(statement, &replicas, proof)
    );
    verdict(holds)
}

fn post_holds<Tree: 'static + MerkleTreeTrait>(
    statement: &PostStatement,
    replicas: &BTreeMap<LibrarySector, PublicReplicaInfo>,
    proof: &[u8],
) -> anyhow::Result<bool> {
    let (config, randomness) = (&statement.config, &statement.randomness());
    let prover = prover_id(statement.header.miner);
    if statement.header.kind == ProofKind::Winning {
        let replicas: Vec<_> = replicas.iter().map(|(n, r)| (*n, r.clone())).collect();
        filecoin_proofs::verify_winning_post::<Tree>(config, randomness, &replicas, prover, proof)
    } else {
        filecoin_proofs::verify_window_post::<Tree>(config, randomness, replicas, prover, proof)
    }
}

fn circuit(statement: &PostStatement) -> Circuit {
    if statement.header.kind == ProofKind::Winning {
        Circuit::WinningPost
    } else {
        Circuit::WindowPost
    }
}

/// The SNARK of a replica update.
pub(crate) fn update(
    files: &UpdatedSector<'_>,
    old_comm_r: &Commitment,
    new: &SealedCommitments,
) -> Result<Vec<u8>, ProofError> {
    params::require(&[Circuit::Update], files.size)?;
    let proof = with_tree!(files.size, update_of(files, old_comm_r, new))?;
    verify_update(files.size, old_comm_r, &new.comm_r, &new.comm_d, &proof)?;
    Ok(proof)
}

fn update_of<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    files: &UpdatedSector<'_>,
    old_comm_r: &Commitment,
    new: &SealedCommitments,
) -> Result<Vec<u8>, ProofError> {
    let out = library("ProveReplicaUpdate", || {
        generate_empty_sector_update_proof::<Tree>(
            &update_config(files.size),
            old_comm_r.0,
            new.comm_r.0,
            new.comm_d.0,
            files.sealed,
            files.cache,
            files.updated,
            files.updated_cache,
        )
    })?;
    Ok(out.0)
}

pub(crate) fn verify_update(
    size: SectorSize,
    old_comm_r: &Commitment,
    new_comm_r: &Commitment,
    new_comm_d: &Commitment,
    proof: &[u8],
) -> Result<(), Refused> {
    element(old_comm_r.0, "old comm_r")?;
    element(new_comm_r.0, "new comm_r")?;
    element(new_comm_d.0, "new comm_d")?;
    check_length(partition_count(nodes(size)), proof)?;
    ready(Circuit::Update, size)?;
    let holds = with_tree!(
        size,
        update_holds(size, old_comm_r, new_comm_r, new_comm_d, proof)
    );
    verdict(holds)
}

fn update_holds<Tree: 'static + MerkleTreeTrait<Hasher = PoseidonHasher>>(
    size: SectorSize,
    old_comm_r: &Commitment,
    new_comm_r: &Commitment,
    new_comm_d: &Commitment,
    proof: &[u8],
) -> anyhow::Result<bool> {
    verify_empty_sector_update_proof::<Tree>(
        &update_config(size),
        proof,
        old_comm_r.0,
        new_comm_r.0,
        new_comm_d.0,
    )
}

pub(crate) fn check_length(partitions: usize, proof: &[u8]) -> Result<(), Refused> {
    let (expected, got) = ((partitions * SNARK) as u64, proof.len() as u64);
    if expected == got {
        Ok(())
    } else {
        Err(Refused::Length { expected, got })
    }
}

/// Without the verifying key there is no verdict.
pub(crate) fn ready(circuit: Circuit, size: SectorSize) -> Result<(), Refused> {
    params::require(&[circuit], size).map_err(|e| Refused::Internal(e.to_string()))
}

pub(crate) fn verdict(holds: anyhow::Result<bool>) -> Result<(), Refused> {
    match holds {
        Ok(true) => Ok(()),
        Ok(false) => Err(Refused::Snark("not for these public inputs".into())),
        Err(e) => Err(Refused::Snark(format!("{e:#}"))),
    }
}
