//! Who calls the hub.
//!
//! The hub has an authority of its own ([`Authority`]): a key in its repo, and registers of whom
//! the authority vouches for. A spoke starts from a one-time file ([`Bundle`]), makes a key of its
//! own, keeps it ([`Held`]), and gets certificates of [`LIFE`] for it, which it renews. A worker on
//! another host has one long-lived certificate. Both sides of every connection show one
//! ([`Authority::server_config`], [`Held::client_config`]), and whether it counts is asked at each
//! call ([`Authority::caller`]), so that revoking takes effect at once.
//!
//! What blocks: everything that writes waits for the disk. [`Authority::caller`] and
//! [`Authority::presented`] look at one file's metadata and may be called anywhere.
//!
//! Why it is so: docs/decisions/0024-identities.md.

mod authority;
mod bundle;
mod certificate;
pub mod files;
mod held;
pub mod listen;
pub mod local;
mod name;
mod outgoing;
mod record;
mod refused;
mod register;
mod secret;
mod spokes;
#[cfg(test)]
mod tests;
mod tls;
mod waiting;

use std::time::Duration;

pub use authority::{Authority, Clock, Issued};
pub use bundle::Bundle;
pub use certificate::{Presented, worker_name};
pub use held::Held;
pub use listen::{Peer, Secured};
pub use local::{Local, Shown};
pub use name::{Caller, Name};
pub use outgoing::{dial, keep_alive};
pub use record::{Credential, Registered, State};
pub use refused::Refused;
pub use tls::{ToHub, client_config, connect};
pub use waiting::Waiting;

/// How long a credential of a spoke counts.
pub const LIFE: Duration = Duration::from_secs(15 * 60);
/// How far the hub's clock may be set back or forth without a spoke noticing.
pub const CLOCK_SKEW: Duration = Duration::from_secs(2 * 60);
/// How long after its end a credential can still be renewed: a spoke that was off for less needs
/// nobody's help.
pub const REJOIN: Duration = Duration::from_secs(7 * 24 * 3600);
/// Name in the hub's certificate. Whoever connects asks for it, whatever address it dials.
pub const HUB_NAME: &str = "hub.lotus-hub.internal";
