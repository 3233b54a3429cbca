//! Where the files of sectors are.
//!
//! A hub has one or more paths: folders, each with `sectorstore.json` in its root and a folder for
//! each kind of file, as in Lotus:
//!
//! - `sealed/s-t01000-7`: the replica; `cache/s-t01000-7/`: its trees.
//! - `update/s-t01000-7` and `update-cache/s-t01000-7/`: the same of an upgraded sector. Once no
//!   proof can ask for the first replica any more, only these are kept.
//! - `scratch/s-t01000-7/`: what only sealing needs: `unsealed` (Fr32-padded data), `attempt-*`
//!   (output of a step that is not finished). Work goes into an attempt and is renamed into place
//!   when it is done, so that a file in its place is complete. PreCommit2 alone encodes the
//!   replica where it is; it leaves a mark first and starts over from the data tree when it finds
//!   one.
//! - `incoming/s-t01000-7/`: a copy on its way here.
//!
//! A sector is worked on in the path that its scratch folder is in, and goes to a path that keeps
//! sectors when it is sealed. Where a file is, is known because it was put there or found there;
//! the journal keeps it for when a path is not mounted. What is not used any more is first
//! written down as such and then deleted, after a while if somebody may still be reading it.

mod attach;
mod error;
mod files;
mod health;
mod index;
mod meta;
mod moves;
mod place;
mod state;
mod watch;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use lotus_journal::{Journal, JournalError};
use lotus_proofs::replica_commitment;
use lotus_types::{Commitment, SectorId, SectorSize};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};

use crate::shared::{lock, unix_ms};
use files::put_in_place;
use meta::META_FILE;
use place::{Purpose, Want};
use state::{Change, DECLARED, HOME, MOVES, Moving, OLD, PATHS, State, StoragePath, sector};

pub use attach::{HeldView, NewMeta, NewPath, PathView};
pub use error::StorageError;
pub(crate) use files::sync_tree;
pub use meta::{FileType, FileTypes, PathId, PathMeta};
pub use moves::MoveView;
pub use place::Refusal;

/// Disk space that sealing one sector takes, in sectors: replica, data, trees and labels. Eleven
/// layers of labels at 32 GiB; the small sizes have two.
const SPACE_PER_SECTOR: u64 = 16;
/// Copies at the same time: more make a disk seek.
const COPIES: usize = 2;
/// The folder in a scratch folder in which a sector is unsealed.
const UNSEAL: &str = "unseal";
/// Replicas of which it is remembered whether they are of an upgrade.
const MAX_KINDS: usize = 100_000;
/// Paths that a hub may have.
const MAX_PATHS: usize = 256;

/// `[storage]` in the hub's config.toml.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorageConfig {
    /// Seconds between two looks at each storage path.
    pub check_secs: u64,
    /// Seconds that a storage path may take to answer. One that takes longer gets no new files.
    pub check_limit_secs: u64,
    /// Seconds that the old files of a moved sector are kept: longer than any proof that may still
    /// read them.
    pub keep_moved_secs: u64,
}

impl Default for StorageConfig {
    fn default() -> Self {
        Self {
            check_secs: 30,
            check_limit_secs: 10,
            // A WindowPoSt deadline is open for 60 epochs of 30 s, and challenged 20 before.
            keep_moved_secs: 3_600,
        }
    }
}

/// What comes into its place.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    /// The data of a sector, in its scratch folder.
    Unsealed,
    /// A file that is kept.
    File(FileType),
}

/// Where the files of sectors are. Clones share one state. Calls that return a [`Result`] block.
#[derive(Clone, Debug)]
pub struct Storage(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    journal: Journal,
    cfg: StorageConfig,
    /// Bytes that sealing one sector takes.
    need: u64,
    home: PathId,
    home_dir: PathBuf,
    state: Mutex<State>,
    /// Held while files come to their place or are deleted, and while that is written down.
    writing: Mutex<()>,
    /// There is a move to begin.
    wake: Notify,
    /// Copies that may be made at the same time.
    copies: Semaphore,
    /// Replicas of sectors that have two, and whether they are of an upgrade. That never changes.
    kinds: Mutex<HashMap<(SectorId, Commitment), bool>>,
}

