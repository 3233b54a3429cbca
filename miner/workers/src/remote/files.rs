//! The hub's side of a remote worker's files: what it may read and write, and how what it brings
//! replaces what is there.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hub_proto::worker::v1::{FileEntry, TaskRef};
use lotus_types::{Generation, Kind};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::copy::{Hash, Receiving, is_plain, send};
use super::identity::WorkerName;
use crate::Task;
use crate::pool::lock;
use crate::slots::{Shape, Slot};

/// Files of one directory. A cache has a few dozen.
const FILES_LIMIT: usize = 256;
/// Checksums that are kept. Each sector in flight has a few dozen files.
const HASHES_LIMIT: usize = 100_000;

/// A file's place in a task: slot, and name in the slot's directory.
type Place = (String, String);

/// A file as it was when its checksum was taken. Moving it leaves all of this as it is; writing
/// to it does not.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Stamp {
    dev: u64,
    ino: u64,
    len: u64,
    mtime: (i64, i64),
}

impl Stamp {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            dev: meta.dev(),
            ino: meta.ino(),
            len: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
        }
    }
}

/// The files of every task that a worker on another host has.
pub(crate) struct Files {
    generation: Generation,
    next: AtomicU64,
    lent: Mutex<HashMap<u64, Arc<Lent>>>,
    /// Checksums of files that went over the wire, in either direction.
    hashes: Mutex<HashMap<Stamp, Hash>>,
}

/// The files of one task in the hands of one worker.
pub(crate) struct Lent {
    worker: WorkerName,
    task_id: String,
    slots: Vec<Slot>,
    /// Name of this attempt's directory in the slots' staging directories.
    dir: String,
    /// Cancelled when the worker has lost the task.
    gone: CancellationToken,
    staged: Mutex<Staged>,
}

#[derive(Default)]
struct Staged {
    /// The task is over: nothing is taken any more.
    closed: bool,
    files: BTreeMap<Place, (u64, Option<Hash>)>,
}

/// Why what a worker brought was not put in its place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotPlaced {
    #[error("{0}")]
    Wrong(String),
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl NotPlaced {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            // The worker has to do it again; nothing is known about the sector.
            Self::Wrong(_) => Kind::Transport,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Kind::Capacity
            }
            Self::Io { .. } => Kind::Fatal,
        }
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> NotPlaced {
    let path = path.to_owned();
    move |source| NotPlaced::Io { path, source }
}

impl Files {
    pub(crate) fn new(generation: Generation) -> Self {
        Self {
            generation,
            next: AtomicU64::new(1),
            lent: Mutex::default(),
            hashes: Mutex::default(),
        }
    }

    /// Lends a task's files to a worker. Returns the number of the attempt.
    pub(crate) fn lend(&self, worker: &WorkerName, task_id: &str, task: &Task) -> u64 {
        let attempt = self.next.fetch_add(1, Ordering::Relaxed);
        let lent = Lent {
            worker: worker.clone(),
            task_id: task_id.into(),
            slots: task.slots(),
            dir: format!("remote-{}-{attempt}", self.generation),
            gone: CancellationToken::new(),
            staged: Mutex::default(),
        };
        lock(&self.lent).insert(attempt, Arc::new(lent));
        attempt
    }

    /// The files of a task, for the worker that has it now.
    pub(crate) fn of(
        &self,
        worker: &WorkerName,
        task: Option<&TaskRef>,
    ) -> Result<Arc<Lent>, Status> {
        let task = task.ok_or_else(|| Status::invalid_argument("no task is named"))?;
        let lent = lock(&self.lent).get(&task.attempt).cloned();
        lent.filter(|l| {
            task.generation == self.generation.0 && l.worker == *worker && l.task_id == task.task_id
        })
        .ok_or_else(stale)
    }

    /// Ends an attempt without a result. Blocks while its result is being put in place. What the
    /// worker sent is deleted.
    pub(crate) fn close(&self, attempt: u64) {
        let Some(lent) = lock(&self.lent).remove(&attempt) else {
            return;
        };
        lent.gone.cancel();
        lock(&lent.staged).closed = true;
        lent.clean();
    }

