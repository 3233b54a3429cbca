use std::collections::BTreeMap;
use std::fmt::Debug;

use futures::io::Cursor;
use lotus_actors::market::Label;
use lotus_actors::{BigInt, PaddedPieceSize};
use lotus_types::TokenAmount;
use proptest::prelude::*;

use super::*;
use crate::damage::{damage, damaged};
use crate::mk20::parse_address;

/// What Go programs wrote: name and hex, one message a line. Made by `boostly-peer golden`
/// (`e2e/peers/boostly`) from boostly's types with go-state-types v0.12.0; those of the ask, which
/// boostly lacks, by the same values in Boost's `storagemarket/types/legacytypes` (v2.5.2).
const GOLDEN: &str = include_str!("golden.txt");

fn golden(name: &str) -> Vec<u8> {
    let lines: BTreeMap<&str, &str> = GOLDEN.lines().filter_map(|l| l.split_once(' ')).collect();
    hex(lines[name])
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
        .collect()
}

fn uuid() -> DealUuid {
    DealUuid(hex("3a1b5c7d000140028003000000000004").try_into().unwrap())
}

fn root() -> Cid {
    "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"
        .parse()
        .unwrap()
}

fn signature() -> Signature {
    Signature::new_secp256k1((0..65).collect())
}

fn proposal() -> DealProposal {
    DealProposal {
        piece_cid: "baga6ea4seaqao7s73y24kcutaosvacpdjgfe5pw76ooefnyqw4ynr3d2y6x2mpq"
            .parse()
            .unwrap(),
        piece_size: PaddedPieceSize(2048),
        verified_deal: false,
        client: parse_address("t1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za").unwrap(),
        provider: Address::new_id(1000),
        label: Label::String("label".into()),
        start_epoch: 5000,
        end_epoch: 600_000,
        storage_price_per_epoch: TokenAmount::from_atto(77),
        provider_collateral: TokenAmount::from_atto(0),
        client_collateral: TokenAmount::from_atto(5),
    }
}

pub(in crate::mk12) fn params() -> DealParams {
    DealParams {
        deal_uuid: uuid(),
        transfer: Transfer {
            size: 2000,
            kind: "http".into(),
            params: br#"{"URL":"http://sp.example/a.car","Headers":null}"#.to_vec(),
            client_id: "c1".into(),
        },
        is_offline: false,
        deal_data_root: root(),
        skip_ipni_announce: false,
        client_deal_proposal: ClientDealProposal {
            proposal: proposal(),
            client_signature: signature(),
        },
        remove_unsealed_copy: true,
    }
}

fn both_ways<T: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, message: &T) {
    let theirs = golden(name);
    assert_eq!(&decode::<T>(&theirs).unwrap(), message, "{name}");
    assert_eq!(encode(message), theirs, "{name}");
}

#[test]
fn messages_are_those_of_go() {
    both_ways("deal", &params());
    let offline = DealParams {
        transfer: Transfer::default(),
        is_offline: true,
        skip_ipni_announce: true,
        remove_unsealed_copy: false,
        ..params()
    };
    both_ways("offline", &offline);
    let accepted = DealResponse {
        message: String::new(),
        accepted: true,
    };
    both_ways("accepted", &accepted);
    let refused = DealResponse {
        message: "no".into(),
        accepted: false,
    };
    both_ways("refused", &refused);
    let question = DealStatusRequest {
        deal_uuid: uuid(),
        signature: signature(),
    };
    both_ways("question", &question);
    let unknown = DealStatusResponse {
        error: "none".into(),
        deal_uuid: uuid(),
        is_offline: false,
        deal_status: None,
        transfer_size: 0,
        n_bytes_received: 0,
    };
    both_ways("unknown", &unknown);
    let cid = GOLDEN.lines().find_map(|l| l.strip_prefix("cid ")).unwrap();
    let status = DealStatusResponse {
        error: String::new(),
        deal_status: Some(DealStatus {
            error: String::new(),
            status: "Published".into(),
            proposal: proposal(),
            publish_cid: Some(root()),
            chain_deal_id: 9,
            sealing_status: "PreCommit1".into(),
            signed_proposal_cid: cid.parse().unwrap(),
        }),
        transfer_size: 2000,
        n_bytes_received: 2000,
        ..unknown
    };
    both_ways("status", &status);
    let signed = encode(&params().client_deal_proposal);
    assert_eq!(super::super::handler::cid_of(&signed).to_string(), cid);
}

