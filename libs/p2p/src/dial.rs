use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use futures::StreamExt as _;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::SwarmEvent;
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::{Multiaddr, PeerId, StreamProtocol, identity};
use libp2p_stream::Control;
use tokio::task::JoinSet;
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _};

use crate::{P2pError, Stream, multiaddr, swarm};

/// Where a peer is, and who it is: `/ip4/192.0.2.1/tcp/80/p2p/12D3...`. Names are not taken, so
/// that whoever checks the address checks what is dialed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// TCP address.
    pub at: SocketAddr,
    /// Its name, which the handshake proves.
    pub peer: PeerId,
}

impl FromStr for PeerAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed: Multiaddr = text.parse().map_err(|e| format!("no multiaddress: {e}"))?;
        let mut parts = parsed.iter();
        let ip = match parts.next() {
            Some(Protocol::Ip4(ip)) => ip.into(),
            Some(Protocol::Ip6(ip)) => ip.into(),
            _ => return Err("it does not begin with /ip4 or /ip6".into()),
        };
        match (parts.next(), parts.next(), parts.next()) {
            (Some(Protocol::Tcp(port)), Some(Protocol::P2p(peer)), None) => Ok(Self {
                at: SocketAddr::new(ip, port),
                peer,
            }),
            _ => Err("it is not of the form /ip4/ADDRESS/tcp/PORT/p2p/PEER".into()),
        }
    }
}

/// A connection to one peer, which ends when this is dropped.
pub struct Dialed {
    control: Control,
    peer: PeerId,
    _connection: JoinSet<()>,
}

impl std::fmt::Debug for Dialed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Dialed({})", self.peer)
    }
}

impl Dialed {
    /// Dials a peer, as the one whose key this is.
    ///
    /// # Errors
    /// It can not be reached within `patience`, or it is another one.
    pub async fn connect(
        key: identity::Keypair,
        to: &PeerAddress,
        patience: Duration,
    ) -> Result<Self, P2pError> {
        let mut swarm = swarm(key, |_| libp2p_stream::Behaviour::new())?;
        let unreachable = |why: String| P2pError::Unreachable { at: to.at, why };
        let dial = DialOpts::peer_id(to.peer).addresses(vec![multiaddr(to.at)]);
        swarm
            .dial(dial.build())
            .map_err(|e| unreachable(e.to_string()))?;
        let connected = async {
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::ConnectionEstablished { .. } => return Ok(()),
                    SwarmEvent::OutgoingConnectionError { error, .. } => {
                        return Err(unreachable(error.to_string()));
                    }
                    _ => {}
                }
            }
        };
        tokio::time::timeout(patience, connected)
            .await
            .map_err(|_| unreachable(format!("no answer within {patience:?}")))??;
        let control = swarm.behaviour().new_control();
        let mut connection = JoinSet::new();
        connection.spawn(async move {
            loop {
                swarm.select_next_some().await;
            }
        });
        Ok(Self {
            control,
            peer: to.peer,
            _connection: connection,
        })
    }

    /// Opens streams of a protocol.
    #[must_use]
    pub fn opener(&self, protocol: &'static str) -> Opener {
        Opener {
            control: self.control.clone(),
            peer: self.peer,
            protocol: StreamProtocol::new(protocol),
        }
    }
}

/// Opens streams of one protocol to one peer, while the connection is kept.
#[derive(Clone)]
pub struct Opener {
    control: Control,
    peer: PeerId,
    protocol: StreamProtocol,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Opener({}, {})", self.peer, self.protocol)
    }
}

impl Opener {
    /// Opens one more.
    ///
    /// # Errors
    /// The connection is gone, or the peer does not take the protocol.
    pub async fn open(&mut self) -> Result<Compat<Stream>, P2pError> {
        let opened = self
            .control
            .open_stream(self.peer, self.protocol.clone())
            .await;
        let stream = opened.map_err(|e| P2pError::NoStream {
            peer: self.peer,
            why: e.to_string(),
        })?;
        Ok(stream.compat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_and_a_name_make_a_peer() {
        let peer = identity::Keypair::generate_ed25519().public().to_peer_id();
        let good: PeerAddress = format!("/ip4/192.0.2.1/tcp/80/p2p/{peer}").parse().unwrap();
        assert_eq!((good.at, good.peer), (([192, 0, 2, 1], 80).into(), peer));
        let six: PeerAddress = format!("/ip6/2001:db8::1/tcp/80/p2p/{peer}")
            .parse()
            .unwrap();
        assert!(six.at.is_ipv6());
        for bad in [
            String::new(),
            "x".into(),
            "/ip4/192.0.2.1/tcp/80".into(),
            format!("/dns4/a.example/tcp/80/p2p/{peer}"),
            format!("/ip4/192.0.2.1/udp/80/p2p/{peer}"),
            format!("/ip4/192.0.2.1/tcp/80/p2p/{peer}/p2p-circuit"),
            format!("/p2p/{peer}/ip4/192.0.2.1/tcp/80"),
        ] {
            assert!(bad.parse::<PeerAddress>().is_err(), "{bad}");
        }
    }
}
