//! A full node that misbehaves while sectors are sealed: cut connections, late answers, error
//! answers, reorgs, null rounds. No sector may fail for it, and no piece may be lost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use lotus_e2e::sectors::MINER;
use lotus_e2e::{Failed, Net, secs};
use lotus_node_client::api::TipSetKey;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::Serialize;

use crate::pieces::{self, Entry, Sector};

/// What the devnet says in the error answers that are ordered here.
const ORDERED: &str = "failed by command";
/// Events by which the chain itself moves a sector to a failure state.
const EVIDENCE: [&str; 5] = [
    "SectorChainRefused",
    "SectorAbandoned",
    "SectorNumberSpent",
    "SectorTicketExpired",
    "SectorDealsExpired",
];

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Sectors to seal while the node misbehaves
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=200))]
    node_sectors: u16,
    /// Minutes after which the sectors must be proven
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=120))]
    node_minutes: u64,
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) ok: bool,
    seed: u64,
    sectors: usize,
    /// Times that a sector came into a failure state without evidence of the chain. Must be 0.
    failed_by_transport: usize,
    /// Times that the chain refused something, a reorg's consequences for example.
    failed_by_chain: usize,
    /// Pieces that are not in exactly one proven sector. Must be 0.
    lost: usize,
    /// Sectors with pieces that the hub shows as proven and the chain has. Their number must be that
    /// of the pieces.
    on_chain: usize,
    /// Sectors that the hub shows as proven and the chain does not have. Must be none.
    not_on_chain: Vec<u64>,
    /// What was done to the node, by kind.
    faults: BTreeMap<&'static str, u64>,
    /// What failed, the first few.
    failures: Vec<String>,
    seconds: f64,
}

/// Whether the sector came into a failure state by this.
fn is_failure(e: &Entry) -> bool {
    let failed = |s: &str| {
        s.contains("Failed") || s.ends_with("DealsExpired") || s.ends_with("ChainConflict")
    };
    failed(&e.to) && !failed(&e.from)
}

/// Whether the chain itself said so.
fn has_evidence(e: &Entry) -> bool {
    EVIDENCE.contains(&e.event.as_str()) && !e.message.contains(ORDERED)
}

pub(crate) async fn run(options: &Options, seed: u64) -> Result<Report, Failed> {
    let start = Instant::now();
    let net = Net::start(&pieces::config()).await?;
    net.ready(secs(120)).await?;

    let mut random = StdRng::seed_from_u64(seed);
    let mut faults = Faults::new(StdRng::seed_from_u64(random.random()));
    let mut made = BTreeSet::new();
    let deadline = Instant::now() + secs(options.node_minutes * 60);
    let wanted = usize::from(options.node_sectors);
    for n in 0.. {
        if n < options.node_sectors {
            made.insert(pieces::deal(&net, n.into(), &mut random).await?);
        }
        faults.next(&net).await;
        let sectors = pieces::sectors(&net).await?;
        let proven = pieces::proven(&sectors).len();
        let told = on_chain(&net, &sectors).await;
        eprintln!(
            "[{:7.2} s] {} deals, {proven} of {wanted} pieces in proven sectors; of those sectors \
             the chain has {}",
            start.elapsed().as_secs_f64(),
            made.len(),
            told.as_ref()
                .map_or_else(|e| format!("? ({e})"), |t| t.has.to_string()),
        );
        let done = proven == wanted && told.is_ok_and(|t| t.has >= wanted && t.lacks.is_empty());
        if done || Instant::now() > deadline {
            break;
        }
    }

    let ask = async |net: &Net| {
        let all = pieces::sectors(net).await.ok()?;
        let told = on_chain(net, &all).await.ok()?;
        Some((all, told))
    };
    let (all, told) = net
        .wait("the sectors of hub and chain", secs(120), ask)
        .await?;
    let places = pieces::proven(&all);
    let lost = made.iter().filter(|p| places.get(*p) != Some(&1)).count();
    let mut failures = Vec::new();
    let (mut by_transport, mut by_chain) = (0, 0);
    for sector in &all {
        let sector = pieces::status(&net, sector.number).await?;
        for e in sector.log.iter().filter(|e| is_failure(e)) {
            *(if has_evidence(e) {
                &mut by_chain
            } else {
                &mut by_transport
            }) += 1;
            failures.push(format!(
                "sector {}: {} -> {}: {}",
                sector.number, e.from, e.to, e.message
            ));
        }
    }
    failures.truncate(20);
    let report = Report {
        ok: lost == 0 && by_transport == 0 && told.lacks.is_empty() && told.has >= made.len(),
        seed,
        sectors: all.len(),
        failed_by_transport: by_transport,
        failed_by_chain: by_chain,
        lost,
        on_chain: told.has,
        not_on_chain: told.lacks,
        faults: faults.count,
        failures,
        seconds: start.elapsed().as_secs_f64(),
    };
    if !report.ok {
        eprintln!("{}", net.logs());
    }
    net.stop().await?;
    Ok(report)
}