#[test]
fn asks_are_those_of_go() {
    let miner = Address::new_id(1000);
    both_ways("ask_question", &AskRequest { miner });
    both_ways("no_ask", &AskResponse { ask: None });
    let ask = AskResponse {
        ask: Some(SignedStorageAsk {
            ask: StorageAsk {
                miner,
                price: TokenAmount::from_atto(50),
                seq_no: 3,
                expiry: 1_000_010,
                timestamp: 10,
                max_piece_size: 8 << 20,
                min_piece_size: 256,
                verified_price: TokenAmount::from_atto(5),
            },
            signature: signature(),
        }),
    };
    both_ways("ask", &ask);
}

#[test]
fn a_proposal_of_1_2_0_lacks_two_keys() {
    let mut whole: BTreeMap<String, ipld_core::ipld::Ipld> =
        lotus_actors::decode(&golden("deal")).unwrap();
    whole.remove("RemoveUnsealedCopy").unwrap();
    whole.remove("SkipIPNIAnnounce").unwrap();
    let old: DealParams = decode(&encode(&whole)).unwrap();
    let want = DealParams {
        remove_unsealed_copy: false,
        ..params()
    };
    assert_eq!(old, want);
}

#[test]
fn uuids_read_as_uuids() {
    assert_eq!(uuid().to_string(), "3a1b5c7d-0001-4002-8003-000000000004");
    assert_eq!(DealUuid::from(uuid().ulid()), uuid());
}

/// Gives out a few bytes at a time, as a network does.
async fn dripping(bytes: &[u8], step: usize) -> io::Result<DealParams> {
    let chunks: Vec<io::Result<Vec<u8>>> = bytes.chunks(step).map(|c| Ok(c.to_vec())).collect();
    let stream = futures::stream::iter(chunks);
    let mut reader = futures::TryStreamExt::into_async_read(stream);
    read(&mut reader).await
}

#[tokio::test]
async fn a_message_ends_where_it_ends() {
    let good = golden("deal");
    for step in [1, 7, 100, 10_000] {
        assert_eq!(dripping(&good, step).await.unwrap(), params());
        let mut more = good.clone();
        more.extend_from_slice(b"more");
        assert_eq!(dripping(&more, step).await.unwrap(), params());
        let cut = dripping(&good[..good.len() - 1], step).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }
    let mut more = good.clone();
    more.push(0);
    assert_eq!(decode::<DealParams>(&more), Err(BadMessage::Length));
    assert_eq!(decode::<DealParams>(&good[1..]), Err(BadMessage::Length));
}

#[test]
fn hostile_heads_are_refused_before_anything_is_made_of_them() {
    let refused = |bytes: &[u8]| decode::<DealParams>(bytes).unwrap_err();
    // Lengths of 2^63 and 2^64-1, for each kind that has one.
    for kind in [0x5b, 0x7b, 0x9b, 0xbb] {
        for len in [1u64 << 63, u64::MAX] {
            let mut bytes = vec![kind];
            bytes.extend_from_slice(&len.to_be_bytes());
            assert_eq!(refused(&bytes), BadMessage::TooLong);
        }
    }
    // Depth: arrays of one array, and tags of a tag.
    for nest in [0x81, 0xc1] {
        assert!(matches!(refused(&vec![nest; 1 << 20]), BadMessage::Cbor(_)));
    }
    // Indefinite and reserved.
    for byte in [0x5f, 0x7f, 0x9f, 0xbf, 0xff, 0x1c, 0x3e] {
        assert!(matches!(refused(&[byte]), BadMessage::Cbor(_)));
    }
    assert_eq!(refused(&vec![0; MAX_MESSAGE + 1]), BadMessage::TooLong);
    assert_eq!(refused(&[]), BadMessage::Length);
}

/// A map of CBOR with some of its keys, in this order.
fn map(keys: &[&str], of: &BTreeMap<String, ipld_core::ipld::Ipld>) -> Vec<u8> {
    let head = 0xa0 | u8::try_from(keys.len()).unwrap();
    let entry = |key: &&str| [encode(key), encode(&of[*key])].concat();
    let entries = keys.iter().flat_map(entry);
    std::iter::once(head).chain(entries).collect()
}

