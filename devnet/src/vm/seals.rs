//! The proofs of seals, each as it is or all in one aggregate.

use lotus_actors::miner::{ProveCommitSectors3Params, SectorPreCommitOnChainInfo};
use lotus_actors::{Dst, RawBytes, RegisteredAggregateProof};
use lotus_proofs::{SealInputs, SealedCommitments, SealingSector};
use lotus_types::{ActorId, Commitment, SectorId, SectorNumber};

use super::{Abort, Call, abort};
use crate::policy::Policy;
use crate::state::Miner;

/// The form of a message's proofs. Source: builtin-actors, actors/miner/src/lib.rs,
/// prove_commit_sectors3 and validate_seal_aggregate_proof.
pub(super) fn check_form(policy: &Policy, p: &ProveCommitSectors3Params) -> Result<(), Abort> {
    let (sectors, aggregate) = (p.sector_activations.len(), p.aggregate_proof.bytes());
    if p.sector_proofs.is_empty() == aggregate.is_empty() {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "exactly one of sector proofs or aggregate proof must be non-empty"
        );
    }
    if aggregate.is_empty() {
        if p.aggregate_proof_type.is_some() {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "aggregate proof type must be null with batched proofs"
            );
        }
        if p.sector_proofs.len() != sectors {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "mismatched lengths: {sectors} sector activations, {} proofs",
                p.sector_proofs.len()
            );
        }
        return Ok(());
    }
    if p.aggregate_proof_type != Some(RegisteredAggregateProof::SnarkPackV2) {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "aggregate proof type must be SnarkPackV2"
        );
    }
    let (min, max) = (policy.aggregated_sectors_min, policy.aggregated_sectors_max);
    if sectors > max {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "too many sectors addressed, addressed {sectors} want <= {max}"
        );
    }
    if sectors < min {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "too few sectors addressed, addressed {sectors} want >= {min}"
        );
    }
    let largest = policy.aggregate_proof_bytes_max;
    if aggregate.len() > largest {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "sector prove-commit proof of size {} exceeds max size of {largest}",
            aggregate.len()
        );
    }
    Ok(())
}

/// How the sectors of a message are proven.
pub(super) enum Proofs<'a> {
    /// One proof for each.
    Each(&'a [RawBytes]),
    /// All by one proof, which holds.
    Aggregated,
}

/// Checks a message's aggregate, if that is what it has.
pub(super) fn proofs<'a>(
    call: &Call<'_>,
    m: &Miner,
    p: &'a ProveCommitSectors3Params,
    pre_commits: &[impl AsRef<SectorPreCommitOnChainInfo>],
) -> Result<Proofs<'a>, Abort> {
    let aggregate = p.aggregate_proof.bytes();
    if aggregate.is_empty() {
        return Ok(Proofs::Each(&p.sector_proofs));
    }
    // Those that come too late are no less part of the aggregate.
    let seals: Vec<SealInputs> = pre_commits
        .iter()
        .map(|pc| inputs(call, pc.as_ref()))
        .collect::<Result<_, _>>()?;
    let verdict =
        call.env
            .verifier
            .verify_aggregate_seal_proofs(ActorId(m.id), m.size, &seals, aggregate);
    match verdict {
        Ok(()) => Ok(Proofs::Aggregated),
        Err(why) => abort!(USR_ILLEGAL_ARGUMENT, "aggregate seal verify failed: {why}"),
    }
}

impl Proofs<'_> {
    /// Checks the proof of the sector at a place in the message.
    pub(super) fn check(
        &self,
        at: usize,
        call: &Call<'_>,
        m: &Miner,
        seal: &SealInputs,
    ) -> Result<(), Abort> {
        let Self::Each(proofs) = self else {
            return Ok(());
        };
        let sector = SealingSector {
            id: SectorId {
                miner: ActorId(m.id),
                number: seal.number,
            },
            size: m.size,
        };
        let (c, proof) = (
            &seal.commitments,
            proofs.get(at).map_or(&[][..], |p| p.bytes()),
        );
        let verdict = call.env.verifier.verify_seal(
            &sector,
            &seal.ticket,
            &seal.seed,
            &c.comm_d,
            &c.comm_r,
            proof,
        );
        match verdict {
            Ok(()) => Ok(()),
            Err(why) => abort!(
                USR_ILLEGAL_ARGUMENT,
                "invalid proof for sector {}: {why}",
                seal.number
            ),
        }
    }
}

/// What the proof of a pre-committed sector must be about.
pub(super) fn inputs(
    call: &Call<'_>,
    pc: &SectorPreCommitOnChainInfo,
) -> Result<SealInputs, Abort> {
    let n = pc.info.sector_number;
    let unsealed = match pc.info.unsealed_cid.get_cid(pc.info.seal_proof) {
        Ok(cid) => cid,
        Err(e) => abort!(USR_ILLEGAL_ARGUMENT, "{e}"),
    };
    let (Ok(comm_d), Ok(comm_r)) = (
        Commitment::from_unsealed_cid(&unsealed),
        Commitment::from_sealed_cid(&pc.info.sealed_cid),
    ) else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "a commitment of sector {n} has the wrong prefix"
        );
    };
    let entropy = call.entropy();
    let ticket = call.tickets(Dst::SealRandomness, pc.info.seal_rand_epoch, &entropy)?;
    let seed_epoch = pc.pre_commit_epoch + call.policy().pre_commit_challenge_delay;
    let seed = call.beacon(Dst::InteractiveSealChallengeSeed, seed_epoch, &entropy)?;
    Ok(SealInputs {
        number: SectorNumber(n),
        ticket,
        seed,
        commitments: SealedCommitments { comm_r, comm_d },
    })
}
