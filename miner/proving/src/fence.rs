use async_trait::async_trait;
use cid::Cid;
use lotus_journal::{Journal, JournalError, Map};
use lotus_node_client::api::{BlockMsg, TipSet};
use lotus_types::{Epoch, EpochDelta, Kind};
use serde::{Deserialize, Serialize};

/// An entry of the mined-block log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mined {
    /// CIDs of the parents, in the tipset's order, as text.
    pub parents: Vec<String>,
    /// The signed block as it is published; `None` while it is not signed.
    pub block: Option<BlockMsg>,
    /// CID of the signed block, as text.
    pub cid: Option<String>,
}

/// Why no block may be made.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// There is a block at this height, or was about to be one.
    #[error("a block at height {height} is in the log already")]
    Height {
        /// The height.
        height: Epoch,
    },
    /// A block at another height has the same parents: a time-offset mining fault.
    #[error("the block in the log at height {other} has the same parents")]
    Parents {
        /// Height of that block.
        other: Epoch,
    },
    /// The parents are siblings of this miner's own block and leave it out: a parent-grinding
    /// fault.
    #[error("the parents at height {height} do not include this miner's own block {own}")]
    Grinding {
        /// Height of the parents.
        height: Epoch,
        /// CID of the own block.
        own: String,
    },
    /// The log no longer tells whether there was a block at this height.
    #[error("height {height} is far below the newest block in the log, at {newest}")]
    TooOld {
        /// The height.
        height: Epoch,
        /// Height of the newest entry.
        newest: Epoch,
    },
    /// A block was recorded that was not reserved, or twice.
    #[error("no reservation for a block at height {height}")]
    NotReserved {
        /// The height.
        height: Epoch,
    },
    /// The log can not be read or written.
    #[error("mined-block log: {0}")]
    Journal(#[from] JournalError),
    /// The store behind a shared fence does not answer.
    #[error("mined-block fence: {0}")]
    Store(String),
}

impl FenceError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Height { .. }
            | Self::Parents { .. }
            | Self::Grinding { .. }
            | Self::TooOld { .. } => Kind::Chain,
            Self::NotReserved { .. } => Kind::Fatal,
            Self::Journal(e) => e.kind(),
            Self::Store(_) => Kind::Transport,
        }
    }

    /// What the operator can do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Height { .. }
            | Self::Parents { .. }
            | Self::Grinding { .. }
            | Self::TooOld { .. } => {
                "nothing: this round is skipped, because a second block would be slashed".into()
            }
            Self::NotReserved { .. } => "report this with the log".into(),
            Self::Journal(e) => e.fix(),
            Self::Store(_) => "bring the store back; nothing is mined without it".into(),
        }
    }
}

/// The mined-block log: makes sure that of one miner actor no two blocks are signed that together
/// are a consensus fault.
///
/// A fence protects against those who use the same fence, and nobody else; [`Fence::scope`] says
/// who that is.
#[async_trait]
pub trait Fence: Send + Sync {
    /// Who is kept from mining at the same time, for operators.
    fn scope(&self) -> String;

    /// Reserves a height on these parents, durably, before anything is signed. Refuses a second
    /// block at one height whatever its parents, one on the same parents at another height, and
    /// one whose parents are siblings of an own block that they leave out. A reservation is never
    /// undone. Source of the faults: builtin-actors and FVM, verify_consensus_fault.
    async fn reserve(&self, height: Epoch, parents: &TipSet) -> Result<(), FenceError>;

    /// Records the signed block of a reservation, durably, before it is published.
    async fn signed(&self, height: Epoch, block: &BlockMsg) -> Result<(), FenceError>;

    /// The newest entry.
    async fn last(&self) -> Result<Option<(Epoch, Mined)>, FenceError>;

    /// The entry at a height.
    async fn at(&self, height: Epoch) -> Result<Option<Mined>, FenceError>;

    /// The height from which on every own block must be in the log. `head` is taken when it is
    /// asked for the first time, and kept.
    async fn complete_since(&self, head: Epoch) -> Result<Epoch, FenceError>;
}

const BLOCKS: Map<Epoch, Mined> = Map::new("mined.blocks");
/// The parents of every entry, and its height.
const PARENTS: Map<String, Epoch> = Map::new("mined.parents");
/// Entries this far below the newest are dropped: twice the finality of the networks, beyond which
/// nothing is slashed.
const KEEP: EpochDelta = EpochDelta(1_800);
const SINCE: Map<u64, Epoch> = Map::new("mined.since");

/// A fence on one host: the hub's own journal, which one process at a time can open.
#[derive(Clone)]
pub struct LocalFence(Journal);

