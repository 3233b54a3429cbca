use std::collections::BTreeMap;

use hub_proto::v1::{IdentityRequest, SafeToRestartRequest, WatchCapacityRequest};
use lotus_node_client::api::TipSetKey;
use lotus_node_client::json::address_text;
use lotus_runtime::Fault;
use serde::Serialize;

use super::parts::{Parts, lines, parts};
use super::{Cx, bytes, from_status, messages, print, print_json, sectors, table};
use crate::api::ONLY_LOOKS;
use crate::control;
use crate::orders::{MessagesView, StopView};
use crate::run::from_node;

#[derive(Serialize)]
struct Info {
    actor: String,
    network: String,
    sector_size: u64,
    height: i64,
    generation: u64,
    proof_mode: String,
    /// What each part of the hub says of itself.
    parts: Parts,
    sectors: BTreeMap<String, u64>,
    free_bytes: u64,
    waiting_pieces: u32,
    safe_to_restart: bool,
    busy: Vec<String>,
    /// Kinds of messages that are stopped, and why.
    stopped_messages: Vec<StopView>,
    /// Absent when the node does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    chain: Option<OnChain>,
}

#[derive(Serialize)]
struct OnChain {
    raw_power: String,
    quality_power: String,
    network_power: String,
    has_min_power: bool,
    /// Sectors that are faulty, and those of them that are declared as recovered.
    faulty_sectors: u64,
    recovering_sectors: u64,
    available_balance: String,
    worker: String,
    worker_balance: String,
}

pub(super) async fn info(cx: &Cx) -> Result<(), Fault> {
    let hub = cx.hub().await?;
    let identity = hub.hub().identity(hub.request(IdentityRequest {})).await;
    let identity = identity.map_err(from_status)?.into_inner();
    let mut question = hub.request(SafeToRestartRequest::default());
    let yes = tonic::metadata::MetadataValue::from_static("1");
    question.metadata_mut().insert(ONLY_LOOKS, yes);
    let safe = hub.hub().safe_to_restart(question).await;
    let safe = safe.map_err(from_status)?.into_inner();
    let room = hub
        .capacity()
        .watch(hub.request(WatchCapacityRequest {}))
        .await;
    let room = room.map_err(from_status)?.into_inner().message().await;
    let room = room.map_err(from_status)?.unwrap_or_default();
    let mut by_state: BTreeMap<String, u64> = BTreeMap::new();
    for s in sectors::all(&hub).await? {
        *by_state.entry(s.state).or_default() += 1;
    }
    let socket = cx.control_socket()?;
    let messages = control::call(&socket, reqwest::Method::GET, "/v1/messages").await;
    let money = messages.map(|m: MessagesView| m.money);
    let (told, unheard) = match parts(cx).await {
        Ok(told) => (told, None),
        Err(e) => (Parts::new(), Some(e)),
    };
    let chain = match on_chain(cx).await {
        Ok(chain) => Some(chain),
        Err(e) => {
            eprintln!("the full node does not answer: {e}");
            None
        }
    };
    let info = Info {
        actor: identity.actor,
        network: identity.network,
        sector_size: identity.sector_size,
        height: identity.height,
        generation: hub.hello().generation,
        proof_mode: identity.proof_mode,
        parts: told,
        sectors: by_state,
        free_bytes: room.free_bytes,
        waiting_pieces: room.waiting_pieces,
        safe_to_restart: safe.safe,
        busy: safe.reasons,
        stopped_messages: money.as_ref().map(|m| m.stops.clone()).unwrap_or_default(),
        chain,
    };
    if cx.json {
        return print_json(&info);
    }
    let mut out = table(&["Miner", &info.actor]);
    let mut row = |name: &str, value: String| {
        out.add_row([name.to_owned(), value]);
    };
    row(
        "Network",
        format!("{}, height {}", info.network, info.height),
    );
    row("Sector size", bytes(info.sector_size));
    row(
        "Hub",
        format!("generation {}, {} proofs", info.generation, info.proof_mode),
    );
    if let Some(c) = &info.chain {
        let least = if c.has_min_power {
            ""
        } else {
            " (below the least for mining)"
        };
        row(
            "Power",
            format!(
                "{} of {}{least}",
                size(&c.quality_power),
                size(&c.network_power)
            ),
        );
        row("Faults", faults(c));
        row("Available balance", c.available_balance.clone());
        row("Worker", format!("{} with {}", c.worker, c.worker_balance));
    }
    match unheard {
        Some(e) => row("Parts", e.to_string()),
        None => {
            for (name, text) in lines(&info.parts) {
                row(&name, text);
            }
        }
    }
    let sectors: Vec<String> = info
        .sectors
        .iter()
        .map(|(s, n)| format!("{s}: {n}"))
        .collect();
    row(
        "Sectors",
        if sectors.is_empty() {
            "none".into()
        } else {
            sectors.join("\n")
        },
    );
    row(
        "Room for pieces",
        format!(
            "{}, {} wait for a sector",
            bytes(info.free_bytes),
            info.waiting_pieces
        ),
    );
    row(
        "Messages",
        match money.as_ref().map(messages::stops) {
            Ok(lines) if lines.is_empty() => "none is stopped".into(),
            Ok(lines) => lines.join("\n"),
            Err(e) => e.to_string(),
        },
    );
    row(
        "Safe to restart",
        if info.safe_to_restart {
            "yes".into()
        } else {
            info.busy.join("\n")
        },
    );
    print(&out.to_string())
}

async fn on_chain(cx: &Cx) -> Result<OnChain, Fault> {
    let (node, cfg) = cx.node()?;
    let (miner, head) = (cfg.actor()?.address(), TipSetKey::default());
    let power = node
        .state_miner_power(miner, &head)
        .await
        .map_err(|e| from_node(&e))?;
    let faulty = node.state_miner_faults(miner, &head).await;
    let recovering = node.state_miner_recoveries(miner, &head).await;
    let available = node.state_miner_available_balance(miner, &head).await;
    let info = node
        .state_miner_info(miner, &head)
        .await
        .map_err(|e| from_node(&e))?;
    let balance = node
        .wallet_balance(info.worker)
        .await
        .map_err(|e| from_node(&e))?;
    Ok(OnChain {
        raw_power: power.miner_power.raw_byte_power.to_string(),
        quality_power: power.miner_power.quality_adj_power.to_string(),
        network_power: power.total_power.quality_adj_power.to_string(),
        has_min_power: power.has_min_power,
        faulty_sectors: faulty.map_err(|e| from_node(&e))?.len(),
        recovering_sectors: recovering.map_err(|e| from_node(&e))?.len(),
        available_balance: format!("{} FIL", available.map_err(|e| from_node(&e))?),
        worker: address_text(&info.worker),
        worker_balance: format!("{balance} FIL"),
    })
}

fn faults(c: &OnChain) -> String {
    match c.faulty_sectors {
        0 => "none".into(),
        n => format!(
            "{n} sectors, {} of them declared as recovered: see `lotus-miner proving faults`",
            c.recovering_sectors
        ),
    }
}

/// Power as operators read it; beyond 16 EiB as it is.
fn size(power: &str) -> String {
    power.parse().map_or_else(|_| power.to_owned(), bytes)
}
