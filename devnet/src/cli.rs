//! The command line.

use std::path::{Path, PathBuf};

use cid::Cid;
use clap::{Parser, Subcommand, ValueEnum};
use lotus_node_client::json::parse_address;
use lotus_runtime::Fault;
use lotus_tokens::{Perm, Tokens};
use lotus_types::{Address, Kind, SectorSize, TokenAmount};

use crate::config::Config;
use crate::{remote, run, wallet};

/// An embedded Filecoin chain behind Lotus JSON-RPC that verifies every proof.
#[derive(Debug, Parser)]
#[command(
    name = "lotus-devnet",
    version,
    after_help = "\
Start a chain and point a miner at it:
  lotus-devnet run
  export FULLNODE_API_INFO=$(lotus-devnet auth api-info)

A fast one, with proving periods of a minute and a half and 8 MiB sectors:
  lotus-devnet --repo /tmp/net run --fast --block-time-ms 750 --sector-size 8MiB

The first run keeps its settings in REPO/config.toml; later runs need no options."
)]
pub(crate) struct Args {
    /// Where the chain, the wallet, the token and the settings live.
    #[arg(long, global = true, env = "LOTUS_HUB_DEVNET", value_name = "DIR")]
    repo: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the chain until SIGINT or SIGTERM.
    Run(run::Options),
    /// Show the head, the miners and the pending messages of a running devnet.
    Status {
        /// One JSON object instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Make a running devnet misbehave.
    #[command(subcommand)]
    Fault(FaultCommand),
    /// The keys of a running devnet.
    #[command(subcommand)]
    Wallet(WalletCommand),
    /// Run a wallet of its own, with the API of `lotus-wallet`, until SIGINT or SIGTERM.
    ///
    /// For trying out keys that are not in the node. Its keys, its token and its address are in
    /// REPO/wallet; with that folder as --repo, `wallet new`, `import` and `export` are for its
    /// keys.
    RemoteWallet(wallet::Options),
    /// Set DataCap aside for a piece, as a client of verified deals does.
    Allocate(Allocate),
    /// Tokens for the RPC.
    #[command(subcommand)]
    Auth(AuthCommand),
    /// The settings.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// What can go wrong on command.
#[derive(Debug, Subcommand)]
pub(crate) enum FaultCommand {
    /// Replace the last DEPTH tipsets by others. Their messages return to the pool.
    Reorg {
        /// Tipsets.
        depth: u64,
    },
    /// Leave the next ROUNDS epochs without a block.
    NullRounds {
        /// Epochs.
        rounds: u64,
    },
    /// Refuse the next COUNT messages that are pushed.
    RefuseMessages {
        /// Messages.
        count: u64,
        /// The words of the refusal.
        #[arg(long, default_value = "refused by command")]
        why: String,
    },
    /// Keep the base fee high.
    BaseFee {
        /// Least base fee, attoFIL per unit of gas.
        atto: u64,
        /// Epochs for which it lasts.
        epochs: u64,
    },
    /// Stop the clock: no block is made or accepted.
    StopBlocks,
    /// Start the clock again.
    ResumeBlocks,
    /// Change the block time.
    BlockTime {
        /// Milliseconds per epoch.
        ms: u64,
    },
    /// Cut every connection.
    DropConnections {
        /// Milliseconds for which new connections are refused.
        #[arg(long, default_value_t = 0)]
        down_ms: u64,
    },
    /// Answer the next COUNT calls with an error; 0 ends it.
    FailCalls {
        /// Calls.
        count: u64,
    },
    /// Delay every answer; 0 ends it.
    Delay {
        /// Milliseconds.
        ms: u64,
    },
}

/// What can be done with keys.
#[derive(Debug, Subcommand)]
pub(crate) enum WalletCommand {
    /// Addresses with their balances; the default one first.
    List {
        /// JSON instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Make a key.
    New {
        /// Kind of key.
        #[arg(value_enum, default_value_t = KeyKind::Secp256k1)]
        kind: KeyKind,
    },
    /// Balance of an address, FIL.
    Balance {
        /// Address.
        #[arg(value_parser = address)]
        address: Address,
    },
    /// Print a key as Lotus does, in hex.
    Export {
        /// Address.
        #[arg(value_parser = address)]
        address: Address,
    },
    /// Take a key that `export`, or Lotus, printed.
    Import {
        /// The key in hex.
        key: String,
    },
    /// Send FIL from the devnet's own funds.
    Fund {
        /// Receiver; an unknown key address becomes an account.
        #[arg(value_parser = address)]
        address: Address,
        /// Whole FIL.
        fil: u32,
    },
}

/// Kinds of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeyKind {
    /// BLS12-381: owners, workers.
    Bls,
    /// secp256k1: clients.
    Secp256k1,
}

/// An allocation to make.
#[derive(Debug, clap::Args)]
pub(crate) struct Allocate {
    /// The client, whose key the devnet's wallet holds.
    #[arg(long, value_parser = address)]
    pub(crate) client: Address,
    /// The storage provider.
    #[arg(long, value_parser = address, default_value = "t01000")]
    pub(crate) provider: Address,
    /// The piece's version 1 CID (baga6ea4sea…).
    #[arg(long)]
    pub(crate) piece: Cid,
    /// The piece's padded size, bytes.
    #[arg(long)]
    pub(crate) size: u64,
    /// Least epochs for which a sector must keep it; 180 days by default.
    #[arg(long, default_value_t = 518_400)]
    pub(crate) term_min: i64,
    /// Most epochs for which it counts; 5 years by default.
    #[arg(long, default_value_t = 5_256_000)]
    pub(crate) term_max: i64,
    /// Epochs from now in which it must be claimed; 30 days by default.
    #[arg(long, default_value_t = 86_400)]
    pub(crate) claim_within: i64,
}

#[derive(Debug, Subcommand)]
enum AuthCommand {
    /// Print a token.
    CreateToken {
        /// What it allows: read, write, sign or admin, each with the ones before it.
        #[arg(long, default_value = "admin")]
        perm: Perm,
    },
    /// Print TOKEN:MULTIADDR for FULLNODE_API_INFO.
    ApiInfo {
        /// What the token allows.
        #[arg(long, default_value = "admin")]
        perm: Perm,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default.
    Default,
    /// Check REPO/config.toml and the environment.
    Check,
}

fn address(text: &str) -> Result<Address, String> {
    parse_address(text).map_err(|e| format!("{e}: expected an address such as t01000"))
}

/// Parses a sector size for clap.
pub(crate) fn sector_size(text: &str) -> Result<SectorSize, String> {
    text.parse()
        .map_err(|e: lotus_types::BadSize| e.to_string())
}

/// attoFIL as FIL.
pub(crate) fn fil(amount: &TokenAmount) -> String {
    format!("{amount} FIL")
}

/// Does what the arguments say.
pub(crate) fn execute(args: Args) -> Result<(), Fault> {
    let repo = args
        .repo
        .or_else(default_repo)
        .ok_or_else(|| Fault::new(Kind::Config, "no home directory", "give --repo DIR"))?;
    match args.command {
        Command::Run(options) => run::run(&repo, &options),
        Command::Config(ConfigCommand::Default) => {
            print!("{}", lotus_settings::default_toml::<Config>());
            Ok(())
        }
        Command::Config(ConfigCommand::Check) => {
            let cfg = Config::load(&repo)?;
            cfg.chain.policy.check().map_err(|why| {
                Fault::new(Kind::Config, why, "correct chain.policy in config.toml")
            })?;
            println!("ok");
            Ok(())
        }
        Command::Auth(AuthCommand::CreateToken { perm }) => {
            println!("{}", token(&repo, perm)?);
            Ok(())
        }
        Command::Auth(AuthCommand::ApiInfo { perm }) => {
            let api = std::fs::read_to_string(repo.join("api"));
            let api = api.map_err(|_| never_ran(&repo))?;
            println!("{}:{}", token(&repo, perm)?, api.trim());
            Ok(())
        }
        Command::Status { json } => remote::status(&repo, json),
        Command::Fault(what) => remote::fault(&repo, &what),
        Command::Wallet(what) => remote::wallet(&repo, &what),
        Command::RemoteWallet(options) => wallet::run(&repo.join("wallet"), &options),
        Command::Allocate(what) => remote::allocate(&repo, &what),
    }
}

fn token(repo: &Path, perm: Perm) -> Result<String, Fault> {
    if !repo.join("token").exists() {
        return Err(never_ran(repo));
    }
    Ok(Tokens::open(repo)?.issue(&perm.up_to()))
}

/// For commands that need what the first run makes.
pub(crate) fn never_ran(repo: &Path) -> Fault {
    Fault::new(
        Kind::Config,
        format!("no devnet ran in {}", repo.display()),
        "start it with `lotus-devnet run`, or give its --repo",
    )
}

fn default_repo() -> Option<PathBuf> {
    Some(PathBuf::from(std::env::var_os("HOME")?).join(".lotus-hub/devnet"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
        let parse = |s: &str| Args::try_parse_from(s.split(' '));
        assert!(parse("lotus-devnet run --sector-size 8MiB --deadlines 6").is_ok());
        assert!(parse("lotus-devnet run --sector-size 7MiB").is_err());
        assert!(parse("lotus-devnet run --proofs groth16-post").is_ok());
        assert!(parse("lotus-devnet run --proofs none").is_err());
        assert!(parse("lotus-devnet wallet balance t01000 --repo /x").is_ok());
        assert!(parse("lotus-devnet wallet balance nobody").is_err());
        assert!(parse("lotus-devnet remote-wallet --listen 127.0.0.1:0").is_ok());
        assert!(parse("lotus-devnet auth create-token --perm all").is_err());
    }
}
