//! Heavy work in worker processes: tasks, the pool, the worker's main loop.
//!
//! The hub computes no proof itself. It runs `lotus-miner worker` processes of two classes: *seal*
//! (niced) and *prove* (normal priority), hands each a [`Task`] and gets an [`Output`] back. A
//! crash in the proof code kills a worker, never the hub; the hub starts another.
//!
//! - The hub's [`Pool`] listens on a Unix socket; each worker attaches to it with one gRPC stream
//!   and exits when that stream breaks, whatever it is doing. So a hub that dies leaves no worker
//!   behind, and needs no list of pids.
//! - A worker that falls silent, or holds a task beyond its deadline, is killed, and its exit is
//!   awaited before its task is given to another or reported as lost: two processes never write
//!   the same files.
//! - A task carries the hub's generation and the trace context of its caller.

mod board;
mod config;
mod error;
mod execute;
mod pool;
mod progress;
mod server;
mod supervise;
mod task;
mod worker;

pub use board::{JobInfo, WorkerInfo};
pub use config::{PoolConfig, WorkersConfig};
pub use error::WorkError;
pub use execute::execute;
pub use pool::{Attached, Pool, Progress, Runner};
pub use task::{Class, Output, PieceFile, PostFile, Task, UpdateFiles};
pub use worker::{WorkerArgs, worker_main};
