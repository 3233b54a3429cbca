//! Onboarding and proving sectors: every wrong step is refused with the actor's exit code.

use lotus_actors::miner::{
    self, DeclareFaultsRecoveredParams, RecoveryDeclaration, TerminateSectorsParams,
    TerminationDeclaration,
};
use lotus_actors::{BigInt, encode};
use lotus_devnet::Chain;
use lotus_types::{Commitment, SectorNumber, TokenAmount};

use crate::sp::*;

#[test]
fn onboarding_refuses_every_wrong_step() {
    let sp = Sp::new();
    let s = sp.seal(1, 1);
    let old = sp.height();
    // The rest of the ticket's allowed age.
    while sp.height() - old < 100 {
        sp.advance(1);
    }
    assert_eq!(sp.pre_commit(&s, |_| ()), ILLEGAL_ARGUMENT, "an old ticket");
    let s = sp.seal(1, 2);
    let future = sp.height() + 50;
    for (what, got) in [
        (
            "a ticket of the future",
            sp.pre_commit(&s, |i| i.seal_rand_epoch = future),
        ),
        ("a short life", sp.pre_commit(&s, |i| i.expiration = 1_000)),
        ("a long life", sp.pre_commit(&s, |i| i.expiration *= 100)),
        (
            "another size",
            sp.pre_commit(&s, |i| i.seal_proof = 8.into()),
        ),
        (
            "commD as commR",
            sp.pre_commit(&s, |i| i.sealed_cid = s.comm.comm_d.unsealed_cid()),
        ),
        ("deal ids", sp.pre_commit(&s, |i| i.deal_ids = vec![1])),
    ] {
        assert_eq!(got, ILLEGAL_ARGUMENT, "{what}");
    }
    let client = sp.client();
    let params = sp.pre_commit_params(&s, |_| ());
    let stranger = sp.send_from(client, miner::PRE_COMMIT_SECTOR_BATCH2, params);
    assert_eq!(stranger.exit_code, FORBIDDEN);
    assert_eq!(
        sp.send(miner::PRE_COMMIT_SECTOR_BATCH2, vec![0x80]),
        SERIALIZATION
    );
    assert_eq!(sp.send(7_777, vec![]), UNHANDLED);

    let before = sp.balance();
    assert_eq!(sp.pre_commit(&s, |_| ()), OK);
    let deposit = sp.on_chain(&s).pre_commit_deposit;
    assert!(deposit.is_positive());
    assert_eq!(sp.balance(), before - &deposit, "the deposit is locked");
    assert_eq!(sp.prove(&s, vec![1; 100]), FORBIDDEN, "before the seed");
    assert_eq!(
        sp.pre_commit(&s, |_| ()),
        ILLEGAL_ARGUMENT,
        "a used sector number"
    );
    let proof = sp.commit(&s);
    let other = sp.seal(2, 3);
    assert_eq!(sp.prove(&other, proof.clone()), NOT_FOUND, "no pre-commit");
    assert_eq!(sp.pre_commit(&other, |_| ()), OK);
    let others_proof = sp.commit(&other);
    assert_eq!(
        sp.prove(&s, flipped(proof.clone())),
        ILLEGAL_ARGUMENT,
        "a flipped bit"
    );
    assert_eq!(
        sp.prove(&s, others_proof),
        ILLEGAL_ARGUMENT,
        "another sector's proof"
    );
    let mut wrong_data = sp.seal(3, 9);
    wrong_data.number = 1;
    assert_eq!(
        sp.prove(&wrong_data, proof.clone()),
        ILLEGAL_ARGUMENT,
        "other pieces"
    );
    assert_eq!(sp.prove(&s, proof.clone()), OK);
    assert_eq!(sp.prove(&s, proof), NOT_FOUND, "proven twice");

    let info = sp
        .chain
        .state_sector_get_info(&sp.miner, SectorNumber(1), HEAD)
        .unwrap()
        .unwrap();
    assert_eq!(
        Commitment::from_sealed_cid(&info.sealed_cid),
        Ok(s.comm.comm_r)
    );
    assert!(info.initial_pledge.is_positive());
    assert_eq!(
        sp.power(),
        BigInt::from(0),
        "no power before the first PoSt"
    );
}

