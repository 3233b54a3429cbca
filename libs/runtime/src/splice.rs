//! Stretches of files in answers, sent by the kernel: their bytes never come into this process.
//!
//! A body holds a *hole* where a stretch belongs: a piece of one static buffer, as long as the
//! stretch. The connection knows the buffer by its address and sends the file's bytes in its place,
//! with sendfile(2). That works where nothing between body and socket looks at the bytes: HTTP/1
//! without TLS. Only there a request has [`Holes`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use axum::body::Bytes;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// Longest stretch, bytes.
pub const MAX_STRETCH: usize = 1 << 20;

/// What every hole is a piece of. Its bytes are never sent.
static BUFFER: [u8; MAX_STRETCH] = [0; MAX_STRETCH];

/// Bytes of a file.
#[derive(Clone, Debug)]
pub struct Stretch {
    /// The file, a regular one.
    pub file: Arc<File>,
    /// Where they start.
    pub offset: u64,
    /// How many, at most [`MAX_STRETCH`].
    pub len: usize,
}

/// The holes of a connection that are on their way to the socket.
#[derive(Clone, Debug, Default)]
pub struct Holes(Arc<Mutex<VecDeque<Stretch>>>);

impl Holes {
    /// The hole for a stretch. It must be the next bytes of the body, in the order of the calls:
    /// make it when the body is polled for them.
    #[must_use]
    pub fn hole(&self, stretch: Stretch) -> Bytes {
        let hole = BUFFER.get(..stretch.len).unwrap_or(&BUFFER);
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push_back(Stretch {
            len: hole.len(),
            ..stretch
        });
        Bytes::from_static(hole)
    }

    /// The next stretch, if a hole of `len` bytes stands for what is left of it.
    fn next(&self, len: usize) -> Option<Stretch> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.front().filter(|s| s.len == len).cloned()
    }

    /// Bytes of the next stretch were sent.
    fn sent(&self, bytes: usize) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(next) = all.front_mut() {
            next.len = next.len.saturating_sub(bytes);
            next.offset += bytes as u64;
            if next.len == 0 {
                all.pop_front();
            }
        }
    }
}

/// Has the kernel read a stretch ahead of its sending. Returns at once.
pub fn advise(file: &File, offset: u64, len: usize) {
    let len = std::num::NonZeroU64::new(len as u64);
    // It is advice: without it sending waits for the disk.
    if let Err(error) = rustix::fs::fadvise(file, offset, len, rustix::fs::Advice::WillNeed) {
        tracing::debug!(%error, "no reading ahead");
    }
}

/// Whether these bytes are a hole.
fn is_hole(bytes: &[u8]) -> bool {
    !bytes.is_empty() && BUFFER.as_ptr_range().contains(&bytes.as_ptr())
}

/// A socket that fills holes.
pub(crate) struct Spliced {
    stream: TcpStream,
    holes: Holes,
}

impl Spliced {
    pub(crate) fn new(stream: TcpStream, holes: Holes) -> Self {
        Self { stream, holes }
    }

    /// Sends what a hole of this length stands for.
    fn poll_fill(&self, cx: &mut Context<'_>, len: usize) -> Poll<io::Result<usize>> {
        let Some(stretch) = self.holes.next(len) else {
            return Poll::Ready(Err(io::Error::other("a hole that stands for nothing")));
        };
        let sent = ready!(self.poll_try(cx, || {
            let mut at = stretch.offset;
            let sent = rustix::fs::sendfile(&self.stream, &*stretch.file, Some(&mut at), len);
            Ok(sent?)
        }))?;
        if sent == 0 {
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        self.holes.sent(sent);
        Poll::Ready(Ok(sent))
    }

    /// Sends bytes that a hole follows: they wait for it, so that a small answer is one segment.
    fn poll_more(&self, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.poll_try(cx, || {
            let mut none = SendAncillaryBuffer::default();
            let flags = SendFlags::MORE | SendFlags::NOSIGNAL;
            Ok(sendmsg(&self.stream, bufs, &mut none, flags)?)
        })
    }

    /// Calls `send` when the socket takes something, until it does.
    fn poll_try(
        &self,
        cx: &mut Context<'_>,
        mut send: impl FnMut() -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_io(Interest::WRITABLE, &mut send) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(sent),
            }
        }
    }
}

impl AsyncRead for Spliced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Spliced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if is_hole(buf) {
            return self.poll_fill(cx, buf.len());
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = bufs.iter().position(|b| !b.is_empty()).unwrap_or(0);
        let bufs = bufs.get(first..).unwrap_or_default();
        match bufs.iter().position(|b| is_hole(b)) {
            Some(0) => {
                let len = bufs.first().map_or(0, |b| b.len());
                self.poll_fill(cx, len)
            }
            Some(until) => self.poll_more(cx, &bufs[..until]),
            None => Pin::new(&mut self.stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn holes_are_filled_and_other_bytes_pass() {
        let mut file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        file.write_all(&data).unwrap();
        let file = Arc::new(file);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let (mut client, holes) = (client.unwrap(), Holes::default());
        let mut socket = Spliced::new(accepted.unwrap().0, holes.clone());
        let stretch = |offset, len| Stretch {
            file: file.clone(),
            offset,
            len,
        };
        let parts = [
            Bytes::from_static(b"head"),
            holes.hole(stretch(7, MAX_STRETCH)),
            Bytes::from_static(b"between"),
            holes.hole(stretch(2_000_000, 1_000_000)),
            Bytes::from_static(b"end"),
        ];
        let want = [
            b"head",
            &data[7..7 + MAX_STRETCH],
            b"between",
            &data[2_000_000..],
            b"end",
        ]
        .concat();
        let write = async {
            let mut left: VecDeque<Bytes> = parts.into();
            while !left.is_empty() {
                let slices: Vec<_> = left.iter().map(|b| io::IoSlice::new(b)).collect();
                let mut n = socket.write_vectored(&slices).await.unwrap();
                while let Some(first) = left.front_mut() {
                    if n < first.len() {
                        drop(first.split_to(n));
                        break;
                    }
                    n -= first.len();
                    left.pop_front();
                }
            }
            // A hole beyond the file, and one that stands for nothing.
            let hole = holes.hole(stretch(3_000_000, 5));
            let beyond = socket.write(&hole).await.unwrap_err();
            assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
            assert!(socket.write(&BUFFER[..9]).await.is_err());
            drop(socket);
        };
        let mut got = Vec::new();
        let ((), read) = tokio::join!(write, client.read_to_end(&mut got));
        read.unwrap();
        assert!(got == want, "{} of {} bytes", got.len(), want.len());
    }
}
