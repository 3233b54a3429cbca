//! Which piece holds a multihash, and where; and how a spoke keeps that in step with the hub.
//!
//! [`PieceIndex`] is the durable index. [`PieceSource`] reads the hub's pieces under leases.
//! [`Follower`] brings the two together: it follows the hub's pieces, indexes those that are
//! wanted, drops those that are gone, and catches up after any break.

mod error;
mod follow;
mod index;
mod sidecar;
mod source;
#[cfg(feature = "testing")]
pub mod testing;

pub use error::IndexError;
pub use follow::{Follower, Hooks, Wanted};
pub use index::{Entry, Location, PieceIndex, Verified};
pub use lotus_segments::Stats;
pub use source::{BlockingReader, Leased, PieceSource, SourceError, connect};
