//! A worker's own copies of files, in a directory that is its alone.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use lotus_runtime::Fault;
use lotus_types::Kind;
use rustix::fs::statvfs;
use tokio::runtime::Handle;

use super::copy::Hash;
use crate::pool::lock;

/// Where copies are, below the directory that the operator named.
const COPIES: &str = "lotus-worker";

/// The scratch directory of this process. Copies of an earlier one are deleted: nothing is known
/// about them.
pub(super) struct Scratch {
    root: PathBuf,
    kept: Mutex<Kept>,
    /// Held while room is made, so that nobody takes what is being deleted for too little room.
    clearing: Mutex<()>,
    _lock: File,
}

#[derive(Default)]
struct Kept {
    in_use: HashSet<String>,
    /// When each directory was last used.
    idle: BTreeMap<String, SystemTime>,
    hashes: HashMap<PathBuf, (u64, (i64, i64), Hash)>,
    next: u64,
}

/// A directory with the files of one sector, while a task uses it.
pub(super) struct Claimed {
    scratch: Arc<Scratch>,
    key: String,
    keep: bool,
    given_back: bool,
}

impl Scratch {
    /// Takes the directory for this process.
    pub(super) fn open(dir: &Path) -> Result<Arc<Self>, Fault> {
        let fault = |e: io::Error| {
            Fault::new(
                Kind::Config,
                format!("scratch directory {}: {e}", dir.display()),
                "give --dir a directory on a large and fast disk that this user can write",
            )
        };
        let root = dir.join(COPIES);
        fs::create_dir_all(&root).map_err(fault)?;
        let lock = File::create(dir.join("lotus-worker.lock")).map_err(fault)?;
        if lock.try_lock().is_err() {
            return Err(Fault::new(
                Kind::Config,
                format!("another worker uses {}", dir.display()),
                "give each worker a --dir of its own",
            ));
        }
        for entry in fs::read_dir(&root).map_err(fault)? {
            let path = entry.map_err(fault)?.path();
            fs::remove_dir_all(&path).map_err(fault)?;
        }
        Ok(Arc::new(Self {
            root,
            kept: Mutex::default(),
            clearing: Mutex::default(),
            _lock: lock,
        }))
    }

    /// Bytes that tasks can take: what is free, and what is only kept in case it is asked for.
    pub(super) fn room(&self) -> io::Result<u64> {
        let idle: u64 = {
            let kept = lock(&self.kept);
            kept.idle.keys().map(|k| size_of(&self.root.join(k))).sum()
        };
        Ok(self.free()?.saturating_add(idle))
    }

    fn free(&self) -> io::Result<u64> {
        let fs = statvfs(&self.root)?;
        Ok(fs.f_bavail.saturating_mul(fs.f_frsize))
    }

    /// The directory of a sector for one task, with what is there of earlier ones; an empty one if
    /// another task is using it. Drops what was not used for longest until `needs` bytes are free.
    pub(super) fn claim(self: &Arc<Self>, sector: &str, needs: u64) -> io::Result<Claimed> {
        let key = {
            let mut kept = lock(&self.kept);
            kept.next += 1;
            let key = if kept.in_use.contains(sector) {
                format!("{sector}.{}", kept.next)
            } else {
                sector.to_owned()
            };
            kept.in_use.insert(key.clone());
            kept.idle.remove(&key);
            key
        };
        // From here on dropping it gives the directory back.
        let claimed = Claimed {
            scratch: self.clone(),
            keep: key == sector,
            key,
            given_back: false,
        };
        self.make_room(needs.saturating_sub(size_of(&claimed.dir())))?;
        fs::create_dir_all(claimed.dir())?;
        Ok(claimed)
    }

    fn make_room(&self, wanted: u64) -> io::Result<()> {
        let _alone = lock(&self.clearing);
        while self.free()? < wanted {
            let oldest = {
                let mut kept = lock(&self.kept);
                let oldest = kept.idle.iter().min_by_key(|(_, used)| **used);
                let oldest = oldest.map(|(key, _)| key.clone());
                let oldest = oldest.ok_or(io::ErrorKind::StorageFull)?;
                kept.idle.remove(&oldest);
                kept.in_use.insert(oldest.clone());
                oldest
            };
            self.give_back(&oldest, false);
        }
        Ok(())
    }

