//! Bytes on their way into a piece file, hashed as they come.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use lotus_dataplane::DataError;
use lotus_proofs::CommpWriter;
use lotus_types::PieceInfo;
use tokio_util::sync::CancellationToken;

/// Bytes moved at a time: large enough that system calls do not count, small enough to stop soon.
const CHUNK: usize = 1 << 20;

/// A part file and the commP of what it holds so far.
pub(super) struct Intake {
    file: File,
    path: PathBuf,
    commp: CommpWriter,
    written: u64,
    total: u64,
    /// Whether an earlier process wrote some of it, which the disk may have lost.
    resumed: bool,
}

impl Intake {
    /// Opens the part file at `path` for `total` bytes, and hashes what is there already. Room
    /// for all is taken at once, so that a full disk is found before hours of transfer and two
    /// transfers do not starve each other halfway.
    pub(super) fn open(
        path: &Path,
        total: u64,
        stop: &CancellationToken,
    ) -> Result<Self, DataError> {
        let io = || DataError::io(format!("write {}", path.display()));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io())?;
        if file.metadata().map_err(io())?.len() > total {
            file.set_len(0).map_err(io())?;
        }
        match rustix::fs::fallocate(
            &file,
            rustix::fs::FallocateFlags::KEEP_SIZE,
            0,
            total.max(1),
        ) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(e) => {
                drop(file);
                remove(path)?;
                return Err(io()(e.into()));
            }
        }
        let mut commp = CommpWriter::new();
        let mut written = 0;
        let mut buf = vec![0; CHUNK];
        loop {
            if stop.is_cancelled() {
                return Err(DataError::Stopped);
            }
            let n = file.read(&mut buf).map_err(io())?;
            if n == 0 {
                break;
            }
            commp.write_all(&buf[..n]).map_err(io())?;
            written += n as u64;
        }
        Ok(Self {
            file,
            path: path.into(),
            commp,
            written,
            total,
            resumed: written > 0,
        })
    }

    /// Bytes here.
    pub(super) const fn written(&self) -> u64 {
        self.written
    }

    /// Bytes there will be.
    pub(super) const fn total(&self) -> u64 {
        self.total
    }

    /// Whether all bytes are here.
    pub(super) const fn is_complete(&self) -> bool {
        self.written == self.total
    }

    /// Whether some of it is from before this process or this source.
    pub(super) const fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// Says that the bytes so far may be of another content than those to come.
    pub(super) const fn mark_resumed(&mut self) {
        self.resumed = self.resumed || self.written > 0;
    }

    /// Appends bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        let io = |e| DataError::io(format!("write {}", self.path.display()))(e);
        if self.written + bytes.len() as u64 > self.total {
            return Err(DataError::TooLong {
                at: self.path.display().to_string(),
                limit: self.total,
            });
        }
        self.file.write_all_at(bytes, self.written).map_err(io)?;
        self.commp.write_all(bytes).map_err(io)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Copies the rest from a descriptor, by position.
    pub(super) fn copy_from(
        &mut self,
        source: &File,
        progress: &AtomicU64,
        stop: &CancellationToken,
    ) -> Result<(), DataError> {
        let mut buf = vec![0; CHUNK];
        while self.written < self.total {
            if stop.is_cancelled() {
                return Err(DataError::Stopped);
            }
            let want = usize::try_from(self.total - self.written).map_or(CHUNK, |n| n.min(CHUNK));
            let n = match source.read_at(&mut buf[..want], self.written) {
                Ok(0) => {
                    return Err(DataError::Unreachable {
                        at: "the staged file".into(),
                        why: format!("it ends after {} of {} bytes", self.written, self.total),
                    });
                }
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    return Err(DataError::Unreachable {
                        at: "the staged file".into(),
                        why: e.to_string(),
                    });
                }
            };
            self.write(&buf[..n])?;
            progress.store(self.written, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Syncs the complete file and says which piece it is, when extended with zeros to the size
    /// of `announced`.
    pub(super) fn finish(mut self, announced: &PieceInfo) -> Result<PieceInfo, DataError> {
        let io = || DataError::io(format!("sync {}", self.path.display()));
        self.file.sync_all().map_err(io())?;
        self.commp.extend_to(announced.size).map_err(io())?;
        let got = self.commp.finish();
        Ok(PieceInfo {
            raw_size: self.written,
            ..got
        })
    }
}

/// Deletes a file, if it is there.
pub(super) fn remove(path: &Path) -> Result<(), DataError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(DataError::io(format!("delete {}", path.display()))(e))
        }
        _ => Ok(()),
    }
}

/// Moves a synced file to its place, durably.
pub(super) fn put_in_place(from: &Path, to: &Path) -> Result<(), DataError> {
    let io = || DataError::io(format!("move a piece to {}", to.display()));
    fs::rename(from, to).map_err(io())?;
    let dir = to.parent().unwrap_or(Path::new("/"));
    File::open(dir).and_then(|d| d.sync_all()).map_err(io())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_types::PaddedSize;

    /// An oracle that knows nothing of resuming: commP of the zero-extended bytes.
    fn commp(bytes: &[u8], size: PaddedSize) -> PieceInfo {
        let mut all = bytes.to_vec();
        all.resize(usize::try_from(size.unpadded().get()).unwrap(), 0);
        PieceInfo {
            raw_size: bytes.len() as u64,
            ..lotus_proofs::commp(all.as_slice()).unwrap()
        }
    }

    #[test]
    fn a_part_goes_on_where_it_stopped_and_larger_sizes_are_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part");
        let stop = CancellationToken::new();
        let data: Vec<u8> = (0..70_000u32).map(|i| (i % 251) as u8).collect();
        for size in [128 << 10, 256 << 10, 1 << 20] {
            remove(&path).unwrap();
            let mut part = Intake::open(&path, 70_000, &stop).unwrap();
            part.write(&data[..30_000]).unwrap();
            assert!(!part.is_resumed() && !part.is_complete());
            drop(part);
            let mut part = Intake::open(&path, 70_000, &stop).unwrap();
            assert!(part.is_resumed());
            assert_eq!(part.written(), 30_000);
            part.write(&data[30_000..]).unwrap();
            assert!(part.write(b"x").is_err());
            let want = commp(&data, PaddedSize::new(size).unwrap());
            assert_eq!(part.finish(&want).unwrap(), want, "{size}");
        }
    }
}
