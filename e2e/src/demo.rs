//! The main job, from outside: a client's CAR becomes a piece in a proven sector, and comes back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lotus_car::CarStore;
use lotus_types::{ActorId, SectorNumber};
use serde::Serialize;
use serde_json::Value;

use crate::compare::{blocks_below, same_dag};
use crate::watch::Watch;
use crate::{Failed, Net, secs};

/// The devnet's genesis miner.
const MINER: ActorId = ActorId(1000);
/// How long one deal may take until its sector is proven, from the proposal on.
const SEALING_LIMIT: Duration = secs(600);
/// How long an accepted WindowPoSt and a won block may take after that.
const PROOF_LIMIT: Duration = secs(300);

/// What was seen of one deal.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Deal {
    /// The piece CID, version 1.
    pub piece_cid: String,
    /// The deal's ULID.
    pub deal_id: String,
    /// The sector that holds the piece.
    pub sector: u64,
    /// State of the sector at the end.
    pub state: String,
    /// Proving windows in which a WindowPoSt of the sector was accepted.
    pub window_posts_accepted: usize,
    /// `/piece` gave the CAR back, byte for byte.
    pub piece_bytes_equal: bool,
    /// `/ipfs` gave every root's DAG back.
    pub dag_bytes_equal: bool,
    /// The index knows a block of the CAR.
    pub index_lookup_ok: bool,
}

impl Deal {
    fn ok(&self) -> bool {
        self.state == "Proving"
            && self.window_posts_accepted > 0
            && self.piece_bytes_equal
            && self.dag_bytes_equal
            && self.index_lookup_ok
    }
}

/// What was seen in all.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether everything is as it must be.
    pub ok: bool,
    /// The first deal.
    #[serde(flatten)]
    pub first: Deal,
    /// Every deal, when there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deals: Vec<Deal>,
    /// Blocks of the miner on the chain.
    pub blocks_won: usize,
    /// Seconds from the start of the processes to the last comparison.
    pub seconds: f64,
    /// Seconds of each part, in order.
    pub steps: BTreeMap<String, f64>,
}

/// Shows what happens: a phase begins, or its state changed.
pub trait Show: Send {
    /// The state of the chain and of a deal, in one line.
    fn progress(&mut self, deal: usize, step: usize, steps: usize, line: &str);
    /// Something is done.
    fn done(&mut self, line: &str);
}

/// Prints what is done, and each deal's state when it changes.
#[derive(Debug, Default)]
pub struct Lines(BTreeMap<usize, usize>);

impl Show for Lines {
    fn progress(&mut self, deal: usize, step: usize, _steps: usize, line: &str) {
        if self.0.insert(deal, step) != Some(step) {
            eprintln!("deal {}: {line}", deal + 1);
        }
    }

    fn done(&mut self, line: &str) {
        eprintln!("{line}");
    }
}

/// States in the order of a good run, for a progress bar.
const STEPS: [&str; 17] = [
    "Accepted",
    "Transferred",
    "Offered",
    "AddedPiece",
    "WaitDeals",
    "Packing",
    "GetTicket",
    "PreCommit1",
    "PreCommit2",
    "SubmitPreCommitBatch",
    "PreCommitBatchWait",
    "WaitSeed",
    "Committing",
    "SubmitCommitAggregate",
    "CommitAggregateWait",
    "FinalizeSector",
    "Proving",
];

/// Makes a deal for each CAR and follows all of them to the end. `net` runs already.
pub async fn run(net: &Net, cars: &[PathBuf], show: &mut dyn Show) -> Result<Report, Failed> {
    for car in cars {
        whole(car)?;
    }
    let start = Instant::now();
    let mut steps = BTreeMap::new();
    let mut lap = Instant::now();
    let mut took = |what: &str| {
        steps.insert(what.to_owned(), round(lap.elapsed()));
        lap = Instant::now();
    };
    net.ready(secs(120)).await?;
    took("1_processes_ready");
    show.done("every process is ready");

    let mut deals = Vec::new();
    for car in cars {
        let deal = propose(net, car).await?;
        show.done(&format!(
            "{}: deal {} for piece {}",
            car.display(),
            deal.deal_id,
            deal.piece_cid
        ));
        deals.push(deal);
    }
    took("2_deals_made");

    let mut watch = Watch::new(net.node()?, MINER);
    seal(net, &mut watch, &mut deals, show).await?;
    took("3_sectors_proving");
    show.done("every sector is Proving");

    let blocks_won = prove(net, &mut watch, &mut deals, show).await?;
    took("4_window_post_and_block");
    show.done(&format!("WindowPoSt accepted; {blocks_won} blocks won"));

    for (deal, car) in deals.iter_mut().zip(cars) {
        fetch(net, deal, car).await?;
    }
    took("5_fetched_and_compared");
    show.done("index, piece and DAG are as they must be");

    let first = deals.first().cloned().unwrap_or_default();
    Ok(Report {
        ok: !deals.is_empty() && blocks_won > 0 && deals.iter().all(Deal::ok),
        first,
        deals: if deals.len() > 1 { deals } else { Vec::new() },
        blocks_won,
        seconds: round(start.elapsed()),
        steps,
    })
}

