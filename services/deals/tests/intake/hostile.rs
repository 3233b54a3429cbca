//! Clients that mean harm: what they use is bounded, others are served, every refusal says why,
//! and nothing of them is left.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use lotus_deals::auth;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use ulid::Ulid;

use crate::{DEADLINE, Net, address, data, files};

async fn within<T>(what: &str, f: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, f)
        .await
        .unwrap_or_else(|_| panic!("no {what} in time"))
}

impl Net {
    fn socket(&self) -> SocketAddr {
        self.base.split("//").nth(1).unwrap().parse().unwrap()
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.socket()).await.unwrap()
    }

    /// The head of a request that the client signs; `more` are headers.
    fn head(&self, method: &str, path: &str, more: &[&str]) -> String {
        let who = address(&self.key);
        let signed = auth::sign_secp256k1(&self.key, &who, method, path, Timestamp::now());
        let more: String = more.iter().map(|line| format!("{line}\r\n")).collect();
        let auth = signed.unwrap();
        format!("{method} {path} HTTP/1.1\r\nHost: a\r\nAuthorization: {auth}\r\n{more}\r\n")
    }

    /// Sends bytes as they are, and reads until the service ends the connection. With `leave`
    /// nothing more can come.
    async fn raw(&self, request: &[u8], leave: bool) -> String {
        let mut stream = self.connect().await;
        // It may end before all is sent.
        drop(stream.write_all(request).await);
        if leave {
            drop(stream.shutdown().await);
        }
        let mut answer = Vec::new();
        drop(within("an end", stream.read_to_end(&mut answer)).await);
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn serves(&self) {
        let asked = self.http.get(format!("{}/market/mk20/products", self.base));
        assert_eq!(asked.send().await.unwrap().status(), 200);
    }
}

/// Every file below a folder, with its length.
fn tree(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = std::fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            found.extend(tree(&path));
        } else if path.extension().is_none_or(|e| e != "redb") {
            found.push((path, meta.len()));
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn slow_clients_are_dropped_while_others_are_served() {
    let net = Net::new(|c| {
        c.header_secs = 1;
        c.requests_per_second = 1_000;
    })
    .await;
    let length = "Content-Length: 5000";
    let json = "Content-Type: application/json";
    let cbor = "Content-Type: application/cbor";
    // What a connection begins with, and words of its answer: none for what is no request yet.
    let openings = [
        (String::new(), ""),
        ("PO".into(), ""),
        ("POST /market/mk20/deal HTTP/1.1\r\nX-Slow: ".into(), ""),
        (
            net.head("POST", "/market/mk20/deal", &[json, length]) + "{\"ident",
            "too slowly",
        ),
        (
            net.head("POST", "/market/mk12/store", &[cbor, length]) + "\u{7f}",
            "too slowly",
        ),
        (net.head("POST", "/pdp/piece", &[length]), "too slowly"),
    ];
    let mut open = Vec::new();
    for (opening, words) in openings.iter().cycle().take(60) {
        let mut stream = net.connect().await;
        stream.write_all(opening.as_bytes()).await.unwrap();
        open.push((stream, opening, words));
    }
    net.serves().await;
    for (mut stream, opening, words) in open {
        let mut answer = Vec::new();
        drop(within("an end", stream.read_to_end(&mut answer)).await);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains(words), "{opening:?}: {answer:?}");
    }
    net.serves().await;
}

