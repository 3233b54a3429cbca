//! A worker that shares nothing with the hub seals a sector, or proves a deadline; another takes over
//! when it is killed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use lotus_e2e::{Net, NetConfig, secs};
use serde_json::Value;

/// Asks the hub.
async fn ask(net: &Net, args: &str) -> Option<Value> {
    let repo = net.root().join("miner").display().to_string();
    let mut all: Vec<&str> = args.split_whitespace().collect();
    all.extend(["--json", "--repo", &repo]);
    serde_json::from_str(&net.run("lotus-miner", &all).await.ok()?).ok()
}

/// `lotus-worker run` with its log; killed when a test fails.
struct Worker {
    child: Child,
    log: PathBuf,
}

impl Worker {
    fn start(net: &Net, name: &str, class: &str) -> Self {
        let log = net.root().join(format!("logs/lotus-worker-{name}.log"));
        let file = std::fs::File::create(&log).unwrap();
        let child = Command::new(net.exe("lotus-worker"))
            .arg("run")
            .arg("--bundle")
            .arg(net.root().join(format!("{name}.bundle")))
            .arg("--dir")
            .arg(net.root().join(format!("scratch-{name}")))
            .args(["--nice", "0", "--class", class])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args([signal, &pid]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It has ended already, if all went well.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Makes the bundle of a worker.
async fn bundle(net: &Net, name: &str, hub: &str) {
    let file = net.root().join(format!("{name}.bundle"));
    let repo = net.root().join("miner");
    let (file, repo) = (file.display().to_string(), repo.display().to_string());
    let args = ["workers", "join-bundle", "--name", name, "--hub", hub];
    let args = [&args[..], &["-o", &file, "--repo", &repo]].concat();
    net.run("lotus-miner", &args).await.unwrap();
}

/// Processes whose parent is `parent`.
fn children(parent: u32) -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").unwrap();
    pids.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let after_name = stat.rsplit(')').next().unwrap_or_default();
            after_name.split_whitespace().nth(1) == Some(&parent.to_string())
        })
        .collect()
}

