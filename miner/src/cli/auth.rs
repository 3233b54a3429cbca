use clap::Subcommand;
use lotus_runtime::Fault;
use lotus_tokens::{Perm, Tokens};
use lotus_types::Kind;
use serde::Serialize;

use super::{Cx, print, print_json};
use crate::config::MinerConfig;
use crate::repo::Repo;

#[derive(Debug, Subcommand)]
pub(super) enum AuthCommand {
    /// Make a token
    ///
    /// Each permission includes those before it: read looks, write changes things, sign uses keys,
    /// admin does everything and makes tokens. Give each tool the least that it needs; `read`
    /// needs no token at all on this host. Tokens do not expire: to revoke them all, delete
    /// `jwt.key` from the repo and restart the hub.
    CreateToken {
        /// One of: read, write, sign, admin
        #[arg(long, value_name = "PERM")]
        perm: Perm,
    },
    /// Make a token and print it with the address, as tools of Lotus read it from MINER_API_INFO
    ApiInfo {
        /// One of: read, write, sign, admin
        #[arg(long, value_name = "PERM")]
        perm: Perm,
    },
}

#[derive(Serialize)]
struct Made {
    token: String,
    perms: Vec<Perm>,
    /// Multiaddr of the API.
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
}

/// Works without a running hub: the secret is in the repo.
pub(super) fn auth(cx: &Cx, command: &AuthCommand) -> Result<(), Fault> {
    let repo = cx.repo()?;
    if !repo.is_initialised() {
        return Err(repo.no_hub());
    }
    let (perm, address) = match command {
        AuthCommand::CreateToken { perm } => (*perm, None),
        AuthCommand::ApiInfo { perm } => (*perm, Some(address(&repo)?)),
    };
    let perms = perm.up_to();
    let token = Tokens::open(repo.root())?.issue(&perms);
    if cx.json {
        return print_json(&Made {
            token,
            perms,
            address,
        });
    }
    match address {
        Some(address) => print(&format!("MINER_API_INFO={token}:{address}")),
        None => print(&token),
    }
}

/// Where the hub answers, or last did; before its first start, where it will.
fn address(repo: &Repo) -> Result<String, Fault> {
    let cfg = MinerConfig::load(&repo.config())?;
    let Some(wanted) = cfg.lotus_api.address()? else {
        return Err(Fault::new(
            Kind::Config,
            "the Lotus API is off",
            "set lotus_api.listen, for example to 127.0.0.1:2345, and restart the hub",
        ));
    };
    match std::fs::read_to_string(repo.root().join("api")) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(_) if wanted.port() != 0 => Ok(lotus_api::multiaddr(wanted, cfg.lotus_api.is_https())),
        Err(_) => Err(Fault::new(
            Kind::Config,
            "the port of the Lotus API is chosen when the hub starts, and it did not start yet",
            "start `lotus-miner run`, or set a port in lotus_api.listen",
        )),
    }
}