impl Storage {
    /// Opens the attached paths and the repo's own, `home`, which is made when it is new. A path
    /// that is not there is told in the log, and is looked for again.
    pub fn open(
        journal: Journal,
        home: &Path,
        size: SectorSize,
        cfg: StorageConfig,
    ) -> Result<Self, StorageError> {
        let home_dir = std::path::absolute(home).map_err(StorageError::io(home))?;
        let mut state = State::default();
        let known = load(&journal, &mut state)?;
        let home = open_home(&journal, &home_dir, known, &state)?;
        let own = StoragePath::new(home_dir.clone(), false);
        state.paths.insert(home.clone(), own);
        let storage = Self(Arc::new(Inner {
            journal,
            cfg,
            need: size.bytes().saturating_mul(SPACE_PER_SECTOR),
            home,
            home_dir,
            state: Mutex::new(state),
            writing: Mutex::default(),
            wake: Notify::new(),
            copies: Semaphore::new(COPIES),
            kinds: Mutex::default(),
        }));
        storage.redeclare(None)?;
        storage.clear_unseals();
        storage.clear_incoming();
        Ok(storage)
    }

    /// The replica of a sector.
    #[must_use]
    pub fn sealed(&self, sector: SectorId) -> PathBuf {
        self.location(sector, FileType::Sealed)
    }

    /// The cache directory of a sector.
    #[must_use]
    pub fn cache(&self, sector: SectorId) -> PathBuf {
        self.location(sector, FileType::Cache)
    }

    /// The upgraded replica of a sector.
    #[must_use]
    pub fn updated(&self, sector: SectorId) -> PathBuf {
        self.location(sector, FileType::Update)
    }

    /// The cache directory of the upgraded replica.
    #[must_use]
    pub fn updated_cache(&self, sector: SectorId) -> PathBuf {
        self.location(sector, FileType::UpdateCache)
    }

    /// The folder of a sector for what only sealing, or an unsealing, needs.
    #[must_use]
    pub fn scratch(&self, sector: SectorId) -> PathBuf {
        self.location(sector, FileType::Scratch)
    }

    /// The data of a sector, Fr32-padded.
    pub(crate) fn unsealed(&self, sector: SectorId) -> PathBuf {
        self.scratch(sector).join("unsealed")
    }

    /// Where a file is. One that is nowhere would come to where the sector is worked on; for want
    /// of that the repo's own path is named, so that its absence is told by a file name.
    fn location(&self, sector: SectorId, file: FileType) -> PathBuf {
        let state = lock(&self.0.state);
        let at = state
            .locate(sector, file)
            .or_else(|| state.locate(sector, FileType::Scratch));
        let dir = at.and_then(|id| state.paths.get(id)).map(|p| &p.dir);
        place_in(dir.unwrap_or(&self.0.home_dir), file, sector)
    }

    /// An error when files of the sector are in a path that is not there. Memory alone is asked.
    pub(crate) fn check(&self, sector: SectorId) -> Result<(), StorageError> {
        lock(&self.0.state).check(sector)
    }

    /// How many sectors could begin to be sealed, by the disks.
    #[must_use]
    pub fn sealable(&self) -> u64 {
        lock(&self.0.state).sealable(self.0.need)
    }

    /// Makes a folder to unseal in, in the path that takes it.
    pub fn begin_unseal(&self, sector: SectorId) -> Result<PathBuf, StorageError> {
        let dir = self.scratch_of(sector)?.join(UNSEAL);
        fs::create_dir_all(&dir).map_err(StorageError::io(&dir))?;
        Ok(dir)
    }

