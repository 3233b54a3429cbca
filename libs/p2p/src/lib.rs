//! A libp2p host that takes streams, and connections that are dialed: the owner of libp2p.
//!
//! Filecoin's market protocols open a stream, write one object, and read one. So a host here is
//! TCP, Noise and Yamux, identify (clients look for protocols there) and ping, behind limits for
//! connections, and hands out the streams of each protocol. It dials nobody; who fetches from a peer
//! has a connection of its own ([`Dialed`]).

mod dial;
mod identity;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::StreamExt as _;
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{StreamProtocol, Swarm, identify, noise, ping, tcp, yamux};
use lotus_types::Kind;
use tokio_util::sync::CancellationToken;

pub use dial::{Dialed, Opener, PeerAddress};
pub use identity::load_or_create;
pub use libp2p::identity::Keypair;
pub use libp2p::{Multiaddr, PeerId, Stream};
pub use libp2p_stream::IncomingStreams;

/// Connections whose handshake is not done yet.
const MAX_PENDING: u32 = 64;
/// A connection without a stream is closed after this time.
const IDLE: Duration = Duration::from_secs(60);
/// Longest wait for the listener.
const LISTEN_PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no host.
#[derive(Debug, thiserror::Error)]
pub enum P2pError {
    /// The address can not be listened on.
    #[error("can not listen on {addr}: {why}")]
    Listen {
        /// As configured.
        addr: SocketAddr,
        /// The system's words.
        why: String,
    },
    /// The host's key can not be read or made.
    #[error("the peer key {path} cannot be used: {why}")]
    Key {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// A peer can not be reached, or another one is there.
    #[error("the peer at {at} can not be reached: {why}")]
    Unreachable {
        /// Where it should be.
        at: SocketAddr,
        /// The library's words.
        why: String,
    },
    /// A peer gives no stream.
    #[error("peer {peer} gives no stream: {why}")]
    NoStream {
        /// Its name.
        peer: PeerId,
        /// The library's words.
        why: String,
    },
    /// The library refuses the setup.
    #[error("libp2p: {0}")]
    Setup(String),
}

impl P2pError {
    /// Who must act.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Listen { .. } | Self::Key { .. } => Kind::Config,
            Self::Unreachable { .. } | Self::NoStream { .. } => Kind::Transport,
            Self::Setup(_) => Kind::Fatal,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Listen { .. } => "free the port, or configure another address".into(),
            Self::Key { .. } => {
                "restore it from a backup; without it clients know this provider by another peer id"
                    .into()
            }
            Self::Unreachable { .. } | Self::NoStream { .. } => {
                "the peer must be up, at that address, and serve the protocol".into()
            }
            Self::Setup(_) => "report this".into(),
        }
    }
}

/// Limits of a host.
#[derive(Clone, Copy, Debug)]
pub struct HostLimits {
    /// Connections in all.
    pub connections: u32,
    /// Connections of one peer.
    pub per_peer: u32,
}

#[derive(NetworkBehaviour)]
struct Behaviour {
    limits: connection_limits::Behaviour,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    streams: libp2p_stream::Behaviour,
}

/// A host that is listening. It does nothing until [`Host::run`].
pub struct Host {
    swarm: Swarm<Behaviour>,
    listening: Multiaddr,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Host({})", self.address())
    }
}

impl Host {
    /// Listens on a TCP address; port 0 lets the system choose. Returns when the address is bound.
    ///
    /// # Errors
    /// The address can not be bound.
    pub async fn listen(
        key: Keypair,
        addr: SocketAddr,
        agent: &str,
        limits: HostLimits,
    ) -> Result<Self, P2pError> {
        let agent = agent.to_owned();
        let mut swarm = swarm(key, |key| Behaviour {
            limits: connection_limits::Behaviour::new(
                ConnectionLimits::default()
                    .with_max_pending_incoming(Some(MAX_PENDING))
                    .with_max_pending_outgoing(Some(0))
                    .with_max_established(Some(limits.connections))
                    .with_max_established_per_peer(Some(limits.per_peer)),
            ),
            identify: identify::Behaviour::new(
                identify::Config::new("/ipfs/id/1.0.0".into(), key.public())
                    .with_agent_version(agent),
            ),
            ping: ping::Behaviour::default(),
            streams: libp2p_stream::Behaviour::new(),
        })?;
        let refused = |why: String| P2pError::Listen { addr, why };
        swarm
            .listen_on(multiaddr(addr))
            .map_err(|e| refused(e.to_string()))?;
        let bound = async {
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::NewListenAddr { address, .. } => return Ok(address),
                    SwarmEvent::ListenerClosed { reason, .. } => {
                        return Err(reason
                            .err()
                            .map_or_else(|| "the listener closed".to_owned(), |e| e.to_string()));
                    }
                    SwarmEvent::ListenerError { error, .. } => return Err(error.to_string()),
                    _ => {}
                }
            }
        };
        let listening = tokio::time::timeout(LISTEN_PATIENCE, bound)
            .await
            .map_err(|_| refused("no answer of the system".into()))?
            .map_err(refused)?;
        Ok(Self { swarm, listening })
    }

    /// The host's name.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        *self.swarm.local_peer_id()
    }

    /// Where it listens, with its name at the end: what a client dials.
    #[must_use]
    pub fn address(&self) -> Multiaddr {
        self.listening.clone().with(Protocol::P2p(self.peer_id()))
    }

    /// The streams that peers open for a protocol. One that comes while nobody takes is closed.
    ///
    /// # Errors
    /// The protocol is malformed or taken already.
    pub fn accept(&self, protocol: &'static str) -> Result<IncomingStreams, P2pError> {
        self.swarm
            .behaviour()
            .streams
            .new_control()
            .accept(StreamProtocol::new(protocol))
            .map_err(|e| P2pError::Setup(format!("{protocol}: {e}")))
    }

    /// Keeps the connections until stopped; then all are closed.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                event = self.swarm.select_next_some() => event,
            };
            match event {
                SwarmEvent::IncomingConnectionError {
                    send_back_addr,
                    error,
                    ..
                } => tracing::debug!(from = %send_back_addr, %error, "connection refused"),
                SwarmEvent::ListenerError { error, .. } => {
                    tracing::warn!(%error, "the libp2p listener fails");
                }
                _ => {}
            }
        }
    }
}

/// A node over TCP, Noise and Yamux, that neither listens nor dials yet.
fn swarm<B: NetworkBehaviour>(
    key: Keypair,
    behaviour: impl FnOnce(&Keypair) -> B,
) -> Result<Swarm<B>, P2pError> {
    let setup = |e: &dyn std::fmt::Display| P2pError::Setup(e.to_string());
    let swarm = libp2p::SwarmBuilder::with_existing_identity(key)
        .with_tokio()
        .with_tcp(
            tcp::Config::default().nodelay(true),
            noise::Config::new,
            yamux::Config::default,
        )
        .map_err(|e| setup(&e))?
        .with_behaviour(behaviour)
        .map_err(|e| setup(&e))?
        .with_swarm_config(|c| c.with_idle_connection_timeout(IDLE))
        .build();
    Ok(swarm)
}

/// A TCP address as a multiaddress.
#[must_use]
pub fn multiaddr(addr: SocketAddr) -> Multiaddr {
    let host = match addr.ip() {
        IpAddr::V4(ip) => Protocol::Ip4(ip),
        IpAddr::V6(ip) => Protocol::Ip6(ip),
    };
    Multiaddr::empty()
        .with(host)
        .with(Protocol::Tcp(addr.port()))
}
