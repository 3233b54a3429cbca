//! Newtypes of the Filecoin domain, without I/O.
//!
//! Ids, sizes, epochs and commitments are types whose construction validates, so that a function
//! that takes an [`UnpaddedSize`] can not be handed a [`PaddedSize`], and adding two epochs does
//! not compile.

mod epoch;
mod error;
mod ids;
mod piece;
mod size;

pub use epoch::{Epoch, EpochDelta};
pub use error::Kind;
pub use fvm_shared::address::Address;
pub use fvm_shared::econ::TokenAmount;
pub use ids::{ActorId, BadId, DealKey, Generation, SectorId, SectorNumber};
pub use piece::{BadPieceCid, Commitment, PieceCid, PieceInfo};
pub use size::{BadSize, PaddedSize, SectorSize, UnpaddedSize};
