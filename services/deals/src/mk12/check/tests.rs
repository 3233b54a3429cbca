use fvm_shared::crypto::signature::Signature;
use k256::ecdsa::SigningKey;
use lotus_actors::PaddedPieceSize;
use proptest::prelude::*;

use super::*;
use crate::damage::{damage, damaged};
use crate::mk12::wire::{DealUuid, decode};

const PEER: &str =
    "libp2p:///ip4/10.0.0.1/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";

fn key() -> SigningKey {
    SigningKey::from_slice(&[7; 32]).unwrap()
}

fn client() -> Address {
    let public = key().verifying_key().to_encoded_point(false);
    Address::new_secp256k1(public.as_bytes()).unwrap()
}

fn sign(params: &mut DealParams) {
    let proposal = encode(&params.client_deal_proposal.proposal);
    let hash = blake2b_simd::Params::new().hash_length(32).hash(&proposal);
    let (signature, recovery) = key().sign_prehash_recoverable(hash.as_bytes()).unwrap();
    let mut bytes = signature.to_bytes().to_vec();
    bytes.push(recovery.to_byte());
    params.client_deal_proposal.client_signature = Signature::new_secp256k1(bytes);
}

fn good() -> DealParams {
    let mut params = crate::mk12::wire::tests::params();
    let p = &mut params.client_deal_proposal.proposal;
    p.client = client();
    p.client_collateral = TokenAmount::from_atto(0);
    params
}

fn cfg() -> DealsConfig {
    DealsConfig::default()
}

