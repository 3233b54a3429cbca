//! How connections to the hub come about: this side opens them, or waits for the hub to do so, where
//! it may open none to the hub.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use lotus_identity::Waiting;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio_util::either::Either;

use crate::HubError;

/// Connections from the hub that wait to be used; of more the oldest are closed.
const WAITING: usize = 16;
/// Pause after an error of the listener itself.
const PAUSE: Duration = Duration::from_millis(200);

/// A connection before the handshake.
pub(crate) type Stream = Either<UnixStream, TcpStream>;

/// Where connections come from.
#[derive(Clone, Debug)]
pub(crate) enum Way {
    /// From here, to `host:port` or `unix:/path`.
    Out(Arc<str>),
    /// From the hub.
    In(Arc<Door>),
}

/// The port that the hub dials.
#[derive(Debug)]
pub(crate) struct Door {
    waiting: Arc<Waiting<TcpStream>>,
    /// Ends with the last user.
    _accepting: JoinSet<()>,
}

impl Way {
    /// The way of an address as in the configuration: `unix:/path`, `https://host:port`, or
    /// `listen:ip:port` for a port here.
    pub(crate) async fn open(addr: &str) -> Result<Self, HubError> {
        if addr.starts_with("unix:") {
            return Ok(Self::Out(addr.into()));
        }
        if let Some(far) = addr.strip_prefix("https://") {
            return Ok(Self::Out(far.into()));
        }
        let bad = || HubError::BadAddress { addr: addr.into() };
        let port = addr.strip_prefix("listen:").ok_or_else(bad)?;
        let listener = TcpListener::bind(port).await.map_err(|e| HubError::Port {
            port: port.into(),
            why: e.to_string(),
        })?;
        let waiting = Arc::new(Waiting::new(WAITING));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, waiting.clone()));
        Ok(Self::In(Arc::new(Door {
            waiting,
            _accepting: accepting,
        })))
    }

    /// The next connection.
    pub(crate) async fn stream(&self) -> io::Result<Stream> {
        match self {
            Self::Out(addr) => match addr.strip_prefix("unix:") {
                Some(path) => UnixStream::connect(path).await.map(Either::Left),
                None => {
                    let tcp = TcpStream::connect(&**addr).await?;
                    tcp.set_nodelay(true)?;
                    lotus_identity::keep_alive(&tcp)?;
                    Ok(Either::Right(tcp))
                }
            },
            Self::In(door) => Ok(Either::Right(door.waiting.next(is_open).await)),
        }
    }
}

/// The hub says nothing before the handshake: whatever can be read is the connection's end.
fn is_open(tcp: &TcpStream) -> bool {
    let read = tcp.try_read(&mut [0]);
    read.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
}

/// Keeps what connects. The handshake tells whether it is the hub.
async fn accept(listener: TcpListener, waiting: Arc<Waiting<TcpStream>>) {
    loop {
        let accepted = match listener.accept().await {
            Ok((tcp, _)) => tcp
                .set_nodelay(true)
                .and_then(|()| lotus_identity::keep_alive(&tcp))
                .map(|()| tcp),
            Err(e) => Err(e),
        };
        match accepted {
            Ok(tcp) => waiting.put(tcp),
            Err(error) => {
                tracing::warn!(%error, "can not accept a connection of the hub");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[tokio::test]
    async fn the_newest_open_connection_is_used() {
        let way = Way::open("listen:127.0.0.1:0").await;
        assert!(way.is_ok());
        let waiting = Arc::new(Waiting::new(WAITING));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let connect = async || TcpStream::connect(addr).await.unwrap();
        let (open, closed, mut talks) = (connect().await, connect().await, connect().await);
        drop(closed);
        talks.write_all(b"x").await.unwrap();
        for ends in [false, true, true] {
            let (tcp, _) = listener.accept().await.unwrap();
            if ends {
                tcp.readable().await.unwrap();
            }
            waiting.put(tcp);
        }
        let limit = Duration::from_secs(10);
        let next = || tokio::time::timeout(limit, waiting.next(is_open));
        assert_eq!(
            next().await.unwrap().peer_addr().ok(),
            open.local_addr().ok()
        );
        // Nothing is left; the next one that comes is taken.
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, waiting.clone()));
        let (next, came) = tokio::join!(next(), connect());
        assert_eq!(next.unwrap().peer_addr().ok(), came.local_addr().ok());
    }

    #[tokio::test]
    async fn an_address_has_one_of_three_forms() {
        for addr in ["", "10.0.0.5:2344", "http://h:1", "listen"] {
            let way = Way::open(addr).await;
            assert!(matches!(way, Err(HubError::BadAddress { .. })), "{addr}");
        }
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = format!("listen:{}", taken.local_addr().unwrap());
        let way = Way::open(&addr).await;
        assert!(matches!(way, Err(HubError::Port { .. })), "{way:?}");
        assert!(Way::open("unix:/p").await.is_ok() && Way::open("https://h:1").await.is_ok());
    }
}
