//! `lotus-devnet run`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::sync::Arc;

use lotus_devnet::rpc::Server;
use lotus_devnet::{Chain, ChainError};
use lotus_proofs::params::{self, Circuit};
use lotus_proofs::{ProofError, ProofMode};
use lotus_runtime::admin::Admin;
use lotus_runtime::{CancellationToken, Fault, Health, addr_file, notify, signals, telemetry};
use lotus_tokens::Tokens;
use lotus_types::{Kind, SectorSize};
use tokio::task::JoinSet;

use crate::cli::sector_size;
use crate::config::Config;

/// Options of `run`. Each overrides the setting of the same name.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Address of the RPC. Port 0 picks a free one.
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Address of health and metrics. Port 0 picks a free one.
    #[arg(long, value_name = "ADDR")]
    admin_listen: Option<SocketAddr>,
    /// The constants for demonstrations: 6 deadlines of 20 epochs, elections that look back 10
    /// epochs. Else those of the Lotus 2k devnet.
    #[arg(long)]
    fast: bool,
    /// Milliseconds per epoch [Lotus 2k devnet: 4000]. May differ from run to run.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    block_time_ms: Option<u64>,
    /// Epochs per deadline [Lotus 2k devnet: 60].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(6..))]
    deadline_epochs: Option<i64>,
    /// Deadlines per proving period [Lotus 2k devnet: 48].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(3..=1000))]
    deadlines: Option<u64>,
    /// Epochs from a pre-commit to its seed [Lotus 2k devnet: 10].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    seed_delay: Option<i64>,
    /// Epochs that an election looks back for power [Lotus 2k devnet: 900].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    winning_lookback: Option<i64>,
    /// Sector size of the miner t01000 [Lotus 2k devnet: 2KiB].
    #[arg(long, value_parser = sector_size)]
    sector_size: Option<SectorSize>,
    /// Which proofs the chain takes [vanilla]. vanilla: full Merkle openings, no parameter files.
    /// groth16-post: SNARKs for WindowPoSt and WinningPoSt. groth16: SNARKs for seals and updates
    /// too, as on public networks. SNARKs need the files that `lotus-miner params` tells of.
    #[arg(long, value_name = "MODE")]
    proofs: Option<ProofMode>,
    /// The network's name.
    #[arg(long)]
    network_name: Option<String>,
}

impl Options {
    fn apply(&self, cfg: &mut Config) {
        let chain = &mut cfg.chain;
        if self.fast {
            let block_time_ms = chain.policy.block_time_ms;
            chain.policy = lotus_devnet::Policy::fast().with_block_time_ms(block_time_ms);
        }
        let policy = &mut chain.policy;
        if self.deadlines.is_some() || self.deadline_epochs.is_some() {
            *policy = policy.clone().with_deadlines(
                self.deadlines.unwrap_or(policy.deadlines),
                self.deadline_epochs.unwrap_or(policy.challenge_window),
            );
        }
        set(&mut policy.block_time_ms, self.block_time_ms);
        set(&mut policy.pre_commit_challenge_delay, self.seed_delay);
        set(&mut policy.winning_lookback, self.winning_lookback);
        set(&mut chain.sector_size, self.sector_size);
        set(&mut chain.proofs, self.proofs);
        set(&mut chain.network_name, self.network_name.clone());
        set(&mut cfg.listen, self.listen);
        set(&mut cfg.admin.listen, self.admin_listen);
    }
}

fn set<T>(at: &mut T, v: Option<T>) {
    if let Some(v) = v {
        *at = v;
    }
}

/// Runs the devnet of a repo until a signal.
pub(crate) fn run(repo: &Path, options: &Options) -> Result<(), Fault> {
    let mut cfg = Config::load(repo)?;
    options.apply(&mut cfg);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let _telemetry = telemetry::init("devnet", &cfg.telemetry)?;
        signals::run_until_signal(|stop| serve(repo, cfg, stop)).await
    })
}

async fn serve(repo: &Path, cfg: Config, stop: CancellationToken) -> Result<(), Fault> {
    let proofs = cfg.chain.proofs;
    params::require(Circuit::of(proofs), cfg.chain.sector_size).map_err(no_proofs)?;
    // The repo holds keys.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(repo)?;
    let chain = {
        let (repo, cfg) = (repo.to_owned(), cfg.chain.clone());
        let open = move || Chain::open(&repo, cfg, Arc::new(proofs));
        let opened = tokio::task::spawn_blocking(open).await;
        opened.map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "report this"))?
    }
    .map_err(fault)?;
    cfg.save_first(repo)?;

    let health = Health::default();
    let run_dir = repo.join("run");
    let admin = Admin::bind(&cfg.admin, health.clone(), &run_dir, "admin").await?;
    let rpc = Server::bind(cfg.listen, chain.clone(), Tokens::open(repo)?).await?;
    let addr = rpc.local_addr()?;
    std::fs::write(repo.join("api"), multiaddr(addr))?;
    addr_file::write(&run_dir, "api", &addr.to_string())?;
    health.set("rpc", Ok(addr.to_string()));
    tracing::info!(%addr, repo = %repo.display(), miner = "t01000", height = %chain.head().height,
        %proofs, block_time_ms = chain.block_time_ms(), "devnet runs");

    let mut parts: JoinSet<Result<(), Fault>> = JoinSet::new();
    let down = stop.child_token();
    parts.spawn(admin.serve(down.clone()));
    parts.spawn(rpc.serve(down.clone()));
    let clock = (chain.clone(), down.clone());
    parts.spawn(async move { clock.0.run(clock.1).await.map_err(fault) });
    notify::ready();
    until_one_ends(parts, &down).await
}

/// The first part that ends, ends the others.
pub(crate) async fn until_one_ends(
    mut parts: JoinSet<Result<(), Fault>>,
    down: &CancellationToken,
) -> Result<(), Fault> {
    let mut result = Ok(());
    while let Some(part) = parts.join_next().await {
        let part = part.unwrap_or_else(|e| {
            Err(Fault::new(
                Kind::Fatal,
                format!("devnet: {e}"),
                "report this with the log",
            ))
        });
        result = result.and(part);
        down.cancel();
    }
    result
}

fn no_proofs(e: ProofError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

pub(crate) fn fault(e: ChainError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

/// The address as Lotus writes it to its repo. An address that means "any" is reached over
/// loopback.
pub(crate) fn multiaddr(addr: SocketAddr) -> String {
    match addr.ip() {
        IpAddr::V4(ip) => {
            let ip = if ip.is_unspecified() {
                Ipv4Addr::LOCALHOST
            } else {
                ip
            };
            format!("/ip4/{ip}/tcp/{}/http", addr.port())
        }
        IpAddr::V6(ip) => {
            let ip = if ip.is_unspecified() {
                Ipv6Addr::LOCALHOST
            } else {
                ip
            };
            format!("/ip6/{ip}/tcp/{}/http", addr.port())
        }
    }
}
