//! Bytes between hub and spokes; control is gRPC, bytes are not.
//!
//! On one host a read-only descriptor crosses a Unix socket ([`FdServer`], [`fetch_fd`]): the
//! reader has no file-system access of its own and reads at page-cache speed. Across hosts the
//! same tokens open the same files over HTTP/1.1 ranges ([`http_router`], [`Far`]), on connections
//! that show who asks. A token is opaque here: an [`OpenToken`] decides what it opens, for whom,
//! and for how long.

mod error;
mod far;
mod fd;
mod pull;
mod reader;
mod serve;

use std::fs::File;

pub use error::DataError;
pub use far::{Dial, Duplex, Far};
pub use fd::{FdServer, fetch_fd};
pub use pull::{HttpPull, Pulled, http_client, http_client_on, pull_http};
pub use reader::{PieceReader, Plane};
pub use serve::{Asker, PATH, PULL_ALPN, http_router, serve_on};

/// Longest token, in bytes.
pub const MAX_TOKEN: usize = 512;

/// Decides what a token opens.
#[async_trait::async_trait]
pub trait OpenToken: Send + Sync + 'static {
    /// A read-only descriptor of a regular file, and how many of its bytes may be read.
    /// `by`: who asks, where the connection tells. [`DataError::UnknownToken`] when the token opens
    /// nothing for them, or nothing any more.
    async fn open(&self, token: &str, by: Option<&str>) -> Result<(File, u64), DataError>;
}
