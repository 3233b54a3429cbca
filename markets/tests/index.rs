//! `lotus-markets index` against a real service of indexing, and against its files.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cid::Cid;
use lotus_car::CarWriter;
use lotus_piece_index::testing::{FakeHub, fake_hub, indexed};
use multihash_codetable::{Code, MultihashDigest};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

struct Markets {
    repo: PathBuf,
    service: Option<Child>,
}

impl Drop for Markets {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Markets {
    fn new(hub: &FakeHub, dir: &Path) -> Self {
        let repo = dir.join("repo");
        std::fs::create_dir_all(&repo).unwrap();
        let addr = hub.config().addr;
        let config = format!("[hub]\naddr = {addr:?}\n[indexing]\nlisten = \"127.0.0.1:0\"\n");
        std::fs::write(repo.join("config.toml"), config).unwrap();
        Self {
            repo,
            service: None,
        }
    }

    fn start(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lotus-markets"));
        command.args(["run", "--services=indexing", "--repo"]);
        command.arg(&self.repo).stdin(Stdio::null());
        let log = std::fs::File::create(self.repo.join("log")).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.service = Some(command.spawn().unwrap());
        // A command that opened the files now would keep them from the service.
        let socket = self.repo.join("indexing/control.sock");
        let began = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(began.elapsed() < DEADLINE, "no service");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn kill(&mut self) {
        if let Some(mut service) = self.service.take() {
            service.kill().unwrap();
            service.wait().unwrap();
        }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lotus-markets"));
        command
            .arg("index")
            .args(args)
            .arg("--repo")
            .arg(&self.repo);
        command.output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let out = self.run(&[args, &["--json"]].concat());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let log = || std::fs::read_to_string(self.repo.join("log")).unwrap_or_default();
        assert!(
            out.status.success(),
            "{args:?}: {}\n{}",
            text(&out.stderr),
            log()
        );
        serde_json::from_slice(&out.stdout).unwrap()
    }

    /// The error of a command that must fail.
    fn error(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(!out.status.success(), "{args:?} succeeds");
        String::from_utf8(out.stderr).unwrap()
    }

    /// Waits until the numbers are as wanted.
    fn until(&self, want: &Value) {
        let began = Instant::now();
        loop {
            let out = self.run(&["stats", "--json"]);
            let stats: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            let fits = |(k, v): (&String, &Value)| stats[k] == *v;
            if want.as_object().unwrap().iter().all(fits) {
                return;
            }
            let said = String::from_utf8_lossy(&out.stderr);
            let log = || std::fs::read_to_string(self.repo.join("log")).unwrap_or_default();
            assert!(
                began.elapsed() < DEADLINE,
                "{stats} and not {want}: {said}\n{}",
                log()
            );
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// An indexer that takes one announcement.
fn indexer() -> (String, thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/announce", listener.local_addr().unwrap());
    let heard = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        stream
            .write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
            .unwrap();
        String::from_utf8(head).unwrap()
    });
    (url, heard)
}

#[test]
fn the_operator_sees_the_index_and_mends_it() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let data = |n: u8| vec![n; 200];
    let cids: Vec<_> = (0..4)
        .map(|n| Cid::new_v1(0x55, Code::Sha2_256.digest(&data(n))))
        .collect();
    let car = |blocks: std::ops::Range<u8>| {
        let mut out = CarWriter::new(Vec::new(), &cids[..1]).unwrap();
        for n in blocks {
            out.write(&cids[usize::from(n)], &data(n)).unwrap();
        }
        out.finish().unwrap()
    };
    let (one, two) = (car(0..3), car(2..4));
    let first = hub.add(&one, indexed());
    let second = hub.add(&two, indexed());
    let mut markets = Markets::new(&hub, tmp.path());
    let none = markets.error(&["stats"]);
    assert!(
        none.contains("there is no index") && none.contains("--services=indexing"),
        "{none}"
    );

    markets.start();
    markets.until(&json!({"pieces": 2, "multihashes": 5, "stale": 0}));
    let stats = markets.json(&["stats"]);
    assert!(
        stats["head"].is_string() && stats["provider"].is_string(),
        "{stats}"
    );
    let found = markets.json(&["find", &cids[2].to_string()]);
    let found = found.as_array().unwrap();
    assert_eq!(found.len(), 2);
    for at in found {
        let in_first = at["piece"] == first.cid.to_string();
        assert!(in_first || at["piece"] == second.cid.to_string());
        let car = if in_first { &one } else { &two };
        let offset = usize::try_from(at["offset"].as_u64().unwrap()).unwrap();
        assert_eq!(car[offset..offset + 200], data(2));
    }
    let absent = Cid::new_v1(0x55, Code::Sha2_256.digest(b"absent"));
    let error = markets.error(&["find", &absent.to_string()]);
    assert!(error.contains("no indexed piece holds"), "{error}");
    let verified = markets.json(&["verify"]);
    assert_eq!(
        (&verified["ok"], &verified["pieces"]),
        (&json!(true), &json!(2))
    );

    // Anew from the bytes.
    assert_eq!(markets.json(&["rebuild"]), json!({"pieces": 2}));
    markets.until(&json!({"pieces": 2, "multihashes": 5, "stale": 0}));
    assert_eq!(
        markets.json(&["rebuild", &second.cid.to_string()]),
        json!({"pieces": 1})
    );
    let other = "baga6ea4seaqao7s73y24kcutaosvacpdjgfe5pw76ooefnyqw4ynr3d2y6x2mpq";
    let error = markets.error(&["rebuild", other]);
    assert!(error.contains("is not indexed"), "{error}");

    let error = markets.error(&["announce"]);
    assert!(error.contains("--url"), "{error}");
    let (url, heard) = indexer();
    let told = markets.json(&["announce", "--url", &url]);
    assert_eq!(
        (&told[0]["error"], &told[0]["url"]),
        (&json!(""), &json!(url))
    );
    assert!(heard.join().unwrap().starts_with("PUT /announce HTTP/1.1"));
    let error = markets.error(&["announce", "--url", "http://127.0.0.1:1/"]);
    assert!(error.contains("was not told"), "{error}");
    markets.until(&json!({"stale": 0}));

    // The files, when nobody runs.
    markets.kill();
    let stats = markets.json(&["stats"]);
    assert_eq!(
        (&stats["pieces"], &stats["head"]),
        (&json!(2), &json!(null))
    );
    assert_eq!(markets.json(&["find", &cids[0].to_string()])[0]["len"], 200);
    let error = markets.error(&["announce"]);
    assert!(error.contains("does not run"), "{error}");
    let list = markets
        .repo
        .join(format!("indexing/index.sidecars/{}.idx", first.cid));
    let mut bytes = std::fs::read(&list).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&list, bytes).unwrap();
    let error = markets.error(&["verify"]);
    assert!(error.contains("index rebuild"), "{error}");
    assert_eq!(markets.json(&["rebuild"]), json!({"pieces": 2}));
    markets.start();
    markets.until(&json!({"pieces": 2, "stale": 0}));
    assert_eq!(markets.json(&["verify"])["ok"], true);
}
