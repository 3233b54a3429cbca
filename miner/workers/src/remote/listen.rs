//! The hub's port for workers on other hosts.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use lotus_runtime::{Fault, addr_file};
use tokio::net::TcpListener;

use super::identity::{Authority, WorkerName};

/// Binds the address and tells it in `run/workers.addr`.
pub(crate) async fn bind(addr: SocketAddr, run_dir: &Path) -> Result<TcpListener, Fault> {
    let listener = TcpListener::bind(addr)
        .await
        .map_err(|e| Fault::bind(&addr, "workers.listen", &e))?;
    addr_file::write(run_dir, "workers", &listener.local_addr()?.to_string())?;
    Ok(listener)
}

/// Who is at the other end of a connection. Whether its certificate counts is looked up at each
/// call, so that revoking takes effect at once.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) authority: Arc<Authority>,
    pub(crate) shown: lotus_identity::Peer,
}

impl Peer {
    /// The worker, if its certificate counts now.
    pub(crate) fn worker(&self) -> Result<WorkerName, String> {
        self.authority.worker(&self.shown.certificate)
    }
}
