//! Hosts the public services of a storage provider, and is a client of them.
//!
//! A service is a crate of its own with one line in [`registry`]. Each runs behind its own panic
//! boundary: when one fails, it is started again with back-off while the others go on.

mod cli;
mod client;
mod config;
mod host;
pub mod registry;

pub use cli::{Args, start};
pub use config::{MarketsConfig, Repo};
