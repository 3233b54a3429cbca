//! One writer per sending address: nonce, signature, journal, push, wait.
//!
//! A message is sent under a *key* of the caller's choice. The signed bytes are journaled before
//! they are pushed, and whatever happens later only those same bytes are pushed again, or the same
//! message with the same nonce and a higher fee, so that a key never yields two messages and no
//! message has effect twice.
//!
//! - [`Sender::send`] chooses who pays and queues a request; one writer per address estimates gas,
//!   takes the nonce, signs, journals and pushes. PoSt messages overtake all others.
//! - [`Sender::wait`] reads the receipt from the chain, at a confidence. A receipt that a reorg
//!   removes is waited for again.
//! - The [`Runner`] pushes again what is not on chain, until it is there for good, and raises the
//!   fee of what is stuck.
//!
//! Money is bounded: each message has a limit, each day has one, each address keeps a floor for
//! WindowPoSt, and a kind of message that fails again and again stops for a while. Declarations of
//! faults and recoveries have a limit and a floor of their own. Money that is missing is waited
//! for. All of that is pure (`select`, `fees`, `replace`, `breaker`, `waiting`); the sums are in
//! the journal.

mod breaker;
mod config;
mod error;
mod fees;
mod message;
mod money;
mod replace;
mod runner;
mod select;
mod sender;
mod track;
mod waiting;
mod write;

pub use breaker::{Stop, StopReason};
pub use config::{AddressConfig, BreakerConfig, FeesConfig, MessagesConfig};
pub use error::SendError;
pub use fees::{OverCap, Purse};
pub use message::{Landed, MessageKind, MessageStatus, Payer, SendRequest};
pub use money::{Money, PurseStatus, Quote};
pub use runner::Runner;
pub use select::{Controls, Roles, preference};
pub use sender::Sender;
pub use waiting::Waiting;
