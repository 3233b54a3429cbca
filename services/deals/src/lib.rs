//! Deal intake: MK20 over HTTP, transfer, hand-off to the hub.
//!
//! A deal goes through the checkpoints of [`machine`]; each is journaled before anything is done,
//! so that a kill at any moment loses nothing that was acknowledged. The bytes come by upload or
//! by download ([`source`] says from where not), are verified while they are written, and are
//! pulled by the hub as a descriptor. When the hub has them the copy here is dropped.

mod arriving;
pub mod auth;
mod chunks;
mod config;
#[cfg(test)]
mod damage;
mod effects;
mod engine;
mod filter;
mod follow;
mod history;
mod http;
pub mod machine;
pub mod mk12;
pub mod mk20;
pub mod openapi;
pub mod operator;
pub mod pdp;
mod pieces;
mod pulled;
mod ranges;
mod service;
mod source;
mod staging;
mod transfer;
pub mod validate;

pub use config::{DealsConfig, Mk12Config, PiecesConfig};
pub use filter::Question;
pub use history::Step;
pub use service::Deals;
pub use source::SourceError;
pub use staging::IntakeError;
