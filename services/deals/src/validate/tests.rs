use hub_proto::v1::AllocationResponse;
use lotus_types::Commitment;
use serde_json::{Value, json};

use super::*;

const ID: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
pub(super) const CLIENT: &str = "t1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za";

fn cid_v2(raw: u64, size: PaddedSize) -> String {
    let info = PieceInfo {
        cid: PieceCid::new(Commitment([1; 32])),
        size,
        raw_size: raw,
    };
    info.cid_v2().to_string()
}

pub(super) fn sized(raw: u64) -> String {
    cid_v2(raw, PaddedSize::to_hold(raw).unwrap())
}

pub(super) fn good() -> Value {
    json!({
        "identifier": ID,
        "client": CLIENT,
        "data": {
            "piece_cid": {"/": sized(1000)},
            "format": {"car": {}},
            "source_http_put": {},
        },
        "products": {
            "ddo_v1": {"provider": "t01000", "start_epoch": 500, "duration": 518_400},
            "retrieval_v1": {"indexing": true, "announce_payload": true, "announce_piece": false},
        },
    })
}

fn check(v: Value) -> Result<Proposal, Refusal> {
    let cfg = DealsConfig::default();
    let rules = Rules {
        provider: ActorId(1000),
        sector_size: SectorSize::S2KiB,
        height: Epoch(100),
        cfg: &cfg,
    };
    let signer = mk20::parse_address(CLIENT).unwrap();
    validate(&serde_json::from_value(v).unwrap(), &signer, &rules)
}

/// Replaces (or with null removes) the value at a dotted path.
fn with(path: &str, value: Value) -> Value {
    let mut root = good();
    let (parent, leaf) = path.rsplit_once('.').unwrap_or(("", path));
    let mut at = &mut root;
    for part in parent.split('.').filter(|p| !p.is_empty()) {
        at = &mut at[part];
    }
    if value.is_null() {
        at.as_object_mut().unwrap().remove(leaf);
    } else {
        at[leaf] = value;
    }
    root
}

#[test]
fn a_good_proposal_passes() {
    let p = check(good()).unwrap();
    assert_eq!(p.key.to_string(), format!("{CLIENT}/{ID}"));
    assert_eq!((p.piece.raw_size, p.piece.size.get()), (1000, 1024));
    assert_eq!((p.format, p.source), (Format::Car, Source::Put));
    assert_eq!((p.start_epoch, p.end_epoch), (Epoch(500), Epoch(518_900)));
    assert_eq!(p.notify, None);
    assert!(p.retrieval.index && p.retrieval.announce_payload);
    let p = check(with("products.ddo_v1.start_epoch", Value::Null)).unwrap();
    assert_eq!(p.start_epoch, Epoch(100 + 5_760));
    let p = check(with("client", json!(CLIENT.replacen('t', "f", 1)))).unwrap();
    assert_eq!(p.key.client, CLIENT, "both prefixes name one client");
}

