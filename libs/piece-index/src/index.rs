use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lotus_car::{CarError, CarReader};
use lotus_types::{Commitment, Kind, PieceCid};
use multihash::Multihash;
use redb::{
    Database, MultimapTableDefinition, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    TableDefinition,
};

/// commP to the piece's number here and its number of entries.
const PIECES: TableDefinition<'_, &[u8; 32], (u64, u64)> = TableDefinition::new("pieces");
/// The piece's number to commP.
const NUMBERS: TableDefinition<'_, u64, &[u8; 32]> = TableDefinition::new("numbers");
/// Multihash to the numbers of the pieces that hold it.
const HOLDERS: MultimapTableDefinition<'_, &[u8], u64> = MultimapTableDefinition::new("holders");
/// Piece number and multihash to offset and length.
const ENTRIES: TableDefinition<'_, (u64, &[u8]), (u64, u32)> = TableDefinition::new("entries");
/// The next piece number, and the event that the follower has seen.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const NEXT_NUMBER: &str = "next-number";
const CURSOR: &str = "cursor";
/// Pieces returned for one multihash.
const MAX_HOLDERS: usize = 16;

/// A block of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What it hashes to.
    pub hash: Multihash<64>,
    /// Where its bytes start in the piece.
    pub offset: u64,
    /// How many bytes it has.
    pub len: u32,
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// The piece that holds it.
    pub piece: PieceCid,
    /// Where its bytes start in the piece.
    pub offset: u64,
    /// How many bytes it has.
    pub len: u32,
}

/// Why the index failed.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Another process has the file open.
    #[error("the index {} is in use by another process", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// The disk is full; nothing was changed.
    #[error("no space left on the disk of the index")]
    DiskFull,
    /// The file cannot be read or written.
    #[error("index: {0}")]
    Store(Box<redb::Error>),
    /// The piece is no CAR that can be indexed.
    #[error("piece {piece} cannot be indexed: {source}")]
    Car {
        /// The piece.
        piece: PieceCid,
        /// What is wrong with it.
        source: Box<CarError>,
    },
}

impl IndexError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Locked { .. } => Kind::Config,
            Self::DiskFull => Kind::Capacity,
            Self::Store(_) => Kind::Fatal,
            // Reading a leased piece can fail for reasons that pass.
            Self::Car { source, .. } if matches!(**source, CarError::Read { .. }) => {
                Kind::Transport
            }
            Self::Car { source, .. } => source.kind(),
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Locked { path } => format!(
                "stop the other process (`fuser {}` names it), or give this one its own --repo",
                path.display()
            ),
            Self::DiskFull => "free space on the disk that holds the repo; it is retried".into(),
            Self::Store(_) => {
                "check the disk; the index can be deleted, it is rebuilt from the pieces".into()
            }
            Self::Car { source, .. } => source.fix(),
        }
    }
}

impl<E: Into<redb::Error>> From<E> for IndexError {
    fn from(e: E) -> Self {
        match e.into() {
            redb::Error::Io(io) if io.kind() == std::io::ErrorKind::StorageFull => Self::DiskFull,
            other => Self::Store(Box::new(other)),
        }
    }
}

/// The index, on disk. Clones share it. Calls block for disk reads; changes for one fsync.
#[derive(Clone, Debug)]
pub struct PieceIndex {
    db: Arc<Database>,
}

impl PieceIndex {
    /// Opens the index, or makes a new one.
    pub fn open(path: &Path) -> Result<Self, IndexError> {
        let db = Database::create(path).map_err(|e| match e {
            redb::DatabaseError::DatabaseAlreadyOpen => IndexError::Locked { path: path.into() },
            e => e.into(),
        })?;
        let tx = db.begin_write()?;
        tx.open_table(PIECES)?;
        tx.open_table(NUMBERS)?;
        tx.open_multimap_table(HOLDERS)?;
        tx.open_table(ENTRIES)?;
        tx.open_table(META)?;
        tx.commit()?;
        Ok(Self { db: Arc::new(db) })
    }

