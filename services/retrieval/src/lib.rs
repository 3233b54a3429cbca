//! Trustless gateway and piece retrieval.
//!
//! Serves what the hub's pieces hold, and nothing that a client could not check by itself:
//! `GET /ipfs/{cid}` as a raw block or a CAR, and `GET /piece/{cid}` with ranges. It has its own
//! index, reads pieces under leases, and verifies every block against its CID before it leaves.
//! Source: ipfs/specs, `trustless-gateway.md`.

mod answer;
mod config;
mod gateway;
mod piece;
mod range;
mod request;
mod send;
mod service;
mod unseal;

pub use config::RetrievalConfig;
pub use service::Retrieval;
