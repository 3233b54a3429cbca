//! Paths come, go, and tell what is in them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lotus_types::{SectorId, SectorNumber};
use serde::{Deserialize, Serialize};

use super::health::{Call, PathHealth, Seen, look, measure, scan};
use super::meta::{FileType, FileTypes, META_FILE, PathId, PathMeta};
use super::state::{Change, PATHS, PathRecord, StoragePath};
use super::{MAX_PATHS, Storage, StorageError, place_in};
use crate::shared::lock;

/// How long a path may take to list what is in it.
const SCAN: Duration = Duration::from_secs(60);
/// Sectors that an error names.
const NAMED: usize = 5;

/// A path to attach.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewPath {
    /// The folder.
    pub dir: PathBuf,
    /// For a folder that is no path yet: what is written into its `sectorstore.json`.
    pub init: Option<NewMeta>,
    /// Nothing is ever written to it.
    pub read_only: bool,
}

/// What a new path is for; the fields are those of [`PathMeta`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewMeta {
    /// How much it is preferred.
    pub weight: u64,
    /// Sectors are sealed here.
    pub can_seal: bool,
    /// Sealed sectors are kept here.
    pub can_store: bool,
    /// Most bytes that sectors may take; 0: no limit.
    pub max_storage: u64,
    /// Groups that it belongs to.
    pub groups: Vec<String>,
    /// Groups that sectors may be moved to from here.
    pub allow_to: Vec<String>,
}

/// An attached path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PathView {
    /// Its id.
    pub id: PathId,
    /// Where it is.
    pub dir: PathBuf,
    /// It is the repo's own, which can not be detached.
    pub home: bool,
    /// Nothing is ever written to it.
    pub read_only: bool,
    /// It can be read.
    pub reachable: bool,
    /// What is wrong with it; while there is, it gets no new files.
    pub trouble: Option<String>,
    /// Bytes of its disk.
    pub capacity: u64,
    /// Bytes that its disk has free.
    pub available: u64,
    /// Bytes of those that are promised to sectors being sealed or moved.
    pub reserved: u64,
    /// Bytes that sectors take; counted only in a path with a limit.
    pub used: u64,
    /// The sectors in it: number, miner, and the files of each.
    #[serde(skip)]
    pub sectors: Vec<(SectorId, FileTypes)>,
    /// How many sectors are in it.
    pub sector_count: u64,
    /// Of how many it has the only copy of some file.
    pub only_copies: u64,
    /// Its `sectorstore.json`; unknown until it was there once.
    pub settings: Option<PathMeta>,
}

/// Files of a sector in one path.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HeldView {
    /// The sector, as its files are called.
    pub sector: String,
    /// The path.
    pub path: PathId,
    /// Where that is.
    pub dir: PathBuf,
    /// What is there.
    pub files: Vec<String>,
    /// Which of it is used: not another copy elsewhere.
    pub in_use: Vec<String>,
    /// They were moved or given up, and are deleted from this time on, Unix milliseconds.
    pub deleted_at_unix_ms: Option<u64>,
    /// What is wrong with the path.
    pub trouble: Option<String>,
}

/// What a path has.
struct Found {
    seen: Seen,
    files: BTreeMap<SectorId, FileTypes>,
    sizes: BTreeMap<SectorId, u64>,
}

fn examine(dir: &Path, id: &PathId, read_only: bool) -> Result<Found, String> {
    let seen = look(dir, id, read_only)?;
    let told = |e: std::io::Error| format!("{}: {e}", dir.display());
    if seen.health == PathHealth::Good && !read_only {
        for file in FileType::ALL {
            fs::create_dir_all(dir.join(file.name())).map_err(told)?;
        }
    }
    let files = scan(dir).map_err(told)?;
    let counted =
        |(_, f): &(SectorId, FileTypes)| seen.meta.max_storage > 0 || f.has(FileType::Scratch);
    let sectors: Vec<_> = files
        .iter()
        .map(|(s, f)| (*s, *f))
        .filter(counted)
        .collect();
    let sizes = measure(dir, &sectors);
    Ok(Found { seen, files, sizes })
}