/// Changes a good proposal, signs it, and checks it against changed facts.
fn outcome(
    change: impl FnOnce(&mut DealParams),
    other: impl FnOnce(&mut Facts<'_>),
) -> Result<Proposal, String> {
    let mut params = good();
    change(&mut params);
    sign(&mut params);
    against(&params, other)
}

fn against(params: &DealParams, other: impl FnOnce(&mut Facts<'_>)) -> Result<Proposal, String> {
    let terms = Terms {
        price: TokenAmount::from_atto(1 << 20),
        verified_price: TokenAmount::from_atto(0),
        min_piece_size: PaddedSize::new(256).unwrap(),
        max_piece_size: PaddedSize::new(8 << 20).unwrap(),
    };
    let cfg = cfg();
    let mut facts = Facts {
        provider: ActorId(1000),
        sector_size: SectorSize::S8MiB,
        height: Epoch(100),
        client: client(),
        client_available: TokenAmount::from_whole(1),
        collateral_min: TokenAmount::from_atto(0),
        terms: &terms,
        cfg: &cfg,
    };
    other(&mut facts);
    check(params, &facts)
}

#[test]
fn a_good_proposal_passes() {
    let p = outcome(|_| {}, |_| {}).unwrap();
    assert_eq!(p.key.client, mk20::address_text(&client()));
    assert_eq!(
        DealUuid::from(p.key.id).to_string(),
        "3a1b5c7d-0001-4002-8003-000000000004"
    );
    assert_eq!((p.piece.raw_size, p.piece.size.get()), (2000, 2048));
    assert_eq!((p.start_epoch, p.end_epoch), (Epoch(5000), Epoch(600_000)));
    assert!(p.retrieval.index && p.retrieval.announce_payload);
    let Source::Http(urls) = &p.source else {
        panic!("{:?}", p.source)
    };
    assert_eq!(urls[0].url, "http://sp.example/a.car");
    let signed = p.signed.unwrap();
    assert!(!signed.offline && signed.transfer_size == 2000);
    // What goes on chain is what was signed, to the byte.
    let mut params = good();
    sign(&mut params);
    assert_eq!(signed.deal, encode(&params.client_deal_proposal));
    assert_eq!(p.digest, digest(&params));
}

#[test]
fn another_signature_is_no_signature() {
    let unsigned = good();
    assert_eq!(against(&unsigned, |_| {}), Err("invalid signature".into()));
    let mut changed = good();
    sign(&mut changed);
    changed.client_deal_proposal.proposal.end_epoch += 1;
    assert_eq!(against(&changed, |_| {}), Err("invalid signature".into()));
    let mut bls = good();
    sign(&mut bls);
    bls.client_deal_proposal.client_signature.sig_type =
        fvm_shared::crypto::signature::SignatureType::BLS;
    assert_eq!(against(&bls, |_| {}), Err("invalid signature".into()));
}

#[test]
fn each_refusal_has_its_reason() {
    type Change = Box<dyn FnOnce(&mut DealParams)>;
    let on = |f: fn(&mut DealProposal)| -> Change {
        Box::new(move |p| f(&mut p.client_deal_proposal.proposal))
    };
    let by = |f: fn(&mut DealParams)| -> Change { Box::new(f) };
    let cases: Vec<(Change, &str)> = vec![
        (
            on(|p| p.provider = Address::new_id(1001)),
            "incorrect provider for deal; proposal.Provider: t01001; provider.Address: t01000",
        ),
        (
            on(|p| p.label = Label::String("x".repeat(257))),
            "deal label can be at most 256 bytes, is 257",
        ),
        (
            on(|p| p.label = Label::Bytes(vec![0; 300])),
            "deal label can be at most 256 bytes, is 300",
        ),
        (
            on(|p| p.piece_size = PaddedPieceSize(2047)),
            "proposal piece size is invalid",
        ),
        (
            on(|p| p.piece_cid = crate::mk12::wire::tests::params().deal_data_root),
            "proposal PieceCID had wrong prefix",
        ),
        (
            on(|p| p.end_epoch = p.start_epoch),
            "proposal end 5000 before proposal start 5000",
        ),
        (
            on(|p| p.start_epoch = 99),
            "deal start epoch 99 has already elapsed (current epoch: 100)",
        ),
        (
            on(|p| p.end_epoch = p.start_epoch + 518_399),
            "deal duration out of bounds (min, max, provided): 518400, 3680640, 518399",
        ),
        (
            on(|p| p.start_epoch = i64::MIN),
            "deal start epoch -9223372036854775808 has already elapsed",
        ),
        (
            on(|p| p.end_epoch = i64::MAX),
            "deal duration out of bounds",
        ),
        (
            on(|p| p.end_epoch = 3_680_741),
            "invalid deal end epoch 3680741: cannot be more than 3680640 past current epoch 100",
        ),
        (
            on(|p| p.provider_collateral = TokenAmount::from_atto(1)),
            "proposed provider collateral 1 above maximum 0",
        ),
        (
            on(|p| p.storage_price_per_epoch = TokenAmount::from_atto(1)),
            "storage price per epoch less than asking price: 1 < 2",
        ),
        (
            on(|p| p.piece_size = PaddedPieceSize(128)),
            "piece size less than minimum required size: 128 < 256",
        ),
        (
            on(|p| {
                p.piece_size = PaddedPieceSize(16 << 20);
                p.storage_price_per_epoch = TokenAmount::from_whole(1);
            }),
            "piece size more than maximum allowed size: 16777216 > 8388608",
        ),
        (
            on(|p| p.client_collateral = TokenAmount::from_whole(2)),
            "client available funds in escrow",
        ),
        (
            on(|p| p.verified_deal = true),
            "verified deals are taken by allocation",
        ),
        (
            by(|p| p.transfer.kind = "graphsync".into()),
            "cannot parse params for unrecognized transfer type 'graphsync'",
        ),
        (by(|p| p.transfer.size = 0), "the transfer has no size"),
        (
            by(|p| p.transfer.size = 2033),
            "a transfer of 2033 bytes makes no piece of 2048",
        ),
        (
            by(|p| p.transfer.size = 1000),
            "a transfer of 1000 bytes makes no piece of 2048",
        ),
        (
            by(|p| p.transfer.params = b"{".to_vec()),
            "failed to de-serialize transport params bytes",
        ),
        (
            by(|p| p.transfer.params = br#"{"URL":"libp2p:///ip4/1.2.3.4"}"#.to_vec()),
            "cannot fetch from the transfer URL: \"/ip4/1.2.3.4\" names no peer",
        ),
        (
            by(|p| p.transfer.params = format!(r#"{{"URL":"{PEER}"}}"#).into()),
            "cannot fetch from the transfer URL: 10.0.0.1 is not a public address",
        ),
        (
            by(|p| {
                let public = PEER.replace("10.0.0.1", "1.2.3.4");
                p.transfer.params = format!(r#"{{"URL":"{public}"}}"#).into();
            }),
            "libp2p:///ip4/1.2.3.4/tcp/4001/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN has a port that is not fetched from",
        ),
        (
            by(|p| p.transfer.params = br#"{"URL":"http://127.0.0.1/x"}"#.to_vec()),
            "cannot fetch from the transfer URL: 127.0.0.1 is not a public address",
        ),
        (
            by(|p| p.transfer.params = br#"{"URL":"http://sp.example:22/x"}"#.to_vec()),
            "http://sp.example:22/x has a port that is not fetched from",
        ),
        (
            by(|p| {
                p.transfer.params =
                    br#"{"URL":"http://sp.example/x","Headers":{"Host":"inside"}}"#.to_vec();
            }),
            "header \"Host\" can not be sent",
        ),
    ];
    for (change, reason) in cases {
        let refused = outcome(change, |_| {}).unwrap_err();
        assert!(refused.starts_with(reason), "{refused} is not {reason}");
    }
}

#[test]
fn the_chain_sets_the_bounds_of_the_collateral() {
    let least = TokenAmount::from_atto(10);
    let with = |atto: u64| {
        outcome(
            |p| {
                p.client_deal_proposal.proposal.provider_collateral = TokenAmount::from_atto(atto);
            },
            |f| f.collateral_min = least.clone(),
        )
    };
    assert_eq!(
        with(9),
        Err("proposed provider collateral 9 below minimum 10".into())
    );
    assert!(with(10).is_ok() && with(20).is_ok());
    assert_eq!(
        with(21),
        Err("proposed provider collateral 21 above maximum 20".into())
    );
    // The funds of a client that was rich yesterday.
    let poor = outcome(|_| {}, |f| f.client_available = TokenAmount::from_atto(3));
    assert!(
        poor.unwrap_err()
            .starts_with("client available funds in escrow 3 not enough")
    );
}

#[test]
fn an_offline_deal_names_no_transfer() {
    let offline = |p: &mut DealParams| {
        p.is_offline = true;
        p.transfer = Transfer::default();
    };
    let p = outcome(offline, |_| {}).unwrap();
    assert_eq!(p.source, Source::Offline);
    assert_eq!(
        p.piece.raw_size, 2032,
        "the most that fits, until it is known"
    );
    assert!(p.signed.unwrap().offline);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    /// Nobody but the client changes what it signed; the rest of a message nobody signs.
    #[test]
    fn a_proposal_that_was_changed_is_nobodys(damage in damage()) {
        let mut params = good();
        sign(&mut params);
        let Ok(other) = decode::<DealParams>(&damaged(&encode(&params), &damage)) else {
            return Ok(());
        };
        let signed = &other.client_deal_proposal;
        let got = against(&other, |f| f.client = signed.proposal.client);
        let unsigned = got == Err("invalid signature".to_owned());
        prop_assert_eq!(unsigned, *signed != params.client_deal_proposal, "{:?}", got);
        if let Ok(taken) = got {
            prop_assert_eq!(&taken.signed.unwrap().deal, &encode(&params.client_deal_proposal));
            prop_assert!(taken.piece.raw_size <= taken.piece.size.unpadded().get());
            prop_assert_eq!(taken.digest == digest(&params), other == params);
        }
    }
}
