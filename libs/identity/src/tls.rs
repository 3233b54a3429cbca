//! TLS on both sides of a connection between hub and spokes, or hub and workers.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use lotus_runtime::Fault;
use rustls::client::Resumption;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use webpki::EndEntityCert;

use crate::certificate::{Holder, broken, unix};
use crate::{Clock, HUB_NAME};

/// How long a peer may take to say who it is.
pub(crate) const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(default_provider())
}

fn roots(authority: CertificateDer<'static>) -> Result<RootCertStore, Fault> {
    let mut roots = RootCertStore::empty();
    roots.add(authority).map_err(|e| broken(&e))?;
    Ok(roots)
}

fn protocols(alpn: &[&[u8]]) -> Vec<Vec<u8>> {
    alpn.iter().map(|p| p.to_vec()).collect()
}

/// TLS 1.3 of the side that is not the hub: trusts this authority alone, and shows a certificate.
pub fn client_config(
    authority: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, Fault> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| broken(&e))?
        .with_root_certificates(roots(authority)?)
        .with_client_auth_cert(vec![certificate], key)
        .map_err(|e| broken(&e))?;
    config.alpn_protocols = protocols(alpn);
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// TLS 1.3 of the hub's side.
pub(crate) fn server_config(
    authority: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    clock: Clock,
    alpn: &[&[u8]],
) -> Result<ServerConfig, Fault> {
    let roots = Arc::new(roots(authority)?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|e| broken(&e))?;
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(Time(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| broken(&e))?
        .with_client_cert_verifier(Arc::new(LateSpokes(verifier)))
        .with_single_cert(vec![certificate], key)
        .map_err(|e| broken(&e))?;
    config.alpn_protocols = protocols(alpn);
    // Each connection proves that its peer has the key of the certificate that it shows now.
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// A connection to the hub, on the other side.
pub type ToHub<S> = TlsStream<S>;

/// Shakes hands with the hub over a connection, whoever dialed it.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ClientConfig>,
    stream: S,
) -> io::Result<ToHub<S>> {
    let name = ServerName::try_from(HUB_NAME).map_err(io::Error::other)?;
    let shaking = TlsConnector::from(config).connect(name, stream);
    let shaken = tokio::time::timeout(HANDSHAKE_LIMIT, shaking).await;
    shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The authority's clock, for rustls.
struct Time(Clock);

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Time")
    }
}

impl TimeProvider for Time {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(unix((self.0)())))
    }
}

/// Lets in whoever has a certificate of the authority that is in force, and spokes also with one
/// that is not: they must be able to ask for a new one. At each call the register is asked, and
/// there the time counts.
#[derive(Debug)]
struct LateSpokes(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for LateSpokes {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verify = |at| self.0.verify_client_cert(end_entity, intermediates, at);
        // The error names a moment of the certificate's time: all else is verified at that one.
        let (refused, at) = match verify(now) {
            Err(Error::InvalidCertificate(e)) => match e {
                CertificateError::ExpiredContext { not_after, .. } => (e, not_after),
                CertificateError::NotValidYetContext { not_before, .. } => (e, not_before),
                e => return Err(e.into()),
            },
            other => return other,
        };
        let parsed = EndEntityCert::try_from(end_entity);
        match parsed.map(|p| Holder::claimed(&p)) {
            Ok(Holder::Spoke(_)) => verify(at),
            _ => Err(refused.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
