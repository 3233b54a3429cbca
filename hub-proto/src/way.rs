//! How connections to the hub come about: this side opens them, or waits for the hub to do so, where
//! it may open none to the hub.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Notify;
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
    waiting: Arc<Waiting>,
    /// Ends with the last user.
    _accepting: JoinSet<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    streams: Mutex<VecDeque<TcpStream>>,
    came: Notify,
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
        let waiting = Arc::<Waiting>::default();
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
            Self::In(door) => Ok(Either::Right(door.waiting.next().await)),
        }
    }
}

impl Waiting {
    fn put(&self, tcp: TcpStream) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams.push_back(tcp);
        if streams.len() > WAITING {
            streams.pop_front();
        }
        self.came.notify_one();
    }

    /// The newest one that is open still.
    fn take(&self) -> Option<TcpStream> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        // The hub says nothing before the handshake: whatever can be read is its end.
        let open = |tcp: &TcpStream| {
            let read = tcp.try_read(&mut [0]);
            read.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
        };
        while let Some(tcp) = streams.pop_back() {
            if open(&tcp) {
                return Some(tcp);
            }
        }
        None
    }

    async fn next(&self) -> TcpStream {
        loop {
            let came = self.came.notified();
            if let Some(tcp) = self.take() {
                return tcp;
            }
            came.await;
        }
    }
}

/// Keeps what connects. The handshake tells whether it is the hub.
async fn accept(listener: TcpListener, waiting: Arc<Waiting>) {
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
        let waiting = Arc::<Waiting>::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, waiting.clone()));
        let connect = async || TcpStream::connect(addr).await.unwrap();
        let (open, closed, mut talks) = (connect().await, connect().await, connect().await);
        drop(closed);
        talks.write_all(b"x").await.unwrap();
        let limit = Duration::from_secs(10);
        let here = tokio::time::timeout(limit, async {
            // Until it has heard of all of them.
            while waiting.streams.lock().unwrap().len() < 3 {
                tokio::task::yield_now().await;
            }
            waiting.next().await
        });
        assert_eq!(here.await.unwrap().peer_addr().ok(), open.local_addr().ok());
        // Nothing is left; the next one that comes is taken.
        let (next, came) = tokio::join!(tokio::time::timeout(limit, waiting.next()), connect());
        assert_eq!(next.unwrap().peer_addr().ok(), came.local_addr().ok());
        for _ in 0..WAITING + 3 {
            waiting.put(connect().await);
        }
        assert_eq!(waiting.streams.lock().unwrap().len(), WAITING);
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