#[test]
fn window_posts_earn_and_lose_power() {
    let sp = Sp::new();
    let s = sp.onboard(1);
    let deadline = sp.wait_open(&s);
    let proof = sp.post_proof(&s);
    let other = (deadline + 1) % policy().deadlines;
    for (what, code, got) in [
        (
            "a wrong deadline",
            ILLEGAL_ARGUMENT,
            sp.post(other, proof.clone(), |_| ()),
        ),
        (
            "no such deadline",
            ILLEGAL_ARGUMENT,
            sp.post(99, proof.clone(), |_| ()),
        ),
        (
            "a wrong partition",
            NOT_FOUND,
            sp.post(deadline, proof.clone(), |p| p.partitions[0].index = 5),
        ),
        (
            "another chain",
            ILLEGAL_ARGUMENT,
            sp.post(deadline, proof.clone(), |p| p.chain_commit_rand.0[0] ^= 1),
        ),
        (
            "an old chain",
            ILLEGAL_ARGUMENT,
            sp.post(deadline, proof.clone(), |p| p.chain_commit_epoch -= 50),
        ),
        (
            "no proof",
            ILLEGAL_ARGUMENT,
            sp.post(deadline, proof.clone(), |p| p.proofs.clear()),
        ),
        (
            "everything skipped",
            ILLEGAL_ARGUMENT,
            sp.post(deadline, proof.clone(), |p| p.partitions[0].skipped.set(1)),
        ),
    ] {
        assert_eq!(got, code, "{what}");
    }
    assert_eq!(sp.post(deadline, proof.clone(), |_| ()), OK);
    assert_eq!(
        sp.post(deadline, proof, |_| ()),
        ILLEGAL_ARGUMENT,
        "proven twice"
    );
    assert_eq!(sp.power(), BigInt::from(SIZE.bytes()));
    sp.wait_closed();
    assert_eq!(sp.faults(), [0u64; 0]);

    // A missed deadline.
    sp.wait_open(&s);
    sp.wait_closed();
    assert_eq!(sp.faults(), [1]);
    assert_eq!(sp.power(), BigInt::from(0));

    // A recovery is checked when it is submitted.
    let recovery = encode(&DeclareFaultsRecoveredParams {
        recoveries: vec![RecoveryDeclaration {
            deadline,
            partition: 0,
            sectors: Chain::numbers(&[1]),
        }],
    });
    assert_eq!(
        sp.send(miner::DECLARE_FAULTS_RECOVERED, recovery.clone()),
        OK
    );
    sp.wait_open(&s);
    assert_eq!(
        sp.send(miner::DECLARE_FAULTS_RECOVERED, recovery),
        ILLEGAL_ARGUMENT,
        "too late"
    );
    let proof = sp.post_proof(&s);
    assert_eq!(
        sp.post(deadline, flipped(proof.clone()), |_| ()),
        ILLEGAL_ARGUMENT
    );
    assert_eq!(sp.post(deadline, proof, |_| ()), OK);
    assert_eq!(sp.faults(), [0u64; 0]);
    assert_eq!(sp.power(), BigInt::from(SIZE.bytes()));
    sp.wait_closed();

    // A wrong proof is accepted at first, then disputed: fault and penalty.
    sp.wait_open(&s);
    let proof = sp.post_proof(&s);
    let rich = sp.balance();
    assert_eq!(sp.post(deadline, flipped(proof), |_| ()), OK, "optimistic");
    assert_eq!(sp.power(), BigInt::from(SIZE.bytes()), "not punished yet");
    sp.wait_closed();
    assert_eq!(sp.faults(), [1], "disputed");
    assert_eq!(sp.power(), BigInt::from(0));
    assert!(sp.balance() + TokenAmount::from_whole(20) < rich, "penalty");

    // Ending the sector gives the rest of its pledge back.
    let end = encode(&TerminateSectorsParams {
        terminations: vec![TerminationDeclaration {
            deadline,
            partition: 0,
            sectors: Chain::numbers(&[1]),
        }],
    });
    sp.advance(40);
    assert_eq!(sp.send(miner::TERMINATE_SECTORS, end), OK);
    let found = sp
        .chain
        .state_sector_get_info(&sp.miner, SectorNumber(1), HEAD);
    assert!(found.unwrap().is_some(), "until its partition is compacted");
    let partitions = sp.chain.state_miner_partitions(&sp.miner, deadline, HEAD);
    let partition = &partitions.unwrap()[0];
    assert!(partition.live_sectors.is_empty() && partition.all_sectors.get(1));
}