    /// Puts what a worker made in its place. Blocking, for as long as some renames take.
    pub(crate) fn place(&self, attempt: u64, made: &[FileEntry]) -> Result<(), NotPlaced> {
        let lent = lock(&self.lent).remove(&attempt);
        let lent = lent.ok_or_else(|| NotPlaced::Wrong("the task is not this worker's".into()))?;
        lent.gone.cancel();
        let mut staged = lock(&lent.staged);
        if std::mem::replace(&mut staged.closed, true) {
            return Err(NotPlaced::Wrong("the task is over".into()));
        }
        let done = self.place_all(&lent, &staged.files, made);
        drop(staged);
        lent.clean();
        done
    }

    fn place_all(
        &self,
        lent: &Lent,
        staged: &BTreeMap<Place, (u64, Option<Hash>)>,
        made: &[FileEntry],
    ) -> Result<(), NotPlaced> {
        let mut come = 0;
        let mut named: BTreeMap<&str, usize> = BTreeMap::new();
        for entry in made {
            let wrong =
                |why: &str| NotPlaced::Wrong(format!("{}/{} {why}", entry.slot, entry.name));
            let slot = lent
                .slot(&entry.slot, &entry.name)
                .map_err(NotPlaced::Wrong)?;
            *named.entry(slot.name).or_default() += 1;
            let place = (entry.slot.clone(), entry.name.clone());
            let hash =
                <Hash>::try_from(&entry.hash[..]).map_err(|_| wrong("came without a checksum"))?;
            if staged.get(&place) == Some(&(entry.len, Some(hash))) {
                come += 1;
            } else if !slot.reads || !self.is_still(&lent.file(slot, &entry.name), entry.len, hash)
            {
                return Err(wrong("did not arrive as the worker says"));
            }
        }
        let unnamed = |s: &&Slot| s.staging.is_some() && !named.contains_key(s.name);
        if let Some(slot) = lent.slots.iter().find(unnamed) {
            return Err(NotPlaced::Wrong(format!(
                "the worker made no {}",
                slot.name
            )));
        }
        if come != staged.len() {
            return Err(NotPlaced::Wrong(format!(
                "{} files arrived and the worker names {come}",
                staged.len()
            )));
        }
        for slot in &lent.slots {
            let Some(from) = lent.staged(slot) else {
                continue;
            };
            let files: Vec<&String> = staged
                .keys()
                .filter(|(s, _)| s == slot.name)
                .map(|(_, name)| name)
                .collect();
            if !files.is_empty() {
                put(slot, &from, &files)?;
            }
        }
        for ((slot, name), (_, hash)) in staged {
            if let (Ok(slot), Some(hash)) = (lent.slot(slot, name), hash) {
                self.remember(&lent.file(slot, name), *hash);
            }
        }
        Ok(())
    }

    /// Whether a file is the one that had this checksum.
    fn is_still(&self, file: &Path, len: u64, hash: Hash) -> bool {
        let known = fs::symlink_metadata(file).ok().and_then(|m| self.known(&m));
        known == Some((len, hash))
    }

    fn known(&self, meta: &fs::Metadata) -> Option<(u64, Hash)> {
        let hash = lock(&self.hashes).get(&Stamp::of(meta)).copied()?;
        Some((meta.len(), hash))
    }

    fn remember(&self, file: &Path, hash: Hash) {
        if let Ok(meta) = fs::symlink_metadata(file) {
            self.remember_as(&meta, hash);
        }
    }

    fn remember_as(&self, meta: &fs::Metadata, hash: Hash) {
        let mut hashes = lock(&self.hashes);
        if hashes.len() >= HASHES_LIMIT {
            // They only save transfers.
            hashes.clear();
        }
        hashes.insert(Stamp::of(meta), hash);
    }

