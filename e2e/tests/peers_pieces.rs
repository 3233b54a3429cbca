//! Pieces by programs of others. `cargo xtask peers` runs this.

use std::fmt::Write as _;

use lotus_e2e::{Net, NetConfig, peers, secs};
use rand::rngs::StdRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use serde_json::Value;
use tokio::process::Command;

/// The client library of Filecoin Onchain Cloud uploads a piece, it is stored by a deal, and
/// fetched back.
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

/// Pieces that are compared with stream-commp.
const PIECES: usize = 1000;
/// The least that it takes.
const SMALLEST: usize = 65;
/// The most that is compared.
const LARGEST: usize = 4 << 20;

/// The library of stream-commp gives pieces of all sizes the commitments that they have here.
#[tokio::test]
#[ignore = "needs go: cargo xtask peers"]
async fn stream_commp() {
    let peer = peers::go_here("stream-commp").await;
    let Some(peer) = peers::installed("stream-commp", peer) else {
        return;
    };
    let seed = std::env::var("LOTUS_SEED")
        .map_or_else(|_| rand::random(), |text| text.parse().expect("a number"));
    eprintln!("LOTUS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut data = vec![0; 2 * LARGEST];
    random.fill_bytes(&mut data);

    // Around each size that fills a piece, and as many of each order of magnitude.
    let full = (0..).map(|n| 127 << n).take_while(|n| *n < LARGEST);
    let mut sizes: Vec<usize> = full.flat_map(|n| [n - 1, n, n + 1]).collect();
    while sizes.len() < PIECES {
        let below = 1 << random.random_range(7..=LARGEST.ilog2());
        sizes.push(random.random_range(SMALLEST..=below));
    }
    let parts: Vec<_> = sizes
        .iter()
        .map(|size| {
            let from = random.random_range(0..=data.len() - size);
            from..from + size
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let (file, list) = (dir.path().join("data"), dir.path().join("parts"));
    std::fs::write(&file, &data).unwrap();
    let lines: Vec<String> = parts
        .iter()
        .map(|p| format!("{} {}\n", p.start, p.len()))
        .collect();
    std::fs::write(&list, lines.concat()).unwrap();
    let mut run = Command::new(&peer);
    let printed = peers::run(run.args([&file, &list]), peers::RUN)
        .await
        .unwrap();
    assert_eq!(printed.lines().count(), PIECES);
    for (part, line) in parts.iter().zip(printed.lines()) {
        let piece = lotus_proofs::commp(&data[part.clone()]).unwrap();
        let mut ours = String::new();
        for byte in piece.cid.commitment().0 {
            write!(ours, "{byte:02x}").unwrap();
        }
        let ours = format!("{ours} {}", piece.size.get());
        assert_eq!(ours, line, "{} bytes", part.len());
    }
}
