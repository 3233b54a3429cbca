//! Lotus' StorageMiner JSON-RPC, for the tools, exporters, dashboards and Boost.
//!
//! `Filecoin.*` over HTTP POST and WebSocket at `/rpc/v0`, with Lotus' tokens
//! ([`lotus_tokens`]): who shows none may read. Only methods that this hub can answer truthfully
//! exist ([`METHODS`]); every other one is "method not found". Names, parameters and fields agree
//! with the OpenRPC document that Lotus publishes, which a test compares.
//!
//! Pieces come in by the two-phase hand-off that spokes use, and raw pieces go out below `/remote`;
//! nothing here removes, terminates or spends. What does goes over the control socket.

mod auth;
mod config;
mod deal;
mod error;
mod machine;
mod methods;
mod paths;
mod remote;
mod server;
mod streams;
mod types;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use lotus_node_client::Node;
use lotus_node_client::api::TipSet;
use lotus_runtime::Fault;
use lotus_sealing::{PathMeta, SealingError, SectorRecord, SectorState};
use lotus_types::{ActorId, Address, PieceCid, SectorId, SectorNumber, SectorSize};
use lotus_workers::{JobInfo, WorkerInfo};

pub use config::LotusApiConfig;
pub use deal::NewPiece;
pub use methods::{METHODS, Method};
pub use server::{LotusApi, multiaddr};
pub use streams::Data;

/// What the hub does for a while.
pub type Work<'a, T> = BoxFuture<'a, Result<T, Fault>>;

/// The hub, as far as it is asked about.
pub trait Hub: Send + Sync + 'static {
    /// The miner.
    fn miner(&self) -> ActorId;
    /// Size of its sectors.
    fn sector_size(&self) -> SectorSize;
    /// Who sends which messages.
    fn senders(&self) -> Senders;
    /// The state of every sector.
    fn sectors(&self) -> Vec<(SectorNumber, SectorState)>;
    /// One sector, with its log.
    fn sector(&self, number: SectorNumber) -> Result<Option<SectorRecord>, SealingError>;
    /// Where sectors are kept.
    fn storage(&self) -> Vec<StoragePath>;
    /// What workers do, and what waits for them.
    fn jobs(&self) -> Vec<JobInfo>;
    /// The attached workers.
    fn workers(&self) -> Vec<WorkerInfo>;
    /// The head that mining builds on, once the node was reached.
    fn head(&self) -> Option<Arc<TipSet>>;
    /// Length of an epoch, once the node told it.
    fn block_delay(&self) -> Option<Duration>;
    /// The full node.
    fn node(&self) -> Node;
    /// The raw file of a piece, if it is complete now.
    fn raw_file(&self, piece: &PieceCid) -> Option<PathBuf>;
    /// Makes the raw file of a piece anew from its sector, and waits for it.
    fn unseal(&self, piece: PieceCid) -> Work<'_, ()>;
    /// Looks anew what is in one storage path, or in all.
    fn redeclare(&self, path: Option<String>) -> Work<'_, ()>;
    /// Takes a piece over, and waits until a sector has it: which, and at which padded offset. The
    /// data is not read when the deal was handed over before.
    fn add_piece(&self, piece: NewPiece, data: Data) -> Work<'_, (SectorNumber, u64)>;
}

/// Addresses for messages, beside the worker.
#[derive(Clone, Debug, Default)]
pub struct Senders {
    /// For pre-commits.
    pub pre_commit: Vec<Address>,
    /// For prove-commits.
    pub commit: Vec<Address>,
    /// For terminations.
    pub terminate: Vec<Address>,
    /// For publishing deals.
    pub publish: Vec<Address>,
    /// Whether the owner sends when no other address can.
    pub owner_falls_in: bool,
    /// Whether the worker does.
    pub worker_falls_in: bool,
}

/// A folder with sectors.
#[derive(Clone, Debug)]
pub struct StoragePath {
    /// Its id.
    pub id: String,
    /// Where it is.
    pub path: PathBuf,
    /// What it is for; unknown of a path that was not there yet.
    pub settings: Option<PathMeta>,
    /// Bytes of its disk.
    pub capacity: u64,
    /// Bytes that its disk has free.
    pub available: u64,
    /// Bytes of those that are promised.
    pub reserved: u64,
    /// Bytes that sectors take, in a path with a limit.
    pub used: u64,
    /// Whether it takes new files now.
    pub takes_new: bool,
    /// The sectors in it, and which files of each: the sum of
    /// [`FileType::bit`](lotus_sealing::FileType::bit)s.
    pub sectors: Vec<(SectorId, u32)>,
}

impl StoragePath {
    /// Bytes that new files may take.
    #[must_use]
    pub fn room(&self) -> u64 {
        let free = self.available.saturating_sub(self.reserved);
        match self.settings.as_ref().map_or(0, |s| s.max_storage) {
            0 => free,
            max => free.min(max.saturating_sub(self.used).saturating_sub(self.reserved)),
        }
    }
}
