//! Readiness and life towards a supervisor: a newline on the descriptor in `LOTUS_NOTIFY_FD` (as
//! s6 does it), and datagrams on `NOTIFY_SOCKET` (as systemd does it, see sd_notify(3)).
//!
//! The socket has a path, so a supervisor that was killed hears of its processes again as soon as
//! the next one has bound it: readiness comes with every sign of life. The listening sockets that
//! the supervisor handed over come with them too, because the next one does not have them.

use std::io::{self, IoSlice, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use crate::listen;

/// Name of the variable that carries the number of the descriptor for the newline.
pub const FD_VAR: &str = "LOTUS_NOTIFY_FD";
/// Name of the variable that carries the number of the descriptor that holds this process's lock.
/// Whoever has it open is the process; see `supervisor/src/fence.rs`.
pub const FENCE_VAR: &str = "LOTUS_FENCE_FD";

/// Longest time between two signs of life. A new supervisor knows who is ready after it.
const BEAT: Duration = Duration::from_secs(5);

static READY: AtomicBool = AtomicBool::new(false);

/// Tells the supervisor, if there is one, that this process is ready. Later calls do nothing.
pub fn ready() {
    if READY.swap(true, Ordering::Relaxed) {
        return;
    }
    if let Some(fd) = inherited(FD_VAR) {
        write_newline(fd);
    }
    if let Some(socket) = Socket::from_env()
        && let Err(e) = socket.send("READY=1")
    {
        tracing::warn!(%e, "the service manager could not be told of readiness");
    }
}

/// Keeps what the supervisor handed over from the processes that this one starts. A worker that
/// outlives the hub must not hold the hub's lock.
pub(crate) fn keep_descriptors() {
    listen::all();
    for fd in [FD_VAR, FENCE_VAR].into_iter().filter_map(inherited) {
        #[expect(
            unsafe_code,
            reason = "borrowed for one call; a number that is no open descriptor fails with EBADF"
        )]
        // SAFETY: see the reason above.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        if let Err(e) = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            tracing::debug!(%e, "an inherited descriptor is not open");
        }
    }
}

/// Sends signs of life for as long as it is polled, if the supervisor asks for them. They come
/// from the runtime that does the work: one that is stuck sends none.
pub(crate) async fn keep_alive() {
    let (Some(socket), Some(every)) = (Socket::from_env(), watchdog()) else {
        return std::future::pending().await;
    };
    let mut beat = tokio::time::interval(every);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        beat.tick().await;
        let ready = READY.load(Ordering::Relaxed);
        let text = if ready {
            "READY=1\nWATCHDOG=1"
        } else {
            "WATCHDOG=1"
        };
        if let Err(e) = socket.send(text) {
            // Normal while a supervisor is replaced.
            tracing::debug!(%e, "no sign of life sent");
        }
        socket.hand_back();
    }
}

/// Tells the supervisor that this process ends because it was asked to, and makes sure that the
/// next one of its kind gets the listening sockets, with the connections that wait in them.
pub fn stopping() {
    if let Some(socket) = Socket::from_env() {
        if let Err(e) = socket.send("STOPPING=1") {
            tracing::debug!(%e, "the service manager could not be told of the end");
        }
        socket.hand_back();
    }
}

/// How often a sign of life is due, if one is.
fn watchdog() -> Option<Duration> {
    let var = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    // systemd names the process; children of it inherit the variables and are not meant.
    if var("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    let limit = Duration::from_micros(var("WATCHDOG_USEC").filter(|usec| *usec > 0)?);
    Some((limit / 2).min(BEAT))
}

/// Where datagrams go.
struct Socket(UnixAddr);

impl Socket {
    fn from_env() -> Option<Self> {
        let name = std::env::var("NOTIFY_SOCKET").ok()?;
        let addr = match name.strip_prefix('@') {
            Some(name) => UnixAddr::new_abstract(name.as_bytes()),
            None => UnixAddr::new(name.as_str()),
        };
        match addr {
            Ok(addr) => Some(Self(addr)),
            Err(e) => {
                tracing::warn!(%e, name, "NOTIFY_SOCKET is not usable");
                None
            }
        }
    }

    fn send(&self, text: &str) -> io::Result<()> {
        self.send_with(text, &[])
    }

    /// Sends each listening socket to the supervisor that handed it over, or to the one after it.
    /// Others that hand sockets over keep them.
    fn hand_back(&self) {
        if inherited(FENCE_VAR).is_none() {
            return;
        }
        for (name, fd) in listen::all() {
            let text = format!("FDSTORE=1\nFDNAME={name}");
            if let Err(e) = self.send_with(&text, &[fd.as_raw_fd()]) {
                tracing::debug!(%e, name, "a listening socket was not sent");
            }
        }
    }

    /// A socket of its own for each datagram, because the other end may be a new one.
    fn send_with(&self, text: &str, fds: &[RawFd]) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        let parts = [IoSlice::new(text.as_bytes())];
        let rights = [ControlMessage::ScmRights(fds)];
        let rights: &[_] = if fds.is_empty() { &[] } else { &rights };
        sendmsg(
            socket.as_raw_fd(),
            &parts,
            rights,
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            Some(&self.0),
        )?;
        Ok(())
    }
}

fn inherited(var: &str) -> Option<RawFd> {
    let fd = std::env::var(var).ok()?.parse::<RawFd>().ok()?;
    (fd > 2).then_some(fd)
}

fn write_newline(fd: RawFd) {
    #[expect(
        unsafe_code,
        reason = "the supervisor opened this descriptor for us and nobody else in this process uses it; it is used once, under `READY`"
    )]
    // SAFETY: see the reason above; a number that is no open descriptor fails with EBADF.
    let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
    if let Err(e) = file.write_all(b"\n") {
        // A supervisor that was killed; the next one hears it on the socket.
        tracing::debug!(%e, fd, "the supervisor could not be told of readiness");
    }
}
