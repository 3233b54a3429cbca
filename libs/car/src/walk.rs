use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use cid::Cid;
use ipld_core::ipld::Ipld;

use crate::hamt::{self, Position};
use crate::links::{BadNode, links};
use crate::memory::{Held, WalkMemory};
use crate::unixfs::{self, Node, kind};
use crate::{BadBlock, DAG_CBOR, DAG_JSON, DAG_PB, Link, RAW, verify};

/// Links that wait to be followed; a hostile DAG cannot make a walk use more memory.
const MAX_PENDING: usize = 1 << 20;
/// Blocks that a walk without duplicates remembers, at 16 bytes each.
const MAX_SEEN: usize = 1 << 22;
/// Nodes that a walk visits without yielding one: a DAG of duplicates can be 2^n nodes wide.
const MAX_SILENT: usize = 1 << 20;
/// Bytes of nodes that a walk reads again without yielding one: each costs a read and a hash.
const MAX_REREAD: usize = 256 << 20;
/// What a small node counts for there.
const MIN_REREAD: usize = 16 << 10;
/// Segments of a path.
const MAX_PATH: usize = 256;
/// Bytes of memory for a block that is remembered, with what the set adds to its 16.
const SEEN_COST: usize = 18;
/// Bytes of memory for each link of a dag-pb node while it is decoded.
const LINK_COST: usize = 256;
/// Bytes of memory for each byte of dag-cbor or dag-json while its links are looked for: the
/// smallest link or value has a few bytes.
const NODE_COST: usize = 16;
/// Bytes of memory for each byte of such a node while it is a value: the smallest has one byte.
const VALUE_COST: usize = 80;

/// How much of a DAG. Source: ipfs/specs, trustless-gateway.md, `dag-scope`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scope {
    /// The block at the end of the path.
    Block,
    /// What it takes to read one file or to list one folder.
    Entity,
    /// Everything below.
    #[default]
    All,
}

/// Bytes of a file, both ends included. Negative numbers count from the end of the file.
/// Source: ipfs/specs, trustless-gateway.md, `entity-bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub from: i64,
    /// Last byte; `None` is the end of the file.
    pub to: Option<i64>,
}

/// What a walk yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Selector {
    /// How much of the DAG at the end of the path.
    pub scope: Scope,
    /// Only the blocks that hold these bytes, when the path ends at a file; implies
    /// [`Scope::Entity`].
    pub bytes: Option<ByteRange>,
    /// Yield a block each time that it occurs.
    pub duplicates: bool,
}

