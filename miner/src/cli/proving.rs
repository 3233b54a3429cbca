use clap::Subcommand;
use lotus_node_client::Node;
use lotus_node_client::api::{DeadlineInfo, Partition, TipSetKey};
use lotus_proving::{DeadlineRecord, Outcome};
use lotus_runtime::Fault;
use lotus_types::{ActorId, Address, Kind, SectorNumber};
use reqwest::Method;
use serde::Serialize;

use super::proving_work::{check, compute, recover};
use super::{Cx, print, print_json, table};
use crate::control;
use crate::run::from_node;

const HEAD: &TipSetKey = &TipSetKey::HEAD;

#[derive(Debug, Subcommand)]
pub(super) enum ProvingCommand {
    /// Show the proving period, what is due, and what is faulty
    Info,
    /// Show the deadlines of the proving period: their sectors, and how they went last time
    Deadlines {
        /// Empty ones too
        #[arg(long)]
        all: bool,
    },
    /// Show the partitions of one deadline, and the messages that proved it last
    Deadline {
        /// Its index
        index: u64,
    },
    /// Check whether sectors can be proven; declares nothing
    Check {
        /// Prove a random challenge of every sector instead of looking for its files
        #[arg(long)]
        slow: bool,
        /// Only this deadline
        #[arg(long, value_name = "N")]
        deadline: Option<u64>,
    },
    /// List faulty sectors, and when each is terminated unless it is repaired
    Faults,
    /// Make proofs without submitting them
    #[command(subcommand)]
    Compute(ComputeCommand),
    /// Declare faulty sectors as recovered, those that can be proven again
    ///
    /// The hub does this by itself before each deadline. By hand it is sooner on chain. Costs the
    /// fee of one message for each deadline.
    RecoverFaults {
        /// Sector numbers
        #[arg(required = true)]
        sectors: Vec<u64>,
        /// Send the messages
        #[arg(long)]
        really_do_it: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ComputeCommand {
    /// Make the WindowPoSts of a deadline against its newest challenge, to see whether it can be
    /// proven and how long that takes
    WindowedPost {
        /// Index of the deadline
        deadline: u64,
    },
}

pub(super) async fn proving(cx: &Cx, command: ProvingCommand) -> Result<(), Fault> {
    match command {
        ProvingCommand::Info => info(cx).await,
        ProvingCommand::Deadlines { all } => deadlines(cx, all).await,
        ProvingCommand::Deadline { index } => deadline(cx, index).await,
        ProvingCommand::Check { slow, deadline } => check(cx, slow, deadline).await,
        ProvingCommand::Faults => faults(cx).await,
        ProvingCommand::Compute(ComputeCommand::WindowedPost { deadline }) => {
            compute(cx, deadline).await
        }
        ProvingCommand::RecoverFaults {
            sectors,
            really_do_it,
        } => recover(cx, sectors.into_iter().collect(), really_do_it).await,
    }
}

/// The chain's side of proving.
pub(super) struct Chain {
    node: Node,
    actor: ActorId,
    miner: Address,
    now: DeadlineInfo,
}

impl Chain {
    pub(super) async fn of(cx: &Cx) -> Result<Self, Fault> {
        let (node, cfg) = cx.node()?;
        let actor = cfg.actor()?;
        let miner = actor.address();
        let now = node.state_miner_proving_deadline(miner, HEAD).await;
        let now = now.map_err(|e| from_node(&e))?;
        Ok(Self {
            node,
            actor,
            miner,
            now,
        })
    }

    pub(super) async fn partitions(&self, deadline: u64) -> Result<Vec<Partition>, Fault> {
        let all = self.node.state_miner_partitions(self.miner, deadline, HEAD);
        all.await.map_err(|e| from_node(&e))
    }

    pub(super) fn indices(&self) -> std::ops::Range<u64> {
        0..self.now.w_post_period_deadlines
    }
}

/// The hub's own account of the deadlines: a bonus, without which the chain's is shown.
async fn records(cx: &Cx) -> Result<Vec<DeadlineRecord>, Fault> {
    let socket = cx.control_socket()?;
    let got = control::call(&socket, Method::GET, "/v1/deadlines").await;
    Ok(got.unwrap_or_else(|e| {
        eprintln!("the hub does not answer: {e}");
        Vec::new()
    }))
}

#[derive(Serialize)]
struct Info {
    miner: String,
    epoch: i64,
    period_start: i64,
    next_period_start: i64,
    deadline: u64,
    deadlines: u64,
    open: i64,
    close: i64,
    challenge: i64,
    fault_cutoff: i64,
    partitions: usize,
    sectors: u64,
    active: u64,
    faulty: u64,
    recovering: u64,
    /// Deadlines that this hub saw close unproven, of those that it remembers.
    failed_deadlines: usize,
    remembered_deadlines: usize,
    disputed_proofs: u64,
}

async fn info(cx: &Cx) -> Result<(), Fault> {
    let chain = Chain::of(cx).await?;
    let records = records(cx).await?;
    let now = &chain.now;
    let failed = |r: &&DeadlineRecord| matches!(r.outcome, Outcome::Failed { .. });
    let mut info = Info {
        miner: chain.actor.to_string(),
        epoch: now.current_epoch.0,
        period_start: now.period_start.0,
        next_period_start: now.next_period_start().0,
        deadline: now.index,
        deadlines: now.w_post_period_deadlines,
        open: now.open.0,
        close: now.close.0,
        challenge: now.challenge.0,
        fault_cutoff: now.fault_cutoff.0,
        partitions: 0,
        sectors: 0,
        active: 0,
        faulty: 0,
        recovering: 0,
        failed_deadlines: records.iter().filter(failed).count(),
        remembered_deadlines: records.len(),
        disputed_proofs: records.iter().map(|r| r.disputed).sum(),
    };
    for index in chain.indices() {
        for p in chain.partitions(index).await? {
            info.partitions += 1;
            info.sectors += p.live_sectors.len();
            info.active += p.active_sectors.len();
            info.faulty += p.faulty_sectors.len();
            info.recovering += p.recovering_sectors.len();
        }
    }
    if cx.json {
        return print_json(&info);
    }
    let mut out = table(&["Miner", &info.miner]);
    for (name, value) in [
        ("Epoch", info.epoch.to_string()),
        (
            "Proving period",
            format!("{} to {}", info.period_start, info.next_period_start),
        ),
        (
            "Deadline",
            format!(
                "{} of {}, open {} to {}, challenge at {}",
                info.deadline, info.deadlines, info.open, info.close, info.challenge
            ),
        ),
        (
            "Sectors",
            format!("{} in {} partitions", info.sectors, info.partitions),
        ),
        ("Active", info.active.to_string()),
        (
            "Faulty",
            format!("{}, {} of them recovering", info.faulty, info.recovering),
        ),
        (
            "Missed by this hub",
            format!(
                "{} of the last {} deadlines",
                info.failed_deadlines, info.remembered_deadlines
            ),
        ),
        ("Disputed proofs", info.disputed_proofs.to_string()),
    ] {
        out.add_row([name.to_owned(), value]);
    }
    print(&out.to_string())
}

#[derive(Serialize)]
struct Deadline {
    index: u64,
    current: bool,
    open: i64,
    close: i64,
    partitions: usize,
    proven_partitions: u64,
    sectors: u64,
    faulty: u64,
    recovering: u64,
    /// How this hub's last try went.
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<DeadlineRecord>,
}

async fn deadlines(cx: &Cx, all: bool) -> Result<(), Fault> {
    let chain = Chain::of(cx).await?;
    let now = &chain.now;
    let on_chain = chain.node.state_miner_deadlines(chain.miner, HEAD).await;
    let on_chain = on_chain.map_err(|e| from_node(&e))?;
    let records = records(cx).await?;
    let mut deadlines = Vec::new();
    for (index, d) in (0u64..).zip(&on_chain) {
        let partitions = chain.partitions(index).await?;
        let open =
            now.period_start.0 + now.w_post_challenge_window.0 * i64::try_from(index).unwrap_or(0);
        deadlines.push(Deadline {
            index,
            current: index == now.index,
            open,
            close: open + now.w_post_challenge_window.0,
            partitions: partitions.len(),
            proven_partitions: d.post_submissions.len(),
            sectors: partitions.iter().map(|p| p.live_sectors.len()).sum(),
            faulty: partitions.iter().map(|p| p.faulty_sectors.len()).sum(),
            recovering: partitions.iter().map(|p| p.recovering_sectors.len()).sum(),
            last: records.iter().rfind(|r| r.index == index).cloned(),
        });
    }
    if cx.json {
        return print_json(&deadlines);
    }
    let mut out = table(&[
        "Deadline",
        "Open",
        "Partitions",
        "Proven",
        "Sectors",
        "Faulty",
        "Recovering",
        "Last outcome",
    ]);
    let mut shown = 0;
    for d in deadlines
        .iter()
        .filter(|d| all || d.current || d.partitions > 0)
    {
        shown += 1;
        out.add_row([
            if d.current {
                format!("{} (now)", d.index)
            } else {
                d.index.to_string()
            },
            format!("{} to {}", d.open, d.close),
            d.partitions.to_string(),
            d.proven_partitions.to_string(),
            d.sectors.to_string(),
            d.faulty.to_string(),
            d.recovering.to_string(),
            d.last.as_ref().map_or_else(String::new, outcome),
        ]);
    }
    print(&format!(
        "{out}\nepoch {}, period from {}, deadline {} of {} closes at {}; {shown} shown",
        now.current_epoch, now.period_start, now.index, now.w_post_period_deadlines, now.close
    ))
}

fn outcome(r: &DeadlineRecord) -> String {
    let mut text = match &r.outcome {
        Outcome::Proved { partitions } => format!("proved {partitions} (epoch {})", r.close),
        Outcome::Empty => "empty".into(),
        Outcome::Failed { why, .. } => format!("failed: {why}"),
    };
    if r.skipped > 0 {
        text.push_str(&format!(", {} sectors skipped", r.skipped));
    }
    if r.disputed > 0 {
        text.push_str(&format!(", {} proofs DISPUTED", r.disputed));
    }
    text
}

#[derive(Serialize)]
struct OnePartition {
    partition: u64,
    proven: bool,
    sectors: u64,
    active: u64,
    faulty: Vec<u64>,
    recovering: Vec<u64>,
}

#[derive(Serialize)]
struct OneDeadline {
    index: u64,
    /// Proofs of its last window that may still be disputed.
    disputable_proofs: u64,
    partitions: Vec<OnePartition>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last: Option<DeadlineRecord>,
}

async fn deadline(cx: &Cx, index: u64) -> Result<(), Fault> {
    let chain = Chain::of(cx).await?;
    exists(&chain, index)?;
    let all = chain.node.state_miner_deadlines(chain.miner, HEAD).await;
    let all = all.map_err(|e| from_node(&e))?;
    let at = usize::try_from(index).ok().and_then(|i| all.get(i));
    let partitions = chain.partitions(index).await?;
    let one = OneDeadline {
        index,
        disputable_proofs: at.map_or(0, |d| d.disputable_proof_count),
        partitions: (0u64..)
            .zip(&partitions)
            .map(|(partition, p)| OnePartition {
                partition,
                proven: at.is_some_and(|d| d.post_submissions.get(partition)),
                sectors: p.live_sectors.len(),
                active: p.active_sectors.len(),
                faulty: p.faulty_sectors.iter().collect(),
                recovering: p.recovering_sectors.iter().collect(),
            })
            .collect(),
        last: records(cx).await?.into_iter().rfind(|r| r.index == index),
    };
    if cx.json {
        return print_json(&one);
    }
    let mut out = table(&[
        "Partition",
        "Proven",
        "Sectors",
        "Active",
        "Faulty",
        "Recovering",
    ]);
    for p in &one.partitions {
        out.add_row([
            p.partition.to_string(),
            if p.proven { "yes" } else { "" }.to_owned(),
            p.sectors.to_string(),
            p.active.to_string(),
            numbers(&p.faulty),
            numbers(&p.recovering),
        ]);
    }
    let mut text = format!(
        "{out}\n{} proofs of the last window may be disputed",
        one.disputable_proofs
    );
    if let Some(last) = &one.last {
        text.push_str(&format!("\nlast: {}", outcome(last)));
        for cid in &last.messages {
            text.push_str(&format!("\n  message {cid}"));
        }
    }
    print(&text)
}

pub(super) fn exists(chain: &Chain, index: u64) -> Result<(), Fault> {
    let n = chain.now.w_post_period_deadlines;
    if index < n {
        return Ok(());
    }
    Err(Fault::new(
        Kind::Data,
        format!("there is no deadline {index}"),
        format!("give an index from 0 to {}", n.saturating_sub(1)),
    ))
}

/// At most twenty sector numbers.
pub(super) fn numbers(all: &[u64]) -> String {
    let mut text: Vec<String> = all.iter().take(20).map(u64::to_string).collect();
    if all.len() > 20 {
        text.push(format!("and {} more", all.len() - 20));
    }
    text.join(" ")
}

#[derive(Serialize)]
struct Faulty {
    sector: u64,
    deadline: u64,
    partition: u64,
    recovering: bool,
    /// The epoch at which it is terminated; 0 if the node does not tell.
    terminated_at: i64,
    /// Its scheduled end.
    expiration: i64,
}

async fn faults(cx: &Cx) -> Result<(), Fault> {
    let chain = Chain::of(cx).await?;
    let mut all = Vec::new();
    for deadline in chain.indices() {
        for (partition, p) in (0u64..).zip(&chain.partitions(deadline).await?) {
            for sector in p.faulty_sectors.iter() {
                let number = SectorNumber(sector);
                let ends = chain
                    .node
                    .state_sector_expiration(chain.miner, number, HEAD);
                let ends = ends.await.map_err(|e| from_node(&e))?;
                all.push(Faulty {
                    sector,
                    deadline,
                    partition,
                    recovering: p.recovering_sectors.get(sector),
                    terminated_at: ends.early.0,
                    expiration: ends.on_time.0,
                });
            }
        }
    }
    if cx.json {
        return print_json(&all);
    }
    if all.is_empty() {
        return print("no sector is faulty");
    }
    let mut out = table(&["Sector", "Deadline", "Partition", "State", "Terminated at"]);
    for f in &all {
        out.add_row([
            f.sector.to_string(),
            f.deadline.to_string(),
            f.partition.to_string(),
            if f.recovering { "recovering" } else { "faulty" }.to_owned(),
            if f.terminated_at > 0 {
                let left = f.terminated_at - chain.now.current_epoch.0;
                format!("{} (in {left} epochs)", f.terminated_at)
            } else {
                format!("{} (its end)", f.expiration)
            },
        ]);
    }
    print(&out.to_string())
}