/// What the chain says of the sectors that the hub shows as proven.
struct Told {
    /// Sectors with pieces that it has.
    has: usize,
    /// Sectors that it does not have.
    lacks: Vec<u64>,
}

/// The chain's word on the sectors with pieces that the hub shows as proven, and on those without.
async fn on_chain(net: &Net, sectors: &[Sector]) -> Result<Told, Failed> {
    let node = net.node()?;
    let all = node
        .state_miner_sectors(MINER.address(), None, &TipSetKey::HEAD)
        .await
        .map_err(|e| Failed::at("the sectors of the chain", e))?;
    let there: BTreeSet<u64> = all.iter().map(|s| s.sector_number.0).collect();
    let proven = ["Proving", "Available"];
    let shown = sectors
        .iter()
        .filter(|s| proven.contains(&s.state.as_str()));
    let (has, lacks): (Vec<&Sector>, Vec<&Sector>) = shown.partition(|s| there.contains(&s.number));
    Ok(Told {
        has: has.iter().filter(|s| !s.pieces.is_empty()).count(),
        lacks: lacks.iter().map(|s| s.number).collect(),
    })
}

/// Orders of `lotus-devnet fault`, one after the other.
struct Faults {
    random: StdRng,
    count: BTreeMap<&'static str, u64>,
}

impl Faults {
    const fn new(random: StdRng) -> Self {
        Self {
            random,
            count: BTreeMap::new(),
        }
    }

    /// Some seconds of peace, then one fault to its end.
    async fn next(&mut self, net: &Net) {
        let peace = self.random.random_range(500..4_000);
        tokio::time::sleep(Duration::from_millis(peace)).await;
        let (name, number) = match self.random.random_range(0..5) {
            0 => ("drop-connections", 0),
            1 => ("delay", 10_000),
            2 => ("fail-calls", self.random.random_range(1..60)),
            3 => ("reorg", self.random.random_range(1..=20)),
            _ => ("null-rounds", self.random.random_range(1..=5)),
        };
        let number = number.to_string();
        let down = self.random.random_range(0..6_000).to_string();
        let order: &[&str] = match name {
            "drop-connections" => &[name, "--down-ms", &down],
            _ => &[name, &number],
        };
        eprintln!("fault {}", order.join(" "));
        if self.order(net, order).await {
            *self.count.entry(name).or_default() += 1;
        }
        if name == "delay" {
            // Long enough for a few answers to be late.
            tokio::time::sleep(secs(12)).await;
            self.order(net, &["delay", "0"]).await;
        }
    }

    /// An order may be caught in the fault before it; what counts is that the node is back when
    /// the next one comes. Whether it was taken.
    async fn order(&self, net: &Net, order: &[&str]) -> bool {
        let repo = net.root().join("devnet").display().to_string();
        let mut args = vec!["fault", "--repo", &repo];
        args.extend(order);
        let taken = net.run("lotus-devnet", &args).await;
        taken.inspect_err(|e| eprintln!("{e}")).is_ok()
    }
}
