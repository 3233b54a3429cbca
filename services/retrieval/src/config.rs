use std::net::SocketAddr;
use std::num::NonZeroU16;

use lotus_runtime::Needs;
use serde::{Deserialize, Serialize};

/// `[retrieval]` in config.toml.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetrievalConfig {
    /// HTTP gateway address. Port 0 picks a free port.
    pub listen: SocketAddr,
    /// Requests served at once; more are answered 429.
    pub max_requests: NonZeroU16,
    /// Open connections; more wait.
    pub max_connections: NonZeroU16,
    /// Pieces that are kept open.
    pub max_leases: NonZeroU16,
    /// Seconds a client may take for the headers of a request.
    pub header_secs: u64,
    /// Seconds after which a client that takes nothing is dropped.
    pub stall_secs: u64,
    /// Seconds a stopping service may spend finishing open transfers.
    pub drain_secs: u64,
}

impl Default for RetrievalConfig {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 7777).into(),
            // Curio admits as many of one class.
            max_requests: limit(256),
            max_connections: limit(1024),
            max_leases: limit(256),
            header_secs: 10,
            stall_secs: 30,
            drain_secs: 30,
        }
    }
}

impl RetrievalConfig {
    /// What the service needs beside its folder and the hub.
    #[must_use]
    pub fn needs(&self) -> Needs {
        Needs::default().socket("retrieval", self.listen)
    }
}

/// A limit of a default configuration.
const fn limit(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).expect("no limit is zero")
}
