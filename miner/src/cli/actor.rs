use cid::multibase::Base;
use clap::Subcommand;
use lotus_actors::{BytesDe, encode, miner};
use lotus_messages::{Controls, MessageKind, Roles, preference};
use lotus_node_client::api::{MinerInfo, TipSetKey};
use lotus_node_client::json::{address_text, parse_address};
use lotus_node_client::{Node, NodeError};
use lotus_runtime::Fault;
use lotus_types::{Address, Kind, TokenAmount};
use multiaddr::Multiaddr;
use serde::Serialize;

use super::order::{Spend, fil, repeated, spend};
use super::{Cx, print, print_json, table};
use crate::config::MinerConfig;
use crate::run::from_node;

const HEAD: &TipSetKey = &TipSetKey::HEAD;
/// Names the order.
const WITHDRAW: &str = "withdraw";
/// Bytes of a peer id at most. Source: builtin-actors, policy.rs, MAX_PEER_ID_LENGTH.
const PEER_ID_MAX: usize = 128;
/// Bytes of all multiaddresses at most. Source: builtin-actors, policy.rs, MAX_MULTIADDR_DATA.
const MULTIADDRS_MAX: usize = 1024;

#[derive(Debug, Subcommand)]
pub(super) enum ActorCommand {
    /// Look at and change who may send the miner's messages
    ///
    /// Control addresses pay for messages, so that each purpose has its own funds and its own
    /// nonces: WindowPoSt never waits behind a pre-commit. `[messages.addresses]` says which is for
    /// what; those that it does not name are for WindowPoSt.
    #[command(subcommand)]
    Control(ControlCommand),
    /// Pay out what the miner actor has available, to its beneficiary
    Withdraw {
        /// FIL, such as 1.5; everything that is available by default
        #[arg(value_parser = fil)]
        amount: Option<TokenAmount>,
        /// Do it; without this the amounts are shown
        #[arg(long)]
        really_do_it: bool,
    },
    /// Publish the libp2p peer id that clients dial
    SetPeerId {
        /// Peer id in base58, such as 12D3KooW...
        peer_id: String,
        /// Do it; without this the amounts are shown
        #[arg(long)]
        really_do_it: bool,
    },
    /// Publish where clients reach this provider; replaces what was published
    SetAddrs {
        /// Multiaddresses, such as /dns4/sp.example/tcp/24001 or /ip4/203.0.113.7/tcp/24001
        #[arg(required_unless_present = "unset")]
        addresses: Vec<Multiaddr>,
        /// Publish none
        #[arg(long, conflicts_with = "addresses")]
        unset: bool,
        /// Do it; without this the amounts are shown
        #[arg(long)]
        really_do_it: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ControlCommand {
    /// Show owner, worker and control addresses: their funds, their keys, and what they pay for
    List,
    /// Replace the control addresses; the owner pays
    Set {
        /// The new control addresses, all of them; none at all removes the present ones
        #[arg(value_parser = address)]
        addresses: Vec<Address>,
        /// Do it; without this the change and the amounts are shown
        #[arg(long)]
        really_do_it: bool,
    },
}

fn address(text: &str) -> Result<Address, String> {
    parse_address(text).map_err(|e| format!("{e}: expected an address such as t01000"))
}

pub(super) async fn actor(cx: &Cx, command: ActorCommand) -> Result<(), Fault> {
    let (node, cfg) = cx.node()?;
    let actor = cfg.actor()?.address();
    let info = node
        .state_miner_info(actor, HEAD)
        .await
        .map_err(|e| from_node(&e))?;
    match command {
        ActorCommand::Control(ControlCommand::List) => list(cx, &node, &cfg, &info).await,
        ActorCommand::Control(ControlCommand::Set {
            addresses,
            really_do_it,
        }) => set(cx, &node, actor, &info, addresses, really_do_it).await,
        ActorCommand::Withdraw {
            amount,
            really_do_it,
        } => withdraw(cx, &node, actor, &info, amount, really_do_it).await,
        ActorCommand::SetPeerId {
            peer_id,
            really_do_it,
        } => {
            let new_id = Base::Base58Btc.decode(&peer_id).ok();
            let new_id = new_id.filter(|id| !id.is_empty() && id.len() <= PEER_ID_MAX);
            let new_id = new_id.ok_or_else(|| {
                Fault::new(
                    Kind::Data,
                    format!("{peer_id:?} is no peer id"),
                    "give it in base58, as `lotus-markets` prints it",
                )
            })?;
            let action = vec![
                ("Old peer id".into(), info.peer_id.unwrap_or_default()),
                ("New peer id".into(), peer_id),
            ];
            let message = Spend {
                name: "set-peer-id",
                action,
                details: Default::default(),
                asked: None,
                from: None,
                miner: actor,
                method: miner::CHANGE_PEER_ID,
                params: encode(&miner::ChangePeerIDParams { new_id }),
                max_fee: None,
            };
            spend(cx, message, really_do_it).await
        }
        ActorCommand::SetAddrs {
            addresses,
            unset: _,
            really_do_it,
        } => {
            let message = set_addrs(actor, &info, &addresses)?;
            spend(cx, message, really_do_it).await
        }
    }
}

fn set_addrs(miner: Address, info: &MinerInfo, addresses: &[Multiaddr]) -> Result<Spend, Fault> {
    let bytes: usize = addresses.iter().map(Multiaddr::len).sum();
    if bytes > MULTIADDRS_MAX || addresses.iter().any(Multiaddr::is_empty) {
        return Err(Fault::new(
            Kind::Data,
            format!("the chain takes {MULTIADDRS_MAX} bytes of addresses, none of them empty"),
            "give fewer or shorter multiaddresses",
        ));
    }
    let list = |all: Vec<String>| match all.is_empty() {
        true => "none".to_owned(),
        false => all.join(", "),
    };
    let old = info.multiaddrs.iter().map(|raw| {
        let known = Multiaddr::try_from(raw.clone());
        known.map_or_else(|e| format!("unreadable ({e})"), |a| a.to_string())
    });
    let new = addresses.iter().map(ToString::to_string);
    Ok(Spend {
        name: "set-addrs",
        action: vec![
            ("Old addresses".into(), list(old.collect())),
            ("New addresses".into(), list(new.collect())),
        ],
        details: Default::default(),
        asked: None,
        from: None,
        miner,
        method: miner::CHANGE_MULTIADDRS,
        params: encode(&miner::ChangeMultiaddrsParams {
            new_multi_addrs: addresses.iter().map(|a| BytesDe(a.to_vec())).collect(),
        }),
        max_fee: None,
    })
}

/// An address that may act for the miner.
#[derive(Serialize)]
struct Controller {
    id: String,
    /// owner, worker, control; one address may be several.
    roles: Vec<&'static str>,
    /// Key form; absent for an address that can not sign, such as a multisig.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// The node's wallet has the key, or the remote one if there is one.
    in_wallet: bool,
    balance: String,
    /// The kinds of messages that it pays for, and its place among those who may.
    pays: Vec<Pays>,
}

#[derive(Serialize)]
struct Pays {
    kind: &'static str,
    place: usize,
}

async fn list(cx: &Cx, node: &Node, cfg: &MinerConfig, info: &MinerInfo) -> Result<(), Fault> {
    let roles = Roles {
        owner: info.owner,
        worker: info.worker,
        control: info.control_addresses.clone(),
    };
    let named = &cfg.messages.addresses;
    let controls = Controls {
        pre_commit: ids(node, &named.pre_commit_control).await?,
        commit: ids(node, &named.commit_control).await?,
        terminate: ids(node, &named.terminate_control).await?,
        publish: ids(node, &named.deal_publish_control).await?,
        disable_owner_fallback: named.disable_owner_fallback,
        disable_worker_fallback: named.disable_worker_fallback,
    };
    let mut all: Vec<Address> = Vec::new();
    for a in [roles.owner, roles.worker].iter().chain(&roles.control) {
        if !all.contains(a) {
            all.push(*a);
        }
    }
    let mut rows = Vec::new();
    for a in all {
        let key = match node.state_account_key(a, HEAD).await {
            Ok(key) => Some(key),
            Err(NodeError::Rpc { .. }) => None,
            Err(e) => return Err(from_node(&e)),
        };
        let in_wallet = match key {
            Some(key) => node.wallet_has(key).await.map_err(|e| from_node(&e))?,
            None => false,
        };
        let balance = node.wallet_balance(a).await.map_err(|e| from_node(&e))?;
        let place = |kind: MessageKind| {
            let list = preference(kind, &roles, &controls);
            let place = list.iter().position(|p| *p == a)? + 1;
            let kind = kind.as_str();
            Some(Pays { kind, place })
        };
        let is = |role, yes: bool| yes.then_some(role);
        rows.push(Controller {
            id: address_text(&a),
            roles: [
                is("owner", a == roles.owner),
                is("worker", a == roles.worker),
                is("control", roles.control.contains(&a)),
            ]
            .into_iter()
            .flatten()
            .collect(),
            key: key.as_ref().map(address_text),
            in_wallet,
            balance: balance.to_string(),
            pays: MessageKind::ALL.into_iter().filter_map(place).collect(),
        });
    }
    if cx.json {
        return print_json(&rows);
    }
    let mut out = table(&["Address", "Role", "Key", "In wallet", "FIL", "Pays for"]);
    for r in rows {
        let pays: Vec<String> = r
            .pays
            .iter()
            .map(|p| match p.place {
                1 => p.kind.into(),
                n => format!("{} ({n}.)", p.kind),
            })
            .collect();
        out.add_row([
            r.id,
            r.roles.join(", "),
            r.key.unwrap_or_else(|| "can not sign".into()),
            if r.in_wallet { "yes" } else { "no" }.into(),
            r.balance,
            pays.join(", "),
        ]);
    }
    print(&format!(
        "{out}\n(2.) pays only when the addresses before it can not"
    ))
}

/// ID addresses of configured ones, as far as the chain knows them.
async fn ids(node: &Node, texts: &[String]) -> Result<Vec<Address>, Fault> {
    let mut ids = Vec::new();
    for address in texts.iter().filter_map(|t| parse_address(t).ok()) {
        match node.state_lookup_id(address, HEAD).await {
            Ok(id) => ids.push(id),
            Err(NodeError::Rpc { .. }) => {
                eprintln!(
                    "{} is configured, but not on the chain",
                    address_text(&address)
                );
            }
            Err(e) => return Err(from_node(&e)),
        }
    }
    Ok(ids)
}

async fn set(
    cx: &Cx,
    node: &Node,
    actor: Address,
    info: &MinerInfo,
    addresses: Vec<Address>,
    really: bool,
) -> Result<(), Fault> {
    let mut new = Vec::new();
    for address in addresses {
        let id = node
            .state_lookup_id(address, HEAD)
            .await
            .map_err(|e| match e {
                NodeError::Rpc { .. } => Fault::new(
                    Kind::Data,
                    format!("{} is not on the chain", address_text(&address)),
                    "send it some FIL first: that makes the account",
                ),
                e => from_node(&e),
            })?;
        let key = node.state_account_key(id, HEAD).await;
        let key = key.map_err(|e| from_node(&e))?;
        if !node.wallet_has(key).await.map_err(|e| from_node(&e))? {
            eprintln!(
                "the wallet that signs has no key of {}: it will pay for nothing until it is imported",
                address_text(&id)
            );
        }
        if !new.contains(&id) {
            new.push(id);
        }
    }
    let list = |all: Vec<&Address>| {
        let texts: Vec<String> = all.into_iter().map(address_text).collect();
        if texts.is_empty() {
            "none".to_owned()
        } else {
            texts.join(", ")
        }
    };
    let old = &info.control_addresses;
    let action = vec![
        (
            "Added".into(),
            list(new.iter().filter(|a| !old.contains(a)).collect()),
        ),
        (
            "Removed".into(),
            list(old.iter().filter(|a| !new.contains(a)).collect()),
        ),
        ("Control addresses".into(), list(new.iter().collect())),
    ];
    let params = encode(&miner::ChangeWorkerAddressParams {
        // The method changes both; the worker stays.
        new_worker: info.worker,
        new_control_addresses: new,
    });
    let message = Spend {
        name: "control-set",
        action,
        details: Default::default(),
        asked: None,
        from: Some(info.owner),
        miner: actor,
        method: miner::CHANGE_WORKER_ADDRESS,
        params,
        max_fee: None,
    };
    spend(cx, message, really).await
}

async fn withdraw(
    cx: &Cx,
    node: &Node,
    actor: Address,
    info: &MinerInfo,
    amount: Option<TokenAmount>,
    really: bool,
) -> Result<(), Fault> {
    // What is available changes; what was asked for makes the order.
    let asked = amount
        .as_ref()
        .map_or_else(|| "everything".into(), |a| a.atto().to_string());
    if repeated(cx, WITHDRAW, asked.as_bytes(), really).await? {
        return Ok(());
    }
    let available = node
        .state_miner_available_balance(actor, HEAD)
        .await
        .map_err(|e| from_node(&e))?;
    let amount = amount.unwrap_or_else(|| available.clone());
    if amount > available || !amount.is_positive() {
        return Err(Fault::new(
            Kind::Data,
            format!("{actor} has {available} FIL available, not {amount}"),
            "withdraw less; deposits, pledges, vesting rewards and debt are not available",
        ));
    }
    let to = info.beneficiary.unwrap_or(info.owner);
    let action = vec![
        ("Withdraws".into(), format!("{amount} FIL")),
        ("Beneficiary".into(), address_text(&to)),
        (
            "Left available".into(),
            format!("{} FIL", &available - &amount),
        ),
    ];
    let message = Spend {
        name: WITHDRAW,
        action,
        details: Default::default(),
        asked: Some(asked),
        from: Some(info.owner),
        miner: actor,
        method: miner::WITHDRAW_BALANCE,
        params: encode(&miner::WithdrawBalanceParams {
            amount_requested: amount,
        }),
        max_fee: None,
    };
    spend(cx, message, really).await
}
