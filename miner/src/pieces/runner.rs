//! Performs the effects of hand-offs: pulls, placements, deletions.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lotus_dataplane::{DataError, Far, HttpPull, fetch_fd, http_client, pull_http};
use lotus_journal::{EffectId, JournalError, Machine as _, Pending};
use lotus_runtime::{Backoff, Fault, trace};
use lotus_types::{DealKey, Kind, PieceInfo};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::intake::{self, Intake, put_in_place};
use super::machine::{Effect, Event, Offer, Phase, PieceMachine, Source};
use super::{BY_CID, FILES, MAX_DEALS_OF_A_PIECE, Pieces, Placer, blocking, deals_of};

/// Chunks between the network and the disk.
const QUEUE: usize = 16;
/// Time after which effects whose task died are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// Runs until stopped; started again, it goes on with what is journaled.
pub struct PieceRunner {
    pieces: Arc<Pieces>,
    placer: Arc<dyn Placer>,
    /// Chain height; 0 while unknown.
    height: watch::Receiver<i64>,
    pulls: Semaphore,
    http: reqwest::Client,
}

/// How a try to get the bytes ended.
enum Fetched {
    Stored,
    /// The bytes are wrong.
    Wrong(String),
    /// The hand-off has moved on.
    Moot,
}

/// What a failed try leaves to the next.
#[derive(Default)]
struct Carry {
    intake: Option<Intake>,
    source: Option<Source>,
}

impl PieceRunner {
    /// A runner for these hand-offs.
    pub fn new(
        pieces: Arc<Pieces>,
        placer: Arc<dyn Placer>,
        height: watch::Receiver<i64>,
    ) -> Result<Self, Fault> {
        let fault = |e: DataError| Fault::new(e.kind(), e.to_string(), e.fix());
        fs::create_dir_all(pieces.tmp())
            .map_err(DataError::io(format!("create {}", pieces.tmp().display())))
            .map_err(fault)?;
        pieces.clear_parts().map_err(fault)?;
        let idle = Duration::from_secs(pieces.cfg.idle_secs.max(1));
        Ok(Self {
            pulls: Semaphore::new(pieces.cfg.pulls),
            http: http_client(idle).map_err(fault)?,
            pieces,
            placer,
            height,
        })
    }

    /// Performs effects until `stop`.
    pub async fn run(self, stop: CancellationToken) -> Result<(), Fault> {
        let this = Arc::new(self);
        let fault = |e: JournalError| Fault::new(e.kind(), e.to_string(), e.fix());
        let reconciled = this.clone();
        blocking(move || reconciled.reconcile())
            .await
            .map_err(fault)?;
        let mut running: HashMap<Id, EffectId> = HashMap::new();
        let mut tasks: JoinSet<()> = JoinSet::new();
        loop {
            let pieces = this.pieces.clone();
            for pending in blocking(move || pieces.machines.pending())
                .await
                .map_err(fault)?
            {
                if running.values().any(|id| *id == pending.id) {
                    continue;
                }
                let id = pending.id;
                let task = this.clone().perform(pending, stop.child_token());
                running.insert(tasks.spawn(task).id(), id);
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = this.pieces.work.notified() => {}
                () = tokio::time::sleep(SWEEP) => {}
                Some(ended) = tasks.join_next_with_id() => {
                    let task = match ended {
                        Ok((task, ())) => task,
                        Err(e) => {
                            tracing::error!("a piece task died; it is run again: {e}");
                            e.id()
                        }
                    };
                    running.remove(&task);
                }
            }
        }
        while tasks.join_next().await.is_some() {}
        Ok(())
    }

    /// Tells hand-offs what became of their sectors while nobody listened.
    fn reconcile(&self) -> Result<(), JournalError> {
        self.pieces.machines.each(|key, offer| {
            let (Phase::Placed(place) | Phase::Active(place)) = offer.phase else {
                return Ok(());
            };
            let event = self.placer.sector(place.sector).event();
            // Nearly all know it already, and a write waits for the disk even if it changes
            // nothing.
            match event.filter(|e| PieceMachine::step(Some(&offer), e).is_some()) {
                Some(event) => self.pieces.apply(&key, &event, None).map(|_| ()),
                None => Ok(()),
            }
        })
    }

