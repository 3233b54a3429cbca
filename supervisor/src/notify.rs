//! The socket on which processes say that they are ready and alive: datagrams of sd_notify(3) at
//! a path, so that those of a supervisor that was killed find the next one, and give it the
//! listening sockets that they were handed (`FDSTORE=1`).

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, recvmsg, setsockopt, sockopt,
};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// Longest datagram that is read; the rest is cut off.
const LONGEST: usize = 4096;
/// Most descriptors that the kernel puts in one datagram (`SCM_MAX_FD`). With room for all of them
/// none is lost unseen: what is not asked for is closed here.
const MOST: usize = 253;

/// The bound socket.
#[derive(Debug)]
pub(crate) struct NotifySocket {
    socket: UnixDatagram,
    path: PathBuf,
}

/// What a process says of itself.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// Its pid, as the kernel knows it.
    pub(crate) pid: u32,
    pub(crate) ready: bool,
    pub(crate) alive: bool,
    /// A descriptor that it gives back, and its name.
    pub(crate) stored: Option<(String, OwnedFd)>,
}

impl NotifySocket {
    /// Binds `path`. The caller holds the supervisor's lock, so a socket that is there is dead.
    pub(crate) fn bind(path: PathBuf) -> io::Result<Self> {
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let socket = UnixDatagram::bind(&path)?;
        setsockopt(&socket, sockopt::PassCred, &true)?;
        Ok(Self { socket, path })
    }

    /// Goes on with a socket that is bound to `path`, and with what was said meanwhile.
    pub(crate) fn resume(path: PathBuf, socket: OwnedFd) -> io::Result<Self> {
        let socket = UnixDatagram::from_std(socket.into())?;
        Ok(Self { socket, path })
    }

    /// The socket, for another image.
    pub(crate) fn hand_over(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The next thing that a process says. Cancel-safe.
    pub(crate) async fn recv(&self) -> io::Result<Said> {
        loop {
            let one = || receive(&self.socket);
            if let Some(said) = self.socket.async_io(Interest::READABLE, one).await? {
                return Ok(said);
            }
        }
    }
}

impl NotifySocket {
    /// What was said before now and not yet heard.
    pub(crate) fn said_already(&self) -> Vec<Said> {
        // More than all processes say while one ends is somebody's game.
        (0..HEARD_AT_ONCE)
            .map_while(|_| receive(&self.socket).ok())
            .flatten()
            .collect()
    }
}

/// Most datagrams that are heard before anything else is done.
const HEARD_AT_ONCE: usize = 64;

/// One datagram; nothing when nobody can be named for it.
fn receive(socket: &UnixDatagram) -> io::Result<Option<Said>> {
    let mut text = [0u8; LONGEST];
    let mut space = nix::cmsg_space!(UnixCredentials, [RawFd; MOST]);
    let mut fds = Vec::new();
    let (len, pid) = {
        let mut slices = [IoSliceMut::new(&mut text)];
        let message = recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut pid = None;
        // Cut short: this process has no descriptors left. Nobody's word is worth an end.
        let Ok(parts) = message.cmsgs() else {
            return Ok(None);
        };
        for c in parts {
            match c {
                ControlMessageOwned::ScmCredentials(c) => pid = u32::try_from(c.pid()).ok(),
                ControlMessageOwned::ScmRights(new) => fds.extend(new.into_iter().map(own)),
                _ => {}
            }
        }
        (message.bytes, pid)
    };
    let text = String::from_utf8_lossy(&text[..len]);
    Ok(pid.map(|pid| parse(pid, &text, fds)))
}

fn own(fd: RawFd) -> OwnedFd {
    #[expect(
        unsafe_code,
        reason = "the kernel made this descriptor for us in the call that gave its number"
    )]
    // SAFETY: see the reason above.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    owned
}

