//! The log as one thread writes it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::disk::{self, Faults};
use crate::line::{FORMAT, Header, Line, Sealed as _, clip};
use crate::scan::{self, Lines, Tail};
use crate::{AuditConfig, AuditError, Call, Hash, Head, Record, Recovered};

/// How long the process that had the log may need until its last file is closed.
pub(crate) const DYING: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// In which state a log was found.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Opened {
    /// The part of a line that was cut.
    pub recovered: Option<Recovered>,
    /// Whole lines at the end that are not sound. They are still there; [`crate::verify()`] names them.
    pub unsound: u64,
}

/// A call with the time at which it was appended.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    time_unix_ms: u64,
    call: Call,
    recovered: Option<Recovered>,
}

impl Entry {
    pub(crate) fn new(time_unix_ms: u64, call: &Call) -> Self {
        let call = Call {
            who: clip(&call.who),
            from: clip(&call.from),
            method: clip(&call.method),
            key: clip(&call.key),
            outcome: clip(&call.outcome),
            generation: call.generation,
        };
        Self {
            time_unix_ms,
            call,
            recovered: None,
        }
    }

    fn recovered(time_unix_ms: u64, recovered: Recovered) -> Self {
        let call = Call {
            who: "audit".into(),
            method: "recovered".into(),
            outcome: "ok".into(),
            ..Call::default()
        };
        Self {
            recovered: Some(recovered),
            ..Self::new(time_unix_ms, &call)
        }
    }

    fn record(&self, seq: u64, prev: Hash) -> Record {
        let call = self.call.clone();
        Record {
            seq,
            time_unix_ms: self.time_unix_ms,
            who: call.who,
            from: call.from,
            method: call.method,
            key: call.key,
            outcome: call.outcome,
            generation: call.generation,
            recovered: self.recovered.clone(),
            prev,
            hash: Hash::default(),
        }
    }
}

/// Where the chain continues.
#[derive(Clone, Copy, Debug)]
struct End {
    /// Number of the next record.
    next: u64,
    /// Hash of the last line.
    prev: Hash,
    head: Head,
}

#[derive(Debug)]
pub(crate) struct Log {
    dir: PathBuf,
    max_file_bytes: u64,
    keep_files: u64,
    faults: Faults,
    /// Identity of the log, in every header.
    id: String,
    number: u64,
    path: PathBuf,
    file: File,
    /// Bytes of the file that are synced.
    len: u64,
    /// Whether the file has anything but its header.
    filled: bool,
    /// Number of the oldest file that is kept.
    oldest: u64,
    end: End,
    /// Whether more than `len` bytes may be in the file.
    dirty: bool,
    /// The file that is to be begun before anything is appended.
    begin: Option<u64>,
    _lock: File,
}

impl Log {
    pub(crate) fn open(
        dir: &Path,
        config: &AuditConfig,
        faults: Faults,
        now_unix_ms: u64,
        patience: Duration,
    ) -> Result<(Self, Opened), AuditError> {
        disk::make_dir(dir).map_err(AuditError::io(dir))?;
        let lock = lock(dir, patience)?;
        let numbers = scan::list(dir)?;
        let found = Found::look(dir, &numbers)?;
        let number = numbers.last().copied().unwrap_or(1);
        let path = scan::path(dir, number);
        let torn = if found.len > found.whole {
            Some(torn(dir, number, &found)?)
        } else {
            None
        };
        // Without a whole line it gets a header, like a file that was not there.
        let begin = found.whole == 0;
        let (mut end, mut len) = (found.end, found.whole);
        let file = if begin {
            let header = header(&found.id, number, found.oldest, end, now_unix_ms);
            let (file, header, written) = create(&faults, &path, header)?;
            len = written;
            end.prev = header.hash;
            if end.head.seq == 0 {
                end.head = header.head();
            }
            file
        } else {
            let file = File::options()
                .read(true)
                .append(true)
                .open(&path)
                .map_err(AuditError::io(&path))?;
            // Its last records may be those of a process that died before it synced them.
            faults.sync(&file).map_err(AuditError::io(&path))?;
            file
        };
        let mut log = Self {
            dir: dir.into(),
            max_file_bytes: config.max_file_bytes,
            keep_files: config.keep_files,
            faults,
            id: found.id,
            number,
            path,
            file,
            len,
            filled: found.filled,
            oldest: found.oldest,
            end,
            dirty: torn.is_some() && !begin,
            begin: None,
            _lock: lock,
        };
        if let Some(recovered) = torn.clone() {
            let entry = Entry::recovered(now_unix_ms, recovered);
            log.append(&[entry], &mut Vec::new())?;
        }
        let opened = Opened {
            recovered: torn,
            unsound: found.unsound,
        };
        Ok((log, opened))
    }

    pub(crate) const fn head(&self) -> Head {
        self.end.head
    }