#[test]
fn what_is_missing_or_twice_is_named() {
    let all: BTreeMap<String, ipld_core::ipld::Ipld> =
        lotus_actors::decode(&golden("deal")).unwrap();
    let keys: Vec<&str> = all.keys().map(String::as_str).collect();
    assert_eq!(decode(&map(&keys, &all)), Ok(params()), "in any order");
    for (i, key) in keys.iter().enumerate() {
        let twice = [&keys[..], &[*key]].concat();
        let refused = decode::<DealParams>(&map(&twice, &all)).unwrap_err();
        assert!(refused.to_string().contains(*key), "{refused}");
        let without = [&keys[..i], &keys[i + 1..]].concat();
        if let Err(refused) = decode::<DealParams>(&map(&without, &all)) {
            assert!(refused.to_string().contains(*key), "{refused}");
        } else {
            let optional = [
                "IsOffline",
                "RemoveUnsealedCopy",
                "SkipIPNIAnnounce",
                "Transfer",
            ];
            assert!(optional.contains(key), "{key}");
        }
    }
}

/// Bytes of the keys that a proposal may lack.
const OPTIONAL: usize = 128;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    /// What a damaged proposal is read as is no larger than it, and is read as the same again.
    #[test]
    fn damaged_proposals_are_refused_or_are_others(damage in damage()) {
        let bytes = damaged(&golden("deal"), &damage);
        match decode::<DealParams>(&bytes) {
            Ok(read) => {
                let again = encode(&read);
                prop_assert!(again.len() <= bytes.len() + OPTIONAL);
                prop_assert_eq!(decode(&again), Ok(read));
            }
            Err(e) => {
                let why = e.to_string();
                prop_assert!(!why.is_empty() && why.len() < 500, "{why}");
                prop_assert!(!e.fix().is_empty());
            }
        }
    }

    /// The same of what others are asked, and of what they answer.
    #[test]
    fn other_damaged_messages_are_refused_or_are_others(damage in damage()) {
        fn one<T: Serialize + DeserializeOwned + PartialEq + Debug>(
            name: &str,
            damage: &[crate::damage::Splice],
        ) -> Result<(), TestCaseError> {
            let bytes = damaged(&golden(name), damage);
            if let Ok(read) = decode::<T>(&bytes) {
                let again = encode(&read);
                prop_assert!(again.len() <= bytes.len(), "{read:?}");
                prop_assert_eq!(decode(&again), Ok(read));
            }
            Ok(())
        }
        one::<DealStatusRequest>("question", &damage)?;
        one::<DealStatusResponse>("status", &damage)?;
        one::<AskRequest>("ask_question", &damage)?;
        one::<AskResponse>("ask", &damage)?;
    }
}

proptest! {
    /// Whatever comes: no panic, no more memory than it has bytes, and the reader of a stream
    /// agrees with the reader of bytes.
    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let whole = decode::<DealParams>(&bytes).is_ok();
        let streamed = futures::executor::block_on(read::<DealParams>(&mut Cursor::new(&bytes)));
        prop_assert!(!whole || streamed.is_ok());
        drop(decode::<DealStatusRequest>(&bytes));
        drop(decode::<AskRequest>(&bytes));
    }

    /// Damaged messages of Go.
    #[test]
    fn any_damage_is_answered(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        for name in ["deal", "status", "ask"] {
            let mut bytes = golden(name);
            let i = at.index(bytes.len());
            bytes[i] = byte;
            drop(decode::<DealParams>(&bytes));
            drop(decode::<DealStatusResponse>(&bytes));
            drop(decode::<AskResponse>(&bytes));
            bytes.truncate(cut.index(bytes.len()));
            prop_assert!(decode::<DealParams>(&bytes).is_err());
        }
    }

    /// What is encoded is read back, in any pieces.
    #[test]
    fn proposals_survive(size in any::<u64>(), price in any::<u128>(), label in ".{0,60}", step in 1usize..300) {
        let mut p = params();
        p.transfer.size = size;
        p.client_deal_proposal.proposal.storage_price_per_epoch =
            TokenAmount::from_atto(BigInt::from(price));
        p.client_deal_proposal.proposal.label = Label::String(label);
        let read = futures::executor::block_on(dripping(&encode(&p), step)).unwrap();
        prop_assert_eq!(read, p);
    }
}
