//! Any process may die at any moment: the demo still ends well, the piece is in one sector, and
//! no message has its effect twice. `LOTUS_SEED` repeats a run's moments.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lotus_e2e::history::History;
use lotus_e2e::{Failed, Net, NetConfig, demo, secs};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// Who is killed. Workers go by their class.
const VICTIMS: [&str; 6] = ["hub", "deals", "retrieval", "indexing", "seal", "prove"];

/// Two demos: in the first everything dies in the seconds of the upload and the hand-over, in the
/// second twice while the sector is sealed and proven.
const ROUNDS: [(std::ops::Range<u64>, usize); 2] = [(0..6_000, 1), (6_000..50_000, 2)];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_ends_well_whatever_is_killed() {
    let seed = std::env::var("LOTUS_SEED")
        .map_or_else(|_| rand::random(), |s| s.parse().expect("a number"));
    eprintln!("LOTUS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for (moments, times) in ROUNDS {
        let mut kills: Vec<(Duration, &str, usize)> = VICTIMS
            .iter()
            .flat_map(|victim| std::iter::repeat_n(*victim, times))
            .map(|victim| {
                let at = Duration::from_millis(random.random_range(moments.clone()));
                (at, victim, random.random_range(0..12))
            })
            .collect();
        kills.sort();
        round(&kills).await;
    }
}

async fn round(kills: &[(Duration, &str, usize)]) {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let data = net.root().join("data");
    std::fs::create_dir(&data).unwrap();
    let mut bytes = vec![0; 3 << 20];
    StdRng::seed_from_u64(1).fill(&mut bytes[..]);
    std::fs::write(data.join("file"), bytes).unwrap();
    let car = net.root().join("data.car");
    lotus_car::pack_dir(&data, &car).unwrap();

    let cars = [car];
    let mut show = demo::Lines::default();
    let demo = demo::run(&net, &cars, &mut show);
    let (report, ()) = tokio::try_join!(demo, strike(&net, kills)).unwrap();
    assert!(report.ok, "{report:?}\n{}", net.logs());
    net.ready(secs(60)).await.unwrap();

    one_sector(&net, &report).await;
    one_effect(&net).await;
    quiet_logs(&net);
    net.stop().await.unwrap();
}

/// Kills each at its moment; who does not run just then, as soon as it does.
async fn strike(net: &Net, kills: &[(Duration, &str, usize)]) -> Result<(), Failed> {
    let start = Instant::now();
    for (at, victim, n) in kills {
        tokio::time::sleep_until((start + *at).into()).await;
        let pid = net
            .wait(
                &format!("{victim} to run"),
                secs(60),
                async |net| match *victim {
                    "seal" | "prove" => net.kill9_worker(victim, *n).ok(),
                    process => net.kill9(process).await.ok(),
                },
            )
            .await?;
        let at = start.elapsed().as_secs_f64();
        eprintln!("[{at:6.2} s] kill -9 {victim} ({pid})");
    }
    Ok(())
}

/// The piece is in exactly one sector, at one offset, which is the one the client was told.
async fn one_sector(net: &Net, report: &demo::Report) {
    let repo = net.root().join("miner").display().to_string();
    let list = net
        .run(
            "lotus-miner",
            &["sectors", "list", "--json", "--repo", &repo],
        )
        .await
        .unwrap();
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let mut places = Vec::new();
    for sector in list.as_array().unwrap() {
        for piece in sector["pieces"].as_array().unwrap() {
            assert_eq!(
                piece["piece_cid"],
                report.first.piece_cid.as_str(),
                "{list}"
            );
            places.push((sector["number"].as_u64().unwrap(), piece["offset"].clone()));
        }
    }
    assert_eq!(places.len(), 1, "{list}");
    assert_eq!(places[0].0, report.first.sector, "{list}");
}

/// What the chain holds: each nonce once and none left out, and each sector pre-committed and
/// activated once.
async fn one_effect(net: &Net) {
    let mut history = History::default();
    history.read(&net.node().unwrap()).await.unwrap();
    let landed = history.messages();
    let mut nonces: BTreeMap<_, BTreeSet<u64>> = BTreeMap::new();
    let mut sectors: BTreeMap<(u64, u64), usize> = BTreeMap::new();
    for one in &landed {
        let m = &one.message;
        assert!(
            nonces.entry(m.from).or_default().insert(m.nonce),
            "nonce {} of {} twice: {landed:?}",
            m.nonce,
            m.from
        );
        for sector in one.sectors().unwrap() {
            *sectors.entry((m.method, sector)).or_default() += 1;
        }
        let exit = one.receipt.as_ref().map_or(0, |r| r.exit_code);
        let name = lotus_actors::miner::method_name(m.method);
        eprintln!("{} nonce {} {name:?} exit {exit}", one.height, m.nonce);
        assert_eq!(exit, 0, "{one:?}\n{}", net.logs());
    }
    for (from, nonces) in &nonces {
        let last = nonces.last().copied().unwrap();
        let first = nonces.first().copied().unwrap();
        assert_eq!(nonces.len() as u64, last - first + 1, "{from}: {nonces:?}");
    }
    assert!(sectors.values().all(|n| *n == 1), "{sectors:?}");
    // Pre-committed and activated.
    assert_eq!(sectors.len(), 2, "{sectors:?}");
}

/// No process panicked or found something wrong in itself.
fn quiet_logs(net: &Net) {
    for file in net.log_files() {
        let text = std::fs::read(&file).unwrap();
        for line in String::from_utf8_lossy(&text).lines() {
            let bad = line.contains("panicked at") || line.contains(" ERROR ");
            assert!(!bad, "{}: {line}", file.display());
        }
    }
}
