//! The strict verifier.
//!
//! The proof library's own checks of vanilla proofs were written as the prover's self-check and
//! are not sound alone: an empty list passes, paths are not hashed, parents come from the proof.
//! Here every public input comes from the caller, everything derivable is derived, and the rest
//! is recomputed: paths, column hashes, labels, encodings, and the binding to comm_r.

pub(crate) mod codec;
pub(crate) mod merkle;
pub(crate) mod post;
pub(crate) mod seal;
pub(crate) mod update;

use std::panic::{AssertUnwindSafe, catch_unwind};

use lotus_types::{ActorId, Commitment, SectorNumber, SectorSize};

use crate::{
    ProofMode, Refused, SealInputs, SealingSector, Seed, Ticket, Verifier, aggregate, snark,
};
use codec::ProofKind;
use post::PostStatement;
use seal::SealStatement;
use update::UpdateStatement;

impl Verifier for ProofMode {
    fn verify_seal(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        seed: &Seed,
        comm_d: &Commitment,
        comm_r: &Commitment,
        proof: &[u8],
    ) -> Result<(), Refused> {
        contain(|| {
            if self.seal_snarks() {
                return snark::verify_seal(sector, ticket, seed, comm_d, comm_r, proof);
            }
            SealStatement::new(sector, ticket, seed, comm_d, comm_r)?.verify(proof)
        })
    }

    fn verify_aggregate_seal_proofs(
        &self,
        miner: ActorId,
        size: SectorSize,
        seals: &[SealInputs],
        proof: &[u8],
    ) -> Result<(), Refused> {
        contain(|| aggregate::verify(*self, miner, size, seals, proof))
    }

    fn verify_window_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused> {
        contain(|| {
            verify_post(
                *self,
                ProofKind::Window,
                miner,
                size,
                randomness,
                sectors,
                proof,
            )
        })
    }

    fn verify_winning_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused> {
        contain(|| {
            verify_post(
                *self,
                ProofKind::Winning,
                miner,
                size,
                randomness,
                sectors,
                proof,
            )
        })
    }

    fn verify_update(
        &self,
        size: SectorSize,
        old_comm_r: &Commitment,
        new_comm_r: &Commitment,
        new_comm_d: &Commitment,
        proof: &[u8],
    ) -> Result<(), Refused> {
        contain(|| {
            if self.seal_snarks() {
                return snark::verify_update(size, old_comm_r, new_comm_r, new_comm_d, proof);
            }
            UpdateStatement::new(size, old_comm_r, new_comm_r, new_comm_d)?.verify(proof)
        })
    }
}

fn verify_post(
    mode: ProofMode,
    kind: ProofKind,
    miner: ActorId,
    size: SectorSize,
    randomness: &[u8; 32],
    sectors: &[(SectorNumber, Commitment)],
    proof: &[u8],
) -> Result<(), Refused> {
    let statement = PostStatement::new(kind, miner, size, randomness, sectors.len())?;
    if mode.post_snarks() {
        snark::verify_post(&statement, sectors, proof)
    } else {
        statement.verify(sectors, proof)
    }
}

/// The last net: the checks above leave nothing for the libraries to panic on.
fn contain(f: impl FnOnce() -> Result<(), Refused>) -> Result<(), Refused> {
    catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|panic| Err(Refused::Internal(crate::prove::panic_text(panic.as_ref()))))
}
