//! Pieces that are uploaded before there is a deal for them. Whoever comes may upload, so their
//! number, size, time and share of the disk are bounded. A deal that names such a piece has its
//! bytes at once. Pieces are in the journal; uploads that are not finished are not.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use lotus_journal::{Journal, JournalError, Map};
use lotus_proofs::CommpWriter;
use lotus_runtime::CancellationToken;
use lotus_types::PieceInfo;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::config::PiecesConfig;
use crate::engine::{journal_refusal, unix_ms};
use crate::mk20::{Code, Refusal};
use crate::staging::IntakeError;
use crate::transfer::{intake_refusal, pump};

/// Smallest and largest upload, in bytes. Source: Curio, pdp/handlers_upload.go; Synapse,
/// utils/constants.ts, SIZE_CONSTANTS.
pub(crate) const SIZES: (u64, u64) = (127, 1_065_353_216);
/// Uploads that may be open at once, of all clients and of one.
const MAX_UPLOADS: usize = 4_096;
const MAX_UPLOADS_OF_ONE: usize = 256;
/// Pieces that may be here at once.
const MAX_PIECES: usize = 100_000;
/// Milliseconds that an upload may stay open.
const UPLOAD_TTL: u64 = 3_600_000;
/// Parts of an upload in flight between network and disk.
const QUEUE: usize = 16;

/// The pieces, by commP.
const PIECES: Map<[u8; 32], Stored> = Map::new("deals.pieces");

/// A piece that is here.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stored {
    piece: PieceInfo,
    /// Address of who uploaded it.
    owner: String,
    unix_ms: u64,
}

/// An upload.
#[derive(Debug)]
struct Upload {
    owner: String,
    /// The piece, where the client named it before.
    piece: Option<PieceInfo>,
    /// The piece that came, where the client names it after.
    came: Option<PieceInfo>,
    /// Bytes are arriving.
    busy: bool,
    unix_ms: u64,
    /// Bytes that are counted for it.
    room: u64,
}

#[derive(Debug, Default)]
struct State {
    stored: HashMap<[u8; 32], Stored>,
    uploads: HashMap<Uuid, Upload>,
    /// Bytes of pieces and uploads by owner, and of all.
    used: HashMap<String, u64>,
    total: u64,
}

impl State {
    fn count(&mut self, owner: &str, bytes: u64) {
        *self.used.entry(owner.to_owned()).or_default() += bytes;
        self.total += bytes;
    }

    fn give_back(&mut self, owner: &str, bytes: u64) {
        self.total = self.total.saturating_sub(bytes);
        if let Some(used) = self.used.get_mut(owner) {
            *used = used.saturating_sub(bytes);
            if *used == 0 {
                self.used.remove(owner);
            }
        }
    }

    fn drop_upload(&mut self, id: &Uuid) {
        if let Some(upload) = self.uploads.remove(id) {
            self.give_back(&upload.owner, upload.room);
        }
    }
}

/// The pieces without a deal.
pub(crate) struct Pieces {
    dir: PathBuf,
    cfg: PiecesConfig,
    journal: Journal,
    state: Arc<Mutex<State>>,
    /// Held while a piece's file, its row and its entry are changed: the three are one.
    turn: Arc<Mutex<()>>,
}

