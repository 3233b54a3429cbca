//! The hub: sealing, proving, mining, and the API that spokes use.
//!
//! - [`repo`]: the directory, its lock and generation. [`config`]: `config.toml`.
//! - [`pieces`]: the hand-off of pieces; [`capacity`]: the room they may take; [`unsealed`]:
//!   reading them; [`events`]: the durable log that spokes follow; [`owner`]: whose a deal is.
//! - [`api`]: all of it over gRPC. [`control`]: what only the operator may do;
//!   [`orders`]: messages on an operator's order.
//! - [`sealer`]: joins sealing, proving and workers to these parts. [`run`]: starts it all.

#[cfg(feature = "all-in-one")]
pub mod all_in_one;
pub mod api;
pub mod backup;
pub mod capacity;
pub mod cli;
pub mod config;
pub mod control;
mod control_proving;
mod control_storage;
pub mod events;
pub mod handover;
pub mod lotus;
mod network;
pub mod operations;
pub mod orders;
pub mod owner;
pub mod pieces;
pub mod repo;
pub mod restart;
pub mod run;
pub mod sealer;
pub mod unsealed;