    /// Adds a piece with all its entries, or nothing of it. Of entries with one multihash the
    /// first counts. Returns how many entries the piece has; a piece that is known is left as
    /// it is.
    pub fn add_piece<E: From<IndexError>>(
        &self,
        piece: &PieceCid,
        entries: impl IntoIterator<Item = Result<Entry, E>>,
    ) -> Result<u64, E> {
        fn own<E: From<IndexError>>(e: impl Into<redb::Error>) -> E {
            IndexError::from(e).into()
        }
        let tx = self.db.begin_write().map_err(own)?;
        let mut count = 0;
        {
            let mut pieces = tx.open_table(PIECES).map_err(own)?;
            let known = pieces.get(&piece.commitment().0).map_err(own)?;
            if let Some(known) = known.map(|p| p.value().1) {
                return Ok(known);
            }
            let mut meta = tx.open_table(META).map_err(own)?;
            let number = meta.get(NEXT_NUMBER).map_err(own)?.map_or(0, |n| n.value());
            meta.insert(NEXT_NUMBER, number + 1).map_err(own)?;
            let mut all = tx.open_table(ENTRIES).map_err(own)?;
            let mut holders = tx.open_multimap_table(HOLDERS).map_err(own)?;
            for entry in entries {
                let Entry { hash, offset, len } = entry?;
                let hash = hash.to_bytes();
                // Asking the multimap alone decides whether the hash is new in this piece.
                if !holders.insert(&hash[..], number).map_err(own)? {
                    all.insert((number, &hash[..]), (offset, len))
                        .map_err(own)?;
                    count += 1;
                }
            }
            pieces
                .insert(&piece.commitment().0, (number, count))
                .map_err(own)?;
            tx.open_table(NUMBERS)
                .map_err(own)?
                .insert(number, &piece.commitment().0)
                .map_err(own)?;
        }
        tx.commit().map_err(own)?;
        Ok(count)
    }

    /// Adds a piece that is a CAR: every block is checked and indexed.
    pub fn add_car(&self, piece: &PieceCid, car: impl Read) -> Result<u64, IndexError> {
        let failed = |source: CarError| IndexError::Car {
            piece: *piece,
            source: source.into(),
        };
        let blocks = CarReader::new(car).map_err(failed)?;
        self.add_piece(
            piece,
            blocks.map(|b| {
                let b = b.map_err(failed)?;
                Ok(Entry {
                    hash: *b.cid.hash(),
                    offset: b.offset,
                    len: u32::try_from(b.data.len()).expect("a block has at most 8 MiB"),
                })
            }),
        )
    }

    /// Forgets a piece. False when it was not known.
    pub fn remove_piece(&self, piece: &PieceCid) -> Result<bool, IndexError> {
        let tx = self.db.begin_write()?;
        {
            let mut pieces = tx.open_table(PIECES)?;
            let known = pieces.remove(&piece.commitment().0)?.map(|p| p.value().0);
            let Some(number) = known else {
                return Ok(false);
            };
            tx.open_table(NUMBERS)?.remove(number)?;
            let mut all = tx.open_table(ENTRIES)?;
            let mut holders = tx.open_multimap_table(HOLDERS)?;
            let of_piece = (number, &[][..])..(number + 1, &[][..]);
            for entry in all.extract_from_if(of_piece, |_, _| true)? {
                holders.remove(entry?.0.value().1, number)?;
            }
        }
        tx.commit()?;
        Ok(true)
    }

    /// The pieces that hold a block, at most 16.
    pub fn find(&self, hash: &Multihash<64>) -> Result<Vec<Location>, IndexError> {
        let tx = self.db.begin_read()?;
        let numbers = tx.open_table(NUMBERS)?;
        let all = tx.open_table(ENTRIES)?;
        let hash = hash.to_bytes();
        let mut found = Vec::new();
        for number in tx
            .open_multimap_table(HOLDERS)?
            .get(&hash[..])?
            .take(MAX_HOLDERS)
        {
            let number = number?.value();
            let (Some(piece), Some(at)) = (numbers.get(number)?, all.get((number, &hash[..]))?)
            else {
                continue;
            };
            let (offset, len) = at.value();
            found.push(Location {
                piece: PieceCid::new(Commitment(*piece.value())),
                offset,
                len,
            });
        }
        Ok(found)
    }

    /// Whether a piece is indexed.
    pub fn has_piece(&self, piece: &PieceCid) -> Result<bool, IndexError> {
        let tx = self.db.begin_read()?;
        Ok(tx.open_table(PIECES)?.get(&piece.commitment().0)?.is_some())
    }

    /// Every piece, with its number of entries.
    pub fn pieces(&self) -> Result<Vec<(PieceCid, u64)>, IndexError> {
        let tx = self.db.begin_read()?;
        let mut out = Vec::new();
        for piece in tx.open_table(PIECES)?.iter()? {
            let (cid, at) = piece?;
            out.push((PieceCid::new(Commitment(*cid.value())), at.value().1));
        }
        Ok(out)
    }

    /// Blocks in all pieces together.
    pub fn len(&self) -> Result<u64, IndexError> {
        Ok(self.db.begin_read()?.open_table(ENTRIES)?.len()?)
    }

    /// Whether there are no blocks.
    pub fn is_empty(&self) -> Result<bool, IndexError> {
        Ok(self.len()? == 0)
    }

    /// Up to `limit` entries of a piece behind `after`, sorted by multihash.
    pub fn entries(
        &self,
        piece: &PieceCid,
        after: Option<&Multihash<64>>,
        limit: usize,
    ) -> Result<Vec<Entry>, IndexError> {
        let tx = self.db.begin_read()?;
        let known = tx.open_table(PIECES)?.get(&piece.commitment().0)?;
        let Some(number) = known.map(|p| p.value().0) else {
            return Ok(Vec::new());
        };
        let all = tx.open_table(ENTRIES)?;
        // A zero behind the last key is the smallest key above it.
        let from = after.map_or_else(Vec::new, |h| [&h.to_bytes()[..], &[0]].concat());
        let range = (number, &from[..])..(number + 1, &[][..]);
        let mut out = Vec::new();
        for entry in all.range(range)?.take(limit) {
            let (key, at) = entry?;
            let (offset, len) = at.value();
            if let Ok(hash) = Multihash::from_bytes(key.value().1) {
                out.push(Entry { hash, offset, len });
            }
        }
        Ok(out)
    }

