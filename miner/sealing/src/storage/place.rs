//! Which path takes new files: a decision over plain data.

use lotus_types::SectorId;

use super::meta::{FileType, FileTypes, PathId, PathMeta};

/// What files are put somewhere for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be worked on.
    Seal,
    /// To be kept and proven.
    Store,
}

/// New files.
#[derive(Clone, Copy, Debug)]
pub(super) struct Want<'a> {
    pub(super) sector: SectorId,
    pub(super) files: FileTypes,
    pub(super) purpose: Purpose,
    pub(super) bytes: u64,
    /// The path that they come from.
    pub(super) from: Option<&'a PathMeta>,
}

/// A path as the decision sees it.
#[derive(Clone, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) meta: &'a PathMeta,
    pub(super) read_only: bool,
    /// Why it gets no new files now.
    pub(super) trouble: Option<&'a str>,
    /// Bytes that it can still take.
    pub(super) room: u64,
}

/// Why a path does not take files.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is not healthy.
    #[error("{0}")]
    Trouble(String),
    /// Nothing new is put there.
    #[error("it is read-only, or of weight 0")]
    ReadOnly,
    /// Sectors are not sealed there.
    #[error("it is not for sealing")]
    NotForSealing,
    /// Sectors are not kept there.
    #[error("it is not for keeping sectors")]
    NotForKeeping,
    /// Its `AllowTypes` or `DenyTypes`.
    #[error("it does not take {0} files")]
    Type(&'static str),
    /// Its `AllowMiners` or `DenyMiners`.
    #[error("it does not take sectors of this miner")]
    Miner,
    /// `AllowTo` of the path that the files come from.
    #[error("it is in none of the groups {0} that the sector may go to")]
    Group(String),
    /// It is full.
    #[error("it has room for {room} bytes, and {bytes} are needed")]
    Full {
        /// Bytes that it can take.
        room: u64,
        /// Bytes that are needed.
        bytes: u64,
    },
}

/// Bytes that a path can still take: what the disk has free, and what its limit leaves, less what
/// is promised to others.
pub(super) const fn room(free: u64, used: u64, promised: u64, max: u64) -> u64 {
    let free = free.saturating_sub(promised);
    let left = if max == 0 {
        u64::MAX
    } else {
        max.saturating_sub(used).saturating_sub(promised)
    };
    if free < left { free } else { left }
}

/// Why this path does not take these files, if it does not.
pub(super) fn refusal(want: &Want<'_>, c: &Candidate<'_>) -> Option<Refusal> {
    let needed = want.purpose;
    if let Some(why) = c.trouble {
        return Some(Refusal::Trouble(why.to_owned()));
    }
    if c.read_only || c.meta.weight == 0 {
        return Some(Refusal::ReadOnly);
    }
    if needed == Purpose::Seal && !c.meta.can_seal {
        return Some(Refusal::NotForSealing);
    }
    if needed == Purpose::Store && !c.meta.can_store {
        return Some(Refusal::NotForKeeping);
    }
    // Scratch is no type of Lotus: no list names it.
    let named = want.files.iter().filter(|f| *f != FileType::Scratch);
    for file in named {
        if !c.meta.takes_type(file) {
            return Some(Refusal::Type(file.name()));
        }
    }
    if !c.meta.takes_miner(want.sector.miner) {
        return Some(Refusal::Miner);
    }
    if let Some(from) = want.from {
        let open = from.allow_to.is_empty();
        if !open && !c.meta.groups.iter().any(|g| from.allow_to.contains(g)) {
            return Some(Refusal::Group(from.allow_to.join(", ")));
        }
    }
    (c.room < want.bytes).then_some(Refusal::Full {
        room: c.room,
        bytes: want.bytes,
    })
}