impl LocalFence {
    /// The log in this journal.
    #[must_use]
    pub const fn new(journal: Journal) -> Self {
        Self(journal)
    }

    /// Runs a blocking call (one fsync) off the async threads.
    async fn blocking<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Journal) -> Result<R, FenceError> + Send + 'static,
    ) -> Result<R, FenceError> {
        let journal = self.0.clone();
        tokio::task::spawn_blocking(move || f(&journal))
            .await
            .unwrap_or_else(|e| Err(FenceError::Store(e.to_string())))
    }
}

fn texts(cids: &[Cid]) -> Vec<String> {
    cids.iter().map(Cid::to_string).collect()
}

/// What a block is to be built on.
struct On {
    /// CIDs of the parents, in the tipset's order.
    parents: Vec<String>,
    /// Their height.
    height: Epoch,
    /// What they are built on themselves, in the tipset's order.
    grandparents: Vec<String>,
}

fn reserve(journal: &Journal, height: Epoch, on: On) -> Result<(), FenceError> {
    let On {
        parents,
        height: parent_height,
        grandparents,
    } = on;
    let name = parents.join(",");
    journal.write(|tx| {
        if tx.get(&BLOCKS, &height)?.is_some() {
            return Err(FenceError::Height { height });
        }
        if let Some(other) = tx.get(&PARENTS, &name)? {
            return Err(FenceError::Parents { other });
        }
        // A block of the same height on another fork is no sibling.
        if let Some(own) = tx
            .get(&BLOCKS, &parent_height)?
            .filter(|m| m.parents == grandparents)
            .and_then(|m| m.cid)
            && !parents.contains(&own)
        {
            return Err(FenceError::Grinding {
                height: parent_height,
                own,
            });
        }
        if let Some((newest, _)) = tx.last(&BLOCKS)? {
            if height < newest - KEEP {
                return Err(FenceError::TooOld { height, newest });
            }
            for (old, entry) in tx.scan(&BLOCKS, None, 4)? {
                if old < newest - KEEP {
                    tx.remove(&BLOCKS, &old)?;
                    tx.remove(&PARENTS, &entry.parents.join(","))?;
                }
            }
        }
        tx.put(&PARENTS, &name, &height)?;
        let entry = Mined {
            parents,
            block: None,
            cid: None,
        };
        Ok(tx.put(&BLOCKS, &height, &entry)?)
    })
}

fn signed(journal: &Journal, height: Epoch, block: BlockMsg) -> Result<(), FenceError> {
    journal.write(|tx| {
        let mut entry = tx
            .get(&BLOCKS, &height)?
            .filter(|m| m.block.is_none() && m.parents == texts(&block.header.parents))
            .ok_or(FenceError::NotReserved { height })?;
        entry.cid = Some(block.header.cid().to_string());
        entry.block = Some(block);
        Ok(tx.put(&BLOCKS, &height, &entry)?)
    })
}

#[async_trait]
impl Fence for LocalFence {
    fn scope(&self) -> String {
        "hubs in this network namespace; others only by their blocks on chain, such as those in \
         other containers or on other hosts"
            .into()
    }

    async fn reserve(&self, height: Epoch, parents: &TipSet) -> Result<(), FenceError> {
        let on = On {
            parents: texts(&parents.cids),
            height: parents.height,
            grandparents: texts(&parents.parents().0),
        };
        self.blocking(move |j| reserve(j, height, on)).await
    }

    async fn signed(&self, height: Epoch, block: &BlockMsg) -> Result<(), FenceError> {
        let block = block.clone();
        self.blocking(move |j| signed(j, height, block)).await
    }

    async fn last(&self) -> Result<Option<(Epoch, Mined)>, FenceError> {
        self.blocking(|j| j.read(|v| Ok(v.last(&BLOCKS)?))).await
    }

    async fn at(&self, height: Epoch) -> Result<Option<Mined>, FenceError> {
        self.blocking(move |j| j.read(|v| Ok(v.get(&BLOCKS, &height)?)))
            .await
    }

