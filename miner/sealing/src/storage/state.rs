//! What is known in memory, and what of it the journal keeps.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use lotus_journal::{JournalError, Map, Tx};
use lotus_types::{ActorId, SectorId, SectorNumber};
use serde::{Deserialize, Serialize};

use super::StorageError;
use super::health::{PathHealth, Space};
use super::index::Index;
use super::meta::{FileType, FileTypes, PathId, PathMeta};
use super::place::{Candidate, Refusal, Want, place, refusal, room};

/// The id of the repo's own path, under key 0.
pub(super) const HOME: Map<u64, PathId> = Map::new("storage.home");
/// The other attached paths, by id.
pub(super) const PATHS: Map<String, PathRecord> = Map::new("storage.paths");
/// Which sectors lie where. The disks know it better and are asked at every start; this names the
/// sectors of a path that is not there.
pub(super) const DECLARED: Map<Key, DeclaredRecord> = Map::new("storage.declared");
/// Files that were replaced, moved away or given up, by path, sector and [`FileType::bit`]: Unix
/// milliseconds from which they may be deleted; 0: nobody wants them any more, and they are deleted
/// as soon as their path is there. Else they were moved, and there is a copy.
pub(super) const OLD: Map<(Key, u64), u64> = Map::new("storage.old");
/// Moves that the operator has ordered, by miner and number.
pub(super) const MOVES: Map<(u64, u64), PathId> = Map::new("storage.moves");

/// Path, miner, number.
pub(super) type Key = ((String, u64), u64);

pub(super) fn key(path: &PathId, sector: SectorId) -> Key {
    ((path.as_str().to_owned(), sector.miner.0), sector.number.0)
}

pub(super) const fn sector(miner: u64, number: u64) -> SectorId {
    SectorId {
        miner: ActorId(miner),
        number: SectorNumber(number),
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PathRecord {
    pub(super) dir: PathBuf,
    pub(super) read_only: bool,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct DeclaredRecord {
    pub(super) files: FileTypes,
    pub(super) since: u64,
}

/// An attached path.
#[derive(Clone, Debug)]
pub(super) struct StoragePath {
    pub(super) dir: PathBuf,
    pub(super) read_only: bool,
    /// Unknown until it was there once.
    pub(super) meta: Option<PathMeta>,
    pub(super) health: PathHealth,
    pub(super) space: Space,
    /// A look at it has not returned yet.
    pub(super) looking: bool,
}

impl StoragePath {
    pub(super) fn new(dir: PathBuf, read_only: bool) -> Self {
        Self {
            dir,
            read_only,
            meta: None,
            health: PathHealth::Gone("it was not looked at yet".into()),
            space: Space::default(),
            looking: false,
        }
    }

    pub(super) const fn reachable(&self) -> bool {
        !matches!(self.health, PathHealth::Gone(_))
    }

    /// Whether files in it may be deleted now: also on a full disk, which needs it most.
    pub(super) const fn erasable(&self) -> bool {
        matches!(self.health, PathHealth::Good | PathHealth::NoNew(_)) && !self.read_only
    }
}

/// A sector on its way to another path.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) to: PathId,
    pub(super) total: AtomicU64,
    pub(super) done: AtomicU64,
    /// Why the last try failed, and when.
    pub(super) failed: Mutex<Option<(String, Instant)>>,
}

impl Moving {
    pub(super) fn new(to: PathId) -> Arc<Self> {
        Arc::new(Self {
            to,
            total: AtomicU64::default(),
            done: AtomicU64::default(),
            failed: Mutex::default(),
        })
    }
}

/// A file that was given up, and whose time has come.
#[derive(Debug)]
pub(super) struct Due {
    pub(super) path: PathId,
    pub(super) dir: PathBuf,
    pub(super) file: FileType,
    /// It was moved, and there is no other.
    pub(super) only: bool,
}

/// A change of what is known.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// Files are in their place.
    Declare(PathId, SectorId, FileTypes),
    /// Files are not where they were.
    Forget(PathId, SectorId, FileTypes),
    /// Files are not used any more, and deleted from this time on, Unix milliseconds.
    Retire(PathId, SectorId, FileTypes, u64),
    /// Files that were not used any more are deleted.
    Erased(PathId, SectorId, FileTypes),
    /// A move is ordered.
    Order(SectorId, PathId),
    /// A move is done, or given up.
    Moved(SectorId),
}

/// What the journal is told of it.
#[derive(Debug)]
pub(super) enum Write {
    Declared(Key, Option<DeclaredRecord>),
    Old((Key, u64), Option<u64>),
    Move((u64, u64), Option<PathId>),
}

impl Write {
    pub(super) fn save(&self, tx: &mut Tx) -> Result<(), JournalError> {
        match self {
            Self::Declared(key, value) => save(tx, &DECLARED, key, value.as_ref()),
            Self::Old(key, value) => save(tx, &OLD, key, value.as_ref()),
            Self::Move(key, value) => save(tx, &MOVES, key, value.as_ref()),
        }
    }
}

fn save<K: lotus_journal::JournalKey, V: Serialize + serde::de::DeserializeOwned>(
    tx: &mut Tx,
    map: &Map<K, V>,
    key: &K,
    value: Option<&V>,
) -> Result<(), JournalError> {
    match value {
        Some(value) => tx.put(map, key, value),
        None => tx.remove(map, key).map(drop),
    }
}

/// Everything in memory.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) paths: BTreeMap<PathId, StoragePath>,
    pub(super) index: Index,
    /// As [`OLD`].
    pub(super) old: BTreeMap<(PathId, SectorId, FileType), u64>,
    /// Bytes that sectors take: of those being sealed, and of all in a path with a limit.
    pub(super) sizes: BTreeMap<(PathId, SectorId), u64>,
    /// Ordered by the operator.
    pub(super) moves: BTreeMap<SectorId, Arc<Moving>>,
    /// Sealed sectors on their way to where they are kept.
    pub(super) keeping: BTreeMap<SectorId, Arc<Moving>>,
}

