use std::path::PathBuf;

use lotus_node_client::api::TipSetKey;
use lotus_node_client::json::address_text;
use lotus_node_client::{Client, FullNode as _, NodeConfig, NodeError};
use lotus_proofs::ProofMode;
use lotus_runtime::Fault;
use lotus_tokens::Tokens;
use lotus_types::{ActorId, Kind, SectorSize};
use serde::Serialize;

use super::{Cx, print, print_json};
use crate::config::{ENV_PREFIX, MinerConfig};
use crate::network::proofs_of;
use crate::run::from_node;

#[derive(Debug, clap::Args)]
pub(super) struct InitArgs {
    /// The miner actor, such as t01000
    #[arg(long)]
    actor: ActorId,
    /// Repo of the full node on this host; its files `token` and `api` are read at each start
    #[arg(long, value_name = "DIR", conflicts_with = "node_api")]
    node_repo: Option<PathBuf>,
    /// The full node as TOKEN:MULTIADDR or TOKEN:URL. The variable FULLNODE_API_INFO overrides it
    /// and --node-repo, now and at each start, as with Lotus
    #[arg(
        long,
        value_name = "INFO",
        env = "LOTUS_MINER__NODE__API",
        hide_env_values = true
    )]
    node_api: Option<String>,
}

#[derive(Serialize)]
struct Done {
    repo: String,
    actor: String,
    sector_size: String,
    worker: String,
    network: String,
    proofs: ProofMode,
}

/// Checks the actor on chain and writes config.toml. Done again, it corrects the entries.
pub(super) async fn init(cx: &Cx, args: InitArgs) -> Result<(), Fault> {
    let repo = cx.repo()?;
    let old: MinerConfig = lotus_settings::load(Some(&repo.config()), ENV_PREFIX)?;
    if !old.miner.actor.is_empty() && old.actor()? != args.actor {
        return Err(Fault::new(
            Kind::Config,
            format!(
                "{} is the repo of {}",
                repo.root().display(),
                old.miner.actor
            ),
            "give each actor a --repo of its own",
        ));
    }
    let mut node = old.node;
    if let Some(dir) = &args.node_repo {
        node.repo = std::path::absolute(expand(dir))?;
        node.api.clear();
    } else if let Some(api) = &args.node_api {
        node.api.clone_from(api);
        node.repo = PathBuf::new();
    }
    let found = look_up(&node, args.actor).await?;

    repo.create()?;
    let mut file: toml::Table = match std::fs::read_to_string(repo.config()) {
        Ok(text) => toml::from_str(&text)
            .map_err(|e| Fault::new(Kind::Config, e.to_string(), "correct config.toml"))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => toml::Table::new(),
        Err(e) => return Err(e.into()),
    };
    set(&mut file, "miner", "actor", &args.actor.to_string());
    set(&mut file, "miner", "sector_size", found.size.name());
    set(&mut file, "proofs", "mode", found.proofs.as_str());
    if args.node_repo.is_some() || args.node_api.is_some() {
        set(&mut file, "node", "repo", &node.repo.display().to_string());
        set(&mut file, "node", "api", &node.api);
    }
    let text = format!(
        "# The hub of {}. `lotus-miner config default` prints every key with its default.\n\n{file}",
        args.actor
    );
    repo.write_config(&text)?;
    // The secret of the tokens, so that they can be made before the first start.
    Tokens::open(repo.root())?;

    let done = Done {
        repo: repo.root().display().to_string(),
        actor: args.actor.to_string(),
        sector_size: found.size.name().into(),
        worker: found.worker,
        network: found.network,
        proofs: found.proofs,
    };
    if cx.json {
        return print_json(&done);
    }
    print(&format!(
        "{} on {}: {} sectors, {} proofs, worker {}\nwrote {}\nnext: lotus-miner run --repo {}",
        done.actor,
        done.network,
        done.sector_size,
        done.proofs,
        done.worker,
        repo.config().display(),
        done.repo
    ))
}

/// What the chain says about an actor.
pub(super) struct Found {
    pub(super) size: SectorSize,
    pub(super) worker: String,
    pub(super) network: String,
    /// What the network takes.
    pub(super) proofs: ProofMode,
}

/// Looks the actor up, and whether its worker's key is there to sign with.
pub(super) async fn look_up(cfg: &NodeConfig, actor: ActorId) -> Result<Found, Fault> {
    let node = Client::connect(cfg).map_err(|e| from_node(&e))?;
    let head = TipSetKey::default();
    let network = node.state_network_name().await.map_err(|e| from_node(&e))?;
    let info = node
        .state_miner_info(actor.address(), &head)
        .await
        .map_err(|e| match e {
            NodeError::Rpc { message, .. } => Fault::new(
                Kind::Config,
                format!("{network} has no miner {actor}: {message}"),
                "check --actor, or whether the node is synced and on the right network",
            ),
            other => from_node(&other),
        })?;
    let size = SectorSize::try_from(info.sector_size).map_err(|e| {
        Fault::new(
            Kind::Config,
            e.to_string(),
            "use a release that knows this size",
        )
    })?;
    let worker = node
        .state_account_key(info.worker, &head)
        .await
        .map_err(|e| from_node(&e))?;
    if !node.wallet_has(worker).await.map_err(|e| from_node(&e))? {
        let (wallet, fix) = match node.wallet() {
            None => (
                "the node's wallet".to_owned(),
                "import it into the node's wallet (`lotus wallet import`): blocks and messages are signed there",
            ),
            Some(at) => (
                format!("the remote wallet {at}"),
                "import it there, or correct [node] wallet: elections and messages are signed there",
            ),
        };
        let worker = address_text(&worker);
        return Err(Fault::new(
            Kind::Config,
            format!("{wallet} lacks the key of worker {worker}"),
            fix,
        ));
    }
    let node = node.check().await.map_err(|e| from_node(&e))?;
    Ok(Found {
        proofs: proofs_of(&node.version),
        size,
        worker: address_text(&worker),
        network,
    })
}

fn set(file: &mut toml::Table, section: &str, key: &str, value: &str) {
    let entry = file
        .entry(section)
        .or_insert_with(|| toml::Value::Table(toml::Table::new()));
    if let toml::Value::Table(table) = entry {
        table.insert(key.into(), toml::Value::String(value.into()));
    }
}

fn expand(path: &std::path::Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}
