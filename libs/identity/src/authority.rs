//! The hub's own authority, and the long-lived certificates of workers.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use lotus_runtime::Fault;
use lotus_types::Kind;
use rcgen::{ExtendedKeyUsagePurpose, Issuer, KeyPair, PublicKeyData};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, TrustAnchor};

use crate::certificate::{
    self, DAY, Facts, Holder, LONGEST, Window, authority_params, broken, fingerprint, worker_name,
};
use crate::register::{self, Register};
use crate::secret::Secret;
use crate::{Name, Refused, files, tls};

/// Largest key file, and largest file of the workers' register, that are read.
const LIMIT: u64 = 16 << 10;

/// Where an authority has the time from.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// The hub's authority: a key in a directory, for its owner alone, and registers of whose
/// certificates count. Processes that open the same directory are one authority: what one changes
/// counts for all at once.
pub struct Authority {
    dir: PathBuf,
    pub(crate) key: KeyPair,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) anchor: TrustAnchor<'static>,
    pub(crate) register: Register,
    /// Certificates that were verified, by their hash.
    pub(crate) verified: RwLock<HashMap<[u8; 32], Arc<Facts>>>,
    pub(crate) clock: Clock,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Authority({})", self.dir.display())
    }
}

/// A long-lived certificate, its key, and whom its holder trusts: what a worker's bundle is made
/// of.
pub struct Issued {
    /// The authority's certificate, DER.
    pub authority: Vec<u8>,
    /// The holder's certificate, DER.
    pub certificate: Vec<u8>,
    /// The holder's key, PKCS #8.
    pub key: Vec<u8>,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Issued")
    }
}

