//! Keys that the node does not have: the hub has everything signed by a remote wallet, which dies
//! and comes back.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lotus_actors::miner::PRE_COMMIT_SECTOR_BATCH2;
use lotus_e2e::history::History;
use lotus_e2e::sectors::{HEAD, MINER};
use lotus_e2e::{Net, NetConfig, secs};
use lotus_node_client::json::{address_text, parse_address};
use serde_json::Value;

/// Asks the hub.
async fn ask(net: &Net, args: &str) -> Option<Value> {
    let repo = net.root().join("miner").display().to_string();
    let mut all: Vec<&str> = args.split_whitespace().collect();
    all.extend(["--json", "--repo", &repo]);
    serde_json::from_str(&net.run("lotus-miner", &all).await.ok()?).ok()
}

/// `lotus-devnet wallet` on the keys of a folder. Returns the last word.
async fn keys(net: &Net, repo: &Path, args: &[&str]) -> String {
    let repo = repo.display().to_string();
    let args = [&["--repo", &repo, "wallet"], args].concat();
    let out = net.run("lotus-devnet", &args).await.unwrap();
    out.split_whitespace().next_back().unwrap().to_owned()
}

/// `lotus-devnet remote-wallet` with its log; killed when a test fails.
struct Wallet {
    child: Child,
    dir: PathBuf,
    log: PathBuf,
    port: u16,
}

impl Wallet {
    /// On a port that stays the same when it is started again.
    async fn start(net: &Net, port: u16) -> Self {
        let home = net.root().join("signer");
        let log = net.root().join("logs/lotus-devnet-wallet.log");
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap();
        let child = Command::new(net.exe("lotus-devnet"))
            .arg("--repo")
            .arg(&home)
            .args(["remote-wallet", "--listen"])
            .arg(format!("127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        net.wait("the wallet", secs(30), async |_| {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        })
        .await
        .unwrap();
        let dir = home.join("wallet");
        Self {
            child,
            dir,
            log,
            port,
        }
    }

    fn kill9(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The lines about signatures.
    fn signed(&self) -> Vec<String> {
        let log = std::fs::read_to_string(&self.log).unwrap();
        let lines = log.lines().filter(|l| l.contains(" signed "));
        lines.map(str::to_owned).collect()
    }
}

impl Drop for Wallet {
    fn drop(&mut self) {
        // It has ended already, if all went well.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_are_signed_by_a_wallet_that_is_not_the_nodes() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = port.local_addr().unwrap().port();
    drop(port);
    let mut cfg = NetConfig {
        services: Vec::new(),
        devnet_args: "--listen 127.0.0.1:0 --sector-size 2KiB --block-time-ms 500 --deadlines 8 \
                      --deadline-epochs 12 --winning-lookback 10 --seed-delay 4"
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
        ..NetConfig::default()
    };
    let mut net = Net::start(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();

    // The wallet has the key of owner and worker, and one that nobody else has.
    let mut wallet = Wallet::start(&net, at).await;
    let (node, devnet) = (net.node().unwrap(), net.root().join("devnet"));
    let worker = address_text(&node.wallet_default_address().await.unwrap());
    let key = keys(&net, &devnet, &["export", &worker]).await;
    assert_eq!(keys(&net, &wallet.dir, &["import", &key]).await, worker);
    let text = keys(&net, &wallet.dir, &["new", "secp256k1"]).await;
    let control = parse_address(&text).unwrap();
    keys(&net, &devnet, &["fund", &text, "100"]).await;
    net.wait("the new account", secs(60), async |_| {
        node.state_lookup_id(control, HEAD).await.ok()
    })
    .await
    .unwrap();

    let token = std::fs::read_to_string(wallet.dir.join("token")).unwrap();
    for (name, value) in [
        (
            "NODE__WALLET",
            format!("{token}:/ip4/127.0.0.1/tcp/{at}/http"),
        ),
        (
            "MESSAGES__ADDRESSES__PRE_COMMIT_CONTROL",
            format!("[\"{text}\"]"),
        ),
    ] {
        cfg.env.insert(format!("LOTUS_MINER__{name}"), value);
    }
    net.again(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let set = format!("actor control set {text} --really-do-it");
    ask(&net, &set).await.unwrap();
    let list = ask(&net, "actor control list").await.unwrap();
    let all = list.as_array().unwrap();
    assert!(all.iter().all(|a| a["in_wallet"] == true), "{list}");

    // It dies under a sector, and comes back.
    ask(&net, "sectors pledge --really-do-it").await.unwrap();
    wallet.kill9();
    let silent = format!("remote wallet http://127.0.0.1:{at}/rpc/v0: ");
    net.wait("the hub to miss it", secs(120), async |n| {
        n.has_logged(&silent).then_some(())
    })
    .await
    .unwrap();
    wallet = Wallet::start(&net, wallet.port).await;
    net.wait("the sector to be proven", secs(300), async |n| {
        let all = ask(n, "sectors list").await?;
        let state = all.as_array()?.first()?["state"].as_str()?.to_owned();
        ["Proving", "Available"]
            .contains(&state.as_str())
            .then_some(())
    })
    .await
    .unwrap();

    // Each message was signed there, and those of the new key nowhere else.
    let node = net.node().unwrap();
    let mut history = History::default();
    history.read(&node).await.unwrap();
    let landed = history.messages();
    let signed = wallet.signed();
    let of_hub = landed.iter().filter(|m| m.message.to == MINER.address());
    let mut pre_commits = 0;
    for one in of_hub {
        let m = &one.message;
        let from = node.state_account_key(m.from, HEAD).await.unwrap();
        let (from, cid) = (address_text(&from), m.cid().to_string());
        let line = |l: &&String| l.contains(&cid) && l.contains(&from);
        let line = signed.iter().find(line);
        assert!(line.unwrap().contains("type=\"message\""), "{one:?}");
        let exit = one.receipt.as_ref().map_or(0, |r| r.exit_code);
        assert_eq!(exit, 0, "{one:?}\n{}", net.logs());
        if m.method == PRE_COMMIT_SECTOR_BATCH2 {
            assert_eq!(from, text);
            pre_commits += 1;
        }
    }
    assert_eq!(pre_commits, 1, "{landed:?}");
    assert!(!node.wallet_has(control).await.unwrap());

    // So are the elections, once the sector has power.
    net.wait("an election", secs(180), async |_| {
        let election = |l: &String| l.contains("type=\"unknown\"") && l.contains(&worker);
        wallet.signed().iter().any(election).then_some(())
    })
    .await
    .unwrap();

    let repo = net.root().join("miner").display().to_string();
    let words = ["config", "check", "--repo", &repo];
    let shown = net.run("lotus-miner", &words).await.unwrap();
    assert!(shown.contains("<token>:/ip4"), "{shown}");
    assert!(!shown.contains(token.as_str()), "{shown}");
    assert!(!net.has_logged(&token));
    net.stop().await.unwrap();
}
