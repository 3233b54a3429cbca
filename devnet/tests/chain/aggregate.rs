//! Many sectors with one proof: what the actor asks of it, and what a wrong one does. The SNARKs
//! are in `tests/groth16.rs`; here the list of the vanilla proofs stands for the aggregate.

use std::sync::Arc;

use lotus_actors::miner::{
    PROVE_COMMIT_SECTORS3, ProveCommitSectors3Params, ProveCommitSectors3Return,
};
use lotus_actors::{RawBytes, RegisteredAggregateProof, decode, encode};
use lotus_proofs::{Refused, SealInputs, SealingSector, Seed, Ticket, Vanilla, Verifier};
use lotus_types::{ActorId, Commitment, SectorId, SectorNumber, SectorSize};

use crate::sp::*;

/// Takes the list of the proofs for an aggregate, if each holds at its place.
struct Lists;

impl Verifier for Lists {
    fn verify_seal(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        seed: &Seed,
        comm_d: &Commitment,
        comm_r: &Commitment,
        proof: &[u8],
    ) -> Result<(), Refused> {
        Vanilla.verify_seal(sector, ticket, seed, comm_d, comm_r, proof)
    }

    fn verify_aggregate_seal_proofs(
        &self,
        miner: ActorId,
        size: SectorSize,
        seals: &[SealInputs],
        proof: &[u8],
    ) -> Result<(), Refused> {
        let proofs: Vec<RawBytes> =
            decode(proof).map_err(|_| Refused::PublicInput("this is no list"))?;
        if proofs.len() != seals.len() {
            return Err(Refused::PublicInput("another number of proofs"));
        }
        for (s, proof) in seals.iter().zip(&proofs) {
            let id = SectorId {
                miner,
                number: s.number,
            };
            let (sector, c) = (SealingSector { id, size }, &s.commitments);
            let proof = proof.bytes();
            Vanilla.verify_seal(&sector, &s.ticket, &s.seed, &c.comm_d, &c.comm_r, proof)?;
        }
        Ok(())
    }

    fn verify_window_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused> {
        Vanilla.verify_window_post(miner, size, randomness, sectors, proof)
    }

    fn verify_winning_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused> {
        Vanilla.verify_winning_post(miner, size, randomness, sectors, proof)
    }

    fn verify_update(
        &self,
        size: SectorSize,
        old: &Commitment,
        new: &Commitment,
        new_d: &Commitment,
        proof: &[u8],
    ) -> Result<(), Refused> {
        Vanilla.verify_update(size, old, new, new_d, proof)
    }
}

fn list(proofs: &[Vec<u8>]) -> Vec<u8> {
    let proofs = proofs.iter().map(|p| RawBytes::new(p.clone()));
    encode(&proofs.collect::<Vec<_>>())
}

/// Pre-committed sectors and their proofs.
fn sectors(sp: &Sp, count: u64) -> (Vec<Sealed>, Vec<Vec<u8>>) {
    let sectors: Vec<_> = (1..=count).map(|n| sp.seal(n, 7)).collect();
    for s in &sectors {
        assert_eq!(sp.pre_commit(s, |_| ()), OK);
    }
    let proofs = sectors.iter().map(|s| sp.commit(s)).collect();
    sp.advance(1);
    (sectors, proofs)
}

#[test]
fn one_proof_activates_many_sectors() {
    let sp = Sp::with(Vanilla, Arc::new(Lists));
    let (sectors, proofs) = sectors(&sp, 4);
    let all: Vec<_> = sectors.iter().collect();
    let aggregate = list(&proofs);
    let prove = |sectors: &[&Sealed], proof: &[u8], change: fn(&mut ProveCommitSectors3Params)| {
        let mut params = aggregate_params(sectors, proof.to_vec());
        change(&mut params);
        sp.send(PROVE_COMMIT_SECTORS3, encode(&params))
    };
    let swapped = [all[1], all[0], all[2], all[3]];
    let twice = [all[0], all[0], all[2], all[3]];
    for (what, exit) in [
        ("too few", prove(&all[..3], &list(&proofs[..3]), |_| ())),
        ("of others", prove(&all, &list(&proofs[..3]), |_| ())),
        ("another order", prove(&swapped, &aggregate, |_| ())),
        ("one twice", prove(&twice, &aggregate, |_| ())),
        ("changed", prove(&all, &flipped(aggregate.clone()), |_| ())),
        (
            "no type",
            prove(&all, &aggregate, |p| p.aggregate_proof_type = None),
        ),
        (
            "an old type",
            prove(&all, &aggregate, |p| {
                p.aggregate_proof_type = Some(RegisteredAggregateProof::SnarkPackV1);
            }),
        ),
        (
            "both kinds",
            prove(&all, &aggregate, |p| {
                p.sector_proofs = vec![RawBytes::new(vec![1]); 4];
            }),
        ),
        ("neither", prove(&all, &[], |_| ())),
        ("too large", prove(&all, &[0; 81_961], |_| ())),
        (
            "the wrong pieces",
            prove(&all, &aggregate, |p| {
                p.sector_activations[3].pieces.clear();
            }),
        ),
    ] {
        assert_eq!(exit, ILLEGAL_ARGUMENT, "{what}");
    }
    let mut unknown = aggregate_params(&all, aggregate.clone());
    unknown.sector_activations[2].sector_number = 99;
    assert_eq!(sp.send(PROVE_COMMIT_SECTORS3, encode(&unknown)), NOT_FOUND);

    let params = encode(&aggregate_params(&all, aggregate));
    let signed = sp.message(sp.worker, PROVE_COMMIT_SECTORS3, params.clone());
    let done = sp.chain.state_call(&signed.message, HEAD).unwrap();
    assert_eq!(done.error, "");
    let receipt = sp.send_from(sp.worker, PROVE_COMMIT_SECTORS3, params);
    assert_eq!(receipt.exit_code, OK);
    let done: ProveCommitSectors3Return = decode(&receipt.r#return).unwrap();
    assert_eq!(done.activation_results.success_count, 4);
    for s in &sectors {
        let number = SectorNumber(s.number);
        let there = sp.chain.state_sector_get_info(&sp.miner, number, HEAD);
        assert!(there.unwrap().is_some());
    }
}

#[test]
fn vanilla_proofs_are_not_aggregated() {
    let sp = Sp::new();
    let (sectors, proofs) = sectors(&sp, 4);
    let all: Vec<_> = sectors.iter().collect();
    let params = encode(&aggregate_params(&all, list(&proofs)));
    let signed = sp.message(sp.worker, PROVE_COMMIT_SECTORS3, params);
    let done = sp.chain.state_call(&signed.message, HEAD).unwrap();
    assert_eq!(done.msg_rct.unwrap().exit_code, ILLEGAL_ARGUMENT);
    assert!(
        done.error
            .contains("vanilla mode are openings, which can not be aggregated"),
        "{}",
        done.error
    );
}
