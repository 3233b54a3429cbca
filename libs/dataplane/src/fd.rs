//! One request, one descriptor.
//!
//! Request: token length (u16, big-endian), token. Answer: one status byte (0: a descriptor is
//! attached), then a u64 (bytes that may be read), or a u16 length and a message. All of it fits
//! one `sendmsg`, so the descriptor and its length arrive together.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lotus_types::Kind;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{DataError, MAX_TOKEN, OpenToken};

const OK: u8 = 0;
const UNKNOWN: u8 = 1;
/// Longest message of a refusal, in bytes.
const MAX_MESSAGE: usize = 1024;
/// Requests served at once; more wait in the listen queue.
const MAX_REQUESTS: usize = 256;
/// A request that takes longer than this is dropped.
const REQUEST_DEADLINE: Duration = Duration::from_secs(20);

/// The kinds in wire order: status byte = 2 + index.
const KINDS: [Kind; 6] = [
    Kind::Transport,
    Kind::Capacity,
    Kind::Chain,
    Kind::Data,
    Kind::Config,
    Kind::Fatal,
];

/// Asks the process behind `socket` for the bytes that `token` names: a read-only descriptor of a
/// regular file, and how many of its bytes are meant. Read with positions (`read_at`): the
/// descriptor's own offset is shared with everybody who holds it.
pub async fn fetch_fd(
    socket: &Path,
    token: &str,
    deadline: Duration,
) -> Result<(File, u64), DataError> {
    let at = socket.display().to_string();
    match tokio::time::timeout(deadline, ask(socket, token, &at)).await {
        Ok(r) => r,
        Err(_) => Err(DataError::Silent {
            at,
            after: deadline,
        }),
    }
}

async fn ask(socket: &Path, token: &str, at: &str) -> Result<(File, u64), DataError> {
    let lost = |e: io::Error| DataError::Unreachable {
        at: at.into(),
        why: e.to_string(),
    };
    let bad = |what: &str| DataError::Protocol {
        at: at.into(),
        what: what.into(),
    };
    let len = u16::try_from(token.len())
        .ok()
        .filter(|&n| usize::from(n) <= MAX_TOKEN)
        .ok_or_else(|| bad("the token is too long"))?;
    let mut stream = UnixStream::connect(socket).await.map_err(lost)?;
    let mut request = len.to_be_bytes().to_vec();
    request.extend_from_slice(token.as_bytes());
    stream.write_all(&request).await.map_err(lost)?;

    let mut buf = [0u8; 3 + MAX_MESSAGE];
    let (n, fd) = loop {
        stream.readable().await.map_err(lost)?;
        match stream.try_io(Interest::READABLE, || receive(&stream, &mut buf)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => break other.map_err(lost)?,
        }
    };
    let (&status, body) =
        buf.get(..n)
            .and_then(<[u8]>::split_first)
            .ok_or_else(|| DataError::Unreachable {
                at: at.into(),
                why: "closed without an answer".into(),
            })?;
    match status {
        OK => {
            let len = body
                .try_into()
                .map(u64::from_be_bytes)
                .map_err(|_| bad("short answer"))?;
            let file = File::from(fd.ok_or_else(|| bad("no descriptor came with the answer"))?);
            check_readable_file(&file).map_err(|what| bad(&what))?;
            Ok((file, len))
        }
        UNKNOWN => Err(DataError::UnknownToken { at: at.into() }),
        code => {
            let kind = KINDS
                .get(usize::from(code) - 2)
                .ok_or_else(|| bad("unknown status"))?;
            let message = String::from_utf8_lossy(body.get(2..).unwrap_or_default()).into_owned();
            Err(DataError::Refused {
                at: at.into(),
                kind: *kind,
                message,
            })
        }
    }
}

/// A peer may be compromised: a pipe or socket in place of a file could block a reader for ever.
fn check_readable_file(file: &File) -> Result<(), String> {
    let meta = file.metadata().map_err(|e| e.to_string())?;
    if !meta.is_file() {
        return Err("the descriptor is not of a regular file".into());
    }
    let flags = rustix::fs::fcntl_getfl(file).map_err(|e| e.to_string())?;
    if flags & rustix::fs::OFlags::RWMODE == rustix::fs::OFlags::WRONLY {
        return Err("the descriptor cannot be read".into());
    }
    Ok(())
}

