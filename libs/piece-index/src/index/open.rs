//! Opens the parts of an index, and brings them together after a crash.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use lotus_segments::Segments;
use lotus_types::{Commitment, PieceCid};
use redb::{Database, ReadableDatabase, ReadableTable, TableHandle as _};

use super::{META, PIECES, Row, STALE, remove_file};
use crate::error::IndexError;

/// A table of the format before this one, which had every multihash in redb.
pub(super) const OLD: &str = "entries";
/// Time for another process to close the index: a command that only looks has it for a moment.
const LOCK_WAIT: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 3000 });

/// Whether a table can not be read, and never will be.
fn is_damaged(e: &redb::DatabaseError) -> bool {
    use redb::{DatabaseError, StorageError};
    match e {
        DatabaseError::UpgradeRequired(_)
        | DatabaseError::RepairAborted
        | DatabaseError::Storage(StorageError::Corrupted(_)) => true,
        DatabaseError::Storage(StorageError::Io(e)) => matches!(
            e.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
        ),
        _ => false,
    }
}

/// Opens the table of pieces; one that is damaged, or of the format before this, is dropped, or
/// refused.
pub(super) fn database(path: &Path, drop_bad: bool) -> Result<Database, IndexError> {
    let began = Instant::now();
    let mut dropped = false;
    let mut create = || loop {
        match Database::create(path) {
            Ok(db) => return Ok(db),
            Err(error) if drop_bad && !dropped && is_damaged(&error) => {
                dropped = true;
                tracing::warn!(path = %path.display(), %error, "the index is damaged, and is rebuilt from the pieces");
                remove_file(path)?;
            }
            Err(redb::DatabaseError::DatabaseAlreadyOpen) if began.elapsed() < LOCK_WAIT => {
                std::thread::sleep(LOCK_WAIT / 50);
            }
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => {
                return Err(IndexError::Locked { path: path.into() });
            }
            Err(e) => return Err(e.into()),
        }
    };
    let mut db = create()?;
    let old = db.begin_read()?.list_tables()?.any(|t| t.name() == OLD);
    if old && !drop_bad {
        return Err(IndexError::Old { path: path.into() });
    }
    if old {
        tracing::info!(path = %path.display(), "the index has an older format, and is rebuilt from the pieces");
        drop(db);
        remove_file(path)?;
        db = create()?;
    }
    let tx = db.begin_write()?;
    tx.open_table(PIECES)?;
    tx.open_table(STALE)?;
    tx.open_table(META)?;
    tx.commit()?;
    Ok(db)
}

pub(super) fn rows(db: &Database) -> Result<Vec<(PieceCid, Row)>, IndexError> {
    let tx = db.begin_read()?;
    let mut out = Vec::new();
    for piece in tx.open_table(PIECES)?.iter()? {
        let (cid, at) = piece?;
        out.push((PieceCid::new(Commitment(*cid.value())), Row::of(at.value())));
    }
    Ok(out)
}

/// Brings the three parts together after a crash: a piece counts when its row, its records and its
/// sidecar are there. What is left of others goes.
pub(super) fn reconcile(
    db: &Database,
    segments: &Segments,
    sidecars: &Path,
) -> Result<HashMap<u32, PieceCid>, IndexError> {
    let held = segments.pieces();
    let mut listed = BTreeSet::new();
    for file in fs::read_dir(sidecars).map_err(|e| IndexError::file(sidecars, e))? {
        let file = file.map_err(|e| IndexError::file(sidecars, e))?;
        listed.insert(file.file_name());
    }
    let mut names = HashMap::new();
    let mut lost = Vec::new();
    for (piece, row) in rows(db)? {
        let whole = held.get(&row.number).copied().unwrap_or(0) == row.count;
        let name = format!("{piece}.idx");
        if whole && listed.remove(std::ffi::OsStr::new(&name)) {
            names.insert(row.number, piece);
        } else {
            tracing::warn!(%piece, "a part of the piece's index is gone; it is indexed anew");
            lost.push(piece);
        }
    }
    if !lost.is_empty() {
        let tx = db.begin_write()?;
        {
            let mut pieces = tx.open_table(PIECES)?;
            for piece in &lost {
                pieces.remove(&piece.commitment().0)?;
            }
        }
        tx.commit()?;
    }
    let stray = held.into_keys().filter(|n| !names.contains_key(n));
    segments.remove_all(stray)?;
    for name in listed {
        let path = sidecars.join(name);
        fs::remove_file(&path).map_err(|e| IndexError::file(&path, e))?;
    }
    Ok(names)
}
