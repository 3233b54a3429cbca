//! Programs of others against a storage provider of ours. They need tools and packages that are
//! not part of this workspace: `cargo xtask peers` runs these tests, or says what is missing.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use lotus_e2e::{Net, NetConfig, peers, secs};
use serde_json::{Value, json};
use tokio::process::Command;

/// One of the hub's commands, as JSON.
async fn hub(net: &Net, args: &[&str]) -> Value {
    let repo = net.root().join("miner").display().to_string();
    let args = [args, &["--json", "--repo", &repo]].concat();
    let out = net.run("lotus-miner", &args).await.unwrap();
    serde_json::from_str(&out).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs node and npm: cargo xtask peers"]
async fn lotus_client() {
    let dir = peers::npm("lotus-client").await;
    let Some(dir) = peers::installed("lotus-client", dir) else {
        return;
    };
    let config = NetConfig {
        services: vec!["deals".into()],
        ..NetConfig::default()
    };
    let net = Net::start(&config).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let pledge = hub(&net, &["sectors", "pledge", "--really-do-it"]).await;
    let pledged = pledge["sectors"][0].clone();
    let number = pledged.to_string();
    let status = async |n: &Net| hub(n, &["sectors", "status", &number]).await;
    // Committed capacity rests where deals can take it.
    net.wait("a proven sector", secs(300), async |n| {
        (status(n).await["state"] == "Available").then_some(())
    })
    .await
    .unwrap();

    let info = hub(&net, &["auth", "api-info", "--perm", "admin"]).await;
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let api = format!("{}:{}", text(&info["token"]), text(&info["address"]));
    let mut node = Command::new("node");
    node.arg("read.mjs")
        .env("MINER_API_INFO", api)
        .current_dir(&dir);
    let read = peers::run(&mut node, peers::RUN).await.unwrap();
    let read: Value = serde_json::from_str(&read).unwrap();

    let chain = hub(&net, &["sectors", "status", &number, "--on-chain-info"]).await;
    for way in ["http", "ws"] {
        let found = &read[way];
        assert_eq!(found["actor"], "t01000", "{way}");
        assert_eq!(found["sectorSize"], 8 << 20);
        assert_eq!(found["version"]["APIVersion"], 0x10500);
        assert_eq!(
            found["permissions"],
            json!(["read", "write", "sign", "admin"])
        );
        assert!(found["base"].as_i64().unwrap() > 0);
        assert_eq!(found["sectors"], json!([pledged]));
        assert_eq!(found["summary"], json!({"Available": 1}));
        // The same sector by our own command line.
        let sector = &found["status"][0];
        assert_eq!(sector["State"], "Available");
        assert_eq!(sector["CommR"]["/"], chain["comm_r"]);
        assert_eq!(sector["CommR"]["/"], chain["on_chain"]["comm_r"]);
        assert_eq!(sector["CommitMsg"]["/"], chain["commit_cid"]);
        assert_eq!(sector["InitialPledge"], chain["on_chain"]["initial_pledge"]);
        assert_eq!(sector["Expiration"], chain["on_chain"]["expiration"]);
        assert_ne!(sector["InitialPledge"], "0");
        let storage = &found["storage"];
        let (id, path) = storage["local"].as_object().unwrap().iter().next().unwrap();
        assert_eq!(
            Path::new(path.as_str().unwrap()),
            net.root().join("miner/storage")
        );
        let decls = json!([{"Miner": 1000, "Number": pledged, "SectorFileType": 6}]);
        assert_eq!(storage["list"][id], decls);
        assert_eq!(storage["info"]["ID"], json!(id));
        assert!(storage["stat"]["Available"].as_u64().unwrap() > 0);
        let workers = found["workers"].as_object().unwrap();
        assert_eq!(workers.len(), 3, "one that seals, two that prove");
        let refused = text(&found["refused"]);
        assert!(refused.to_lowercase().contains("not found"), "{refused}");
    }
    assert_eq!(read["http"]["session"], read["ws"]["session"]);

    // What the operator sees of the same hub.
    let workers = hub(&net, &["sealing", "workers"]).await;
    assert_eq!(workers.as_array().unwrap().len(), 3);
    let all = hub(&net, &["info", "all"]).await;
    for part in [
        "info",
        "sectors list",
        "sealing jobs",
        "proving deadlines --all",
    ] {
        assert!(!all[part]["output"].is_null(), "{part}: {}", all[part]);
    }
    // And a backup of it while it runs.
    let file = net.root().join("hub.backup").display().to_string();
    let made = hub(&net, &["backup", &file]).await;
    let verified = hub(&net, &["backup", &file, "--verify"]).await;
    assert_eq!(made["manifest"], verified["manifest"]);
    assert!(made["manifest"]["entries"].as_u64().unwrap() > 10, "{made}");
    net.stop().await.unwrap();
}
