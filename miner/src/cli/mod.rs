//! The command line.

mod actor;
mod audit;
mod auth;
mod backup;
mod cost;
mod credentials;
mod doctor;
mod elsewhere;
mod info;
mod info_all;
mod init;
mod kept;
mod messages;
mod mining;
mod on_chain;
mod order;
mod params;
mod parts;
mod pieces;
mod proving;
mod proving_work;
mod sealing_jobs;
mod sectors;
mod sectors_act;
mod sectors_compact;
mod sectors_expired;
mod sectors_extend;
mod storage;
mod workers;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use hub_proto::{HubClient, HubError};
use lotus_node_client::{Client, Node};
use lotus_runtime::{Fault, signals, trace};
use lotus_types::Kind;
use lotus_workers::{WorkerArgs, worker_main};
use serde::Serialize;

use crate::config::MinerConfig;
use crate::repo::{REPO_VAR, Repo, default_repo};
use crate::run::{from_node, run};

/// Threads of the hub for calls and journal work; proofs run in processes of their own.
const BLOCKING_THREADS: usize = 64;
/// How long the running hub may take to answer a command.
const ANSWER: Duration = Duration::from_secs(30);
/// How long the runtime waits for a write to a slow disk at the end.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// The hub of a Filecoin storage provider: sealing, proving, mining.
///
/// Start with `lotus-miner init --actor t01000 --node-repo ~/.lotus-hub/devnet`, then
/// `lotus-miner run`. Every other command asks the running hub.
#[derive(Debug, Parser)]
#[command(name = "lotus-miner", version, max_term_width = 100)]
pub struct Args {
    /// The hub's directory. Without it and its variable, that of LOTUS_MINER_PATH, else
    /// ~/.lotus-hub/miner. The repo of a Go lotus-miner is refused and never touched
    #[arg(long, global = true, env = REPO_VAR, value_name = "DIR")]
    repo: Option<String>,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prepare a repo: check the actor on chain, write config.toml
    Init(init::InitArgs),
    /// Run the hub until SIGTERM or Ctrl-C
    Run(RunArgs),
    /// Run a worker process; the hub starts these itself
    #[command(hide = true)]
    Worker(WorkerArgs),
    /// Show the actor, its power and balance, what works and what does not, faults, the sectors,
    /// the room, and whether a restart is safe
    Info {
        #[command(subcommand)]
        more: Option<InfoCommand>,
    },
    /// Look at sectors and push them on
    #[command(subcommand)]
    Sectors(sectors::SectorsCommand),
    /// Attach and look at the folders that sectors are in, and move sectors between them
    #[command(subcommand)]
    Storage(storage::StorageCommand),
    /// Look at the workers: what they do, what waits for them
    #[command(subcommand)]
    Sealing(sealing_jobs::SealingCommand),
    /// Let workers on other hosts seal for this hub
    #[command(subcommand)]
    Workers(workers::WorkersCommand),
    /// Write the one file that a spoke on another host starts from
    ///
    /// It lets one spoke join, once: whoever uses it first gets the identity, which is good for a
    /// quarter of an hour and renews itself. Keep it secret. A new bundle for the same instance
    /// makes void what that had before.
    JoinBundle(credentials::JoinBundleArgs),
    /// List and revoke the identities of spokes on other hosts
    #[command(subcommand)]
    Credentials(credentials::CredentialsCommand),
    /// Look at the audit log: who changed what
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Show which service may call which method of the hub API
    Api(credentials::ApiArgs),
    /// Look at the pieces that were handed over
    #[command(subcommand)]
    Pieces(pieces::PiecesCommand),
    /// The parameter files of SNARKs: list, verify, make
    ///
    /// Proofs with proofs.mode = "vanilla", for a devnet, need none. They are in the folder that
    /// FIL_PROOFS_PARAMETER_CACHE names, else in /var/tmp/filecoin-proof-parameters, where Lotus
    /// has them too.
    #[command(subcommand)]
    Params(params::ParamsCommand),
    /// Look at WindowPoSt: deadlines, faults, checks, recoveries
    #[command(subcommand)]
    Proving(proving::ProvingCommand),
    /// Look at block production
    #[command(subcommand)]
    Mining(mining::MiningCommand),
    /// Control addresses, withdrawals, the peer id
    #[command(subcommand)]
    Actor(actor::ActorCommand),
    /// Look at messages and fees, and end a stop
    #[command(subcommand)]
    Messages(messages::MessagesCommand),
    /// Make tokens for tools that speak Lotus' JSON-RPC
    #[command(subcommand)]
    Auth(auth::AuthCommand),
    /// Write a backup of the hub's journal, configuration and token secret
    ///
    /// The running hub writes the file and reads it back before it says that it is good. It holds
    /// what can not be made anew: which sectors there are, their randomness and proofs, the pieces'
    /// places, messages in flight, and the log of mined blocks. Keep it on another disk, and as
    /// secret as the repo.
    Backup(backup::BackupArgs),
    /// Make a repo from a backup, into an empty --repo
    ///
    /// For a host that is lost. Without --really-do-it it only checks the backup.
    Restore(backup::RestoreArgs),
    /// Print or check the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Check everything that a start needs, and say what to do about what is missing
    Doctor,
    /// Moved to lotus-markets: deals with clients
    #[command(disable_help_flag = true)]
    StorageDeals(Moved),
    /// Moved to lotus-markets: retrievals
    #[command(disable_help_flag = true)]
    RetrievalDeals(Moved),
}

