//! Uploads in chunks: in any order, several at a time, over restarts. A chunk is written to its
//! place in one file; which chunks are on disk stands in the journal.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use lotus_journal::{JournalError, Map};
use lotus_types::DealKey;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::engine::{Engine, blocking, journal_refusal};
use crate::machine::{Event, Record};
use crate::mk20::{Code, Refusal, StartUpload, UploadStatus};
use crate::staging::IntakeError;
use crate::transfer::{awaits_upload, intake_refusal, pump};

/// The uploads in chunks that have begun.
pub(crate) const UPLOADS: Map<DealKey, Upload> = Map::new("deals.uploads");
/// Pieces of a chunk in flight between network and disk.
const QUEUE: usize = 16;

/// An upload in chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Upload {
    /// Bytes of the piece.
    raw_size: u64,
    /// Bytes of each chunk but the last.
    chunk_size: u64,
    /// Chunks that are on disk; the first is 1.
    done: BTreeSet<u32>,
}

impl Upload {
    fn chunks(&self) -> u32 {
        u32::try_from(self.raw_size.div_ceil(self.chunk_size)).unwrap_or(u32::MAX)
    }

    /// First byte and length of a chunk.
    fn place(&self, chunk: u32) -> Option<(u64, u64)> {
        let start = u64::from(chunk.checked_sub(1)?) * self.chunk_size;
        let left = self.raw_size.checked_sub(start).filter(|n| *n > 0)?;
        Some((start, left.min(self.chunk_size)))
    }

    fn complete(&self) -> bool {
        self.done.len() == self.chunks() as usize
    }

    /// Bytes that are on disk.
    pub(crate) fn received(&self) -> u64 {
        let lengths = self.done.iter().filter_map(|n| self.place(*n));
        lengths.map(|(_, len)| len).sum()
    }

    fn status(&self) -> UploadStatus {
        let missing: Vec<u32> = (1..=self.chunks())
            .filter(|n| !self.done.contains(n))
            .collect();
        UploadStatus {
            total_chunks: self.chunks(),
            uploaded: self.chunks() - u32::try_from(missing.len()).unwrap_or(0),
            missing: u32::try_from(missing.len()).unwrap_or(u32::MAX),
            uploaded_chunks: self.done.iter().copied().collect(),
            missing_chunks: missing,
        }
    }
}

/// Checks what a client wants against the deal and the limits.
fn plan(want: StartUpload, raw_size: u64, least: u64, most: u64) -> Result<Upload, Refusal> {
    let bad = |field, error: String, fix: String| {
        Err(Refusal::new(Code::BadProposal, error, fix).at(field))
    };
    if want.raw_size != raw_size {
        return bad(
            "raw_size",
            format!(
                "the upload has {} bytes, the piece CID names {raw_size}",
                want.raw_size
            ),
            "send the file that the deal is for".into(),
        );
    }
    if !want.chunk_size.is_power_of_two() || want.chunk_size < least || want.chunk_size > most {
        return bad(
            "chunk_size",
            format!("chunks of {} bytes are not taken", want.chunk_size),
            format!("choose a power of two from {least} to {most}"),
        );
    }
    Ok(Upload {
        raw_size,
        chunk_size: want.chunk_size,
        done: BTreeSet::new(),
    })
}

fn taken() -> Refusal {
    Refusal::new(
        Code::Conflict,
        "another transfer for this deal is running",
        "wait for it, or break it off",
    )
    .retry_after(5)
}

fn not_started(code: Code) -> Refusal {
    Refusal::new(
        code,
        "no upload in chunks has begun for this deal",
        "begin it with POST /market/mk20/uploads/{id}",
    )
}

fn blocked(e: tokio::task::JoinError) -> IntakeError {
    IntakeError::Io(io::Error::other(e))
}

impl Engine {
    /// The upload in chunks of a deal, if it has begun.
    pub(crate) fn chunked(&self, key: &DealKey) -> Result<Option<Upload>, Refusal> {
        self.deals
            .journal()
            .read(|v| v.get(&UPLOADS, key))
            .map_err(|e: JournalError| journal_refusal(&e))
    }