/// Why a walk stops.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The source does not have a block.
    #[error("block {0} is missing")]
    Missing(Cid),
    /// The source failed.
    #[error("reading block {cid}: {source}")]
    Read {
        /// The block.
        cid: Cid,
        /// The source's error.
        source: io::Error,
    },
    /// The source gave other bytes.
    #[error("a block is corrupt: {0}")]
    Corrupt(#[from] BadBlock),
    /// A block that cannot be decoded.
    #[error("the DAG cannot be followed: {0}")]
    Node(#[from] BadNode),
    /// The path leads nowhere.
    #[error("nothing is named {segment:?} on this path")]
    NoSuchPath {
        /// The first segment that was not found.
        segment: String,
    },
    /// The bytes asked for are all outside of the file.
    #[error("the range is outside of the file's {size} bytes")]
    OutOfRange {
        /// Length of the file.
        size: u64,
    },
    /// All walks together use the memory that they may.
    #[error("requests for DAGs use the {limit} bytes that they may use together")]
    Busy {
        /// The limit.
        limit: usize,
    },
    /// A DAG that no honest program makes.
    #[error("the DAG is too wide: more than {limit} {what}")]
    TooWide {
        /// What there are too many of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
}

/// Goes through a DAG depth first and yields its blocks, verified, in the order of their links.
///
/// Identity CIDs are followed but never yielded. A missing or corrupt block ends the walk with
/// an error. Memory is bounded whatever the DAG.
pub struct Walk<G> {
    get: G,
    duplicates: bool,
    /// Next step last.
    stack: Vec<Step>,
    seen: HashSet<(u64, u64)>,
    keys: (RandomState, RandomState),
    memory: Held,
    done: bool,
}

enum Step {
    /// The block alone.
    One(Link),
    /// The block and all below.
    All(Link),
    /// The shard and the shards below.
    Shard(Link),
    /// The blocks of the file node at byte `start` of the file that hold bytes of the range.
    File {
        link: Link,
        start: u64,
        range: (u64, u64),
    },
}

impl<G: FnMut(&Cid) -> io::Result<Option<Bytes>>> Walk<G> {
    /// Resolves `path` below `root`. Every block on the path is read here, so that a caller can
    /// still answer "not found" before the first block is sent.
    pub fn new(root: &Cid, path: &[String], select: Selector, get: G) -> Result<Self, WalkError> {
        Self::start(None, root, path, select, get)
    }

    /// [`Walk::new`], with memory that this walk shares with others.
    pub fn within(
        memory: &Arc<WalkMemory>,
        root: &Cid,
        path: &[String],
        select: Selector,
        get: G,
    ) -> Result<Self, WalkError> {
        Self::start(Some(memory.clone()), root, path, select, get)
    }

    fn start(
        memory: Option<Arc<WalkMemory>>,
        root: &Cid,
        path: &[String],
        select: Selector,
        get: G,
    ) -> Result<Self, WalkError> {
        let mut walk = Self {
            get,
            duplicates: select.duplicates,
            stack: Vec::new(),
            seen: HashSet::new(),
            keys: Default::default(),
            memory: Held::none(memory),
            done: false,
        };
        let (passed, target) = walk.resolve(root.into(), path)?;
        let last = walk.target(target, &select)?;
        walk.stack.push(last);
        walk.stack.extend(passed.into_iter().rev().map(Step::One));
        Ok(walk)
    }

    fn load(&mut self, link: &Link) -> Result<Bytes, WalkError> {
        match link {
            Link::Inline(inline) => Ok(inline.data.clone()),
            Link::Block(cid) => {
                let data = (self.get)(cid)
                    .map_err(|source| WalkError::Read { cid: *cid, source })?
                    .ok_or(WalkError::Missing(*cid))?;
                verify(cid, &data)?;
                Ok(data)
            }
        }
    }

    /// A dag-pb node. What it takes to decode it is lent for as long as that.
    fn node(&self, data: &Bytes) -> Result<Node, WalkError> {
        let _lent = self.lend_links(data)?;
        Ok(Node::decode(data)?)
    }

    fn lend_links(&self, data: &[u8]) -> Result<Held, WalkError> {
        let links = unixfs::count_links(data)?;
        // And the sizes of a file's parts, 8 bytes for every two.
        let own = data.len().saturating_mul(4);
        self.memory
            .lend(links.saturating_mul(LINK_COST).saturating_add(own))
    }

    /// The links of a node of any codec.
    fn links(&self, codec: u64, data: &Bytes) -> Result<Vec<Link>, WalkError> {
        let _lent = match codec {
            DAG_PB => self.lend_links(data)?,
            RAW => self.memory.lend(0)?,
            _ => self.memory.lend(data.len().saturating_mul(NODE_COST))?,
        };
        Ok(links(codec, data)?)
    }

    /// The blocks before the end of the path, and the link at its end.
    fn resolve(&mut self, root: Link, path: &[String]) -> Result<(Vec<Link>, Link), WalkError> {
        let mut passed = Vec::new();
        let mut here = root;
        let mut path = path;
        if path.len() > MAX_PATH {
            return Err(WalkError::TooWide {
                what: "segments in a path",
                limit: MAX_PATH,
            });
        }
        while let Some((segment, rest)) = path.split_first() {
            let absent = || WalkError::NoSuchPath {
                segment: segment.clone(),
            };
            let data = self.load(&here)?;
            match here.codec() {
                DAG_PB => {
                    let node = self.node(&data)?;
                    let next = if let Some(fanout) = node.unixfs.as_ref().and_then(hamt::fanout) {
                        let mut at = Position::of(segment);
                        self.in_shard(node, fanout, segment, &mut at, &mut here, &mut passed)?
                    } else {
                        node.links
                            .into_iter()
                            .find(|l| l.name == *segment)
                            .map(|l| l.link)
                    };
                    passed.push(std::mem::replace(&mut here, next.ok_or_else(absent)?));
                    path = rest;
                }
                DAG_CBOR | DAG_JSON => {
                    let _lent = self.memory.lend(data.len().saturating_mul(VALUE_COST))?;
                    let value = decode(here.codec(), &data)?;
                    let (next, used) =
                        descend(&value, path).map_err(|i| WalkError::NoSuchPath {
                            segment: path.get(i).cloned().unwrap_or_default(),
                        })?;
                    path = &path[used..];
                    match next {
                        Some(next) => passed.push(std::mem::replace(&mut here, next)),
                        // The path ends inside this block.
                        None => break,
                    }
                }
                _ => return Err(absent()),
            }
        }
        Ok((passed, here))
    }

    /// Finds a name in a sharded folder. Goes down in `here`, noting the shards passed.
    fn in_shard(
        &mut self,
        mut node: Node,
        fanout: u64,
        name: &str,
        at: &mut Position,
        here: &mut Link,
        passed: &mut Vec<Link>,
    ) -> Result<Option<Link>, WalkError> {
        let digits = hamt::prefix_len(fanout);
        while let Some(i) = at.next(fanout) {
            let prefix = format!("{i:0digits$X}");
            let child = node.links.into_iter().find(|l| {
                l.name
                    .strip_prefix(&prefix)
                    .is_some_and(|n| n.is_empty() || n == name)
            });
            match child {
                None => return Ok(None),
                Some(c) if c.name.len() > digits => return Ok(Some(c.link)),
                Some(c) => {
                    passed.push(std::mem::replace(here, c.link));
                    let data = self.load(here)?;
                    node = self.node(&data)?;
                    if node.unixfs.as_ref().and_then(hamt::fanout) != Some(fanout) {
                        return Ok(None);
                    }
                }
            }
        }
        Ok(None)
    }

    fn target(&mut self, link: Link, select: &Selector) -> Result<Step, WalkError> {
        let data = self.load(&link)?;
        let entity = select.bytes.is_some() || select.scope == Scope::Entity;
        if !entity {
            return Ok(match select.scope {
                Scope::Block => Step::One(link),
                _ => Step::All(link),
            });
        }
        let (size, shard) = match link.codec() {
            RAW => (Some(data.len() as u64), false),
            DAG_PB => {
                let node = self.node(&data)?;
                (node.file_size(), node.kind() == Some(kind::HAMT_SHARD))
            }
            _ => (None, false),
        };
        Ok(match (size, select.bytes) {
            (None, _) if shard => Step::Shard(link),
            (None, _) => Step::One(link),
            (Some(_), None) => Step::All(link),
            (Some(size), Some(bytes)) => match within(bytes, size)? {
                Some(range) => Step::File {
                    link,
                    start: 0,
                    range,
                },
                None => Step::One(link),
            },
        })
    }

    /// Notes a block; false when it was yielded before and duplicates are not wanted.
    fn note(&mut self, cid: &Cid) -> Result<bool, WalkError> {
        if self.duplicates {
            return Ok(true);
        }
        if self.seen.len() == self.seen.capacity() {
            let next = self.seen.capacity().saturating_mul(2).max(64);
            self.reach(next, self.stack.capacity())?;
            self.seen.reserve(next - self.seen.len());
        }
        let key = (self.keys.0.hash_one(cid), self.keys.1.hash_one(cid));
        let new = self.seen.insert(key);
        if self.seen.len() > MAX_SEEN {
            return Err(WalkError::TooWide {
                what: "blocks to keep apart; ask for duplicates",
                limit: MAX_SEEN,
            });
        }
        Ok(new)
    }

    /// Has memory for as many blocks and steps.
    fn reach(&mut self, seen: usize, steps: usize) -> Result<(), WalkError> {
        let steps = steps.saturating_mul(size_of::<Step>());
        self.memory
            .reach(seen.saturating_mul(SEEN_COST).saturating_add(steps))
    }

    fn push(&mut self, steps: impl DoubleEndedIterator<Item = Step>) -> Result<(), WalkError> {
        // At most as many as a node has links.
        let more = steps.size_hint().1.unwrap_or_default();
        let want = self.stack.len().saturating_add(more);
        if want > self.stack.capacity() {
            let next = want.max(self.stack.capacity().saturating_mul(2));
            self.reach(self.seen.capacity(), next)?;
            self.stack.reserve_exact(next - self.stack.len());
        }
        self.stack.extend(steps.rev());
        if self.stack.len() > MAX_PENDING {
            return Err(WalkError::TooWide {
                what: "links wait to be followed",
                limit: MAX_PENDING,
            });
        }
        Ok(())
    }

    fn step(&mut self) -> Result<Option<(Cid, Bytes)>, WalkError> {
        let mut reread = 0;
        for _ in 0..MAX_SILENT {
            let Some(step) = self.stack.pop() else {
                return Ok(None);
            };
            let (Step::One(link) | Step::All(link) | Step::Shard(link) | Step::File { link, .. }) =
                &step;
            let link = link.clone();
            let fresh = match &link {
                Link::Block(cid) => self.note(cid)?,
                Link::Inline(_) => true,
            };
            // The part of a file below a known node may still be another part.
            if !fresh && !matches!(step, Step::File { .. }) {
                continue;
            }
            if !fresh && link.codec() == RAW {
                continue;
            }
            let data = self.load(&link)?;
            if !fresh {
                reread += data.len().max(MIN_REREAD);
                if reread > MAX_REREAD {
                    return Err(WalkError::TooWide {
                        what: "bytes of repeated nodes",
                        limit: MAX_REREAD,
                    });
                }
            }
            match step {
                Step::One(_) => {}
                Step::All(_) => {
                    let below = self.links(link.codec(), &data)?;
                    self.push(below.into_iter().map(Step::All))?;
                }
                Step::Shard(_) => {
                    let node = self.node(&data)?;
                    if let Some(fanout) = node.unixfs.as_ref().and_then(hamt::fanout) {
                        let digits = hamt::prefix_len(fanout);
                        let shards = node.links.into_iter().filter(|l| l.name.len() == digits);
                        self.push(shards.map(|l| Step::Shard(l.link)))?;
                    }
                }
                Step::File { start, range, .. } if link.codec() == DAG_PB => {
                    let parts = file_parts(self.node(&data)?, start, range);
                    self.push(parts.into_iter())?;
                }
                Step::File { .. } => {}
            }
            if let (true, Link::Block(cid)) = (fresh, link) {
                return Ok(Some((cid, data)));
            }
        }
        Err(WalkError::TooWide {
            what: "repeated nodes",
            limit: MAX_SILENT,
        })
    }
}

impl<G: FnMut(&Cid) -> io::Result<Option<Bytes>>> Iterator for Walk<G> {
    type Item = Result<(Cid, Bytes), WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.step().transpose();
        self.done = !matches!(next, Some(Ok(_)));
        next
    }
}

/// Walks from `root` on, each block once.
pub fn walk<G: FnMut(&Cid) -> io::Result<Option<Bytes>>>(
    root: &Cid,
    scope: Scope,
    get: G,
) -> Result<Walk<G>, WalkError> {
    let select = Selector {
        scope,
        ..Selector::default()
    };
    Walk::new(root, &[], select, get)
}

/// The children of a file node that hold bytes of the range.
fn file_parts(node: Node, start: u64, (from, to): (u64, u64)) -> Vec<Step> {
    let range = (from, to);
    let Some(data) = node.unixfs else {
        return Vec::new();
    };
    let sizes = data.blocksizes;
    // Without sizes nobody can tell which child holds what.
    let known = sizes.len() == node.links.len();
    let mut at = start.saturating_add(data.data.map_or(0, |d| d.len() as u64));
    let mut parts = Vec::new();
    for (i, l) in node.links.into_iter().enumerate() {
        let end = at.saturating_add(sizes.get(i).copied().unwrap_or(0));
        if !known || (at <= to && end > from) {
            parts.push(Step::File {
                link: l.link,
                start: at,
                range,
            });
        }
        at = end;
    }
    parts
}

/// First and last byte of a range in a file of `size` bytes; `None` when it has no byte.
fn within(range: ByteRange, size: u64) -> Result<Option<(u64, u64)>, WalkError> {
    let place = |at: i64| match at {
        0.. => i128::from(at),
        _ => i128::from(size) + i128::from(at),
    };
    let last = i128::from(size) - 1;
    let from = place(range.from);
    let to = range.to.map_or(last, place);
    if size > 0 && (from > last || to < 0) {
        return Err(WalkError::OutOfRange { size });
    }
    let (from, to) = (from.max(0), to.min(last));
    match (u64::try_from(from), u64::try_from(to)) {
        (Ok(from), Ok(to)) if from <= to => Ok(Some((from, to))),
        _ => Ok(None),
    }
}

fn decode(codec: u64, data: &[u8]) -> Result<Ipld, BadNode> {
    let bad = |e: &dyn std::fmt::Display| BadNode {
        codec,
        why: e.to_string(),
    };
    if codec == DAG_JSON {
        serde_ipld_dagjson::from_slice(data).map_err(|e| bad(&e))
    } else {
        serde_ipld_dagcbor::from_slice(data).map_err(|e| bad(&e))
    }
}

/// Follows as much of `path` as lies in one block: the link met and the segments used, or no
/// link when the path ends inside. Errs with the index of a segment that is not there.
fn descend(value: &Ipld, path: &[String]) -> Result<(Option<Link>, usize), usize> {
    let mut here = value;
    let mut used = 0;
    loop {
        if let Ipld::Link(cid) = here {
            return Ok((Some(cid.into()), used));
        }
        let Some(segment) = path.get(used) else {
            return Ok((None, used));
        };
        let next = match here {
            Ipld::Map(map) => map.get(segment),
            Ipld::List(list) => segment.parse::<usize>().ok().and_then(|i| list.get(i)),
            _ => None,
        };
        here = next.ok_or(used)?;
        used += 1;
    }
}
