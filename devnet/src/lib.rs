//! An embedded Filecoin chain behind Lotus JSON-RPC that verifies every proof.
//!
//! [`vm`] is a pure state transition over [`state`]; [`Policy`] holds every constant; [`chain`]
//! keeps tipsets, messages and keys, and answers the node's questions.

pub mod chain;
mod error;
pub mod keys;
pub mod policy;
pub mod rpc;
pub mod state;
pub mod vm;

pub use chain::{AllocationOrder, BlockMessageLists, Chain, ChainConfig};
pub use error::ChainError;
pub use policy::Policy;
