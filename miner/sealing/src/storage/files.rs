//! Files and folders: moved durably, copied so that a copy goes on after a crash, deleted.

use std::ffi::OsString;
use std::fs::{self, File, FileTimes};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use tokio_util::sync::CancellationToken;

/// Bytes between two looks at whether the hub stops.
const CHUNK: u64 = 64 << 20;
/// What a file is called until it is complete.
const PART: &str = ".part";

/// Moves a finished file or folder to its place, durably: its content is synced, what was there
/// is replaced, and the rename is on disk when this returns.
pub(super) fn put_in_place(from: &Path, to: &Path) -> io::Result<()> {
    sync_tree(from)?;
    if to.is_dir() {
        fs::remove_dir_all(to)?;
    }
    fs::rename(from, to)?;
    to.parent().map_or(Ok(()), sync)
}

/// Deletes a file or folder, if it is there.
pub(super) fn remove(path: &Path) -> io::Result<()> {
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

/// Syncs a file, or a folder and all below it.
pub(crate) fn sync_tree(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            sync_tree(&entry?.path())?;
        }
    }
    sync(path)
}

/// `fsync` of a file or folder.
pub(super) fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Bytes of a file or folder, as the files tell them; 0 when it is not there.
pub(super) fn tree_len(path: &Path) -> io::Result<u64> {
    sum(path, &|m| m.len())
}

/// Bytes that a file or folder takes on the disk; 0 when it is not there.
pub(super) fn tree_bytes(path: &Path) -> io::Result<u64> {
    // Source: stat(2): blocks are of 512 bytes, whatever the disk's are.
    sum(path, &|m| m.blocks().saturating_mul(512))
}

fn sum(path: &Path, of: &dyn Fn(&fs::Metadata) -> u64) -> io::Result<u64> {
    let meta = match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        meta => meta?,
    };
    if !meta.is_dir() {
        return Ok(of(&meta));
    }
    let mut total = 0u64;
    let entries = match fs::read_dir(path) {
        // Deleted meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    for entry in entries {
        total = total.saturating_add(sum(&entry?.path(), of)?);
    }
    Ok(total)
}

/// Who copies, and how far.
pub(super) struct Copying<'a> {
    pub(super) done: &'a AtomicU64,
    pub(super) stop: &'a CancellationToken,
}

impl Copying<'_> {
    /// Copies a file or folder, synced. What an earlier try has finished is not copied again. On
    /// one file system it makes links, which takes no time and no space; nobody writes to a file
    /// of a sector that is moved.
    pub(super) fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        if !fs::metadata(from)?.is_dir() {
            return self.file(from, to);
        }
        fs::create_dir_all(to)?;
        let mut names = Vec::new();
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            self.copy(&from.join(&name), &to.join(&name))?;
            names.push(name);
        }
        // Of an earlier try, when the source was another.
        for entry in fs::read_dir(to)? {
            let name = entry?.file_name();
            if !names.contains(&name) {
                remove(&to.join(name))?;
            }
        }
        sync(to)
    }

    fn file(&self, from: &Path, to: &Path) -> io::Result<()> {
        if self.stop.is_cancelled() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let source = fs::metadata(from)?;
        if fs::metadata(to).is_ok_and(|t| same(&source, &t)) {
            self.done.fetch_add(source.len(), Ordering::Relaxed);
            return Ok(());
        }
        remove(to)?;
        let plain = fs::symlink_metadata(from)?.is_file();
        if plain && fs::hard_link(from, to).is_ok() {
            self.done.fetch_add(source.len(), Ordering::Relaxed);
            return sync(to);
        }
        let part = part(to);
        let input = File::open(from)?;
        let mut output = File::create(&part)?;
        loop {
            if self.stop.is_cancelled() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let copied = io::copy(&mut (&input).take(CHUNK), &mut output)?;
            if copied == 0 {
                break;
            }
            self.done.fetch_add(copied, Ordering::Relaxed);
        }
        output.set_times(FileTimes::new().set_modified(source.modified()?))?;
        output.sync_all()?;
        fs::rename(part, to)
    }
}

fn part(to: &Path) -> PathBuf {
    let mut name = OsString::from(to);
    name.push(PART);
    name.into()
}

/// Whether a copy is of this very file: one inode, or the size and the time that the copy was
/// given at its end. A source that was made anew has another time.
fn same(from: &fs::Metadata, to: &fs::Metadata) -> bool {
    let one = (from.dev(), from.ino()) == (to.dev(), to.ino());
    let (a, b) = (from.modified(), to.modified());
    one || from.len() == to.len() && a.is_ok() && a.ok() == b.ok()
}

