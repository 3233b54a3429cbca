//! Market, verified registry, power actor, replica updates.

use lotus_actors::{BigInt, RawBytes, encode, market, miner, power};
use lotus_devnet::{AllocationOrder, Chain};
use lotus_proofs::{Prover, Vanilla};
use lotus_types::{PaddedSize, SectorNumber, SectorSize, TokenAmount};

use crate::sp::*;

#[test]
fn verified_data_is_claimed_once_and_counts_tenfold() {
    let sp = Sp::new();
    let client = sp.client();
    let s = sp.seal(1, 5);
    let piece = s.layout.iter().find(|p| !p.filler).unwrap().piece;
    assert_eq!(piece.size, PaddedSize::new(1024).unwrap());
    let order = AllocationOrder {
        provider: sp.miner,
        piece: piece.cid.cid(),
        size: piece.size.get(),
        term_min: policy().allocation_term_min,
        term_max: policy().allocation_term_max,
        claim_within: 1_000,
    };
    let sent = sp.chain.order_allocation(&client, &order).unwrap();
    assert_eq!(sp.land(&sent.cid()).receipt.exit_code, OK);
    let (id, allocation) = sp
        .chain
        .state_get_allocations(&client, HEAD)
        .unwrap()
        .pop_first()
        .unwrap();
    assert_eq!(allocation.provider, 1000);
    assert_eq!(sp.pre_commit(&s, |_| ()), OK);
    let proof = sp.commit(&s);
    let wrong = prove_params(
        &s,
        proof.clone(),
        manifests(&s.layout, Some((allocation.client, id + 1)), &[]),
    );
    assert_eq!(
        sp.send(miner::PROVE_COMMIT_SECTORS3, wrong),
        ILLEGAL_ARGUMENT
    );
    let right = prove_params(
        &s,
        proof,
        manifests(&s.layout, Some((allocation.client, id)), &[]),
    );
    assert_eq!(sp.send(miner::PROVE_COMMIT_SECTORS3, right), OK);
    assert_eq!(
        sp.chain.state_get_allocation(&client, id, HEAD).unwrap(),
        None
    );
    let claim = sp
        .chain
        .state_get_claim(&sp.miner, id, HEAD)
        .unwrap()
        .unwrap();
    assert_eq!(claim.sector, 1);
    let deadline = sp.wait_open(&s);
    assert_eq!(sp.post(deadline, sp.post_proof(&s), |_| ()), OK);
    let power = sp
        .chain
        .state_miner_power(&sp.miner, HEAD)
        .unwrap()
        .miner_power;
    let quality = BigInt::from(1024 * 10 + 1024);
    assert_eq!(power.raw_byte_power, BigInt::from(2048));
    assert_eq!(power.quality_adj_power, quality);

    // A longer life keeps the claim, all of it, and not beyond its term.
    let info = || {
        let number = SectorNumber(1);
        let info = sp.chain.state_sector_get_info(&sp.miner, number, HEAD);
        info.unwrap().unwrap()
    };
    let claims = sp.chain.state_get_claims(&sp.miner, HEAD).unwrap();
    assert_eq!(claims[&id].sector, SectorNumber(1));
    let longer = |to: i64, keep: &[u64], drop: &[u64]| {
        let named = !(keep.is_empty() && drop.is_empty());
        let with_claims = miner::SectorClaim {
            sector_number: 1,
            maintain_claims: keep.to_vec(),
            drop_claims: drop.to_vec(),
        };
        let e = miner::ExpirationExtension2 {
            deadline,
            partition: 0,
            sectors: Chain::numbers(if named { &[] } else { &[1] }),
            sectors_with_claims: named.then_some(with_claims).into_iter().collect(),
            new_expiration: to,
        };
        let params = miner::ExtendSectorExpiration2Params {
            extensions: vec![e],
        };
        sp.send(miner::EXTEND_SECTOR_EXPIRATION2, encode(&params))
    };
    let to = info().expiration.0 + 1_000;
    let beyond = claims[&id].term_start.0 + claims[&id].term_max.0 + 1;
    assert_eq!(
        longer(to, &[], &[]),
        ILLEGAL_ARGUMENT,
        "the claim is missing"
    );
    assert_eq!(
        longer(to, &[id + 1], &[]),
        ILLEGAL_ARGUMENT,
        "no such claim"
    );
    assert_eq!(longer(beyond, &[id], &[]), FORBIDDEN, "beyond its term");
    assert_eq!(longer(to, &[], &[id]), FORBIDDEN, "too early to drop it");
    assert_eq!(longer(to, &[id], &[]), OK);
    assert_eq!(info().expiration.0, to);
    let power = sp.chain.state_miner_power(&sp.miner, HEAD).unwrap();
    assert_eq!(power.miner_power.quality_adj_power, quality);
}

