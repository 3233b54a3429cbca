//! What a path says of itself. A disk can hang instead of failing, so every look has a deadline.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use lotus_types::SectorId;

use super::files::tree_bytes;
use super::meta::{FileType, FileTypes, META_FILE, PathId, PathMeta, sector_of};

/// The file that is written and read back to see whether a path takes files.
const PROBE: &str = ".lotus-hub-probe";
/// How long sectors may be measured before the rest is estimated.
const MEASURE: Duration = Duration::from_secs(20);

/// The file system below a path, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Space {
    pub(super) capacity: u64,
    pub(super) available: u64,
}

/// State of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PathHealth {
    /// All is well.
    Good,
    /// It can be read, and takes no new files.
    NoNew(String),
    /// It does not answer in time.
    Silent(String),
    /// It is not there.
    Gone(String),
}

impl PathHealth {
    pub(super) fn trouble(&self) -> Option<&str> {
        match self {
            Self::Good => None,
            Self::NoNew(why) | Self::Silent(why) | Self::Gone(why) => Some(why),
        }
    }
}

/// What a look at a path found.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) meta: PathMeta,
    pub(super) space: Space,
    pub(super) health: PathHealth,
}

/// Looks at a path: whether it is there, and whether it takes files.
pub(super) fn look(dir: &Path, id: &PathId, read_only: bool) -> Result<Seen, String> {
    let meta = PathMeta::read(dir).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            format!(
                "there is no {META_FILE} in {}: is it mounted?",
                dir.display()
            )
        }
        _ => format!("{}: {e}", dir.join(META_FILE).display()),
    })?;
    if meta.id != *id {
        return Err(format!("{} is now storage path {}", dir.display(), meta.id));
    }
    let space = space(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let health = if read_only {
        PathHealth::Good
    } else {
        match probe(dir) {
            Ok(()) => PathHealth::Good,
            Err(e) => PathHealth::NoNew(format!("writing to {}: {e}", dir.display())),
        }
    };
    Ok(Seen {
        meta,
        space,
        health,
    })
}

pub(super) fn space(dir: &Path) -> io::Result<Space> {
    let s = nix::sys::statvfs::statvfs(dir)?;
    Ok(Space {
        capacity: s.blocks().saturating_mul(s.fragment_size()),
        available: s.blocks_available().saturating_mul(s.fragment_size()),
    })
}

/// Writes a small file, syncs it, reads it back.
fn probe(dir: &Path) -> io::Result<()> {
    let path = dir.join(PROBE);
    let text = format!("lotus-hub {}\n", std::process::id());
    let mut file = fs::File::create(&path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    let back = fs::read(&path)?;
    fs::remove_file(&path)?;
    if back == text.as_bytes() {
        Ok(())
    } else {
        Err(io::Error::other("what is read is not what was written"))
    }
}

/// The files of sectors that lie in a path.
pub(super) fn scan(dir: &Path) -> io::Result<BTreeMap<SectorId, FileTypes>> {
    let mut found: BTreeMap<SectorId, FileTypes> = BTreeMap::new();
    for file in FileType::ALL {
        let entries = match fs::read_dir(dir.join(file.name())) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let name = entry?.file_name();
            if let Some(sector) = name.to_str().and_then(sector_of) {
                found.entry(sector).or_default().insert(file);
            }
        }
    }
    Ok(found)
}

/// Bytes that sectors take in a path, each for itself. A path with very many is measured for a
/// while, and the rest estimated at the mean.
pub(super) fn measure(dir: &Path, sectors: &[(SectorId, FileTypes)]) -> BTreeMap<SectorId, u64> {
    let end = Instant::now() + MEASURE;
    let mut sizes = BTreeMap::new();
    let (mut total, mut count) = (0u64, 0u64);
    for (sector, files) in sectors {
        let bytes = if Instant::now() < end {
            let bytes = bytes_of(dir, *sector, *files);
            (total, count) = (total.saturating_add(bytes), count + 1);
            bytes
        } else {
            total / count.max(1)
        };
        sizes.insert(*sector, bytes);
    }
    sizes
}

