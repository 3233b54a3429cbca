//! A provider's life on the chain, in process and stepped by hand: 2 KiB sectors are really
//! sealed and really proven, and every wrong step is refused with the actor's exit code.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod actors;
mod aggregate;
mod mining;
mod proving;
mod sp;
