//! One hub, and deals and replicas of retrieval on hosts of their own: two dial the hub, the third
//! may not and is dialed. They are cut off, killed, and come back; whoever is left serves.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
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
    let (data, car) = (
        net.root().join(name),
        net.root().join(format!("{name}.car")),
    );
    fs::create_dir(&data).unwrap();
    fs::write(data.join(name), name.repeat(90_000)).unwrap();
    lotus_car::pack_dir(&data, &car).unwrap();
    let deal = demo::propose_to(net, || deals.url(), &car).await;
    let deal = deal.unwrap_or_else(|e| panic!("{e}\n{}", deals.log()));
    Piece {
        path: format!("/piece/{}", deal.piece_cid),
        bytes: fs::read(&car).unwrap(),
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
    let third = deal(&net, &deals, "three").await;
    serves(&net, &one, &third).await;
    serves(&net, &two, &third).await;
    for far in [&deals, &one, &two] {
        let log = far.log();
        assert!(!log.contains(" ERROR "), "{log}");
    }
    // The authority's key, three identities and their bundles, indexing's, tokens of the node and
    // the hub: none of them is in any log.
    let kept = secrets::all(net.root()).unwrap();
    assert!(kept.len() >= 12, "{} secrets are there", kept.len());
    let far = [&deals, &one, &two].map(Far::log_file);
    let logs = [net.log_files(), far.to_vec()].concat();
    assert_eq!(
        secrets::shown(&kept, &logs).unwrap(),
        [""; 0].map(std::path::PathBuf::from)
    );
    drop((clients, deals, one, two));
    net.stop().await.unwrap();
}