#[test]
fn each_wrong_field_has_its_own_refusal() {
    let v1 = PieceCid::new(Commitment([1; 32])).to_string();
    let urls = |u: Value| json!({"urls": u});
    let one = |u: &str| urls(json!([{"url": u}]));
    let http = |source: Value| {
        let mut v = with("data.source_http_put", Value::Null);
        v["data"]["source_http"] = source;
        v
    };
    let header = |name: &str, value: &str| {
        http(urls(
            json!([{"url": "https://example.com/x", "headers": {name: [value]}}]),
        ))
    };
    let ddo = |f: &str, v: Value| with(&format!("products.ddo_v1.{f}"), v);
    let retrieval = |i, payload, piece| {
        with(
            "products.retrieval_v1",
            json!({"indexing": i, "announce_payload": payload, "announce_piece": piece}),
        )
    };
    let raw_indexed = with("data.format", json!({"raw": {}}));
    // (what is wrong, proposal, code, field, words of the reason)
    let table: Vec<(&str, Value, u16, &str, &str)> = vec![
        (
            "bad ulid",
            with("identifier", json!("nope")),
            400,
            "identifier",
            "no ULID",
        ),
        (
            "ulid too large",
            with("identifier", json!("8ZZZZZZZZZZZZZZZZZZZZZZZZZ")),
            400,
            "identifier",
            "no ULID",
        ),
        (
            "bad client",
            with("client", json!("t1abc")),
            400,
            "client",
            "no address",
        ),
        (
            "id client",
            with("client", json!("t01001")),
            400,
            "client",
            "not the address of a key",
        ),
        (
            "someone else",
            with("client", json!("t1i5vulpjggjwd5ekcy2jkojcbx5yu2xrbsg6gdxa")),
            400,
            "client",
            "",
        ),
        (
            "pdp",
            with("products.pdp_v1", json!({})),
            423,
            "products.pdp_v1",
            "not offered",
        ),
        ("no data", with("data", Value::Null), 400, "data", "no data"),
        (
            "no cid",
            with("data.piece_cid", json!("x")),
            400,
            "data.piece_cid",
            "no CID",
        ),
        (
            "payload cid",
            with("data.piece_cid", json!("bafkqaaa")),
            400,
            "data.piece_cid",
            "no piece CID",
        ),
        (
            "cid v1",
            with("data.piece_cid", json!(v1)),
            400,
            "data.piece_cid",
            "version 1",
        ),
        (
            "empty",
            with(
                "data.piece_cid",
                json!(cid_v2(0, PaddedSize::new(128).unwrap())),
            ),
            400,
            "data.piece_cid",
            "empty",
        ),
        (
            "over-padded",
            with(
                "data.piece_cid",
                json!(cid_v2(100, PaddedSize::new(1024).unwrap())),
            ),
            400,
            "data.piece_cid",
            "padded to 1024",
        ),
        (
            "larger than the sector",
            with("data.piece_cid", json!(sized(2033))),
            400,
            "data.piece_cid",
            "holds 2048",
        ),
        (
            "no format",
            with("data.format", json!({})),
            430,
            "data.format",
            "missing",
        ),
        (
            "aggregate",
            with("data.format", json!({"aggregate": {}})),
            430,
            "data.format",
            "not taken",
        ),
        (
            "two formats",
            with("data.format", json!({"car": {}, "raw": {}})),
            430,
            "data.format",
            "more than one",
        ),
        (
            "no source",
            with("data.source_http_put", Value::Null),
            400,
            "data",
            "no source",
        ),
        (
            "two sources",
            with("data.source_http", one("https://example.com")),
            400,
            "data",
            "more than one",
        ),
        (
            "aggregate source",
            {
                let mut v = with("data.source_http_put", Value::Null);
                v["data"]["source_aggregate"] = json!({});
                v
            },
            422,
            "data.source_aggregate",
            "not taken",
        ),
        (
            "no urls",
            http(urls(json!([]))),
            430,
            "data.source_http.urls",
            "0 URLs",
        ),
        (
            "too many urls",
            http(urls(json!(vec![json!({"url": "https://example.com"}); 11]))),
            430,
            "data.source_http.urls",
            "11 URLs",
        ),
        (
            "ftp",
            http(one("ftp://example.com/x")),
            430,
            "data.source_http.urls",
            "http",
        ),
        (
            "not a url",
            http(one("::")),
            430,
            "data.source_http.urls",
            "no URL",
        ),
        (
            "credentials",
            http(one("http://u:p@example.com/")),
            430,
            "data.source_http.urls",
            "user",
        ),
        (
            "loopback",
            http(one("http://127.0.0.1/x")),
            430,
            "data.source_http.urls",
            "public",
        ),
        (
            "metadata",
            http(one("http://169.254.169.254/x")),
            430,
            "data.source_http.urls",
            "public",
        ),
        (
            "private v6",
            http(one("http://[fd00::1]/x")),
            430,
            "data.source_http.urls",
            "public",
        ),
        (
            "octal loopback",
            http(one("http://0177.1/x")),
            430,
            "data.source_http.urls",
            "public",
        ),
        (
            "host header",
            header("Host", "x"),
            430,
            "data.source_http.urls",
            "Host",
        ),
        (
            "header injection",
            header("X-A", "a\r\nb: c"),
            430,
            "data.source_http.urls",
            "X-A",
        ),
        (
            "no ddo",
            with("products.ddo_v1", Value::Null),
            425,
            "products.ddo_v1",
            "no storage product",
        ),
        (
            "other provider",
            ddo("provider", json!("t01001")),
            425,
            "products.ddo_v1.provider",
            "this is t01000",
        ),
        (
            "bad provider",
            ddo("provider", json!("x")),
            425,
            "products.ddo_v1.provider",
            "this is t01000",
        ),
        (
            "allocation 0",
            ddo("allocation_id", json!(0)),
            425,
            "products.ddo_v1.allocation_id",
            "does not exist",
        ),
        (
            "too short",
            ddo("duration", json!(518_399)),
            441,
            "products.ddo_v1.duration",
            "too short",
        ),
        (
            "negative",
            ddo("duration", json!(-1)),
            441,
            "products.ddo_v1.duration",
            "too short",
        ),
        (
            "too long",
            ddo("duration", json!(3_680_641)),
            425,
            "products.ddo_v1.duration",
            "not possible",
        ),
        (
            "start elapsed",
            ddo("start_epoch", json!(100)),
            425,
            "products.ddo_v1.start_epoch",
            "too early",
        ),
        (
            "start negative",
            ddo("start_epoch", json!(-5)),
            425,
            "products.ddo_v1.start_epoch",
            "too early",
        ),
        (
            "start far off",
            ddo("start_epoch", json!(4_000_000)),
            425,
            "products.ddo_v1.start_epoch",
            "too far",
        ),
        (
            "contract",
            ddo("market_address", json!("0x00")),
            425,
            "products.ddo_v1.market_address",
            "not supported",
        ),
        (
            "bad notification address",
            ddo("notification_address", json!("x")),
            425,
            "products.ddo_v1.notification_address",
            "no address",
        ),
        (
            "payload without address",
            ddo("notification_payload", json!("AAAA")),
            425,
            "products.ddo_v1.notification_address",
            "without an address",
        ),
        (
            "address without payload",
            ddo("notification_address", json!("t01001")),
            425,
            "products.ddo_v1.notification_payload",
            "without a payload",
        ),
        (
            "payload not base64",
            ddo("notification_payload", json!("!")),
            425,
            "products.ddo_v1.notification_payload",
            "base64",
        ),
        (
            "no retrieval",
            with("products.retrieval_v1", Value::Null),
            425,
            "products.retrieval_v1",
            "required",
        ),
        (
            "announce without index",
            retrieval(false, true, false),
            425,
            "products.retrieval_v1.announce_payload",
            "without an index",
        ),
        (
            "announce both",
            retrieval(true, true, true),
            425,
            "products.retrieval_v1.announce_piece",
            "both",
        ),
        (
            "index raw",
            raw_indexed,
            425,
            "products.retrieval_v1.indexing",
            "no blocks",
        ),
    ];
    for (what, proposal, code, field, words) in table {
        let refusal = check(proposal).expect_err(what);
        assert_eq!(
            (refusal.code, refusal.field.as_str()),
            (code, field),
            "{what}: {refusal:?}"
        );
        assert!(refusal.error.contains(words), "{what}: {refusal:?}");
        assert!(!refusal.fix.is_empty(), "{what}");
    }
}