    /// Appends records. When this returns, those whose heads are in `done` are on the disk, and nothing of
    /// the others is in the log.
    pub(crate) fn append(
        &mut self,
        entries: &[Entry],
        done: &mut Vec<Head>,
    ) -> Result<(), AuditError> {
        let appended = self.append_all(entries, done);
        if appended.is_err() && self.clean().is_err() {
            // It is tried again before the next record, which fails if this still does.
            tracing::warn!(file = %self.path.display(), "a failed record can not be cut yet");
        }
        appended
    }

    fn append_all(&mut self, entries: &[Entry], done: &mut Vec<Head>) -> Result<(), AuditError> {
        self.clean()?;
        if self.begin.is_none() && self.replaced() {
            let there = scan::list(&self.dir)?.last().copied();
            self.begin = Some(there.map_or(self.number, |n| n.max(self.number)) + 1);
        }
        if let Some(number) = self.begin {
            let now = entries.first().map_or(0, |e| e.time_unix_ms);
            self.next_file(number, now)?;
        }
        let mut batch = Batch::after(self.end);
        for entry in entries {
            let mut line = batch.line(entry).map_err(AuditError::io(&self.path))?;
            let filled = self.filled || !batch.heads.is_empty();
            let len = self.len + (batch.bytes.len() + line.1.len()) as u64;
            if filled && len > self.max_file_bytes {
                self.commit(&batch, done)?;
                self.next_file(self.number + 1, entry.time_unix_ms)?;
                batch = Batch::after(self.end);
                line = batch.line(entry).map_err(AuditError::io(&self.path))?;
            }
            batch.push(&line);
        }
        self.commit(&batch, done)
    }

    fn commit(&mut self, batch: &Batch, done: &mut Vec<Head>) -> Result<(), AuditError> {
        if batch.heads.is_empty() {
            return Ok(());
        }
        self.dirty = true;
        let written = self.faults.write(&mut self.file, &batch.bytes);
        written
            .and_then(|()| self.faults.sync(&self.file))
            .map_err(AuditError::io(&self.path))?;
        self.dirty = false;
        self.filled = true;
        self.len += batch.bytes.len() as u64;
        self.end = batch.end;
        done.extend(&batch.heads);
        Ok(())
    }

    /// Cuts what an append left that failed.
    fn clean(&mut self) -> Result<(), AuditError> {
        if self.dirty {
            let cut = self.faults.cut(&self.file, self.len);
            cut.map_err(AuditError::io(&self.path))?;
            self.dirty = false;
        }
        Ok(())
    }

    /// Whether the file is not in its place any more: a tool for logs moved it, or somebody removed it.
    fn replaced(&self) -> bool {
        match (fs::metadata(&self.path), self.file.metadata()) {
            (Ok(there), Ok(ours)) => (there.dev(), there.ino()) != (ours.dev(), ours.ino()),
            (Err(e), _) => e.kind() == io::ErrorKind::NotFound,
            (Ok(_), Err(_)) => false,
        }
    }

    /// Begins a file. Until that worked, nothing may be appended to the present one.
    fn next_file(&mut self, number: u64, now_unix_ms: u64) -> Result<(), AuditError> {
        self.begin = Some(number);
        let oldest = match self.keep_files {
            0 => self.oldest,
            keep => self.oldest.max((number + 1).saturating_sub(keep)),
        };
        let header = header(&self.id, number, oldest, self.end, now_unix_ms);
        let path = scan::path(&self.dir, number);
        let (file, header, len) = create(&self.faults, &path, header)?;
        self.begin = None;
        self.number = number;
        self.path = path;
        self.file = file;
        self.len = len;
        self.filled = false;
        self.oldest = oldest;
        self.end.prev = header.hash;
        let head = self.end.head;
        tracing::info!(file = %self.path.display(), %head, "the audit log begins a file");
        if let Err(e) = self.prune() {
            // The next file that is begun tries again.
            tracing::warn!("an old file of the audit log stays: {e}");
        }
        Ok(())
    }

    /// Removes files that are not kept, oldest first.
    fn prune(&self) -> Result<(), AuditError> {
        if self.keep_files == 0 {
            return Ok(());
        }
        for number in scan::list(&self.dir)? {
            if number < self.oldest {
                let path = scan::path(&self.dir, number);
                let removed = self.faults.remove(&path);
                removed.map_err(AuditError::io(&path))?;
            }
        }
        Ok(())
    }
}

fn header(log: &str, file: u64, oldest: u64, end: End, time_unix_ms: u64) -> Header {
    Header {
        log: log.into(),
        format: FORMAT,
        file,
        seq: end.next,
        oldest,
        time_unix_ms,
        prev: end.prev,
        hash: Hash::default(),
    }
}

