//! Real handshakes, over a pipe in memory.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected as _;

use super::*;
use crate::listen::{self, accept, secure};
use crate::{Secured, Shown, client_config, connect, local};

const H2: &[&[u8]] = &[b"h2"];
const ADDR: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

impl Hub {
    fn client(&self, key: &KeyPair, certificate: &CertificateDer<'static>) -> ClientConfig {
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let authority = self.authority.certificate.clone();
        client_config(authority, certificate.clone(), key, H2).unwrap()
    }

    /// What the hub's side says of a client.
    async fn shakes(&self, client: ClientConfig) -> io::Result<Secured<DuplexStream>> {
        let (near, far) = duplex(64 << 10);
        let tls = Arc::new(self.authority.server_config(H2).unwrap());
        let dialing = async {
            // One byte, as the client's side ends before the hub has looked at the certificate.
            let mut stream = connect(Arc::new(client), far).await?;
            stream.read_u8().await
        };
        let serving = async {
            let mut secured = secure(tls, near, Some(ADDR)).await?;
            secured.write_u8(7).await?;
            secured.flush().await?;
            Ok::<_, io::Error>(secured)
        };
        let (served, dialed) = tokio::join!(serving, dialing);
        assert_eq!(served.is_ok(), dialed.is_ok(), "{served:?} {dialed:?}");
        served
    }
}

#[tokio::test]
async fn a_spoke_passes_and_its_certificate_is_told() {
    let hub = Hub::new();
    let (key, certificate) = hub.joined("retrieval/r1");
    let secured = hub.shakes(hub.client(&key, &certificate)).await.unwrap();
    assert_eq!(secured.peer().certificate, certificate);
    assert_eq!(secured.peer().addr, Some(ADDR));
    let bundle = hub.invite("deals/d1");
    let secured = hub.shakes(bundle.client_config(H2).unwrap()).await;
    assert_eq!(&secured.unwrap().peer().certificate, bundle.certificate());
}

#[tokio::test]
async fn an_expired_spoke_passes_and_may_renew_and_nobody_else_does() {
    let hub = Hub::new();
    let (key, certificate) = hub.joined("retrieval/r1");
    let bundle = hub.invite("deals/d1");
    let name = "w".parse().unwrap();
    let worker = hub.authority.issue_worker(&name, LIFE).unwrap();
    hub.wait(REJOIN);
    let secured = hub.shakes(hub.client(&key, &certificate)).await.unwrap();
    let shown = &secured.peer().certificate;
    assert_eq!(hub.authority.caller(shown), Err(Refused::Expired));
    assert!(hub.authority.renew_late(shown, REJOIN).is_ok());

    let joins = hub.shakes(bundle.client_config(H2).unwrap()).await;
    assert!(joins.is_err(), "an expired bundle");
    let key = KeyPair::try_from(worker.key).unwrap();
    let works = hub.shakes(hub.client(&key, &worker.certificate.into()));
    assert!(works.await.is_err(), "an expired worker");

    // The hub's clock was wrong, and now it is right.
    let (key, certificate) = hub.joined("retrieval/r2");
    hub.set_back(REJOIN);
    let secured = hub.shakes(hub.client(&key, &certificate)).await.unwrap();
    let shown = &secured.peer().certificate;
    assert_eq!(hub.authority.caller(shown), Err(Refused::Expired));
    assert!(hub.authority.renew_late(shown, REJOIN).is_ok());
}

#[tokio::test]
async fn whoever_has_no_certificate_of_the_authority_fails() {
    let hub = Hub::new();
    let (key, certificate) = hub.joined("retrieval/r1");

    let other = Hub::new();
    let (their_key, theirs) = other.joined("retrieval/r1");
    // It trusts us, and shows a certificate of theirs; of theirs that is over, too.
    let client = || hub.client(&their_key, &theirs);
    assert!(hub.shakes(client()).await.is_err());
    hub.wait(HOUR);
    assert!(hub.shakes(client()).await.is_err());
    // It trusts them alone.
    let client = other.client(&their_key, &theirs);
    assert!(hub.shakes(client).await.is_err());

    let mut roots = RootCertStore::empty();
    roots.add(hub.authority.certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let nobody = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    assert!(hub.shakes(nobody).await.is_err());

    // A certificate without its key.
    let thief = KeyPair::generate().unwrap();
    let der = PrivatePkcs8KeyDer::from(thief.serialize_der()).into();
    let authority = hub.authority.certificate.clone();
    let made = client_config(authority, certificate.clone(), der, H2);
    if let Ok(client) = made {
        assert!(hub.shakes(client).await.is_err());
    }
    assert!(hub.shakes(hub.client(&key, &certificate)).await.is_ok());
}

#[tokio::test]
async fn the_port_passes_on_who_shook_hands_and_no_other() {
    let hub = Hub::new();
    let (key, certificate) = hub.joined("retrieval/r1");
    let tls = Arc::new(hub.authority.server_config(H2).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (to, mut from) = mpsc::channel(4);
    let stop = CancellationToken::new();
    let serving = accept(listener, tls, 1000, "spoke", to, stop.clone());
    let meeting = async {
        // Says nothing, and holds nobody up.
        let silent = TcpStream::connect(addr).await.unwrap();
        let tcp = TcpStream::connect(addr).await.unwrap();
        let ours = tcp.local_addr().unwrap();
        let client = Arc::new(hub.client(&key, &certificate));
        let mut stream = connect(client, tcp).await.unwrap();
        let mut secured: Secured = from.recv().await.unwrap().unwrap();
        let listen::Peer {
            certificate: c,
            addr,
        } = secured.peer().clone();
        assert_eq!((c, addr), (certificate.clone(), Some(ours)));
        stream.write_all(b"hi").await.unwrap();
        stream.flush().await.unwrap();
        let mut said = [0; 2];
        secured.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hi");
        stop.cancel();
        drop(silent);
    };
    let both = async { tokio::join!(serving, meeting) };
    tokio::time::timeout(HOUR / 60, both).await.unwrap();
    assert!(from.recv().await.is_none());
}

#[tokio::test]
async fn the_socket_of_this_host_tells_spokes_from_the_operator() {
    let hub = Hub::new();
    let (key, certificate) = hub.joined("retrieval/r1");
    let tls = Arc::new(hub.authority.server_config(H2).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hub.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (to, mut from) = mpsc::channel(4);
    let stop = CancellationToken::new();
    let serving = local::accept(listener, tls, 1000, to, stop.clone());
    let meeting = async {
        // Says nothing, or goes again, and holds nobody up.
        let silent = UnixStream::connect(&path).await.unwrap();
        drop(UnixStream::connect(&path).await.unwrap());
        let client = Arc::new(hub.client(&key, &certificate));
        let unix = UnixStream::connect(&path).await.unwrap();
        let _spoke = connect(client, unix).await.unwrap();
        let spoke = from.recv().await.unwrap().unwrap();
        let secured = spoke.secured().unwrap();
        assert_eq!(secured.peer().certificate, certificate);
        assert_eq!(secured.peer().addr, None);
        // What was looked at stays to be read.
        let mut operator = UnixStream::connect(&path).await.unwrap();
        operator.write_all(b"PRI").await.unwrap();
        let mut plain = from.recv().await.unwrap().unwrap();
        let shown = plain.connect_info();
        assert!(matches!(shown, Shown::Operator), "{shown:?}");
        let mut said = [0; 3];
        plain.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"PRI");
        stop.cancel();
        drop(silent);
    };
    let both = async { tokio::join!(serving, meeting) };
    tokio::time::timeout(Duration::from_secs(20), both)
        .await
        .unwrap();
}