    /// Begins an upload in chunks.
    pub(crate) async fn start_chunks(
        &self,
        record: &Record,
        want: StartUpload,
    ) -> Result<(), Refusal> {
        let key = &record.proposal.key;
        awaits_upload(record)?;
        let upload = plan(
            want,
            record.proposal.piece.raw_size,
            self.cfg.min_chunk_bytes,
            self.cfg.max_chunk_bytes,
        )?;
        let lease = self.arriving.lease(key).ok_or_else(taken)?;
        // What is given up from here on is cleaned up after the lease.
        let now = self.deals.get(key).map_err(|e| journal_refusal(&e))?;
        now.as_ref().map_or(Ok(()), awaits_upload)?;
        if self.chunked(key)?.is_some() || self.staging.has(key) {
            return Err(Refusal::new(
                Code::Conflict,
                "an upload for this deal has begun",
                "ask GET /market/mk20/uploads/{id} which chunks are missing",
            ));
        }
        let (file, journal, key) = (
            self.staging.chunks(key),
            self.deals.journal().clone(),
            key.clone(),
        );
        let begin = move || -> Result<(), IntakeError> {
            // No bytes are taken from the disk until they come.
            let f = File::create(&file)?;
            f.set_len(upload.raw_size)?;
            f.sync_all()?;
            journal
                .write(|tx| tx.put(&UPLOADS, &key, &upload))
                .map_err(|e: JournalError| IntakeError::Io(io::Error::other(e)))?;
            drop(lease);
            Ok(())
        };
        let begun = tokio::task::spawn_blocking(begin).await.map_err(blocked);
        begun.and_then(|r| r).map_err(|e| intake_refusal(&e))
    }

    /// Which chunks are here.
    pub(crate) fn chunk_status(&self, record: &Record) -> Result<UploadStatus, Refusal> {
        let upload = self.chunked(&record.proposal.key)?;
        Ok(upload
            .ok_or_else(|| not_started(Code::NOT_STARTED))?
            .status())
    }