/// The path that takes the files: of those that may, the one with the largest product of weight
/// and room. Source: lotus storage/paths/index.go, `StorageBestAlloc`.
pub(super) fn place<'a>(
    want: &Want<'_>,
    all: &[Candidate<'a>],
) -> Result<&'a PathId, Vec<(PathId, Refusal)>> {
    let mut refusals = Vec::new();
    let mut best: Option<(u128, &PathId)> = None;
    for c in all {
        match refusal(want, c) {
            Some(why) => refusals.push((c.meta.id.clone(), why)),
            None => {
                let value = u128::from(c.meta.weight) * u128::from(c.room);
                // Of equals the first, so that the answer does not change by itself.
                if best.is_none_or(|(most, _)| value > most) {
                    best = Some((value, &c.meta.id));
                }
            }
        }
    }
    best.map(|(_, id)| id).ok_or(refusals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lotus_types::{ActorId, SectorNumber};
    use proptest::prelude::*;

    const SECTOR: SectorId = SectorId {
        miner: ActorId(1000),
        number: SectorNumber(7),
    };

    fn meta(name: &str) -> PathMeta {
        PathMeta::new(name.parse().unwrap())
    }

    fn want(purpose: Purpose, bytes: u64) -> Want<'static> {
        Want {
            sector: SECTOR,
            files: FileTypes::REPLICA,
            purpose,
            bytes,
            from: None,
        }
    }

    fn open(meta: &PathMeta, room: u64) -> Candidate<'_> {
        Candidate {
            meta,
            read_only: false,
            trouble: None,
            room,
        }
    }

    #[test]
    fn each_rule_refuses_alone() {
        let strings = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut from = meta("from");
        from.allow_to = strings(&["cold", "warm"]);
        type Row = (&'static str, fn(&mut PathMeta), Purpose, Option<Refusal>);
        let rows: [Row; 9] = [
            ("as it is", |_| (), Purpose::Store, None),
            (
                "weight",
                |m| m.weight = 0,
                Purpose::Store,
                Some(Refusal::ReadOnly),
            ),
            (
                "seal",
                |m| m.can_seal = false,
                Purpose::Seal,
                Some(Refusal::NotForSealing),
            ),
            ("not asked", |m| m.can_seal = false, Purpose::Store, None),
            (
                "store",
                |m| m.can_store = false,
                Purpose::Store,
                Some(Refusal::NotForKeeping),
            ),
            (
                "types",
                |m| m.deny_types = vec!["cache".into()],
                Purpose::Store,
                Some(Refusal::Type("cache")),
            ),
            (
                "allowed types",
                |m| m.allow_types = vec!["cache".into()],
                Purpose::Store,
                Some(Refusal::Type("sealed")),
            ),
            (
                "miners",
                |m| m.allow_miners = vec!["t01001".into()],
                Purpose::Store,
                Some(Refusal::Miner),
            ),
            (
                "groups",
                |m| m.groups = vec!["hot".into()],
                Purpose::Store,
                Some(Refusal::Group("cold, warm".into())),
            ),
        ];
        for (what, change, purpose, expected) in rows {
            let mut path = meta("to");
            path.groups = strings(&["cold"]);
            change(&mut path);
            let want = Want {
                from: Some(&from),
                ..want(purpose, 10)
            };
            assert_eq!(refusal(&want, &open(&path, 10)), expected, "{what}");
        }
        let path = meta("to");
        let read_only = Candidate {
            read_only: true,
            ..open(&path, 10)
        };
        let sick = Candidate {
            trouble: Some("disk on fire"),
            ..open(&path, 10)
        };
        let small = open(&path, 9);
        let want = want(Purpose::Seal, 10);
        assert_eq!(refusal(&want, &read_only), Some(Refusal::ReadOnly));
        let fire = Refusal::Trouble("disk on fire".into());
        assert_eq!(refusal(&want, &sick), Some(fire));
        let full = Refusal::Full { room: 9, bytes: 10 };
        assert_eq!(refusal(&want, &small), Some(full));
    }

    #[test]
    fn scratch_is_named_in_no_list() {
        let mut path = meta("to");
        path.allow_types = vec!["sealed".into()];
        let scratch = Want {
            files: FileType::Scratch.into(),
            ..want(Purpose::Seal, 1)
        };
        assert_eq!(refusal(&scratch, &open(&path, 1)), None);
    }

    #[test]
    fn room_is_what_disk_and_limit_leave() {
        for (free, used, promised, max, want) in [
            (100, 0, 0, 0, 100),
            (100, 0, 30, 0, 70),
            (100, 40, 30, 100, 30),
            (100, 40, 30, 60, 0),
            (10, 0, 30, 0, 0),
            (100, 90, 0, 80, 0),
        ] {
            assert_eq!(room(free, used, promised, max), want);
        }
    }

    proptest! {
        /// Whatever the paths are: the one that is chosen refuses nothing, none that takes the
        /// files is worth more, and without one every path has its reason.
        #[test]
        fn the_best_of_those_that_may(
            paths in proptest::collection::vec(
                (0u64..4, any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), 0u64..100),
                0..8,
            ),
            seal in any::<bool>(),
            bytes in 0u64..100,
        ) {
            let metas: Vec<PathMeta> = paths.iter().enumerate().map(|(i, p)| {
                let mut m = meta(&format!("p{i}"));
                (m.weight, m.can_seal, m.can_store) = (p.0, p.1, p.2);
                m
            }).collect();
            let all: Vec<Candidate<'_>> = metas.iter().zip(&paths).map(|(meta, p)| Candidate {
                meta,
                read_only: p.3,
                trouble: p.4.then_some("sick"),
                room: p.5,
            }).collect();
            let purpose = if seal { Purpose::Seal } else { Purpose::Store };
            let want = want(purpose, bytes);
            let value = |c: &Candidate<'_>| u128::from(c.meta.weight) * u128::from(c.room);
            match place(&want, &all) {
                Ok(id) => {
                    let chosen = all.iter().find(|c| c.meta.id == *id).unwrap();
                    prop_assert_eq!(refusal(&want, chosen), None);
                    prop_assert!(!chosen.read_only && chosen.room >= bytes);
                    for other in all.iter().filter(|c| refusal(&want, c).is_none()) {
                        prop_assert!(value(other) <= value(chosen));
                    }
                }
                Err(refusals) => prop_assert_eq!(refusals.len(), all.len()),
            }
        }
    }
}
