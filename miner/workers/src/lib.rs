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
//! - Workers on other hosts (`lotus-worker run`) attach over mutual TLS. They share no files with
//!   the hub: what a task reads goes to them and what it makes comes back, into the hub's attempt
//!   directories, and counts only while the task is theirs.

mod board;
mod config;
mod error;
mod execute;
mod fit;
mod pool;
mod post;
mod progress;
mod queues;
mod remote;
mod server;
mod slots;
mod supervise;
mod task;
mod worker;

pub use board::{JobInfo, WorkerInfo};
pub use config::{PoolConfig, WorkersConfig};
pub use error::WorkError;
pub use execute::execute;
pub use fit::Declared;
pub use pool::{Attached, Pool, Progress, Runner};
pub use post::{Post, PostClaim, PostKind};
pub use remote::agent::{RemoteArgs, remote_main};
pub use remote::identity::{Authority, Bundle, WorkerName};
pub use task::{Class, Output, PieceFile, PostFile, SealProof, Task, UpdateFiles};
pub use worker::{WorkerArgs, attach, worker_main};