/// Bytes that files of a sector take in a path. What can not be read counts nothing: the next
/// look tells.
pub(super) fn bytes_of(dir: &Path, sector: SectorId, files: FileTypes) -> u64 {
    let of = |file: FileType| {
        let path = dir.join(file.name()).join(sector.to_string());
        tree_bytes(&path).unwrap_or_default()
    };
    files.iter().map(of).sum()
}

/// A call on a thread of its own, so that it can be given up. One that hangs keeps its thread
/// until the kernel lets it go.
pub(super) struct Call<R>(mpsc::Receiver<R>, PathBuf);

impl<R: Send + 'static> Call<R> {
    /// Begins the call. `dir` is what it is about.
    pub(super) fn begin(dir: &Path, f: impl FnOnce() -> R + Send + 'static) -> io::Result<Self> {
        let (send, receive) = mpsc::sync_channel(1);
        let run = move || {
            // Nobody listens any more after the deadline.
            drop(send.send(f()));
        };
        std::thread::Builder::new()
            .name("storage-path".into())
            .spawn(run)?;
        Ok(Self(receive, dir.to_owned()))
    }

    /// Its result, or that the deadline has passed.
    pub(super) fn until(self, end: Instant) -> Result<R, String> {
        let wait = end.saturating_duration_since(Instant::now());
        self.0.recv_timeout(wait).map_err(|e| match e {
            mpsc::RecvTimeoutError::Timeout => {
                format!("{} does not answer", self.1.display())
            }
            mpsc::RecvTimeoutError::Disconnected => {
                format!("looking at {} panicked; see the log", self.1.display())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_told_from_an_empty_mount_point_and_from_another_path() {
        let dir = tempfile::tempdir().unwrap();
        let id = PathId::generate();
        let e = look(dir.path(), &id, false).unwrap_err();
        assert!(e.contains("is it mounted?"), "{e}");
        PathMeta::new(id.clone()).write(dir.path()).unwrap();
        let seen = look(dir.path(), &id, false).unwrap();
        assert_eq!(seen.health, PathHealth::Good);
        assert!(seen.space.available > 0 && seen.space.capacity >= seen.space.available);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no probe is left"
        );
        let e = look(dir.path(), &PathId::generate(), false).unwrap_err();
        assert!(e.contains(id.as_str()), "{e}");
    }

    #[test]
    fn a_path_that_can_not_be_written_takes_no_new_files() {
        let dir = tempfile::tempdir().unwrap();
        let id = PathId::generate();
        PathMeta::new(id.clone()).write(dir.path()).unwrap();
        // Also root can not write a file where a folder is.
        fs::create_dir(dir.path().join(PROBE)).unwrap();
        let seen = look(dir.path(), &id, false).unwrap();
        assert!(matches!(seen.health, PathHealth::NoNew(_)), "{seen:?}");
        let seen = look(dir.path(), &id, true).unwrap();
        assert_eq!(seen.health, PathHealth::Good, "nothing is written to it");
    }

    #[test]
    fn a_call_that_hangs_is_given_up() {
        let (release, held) = mpsc::channel::<()>();
        let dir = Path::new("/mnt/dead");
        let call = Call::begin(dir, move || held.recv().is_ok()).unwrap();
        let said = call.until(Instant::now() + Duration::from_millis(20));
        assert_eq!(said, Err("/mnt/dead does not answer".into()));
        drop(release);
        let call = Call::begin(dir, || 7).unwrap();
        assert_eq!(call.until(Instant::now() + Duration::from_secs(60)), Ok(7));
    }

    #[test]
    fn what_lies_in_a_path_is_found_and_measured() {
        let dir = tempfile::tempdir().unwrap();
        assert!(scan(dir.path()).unwrap().is_empty());
        for name in ["sealed/s-t01000-7", "cache/s-t01000-7/p_aux", "sealed/junk"] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![1; 10_000]).unwrap();
        }
        let found = scan(dir.path()).unwrap();
        let all: Vec<_> = found.into_iter().collect();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].1, FileTypes::REPLICA);
        let sizes = measure(dir.path(), &all);
        assert!(sizes[&all[0].0] >= 20_000, "{sizes:?}");
    }
}