    /// Deletes the folder of an unsealing, and the scratch folder when nothing else is in it.
    pub fn end_unseal(&self, sector: SectorId) -> Result<(), StorageError> {
        let Some(path) = lock(&self.0.state)
            .locate(sector, FileType::Scratch)
            .cloned()
        else {
            return Ok(());
        };
        let scratch = self.scratch(sector);
        let dir = scratch.join(UNSEAL);
        files::remove(&dir).map_err(StorageError::io(&dir))?;
        let _one_at_a_time = lock(&self.0.writing);
        match fs::remove_dir(&scratch) {
            // The sector is upgraded meanwhile.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => return Ok(()),
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(StorageError::io(&scratch)(e));
            }
            Ok(()) | Err(_) => {}
        }
        let gone = Change::Forget(path.clone(), sector, FileType::Scratch.into());
        self.apply([gone])?;
        lock(&self.0.state).sizes.remove(&(path, sector));
        Ok(())
    }

    /// Deletes what unsealings left that a crash ended: they begin anew.
    fn clear_unseals(&self) {
        let all: Vec<SectorId> = {
            let state = lock(&self.0.state);
            let there = state.paths.iter().filter(|(_, p)| p.erasable());
            let held = there.flat_map(|(id, _)| state.index.on(id));
            held.filter(|(_, files)| files.has(FileType::Scratch))
                .map(|(sector, _)| sector)
                .collect()
        };
        for sector in all {
            if self.scratch(sector).join(UNSEAL).exists()
                && let Err(e) = self.end_unseal(sector)
            {
                tracing::warn!(%sector, error = %e, "what an unsealing left is not deleted");
            }
        }
    }

    fn scratch_of(&self, sector: SectorId) -> Result<PathBuf, StorageError> {
        let _one_at_a_time = lock(&self.0.writing);
        let (path, dir) = {
            let state = lock(&self.0.state);
            state.check(sector)?;
            let path = match state.locate(sector, FileType::Scratch) {
                Some(path) => path.clone(),
                None => {
                    let want = Want {
                        sector,
                        files: FileType::Scratch.into(),
                        purpose: Purpose::Seal,
                        bytes: self.0.need,
                        from: None,
                    };
                    state.place(&want, self.0.need)?
                }
            };
            let dir = place_in(&state.get(&path)?.dir, FileType::Scratch, sector);
            (path, dir)
        };
        fs::create_dir_all(&dir).map_err(StorageError::io(&dir))?;
        self.apply([Change::Declare(path, sector, FileType::Scratch.into())])?;
        Ok(dir)
    }

    /// An empty folder for one try of a step, with a name of its own: a worker that is not heard
    /// any more may still write to an earlier one. Those of earlier tries are deleted.
    pub(crate) fn attempt(&self, sector: SectorId, step: &str) -> Result<PathBuf, StorageError> {
        let scratch = self.scratch_of(sector)?;
        let io = |e: io::Error| StorageError::io(&scratch)(e);
        for entry in fs::read_dir(&scratch).map_err(io)? {
            let entry = entry.map_err(io)?;
            if entry.file_name().to_string_lossy().starts_with("attempt-") {
                fs::remove_dir_all(entry.path()).map_err(io)?;
            }
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (pid, n) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = scratch.join(format!("attempt-{step}-{pid}-{n}"));
        fs::create_dir(&dir).map_err(StorageError::io(&dir))?;
        Ok(dir)
    }

    /// Moves what an attempt has made to its place, in the path that the attempt is in. What
    /// another path has of it is given up: it is of an earlier try. A replica that commits to one
    /// of `kept` is not replaced: the chain asks for it.
    pub(crate) fn put(
        &self,
        sector: SectorId,
        part: Part,
        from: &Path,
        kept: &[Commitment],
    ) -> Result<(), StorageError> {
        let Part::File(file) = part else {
            let to = self.unsealed(sector);
            return put_in_place(from, &to).map_err(StorageError::io(&to));
        };
        let _one_at_a_time = lock(&self.0.writing);
        self.refuse_kept(sector, file, kept)?;
        let (path, dir) = {
            let state = lock(&self.0.state);
            state.check(sector)?;
            let path = state.locate(sector, FileType::Scratch).cloned();
            let path = path.ok_or(StorageError::Changed(sector))?;
            let dir = state.get(&path)?.dir.clone();
            (path, dir)
        };
        let to = place_in(&dir, file, sector);
        put_in_place(from, &to).map_err(StorageError::io(&to))?;
        let mut changes = self.retired(sector, file.into(), Some(&path), 0);
        changes.push(Change::Declare(path, sector, file.into()));
        self.apply(changes)?;
        // The file is in its place. What is in the way elsewhere is deleted later, if not now.
        if let Err(e) = self.erase_now(sector) {
            tracing::warn!(%sector, error = %e, "old files are not deleted yet");
        }
        Ok(())
    }

    /// An error when a file belongs to a replica that is kept. The last guard: steps ask the chain
    /// before they begin.
    fn refuse_kept(
        &self,
        sector: SectorId,
        file: FileType,
        kept: &[Commitment],
    ) -> Result<(), StorageError> {
        let cache = match file {
            FileType::Update | FileType::UpdateCache => self.updated_cache(sector),
            _ => self.cache(sector),
        };
        if kept.is_empty() {
            return Ok(());
        }
        let why = match replica_commitment(&cache) {
            Ok(None) => return Ok(()),
            Ok(Some(comm_r)) if !kept.contains(&comm_r) => return Ok(()),
            Ok(Some(comm_r)) => format!("the chain has replica {}", comm_r.sealed_cid()),
            Err(e) => format!("the chain has a replica, and that here can not be read: {e}"),
        };
        Err(StorageError::refused(
            format!("files of {sector} are not replaced: {why}"),
            "see `lotus-miner sectors status --log`; if the hub was restored from a backup, stop it \
             and keep a copy of the sector's files",
        ))
    }

    /// Whether the replica that commits to `comm_r` is that of an upgrade. The files say it where
    /// there are both; `hint` is what the journal says.
    pub(crate) fn is_update(&self, sector: SectorId, comm_r: &Commitment, hint: bool) -> bool {
        {
            let state = lock(&self.0.state);
            let has = |file| state.locate(sector, file).is_some();
            match (has(FileType::Sealed), has(FileType::Update)) {
                (_, false) => return false,
                (false, true) => return true,
                (true, true) => {}
            }
        }
        let key = (sector, *comm_r);
        if let Some(known) = lock(&self.0.kinds).get(&key) {
            return *known;
        }
        let of = |cache: PathBuf| replica_commitment(&cache).ok().flatten() == Some(*comm_r);
        let order = if hint { [true, false] } else { [false, true] };
        let found = order.into_iter().find(|update| {
            of(if *update {
                self.updated_cache(sector)
            } else {
                self.cache(sector)
            })
        });
        // Neither can be read, or the replica is not here.
        let Some(found) = found else { return hint };
        let mut kinds = lock(&self.0.kinds);
        if kinds.len() >= MAX_KINDS {
            kinds.clear();
        }
        kinds.insert(key, found);
        found
    }

    /// Deletes what only sealing needed.
    pub(crate) fn clean(&self, sector: SectorId) -> Result<(), StorageError> {
        self.discard(sector, FileType::Scratch.into())
    }

    /// Deletes the first replica of an upgraded sector.
    pub(crate) fn release_key(&self, sector: SectorId) -> Result<(), StorageError> {
        self.discard(sector, FileTypes::REPLICA)
    }

    /// Deletes what an upgrade has made.
    pub(crate) fn abort_update(&self, sector: SectorId) -> Result<(), StorageError> {
        self.discard(sector, FileTypes::UPDATE.or(FileType::Scratch.into()))
    }

    /// Deletes all files of a sector.
    pub(crate) fn delete(&self, sector: SectorId) -> Result<(), StorageError> {
        self.discard(sector, FileTypes::EVERY)
    }

    /// Deletes files of a sector wherever they are. Those in a path that is not there now are
    /// deleted when it comes back.
    fn discard(&self, sector: SectorId, files: FileTypes) -> Result<(), StorageError> {
        let _one_at_a_time = lock(&self.0.writing);
        self.apply(self.retired(sector, files, None, 0))?;
        self.erase_now(sector)
    }

    /// The changes by which every path but one gives up files of a sector, those included that it
    /// would delete later.
    fn retired(
        &self,
        sector: SectorId,
        files: FileTypes,
        except: Option<&PathId>,
        until: u64,
    ) -> Vec<Change> {
        let state = lock(&self.0.state);
        let held = state.index.of(sector).iter();
        let held = held.map(|h| (h.path.clone(), h.files.and(files)));
        let old = state.old.keys().filter(|(_, s, _)| *s == sector);
        let old = old.map(|(path, _, file)| (path.clone(), files.and((*file).into())));
        held.chain(old)
            .filter(|(path, files)| Some(path) != except && !files.is_empty())
            .map(|(path, files)| Change::Retire(path, sector, files, until))
            .collect()
    }

    /// Makes changes, in memory and in the journal.
    fn apply(&self, changes: impl IntoIterator<Item = Change>) -> Result<(), StorageError> {
        let now = unix_ms();
        let writes: Vec<_> = {
            let mut state = lock(&self.0.state);
            let each = changes.into_iter();
            each.flat_map(|change| state.apply(change, now)).collect()
        };
        if writes.is_empty() {
            return Ok(());
        }
        let save = |tx: &mut lotus_journal::Tx| {
            writes.iter().try_for_each(|w| w.save(tx))?;
            Ok::<_, JournalError>(())
        };
        Ok(self.0.journal.write(save)?)
    }
}

