//! Lotus' StorageMiner JSON-RPC, for the tools, exporters and dashboards that operators have.
//!
//! `Filecoin.*` over HTTP POST and WebSocket at `/rpc/v0`, with Lotus' tokens
//! ([`lotus_tokens`]): who shows none may read. Only methods that this hub can answer truthfully
//! exist ([`METHODS`]); every other one is "method not found". Names, parameters and fields agree
//! with the OpenRPC document that Lotus publishes, which a test compares.
//!
//! Nothing here changes the hub: what changes it goes over the control socket or gRPC.

mod auth;
mod config;
mod error;
mod machine;
mod methods;
mod server;
mod types;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lotus_node_client::Node;
use lotus_node_client::api::TipSet;
use lotus_sealing::{SealingError, SectorRecord, SectorState};
use lotus_types::{ActorId, Address, SectorId, SectorNumber, SectorSize};
use lotus_workers::{JobInfo, WorkerInfo};

pub use config::LotusApiConfig;
pub use methods::{METHODS, Method};
pub use server::{LotusApi, multiaddr};

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
    /// Where sectors are kept. Reads folders: it blocks.
    fn storage(&self) -> std::io::Result<Vec<StoragePath>>;
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
    /// Names it for as long as it is there.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// The sectors in it, and which files of each: the sum of [`file_type`]s.
    pub sectors: Vec<(SectorId, u32)>,
}

/// Files of a sector. Source: lotus storage/sealer/storiface/filetype.go.
pub mod file_type {
    /// The replica.
    pub const SEALED: u32 = 2;
    /// Its trees.
    pub const CACHE: u32 = 4;
    /// The replica of an upgraded sector.
    pub const UPDATE: u32 = 8;
    /// Its trees.
    pub const UPDATE_CACHE: u32 = 16;
}