/// An upload whose bytes are arriving. Dropped unfinished, the upload starts anew.
struct Arrival {
    id: Uuid,
    part: PathBuf,
    state: Arc<Mutex<State>>,
    done: bool,
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        drop(fs::remove_file(&self.part));
        let mut state = lock(&self.state);
        let Some(upload) = state.uploads.get_mut(&self.id) else {
            return;
        };
        upload.busy = false;
        let (owner, room) = (upload.owner.clone(), std::mem::take(&mut upload.room));
        state.give_back(&owner, room);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unknown() -> Refusal {
    Refusal::new(
        Code::NotFound,
        "there is no such upload",
        "begin one with POST /pdp/piece or POST /pdp/piece/uploads",
    )
}

fn full(what: &str) -> Refusal {
    Refusal::new(
        Code::Overloaded,
        what,
        "come back later, or propose a deal for the pieces that are here",
    )
    .retry_after(600)
}

fn wrong_size(bytes: u64) -> Refusal {
    Refusal::new(
        Code::TooLarge,
        format!("an upload of {bytes} bytes is not taken"),
        format!("upload {} to {} bytes", SIZES.0, SIZES.1),
    )
}

fn key(piece: &PieceInfo) -> [u8; 32] {
    piece.cid.commitment().0
}

impl Pieces {
    /// Opens the folder, and removes what no piece of the journal needs.
    pub(crate) fn open(
        dir: &Path,
        cfg: PiecesConfig,
        journal: Journal,
    ) -> Result<Self, IntakeError> {
        fs::create_dir_all(dir)?;
        let mut state = State::default();
        let each = journal.read(|v| {
            v.each(&PIECES, |k, s| {
                state.stored.insert(k, s);
                Ok::<_, JournalError>(())
            })
        });
        each.map_err(|e| IntakeError::Io(io::Error::other(e)))?;
        let pieces = Self {
            dir: dir.to_owned(),
            cfg,
            journal,
            state: Arc::default(),
            turn: Arc::default(),
        };
        let named: HashMap<PathBuf, [u8; 32]> = state
            .stored
            .iter()
            .map(|(k, s)| (pieces.path(&s.piece), *k))
            .collect();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if !named.contains_key(&path) {
                fs::remove_file(path)?;
            }
        }
        state.stored.retain(|_, s| pieces.path(&s.piece).is_file());
        let counted: Vec<_> = state
            .stored
            .values()
            .map(|s| (s.owner.clone(), s.piece.raw_size))
            .collect();
        for (owner, bytes) in counted {
            state.count(&owner, bytes);
        }
        *lock(&pieces.state) = state;
        Ok(pieces)
    }

    fn path(&self, piece: &PieceInfo) -> PathBuf {
        self.dir.join(format!("{}.piece", piece.cid))
    }

    fn part(&self, id: &Uuid) -> PathBuf {
        self.dir.join(format!("{id}.part"))
    }

    /// The file of a piece that is here.
    pub(crate) fn file(&self, piece: &PieceInfo) -> Option<PathBuf> {
        let state = lock(&self.state);
        let stored = state.stored.get(&key(piece))?;
        (stored.piece == *piece).then(|| self.path(piece))
    }

    /// Begins an upload, of a piece that is named now, or after the bytes.
    pub(crate) fn begin(&self, owner: &str, piece: Option<PieceInfo>) -> Result<Uuid, Refusal> {
        if !self.cfg.enabled {
            return Err(Refusal::new(
                Code::NotFound,
                "this provider takes no pieces without a deal",
                "propose a deal with POST /market/mk20/deal",
            ));
        }
        if let Some(p) = &piece
            && !(SIZES.0..=SIZES.1).contains(&p.raw_size)
        {
            return Err(wrong_size(p.raw_size).at("pieceCid"));
        }
        let mut state = lock(&self.state);
        let own = state.uploads.values().filter(|u| u.owner == owner).count();
        if own >= MAX_UPLOADS_OF_ONE || state.uploads.len() >= MAX_UPLOADS {
            return Err(full("too many uploads are open"));
        }
        let id = Uuid::new_v4();
        let upload = Upload {
            owner: owner.to_owned(),
            piece,
            came: None,
            busy: false,
            unix_ms: unix_ms(),
            room: 0,
        };
        state.uploads.insert(id, upload);
        Ok(id)
    }

