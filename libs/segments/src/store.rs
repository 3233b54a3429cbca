use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::hash::Hasher as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError as Busy};
use std::time::Duration;

use siphasher::sip::SipHasher13;

use crate::manifest::Manifest;
use crate::page::Raw;
use crate::segment::Segment;
use crate::sort::Sorter;
use crate::write::{Writer, key_sum};
use crate::{Record, SegmentsError, disk, merge, place, unplace};

/// Bytes of records that an ingest keeps in memory: 2,097,152 records.
const RUN: usize = 32 << 20;
/// Bytes of a record while it is sorted: key and place.
const SORTED: usize = 16;
/// With so many segments an ingest waits for a merge that is under way.
const MANY: usize = 64;

/// A store of segments. Clones share it. Calls block for the disk.
#[derive(Debug, Clone)]
pub struct Segments {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// Held as long as the store is open.
    _lock: File,
    key: [u8; 16],
    /// With the key, before any input.
    hasher: SipHasher13,
    state: RwLock<Arc<State>>,
    /// Taken by whoever changes what is committed.
    commit: Mutex<()>,
    /// Taken by whoever merges.
    merging: Mutex<()>,
    /// Never given twice by one process, whatever becomes of the file.
    next_id: AtomicU64,
    reads: AtomicU64,
    run: usize,
}

/// What is committed.
#[derive(Debug, Clone, Default)]
struct State {
    segments: Vec<Arc<Segment>>,
    tombstones: BTreeSet<u32>,
}

impl State {
    fn has(&self, piece: u32) -> bool {
        self.segments.iter().any(|s| s.pieces.contains_key(&piece))
    }

    /// Drops the tombstones that stand for nothing any more.
    fn forget(&mut self) {
        let gone = std::mem::take(&mut self.tombstones);
        self.tombstones = gone.into_iter().filter(|p| self.has(*p)).collect();
    }

    /// Records of each segment, and how many of them are of pieces that are gone.
    fn sizes(&self) -> Vec<(u64, u64)> {
        let gone = |s: &Segment| {
            let of = |p: &u32| s.pieces.get(p).copied().unwrap_or(0);
            self.tombstones.iter().map(of).sum()
        };
        self.segments.iter().map(|s| (s.records, gone(s))).collect()
    }
}

/// How large a store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Segments.
    pub segments: u64,
    /// Records of pieces that are there.
    pub records: u64,
    /// Records of pieces that are gone; merges drop them.
    pub gone: u64,
    /// Pages of all segments.
    pub pages: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Bytes in memory.
    pub memory: u64,
    /// Pages that lookups have read since the store was opened.
    pub pages_read: u64,
}

/// What [`Segments::verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verified {
    /// Segments that were read whole.
    pub segments: u64,
    /// Records in those that are good.
    pub records: u64,
    /// What is wrong with the others.
    pub damaged: Vec<String>,
}

impl Segments {
    /// Opens the store in a folder, or makes a new one.
    pub fn open(dir: &Path) -> Result<Self, SegmentsError> {
        Self::open_with(dir, RUN)
    }

