use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

use lotus_runtime::{Fault, Needs, Network, Tls};
use serde::{Deserialize, Serialize};

/// `[retrieval]` in config.toml.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RetrievalConfig {
    /// HTTP gateway address. Port 0 picks a free port.
    pub listen: SocketAddr,
    /// PEM file with the chain of certificates, the server's own first. With it and `tls_key` the
    /// address speaks HTTPS only; both are read again when they change. Empty: plain HTTP.
    pub tls_cert: PathBuf,
    /// PEM file with the private key of the certificate.
    pub tls_key: PathBuf,
    /// Requests served at once; more are answered 429.
    pub max_requests: NonZeroU16,
    /// Of those, requests of one client: an IPv4 address, or a /64 of IPv6.
    pub max_requests_per_client: NonZeroU16,
    /// Open connections; more wait.
    pub max_connections: NonZeroU16,
    /// Of those, connections of one client; more are closed.
    pub max_connections_per_client: NonZeroU16,
    /// Load balancers and proxies before this gateway, such as `10.0.0.0/8`: they are under no
    /// limit of one client, and X-Forwarded-For from them says who the client is.
    pub trusted_proxies: Vec<Network>,
    /// Memory for what the walks of all requests keep in mind of their DAGs, MiB. A request that
    /// finds none left is answered 503.
    pub walk_memory_mib: NonZeroU16,
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
            tls_cert: PathBuf::new(),
            tls_key: PathBuf::new(),
            // Curio admits as many of one class.
            max_requests: limit(256),
            max_requests_per_client: limit(64),
            max_connections: limit(1024),
            max_connections_per_client: limit(128),
            trusted_proxies: Vec::new(),
            walk_memory_mib: limit(1024),
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
        let mut needs = Needs::default().socket("retrieval", self.listen);
        for file in [&self.tls_cert, &self.tls_key] {
            // The folder, because a renewed file is another one; and that which it is a link to.
            let real = file.canonicalize();
            let folder = |f: &Path| f.parent().map(Path::to_path_buf);
            needs.read.extend(folder(file).filter(|f| f.is_absolute()));
            needs.read.extend(real.ok().and_then(|f| folder(&f)));
        }
        needs.read.dedup();
        needs
    }

    /// The certificate and its key, if this gateway speaks TLS.
    pub(crate) fn tls(&self) -> Result<Option<Tls>, Fault> {
        Tls::of("retrieval", &self.tls_cert, &self.tls_key)
    }
}

/// A limit of a default configuration.
const fn limit(n: u16) -> NonZeroU16 {
    NonZeroU16::new(n).expect("no limit is zero")
}
