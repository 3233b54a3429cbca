//! Clients and content that mean harm: what they use is bounded, others are served, and every
//! refusal says why.

use std::fs;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cid::Cid;
use ipld_core::ipld::Ipld;
use lotus_car::{CarWriter, DAG_CBOR, DAG_PB, RAW};
use lotus_piece_index::testing::{FakeHub, fake_hub, indexed};
use lotus_retrieval::RetrievalConfig;
use multihash_codetable::{Code, MultihashDigest};
use reqwest::{Method, Version};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{Spoke, header, small, within};

fn n(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).unwrap()
}

fn address(spoke: &Spoke) -> SocketAddr {
    spoke.url.split("//").nth(1).unwrap().parse().unwrap()
}

/// A CAR of these blocks, in their order, and the CIDs of all.
fn car(blocks: &[(u64, Vec<u8>)]) -> (Vec<Cid>, Vec<u8>) {
    let cid = |(codec, data): &(u64, Vec<u8>)| Cid::new_v1(*codec, Code::Sha2_256.digest(data));
    let cids: Vec<Cid> = blocks.iter().map(cid).collect();
    let mut car = CarWriter::new(Vec::new(), &cids[cids.len() - 1..]).unwrap();
    for (cid, (_, data)) in cids.iter().zip(blocks) {
        car.write(cid, data).unwrap();
    }
    (cids, car.finish().unwrap())
}

fn cbor(links: &[Cid]) -> Vec<u8> {
    let list = links.iter().map(|c| Ipld::Link(*c)).collect();
    serde_ipld_dagcbor::to_vec(&Ipld::List(list)).unwrap()
}

/// A dag-pb field of wire type 2.
fn field(tag: u8, data: &[u8]) -> Vec<u8> {
    let mut len = unsigned_varint::encode::usize_buffer();
    let len = unsigned_varint::encode::usize(data.len(), &mut len);
    [&[tag << 3 | 2], len, data].concat()
}

/// A UnixFS file node over these parts, each of which is said to have so many bytes.
fn file_node(parts: &[Cid], size: u64) -> Vec<u8> {
    let number = |n: u64| {
        let mut buf = unsigned_varint::encode::u64_buffer();
        unsigned_varint::encode::u64(n, &mut buf).to_vec()
    };
    let mut data = vec![0x08, 2];
    data.push(0x18);
    data.extend(number(size.saturating_mul(parts.len() as u64)));
    for _ in parts {
        data.push(0x20);
        data.extend(number(size));
    }
    let links = parts.iter().map(|c| field(2, &field(1, &c.to_bytes())));
    links.chain([field(1, &data)]).flatten().collect()
}