/// Where a file of a sector belongs in a path.
fn place_in(dir: &Path, file: FileType, sector: SectorId) -> PathBuf {
    dir.join(file.name()).join(sector.to_string())
}

/// Reads the journal into memory. Returns the id of the repo's own path, if it has one.
fn load(journal: &Journal, state: &mut State) -> Result<Option<PathId>, StorageError> {
    journal.read(|v| {
        for (id, path) in v.scan(&PATHS, None, MAX_PATHS)? {
            if let Ok(id) = id.parse() {
                state
                    .paths
                    .insert(id, StoragePath::new(path.dir, path.read_only));
            }
        }
        for (((path, miner), number), held) in v.scan(&DECLARED, None, usize::MAX)? {
            if let Ok(path) = path.parse() {
                let sector = sector(miner, number);
                state.index.declare(&path, sector, held.files, held.since);
            }
        }
        for ((((path, miner), number), bit), until) in v.scan(&OLD, None, usize::MAX)? {
            let file = FileType::ALL
                .into_iter()
                .find(|f| u64::from(f.bit()) == bit);
            if let (Ok(path), Some(file)) = (path.parse(), file) {
                state.old.insert((path, sector(miner, number), file), until);
            }
        }
        for ((miner, number), to) in v.scan(&MOVES, None, usize::MAX)? {
            state.moves.insert(sector(miner, number), Moving::new(to));
        }
        Ok(v.get(&HOME, &0)?)
    })
}