    /// Opens it with another limit for the records that an ingest keeps in memory.
    pub(crate) fn open_with(dir: &Path, run: usize) -> Result<Self, SegmentsError> {
        fs::create_dir_all(dir).map_err(SegmentsError::io(dir))?;
        let path = dir.join("LOCK");
        let lock = File::create(&path).map_err(SegmentsError::io(&path))?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => SegmentsError::Locked { dir: dir.into() },
            TryLockError::Error(e) => SegmentsError::io(&path)(e),
        })?;
        let path = dir.join("MANIFEST");
        let manifest = match Manifest::read(&path)? {
            Some(manifest) => manifest,
            None if files(dir)?.iter().any(|n| id(n).is_some()) => {
                return Err(SegmentsError::corrupt(
                    &path,
                    "it is gone, segments are there",
                ));
            }
            None => {
                let manifest = Manifest {
                    key: rand::random(),
                    next_id: 1,
                    segments: Vec::new(),
                    tombstones: BTreeSet::new(),
                };
                manifest.write(&path)?;
                manifest
            }
        };
        let mut next_id = manifest.next_id;
        for name in files(dir)? {
            let stray = match id(&name) {
                Some(id) => {
                    next_id = next_id.max(id.saturating_add(1));
                    !manifest.segments.contains(&id)
                }
                None => name == "MANIFEST.new",
            };
            if stray {
                disk::remove(&dir.join(name))?;
            }
        }
        let sum = key_sum(&manifest.key);
        let open = |id: &u64| Segment::open(*id, &file(dir, *id), sum).map(Arc::new);
        let segments: Result<_, _> = manifest.segments.iter().map(open).collect();
        let state = State {
            segments: segments?,
            tombstones: manifest.tombstones,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                dir: dir.into(),
                _lock: lock,
                key: manifest.key,
                hasher: SipHasher13::new_with_key(&manifest.key),
                state: RwLock::new(Arc::new(state)),
                commit: Mutex::default(),
                merging: Mutex::default(),
                next_id: AtomicU64::new(next_id),
                reads: AtomicU64::new(0),
                run,
            }),
        })
    }

    fn key(&self, multihash: &[u8]) -> u64 {
        let mut hasher = self.inner.hasher;
        hasher.write(multihash);
        hasher.finish()
    }

    fn state(&self) -> Arc<State> {
        let state = self.inner.state.read();
        state.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins a piece. Its number must be one that no piece had before.
    #[must_use]
    pub fn ingest(&self, piece: u32) -> Ingest {
        Ingest {
            store: self.clone(),
            piece,
            sorter: Sorter::new(&self.inner.dir, SORTED, self.inner.run),
        }
    }

    /// Up to `limit` places of pieces that are there where a multihash may be, those of the
    /// oldest segment first. **Candidates**: another multihash may have the same key.
    pub fn find(&self, multihash: &[u8], limit: usize) -> Result<Vec<Record>, SegmentsError> {
        let key = self.key(multihash);
        let state = self.state();
        let mut found = Vec::new();
        for segment in &state.segments {
            if found.len() >= limit {
                break;
            }
            segment.find(key, &self.inner.reads, |raw| {
                if !state.tombstones.contains(&raw.piece) {
                    let (offset, len) = unplace(raw.place);
                    found.push(Record {
                        piece: raw.piece,
                        offset,
                        len,
                    });
                }
                found.len() < limit
            })?;
        }
        Ok(found)
    }

    /// Takes a piece out. False when it is not there.
    pub fn remove(&self, piece: u32) -> Result<bool, SegmentsError> {
        Ok(self.remove_all([piece])? == 1)
    }

    /// Takes pieces out, all or none of them. Returns how many were there.
    pub fn remove_all(&self, pieces: impl IntoIterator<Item = u32>) -> Result<u64, SegmentsError> {
        let _turn = self.turn();
        let mut state = State::clone(&self.state());
        let before = state.tombstones.len();
        for piece in pieces {
            if state.has(piece) {
                state.tombstones.insert(piece);
            }
        }
        let removed = state.tombstones.len() - before;
        if removed > 0 {
            self.commit(state)?;
        }
        Ok(removed as u64)
    }

    /// The highest number of a piece that has records here, removed or not.
    #[must_use]
    pub fn last_piece(&self) -> Option<u32> {
        let state = self.state();
        let last = |s: &Arc<Segment>| s.pieces.keys().next_back().copied();
        state.segments.iter().filter_map(last).max()
    }

    /// The pieces that are there, with their number of records. A piece without records is not.
    #[must_use]
    pub fn pieces(&self) -> BTreeMap<u32, u64> {
        let state = self.state();
        let mut all = BTreeMap::new();
        for (piece, records) in state.segments.iter().flat_map(|s| &s.pieces) {
            if !state.tombstones.contains(piece) {
                *all.entry(*piece).or_default() += records;
            }
        }
        all
    }

    /// How large it is.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let state = self.state();
        let mut stats = Stats {
            pages_read: self.inner.reads.load(Ordering::Relaxed),
            ..Stats::default()
        };
        for (segment, (records, gone)) in state.segments.iter().zip(state.sizes()) {
            stats.segments += 1;
            stats.records += records.saturating_sub(gone);
            stats.gone += gone;
            stats.pages += segment.pages();
            stats.bytes += segment.size();
            stats.memory += segment.memory();
        }
        stats
    }

    /// Reads everything and checks it.
    pub fn verify(&self) -> Result<Verified, SegmentsError> {
        let mut out = Verified::default();
        for segment in &self.state().segments {
            match segment.verify() {
                Ok(()) => out.records += segment.records,
                Err(e @ SegmentsError::Corrupt { .. }) => out.damaged.push(e.to_string()),
                Err(e) => return Err(e),
            }
            out.segments += 1;
        }
        Ok(out)
    }

    /// Merges what is due. Returns at once while another thread does that, unless there are many
    /// segments.
    pub fn maintain(&self) -> Result<(), SegmentsError> {
        let _alone = match self.inner.merging.try_lock() {
            Ok(alone) => alone,
            Err(Busy::WouldBlock) if self.state().segments.len() < MANY => return Ok(()),
            Err(_) => lock(&self.inner.merging),
        };
        loop {
            let state = self.state();
            let due = merge::due(&state.sizes());
            if due.is_empty() {
                return Ok(());
            }
            self.merge(&state, &due)?;
        }
    }

    /// Merges everything into one segment, where a lookup reads one page, if nothing changed for
    /// `quiet` and if that pays. Returns at once while another thread merges. Fails before it begins
    /// unless the disk has room for twice as much as is there.
    pub fn settle(&self, quiet: Duration) -> Result<(), SegmentsError> {
        if let Err(Busy::WouldBlock) = self.inner.merging.try_lock() {
            return Ok(());
        }
        let state = self.state();
        let Some(largest) = state.segments.iter().max_by_key(|s| s.records) else {
            return Ok(());
        };
        let pays = age(&self.inner.dir.join("MANIFEST"))? >= quiet
            && merge::at_rest(&state.sizes(), age(&largest.path)?);
        if !pays {
            return Ok(());
        }
        let needed: u64 = state.segments.iter().map(|s| s.size()).sum();
        if disk::free(&self.inner.dir)? < needed.saturating_mul(2) {
            let path = self.inner.dir.clone();
            return Err(SegmentsError::DiskFull { path });
        }
        self.compact()
    }

    /// Merges everything into one segment.
    pub(crate) fn compact(&self) -> Result<(), SegmentsError> {
        let _alone = lock(&self.inner.merging);
        let state = self.state();
        let all: Vec<usize> = (0..state.segments.len().min(merge::MOST)).collect();
        if all.len() > 1 || !state.tombstones.is_empty() {
            self.merge(&state, &all)?;
        }
        Ok(())
    }

    /// Puts the merge of some segments in their place. The caller holds `merging`.
    fn merge(&self, before: &State, chosen: &[usize]) -> Result<(), SegmentsError> {
        let inputs: Vec<&Segment> = chosen.iter().map(|n| &*before.segments[*n]).collect();
        self.fresh(|id, path| self.replace(before, chosen, &inputs, id, path))?;
        for input in inputs {
            // A lookup may still read it; what stays behind is removed at the next start.
            if let Err(error) = disk::remove(&input.path) {
                tracing::warn!(%error, "a merged segment stays");
            }
        }
        Ok(())
    }

    /// Writes the merge of `inputs` as segment `id`, and commits it in their place.
    fn replace(
        &self,
        before: &State,
        chosen: &[usize],
        inputs: &[&Segment],
        id: u64,
        path: &Path,
    ) -> Result<(), SegmentsError> {
        let sum = key_sum(&self.inner.key);
        let pieces = merge::pieces(inputs, &before.tombstones);
        let output = if pieces.is_empty() {
            None
        } else {
            merge::merge(inputs, &pieces, path, sum)?;
            Some(Arc::new(Segment::open(id, path, sum)?))
        };
        let _turn = self.turn();
        let mut state = State::clone(&self.state());
        // The output stands where the oldest of its inputs stood.
        let at = chosen.iter().copied().min().unwrap_or(0);
        let used = |s: &Arc<Segment>| inputs.iter().any(|i| i.id == s.id);
        state.segments.splice(at..at, output);
        state.segments.retain(|s| !used(s));
        state.forget();
        self.commit(state)
    }

    /// Gives a new segment its id and its file. When `write` fails and did not commit it, the file
    /// goes: on a full disk each try would leave one.
    fn fresh<T>(
        &self,
        write: impl FnOnce(u64, &Path) -> Result<T, SegmentsError>,
    ) -> Result<T, SegmentsError> {
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let path = file(&self.inner.dir, id);
        let done = write(id, &path);
        if done.is_err() && !self.may_be_committed(id) {
            match disk::remove(&path) {
                Err(SegmentsError::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(%error, "a segment that failed stays"),
                Ok(()) => {}
            }
        }
        done
    }

    /// Whether the manifest on disk names a segment. A commit can fail after its rename.
    fn may_be_committed(&self, id: u64) -> bool {
        match Manifest::read(&self.inner.dir.join("MANIFEST")) {
            Ok(manifest) => manifest.is_some_and(|m| m.segments.contains(&id)),
            Err(_) => true,
        }
    }

    /// What is in use.
    #[cfg(test)]
    pub(crate) fn segment_ids(&self) -> Vec<u64> {
        self.state().segments.iter().map(|s| s.id).collect()
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.inner.commit)
    }

    /// Commits a state. The caller has the turn, and its segments are on the disk.
    fn commit(&self, state: State) -> Result<(), SegmentsError> {
        let path = self.inner.dir.join("MANIFEST");
        // The names of new segments first.
        disk::sync_parent(&path)?;
        let manifest = Manifest {
            key: self.inner.key,
            next_id: self.inner.next_id.load(Ordering::Relaxed),
            segments: state.segments.iter().map(|s| s.id).collect(),
            tombstones: state.tombstones.clone(),
        };
        manifest.write(&path)?;
        let shown = self.inner.state.write();
        *shown.unwrap_or_else(PoisonError::into_inner) = Arc::new(state);
        Ok(())
    }
}