    /// Makes room for the bytes of an upload. Returns its piece, if that is known, and the most
    /// bytes that may come.
    fn arrive(
        &self,
        id: Uuid,
        announced: Option<u64>,
        named: bool,
    ) -> Result<(Arrival, Option<PieceInfo>, u64), Refusal> {
        let mut state = lock(&self.state);
        let upload = state.uploads.get(&id).ok_or_else(unknown)?;
        if upload.piece.is_some() != named {
            return Err(unknown());
        }
        if upload.busy || upload.came.is_some() {
            return Err(Refusal::new(
                Code::Conflict,
                "the bytes of this upload have come, or are coming",
                "finish it, or begin another one",
            ));
        }
        let (owner, piece) = (upload.owner.clone(), upload.piece);
        let want = piece.map(|p| p.raw_size);
        if let (Some(want), Some(have)) = (want, announced)
            && want != have
        {
            return Err(Refusal::new(
                Code::BadProposal,
                format!("the upload has {have} bytes, the piece CID names {want}"),
                "send the file that the piece CID is of",
            ));
        }
        let most = want.or(announced).unwrap_or(SIZES.1);
        if !(SIZES.0..=SIZES.1).contains(&most) {
            return Err(wrong_size(most));
        }
        let used = state.used.get(&owner).copied().unwrap_or(0);
        if used.saturating_add(most) > self.cfg.max_bytes_per_client {
            return Err(full("pieces of this client take all the room that it has"));
        }
        if state.total.saturating_add(most) > self.cfg.max_bytes || state.stored.len() >= MAX_PIECES
        {
            return Err(full("there is no room for pieces without a deal"));
        }
        state.count(&owner, most);
        if let Some(upload) = state.uploads.get_mut(&id) {
            (upload.busy, upload.room) = (true, most);
        }
        let arrival = Arrival {
            id,
            part: self.part(&id),
            state: self.state.clone(),
            done: false,
        };
        Ok((arrival, piece, most))
    }

    /// Takes the bytes of an upload. `named` says that its piece was named before: then it is
    /// here when this returns.
    pub(crate) async fn receive<E: std::fmt::Display>(
        &self,
        id: Uuid,
        named: bool,
        announced: Option<u64>,
        body: impl Stream<Item = Result<Bytes, E>> + Unpin,
        idle: Duration,
    ) -> Result<(), Refusal> {
        let (arrival, piece, most) = self.arrive(id, announced, named)?;
        let (sink, parts) = mpsc::channel(QUEUE);
        // The arrival ends with the writing, whatever becomes of the request.
        let writing = move || (write(&arrival.part, most, parts), arrival);
        let written = tokio::task::spawn_blocking(writing);
        let broken = pump(body, &sink, idle, &CancellationToken::new()).await;
        drop(sink);
        let (came, mut arrival) = written.await.map_err(|e| blocked(&e))?;
        let came = came.map_err(|e| intake_refusal(&e.into()))?;
        let again = |error: String| Refusal::new(Code::BadProposal, error, "upload again");
        if let Some(why) = broken {
            return Err(again(format!("the upload broke off: {why}")));
        }
        let Some(came) = came else {
            return Err(wrong_size(most.saturating_add(1)));
        };
        if came.raw_size < SIZES.0 {
            return Err(wrong_size(came.raw_size));
        }
        match piece {
            Some(piece) => {
                same(&came, &piece)?;
                self.store(id, piece, Some(arrival)).await
            }
            None => {
                let mut state = lock(&self.state);
                let upload = state.uploads.get_mut(&id).ok_or_else(unknown)?;
                (upload.busy, upload.came) = (false, Some(came));
                let spare = upload.room.saturating_sub(came.raw_size);
                upload.room -= spare;
                let owner = upload.owner.clone();
                state.give_back(&owner, spare);
                arrival.done = true;
                Ok(())
            }
        }
    }

    /// The client names the piece of an upload whose bytes have come.
    pub(crate) async fn finalize(&self, id: Uuid, piece: PieceInfo) -> Result<(), Refusal> {
        let came = {
            let state = lock(&self.state);
            let upload = state.uploads.get(&id).ok_or_else(unknown)?;
            upload.came
        };
        let Some(came) = came else {
            return Err(Refusal::new(
                Code::Conflict,
                "the bytes of this upload have not come",
                "PUT them first",
            ));
        };
        same(&came, &piece)?;
        self.store(id, piece, None).await
    }

