//! Bytes between hub and spokes; control is gRPC, bytes are not.
//!
//! On one host a read-only descriptor crosses a Unix socket ([`FdServer`], [`fetch_fd`]): the
//! reader has no file-system access of its own and reads at page-cache speed. Across hosts the
//! same tokens open the same files over HTTP ranges ([`http_router`], [`pull_http`]).
//! A token is opaque here: an [`OpenToken`] decides what it opens, and for how long.

mod error;
mod fd;
mod pull;
mod reader;
mod serve;

use std::fs::File;

pub use error::DataError;
pub use fd::{FdServer, fetch_fd};
pub use pull::{HttpPull, Pulled, http_client, http_client_on, pull_http};
pub use reader::PieceReader;
pub use serve::http_router;

/// Longest token, in bytes.
pub const MAX_TOKEN: usize = 512;

/// Decides what a token opens.
#[async_trait::async_trait]
pub trait OpenToken: Send + Sync + 'static {
    /// A read-only descriptor of a regular file, and how many of its bytes may be read.
    /// [`DataError::UnknownToken`] when the token opens nothing, or nothing any more.
    async fn open(&self, token: &str) -> Result<(File, u64), DataError>;
}
