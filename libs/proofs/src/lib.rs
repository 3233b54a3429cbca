//! commP, sealing and PoSt behind [`Prover`], and the strict [`Verifier`]: the owner of
//! `filecoin-proofs`.
//!
//! Everything here is synchronous and heavy on the CPU: call it from a worker process or a
//! blocking thread. Paths name the three places of a sector: the *unsealed* file (Fr32-padded
//! pieces), the *sealed* file (the replica) and the *cache* directory (trees and labels).
//!
//! [`Vanilla`] is the mode without SNARKs: proofs are the full Merkle openings, encoded in the
//! fixed-size canonical form of [`vanilla`](crate::Vanilla), and the verifier recomputes from
//! them every label, column hash, encoding and path.

mod api;
mod error;

pub use api::{
    PlacedPiece, PostSector, Prover, SealedCommitments, SealingSector, Seed, Ticket,
    UnpaddedOffset, UpdatedSector, Vanilla, Verifier, WindowPost,
};
pub use error::{ProofError, Refused};
