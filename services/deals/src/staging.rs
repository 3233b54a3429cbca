//! Staged pieces on disk. Bytes stream to a part file; commP and, for a CAR, every block are
//! checked in the same pass. Only a complete, verified and synced piece gets its final name.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use lotus_car::{CarError, CarReader};
use lotus_proofs::CommpWriter;
use lotus_types::{DealKey, Kind, PieceInfo};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::arriving::{Lease, Transfer};
use crate::validate::Format;

/// Chunks in flight between network and disk, and between disk and CAR check.
const QUEUE: usize = 16;

/// Why the bytes of a deal are not taken.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// Fewer bytes than the piece CID says.
    #[error("the transfer ended after {have} of {want} bytes")]
    Short {
        /// Bytes that came.
        have: u64,
        /// Bytes that the piece CID names.
        want: u64,
    },
    /// More bytes than the piece CID says.
    #[error("the transfer has more than the {want} bytes that the piece CID names")]
    Long {
        /// Bytes that the piece CID names.
        want: u64,
    },
    /// Other bytes.
    #[error("the bytes are piece {got}, not {want}")]
    WrongPiece {
        /// Piece CID (version 2) of what came.
        got: String,
        /// Piece CID (version 2) of the deal.
        want: String,
    },
    /// The piece is right, but it is no sound CAR.
    #[error("the piece is not a sound CAR: {0}")]
    Car(#[from] CarError),
    /// No space left.
    #[error("the staging disk is full")]
    DiskFull,
    /// The disk fails.
    #[error("staging: {0}")]
    Io(io::Error),
}

impl From<io::Error> for IntakeError {
    fn from(e: io::Error) -> Self {
        if matches!(
            e.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ) {
            Self::DiskFull
        } else {
            Self::Io(e)
        }
    }
}

impl IntakeError {
    /// Who must act.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Short { .. } | Self::Long { .. } | Self::WrongPiece { .. } | Self::Car(_) => {
                Kind::Data
            }
            Self::DiskFull => Kind::Capacity,
            Self::Io(_) => Kind::Fatal,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Short { .. } => "send the whole file; the deal waits for it".into(),
            Self::Long { .. } | Self::WrongPiece { .. } => {
                "send the file whose piece CID is in the deal (`lotus-markets client piece-cid FILE` shows it), or propose a deal for this one".into()
            }
            Self::Car(e) => format!("{}; data that is no CAR goes with format.raw", e.fix()),
            Self::DiskFull => "try again later; the provider must free space in its markets repo".into(),
            Self::Io(_) => "try again later; the provider must check the disk of its markets repo".into(),
        }
    }
}

/// The staging directory.
#[derive(Clone, Debug)]
pub(crate) struct Staging {
    dir: PathBuf,
}