async fn spoke(hub: &FakeHub, dir: &Path, cfg: RetrievalConfig) -> Spoke {
    Spoke::start(hub, dir, cfg).await
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_dropped_while_others_are_served() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let cfg = RetrievalConfig {
        header_secs: 1,
        ..RetrievalConfig::default()
    };
    let spoke = spoke(&hub, tmp.path(), cfg).await;
    // No connection is used twice: the service ends one that waited for `header_secs`.
    let others = lotus_runtime::http_client().pool_max_idle_per_host(0);
    let others = others.build().unwrap();
    let block = format!("{}/ipfs/bafkqaaa?format=raw", spoke.url);
    // Nothing at all, a part of each HTTP's opening, headers that never end, and a request that
    // says its body is endless.
    let openings: [&[u8]; 5] = [
        b"",
        b"PRI * HTTP/2.0\r\n",
        b"GE",
        b"GET /ipfs/bafkqaaa HTTP/1.1\r\nHost: a\r\nX-Slow: ",
        b"\x16\x03\x01",
    ];
    let mut open = Vec::new();
    for opening in openings.iter().cycle().take(50) {
        let mut stream = TcpStream::connect(address(&spoke)).await.unwrap();
        stream.write_all(opening).await.unwrap();
        open.push(stream);
    }
    assert_eq!(others.get(&block).send().await.unwrap().status(), 200);
    for (i, mut stream) in open.into_iter().enumerate() {
        let mut rest = Vec::new();
        // An answer that says so, a close or a reset: but an end.
        drop(within(&format!("end of {i}"), stream.read_to_end(&mut rest)).await);
    }
    assert_eq!(others.get(&block).send().await.unwrap().status(), 200);
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_keeps_no_place() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let piece = hub.add(&vec![7; 64 << 20], Default::default());
    let (block, bytes) = small("a few words");
    hub.add(&bytes, indexed());
    let cfg = RetrievalConfig {
        stall_secs: 1,
        max_requests: n(1),
        ..RetrievalConfig::default()
    };
    let spoke = spoke(&hub, tmp.path(), cfg).await;
    within("the block", async {
        let path = format!("/ipfs/{block}?format=raw");
        while spoke.get(&path).await.status() != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let path = format!("/piece/{}", piece.cid);
    // HTTP/1.1, and HTTP/2 where the connection itself stays healthy.
    let h2 = lotus_runtime::http_client().http2_prior_knowledge();
    for http in [spoke.http.clone(), h2.build().unwrap()] {
        let open = http.get(format!("{}{path}", spoke.url)).send();
        let open = within("an answer", open).await.unwrap();
        assert_eq!(open.status(), 200);
        within("free place", async {
            while spoke.send(Method::HEAD, &path, &[]).await.status() != 200 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        // What it has is not taken for the whole.
        assert!(within("the rest", open.bytes()).await.is_err());
    }
    // What is short enough to be handed over at once, to streams that take none of it, or one byte.
    let short = format!("{}/ipfs/{block}?format=raw", spoke.url);
    for window in [0, 1] {
        let h2 = lotus_runtime::http_client().http2_prior_knowledge();
        let h2 = h2.http2_initial_stream_window_size(window).build().unwrap();
        let open = within("an answer", h2.get(&short).send()).await.unwrap();
        assert_eq!(open.status(), 200);
        within("free place", async {
            while spoke.send(Method::HEAD, &path, &[]).await.status() != 200 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        assert!(within("the rest", open.bytes()).await.is_err());
    }
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_cannot_have_everything() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let piece = hub.add(&vec![7; 48 << 20], Default::default());
    let path = format!("/piece/{}", piece.cid);
    let cfg = RetrievalConfig {
        max_requests_per_client: n(1),
        ..RetrievalConfig::default()
    };
    let direct = spoke(&hub, &tmp.path().join("a"), cfg.clone()).await;
    let open = direct.get(&path).await;
    // Who writes the header itself gains nothing.
    let forged = [("x-forwarded-for", "192.0.2.9")];
    let refused = direct.send(Method::GET, &path, &forged).await;
    assert_eq!(
        (refused.status().as_u16(), header(&refused, "retry-after")),
        (429, "1")
    );
    let text = refused.text().await.unwrap();
    assert!(text.contains("from this address"), "{text}");
    drop(open);
    direct.end().await;

    // Behind a proxy that is trusted, its clients are told apart.
    let cfg = RetrievalConfig {
        trusted_proxies: vec!["127.0.0.0/8".parse().unwrap()],
        ..cfg
    };
    let behind = spoke(&hub, &tmp.path().join("b"), cfg).await;
    let one = [("x-forwarded-for", "192.0.2.1")];
    let two = [("x-forwarded-for", "192.0.2.2")];
    let open = behind.send(Method::GET, &path, &one).await;
    assert_eq!(open.status(), 200);
    assert_eq!(behind.send(Method::GET, &path, &one).await.status(), 429);
    assert_eq!(behind.send(Method::HEAD, &path, &two).await.status(), 200);
    drop(open);
    behind.end().await;

    let cfg = RetrievalConfig {
        max_connections_per_client: n(2),
        ..RetrievalConfig::default()
    };
    let few = spoke(&hub, &tmp.path().join("c"), cfg).await;
    let connect = || TcpStream::connect(address(&few));
    let (first, _second) = (connect().await.unwrap(), connect().await.unwrap());
    let mut third = connect().await.unwrap();
    let mut end = Vec::new();
    drop(within("the end of the third", third.read_to_end(&mut end)).await);
    assert!(end.is_empty());
    drop(first);
    within("a free connection", async {
        let url = format!("{}/ipfs/bafkqaaa?format=raw", few.url);
        while few.http.get(&url).send().await.is_err() {}
    })
    .await;
    few.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bombs_cost_little_and_end() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let cfg = RetrievalConfig {
        walk_memory_mib: n(1),
        ..RetrievalConfig::default()
    };
    // Each node links twice to the one below: 2^40 paths through 41 blocks.
    let mut blocks = vec![(RAW, b"leaf".to_vec())];
    let (mut below, _) = car(&blocks);
    for _ in 0..40 {
        let last = below[below.len() - 1];
        blocks.push((DAG_CBOR, cbor(&[last, last])));
        below = car(&blocks).0;
    }
    let (doubling, bytes) = car(&blocks);
    hub.add(&bytes, indexed());
    // The same as a UnixFS file of 2^40 bytes.
    let mut blocks = vec![(RAW, b"l".to_vec())];
    for level in 0..40 {
        let last = car(&blocks).0[blocks.len() - 1];
        blocks.push((DAG_PB, file_node(&[last, last], 1 << level)));
    }
    let (file, bytes) = car(&blocks);
    hub.add(&bytes, indexed());
    // More blocks than the memory of walks is for.
    let leaves: Vec<_> = (0..40_000u32)
        .map(|i| (RAW, i.to_le_bytes().to_vec()))
        .collect();
    let (cids, _) = car(&leaves);
    let mut blocks = leaves;
    blocks.push((DAG_CBOR, cbor(&cids)));
    let (wide, bytes) = car(&blocks);
    hub.add(&bytes, indexed());
    // A node of half a million links to nothing, 8 bytes each.
    let inline = Cid::new_v1(RAW, cid::multihash::Multihash::wrap(0, b"").unwrap());
    let link = field(2, &field(1, &inline.to_bytes()));
    let (many, bytes) = car(&[(DAG_PB, link.repeat(500_000))]);
    hub.add(&bytes, indexed());
    let spoke = spoke(&hub, tmp.path(), cfg).await;
    spoke.indexed(4).await;

    let top = doubling[doubling.len() - 1];
    let once = spoke.car(&format!("/ipfs/{top}?format=car")).await;
    assert_eq!(once.len(), 41, "each block once");
    // With duplicates it has no end, and ends when the client goes.
    let path = format!("/ipfs/{top}?format=car&car-dups=y");
    let mut endless = spoke.get(&path).await;
    let mut got = 0;
    while got < 1 << 20 {
        got += endless.chunk().await.unwrap().unwrap().len();
    }
    drop(endless);

    // Blocks that hold bytes of the file, over and over: given up.
    let top = file[file.len() - 1];
    let path = format!("/ipfs/{top}?format=car&entity-bytes=0:*");
    let answer = spoke.get(&path).await;
    assert_eq!(answer.status(), 200);
    assert!(within("the end", answer.bytes()).await.is_err());

    let top = wide[wide.len() - 1];
    let answer = spoke.get(&format!("/ipfs/{top}?format=car")).await;
    let status = answer.status();
    if status == 200 {
        assert!(within("the end", answer.bytes()).await.is_err(), "cut");
    } else {
        assert_eq!(
            (status.as_u16(), header(&answer, "retry-after")),
            (503, "5")
        );
    }
    let top = many[0];
    for query in ["format=car", "format=car&dag-scope=entity"] {
        let answer = spoke.get(&format!("/ipfs/{top}?{query}")).await;
        let status = answer.status();
        let cut = status == 200 && within("the end", answer.bytes()).await.is_err();
        assert!(cut || status == 404 || status == 503, "{status}");
    }
    // Each gave back what it had: a walk of some memory goes through again.
    let once = spoke
        .car(&format!("/ipfs/{}?format=car", doubling[40]))
        .await;
    assert_eq!(once.len(), 41);
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_content_is_never_passed_on() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    // A CAR whose block is not what its CID says.
    let (wrong, mut bytes) = small("the right words");
    let at = bytes.len() - 1;
    bytes[at] ^= 1;
    hub.add(&bytes, indexed());
    // A DAG that lacks a block.
    let absent = small("nobody has this").0;
    let here = (RAW, b"here".to_vec());
    let first = car(std::slice::from_ref(&here)).0[0];
    let (dangling, bytes) = car(&[here, (DAG_CBOR, cbor(&[first, absent]))]);
    hub.add(&bytes, indexed());
    let (good, bytes) = small("good");
    hub.add(&bytes, indexed());
    let spoke = spoke(&hub, tmp.path(), RetrievalConfig::default()).await;
    within("the good ones", async {
        for cid in [good, dangling[1]] {
            let path = format!("/ipfs/{cid}?format=raw");
            while spoke.get(&path).await.status() != 200 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    })
    .await;
    let answer = spoke.get(&format!("/ipfs/{wrong}?format=raw")).await;
    assert_eq!(answer.status(), 404);

    // Cut after what there is, over both versions of HTTP.
    let path = format!("{}/ipfs/{}?format=car", spoke.url, dangling[1]);
    let h2 = lotus_runtime::http_client().http2_prior_knowledge();
    for http in [spoke.http.clone(), h2.build().unwrap()] {
        let answer = http.get(&path).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(within("the end", answer.bytes()).await.is_err());
    }

    // Ways out of a folder, and what is too long, lead nowhere.
    let long = "a/".repeat(300);
    for (tail, status) in [
        ("/../../etc/passwd", 404),
        ("/%2e%2e/%2e%2e/etc/passwd", 404),
        ("/..%2f..%2fetc%2fpasswd", 404),
        ("/%00", 404),
        ("/\\..\\..", 404),
        (&*format!("/{long}"), 400),
    ] {
        let request = format!(
            "GET /ipfs/{}{tail}?format=car HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            dangling[1]
        );
        let mut stream = TcpStream::connect(address(&spoke)).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        within("an answer", read).await.unwrap();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{tail}: {answer}"
        );
        assert!(answer.contains("\"fix\""), "{answer}");
    }
    for path in ["/piece/../piece/x", "/piece/%2e%2e", "/piece/a/b"] {
        let status = spoke.get(path).await.status().as_u16();
        assert!([400, 404].contains(&status), "{path}: {status}");
    }
    spoke.end().await;
}

/// A certificate that nobody else signed, and its key.
fn certificate(dir: &Path) -> (PathBuf, PathBuf) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    (cert, key)
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_serves_both_versions_and_nothing_else() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let piece = hub.add(&vec![7; 3 << 20], Default::default());
    let (tls_cert, tls_key) = certificate(tmp.path());
    let cfg = RetrievalConfig {
        header_secs: 1,
        tls_cert: tls_cert.clone(),
        tls_key,
        ..RetrievalConfig::default()
    };
    let needs = cfg.needs();
    assert!(needs.read.iter().any(|p| p == tmp.path()), "{needs:?}");
    let spoke = spoke(&hub, tmp.path(), cfg).await;
    let path = format!("/piece/{}", piece.cid);
    let answer = spoke.get(&path).await;
    assert_eq!(answer.version(), Version::HTTP_2, "chosen by ALPN");
    assert_eq!(answer.bytes().await.unwrap(), vec![7; 3 << 20]);
    let old = lotus_runtime::http_client()
        .danger_accept_invalid_certs(true)
        .http1_only();
    let old = old.build().unwrap();
    let answer = old
        .get(format!("{}{path}", spoke.url))
        .send()
        .await
        .unwrap();
    assert_eq!(answer.version(), Version::HTTP_11);
    assert_eq!(answer.bytes().await.unwrap(), vec![7; 3 << 20]);
    // Without TLS there is no answer, and neither is there one for who says nothing.
    for opening in [&b"GET /ipfs/bafkqaaa HTTP/1.1\r\n\r\n"[..], b""] {
        let mut stream = TcpStream::connect(address(&spoke)).await.unwrap();
        stream.write_all(opening).await.unwrap();
        let mut rest = Vec::new();
        drop(within("the end", stream.read_to_end(&mut rest)).await);
        assert!(!rest.starts_with(b"HTTP"));
    }
    spoke.end().await;

    // Half of a pair is a mistake that is named.
    let half = RetrievalConfig {
        tls_cert,
        ..RetrievalConfig::default()
    };
    let fault = crate::support::fault(&hub, tmp.path(), half).await;
    assert!(fault.message.contains("retrieval.tls_key"), "{fault}");
}
