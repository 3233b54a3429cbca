//! Files of sectors on their way from path to path, and what they leave behind.
//!
//! A copy is made beside its place, compared and synced, renamed into its place, declared; only
//! then is the old one given up, and deleted when no proof can be reading it any more. A crash at
//! any point leaves the old files in use, or both.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lotus_types::SectorId;
use serde::{Deserialize, Serialize};
use tokio::sync::SemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::files::{Copying, is_copy, put_in_place, remove, sync, tree_len};
use super::health::bytes_of;
use super::meta::{FileType, FileTypes, PathId, PathMeta};
use super::place::{Purpose, Want};
use super::state::{Change, Due, Moving, State};
use super::{Storage, StorageError, place_in};
use crate::shared::{lock, unix_ms};

/// Copies on their way into a path. Lotus has no such folder.
const INCOMING: &str = "incoming";
/// How long a move waits after it failed.
const AGAIN: Duration = Duration::from_secs(30);

/// A move that an operator ordered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveView {
    /// The sector's number.
    pub sector: u64,
    /// Where it goes.
    pub to: PathId,
    /// Bytes that are copied.
    pub done_bytes: u64,
    /// Bytes in all; 0 until they are counted.
    pub total_bytes: u64,
    /// Why it does not go on.
    pub trouble: Option<String>,
}

/// A file to copy.
struct Step {
    file: FileType,
    path: PathId,
    from: PathBuf,
}

impl Storage {
    /// Whether files of a sealed sector are where sectors are kept. Those that are stay, as in
    /// Lotus.
    pub(crate) fn is_kept(&self, sector: SectorId, files: FileTypes) -> Result<bool, StorageError> {
        let state = lock(&self.0.state);
        state.check(sector)?;
        let mut places = files.iter().filter_map(|f| state.locate(sector, f));
        let Some(first) = places.next() else {
            return Ok(true);
        };
        Ok(places.all(|p| p == first) && state.keeps(first))
    }

