//! Deals under kills, and the operator's commands, with real processes.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use futures::{StreamExt as _, stream};
use lotus_e2e::{Net, NetConfig, secs};
use serde_json::Value;

/// One of the operator's commands, as JSON; `None` while the service does not answer.
async fn asked(net: &Net, words: &[&str]) -> Option<Value> {
    let repo = net.root().join("markets").display().to_string();
    let args = [&["storage-deals"], words, &["--json", "--repo", &repo]].concat();
    let out = net.run("lotus-markets", &args).await.ok()?;
    serde_json::from_str(&out).ok()
}

async fn list(net: &Net) -> Option<Value> {
    asked(net, &["list"]).await
}

async fn deals(net: &Net, words: &[&str]) -> Value {
    asked(net, words).await.unwrap()
}

/// Makes a deal for a file of its own, and gives its piece; while the service is down the same
/// deal is proposed again.
async fn deal(net: &Net, n: usize) -> String {
    let file = net.root().join(format!("file-{n}"));
    std::fs::write(&file, format!("the contents of file {n}").repeat(50)).unwrap();
    let (file, key) = (file.display().to_string(), net.root().join("key"));
    let key = key.display().to_string();
    let id = ulid::Ulid::generate().to_string();
    net.wait("a deal", secs(120), async |n| {
        let url = n.spoke_url("deals").ok()?;
        let words = [
            "client",
            "deal",
            "--provider-url",
            &url,
            "--key",
            &key,
            "--car",
            &file,
            "--format",
            "raw",
            "--deal-id",
            &id,
            "--json",
        ];
        let out = n.run("lotus-markets", &words).await.ok()?;
        let made: Value = serde_json::from_str(&out).ok()?;
        made["piece_cid"].as_str().map(str::to_owned)
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_deal_is_lost_or_doubled_by_kills_and_the_operator_sees_them_all() {
    let mut config = NetConfig {
        services: vec!["deals".into()],
        ..NetConfig::default()
    };
    // Sealing is of no matter here: the pieces wait in an open sector.
    let wait = "LOTUS_MINER__SEALING__WAIT_DEALS_SECS";
    config.hub_env.insert(wait.into(), "600".into());
    let net = Net::start(&config).await.unwrap();
    net.ready(secs(120)).await.unwrap();

    const COUNT: usize = 12;
    let all_made = stream::iter(0..COUNT)
        .map(|n| deal(&net, n))
        .buffer_unordered(3)
        .collect::<Vec<_>>();
    let kills = async {
        let root = net.root().display().to_string();
        let mut dead = None;
        // Once so many deals are made, while others are on their way.
        for made in [0, 2, 4, 6, 8] {
            net.wait("the deal service", secs(60), async |net| {
                let p = net.process("deals").await.ok()?;
                if p.state == "backoff" {
                    // It may have been started in between, which is an error of the command.
                    let start = ["start", "deals", "--repo", &root];
                    drop(net.run("lotus-supervisor", &start).await);
                }
                (p.ready && p.pid != dead).then_some(())
            })
            .await
            .unwrap();
            let wanted = format!("{made} deals");
            net.wait(&wanted, secs(60), async |n| {
                (list(n).await?.as_array()?.len() >= made).then_some(())
            })
            .await
            .unwrap();
            dead = Some(net.kill9("deals").await.unwrap());
        }
    };
    let (made, ()) = tokio::join!(all_made, kills);
    let found = net
        .wait("every piece in a sector", secs(120), async |n| {
            let found = list(n).await?;
            let all = found.as_array()?;
            all.iter().all(|d| d["sector"].is_u64()).then_some(found)
        })
        .await
        .unwrap();
    assert_eq!(found.as_array().unwrap().len(), COUNT, "{found}");
    let repo = net.root().join("miner").display().to_string();
    let words = ["sectors", "list", "--json", "--repo", &repo];
    let sectors: Value =
        serde_json::from_str(&net.run("lotus-miner", &words).await.unwrap()).unwrap();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for piece in sectors
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|s| s["pieces"].as_array().unwrap())
    {
        let cid = piece["piece_cid"].as_str().unwrap().to_owned();
        *places.entry(cid).or_default() += 1;
    }
    let wanted: BTreeMap<String, usize> = made.into_iter().map(|cid| (cid, 1)).collect();
    assert_eq!(places, wanted, "each piece once");

    let id = found[0]["id"].as_str().unwrap();
    let detail = deals(&net, &["status", id]).await;
    let steps = detail["history"].as_array().unwrap();
    assert_eq!(steps[0]["checkpoint"], "Accepted", "{detail}");
    assert!(
        steps.iter().any(|s| s["checkpoint"] == "AddedPiece"),
        "{detail}"
    );
    assert_eq!(
        deals(&net, &["list", "--waiting"]).await,
        serde_json::json!([])
    );
    assert_eq!(deals(&net, &["transfers"]).await, serde_json::json!([]));
    let repo = net.root().join("markets").display().to_string();
    for order in ["cancel", "retry"] {
        let words = ["storage-deals", order, id, "--repo", &repo];
        let refused = net.run("lotus-markets", &words).await;
        let why = refused.unwrap_err().to_string();
        assert!(why.contains("the deal is AddedPiece"), "{why}");
    }
    net.stop().await.unwrap();
}
