//! The supervisor keeps things running, and a host of spokes runs exactly what it was told to.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Stdio};

use lotus_e2e::{Net, NetConfig, secs};

/// Asks the hub on its command line.
async fn hub(net: &Net, words: &[&str]) -> serde_json::Value {
    let repo = net.root().join("miner").display().to_string();
    let args = [words, &["--json", "--repo", &repo]].concat();
    let out = net.run("lotus-miner", &args).await.unwrap();
    serde_json::from_str(&out).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spokes_run_as_named_and_come_back_when_killed() {
    let mut cfg = NetConfig::default();
    // The steps take seconds here: each is dear.
    let key = "LOTUS_MINER__RESTART__SEAL_LOSS_MINS";
    cfg.hub_env.insert(key.into(), "0".into());
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();

    // The default set, in order, ready, with pids.
    let all = net.status().await.unwrap();
    let names: Vec<&str> = all.iter().map(|p| p.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "devnet",
            "hub-init",
            "hub",
            "deals-identity",
            "deals",
            "retrieval-identity",
            "retrieval",
            "indexing-identity",
            "indexing"
        ]
    );
    assert!(all.iter().all(|p| p.ready), "{all:?}");

    // `--services=indexing,retrieval` runs exactly those.
    let repo = net.root().join("two");
    let mut two = Command::new(net.exe("lotus-markets"))
        .args(["run", "--services=indexing,retrieval", "--repo"])
        .arg(&repo)
        .env(
            "LOTUS_MARKETS__HUB__ADDR",
            format!("unix:{}", net.root().join("miner/run/hub.sock").display()),
        )
        .env("LOTUS_MARKETS__RETRIEVAL__LISTEN", "127.0.0.1:0")
        .env("LOTUS_MARKETS__INDEXING__LISTEN", "127.0.0.1:0")
        .env("LOTUS_MARKETS__DEALS__LISTEN", "127.0.0.1:0")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let read = |name: &str| lotus_runtime::addr_file::read(&repo.join("run"), name).ok();
    let admin = net
        .wait("two spokes to bind", secs(30), async |_| {
            read("retrieval").and(read("indexing")).and(read("admin"))
        })
        .await
        .unwrap();
    assert_eq!(read("deals"), None);
    let http = lotus_runtime::http_client().build().unwrap();
    let ready: serde_json::Value = net
        .wait("two spokes to be ready", secs(30), async |_| {
            let answer = http
                .get(format!("http://{admin}/readyz"))
                .send()
                .await
                .ok()?;
            answer.error_for_status().ok()?.json().await.ok()
        })
        .await
        .unwrap();
    let parts = ready["components"].as_object().unwrap();
    assert!(parts.contains_key("retrieval") && parts.contains_key("indexing"));
    assert!(!parts.contains_key("deals"), "{ready}");
    two.kill().unwrap();
    two.wait().unwrap();

    // A spoke comes back; nobody else is touched.
    let before = net.status().await.unwrap();
    let old = net.kill9("retrieval").await.unwrap();
    net.wait("a new retrieval", secs(30), async |n| {
        let p = n.process("retrieval").await.ok()?;
        (p.ready && p.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();
    // The hub comes back, and the spokes that were healthy are still the same processes.
    let old = net.kill9("hub").await.unwrap();
    net.wait("a new hub", secs(60), async |n| {
        let p = n.process("hub").await.ok()?;
        (p.ready && p.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();
    let after = net.status().await.unwrap();
    for (b, a) in before.iter().zip(&after) {
        let killed = ["hub", "retrieval"].contains(&b.name.as_str());
        assert_eq!(b.pid == a.pid, !killed || b.pid.is_none(), "{b:?} {a:?}");
        assert_eq!(a.restarts, u32::from(killed), "{a:?}");
    }

    // A restart waits until no dear step is under way, and then happens.
    pledge(&net, 0).await;
    let root = net.root().display().to_string();
    let old = net.process("hub").await.unwrap().pid;
    let restart = ["restart", "hub", "--no-wait", "--repo", &root];
    net.run("lotus-supervisor", &restart).await.unwrap();
    waits(&net, "restart").await;
    net.wait("the restart", secs(180), async |n| {
        let p = n.process("hub").await.ok()?;
        (p.ready && p.pid != old).then_some(())
    })
    .await
    .unwrap();
    let all = hub(&net, &["sectors", "list"]).await;
    let state = all[0]["state"].as_str().unwrap();
    assert!(!["GetTicket", "PreCommit1"].contains(&state), "{all}");

    // A second supervisor is refused.
    let out = Command::new(net.exe("lotus-supervisor"))
        .args(["run", "--repo"])
        .arg(net.root())
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(78));

    // A stop of everything waits too, until somebody insists, and then says what that cost.
    pledge(&net, 1).await;
    let stop = ["stop", "--no-wait", "--repo", &root];
    net.run("lotus-supervisor", &stop).await.unwrap();
    waits(&net, "stop").await;
    let stop = ["stop", "--force", "--repo", &root];
    net.run("lotus-supervisor", &stop).await.unwrap();
    assert!(net.status().await.is_err(), "it has ended");
    let events = std::fs::read_to_string(net.root().join("logs/events.jsonl")).unwrap();
    let of_hub = |l: &&str| l.contains("\"process\":\"hub\"") && l.contains("\"forced\"");
    let forced: Vec<&str> = events.lines().filter(of_hub).collect();
    assert_eq!(forced.len(), 1, "{events}");
    assert!(forced[0].contains("pre_commit"), "{forced:?}");
}

/// Adds a sector without data, the `nth` of the hub, and waits until a dear step of it is under way.
async fn pledge(net: &Net, nth: usize) {
    hub(net, &["sectors", "pledge", "--really-do-it"]).await;
    net.wait("PreCommit1", secs(60), async |n| {
        let all = hub(n, &["sectors", "list"]).await;
        (all[nth]["state"] == "PreCommit1").then_some(())
    })
    .await
    .unwrap();
}

/// Waits until the supervisor says that it waits for the hub to do `what`; the hub goes on.
async fn waits(net: &Net, what: &str) {
    let old = net.process("hub").await.unwrap().pid;
    net.wait("the reason of the wait", secs(20), async |n| {
        let p = n.process("hub").await.ok()?;
        assert_eq!(p.pid, old, "{p:?}");
        let waits = p
            .reason
            .starts_with(&format!("waits to {what} it safely: "));
        (waits && p.reason.contains("pre_commit")).then_some(())
    })
    .await
    .unwrap();
}
