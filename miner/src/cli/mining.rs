use clap::Subcommand;
use lotus_node_client::api::TipSetKey;
use lotus_proving::{RoundOutcome, RoundRecord};
use lotus_runtime::Fault;
use lotus_types::Epoch;
use serde::Serialize;

use super::{Cx, print, print_json, table};
use crate::control;

#[derive(Debug, Subcommand)]
pub(super) enum MiningCommand {
    /// List what became of the rounds that were won, and the rounds that were not attended
    ///
    /// Every won round has a block or the reason why it has none, crashes of the hub included.
    /// Newest first.
    List {
        /// How many
        #[arg(long, default_value_t = 20, value_name = "N")]
        limit: usize,
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
    let MiningCommand::List { limit } = command;
    let path = format!("/v1/mining?limit={limit}");
    let socket = cx.control_socket()?;
    let records: Vec<RoundRecord> = control::call(&socket, reqwest::Method::GET, &path).await?;
    let mut rounds = Vec::new();
    for record in records {
        let on_chain = match &record.outcome {
            RoundOutcome::Mined { cid } => on_chain(cx, record.height, cid).await,
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
    print(&out.to_string())
}

async fn on_chain(cx: &Cx, height: Epoch, cid: &str) -> Option<bool> {
    let (node, _) = cx.node().ok()?;
    let head = TipSetKey::HEAD;
    let tipset = node.chain_get_tipset_by_height(height, &head).await.ok()?;
    Some(tipset.cids.iter().any(|c| c.to_string() == cid))
}