    /// Waits until few enough copies are made that one more does not slow them all down.
    pub(crate) async fn turn(&self) -> Result<SemaphorePermit<'_>, StorageError> {
        let turn = self.0.copies.acquire().await;
        turn.map_err(|_| StorageError::Stopped)
    }

    /// Brings files of a sealed sector to a path that keeps sectors.
    pub(crate) fn keep(
        &self,
        sector: SectorId,
        files: FileTypes,
        stop: &CancellationToken,
    ) -> Result<(), StorageError> {
        let (whole, from) = {
            let state = lock(&self.0.state);
            state.check(sector)?;
            // One that has it all, of a try that was broken off.
            let mut held = state.index.of(sector).iter();
            let whole = held.find(|h| {
                h.files.and(files) == files && state.keeps(&h.path) && state.reachable(&h.path)
            });
            let first = files.iter().find_map(|f| state.locate(sector, f));
            let from = first.and_then(|p| state.paths.get(p)?.meta.clone());
            (whole.map(|h| h.path.clone()), from)
        };
        let to = match whole {
            Some(to) => to,
            None => self.keeper(sector, files, from.as_ref())?,
        };
        let moving = Moving::new(to);
        {
            let mut state = lock(&self.0.state);
            if state.keeping.contains_key(&sector) {
                return Err(StorageError::Changed(sector));
            }
            state.keeping.insert(sector, moving.clone());
        }
        let carried = self.carry(sector, files, &moving, stop, false);
        lock(&self.0.state).keeping.remove(&sector);
        carried
    }

    /// The path that keeps these files.
    fn keeper(
        &self,
        sector: SectorId,
        files: FileTypes,
        from: Option<&PathMeta>,
    ) -> Result<PathId, StorageError> {
        let sources: Vec<PathBuf> = files.iter().map(|f| self.location(sector, f)).collect();
        let sizes = sources.iter().map(|p| tree_len(p)).sum::<Result<u64, _>>();
        let bytes = sizes.map_err(StorageError::io(&self.sealed(sector)))?;
        let want = Want {
            sector,
            files,
            purpose: Purpose::Store,
            bytes,
            from,
        };
        lock(&self.0.state).place(&want, self.0.need)
    }

    /// Orders a move: it is journaled, begins when those before it are done, and goes on after a
    /// restart.
    pub fn order_move(&self, sector: SectorId, to: &PathId) -> Result<MoveView, StorageError> {
        let _one_at_a_time = lock(&self.0.writing);
        let number = sector.number;
        {
            let state = lock(&self.0.state);
            state.check(sector)?;
            let held = state.index.of(sector);
            let files = held
                .iter()
                .fold(FileTypes::default(), |sum, h| sum.or(h.files));
            let again = "see `lotus-miner storage find`";
            if files.is_empty() {
                return Err(StorageError::refused(
                    format!("no storage path has files of sector {number}"),
                    "see `lotus-miner sectors list`; `lotus-miner storage redeclare` looks again",
                ));
            }
            if files.has(FileType::Scratch) {
                return Err(StorageError::refused(
                    format!("sector {number} is being sealed, upgraded or unsealed"),
                    "wait until it is done; a sealed sector goes to a path that keeps sectors by \
                     itself",
                ));
            }
            if let Some(moving) = state.moves.get(&sector) {
                return Err(StorageError::refused(
                    format!("sector {number} is on its way to {}", moving.to),
                    "wait until it is there",
                ));
            }
            if held.len() == 1 && held[0].path == *to {
                return Err(StorageError::refused(
                    format!("sector {number} is there already"),
                    again,
                ));
            }
            if !state.old_in(to, sector).is_empty() {
                return Err(StorageError::refused(
                    format!(
                        "sector {number} came from there a while ago, and its old files there \
                         are not deleted yet"
                    ),
                    format!("{again}, which tells when they are"),
                ));
            }
            let first = held.first().and_then(|h| state.paths.get(&h.path));
            let want = Want {
                sector,
                files,
                purpose: Purpose::Store,
                bytes: 0,
                from: first.and_then(|p| p.meta.as_ref()),
            };
            if let Some(why) = state.refusal(&want, to, self.0.need)? {
                return Err(StorageError::refused(
                    format!("storage path {to} does not take sector {number}: {why}"),
                    "choose another: `lotus-miner storage list`",
                ));
            }
        }
        self.apply([Change::Order(sector, to.clone())])?;
        self.0.wake.notify_one();
        Ok(MoveView {
            sector: number.0,
            to: to.clone(),
            done_bytes: 0,
            total_bytes: 0,
            trouble: None,
        })
    }

    /// The moves that are not done.
    #[must_use]
    pub fn moves(&self) -> Vec<MoveView> {
        let state = lock(&self.0.state);
        let view = |(sector, m): (&SectorId, &std::sync::Arc<Moving>)| MoveView {
            sector: sector.number.0,
            to: m.to.clone(),
            done_bytes: m.done.load(Ordering::Relaxed),
            total_bytes: m.total.load(Ordering::Relaxed),
            trouble: lock(&m.failed).as_ref().map(|(why, _)| why.clone()),
        };
        state.moves.iter().map(view).collect()
    }

    /// Makes the next move that is due. `false`: there is none.
    pub(super) fn next_move(&self, stop: &CancellationToken) -> bool {
        let next = {
            let state = lock(&self.0.state);
            let due = |m: &Moving| {
                let failed = lock(&m.failed);
                failed.as_ref().is_none_or(|(_, at)| at.elapsed() >= AGAIN)
            };
            let mut all = state.moves.iter();
            all.find(|(_, m)| due(m)).map(|(s, m)| (*s, m.clone()))
        };
        let Some((sector, moving)) = next else {
            return false;
        };
        match self.carry(sector, FileTypes::KEPT, &moving, stop, true) {
            Ok(()) => tracing::info!(%sector, to = %moving.to, "sector is moved"),
            Err(StorageError::Stopped) => return false,
            Err(e) => {
                tracing::warn!(%sector, to = %moving.to, error = %e, "sector is not moved yet");
                let why = format!("{e}; {}", e.fix());
                *lock(&moving.failed) = Some((why, Instant::now()));
            }
        }
        true
    }

    /// Copies files to a path and switches to them.
    fn carry(
        &self,
        sector: SectorId,
        files: FileTypes,
        moving: &Moving,
        stop: &CancellationToken,
        ordered: bool,
    ) -> Result<(), StorageError> {
        let (steps, to_dir) = {
            let state = lock(&self.0.state);
            state.check(sector)?;
            (
                steps(&state, sector, files, &moving.to),
                state.get(&moving.to)?.dir.clone(),
            )
        };
        if ordered {
            self.may_take(sector, files, moving)?;
        }
        let incoming = to_dir.join(INCOMING).join(sector.to_string());
        let io = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::Interrupted => StorageError::Stopped,
            _ => StorageError::io(&incoming)(e),
        };
        let mut total = 0u64;
        for step in &steps {
            total = total.saturating_add(tree_len(&step.from).map_err(io)?);
        }
        moving.total.store(total, Ordering::Relaxed);
        moving.done.store(0, Ordering::Relaxed);
        fs::create_dir_all(&incoming).map_err(io)?;
        let copying = Copying {
            done: &moving.done,
            stop,
        };
        for step in &steps {
            let copy = incoming.join(step.file.name());
            copying.copy(&step.from, &copy).map_err(io)?;
            if !is_copy(&step.from, &copy).map_err(io)? {
                return Err(StorageError::Changed(sector));
            }
        }
        sync(&incoming).map_err(io)?;
        self.switch(sector, files, &steps, moving, ordered)?;
        // Also what a try left that had another path in mind.
        for dir in self.incoming() {
            remove(&dir.join(sector.to_string())).map_err(io)?;
        }
        Ok(())
    }

    /// Where copies come in, in the paths from which files may be deleted.
    fn incoming(&self) -> Vec<PathBuf> {
        let state = lock(&self.0.state);
        let own = state.paths.values().filter(|p| p.erasable());
        own.map(|p| p.dir.join(INCOMING)).collect()
    }

    /// An error when the path of a move would not take it now: things may have changed since it
    /// was ordered.
    fn may_take(
        &self,
        sector: SectorId,
        files: FileTypes,
        moving: &Moving,
    ) -> Result<(), StorageError> {
        let state = lock(&self.0.state);
        let bytes = files
            .iter()
            .filter_map(|f| state.locate(sector, f).map(|p| (f, p)));
        let bytes = bytes.filter(|(_, p)| **p != moving.to);
        let dirs = bytes.filter_map(|(f, p)| Some((f, state.paths.get(p)?.dir.clone())));
        let dirs: Vec<(FileType, PathBuf)> = dirs.collect();
        drop(state);
        let bytes = dirs
            .iter()
            .map(|(f, dir)| bytes_of(dir, sector, (*f).into()));
        let want = Want {
            sector,
            files,
            purpose: Purpose::Store,
            bytes: bytes.sum(),
            from: None,
        };
        // Its own promise does not stand against it.
        moving.total.store(0, Ordering::Relaxed);
        match lock(&self.0.state).refusal(&want, &moving.to, self.0.need)? {
            None => Ok(()),
            Some(why) => Err(StorageError::NoPlace {
                sector,
                refusals: vec![(moving.to.clone(), why)],
            }),
        }
    }

    /// Renames complete copies into place, declares them, and gives the old files up.
    fn switch(
        &self,
        sector: SectorId,
        files: FileTypes,
        steps: &[Step],
        moving: &Moving,
        ordered: bool,
    ) -> Result<(), StorageError> {
        let _one_at_a_time = lock(&self.0.writing);
        let to = &moving.to;
        let dir = {
            let state = lock(&self.0.state);
            // A sector that was removed, or made anew, while its files were copied.
            let held = |step: &Step| {
                let mut all = state.index.of(sector).iter();
                all.any(|h| h.path == step.path && h.files.has(step.file))
            };
            if !steps.iter().all(held) {
                return Err(StorageError::Changed(sector));
            }
            state.get(to)?.dir.clone()
        };
        let incoming = dir.join(INCOMING).join(sector.to_string());
        let mut moved = FileTypes::default();
        for step in steps {
            let place = place_in(&dir, step.file, sector);
            let folder = dir.join(step.file.name());
            fs::create_dir_all(&folder).map_err(StorageError::io(&folder))?;
            put_in_place(&incoming.join(step.file.name()), &place)
                .map_err(StorageError::io(&place))?;
            moved.insert(step.file);
        }
        // Also what was there already, of a try that was broken off just before this.
        let there = {
            let state = lock(&self.0.state);
            let mut held = state.index.of(sector).iter();
            let held = held.find(|h| h.path == *to);
            held.map(|h| h.files.and(files)).unwrap_or_default()
        };
        let until = unix_ms().saturating_add(self.0.cfg.keep_moved_secs.saturating_mul(1000));
        let mut changes = self.retired(sector, there.or(moved), Some(to), until);
        if !moved.is_empty() {
            changes.push(Change::Declare(to.clone(), sector, moved));
        }
        if ordered {
            changes.push(Change::Moved(sector));
        }
        self.apply(changes)?;
        self.measure_one(to, sector);
        Ok(())
    }

    /// Deletes what was given up and nobody can be reading any more. What can not be deleted now
    /// is tried again with the next look at the paths.
    pub(super) fn erase_due(&self) {
        let now = unix_ms();
        let due: BTreeSet<SectorId> = {
            let state = lock(&self.0.state);
            let due = state.old.iter().filter(|(_, until)| **until <= now);
            due.map(|((_, sector, _), _)| *sector).collect()
        };
        for sector in due {
            let _one_at_a_time = lock(&self.0.writing);
            if let Err(e) = self.erase_now(sector) {
                tracing::warn!(%sector, error = %e, "old files are not deleted yet");
            }
        }
    }

    /// Deletes what is due of one sector, in the paths that are there. `writing` is held.
    pub(super) fn erase_now(&self, sector: SectorId) -> Result<(), StorageError> {
        let due = lock(&self.0.state).due(sector, unix_ms());
        let wanted = |d: &Due| d.only && place_in(&d.dir, d.file, sector).exists();
        let (kept, due): (Vec<_>, Vec<_>) = due.into_iter().partition(wanted);
        for d in &due {
            let gone = place_in(&d.dir, d.file, sector);
            remove(&gone).map_err(StorageError::io(&gone))?;
            let folder = d.dir.join(d.file.name());
            if folder.exists() {
                sync(&folder).map_err(StorageError::io(&folder))?;
            }
        }
        let erased = due.iter();
        let erased = erased.map(|d| Change::Erased(d.path.clone(), sector, d.file.into()));
        let kept = kept.iter().map(|d| {
            tracing::warn!(path = %d.path, %sector, file = d.file.name(), "the file that was moved \
                 away is the only copy, and used again");
            Change::Declare(d.path.clone(), sector, d.file.into())
        });
        self.apply(erased.chain(kept))?;
        for d in due {
            self.measure_one(&d.path, sector);
        }
        Ok(())
    }

    /// Counts the bytes of one sector in a path with a limit.
    fn measure_one(&self, path: &PathId, sector: SectorId) {
        let (dir, files) = {
            let state = lock(&self.0.state);
            let limited = state.paths.get(path).filter(|p| {
                let meta = p.meta.as_ref();
                meta.is_some_and(|m| m.max_storage > 0)
            });
            let mut held = state.index.of(sector).iter();
            let held = held.find(|h| h.path == *path);
            let (Some(limited), Some(held)) = (limited, held) else {
                return;
            };
            (limited.dir.clone(), held.files)
        };
        let bytes = bytes_of(&dir, sector, files);
        let mut state = lock(&self.0.state);
        state.sizes.insert((path.clone(), sector), bytes);
    }

    /// Deletes copies that nobody will finish.
    pub(super) fn clear_incoming(&self) {
        for dir in self.incoming() {
            let Ok(entries) = fs::read_dir(&dir) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name();
                let wanted = name.to_str().and_then(super::meta::sector_of);
                let wanted = wanted.is_some_and(|sector| {
                    let state = lock(&self.0.state);
                    state.moves.contains_key(&sector)
                        || state.locate(sector, FileType::Scratch).is_some()
                });
                if !wanted && let Err(e) = remove(&entry.path()) {
                    tracing::warn!(path = %entry.path().display(), "a copy that was given up is \
                         not deleted: {e}");
                }
            }
        }
    }
}

/// What must be copied so that the path has these files.
fn steps(state: &State, sector: SectorId, files: FileTypes, to: &PathId) -> Vec<Step> {
    let there = state.index.of(sector).iter().find(|h| h.path == *to);
    let there = there.map(|h| h.files).unwrap_or_default();
    let missing = files.iter().filter(|f| !there.has(*f));
    let step = |file| {
        let path = state.locate(sector, file)?;
        Some(Step {
            file,
            path: path.clone(),
            from: place_in(&state.paths.get(path)?.dir, file, sector),
        })
    };
    missing.filter_map(step).collect()
}
