//! Pieces by the client library of Filecoin Onchain Cloud: uploaded here, then stored by a deal,
//! and fetched back. `cargo xtask peers` runs this.

use lotus_e2e::{Net, NetConfig, peers, secs};
use serde_json::Value;
use tokio::process::Command;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs node and npm: cargo xtask peers"]
async fn synapse() {
    let Some(dir) = peers::installed("synapse", peers::npm("synapse").await) else {
        return;
    };
    let config = NetConfig {
        services: vec!["deals".into(), "retrieval".into()],
        ..NetConfig::default()
    };
    let net = Net::start(&config).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let url = net.spoke_url("deals").unwrap();
    let file = net.root().join("piece").display().to_string();
    let mut script = Command::new("node");
    script.arg("pieces.mjs").current_dir(&dir);
    script.env("SERVICE_URL", &url).env("PIECE_FILE", &file);
    let done = peers::run(&mut script, peers::RUN).await.unwrap();
    let done: Value = serde_json::from_str(&done).unwrap();
    assert_eq!(done["found"], done["streamed"]);
    assert_eq!(done["size"], 1_000_000);
    let words = |name: &str| done[name].as_str().unwrap().to_lowercase();
    // The library keeps our words to itself here.
    assert!(words("notFound").starts_with("failed"), "{done}");
    assert!(words("refused").contains("the bytes are piece"), "{done}");

    // Our own name for the same bytes.
    let named = ["client", "piece-cid", &file, "--json"];
    let named: Value =
        serde_json::from_str(&net.run("lotus-markets", &named).await.unwrap()).unwrap();
    assert_eq!(named["piece_cid_v2"], done["streamed"]);

    // A deal for it has its bytes already: nothing is uploaded.
    let key = net.root().join("key").display().to_string();
    let words = ["client", "deal", "--provider-url", &url, "--key", &key];
    let deal = [&words[..], &["--car", &file, "--format", "raw", "--json"]].concat();
    let deal: Value =
        serde_json::from_str(&net.run("lotus-markets", &deal).await.unwrap()).unwrap();
    let id = deal["deal_id"].as_str().unwrap();
    let repo = net.root().join("markets").display().to_string();
    net.wait("the piece in a sector", secs(120), async |n| {
        let show = ["storage-deals", "status", id, "--json", "--repo", &repo];
        let now = n.run("lotus-markets", &show).await.ok()?;
        let now: Value = serde_json::from_str(&now).ok()?;
        now["sector"].is_u64().then_some(())
    })
    .await
    .unwrap();
    let retrieval = net.spoke_url("retrieval").unwrap();
    let http = lotus_runtime::http_client().build().unwrap();
    let piece = format!("{retrieval}/piece/{}", named["piece_cid"].as_str().unwrap());
    let back = net
        .wait("the piece to be served", secs(60), async |_| {
            let answer = http.get(&piece).send().await.ok()?;
            answer.error_for_status().ok()?.bytes().await.ok()
        })
        .await
        .unwrap();
    assert!(back == std::fs::read(&file).unwrap(), "the same bytes");
    net.stop().await.unwrap();
}
