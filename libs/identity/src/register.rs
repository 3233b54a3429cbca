//! Who was invited and who has joined: one small file for each, which any process of the hub's
//! user may change, and which the running hub follows.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::record::Record;
use crate::{Caller, files};

/// Largest record that is read, bytes.
const LIMIT: u64 = 64 << 10;
/// How long a change waits for another one of the same caller, which takes a write to the disk.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// The register of spokes.
#[derive(Debug)]
pub(crate) struct Register {
    dir: PathBuf,
    seen: RwLock<HashMap<Caller, (Stamp, Arc<Record>)>>,
}

/// A file as it was when it was read. Every change makes a new file and renames it into place.
/// Should the new one get a number that was just given free, and that in the same tick of the
/// clock, then joining and revoking still change the length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    ino: u64,
    len: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stamp {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            ino: meta.ino(),
            len: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl Register {
    pub(crate) fn open(dir: PathBuf) -> io::Result<Self> {
        files::make_dir(&dir)?;
        Ok(Self {
            dir,
            seen: RwLock::default(),
        })
    }

    /// What is known of a caller now, whoever wrote it.
    pub(crate) fn get(&self, caller: &Caller) -> io::Result<Option<Arc<Record>>> {
        let file = self.file(caller);
        match fs::metadata(&file) {
            Ok(meta) => {
                let seen = self.seen.read().unwrap_or_else(PoisonError::into_inner);
                if let Some((stamp, record)) = seen.get(caller)
                    && *stamp == Stamp::of(&meta)
                {
                    return Ok(Some(record.clone()));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(files::naming(&file, &e)),
        }
        let found = self.read(caller)?.map(|(s, r)| (s, Arc::new(r)));
        let record = found.as_ref().map(|(_, record)| record.clone());
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        match found {
            Some(found) => seen.insert(caller.clone(), found),
            None => seen.remove(caller),
        };
        Ok(record)
    }

    /// Changes what is known of a caller, with nobody in between: `change` gets what is there, and
    /// gives an answer and, if something changes, what shall be there. It is on disk before the
    /// answer is given.
    pub(crate) fn change<R, E: From<io::Error>>(
        &self,
        caller: &Caller,
        change: impl FnOnce(Option<Record>) -> Result<(R, Option<Record>), E>,
    ) -> Result<R, E> {
        let _locked = self.lock(caller)?;
        let (answer, new) = change(self.read(caller)?.map(|(_, record)| record))?;
        if let Some(new) = new {
            let text = serde_json::to_vec_pretty(&new).map_err(io::Error::from)?;
            files::replace(&self.file(caller), &text)?;
        }
        Ok(answer)
    }

    /// Everybody, in order.
    pub(crate) fn all(&self) -> io::Result<Vec<Arc<Record>>> {
        let mut callers = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(|e| files::naming(&self.dir, &e))? {
            // Locks and what is half written have other names.
            callers.extend(entry?.file_name().to_str().and_then(caller_of));
        }
        callers.sort();
        let records = callers.iter().filter_map(|c| self.get(c).transpose());
        records.collect()
    }

    fn file(&self, caller: &Caller) -> PathBuf {
        let name = format!("{}.{}.json", caller.instance, caller.service);
        self.dir.join(name)
    }

    fn read(&self, caller: &Caller) -> io::Result<Option<(Stamp, Record)>> {
        let file = self.file(caller);
        let opened = match File::open(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened,
        };
        let read = || {
            let opened = opened?;
            let stamp = Stamp::of(&opened.metadata()?);
            let record: Record = serde_json::from_slice(&files::read_opened(opened, LIMIT)?)?;
            if record.caller != *caller {
                return Err(io::Error::other(format!("it is of {}", record.caller)));
            }
            Ok((stamp, record))
        };
        read().map(Some).map_err(|e| files::naming(&file, &e))
    }

    /// Keeps other threads and processes from this caller's file, until the lock is dropped. It is
    /// beside the file, which is another one after each change.
    fn lock(&self, caller: &Caller) -> io::Result<File> {
        let file = self.file(caller).with_extension("lock");
        let opened = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&file);
        let opened = opened.map_err(|e| files::naming(&file, &e))?;
        let until = Instant::now() + LOCK_LIMIT;
        loop {
            match opened.try_lock() {
                Ok(()) => return Ok(opened),
                Err(fs::TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(LOCK_POLL);
                }
                Err(fs::TryLockError::WouldBlock) => {
                    let e = io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("somebody has it locked for more than {LOCK_LIMIT:?}"),
                    );
                    return Err(files::naming(&file, &e));
                }
                Err(fs::TryLockError::Error(e)) => return Err(files::naming(&file, &e)),
            }
        }
    }
}

fn caller_of(file_name: &str) -> Option<Caller> {
    let (instance, service) = file_name.strip_suffix(".json")?.split_once('.')?;
    Some(Caller {
        service: service.parse().ok()?,
        instance: instance.parse().ok()?,
    })
}

/// Where the register is, in an authority's directory.
pub(crate) fn within(dir: &Path) -> PathBuf {
    dir.join("spokes")
}
