//! Who a worker on another host is: certificates of the hub's own authority.

use std::fmt;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use lotus_proofs::ProofMode;
use lotus_runtime::Fault;
use lotus_types::{Kind, SectorSize};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};

use crate::task::base64_bytes;

/// Name in the hub's certificate. Workers ask for it whatever address they dial.
pub(crate) const HUB_NAME: &str = "hub.lotus-hub.internal";
/// What follows a worker's name in its certificate. Whoever else the authority may vouch for one
/// day has another suffix, and is no worker.
const WORKER_SUFFIX: &str = ".worker.lotus-hub.internal";
/// HTTP/2, the only protocol on this port.
const ALPN: &[u8] = b"h2";
/// Largest bundle that is read, bytes.
const BUNDLE_LIMIT: u64 = 64 << 10;
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Name of a worker on another host: 1 to 32 of a to z, 0 to 9 and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WorkerName(String);

impl WorkerName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for WorkerName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let edges = !text.starts_with('-') && !text.ends_with('-');
        if (1..=32).contains(&text.len()) && text.bytes().all(allowed) && edges {
            Ok(Self(text.into()))
        } else {
            Err(format!(
                "{text:?} is no name of a worker: give 1 to 32 of a-z, 0-9 and -, such as sealer-1"
            ))
        }
    }
}

impl TryFrom<String> for WorkerName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<WorkerName> for String {
    fn from(name: WorkerName) -> Self {
        name.0
    }
}

impl fmt::Display for WorkerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The hub's authority over its workers: a key in a directory of the repo, for its owner alone,
/// and a list of the certificates that count.
#[derive(Debug)]
pub struct Authority {
    dir: PathBuf,
    key: KeyPair,
}

impl Authority {
    /// The authority in `dir`; makes one if there is none.
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        let open = || -> io::Result<Vec<u8>> {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir.join("workers"))?;
            let file = dir.join("ca.key");
            match fs::read(&file) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                read => return read,
            }
            let key = KeyPair::generate().map_err(io::Error::other)?;
            let tmp = temporary(&file);
            write_private(&tmp, key.serialized_der())?;
            // A link, as it fails if somebody was faster: then theirs is the key.
            let linked = fs::hard_link(&tmp, &file);
            fs::remove_file(&tmp)?;
            match linked {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => fs::File::open(dir)?.sync_all()?,
            }
            fs::read(file)
        };
        let bytes = open().map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("worker authority in {}: {e}", dir.display()),
                "make the directory readable and writable for this user alone",
            )
        })?;
        let key = KeyPair::try_from(bytes).map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("{}/ca.key is no key: {e}", dir.display()),
                "delete it, restart the hub, and make new join bundles for all workers",
            )
        })?;
        Ok(Self {
            dir: dir.into(),
            key,
        })
    }

    /// Makes the bundle of a worker, good for `days`. An earlier one of the same name is void.
    pub fn issue(
        &self,
        name: &WorkerName,
        hub: &str,
        proofs: (ProofMode, SectorSize),
        days: u32,
    ) -> Result<Bundle, Fault> {
        let key = KeyPair::generate().map_err(|e| broken(&e))?;
        let dns = format!("{name}{WORKER_SUFFIX}");
        let purpose = ExtendedKeyUsagePurpose::ClientAuth;
        let certificate = self.sign(&dns, purpose, &key, DAY * days)?;
        write_private(&self.entry(name), fingerprint(&certificate).as_bytes())?;
        Ok(Bundle {
            hub: hub.into(),
            name: name.clone(),
            proofs: proofs.0,
            sector_size: proofs.1,
            authority: self.certificate()?.to_vec(),
            certificate: certificate.to_vec(),
            key: key.serialize_der(),
        })
    }

    /// The workers that have a bundle that counts.
    pub fn workers(&self) -> Result<Vec<WorkerName>, Fault> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.dir.join("workers"))? {
            // A temporary file has no name of a worker.
            names.extend(entry?.file_name().to_str().and_then(|n| n.parse().ok()));
        }
        names.sort();
        Ok(names)
    }

    /// Makes a worker's bundle void. False if there is none.
    pub fn revoke(&self, name: &WorkerName) -> Result<bool, Fault> {
        match fs::remove_file(self.entry(name)) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// The worker that a certificate is of, if the certificate counts now. The certificate is of
    /// this authority: the handshake has looked.
    pub(crate) fn worker(&self, certificate: &CertificateDer<'_>) -> Result<WorkerName, String> {
        let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|e| e.to_string())?;
        let name = parsed
            .valid_dns_names()
            .find_map(|dns| dns.strip_suffix(WORKER_SUFFIX)?.parse::<WorkerName>().ok())
            .ok_or("this certificate is of no worker: it may not do a worker's work")?;
        let known = fs::read_to_string(self.entry(&name));
        if known.is_ok_and(|k| k == fingerprint(certificate)) {
            Ok(name)
        } else {
            Err(format!(
                "the bundle of {name} does not count any more: make a new one on the hub with \
                 `lotus-miner workers join-bundle`"
            ))
        }
    }

    /// TLS of the hub's side: every client must have a certificate of this authority.
    pub(crate) fn server_config(&self) -> Result<ServerConfig, Fault> {
        let key = KeyPair::generate().map_err(|e| broken(&e))?;
        // Made anew at each start of the hub.
        let life = DAY * 3650;
        let purpose = ExtendedKeyUsagePurpose::ServerAuth;
        let certificate = self.sign(HUB_NAME, purpose, &key, life)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = roots(self.certificate()?)?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()
                .map_err(|e| broken(&e))?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| broken(&e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate], private(key.serialize_der()))
            .map_err(|e| broken(&e))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }

    /// The authority's certificate. It is made when it is needed: what workers trust is the name
    /// and the key in it.
    fn certificate(&self) -> Result<CertificateDer<'static>, Fault> {
        let made = authority_params().self_signed(&self.key);
        made.map(|c| c.der().clone()).map_err(|e| broken(&e))
    }

    pub(super) fn sign(
        &self,
        dns: &str,
        purpose: ExtendedKeyUsagePurpose,
        key: &KeyPair,
        life: Duration,
    ) -> Result<CertificateDer<'static>, Fault> {
        let mut params = CertificateParams::new([dns.to_owned()]).map_err(|e| broken(&e))?;
        params.distinguished_name.push(DnType::CommonName, dns);
        let now = SystemTime::now();
        // The clock of the other host may be behind.
        params.not_before = (now - DAY).into();
        params.not_after = (now + life).into();
        params.extended_key_usages = vec![purpose];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let issuer = Issuer::new(authority_params(), &self.key);
        let signed = params.signed_by(key, &issuer);
        signed.map(|c| c.der().clone()).map_err(|e| broken(&e))
    }

    fn entry(&self, name: &WorkerName) -> PathBuf {
        self.dir.join("workers").join(name.as_str())
    }
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    let name = "lotus-hub worker authority";
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
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
        let text = serde_json::to_vec_pretty(self).map_err(|e| broken(&e))?;
        let mut out = fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(file)
            .map_err(|e| {
                Fault::new(
                    Kind::Config,
                    format!("can not write {}: {e}", file.display()),
                    "name a file that does not exist, in a directory that does",
                )
            })?;
        out.write_all(&text)?;
        Ok(out.sync_all()?)
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
        let len = fs::metadata(file).map_err(|e| bad(e.to_string()))?.len();
        if len > BUNDLE_LIMIT {
            return Err(bad(format!("it has {len} bytes")));
        }
        let text = fs::read(file).map_err(|e| bad(e.to_string()))?;
        serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))
    }

    /// TLS of the worker's side.
    pub(crate) fn client_config(&self) -> Result<ClientConfig, Fault> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| broken(&e))?
            .with_root_certificates(roots(self.authority.clone().into())?)
            .with_client_auth_cert(
                vec![self.certificate.clone().into()],
                private(self.key.clone()),
            )
            .map_err(|e| broken(&e))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
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

