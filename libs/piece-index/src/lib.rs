//! Which piece holds a multihash, and where; and how a spoke keeps that in step with the hub.
//!
//! [`PieceIndex`] is the durable index. [`PieceSource`] reads the hub's pieces under leases.
//! [`Follower`] brings the two together: it follows the hub's pieces, indexes those that are
//! wanted, drops those that are gone, and catches up after any break.

mod follow;
mod index;
mod source;
#[cfg(feature = "testing")]
pub mod testing;

pub use follow::{Follower, Hooks, Wanted};
pub use index::{Entry, IndexError, Location, PieceIndex};
pub use source::{BlockingReader, Leased, PieceSource, SourceError, connect};