fn receive(stream: &UnixStream, buf: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let msg = recvmsg(
        stream,
        &mut [IoSliceMut::new(buf)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fd = control.drain().find_map(|m| match m {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((msg.bytes, fd))
}

fn send(stream: &UnixStream, bytes: &[u8], fd: Option<&File>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|f| [f.as_fd()]);
    if let Some(fds) = &fds {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    // At most about 1 KiB: a fresh stream socket takes it whole.
    let n = sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    if n == bytes.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Hands descriptors out on a Unix socket.
pub struct FdServer {
    listener: UnixListener,
    path: PathBuf,
    open: Arc<dyn OpenToken>,
}

impl FdServer {
    /// Binds `socket`, replacing what a dead process left there. The socket is for this user
    /// alone (mode 0600).
    pub fn bind(socket: &Path, open: Arc<dyn OpenToken>) -> Result<Self, DataError> {
        let fail = |why: String| DataError::Bind {
            path: socket.display().to_string(),
            why,
        };
        // sockaddr_un holds 108 bytes with the closing zero.
        if socket.as_os_str().len() > 107 {
            return Err(fail(
                "the path of a Unix socket has at most 107 bytes".into(),
            ));
        }
        match std::fs::symlink_metadata(socket) {
            Ok(m) if m.file_type().is_socket() => {
                if std::os::unix::net::UnixStream::connect(socket).is_ok() {
                    return Err(fail("another process listens there".into()));
                }
                std::fs::remove_file(socket).map_err(|e| fail(e.to_string()))?;
            }
            Ok(_) => return Err(fail("something else than a socket is there".into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(fail(e.to_string())),
        }
        let listener = UnixListener::bind(socket).map_err(|e| fail(e.to_string()))?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
            .map_err(|e| fail(e.to_string()))?;
        Ok(Self {
            listener,
            path: socket.into(),
            open,
        })
    }

    /// [`FdServer::bind`] and [`FdServer::run`].
    pub async fn serve(
        socket: &Path,
        open: Arc<dyn OpenToken>,
        stop: CancellationToken,
    ) -> Result<(), DataError> {
        Self::bind(socket, open)?.run(stop).await;
        Ok(())
    }

    /// Serves until `stop`, then finishes the requests at hand and removes the socket.
    pub async fn run(self, stop: CancellationToken) {
        let slots = Arc::new(Semaphore::new(MAX_REQUESTS));
        let mut tasks = JoinSet::new();
        loop {
            let slot = tokio::select! {
                () = stop.cancelled() => break,
                slot = slots.clone().acquire_owned() => slot.expect("the semaphore is never closed"),
            };
            let stream = tokio::select! {
                () = stop.cancelled() => break,
                conn = self.listener.accept() => match conn {
                    Ok((stream, _)) => stream,
                    Err(e) => {
                        // Out of descriptors: wait for requests to end instead of spinning.
                        tracing::warn!(socket = %self.path.display(), "cannot accept: {e}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let open = self.open.clone();
            tasks.spawn(async move {
                let _slot = slot;
                match tokio::time::timeout(REQUEST_DEADLINE, answer(stream, &*open)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => tracing::debug!("data request broke off: {e}"),
                    Err(_) => tracing::debug!("data request took longer than {REQUEST_DEADLINE:?}"),
                }
            });
            while tasks.try_join_next().is_some() {}
        }
        while tasks.join_next().await.is_some() {}
        if let Err(e) = std::fs::remove_file(&self.path) {
            tracing::debug!(socket = %self.path.display(), "cannot remove the socket: {e}");
        }
    }
}

async fn answer(mut stream: UnixStream, open: &dyn OpenToken) -> io::Result<()> {
    let len = usize::from(stream.read_u16().await?);
    if len > MAX_TOKEN {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut token = vec![0; len];
    stream.read_exact(&mut token).await?;
    let token = String::from_utf8(token).map_err(|_| io::ErrorKind::InvalidData)?;
    let (bytes, file) = match open.open(&token, None).await {
        Ok((file, len)) => {
            let mut bytes = vec![OK];
            bytes.extend_from_slice(&len.to_be_bytes());
            (bytes, Some(file))
        }
        Err(DataError::UnknownToken { .. }) => (vec![UNKNOWN], None),
        Err(e) => (refusal(&e), None),
    };
    loop {
        stream.writable().await?;
        match stream.try_io(Interest::WRITABLE, || send(&stream, &bytes, file.as_ref())) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
    }
}

fn refusal(e: &DataError) -> Vec<u8> {
    let kind = e.kind();
    let index = KINDS
        .iter()
        .position(|k| *k == kind)
        .expect("KINDS lists every kind");
    let text = e.to_string();
    let text = text
        .as_bytes()
        .get(..MAX_MESSAGE)
        .unwrap_or(text.as_bytes());
    let mut bytes = vec![2 + u8::try_from(index).expect("there are six kinds")];
    bytes.extend_from_slice(
        &u16::try_from(text.len())
            .expect("at most 1,024")
            .to_be_bytes(),
    );
    bytes.extend_from_slice(text);
    bytes
}
