//! A piece whose unsealed copy is gone comes back when a client wants it.

use std::fs;
use std::path::{Path, PathBuf};

use lotus_car::pack_dir;
use lotus_e2e::{At, Far, Net, NetConfig, demo, secs};

/// Files below `dir` with exactly these bytes.
fn copies(dir: &Path, bytes: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        // What goes meanwhile is no copy.
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => todo.push(path),
                Ok(kind) if kind.is_file() && fs::read(&path).is_ok_and(|b| b == bytes) => {
                    found.push(path);
                }
                _ => {}
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_piece_without_an_unsealed_copy_is_unsealed_for_a_client() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let data = net.root().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), vec![5; 900_000]).unwrap();
    let car = net.root().join("data.car");
    let root = pack_dir(&data, &car).unwrap();
    let deal = demo::propose(&net, &car).await.unwrap();
    let repo = net.root().join("miner").display().to_string();
    net.wait("a proven sector", secs(300), async |n| {
        let words = ["sectors", "list", "--json", "--repo", &repo];
        let all = n.run("lotus-miner", &words).await.ok()?;
        let all: serde_json::Value = serde_json::from_str(&all).ok()?;
        (all[0]["state"] == "Proving").then_some(())
    })
    .await
    .unwrap();

    let bytes = fs::read(&car).unwrap();
    let http = lotus_runtime::http_client().build().unwrap();
    // A replica on another host has no descriptor: bytes come over the hub's port.
    let (far, _) = Far::join(&net, "retrieval", "far", At::Here).await.unwrap();
    let far = Far::run(&net, "retrieval", far, At::Here).await.unwrap();
    let (near, replica) = (net.spoke_url("retrieval").unwrap(), far.url().unwrap());
    let part = http.get(format!("{replica}/piece/{}", deal.piece_cid));
    let part = part.header("range", "bytes=7-499999");
    let part = part.timeout(secs(20)).send().await.unwrap();
    assert_eq!(part.status(), 206);
    assert!(part.bytes().await.unwrap() == bytes[7..500_000]);
    let dag = async |from: &str| {
        let dag = http.get(format!("{from}/ipfs/{root}?format=car&dag-scope=all"));
        let dag = dag.timeout(secs(20)).send().await.unwrap();
        assert_eq!(dag.status(), 200);
        dag.bytes().await.unwrap()
    };
    let whole = dag(&replica).await;
    assert!(whole.len() > 900_000 && whole == dag(&near).await);
    let lost = far.log();
    assert!(
        !lost.contains(" WARN ") && !lost.contains(" ERROR "),
        "{lost}"
    );
    far.kill().await.unwrap();

    let raw = copies(&net.root().join("miner"), &bytes);
    assert_eq!(raw.len(), 1, "the hub's raw copy: {raw:?}");
    fs::remove_file(&raw[0]).unwrap();
    // Whoever has a descriptor reads on; a spoke that starts has none.
    let old = net.kill9("retrieval").await.unwrap();
    net.wait("a new retrieval", secs(30), async |n| {
        let p = n.process("retrieval").await.ok()?;
        (p.ready && p.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();

    let url = format!(
        "{}/piece/{}",
        net.spoke_url("retrieval").unwrap(),
        deal.piece_cid
    );
    let get = async || http.get(&url).timeout(secs(20)).send().await.unwrap();
    // Many at once are one unsealing, and each is told when to come back.
    for refused in futures::future::join_all((0..8).map(|_| get())).await {
        assert_eq!(refused.status(), 503);
        let after = refused.headers()["retry-after"].to_str().unwrap();
        assert!(after.parse::<u64>().unwrap() > 0, "{after}");
        let why = refused.text().await.unwrap();
        assert!(why.contains("is being unsealed"), "{why}");
    }
    let back = net
        .wait("the piece", secs(180), async |_| {
            let answer = get().await;
            answer.status().is_success().then_some(answer)
        })
        .await
        .unwrap();
    assert_eq!(back.bytes().await.unwrap(), bytes);
    net.stop().await.unwrap();
}