    /// Keeps a piece whose bytes are here. Begun, it is done even if nobody waits for it any more.
    async fn store(
        &self,
        id: Uuid,
        piece: PieceInfo,
        arrival: Option<Arrival>,
    ) -> Result<(), Refusal> {
        let (part, file, dir) = (self.part(&id), self.path(&piece), self.dir.clone());
        let (journal, state, turn) = (self.journal.clone(), self.state.clone(), self.turn.clone());
        let keep = move || -> Result<(), Refusal> {
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            let owner = {
                let state = lock(&state);
                let upload = state.uploads.get(&id).ok_or_else(unknown)?;
                upload.owner.clone()
            };
            let stored = Stored {
                piece,
                owner: owner.clone(),
                unix_ms: unix_ms(),
            };
            let moved = fs::rename(part, file).and_then(|()| File::open(dir)?.sync_all());
            moved.map_err(|e| intake_refusal(&e.into()))?;
            journal
                .write(|tx| tx.put(&PIECES, &key(&piece), &stored))
                .map_err(|e: JournalError| journal_refusal(&e))?;
            let bytes = piece.raw_size;
            {
                let mut state = lock(&state);
                state.drop_upload(&id);
                state.count(&owner, bytes);
                if let Some(old) = state.stored.insert(key(&piece), stored) {
                    state.give_back(&old.owner, old.piece.raw_size);
                }
            }
            if let Some(mut arrival) = arrival {
                arrival.done = true;
            }
            tracing::info!(piece = %piece.cid, owner, bytes, "a piece without a deal is here");
            Ok(())
        };
        let kept = tokio::task::spawn_blocking(keep).await;
        kept.map_err(|e| blocked(&e))?
    }

    /// Drops the pieces and uploads whose time is over.
    pub(crate) async fn expire(self: &Arc<Self>, now: u64) {
        let all = self.clone();
        match tokio::task::spawn_blocking(move || all.clean(now)).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::warn!(%e, "old pieces are not removed yet"),
            Err(e) => tracing::warn!(%e, "old pieces are not removed yet"),
        }
    }

    fn clean(&self, now: u64) -> Result<(), JournalError> {
        let ttl = self.cfg.ttl_secs.saturating_mul(1000);
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut files = Vec::new();
        let mut gone = Vec::new();
        {
            let mut state = lock(&self.state);
            let old = |since: u64, ttl| now.saturating_sub(since) > ttl;
            let pieces: Vec<_> = state
                .stored
                .iter()
                .filter(|(_, s)| old(s.unix_ms, ttl))
                .map(|(k, s)| (*k, s.piece))
                .collect();
            for (k, piece) in pieces {
                if let Some(s) = state.stored.remove(&k) {
                    state.give_back(&s.owner, s.piece.raw_size);
                }
                files.push(self.path(&piece));
                gone.push(k);
            }
            let uploads: Vec<Uuid> = state
                .uploads
                .iter()
                .filter(|(_, u)| !u.busy && old(u.unix_ms, UPLOAD_TTL))
                .map(|(id, _)| *id)
                .collect();
            for id in uploads {
                state.drop_upload(&id);
                files.push(self.part(&id));
            }
        }
        // Files without a row are removed at the next start too.
        if !gone.is_empty() {
            self.journal.write(|tx| {
                gone.iter()
                    .try_for_each(|k| tx.remove(&PIECES, k).map(drop))
            })?;
        }
        for file in files {
            match fs::remove_file(&file) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%e, file = %file.display(), "an old piece is not removed");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn blocked(e: &tokio::task::JoinError) -> Refusal {
    intake_refusal(&IntakeError::Io(io::Error::other(e.to_string())))
}

fn same(came: &PieceInfo, named: &PieceInfo) -> Result<(), Refusal> {
    if came == named {
        return Ok(());
    }
    Err(Refusal::new(
        Code::BadProposal,
        format!(
            "the bytes are piece {}, not {}",
            came.cid_v2(),
            named.cid_v2()
        ),
        "send the file that the piece CID is of",
    )
    .at("pieceCid"))
}

/// Writes what comes, and returns the piece that it is; `None` when it is more than `most` bytes.
fn write(
    part: &Path,
    most: u64,
    mut parts: mpsc::Receiver<Bytes>,
) -> io::Result<Option<PieceInfo>> {
    let mut file = File::create(part)?;
    let mut commp = CommpWriter::new();
    let mut len = 0u64;
    while let Some(bytes) = parts.blocking_recv() {
        len = len.saturating_add(bytes.len() as u64);
        if len > most {
            return Ok(None);
        }
        file.write_all(&bytes)?;
        commp.write_all(&bytes)?;
    }
    file.sync_all()?;
    Ok(Some(commp.finish()))
}

#[cfg(test)]
mod tests;