#[test]
fn an_allocation_must_match_in_every_respect() {
    let cfg = DealsConfig::default();
    let rules = Rules {
        provider: ActorId(1000),
        sector_size: SectorSize::S2KiB,
        height: Epoch(100),
        cfg: &cfg,
    };
    let mut v = with("products.ddo_v1.allocation_id", json!(7));
    v["products"]["ddo_v1"]["duration"] = json!(1000);
    let proposal = check(v).expect("an allocation allows a short duration");
    let allocation = AllocationResponse {
        client: 1005,
        provider: 1000,
        piece_cid: proposal.piece.cid.to_string(),
        piece_size: 1024,
        term_min: 1000,
        term_max: 2000,
        expiration: 500,
    };
    let mut accepted = proposal.clone();
    check_allocation(&mut accepted, Some(&allocation), &rules).unwrap();
    assert_eq!(accepted.allocation, Some((1005, 7)));
    type Change = fn(&mut AllocationResponse);
    let table: [(&str, Change); 7] = [
        ("is for t01001", |a| a.provider = 1001),
        ("is for piece", |a| {
            a.piece_cid = PieceCid::new(Commitment([2; 32])).to_string()
        }),
        ("is for piece", |a| a.piece_size = 2048),
        ("expires", |a| a.expiration = 100),
        ("expires", |a| a.expiration = 499),
        ("is for 1001", |a| a.term_min = 1001),
        ("to 999", |a| (a.term_min, a.term_max) = (1, 999)),
    ];
    for (words, change) in table {
        let mut a = allocation.clone();
        change(&mut a);
        let e = check_allocation(&mut proposal.clone(), Some(&a), &rules).unwrap_err();
        assert!(e.error.contains(words), "{words}: {e:?}");
    }
    let e = check_allocation(&mut proposal.clone(), None, &rules).unwrap_err();
    assert!(e.error.contains("no allocation 7"), "{e:?}");
}