    fn follow_sector(&self, key: &DealKey, sector: u64) -> Result<(), JournalError> {
        match self.placer.sector(sector).event() {
            Some(event) => self.pieces.apply(key, &event, None).map(|_| ()),
            None => Ok(()),
        }
    }

    async fn perform(self: Arc<Self>, pending: Pending<PieceMachine>, stop: CancellationToken) {
        let Pending { id, key, effect } = pending;
        let span = tracing::info_span!("piece", %key, ?effect);
        if let Ok(Some(offer)) = self.pieces.get(&key) {
            trace::set_parent(&span, &offer.trace);
        }
        let work = async {
            let cfg = &self.pieces.cfg;
            let first = Duration::from_millis(cfg.retry_first_ms.max(1));
            let max = Duration::from_millis(cfg.retry_max_ms.max(1));
            let mut backoff = Backoff::new(first, max);
            let mut carry = Carry::default();
            loop {
                let tried = match effect {
                    Effect::Pull => self.pull(&key, id, &mut carry, &stop).await,
                    Effect::Place => self.place(&key, id).await,
                    Effect::Discard => self.discard(&key, id).await,
                };
                let Err(waits) = tried else { return };
                if stop.is_cancelled() {
                    return;
                }
                let wait = backoff.next();
                tracing::warn!(%key, ?effect, "{waits}; next try in {wait:.1?}");
                self.pieces.waits_for(&key, &waits);
                metrics::counter!("lotus_miner_piece_retries_total", "effect" => effect.name())
                    .increment(1);
                let cancel = self.cancel_of(&key);
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = cancel.cancelled() => {}
                    () = tokio::time::sleep(wait) => {}
                }
            }
        };
        work.instrument(span).await;
    }

    /// Applies an event that settles the effect, off the async threads.
    async fn done(&self, key: &DealKey, id: EffectId, event: Event) -> Result<(), String> {
        let (pieces, key) = (self.pieces.clone(), key.clone());
        blocking(move || pieces.apply(&key, &event, Some(id)))
            .await
            .map(|_| ())
            .map_err(|e| e.to_string())
    }

    async fn settle(&self, id: EffectId) -> Result<(), String> {
        let pieces = self.pieces.clone();
        blocking(move || pieces.machines.settle(id))
            .await
            .map_err(|e| e.to_string())
    }

    fn cancel_of(&self, key: &DealKey) -> CancellationToken {
        let live = self.pieces.lock_live();
        live.get(key).map(|l| l.cancel.clone()).unwrap_or_default()
    }

    /// Why the piece has no future, if its time is over.
    fn expired(&self, offer: &Offer) -> Option<String> {
        let (start, now) = (offer.terms.start_epoch, *self.height.borrow());
        (start > 0 && now > start).then(|| {
            format!("start epoch {start} passed before the piece was in a sector (now {now})")
        })
    }

    // ---- pull

    /// `Err` says what is waited for.
    async fn pull(
        &self,
        key: &DealKey,
        id: EffectId,
        carry: &mut Carry,
        stop: &CancellationToken,
    ) -> Result<(), String> {
        let offer = self.pieces.get(key).map_err(|e| e.to_string())?;
        let Some(offer) = offer.filter(|o| matches!(o.phase, Phase::Offered | Phase::Pulling))
        else {
            return self.settle(id).await;
        };
        if let Some(why) = self.expired(&offer) {
            return self.done(key, id, Event::Refused(why)).await;
        }
        // A source that is tried again does not hold a slot while it waits.
        let _slot = self.pulls.acquire().await.map_err(|e| e.to_string())?;
        if offer.phase == Phase::Offered {
            let (pieces, key) = (self.pieces.clone(), key.clone());
            blocking(move || pieces.apply(&key, &Event::PullStarted, None))
                .await
                .map_err(|e| e.to_string())?;
        }
        match self.fetch(key, id, &offer, carry, stop).await {
            Ok(Fetched::Stored) => {
                metrics::counter!("lotus_miner_pulled_bytes_total").increment(offer.piece.raw_size);
                tracing::info!(%key, piece = %offer.piece.cid, "piece is here and verified");
                Ok(())
            }
            Ok(Fetched::Wrong(why)) => {
                tracing::warn!(%key, "piece refused: {why}");
                self.done(key, id, Event::Refused(why)).await
            }
            Ok(Fetched::Moot) => self.settle(id).await,
            Err(e) => {
                // A full disk: give back what this pull took, and begin anew when there is room.
                if e.kind() == Kind::Capacity {
                    carry.intake = None;
                    intake::remove(&self.pieces.part(key)).map_err(|e| e.to_string())?;
                }
                if matches!(e, DataError::Changed { .. }) {
                    *carry = Carry::default();
                    intake::remove(&self.pieces.part(key)).map_err(|e| e.to_string())?;
                }
                Err(format!("{e} ({})", e.fix()))
            }
        }
    }

    async fn fetch(
        &self,
        key: &DealKey,
        id: EffectId,
        offer: &Offer,
        carry: &mut Carry,
        stop: &CancellationToken,
    ) -> Result<Fetched, DataError> {
        if let Some(done) = self.adopt(key, id, offer).await? {
            if offer.source == Source::Staged {
                intake::remove(&self.pieces.part(key))?;
            }
            return Ok(done);
        }
        let cancel = self.cancel_of(key);
        let halt = stop.child_token();
        let _guard = halt.clone().drop_guard();
        let pulled = {
            let live = self.pieces.lock_live();
            live.get(key).map(|l| l.pulled.clone()).unwrap_or_default()
        };
        let total = offer.piece.raw_size;
        let mut part = match carry.intake.take() {
            Some(part) => part,
            None => {
                let (path, halt) = (self.pieces.part(key), halt.clone());
                blocking(move || Intake::open(&path, total, &halt)).await?
            }
        };
        if carry.source.as_ref().is_some_and(|s| *s != offer.source) {
            part.mark_resumed();
        }
        carry.source = Some(offer.source.clone());
        pulled.store(part.written(), Ordering::Relaxed);

        let transfer = async {
            match &offer.source {
                _ if part.is_complete() => (Ok(Fetched::Stored), Some(part)),
                Source::Unix { socket, token } => {
                    self.copy_fd(socket, token, part, pulled, &halt).await
                }
                // Its data was synced before it was offered.
                Source::Staged => {
                    let why = "the disk lost the data that came with the call";
                    (Ok(Fetched::Wrong(why.into())), None)
                }
                Source::Http { url, headers } => {
                    let headers = headers.clone().into_iter().collect();
                    let far = None;
                    self.copy_http(url, headers, far, part, pulled, &halt).await
                }
                Source::Spoke { name, token } => {
                    let far = Some((self.pieces.far.of(name), token.as_str()));
                    let headers = HashMap::new();
                    self.copy_http(name, headers, far, part, pulled, &halt)
                        .await
                }
            }
        };
        // Dropping the transfer would lose the part file's state, so a withdrawal asks it to end.
        let (fetched, part) = {
            tokio::pin!(transfer);
            tokio::select! {
                done = &mut transfer => done,
                () = cancel.cancelled() => { halt.cancel(); transfer.await }
            }
        };
        match fetched {
            Err(e) => {
                carry.intake = part;
                return if cancel.is_cancelled() {
                    Ok(Fetched::Moot)
                } else {
                    Err(e)
                };
            }
            Ok(Fetched::Stored) => {}
            Ok(other) => return Ok(other),
        }
        let Some(part) = part else {
            return Ok(Fetched::Moot);
        };
        let resumed = part.is_resumed();
        let announced = offer.piece;
        let got = blocking(move || part.finish(&announced)).await?;
        if got != announced {
            intake::remove(&self.pieces.part(key))?;
            // What an earlier try left may be the wrong part: only a pull in one go decides.
            return if resumed {
                Err(DataError::Changed {
                    at: format!("{:?}", offer.source.name()),
                })
            } else {
                Ok(Fetched::Wrong(mismatch(&announced, &got)))
            };
        }
        self.keep(key, id, offer).await
    }

    /// Takes a file that another hand-off of the same piece brought.
    async fn adopt(
        &self,
        key: &DealKey,
        id: EffectId,
        offer: &Offer,
    ) -> Result<Option<Fetched>, DataError> {
        let _files = self.pieces.files.lock().await;
        let (pieces, key, piece) = (self.pieces.clone(), key.clone(), offer.piece);
        blocking(move || {
            let name = piece.cid.to_string();
            let known = pieces
                .machines
                .journal()
                .read(|v| v.get(&FILES, &name))
                .map_err(from_journal)?;
            let path = pieces.path(&piece.cid);
            let io = || DataError::io(format!("use {}", path.display()));
            let Some(known) = known else {
                return Ok(None);
            };
            if known.size != piece.size {
                return Ok(Some(Fetched::Wrong(mismatch(&piece, &known))));
            }
            let file = match fs::OpenOptions::new().write(true).open(&path) {
                Ok(f) => f,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(io()(e)),
            };
            // The same commP over another number of raw bytes: they differ by zeros at the end.
            if file.metadata().map_err(io())?.len() < piece.raw_size {
                file.set_len(piece.raw_size).map_err(io())?;
                file.sync_all().map_err(io())?;
            }
            pieces
                .apply(&key, &Event::Stored, Some(id))
                .map_err(from_journal)?;
            Ok(Some(Fetched::Stored))
        })
        .await
    }

    /// Moves the verified part to its place and journals that it is here.
    async fn keep(&self, key: &DealKey, id: EffectId, offer: &Offer) -> Result<Fetched, DataError> {
        let _files = self.pieces.files.lock().await;
        let (pieces, key, cid) = (self.pieces.clone(), key.clone(), offer.piece.cid);
        blocking(move || {
            let part = pieces.part(&key);
            let now = pieces.get(&key).map_err(from_journal)?;
            if !now.is_some_and(|o| matches!(o.phase, Phase::Offered | Phase::Pulling)) {
                intake::remove(&part)?;
                return Ok(Fetched::Moot);
            }
            let place = pieces.path(&cid);
            // Another hand-off was faster; its file may be longer by zeros, and readers have it.
            let known = pieces
                .machines
                .journal()
                .read(|v| v.get(&FILES, &cid.to_string()))
                .map_err(from_journal)?;
            // Without the journal's word a file there is what a crash left: it is replaced.
            if known.is_some() && place.exists() {
                intake::remove(&part)?;
                return Err(DataError::Unreachable {
                    at: place.display().to_string(),
                    why: "the piece came in by another deal; it is used".into(),
                });
            }
            put_in_place(&part, &place)?;
            pieces
                .apply(&key, &Event::Stored, Some(id))
                .map_err(from_journal)?;
            Ok(Fetched::Stored)
        })
        .await
    }

    async fn copy_fd(
        &self,
        socket: &Path,
        token: &str,
        mut part: Intake,
        pulled: Arc<AtomicU64>,
        halt: &CancellationToken,
    ) -> (Result<Fetched, DataError>, Option<Intake>) {
        let idle = Duration::from_secs(self.pieces.cfg.idle_secs.max(1));
        let (file, len) = match fetch_fd(socket, token, idle).await {
            Ok(found) => found,
            Err(e) => return (Err(e), Some(part)),
        };
        if len != part.total() {
            return (Ok(Fetched::Wrong(wrong_len(part.total(), len))), None);
        }
        let halt = halt.clone();
        blocking(move || {
            let copied = part.copy_from(&file, &pulled, &halt);
            (copied.map(|()| Fetched::Stored), Some(part))
        })
        .await
    }

    async fn copy_http(
        &self,
        url: &str,
        headers: HashMap<String, String>,
        far: Option<(Far, &str)>,
        mut part: Intake,
        pulled: Arc<AtomicU64>,
        halt: &CancellationToken,
    ) -> (Result<Fetched, DataError>, Option<Intake>) {
        let total = part.total();
        let pull = HttpPull {
            url: url.into(),
            headers,
            from: part.written(),
            limit: total,
            idle: Duration::from_secs(self.pieces.cfg.idle_secs.max(1)),
            etag: None,
        };
        let (tx, mut rx) = mpsc::channel::<bytes::Bytes>(QUEUE);
        let writer = blocking(move || {
            while let Some(chunk) = rx.blocking_recv() {
                if let Err(e) = part.write(&chunk) {
                    return (Err(e), part);
                }
                pulled.store(part.written(), Ordering::Relaxed);
            }
            (Ok(()), part)
        });
        let puller = async move {
            let pulling = async {
                match far {
                    Some((far, token)) => far.pull(token, &pull, &tx).await,
                    None => pull_http(&self.http, &pull, &tx).await,
                }
            };
            tokio::select! {
                pulled = pulling => pulled,
                () = halt.cancelled() => Err(DataError::Stopped),
            }
        };
        let (pulled, (wrote, part)) = tokio::join!(puller, writer);
        // The writer's error is the cause when both have one.
        let result = match (wrote, pulled) {
            (Err(e), _) => Err(e),
            (Ok(()), Err(DataError::TooLong { .. })) => {
                let why = format!("the source has more than the {total} bytes offered");
                return (Ok(Fetched::Wrong(why)), None);
            }
            (Ok(()), Err(e)) => Err(e),
            (Ok(()), Ok(p)) if p.end == total => Ok(Fetched::Stored),
            (Ok(()), Ok(p)) => return (Ok(Fetched::Wrong(wrong_len(total, p.end))), None),
        };
        (result, Some(part))
    }

    // ---- place, discard

    async fn place(&self, key: &DealKey, id: EffectId) -> Result<(), String> {
        let _placing = self.pieces.placing.lock().await;
        let offer = self.pieces.get(key).map_err(|e| e.to_string())?;
        let Some(offer) = offer.filter(|o| o.phase == Phase::Stored) else {
            return self.settle(id).await;
        };
        self.pieces.waits(key, &offer);
        match self.placer.place(key, offer.piece, &offer.terms).await {
            Ok(place) => {
                tracing::info!(%key, sector = place.sector, offset = place.offset, "piece is placed");
                self.done(key, id, Event::Placed(place)).await?;
                // The sector may have been proven, or have given the piece back, before we noted
                // that the piece is in it.
                if let Ok(None) = self.placer.placement(key).await {
                    let back = self.pieces.apply(key, &Event::Returned, None);
                    return back.map(|_| ()).map_err(|e| e.to_string());
                }
                self.follow_sector(key, place.sector)
                    .map_err(|e| e.to_string())
            }
            Err(e) if e.kind == Kind::Data => self.done(key, id, Event::Refused(e.message)).await,
            Err(e) => match self.expired(&offer) {
                Some(why) => self.done(key, id, Event::Refused(why)).await,
                None => Err(e.message),
            },
        }
    }

    async fn discard(&self, key: &DealKey, id: EffectId) -> Result<(), String> {
        let _files = self.pieces.files.lock().await;
        let (pieces, key) = (self.pieces.clone(), key.clone());
        blocking(move || {
            intake::remove(&pieces.part(&key)).map_err(|e| e.to_string())?;
            let Some(offer) = pieces.get(&key).map_err(|e| e.to_string())? else {
                return Ok(());
            };
            let name = offer.piece.cid.to_string();
            let others = pieces.machines.journal().read(|v| {
                for (other, _) in deals_of(&name, |from| {
                    v.scan(&BY_CID, Some(from), MAX_DEALS_OF_A_PIECE)
                })? {
                    let state = v.get(&PieceMachine::STATES, &other)?;
                    if other != key && state.is_some_and(|o: Offer| o.phase.is_live()) {
                        return Ok(true);
                    }
                }
                Ok::<_, JournalError>(false)
            });
            if !others.map_err(|e| e.to_string())? {
                intake::remove(&pieces.path(&offer.piece.cid)).map_err(|e| e.to_string())?;
                pieces
                    .machines
                    .journal()
                    .write(|tx| tx.remove(&FILES, &name).map(|_| ()))
                    .map_err(|e: JournalError| e.to_string())?;
                tracing::debug!(dir = %pieces.dir().display(), piece = name, "piece file deleted");
            }
            pieces.machines.settle(id).map_err(|e| e.to_string())
        })
        .await
    }
}

fn mismatch(announced: &PieceInfo, got: &PieceInfo) -> String {
    format!(
        "the bytes are piece {} of {} padded bytes, the offer says {} of {}",
        got.cid, got.size, announced.cid, announced.size
    )
}

fn wrong_len(announced: u64, got: u64) -> String {
    format!("the source has {got} bytes, the offer says {announced}")
}

/// The journal shares the disk with the pieces: its troubles pass as theirs do.
fn from_journal(e: JournalError) -> DataError {
    match e.kind() {
        Kind::Capacity => DataError::Io {
            doing: "write the journal".into(),
            source: io::ErrorKind::StorageFull.into(),
        },
        _ => DataError::Io {
            doing: "write the journal".into(),
            source: io::Error::other(e.to_string()),
        },
    }
}