#[derive(Debug, Subcommand)]
enum InfoCommand {
    /// Run every command that looks, for a report: info, doctor, sectors, jobs, deadlines, ...
    All,
}

/// A build for measuring has more.
#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Run the services of the spokes and the prove workers in this process, to be measured
    #[cfg(feature = "all-in-one")]
    #[arg(long, requires = "markets_repo")]
    all_in_one: bool,
    /// Folder of the services' configuration and state
    #[cfg(feature = "all-in-one")]
    #[arg(long)]
    markets_repo: Option<PathBuf>,
    /// Services to run; all when left out
    #[cfg(feature = "all-in-one")]
    #[arg(long, value_delimiter = ',')]
    services: Option<Vec<String>>,
}

#[cfg(feature = "all-in-one")]
impl RunArgs {
    fn all_in_one(self) -> Option<crate::all_in_one::AllInOne> {
        let markets = self.markets_repo.filter(|_| self.all_in_one)?;
        Some(crate::all_in_one::AllInOne {
            markets,
            services: self.services,
        })
    }
}

/// Whatever an operator typed by habit.
#[derive(Debug, clap::Args)]
struct Moved {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every key with its default
    Default,
    /// Check config.toml and the environment, and print what is in force
    Check,
}

/// Runs the command.
pub fn start(args: Args) -> Result<(), Fault> {
    let (cx, command) = (
        Cx {
            json: args.json,
            repo: args.repo.unwrap_or_else(default_repo),
        },
        args.command,
    );
    if let Some(done) = elsewhere::run(&cx, &command) {
        return done;
    }
    match command {
        // These make runtimes of their own.
        Command::Worker(worker) => worker_main(&worker),
        #[cfg_attr(
            not(feature = "all-in-one"),
            expect(unused_variables, reason = "empty")
        )]
        Command::Run(args) => {
            let repo = Repo::at(&cx.repo)?;
            // Before anything is locked or bound: a typo must not cost a running hub.
            let cfg = if repo.is_initialised() {
                MinerConfig::load(&repo.config())?
            } else {
                return repo.open().map(|_| ());
            };
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .max_blocking_threads(BLOCKING_THREADS)
                .build()?;
            #[cfg(feature = "all-in-one")]
            let all_in_one = args.all_in_one();
            let result = runtime.block_on(signals::run_until_signal(|stop| {
                run(
                    repo,
                    cfg,
                    stop,
                    #[cfg(feature = "all-in-one")]
                    all_in_one,
                )
            }));
            runtime.shutdown_timeout(LAST_WRITES);
            result
        }
        Command::Config(ConfigCommand::Default) => {
            print(&lotus_settings::default_toml::<MinerConfig>())
        }
        Command::Config(ConfigCommand::Check) => check_config(&cx),
        Command::Auth(command) => auth::auth(&cx, &command),
        Command::Params(command) => params::params(&cx, &command),
        Command::Workers(command) => workers::workers(&cx, &command),
        Command::JoinBundle(args) => credentials::join_bundle(&cx, &args),
        Command::Api(args) => credentials::api(&cx, &args),
        Command::Audit(command) => audit::audit(&cx, &command),
        Command::Restore(args) => backup::restore(&cx, &args),
        Command::StorageDeals(_) => Err(moved("storage-deals", "deals")),
        Command::RetrievalDeals(_) => Err(moved("retrieval-deals", "retrieval")),
        other => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(async {
                match other {
                    Command::Init(args) => init::init(&cx, args).await,
                    Command::Info { more: None } => info::info(&cx).await,
                    Command::Info {
                        more: Some(InfoCommand::All),
                    } => info_all::all(&cx).await,
                    Command::Sectors(command) => sectors::sectors(&cx, command).await,
                    Command::Storage(command) => storage::storage(&cx, command).await,
                    Command::Sealing(command) => sealing_jobs::sealing(&cx, command).await,
                    Command::Backup(args) => backup::backup(&cx, args).await,
                    Command::Pieces(command) => pieces::pieces(&cx, command).await,
                    Command::Proving(command) => proving::proving(&cx, command).await,
                    Command::Mining(command) => mining::mining(&cx, command).await,
                    Command::Actor(command) => actor::actor(&cx, command).await,
                    Command::Messages(command) => messages::messages(&cx, command).await,
                    Command::Credentials(command) => credentials::credentials(&cx, command).await,
                    Command::Doctor => doctor::doctor(&cx).await,
                    Command::Worker(_)
                    | Command::Run(_)
                    | Command::Config(_)
                    | Command::Auth(_)
                    | Command::Params(_)
                    | Command::Workers(_)
                    | Command::JoinBundle(_)
                    | Command::Api(_)
                    | Command::Audit(_)
                    | Command::Restore(_)
                    | Command::StorageDeals(_)
                    | Command::RetrievalDeals(_) => Ok(()),
                }
            }),
    }
}

