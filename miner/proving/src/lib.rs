//! WindowPoSt, WinningPoSt, block production and the mined-block log.
//!
//! - [`WindowPost`] follows the chain, proves each deadline as soon as its challenge is known,
//!   submits when it opens, and declares faults and recoveries before the cut-off. What is due at
//!   a head is a pure function of `dline.Info` ([`deadline`]); every constant comes from the node.
//! - [`Mining`] takes part in every epoch's election. Before a block is signed its height and
//!   parents are reserved in a [`Fence`].
//! - [`Activity`] says what a restart would interrupt, and which proofs are being made.
//!
//! Proofs are made in worker processes ([`lotus_workers::Pool`]); messages go through
//! [`lotus_messages::Sender`].

mod activity;
mod around;
mod attend;
mod check;
mod config;
pub mod deadline;
mod dispute;
mod error;
mod fence;
mod files;
mod first;
mod host;
mod leave;
mod memory;
mod mining;
mod ops;
mod pace;
mod partition;
mod prove;
mod publish;
mod record;
mod round;
mod rounds;
mod submit;
mod watch;
mod window;

pub use activity::{Activity, Busy, Work};
pub use config::{CheckLevel, MiningConfig, ProvingConfig};
pub use error::ProvingError;
pub use fence::{Fence, FenceError, LocalFence, Mined};
pub use files::SectorFiles;
pub use leave::{Allowed, Leave};
pub use mining::{Mining, MiningDeps};
pub use ops::{BadSector, CheckedPartition, Computed, Recovery};
pub use record::{DeadlineRecord, Outcome};
pub use rounds::{RoundOutcome, RoundRecord, RoundStep, Rounds};
pub use window::{ProvingDeps, WindowPost};