impl State {
    /// Makes a change. Returns what the journal must know of it.
    pub(super) fn apply(&mut self, change: Change, now: u64) -> Vec<Write> {
        match change {
            Change::Declare(path, sector, files) => {
                let held = self.index.declare(&path, sector, files, now);
                let record = DeclaredRecord {
                    files: held.files,
                    since: held.since,
                };
                let mut writes = vec![Write::Declared(key(&path, sector), Some(record))];
                // What is there now is not what was given up.
                writes.extend(self.not_old(&path, sector, files));
                writes
            }
            Change::Forget(path, sector, files) => vec![self.undeclare(&path, sector, files)],
            Change::Retire(path, sector, files, until) => {
                let mut writes = vec![self.undeclare(&path, sector, files)];
                for file in files.iter() {
                    self.old.insert((path.clone(), sector, file), until);
                    let key = (key(&path, sector), u64::from(file.bit()));
                    writes.push(Write::Old(key, Some(until)));
                }
                writes
            }
            Change::Erased(path, sector, files) => {
                if !self.index.of(sector).iter().any(|h| h.path == path) {
                    self.sizes.remove(&(path.clone(), sector));
                }
                self.not_old(&path, sector, files)
            }
            Change::Order(sector, to) => {
                self.moves.insert(sector, Moving::new(to.clone()));
                vec![Write::Move((sector.miner.0, sector.number.0), Some(to))]
            }
            Change::Moved(sector) => {
                self.moves.remove(&sector);
                vec![Write::Move((sector.miner.0, sector.number.0), None)]
            }
        }
    }

    fn not_old(&mut self, path: &PathId, sector: SectorId, files: FileTypes) -> Vec<Write> {
        let mut writes = Vec::new();
        for file in files.iter() {
            if self.old.remove(&(path.clone(), sector, file)).is_some() {
                let key = (key(path, sector), u64::from(file.bit()));
                writes.push(Write::Old(key, None));
            }
        }
        writes
    }

    /// What may be deleted of a sector. Files that were moved are kept as long as the copy can not
    /// be reached; without a copy, after its path was detached or the journal restored, they are
    /// the only ones.
    pub(super) fn due(&self, sector: SectorId, now: u64) -> Vec<Due> {
        let own = self.old.iter();
        let own = own.filter(|((_, s, _), until)| *s == sector && **until <= now);
        let due = own.filter_map(|((path, _, file), until)| {
            let known = self.paths.get(path).filter(|p| p.erasable())?;
            let copy = self.locate(sector, *file);
            if *until > 0 && copy.is_some_and(|p| !self.reachable(p)) {
                return None;
            }
            Some(Due {
                path: path.clone(),
                dir: known.dir.clone(),
                file: *file,
                only: *until > 0 && copy.is_none(),
            })
        });
        due.collect()
    }

