//! commP, sealing and PoSt behind [`Prover`], and the strict [`Verifier`]: the owner of
//! `filecoin-proofs`.
//!
//! Everything here is synchronous and heavy on the CPU: call it from a worker process or a
//! blocking thread. A sector has three places: the *unsealed* file (its Fr32-padded pieces), the
//! *sealed* file (the replica) and the *cache* folder (trees and labels).
//!
//! [`Vanilla`] is the mode without SNARKs. Its proofs are full Merkle openings in one canonical
//! encoding of one exact length, which holds nothing that the verifier can derive from the public
//! inputs. The verifier recomputes every path, column hash, label and encoding. The other
//! [modes](ProofMode) compress proofs to SNARKs of 192 bytes per partition, which needs the
//! parameter files that [`params`] finds, verifies and, for the smallest sectors, makes.
//!
//! The proof library keeps a cache of graph parents, about 1.75 times the sector's size, in
//! `FIL_PROOFS_PARENT_CACHE` (else `/var/tmp/filecoin-parents`), and uses one thread for each CPU
//! (`RAYON_NUM_THREADS`): the process that starts a worker sets these variables.

mod aggregate;
mod api;
mod commp;
mod error;
mod network;
pub mod params;
mod pieces;
mod prove;
mod snark;
#[cfg(test)]
mod tests;
mod verify;

pub use aggregate::{AGGREGATE_SEALS, aggregate_bytes, aggregate_memory};
pub use api::{
    PlacedPiece, PostSector,
    ProofMode::{self, Vanilla},
    Prover, SealInputs, SealedCommitments, SealingSector, Seed, Ticket, UnknownMode,
    UnpaddedOffset, UpdatedSector, Verifier, WindowPost,
};
pub use commp::{CommpWriter, commp, fr32_pad, zero_commitment};
pub use error::{Check, ProofError, Refused};
pub use network::{
    seal_proof_type, update_proof_type, window_post_partition_sectors, window_post_proof_type,
    winning_post_proof_type,
};
pub use pieces::{add_pieces, comm_d, layout};
pub use prove::{check_sector, replica_commitment, winning_challenge};
pub use verify::post::window_post_bytes;
