use std::net::SocketAddr;
use std::path::PathBuf;

use lotus_runtime::{Fault, Tls};
use lotus_types::Kind;
use serde::{Deserialize, Serialize};

/// `[lotus_api]`: Lotus' JSON-RPC for existing tools.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LotusApiConfig {
    /// Address such as 127.0.0.1:2345, the port of lotus-miner; empty: off. Port 0 picks a free
    /// one. `run/lotus-api.addr` has the one in use, and `api` the same as a multiaddr. Tokens can be
    /// read on the way unless `tls_cert` is set: keep it on loopback then.
    pub listen: String,
    /// PEM file with the chain of certificates, the server's own first. With it and `tls_key` the
    /// address speaks HTTPS only; both are read again when they change. Empty: plain HTTP.
    pub tls_cert: PathBuf,
    /// PEM file with the private key of the certificate.
    pub tls_key: PathBuf,
    /// URL of `listen` for other hosts, such as https://hub.example:2345, when a proxy is before it.
    /// Callers are told it as the place of raw pieces; empty: the address that they use.
    pub url: String,
    /// Connections at a time. More are closed at once.
    pub max_connections: u32,
    /// Largest request, bytes.
    pub max_request_bytes: u32,
    /// Largest answer, bytes.
    pub max_response_bytes: u32,
    /// Calls in one batch.
    pub max_batch: u32,
    /// Seconds that a request may take to arrive, and a call to be answered.
    pub call_secs: u64,
    /// Seconds that a call may take which moves data, unseals, or waits for a sector.
    pub long_call_secs: u64,
}

impl Default for LotusApiConfig {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:2345".into(),
            tls_cert: PathBuf::new(),
            tls_key: PathBuf::new(),
            url: String::new(),
            max_connections: 64,
            max_request_bytes: 1 << 20,
            max_response_bytes: 64 << 20,
            max_batch: 100,
            call_secs: 30,
            // Lotus lets such a call wait for ever; a repeated one finds what the first has done.
            long_call_secs: 6 * 3_600,
        }
    }
}

impl LotusApiConfig {
    /// Whether it speaks HTTPS.
    #[must_use]
    pub fn is_https(&self) -> bool {
        !self.tls_cert.as_os_str().is_empty()
    }

    /// The certificate and its key, if it does.
    pub(crate) fn tls(&self) -> Result<Option<Tls>, Fault> {
        let tls = Tls::of("lotus_api", &self.tls_cert, &self.tls_key)?;
        Ok(tls.map(Tls::http1))
    }

    /// The address, if it is on.
    pub fn address(&self) -> Result<Option<SocketAddr>, Fault> {
        if self.listen.is_empty() {
            return Ok(None);
        }
        self.listen.parse().map(Some).map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("lotus_api.listen {:?}: {e}", self.listen),
                "set lotus_api.listen to an address such as 127.0.0.1:2345, or to \"\" for off",
            )
        })
    }
}