/// Whether every root's DAG is complete: only then can it come back complete.
fn whole(car: &Path) -> Result<(), Failed> {
    let name = car.display().to_string();
    let store = CarStore::open(car).map_err(|e| Failed::at(&name, e))?;
    if store.roots().is_empty() {
        return Err(Failed(format!("{name}: the CAR names no root")));
    }
    for root in store.roots() {
        blocks_below(root, &store)
            .map_err(|e| Failed(format!("{name} does not hold the whole DAG of {root}: {e}")))?;
    }
    Ok(())
}

fn round(d: Duration) -> f64 {
    (d.as_secs_f64() * 10.0).round() / 10.0
}

fn text(v: &Value, at: &str) -> Result<String, Failed> {
    v.pointer(at)
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| Failed(format!("no text at {at} in {v}")))
}

fn utf8(path: &Path) -> Result<&str, Failed> {
    path.to_str()
        .ok_or_else(|| Failed(format!("{} is no UTF-8", path.display())))
}

/// A CAR with data of this name, in the folder of the net.
pub fn pack(net: &Net, name: &str) -> Result<PathBuf, Failed> {
    let (data, car) = (
        net.root().join(name),
        net.root().join(format!("{name}.car")),
    );
    std::fs::create_dir(&data)?;
    std::fs::write(data.join(name), name.repeat(90_000))?;
    lotus_car::pack_dir(&data, &car).map_err(|e| Failed::at("pack", e))?;
    Ok(car)
}

/// Proposes and uploads. A provider that restarts meanwhile is asked again with the same deal
/// id, as a client would do it; that is what the id is for.
pub async fn propose(net: &Net, car: &Path) -> Result<Deal, Failed> {
    propose_to(net, || net.spoke_url("deals"), car).await
}

/// The same to the deals that are at `url`, then.
pub async fn propose_to(
    net: &Net,
    url: impl Fn() -> Result<String, Failed>,
    car: &Path,
) -> Result<Deal, Failed> {
    let key = net.root().join("client.key");
    let id = ulid::Ulid::generate().to_string();
    let deadline = Instant::now() + secs(120);
    loop {
        let url = url()?;
        let made = net
            .run(
                "lotus-markets",
                &[
                    "client",
                    "deal",
                    "--provider-url",
                    &url,
                    "--car",
                    utf8(car)?,
                    "--key",
                    utf8(&key)?,
                    "--deal-id",
                    &id,
                    "--announce",
                    "--json",
                ],
            )
            .await;
        match made {
            Ok(out) => {
                let v: Value = serde_json::from_str(&out).map_err(|e| Failed::at("deal", e))?;
                return Ok(Deal {
                    piece_cid: text(&v, "/piece_cid")?,
                    deal_id: text(&v, "/deal_id")?,
                    ..Deal::default()
                });
            }
            Err(e) if Instant::now() > deadline || !unreachable(net).await => return Err(e),
            Err(_) => net.ready(secs(60)).await?,
        }
    }
}

/// Whether some process is not ready, so that a failed call may be for that.
async fn unreachable(net: &Net) -> bool {
    match net.status().await {
        Ok(all) => all.iter().any(|p| !p.ready || p.restarts > 0),
        Err(_) => true,
    }
}

/// The deal's status from the provider, or `None` while it does not answer.
pub async fn status(net: &Net, deal: &Deal) -> Option<Value> {
    let url = net.spoke_url("deals").ok()?;
    let key = net.root().join("client.key");
    let args = [
        "client",
        "status",
        "--provider-url",
        &url,
        "--key",
        key.to_str()?,
        &deal.deal_id,
        "--json",
    ];
    let out = net.run("lotus-markets", &args).await.ok()?;
    serde_json::from_str(out.lines().last()?).ok()
}