impl Storage {
    /// Attaches a folder, and finds what is in it. An attached one that is named again takes the
    /// new `read_only`.
    pub fn attach(&self, new: &NewPath) -> Result<PathId, StorageError> {
        let dir = fs::canonicalize(&new.dir).map_err(|e| {
            // An order is not tried again, so its error says what to do.
            StorageError::refused(
                format!("{}: {e}", new.dir.display()),
                "name a folder that is there: mount its disk, or make it",
            )
        })?;
        if !dir.is_dir() || dir.to_str().is_none() {
            return Err(StorageError::refused(
                format!("{} is no folder with a name in UTF-8", dir.display()),
                "name a folder, best the root of a mounted disk",
            ));
        }
        let home = fs::canonicalize(&self.0.home_dir).is_ok_and(|home| home == dir);
        let dir = if home { self.0.home_dir.clone() } else { dir };
        let id = self.id_of(&dir, new)?;
        self.may_attach(&dir, &id)?;
        if id == self.0.home {
            self.redeclare(Some(&id))?;
            return Ok(id);
        }
        let record = PathRecord {
            dir: dir.clone(),
            read_only: new.read_only,
        };
        let key = id.as_str().to_owned();
        let journal = &self.0.journal;
        journal.write(|tx| tx.put(&PATHS, &key, &record))?;
        {
            let mut state = lock(&self.0.state);
            let path = StoragePath::new(dir.clone(), new.read_only);
            let known = state.paths.entry(id.clone()).or_insert(path);
            (known.dir, known.read_only) = (dir, new.read_only);
        }
        self.redeclare(Some(&id))?;
        Ok(id)
    }

    /// The id of a folder: of its `sectorstore.json`, which is written when that is asked for.
    fn id_of(&self, dir: &Path, new: &NewPath) -> Result<PathId, StorageError> {
        let file = dir.join(META_FILE);
        match (PathMeta::read(dir), &new.init) {
            (Ok(meta), None) => Ok(meta.id),
            (Ok(meta), Some(_)) => Err(StorageError::refused(
                format!("{} is storage path {} already", dir.display(), meta.id),
                format!(
                    "attach it without --init; to change it, edit {} and run `lotus-miner \
                     storage redeclare`",
                    file.display()
                ),
            )),
            (Err(e), init) if e.kind() == std::io::ErrorKind::NotFound => match init {
                Some(init) => self.init(dir, init),
                None => Err(StorageError::refused(
                    format!("there is no {META_FILE} in {}", dir.display()),
                    "mount its disk; for a new path add --init with --seal, --store, or both",
                )),
            },
            (Err(e), _) => Err(StorageError::io(&file)(e)),
        }
    }

    /// Writes the `sectorstore.json` of a new path. A disk that takes the place of a lost one
    /// takes its id.
    fn init(&self, dir: &Path, init: &NewMeta) -> Result<PathId, StorageError> {
        if !init.can_seal && !init.can_store {
            return Err(StorageError::refused(
                "a path is for sealing, for keeping sectors, or both",
                "add --seal, --store, or both",
            ));
        }
        let known = {
            let state = lock(&self.0.state);
            let mut all = state.paths.iter();
            all.find(|(_, p)| p.dir == dir).map(|(id, _)| id.clone())
        };
        let id = known.unwrap_or_else(PathId::generate);
        self.may_attach(dir, &id)?;
        let meta = PathMeta {
            weight: init.weight,
            can_seal: init.can_seal,
            can_store: init.can_store,
            max_storage: init.max_storage,
            groups: init.groups.clone(),
            allow_to: init.allow_to.clone(),
            ..PathMeta::new(id.clone())
        };
        meta.write(dir).map_err(StorageError::io(dir))?;
        Ok(id)
    }

    /// An error when another path is there, or this one is somewhere else.
    fn may_attach(&self, dir: &Path, id: &PathId) -> Result<(), StorageError> {
        let state = lock(&self.0.state);
        if let Some(path) = state.paths.get(id)
            && path.dir != dir
            && path.reachable()
        {
            return Err(StorageError::refused(
                format!("storage path {id} is attached at {}", path.dir.display()),
                format!(
                    "a copy of a path needs an id of its own: delete {} and attach it with --init",
                    dir.join(META_FILE).display()
                ),
            ));
        }
        let mut others = state.paths.iter().filter(|(other, _)| *other != id);
        let nested = |p: &StoragePath| p.dir.starts_with(dir) || dir.starts_with(&p.dir);
        if let Some((other, path)) = others.find(|(_, p)| nested(p)) {
            return Err(StorageError::refused(
                format!(
                    "{} and storage path {other} at {} are in one another",
                    dir.display(),
                    path.dir.display()
                ),
                "give each path a folder of its own",
            ));
        }
        if !state.paths.contains_key(id) && state.paths.len() >= MAX_PATHS {
            return Err(StorageError::refused(
                format!("{MAX_PATHS} storage paths are attached"),
                "detach one first",
            ));
        }
        Ok(())
    }