/// Deals and retrievals are of spokes, in processes of their own.
fn moved(command: &str, service: &str) -> Fault {
    Fault::new(
        Kind::Config,
        format!("`{command}` is no command of the hub: the {service} spoke has it"),
        format!(
            "run it on the host of the {service} spoke: `lotus-markets --help` lists what that \
             knows. What was handed over to the hub: `lotus-miner pieces list`"
        ),
    )
}

fn check_config(cx: &Cx) -> Result<(), Fault> {
    let repo = Repo::at(&cx.repo)?;
    let mut cfg = MinerConfig::load(&repo.config())?;
    // Output is copied into tickets and chats; the tokens must not go along.
    for info in [&mut cfg.node.api, &mut cfg.node.wallet] {
        if let Some((_, address)) = info.split_once(':') {
            *info = format!("<token>:{address}");
        }
    }
    if cx.json {
        return print_json(&cfg);
    }
    let text = toml::to_string_pretty(&cfg)
        .map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "report this"))?;
    print(&format!(
        "# {} is good. In force, environment included:\n{text}",
        repo.config().display()
    ))
}

/// What every command knows.
struct Cx {
    json: bool,
    repo: String,
}

impl Cx {
    fn repo(&self) -> Result<Repo, Fault> {
        Repo::at(&self.repo)
    }

