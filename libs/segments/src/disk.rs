//! Every change of the disk. In tests each of them is a boundary at which the process may die.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::SegmentsError;

/// Bytes that are collected before they are written.
const BUFFER: usize = 1 << 20;

/// A file that is written from its start to its end.
#[derive(Debug)]
pub(crate) struct OutFile {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
}

impl OutFile {
    pub(crate) fn create(path: &Path) -> Result<Self, SegmentsError> {
        boundary(path)?;
        let file = File::create(path).map_err(SegmentsError::io(path))?;
        fault::written(path);
        Ok(Self {
            path: path.into(),
            file,
            buffer: Vec::with_capacity(BUFFER),
        })
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), SegmentsError> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SegmentsError> {
        boundary(&self.path)?;
        let done = self.file.write_all(&self.buffer);
        done.map_err(SegmentsError::io(&self.path))?;
        self.buffer.clear();
        Ok(())
    }

    /// Everything is on the disk when this returns.
    pub(crate) fn finish(mut self) -> Result<(), SegmentsError> {
        self.flush()?;
        boundary(&self.path)?;
        self.file
            .sync_all()
            .map_err(SegmentsError::io(&self.path))?;
        fault::synced(&self.path);
        Ok(())
    }
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