    /// The sectors of which a path has the only copy of some file.
    ///
    /// # Errors
    /// There is no such path.
    pub fn only_on(&self, id: &PathId) -> Result<Vec<SectorId>, StorageError> {
        let state = lock(&self.0.state);
        state.get(id)?;
        Ok(state.index.only_on(id))
    }

    /// Forgets a path and what is declared in it. Its files stay. Unless `really`, it is refused
    /// while sectors would be lost to this hub.
    pub fn detach(&self, id: &PathId, really: bool) -> Result<(), StorageError> {
        let _one_at_a_time = lock(&self.0.writing);
        let sectors = {
            let state = lock(&self.0.state);
            state.get(id)?;
            if *id == self.0.home {
                return Err(StorageError::refused(
                    "the repo's own storage path stays attached",
                    format!(
                        "to use others alone, set CanSeal and CanStore to false in {}, run \
                         `lotus-miner storage redeclare`, and move its sectors",
                        self.0.home_dir.join(META_FILE).display()
                    ),
                ));
            }
            let only = state.index.only_on(id);
            if !only.is_empty() && !really {
                let named: Vec<_> = only
                    .iter()
                    .take(NAMED)
                    .map(|s| s.number.to_string())
                    .collect();
                let more = if only.len() > NAMED { ", ..." } else { "" };
                return Err(StorageError::refused(
                    format!(
                        "storage path {id} has the only files of {} sectors: {}{more}",
                        only.len(),
                        named.join(", ")
                    ),
                    "move them with `lotus-miner storage move`; with --really-do-it they turn \
                     faulty",
                ));
            }
            state.index.on(id)
        };
        let moves: Vec<SectorId> = {
            let state = lock(&self.0.state);
            let to = state.moves.iter().filter(|(_, m)| m.to == *id);
            to.map(|(sector, _)| *sector).collect()
        };
        let old: Vec<(SectorId, FileType)> = {
            let state = lock(&self.0.state);
            let own = state.old.keys().filter(|(path, _, _)| path == id);
            own.map(|(_, sector, file)| (*sector, *file)).collect()
        };
        let forget = sectors.into_iter();
        let forget = forget.map(|(sector, files)| Change::Forget(id.clone(), sector, files));
        let erased = old
            .into_iter()
            .map(|(s, f)| Change::Erased(id.clone(), s, f.into()));
        let changes = forget
            .chain(erased)
            .chain(moves.into_iter().map(Change::Moved));
        self.apply(changes)?;
        let key = id.as_str().to_owned();
        self.0.journal.write(|tx| tx.remove(&PATHS, &key))?;
        let mut state = lock(&self.0.state);
        state.paths.remove(id);
        state.sizes.retain(|(path, _), _| path != id);
        Ok(())
    }

    /// Reads `sectorstore.json` of one path, or of all, and looks what is in them.
    pub fn redeclare(&self, one: Option<&PathId>) -> Result<(), StorageError> {
        let paths: Vec<(PathId, PathBuf, bool)> = {
            let state = lock(&self.0.state);
            if let Some(id) = one {
                state.get(id)?;
            }
            let wanted = state
                .paths
                .iter()
                .filter(|(id, _)| one.is_none_or(|o| o == *id));
            wanted
                .map(|(id, p)| (id.clone(), p.dir.clone(), p.read_only))
                .collect()
        };
        let end = Instant::now() + SCAN;
        let mut calls = Vec::new();
        for (id, dir, read_only) in paths {
            let (at, name) = (dir.clone(), id.clone());
            let call = Call::begin(&dir, move || examine(&at, &name, read_only));
            calls.push((id, call.map_err(StorageError::io(&dir))?));
        }
        for (id, call) in calls {
            self.adopt(&id, call.until(end).and_then(|found| found))?;
        }
        Ok(())
    }

