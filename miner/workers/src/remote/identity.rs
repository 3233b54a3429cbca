//! Who a worker on another host is: certificates of the hub's own authority.

use std::fmt;
use std::path::Path;
use std::time::Duration;

pub use lotus_identity::Name as WorkerName;
use lotus_identity::{Refused, client_config, files, worker_name};
use lotus_proofs::ProofMode;
use lotus_runtime::Fault;
use lotus_types::{Kind, SectorSize};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, ServerConfig};
use serde::{Deserialize, Serialize};

use crate::task::base64_bytes;

/// HTTP/2, the only protocol on this port.
const ALPN: &[&[u8]] = &[b"h2"];
/// Largest bundle that is read, bytes.
const BUNDLE_LIMIT: u64 = 64 << 10;
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The hub's authority over its workers.
#[derive(Debug)]
pub struct Authority(lotus_identity::Authority);

impl Authority {
    /// The authority in `dir`; makes one if there is none.
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        lotus_identity::Authority::open(dir).map(Self)
    }

    /// Makes the bundle of a worker, good for `days`. An earlier one of the same name is void.
    pub fn issue(
        &self,
        name: &WorkerName,
        hub: &str,
        proofs: (ProofMode, SectorSize),
        days: u32,
    ) -> Result<Bundle, Fault> {
        let issued = self.0.issue_worker(name, DAY * days)?;
        Ok(Bundle {
            hub: hub.into(),
            name: name.clone(),
            proofs: proofs.0,
            sector_size: proofs.1,
            authority: issued.authority,
            certificate: issued.certificate,
            key: issued.key,
        })
    }

    /// The workers that have a bundle that counts.
    pub fn workers(&self) -> Result<Vec<WorkerName>, Fault> {
        self.0.workers()
    }

    /// Makes a worker's bundle void. False if there is none.
    pub fn revoke(&self, name: &WorkerName) -> Result<bool, Fault> {
        self.0.revoke_worker(name)
    }

    /// The worker that a certificate is of, if the certificate counts now. The certificate is of
    /// this authority: the handshake has looked.
    pub(crate) fn worker(&self, certificate: &CertificateDer<'_>) -> Result<WorkerName, String> {
        self.0.worker(certificate).map_err(|refused| match refused {
            Refused::NotOurs | Refused::Nothing => {
                "this certificate is of no worker: it may not do a worker's work".into()
            }
            Refused::Broken(why) => why,
            Refused::Expired
            | Refused::Revoked
            | Refused::Unknown
            | Refused::Used
            | Refused::WrongKey => {
                let name = worker_name(certificate);
                format!(
                    "the bundle of {} does not count any more: make a new one on the hub with \
                     `lotus-miner workers join-bundle`",
                    name.as_ref().map_or("this worker", WorkerName::as_str)
                )
            }
        })
    }

    /// TLS of the hub's side: every client must have a certificate of this authority.
    pub(crate) fn server_config(&self) -> Result<ServerConfig, Fault> {
        self.0.server_config(ALPN)
    }

    /// A spoke's certificate, for a key of its own.
    #[cfg(test)]
    pub(super) fn spoke(&self, public_key: &[u8]) -> Vec<u8> {
        let caller = "deals/deals-1".parse().unwrap();
        let bundle = self.0.invite(&caller, "hub:1", DAY).unwrap();
        let joined = self.0.join(bundle.certificate(), public_key);
        joined.unwrap().certificate
    }
}

/// All that a worker on another host starts from: one file.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    /// Where the hub listens, `host:port`.
    pub hub: String,
    /// The worker.
    pub name: WorkerName,
    /// Which proofs the worker makes: those that the hub's network takes.
    pub proofs: ProofMode,
    /// The size of the hub's sectors, which says what parameter files the worker needs.
    pub sector_size: SectorSize,
    /// Whom the worker trusts, DER.
    #[serde(with = "base64_bytes")]
    authority: Vec<u8>,
    /// Who the worker is, DER.
    #[serde(with = "base64_bytes")]
    certificate: Vec<u8>,
    /// Its key, PKCS #8.
    #[serde(with = "base64_bytes")]
    key: Vec<u8>,
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bundle({} for {})", self.name, self.hub)
    }
}

impl Bundle {
    /// Writes the bundle to a file that does not exist, for this user alone.
    pub fn write(&self, file: &Path) -> Result<(), Fault> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| Fault::new(Kind::Fatal, format!("bundle: {e}"), "see the log"))?;
        files::create(file, &text)
    }

    /// Reads a bundle.
    pub fn read(file: &Path) -> Result<Self, Fault> {
        let bad = |why: String| {
            Fault::new(
                Kind::Config,
                format!("{} is no join bundle: {why}", file.display()),
                "make one on the hub with `lotus-miner workers join-bundle`, and copy it here",
            )
        };
        let text = files::read(file, BUNDLE_LIMIT).map_err(|e| bad(e.to_string()))?;
        serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))
    }

    /// TLS of the worker's side.
    pub(crate) fn client_config(&self) -> Result<ClientConfig, Fault> {
        client_config(
            self.authority.clone().into(),
            self.certificate.clone().into(),
            PrivatePkcs8KeyDer::from(self.key.clone()).into(),
            ALPN,
        )
    }

    #[cfg(test)]
    pub(super) fn with_certificate(&self, certificate: Vec<u8>, key: Vec<u8>) -> Self {
        Self {
            certificate,
            key,
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PublicKeyData as _};

    use super::*;

    #[test]
    fn only_a_workers_certificate_that_counts_names_a_worker() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        let name: WorkerName = "sealer-1".parse().unwrap();
        let first = authority
            .issue(&name, "hub:1", (ProofMode::Vanilla, SectorSize::S2KiB), 1)
            .unwrap();
        let who = |a: &Authority, b: &Bundle| a.worker(&b.certificate.clone().into());
        // The hub was restarted in between.
        let again = Authority::open(dir.path()).unwrap();
        assert_eq!(who(&again, &first).unwrap(), name);
        assert_eq!(again.workers().unwrap(), std::slice::from_ref(&name));

        let second = authority
            .issue(&name, "hub:1", (ProofMode::Vanilla, SectorSize::S2KiB), 1)
            .unwrap();
        assert!(who(&authority, &first).is_err(), "replaced");
        assert_eq!(who(&authority, &second).unwrap(), name);
        assert!(authority.revoke(&name).unwrap());
        assert!(!authority.revoke(&name).unwrap());
        assert!(who(&authority, &second).is_err(), "revoked");

        let key = KeyPair::generate().unwrap();
        let spoke = authority.spoke(&key.subject_public_key_info());
        assert!(authority.worker(&spoke.into()).is_err());
    }

    #[test]
    fn a_bundle_is_written_once_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(&dir.path().join("ca")).unwrap();
        let name: WorkerName = "w".parse().unwrap();
        let bundle = authority
            .issue(
                &name,
                "10.0.0.5:2347",
                (ProofMode::Groth16, SectorSize::S32GiB),
                1,
            )
            .unwrap();
        let file = dir.path().join("bundle");
        bundle.write(&file).unwrap();
        assert!(bundle.write(&file).is_err());
        let read = Bundle::read(&file).unwrap();
        assert_eq!((read.hub.as_str(), read.name), ("10.0.0.5:2347", name));
        assert_eq!(read.proofs, ProofMode::Groth16);
        assert_eq!(read.sector_size, SectorSize::S32GiB);
        std::fs::write(&file, "{}").unwrap();
        assert_eq!(Bundle::read(&file).unwrap_err().kind, Kind::Config);
    }
}