/// The id of the repo's own path, which is made when the repo is new. One that had sectors and
/// has no `sectorstore.json` is not made again: its disk is not mounted.
fn open_home(
    journal: &Journal,
    dir: &Path,
    known: Option<PathId>,
    state: &State,
) -> Result<PathId, StorageError> {
    let io = |e| StorageError::io(&dir.join(META_FILE))(e);
    let found = match PathMeta::read(dir) {
        Ok(meta) => Some(meta.id),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(io(e)),
    };
    let id = match (found, known.clone()) {
        (Some(found), Some(known)) if state.paths.contains_key(&found) => {
            tracing::error!(path = %found, dir = %dir.display(), "the repo's own storage path has \
                 the id of another path");
            known
        }
        (Some(found), _) => found,
        (None, Some(known)) if !state.index.on(&known).is_empty() => known,
        (None, known) => {
            let id = known.unwrap_or_else(PathId::generate);
            fs::create_dir_all(dir).map_err(StorageError::io(dir))?;
            PathMeta::new(id.clone()).write(dir).map_err(io)?;
            id
        }
    };
    if known.as_ref() != Some(&id) {
        journal.write(|tx| tx.put(&HOME, &0, &id))?;
    }
    Ok(id)
}

#[cfg(test)]
mod tests;
