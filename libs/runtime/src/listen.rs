//! Listening sockets that whoever started this process bound for it: the supervisor, or systemd
//! with socket units (`FileDescriptorName=` is the name of the service). See sd_listen_fds(3).
//!
//! They are owned by those that start the process, so connections that arrive while it is replaced
//! wait in the queue of the kernel instead of being refused.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use tokio::net::TcpListener;

use crate::Fault;

/// First descriptor that is handed over. Source: sd_listen_fds(3).
const FIRST: RawFd = 3;
/// Most descriptors that are taken.
const MOST: RawFd = 64;

/// What was handed over, for as long as the process lives: a service that is started again within
/// it needs its socket again, and a supervisor that was killed gets it back.
static HANDED: OnceLock<Vec<(String, OwnedFd)>> = OnceLock::new();

/// Listens on the socket called `name` if this process was handed one, else on `address`, which
/// comes from the setting `NAME.listen`.
pub async fn listen(name: &str, address: SocketAddr) -> Result<TcpListener, Fault> {
    if let Some(listener) = handed(name)? {
        let bound = listener.local_addr()?;
        let same = |a: u16, b: u16| b == 0 || a == b;
        if bound.ip() != address.ip() || !same(bound.port(), address.port()) {
            tracing::warn!(name, %bound, %address, "the configured address differs from that of the socket that was handed over, which is used");
        }
        return Ok(listener);
    }
    TcpListener::bind(address)
        .await
        .map_err(|e| Fault::bind(&address, &format!("{name}.listen"), &e))
}

/// The socket called `name`, if this process was handed one. Each call gives a copy.
pub fn handed(name: &str) -> Result<Option<TcpListener>, Fault> {
    let Some((_, fd)) = all().iter().find(|(n, _)| n == name) else {
        return Ok(None);
    };
    let listener = std::net::TcpListener::from(fd.try_clone()?);
    listener.set_nonblocking(true)?;
    Ok(Some(TcpListener::from_std(listener)?))
}

/// Every socket that was handed over. The first call takes them, and keeps them from processes
/// that this one starts.
pub(crate) fn all() -> &'static [(String, OwnedFd)] {
    HANDED.get_or_init(|| {
        let var = |name: &str| std::env::var(name).ok();
        let mut taken = Vec::new();
        for (name, fd) in inherited(std::process::id(), var) {
            match take(fd) {
                Ok(fd) => taken.push((name, fd)),
                Err(e) => tracing::warn!(name, fd, %e, "a socket that was announced is not there"),
            }
        }
        taken
    })
}

/// Names and numbers of what is announced to the process `pid`.
fn inherited(pid: u32, var: impl Fn(&str) -> Option<String>) -> Vec<(String, RawFd)> {
    let number = |name: &str| var(name)?.parse::<RawFd>().ok();
    // Children inherit the variables and are not meant.
    if number("LISTEN_PID").and_then(|p| u32::try_from(p).ok()) != Some(pid) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0).clamp(0, MOST);
    let names = var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    (FIRST..FIRST + count)
        .map(|fd| (names.next().unwrap_or("unknown").to_owned(), fd))
        .collect()
}

/// Takes a descriptor that was announced.
fn take(fd: RawFd) -> io::Result<OwnedFd> {
    #[expect(
        unsafe_code,
        reason = "borrowed for one call; a number that is no open descriptor fails with EBADF"
    )]
    // SAFETY: see the reason above.
    let announced = unsafe { BorrowedFd::borrow_raw(fd) };
    fcntl(announced, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    #[expect(
        unsafe_code,
        reason = "it is open, it was announced to this very process, and it is taken once, under `HANDED`"
    )]
    // SAFETY: see the reason above.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // A data file or a datagram socket is somebody's mistake.
    if nix::sys::socket::getsockopt(&owned.as_fd(), nix::sys::socket::sockopt::AcceptConn)? {
        return Ok(owned);
    }
    Err(io::Error::other("it is no listening socket"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_announced_to_this_process_is_taken() {
        let of = |pid: &str, fds: &str, names: &str| {
            let vars = [
                ("LISTEN_PID", pid),
                ("LISTEN_FDS", fds),
                ("LISTEN_FDNAMES", names),
            ];
            inherited(7, |name| {
                let (_, value) = vars.iter().find(|(n, _)| *n == name)?;
                (!value.is_empty()).then(|| (*value).to_owned())
            })
        };
        let named = |all: &[(&str, RawFd)]| {
            all.iter()
                .map(|(n, fd)| ((*n).to_owned(), *fd))
                .collect::<Vec<_>>()
        };
        for (pid, fds, names, wanted) in [
            ("7", "2", "a:b", named(&[("a", 3), ("b", 4)])),
            ("7", "2", "a", named(&[("a", 3), ("unknown", 4)])),
            ("7", "1", "", named(&[("", 3)])),
            ("8", "2", "a:b", vec![]),
            ("", "2", "a:b", vec![]),
            ("7", "", "a:b", vec![]),
            ("7", "-1", "a:b", vec![]),
            ("7", "x", "a:b", vec![]),
        ] {
            assert_eq!(of(pid, fds, names), wanted, "{pid} {fds} {names}");
        }
        assert_eq!(of("7", "2000000000", "").len(), 64);
    }

    #[tokio::test]
    async fn without_a_handed_socket_the_address_is_bound() {
        let one = listen("x", ([127, 0, 0, 1], 0).into()).await.unwrap();
        let addr = one.local_addr().unwrap();
        let e = listen("x", addr).await.unwrap_err();
        assert!(e.fix.contains("x.listen"), "{}", e.fix);
    }
}