    /// The running hub.
    async fn hub(&self) -> Result<HubClient, Fault> {
        HubClient::on_this_host(
            &self.repo()?.hub_socket(),
            ANSWER,
            "cli",
            &std::process::id().to_string(),
            trace::client_interceptor,
        )
        .await
        .map_err(from_hub)
    }

    fn control_socket(&self) -> Result<PathBuf, Fault> {
        Ok(self.repo()?.control_socket())
    }

    /// The full node that the hub uses, and the hub's configuration.
    fn node(&self) -> Result<(Node, MinerConfig), Fault> {
        let cfg = MinerConfig::load(&self.repo()?.config())?;
        let node = Client::connect(&cfg.node).map_err(|e| from_node(&e))?;
        Ok((node, cfg))
    }
}

fn from_hub(e: HubError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

fn from_status(s: tonic::Status) -> Fault {
    from_hub(s.into())
}

fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(head.to_vec());
    table
}

/// Prints to standard output. A reader that has gone away (`| head`) is no error.
fn print(text: &str) -> Result<(), Fault> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| {
        if text.ends_with('\n') {
            Ok(())
        } else {
            out.write_all(b"\n")
        }
    }) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(()),
    }
}

fn print_json(value: &impl Serialize) -> Result<(), Fault> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "report this"))?;
    print(&text)
}

/// Bytes as operators read them: 8.0 MiB.
#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if n < 1024 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A moment in UTC.
fn time(unix_ms: u64) -> String {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(String::new, |t| t.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn what_operators_type_by_habit_is_understood() {
        Args::command().debug_assert();
        for line in [
            "info",
            "info all --json",
            "sectors list",
            "sectors status --on-chain-info 7",
            "sectors status --log 7",
            "storage list",
            "storage attach /mnt/a",
            "storage attach /mnt/a --init --store --weight 5 --max-storage 4TiB --groups a,b",
            "storage attach /mnt/a --read-only",
            "storage detach 1a2b --really-do-it",
            "sectors pledge --count 3 --really-do-it",
            "sectors seal 7 --really-do-it",
            "sectors snap-up 7 --really-do-it",
            "sectors batching commit",
            "sectors batching precommit --publish-now --really-do-it",
            "messages resume commit --really-do-it",
            "messages status order/withdraw/01",
            "storage redeclare --id 1a2b",
            "storage find 7",
            "storage move 7 --to 1a2b",
            "mining list",
            "mining allow",
            "mining allow --reason gone --really-do-it",
            "sealing jobs",
            "sealing workers --json",
            "sealing sched-diag",
            "sealing abort 12",
            "auth create-token --perm admin",
            "auth api-info --perm read",
            "backup /b/hub.backup",
            "backup --offline hub.backup",
            "backup --verify hub.backup",
            "restore hub.backup --really-do-it --repo /new",
            "params list --sector-size 32GiB",
            "params verify --json",
            "params generate --post-only",
            "storage-deals list --verbose",
            "retrieval-deals --help",
        ] {
            let words = std::iter::once("lotus-miner").chain(line.split(' '));
            let parsed = Args::try_parse_from(words);
            assert!(parsed.is_ok(), "{line}: {:?}", parsed.err());
        }
        for line in [
            "auth create-token",
            "auth create-token --perm root",
            "storage attach /mnt/a --store",
            "storage move 7",
            "params generate --sector-size 3KiB",
            "sealing abort",
            "sectors batching commit --really-do-it",
            "mining allow --really-do-it",
        ] {
            let words = std::iter::once("lotus-miner").chain(line.split(' '));
            assert!(Args::try_parse_from(words).is_err(), "{line}");
        }
    }

    #[test]
    fn deals_are_pointed_to_lotus_markets() {
        let words = ["lotus-miner", "storage-deals", "list", "--verbose"];
        let e = start(Args::try_parse_from(words).unwrap()).unwrap_err();
        assert_eq!(e.kind, Kind::Config);
        assert!(e.fix.contains("lotus-markets --help"), "{e:?}");
    }
}