async fn seal(
    net: &Net,
    watch: &mut Watch,
    deals: &mut [Deal],
    show: &mut dyn Show,
) -> Result<(), Failed> {
    let deadline = Instant::now() + SEALING_LIMIT;
    while deals.iter().any(|d| d.state != "Proving") {
        if Instant::now() > deadline {
            let states: Vec<&str> = deals.iter().map(|d| d.state.as_str()).collect();
            return Err(Failed(format!(
                "not Proving after {SEALING_LIMIT:?}: {states:?}\n{}",
                net.logs()
            )));
        }
        let height = watch.height().await.map_or(-1, |h| h.0);
        for (i, deal) in deals.iter_mut().enumerate() {
            let Some(now) = status(net, deal).await else {
                continue;
            };
            let d = &now["deal"];
            let checkpoint = d["checkpoint"].as_str().unwrap_or_default();
            let sealing = d["sealing_state"].as_str().unwrap_or_default();
            if matches!(checkpoint, "Failed" | "Expired") {
                return Err(Failed(format!(
                    "the deal {checkpoint}: {now}\n{}",
                    net.logs()
                )));
            }
            if let Some(n) = d["sector"].as_u64() {
                deal.sector = n;
            }
            deal.state = if sealing.is_empty() {
                checkpoint
            } else {
                sealing
            }
            .to_owned();
            let step = STEPS.iter().position(|s| *s == deal.state).unwrap_or(0);
            let line = format!("epoch {height:>4}  {checkpoint:<12} {sealing}");
            show.progress(i, step, STEPS.len() - 1, &line);
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    Ok(())
}

async fn prove(
    net: &Net,
    watch: &mut Watch,
    deals: &mut [Deal],
    show: &mut dyn Show,
) -> Result<usize, Failed> {
    let deadline = Instant::now() + PROOF_LIMIT;
    loop {
        for (i, deal) in deals.iter_mut().enumerate() {
            deal.window_posts_accepted = watch.window_posts(SectorNumber(deal.sector)).await?;
            let line = format!(
                "Proving, WindowPoSt accepted: {}",
                deal.window_posts_accepted
            );
            show.progress(i, STEPS.len() - 1, STEPS.len() - 1, &line);
        }
        if deals.iter().all(|d| d.window_posts_accepted > 0) {
            let won = watch.blocks_won().await?;
            if won > 0 {
                return Ok(won);
            }
        }
        if Instant::now() > deadline {
            let won = watch.blocks_won().await?;
            return Err(Failed(format!(
                "after {PROOF_LIMIT:?}: {won} blocks won, WindowPoSts of {deals:?}\n{}",
                net.logs()
            )));
        }
        // Shorter than an epoch, so that no window is missed.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Asks index and retrieval, and compares with the file that the client kept.
async fn fetch(net: &Net, deal: &mut Deal, car: &Path) -> Result<(), Failed> {
    let http = lotus_runtime::http_client()
        .timeout(secs(60))
        .build()
        .map_err(|e| Failed::at("HTTP client", e))?;
    let sent = CarStore::open(car).map_err(|e| Failed::at(&car.display().to_string(), e))?;
    // An identity CID carries its own bytes; nobody indexes it.
    let last = *sent
        .cids()
        .iter()
        .rfind(|cid| cid.hash().code() != 0)
        .ok_or_else(|| Failed::new("the CAR holds no block"))?;

    // The spokes index a piece soon after it was placed.
    let lookup = format!("/routing/v1/providers/{last}");
    net.wait("the index to know the piece", secs(60), async |n| {
        let found = get(n, &http, "indexing", &lookup, "application/json")
            .await
            .ok()?;
        let found: Value = serde_json::from_slice(&found).ok()?;
        (!found["Providers"].as_array()?.is_empty()).then_some(())
    })
    .await?;
    deal.index_lookup_ok = true;

    // A service that restarts is asked again, as a client would do it.
    let get = async |path: String| {
        let last = Mutex::new(None);
        let bytes = net.wait(&path, secs(30), async |n| {
            match get(n, &http, "retrieval", &path, "*/*").await {
                Ok(bytes) => Some(bytes),
                Err(e) => {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                    None
                }
            }
        });
        bytes.await.map_err(|e| {
            let last = last.into_inner().unwrap_or_else(PoisonError::into_inner);
            last.map_or_else(|| Failed::at(&path, &e), |why| Failed::at(&why.0, &e))
        })
    };
    let piece = get(format!("/piece/{}", deal.piece_cid)).await?;
    deal.piece_bytes_equal = piece == std::fs::read(car)?;

    let dir = tempfile::tempdir()?;
    for root in sent.roots() {
        let path = format!("/ipfs/{root}?format=car&dag-scope=all");
        let file = dir.path().join("dag.car");
        std::fs::write(&file, get(path.clone()).await?)?;
        let got = CarStore::open(&file).map_err(|e| Failed::at(&path, e))?;
        same_dag(root, &sent, &got)?;
    }
    deal.dag_bytes_equal = true;
    Ok(())
}

/// One HTTP GET of a spoke.
async fn get(
    net: &Net,
    http: &reqwest::Client,
    service: &str,
    path: &str,
    accept: &str,
) -> Result<Vec<u8>, Failed> {
    let answer = http
        .get(format!("{}{path}", net.spoke_url(service)?))
        .header("accept", accept)
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(|e| Failed::at(path, e))?;
    let bytes = answer.bytes().await.map_err(|e| Failed::at(path, e))?;
    Ok(bytes.to_vec())
}
