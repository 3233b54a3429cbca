//! Which files of which sectors are in which path: plain data.

use std::collections::BTreeMap;

use lotus_types::SectorId;

use super::meta::{FileType, FileTypes, PathId};

/// Files of a sector in one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) path: PathId,
    pub(super) files: FileTypes,
    /// When the first of them was declared, Unix milliseconds: of two copies the elder counts,
    /// because the other may still be written by whoever makes it.
    pub(super) since: u64,
}

/// What is declared.
#[derive(Clone, Debug, Default)]
pub(super) struct Index(BTreeMap<SectorId, Vec<Held>>);

impl Index {
    /// Adds files of a sector. Returns what is now declared of it in this path.
    pub(super) fn declare(
        &mut self,
        path: &PathId,
        sector: SectorId,
        files: FileTypes,
        since: u64,
    ) -> Held {
        let all = self.0.entry(sector).or_default();
        if let Some(held) = all.iter_mut().find(|h| h.path == *path) {
            held.files = held.files.or(files);
            return held.clone();
        }
        let held = Held {
            path: path.clone(),
            files,
            since,
        };
        let at = all.partition_point(|h| h.since <= since);
        all.insert(at, held.clone());
        held
    }

    /// Takes files of a sector away. Returns what is left of it in this path.
    pub(super) fn drop(
        &mut self,
        path: &PathId,
        sector: SectorId,
        files: FileTypes,
    ) -> Option<Held> {
        let all = self.0.get_mut(&sector)?;
        let held = all.iter_mut().find(|h| h.path == *path)?;
        held.files.remove(files);
        let left = held.clone();
        all.retain(|h| !h.files.is_empty());
        if all.is_empty() {
            self.0.remove(&sector);
        }
        (!left.files.is_empty()).then_some(left)
    }

    /// All that is declared of a sector, the elder copies first.
    pub(super) fn of(&self, sector: SectorId) -> &[Held] {
        self.0.get(&sector).map_or(&[], Vec::as_slice)
    }

    /// The path with a file: the eldest copy that can be reached, else the eldest.
    pub(super) fn locate(
        &self,
        sector: SectorId,
        file: FileType,
        reachable: impl Fn(&PathId) -> bool,
    ) -> Option<&PathId> {
        let mut with = self.of(sector).iter().filter(|h| h.files.has(file));
        let first = with.clone().next()?;
        let held = with.find(|h| reachable(&h.path)).unwrap_or(first);
        Some(&held.path)
    }

    /// What is declared in a path.
    pub(super) fn on(&self, path: &PathId) -> Vec<(SectorId, FileTypes)> {
        let held = |(sector, all): (&SectorId, &Vec<Held>)| {
            let held = all.iter().find(|h| h.path == *path)?;
            Some((*sector, held.files))
        };
        self.0.iter().filter_map(held).collect()
    }

    /// The sectors of which a path has the only copy of some file.
    pub(super) fn only_on(&self, path: &PathId) -> Vec<SectorId> {
        let sole = |(sector, files): (SectorId, FileTypes)| {
            let elsewhere = self.of(sector).iter().filter(|h| h.path != *path);
            let others = elsewhere.fold(FileTypes::default(), |sum, h| sum.or(h.files));
            let mut sole = files;
            sole.remove(others);
            (!sole.is_empty()).then_some(sector)
        };
        self.on(path).into_iter().filter_map(sole).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_types::{ActorId, SectorNumber};
    use proptest::prelude::*;

    fn id(n: u64) -> SectorId {
        SectorId {
            miner: ActorId(1000),
            number: SectorNumber(n),
        }
    }

    fn path(name: &str) -> PathId {
        name.parse().unwrap()
    }

    #[test]
    fn the_elder_copy_counts_as_long_as_it_can_be_reached() {
        let mut index = Index::default();
        let (a, b) = (path("a"), path("b"));
        index.declare(&b, id(1), FileTypes::REPLICA, 20);
        index.declare(&a, id(1), FileTypes::REPLICA, 30);
        let at = |index: &Index, gone: &PathId| {
            let found = index.locate(id(1), FileType::Sealed, |p| p != gone);
            found.cloned()
        };
        assert_eq!(at(&index, &path("x")), Some(b.clone()));
        assert_eq!(at(&index, &b), Some(a.clone()));
        assert!(index.only_on(&a).is_empty() && index.only_on(&b).is_empty());
        // One file less, and the other path has the only copy of it.
        index.drop(&a, id(1), FileType::Cache.into());
        assert_eq!(index.only_on(&b), [id(1)]);
        assert!(index.only_on(&a).is_empty());
        index.drop(&a, id(1), FileType::Sealed.into());
        // Nowhere to be reached: where it was is still told.
        assert_eq!(at(&index, &b), Some(b.clone()));
        index.drop(&b, id(1), FileTypes::REPLICA);
        assert_eq!(at(&index, &a), None);
    }

    proptest! {
        /// A list of declarations and their ends gives what a plain set of triples gives.
        #[test]
        fn the_index_is_a_set(steps in proptest::collection::vec(
            (any::<bool>(), 0u64..3, 0usize..3, 0usize..5), 0..60,
        )) {
            let mut index = Index::default();
            let mut plain = std::collections::BTreeSet::new();
            for (now, (adds, sector, at, file)) in (0u64..).zip(steps) {
                let (at, file) = (path(["a", "b", "c"][at]), FileType::ALL[file]);
                let key = (id(sector), at.clone(), file);
                if adds {
                    index.declare(&at, id(sector), file.into(), now);
                    plain.insert(key);
                } else {
                    index.drop(&at, id(sector), file.into());
                    plain.remove(&key);
                }
                for n in 0..3 {
                    for file in FileType::ALL {
                        let has = plain.iter().any(|(s, _, f)| (*s, *f) == (id(n), file));
                        let found = index.locate(id(n), file, |_| true).cloned();
                        prop_assert_eq!(found.is_some(), has);
                        if let Some(found) = found {
                            prop_assert!(plain.contains(&(id(n), found, file)));
                        }
                    }
                }
            }
        }
    }
}
