//! Connections that the hub opens, to spokes that may open none to it. Who dialed makes no
//! difference to what follows: the spoke begins the handshake when it wants the connection.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use lotus_runtime::Backoff;
use rustix::net::sockopt::{
    set_socket_keepalive, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
};
use rustls::ServerConfig;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::Secured;
use crate::listen::secure;

/// Connections to a spoke that wait until it wants one.
const WAITING: usize = 2;
/// How long a spoke's host may take to answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Pauses between tries.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// A host that is silent for a minute is gone.
const ALIVE_EVERY: Duration = Duration::from_secs(15);
const ALIVE_TRIES: u32 = 3;

/// Keeps connections to each of `spokes` (`host:port`) waiting, and passes on those on which a spoke
/// has shown a certificate that `tls` takes, until `stop`.
pub async fn dial(
    spokes: Vec<String>,
    tls: Arc<ServerConfig>,
    to: mpsc::Sender<io::Result<Secured>>,
    stop: CancellationToken,
) {
    let mut waiting = JoinSet::new();
    for spoke in spokes {
        for _ in 0..WAITING {
            let work = keep(spoke.clone(), tls.clone(), to.clone());
            let stop = stop.clone();
            waiting.spawn(async move { stop.run_until_cancelled(work).await });
        }
    }
    while waiting.join_next().await.is_some() {}
}

/// One after the other, for ever.
async fn keep(spoke: String, tls: Arc<ServerConfig>, to: mpsc::Sender<io::Result<Secured>>) {
    let mut failed: Option<Backoff> = None;
    loop {
        match one(&spoke, tls.clone()).await {
            Ok(secured) => {
                failed = None;
                // Nobody takes it when the hub stops.
                to.send(Ok(secured)).await.unwrap_or_default();
            }
            Err(error) => {
                if failed.is_none() {
                    tracing::info!(%spoke, %error, "a spoke that is dialed is not there; tried again");
                }
                let pauses = failed.get_or_insert_with(|| Backoff::new(FIRST_PAUSE, LONGEST_PAUSE));
                tokio::time::sleep(pauses.next()).await;
            }
        }
    }
}

/// Finds out when the other host is gone, for connections that wait in silence.
pub fn keep_alive(tcp: &TcpStream) -> io::Result<()> {
    set_socket_keepalive(tcp, true)?;
    set_tcp_keepidle(tcp, ALIVE_EVERY)?;
    set_tcp_keepintvl(tcp, ALIVE_EVERY)?;
    set_tcp_keepcnt(tcp, ALIVE_TRIES)?;
    Ok(())
}

async fn one(spoke: &str, tls: Arc<ServerConfig>) -> io::Result<Secured> {
    let connecting = tokio::time::timeout(CONNECT_LIMIT, TcpStream::connect(spoke)).await;
    let tcp = connecting.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    tcp.set_nodelay(true)?;
    keep_alive(&tcp)?;
    if tcp.peek(&mut [0]).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let addr = tcp.peer_addr()?;
    secure(tls, tcp, Some(addr)).await
}
