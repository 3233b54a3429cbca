//! Small files for their owner alone, written whole or not at all.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use lotus_runtime::Fault;
use lotus_types::Kind;

/// Makes a directory, and those above it, for their owner alone.
pub fn make_dir(dir: &Path) -> io::Result<()> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir);
    made.map_err(|e| naming(dir, &e))
}

/// Writes a file that must not exist yet.
pub fn create(file: &Path, bytes: &[u8]) -> Result<(), Fault> {
    let mut out = File::options()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(file)
        .map_err(|e| {
            Fault::new(
                Kind::Config,
                format!("can not write {}: {e}", file.display()),
                "name a file that does not exist, in a directory that does",
            )
        })?;
    out.write_all(bytes)?;
    out.sync_all()?;
    Ok(sync_parent(file)?)
}

/// Writes a file in place of the one that may be there: a reader, and whoever comes after a crash,
/// finds the old bytes or the new ones.
pub fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let tmp = temporary(file);
    let written = (|| {
        write_new(&tmp, bytes)?;
        fs::rename(&tmp, file)?;
        sync_parent(file)
    })();
    written.map_err(|e| {
        // Of no use to anybody. If it is not there, all the better.
        fs::remove_file(&tmp).unwrap_or_default();
        naming(file, &e)
    })
}

/// Writes a file unless there is one. What is there is then what counts.
pub(crate) fn create_or_keep(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let tmp = temporary(file);
    write_new(&tmp, bytes)?;
    // A link, as it fails if somebody was faster.
    let linked = fs::hard_link(&tmp, file);
    fs::remove_file(&tmp)?;
    match linked {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => sync_parent(file),
    }
}

/// Reads a file of at most `limit` bytes. The error does not name it.
pub fn read(file: &Path, limit: u64) -> io::Result<Vec<u8>> {
    read_opened(File::open(file)?, limit)
}

/// Reads an open file of at most `limit` bytes.
pub(crate) fn read_opened(opened: File, limit: u64) -> io::Result<Vec<u8>> {
    let len = opened.metadata()?.len();
    let too_long = |what: &str| {
        let why = format!("it has {what} bytes, and {limit} are the limit");
        io::Error::new(io::ErrorKind::InvalidData, why)
    };
    if len > limit {
        return Err(too_long(&len.to_string()));
    }
    // At once, as growing leaves copies behind; one more byte to see the end.
    let room = usize::try_from(len + 1).map_err(io::Error::other)?;
    let mut bytes = Vec::with_capacity(room);
    opened.take(limit + 1).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|n| n <= limit) {
        Ok(bytes)
    } else {
        Err(too_long("more"))
    }
}

/// The same error, which says of which file.
pub(crate) fn naming(file: &Path, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", file.display()))
}

/// A name beside a file that nobody else uses.
fn temporary(file: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let (pid, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    file.with_extension(format!("tmp-{pid}-{n}"))
}

fn write_new(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut out = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(file)?;
    out.write_all(bytes)?;
    out.sync_all()
}

fn sync_parent(file: &Path) -> io::Result<()> {
    let dir = match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn files_are_private_whole_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        make_dir(&inner).unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&inner), mode(&dir.path().join("a"))), (0o700, 0o700));

        let file = inner.join("f");
        create(&file, b"one").unwrap();
        assert_eq!(create(&file, b"two").unwrap_err().kind, Kind::Config);
        assert_eq!(read(&file, 3).unwrap(), b"one");
        assert!(read(&file, 2).is_err());
        replace(&file, b"three").unwrap();
        create_or_keep(&file, b"four").unwrap();
        assert_eq!(read(&file, 100).unwrap(), b"three");
        assert_eq!(mode(&file), 0o600);
        assert!(read(&inner, 100).is_err());
        assert!(replace(&inner.join("none/f"), b"x").is_err());
        let left: Vec<_> = fs::read_dir(&inner).unwrap().collect();
        assert_eq!(left.len(), 1, "nothing temporary stays: {left:?}");
    }
}
