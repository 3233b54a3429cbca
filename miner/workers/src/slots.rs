//! Which files a task reads and writes: what a worker on another host must get and bring back.

use std::path::PathBuf;

use lotus_types::SectorSize;

use crate::execute::layers;
use crate::{Class, Task};

/// What a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One file.
    File,
    /// A flat directory of files.
    Dir,
}

/// One place of a task where files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// Its name between hub and worker, and the file's name in a worker's scratch directory. Steps
    /// of one sector use one name for one thing.
    pub(crate) name: &'static str,
    /// Where it is on the hub.
    pub(crate) path: PathBuf,
    pub(crate) shape: Shape,
    /// Whether the task reads it.
    pub(crate) reads: bool,
    /// If the task writes it: an existing directory of the hub on the same file system, for what a
    /// worker sends before it is complete.
    pub(crate) staging: Option<PathBuf>,
    /// Bytes that it can hold.
    pub(crate) limit: u64,
}

/// How a task uses a path.
enum Use {
    Reads,
    Writes,
    /// Reads it and changes it in place.
    Changes,
}

/// Room for what is small in a cache directory: auxiliary data, marks.
const SMALL_FILES: u64 = 1 << 20;

impl Task {
    /// The names of the tasks that a worker of a class on another host can do: those that have
    /// all their files in slots. The others are short, or read from the whole store of sectors.
    pub(crate) const fn remote(class: Class) -> &'static [&'static str] {
        match class {
            Class::Seal => &[
                "pre_commit1",
                "pre_commit2",
                "commit",
                "aggregate",
                "replica_update",
                "prove_update",
            ],
            Class::Prove => &["window_post", "winning_post"],
        }
    }

    /// Whether a worker on another host can do it.
    pub(crate) fn can_be_remote(&self) -> bool {
        Self::remote(self.class()).contains(&self.name())
    }

    /// Whether no step after it needs the task's files on another host.
    pub(crate) const fn is_last_remote(&self) -> bool {
        matches!(
            self,
            Self::Commit { .. }
                | Self::Aggregate { .. }
                | Self::ProveUpdate { .. }
                | Self::ProvePost { .. }
        )
    }

    /// The table of what each task reads and writes, for those that [can be
    /// remote](Self::can_be_remote). What is written is in the order in which it may replace what
    /// is there: the mark in the cache that `PreCommit2` has begun comes before its replica, so
    /// that a repeated `PreCommit2` knows what it finds.
    pub(crate) fn slots(&self) -> Vec<Slot> {
        use Shape::{Dir, File};
        use Use::{Changes, Reads, Writes};
        let mut task = self.clone();
        let Some(size) = task.size() else {
            return Vec::new();
        };
        let staging = task.staging();
        let paths: Vec<(&'static str, Shape, Use, &mut PathBuf)> = match &mut task {
            Self::PreCommit1 {
                unsealed,
                sealed,
                cache,
                ..
            } => vec![
                ("unsealed", File, Reads, unsealed),
                ("cache", Dir, Writes, cache),
                ("sealed", File, Writes, sealed),
            ],
            Self::PreCommit2 { sealed, cache, .. } => vec![
                ("cache", Dir, Changes, cache),
                ("sealed", File, Changes, sealed),
            ],
            Self::Commit { sealed, cache, .. } => vec![
                ("cache", Dir, Reads, cache),
                ("sealed", File, Reads, sealed),
            ],
            Self::ReplicaUpdate {
                files, unsealed, ..
            } => vec![
                ("unsealed", File, Reads, unsealed),
                ("cache", Dir, Reads, &mut files.cache),
                ("sealed", File, Reads, &mut files.sealed),
                ("update-cache", Dir, Writes, &mut files.updated_cache),
                ("update", File, Writes, &mut files.updated),
            ],
            Self::ProveUpdate { files, .. } => vec![
                ("cache", Dir, Reads, &mut files.cache),
                ("sealed", File, Reads, &mut files.sealed),
                ("update-cache", Dir, Reads, &mut files.updated_cache),
                ("update", File, Reads, &mut files.updated),
            ],
            Self::AddPieces { .. }
            | Self::Aggregate { .. }
            | Self::Finalize { .. }
            | Self::Unseal { .. }
            | Self::UnsealUpdate { .. }
            | Self::OpenPost(_)
            | Self::ProvePost { .. }
            | Self::VerifyPost { .. }
            | Self::CheckSectors { .. } => Vec::new(),
        };
        paths
            .into_iter()
            .map(|(name, shape, used, path)| Slot {
                name,
                path: path.clone(),
                shape,
                reads: matches!(used, Reads | Changes),
                staging: match used {
                    Reads => None,
                    Writes | Changes => staging.clone(),
                },
                limit: match shape {
                    File => size.bytes(),
                    Dir => cache_bytes(size),
                },
            })
            .collect()
    }

    /// Gives each slot another path.
    pub(crate) fn move_slots(&mut self, to: impl Fn(&'static str) -> PathBuf) {
        match self {
            Self::PreCommit1 {
                unsealed,
                sealed,
                cache,
                ..
            } => {
                *unsealed = to("unsealed");
                *sealed = to("sealed");
                *cache = to("cache");
            }
            Self::PreCommit2 {
                sealed,
                cache,
                attempt,
                ..
            } => {
                *sealed = to("sealed");
                *cache = to("cache");
                *attempt = to("attempt");
            }
            Self::Commit { sealed, cache, .. } => {
                *sealed = to("sealed");
                *cache = to("cache");
            }
            Self::ReplicaUpdate {
                files, unsealed, ..
            } => {
                *unsealed = to("unsealed");
                files.move_to(&to);
            }
            Self::ProveUpdate { files, .. } => files.move_to(&to),
            Self::AddPieces { .. }
            | Self::Aggregate { .. }
            | Self::Finalize { .. }
            | Self::Unseal { .. }
            | Self::UnsealUpdate { .. }
            | Self::OpenPost(_)
            | Self::ProvePost { .. }
            | Self::VerifyPost { .. }
            | Self::CheckSectors { .. } => {}
        }
    }

    /// Where what a worker sends is collected.
    fn staging(&self) -> Option<PathBuf> {
        let beside = |path: &PathBuf| path.parent().map(PathBuf::from);
        match self {
            Self::PreCommit1 { sealed, .. } => beside(sealed),
            Self::PreCommit2 { attempt, .. } => Some(attempt.clone()),
            Self::ReplicaUpdate { files, .. } => beside(&files.updated),
            _ => None,
        }
    }

    /// Size of the sector, of those that [can be remote](Self::can_be_remote).
    pub(crate) const fn size(&self) -> Option<SectorSize> {
        match self {
            Self::PreCommit1 { size, .. }
            | Self::PreCommit2 { size, .. }
            | Self::Commit { size, .. }
            | Self::Aggregate { size, .. } => Some(*size),
            Self::ReplicaUpdate { files, .. } | Self::ProveUpdate { files, .. } => Some(files.size),
            Self::ProvePost { claim, .. } => Some(claim.size),
            _ => None,
        }
    }
}

