//! Durable state with pending effects, on an embedded transactional store.
//!
//! The rule of the whole product is *journal, then effect*: a process writes what it is about to
//! do in one durable transaction, then does it, then records that it is done. After a crash the
//! unfinished effects are still in the journal and are run again, so every effect must be
//! idempotent. [`Machines`] does this for pure state machines; [`Journal`] is the store below.
//!
//! Calls block for one fsync (about a millisecond on an SSD).

mod archive;
mod key;
mod machine;
mod store;

pub use archive::{Archive, Contents};
pub use key::JournalKey;
pub use machine::{EffectId, Machine, Machines, Pending, Step};
pub use store::{Entries, Journal, JournalError, Map, Tx, View};
