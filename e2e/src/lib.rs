//! Real processes: a storage provider on an embedded devnet, run by the supervisor, driven from
//! outside as a client would. The demo and the end-to-end tests share it.

pub mod attempts;
mod compare;
pub mod demo;
pub mod download;
mod far;
pub mod history;
mod hosts;
mod net;
pub mod peers;
pub mod secrets;
pub mod sectors;
mod watch;

pub use far::{At, Far};
pub use hosts::Host;
pub use net::{Failed, GuardStatus, Net, NetConfig, OwnedSocket, ProcessStatus, binary, secs};
