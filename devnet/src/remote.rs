//! Commands to a running devnet, over its RPC.

use std::path::Path;
use std::sync::Arc;

use cid::Cid;
use lotus_node_client::api::{NetworkParams, TipSetKey};
use lotus_node_client::json::{Lotus, ToLotus, address_text};
use lotus_node_client::{Client, FullNode, NodeConfig, NodeError};
use lotus_runtime::Fault;
use lotus_types::{EpochDelta, Kind, TokenAmount};
use serde_json::{Value, json};

use crate::cli::{Allocate, FaultCommand, KeyKind, WalletCommand, fil, never_ran};

fn as_fault(e: NodeError) -> Fault {
    let fix = match e.kind() {
        Kind::Transport => "start it with `lotus-devnet run`, or give its --repo".into(),
        _ => e.fix(),
    };
    Fault::new(e.kind(), e.to_string(), fix)
}

/// Runs `work` with a client of the repo's devnet.
fn with_node<F, Fut>(repo: &Path, work: F) -> Result<(), Fault>
where
    F: FnOnce(Arc<Client>) -> Fut,
    Fut: Future<Output = Result<(), NodeError>>,
{
    let read = |name: &str| {
        let text = std::fs::read_to_string(repo.join(name));
        text.map_err(|_| never_ran(repo))
    };
    let cfg = NodeConfig {
        api: format!("{}:{}", read("token")?.trim(), read("api")?.trim()),
        ..NodeConfig::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let node = Client::connect(&cfg).map_err(as_fault)?;
        work(node).await.map_err(as_fault)
    })
}

fn lotus<T: ToLotus>(v: T) -> Value {
    serde_json::to_value(Lotus(v)).unwrap_or_default()
}

/// `status`.
pub(crate) fn status(repo: &Path, as_json: bool) -> Result<(), Fault> {
    with_node(repo, async |node| {
        let key = TipSetKey::HEAD;
        let head = node.chain_head().await?;
        let version = node.version().await?;
        let params: NetworkParams = node.state_get_network_params().await?;
        let pending = node.mpool_pending(&key).await?.len();
        let mut miners = Vec::new();
        for miner in node.state_list_miners(&key).await? {
            let power = node.state_miner_power(miner, &key).await?;
            let info = node.state_miner_info(miner, &key).await?;
            miners.push(json!({
                "miner": address_text(&miner),
                "sector_size": info.sector_size,
                "power": power.miner_power.quality_adj_power.to_string(),
                "network_power": power.total_power.quality_adj_power.to_string(),
            }));
        }
        let status = json!({
            "version": version.version,
            "network": params.network_name,
            "block_time_ms": params.block_delay().as_millis().to_string().parse::<u64>().ok(),
            "height": head.height,
            "head": head.cids.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "base_fee": head.min_ticket_block().parent_base_fee.atto().to_string(),
            "pending_messages": pending,
            "miners": miners,
        });
        if as_json {
            println!("{status}");
            return Ok(());
        }
        println!("network   {} ({})", params.network_name, version.version);
        println!("endpoint  {}", node.endpoint());
        println!(
            "height    {} (an epoch every {:?})",
            head.height,
            params.block_delay()
        );
        for (cid, block) in head.cids.iter().zip(&head.blocks) {
            println!("block     {cid} by {}", address_text(&block.miner));
        }
        println!("pending   {pending} messages");
        for m in &miners {
            println!(
                "miner     {}  power {} of {} bytes",
                m["miner"].as_str().unwrap_or_default(),
                m["power"].as_str().unwrap_or_default(),
                m["network_power"].as_str().unwrap_or_default(),
            );
        }
        Ok(())
    })
}

fn method_of(what: &FaultCommand) -> (&'static str, Vec<Value>) {
    match what {
        FaultCommand::Reorg { depth } => ("Devnet.Reorg", vec![json!(depth)]),
        FaultCommand::NullRounds { rounds } => ("Devnet.NullRounds", vec![json!(rounds)]),
        FaultCommand::RefuseMessages { count, why } => {
            ("Devnet.RefuseMessages", vec![json!(count), json!(why)])
        }
        FaultCommand::BaseFee { atto, epochs } => {
            let floor = lotus(TokenAmount::from_atto(*atto));
            ("Devnet.RaiseBaseFee", vec![floor, json!(epochs)])
        }
        FaultCommand::StopBlocks => ("Devnet.StopBlocks", vec![]),
        FaultCommand::ResumeBlocks => ("Devnet.ResumeBlocks", vec![]),
        FaultCommand::BlockTime { ms } => ("Devnet.SetBlockTime", vec![json!(ms)]),
        FaultCommand::DropConnections { down_ms } => {
            ("Devnet.DropConnections", vec![json!(down_ms)])
        }
        FaultCommand::FailCalls { count } => ("Devnet.FailCalls", vec![json!(count)]),
        FaultCommand::Delay { ms } => ("Devnet.Delay", vec![json!(ms)]),
    }
}

