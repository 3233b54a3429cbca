//! Deal intake: MK20 over HTTP, transfer, hand-off to the hub.
//!
//! A deal goes through the checkpoints of [`machine`]; each is journaled before anything is done,
//! so that a kill at any moment loses nothing that was acknowledged. The bytes come by upload or
//! by download ([`source`] says from where not), are verified while they are written, and are
//! pulled by the hub as a descriptor. When the hub has them the copy here is dropped.

pub mod auth;
mod config;
mod effects;
mod engine;
mod follow;
mod http;
pub mod machine;
pub mod mk20;
mod service;
mod source;
mod staging;
mod transfer;
pub mod validate;

pub use config::DealsConfig;
pub use service::Deals;
pub use source::SourceError;
pub use staging::IntakeError;
