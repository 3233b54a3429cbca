//! Bad input: each gets its own clear error with the fix and the right exit code, and the
//! provider stays up and loses nothing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use lotus_e2e::{Net, NetConfig, secs};

/// Exit codes; see docs/exit-codes.md.
const DATA: i32 = 65;
const CONFIG: i32 = 78;

fn client(net: &Net, args: &[&str]) -> Output {
    let url = net.spoke_url("deals").expect("deals runs");
    let key = net.root().join("bad.key");
    let mut command = Command::new(net.exe("lotus-markets"));
    command
        .args(["client", "deal", "--provider-url", &url, "--key"])
        .arg(key)
        .args(args);
    command.output().expect("the client starts")
}

/// The error says `word`, has a fix, and the exit code is `code`.
#[track_caller]
fn refused(what: &str, out: &Output, code: i32, word: &str) {
    let text = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{what}: {text}");
    assert!(text.contains(word), "{what}: no {word:?} in {text}");
    assert!(text.contains("fix: "), "{what}: no fix in {text}");
}

fn pack(net: &Net, bytes: &[u8], name: &str) -> std::path::PathBuf {
    let dir = net.root().join(format!("{name}-data"));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("file"), bytes).unwrap();
    let car = net.root().join(format!("{name}.car"));
    let packed = Command::new(net.exe("lotus-markets"))
        .args(["client", "pack"])
        .arg(&dir)
        .arg("-o")
        .arg(&car)
        .output()
        .unwrap();
    assert!(packed.status.success(), "{packed:?}");
    car
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_gets_a_clear_error_and_harms_nothing() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();

    deals(&net);
    configuration(&net);
    second_hub(&net);
    wrong_token(&net);
    full_disk(&net);

    let all = net.status().await.unwrap();
    for p in &all {
        assert!(p.ready && p.restarts == 0, "{p:?}\n{}", net.logs());
    }
    net.stop().await.unwrap();
}

fn deals(net: &Net) {
    let car = pack(net, &vec![7u8; 300_000], "good");
    let bytes = std::fs::read(&car).unwrap();

    let cut = net.root().join("cut.car");
    std::fs::write(&cut, &bytes[..bytes.len() - 1000]).unwrap();
    let out = client(net, &["--car", cut.to_str().unwrap()]);
    refused("truncated CAR", &out, DATA, "CAR");

    let corrupt = net.root().join("corrupt.car");
    let mut changed = bytes.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    std::fs::write(&corrupt, changed).unwrap();
    let out = client(net, &["--car", corrupt.to_str().unwrap()]);
    refused("corrupt CAR", &out, DATA, "CAR");

    let big = net.root().join("big.raw");
    std::fs::write(&big, vec![1u8; 9 << 20]).unwrap();
    let out = client(net, &["--car", big.to_str().unwrap(), "--format", "raw"]);
    refused("piece larger than the sector", &out, DATA, "sector");

    let other = pack(net, b"something else", "other");
    let cid = Command::new(net.exe("lotus-markets"))
        .args(["client", "piece-cid", "--json"])
        .arg(&other)
        .output()
        .unwrap();
    let cid: serde_json::Value = serde_json::from_slice(&cid.stdout).unwrap();
    let good = car.to_str().unwrap();
    let out = client(
        net,
        &[
            "--car",
            good,
            "--piece-cid",
            cid["piece_cid_v2"].as_str().unwrap(),
        ],
    );
    assert!(!out.status.success(), "wrong piece CID: {out:?}");
    let out = client(net, &["--car", good, "--piece-cid", "bafkqaaa"]);
    refused("no piece CID", &out, DATA, "piece");

    for (what, args, word) in [
        ("short duration", &["--duration", "5"], "duration"),
        ("long duration", &["--duration", "99999999"], "duration"),
        ("start in the past", &["--start-epoch", "-5"], "start"),
        ("another provider", &["--provider", "t09999"], "provider"),
        (
            "no such allocation",
            &["--allocation", "4242"],
            "allocation",
        ),
    ] {
        let mut all = vec!["--car", good];
        all.extend(args);
        let out = client(net, &all);
        assert!(!out.status.success(), "{what} was accepted");
        let text = String::from_utf8_lossy(&out.stderr).to_lowercase();
        assert!(
            text.contains(word) && text.contains("fix: "),
            "{what}: {text}"
        );
    }
}