    /// Takes over what a look at a path found.
    fn adopt(&self, id: &PathId, found: Result<Found, String>) -> Result<(), StorageError> {
        let _one_at_a_time = lock(&self.0.writing);
        let mut state = lock(&self.0.state);
        let declared = state.index.on(id);
        let Some(path) = state.paths.get_mut(id) else {
            // Detached meanwhile.
            return Ok(());
        };
        let dir = path.dir.clone();
        let found = match found {
            Ok(found) => found,
            Err(why) => {
                tracing::error!(path = %id, sectors = declared.len(), "a storage path is not \
                     there, and its sectors can not be proven: {why}");
                path.health = PathHealth::Gone(why);
                return Ok(());
            }
        };
        if let Some(why) = found.seen.health.trouble() {
            tracing::warn!(path = %id, "a storage path takes no new files: {why}");
        }
        path.meta = Some(found.seen.meta);
        path.health = found.seen.health;
        path.space = found.seen.space;
        state.sizes.retain(|(p, _), _| p != id);
        for (sector, bytes) in found.sizes {
            state.sizes.insert((id.clone(), sector), bytes);
        }
        // Files come and go while the folders are read: what differs is looked at once more. Not
        // in a path that is new, from which nothing was taken yet.
        let fresh = declared.is_empty();
        let there = |sector: SectorId, file: FileType| place_in(&dir, file, sector).exists();
        let mut changes = Vec::new();
        let before: BTreeMap<SectorId, FileTypes> = declared.iter().copied().collect();
        for (sector, files) in &found.files {
            let mut new = *files;
            new.remove(state.old_in(id, *sector));
            new.remove(before.get(sector).copied().unwrap_or_default());
            for file in new.iter().filter(|f| fresh || there(*sector, *f)) {
                changes.push(Change::Declare(id.clone(), *sector, file.into()));
            }
        }
        for (sector, files) in declared {
            let mut lost = files;
            lost.remove(found.files.get(&sector).copied().unwrap_or_default());
            for file in lost.iter().filter(|f| !there(sector, *f)) {
                tracing::warn!(path = %id, %sector, file = file.name(), "a file of a sector is \
                     not where it was");
                changes.push(Change::Forget(id.clone(), sector, file.into()));
            }
        }
        drop(state);
        self.apply(changes)
    }

    /// The attached paths.
    #[must_use]
    pub fn paths(&self) -> Vec<PathView> {
        let state = lock(&self.0.state);
        let view = |(id, p): (&PathId, &StoragePath)| {
            let sectors = state.index.on(id);
            PathView {
                id: id.clone(),
                dir: p.dir.clone(),
                home: *id == self.0.home,
                read_only: p.read_only,
                reachable: p.reachable(),
                trouble: p.health.trouble().map(str::to_owned),
                capacity: p.space.capacity,
                available: p.space.available,
                reserved: state.promised(id, self.0.need),
                used: state.used(id),
                sector_count: sectors.len() as u64,
                only_copies: state.index.only_on(id).len() as u64,
                sectors,
                settings: p.meta.clone(),
            }
        };
        state.paths.iter().map(view).collect()
    }

    /// Where the files of a sector are.
    #[must_use]
    pub fn find(&self, number: SectorNumber) -> Vec<HeldView> {
        let state = lock(&self.0.state);
        let names = |files: FileTypes| files.iter().map(|f| f.name().to_owned()).collect();
        let mut all = Vec::new();
        for (id, path) in &state.paths {
            let view = |sector: SectorId, files: FileTypes, used: FileTypes| HeldView {
                sector: sector.to_string(),
                path: id.clone(),
                dir: path.dir.clone(),
                files: names(files),
                in_use: names(used),
                deleted_at_unix_ms: None,
                trouble: path.health.trouble().map(str::to_owned),
            };
            for (sector, files) in state.index.on(id) {
                if sector.number == number {
                    let mut used = FileTypes::default();
                    for file in files.iter() {
                        if state.locate(sector, file) == Some(id) {
                            used.insert(file);
                        }
                    }
                    all.push(view(sector, files, used));
                }
            }
            for ((at, sector, file), until) in &state.old {
                if at == id && sector.number == number {
                    all.push(HeldView {
                        deleted_at_unix_ms: Some(*until),
                        ..view(*sector, (*file).into(), FileTypes::default())
                    });
                }
            }
        }
        all
    }
}
