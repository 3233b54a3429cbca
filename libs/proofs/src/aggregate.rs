//! Aggregates: the SNARKs of many seals in one proof, which grows with the logarithm of their
//! number (SnarkPack; FIP-0013, and FIP-0100 since which it costs no fee).
//!
//! The library pads the SNARKs to a power of two with copies of the last one, and its verifier
//! takes their number from the proof. Here the number comes from the statements, and an aggregate
//! of so many has one exact length.

use std::ops::RangeInclusive;

use bellperson::groth16::aggregate::AggregateVersion;
use filecoin_proofs::types::SealCommitOutput;
use filecoin_proofs::{
    aggregate_seal_commit_proofs, get_seal_inputs, verify_aggregate_seal_commit_proofs,
};
use lotus_types::{ActorId, SectorSize};
use storage_proofs_core::merkle::MerkleTreeTrait;

use crate::network::{prover_id, seal_config, with_tree};
use crate::params::{self, Circuit};
use crate::prove::library;
use crate::snark::{check_length, ready, verdict};
use crate::verify::codec::element;
use crate::{ProofError, ProofMode, Refused, SealInputs};

/// How many seals one aggregate may have. Source: builtin-actors, runtime/src/runtime/policy.rs,
/// MIN_AGGREGATED_SECTORS and MAX_AGGREGATED_SECTORS.
pub const AGGREGATE_SEALS: RangeInclusive<usize> = 4..=819;

/// Compressed points of the two groups, and elements of the target group. Source: blstrs.
const G1: usize = 48;
const G2: usize = 96;
const GT: usize = 288;
/// What every aggregate has: two commitments of two elements, the products of A and B and of C,
/// the number of SNARKs, the folded points and keys, and the openings of the keys. Source:
/// bellperson, groth16/aggregate/proof.rs.
const FIXED: usize = 5 * GT + G1 + 4 + (G1 + G2 + G1) + (2 * G2 + 2 * G1) + (2 * G2 + 2 * G1);
/// What each halving of the number of SNARKs adds.
const HALVING: usize = 10 * GT + 2 * G1;

/// Bytes of an aggregate of so many seals.
#[must_use]
pub fn aggregate_bytes(size: SectorSize, seals: usize) -> usize {
    FIXED + halvings(size, seals) as usize * HALVING
}

/// Bytes of memory that making it takes: tables of 255 multiples of the points of the reference
/// string, four of G1 and two of G2 for each SNARK of the padded number, which the library makes
/// once to prove and once more to verify. Source: bellperson, `specialize_prover`.
#[must_use]
pub fn aggregate_memory(size: SectorSize, seals: usize) -> u64 {
    (2 * 255 * (4 * 2 * G1 + 2 * 2 * G2) as u64) << halvings(size, seals)
}

/// How often the padded number of SNARKs can be halved.
fn halvings(size: SectorSize, seals: usize) -> u32 {
    let snarks = seals.saturating_mul(partitions(size)).max(2);
    usize::BITS - (snarks - 1).leading_zeros()
}

fn partitions(size: SectorSize) -> usize {
    usize::from(seal_config(size).partitions)
}

pub(crate) fn aggregate(
    mode: ProofMode,
    miner: ActorId,
    size: SectorSize,
    seals: &[SealInputs],
    proofs: &[Vec<u8>],
) -> Result<Vec<u8>, ProofError> {
    if !mode.seal_snarks() {
        return Err(ProofError::NoAggregates(mode));
    }
    let bad = |why: String| ProofError::BadInput {
        what: "list of proofs to aggregate",
        why,
    };
    if !AGGREGATE_SEALS.contains(&seals.len()) || seals.len() != proofs.len() {
        return Err(bad(format!(
            "{} proofs of {} seals; an aggregate has {} to {}",
            proofs.len(),
            seals.len(),
            AGGREGATE_SEALS.start(),
            AGGREGATE_SEALS.end()
        )));
    }
    for (seal, proof) in seals.iter().zip(proofs) {
        check_length(partitions(size), proof)
            .map_err(|e| bad(format!("sector {}: {e}", seal.number)))?;
    }
    params::require(&[Circuit::Seal, Circuit::Aggregate], size)?;
    let made = with_tree!(size, aggregate_of(size, seals, proofs))?;
    verify(mode, miner, size, seals, &made)?;
    Ok(made)
}

