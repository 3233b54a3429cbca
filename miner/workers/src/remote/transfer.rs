//! The worker's side of its files: gets what a task reads, brings back what it made.

use std::io;
use std::path::Path;
use std::time::Duration;

use hub_proto::worker::v1::workers_client::WorkersClient;
use hub_proto::worker::v1::{FileEntry, ReadRequest, TaskRef, WriteChunk, WriteHead};
use lotus_runtime::Backoff;
use lotus_types::Kind;
use tokio::fs::File;
use tokio::io::AsyncSeekExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::copy::{Hash, IN_FLIGHT, Receiving, next_chunk};

/// How often one file is begun again, from where it stopped or from its beginning.
const TRIES: u32 = 6;

/// Why a file did not travel.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stuck {
    #[error("{what}: {status}", status = status.message())]
    Hub { what: String, status: Status },
    #[error("{what}: {source}")]
    Disk { what: String, source: io::Error },
}

impl Stuck {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Hub { .. } => Kind::Transport,
            Self::Disk { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Kind::Capacity
            }
            // This host's disk is no evidence against the sector: another host may do the task.
            Self::Disk { .. } => Kind::Transport,
        }
    }

    fn may_pass(&self) -> bool {
        match self {
            Self::Hub { status, .. } => matches!(
                status.code(),
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
            ),
            Self::Disk { source, .. } => source.kind() == io::ErrorKind::InvalidData,
        }
    }
}

/// The hub, for the files of one task.
#[derive(Clone)]
pub(super) struct Hub {
    pub(super) client: WorkersClient<Channel>,
    pub(super) task: TaskRef,
}

/// A new file. Not the old one made empty: the killed process of an earlier task may have that
/// one open.
async fn create(path: &Path) -> io::Result<File> {
    match tokio::fs::remove_file(path).await {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => File::create_new(path).await,
    }
}

fn show(entry: &FileEntry) -> String {
    match entry.name.as_str() {
        "" => entry.slot.clone(),
        name => format!("{}/{name}", entry.slot),
    }
}

impl Hub {
    /// What the task reads.
    pub(super) async fn inputs(&mut self) -> Result<Vec<FileEntry>, Stuck> {
        let list = self.client.inputs(Request::new(self.task.clone())).await;
        let list = list.map_err(|status| Stuck::Hub {
            what: "the list of files".into(),
            status,
        })?;
        Ok(list.into_inner().files)
    }

    /// Gets a file. After a broken connection it goes on where it stopped.
    pub(super) async fn get(&mut self, entry: &FileEntry, to: &Path) -> Result<Hash, Stuck> {
        let disk = |source| Stuck::Disk {
            what: show(entry),
            source,
        };
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut begun: Option<Receiving> = None;
        loop {
            let mut receiving = match begun.take() {
                Some(receiving) => receiving,
                None => Receiving::new(create(to).await.map_err(disk)?, entry.len),
            };
            let why = match self.read_on(entry, &mut receiving).await {
                Ok(hash) => match receiving.end(&hash).await {
                    Ok(hash) => return Ok(hash),
                    Err(e) => disk(e),
                },
                Err(why) => {
                    begun = Some(receiving);
                    why
                }
            };
            if backoff.tries() >= TRIES || !why.may_pass() {
                return Err(why);
            }
            tracing::warn!(file = show(entry), error = %why, "goes on after a while");
            tokio::time::sleep(backoff.next()).await;
        }
    }

    async fn read_on(
        &mut self,
        entry: &FileEntry,
        receiving: &mut Receiving,
    ) -> Result<Vec<u8>, Stuck> {
        let hub = |status| Stuck::Hub {
            what: show(entry),
            status,
        };
        let request = ReadRequest {
            task: Some(self.task.clone()),
            slot: entry.slot.clone(),
            name: entry.name.clone(),
            offset: receiving.got(),
        };
        let mut chunks = self
            .client
            .read(Request::new(request))
            .await
            .map_err(hub)?
            .into_inner();
        while let Some(chunk) = chunks.message().await.map_err(hub)? {
            receiving
                .take(&chunk.data)
                .await
                .map_err(|source| Stuck::Disk {
                    what: show(entry),
                    source,
                })?;
            if !chunk.hash.is_empty() {
                return Ok(chunk.hash);
            }
        }
        Err(hub(Status::unavailable("the file ended before its end")))
    }

    /// Brings a file whose checksum is known. After a broken connection it begins anew.
    pub(super) async fn put(&mut self, entry: &FileEntry, from: &Path) -> Result<(), Stuck> {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            let why = match self.write_all(entry, from).await {
                Ok(()) => return Ok(()),
                Err(why) => why,
            };
            if backoff.tries() >= TRIES || !why.may_pass() {
                return Err(why);
            }
            tracing::warn!(file = show(entry), error = %why, "begins again after a while");
            tokio::time::sleep(backoff.next()).await;
        }
    }

    async fn write_all(&mut self, entry: &FileEntry, from: &Path) -> Result<(), Stuck> {
        let disk = |source| Stuck::Disk {
            what: show(entry),
            source,
        };
        let mut file = File::open(from).await.map_err(disk)?;
        file.rewind().await.map_err(disk)?;
        let (to, chunks) = mpsc::channel(IN_FLIGHT);
        let read = async {
            let head = WriteHead {
                task: Some(self.task.clone()),
                slot: entry.slot.clone(),
                name: entry.name.clone(),
                len: entry.len,
            };
            let first = WriteChunk {
                head: Some(head),
                ..WriteChunk::default()
            };
            // A closed channel: the call has ended, and says why.
            if to.send(first).await.is_err() {
                return Ok(());
            }
            loop {
                let data = next_chunk(&mut file).await?;
                let last = data.is_empty();
                let message = WriteChunk {
                    data,
                    hash: if last { entry.hash.clone() } else { Vec::new() },
                    ..WriteChunk::default()
                };
                if to.send(message).await.is_err() || last {
                    drop(to);
                    return Ok(());
                }
            }
        };
        let mut client = self.client.clone();
        let call = client.write(Request::new(ReceiverStream::new(chunks)));
        let (read, called): (io::Result<()>, _) = tokio::join!(read, call);
        read.map_err(disk)?;
        called.map(drop).map_err(|status| Stuck::Hub {
            what: show(entry),
            status,
        })
    }
}