impl Staging {
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
        })
    }

    fn path(&self, key: &DealKey, ending: &str) -> PathBuf {
        // The client is an address in text form: letters and digits only.
        self.dir.join(format!("{}_{}.{ending}", key.client, key.id))
    }

    /// Where the complete piece is.
    pub(crate) fn piece(&self, key: &DealKey) -> PathBuf {
        self.path(key, "piece")
    }

    /// Whether the complete piece is here.
    pub(crate) fn has(&self, key: &DealKey) -> bool {
        self.piece(key).is_file()
    }

    /// Where the chunks of an upload go until all of them are here.
    pub(crate) fn chunks(&self, key: &DealKey) -> PathBuf {
        self.path(key, "chunks")
    }

    /// Makes a file that a complete, unchecked piece is in a deal's own: no bytes are copied.
    /// Whoever has the file keeps it.
    pub(crate) fn adopt(&self, key: &DealKey, file: &Path) -> io::Result<()> {
        let part = self.path(key, "part");
        gone(&part)?;
        fs::hard_link(file, part)?;
        File::open(&self.dir)?.sync_all()
    }

    /// Checks a piece whose bytes are all on disk, and gives it its name.
    pub(crate) async fn check(
        &self,
        piece: PieceInfo,
        format: Format,
        lease: Lease,
    ) -> Result<(), IntakeError> {
        let key = &lease.key;
        match fs::rename(self.chunks(key), self.path(key, "part")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let mut intake = self.intake(piece, format, true, lease);
        intake.start().await;
        intake.finish().await
    }

    /// Removes everything of a deal.
    pub(crate) fn remove(&self, key: &DealKey) -> io::Result<()> {
        for path in [self.chunks(key), self.path(key, "part"), self.piece(key)] {
            gone(&path)?;
        }
        Ok(())
    }

    /// Removes the files of deals that `wanted` does not name.
    pub(crate) fn sweep(&self, wanted: impl Fn(&DealKey) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let key = path
                .file_stem()
                .and_then(|s| s.to_str())
                .and_then(|s| s.replacen('_', "/", 1).parse::<DealKey>().ok());
            if !key.is_some_and(|k| wanted(&k)) {
                tracing::info!(file = %path.display(), "removing a staged file that no open deal needs");
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// Begins to take the bytes of a deal. With `resume`, bytes that an earlier process left are
    /// taken over, and a broken transfer leaves its own. `lease` is dropped when the files are at
    /// rest again.
    pub(crate) fn intake(
        &self,
        piece: PieceInfo,
        format: Format,
        resume: bool,
        lease: Lease,
    ) -> Intake {
        let (sink, chunks) = mpsc::channel(QUEUE);
        let key = &lease.key;
        let job = Job {
            part: self.path(key, "part"),
            done: self.piece(key),
            dir: self.dir.clone(),
            piece,
            format,
            resume,
        };
        let transfer = lease.transfer.clone();
        let (started, start) = tokio::sync::oneshot::channel();
        let done = tokio::task::spawn_blocking(move || {
            let out = job.run(chunks, &lease.transfer.received, started);
            drop(lease);
            out
        });
        Intake {
            sink: Some(sink),
            done,
            transfer,
            start,
        }
    }
}

/// Removes a file that may not be there.
fn gone(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Takes bytes in order. Dropped unfinished, the transfer counts as broken.
#[derive(Debug)]
pub(crate) struct Intake {
    sink: Option<mpsc::Sender<Bytes>>,
    done: JoinHandle<Result<(), IntakeError>>,
    transfer: Arc<Transfer>,
    start: tokio::sync::oneshot::Receiver<u64>,
}

impl Intake {
    /// Where the bytes go.
    pub(crate) fn sink(&self) -> Option<&mpsc::Sender<Bytes>> {
        self.sink.as_ref()
    }

    /// First byte that is wanted: not 0 when an earlier process left some. To be asked once.
    pub(crate) async fn start(&mut self) -> u64 {
        (&mut self.start).await.unwrap_or(0)
    }

    /// Bytes taken so far.
    pub(crate) fn received(&self) -> u64 {
        self.transfer.received.load(Ordering::Relaxed)
    }

    /// No more bytes come: checks them and gives the piece its name.
    pub(crate) async fn finish(mut self) -> Result<(), IntakeError> {
        drop(self.sink.take());
        self.done
            .await
            .map_err(|e| IntakeError::Io(io::Error::other(e)))?
    }
}

struct Job {
    part: PathBuf,
    done: PathBuf,
    dir: PathBuf,
    piece: PieceInfo,
    format: Format,
    resume: bool,
}

impl Job {
    fn run(
        self,
        chunks: mpsc::Receiver<Bytes>,
        received: &AtomicU64,
        started: tokio::sync::oneshot::Sender<u64>,
    ) -> Result<(), IntakeError> {
        let out = self.take(chunks, received, started);
        let keep = self.resume && matches!(out, Err(IntakeError::Short { .. }));
        if out.is_err() {
            received.store(0, Ordering::Relaxed);
            if !keep {
                // What is left is of no use, and on a full disk it is in the way.
                drop(fs::remove_file(&self.part));
            }
        }
        out
    }

    fn take(
        &self,
        mut chunks: mpsc::Receiver<Bytes>,
        received: &AtomicU64,
        started: tokio::sync::oneshot::Sender<u64>,
    ) -> Result<(), IntakeError> {
        std::thread::scope(|scope| {
            let (to_car, car) = match self.format {
                Format::Raw => (None, None),
                Format::Car => {
                    let (tx, rx) = sync_channel(QUEUE);
                    (Some(tx), Some(scope.spawn(move || check_car(rx))))
                }
            };
            if !self.resume && fs::metadata(&self.part).is_ok_and(|m| m.len() > 0) {
                // Not truncated: it may be a link to a piece that others have too.
                gone(&self.part)?;
            }
            let mut pass = Pass {
                file: OpenOptions::new()
                    .create(true)
                    .append(true)
                    .read(true)
                    .open(&self.part)?,
                commp: CommpWriter::new(),
                to_car,
                len: 0,
                want: self.piece.raw_size,
                received,
            };
            pass.begin(&chunks)?;
            // Nobody listens when the transfer was given up already.
            started.send(pass.len).ok();
            while let Some(chunk) = chunks.blocking_recv() {
                pass.file_and_hash(chunk)?;
            }
            let Pass {
                file,
                commp,
                to_car,
                len,
                ..
            } = pass;
            drop(to_car);
            if len < self.piece.raw_size {
                return Err(IntakeError::Short {
                    have: len,
                    want: self.piece.raw_size,
                });
            }
            let got = commp.finish();
            if got.cid != self.piece.cid {
                return Err(IntakeError::WrongPiece {
                    got: got.cid_v2().to_string(),
                    want: self.piece.cid_v2().to_string(),
                });
            }
            if let Some(car) = car {
                car.join()
                    .map_err(|_| io::Error::other("the CAR check panicked"))??;
            }
            file.sync_all()?;
            fs::rename(&self.part, &self.done)?;
            File::open(&self.dir)?.sync_all()?;
            Ok(())
        })
    }
}

struct Pass<'a> {
    file: File,
    commp: CommpWriter,
    to_car: Option<SyncSender<Bytes>>,
    len: u64,
    want: u64,
    received: &'a AtomicU64,
}

impl Pass<'_> {
    /// Takes over what an earlier process left, or starts empty.
    fn begin(&mut self, chunks: &mpsc::Receiver<Bytes>) -> Result<(), IntakeError> {
        let left = self.file.metadata()?.len();
        if left == 0 {
            return Ok(());
        }
        if left > self.want {
            self.file.set_len(0)?;
            return Ok(());
        }
        let mut left = self.file.try_clone()?;
        loop {
            let mut buf = vec![0; 256 << 10];
            let n = left.read(&mut buf)?;
            // Closed while it starts: nobody waits for it any more.
            if n == 0 || chunks.is_closed() {
                return Ok(());
            }
            buf.truncate(n);
            self.hash(buf.into())?;
        }
    }

    fn file_and_hash(&mut self, chunk: Bytes) -> Result<(), IntakeError> {
        if self.len.saturating_add(chunk.len() as u64) > self.want {
            return Err(IntakeError::Long { want: self.want });
        }
        self.file.write_all(&chunk)?;
        self.hash(chunk)
    }

    fn hash(&mut self, chunk: Bytes) -> Result<(), IntakeError> {
        self.commp.write_all(&chunk)?;
        self.len += chunk.len() as u64;
        self.received.store(self.len, Ordering::Relaxed);
        if let Some(to) = &self.to_car
            && to.send(chunk).is_err()
        {
            // It has seen enough: its verdict is asked for at the end.
            self.to_car = None;
        }
        Ok(())
    }
}

fn check_car(chunks: Receiver<Bytes>) -> Result<(), CarError> {
    for block in CarReader::new(Chunks {
        from: chunks,
        now: Bytes::new(),
    })? {
        block?;
    }
    Ok(())
}

struct Chunks {
    from: Receiver<Bytes>,
    now: Bytes,
}

impl Read for Chunks {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            match self.from.recv() {
                Ok(chunk) => self.now = chunk,
                Err(_) => return Ok(0),
            }
        }
        let n = buf.len().min(self.now.len());
        buf[..n].copy_from_slice(&self.now.split_to(n));
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