fn aggregate_of<Tree: 'static + MerkleTreeTrait>(
    size: SectorSize,
    seals: &[SealInputs],
    proofs: &[Vec<u8>],
) -> Result<Vec<u8>, ProofError> {
    let (comm_rs, seeds) = transcript(seals);
    let outputs: Vec<_> = proofs
        .iter()
        .map(|proof| SealCommitOutput {
            proof: proof.clone(),
        })
        .collect();
    library("the aggregate of seals", || {
        aggregate_seal_commit_proofs::<Tree>(
            &seal_config(size),
            &comm_rs,
            &seeds,
            &outputs,
            AggregateVersion::V2,
        )
    })
}

pub(crate) fn verify(
    mode: ProofMode,
    miner: ActorId,
    size: SectorSize,
    seals: &[SealInputs],
    proof: &[u8],
) -> Result<(), Refused> {
    if !mode.seal_snarks() {
        return Err(Refused::NoAggregates(mode));
    }
    if !AGGREGATE_SEALS.contains(&seals.len()) {
        return Err(Refused::PublicInput("an aggregate has 4 to 819 seals"));
    }
    for seal in seals {
        element(seal.commitments.comm_d.0, "comm_d")?;
        element(seal.commitments.comm_r.0, "comm_r")?;
    }
    // It holds the number of SNARKs, a power of two, once more: another one has another length.
    let (expected, got) = (aggregate_bytes(size, seals.len()), proof.len());
    if expected != got {
        return Err(Refused::Length {
            expected: expected as u64,
            got: got as u64,
        });
    }
    ready(Circuit::Seal, size)?;
    ready(Circuit::Aggregate, size)?;
    verdict(with_tree!(size, holds(miner, size, seals, proof)))
}

fn holds<Tree: 'static + MerkleTreeTrait>(
    miner: ActorId,
    size: SectorSize,
    seals: &[SealInputs],
    proof: &[u8],
) -> anyhow::Result<bool> {
    let config = seal_config(size);
    let mut inputs = Vec::with_capacity(seals.len() * partitions(size));
    for seal in seals {
        inputs.extend(get_seal_inputs::<Tree>(
            &config,
            seal.commitments.comm_r.0,
            seal.commitments.comm_d.0,
            prover_id(miner),
            seal.number.0.into(),
            seal.ticket,
            seal.seed,
        )?);
    }
    let (comm_rs, seeds) = transcript(seals);
    verify_aggregate_seal_commit_proofs::<Tree>(
        &config,
        proof.to_vec(),
        &comm_rs,
        &seeds,
        inputs,
        AggregateVersion::V2,
    )
}

/// What the aggregate's challenges are drawn from besides the SNARKs.
fn transcript(seals: &[SealInputs]) -> (Vec<[u8; 32]>, Vec<[u8; 32]>) {
    seals
        .iter()
        .map(|s| (s.commitments.comm_r.0, s.seed))
        .unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The library's own fixed sample of four SNARKs has 8,212 bytes, and the largest aggregate is
    /// one that the actors and a message hold.
    #[test]
    fn an_aggregate_has_the_librarys_length() {
        assert_eq!(aggregate_bytes(SectorSize::S2KiB, 4), 8_212);
        let five = aggregate_bytes(SectorSize::S2KiB, 5);
        assert_eq!(five, 8_212 + HALVING);
        assert_eq!(aggregate_bytes(SectorSize::S2KiB, 8), five);
        assert_eq!(aggregate_bytes(SectorSize::S2KiB, 9), five + HALVING);
        // Ten SNARKs each: 40 are padded to 64.
        assert_eq!(aggregate_bytes(SectorSize::S32GiB, 4), 8_212 + 4 * HALVING);
        assert_eq!(aggregate_bytes(SectorSize::S32GiB, 819), 40_948);
        assert_eq!(aggregate_memory(SectorSize::S32GiB, 819) >> 20, 3_060);
    }
}
