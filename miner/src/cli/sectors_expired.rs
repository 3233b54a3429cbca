//! `sectors expired`: sectors whose time on the chain is over, and their files.

use lotus_node_client::api::{BitField, TipSetKey};
use lotus_runtime::Fault;
use lotus_types::Kind;
use reqwest::Method;
use serde::Serialize;

use super::sectors::all;
use super::{Cx, print, print_json, table};
use crate::control::{self, Opened};
use crate::run::from_node;

/// Show the sectors that the chain has let go, at their end or after faults of many weeks
///
/// They earn and cost nothing any more, but their files are here until they are removed. The hub
/// refuses to remove one that a block may still ask for.
#[derive(Debug, clap::Args)]
pub(super) struct ExpiredArgs {
    /// Delete the files of all of them
    #[arg(long, requires = "confirm_remove_count")]
    remove_expired: bool,
    /// How many sectors this is about to remove, as the command shows it without this
    #[arg(long, value_name = "COUNT")]
    confirm_remove_count: Option<usize>,
}

#[derive(Serialize)]
struct Expired {
    sector: u64,
    state: String,
    expiration: i64,
    pieces: usize,
    removed: bool,
    /// Why it is not removed.
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
}

pub(super) async fn expired(cx: &Cx, args: ExpiredArgs) -> Result<(), Fault> {
    let live = live(cx).await?;
    // Sectors that were active once, and rest.
    let resting = ["Proving", "Available"];
    let sectors = all(&cx.hub().await?).await?;
    let over = sectors
        .into_iter()
        .filter(|s| s.activation > 0 && resting.contains(&s.state.as_str()) && !live.get(s.number));
    let mut over: Vec<Expired> = over
        .map(|s| Expired {
            sector: s.number,
            state: s.state,
            expiration: s.expiration,
            pieces: s.pieces.len(),
            removed: false,
            error: String::new(),
        })
        .collect();
    if args.remove_expired {
        let found = over.len();
        if args.confirm_remove_count != Some(found) {
            return Err(Fault::new(
                Kind::Config,
                format!("nothing was removed: {found} sectors have expired"),
                format!("repeat the command with --confirm-remove-count {found}"),
            ));
        }
        for sector in &mut over {
            let path = format!("/v1/sectors/{}/remove", sector.sector);
            let done = control::call::<Opened>(&cx.control_socket()?, Method::POST, &path).await;
            match done {
                Ok(_) => sector.removed = true,
                Err(e) => sector.error = e.message,
            }
        }
    }
    if cx.json {
        return print_json(&over);
    }
    if over.is_empty() {
        return print("no sector has expired");
    }
    let mut out = table(&["Sector", "State", "Expiration", "Pieces", "Removed"]);
    for s in &over {
        let removed = match (s.removed, s.error.is_empty()) {
            (true, _) => "begun",
            (false, true) => "no",
            (false, false) => &s.error,
        };
        out.add_row([
            s.sector.to_string(),
            s.state.clone(),
            s.expiration.to_string(),
            s.pieces.to_string(),
            removed.to_owned(),
        ]);
    }
    let hint = match args.remove_expired {
        true => String::new(),
        false => format!(
            "\nto delete their files: `lotus-miner sectors expired --remove-expired \
             --confirm-remove-count {}`",
            over.len()
        ),
    };
    print(&format!("{out}{hint}"))
}

/// Every sector that lives on the chain, all read from one tipset.
async fn live(cx: &Cx) -> Result<BitField, Fault> {
    let (node, cfg) = cx.node()?;
    let miner = cfg.actor()?.address();
    let head = node.chain_head().await.map_err(|e| from_node(&e))?;
    let key: TipSetKey = head.key();
    let now = node.state_miner_proving_deadline(miner, &key).await;
    let deadlines = now.map_err(|e| from_node(&e))?.w_post_period_deadlines;
    let mut live = BitField::new();
    for deadline in 0..deadlines {
        let partitions = node.state_miner_partitions(miner, deadline, &key).await;
        for partition in partitions.map_err(|e| from_node(&e))? {
            live |= &partition.live_sectors;
        }
    }
    Ok(live)
}