impl Authority {
    /// The authority in `dir`; makes one if there is none.
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        Self::with_clock(dir, Arc::new(SystemTime::now))
    }

    /// The same with another clock.
    pub fn with_clock(dir: &Path, clock: Clock) -> Result<Self, Fault> {
        let open = || {
            files::make_dir(dir)?;
            files::make_dir(&dir.join("workers"))?;
            let register = Register::open(register::within(dir))?;
            Ok::<_, io::Error>((Secret::new(authority_key(dir)?), register))
        };
        let (bytes, register) = open().map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("the hub's authority in {}: {e}", dir.display()),
                "make the directory readable and writable for this user alone",
            )
        })?;
        let key = KeyPair::try_from(bytes.bytes()).map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("{}/ca.key is no key: {e}", dir.display()),
                "delete it, restart the hub, and make new join bundles for all workers and spokes",
            )
        })?;
        // What others trust is the name and the key in it, so it needs not be kept.
        let made = authority_params().self_signed(&key);
        let certificate = made.map(|c| c.der().clone()).map_err(|e| broken(&e))?;
        let anchor = webpki::anchor_from_trusted_cert(&certificate)
            .map_err(|e| broken(&e))?
            .to_owned();
        Ok(Self {
            dir: dir.into(),
            key,
            certificate,
            anchor,
            register,
            verified: RwLock::default(),
            clock,
        })
    }

    /// TLS 1.3 of the hub's side: every client must show a certificate of this authority that is
    /// in force, and prove that it has the key. A spoke passes also when its time is over, so that
    /// it can renew; for anything else, [`Authority::caller`] refuses it.
    pub fn server_config(&self, alpn: &[&[u8]]) -> Result<ServerConfig, Fault> {
        let key = KeyPair::generate().map_err(|e| broken(&e))?;
        // Made anew at each start of the hub. Since when it is in force protects nobody, and the
        // clocks of others may be behind, or the hub's may be set back.
        let window = Window {
            from: 0,
            ..Window::around((self.clock)(), DAY, LONGEST)
        };
        let purpose = ExtendedKeyUsagePurpose::ServerAuth;
        let certificate = self
            .sign(&Holder::Hub, purpose, &key, window)
            .map_err(|e| broken(&e))?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let authority = self.certificate.clone();
        tls::server_config(authority, certificate, key, self.clock.clone(), alpn)
    }

    /// Makes a worker's certificate and key. Earlier ones of the same name are void.
    pub fn issue_worker(&self, name: &Name, life: Duration) -> Result<Issued, Fault> {
        let key = KeyPair::generate().map_err(|e| broken(&e))?;
        let window = Window::around((self.clock)(), DAY, life);
        let holder = Holder::Worker(name.clone());
        let purpose = ExtendedKeyUsagePurpose::ClientAuth;
        let certificate = self
            .sign(&holder, purpose, &key, window)
            .map_err(|e| broken(&e))?;
        files::replace(&self.entry(name), fingerprint(&certificate).as_bytes())?;
        Ok(Issued {
            authority: self.certificate.to_vec(),
            certificate: certificate.to_vec(),
            key: key.serialize_der(),
        })
    }

    /// The workers whose certificates count.
    pub fn workers(&self) -> Result<Vec<Name>, Fault> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.dir.join("workers"))? {
            // A temporary file has no name of a worker.
            names.extend(entry?.file_name().to_str().and_then(|n| n.parse().ok()));
        }
        names.sort();
        Ok(names)
    }

    /// Makes a worker's certificate void. False if there is none.
    pub fn revoke_worker(&self, name: &Name) -> Result<bool, Fault> {
        match fs::remove_file(self.entry(name)) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// The worker that a certificate is of, if the certificate counts now. That it is of this
    /// authority, and in force, the handshake has looked.
    pub fn worker(&self, certificate: &CertificateDer<'_>) -> Result<Name, Refused> {
        let name = worker_name(certificate).ok_or(Refused::NotOurs)?;
        match files::read(&self.entry(&name), LIMIT) {
            Ok(known) if known == fingerprint(certificate).as_bytes() => Ok(name),
            Ok(_) => Err(Refused::WrongKey),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Refused::Unknown),
            Err(e) => Err(files::naming(&self.entry(&name), &e).into()),
        }
    }

    pub(crate) fn sign(
        &self,
        holder: &Holder,
        purpose: ExtendedKeyUsagePurpose,
        key: &impl PublicKeyData,
        window: Window,
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        let issuer = Issuer::new(authority_params(), &self.key);
        let signed = certificate::params(holder, purpose, window)?.signed_by(key, &issuer);
        signed.map(|c| c.der().clone())
    }

    fn entry(&self, name: &Name) -> PathBuf {
        self.dir.join("workers").join(name.as_str())
    }
}

/// The key in the directory. Who opens it for the first time makes one.
fn authority_key(dir: &Path) -> io::Result<Vec<u8>> {
    let file = dir.join("ca.key");
    match files::read(&file, LIMIT) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        read => return read.map_err(|e| files::naming(&file, &e)),
    }
    let key = KeyPair::generate().map_err(io::Error::other)?;
    files::create_or_keep(&file, key.serialized_der())?;
    files::read(&file, LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_workers_certificate_that_counts_names_a_worker() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        let name: Name = "sealer-1".parse().unwrap();
        let first = authority.issue_worker(&name, DAY).unwrap();
        let who = |a: &Authority, b: &Issued| a.worker(&b.certificate.clone().into());
        // The hub was restarted in between.
        let again = Authority::open(dir.path()).unwrap();
        assert_eq!(who(&again, &first).unwrap(), name);
        assert_eq!(again.workers().unwrap(), std::slice::from_ref(&name));

        let second = authority.issue_worker(&name, DAY).unwrap();
        assert_eq!(who(&authority, &first), Err(Refused::WrongKey), "replaced");
        assert_eq!(who(&authority, &second).unwrap(), name);
        assert!(authority.revoke_worker(&name).unwrap());
        assert!(!authority.revoke_worker(&name).unwrap());
        assert_eq!(who(&authority, &second), Err(Refused::Unknown), "revoked");

        let invited = authority
            .invite(&"deals/d1".parse().unwrap(), "hub:1", DAY)
            .unwrap();
        let other = authority.worker(invited.certificate());
        assert_eq!(other, Err(Refused::NotOurs));
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
}
