//! Pieces whose bytes come to the hub before they are offered.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use lotus_dataplane::DataError;
use lotus_types::{DealKey, PieceInfo};
use tokio::sync::mpsc;

use super::intake::{self, Intake};
use super::{CancellationToken, Pieces};

impl Pieces {
    /// Writes the bytes of a deal to where they would be pulled to, synced, if they are `piece`.
    /// They are to be offered as [`Staged`](super::machine::Source::Staged). Bytes that are here
    /// already, by another deal, are not read.
    pub async fn stage(
        &self,
        key: &DealKey,
        piece: PieceInfo,
        mut data: mpsc::Receiver<std::io::Result<bytes::Bytes>>,
    ) -> Result<(), DataError> {
        let here = self
            .locate(&piece.cid)
            .is_ok_and(|l| l.is_some_and(|l| l.verified && l.piece.size == piece.size));
        if here && self.path(&piece.cid).exists() {
            return Ok(());
        }
        let path = self.part(key);
        blocking(move || {
            // Of a call that broke off: its bytes are sent anew.
            intake::remove(&path)?;
            let written = write(&path, piece, &mut data);
            if written.is_err() {
                intake::remove(&path)?;
            }
            written
        })
        .await
    }

    /// Deletes what calls left that broke off with the hub.
    pub(super) fn clear_parts(&self) -> Result<(), DataError> {
        let io = || DataError::io(format!("list {}", self.tmp().display()));
        let live: HashSet<PathBuf> = self.lock_live().keys().map(|k| self.part(k)).collect();
        for entry in fs::read_dir(self.tmp()).map_err(io())? {
            let path = entry.map_err(io())?.path();
            if path.extension().is_some_and(|e| e == "part") && !live.contains(&path) {
                intake::remove(&path)?;
            }
        }
        Ok(())
    }
}

fn write(
    path: &std::path::Path,
    piece: PieceInfo,
    data: &mut mpsc::Receiver<std::io::Result<bytes::Bytes>>,
) -> Result<(), DataError> {
    let broken = |why: String| DataError::Unreachable {
        at: "the caller".into(),
        why,
    };
    let mut part = Intake::open(path, piece.raw_size, &CancellationToken::new())?;
    while let Some(chunk) = data.blocking_recv() {
        part.write(&chunk.map_err(|e| broken(e.to_string()))?)?;
    }
    if !part.is_complete() {
        let (got, all) = (part.written(), piece.raw_size);
        return Err(broken(format!("it sent {got} of {all} bytes")));
    }
    let got = part.finish(&piece)?;
    if got != piece {
        return Err(DataError::Changed {
            at: format!("the data of the call, which is piece {}", got.cid),
        });
    }
    Ok(())
}

/// Runs journal and file work off the async threads.
pub(crate) async fn blocking<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> R {
    match tokio::task::spawn_blocking(f).await {
        Ok(r) => r,
        // Only at the end of the runtime, when nobody waits any more, or by a panic within.
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await,
        },
    }
}
