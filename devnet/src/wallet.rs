//! `lotus-devnet remote-wallet`.

use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use lotus_devnet::rpc::{Wallet, WalletServer};
use lotus_runtime::admin::{Admin, AdminConfig};
use lotus_runtime::telemetry::TelemetryConfig;
use lotus_runtime::{CancellationToken, Fault, Health, addr_file, notify, signals, telemetry};
use lotus_tokens::Tokens;
use tokio::task::JoinSet;

use crate::run::{fault, multiaddr, until_one_ends};

/// Options of `remote-wallet`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Address of the API. Port 0 picks a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:1777")]
    listen: SocketAddr,
}

/// Runs the wallet of a folder until a signal.
pub(crate) fn run(dir: &Path, options: &Options) -> Result<(), Fault> {
    // The folder holds keys.
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)?;
    let wallet = Wallet::open(dir).map_err(fault)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let _telemetry = telemetry::init("devnet-wallet", &TelemetryConfig::default())?;
        signals::run_until_signal(|stop| serve(dir, options.listen, wallet, stop)).await
    })
}

async fn serve(
    dir: &Path,
    listen: SocketAddr,
    wallet: Wallet,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let (health, run_dir) = (Health::default(), dir.join("run"));
    let admin = Admin::bind(&AdminConfig::default(), health.clone(), &run_dir, "admin").await?;
    let rpc = WalletServer::bind(listen, wallet, Tokens::open(dir)?).await?;
    let addr = rpc.local_addr()?;
    std::fs::write(dir.join("api"), multiaddr(addr))?;
    addr_file::write(&run_dir, "api", &addr.to_string())?;
    health.set("rpc", Ok(addr.to_string()));
    tracing::info!(%addr, dir = %dir.display(), "wallet runs");

    let mut parts = JoinSet::new();
    let down = stop.child_token();
    parts.spawn(admin.serve(down.clone()));
    parts.spawn(rpc.serve(down.clone()));
    notify::ready();
    until_one_ends(parts, &down).await
}