    /// What the task reads. Blocking.
    pub(crate) fn inputs(&self, lent: &Lent) -> Result<Vec<FileEntry>, Status> {
        let mut all = Vec::new();
        for slot in lent.slots.iter().filter(|s| s.reads) {
            let entry = |name: String, meta: &fs::Metadata| FileEntry {
                slot: slot.name.into(),
                name,
                len: meta.len(),
                hash: self.known(meta).map_or_else(Vec::new, |(_, h)| h.to_vec()),
            };
            match slot.shape {
                Shape::File => {
                    let meta = fs::symlink_metadata(&slot.path).map_err(|e| missing(slot, &e))?;
                    if !meta.is_file() {
                        return Err(Status::data_loss(format!("{} is no file", slot.name)));
                    }
                    all.push(entry(String::new(), &meta));
                }
                Shape::Dir => {
                    let mut names = Vec::new();
                    for found in fs::read_dir(&slot.path).map_err(|e| missing(slot, &e))? {
                        let found = found.map_err(|e| missing(slot, &e))?;
                        let name = found.file_name().into_string().unwrap_or_default();
                        let meta = found.metadata().map_err(|e| missing(slot, &e))?;
                        if !meta.is_file() || !is_plain(&name) || names.len() >= FILES_LIMIT {
                            return Err(Status::data_loss(format!(
                                "{} has more in it than a cache has: {name:?}",
                                slot.name
                            )));
                        }
                        names.push(entry(name, &meta));
                    }
                    names.sort_by(|a, b| a.name.cmp(&b.name));
                    all.append(&mut names);
                }
            }
        }
        Ok(all)
    }
}

fn stale() -> Status {
    Status::failed_precondition("this task is not this worker's, or not any more")
}

fn missing(slot: &Slot, e: &io::Error) -> Status {
    Status::data_loss(format!("{}: {e}", slot.name))
}

/// Moves what arrived for one slot to its place.
fn put(slot: &Slot, from: &Path, names: &[&String]) -> Result<(), NotPlaced> {
    match slot.shape {
        Shape::File => fs::rename(from, &slot.path).map_err(at(&slot.path))?,
        Shape::Dir if slot.reads => {
            for name in names {
                let to = slot.path.join(name);
                fs::rename(from.join(name), &to).map_err(at(&to))?;
            }
            sync_dir(&slot.path)?;
        }
        Shape::Dir => {
            // What a lost worker of this host may have left of its try.
            match fs::remove_dir_all(&slot.path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(&slot.path)(e)),
                _ => {}
            }
            sync_dir(from)?;
            fs::rename(from, &slot.path).map_err(at(&slot.path))?;
        }
    }
    slot.path.parent().map_or(Ok(()), sync_dir)
}

fn sync_dir(dir: &Path) -> Result<(), NotPlaced> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(at(dir))
}

impl Lent {
    /// The slot of a file that the task has, or may have.
    fn slot(&self, slot: &str, name: &str) -> Result<&Slot, String> {
        let found = self.slots.iter().find(|s| s.name == slot);
        let found = found.ok_or_else(|| format!("the task has no {slot:?}"))?;
        let fine = match found.shape {
            Shape::File => name.is_empty(),
            Shape::Dir => is_plain(name),
        };
        if fine {
            Ok(found)
        } else {
            Err(format!("{name:?} is no name of a file in {slot}"))
        }
    }

    /// Where a file is on the hub.
    fn file(&self, slot: &Slot, name: &str) -> PathBuf {
        match slot.shape {
            Shape::File => slot.path.clone(),
            Shape::Dir => slot.path.join(name),
        }
    }

    /// Where what is sent for a slot is collected.
    fn staged(&self, slot: &Slot) -> Option<PathBuf> {
        Some(slot.staging.as_ref()?.join(&self.dir).join(slot.name))
    }

