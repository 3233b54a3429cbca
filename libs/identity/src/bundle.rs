//! The file that a new spoke starts from.

use std::fmt;
use std::path::Path;

use lotus_runtime::Fault;
use lotus_types::Kind;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use crate::certificate::broken;
use crate::secret::{Secret, der};
use crate::{Caller, files};

/// Largest bundle that is read, bytes.
const LIMIT: u64 = 64 << 10;
/// Room for the text of one, bytes.
const ROOM: usize = 8 << 10;

/// All that a new spoke starts from: one file. Its key is good for asking for a credential once,
/// and for nothing else.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    /// Where the hub listens: `host:port`, or `unix:/path` on its own host.
    pub(crate) hub: String,
    pub(crate) caller: Caller,
    /// Of two bundles of one authority for one caller, the later counts.
    pub(crate) invited_unix_ms: u64,
    pub(crate) expires_unix_ms: u64,
    /// Whom the spoke trusts.
    #[serde(with = "der")]
    pub(crate) authority: CertificateDer<'static>,
    /// What it joins with.
    #[serde(with = "der")]
    pub(crate) certificate: CertificateDer<'static>,
    /// The key of that, PKCS #8.
    pub(crate) key: Secret,
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bundle({} for {})", self.caller, self.hub)
    }
}

impl Bundle {
    /// Writes the bundle to a file that does not exist, for this user alone.
    pub fn write(&self, file: &Path) -> Result<(), Fault> {
        let text = Secret::json(self, ROOM).map_err(|e| broken(&e))?;
        files::create(file, text.bytes())
    }

    /// Reads a bundle.
    pub fn read(file: &Path) -> Result<Self, Fault> {
        let bad = |why: String| {
            Fault::new(
                Kind::Config,
                format!("{} is no join bundle: {why}", file.display()),
                "make one on the hub with `lotus-miner join-bundle`, and copy it here",
            )
        };
        let text = files::read(file, LIMIT).map_err(|e| bad(e.to_string()))?;
        let text = Secret::new(text);
        serde_json::from_slice(text.bytes()).map_err(|e| bad(e.to_string()))
    }

    /// Where the hub listens: `host:port`, or `unix:/path` on its own host.
    #[must_use]
    pub fn hub(&self) -> &str {
        &self.hub
    }

    /// Whom it is for.
    #[must_use]
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Until when it can be used, by the hub's clock.
    #[cfg(test)]
    pub(crate) fn expires(&self) -> std::time::SystemTime {
        use std::time::{Duration, UNIX_EPOCH};
        let after = Duration::from_millis(self.expires_unix_ms);
        UNIX_EPOCH.checked_add(after).unwrap_or(UNIX_EPOCH)
    }

    /// The certificate to join with.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// TLS of a connection that joins.
    #[cfg(test)]
    pub(crate) fn client_config(&self, alpn: &[&[u8]]) -> Result<rustls::ClientConfig, Fault> {
        let (authority, certificate) = (self.authority.clone(), self.certificate.clone());
        crate::client_config(authority, certificate, self.key.private_key(), alpn)
    }
}