/// `fault`.
pub(crate) fn fault(repo: &Path, what: &FaultCommand) -> Result<(), Fault> {
    let (method, params) = method_of(what);
    with_node(repo, async |node| {
        let answer = node.request(method, params).await?;
        match answer["Height"].as_i64() {
            Some(height) => println!("the head is at {height} now"),
            None => println!("ok"),
        }
        Ok(())
    })
}

/// `wallet`.
pub(crate) fn wallet(repo: &Path, what: &WalletCommand) -> Result<(), Fault> {
    let imported = match what {
        WalletCommand::Import { key } => exported(key)?,
        _ => Value::Null,
    };
    with_node(repo, async |node| match what {
        WalletCommand::List { json } => list(&node, *json).await,
        WalletCommand::New { kind } => {
            let kind = match kind {
                KeyKind::Bls => "bls",
                KeyKind::Secp256k1 => "secp256k1",
            };
            let address = node
                .request("Filecoin.WalletNew", vec![kind.into()])
                .await?;
            println!("{}", address.as_str().unwrap_or_default());
            Ok(())
        }
        WalletCommand::Balance { address } => {
            println!("{}", fil(&node.wallet_balance(*address).await?));
            Ok(())
        }
        WalletCommand::Export { address } => {
            let key = node
                .request("Filecoin.WalletExport", vec![lotus(address)])
                .await?;
            println!("{}", hex::encode(key.to_string()));
            Ok(())
        }
        WalletCommand::Import { .. } => {
            let address = node
                .request("Filecoin.WalletImport", vec![imported])
                .await?;
            println!("{}", address.as_str().unwrap_or_default());
            Ok(())
        }
        WalletCommand::Fund { address, fil } => {
            let amount = TokenAmount::from_whole(*fil);
            let cid = node
                .request("Devnet.Fund", vec![lotus(address), lotus(amount)])
                .await?;
            println!(
                "sent with message {}",
                cid["/"].as_str().unwrap_or_default()
            );
            Ok(())
        }
    })
}

/// Reads what `wallet export` prints.
fn exported(key: &str) -> Result<Value, Fault> {
    let bytes = hex::decode(key.trim()).map_err(|e| e.to_string());
    let key = bytes.and_then(|b| serde_json::from_slice(&b).map_err(|e| e.to_string()));
    key.map_err(|e| {
        Fault::new(
            Kind::Data,
            format!("no exported key: {e}"),
            "give the hex text that `lotus-devnet wallet export` or `lotus wallet export` printed",
        )
    })
}

async fn list(node: &Client, as_json: bool) -> Result<(), NodeError> {
    let default = node.wallet_default_address().await.ok();
    let mut rows = Vec::new();
    let mut addresses = node.wallet_list().await?;
    addresses.sort_by_key(|a| Some(*a) != default);
    for a in addresses {
        rows.push((a, node.wallet_balance(a).await?));
    }
    if as_json {
        let rows: Vec<Value> = rows
            .iter()
            .map(|(a, b)| {
                json!({"address": lotus(a), "balance": lotus(b), "default": Some(*a) == default})
            })
            .collect();
        println!("{}", Value::from(rows));
        return Ok(());
    }
    for (a, b) in rows {
        let mark = if Some(a) == default {
            "  (default)"
        } else {
            ""
        };
        println!("{}  {}{mark}", address_text(&a), fil(&b));
    }
    Ok(())
}

/// `allocate`.
pub(crate) fn allocate(repo: &Path, what: &Allocate) -> Result<(), Fault> {
    with_node(repo, async |node| {
        let key = TipSetKey::HEAD;
        let before = node.state_get_allocations(what.client, &key).await?;
        let params = vec![
            lotus(what.client),
            lotus(what.provider),
            lotus(what.piece),
            json!(what.size),
            json!(what.term_min),
            json!(what.term_max),
            json!(what.claim_within),
        ];
        let answer = node.request("Devnet.Allocate", params).await?;
        let bad = |why: String| NodeError::Decode {
            method: "Devnet.Allocate".into(),
            why,
        };
        let cid: Lotus<Cid> = serde_json::from_value(answer).map_err(|e| bad(e.to_string()))?;
        let found = node.state_wait_msg(cid.0, 0, EpochDelta(-1), false).await?;
        if found.receipt.exit_code != 0 {
            let code = found.receipt.exit_code;
            return Err(NodeError::Rpc {
                method: "allocate".into(),
                code,
                message: format!("the verified registry refused the allocation: exit code {code}"),
            });
        }
        let after = node
            .state_get_allocations(what.client, &found.tip_set)
            .await?;
        for (id, a) in after.iter().filter(|(id, _)| !before.contains_key(id)) {
            println!(
                "allocation {id}  piece {}  expires at epoch {}",
                a.data, a.expiration
            );
        }
        Ok(())
    })
}