/// The hub's worker on another host of this name.
async fn attached(net: &Net, name: &str) -> Option<Value> {
    let all = ask(net, "sealing workers").await?;
    let starts = format!("{name} on ");
    let mut found = all.as_array()?.iter().filter(|w| {
        w["host"]
            .as_str()
            .is_some_and(|host| host.starts_with(&starts))
    });
    found.next().cloned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sector_is_sealed_by_workers_that_share_nothing() {
    // A port that stays the same when the hub is started again.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = port.local_addr().unwrap().to_string();
    drop(port);
    let mut cfg = NetConfig {
        services: Vec::new(),
        ..NetConfig::default()
    };
    for (key, value) in [
        ("LOTUS_MINER__WORKERS__LISTEN", addr.as_str()),
        // The one on this host writes pieces and cleans up.
        ("LOTUS_MINER__WORKERS__SEAL_LOCALLY", "false"),
    ] {
        cfg.hub_env.insert(key.into(), value.into());
    }
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    for name in ["one", "two"] {
        bundle(&net, name, &addr).await;
    }

    // Without a worker the sector waits, and the hub says why.
    let pledged = ask(&net, "sectors pledge --really-do-it").await.unwrap();
    net.wait("the reason of the wait", secs(60), async |n| {
        let queue = ask(n, "sealing sched-diag").await?;
        let job = queue["queue"].as_array()?.first()?.clone();
        let why = job["blocked"].as_str()?.contains("seal_locally");
        (why && job["step"] == "pre_commit1").then_some(())
    })
    .await
    .unwrap();

    // Killed in the middle of PreCommit1, with the process that computes.
    let one = Worker::start(&net, "one", "seal");
    let worker = net
        .wait("the first worker", secs(30), async |n| {
            attached(n, "one").await
        })
        .await
        .unwrap();
    assert!(worker["declared"]["scratch"].as_u64().unwrap() > 0);
    net.wait("PreCommit1 to be on its way", secs(60), async |n| {
        let jobs = ask(n, "sealing jobs").await?;
        let job = jobs.as_array()?.first()?.clone();
        let runs = job["step"] == "pre_commit1" && job["worker"] == worker["id"];
        (runs && job["progress"].as_f64()? > 0.0).then_some(())
    })
    .await
    .unwrap();
    let computes = children(one.child.id());
    assert_eq!(computes.len(), 1, "{computes:?}");
    one.signal("-KILL");
    net.wait("its process to be gone", secs(20), async |_| {
        let gone = |pid: &u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        computes.iter().all(gone).then_some(())
    })
    .await
    .unwrap();
    drop(one);

    // Another takes over; the hub dies under it.
    let mut two = Worker::start(&net, "two", "seal");
    net.wait("PreCommit1 to be done", secs(180), async |_| {
        two.log().contains("brought back").then_some(())
    })
    .await
    .unwrap();
    let old = net.kill9("hub").await.unwrap();
    net.wait("a new hub and its worker", secs(90), async |n| {
        let hub = n.process("hub").await.ok()?;
        attached(n, "two").await?;
        (hub.ready && hub.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();
    net.wait("the sector to be proven", secs(300), async |n| {
        let all = ask(n, "sectors list").await?;
        let state = all.as_array()?.first()?["state"].as_str()?.to_owned();
        ["Proving", "Available"]
            .contains(&state.as_str())
            .then_some(())
    })
    .await
    .unwrap();
    for step in ["pre_commit1", "pre_commit2", "commit"] {
        let log = two.log();
        assert!(log.contains(&format!("step=\"{step}\"")), "{pledged} {log}");
    }
    // The proof was made from what PreCommit2 left there.
    assert!(two.log().contains("inputs bytes=0 "), "{}", two.log());

    // It leaves as asked; and is not let in again once its bundle is void.
    two.signal("-TERM");
    assert!(two.child.wait().unwrap().success(), "{}", two.log());
    ask(&net, "workers revoke two").await.unwrap();
    let mut void = Worker::start(&net, "two", "seal");
    net.wait(
        "the fix for a worker that is not let in",
        secs(30),
        async |_| void.log().contains("join-bundle").then_some(()),
    )
    .await
    .unwrap();
    let status = void.child.wait().unwrap();
    assert_eq!(status.code(), Some(78), "{}", void.log());
    net.stop().await.unwrap();
}

/// The deadline with the sector, as chain and hub have it.
async fn deadline(net: &Net) -> Option<Value> {
    let all = ask(net, "proving deadlines --all").await?;
    let mut with = all.as_array()?.iter().filter(|d| d["sectors"] != 0);
    with.next().cloned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_is_proven_elsewhere_and_here_when_that_dies() {
    const DEADLINES: u64 = 4;
    let mut cfg = NetConfig {
        services: Vec::new(),
        devnet_args: format!(
            "--listen 127.0.0.1:0 --sector-size 2KiB --block-time-ms 500 --deadlines {DEADLINES} \
             --deadline-epochs 24 --winning-lookback 10"
        )
        .split_whitespace()
        .map(str::to_owned)
        .collect(),
        ..NetConfig::default()
    };
    let listen = ("LOTUS_MINER__WORKERS__LISTEN", "127.0.0.1:0");
    cfg.hub_env.insert(listen.0.into(), listen.1.into());
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let run = net.root().join("miner/run");
    let hub = lotus_runtime::addr_file::read(&run, "workers").unwrap();
    bundle(&net, "prover", &hub).await;
    let prover = Worker::start(&net, "prover", "prove");
    let worker = net
        .wait("the worker", secs(30), async |n| {
            attached(n, "prover").await
        })
        .await
        .unwrap();
    assert_eq!(worker["class"], "prove");
    let steps = worker["declared"]["steps"].as_array().unwrap();
    assert!(steps.contains(&"window_post".into()), "{worker}");

    ask(&net, "sectors pledge --really-do-it").await.unwrap();
    let first = net
        .wait("a deadline proven elsewhere", secs(300), async |n| {
            let d = deadline(n).await?;
            (d["last"]["outcome"]["proved"].is_object()).then_some(d)
        })
        .await
        .unwrap();
    assert!(
        prover.log().contains("step=\"window_post\""),
        "{}",
        prover.log()
    );
    assert!(net.has_logged("a proof came from another host"));

    // It stops before the next proof, gets it, and dies over it.
    let index = first["index"].as_u64().unwrap();
    net.wait("two deadlines before it", secs(120), async |n| {
        let now = ask(n, "proving info").await?["deadline"].as_u64()?;
        ((now + 2) % DEADLINES == index).then_some(())
    })
    .await
    .unwrap();
    let open = deadline(&net).await.unwrap()["last"]["open"].as_i64();
    prover.signal("-STOP");
    net.wait("it to have the proof", secs(60), async |n| {
        let jobs = ask(n, "sealing jobs").await?;
        let held = |j: &Value| j["step"] == "window_post" && j["worker"] == worker["id"];
        jobs.as_array()?.iter().any(held).then_some(())
    })
    .await
    .unwrap();
    prover.signal("-KILL");
    let next = net
        .wait("the deadline to be over", secs(120), async |n| {
            let d = deadline(n).await?;
            (d["last"]["open"].as_i64() > open).then_some(d)
        })
        .await
        .unwrap();
    assert!(next["last"]["outcome"]["proved"].is_object(), "{next}");
    assert!(net.has_logged("making it on this one"));
    let info = ask(&net, "proving info").await.unwrap();
    assert_eq!(info["failed_deadlines"], 0, "{info}");
    assert_eq!(info["faulty"], 0, "{info}");
    drop(prover);
    net.stop().await.unwrap();
}