    async fn complete_since(&self, head: Epoch) -> Result<Epoch, FenceError> {
        self.blocking(move |j| {
            // Asked in every round; written once.
            if let Some(since) = j.read::<_, FenceError>(|v| Ok(v.get(&SINCE, &0)?))? {
                return Ok(since);
            }
            j.write(|tx| {
                if let Some(since) = tx.get(&SINCE, &0)? {
                    return Ok(since);
                }
                tx.put(&SINCE, &0, &head)?;
                Ok(head)
            })
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn open(path: &std::path::Path) -> Journal {
        Journal::open(&path.join("journal")).unwrap()
    }

    fn on(parents: Vec<String>, height: i64, grandparents: &[&str]) -> On {
        On {
            parents,
            height: Epoch(height),
            grandparents: grandparents.iter().map(ToString::to_string).collect(),
        }
    }

    #[derive(Clone, Debug)]
    struct Try {
        height: i64,
        parents: BTreeSet<u8>,
        parent_height: i64,
        /// Whether the process dies and comes back after it.
        reopen: bool,
    }

    fn a_try() -> impl Strategy<Value = Try> {
        (
            1i64..12,
            prop::collection::btree_set(0u8..4, 1..3),
            any::<bool>(),
        )
            .prop_map(|(height, parents, reopen)| Try {
                height,
                // The same blocks are always of the same height.
                parent_height: i64::from(parents.iter().sum::<u8>()) % height,
                parents,
                reopen,
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn no_height_and_no_parents_twice(tries in prop::collection::vec(a_try(), 1..24)) {
            let dir = tempfile::tempdir().unwrap();
            let mut journal = open(dir.path());
            let mut granted: BTreeMap<i64, BTreeSet<u8>> = BTreeMap::new();
            for t in tries {
                let names: Vec<String> = t.parents.iter().map(|p| format!("block{p}")).collect();
                let on = on(names, t.parent_height, &[]);
                let result = reserve(&journal, Epoch(t.height), on);
                let fresh = !granted.contains_key(&t.height)
                    && !granted.values().any(|p| *p == t.parents);
                prop_assert_eq!(result.is_ok(), fresh, "{:?} after {:?}", t, granted);
                if fresh {
                    granted.insert(t.height, t.parents);
                }
                if t.reopen {
                    drop(journal);
                    journal = open(dir.path());
                }
            }
        }
    }

    #[test]
    fn siblings_of_the_own_block_without_it_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        let parents = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let build = |names: &[&str], height, grandparents: &[&str]| {
            reserve(
                &journal,
                Epoch(height + 1),
                on(parents(names), height, grandparents),
            )
        };
        build(&["a"], 4, &["z"]).unwrap();
        // Reserved only: there is no own block that the parents could lack.
        build(&["x"], 5, &["a"]).unwrap();
        journal
            .write::<_, JournalError>(|tx| {
                let entry = Mined {
                    parents: parents(&["x"]),
                    block: None,
                    cid: Some("own".into()),
                };
                tx.put(&BLOCKS, &Epoch(6), &entry)
            })
            .unwrap();
        let grinding = build(&["y"], 6, &["x"]);
        assert!(
            matches!(grinding, Err(FenceError::Grinding { .. })),
            "{grinding:?}"
        );
        // After a reorg: of the same height, but on other parents.
        build(&["w"], 6, &["v"]).unwrap();
    }

    #[test]
    fn parents_with_the_own_block_are_good() {
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        journal
            .write::<_, JournalError>(|tx| {
                let entry = Mined {
                    parents: vec!["x".into()],
                    block: None,
                    cid: Some("own".into()),
                };
                tx.put(&BLOCKS, &Epoch(6), &entry)
            })
            .unwrap();
        let both = vec!["y".to_owned(), "own".to_owned()];
        reserve(&journal, Epoch(7), on(both, 6, &["x"])).unwrap();
    }

    #[test]
    fn old_entries_go_and_their_heights_stay_refused() {
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        for height in [1, 2, 5000, 5001] {
            let parents = vec![format!("p{height}")];
            reserve(&journal, Epoch(height), on(parents, height - 1, &[])).unwrap();
        }
        let left = journal
            .read::<_, JournalError>(|v| v.scan(&BLOCKS, None, 9))
            .unwrap();
        let left: Vec<i64> = left.into_iter().map(|(h, _)| h.0).collect();
        assert_eq!(left, [5000, 5001]);
        let old = reserve(&journal, Epoch(2), on(vec!["q".into()], 1, &[]));
        assert!(matches!(old, Err(FenceError::TooOld { .. })), "{old:?}");
    }

    #[tokio::test]
    async fn the_log_is_complete_since_it_was_begun() {
        let dir = tempfile::tempdir().unwrap();
        {
            let fence = LocalFence::new(open(dir.path()));
            assert_eq!(fence.complete_since(Epoch(40)).await.unwrap(), Epoch(40));
        }
        let fence = LocalFence::new(open(dir.path()));
        assert_eq!(fence.complete_since(Epoch(90)).await.unwrap(), Epoch(40));
        assert!(fence.last().await.unwrap().is_none());
    }
}
