//! Full-node JSON-RPC client behind `trait FullNode`, and the JSON forms of its types.
//!
//! [`FullNode`] names the calls of Lotus' API (version 1) that sealing, proving, mining and deals
//! need; [`Client`] makes them over HTTP and follows the head over a WebSocket. Keys may be in a
//! remote wallet, which speaks the API of `lotus-wallet`, instead of the node. The types in
//! [`api`] are the wire's, in both directions, so that the devnet serves what the client reads.

pub mod api;
mod client;
mod endpoint;
mod error;
pub mod json;
mod node;
mod notify;
mod wallet;

pub use client::{Client, NamedBy, NodeConfig};
pub use endpoint::Endpoint;
pub use error::NodeError;
pub use node::{FullNode, HeadChanges, Node};
