//! The supervisor itself dies, and what it runs does not notice.

use std::collections::BTreeMap;
use std::time::Duration;

use lotus_e2e::{Net, NetConfig, demo, secs};

const KILLS: usize = 50;

/// Each process, and the one of it that may live: binary and first arguments.
const ALL: [(&str, &str, &[&str]); 5] = [
    ("devnet", "lotus-devnet", &["run"]),
    ("hub", "lotus-miner", &["run"]),
    ("deals", "lotus-markets", &["run", "--services=deals"]),
    (
        "retrieval",
        "lotus-markets",
        &["run", "--services=retrieval"],
    ),
    ("indexing", "lotus-markets", &["run", "--services=indexing"]),
];

fn living(net: &Net) -> BTreeMap<&'static str, Vec<u32>> {
    ALL.iter()
        .map(|(name, exe, args)| (*name, net.copies(exe, args)))
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_supervisor_leaves_one_of_each_and_the_next_one_finds_them() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let before = living(&net);
    assert!(before.values().all(|pids| pids.len() == 1), "{before:?}");
    let car = net.root().join("a.car");
    let data = net.root().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("a"), vec![7; 300_000]).unwrap();
    lotus_car::pack_dir(&data, &car).unwrap();

    let mut lines = demo::Lines::default();
    let cars = [car];
    let job = demo::run(&net, &cars, &mut lines);
    let kills = async {
        for n in 1..=KILLS {
            // The demo takes a minute: deaths at all its stages, some close to each other.
            let pause = if n % 5 == 0 { 100 } else { 1100 };
            tokio::time::sleep(Duration::from_millis(pause)).await;
            net.replace_supervisor().unwrap();
            assert_eq!(living(&net), before, "after kill {n}");
        }
    };
    let (report, ()) = tokio::join!(job, kills);
    let report = report.unwrap();
    assert!(report.ok, "{report:?}\n{}", net.logs());

    // The last supervisor knows all of them, and nobody was restarted.
    net.ready(secs(30)).await.unwrap();
    assert_eq!(living(&net), before);
    for p in net.status().await.unwrap() {
        assert_eq!(p.restarts, 0, "{p:?}");
        if let Some(pids) = before.get(p.name.as_str()) {
            assert_eq!(p.pid, pids.first().copied(), "{p:?}");
        }
    }

    // What it found alive it can also restart and stop.
    let old = net.kill9("retrieval").await.unwrap();
    net.wait("a new retrieval", secs(30), async |n| {
        let p = n.process("retrieval").await.ok()?;
        (p.ready && p.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();
    net.stop().await.unwrap();
}
