//! Proposals in JSON that mean harm.

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

use super::tests::{CLIENT, good, sized};
use super::*;
use crate::damage::{damage, damaged};

/// Proposals that are taken, one for each way that the bytes come.
fn proposals() -> [Value; 3] {
    let mut http = good();
    let data = http["data"].as_object_mut().unwrap();
    data.remove("source_http_put");
    let url = json!({
        "url": "https://example.com/a.car",
        "headers": {"Authorization": ["x"]},
        "priority": 1,
        "fallback": true,
    });
    data.insert("source_http".into(), json!({"urls": [url]}));
    let mut offline = good();
    offline["data"] = json!({
        "piece_cid": sized(1000),
        "format": {"raw": {}},
        "source_offline": {},
    });
    offline["products"]["retrieval_v1"] = json!({"announce_piece": true});
    let ddo = offline["products"]["ddo_v1"].as_object_mut().unwrap();
    ddo.insert("allocation_id".into(), json!(7));
    ddo.insert("notification_address".into(), json!("f01"));
    ddo.insert("notification_payload".into(), json!("AQID"));
    [good(), http, offline]
}

/// Any JSON, with numbers at the ends of their ranges and long texts.
fn values() -> impl Strategy<Value = Value> {
    let number = prop_oneof![
        Just(json!(i64::MIN)),
        Just(json!(i64::MAX)),
        Just(json!(u64::MAX)),
        Just(json!(-1)),
        Just(json!(0)),
        Just(json!(1e300)),
        any::<i64>().prop_map(|n| json!(n)),
        (0i64..4_000_000).prop_map(|n| json!(n)),
    ];
    let text = prop_oneof![
        ".{0,40}".prop_map(|s| json!(s)),
        (1usize..9_000).prop_map(|n| json!("é".repeat(n))),
        Just(json!(CLIENT)),
        Just(json!("<empty>")),
        Just(json!("http://127.0.0.1/")),
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(|b| json!(b)),
        number,
        text
    ];
    leaf.prop_recursive(3, 24, 8, |inner| {
        let object = prop::collection::btree_map("[a-z_/]{0,12}", inner.clone(), 0..8);
        prop_oneof![
            prop::collection::vec(inner, 0..16).prop_map(Value::Array),
            object.prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Every value in another.
fn places<'a>(value: &'a mut Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    let children: Vec<(String, &'a mut Value)> = match value {
        Value::Object(map) => map.iter_mut().map(|(k, v)| (k.clone(), v)).collect(),
        Value::Array(list) => (0..).map(|i: usize| i.to_string()).zip(list).collect(),
        _ => Vec::new(),
    };
    for (key, child) in children {
        let key = key.replace('~', "~0").replace('/', "~1");
        places(child, &format!("{at}/{key}"), found);
    }
}

/// What a body leads to: a deal that is within every bound, or a refusal that says where.
fn answered(body: &[u8]) -> Result<(), TestCaseError> {
    let deal: Deal = match serde_json::from_slice(body) {
        Ok(deal) => deal,
        Err(e) => {
            prop_assert!(e.line() > 0 && e.to_string().contains(" column "), "{e}");
            return Ok(());
        }
    };
    let again: Deal = serde_json::from_slice(&serde_json::to_vec(&deal).unwrap()).unwrap();
    prop_assert_eq!(&again, &deal);
    prop_assert_eq!(digest(&again), digest(&deal));
    let cfg = DealsConfig::default();
    let rules = Rules {
        provider: ActorId(1000),
        sector_size: SectorSize::S2KiB,
        height: Epoch(100),
        cfg: &cfg,
    };
    let signer = mk20::parse_address(CLIENT).unwrap();
    match validate(&deal, &signer, &rules) {
        Ok(p) => {
            prop_assert_eq!(&p.key.client, CLIENT);
            prop_assert!(p.piece.fits(rules.sector_size) && p.piece.raw_size > 0);
            prop_assert!(p.start_epoch > rules.height && p.start_epoch < p.end_epoch);
            prop_assert!(p.end_epoch <= rules.height + MAX_DURATION + MAX_DURATION);
            if let Source::Http(urls) = &p.source {
                prop_assert!(urls.len() <= MAX_URLS);
                prop_assert!(urls.iter().all(|u| u.url.len() <= MAX_TEXT));
            }
            prop_assert!(
                p.notify
                    .is_none_or(|(_, payload)| payload.len() <= MAX_PAYLOAD)
            );
        }
        Err(refusal) => {
            prop_assert!(!refusal.field.is_empty(), "{refusal:?}");
            prop_assert!(!refusal.fix.is_empty(), "{refusal:?}");
            prop_assert!((400..500).contains(&refusal.code), "{refusal:?}");
            // What was sent is not sent back whole.
            prop_assert!(refusal.error.len() < 1_000, "{refusal:?}");
        }
    }
    Ok(())
}

#[test]
fn they_are_taken_as_long_as_nothing_is_changed() {
    for proposal in proposals() {
        answered(proposal.to_string().as_bytes()).unwrap();
        let deal = serde_json::from_value(proposal).unwrap();
        let cfg = DealsConfig::default();
        let rules = Rules {
            provider: ActorId(1000),
            sector_size: SectorSize::S2KiB,
            height: Epoch(100),
            cfg: &cfg,
        };
        validate(&deal, &mk20::parse_address(CLIENT).unwrap(), &rules).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    /// Any value in the place of any other.
    #[test]
    fn another_value_is_taken_or_its_field_is_named(
        which in 0usize..3, changes in prop::collection::vec((any::<Index>(), values()), 1..3),
    ) {
        let mut proposal = proposals()[which].clone();
        for (at, new) in changes {
            let mut found = Vec::new();
            places(&mut proposal, "", &mut found);
            *proposal.pointer_mut(&found[at.index(found.len())]).unwrap() = new;
        }
        answered(proposal.to_string().as_bytes())?;
    }

    /// Any damage to the text.
    #[test]
    fn a_damaged_text_is_taken_or_refused_with_its_place(which in 0usize..3, damage in damage()) {
        let text = proposals()[which].to_string();
        answered(&damaged(text.as_bytes(), &damage))?;
    }
}
