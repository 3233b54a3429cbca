//! A host, and a peer that dials it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use futures::{AsyncReadExt as _, AsyncWriteExt as _, StreamExt as _};
use lotus_p2p::{Dialed, Host, HostLimits, Keypair, P2pError, PeerAddress, load_or_create};
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

    let to: PeerAddress = address.to_string().parse().unwrap();
    assert_eq!(to.peer, peer);
    let talk = async {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let dialed = Dialed::connect(Keypair::generate_ed25519(), &to, DEADLINE)
            .await
            .unwrap();
        let mut stream = dialed.opener(ECHO).open().await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.unwrap();
        assert_eq!(back, b"hello");
        let other = dialed.opener("/test/other").open().await;
        assert!(
            matches!(other, Err(P2pError::NoStream { .. })),
            "nobody takes that protocol"
        );
        let other = PeerAddress {
            peer: Keypair::generate_ed25519().public().to_peer_id(),
            ..to.clone()
        };
        let dialed = Dialed::connect(Keypair::generate_ed25519(), &other, DEADLINE).await;
        assert!(
            matches!(dialed, Err(P2pError::Unreachable { .. })),
            "{dialed:?}"
        );
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