    /// Files that a path has and does not use any more.
    pub(super) fn old_in(&self, path: &PathId, sector: SectorId) -> FileTypes {
        let mut files = FileTypes::default();
        for file in FileTypes::EVERY.iter() {
            if self.old.contains_key(&(path.clone(), sector, file)) {
                files.insert(file);
            }
        }
        files
    }

    fn undeclare(&mut self, path: &PathId, sector: SectorId, files: FileTypes) -> Write {
        let left = self.index.drop(path, sector, files);
        let record = left.map(|h| DeclaredRecord {
            files: h.files,
            since: h.since,
        });
        Write::Declared(key(path, sector), record)
    }

    /// Whether sectors are kept in a path.
    pub(super) fn keeps(&self, path: &PathId) -> bool {
        let meta = self.paths.get(path).and_then(|p| p.meta.as_ref());
        meta.is_some_and(|m| m.can_store)
    }

    pub(super) fn reachable(&self, path: &PathId) -> bool {
        self.paths.get(path).is_some_and(StoragePath::reachable)
    }

    /// The path with a file.
    pub(super) fn locate(&self, sector: SectorId, file: FileType) -> Option<&PathId> {
        self.index.locate(sector, file, |p| self.reachable(p))
    }

    pub(super) fn get(&self, path: &PathId) -> Result<&StoragePath, StorageError> {
        let found = self.paths.get(path);
        found.ok_or_else(|| StorageError::NoPath(path.clone()))
    }

    /// An error when a file of the sector is in a path that is not there.
    pub(super) fn check(&self, sector: SectorId) -> Result<(), StorageError> {
        for file in FileTypes::EVERY.iter() {
            let Some(at) = self.locate(sector, file) else {
                continue;
            };
            if let PathHealth::Gone(why) = &self.get(at)?.health {
                return Err(StorageError::Gone {
                    sector,
                    path: at.clone(),
                    why: why.clone(),
                });
            }
        }
        Ok(())
    }

    /// Bytes that are promised in a path: `need` for each sector that is worked on, less what it
    /// has taken, and what comes with moves.
    pub(super) fn promised(&self, path: &PathId, need: u64) -> u64 {
        let taken = |s: SectorId| self.sizes.get(&(path.clone(), s)).copied().unwrap_or(0);
        let worked = self.index.on(path).into_iter();
        let worked = worked.filter(|(_, files)| files.has(FileType::Scratch));
        let sealing: u64 = worked.map(|(s, _)| need.saturating_sub(taken(s))).sum();
        let coming = self.moves.values().chain(self.keeping.values());
        let coming = coming.filter(|m| m.to == *path);
        let coming: u64 = coming.map(|m| m.total.load(Ordering::Relaxed)).sum();
        sealing.saturating_add(coming)
    }

    /// Bytes that sectors take in a path, as far as they are counted.
    pub(super) fn used(&self, path: &PathId) -> u64 {
        let own = self.sizes.iter().filter(|((p, _), _)| p == path);
        own.map(|(_, bytes)| *bytes).sum()
    }

