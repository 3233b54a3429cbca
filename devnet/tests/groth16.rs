//! Seals whose proofs are SNARKs, on a chain. Needs parameter files:
//! `cargo xtask test --groth16 --porep` makes them and runs this.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "two tests use it, each another part")]
#[path = "chain/sp.rs"]
mod sp;

use std::sync::Arc;

use lotus_actors::encode;
use lotus_actors::miner::PROVE_COMMIT_SECTORS3;
use lotus_proofs::{ProofMode, Prover as _, SealInputs};
use lotus_types::{ActorId, SectorNumber};
use sp::{HEAD, ILLEGAL_ARGUMENT, OK, SIZE, Sealed, Sp, aggregate_params};

#[test]
#[ignore = "needs all parameters, of minutes and gigabytes: cargo xtask test --groth16 --porep"]
fn an_aggregate_of_poreps_is_taken_and_a_changed_one_refused() {
    let mode = ProofMode::Groth16;
    let sp = Sp::with(mode, Arc::new(mode));
    let sectors: Vec<Sealed> = (1..=4).map(|n| sp.seal(n, 7)).collect();
    for s in &sectors {
        assert_eq!(sp.pre_commit(s, |_| ()), OK);
    }
    let proofs: Vec<_> = sectors.iter().map(|s| sp.commit(s)).collect();
    let inputs = |s: &Sealed| SealInputs {
        number: SectorNumber(s.number),
        ticket: s.ticket,
        seed: sp.seed(s),
        commitments: s.comm,
    };
    let seals: Vec<_> = sectors.iter().map(inputs).collect();
    sp.advance(1);
    let aggregate = mode
        .aggregate_seal_proofs(ActorId(1000), SIZE, &seals, &proofs)
        .unwrap();
    let mut all: Vec<_> = sectors.iter().collect();
    let prove = |sectors: &[&Sealed], aggregate: &[u8]| {
        let params = aggregate_params(sectors, aggregate.to_vec());
        sp.send(PROVE_COMMIT_SECTORS3, encode(&params))
    };
    for at in [0, 1_488, aggregate.len() / 2, aggregate.len() - 1] {
        let mut changed = aggregate.clone();
        changed[at] ^= 1;
        assert_eq!(prove(&all, &changed), ILLEGAL_ARGUMENT, "byte {at}");
    }
    all.swap(0, 3);
    assert_eq!(prove(&all, &aggregate), ILLEGAL_ARGUMENT, "another order");
    all.swap(0, 3);
    assert_eq!(prove(&all[..3], &aggregate), ILLEGAL_ARGUMENT, "one less");
    assert_eq!(prove(&all, &aggregate), OK);
    for s in &sectors {
        let number = SectorNumber(s.number);
        let there = sp.chain.state_sector_get_info(&sp.miner, number, HEAD);
        assert!(there.unwrap().is_some());
    }
}
