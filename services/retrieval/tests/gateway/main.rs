//! The spoke against a hub that speaks the real protocol: content, ranges, refusals, catch-up.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroU16;
use std::path::Path;

use cid::Cid;
use hub_proto::v1::PiecePhase;
use lotus_car::{CarReader, CarStore, Scope, pack_dir, walk};
use lotus_piece_index::testing::{fake_hub, indexed};
use lotus_retrieval::{Retrieval, RetrievalConfig};
use lotus_runtime::{CancellationToken, Cx, Health, Service};
use lotus_types::{PieceCid, PieceInfo};
use reqwest::Method;

mod hostile;
mod support;

use support::{Spoke, header, small, within};

/// A folder with two levels, a file of several chunks and a file that occurs twice.
fn packed(dir: &Path) -> (Cid, Vec<u8>) {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    let big: Vec<u8> = (0..2_600_000u32)
        .map(|i| (i % 251) as u8 ^ (i >> 16).to_le_bytes()[0])
        .collect();
    fs::write(tree.join("sub/big.bin"), big).unwrap();
    fs::write(tree.join("a.txt"), "same").unwrap();
    fs::write(tree.join("b.txt"), "same").unwrap();
    let out = dir.join("tree.car");
    let root = pack_dir(&tree, &out).unwrap();
    (root, fs::read(out).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn dags_and_blocks_are_served_as_the_specification_says() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let (root, car) = packed(tmp.path());
    hub.add(&car, indexed());
    let spoke = Spoke::start(&hub, tmp.path(), RetrievalConfig::default()).await;
    spoke.indexed(1).await;
    let store = CarStore::open(&tmp.path().join("tree.car")).unwrap();
    let all: Vec<Cid> = walk(&root, Scope::All, |c| store.get(c))
        .unwrap()
        .map(|b| b.unwrap().0)
        .collect();

    // Raw blocks.
    for cid in &all {
        let answer = spoke.get(&format!("/ipfs/{cid}?format=raw")).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(header(&answer, "content-type"), "application/vnd.ipld.raw");
        assert_eq!(
            header(&answer, "content-disposition"),
            format!("attachment; filename=\"{cid}.bin\"")
        );
        assert_eq!(header(&answer, "x-content-type-options"), "nosniff");
        assert_eq!(
            header(&answer, "cache-control"),
            "public, max-age=29030400, immutable"
        );
        assert_eq!(header(&answer, "x-ipfs-path"), format!("/ipfs/{cid}"));
        let etag = header(&answer, "etag").to_owned();
        let len = header(&answer, "content-length").to_owned();
        let data = answer.bytes().await.unwrap();
        assert_eq!(len, data.len().to_string());
        assert_eq!(Some(data), store.get(cid).unwrap());
        let path = format!("/ipfs/{cid}");
        let again = spoke
            .send(
                Method::GET,
                &path,
                &[
                    ("accept", "application/vnd.ipld.raw"),
                    ("if-none-match", &etag),
                ],
            )
            .await;
        assert_eq!(again.status(), 304);
        let head = spoke
            .send(Method::HEAD, &format!("{path}?format=raw"), &[])
            .await;
        assert_eq!(
            (head.status().as_u16(), header(&head, "content-length")),
            (200, &len[..])
        );
        assert!(head.bytes().await.unwrap().is_empty());
    }

    // CARs: order, scopes, ranges, duplicates.
    let answer = spoke.get(&format!("/ipfs/{root}?format=car")).await;
    assert_eq!(
        header(&answer, "content-type"),
        "application/vnd.ipld.car; version=1; order=dfs; dups=n"
    );
    assert!(header(&answer, "content-disposition").ends_with(".car\""));
    assert_eq!(header(&answer, "accept-ranges"), "none");
    assert_eq!(header(&answer, "content-location"), "");
    let body = answer.bytes().await.unwrap();
    let reader = CarReader::new(&body[..]).unwrap();
    assert_eq!(reader.roots(), [root]);
    let got: Vec<Cid> = reader.map(|b| b.unwrap().cid).collect();
    assert_eq!(got, all, "depth first, each block once");
    let dups = spoke
        .car(&format!("/ipfs/{root}?format=car&car-dups=y"))
        .await;
    assert_eq!(dups.len(), all.len() + 1, "the same file twice");
    let count = async |query: &str| spoke.car(&format!("/ipfs/{root}{query}")).await.len();
    assert_eq!(count("?format=car&dag-scope=block").await, 1);
    assert_eq!(count("?format=car&dag-scope=entity").await, 1);
    assert_eq!(count("/a.txt?format=car").await, 2);
    assert_eq!(count("/sub/?format=car&dag-scope=block").await, 2);
    assert_eq!(count("/sub/big.bin?format=car").await, 6);
    assert_eq!(count("/sub/big.bin?format=car&entity-bytes=0:0").await, 4);
    assert_eq!(count("/sub/big.bin?format=car&entity-bytes=-1:*").await, 4);
    assert_eq!(
        count("/sub/big.bin?format=car&dag-scope=entity&entity-bytes=1048575:1048576").await,
        5
    );

    // HEAD, conditions, identity, methods.
    let head = spoke
        .send(Method::HEAD, &format!("/ipfs/{root}?format=car"), &[])
        .await;
    assert_eq!(head.status(), 200);
    assert!(header(&head, "etag").contains(".car."));
    assert!(head.bytes().await.unwrap().is_empty());
    let probe = spoke.get("/ipfs/bafkqaaa?format=raw").await;
    assert_eq!(
        (probe.status().as_u16(), probe.bytes().await.unwrap().len()),
        (200, 0)
    );
    assert!(spoke.car("/ipfs/bafkqaaa?format=car").await.is_empty());

    let absent = small("nobody has this").0;
    for (method, path, headers, status) in [
        (
            Method::GET,
            format!("/ipfs/{absent}?format=raw"),
            &[][..],
            404,
        ),
        (Method::GET, format!("/ipfs/{absent}?format=car"), &[], 404),
        (Method::HEAD, format!("/ipfs/{absent}?format=car"), &[], 404),
        (
            Method::GET,
            format!("/ipfs/{absent}?format=car"),
            &[("cache-control", "only-if-cached")],
            412,
        ),
        (
            Method::GET,
            format!("/ipfs/{root}/sub/nope?format=car"),
            &[],
            404,
        ),
        (
            Method::GET,
            format!("/ipfs/{root}/a.txt/below?format=car"),
            &[],
            404,
        ),
        (
            Method::GET,
            format!("/ipfs/{root}/sub/big.bin?format=car&entity-bytes=9999999:*"),
            &[],
            400,
        ),
        (Method::GET, format!("/ipfs/{root}"), &[], 400),
        (
            Method::GET,
            format!("/ipfs/{root}/a.txt?format=raw"),
            &[],
            400,
        ),
        (Method::GET, "/ipfs/garbage?format=car".into(), &[], 400),
        (
            Method::GET,
            format!("/ipfs/{root}"),
            &[("accept", "text/html")],
            406,
        ),
        (Method::POST, format!("/ipfs/{root}?format=car"), &[], 405),
        (Method::GET, "/".into(), &[], 404),
        (Method::GET, "/ipns/x".into(), &[], 404),
    ] {
        let answer = spoke.send(method.clone(), &path, headers).await;
        assert_eq!(answer.status(), status, "{method} {path}");
        if method != Method::HEAD {
            let text = answer.text().await.unwrap();
            assert!(text.contains("\"fix\""), "{path}: {text}");
        }
    }
    assert!(
        hub.leases() <= 2,
        "requests share a lease: {}",
        hub.leases()
    );
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_are_served_whole_and_in_ranges() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 253) as u8).collect();
    // Not a CAR and not indexed: a piece is served for what it is.
    let piece = hub.add(&bytes, Default::default());
    let spoke = Spoke::start(&hub, tmp.path(), RetrievalConfig::default()).await;
    for cid in [piece.cid.to_string(), piece.cid_v2().to_string()] {
        let path = format!("/piece/{cid}");
        let answer = spoke.get(&path).await;
        assert_eq!(answer.status(), 200);
        assert_eq!(header(&answer, "etag"), format!("\"{cid}\""));
        assert_eq!(header(&answer, "accept-ranges"), "bytes");
        assert_eq!(
            header(&answer, "cache-control"),
            "public, max-age=29030400, immutable"
        );
        assert_eq!(answer.bytes().await.unwrap(), bytes);
        let head = spoke.send(Method::HEAD, &path, &[]).await;
        assert_eq!(
            (head.status().as_u16(), header(&head, "content-length")),
            (200, "3000000")
        );
        for (range, from, to) in [
            ("bytes=0-0", 0, 1),
            ("bytes=1048570-2097160", 1_048_570, 2_097_161),
            ("bytes=-5", 2_999_995, 3_000_000),
        ] {
            let part = spoke.send(Method::GET, &path, &[("range", range)]).await;
            assert_eq!(part.status(), 206);
            assert_eq!(
                header(&part, "content-range"),
                format!("bytes {from}-{}/3000000", to - 1)
            );
            assert_eq!(part.bytes().await.unwrap(), bytes[from..to]);
        }
        let etag = format!("\"{cid}\"");
        let parts = spoke
            .send(
                Method::GET,
                &path,
                &[("range", "bytes=0-3,10-11"), ("if-range", &etag)],
            )
            .await;
        assert_eq!(parts.status(), 206);
        let kind = header(&parts, "content-type").to_owned();
        let boundary = kind
            .strip_prefix("multipart/byteranges; boundary=")
            .unwrap();
        let length: usize = header(&parts, "content-length").parse().unwrap();
        let body = parts.bytes().await.unwrap();
        assert_eq!(body.len(), length);
        let head = |r: &str| {
            format!(
                "--{boundary}\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes {r}/3000000\r\n\r\n"
            )
        };
        let want = [
            head("0-3").as_bytes(),
            &bytes[..4],
            b"\r\n",
            head("10-11").as_bytes(),
            &bytes[10..12],
            format!("\r\n--{boundary}--\r\n").as_bytes(),
        ]
        .concat();
        assert_eq!(body, want);
        let other = spoke
            .send(
                Method::GET,
                &path,
                &[("range", "bytes=0-3"), ("if-range", "\"x\"")],
            )
            .await;
        assert_eq!(
            (other.status().as_u16(), other.bytes().await.unwrap().len()),
            (200, 3_000_000)
        );
        assert_eq!(
            spoke
                .send(Method::GET, &path, &[("if-none-match", &etag)])
                .await
                .status(),
            304
        );
        let beyond = spoke
            .send(Method::GET, &path, &[("range", "bytes=3000000-")])
            .await;
        assert_eq!(
            (beyond.status().as_u16(), header(&beyond, "content-range")),
            (416, "bytes */3000000")
        );
    }
    let wrong_size = PieceInfo {
        raw_size: piece.raw_size - 1,
        ..piece
    }
    .cid_v2();
    let unknown = PieceCid::new(lotus_types::Commitment([1; 32]));
    for (path, status) in [
        (format!("/piece/{wrong_size}"), 404),
        (format!("/piece/{unknown}"), 404),
        ("/piece/bafkqaaa".into(), 400),
        ("/piece/nonsense".into(), 400),
        ("/piece/".into(), 400),
    ] {
        assert_eq!(spoke.get(&path).await.status(), status, "{path}");
    }
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_requests_are_told_to_come_back() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let piece = hub.add(&vec![7; 48 << 20], Default::default());
    let cfg = RetrievalConfig {
        max_requests: NonZeroU16::MIN,
        ..RetrievalConfig::default()
    };
    let spoke = Spoke::start(&hub, tmp.path(), cfg).await;
    let path = format!("/piece/{}", piece.cid);
    // More than the buffers on the way hold, and nobody reads it.
    let open = spoke.get(&path).await;
    let refused = spoke.get(&path).await;
    assert_eq!(
        (refused.status().as_u16(), header(&refused, "retry-after")),
        (429, "1")
    );
    drop(open);
    within("free place", async {
        while spoke.send(Method::HEAD, &path, &[]).await.status() != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_spoke_catches_up_after_any_break() {
    let tmp = tempfile::tempdir().unwrap();
    let mut hub = fake_hub();
    let cars: Vec<_> = (0..5).map(|i| small(&format!("content {i}"))).collect();
    let first = hub.add(&cars[0].1, indexed());
    let spoke = Spoke::start(&hub, tmp.path(), RetrievalConfig::default()).await;
    spoke.indexed(1).await;
    // An event while it runs; a CAR that is none leaves the others alone.
    hub.add(&cars[1].1, indexed());
    spoke.indexed(2).await;
    spoke.end().await;

    // Changes while it is down.
    hub.add(&cars[2].1, indexed());
    hub.set_phase(&first.cid, PiecePhase::Withdrawn);
    let spoke = Spoke::start(&hub, tmp.path(), RetrievalConfig::default()).await;
    spoke.indexed(2).await;
    let status = async |spoke: &Spoke, i: usize| {
        spoke
            .get(&format!("/ipfs/{}?format=raw", cars[i].0))
            .await
            .status()
            .as_u16()
    };
    assert_eq!(
        [
            status(&spoke, 0).await,
            status(&spoke, 1).await,
            status(&spoke, 2).await
        ],
        [404, 200, 200]
    );

    // The hub dies and comes back: what was open is still served, and events go on.
    hub.stop();
    assert_eq!(status(&spoke, 1).await, 200);
    hub.add(&cars[3].1, indexed());
    hub.start();
    spoke.indexed(3).await;
    let served: BTreeSet<u16> = [
        status(&spoke, 1).await,
        status(&spoke, 2).await,
        status(&spoke, 3).await,
    ]
    .into();
    assert_eq!(served, [200].into());

    // A piece without an unsealed copy is as good as absent.
    let lost = hub.add(&cars[4].1, indexed());
    spoke.indexed(4).await;
    spoke.end().await;
    hub.lose(&lost.cid);
    let spoke = Spoke::start(&hub, tmp.path(), RetrievalConfig::default()).await;
    assert_eq!(
        [status(&spoke, 4).await, status(&spoke, 3).await],
        [404, 200]
    );
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spoke_that_cannot_start_says_why() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let spoke = Spoke::start(&hub, tmp.path(), RetrievalConfig::default()).await;
    let run = |cfg: RetrievalConfig, dir: &str| {
        let spoke = Retrieval::new(
            cfg,
            hub.config(),
            tmp.path().join(dir),
            tmp.path().join("run2"),
        );
        spoke.run(Cx::new(
            "retrieval",
            Health::default(),
            CancellationToken::new(),
        ))
    };
    let taken = RetrievalConfig {
        listen: spoke.url[7..].parse().unwrap(),
        ..RetrievalConfig::default()
    };
    let fault = within("fault", run(taken, "other")).await.unwrap_err();
    assert_eq!(fault.kind, lotus_types::Kind::Config);
    assert!(fault.fix.contains("retrieval.listen"), "{}", fault.fix);
    let free = RetrievalConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        ..RetrievalConfig::default()
    };
    let fault = within("fault", run(free, "retrieval")).await.unwrap_err();
    assert_eq!(fault.kind, lotus_types::Kind::Config);
    assert!(fault.message.contains("in use"), "{fault}");
    spoke.end().await;
}
