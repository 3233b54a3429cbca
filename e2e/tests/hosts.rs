//! One hub, and two replicas of deals and of retrieval on hosts of their own: two hosts dial the hub, the
//! third may not and is dialed. They are cut off, killed, and come back; whoever is left serves.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lotus_e2e::{At, Failed, Far, Host, Net, NetConfig, demo, secrets, secs};
use tokio::task::JoinSet;

/// Where the hub listens, and where it dials.
const API: u16 = 2344;
const DOOR: u16 = 2345;

/// What clients ask for, and what it is.
struct Piece {
    path: String,
    bytes: Vec<u8>,
}

/// Makes a deal about a piece of this name.
async fn deal(net: &Net, deals: &Far, name: &str) -> Piece {
    let car = demo::pack(net, name).unwrap();
    let deal = demo::propose_to(net, || deals.url(), &car).await;
    let deal = deal.unwrap_or_else(|e| panic!("{e}\n{}", deals.log()));
    piece(&car, &deal.piece_cid)
}

fn piece(car: &Path, piece_cid: &str) -> Piece {
    Piece {
        path: format!("/piece/{piece_cid}"),
        bytes: fs::read(car).unwrap(),
    }
}

/// One deal, whoever is asked for it.
struct Proposal {
    car: PathBuf,
    id: String,
    start: String,
}

impl Proposal {
    async fn new(net: &Net, name: &str) -> Self {
        let head = net.node().unwrap().chain_head().await.unwrap().height;
        Self {
            car: demo::pack(net, name).unwrap(),
            id: ulid::Ulid::generate().to_string(),
            start: (head.0 + 5_000).to_string(),
        }
    }

    /// Asks once.
    async fn to(&self, net: &Net, deals: &Far) -> Result<Piece, Failed> {
        let (url, key) = (deals.url()?, net.root().join("client.key"));
        let [car, key] = [&self.car, &key].map(|path| path.display().to_string());
        let what = [
            "client",
            "deal",
            "--provider-url",
            &url,
            "--car",
            &car,
            "--key",
            &key,
        ];
        let terms = [
            "--deal-id",
            &self.id,
            "--start-epoch",
            &self.start,
            "--json",
        ];
        let made = net
            .run("lotus-markets", &[&what[..], &terms].concat())
            .await?;
        let made: serde_json::Value = serde_json::from_str(&made).unwrap();
        Ok(piece(&self.car, made["piece_cid"].as_str().unwrap()))
    }
}

/// A balancer that asks the next replica when one does not answer.
#[derive(Clone)]
struct Balancer {
    http: reqwest::Client,
    replicas: Arc<Mutex<Vec<String>>>,
}

impl Balancer {
    fn to(replicas: &[&Far]) -> Self {
        let http = lotus_runtime::http_client().connect_timeout(secs(1));
        let balancer = Self {
            http: http.timeout(secs(10)).build().unwrap(),
            replicas: Arc::default(),
        };
        balancer.turn_to(replicas);
        balancer
    }

    fn turn_to(&self, replicas: &[&Far]) {
        *self.replicas.lock().unwrap() = replicas.iter().map(|r| r.url().unwrap()).collect();
    }

    async fn get(&self, piece: &Piece) -> Result<(), String> {
        let replicas = self.replicas.lock().unwrap().clone();
        let mut why = String::from("no replica");
        for replica in replicas {
            let sent = self.http.get(format!("{replica}{}", piece.path)).send();
            let answer = match sent.await.and_then(reqwest::Response::error_for_status) {
                Ok(answer) => answer.bytes().await,
                Err(e) => Err(e),
            };
            match answer {
                Ok(bytes) if bytes == piece.bytes => return Ok(()),
                Ok(_) => return Err("wrong bytes".into()),
                Err(e) => why = format!("{e:?}"),
            }
        }
        Err(why)
    }
}

/// Waits until a replica has a piece.
async fn serves(net: &Net, replica: &Far, piece: &Piece) {
    let from = Balancer::to(&[replica]);
    net.wait("a replica to have a piece", secs(60), async |_| {
        from.get(piece).await.ok()
    })
    .await
    .unwrap_or_else(|e| panic!("{e}\n{}", replica.log()));
}

/// Clients that never stop.
struct Clients {
    from: Balancer,
    served: Arc<AtomicU64>,
    failed: Arc<Mutex<Vec<String>>>,
    tasks: JoinSet<()>,
}

