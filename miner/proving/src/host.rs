//! One miner actor is mined for by one process of a host, whichever repos there are.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use cid::Cid;
use lotus_types::ActorId;

/// Held while this process mines. A socket in the kernel's abstract namespace: it has no file to
/// be left behind or deleted, and is free again when its process ends, however it ends.
///
/// It keeps out processes of the same network namespace, and nobody else: each container has a
/// namespace of its own, unless it was started with that of the host. There is no place that all
/// containers of a host share. Others are noticed by their blocks ([`crate::Leave`], `watch`).
#[derive(Debug)]
pub(crate) struct HostLock(#[expect(dead_code, reason = "held, not used")] UnixListener);

/// Why the lock was not taken.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Another process has it; its pid, if the kernel tells.
    By(Option<i32>),
    /// The system refuses such sockets.
    Refused(io::Error),
}

impl HostLock {
    /// Takes the lock of an actor of a network.
    pub(crate) fn take(genesis: &Cid, actor: ActorId) -> Result<Self, Taken> {
        let name = format!("lotus-hub/mining/{genesis}/{actor}");
        let addr = SocketAddr::from_abstract_name(name).map_err(Taken::Refused)?;
        match UnixListener::bind_addr(&addr) {
            Ok(listener) => Ok(Self(listener)),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => Err(Taken::By(holder(&addr))),
            Err(e) => Err(Taken::Refused(e)),
        }
    }
}

fn holder(addr: &SocketAddr) -> Option<i32> {
    let stream = UnixStream::connect_addr(addr).ok()?;
    stream.set_nonblocking(true).ok()?;
    let stream = tokio::net::UnixStream::from_std(stream).ok()?;
    stream.peer_cred().ok()?.pid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_process_holds_an_actor_of_a_network() {
        let network = |text: &str| Cid::try_from(text).unwrap();
        let ours = network("bafy2bzacebuwjwmlbrxqb43mxgvulgs7xwlzgxgrz5fpmxptaye4nvmorvvqy");
        let other = network("bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy");
        // Of no other test run: actors are numbered.
        let actor = ActorId(u64::from(std::process::id()));
        let held = HostLock::take(&ours, actor).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        match HostLock::take(&ours, actor) {
            Err(Taken::By(Some(pid))) => assert_eq!(pid, own),
            got => panic!("{got:?}"),
        }
        drop(HostLock::take(&other, actor).unwrap());
        drop(HostLock::take(&ours, ActorId(actor.0 + 1)).unwrap());
        drop(held);
        drop(HostLock::take(&ours, actor).unwrap());
    }
}
