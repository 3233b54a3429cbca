//! The socket on which processes say that they are ready and alive: datagrams of sd_notify(3) at
//! a path, so that those of a supervisor that was killed find the next one.

use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, recvmsg, setsockopt, sockopt,
};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// Longest datagram that is read; the rest is cut off.
const LONGEST: usize = 4096;

/// The bound socket.
#[derive(Debug)]
pub(crate) struct NotifySocket {
    socket: UnixDatagram,
    path: PathBuf,
}

/// What a process says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Said {
    /// Its pid, as the kernel knows it.
    pub(crate) pid: u32,
    pub(crate) ready: bool,
    pub(crate) alive: bool,
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

/// One datagram; nothing when nobody can be named for it.
fn receive(socket: &UnixDatagram) -> io::Result<Option<Said>> {
    let mut text = [0u8; LONGEST];
    let mut space = nix::cmsg_space!(UnixCredentials);
    let (len, pid) = {
        let mut slices = [IoSliceMut::new(&mut text)];
        let message = recvmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_DONTWAIT,
        )?;
        let pid = message.cmsgs()?.find_map(|c| match c {
            ControlMessageOwned::ScmCredentials(c) => u32::try_from(c.pid()).ok(),
            _ => None,
        });
        (message.bytes, pid)
    };
    let text = String::from_utf8_lossy(&text[..len]);
    Ok(pid.map(|pid| parse(pid, &text)))
}

fn parse(pid: u32, text: &str) -> Said {
    let mut said = Said {
        pid,
        ..Said::default()
    };
    for line in text.lines() {
        match line {
            "READY=1" => said.ready = true,
            "WATCHDOG=1" => said.alive = true,
            // STATUS=, MAINPID= and others are not asked for.
            _ => {}
        }
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_datagram_names_its_sender() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify.sock");
        drop(NotifySocket::bind(path.clone()).unwrap());
        let socket = NotifySocket::bind(path.clone()).unwrap();
        let sender = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let mut said = Said {
            pid: std::process::id(),
            ready: true,
            alive: false,
        };
        sender
            .send_to(b"STATUS=hello\nREADY=1\n", socket.path())
            .unwrap();
        assert_eq!(socket.recv().await.unwrap(), said);
        sender
            .send_to(b"READY=1\nWATCHDOG=1", socket.path())
            .unwrap();
        said.alive = true;
        assert_eq!(socket.recv().await.unwrap(), said);
        // Nonsense, and more than is read.
        sender.send_to(&[0xff; 9000], socket.path()).unwrap();
        said.ready = false;
        said.alive = false;
        assert_eq!(socket.recv().await.unwrap(), said);
    }
}
