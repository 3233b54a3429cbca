//! A hub that is paused, and goes on after another one took its place.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{ExitStatus, Output, Stdio};

use lotus_e2e::history::History;
use lotus_e2e::{Net, NetConfig, demo, secs};
use lotus_node_client::api::TipSetKey;
use lotus_types::Epoch;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

fn send(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// A hub on the repo, beside the supervisor's.
fn hub(net: &Net, cfg: &NetConfig, log: &Path) -> Child {
    Command::new(net.exe("lotus-miner"))
        .args(["run", "--repo"])
        .arg(net.root().join("miner"))
        .envs(&cfg.hub_env)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(log).unwrap())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn ends(hub: &mut Child) -> ExitStatus {
    let ended = tokio::time::timeout(secs(60), hub.wait()).await;
    ended.unwrap().unwrap()
}

/// What `lotus-miner` says of the hub of the repo, in JSON.
async fn ask(net: &Net, words: &[&str]) -> Option<serde_json::Value> {
    let repo = net.root().join("miner").display().to_string();
    let words = [words, &["--json", "--repo", &repo]].concat();
    let out = net.run("lotus-miner", &words).await.ok()?;
    serde_json::from_str(&out).ok()
}

async fn generation(net: &Net) -> Option<u64> {
    ask(net, &["info"]).await?["generation"].as_u64()
}

/// Waits until so many sectors are proven, and none is anything else.
async fn proven(net: &Net, sectors: usize) {
    net.wait("the sectors to be proven", secs(180), async |net| {
        let all = ask(net, &["sectors", "list"]).await?;
        let all = all.as_array()?;
        let done = all.iter().all(|s| s["state"] == "Proving");
        (done && all.len() >= sectors).then_some(())
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_was_replaced_while_it_was_paused_does_no_harm() {
    // Nobody but this test ends the paused one, and spokes find the new one's socket.
    let mut cfg = NetConfig {
        supervisor: "[limits]\nwatchdog_secs = 0\n".into(),
        ..NetConfig::default()
    };
    cfg.sandbox.insert("enabled".into(), false.into());
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let (miner, node) = (net.root().join("miner"), net.node().unwrap());
    demo::propose(&net, &demo::pack(&net, "one").unwrap())
        .await
        .unwrap();
    proven(&net, 1).await;

    // As long as it lives, paused or not, its repo is its own.
    let old = net.process("hub").await.unwrap().pid.unwrap();
    let first = generation(&net).await.unwrap();
    send(old, Signal::SIGSTOP);
    let refused = net.root().join("refused.log");
    let ended = ends(&mut hub(&net, &cfg, &refused)).await;
    assert_eq!(ended.code(), Some(78));
    let said = fs::read_to_string(&refused).unwrap();
    assert!(
        said.contains(&format!("another hub (pid {old}) runs on")),
        "{said}"
    );
    send(old, Signal::SIGCONT);
    net.wait("the hub to go on", secs(60), async |net| {
        generation(net).await
    })
    .await
    .unwrap();
    assert_eq!(generation(&net).await, Some(first));

    // In the midst of a deal its repo is taken away, as when a disk is moved to another host, and
    // another hub goes on with it.
    let two = demo::propose(&net, &demo::pack(&net, "two").unwrap())
        .await
        .unwrap();
    let before = node.chain_head().await.unwrap().height;
    send(old, Signal::SIGSTOP);
    let (copy, aside) = (net.root().join("copy"), net.root().join("aside"));
    let copied: Output = Command::new("cp")
        .arg("-a")
        .args([&miner, &copy])
        .output()
        .await
        .unwrap();
    assert!(copied.status.success(), "{copied:?}");
    fs::remove_dir_all(copy.join("run")).unwrap();
    fs::rename(&miner, &aside).unwrap();
    fs::rename(&copy, &miner).unwrap();
    let log = net.root().join("new.log");
    let mut new = hub(&net, &cfg, &log);
    let now = net.wait("the new hub", secs(60), async |net| generation(net).await);
    assert_eq!(now.await.unwrap(), first + 1);

    // The old one wakes up, with proofs to make, blocks to mine and messages to send, and ends
    // before it has done any of it.
    send(old, Signal::SIGCONT);
    let ended = net.wait("the old hub to end", secs(30), async |net| {
        let hub = net.process("hub").await.ok()?;
        hub.pid.is_none().then_some(hub)
    });
    let ended = ended.await.unwrap();
    assert!(ended.reason.contains("was moved or replaced"), "{ended:?}");
    assert_eq!(ended.restarts, 0, "{ended:?}");

    // Spokes are with the new one, and what was under way goes on, once.
    net.wait("the second deal", secs(180), async |net| {
        let now = demo::status(net, &two).await?;
        (now["deal"]["sealing_state"] == "Proving").then_some(())
    })
    .await
    .unwrap_or_else(|e| panic!("{e}\n{}", fs::read_to_string(&log).unwrap()));
    proven(&net, 2).await;
    let mut history = History::default();
    history.read(&node).await.unwrap();
    let mut sectors: BTreeMap<(u64, u64), u32> = BTreeMap::new();
    for landed in history.messages() {
        let failed = landed.receipt.as_ref().is_some_and(|r| r.exit_code != 0);
        assert!(!failed, "{landed:?}");
        for sector in landed.sectors().unwrap() {
            *sectors.entry((landed.message.method, sector)).or_default() += 1;
        }
    }
    assert!(
        sectors.len() >= 4,
        "two sectors, each in two messages: {sectors:?}"
    );
    assert!(sectors.values().all(|n| *n == 1), "{sectors:?}");
    let mut tipset = node.chain_head().await.unwrap();
    while tipset.height > before {
        let miners: Vec<_> = tipset.blocks.iter().map(|b| b.miner).collect();
        assert_eq!(miners.len(), 1, "one miner, one block: {tipset:?}");
        let parent = TipSetKey(tipset.blocks[0].parents.clone());
        tipset = node.chain_get_tipset(&parent).await.unwrap();
    }
    assert!(tipset.height > Epoch(0));

    // The supervisor's next hub is the third of the repo.
    send(new.id().unwrap(), Signal::SIGTERM);
    assert!(ends(&mut new).await.success());
    let root = net.root().display().to_string();
    net.run("lotus-supervisor", &["restart", "hub", "--repo", &root])
        .await
        .unwrap();
    net.ready(secs(120)).await.unwrap();
    assert_eq!(generation(&net).await, Some(first + 2));
    net.stop().await.unwrap();
}
