//! One writer per sending address: nonce, signature, journal, push, wait.
//!
//! A message is sent under a *key* of the caller's choice. The signed bytes are journaled before
//! they are pushed, and whatever happens later only those same bytes are pushed again, so that a
//! key never yields two messages and no message has effect twice.
//!
//! - [`Sender::send`] queues a request; one writer per address estimates gas, takes the nonce,
//!   signs, journals and pushes. PoSt messages overtake all others.
//! - [`Sender::wait`] reads the receipt from the chain, at a confidence. A receipt that a reorg
//!   removes is waited for again.
//! - The [`Runner`] pushes again what is not on chain, until it is there for good.

mod config;
mod error;
mod message;
mod runner;
mod sender;
mod track;
mod write;

pub use config::MessagesConfig;
pub use error::SendError;
pub use message::{Landed, MessageKind, MessageStatus, SendRequest};
pub use runner::Runner;
pub use sender::Sender;
