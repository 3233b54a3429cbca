//! Every change of the disk. In tests each of them is a boundary at which the process may die.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::SegmentsError;

/// Bytes that are collected before they are written, and read at once by whoever reads all.
pub(crate) const BUFFER: usize = 1 << 20;
/// What direct I/O wants of addresses, offsets and lengths: no drive has larger sectors.
const SECTOR: usize = 4096;

/// Opens a file past the page cache, so that what is written and read once does not drive out what
/// lookups read, and is not copied. Where the file system has no direct I/O, through the cache.
pub(crate) fn open_direct(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let direct = OFlags::DIRECT.bits().cast_signed();
    match options.custom_flags(direct).open(path) {
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => options.custom_flags(0).open(path),
        opened => opened,
    }
}

/// A buffer for direct I/O.
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    /// Where in `bytes` it begins.
    from: usize,
}

impl Aligned {
    pub(crate) fn new() -> Self {
        let bytes = vec![0; BUFFER + SECTOR];
        let from = bytes.as_ptr().align_offset(SECTOR).min(SECTOR);
        Self { bytes, from }
    }

    pub(crate) fn get(&self) -> &[u8] {
        &self.bytes[self.from..self.from + BUFFER]
    }

    pub(crate) fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + BUFFER]
    }
}

/// A file that is written from its start to its end.
pub(crate) struct OutFile {
    path: PathBuf,
    file: File,
    buffer: Aligned,
    /// Bytes of the buffer that wait.
    filled: usize,
}

impl OutFile {
    pub(crate) fn create(path: &Path) -> Result<Self, SegmentsError> {
        boundary(path)?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        let file = open_direct(&mut options, path).map_err(SegmentsError::io(path))?;
        fault::written(path);
        Ok(Self {
            path: path.into(),
            file,
            buffer: Aligned::new(),
            filled: 0,
        })
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> Result<(), SegmentsError> {
        while !bytes.is_empty() {
            let free = &mut self.buffer.get_mut()[self.filled..];
            let (now, later) = bytes.split_at(free.len().min(bytes.len()));
            free[..now.len()].copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
            if self.filled == BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn flush(&mut self) -> Result<(), SegmentsError> {
        boundary(&self.path)?;
        let done = self.file.write_all(&self.buffer.get()[..self.filled]);
        done.map_err(SegmentsError::io(&self.path))?;
        self.filled = 0;
        Ok(())
    }

    /// Everything is on the disk when this returns.
    pub(crate) fn finish(mut self) -> Result<(), SegmentsError> {
        // What is left is no whole sector.
        let flags = rustix::fs::fcntl_getfl(&self.file);
        flags
            .and_then(|flags| rustix::fs::fcntl_setfl(&self.file, flags - OFlags::DIRECT))
            .map_err(|e| SegmentsError::io(&self.path)(e.into()))?;
        self.flush()?;
        boundary(&self.path)?;
        self.file
            .sync_all()
            .map_err(SegmentsError::io(&self.path))?;
        fault::synced(&self.path);
        Ok(())
    }
}

/// Bytes that a file on the disk of this folder may still take.
pub(crate) fn free(dir: &Path) -> Result<u64, SegmentsError> {
    let disk = rustix::fs::statvfs(dir).map_err(|e| SegmentsError::io(dir)(e.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Puts a finished file in the place of another, for good.
pub(crate) fn replace(from: &Path, to: &Path) -> Result<(), SegmentsError> {
    boundary(to)?;
    fs::rename(from, to).map_err(SegmentsError::io(to))?;
    sync_parent(to)
}

/// Makes the names in a file's folder last.
pub(crate) fn sync_parent(path: &Path) -> Result<(), SegmentsError> {
    boundary(path)?;
    let Some(dir) = path.parent() else {
        return Ok(());
    };
    let synced = File::open(dir).and_then(|d| d.sync_all());
    synced.map_err(SegmentsError::io(dir))
}

pub(crate) fn remove(path: &Path) -> Result<(), SegmentsError> {
    boundary(path)?;
    fs::remove_file(path).map_err(SegmentsError::io(path))
}

fn boundary(path: &Path) -> Result<(), SegmentsError> {
    fault::boundary().map_err(SegmentsError::io(path))
}

/// Nothing dies here.
#[cfg(not(test))]
mod fault {
    use std::io;
    use std::path::Path;

    #[expect(clippy::unnecessary_wraps, reason = "in tests it fails")]
    pub(super) fn boundary() -> io::Result<()> {
        Ok(())
    }
    pub(super) fn written(_: &Path) {}
    pub(super) fn synced(_: &Path) {}
}

/// A process that dies at a chosen boundary, and loses of what it has not synced.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::fs::OpenOptions;
    use std::io;
    use std::path::{Path, PathBuf};

    #[derive(Default)]
    struct Process {
        /// Boundaries until its death; `None` when it lives on.
        left: Option<u32>,
        /// Boundaries until one fails, and only that.
        fails: Option<u32>,
        unsynced: BTreeSet<PathBuf>,
    }

    thread_local! {
        static PROCESS: RefCell<Process> = RefCell::default();
    }

    /// From now on this thread dies at the boundary after `left` others.
    pub(crate) fn die_after(left: u32) {
        PROCESS.with_borrow_mut(|p| p.left = Some(left));
    }

    /// The boundary after `left` others fails; the process lives on.
    pub(crate) fn fail_after(left: u32) {
        PROCESS.with_borrow_mut(|p| p.fails = Some(left));
    }

    /// Whether that boundary was reached. Nothing fails from now on.
    pub(crate) fn failed() -> bool {
        PROCESS.with_borrow_mut(|p| p.fails.take().is_none())
    }

    /// Whether it died; it lives again. Files that were not synced end somewhere.
    pub(crate) fn revive() -> bool {
        PROCESS.with_borrow_mut(|p| {
            let dead = p.left.take() == Some(0);
            for path in std::mem::take(&mut p.unsynced) {
                let Ok(file) = OpenOptions::new().write(true).open(path) else {
                    continue;
                };
                if dead {
                    let len = file.metadata().map_or(0, |m| m.len());
                    file.set_len(len / 2).expect("a file of the test");
                }
            }
            dead
        })
    }

    pub(super) fn boundary() -> io::Result<()> {
        PROCESS.with_borrow_mut(|p| {
            match &mut p.fails {
                Some(0) => {
                    p.fails = None;
                    return Err(io::Error::other("the disk fails"));
                }
                Some(n) => *n -= 1,
                None => {}
            }
            match &mut p.left {
                Some(0) => Err(io::Error::other("the process is dead")),
                Some(n) => {
                    *n -= 1;
                    Ok(())
                }
                None => Ok(()),
            }
        })
    }

    pub(super) fn written(path: &Path) {
        PROCESS.with_borrow_mut(|p| p.unsynced.insert(path.into()));
    }

    pub(super) fn synced(path: &Path) {
        PROCESS.with_borrow_mut(|p| p.unsynced.remove(path));
    }
}