    fn candidate(&self, id: &PathId, need: u64) -> Option<Candidate<'_>> {
        let path = self.paths.get(id)?;
        let meta = path.meta.as_ref()?;
        let promised = self.promised(id, need);
        let free = path.space.available;
        Some(Candidate {
            meta,
            read_only: path.read_only,
            trouble: path.health.trouble(),
            room: room(free, self.used(id), promised, meta.max_storage),
        })
    }

    fn candidates(&self, need: u64) -> Vec<Candidate<'_>> {
        let all = self.paths.keys();
        all.filter_map(|id| self.candidate(id, need)).collect()
    }

    /// The path for new files.
    pub(super) fn place(&self, want: &Want<'_>, need: u64) -> Result<PathId, StorageError> {
        let chosen = place(want, &self.candidates(need)).cloned();
        chosen.map_err(|mut refusals| {
            for (id, path) in self.paths.iter().filter(|(_, p)| p.meta.is_none()) {
                let why = path.health.trouble().unwrap_or_default();
                refusals.push((id.clone(), Refusal::Trouble(why.into())));
            }
            StorageError::NoPlace {
                sector: want.sector,
                refusals,
            }
        })
    }

    /// Why this path does not take files, if it does not.
    pub(super) fn refusal(
        &self,
        want: &Want<'_>,
        path: &PathId,
        need: u64,
    ) -> Result<Option<Refusal>, StorageError> {
        let known = self.get(path)?;
        Ok(match self.candidate(path, need) {
            Some(candidate) => refusal(want, &candidate),
            None => Some(Refusal::Trouble(
                known.health.trouble().unwrap_or_default().into(),
            )),
        })
    }

    /// How many sectors could begin to be sealed.
    pub(super) fn sealable(&self, need: u64) -> u64 {
        let open = |c: &Candidate<'_>| {
            c.trouble.is_none() && !c.read_only && c.meta.can_seal && c.meta.weight > 0
        };
        let all = self.candidates(need).into_iter().filter(open);
        all.map(|c| c.room / need.max(1)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: u64 = 100;

    fn path(name: &str) -> PathId {
        name.parse().unwrap()
    }

    fn state() -> State {
        let mut state = State::default();
        for name in ["a", "b"] {
            let mut one = StoragePath::new(PathBuf::from(format!("/{name}")), false);
            one.meta = Some(PathMeta::new(path(name)));
            one.health = PathHealth::Good;
            one.space.available = 1_000;
            state.paths.insert(path(name), one);
        }
        state
    }

    #[test]
    fn files_in_their_place_are_not_those_that_were_given_up() {
        let (mut s, a, id) = (state(), path("a"), sector(1000, 1));
        s.apply(Change::Declare(a.clone(), id, FileTypes::REPLICA), 5);
        s.apply(Change::Retire(a.clone(), id, FileTypes::REPLICA, 90), 6);
        assert_eq!(s.locate(id, FileType::Sealed), None);
        assert_eq!(s.old_in(&a, id), FileTypes::REPLICA);
        // One of them is made anew; the other is still to be deleted, and then at once.
        let writes = s.apply(Change::Declare(a.clone(), id, FileType::Sealed.into()), 7);
        assert_eq!(writes.len(), 2, "{writes:?}");
        assert_eq!(s.old_in(&a, id), FileType::Cache.into());
        s.apply(
            Change::Retire(a.clone(), id, FileType::Scratch.into(), 0),
            8,
        );
        let until = |s: &State, file| s.old[&(path("a"), id, file)];
        assert_eq!(until(&s, FileType::Cache), 90, "each has its own time");
        s.apply(Change::Retire(a.clone(), id, FileType::Cache.into(), 0), 8);
        assert_eq!(until(&s, FileType::Cache), 0);
        s.apply(Change::Erased(a.clone(), id, FileTypes::EVERY), 9);
        assert!(s.old.is_empty());
        assert_eq!(s.locate(id, FileType::Sealed), Some(&a));
    }

    #[test]
    fn room_is_promised_once_and_given_back() {
        let (mut s, a, id) = (state(), path("a"), sector(1000, 1));
        assert_eq!(s.sealable(NEED), 20);
        s.apply(Change::Declare(a.clone(), id, FileType::Scratch.into()), 1);
        assert_eq!((s.promised(&a, NEED), s.sealable(NEED)), (100, 19));
        s.sizes.insert((a.clone(), id), 60);
        assert_eq!(
            s.promised(&a, NEED),
            40,
            "60 are taken and not free any more"
        );
        s.apply(
            Change::Retire(a.clone(), id, FileType::Scratch.into(), 0),
            2,
        );
        s.apply(Change::Erased(a.clone(), id, FileTypes::EVERY), 3);
        assert_eq!((s.promised(&a, NEED), s.used(&a)), (0, 0));
        s.apply(Change::Order(id, a.clone()), 4);
        s.moves[&id].total.store(700, Ordering::Relaxed);
        assert_eq!(s.sealable(NEED), 3 + 10);
        s.apply(Change::Moved(id), 5);
        assert_eq!(s.sealable(NEED), 20);
    }

    #[test]
    fn a_path_that_is_gone_is_named() {
        let (mut s, a, id) = (state(), path("a"), sector(1000, 1));
        s.apply(Change::Declare(a.clone(), id, FileTypes::REPLICA), 1);
        s.check(id).unwrap();
        s.paths.get_mut(&a).unwrap().health = PathHealth::Gone("no mount".into());
        let e = s.check(id).unwrap_err();
        assert!(
            matches!(&e, StorageError::Gone { path, .. } if *path == a),
            "{e}"
        );
        // A copy that can be reached is as good.
        s.apply(Change::Declare(path("b"), id, FileTypes::REPLICA), 2);
        s.check(id).unwrap();
    }
}
