mod open;

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use lotus_car::{CarError, CarReader};
use lotus_segments::{Segments, SegmentsError, Stats};
use lotus_types::PieceCid;
use multihash::Multihash;
use redb::{Database, ReadableDatabase, TableDefinition};
use tokio::sync::watch;

use self::open::{database, reconcile, rows};
use crate::error::IndexError;
use crate::sidecar::{self, Builder, Sidecar};

/// commP to the piece's number in the segments, its number of multihashes, and the checksum of its
/// sidecar.
const PIECES: TableDefinition<'_, &[u8; 32], (u32, u64, u64)> =
    TableDefinition::new("indexed-pieces");
/// Pieces that are to be indexed anew.
const STALE: TableDefinition<'_, &[u8; 32], ()> = TableDefinition::new("stale-pieces");
/// The event that the follower has seen.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const CURSOR: &str = "cursor";
/// The index is at rest when nothing changed for so long.
const QUIET: Duration = Duration::from_secs(600);
/// Places returned for one multihash.
const MAX_HOLDERS: usize = 16;
/// Places looked at to find them: some are of pieces that go at this moment.
const MAX_CANDIDATES: usize = 64;

/// A block of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What it hashes to.
    pub hash: Multihash<64>,
    /// Where its section starts in the CARv1 that the piece is or holds.
    pub section: u64,
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

/// What [`PieceIndex::verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verified {
    /// Pieces whose list of multihashes is good.
    pub pieces: u64,
    /// Multihashes in them.
    pub multihashes: u64,
    /// Segments that were read.
    pub segments: u64,
    /// What is wrong, each with its piece or file.
    pub damaged: Vec<String>,
}

/// The index, on disk. Clones share it. Calls block for the disk.
///
/// Beside its file, `X.redb`, which has the pieces, lie `X.segments`, where multihashes are looked
/// up, and `X.sidecars`, which list those of each piece.
#[derive(Clone, Debug)]
pub struct PieceIndex {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Closed before the table: who waits for the files waits for the table's lock.
    segments: Segments,
    db: Database,
    sidecars: PathBuf,
    /// The pieces by their numbers in the segments.
    names: RwLock<HashMap<u32, PieceCid>>,
    next: AtomicU32,
    /// Taken by whoever adds or removes a piece at the end of its work.
    change: Mutex<()>,
    rebuilds: watch::Sender<u64>,
}

/// What the table has of a piece.
#[derive(Debug, Clone, Copy)]
struct Row {
    number: u32,
    count: u64,
    sum: u64,
}

impl Row {
    fn of((number, count, sum): (u32, u64, u64)) -> Self {
        Self { number, count, sum }
    }
}

impl PieceIndex {
    /// Opens the index, or makes a new one. An index of an older version, or one that is damaged,
    /// is dropped; the follower fills it again from the pieces.
    pub fn open(path: &Path) -> Result<Self, IndexError> {
        Self::open_with(path, true)
    }

    /// Opens an index that is there. One that is damaged, or of an older version, is an error, and
    /// stays.
    pub fn open_existing(path: &Path) -> Result<Self, IndexError> {
        fs::metadata(path).map_err(|e| IndexError::file(path, e))?;
        Self::open_with(path, false)
    }

    fn open_with(path: &Path, drop_bad: bool) -> Result<Self, IndexError> {
        let db = database(path, drop_bad)?;
        let dir = path.with_extension("segments");
        let segments = match Segments::open(&dir) {
            Err(e @ SegmentsError::Corrupt { .. }) if drop_bad => {
                tracing::warn!(error = %e, "the index is damaged, and is rebuilt from the pieces");
                fs::remove_dir_all(&dir).map_err(|e| IndexError::file(&dir, e))?;
                Segments::open(&dir)?
            }
            other => other?,
        };
        let sidecars = path.with_extension("sidecars");
        fs::create_dir_all(&sidecars).map_err(|e| IndexError::file(&sidecars, e))?;
        let names = reconcile(&db, &segments, &sidecars)?;
        let next = segments.last_piece().map_or(Some(0), |n| n.checked_add(1));
        let empty = names.keys().max().map_or(Some(0), |n| n.checked_add(1));
        let next = next
            .zip(empty)
            .map(|(a, b)| a.max(b))
            .ok_or(IndexError::Full)?;
        Ok(Self {
            inner: Arc::new(Inner {
                db,
                segments,
                sidecars,
                names: RwLock::new(names),
                next: AtomicU32::new(next),
                change: Mutex::default(),
                rebuilds: watch::Sender::new(0),
            }),
        })
    }

