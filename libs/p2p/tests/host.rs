//! A host, and another libp2p node that talks to it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use futures::{AsyncReadExt as _, AsyncWriteExt as _, StreamExt as _};
use libp2p::{StreamProtocol, noise, tcp, yamux};
use lotus_p2p::{Host, HostLimits, Keypair, P2pError, load_or_create};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

const ECHO: &str = "/test/echo/1.0.0";
const DEADLINE: Duration = Duration::from_secs(20);

async fn host() -> Host {
    let limits = HostLimits {
        connections: 8,
        per_peer: 2,
    };
    let any = ([127, 0, 0, 1], 0).into();
    Host::listen(Keypair::generate_ed25519(), any, "test", limits)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_peer_opens_a_stream_and_is_answered() {
    let host = host().await;
    let (peer, address) = (host.peer_id(), host.address());
    let mut streams = host.accept(ECHO).unwrap();
    assert!(host.accept(ECHO).is_err(), "a protocol has one taker");
    let stop = CancellationToken::new();
    let mut tasks = JoinSet::new();
    tasks.spawn(host.run(stop.clone()));
    tasks.spawn(async move {
        let (_, mut stream) = streams.next().await.unwrap();
        let mut buf = [0; 5];
        stream.read_exact(&mut buf).await.unwrap();
        stream.write_all(&buf).await.unwrap();
        stream.close().await.unwrap();
    });

    let mut dialer = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            noise::Config::new,
            yamux::Config::default,
        )
        .unwrap()
        .with_behaviour(|_| libp2p_stream::Behaviour::new())
        .unwrap()
        .build();
    let mut control = dialer.behaviour().new_control();
    dialer.dial(address).unwrap();
    tasks.spawn(async move {
        loop {
            dialer.select_next_some().await;
        }
    });
    let talk = async {
        let mut stream = control
            .open_stream(peer, StreamProtocol::new(ECHO))
            .await
            .unwrap();
        stream.write_all(b"hello").await.unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.unwrap();
        assert_eq!(back, b"hello");
        let other = control.open_stream(peer, StreamProtocol::new("/test/other"));
        assert!(other.await.is_err(), "nobody takes that protocol");
    };
    tokio::time::timeout(DEADLINE, talk).await.unwrap();
    stop.cancel();
}

#[tokio::test]
async fn a_taken_port_is_a_mistake_of_the_configuration() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let limits = HostLimits {
        connections: 1,
        per_peer: 1,
    };
    let addr = taken.local_addr().unwrap();
    let refused = Host::listen(Keypair::generate_ed25519(), addr, "test", limits).await;
    assert!(
        matches!(refused, Err(P2pError::Listen { .. })),
        "{refused:?}"
    );
}

#[test]
fn the_name_outlives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peer.key");
    let key = load_or_create(&path).unwrap();
    let again = load_or_create(&path).unwrap();
    assert_eq!(key.public(), again.public());
    std::fs::write(&path, b"nonsense").unwrap();
    assert!(matches!(load_or_create(&path), Err(P2pError::Key { .. })));
}
