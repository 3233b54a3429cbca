//! The sealing state machine and the runner of its effects.
//!
//! - [`machine`]: the pure table `step(state, event)`, over the state names of Lotus. Each state
//!   has one effect, which is journaled with the state, so that a restart runs it again.
//! - [`Sealing`]: places pieces into sectors and answers questions about sectors.
//! - [`Runner`]: performs the effects: heavy work in worker processes, messages through
//!   [`lotus_messages::Sender`], everything else by asking the chain.
//! - [`Storage`]: where the files of sectors are.
//!
//! A state changes for the worse only on evidence: an answer of the chain, a proof that fails, a
//! file that is wrong. A peer that does not answer changes nothing; the effect is tried again
//! with back-off until it does.

mod aggregate;
mod ahead;
mod batch;
mod batching;
mod chain;
mod config;
mod error;
mod heavy;
pub mod machine;
mod mirror;
mod operate;
mod params;
mod pieces;
mod record;
mod runner;
mod sealing;
mod shared;
mod storage;
mod terminate;
mod update;
mod young;

pub use batch::{BatchKind, Waiting};
pub use config::SealingConfig;
pub use error::SealingError;
pub use machine::{Sector, SectorPiece, SectorState, Terms};
pub use operate::Stake;
pub use record::{LogEntry, SectorChange, SectorRecord};
pub use runner::Runner;
pub use sealing::{Capacity, Observer, PieceFiles, Placement, Replica, Sealing, SealingDeps, Work};
pub use storage::{
    FileType, FileTypes, HeldView, MoveView, NewMeta, NewPath, PathId, PathMeta, PathView, Refusal,
    Storage, StorageConfig, StorageError,
};