    /// Adds a piece with all its entries, or nothing of it. Of entries with one multihash the
    /// first section counts. Returns how many multihashes the piece has; a piece that is known is
    /// left as it is, unless it is [stale](Self::is_stale).
    pub fn add_piece<E: From<IndexError>>(
        &self,
        piece: &PieceCid,
        entries: impl IntoIterator<Item = Result<Entry, E>>,
    ) -> Result<u64, E> {
        if let Some(known) = self.row(piece)?
            && !self.is_stale(piece)?
        {
            return Ok(known.count);
        }
        let mut sidecar = Builder::new(&self.inner.sidecars);
        for entry in entries {
            sidecar.push(&entry?)?;
        }
        Ok(self.put(piece, sidecar)?)
    }

    fn put(&self, piece: &PieceCid, sidecar: Builder) -> Result<u64, IndexError> {
        let inner = &self.inner;
        let take = |n: u32| n.checked_add(1);
        let number = inner
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let number = number.map_err(|_| IndexError::Full)?;
        let done = self.write(piece, number, sidecar);
        if done.is_err() {
            self.undo(piece, number);
        }
        let count = done?;
        self.tidy();
        Ok(count)
    }

    fn write(&self, piece: &PieceCid, number: u32, sidecar: Builder) -> Result<u64, IndexError> {
        let inner = &self.inner;
        let mut ingest = inner.segments.ingest(number);
        let done = sidecar.finish(&self.sidecar_path(piece), |e| {
            ingest.push(&e.hash.to_bytes(), e.offset, e.len)?;
            Ok(())
        })?;
        ingest.finish()?;
        // From here on a crash leaves records of a number that no piece has: the next start
        // removes them.
        let before = {
            let _turn = inner.change.lock().unwrap_or_else(PoisonError::into_inner);
            let key = &piece.commitment().0;
            let tx = inner.db.begin_write()?;
            let before = {
                let mut pieces = tx.open_table(PIECES)?;
                let before = pieces.insert(key, (number, done.count, done.sum))?;
                let before = before.map(|b| Row::of(b.value()));
                tx.open_table(STALE)?.remove(key)?;
                before
            };
            tx.commit()?;
            let mut names = inner.names.write().unwrap_or_else(PoisonError::into_inner);
            names.insert(number, *piece);
            if let Some(before) = before {
                names.remove(&before.number);
            }
            before
        };
        if let Some(before) = before {
            inner.segments.remove(before.number)?;
        }
        Ok(done.count)
    }

    /// Takes back what an add that failed has written: each try would leave as much again. What
    /// stays nevertheless the next start removes.
    fn undo(&self, piece: &PieceCid, number: u32) {
        let taken_back = || {
            let row = self.row(piece)?;
            if row.is_some_and(|r| r.number == number) {
                return Ok(());
            }
            self.inner.segments.remove(number)?;
            let path = self.sidecar_path(piece);
            remove_file(&sidecar::unfinished(&path))?;
            if row.is_none() {
                remove_file(&path)?;
            }
            Ok::<_, IndexError>(())
        };
        if let Err(error) = taken_back() {
            tracing::warn!(%piece, %error, "a part of a piece that was not indexed stays");
        }
    }

    /// Merges what is due. The piece that brought it on is in the index whatever becomes of it.
    fn tidy(&self) {
        let _merged = note(self.inner.segments.maintain());
    }

    /// Merges all segments into one if nothing changed for a while and if that pays. Call it now and
    /// then, and less often when it failed: that is false.
    pub fn settle(&self) -> bool {
        note(self.inner.segments.settle(QUIET))
    }

    /// Adds a piece that is a CAR: every block is checked and indexed.
    pub fn add_car(&self, piece: &PieceCid, car: impl Read) -> Result<u64, IndexError> {
        let failed = |source: CarError| IndexError::Car {
            piece: *piece,
            source: source.into(),
        };
        let (start, car) = car_start(car).map_err(|e| {
            failed(CarError::Read {
                offset: 0,
                source: e,
            })
        })?;
        let blocks = CarReader::new(car).map_err(failed)?;
        self.add_piece(
            piece,
            blocks.map(|b| {
                let b = b.map_err(failed)?;
                Ok(Entry {
                    hash: *b.cid.hash(),
                    section: b.section.saturating_sub(start),
                    offset: b.offset,
                    len: u32::try_from(b.data.len()).expect("a block has at most 8 MiB"),
                })
            }),
        )
    }