/// What a datagram means. Descriptors that nobody asked for are closed.
fn parse(pid: u32, text: &str, fds: Vec<OwnedFd>) -> Said {
    let (mut store, mut name) = (false, "");
    let mut said = Said {
        pid,
        ..Said::default()
    };
    for line in text.lines() {
        match line {
            "READY=1" => said.ready = true,
            "WATCHDOG=1" => said.alive = true,
            "FDSTORE=1" => store = true,
            // STATUS=, MAINPID= and others are not asked for.
            _ => name = line.strip_prefix("FDNAME=").unwrap_or(name),
        }
    }
    if store {
        said.stored = fds.into_iter().next().map(|fd| (name.to_owned(), fd));
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::IoSlice;
    use std::net::TcpListener;
    use std::os::unix::net::UnixDatagram as Sender;

    use nix::sys::socket::{ControlMessage, sendmsg};

    fn bound() -> (tempfile::TempDir, NotifySocket, Sender) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify.sock");
        drop(NotifySocket::bind(path.clone()).unwrap());
        let socket = NotifySocket::bind(path).unwrap();
        (dir, socket, Sender::unbound().unwrap())
    }

    #[tokio::test]
    async fn a_datagram_names_its_sender() {
        let (_dir, socket, sender) = bound();
        let heard = async |text: &[u8]| {
            sender.send_to(text, socket.path()).unwrap();
            let said = socket.recv().await.unwrap();
            assert_eq!(said.pid, std::process::id());
            assert!(said.stored.is_none());
            (said.ready, said.alive)
        };
        assert_eq!(heard(b"STATUS=hello\nREADY=1\n").await, (true, false));
        assert_eq!(heard(b"READY=1\nWATCHDOG=1").await, (true, true));
        // Nonsense, and more than is read.
        assert_eq!(heard(&[0xff; 9000]).await, (false, false));
        // Nothing came with it.
        assert_eq!(heard(b"FDSTORE=1\nFDNAME=x").await, (false, false));
    }

    fn give(socket: &NotifySocket, sender: &Sender, text: &str, fds: &[RawFd]) {
        let to = UnixAddr::new(socket.path()).unwrap();
        sendmsg(
            sender.as_raw_fd(),
            &[IoSlice::new(text.as_bytes())],
            &[ControlMessage::ScmRights(fds)],
            MsgFlags::empty(),
            Some(&to),
        )
        .unwrap();
    }

    /// Descriptors of this process that are `what` in /proc.
    fn open(what: &str) -> usize {
        let all = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        all.filter(|e| std::fs::read_link(e.path()).is_ok_and(|l| l.to_string_lossy() == what))
            .count()
    }

    #[tokio::test]
    async fn a_descriptor_comes_with_its_name_and_the_surplus_is_closed() {
        let (_dir, socket, sender) = bound();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let fd = listener.as_raw_fd();
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        let link = link.to_string_lossy();

        give(&socket, &sender, "FDSTORE=1\nFDNAME=retrieval", &[fd; 3]);
        let (name, kept) = socket.recv().await.unwrap().stored.unwrap();
        assert_eq!(name, "retrieval");
        assert_eq!(open(&link), 2, "the other two are closed");
        let flags = nix::fcntl::fcntl(kept.as_fd(), nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, libc::FD_CLOEXEC);
        assert_eq!(TcpListener::from(kept).local_addr().unwrap(), addr);

        // A great many, and two that nobody asked for.
        give(&socket, &sender, "FDSTORE=1", &[fd; 40]);
        assert!(socket.recv().await.unwrap().stored.is_some());
        give(&socket, &sender, "WATCHDOG=1", &[fd; 2]);
        let said = socket.recv().await.unwrap();
        assert!(said.alive && said.stored.is_none());
        assert_eq!(open(&link), 1);

        // What waits is heard without waiting.
        assert!(socket.said_already().is_empty());
        give(&socket, &sender, "FDSTORE=1\nFDNAME=a", &[fd]);
        sender.send_to(b"READY=1", socket.path()).unwrap();
        let said = socket.said_already();
        assert!(said[0].stored.is_some() && said[1].ready, "{said:?}");
    }
}