#[test]
fn a_snap_deal_puts_data_into_an_empty_sector() {
    let sp = Sp::new();
    let mut s = sp.seal_pieces(1, &[]);
    assert_eq!(sp.pre_commit(&s, |_| ()), OK);
    let proof = sp.commit(&s);
    assert_eq!(sp.prove(&s, proof), OK);
    let deadline = sp.wait_open(&s);
    assert_eq!(sp.post(deadline, sp.post_proof(&s), |_| ()), OK);
    sp.wait_closed();

    let data = vec![3u8; 1016];
    let piece = lotus_proofs::commp(data.as_slice()).unwrap();
    let layout = lotus_proofs::layout(SIZE, &[piece]).unwrap();
    let base = sp.dir.path().join("update");
    let (unsealed, updated, updated_cache) = (
        base.join("unsealed"),
        base.join("sealed"),
        base.join("cache"),
    );
    std::fs::create_dir_all(&updated_cache).unwrap();
    lotus_proofs::add_pieces(&unsealed, SIZE, &layout, &mut |_| {
        Ok(Box::new(std::io::Cursor::new(data.clone())))
    })
    .unwrap();
    let files = lotus_proofs::UpdatedSector {
        size: SIZE,
        sealed: &s.sealed,
        cache: &s.cache,
        updated: &updated,
        updated_cache: &updated_cache,
    };
    let new = Vanilla.replica_update(&files, &layout, &unsealed).unwrap();
    let proof = Vanilla.prove_update(&files, &s.comm.comm_r, &new).unwrap();
    let params = |proof: Vec<u8>, partition| {
        encode(&miner::ProveReplicaUpdates3Params {
            sector_updates: vec![miner::SectorUpdateManifest {
                sector: 1,
                deadline,
                partition,
                new_sealed_cid: new.comm_r.sealed_cid(),
                pieces: manifests(&layout, None, &[]),
            }],
            sector_proofs: vec![RawBytes::new(proof)],
            aggregate_proof: RawBytes::default(),
            update_proofs_type: lotus_proofs::update_proof_type(SIZE).into(),
            aggregate_proof_type: None,
            require_activation_success: true,
            require_notification_success: true,
        })
    };
    let update =
        |proof, partition| sp.send(miner::PROVE_REPLICA_UPDATES3, params(proof, partition));
    assert_eq!(update(flipped(proof.clone()), 0), ILLEGAL_ARGUMENT);
    assert_eq!(
        update(proof.clone(), 3),
        ILLEGAL_ARGUMENT,
        "a wrong partition"
    );
    assert_eq!(update(proof.clone(), 0), OK);
    assert_eq!(update(proof, 0), ILLEGAL_ARGUMENT, "updated twice");
    let info = sp
        .chain
        .state_sector_get_info(&sp.miner, SectorNumber(1), HEAD)
        .unwrap()
        .unwrap();
    assert_eq!(info.sealed_cid, new.comm_r.sealed_cid());
    assert_eq!(info.sector_key_cid, Some(s.comm.comm_r.sealed_cid()));

    // From now on the new replica is proven.
    (s.comm, s.sealed, s.cache) = (new, updated, updated_cache);
    sp.wait_open(&s);
    assert_eq!(sp.post(deadline, sp.post_proof(&s), |_| ()), OK);
    sp.wait_closed();
    assert_eq!(sp.faults(), [0u64; 0]);
    assert_eq!(sp.power(), BigInt::from(2048));

    let longer = |to: i64| {
        let e = miner::ExpirationExtension2 {
            deadline,
            partition: 0,
            sectors: Chain::numbers(&[1]),
            sectors_with_claims: vec![],
            new_expiration: to,
        };
        let params = miner::ExtendSectorExpiration2Params {
            extensions: vec![e],
        };
        sp.send(miner::EXTEND_SECTOR_EXPIRATION2, encode(&params))
    };
    assert_eq!(longer(info.expiration.0 - 1), ILLEGAL_ARGUMENT);
    assert_eq!(longer(info.expiration.0 + 100), OK);
    let info = sp
        .chain
        .state_sector_get_info(&sp.miner, SectorNumber(1), HEAD)
        .unwrap()
        .unwrap();
    assert!(info.deal_weight > BigInt::from(0));
    assert_eq!(sp.power(), BigInt::from(2048));
}