    /// Forgets a piece. False when it was not known.
    pub fn remove_piece(&self, piece: &PieceCid) -> Result<bool, IndexError> {
        let inner = &self.inner;
        let key = &piece.commitment().0;
        {
            let _turn = inner.change.lock().unwrap_or_else(PoisonError::into_inner);
            let tx = inner.db.begin_write()?;
            let known = {
                tx.open_table(STALE)?.remove(key)?;
                let mut pieces = tx.open_table(PIECES)?;
                pieces.remove(key)?.map(|p| Row::of(p.value()))
            };
            let Some(known) = known else {
                return Ok(false);
            };
            tx.commit()?;
            let mut names = inner.names.write().unwrap_or_else(PoisonError::into_inner);
            names.remove(&known.number);
            drop(names);
            // What a crash leaves of these the next start removes.
            inner.segments.remove(known.number)?;
        }
        remove_file(&self.sidecar_path(piece))?;
        self.tidy();
        Ok(true)
    }

    /// Where a block may be, at most 16 places. **Candidates**: the index knows a multihash by 64
    /// bits of it, so whoever reads the bytes verifies them, as is due anyway.
    /// [`PieceIndex::holders`] tells for sure.
    pub fn find(&self, hash: &Multihash<64>) -> Result<Vec<Location>, IndexError> {
        let found = self.inner.segments.find(&hash.to_bytes(), MAX_CANDIDATES)?;
        let names = self
            .inner
            .names
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let place = |r: lotus_segments::Record| {
            Some(Location {
                piece: *names.get(&r.piece)?,
                offset: r.offset,
                len: r.len,
            })
        };
        let places = found.into_iter().filter_map(place);
        Ok(places.take(MAX_HOLDERS).collect())
    }

    /// The pieces that list a multihash, at most 16.
    pub fn holders(&self, hash: &Multihash<64>) -> Result<Vec<PieceCid>, IndexError> {
        let mut out = Vec::new();
        for at in self.find(hash)? {
            if out.contains(&at.piece) {
                continue;
            }
            match Sidecar::open(&self.sidecar_path(&at.piece)).and_then(|s| s.has(hash)) {
                Ok(true) => out.push(at.piece),
                Ok(false) => {}
                // It may have gone since it was found.
                Err(_) if !self.has_piece(&at.piece)? => {}
                Err(e) => return Err(e),
            }
        }
        Ok(out)
    }

    /// Whether a piece is indexed.
    pub fn has_piece(&self, piece: &PieceCid) -> Result<bool, IndexError> {
        Ok(self.row(piece)?.is_some())
    }

    fn row(&self, piece: &PieceCid) -> Result<Option<Row>, IndexError> {
        let tx = self.inner.db.begin_read()?;
        let pieces = tx.open_table(PIECES)?;
        let row = pieces.get(&piece.commitment().0)?;
        Ok(row.map(|r| Row::of(r.value())))
    }

    fn rows(&self) -> Result<Vec<(PieceCid, Row)>, IndexError> {
        rows(&self.inner.db)
    }

    /// Every piece, with its number of multihashes.
    pub fn pieces(&self) -> Result<Vec<(PieceCid, u64)>, IndexError> {
        let rows = self.rows()?.into_iter();
        Ok(rows.map(|(p, row)| (p, row.count)).collect())
    }

    /// Multihashes of one piece; none when it is not indexed.
    pub fn count(&self, piece: &PieceCid) -> Result<u64, IndexError> {
        Ok(self.row(piece)?.map_or(0, |row| row.count))
    }

    /// Multihashes in all pieces together.
    pub fn len(&self) -> Result<u64, IndexError> {
        Ok(self.rows()?.iter().map(|(_, row)| row.count).sum())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> Result<bool, IndexError> {
        Ok(self.len()? == 0)
    }

    /// How large the segments are.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.inner.segments.stats()
    }

