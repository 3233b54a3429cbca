//! Who is at the other end of a Unix socket that only operators may use.
//!
//! The mode of a socket keeps other users out, and Landlock does not know sockets with a path. So
//! a spoke in its sandbox, running as the hub's user, could give the hub orders as an operator
//! does. It is told apart by what a process never loses: `no_new_privs` and seccomp filters pass
//! to everything that it starts.

use std::io;

use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::net::unix::SocketAddr;

/// How much a process is confined. Source: proc_pid_status(5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Confined {
    no_new_privs: bool,
    filters: u32,
}

impl Confined {
    /// Reads /proc/PID/status. `Seccomp_filters` came with Linux 5.9; before it there is the mode.
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name))?;
            line.strip_prefix(':')?.trim().parse::<u32>().ok()
        };
        Some(Self {
            no_new_privs: field("NoNewPrivs")? > 0,
            filters: field("Seccomp_filters").or_else(|| field("Seccomp"))?,
        })
    }

    fn of(pid: &str) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
    }

    /// In a container both sides have the container's filters: what counts is who has more.
    const fn is_more_than(self, other: Self) -> bool {
        self.filters > other.filters || (self.no_new_privs && !other.no_new_privs)
    }
}

fn pid(stream: &UnixStream) -> Option<i32> {
    let pid = stream.peer_cred().ok().and_then(|c| c.pid());
    pid.filter(|pid| *pid > 0)
}

/// Whether the process that connected is more confined than this one. So is one that cannot be
/// looked at, because it is gone.
#[must_use]
pub fn is_confined(stream: &UnixStream) -> bool {
    let Some(pid) = pid(stream) else {
        // A peer outside of this pid namespace has no pid here. It is no child of ours.
        return false;
    };
    let known = Confined::of(&pid.to_string()).zip(Confined::of("self"));
    known.is_none_or(|(peer, own)| peer.is_more_than(own))
}

/// Whether the process that connected may give orders: it is not more confined than this one. Says
/// it in the log if not.
#[must_use]
pub fn may_order(stream: &UnixStream) -> bool {
    let may = !is_confined(stream);
    if !may {
        tracing::warn!(
            pid = pid(stream),
            "refused: a process in a sandbox may not give orders; run the command outside of it"
        );
    }
    may
}

/// A listener that drops the connections of those that may not give orders.
#[derive(Debug)]
pub struct Operators(pub UnixListener);

impl axum::serve::Listener for Operators {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, addr) = axum::serve::Listener::accept(&mut self.0).await;
            if may_order(&stream) {
                return (stream, addr);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_more_confined_gives_no_orders() {
        let status = |nnp, seccomp, filters: Option<u32>| {
            let filters = filters.map_or_else(String::new, |n| format!("Seccomp_filters:\t{n}\n"));
            let text = format!("Name:\tx\nNoNewPrivs:\t{nnp}\nSeccomp:\t{seccomp}\n{filters}");
            Confined::parse(&text).unwrap()
        };
        let plain = status(0, 0, Some(0));
        let container = status(1, 2, Some(1));
        for (peer, own, more) in [
            (plain, plain, false),
            (status(1, 2, Some(2)), plain, true),
            (status(1, 0, Some(0)), plain, true),
            (status(0, 2, None), plain, true),
            (container, container, false),
            (plain, container, false),
            (status(1, 2, Some(3)), container, true),
        ] {
            assert_eq!(peer.is_more_than(own), more, "{peer:?} {own:?}");
        }
        assert_eq!(Confined::parse("Name:\tx\n"), None);
    }

    #[tokio::test]
    async fn a_process_like_this_one_may() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        let mut listener = Operators(UnixListener::bind(&path).unwrap());
        let client = UnixStream::connect(&path).await.unwrap();
        let accepted = axum::serve::Listener::accept(&mut listener);
        let accepted = tokio::time::timeout(std::time::Duration::from_secs(10), accepted);
        assert!(accepted.await.is_ok());
        drop(client);
    }
}