/// Whether a copy has the files of its source, of the same sizes, and no other.
pub(super) fn is_copy(from: &Path, to: &Path) -> io::Result<bool> {
    let (source, copy) = (fs::metadata(from)?, fs::metadata(to)?);
    if source.is_dir() != copy.is_dir() {
        return Ok(false);
    }
    if !source.is_dir() {
        return Ok(same(&source, &copy));
    }
    let mut count = 0usize;
    for entry in fs::read_dir(from)? {
        let name = entry?.file_name();
        if !to.join(&name).exists() || !is_copy(&from.join(&name), &to.join(&name))? {
            return Ok(false);
        }
        count += 1;
    }
    Ok(fs::read_dir(to)?.count() == count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(dir: &Path) -> PathBuf {
        let cache = dir.join("cache");
        fs::create_dir(&cache).unwrap();
        for (name, text) in [("p_aux", "p"), ("t_aux", "tt"), ("tree", "tree")] {
            fs::write(cache.join(name), text).unwrap();
        }
        cache
    }

    fn copy(from: &Path, to: &Path) -> io::Result<u64> {
        let done = AtomicU64::new(0);
        let stop = CancellationToken::new();
        let copying = Copying {
            done: &done,
            stop: &stop,
        };
        copying.copy(from, to)?;
        Ok(done.into_inner())
    }

    #[test]
    fn a_copy_that_was_broken_off_goes_on_with_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let from = cache(dir.path());
        let to = dir.path().join("copy");
        // What a copy over file systems leaves when it is killed: a whole file, half a file, and
        // files of a source that is no more.
        fs::create_dir(&to).unwrap();
        fs::write(to.join("p_aux"), "x").unwrap();
        let other = File::options().write(true).open(to.join("p_aux")).unwrap();
        other.set_modified(std::time::UNIX_EPOCH).unwrap();
        fs::write(to.join("tree.part"), "tr").unwrap();
        fs::write(to.join("gone"), "gone").unwrap();
        let time = fs::metadata(from.join("t_aux"))
            .unwrap()
            .modified()
            .unwrap();
        fs::write(to.join("t_aux"), "TT").unwrap();
        let whole = File::options().write(true).open(to.join("t_aux")).unwrap();
        whole.set_modified(time).unwrap();
        assert!(!is_copy(&from, &to).unwrap());

        assert_eq!(copy(&from, &to).unwrap(), 7);
        assert!(is_copy(&from, &to).unwrap());
        let text = |name: &str| fs::read_to_string(to.join(name)).unwrap();
        // The finished one is kept; the one of another time is not.
        assert_eq!((text("t_aux"), text("p_aux")), ("TT".into(), "p".into()));
        assert_eq!(tree_len(&to).unwrap(), 7);
        assert_eq!(tree_len(&to.join("none")).unwrap(), 0);

        fs::write(from.join("tree"), "other").unwrap();
        fs::write(from.join("more"), "m").unwrap();
        assert!(!is_copy(&from, &to).unwrap());
    }

    #[test]
    fn bytes_go_over_file_systems() {
        // A link of a symbolic link would be one more link, so this is copied byte by byte.
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        fs::write(&real, vec![7; 3_000_000]).unwrap();
        let from = dir.path().join("from");
        std::os::unix::fs::symlink(&real, &from).unwrap();
        let to = dir.path().join("to");
        assert_eq!(copy(&from, &to).unwrap(), 3_000_000);
        assert!(fs::symlink_metadata(&to).unwrap().is_file());
        assert!(fs::metadata(&to).unwrap().ino() != fs::metadata(&real).unwrap().ino());
        assert!(is_copy(&from, &to).unwrap() && fs::read(&to).unwrap() == [7; 3_000_000]);

        let (done, stop) = (AtomicU64::new(0), CancellationToken::new());
        stop.cancel();
        let copying = Copying {
            done: &done,
            stop: &stop,
        };
        let e = copying.copy(&from, &dir.path().join("two")).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::Interrupted);
    }

    #[test]
    fn what_is_put_replaces_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("place");
        for round in ["one", "two"] {
            let made = dir.path().join("made");
            fs::create_dir(&made).unwrap();
            fs::write(made.join(round), round).unwrap();
            put_in_place(&made, &place).unwrap();
        }
        assert!(!place.join("one").exists() && place.join("two").exists());
        remove(&place).unwrap();
        remove(&place).unwrap();
        assert!(!place.exists());
    }
}