    /// Up to `limit` multihashes of a piece from the `from`th on, in the order of its sidecar: by
    /// hash function, length, digest.
    pub fn multihashes(
        &self,
        piece: &PieceCid,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Multihash<64>>, IndexError> {
        if !self.has_piece(piece)? {
            return Ok(Vec::new());
        }
        Sidecar::open(&self.sidecar_path(piece))?.multihashes(from, limit)
    }

    /// The file that lists a piece's multihashes, a CARv2 index (`MultihashIndexSorted`).
    #[must_use]
    pub fn sidecar_path(&self, piece: &PieceCid) -> PathBuf {
        self.inner.sidecars.join(format!("{piece}.idx"))
    }

    /// Reads everything and checks it: segments, sidecars, and whether the one has what the other
    /// lists, for up to `samples` multihashes of each piece.
    pub fn verify(&self, samples: u64) -> Result<Verified, IndexError> {
        let segments = self.inner.segments.verify()?;
        let mut out = Verified {
            segments: segments.segments,
            damaged: segments.damaged,
            ..Verified::default()
        };
        for (piece, row) in self.rows()? {
            match self.verify_piece(&piece, row, samples) {
                Ok(()) => {
                    out.pieces += 1;
                    out.multihashes += row.count;
                }
                // Gone, or indexed anew, meanwhile.
                Err(_) if self.row(&piece)?.map(|r| r.number) != Some(row.number) => {}
                Err(e) => out.damaged.push(format!("piece {piece}: {e}")),
            }
        }
        Ok(out)
    }

    fn verify_piece(&self, piece: &PieceCid, row: Row, samples: u64) -> Result<(), IndexError> {
        let path = self.sidecar_path(piece);
        let bad = |what: String| {
            let path = path.clone();
            IndexError::from(SegmentsError::Corrupt { path, what })
        };
        let sidecar = Sidecar::open(&path)?;
        let seen = sidecar.verify()?;
        if (seen.count, seen.sum) != (row.count, row.sum) {
            return Err(bad("it is not what was written".into()));
        }
        let step = row.count.div_ceil(samples.max(1)).max(1);
        for n in (0..row.count).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            for hash in sidecar.multihashes(n, 1)? {
                let found = self.inner.segments.find(&hash.to_bytes(), usize::MAX)?;
                if !found.iter().any(|r| r.piece == row.number) {
                    return Err(bad(format!("the segments lack its multihash number {n}")));
                }
            }
        }
        Ok(())
    }

    /// Asks for one piece, or all, to be indexed anew from the bytes of the piece. Until that is
    /// done the index answers as before. Returns how many pieces that are; it outlasts a restart.
    pub fn rebuild(&self, only: Option<&PieceCid>) -> Result<u64, IndexError> {
        let chosen: Vec<PieceCid> = self
            .rows()?
            .into_iter()
            .map(|(p, _)| p)
            .filter(|p| only.is_none_or(|o| o == p))
            .collect();
        let tx = self.inner.db.begin_write()?;
        {
            let mut stale = tx.open_table(STALE)?;
            for piece in &chosen {
                stale.insert(&piece.commitment().0, ())?;
            }
        }
        tx.commit()?;
        self.inner.rebuilds.send_modify(|n| *n += 1);
        Ok(chosen.len() as u64)
    }

    /// Whether a piece is to be indexed anew.
    pub fn is_stale(&self, piece: &PieceCid) -> Result<bool, IndexError> {
        let tx = self.inner.db.begin_read()?;
        Ok(tx.open_table(STALE)?.get(&piece.commitment().0)?.is_some())
    }

    /// Changes with each call of [`PieceIndex::rebuild`].
    pub(crate) fn rebuilds(&self) -> watch::Receiver<u64> {
        self.inner.rebuilds.subscribe()
    }

    /// The last hub event that was taken in.
    pub(crate) fn cursor(&self) -> Result<u64, IndexError> {
        let tx = self.inner.db.begin_read()?;
        Ok(tx.open_table(META)?.get(CURSOR)?.map_or(0, |n| n.value()))
    }

    pub(crate) fn set_cursor(&self, seq: u64) -> Result<(), IndexError> {
        let tx = self.inner.db.begin_write()?;
        tx.open_table(META)?.insert(CURSOR, seq)?;
        tx.commit()?;
        Ok(())
    }
}

/// Removes a file, or finds that it is gone.
fn remove_file(path: &Path) -> Result<(), IndexError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(IndexError::file(path, e)),
        _ => Ok(()),
    }
}

/// Notes how a merge went: without it the index is slower, and whole. False when it failed.
fn note(merged: Result<(), SegmentsError>) -> bool {
    let Err(error) = merged else { return true };
    let fix = error.fix();
    tracing::warn!(%error, fix, "segments were not merged");
    metrics::counter!("lotus_markets_index_merge_failures_total").increment(1);
    false
}

/// Bytes of the pragma and the header of a CARv2.
/// Source: ipld.io/specs/transport/car/carv2, "Header".
const V2_START: usize = 51;
/// The pragma.
const V2_PRAGMA: [u8; 11] = [
    0x0a, 0xa1, 0x67, 0x76, 0x65, 0x72, 0x73, 0x69, 0x6f, 0x6e, 0x02,
];

/// Where the CARv1 starts in a CAR, and the CAR.
fn car_start(mut car: impl Read) -> io::Result<(u64, impl Read)> {
    let mut head = Vec::with_capacity(V2_START);
    car.by_ref().take(V2_START as u64).read_to_end(&mut head)?;
    let start = match head.get(27..35) {
        Some(offset) if head.starts_with(&V2_PRAGMA) => {
            u64::from_le_bytes(offset.try_into().expect("eight bytes"))
        }
        _ => 0,
    };
    Ok((start, io::Cursor::new(head).chain(car)))
}

#[cfg(test)]
mod tests;