    /// Takes one chunk. When this returns it is on disk.
    pub(crate) async fn put_chunk<E: std::fmt::Display>(
        &self,
        record: &Record,
        chunk: u32,
        announced: Option<u64>,
        body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<(), Refusal> {
        let key = &record.proposal.key;
        awaits_upload(record)?;
        let lease = self.arriving.chunk(key, chunk).ok_or_else(taken)?;
        let upload = self
            .chunked(key)?
            .ok_or_else(|| not_started(Code::NotFound))?;
        let (start, len) = upload.place(chunk).ok_or_else(|| {
            Refusal::new(
                Code::NotFound,
                format!("there is no chunk {chunk}"),
                format!("the chunks are 1 to {}", upload.chunks()),
            )
        })?;
        if upload.done.contains(&chunk) {
            return Err(Refusal::new(
                Code::Conflict,
                format!("chunk {chunk} is here already"),
                "go on with a missing one, or finalize",
            ));
        }
        let wrong = |have: u64| {
            Refusal::new(
                Code::BadProposal,
                format!("chunk {chunk} has {len} bytes, not {have}"),
                "send exactly the bytes of the chunk",
            )
        };
        if let Some(have) = announced.filter(|have| *have != len) {
            return Err(wrong(have));
        }
        let (sink, pieces) = mpsc::channel(QUEUE);
        let file = self.staging.chunks(key);
        let stop = lease.stop.clone();
        // The lease ends with the writing, whatever becomes of the request.
        let written =
            tokio::task::spawn_blocking(move || (write(&file, start, len, pieces), lease));
        let idle = Duration::from_secs(self.cfg.transfer_idle_secs.max(1));
        let broken = pump(body, &sink, idle, &stop).await;
        drop(sink);
        let (have, lease) = written.await.map_err(|e| intake_refusal(&blocked(e)))?;
        let have = have.map_err(|e| intake_refusal(&e.into()))?;
        if let Some(why) = broken {
            return Err(Refusal::new(
                Code::BadProposal,
                format!("chunk {chunk} broke off after {have} of {len} bytes: {why}"),
                "send the chunk again",
            ));
        }
        if have != len {
            return Err(wrong(have));
        }
        let (journal, key) = (self.deals.journal().clone(), key.clone());
        let note = move || {
            journal.write(|tx| {
                let Some(mut upload) = tx.get(&UPLOADS, &key)? else {
                    return Ok(false);
                };
                upload.done.insert(chunk);
                tx.put(&UPLOADS, &key, &upload)?;
                Ok(true)
            })
        };
        let noted = blocking(note).await;
        drop(lease);
        match noted {
            Ok(true) => Ok(()),
            // The deal was given up in the meantime.
            Ok(false) => Err(not_started(Code::NotFound)),
            Err(e) => Err(journal_refusal(&e)),
        }
    }

    /// Every chunk is here: the piece is checked in the background.
    pub(crate) async fn finish_chunks(&self, record: &Record) -> Result<(), Refusal> {
        let key = &record.proposal.key;
        let upload = self
            .chunked(key)?
            .ok_or_else(|| not_started(Code::BadProposal))?;
        if !upload.complete() {
            let missing = upload.status().missing_chunks;
            let first = missing.first().copied().unwrap_or_default();
            return Err(Refusal::new(
                Code::BadProposal,
                format!("{} chunks are missing, such as {first}", missing.len()),
                "send the missing chunks first",
            ));
        }
        self.apply(key, Event::Uploaded, None, None)
            .await
            .map_err(|e| journal_refusal(&e))?;
        Ok(())
    }
}

/// Writes what comes to its place, at most `len` bytes and one more, and returns how many came.
fn write(file: &Path, mut at: u64, len: u64, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<u64> {
    let file = OpenOptions::new().write(true).open(file)?;
    let mut have = 0;
    while let Some(piece) = pieces.blocking_recv() {
        have += piece.len() as u64;
        if have > len {
            // The next chunk's place is not to be touched.
            return Ok(have);
        }
        file.write_all_at(&piece, at)?;
        at += piece.len() as u64;
    }
    file.sync_data()?;
    Ok(have)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn wanted(raw_size: u64, chunk_size: u64) -> StartUpload {
        StartUpload {
            raw_size,
            chunk_size,
        }
    }

    #[test]
    fn chunks_cover_the_piece_once() {
        for raw_size in [1, MIB - 1, MIB, MIB + 1, 5 * MIB, 5 * MIB + 7] {
            let mut upload = plan(wanted(raw_size, MIB), raw_size, MIB, 4 * MIB).unwrap();
            let mut next = 0;
            for n in 1..=upload.chunks() {
                assert!(!upload.complete());
                let (start, len) = upload.place(n).unwrap();
                assert_eq!(start, next);
                next += len;
                upload.done.insert(n);
                assert_eq!(upload.received(), next);
            }
            assert_eq!(next, raw_size);
            assert!(upload.complete());
            assert_eq!(upload.place(0), None);
            assert_eq!(upload.place(upload.chunks() + 1), None);
            assert_eq!(upload.place(u32::MAX), None);
        }
        let upload = plan(wanted(3 * MIB, MIB), 3 * MIB, MIB, MIB).unwrap();
        let mut part = upload.clone();
        part.done.insert(2);
        let status = part.status();
        assert_eq!(
            (status.total_chunks, status.uploaded, status.missing),
            (3, 1, 2)
        );
        assert_eq!(status.uploaded_chunks, [2]);
        assert_eq!(status.missing_chunks, [1, 3]);
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for (raw_size, chunk_size, field) in [
            (10, MIB, "raw_size"),
            (11, 0, "chunk_size"),
            (11, MIB + 1, "chunk_size"),
            (11, MIB / 2, "chunk_size"),
            (11, 8 * MIB, "chunk_size"),
        ] {
            let e = plan(wanted(raw_size, chunk_size), 11, MIB, 4 * MIB).unwrap_err();
            assert_eq!((e.code, e.field.as_str()), (400, field));
        }
    }
}