/// A piece that is taken in. Dropped before its end it leaves nothing.
#[derive(Debug)]
pub struct Ingest {
    store: Segments,
    piece: u32,
    sorter: Sorter,
}

impl Ingest {
    /// Adds a block.
    pub fn push(&mut self, multihash: &[u8], offset: u64, len: u32) -> Result<(), SegmentsError> {
        let place = place(offset, len).ok_or(SegmentsError::OutOfRange { offset, len })?;
        let mut record = [0; SORTED];
        record[..8].copy_from_slice(&self.store.key(multihash).to_be_bytes());
        record[8..].copy_from_slice(&place.to_be_bytes());
        self.sorter.push(&record)
    }

    /// Makes the piece part of the store, all of it. Returns how many records it has.
    pub fn finish(self) -> Result<u64, SegmentsError> {
        let store = self.store.clone();
        store.fresh(|id, path| self.write(id, path))
    }

    fn write(self, id: u64, path: &Path) -> Result<u64, SegmentsError> {
        let Self {
            store,
            piece,
            sorter,
        } = self;
        let mut sorted = sorter.finish()?;
        let sum = key_sum(&store.inner.key);
        if sorted.is_empty() {
            return Ok(0);
        }
        let mut out = Writer::create(path, sum)?;
        let mut records = 0;
        while let Some(record) = sorted.next()? {
            let number =
                |at: usize| u64::from_be_bytes(record[at..at + 8].try_into().expect("eight bytes"));
            out.push(&Raw {
                key: number(0),
                piece,
                place: number(8),
            })?;
            records += 1;
        }
        out.finish(&BTreeMap::from([(piece, records)]))?;
        let segment = Arc::new(Segment::open(id, path, sum)?);
        let _turn = store.turn();
        let mut state = State::clone(&store.state());
        if state.has(piece) {
            return Err(SegmentsError::Known { piece });
        }
        state.segments.push(segment);
        store.commit(state)?;
        Ok(records)
    }
}

fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long ago a file was written. Zero when the clock was set back since.
fn age(path: &Path) -> Result<Duration, SegmentsError> {
    let written = fs::metadata(path).and_then(|m| m.modified());
    Ok(written
        .map_err(SegmentsError::io(path))?
        .elapsed()
        .unwrap_or_default())
}

fn file(dir: &Path, id: u64) -> PathBuf {
    dir.join(format!("{id:016x}.seg"))
}

/// The id of a segment, from its file's name.
fn id(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg").filter(|d| d.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

fn files(dir: &Path) -> Result<Vec<String>, SegmentsError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(SegmentsError::io(dir))? {
        let entry = entry.map_err(SegmentsError::io(dir))?;
        names.extend(entry.file_name().into_string().ok());
    }
    Ok(names)
}
