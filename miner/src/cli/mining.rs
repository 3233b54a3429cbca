use clap::Subcommand;
use lotus_node_client::api::TipSetKey;
use lotus_proving::{Allowed, RoundOutcome, RoundRecord};
use lotus_runtime::Fault;
use lotus_types::Epoch;
use reqwest::Method;
use serde::Serialize;

use super::{Cx, print, print_json, table, time};
use crate::control;
use crate::control_proving::{Allow, MiningView};

#[derive(Debug, Subcommand)]
pub(super) enum MiningCommand {
    /// List what became of the rounds that were won, and the rounds that were not attended
    ///
    /// Every won round has a block or the reason why it has none, crashes of the hub included.
    /// Newest first. Says also why mining is refused or waits, if it does.
    List {
        /// How many
        #[arg(long, default_value_t = 20, value_name = "N")]
        limit: usize,
    },
    /// End a refusal to mine, or the wait before the first block
    ///
    /// The hub refuses to mine while the chain has a block of its miner that its mined-block log
    /// lacks, and a new hub for an old miner waits before its first block: another hub, an old
    /// lotus-miner or the host of a backup may still run. Two that mine cost the miner its
    /// collateral. Without --really-do-it this shows why mining is held, and what was allowed
    /// before.
    Allow {
        /// Why nothing else mines for this miner; it is journaled
        #[arg(long, required_if_eq("really_do_it", "true"))]
        reason: Option<String>,
        /// Nothing else mines for this miner, nor ever will: go on
        #[arg(long)]
        really_do_it: bool,
    },
}

#[derive(Serialize)]
struct Round {
    #[serde(flatten)]
    record: RoundRecord,
    /// Whether the chain has its block now; absent without a block or an answer of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    on_chain: Option<bool>,
}

pub(super) async fn mining(cx: &Cx, command: MiningCommand) -> Result<(), Fault> {
    match command {
        MiningCommand::List { limit } => list(cx, limit).await,
        MiningCommand::Allow {
            reason: Some(reason),
            really_do_it: true,
        } => allow(cx, reason).await,
        MiningCommand::Allow { .. } => show(cx).await,
    }
}

/// Lets mining go on.
async fn allow(cx: &Cx, reason: String) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    let path = "/v1/mining/allow";
    let word = Allow { reason };
    let done: Allowed =
        control::call_with(&socket, Method::POST, path, Some(&word), control::DEADLINE).await?;
    if cx.json {
        return print_json(&done);
    }
    print(&format!(
        "blocks up to height {} may be missing from the mined-block log; mining goes on",
        done.until
    ))
}

/// Shows what holds mining, and what was allowed before.
async fn show(cx: &Cx) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    let view: MiningView = control::call(&socket, Method::GET, "/v1/mining/state").await?;
    if cx.json {
        return print_json(&view);
    }
    let mut text = match &view.held {
        Some(why) => format!(
            "mining {why}\nnothing was changed: to go on, add --reason TEXT --really-do-it\n"
        ),
        None => format!("{}\n", line(&view)),
    };
    if !view.allowed.is_empty() {
        let mut out = table(&["Allowed (UTC)", "Up to", "Reason", "What was held"]);
        for a in &view.allowed {
            let (at, until) = (time(a.at_unix_ms), a.until.to_string());
            out.add_row([&at, &until, &a.reason, &a.held]);
        }
        text = format!("{text}{out}\n");
    }
    print(&text)
}

fn line(view: &MiningView) -> String {
    match (view.state.ready, view.state.detail.as_str()) {
        (true, "") => "mining: yes".into(),
        (true, detail) => format!("mining: {detail}"),
        (false, detail) => format!("mining: no: {detail}"),
    }
}

async fn list(cx: &Cx, limit: usize) -> Result<(), Fault> {
    let path = format!("/v1/mining?limit={limit}");
    let socket = cx.control_socket()?;
    let records: Vec<RoundRecord> = control::call(&socket, Method::GET, &path).await?;
    let mut rounds = Vec::new();
    for record in records {
        let on_chain = match &record.outcome {
            RoundOutcome::Mined { cid } | RoundOutcome::Unsure { cid, .. } => {
                on_chain(cx, record.height, cid).await
            }
            RoundOutcome::Open
            | RoundOutcome::NoBlock { .. }
            | RoundOutcome::NotAttended { .. } => None,
        };
        rounds.push(Round { record, on_chain });
    }
    if cx.json {
        return print_json(&rounds);
    }
    let mut out = table(&["Round", "Wins", "Outcome", "Block or reason", "Time"]);
    for Round { record, on_chain } in &rounds {
        let (round, outcome, text) = match &record.outcome {
            RoundOutcome::Open => (record.height.to_string(), "being made", String::new()),
            RoundOutcome::Mined { cid } => {
                let outcome = match on_chain {
                    Some(true) => "block",
                    Some(false) => "block, not on chain",
                    // Or the node does not answer.
                    None => "block, not on chain yet",
                };
                (record.height.to_string(), outcome, cid.clone())
            }
            RoundOutcome::Unsure { cid, why } => {
                let outcome = match on_chain {
                    Some(true) => "block",
                    Some(false) => "perhaps a block, not on chain",
                    None => "perhaps a block",
                };
                (record.height.to_string(), outcome, format!("{cid}: {why}"))
            }
            RoundOutcome::NoBlock { why } => (record.height.to_string(), "no block", why.clone()),
            RoundOutcome::NotAttended { through, why } => (
                format!("{} to {through}", record.height),
                "not attended",
                why.clone(),
            ),
        };
        let took: u64 = record.steps.iter().map(|s| s.ms).sum();
        out.add_row([
            round,
            record.wins.map_or_else(|| "?".into(), |w| w.to_string()),
            outcome.into(),
            text,
            if record.steps.is_empty() {
                String::new()
            } else {
                format!("{took} ms")
            },
        ]);
    }
    let view: Result<MiningView, Fault> =
        control::call(&socket, Method::GET, "/v1/mining/state").await;
    match view {
        Ok(view) if !view.state.ready => print(&format!("{out}\n{}", line(&view))),
        _ => print(&out.to_string()),
    }
}

async fn on_chain(cx: &Cx, height: Epoch, cid: &str) -> Option<bool> {
    let (node, _) = cx.node().ok()?;
    let head = TipSetKey::HEAD;
    let tipset = node.chain_get_tipset_by_height(height, &head).await.ok()?;
    Some(tipset.cids.iter().any(|c| c.to_string() == cid))
}