    fn clean(&self) {
        for dir in self.slots.iter().filter_map(|s| s.staging.as_ref()) {
            let dir = dir.join(&self.dir);
            match fs::remove_dir_all(&dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(dir = %dir.display(), error = %e, "left over from a worker");
                }
                _ => {}
            }
        }
    }

    /// Opens a file that the task reads.
    pub(crate) async fn open(&self, slot: &str, name: &str) -> Result<tokio::fs::File, Status> {
        let slot = self.slot(slot, name).map_err(Status::invalid_argument)?;
        if !slot.reads {
            return Err(Status::permission_denied("the task does not read this"));
        }
        let file = tokio::fs::File::open(self.file(slot, name)).await;
        file.map_err(|e| missing(slot, &e))
    }

    /// Room for a file that the worker sends. A second one of the same place replaces the first.
    pub(crate) fn begin(
        self: &Arc<Self>,
        slot: &str,
        name: &str,
        len: u64,
    ) -> Result<Arriving, Status> {
        let found = self.slot(slot, name).map_err(Status::invalid_argument)?;
        let to = self
            .staged(found)
            .ok_or_else(|| Status::permission_denied("the task does not write this"))?;
        let place = (slot.to_owned(), name.to_owned());
        let mut staged = lock(&self.staged);
        if staged.closed {
            return Err(stale());
        }
        let others = staged
            .files
            .iter()
            .filter(|(p, _)| p.0 == slot && **p != place);
        let (mut count, mut bytes) = (0, 0_u64);
        for (_, (len, _)) in others {
            count += 1;
            bytes = bytes.saturating_add(*len);
        }
        if count >= FILES_LIMIT || bytes.saturating_add(len) > found.limit {
            return Err(Status::resource_exhausted(format!(
                "{slot} holds at most {} bytes in {FILES_LIMIT} files",
                found.limit
            )));
        }
        let path = match found.shape {
            Shape::File => to,
            Shape::Dir => to.join(name),
        };
        // Under the lock, so that nothing is made anew after the attempt was cleaned.
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|e| disk(&e))?;
        }
        // A file of its own: whoever else still writes to this place writes to another.
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(disk(&e)),
            _ => {}
        }
        let file = File::create_new(&path).map_err(|e| disk(&e))?;
        let ino = file.metadata().map_err(|e| disk(&e))?.ino();
        staged.files.insert(place.clone(), (len, None));
        drop(staged);
        Ok(Arriving {
            lent: self.clone(),
            place,
            path,
            ino,
            receiving: Receiving::new(file.into(), len),
        })
    }

    /// Resolves when the worker has lost the task.
    pub(crate) async fn gone(&self) {
        self.gone.cancelled().await;
    }
}

fn disk(e: &io::Error) -> Status {
    match e.kind() {
        io::ErrorKind::StorageFull => Status::resource_exhausted("the hub's disk is full"),
        _ => Status::internal(format!("the hub can not store this: {e}")),
    }
}

/// A file on its way from a worker.
pub(crate) struct Arriving {
    lent: Arc<Lent>,
    place: Place,
    path: PathBuf,
    ino: u64,
    receiving: Receiving,
}

impl Arriving {
    pub(crate) async fn take(&mut self, bytes: &[u8]) -> Result<(), Status> {
        self.receiving.take(bytes).await.map_err(|e| disk(&e))
    }

    /// The file is complete if it has this checksum.
    pub(crate) async fn end(self, hash: &[u8]) -> Result<(), Status> {
        let len = self.receiving.len();
        let hash = self.receiving.end(hash).await.map_err(|e| match e.kind() {
            io::ErrorKind::InvalidData => Status::data_loss(e.to_string()),
            _ => disk(&e),
        })?;
        let mut staged = lock(&self.lent.staged);
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.ino);
        if staged.closed || !ours {
            return Err(stale());
        }
        staged.files.insert(self.place, (len, Some(hash)));
        Ok(())
    }
}

/// Sends a file and remembers its checksum if it did not change meanwhile.
pub(crate) async fn send_file(
    files: &Files,
    lent: &Lent,
    file: tokio::fs::File,
    offset: u64,
    to: mpsc::Sender<Result<hub_proto::worker::v1::ReadChunk, Status>>,
) {
    let sent = async {
        let before = file.metadata().await?;
        let (file, hash) = send(file, offset, &to).await?;
        let after = file.metadata().await?;
        if Stamp::of(&before) == Stamp::of(&after) {
            files.remember_as(&after, hash);
        }
        Ok::<_, io::Error>(())
    };
    tokio::select! {
        () = lent.gone() => {
            // Nobody reads it when the stream is gone as well.
            to.send(Err(stale())).await.unwrap_or_default();
        }
        sent = sent => if let Err(e) = sent
            && e.kind() != io::ErrorKind::BrokenPipe
        {
            to.send(Err(Status::data_loss(e.to_string()))).await.unwrap_or_default();
        }
    }
}