    /// The last hub event that was taken in.
    pub(crate) fn cursor(&self) -> Result<u64, IndexError> {
        let tx = self.db.begin_read()?;
        Ok(tx.open_table(META)?.get(CURSOR)?.map_or(0, |n| n.value()))
    }

    pub(crate) fn set_cursor(&self, seq: u64) -> Result<(), IndexError> {
        let tx = self.db.begin_write()?;
        tx.open_table(META)?.insert(CURSOR, seq)?;
        tx.commit()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use multihash_codetable::{Code, MultihashDigest};
    use proptest::prelude::*;

    use super::*;

    fn piece(n: u8) -> PieceCid {
        PieceCid::new(Commitment([n; 32]))
    }

    fn hash(n: u8) -> Multihash<64> {
        let code = if n.is_multiple_of(2) {
            Code::Sha2_256
        } else {
            Code::Blake2b256
        };
        code.digest(&[n])
    }

    #[derive(Debug, Clone)]
    enum Op {
        Add(u8, Vec<(u8, u64)>),
        /// An add that fails in the middle.
        Fail(u8, Vec<(u8, u64)>),
        Remove(u8),
        Reopen,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let entries = || proptest::collection::vec((0u8..12, any::<u64>()), 0..10);
        let op = prop_oneof![
            3 => (0u8..4, entries()).prop_map(|(p, e)| Op::Add(p, e)),
            1 => (0u8..4, entries()).prop_map(|(p, e)| Op::Fail(p, e)),
            2 => (0u8..4).prop_map(Op::Remove),
            1 => Just(Op::Reopen),
        ];
        proptest::collection::vec(op, 0..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn it_answers_as_a_map_would(ops in ops()) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("index.redb");
            let mut index = PieceIndex::open(&path).unwrap();
            let mut model: BTreeMap<u8, BTreeMap<u8, u64>> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Add(p, entries) => {
                        let items = entries.iter().map(|(h, o)| Ok::<_, IndexError>(Entry { hash: hash(*h), offset: *o, len: 1 }));
                        let n = index.add_piece(&piece(p), items).unwrap();
                        let known = model.entry(p).or_insert_with(|| {
                            let mut first = BTreeMap::new();
                            for (h, o) in entries { first.entry(h).or_insert(o); }
                            first
                        });
                        prop_assert_eq!(n, known.len() as u64);
                    }
                    Op::Fail(p, entries) => {
                        let items = entries.iter().map(|(h, o)| Ok(Entry { hash: hash(*h), offset: *o, len: 1 }))
                            .chain([Err(IndexError::DiskFull)]);
                        let r = index.add_piece(&piece(p), items);
                        prop_assert_eq!(r.is_ok(), model.contains_key(&p));
                    }
                    Op::Remove(p) => {
                        prop_assert_eq!(index.remove_piece(&piece(p)).unwrap(), model.remove(&p).is_some());
                    }
                    Op::Reopen => {
                        let locked = matches!(PieceIndex::open(&path), Err(IndexError::Locked { .. }));
                        prop_assert!(locked, "two owners");
                        drop(index);
                        index = PieceIndex::open(&path).unwrap();
                    }
                }
            }
            for h in 0..12 {
                let got: BTreeSet<_> = index.find(&hash(h)).unwrap().iter().map(|l| (l.piece.commitment().0[0], l.offset)).collect();
                let want: BTreeSet<_> = model.iter().filter_map(|(p, e)| Some((*p, *e.get(&h)?))).collect();
                prop_assert_eq!(got, want);
            }
            let pieces: Vec<_> = index.pieces().unwrap().iter().map(|(p, n)| (p.commitment().0[0], *n)).collect();
            let want: Vec<_> = model.iter().map(|(p, e)| (*p, e.len() as u64)).collect();
            prop_assert_eq!(pieces, want);
            prop_assert_eq!(index.len().unwrap(), model.values().map(|e| e.len() as u64).sum::<u64>());
            for (p, e) in &model {
                // Page by page, each entry once and in order.
                let mut got = Vec::new();
                while let page @ [_, ..] = &index.entries(&piece(*p), got.last().map(|e: &Entry| &e.hash), 3).unwrap()[..] {
                    got.extend_from_slice(page);
                }
                prop_assert_eq!(got.len(), e.len());
                prop_assert!(got.windows(2).all(|w| w[0].hash.to_bytes() < w[1].hash.to_bytes()));
            }
        }
    }
}
