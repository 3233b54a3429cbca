use clap::Subcommand;
use lotus_node_client::api::TipSetKey;
use lotus_proving::{DeadlineRecord, Outcome};
use lotus_runtime::Fault;
use serde::Serialize;

use super::{Cx, print, print_json, table};
use crate::control;
use crate::run::from_node;

#[derive(Debug, Subcommand)]
pub(super) enum ProvingCommand {
    /// Show the deadlines of the proving period: their sectors, and how they went last time
    Deadlines {
        /// Empty ones too
        #[arg(long)]
        all: bool,
    },
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

pub(super) async fn proving(cx: &Cx, command: ProvingCommand) -> Result<(), Fault> {
    let ProvingCommand::Deadlines { all } = command;
    let (node, cfg) = cx.node()?;
    let (miner, head) = (cfg.actor()?.address(), TipSetKey::default());
    let now = node
        .state_miner_proving_deadline(miner, &head)
        .await
        .map_err(|e| from_node(&e))?;
    let chain = node
        .state_miner_deadlines(miner, &head)
        .await
        .map_err(|e| from_node(&e))?;
    // The hub's own account is a bonus: without it the chain's is shown.
    let socket = cx.control_socket()?;
    let records: Vec<DeadlineRecord> =
        match control::call(&socket, reqwest::Method::GET, "/v1/deadlines").await {
            Ok(records) => records,
            Err(e) => {
                eprintln!("the hub does not answer: {e}");
                Vec::new()
            }
        };
    let mut deadlines = Vec::new();
    for (index, d) in (0u64..).zip(&chain) {
        let partitions = node
            .state_miner_partitions(miner, index, &head)
            .await
            .map_err(|e| from_node(&e))?;
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
        let last = d
            .last
            .as_ref()
            .map_or_else(String::new, |r| match &r.outcome {
                Outcome::Proved { partitions } => {
                    format!("proved {partitions} (epoch {})", r.close)
                }
                Outcome::Empty => "empty".into(),
                Outcome::Failed { why, .. } => format!("failed: {why}"),
            });
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
            last,
        ]);
    }
    print(&format!(
        "{out}\nepoch {}, period from {}, deadline {} of {} closes at {}; {shown} shown",
        now.current_epoch, now.period_start, now.index, now.w_post_period_deadlines, now.close
    ))
}
