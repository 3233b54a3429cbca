//! Clients that download do not notice that retrieval is restarted: the supervisor owns the
//! socket, and open transfers drain.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use lotus_e2e::download::{Downloads, Kind, store};
use lotus_e2e::{Net, NetConfig, secs};

const RESTARTS: usize = 20;
/// More than the kernel buffers for a connection of the slow client.
const SIZE: usize = 6 << 20;

/// The sockets that the supervisor says it owns for retrieval.
async fn owned(net: &Net) -> Vec<String> {
    let process = net.process("retrieval").await.unwrap();
    process.sockets.into_iter().map(|s| s.address).collect()
}

async fn restart(net: &Net, name: &str) {
    let root = net.root().display().to_string();
    net.run("lotus-supervisor", &["restart", name, "--repo", &root])
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn downloads_go_on_while_retrieval_is_restarted_and_after_the_supervisor_was_killed() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let stored = store(&net, SIZE).await.unwrap();
    let url = net.spoke_url("retrieval").unwrap();
    assert_eq!(owned(&net).await, [url.trim_start_matches("http://")]);

    // Restarted by an operator, again and again: nobody sees it.
    let downloads = Downloads::start(&url, &stored).unwrap();
    downloads.go_on(&net, 1).await.unwrap();
    for n in 1..=RESTARTS {
        let before = net.process("retrieval").await.unwrap().pid;
        restart(&net, "retrieval").await;
        assert_ne!(net.process("retrieval").await.unwrap().pid, before, "{n}");
        downloads.go_on(&net, 1).await.unwrap();
    }
    assert_eq!(net.spoke_url("retrieval").unwrap(), url);
    let seen = downloads.end().await;
    eprintln!(
        "{RESTARTS} restarts: {:?}, slowest {:?}",
        seen.good, seen.slowest
    );
    assert!(seen.failures.is_empty(), "{seen:?}\n{}", net.logs());

    // The supervisor is killed; the next one gets the socket back from the process.
    let downloads = Downloads::start(&url, &stored).unwrap();
    let pid = net.process("retrieval").await.unwrap().pid;
    net.replace_supervisor().unwrap();
    net.wait("the socket to be back", secs(60), async |n| {
        let p = n.process("retrieval").await.ok()?;
        assert_eq!(p.pid, pid, "it was not restarted");
        (!p.sockets.is_empty()).then_some(())
    })
    .await
    .unwrap();
    assert_eq!(owned(&net).await, [url.trim_start_matches("http://")]);
    downloads.go_on(&net, 1).await.unwrap();
    let seen = downloads.seen();
    assert!(seen.failures.is_empty(), "{seen:?}\n{}", net.logs());

    // Now retrieval itself is killed: what was open in it breaks, and nobody is refused.
    let old = net.kill9("retrieval").await.unwrap();
    net.wait("a new retrieval", secs(60), async |n| {
        let p = n.process("retrieval").await.ok()?;
        (p.ready && p.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();
    downloads.go_on(&net, 2).await.unwrap();
    downloads.go_on(&net, 2).await.unwrap();
    let seen = downloads.end().await;
    eprintln!("killed: {:?}, broken {:?}", seen.good, seen.failures);
    assert_eq!(seen.refused, 0, "{seen:?}\n{}", net.logs());
    assert!(seen.failures.len() <= 3, "one of each kind: {seen:?}");
    assert!(seen.good[&Kind::Slow] > 0);
    // The hub seals the deal by now, and a stop that waits for it is not what this is about.
    let root = net.root().display().to_string();
    net.run("lotus-supervisor", &["stop", "--force", "--repo", &root])
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_right_after_the_supervisor_was_killed_keeps_the_socket_too() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let url = net.spoke_url("retrieval").unwrap();
    net.replace_supervisor().unwrap();
    net.wait("the next supervisor to answer", secs(30), async |n| {
        n.status().await.ok()
    })
    .await
    .unwrap();
    // It may not have the socket yet: the process gives it back with its last words.
    restart(&net, "retrieval").await;
    assert_eq!(owned(&net).await, [url.trim_start_matches("http://")]);
    assert_eq!(net.spoke_url("retrieval").unwrap(), url);

    // A wrong configuration is refused before the one that runs is touched.
    let pid = net.process("retrieval").await.unwrap().pid;
    std::fs::create_dir_all(net.root().join("markets")).unwrap();
    let file = net.root().join("markets/config.toml");
    std::fs::write(&file, "[retrieval]\nno_such_key = 1\n").unwrap();
    let root = net.root().display().to_string();
    let refused = net
        .run(
            "lotus-supervisor",
            &["restart", "retrieval", "--repo", &root],
        )
        .await
        .unwrap_err();
    assert!(refused.0.contains("no_such_key"), "{refused}");
    assert_eq!(net.process("retrieval").await.unwrap().pid, pid);
    std::fs::remove_file(&file).unwrap();

    // One that is stopped refuses at once instead of letting clients wait for nobody.
    net.run("lotus-supervisor", &["stop", "retrieval", "--repo", &root])
        .await
        .unwrap();
    let addr = url.trim_start_matches("http://");
    std::net::TcpStream::connect(addr).unwrap_err();
    net.run("lotus-supervisor", &["start", "retrieval", "--repo", &root])
        .await
        .unwrap();
    net.ready(secs(60)).await.unwrap();
    assert_eq!(net.spoke_url("retrieval").unwrap(), url, "the same port");
    net.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_in_use_is_a_reason_and_not_a_loop() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let mut cfg = NetConfig {
        services: vec!["retrieval".into()],
        ..NetConfig::default()
    };
    let key = "LOTUS_MARKETS__RETRIEVAL__LISTEN".to_owned();
    cfg.spoke_env.insert(key, addr.clone());
    let net = Net::start(&cfg).await.unwrap();
    let failed = net
        .wait("retrieval to give up", secs(120), async |n| {
            let p = n.process("retrieval").await.ok()?;
            (p.state == "failed").then_some(p)
        })
        .await
        .unwrap();
    assert!(failed.reason.contains(&addr), "{failed:?}");
    assert!(failed.reason.contains("retrieval.listen"), "{failed:?}");
    assert!(failed.sockets.is_empty() && failed.restarts == 0);

    drop(taken);
    let root = net.root().display().to_string();
    net.run("lotus-supervisor", &["start", "retrieval", "--repo", &root])
        .await
        .unwrap();
    net.ready(secs(60)).await.unwrap();
    assert_eq!(owned(&net).await, [addr]);
    net.stop().await.unwrap();
}
