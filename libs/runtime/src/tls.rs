//! TLS of a server for the public: certificate and key come from files, and are read again when
//! they change, so that a renewed certificate needs no restart.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lotus_types::Kind;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::Fault;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// Largest file that is read, bytes; a chain of a few certificates has some thousands.
const MAX_PEM: u64 = 1 << 20;

/// A certificate with its key, as clients get it. Clones share it.
#[derive(Clone, Debug)]
pub struct Tls {
    cert: PathBuf,
    key: PathBuf,
    current: Arc<Current>,
    config: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let pair = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Some(pair.clone())
    }
}

impl Tls {
    /// Reads a chain of certificates, the server's own first, and its private key, both in PEM.
    /// Clients may speak HTTP/2 or HTTP/1.1, as they choose by ALPN.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, Fault> {
        let pair = read(cert, key).map_err(|why| fault(cert, key, &why))?;
        let current = Arc::new(Current(RwLock::new(Arc::new(pair))));
        let provider = Arc::new(ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| fault(cert, key, &e.to_string()))?
            .with_no_client_auth()
            .with_cert_resolver(current.clone());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self {
            cert: cert.into(),
            key: key.into(),
            current,
            config: Arc::new(config),
        })
    }

    /// What `SECTION.tls_cert` and `SECTION.tls_key` name; `None` if both are empty.
    pub fn of(section: &str, cert: &Path, key: &Path) -> Result<Option<Self>, Fault> {
        match (cert.as_os_str().is_empty(), key.as_os_str().is_empty()) {
            (true, true) => Ok(None),
            (false, false) => Self::load(cert, key).map(Some),
            _ => Err(Fault::new(
                Kind::Config,
                format!("one of {section}.tls_cert and {section}.tls_key is set, the other is not"),
                "set both for HTTPS, or none for plain HTTP",
            )),
        }
    }

    /// The same for a server that does not speak HTTP/2.
    #[must_use]
    pub fn http1(mut self) -> Self {
        Arc::make_mut(&mut self.config).alpn_protocols = vec![b"http/1.1".to_vec()];
        self
    }

    /// Shakes hands with a client. Bound the time that it may take.
    pub async fn accept<S>(
        &self,
        stream: S,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Unpin + Send + use<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        self.acceptor().accept(stream).await
    }

    /// Reads the files again and again, until stopped. A pair that cannot be used leaves the last
    /// good one in place, and is complained about once.
    pub async fn follow(&self, stop: &CancellationToken) {
        let mut complained = String::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let this = self.clone();
            // Blocks for two small files.
            let looked = tokio::task::spawn_blocking(move || this.refresh()).await;
            match looked {
                Ok(Ok(new)) => {
                    complained.clear();
                    if new {
                        tracing::info!(cert = %self.cert.display(), "new certificate");
                    }
                }
                Ok(Err(error)) if error.message == complained => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, fix = error.fix, "the changed certificate is not used; the last good one stays");
                    complained = error.message;
                }
                Err(error) => tracing::warn!(%error, "looking at the certificate"),
            }
        }
    }

    /// Whether there was a new pair, which is used from now on. The files themselves are compared:
    /// their times tell neither a change of permissions nor an error that has passed.
    fn refresh(&self) -> Result<bool, Fault> {
        let pair = read(&self.cert, &self.key).map_err(|why| fault(&self.cert, &self.key, &why))?;
        let current = &self.current.0;
        // The certificate says which key is its own.
        let same = |now: &CertifiedKey| now.cert == pair.cert;
        if same(&current.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(false);
        }
        *current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(pair);
        Ok(true)
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.config.clone().into()
    }
}

fn fault(cert: &Path, key: &Path, why: &str) -> Fault {
    Fault::new(
        Kind::Config,
        format!(
            "no TLS with {} and {}: {why}",
            cert.display(),
            key.display()
        ),
        "name a PEM file with the chain of certificates, the server's own first, and one with its \
         private key; both must be readable for the user of this process",
    )
}

fn read(cert: &Path, key: &Path) -> Result<CertifiedKey, String> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem(cert)?)
        .collect::<Result<_, _>>()
        .map_err(|e| format!("{}: {e}", cert.display()))?;
    if chain.is_empty() {
        return Err(format!("{} holds no certificate", cert.display()));
    }
    let key =
        PrivateKeyDer::from_pem_slice(&pem(key)?).map_err(|e| format!("{}: {e}", key.display()))?;
    CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(|e| e.to_string())
}

fn pem(path: &Path) -> Result<Vec<u8>, String> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?
            .take(MAX_PEM + 1)
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_PEM {
            return Err(io::Error::other(format!("more than {MAX_PEM} bytes")));
        }
        Ok(bytes)
    };
    read().map_err(|e| format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn pair(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
        let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        fs::write(&cert, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        (cert, key)
    }

    fn served(tls: &Tls) -> Vec<u8> {
        let pair = tls.current.0.read().unwrap();
        pair.end_entity_cert().unwrap().to_vec()
    }

    #[test]
    fn a_renewed_pair_is_used_and_a_bad_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = pair(dir.path(), "one.example");
        let tls = Tls::load(&cert, &key).unwrap();
        let first = served(&tls);
        assert!(!tls.refresh().unwrap(), "nothing changed");

        pair(dir.path(), "two.example");
        assert!(tls.refresh().unwrap());
        let second = served(&tls);
        assert_ne!(first, second);

        // Other files, whatever their times say.
        let times = [&cert, &key].map(|f| fs::metadata(f).unwrap().modified().unwrap());
        pair(dir.path(), "six.example");
        for (file, time) in [&cert, &key].into_iter().zip(times) {
            let file = File::options().write(true).open(file).unwrap();
            file.set_modified(time).unwrap();
        }
        assert!(tls.refresh().unwrap());
        let second = served(&tls);

        // A key of another certificate, half a renewal, and then the other half.
        let other = tempfile::tempdir().unwrap();
        let (next_cert, next_key) = pair(other.path(), "three.example");
        fs::copy(&next_key, &key).unwrap();
        let e = tls.refresh().unwrap_err();
        assert_eq!(e.kind, Kind::Config, "{e}");
        assert_eq!(served(&tls), second);
        fs::copy(&next_cert, &cert).unwrap();
        assert!(tls.refresh().unwrap());
        assert_ne!(served(&tls), second);
        let third = served(&tls);
        fs::remove_file(&cert).unwrap();
        assert!(tls.refresh().is_err());
        assert_eq!(served(&tls), third);
    }

    #[test]
    fn what_is_no_pair_is_refused_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = pair(dir.path(), "one.example");
        let absent = dir.path().join("absent.pem");
        let empty = dir.path().join("empty.pem");
        fs::write(&empty, "").unwrap();
        let large = dir.path().join("large.pem");
        let text = vec![b'a'; usize::try_from(MAX_PEM).unwrap() + 1];
        fs::write(&large, text).unwrap();
        for (cert, key, named) in [
            (&absent, &key, "absent.pem"),
            (&cert, &absent, "absent.pem"),
            (&empty, &key, "holds no certificate"),
            (&cert, &empty, "empty.pem"),
            (&key, &key, "holds no certificate"),
            (&large, &key, "large.pem"),
        ] {
            let e = Tls::load(cert, key).unwrap_err();
            assert!(e.message.contains(named), "{e}");
            assert!(e.fix.contains("PEM"), "{}", e.fix);
        }
    }
}
