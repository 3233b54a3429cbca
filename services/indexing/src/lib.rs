//! Multihash index of the pieces, IPNI advertisement chain, lookups.
//!
//! Indexes what the hub's deals want indexed, advertises it on a signed chain that indexers
//! fetch over HTTP, takes it back when a piece goes, and answers lookups itself.
//! Sources: ipni/specs, `IPNI.md`; ipfs/specs, `http-routing-v1.md`.

mod ad;
mod addr;
mod announce;
mod chain;
mod config;
pub mod control;
mod http_api;
mod identity;
mod service;

pub use config::IndexingConfig;
pub use service::Indexing;
