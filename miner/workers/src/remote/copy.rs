//! Files in chunks, with a checksum over the whole.

use std::io;

use hub_proto::worker::v1::ReadChunk;
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tonic::Status;

/// Bytes of one message.
pub(super) const CHUNK: usize = 1 << 20;
/// Messages on their way between disk and network.
pub(super) const IN_FLIGHT: usize = 4;

/// BLAKE3 of a file.
pub(super) type Hash = [u8; 32];

/// Whether a name is of a file in a directory, and nothing else: 1 to 128 letters, digits, `.`,
/// `_` and `-`, with no `.` at the beginning.
pub(super) fn is_plain(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    (1..=128).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(allowed)
}

/// Sends what a file has from `offset` on, and then the checksum of all of it. Broken pipe: nobody
/// takes it any more.
pub(super) async fn send(
    mut file: File,
    offset: u64,
    to: &mpsc::Sender<Result<ReadChunk, Status>>,
) -> io::Result<(File, Hash)> {
    let mut hasher = blake3::Hasher::new();
    let mut at = 0_u64;
    loop {
        let chunk = next_chunk(&mut file).await?;
        if chunk.is_empty() {
            break;
        }
        hasher.update(&chunk);
        // What the other side has already is only read for the checksum.
        let skip = usize::try_from(offset.saturating_sub(at)).unwrap_or(usize::MAX);
        at += chunk.len() as u64;
        if let Some(data) = chunk.get(skip..).filter(|d| !d.is_empty()) {
            let message = ReadChunk {
                data: data.to_vec(),
                hash: Vec::new(),
            };
            pass(to, message).await?;
        }
    }
    let hash = *hasher.finalize().as_bytes();
    let last = ReadChunk {
        data: Vec::new(),
        hash: hash.to_vec(),
    };
    pass(to, last).await?;
    Ok((file, hash))
}

async fn pass(to: &mpsc::Sender<Result<ReadChunk, Status>>, message: ReadChunk) -> io::Result<()> {
    to.send(Ok(message))
        .await
        .map_err(|_| io::ErrorKind::BrokenPipe.into())
}

/// The next bytes of a file; none at its end.
pub(super) async fn next_chunk(file: &mut File) -> io::Result<Vec<u8>> {
    let mut chunk = Vec::with_capacity(CHUNK);
    file.take(CHUNK as u64).read_to_end(&mut chunk).await?;
    Ok(chunk)
}

/// The checksum of a file.
pub(super) async fn hash(file: &mut File) -> io::Result<Hash> {
    let mut hasher = blake3::Hasher::new();
    loop {
        let chunk = next_chunk(file).await?;
        if chunk.is_empty() {
            return Ok(*hasher.finalize().as_bytes());
        }
        hasher.update(&chunk);
    }
}

/// A file that is being received: never longer than announced, and complete only with the
/// checksum that its sender computed.
pub(super) struct Receiving {
    file: File,
    hasher: blake3::Hasher,
    len: u64,
    got: u64,
}

impl Receiving {
    pub(super) fn new(file: File, len: u64) -> Self {
        Self {
            file,
            hasher: blake3::Hasher::new(),
            len,
            got: 0,
        }
    }

    /// The announced length.
    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    /// Bytes that are here.
    pub(super) const fn got(&self) -> u64 {
        self.got
    }

    pub(super) async fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.got += bytes.len() as u64;
        if self.got > self.len {
            return Err(io::Error::other("the file is longer than announced"));
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).await
    }

    /// Syncs the file. Invalid data: it is not what was sent.
    pub(super) async fn end(mut self, hash: &[u8]) -> io::Result<Hash> {
        let ours = *self.hasher.finalize().as_bytes();
        if self.got != self.len || ours[..] != *hash {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "{} of {} bytes arrived, or their checksum is wrong",
                    self.got, self.len
                ),
            ));
        }
        self.file.flush().await?;
        self.file.sync_all().await?;
        Ok(ours)
    }
}