#[tokio::test]
async fn who_may_not_upload_or_sends_nothing_keeps_no_place() {
    let net = Net::new(|c| {
        c.transfer_idle_secs = 1;
        c.max_transfers = 1.try_into().unwrap();
        c.max_chunk_uploads = 1.try_into().unwrap();
        c.requests_per_second = 1_000;
    })
    .await;
    let bytes = data(1, 5_000);
    let id = Ulid::from(1u128);
    assert_eq!(net.propose(&net.deal(id, &bytes)).await.0, 200);
    let unknown = Ulid::from(9u128);
    let headers = [
        "Content-Type: application/octet-stream",
        "Content-Length: 5000",
    ];
    let unsigned = format!("Host: a\r\n{}\r\n\r\n", headers.join("\r\n"));
    let mut open = Vec::new();
    for path in [
        format!("/market/mk20/upload/{id}"),
        format!("/market/mk20/uploads/{id}/1"),
        "/pdp/piece/upload/x".to_owned(),
    ] {
        let request = format!("PUT {path} HTTP/1.1\r\n{unsigned}");
        open.extend([request.clone(), request]);
    }
    for path in [
        format!("/market/mk20/upload/{unknown}"),
        format!("/market/mk20/uploads/{unknown}/1"),
    ] {
        open.push(net.head("PUT", &path, &headers));
    }
    let mut streams = Vec::new();
    for request in open {
        let mut stream = net.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        streams.push(stream);
    }
    net.serves().await;
    assert_eq!(net.put(id, &bytes).await.0, 200, "they only wait");

    // Whose upload it is has the place, until it has sent nothing for a second.
    let id = Ulid::from(2u128);
    assert_eq!(net.propose(&net.deal(id, &bytes)).await.0, 200);
    let path = format!("/market/mk20/upload/{id}");
    let mut slow = net.connect().await;
    let head = net.head("PUT", &path, &headers) + "a few";
    slow.write_all(head.as_bytes()).await.unwrap();
    net.wait(id, "the slow one to begin", |s| {
        s["deal"]["received_bytes"] == 5
    })
    .await;
    assert_eq!(net.put(id, &bytes).await.0, 429);
    within("the place", async {
        while net.put(id, &bytes).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn one_client_cannot_have_every_connection() {
    let net = Net::new(|c| {
        c.max_connections = 6.try_into().unwrap();
        c.max_connections_per_client = 3.try_into().unwrap();
    })
    .await;
    // The one that the service's own health is asked by is gone.
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut stream = net.connect().await;
        stream.write_all(b"GET /market").await.unwrap();
        open.push(stream);
    }
    let mut fourth = net.connect().await;
    let mut rest = Vec::new();
    drop(within("the end of the fourth", fourth.read_to_end(&mut rest)).await);
    assert!(rest.is_empty());
    let other: IpAddr = [127, 0, 0, 2].into();
    let other = reqwest::Client::builder().local_address(other);
    let other = other.build().unwrap();
    let products = format!("{}/market/mk20/products", net.base);
    let asked = within("an answer to another", other.get(&products).send()).await;
    assert_eq!(asked.unwrap().status(), 200);
    drop(open);
    within("a free connection", async {
        while net.http.get(&products).send().await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn uploads_that_lie_about_their_length_leave_nothing() {
    let net = Net::new(|c| {
        c.header_secs = 1;
        c.requests_per_second = 1_000;
    })
    .await;
    let id = Ulid::from(1u128);
    let bytes = data(1, 5_000);
    assert_eq!(net.propose(&net.deal(id, &bytes)).await.0, 200);
    let path = format!("/market/mk20/upload/{id}");
    let chunked = "Transfer-Encoding: chunked";
    let chunk = |len: &str, bytes: &[u8]| {
        [format!("{len}\r\n").as_bytes(), bytes, b"\r\n0\r\n\r\n"].concat()
    };
    // Headers, body, words of the answer, and whether there must be one: what is no HTTP, or ends
    // in its middle, may have none.
    let cases: [(&[&str], Vec<u8>, &str, bool); 10] = [
        (
            &["Content-Length: 5000"],
            bytes[..2_000].to_vec(),
            "broke off after",
            false,
        ),
        (
            &["Content-Length: 5001"],
            [&bytes[..], b"x"].concat(),
            "the upload has 5001 bytes, the piece CID names 5000",
            true,
        ),
        (
            &["Content-Length: 5"],
            bytes.clone(),
            "the upload has 5 bytes, the piece CID names 5000",
            true,
        ),
        (
            &["Content-Length: 5000", "Content-Length: 1"],
            bytes.clone(),
            "HTTP/1.1 400 ",
            false,
        ),
        (
            &["Content-Length: -1"],
            bytes.clone(),
            "HTTP/1.1 400 ",
            false,
        ),
        (
            &["Content-Length: 18446744073709551616"],
            bytes.clone(),
            "HTTP/1.1 400 ",
            false,
        ),
        (
            &[chunked],
            chunk("1770", &data(1, 6_000)),
            "more than the 5000 bytes that the piece CID names",
            true,
        ),
        (
            &[chunked],
            chunk("ffffffffffffffff", &bytes),
            "HTTP/1.1 400 ",
            false,
        ),
        (&[chunked], chunk("x", &bytes), "HTTP/1.1 400 ", false),
        (
            &[chunked],
            chunk("3e8", &bytes[..1_000]),
            "ended after 1000 of 5000 bytes",
            true,
        ),
    ];
    for (headers, body, words, told) in cases {
        let octets = "Content-Type: application/octet-stream";
        let head = net.head("PUT", &path, &[&[octets], headers].concat());
        let request = [head.as_bytes(), &body].concat();
        let end = tokio::time::Instant::now() + DEADLINE;
        let answer = loop {
            let answer = net.raw(&request, !told).await;
            // The one before may still hold its place for a moment.
            if !answer.starts_with("HTTP/1.1 409 ") {
                break answer;
            }
            assert!(tokio::time::Instant::now() < end, "{headers:?}");
        };
        let silent = !told && answer.is_empty();
        assert!(silent || answer.contains(words), "{words}: {answer}");
        net.wait(id, "no bytes", |_| files(&net.staging()) == 0)
            .await;
        let status = net.status(id).await;
        assert_eq!(status["deal"]["checkpoint"], "Accepted", "{headers:?}");
    }
    assert_eq!(net.put(id, &bytes).await.0, 200);
}

#[tokio::test]
async fn an_endless_body_is_refused_after_little_of_it() {
    let net = Net::new(|c| c.header_secs = 5).await;
    let chunk = [b"10000\r\n", &[b' '; 1 << 16][..], b"\r\n"].concat();
    for (path, kind) in [
        ("/market/mk20/deal", "application/json"),
        ("/market/mk12/store", "application/cbor"),
        ("/pdp/piece", "application/json"),
    ] {
        let kind = format!("Content-Type: {kind}");
        let head = net.head("POST", path, &[&kind, "Transfer-Encoding: chunked"]);
        let (mut from, mut to) = net.connect().await.into_split();
        to.write_all(head.as_bytes()).await.unwrap();
        let mut sent = 0;
        let endless = async {
            while to.write_all(&chunk).await.is_ok() {
                sent += chunk.len();
            }
        };
        let mut answer = Vec::new();
        let read = async {
            // As soon as it is refused nothing more is sent.
            while answer.is_empty() && from.read_buf(&mut answer).await.is_ok_and(|n| n > 0) {}
        };
        within(path, async {
            tokio::select! {
                () = read => {}
                () = endless => {}
            }
        })
        .await;
        drop(within("the rest", from.read_to_end(&mut answer)).await);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 413 "), "{path}: {answer}");
        // The limit of the message, and what lies in the buffers of two sockets.
        assert!(sent < 32 << 20, "{path}: {sent} bytes were taken");
    }
    net.serves().await;
}

/// A CAR of one block, and what is then done to it.
fn car(spoil: impl FnOnce(&mut cid::Cid, &mut Vec<u8>)) -> Vec<u8> {
    use sha2::Digest as _;
    let mut block = data(9, 3_000);
    let hash = sha2::Sha256::digest(&block);
    let hash = cid::multihash::Multihash::wrap(0x12, &hash).unwrap();
    let mut cid = cid::Cid::new_v1(0x55, hash);
    spoil(&mut cid, &mut block);
    let mut car = lotus_car::CarWriter::new(Vec::new(), &[cid]).unwrap();
    car.write(&cid, &block).unwrap();
    car.finish().unwrap()
}

#[tokio::test]
async fn a_car_that_lies_fails_its_deal_alone() {
    let net = Net::new(|_| {}).await;
    let good = car(|_, _| {});
    let mut huge = good.clone();
    let at = huge.len() - 3_000 - 36 - 2;
    huge.splice(at..at + 2, [0xff, 0xff, 0xff, 0xff, 0x7f]);
    let cases = [
        (car(|_, block| block[7] ^= 1), "is corrupt"),
        (
            car(|cid, _| {
                let hash = cid::multihash::Multihash::wrap(0x99, &[1; 32]).unwrap();
                *cid = cid::Cid::new_v1(0x55, hash);
            }),
            "is corrupt",
        ),
        (
            car(|cid, _| {
                let short = cid::multihash::Multihash::wrap(0x12, &[1; 4]).unwrap();
                *cid = cid::Cid::new_v1(0x55, short);
            }),
            "is corrupt",
        ),
        (huge, "claims 34359738367 bytes"),
        (good[..good.len() - 1].to_vec(), "is truncated"),
        ([&good[..], &[0, 0, 7]].concat(), "data after the end"),
        (b"PK\x03\x04 a zip file, not a CAR".to_vec(), "CAR"),
    ];
    let propose = async |id: Ulid, bytes: &[u8]| {
        let mut deal = net.deal(id, bytes);
        deal["data"]["format"] = json!({"car": {}});
        assert_eq!(net.propose(&deal).await.0, 200);
    };
    for (n, (bytes, words)) in (1u128..).zip(cases) {
        let id = Ulid::from(n);
        propose(id, &bytes).await;
        let (code, refusal) = net.put(id, &bytes).await;
        let error = refusal["error"].as_str().unwrap();
        assert_eq!(code, 400, "{error}");
        assert!(error.contains("not a sound CAR"), "{error}");
        assert!(error.contains(words), "{words}: {error}");
        let state = net.checkpoint(id, "Failed").await;
        let told = state["ddo_v1"]["errorMsg"].as_str().unwrap();
        assert!(told.contains(words), "{told}");
    }
    let id = Ulid::from(99u128);
    propose(id, &good).await;
    assert_eq!(net.put(id, &good).await.0, 200);
    assert_eq!(net.finalize(id).await.0, 200);
    net.checkpoint(id, "Offered").await;
    net.wait(id, "what was left of the others to go", |_| {
        files(&net.staging()) == 1
    })
    .await;
}

#[tokio::test]
async fn no_name_leads_out_of_the_folder() {
    let net = Net::new(|c| {
        c.requests_per_second = 10_000;
        c.header_secs = 1;
    })
    .await;
    let id = Ulid::from(1u128);
    assert_eq!(net.propose(&net.deal(id, &data(1, 3))).await.0, 200);
    let before = tree(net.dir.path());
    let long = "A".repeat(5_000);
    let names = [
        "..",
        "%2e%2e",
        "..%2f..%2fdeals.redb",
        "..%5c..%5cx",
        "%2fetc%2fpasswd",
        "%00",
        "%ff",
        "x%0d%0aX-Injected:%20y",
        &*long,
    ];
    let of = |name: &str, ending: &str| format!("/market/mk20/upload{ending}/{name}");
    let mut paths = Vec::new();
    for name in names {
        paths.extend([
            ("PUT", of(name, "")),
            ("POST", of(name, "")),
            ("PUT", of(name, "s") + "/1"),
            ("POST", of(name, "s")),
            ("GET", of(name, "s")),
            ("POST", of(name, "s/finalize")),
            ("PUT", format!("/market/mk20/uploads/{id}/{name}")),
            ("GET", format!("/market/mk20/status/{name}")),
            ("POST", format!("/market/mk20/update/{name}")),
            ("PUT", format!("/pdp/piece/upload/{name}")),
            ("PUT", format!("/pdp/piece/uploads/{name}")),
            ("POST", format!("/pdp/piece/uploads/{name}")),
            ("GET", format!("/pdp/piece/{name}/status")),
            ("GET", format!("/pdp/piece?pieceCid={name}")),
        ]);
    }
    for chunk in ["-1", "0", "4294967296", "1e3", "+1", "1/../2"] {
        paths.push(("PUT", format!("/market/mk20/uploads/{id}/{chunk}")));
    }
    for (method, path) in paths {
        let kind = if method == "PUT" {
            "Content-Type: application/octet-stream"
        } else {
            "Content-Type: application/json"
        };
        let headers = [kind, "Content-Length: 3", "Connection: close"];
        let signed = path.split('?').next().unwrap();
        let head = net
            .head(method, signed, &headers)
            .replacen(signed, &path, 1);
        let answer = net.raw((head + "abc").as_bytes(), false).await;
        let status = answer.get(9..12).unwrap_or_default();
        assert!(status.starts_with('4'), "{method} {path}: {answer}");
        assert!(!answer.contains("\r\nX-Injected"), "{answer}");
        assert!(answer.len() < 2_000, "{method} {path}: {answer}");
    }
    assert_eq!(tree(net.dir.path()), before);
    net.serves().await;
}

#[tokio::test]
async fn json_bombs_are_refused_with_a_reason() {
    let net = Net::new(|_| {}).await;
    let good = net.deal(Ulid::from(1u128), &data(1, 100));
    let text = good.to_string();
    let nested = |open: &str, close: &str| {
        let deep = open.repeat(20_000) + &close.repeat(20_000);
        text.replace("\"raw\":{}", &format!("\"raw\":{deep}"))
    };
    let twice = text.replacen('{', "{\"client\":\"t01\",", 1);
    for (body, words) in [
        (nested("[", "]"), "recursion limit"),
        (nested("{\"a\":", "}"), "recursion limit"),
        (twice, "duplicate field `client`"),
        (text.replace("518400", "1e400"), "number out of range"),
        (
            text.replace("518400", "9223372036854775808"),
            "invalid value",
        ),
        (
            text.replace("identifier", "Identifier"),
            "missing field `identifier`",
        ),
        (text[..text.len() - 1].to_owned(), "EOF"),
        ("{}".to_owned() + &text, "missing field"),
        (text.clone() + "{}", "trailing characters"),
        (String::new(), "EOF"),
    ] {
        let post = net.request("POST", "/deal");
        let post = post.header("content-type", "application/json");
        let answer = post.body(body).send().await.unwrap();
        assert_eq!(answer.status(), 400, "{words}");
        let refusal: Value = answer.json().await.unwrap();
        let error = refusal["error"].as_str().unwrap();
        assert!(error.contains(words), "{words}: {error}");
        // Where in the body it is.
        assert!(error.contains(" column "), "{error}");
        assert!(!refusal["fix"].as_str().unwrap().is_empty());
    }
    assert_eq!(net.propose(&good).await.0, 200);
}
