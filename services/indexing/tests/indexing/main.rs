//! The spoke against a hub that speaks the real protocol, seen as an indexer and a client see it.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod extended;
mod removals;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Bytes;
use axum::routing::put;
use cid::Cid;
use http::StatusCode;
use hub_proto::v1::{PiecePhase, Use};
use ipld_core::ipld::Ipld;
use libp2p_identity::PublicKey;
use lotus_car::CarWriter;
use lotus_indexing::{Indexing, IndexingConfig};
use lotus_piece_index::testing::{FakeHub, fake_hub, indexed};
use lotus_runtime::{CancellationToken, Cx, Fault, Health, Service, addr_file};
use multihash_codetable::{Code, MultihashDigest};
use prost::Message;
use serde_json::Value;
use tokio::task::JoinSet;

const DEADLINE: Duration = Duration::from_secs(20);

struct Spoke {
    health: Health,
    stop: CancellationToken,
    task: JoinSet<Result<(), Fault>>,
    url: String,
    http: reqwest::Client,
}

impl Spoke {
    async fn start(hub: &FakeHub, dir: &Path, cfg: IndexingConfig) -> Self {
        let (health, stop) = (Health::default(), CancellationToken::new());
        let cfg = IndexingConfig {
            listen: ([127, 0, 0, 1], 0).into(),
            ..cfg
        };
        let spoke = Indexing::new(cfg, hub.config(), dir.join("indexing"), dir.join("run"));
        let mut task = JoinSet::new();
        task.spawn(spoke.run(Cx::new("indexing", health.clone(), stop.clone())));
        within("ready", health.ready()).await;
        let addr = addr_file::read(&dir.join("run"), "indexing").unwrap();
        let http = lotus_runtime::http_client().build().unwrap();
        Self {
            health,
            stop,
            task,
            url: format!("http://{addr}"),
            http,
        }
    }

    async fn indexed(&self, pieces: usize) {
        self.indexed_within(pieces, DEADLINE).await;
    }

    async fn indexed_within(&self, pieces: usize, limit: Duration) {
        let want = format!("{pieces} pieces");
        let mut parts = self.health.watch();
        let reached = parts.wait_for(|p| p.get("indexing.index").is_some_and(|c| c.detail == want));
        let reached = tokio::time::timeout(limit, reached).await;
        drop(
            reached
                .unwrap_or_else(|_| panic!("no {want} in time"))
                .unwrap(),
        );
    }

    async fn get(&self, path: &str, accept: &str) -> (u16, Bytes) {
        let request = self
            .http
            .get(format!("{}{path}", self.url))
            .header("accept", accept);
        let answer = within(path, request.send()).await.unwrap();
        (answer.status().as_u16(), answer.bytes().await.unwrap())
    }

    async fn json(&self, path: &str) -> Value {
        let (status, body) = self.get(path, "application/json").await;
        assert_eq!(status, 200, "{path}");
        serde_json::from_slice(&body).unwrap()
    }

    /// A block of the chain, checked against its CID.
    async fn block(&self, cid: &Cid) -> BTreeMap<String, Ipld> {
        let (status, body) = self.get(&format!("/ipni/v1/ad/{cid}"), "*/*").await;
        assert_eq!(status, 200, "{cid}");
        assert_eq!(Code::Sha2_256.digest(&body), *cid.hash());
        let value = if cid.codec() == 0x71 {
            serde_ipld_dagcbor::from_slice(&body).unwrap()
        } else {
            serde_ipld_dagjson::from_slice(&body).unwrap()
        };
        let Ipld::Map(map) = value else {
            panic!("no map: {value:?}")
        };
        map
    }

    /// The newest advertisement, as its signed head says.
    async fn head(&self) -> Option<Cid> {
        let (status, body) = self.get("/ipni/v1/ad/head", "*/*").await;
        if status == 204 {
            return None;
        }
        let Ok(Ipld::Map(head)) = serde_ipld_dagjson::from_slice(&body) else {
            panic!("no head")
        };
        let cid = link(&head["head"]);
        let key = PublicKey::try_decode_protobuf(bytes(&head["pubkey"])).unwrap();
        assert!(
            key.verify(&cid.to_bytes(), bytes(&head["sig"])),
            "signature of the head"
        );
        Some(cid)
    }