fn roots(authority: CertificateDer<'static>) -> Result<RootCertStore, Fault> {
    let mut roots = RootCertStore::empty();
    roots.add(authority).map_err(|e| broken(&e))?;
    Ok(roots)
}

fn private(pkcs8: Vec<u8>) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(pkcs8).into()
}

fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    blake3::hash(certificate).to_hex().to_string()
}

/// A name beside a file that nobody else uses, and that is no worker's.
fn temporary(file: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let (pid, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    file.with_extension(format!("tmp-{pid}-{n}"))
}

fn write_private(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let tmp = temporary(file);
    let mut out = fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&tmp)?;
    out.write_all(bytes)?;
    out.sync_all()?;
    fs::rename(tmp, file)
}

fn broken(e: &dyn fmt::Display) -> Fault {
    Fault::new(
        Kind::Fatal,
        format!("certificates: {e}"),
        "check the bundle and the clock; make a new bundle on the hub",
    )
}

#[cfg(test)]
mod tests {
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
        let client = ExtendedKeyUsagePurpose::ClientAuth;
        let spoke = authority
            .sign("deals-1.spoke.lotus-hub.internal", client, &key, DAY)
            .unwrap();
        assert!(authority.worker(&spoke).is_err());
    }

    #[test]
    fn who_opens_it_at_the_same_time_gets_the_same_key() {
        let dir = tempfile::tempdir().unwrap();
        let at_once = std::sync::Barrier::new(8);
        let keys: Vec<Vec<u8>> = std::thread::scope(|s| {
            let open = || {
                at_once.wait();
                Authority::open(dir.path()).unwrap().key.serialize_der()
            };
            let all: Vec<_> = (0..8).map(|_| s.spawn(open)).collect();
            all.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|k| *k == keys[0]));
    }

    #[test]
    fn names_are_labels() {
        for good in ["a", "sealer-1", "0"] {
            assert!(good.parse::<WorkerName>().is_ok(), "{good}");
        }
        for bad in ["", "A", "a.b", "-a", "a-", "a/../b", &"a".repeat(33)] {
            assert!(bad.parse::<WorkerName>().is_err(), "{bad}");
        }
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