/// A new file, with its header as it was written and the length of that.
fn create(
    faults: &Faults,
    path: &Path,
    mut header: Header,
) -> Result<(File, Header, u64), AuditError> {
    let line = header.seal().map_err(AuditError::io(path))?;
    let file = faults.create(path, &line).map_err(AuditError::io(path))?;
    Ok((file, header, line.len() as u64))
}

fn lock(dir: &Path, patience: Duration) -> Result<File, AuditError> {
    let path = dir.join("LOCK");
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(AuditError::io(&path))?;
    let end = Instant::now() + patience;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) if Instant::now() < end => {
                std::thread::sleep(LOCK_POLL);
            }
            Err(TryLockError::WouldBlock) => return Err(AuditError::Locked { dir: dir.into() }),
            Err(TryLockError::Error(e)) => return Err(AuditError::io(&path)(e)),
        }
    }
}

/// Records that are written together.
struct Batch {
    bytes: Vec<u8>,
    heads: Vec<Head>,
    end: End,
}

impl Batch {
    const fn after(end: End) -> Self {
        Self {
            bytes: Vec::new(),
            heads: Vec::new(),
            end,
        }
    }

    fn line(&self, entry: &Entry) -> io::Result<(Head, Vec<u8>)> {
        let mut record = entry.record(self.end.next, self.end.prev);
        let line = record.seal()?;
        Ok((record.head(), line))
    }

    fn push(&mut self, (head, line): &(Head, Vec<u8>)) {
        self.bytes.extend_from_slice(line);
        self.heads.push(*head);
        self.end = End {
            next: head.seq.saturating_add(1),
            prev: head.hash,
            head: *head,
        };
    }
}

/// What is in a folder before anything in it changes.
struct Found {
    id: String,
    oldest: u64,
    end: End,
    /// Whole lines at the end that are not sound.
    unsound: u64,
    /// Of the last file: bytes up to its last line feed, all bytes, and whether it has more than a header.
    whole: u64,
    len: u64,
    filled: bool,
}

impl Found {
    fn look(dir: &Path, numbers: &[u64]) -> Result<Self, AuditError> {
        let (mut newest, mut last, mut unsound) = (None, None, 0_u64);
        for number in numbers.iter().rev() {
            let tail = look(dir, *number, |file| scan::tail(&file))?;
            let Some(tail) = tail else { continue };
            unsound += tail.unsound;
            last = tail.last.clone();
            newest.get_or_insert(tail);
            if last.is_some() {
                break;
            }
        }
        let mut header = None;
        for number in numbers.iter().rev() {
            header = look(dir, *number, first_header)?.flatten();
            if header.is_some() {
                break;
            }
        }
        let (next, prev, head) = match last {
            Some(Line::Record(r)) => (r.seq.saturating_add(1), r.hash, r.head()),
            Some(Line::Header(h)) => (h.seq, h.hash, h.head()),
            None => (
                1,
                Hash::default(),
                Head {
                    seq: 0,
                    hash: Hash::default(),
                },
            ),
        };
        let newest = newest.unwrap_or(Tail {
            last: None,
            unsound: 0,
            whole: 0,
            len: 0,
        });
        let only_header = matches!(newest.last, Some(Line::Header(_))) && newest.unsound == 0;
        Ok(Self {
            id: header.as_ref().map_or_else(
                || format!("{:032x}", rand::random::<u128>()),
                |h: &Header| h.log.clone(),
            ),
            oldest: header.map_or_else(
                || numbers.first().copied().unwrap_or(1),
                |h| h.oldest.min(h.file),
            ),
            end: End {
                next: next.saturating_add(unsound),
                prev,
                head,
            },
            unsound,
            whole: newest.whole,
            len: newest.len,
            filled: newest.whole > 0 && !only_header,
        })
    }
}

fn look<T>(
    dir: &Path,
    number: u64,
    f: impl FnOnce(File) -> io::Result<T>,
) -> Result<Option<T>, AuditError> {
    match scan::open(dir, number)? {
        Some(file) => f(file)
            .map(Some)
            .map_err(AuditError::io(&scan::path(dir, number))),
        None => Ok(None),
    }
}

/// What is after the last line feed of a file.
fn torn(dir: &Path, number: u64, found: &Found) -> Result<Recovered, AuditError> {
    let at = found.whole;
    let read = look(dir, number, |file| scan::digest(&file, at))?;
    let (sha256, begins) = read.unwrap_or_default();
    Ok(Recovered {
        file: scan::name(number),
        at,
        bytes: found.len - at,
        sha256,
        begins: hex::encode(begins),
    })
}

/// The header of a file, if it is sound.
fn first_header(file: File) -> io::Result<Option<Header>> {
    let mut lines = Lines::new(file);
    let first = lines.next()?.and_then(|raw| raw.parse().ok());
    Ok(match first {
        Some(Line::Header(header)) => Some(header),
        _ => None,
    })
}