/// The most that a cache directory holds: every layer, the data tree (twice the sector), tree C
/// and tree R (a sector and a seventh each, rounded up).
pub(crate) const fn cache_bytes(size: SectorSize) -> u64 {
    (layers(size) + 2 + 2 + 2) * size.bytes() + SMALL_FILES
}

#[cfg(test)]
mod tests {
    use lotus_types::{ActorId, SectorId, SectorNumber};

    use super::*;

    fn pre_commit2() -> Task {
        Task::PreCommit2 {
            sector: SectorId {
                miner: ActorId(1000),
                number: SectorNumber(3),
            },
            size: SectorSize::S8MiB,
            pc1: vec![1],
            sealed: "/hub/sealed/s".into(),
            cache: "/hub/cache/s".into(),
            attempt: "/hub/scratch/a".into(),
        }
    }

    #[test]
    fn moving_the_slots_leaves_no_path_of_the_hub() {
        let mut task = pre_commit2();
        task.move_slots(|slot| PathBuf::from("/w").join(slot));
        let text = serde_json::to_string(&task).unwrap();
        assert!(!text.contains("/hub"), "{text}");
        for slot in task.slots() {
            assert_eq!(slot.path, PathBuf::from("/w").join(slot.name));
        }
    }

    #[test]
    fn what_is_changed_in_place_comes_back_mark_first() {
        let slots = pre_commit2().slots();
        let names: Vec<_> = slots.iter().map(|s| (s.name, s.reads)).collect();
        assert_eq!(names, [("cache", true), ("sealed", true)]);
        assert!(
            slots
                .iter()
                .all(|s| s.staging == Some("/hub/scratch/a".into()))
        );
        assert!(pre_commit2().can_be_remote());
    }
}