fn markets(net: &Net, repo: &Path, services: &str, env: &[(&str, &str)]) -> Output {
    Command::new(net.exe("lotus-markets"))
        .args(["run", &format!("--services={services}"), "--repo"])
        .arg(repo)
        .env(
            "LOTUS_MARKETS__HUB__ADDR",
            format!("unix:{}", net.root().join("miner/run/hub.sock").display()),
        )
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

fn configuration(net: &Net) {
    let repo = net.root().join("markets2");
    std::fs::create_dir_all(&repo).unwrap();

    let out = markets(net, &repo, "retreival", &[]);
    refused("unknown service", &out, CONFIG, "retreival");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    for name in ["deals", "retrieval", "indexing"] {
        assert!(text.contains(name), "the valid names are listed: {text}");
    }

    std::fs::write(repo.join("config.toml"), "[retrieval]\nlissten = \"x\"\n").unwrap();
    let out = markets(net, &repo, "retrieval", &[]);
    refused("unknown key", &out, CONFIG, "lissten");
    for text in ["max_requests = 0", "max_connections = 70000"] {
        std::fs::write(repo.join("config.toml"), format!("[retrieval]\n{text}\n")).unwrap();
        let key = text.split(' ').next().unwrap();
        let out = markets(net, &repo, "retrieval", &[]);
        refused("a limit that limits nothing", &out, CONFIG, key);
    }
    std::fs::remove_file(repo.join("config.toml")).unwrap();

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let out = markets(
        net,
        &repo,
        "retrieval",
        &[("LOTUS_MARKETS__RETRIEVAL__LISTEN", &addr)],
    );
    refused("occupied port", &out, CONFIG, &addr);
}

fn second_hub(net: &Net) {
    let out = Command::new(net.exe("lotus-miner"))
        .args(["run", "--repo"])
        .arg(net.root().join("miner"))
        .output()
        .unwrap();
    refused("second hub", &out, CONFIG, "pid");
}

fn wrong_token(net: &Net) {
    let addr = lotus_runtime::addr_file::read(&net.root().join("devnet/run"), "api").unwrap();
    let out = Command::new(net.exe("lotus-miner"))
        .args(["init", "--actor", "t01000", "--repo"])
        .arg(net.root().join("miner2"))
        .args(["--node-api", &format!("wrong-token:http://{addr}")])
        .output()
        .unwrap();
    refused("wrong node token", &out, CONFIG, "token");
}

/// Says it past the capture of the test's output: a skip must be seen.
fn skipped(what: &str) {
    let line = format!("SKIPPED {what}\n");
    std::io::stdout().write_all(line.as_bytes()).unwrap();
}

/// The deals spoke on a disk of 1 MiB.
fn full_disk(net: &Net) {
    if !nix::unistd::geteuid().is_root() {
        skipped("full_disk: mounting a small tmpfs needs root; run the tests as root");
        return;
    }
    let repo = net.root().join("small");
    std::fs::create_dir_all(&repo).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
        .arg(&repo)
        .status();
    if !mounted.is_ok_and(|s| s.success()) {
        skipped("full_disk: this kernel or container does not let root mount a tmpfs");
        return;
    }
    let mut deals = Command::new(net.exe("lotus-markets"))
        .args(["run", "--services=deals", "--repo"])
        .arg(&repo)
        .env(
            "LOTUS_MARKETS__HUB__ADDR",
            format!("unix:{}", net.root().join("miner/run/hub.sock").display()),
        )
        .env("LOTUS_MARKETS__DEALS__LISTEN", "127.0.0.1:0")
        .env("LOTUS_MARKETS__DEALS__MK12__LISTEN", "127.0.0.1:0")
        .spawn()
        .unwrap();
    let deadline = std::time::Instant::now() + secs(30);
    let addr = loop {
        if let Ok(addr) = lotus_runtime::addr_file::read(&repo.join("run"), "deals") {
            break addr;
        }
        assert!(std::time::Instant::now() < deadline, "deals did not start");
        std::thread::yield_now();
    };
    let url = format!("http://{addr}");
    let send = |name: &str, bytes: &[u8]| {
        let file = net.root().join(name);
        std::fs::write(&file, bytes).unwrap();
        Command::new(net.exe("lotus-markets"))
            .args([
                "client",
                "deal",
                "--provider-url",
                &url,
                "--format",
                "raw",
                "--key",
            ])
            .arg(net.root().join("bad.key"))
            .arg("--car")
            .arg(file)
            .output()
            .unwrap()
    };
    let out = send("too-big.raw", &vec![3u8; 6 << 20]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "6 MiB fitted a disk of 4 MiB");
    assert!(
        text.contains("space") || text.contains("disk"),
        "full disk: {text}"
    );
    let out = send("small.raw", &vec![4u8; 100_000]);
    assert!(
        out.status.success(),
        "the disk is free again and the service is up: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    deals.kill().unwrap();
    deals.wait().unwrap();
    let unmounted = Command::new("umount").arg("-l").arg(&repo).status();
    assert!(unmounted.is_ok_and(|s| s.success()));
}