    /// The whole chain, newest first, with every signature checked and every entry read.
    async fn chain(&self) -> Vec<SeenAd> {
        let mut seen = Vec::new();
        let mut next = self.head().await;
        while let Some(cid) = next {
            let ad = self.block(&cid).await;
            check_signature(&ad);
            next = ad.get("PreviousID").map(link);
            let mut hashes = BTreeSet::new();
            let mut chunks = 0;
            let mut entries = Some(link(&ad["Entries"]));
            while let Some(at) = entries.filter(|c| c.codec() != 0x55) {
                let chunk = self.block(&at).await;
                let Ipld::List(list) = &chunk["Entries"] else {
                    panic!("no entries")
                };
                assert!(list.len() <= 16_384);
                hashes.extend(list.iter().map(|h| bytes(h).to_vec()));
                entries = chunk.get("Next").map(link);
                chunks += 1;
            }
            seen.push(SeenAd {
                context: bytes(&ad["ContextID"]).to_vec(),
                metadata: bytes(&ad["Metadata"]).to_vec(),
                is_rm: ad["IsRm"] == Ipld::Bool(true),
                addresses: ad["Addresses"].clone(),
                hashes,
                chunks,
            });
        }
        seen
    }

    async fn end(mut self) {
        self.stop.cancel();
        within("the end", self.task.join_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

#[derive(Debug)]
struct SeenAd {
    context: Vec<u8>,
    metadata: Vec<u8>,
    is_rm: bool,
    addresses: Ipld,
    hashes: BTreeSet<Vec<u8>>,
    chunks: usize,
}

async fn within<T>(what: &str, f: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, f)
        .await
        .unwrap_or_else(|_| panic!("no {what} in time"))
}

fn link(v: &Ipld) -> Cid {
    let Ipld::Link(cid) = v else {
        panic!("no link: {v:?}")
    };
    *cid
}

fn bytes(v: &Ipld) -> &[u8] {
    let Ipld::Bytes(b) = v else {
        panic!("no bytes: {v:?}")
    };
    b
}

#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(bytes = "vec", tag = "1")]
    public_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    payload_type: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    signature: Vec<u8>,
}

/// Opens a signed envelope of a kind. Returns who signed it, and what.
fn opened(signature: &Ipld, kind: &[u8]) -> (String, Vec<u8>) {
    let envelope = Envelope::decode(bytes(signature)).unwrap();
    assert_eq!(envelope.payload_type, kind);
    let mut signed = vec![7];
    signed.extend(b"indexer");
    signed.push(u8::try_from(kind.len()).unwrap());
    signed.extend(kind);
    signed.push(34);
    signed.extend(&envelope.payload);
    let key = PublicKey::try_decode_protobuf(&envelope.public_key).unwrap();
    assert!(
        key.verify(&signed, &envelope.signature),
        "signature of the envelope"
    );
    (key.to_peer_id().to_base58(), envelope.payload)
}

/// As go-libipni's `VerifySignature` does it.
fn check_signature(ad: &BTreeMap<String, Ipld>) {
    let Ipld::String(provider) = &ad["Provider"] else {
        panic!("no provider")
    };
    let (signer, signed) = opened(&ad["Signature"], b"/indexer/ingest/adSignature");
    assert_eq!(signer, *provider);

    let mut payload = ad
        .get("PreviousID")
        .map(|p| link(p).to_bytes())
        .unwrap_or_default();
    payload.extend(link(&ad["Entries"]).to_bytes());
    payload.extend(provider.as_bytes());
    let Ipld::List(addresses) = &ad["Addresses"] else {
        panic!("no addresses")
    };
    for a in addresses {
        let Ipld::String(a) = a else {
            panic!("no address")
        };
        payload.extend(a.as_bytes());
    }
    payload.extend(bytes(&ad["Metadata"]));
    payload.push(u8::from(ad["IsRm"] == Ipld::Bool(true)));
    assert_eq!(Code::Sha2_256.digest(&payload).to_bytes(), signed);
}

fn car(blocks: u32, salt: u32) -> (Vec<Cid>, Vec<u8>) {
    let data = |i: u32| [salt.to_be_bytes(), i.to_be_bytes()].concat();
    let cids: Vec<Cid> = (0..blocks)
        .map(|i| Cid::new_v1(0x55, Code::Sha2_256.digest(&data(i))))
        .collect();
    let mut out = CarWriter::new(Vec::new(), &cids[..1]).unwrap();
    for (cid, i) in cids.iter().zip(0..) {
        out.write(cid, &data(i)).unwrap();
    }
    (cids, out.finish().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_indexer_learns_what_the_pieces_hold() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    // More than one chunk of multihashes.
    let (many, big) = car(16_384 + 700, 1);
    let big = hub.add(&big, indexed());
    let spoke = Spoke::start(&hub, tmp.path(), IndexingConfig::default()).await;
    spoke.indexed(1).await;
    let raw = hub.add(
        b"not a CAR",
        Use {
            announce_piece: true,
            format: "raw".into(),
            ..Use::default()
        },
    );
    spoke.indexed(2).await;
    let (quiet, car) = car(3, 2);
    hub.add(
        &car,
        Use {
            index: true,
            format: "car".into(),
            ..Use::default()
        },
    );
    spoke.indexed(3).await;

    let chain = spoke.chain().await;
    assert_eq!(chain.len(), 3, "{chain:#?}");
    let of = |context: Vec<u8>| chain.iter().find(|a| a.context == context).unwrap();
    let payload = of(big.cid.cid().to_bytes());
    let want: BTreeSet<Vec<u8>> = many.iter().map(|c| c.hash().to_bytes()).collect();
    assert!(payload.hashes == want, "every block, and nothing else");
    assert_eq!(
        (payload.chunks, &payload.metadata[..], payload.is_rm),
        (2, &[0xa0, 0x12, 0][..], false)
    );
    for info in [&big, &raw] {
        let piece = of(info.cid_v2().to_bytes());
        let both = [
            info.cid.cid().hash().to_bytes(),
            info.cid_v2().hash().to_bytes(),
        ];
        assert_eq!(piece.hashes, BTreeSet::from(both));
        assert_eq!(piece.metadata, [0xb0, 0x12, 0]);
    }
    assert_eq!(
        payload.addresses,
        Ipld::List(vec![Ipld::String("/ip4/127.0.0.1/tcp/7777/http".into())])
    );

    // Lookups, in each form.
    let one = many[4711];
    let b58 = multibase::Base::Base58Btc.encode(one.hash().to_bytes());
    let hex = data_encoding::HEXLOWER.encode(&one.hash().to_bytes());
    for path in [
        format!("/cid/{one}"),
        format!("/multihash/{b58}"),
        format!("/multihash/{hex}"),
        format!("/cid/{}", quiet[1]),
    ] {
        let found = spoke.json(&path).await;
        let results = found["MultihashResults"][0]["ProviderResults"]
            .as_array()
            .unwrap();
        assert_eq!(results.len(), 1, "{path}");
        assert_eq!(results[0]["Metadata"], "oBIA");
        assert_eq!(
            results[0]["Provider"]["Addrs"][0],
            "/ip4/127.0.0.1/tcp/7777/http"
        );
    }
    for cid in [raw.cid.cid(), raw.cid_v2()] {
        let found = spoke.json(&format!("/cid/{cid}")).await;
        assert_eq!(
            found["MultihashResults"][0]["ProviderResults"][0]["Metadata"],
            "sBIA"
        );
    }
    let absent = Cid::new_v1(0x55, Code::Sha2_256.digest(b"absent"));
    let routing = spoke.json(&format!("/routing/v1/providers/{one}")).await;
    assert_eq!(routing["Providers"][0]["Schema"], "peer");
    assert_eq!(
        routing["Providers"][0]["Protocols"][0],
        "transport-ipfs-gateway-http"
    );
    assert_eq!(
        spoke.json(&format!("/routing/v1/providers/{absent}")).await["Providers"],
        serde_json::json!([])
    );
    let (_, lines) = spoke
        .get(
            &format!("/routing/v1/providers/{one}"),
            "application/x-ndjson",
        )
        .await;
    assert_eq!(
        serde_json::from_slice::<Value>(&lines).unwrap()["Schema"],
        "peer"
    );
    for (filter, shown) in [
        ("filter-protocols=transport-bitswap", 0),
        (
            "filter-protocols=transport-bitswap,transport-ipfs-gateway-http",
            1,
        ),
        ("filter-addrs=http", 1),
        ("filter-addrs=!http", 0),
        ("filter-addrs=quic-v1", 0),
    ] {
        let found = spoke
            .json(&format!("/routing/v1/providers/{one}?{filter}"))
            .await;
        assert_eq!(
            found["Providers"].as_array().unwrap().len(),
            shown,
            "{filter}"
        );
    }
    for (path, status) in [
        (format!("/cid/{absent}"), 404),
        ("/cid/x".into(), 400),
        ("/multihash/zz0O".into(), 400),
        ("/routing/v1/providers/x".into(), 400),
        (format!("/ipni/v1/ad/{absent}"), 404),
        ("/ipni/v1/ad/x".into(), 400),
        ("/nothing".into(), 404),
    ] {
        assert_eq!(spoke.get(&path, "*/*").await.0, status, "{path}");
    }
    let about = spoke.json("/").await;
    assert_eq!(
        (&about["pieces"], &about["entries"]),
        (&2.into(), &(16_384 + 700 + 3).into())
    );
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_is_taken_back_and_a_restart_repeats_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let spoke = Spoke::start(&hub, tmp.path(), IndexingConfig::default()).await;
    assert_eq!(spoke.head().await, None);
    let cars: Vec<_> = (0..3).map(|salt| car(5, salt)).collect();
    let pieces: Vec<_> = cars[..2]
        .iter()
        .map(|(_, bytes)| hub.add(bytes, indexed()))
        .collect();
    spoke.indexed(2).await;
    hub.set_phase(&pieces[0].cid, PiecePhase::Withdrawn);
    spoke.indexed(1).await;
    assert_eq!(
        spoke.get(&format!("/cid/{}", cars[0].0[0]), "*/*").await.0,
        404
    );
    assert_eq!(
        spoke.get(&format!("/cid/{}", cars[1].0[0]), "*/*").await.0,
        200
    );
    let head = spoke.head().await.unwrap();
    let newest = spoke.block(&head).await;
    assert_eq!(newest["IsRm"], Ipld::Bool(true));
    check_signature(&newest);
    assert_eq!(
        link(&newest["Entries"]).hash().digest().len(),
        16,
        "no entries"
    );
    spoke.end().await;

    // Nothing changed, one piece more, one less, the content elsewhere.
    let spoke = Spoke::start(&hub, tmp.path(), IndexingConfig::default()).await;
    spoke.indexed(1).await;
    assert_eq!(spoke.head().await, Some(head));
    spoke.end().await;
    hub.add(&cars[2].1, indexed());
    hub.set_phase(&pieces[1].cid, PiecePhase::Withdrawn);
    let moved = IndexingConfig {
        retrieval_url: "https://sp.example".into(),
        ..IndexingConfig::default()
    };
    let spoke = Spoke::start(&hub, tmp.path(), moved).await;
    spoke.indexed(1).await;
    let gone = format!("/cid/{}", cars[1].0[0]);
    within("removal", async {
        while spoke.get(&gone, "*/*").await.0 != 404 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let found = spoke.json(&format!("/cid/{}", cars[2].0[0])).await;
    assert_eq!(
        found["MultihashResults"][0]["ProviderResults"][0]["Provider"]["Addrs"][0],
        "/dns/sp.example/tcp/443/https"
    );
    assert_ne!(spoke.head().await, Some(head));
    let ad = spoke.block(&spoke.head().await.unwrap()).await;
    assert_eq!(
        ad["Addresses"],
        Ipld::List(vec![Ipld::String("/dns/sp.example/tcp/443/https".into())])
    );
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn under_another_key_all_is_advertised_anew() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    for salt in 0..2 {
        hub.add(&car(3, salt).1, indexed());
    }
    let mut seen = BTreeSet::new();
    for lost in ["identity.key", "chain.redb"] {
        let spoke = Spoke::start(&hub, tmp.path(), IndexingConfig::default()).await;
        spoke.indexed(2).await;
        let head = spoke.head().await.unwrap();
        let provider = spoke.block(&head).await["Provider"].clone();
        let Ipld::String(provider) = provider else {
            panic!("no provider")
        };
        assert_eq!(spoke.json("/").await["provider"], provider);
        assert!(seen.insert(provider), "the key was lost");
        // Each piece and its blocks, under this key alone.
        let chain = spoke.chain().await;
        let contexts: BTreeSet<_> = chain.iter().map(|ad| &ad.context).collect();
        assert_eq!((chain.len(), contexts.len()), (4, 4));
        spoke.end().await;
        std::fs::remove_file(tmp.path().join("indexing").join(lost)).unwrap();
    }
    let spoke = Spoke::start(&hub, tmp.path(), IndexingConfig::default()).await;
    spoke.indexed(2).await;
    assert_eq!(spoke.chain().await.len(), 4);
    let provider = spoke.json("/").await["provider"].clone();
    assert!(seen.contains(provider.as_str().unwrap()), "the same key");
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn indexers_are_told_until_they_hear() {
    let tmp = tempfile::tempdir().unwrap();
    let (tries, heard) = (
        Arc::new(AtomicU32::new(0)),
        Arc::new(Mutex::new(Vec::new())),
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (count, messages) = (tries.clone(), heard.clone());
    let app = axum::Router::new().route(
        "/announce",
        put(async move |body: Bytes| {
            if count.fetch_add(1, Ordering::SeqCst) == 0 {
                return StatusCode::SERVICE_UNAVAILABLE;
            }
            messages.lock().unwrap().push(body.to_vec());
            StatusCode::NO_CONTENT
        }),
    );
    let mut indexer = JoinSet::new();
    indexer.spawn(async move { axum::serve(listener, app).await });

    let hub = fake_hub();
    hub.add(
        &car(2, 9).1,
        Use {
            announce_piece: false,
            ..indexed()
        },
    );
    let cfg = IndexingConfig {
        announce_urls: vec![url],
        publisher_url: "http://10.0.0.1:80".into(),
        ..IndexingConfig::default()
    };
    let spoke = Spoke::start(&hub, tmp.path(), cfg).await;
    spoke.indexed(1).await;
    within("announcement", async {
        while heard.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let message = heard.lock().unwrap()[0].clone();
    let Ipld::List(parts) = serde_ipld_dagcbor::from_slice(&message).unwrap() else {
        panic!("no list")
    };
    assert_eq!(Some(link(&parts[0])), spoke.head().await);
    let Ipld::List(addrs) = &parts[1] else {
        panic!("no addresses")
    };
    assert!(bytes(&addrs[0]).starts_with(&[4, 10, 0, 0, 1, 6, 0, 80, 0xe0, 0x03, 0xa5, 0x03]));
    assert_eq!(parts[2], Ipld::Bytes(vec![]));
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_setting_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    for (cfg, key) in [
        (
            IndexingConfig {
                retrieval_url: "nonsense".into(),
                ..IndexingConfig::default()
            },
            "indexing.retrieval_url",
        ),
        (
            IndexingConfig {
                announce_urls: vec!["nonsense".into()],
                ..IndexingConfig::default()
            },
            "indexing.announce_urls",
        ),
    ] {
        let spoke = Indexing::new(
            cfg,
            hub.config(),
            tmp.path().join("i"),
            tmp.path().join("run"),
        );
        let run = spoke.run(Cx::new(
            "indexing",
            Health::default(),
            CancellationToken::new(),
        ));
        let fault = within("fault", run).await.unwrap_err();
        assert_eq!(fault.kind, lotus_types::Kind::Config);
        assert!(fault.message.contains(key), "{fault}");
    }
}