impl Clients {
    fn start(from: Balancer, piece: Piece) -> Self {
        let mut all = Self {
            from,
            served: Arc::default(),
            failed: Arc::default(),
            tasks: JoinSet::new(),
        };
        let piece = Arc::new(piece);
        for _ in 0..4 {
            let (from, piece) = (all.from.clone(), piece.clone());
            let (served, failed) = (all.served.clone(), all.failed.clone());
            all.tasks.spawn(async move {
                loop {
                    match from.get(&piece).await {
                        Ok(()) => drop(served.fetch_add(1, Ordering::Relaxed)),
                        Err(why) => failed.lock().unwrap().push(why),
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            });
        }
        all
    }

    /// Waits for another fifty answers, of which none is a failure.
    async fn go_on(&self, net: &Net, while_what: &str) {
        let before = self.served.load(Ordering::Relaxed);
        net.wait(while_what, secs(60), async |_| {
            (self.served.load(Ordering::Relaxed) > before + 50).then_some(())
        })
        .await
        .unwrap();
        let failed = self.failed.lock().unwrap();
        assert!(failed.is_empty(), "{while_what}: {failed:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_on_other_hosts_come_and_go() {
    let made = futures::future::try_join3(Host::new(1), Host::new(2), Host::new(3)).await;
    let (seller, near, dmz) = match made {
        Ok(hosts) => hosts,
        Err(Failed(why)) => {
            eprintln!(
                "SKIPPED replicas_on_other_hosts_come_and_go: {why}: it needs root and \
                 `apt-get install iproute2`"
            );
            return;
        }
    };
    let mut cfg = NetConfig::default();
    let dialed = format!("[\"{}:{DOOR}\"]", dmz.addr);
    let listen = format!("{}:{API}", seller.gateway);
    near.route_to(seller.gateway).await.unwrap();
    for (key, value) in [("LISTEN", listen), ("DIAL", dialed)] {
        let key = format!("LOTUS_MINER__API__{key}");
        cfg.hub_env.insert(key, value);
    }
    cfg.services = vec!["indexing".into()];
    let net = Net::start(&cfg).await.unwrap();
    net.ready(secs(120)).await.unwrap();

    assert!(near.reaches(seller.gateway, API).await.unwrap());
    for hub in [seller.gateway, dmz.gateway] {
        assert!(!dmz.reaches(hub, API).await.unwrap(), "{hub}");
    }
    let (at0, at1, at2) = (At::Host(&seller), At::Host(&near), At::Dialed(&dmz, DOOR));
    let (repo0, _) = Far::join(&net, "deals", "d1", at0).await.unwrap();
    let deals = Far::run(&net, "deals", repo0, at0).await.unwrap();
    let first = deal(&net, &deals, "one").await;
    let (repo1, _) = Far::join(&net, "retrieval", "r1", at1).await.unwrap();
    let (repo2, _) = Far::join(&net, "retrieval", "r2", at2).await.unwrap();
    let one = Far::run(&net, "retrieval", repo1, at1).await.unwrap();
    let two = Far::run(&net, "retrieval", repo2, at2).await.unwrap();
    serves(&net, &one, &first).await;
    serves(&net, &two, &first).await;
    let clients = Clients::start(Balancer::to(&[&one, &two]), first);
    clients.go_on(&net, "both are there").await;

    near.linked(false).await.unwrap();
    clients.go_on(&net, "the first is cut off").await;
    // Deals go on, and whoever can hear of them does.
    let second = deal(&net, &deals, "two").await;
    serves(&net, &two, &second).await;
    near.linked(true).await.unwrap();
    serves(&net, &one, &second).await;
    clients.go_on(&net, "the first is back").await;

    let repo2 = two.kill().await.unwrap();
    clients.go_on(&net, "the second is killed").await;
    let two = Far::run(&net, "retrieval", repo2, at2).await.unwrap();
    serves(&net, &two, &second).await;
    clients.from.turn_to(&[&two, &one]);
    clients.go_on(&net, "the second is back").await;

    // A hub that takes the place of another finds both again.
    let old = net.kill9("hub").await.unwrap();
    net.wait("another hub", secs(60), async |net| {
        let hub = net.process("hub").await.ok()?;
        (hub.ready && hub.pid != Some(old)).then_some(())
    })
    .await
    .unwrap();
    let third = Proposal::new(&net, "three").await;
    let made = third.to(&net, &deals).await.unwrap();
    serves(&net, &one, &made).await;
    serves(&net, &two, &made).await;

    // A second replica of deals joins. Another's deal is not made by it too; its own are.
    let (repo3, _) = Far::join(&net, "deals", "d2", at1).await.unwrap();
    let more = Far::run(&net, "deals", repo3, at1).await.unwrap();
    let twice = third.to(&net, &more).await.map(|_| "made");
    let refused = twice.unwrap_err().to_string();
    assert!(refused.contains("is one of deals/d1"), "{refused}");
    let fourth = deal(&net, &more, "four").await;
    serves(&net, &two, &fourth).await;
    // The first leaves for good. Once it is sent away, the other has what its clients come back with.
    let mut logs = vec![deals.log_file()];
    deals.kill().await.unwrap();
    let hub = net.root().join("miner").display().to_string();
    let revoke = ["credentials", "revoke", "deals/d1", "--repo", &hub];
    net.run("lotus-miner", &revoke).await.unwrap();
    let again = third.to(&net, &more).await.unwrap();
    assert_eq!(again.path, made.path);
    let list = ["pieces", "list", "--json", "--repo", &hub];
    net.wait("the other to have it", secs(60), async |net| {
        let listed = net.run("lotus-miner", &list).await.ok()?;
        (listed.matches("deals/d2").count() == 2).then_some(())
    })
    .await
    .unwrap_or_else(|e| panic!("{e}\n{}", more.log()));

    logs.extend([&more, &one, &two].map(Far::log_file));
    for log in &logs {
        let log = fs::read_to_string(log).unwrap();
        assert!(!log.contains(" ERROR "), "{log}");
    }
    // The authority's key, four identities and their bundles, indexing's, tokens of the node and
    // the hub: none of them is in any log.
    let kept = secrets::all(net.root()).unwrap();
    assert!(kept.len() >= 14, "{} secrets are there", kept.len());
    logs.extend(net.log_files());
    assert_eq!(secrets::shown(&kept, &logs).unwrap(), Vec::<PathBuf>::new());
    drop((clients, more, one, two));
    net.stop().await.unwrap();
}