    /// Ends the use of a directory. What is not kept is deleted, which may take a minute: nobody
    /// else gets it before, and nobody waits for the lock.
    fn give_back(&self, key: &str, keep: bool) {
        if !keep {
            let dir = self.root.join(key);
            match fs::remove_dir_all(&dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(dir = %dir.display(), error = %e, "can not delete copies");
                }
                _ => {}
            }
        }
        let mut kept = lock(&self.kept);
        kept.in_use.remove(key);
        if keep {
            kept.idle.insert(key.to_owned(), SystemTime::now());
        } else {
            let dir = self.root.join(key);
            kept.hashes.retain(|path, _| !path.starts_with(&dir));
        }
    }
}

impl Claimed {
    pub(super) fn dir(&self) -> PathBuf {
        self.scratch.root.join(&self.key)
    }

    /// The checksum of a copy that did not change since it was taken.
    pub(super) fn known(&self, file: &Path) -> Option<Hash> {
        let meta = fs::symlink_metadata(file).ok()?;
        let (len, mtime, hash) = *lock(&self.scratch.kept).hashes.get(file)?;
        (meta.len() == len && (meta.mtime(), meta.mtime_nsec()) == mtime).then_some(hash)
    }

    pub(super) fn remember(&self, file: &Path, hash: Hash) {
        if let Ok(meta) = fs::symlink_metadata(file) {
            let mtime = (meta.mtime(), meta.mtime_nsec());
            let known = (meta.len(), mtime, hash);
            lock(&self.scratch.kept).hashes.insert(file.into(), known);
        }
    }

    /// Nothing of it is wanted any more.
    pub(super) fn discard(&mut self) {
        self.keep = false;
    }

    /// Gives the directory back, and returns when that is done.
    pub(super) async fn end(mut self) {
        self.given_back = true;
        let (scratch, key, keep) = (self.scratch.clone(), self.key.clone(), self.keep);
        let ended = tokio::task::spawn_blocking(move || scratch.give_back(&key, keep));
        if let Err(e) = ended.await {
            tracing::error!(error = %e, "giving up a scratch directory panicked");
        }
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if self.given_back {
            return;
        }
        let (scratch, key, keep) = (self.scratch.clone(), self.key.clone(), self.keep);
        match Handle::try_current() {
            // A task that was given up ends on an async thread.
            Ok(runtime) if !keep => {
                runtime.spawn_blocking(move || scratch.give_back(&key, keep));
            }
            _ => scratch.give_back(&key, keep),
        }
    }
}

/// Bytes on disk below a directory of slots.
fn size_of(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    let size = |path: PathBuf| match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_dir() => size_of(&path),
        Ok(meta) => meta.blocks().saturating_mul(512),
        Err(_) => 0,
    };
    entries.flatten().map(|e| size(e.path())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_kept_for_the_next_task_and_dropped_for_room() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(dir.path()).unwrap();
        assert!(Scratch::open(dir.path()).is_err(), "one process");
        let first = scratch.claim("s-1", 0).unwrap();
        let file = first.dir().join("sealed");
        fs::write(&file, "replica").unwrap();
        first.remember(&file, [7; 32]);
        // The sector is in use: another task gets another directory, which is not kept.
        let second = scratch.claim("s-1", 0).unwrap();
        let other = second.dir();
        assert_ne!(first.dir(), other);
        drop(second);
        assert!(!other.exists());
        drop(first);
        let again = scratch.claim("s-1", 0).unwrap();
        assert_eq!(again.known(&file), Some([7; 32]));
        fs::write(&file, "another replica").unwrap();
        assert_eq!(again.known(&file), None, "changed");
        drop(again);
        assert!(scratch.room().unwrap() > 0);
        // What is being deleted is nobody's.
        lock(&scratch.kept).in_use.insert("s-3".into());
        fs::create_dir(scratch.root.join("s-3")).unwrap();
        let beside = scratch.claim("s-3", 0).unwrap();
        assert_ne!(beside.dir(), scratch.root.join("s-3"));
        scratch.give_back("s-3", false);
        assert!(!scratch.root.join("s-3").exists() && beside.dir().exists());
        // More than any disk has: what is kept goes first.
        assert!(scratch.claim("s-2", u64::MAX).is_err());
        assert!(!file.exists());
    }

    #[tokio::test]
    async fn what_is_not_kept_is_gone_when_the_task_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(dir.path()).unwrap();
        let mut last = scratch.claim("s-1", 0).unwrap();
        let copies = last.dir();
        fs::write(copies.join("sealed"), "replica").unwrap();
        last.discard();
        last.end().await;
        assert!(!copies.exists());
        let again = scratch.claim("s-1", 0).unwrap();
        assert_eq!(again.dir(), copies);
        again.end().await;
        assert!(copies.exists(), "kept");
    }
}
