use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use lotus_types::SectorId;

/// Where the files of sectors are.
///
/// - `sealed/s-t01000-7`: the replica; `cache/s-t01000-7/`: its trees.
/// - `update/s-t01000-7` and `update-cache/s-t01000-7/`: the same of an upgraded sector. Once no
///   proof can ask for the first replica any more, only these are kept.
/// - `scratch/s-t01000-7/`: what only sealing needs: `unsealed` (Fr32-padded data), `attempt-*`
///   (output of a step that is not finished). Work goes into an attempt and is renamed into place
///   when it is done, so that a file in its place is complete. PreCommit2 alone encodes the
///   replica where it is; it leaves a mark first and starts over from the data tree when it finds
///   one.
#[derive(Clone, Debug)]
pub struct Storage {
    root: PathBuf,
}

impl Storage {
    /// Opens the folder, and creates what is missing in it.
    pub fn open(root: PathBuf) -> io::Result<Self> {
        for dir in ["sealed", "cache", "update", "update-cache", "scratch"] {
            fs::create_dir_all(root.join(dir))?;
        }
        Ok(Self { root })
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Bytes that the disk has free; 0 when it does not say.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        nix::sys::statvfs::statvfs(&self.root).map_or(0, |s| {
            s.blocks_available().saturating_mul(s.fragment_size())
        })
    }

    /// The replica of a sector.
    #[must_use]
    pub fn sealed(&self, sector: SectorId) -> PathBuf {
        self.root.join("sealed").join(sector.to_string())
    }

    /// The cache directory of a sector.
    #[must_use]
    pub fn cache(&self, sector: SectorId) -> PathBuf {
        self.root.join("cache").join(sector.to_string())
    }

    /// The upgraded replica of a sector.
    #[must_use]
    pub fn updated(&self, sector: SectorId) -> PathBuf {
        self.root.join("update").join(sector.to_string())
    }

    /// The cache directory of the upgraded replica.
    #[must_use]
    pub fn updated_cache(&self, sector: SectorId) -> PathBuf {
        self.root.join("update-cache").join(sector.to_string())
    }

    /// The folder of a sector for what only sealing, or an unsealing, needs.
    #[must_use]
    pub fn scratch(&self, sector: SectorId) -> PathBuf {
        self.root.join("scratch").join(sector.to_string())
    }

    /// The data of a sector, Fr32-padded.
    pub(crate) fn unsealed(&self, sector: SectorId) -> PathBuf {
        self.scratch(sector).join("unsealed")
    }

    /// An empty folder for one try of a step, with a name of its own: a worker that is not heard
    /// any more may still write to an earlier one. Those of earlier tries are deleted.
    pub(crate) fn attempt(&self, sector: SectorId, step: &str) -> io::Result<PathBuf> {
        let scratch = self.scratch(sector);
        fs::create_dir_all(&scratch)?;
        for entry in fs::read_dir(&scratch)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("attempt-") {
                fs::remove_dir_all(entry.path())?;
            }
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (pid, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = scratch.join(format!("attempt-{step}-{pid}-{n}"));
        fs::create_dir(&dir)?;
        Ok(dir)
    }

    /// Deletes what only sealing needed.
    pub(crate) fn clean(&self, sector: SectorId) -> io::Result<()> {
        remove(&self.scratch(sector))?;
        sync_dir(&self.root.join("scratch"))
    }

    /// Deletes the first replica of an upgraded sector.
    pub(crate) fn release_key(&self, sector: SectorId) -> io::Result<()> {
        remove(&self.sealed(sector))?;
        remove(&self.cache(sector))
    }

    /// Deletes what an upgrade has made.
    pub(crate) fn abort_update(&self, sector: SectorId) -> io::Result<()> {
        remove(&self.updated(sector))?;
        remove(&self.updated_cache(sector))?;
        self.clean(sector)
    }

    /// Deletes all files of a sector.
    pub(crate) fn delete(&self, sector: SectorId) -> io::Result<()> {
        self.release_key(sector)?;
        self.abort_update(sector)
    }
}

/// Moves a finished file or folder to its place, durably: its content is synced, what was there
/// is replaced, and the rename is on disk when this returns.
pub(crate) fn put_in_place(from: &Path, to: &Path) -> io::Result<()> {
    sync_tree(from)?;
    if to.is_dir() {
        fs::remove_dir_all(to)?;
    }
    fs::rename(from, to)?;
    to.parent().map_or(Ok(()), sync_dir)
}

/// Deletes a file or folder, if it is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let gone = match fs::symlink_metadata(path) {
        Ok(m) if m.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match gone {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

pub(crate) fn sync_tree(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            sync_tree(&entry?.path())?;
        }
    }
    sync_dir(path)
}

/// `fsync` of a file or folder.
fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_types::{ActorId, SectorNumber};

    #[test]
    fn an_attempt_starts_empty_and_replaces_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::open(dir.path().join("s")).unwrap();
        let id = SectorId {
            miner: ActorId(1000),
            number: SectorNumber(3),
        };
        let stale = storage.attempt(id, "pc1").unwrap();
        fs::write(stale.join("half"), "x").unwrap();

        let attempt = storage.attempt(id, "pc1").unwrap();
        assert_eq!(fs::read_dir(&attempt).unwrap().count(), 0);
        for round in ["one", "two"] {
            let made = storage.attempt(id, "pc2").unwrap().join("cache");
            fs::create_dir(&made).unwrap();
            fs::write(made.join(round), round).unwrap();
            put_in_place(&made, &storage.cache(id)).unwrap();
        }
        assert!(!storage.cache(id).join("one").exists());
        assert_eq!(fs::read(storage.cache(id).join("two")).unwrap(), b"two");

        storage.delete(id).unwrap();
        storage.delete(id).unwrap();
        assert!(!storage.cache(id).exists() && !storage.scratch(id).exists());
    }
}