#[test]
fn a_published_deal_is_active_when_a_sector_holds_it() {
    let sp = Sp::new();
    let client = sp.client();
    let s = sp.seal(1, 5);
    let piece = s.layout[0].piece;
    let market_address = lotus_actors::actors::MARKET.address();
    let to_market = |from, method, params, value| {
        let mut m = sp.message(from, method, params).message;
        m.to = market_address;
        m.value = value;
        let signed = sp.chain.wallet_sign_message(&from, m).unwrap();
        let cid = sp.chain.mpool_push(signed).unwrap();
        sp.land(&cid).receipt
    };
    let add = encode(&market::AddBalanceParams {
        provider_or_client: client,
    });
    let proposal = market::DealProposal {
        piece_cid: piece.cid.cid(),
        piece_size: lotus_actors::PaddedPieceSize(piece.size.get()),
        verified_deal: false,
        client,
        provider: sp.miner,
        label: market::Label::String("test".into()),
        start_epoch: 2_000,
        end_epoch: 2_000 + policy().deal_duration_min,
        storage_price_per_epoch: TokenAmount::from_nano(1),
        provider_collateral: TokenAmount::default(),
        client_collateral: TokenAmount::default(),
    };
    let publish = |forge: bool| {
        let mut signature = sp.chain.wallet_sign(&client, &encode(&proposal)).unwrap();
        if forge {
            signature.bytes[3] ^= 1;
        }
        let params = encode(&market::PublishStorageDealsParams {
            deals: vec![market::ClientDealProposal {
                proposal: proposal.clone(),
                client_signature: signature,
            }],
        });
        to_market(
            sp.worker,
            market::PUBLISH_STORAGE_DEALS,
            params,
            TokenAmount::default(),
        )
    };
    assert_eq!(publish(false).exit_code, ILLEGAL_ARGUMENT, "no escrow");
    let fil = TokenAmount::from_whole(1_000);
    assert_eq!(
        to_market(client, market::ADD_BALANCE, add, fil.clone()).exit_code,
        OK
    );
    assert_eq!(
        publish(true).exit_code,
        ILLEGAL_ARGUMENT,
        "a forged signature"
    );
    let landed = publish(false);
    assert_eq!(landed.exit_code, OK);
    let ids: market::PublishStorageDealsReturn = lotus_actors::decode(&landed.r#return).unwrap();
    assert_eq!(
        publish(false).exit_code,
        ILLEGAL_ARGUMENT,
        "published twice"
    );
    let balance = sp.chain.state_market_balance(&client, HEAD).unwrap();
    assert_eq!(balance.escrow, fil);
    assert!(balance.locked.is_positive());
    let deal = || {
        sp.chain
            .state_market_storage_deal(ids.ids[0], HEAD)
            .unwrap()
            .state
    };
    assert_eq!(deal().sector_start_epoch.0, -1);

    assert_eq!(sp.pre_commit(&s, |_| ()), OK);
    let proof = sp.commit(&s);
    let tell = |id: u64| {
        let notify = [miner::DataActivationNotification {
            address: market_address,
            payload: RawBytes::new(encode(&id)),
        }];
        let params = prove_params(&s, proof.clone(), manifests(&s.layout, None, &notify));
        sp.send(miner::PROVE_COMMIT_SECTORS3, params)
    };
    assert_eq!(tell(99), 1004, "the market rejects an unknown deal");
    assert_eq!(tell(ids.ids[0]), OK);
    assert_eq!(deal().sector_number, 1);
    assert!(deal().sector_start_epoch.0 > 0);
}

#[test]
fn a_second_miner_can_be_made_and_handed_over() {
    let sp = Sp::new();
    let client = sp.client();
    let params = |worker| {
        encode(&power::CreateMinerParams {
            owner: client,
            worker,
            window_post_proof_type: lotus_proofs::window_post_proof_type(SectorSize::S8MiB).into(),
            peer: b"peer".to_vec(),
            multiaddrs: vec![],
        })
    };
    let make = |worker| {
        let mut m = sp
            .message(client, power::CREATE_MINER, params(worker))
            .message;
        m.to = lotus_actors::actors::POWER.address();
        let signed = sp.chain.wallet_sign_message(&client, m).unwrap();
        sp.land(&sp.chain.mpool_push(signed).unwrap()).receipt
    };
    assert_eq!(
        make(client).exit_code,
        ILLEGAL_ARGUMENT,
        "a worker needs a BLS key"
    );
    let landed = make(sp.worker);
    assert_eq!(landed.exit_code, OK);
    let made: power::CreateMinerReturn = lotus_actors::decode(&landed.r#return).unwrap();
    let id = sp
        .chain
        .state_lookup_id(&made.robust_address, HEAD)
        .unwrap();
    assert_eq!(id, made.id_address);
    let info = sp.chain.state_miner_info(&id, HEAD).unwrap();
    assert_eq!(info.sector_size, SectorSize::S8MiB.bytes());
    assert_eq!(info.owner, sp.chain.state_lookup_id(&client, HEAD).unwrap());
    assert_eq!(sp.chain.state_list_miners(HEAD).unwrap().len(), 2);

    // The first miner's owner takes a control address, which may then act for it.
    let change = encode(&miner::ChangeWorkerAddressParams {
        new_worker: sp.worker,
        new_control_addresses: vec![client],
    });
    let by_client = |params: &[u8]| {
        sp.send_from(client, miner::CHANGE_WORKER_ADDRESS, params.to_vec())
            .exit_code
    };
    assert_eq!(by_client(&change), FORBIDDEN);
    assert_eq!(sp.send(miner::CHANGE_WORKER_ADDRESS, change.clone()), OK);
    let peer = encode(&miner::ChangePeerIDParams {
        new_id: b"other".to_vec(),
    });
    assert_eq!(
        sp.send_from(client, miner::CHANGE_PEER_ID, peer).exit_code,
        OK
    );
    assert_eq!(by_client(&change), FORBIDDEN, "only the owner");

    let all = encode(&miner::WithdrawBalanceParams {
        amount_requested: TokenAmount::from_whole(1_000),
    });
    assert_eq!(
        sp.send_from(client, miner::WITHDRAW_BALANCE, all.clone())
            .exit_code,
        FORBIDDEN
    );
    let before = sp.balance();
    assert_eq!(sp.send(miner::WITHDRAW_BALANCE, all), OK);
    assert_eq!(sp.balance(), before - TokenAmount::from_whole(1_000));
}
