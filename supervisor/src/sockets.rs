//! Listening sockets that this supervisor owns for a process, and lends to each run of it: while
//! it is replaced, connections wait in their queue.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use lotus_runtime::{Fault, Socket};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, getsockopt, listen,
    setsockopt, socket, sockopt,
};
use serde::{Deserialize, Serialize};

/// Connections that wait in the queue of one socket. The kernel's own limit (somaxconn) may be
/// lower.
const BACKLOG: i32 = 1024;

/// The sockets of one process.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Vec<Held>);

#[derive(Debug)]
struct Held {
    known: Known,
    /// None before the process is started for the first time, while the next supervisor waits for
    /// the process to give it back, and while the process is not wanted.
    listener: Option<TcpListener>,
}

/// What the next supervisor is told of a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Known {
    name: String,
    /// As the process's configuration has it.
    wanted: SocketAddr,
    /// Where it was bound last, which is another port if port 0 is wanted.
    bound: Option<SocketAddr>,
}

impl Sockets {
    /// What the supervisor before this one knew.
    pub(crate) fn restore(known: &[Known]) -> Self {
        let held = |known: &Known| Held {
            known: known.clone(),
            listener: None,
        };
        Self(known.iter().map(held).collect())
    }

    /// For the next supervisor.
    pub(crate) fn known(&self) -> Vec<Known> {
        self.0.iter().map(|h| h.known.clone()).collect()
    }

    /// The configuration asks for these. Those that stay as they are stay open; others are closed,
    /// and bound when the process starts.
    pub(crate) fn want(&mut self, wanted: &[Socket]) {
        let mut before = std::mem::take(&mut self.0);
        for w in wanted {
            let same = |h: &Held| h.known.name == w.name && h.known.wanted == w.address;
            let held = match before.iter().position(same) {
                Some(i) => before.swap_remove(i),
                None => Held {
                    known: Known {
                        name: w.name.clone(),
                        wanted: w.address,
                        bound: None,
                    },
                    listener: None,
                },
            };
            self.0.push(held);
        }
    }

    /// Binds what is not open.
    pub(crate) fn open(&mut self) -> Result<(), Fault> {
        for held in self.0.iter_mut().filter(|h| h.listener.is_none()) {
            let Known {
                name,
                wanted,
                bound,
            } = &held.known;
            // Clients have the URL with the port of before.
            let again = bound.filter(|b| wanted.port() == 0 && b.ip() == wanted.ip());
            let listener = match again.map(bind_to) {
                Some(Ok(listener)) => Ok(listener),
                _ => bind_to(*wanted),
            };
            let listener =
                listener.map_err(|e| Fault::bind(wanted, &format!("{name}.listen"), &e))?;
            held.known.bound = Some(listener.local_addr()?);
            held.listener = Some(listener);
        }
        Ok(())
    }

    /// Closes all of them: who connects is refused.
    pub(crate) fn close(&mut self) {
        for held in &mut self.0 {
            held.listener = None;
        }
    }

    /// What a run of the process gets.
    pub(crate) fn lent<'a>(&'a self) -> Vec<(&'a str, BorrowedFd<'a>)> {
        let open = |h: &'a Held| Some((h.known.name.as_str(), h.listener.as_ref()?.as_fd()));
        self.0.iter().filter_map(open).collect()
    }

    /// Takes a socket back from the process that it was lent to, if it is missing here and is what
    /// it is said to be.
    pub(crate) fn take_back(&mut self, name: &str, fd: OwnedFd) -> bool {
        let Some(held) = self.0.iter_mut().find(|h| h.known.name == name) else {
            return false;
        };
        if held.listener.is_some() || !getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false) {
            return false;
        }
        let listener = TcpListener::from(fd);
        let Ok(bound) = listener.local_addr() else {
            return false;
        };
        let wanted = held.known.wanted;
        if bound.ip() != wanted.ip() || ![0, bound.port()].contains(&wanted.port()) {
            return false;
        }
        held.known.bound = Some(bound);
        held.listener = Some(listener);
        true
    }

    /// Each as `NAME ADDRESS`, for `status`.
    pub(crate) fn addresses(&self) -> Vec<String> {
        let shown = |h: &Held| {
            let bound = h.listener.as_ref().and(h.known.bound)?;
            Some(format!("{} {bound}", h.known.name))
        };
        self.0.iter().filter_map(shown).collect()
    }
}

/// A socket that listens, with the longest queue, and not for other programs that are started.
fn bind_to(address: SocketAddr) -> io::Result<TcpListener> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    // Connections of before, that the kernel still remembers, do not block the address.
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    fn wanted(port: u16) -> Vec<Socket> {
        vec![Socket {
            name: "x".into(),
            address: ([127, 0, 0, 1], port).into(),
        }]
    }

    fn bound(s: &Sockets) -> SocketAddr {
        s.known()[0].bound.unwrap()
    }

    /// A copy, as a process has it that was handed it.
    fn copy(s: &Sockets) -> OwnedFd {
        s.lent()[0].1.try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_socket_stays_open_until_another_address_is_wanted() {
        let mut s = Sockets::default();
        s.want(&wanted(0));
        assert!(s.lent().is_empty() && s.addresses().is_empty());
        s.open().unwrap();
        let first = bound(&s);
        assert_eq!(s.addresses(), [format!("x {first}")]);
        s.want(&wanted(0));
        s.open().unwrap();
        assert_eq!(bound(&s), first);
        TcpStream::connect(first).unwrap();

        s.close();
        TcpStream::connect(first).unwrap_err();
        s.open().unwrap();
        assert_eq!(bound(&s), first, "the same port again");

        s.want(&[]);
        TcpStream::connect(first).unwrap_err();
        s.want(&wanted(first.port()));
        s.open().unwrap();
        assert_eq!(bound(&s), first);
    }

    #[test]
    fn an_occupied_port_is_a_wrong_configuration() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut s = Sockets::default();
        s.want(&wanted(port));
        let e = s.open().unwrap_err();
        assert_eq!(e.kind, lotus_types::Kind::Config);
        assert!(e.message.contains(&port.to_string()), "{e}");
        assert!(e.fix.contains("x.listen"), "{}", e.fix);
    }

    #[test]
    fn the_next_supervisor_gets_it_back_and_nothing_else() {
        let mut before = Sockets::default();
        before.want(&wanted(0));
        before.open().unwrap();
        let addr = bound(&before);
        let text = serde_json::to_string(&before.known()).unwrap();
        let known: Vec<Known> = serde_json::from_str(&text).unwrap();
        let mut next = Sockets::restore(&known);
        next.want(&wanted(0));
        assert!(!next.take_back("y", copy(&before)), "no such name");
        let plain = std::fs::File::open("/dev/null").unwrap();
        assert!(!next.take_back("x", plain.into()), "no socket");
        let peer = TcpStream::connect(addr).unwrap();
        assert!(!next.take_back("x", peer.into()), "it does not listen");
        assert!(next.take_back("x", copy(&before)));
        assert!(!next.take_back("x", copy(&before)), "it is there already");
        // Its former owner and the process are gone.
        before.close();
        TcpStream::connect(addr).unwrap();
        assert_eq!(bound(&next), addr);

        // The configuration has changed meanwhile.
        let mut other = Sockets::restore(&known);
        other.want(&wanted(addr.port() ^ 1));
        assert!(!other.take_back("x", copy(&next)));

        // It ended before it could give it back: the same port, if it is free.
        next.close();
        let mut third = Sockets::restore(&known);
        third.open().unwrap();
        assert_eq!(bound(&third), addr);
    }
}
