use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hub_proto::v1::{Event, ListPiecesRequest, PiecePhase, PieceState, event::What};
use hub_proto::{HubClient, HubError, events_stream};
use lotus_runtime::{Backoff, CancellationToken, Fault, Health};
use lotus_types::{Kind, PaddedSize, PieceCid, PieceInfo};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::time::DelayQueue;

use crate::{BlockingReader, IndexError, PieceIndex, PieceSource};

/// Pieces indexed at once: one reads while the other writes.
const JOBS: usize = 2;
/// Pieces of one answer to a listing. Source: hub.v1, `ListPiecesRequest.limit`.
const PAGE: u32 = 1000;
/// The whole state is compared with the hub's this often, whatever events say.
const RELIST: Duration = Duration::from_secs(60);
/// First and longest wait before a failed piece is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
/// Longest wait before segments are merged again after that failed: each try reads them.
const SETTLE: Duration = Duration::from_secs(24 * 3600);
/// Time for jobs to end at a stop. A merge of large segments takes longer, and is begun again.
const DRAIN: Duration = Duration::from_secs(10);

/// What the deals of a piece, taken together, want from a spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Index its blocks. Only pieces that are CARs have blocks.
    pub index: bool,
    /// Advertise its blocks.
    pub announce_payload: bool,
    /// Advertise the piece itself.
    pub announce_piece: bool,
}

impl Wanted {
    fn of(state: &PieceState) -> Self {
        let u = state.r#use.clone().unwrap_or_default();
        let car = u.format == "car";
        Self {
            index: u.index && car,
            announce_payload: u.announce_payload && u.index && car,
            announce_piece: u.announce_piece,
        }
    }

    fn and(self, other: Self) -> Self {
        Self {
            index: self.index || other.index,
            announce_payload: self.announce_payload || other.announce_payload,
            announce_piece: self.announce_piece || other.announce_piece,
        }
    }
}

/// What a spoke does beside the index. The calls block, may come again, and must then change
/// nothing.
pub trait Hooks: Send + Sync + 'static {
    /// The piece is wanted, and indexed if that is wanted.
    fn apply(&self, piece: &PieceInfo, wanted: Wanted) -> Result<(), Fault>;
    /// The piece is not wanted any more, and out of the index.
    fn gone(&self, piece: &PieceCid) -> Result<(), Fault>;
    /// The pieces that were applied and are not gone.
    fn known(&self) -> Result<Vec<PieceCid>, Fault>;
}

impl Hooks for () {
    fn apply(&self, _: &PieceInfo, _: Wanted) -> Result<(), Fault> {
        Ok(())
    }
    fn gone(&self, _: &PieceCid) -> Result<(), Fault> {
        Ok(())
    }
    fn known(&self) -> Result<Vec<PieceCid>, Fault> {
        Ok(Vec::new())
    }
}

impl From<IndexError> for Fault {
    fn from(e: IndexError) -> Self {
        Self::new(e.kind(), e.to_string(), e.fix())
    }
}

/// Keeps an index, and what hangs on it, in step with the hub's pieces.
///
/// Level-triggered: a listing and the events say what is wanted of each piece; a job brings the
/// piece there, and is repeated with back-off until it succeeds. So nothing depends on having
/// seen every event.
pub struct Follower<H> {
    hub: HubClient,
    index: PieceIndex,
    source: PieceSource,
    hooks: Arc<H>,
    health: Health,
    /// Name of the health component.
    component: String,
    pieces: HashMap<PieceCid, Piece>,
    /// Pieces that may need a job.
    queue: VecDeque<PieceCid>,
    retries: DelayQueue<PieceCid>,
    jobs: JoinSet<Done>,
    seen: u64,
}

struct Piece {
    /// What each deal wants, by its key.
    deals: BTreeMap<String, Wanted>,
    info: Option<PieceInfo>,
    /// What the last job that succeeded reached; `None` before the first.
    reached: Option<Option<Wanted>>,
    running: bool,
    waiting: bool,
    /// It is in the queue, where it needs to be but once.
    queued: bool,
    /// The target for which trying again is useless.
    hopeless: Option<Option<Wanted>>,
    backoff: Backoff,
}

impl Piece {
    fn target(&self) -> Option<Wanted> {
        self.deals
            .values()
            .copied()
            .reduce(Wanted::and)
            .filter(|w| *w != Wanted::default())
    }

    fn enqueue(&mut self, cid: PieceCid, queue: &mut VecDeque<PieceCid>) {
        if !std::mem::replace(&mut self.queued, true) {
            queue.push_back(cid);
        }
    }

    /// Whether it is where it should be, or cannot be brought there.
    fn settled(&self) -> bool {
        let target = self.target();
        self.reached == Some(target) || self.hopeless == Some(target)
    }
}

struct Done {
    piece: PieceCid,
    target: Option<Wanted>,
    result: Result<(), Fault>,
}

impl<H: Hooks> Follower<H> {
    /// A follower that reports its health as `component`.
    pub fn new(
        hub: HubClient,
        index: PieceIndex,
        source: PieceSource,
        hooks: Arc<H>,
        health: Health,
        component: &str,
    ) -> Self {
        Self {
            hub,
            index,
            source,
            hooks,
            health,
            component: component.into(),
            pieces: HashMap::new(),
            queue: VecDeque::new(),
            retries: DelayQueue::new(),
            jobs: JoinSet::new(),
            seen: 0,
        }
    }

    /// Runs until stopped. Calls `listed` once, when the hub's pieces are known.
    pub async fn run(
        mut self,
        listed: impl FnOnce() + Send,
        stop: CancellationToken,
    ) -> Result<(), Fault> {
        for piece in self.known()? {
            self.piece(piece);
        }
        self.seen = self.index.cursor()?;
        let mut listed = Some(listed);
        let mut events = self.subscribe(self.seen + 1);
        let mut relist = tokio::time::interval(RELIST);
        relist.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut saved = self.seen;
        let mut rebuilds = self.index.rebuilds();
        let mut settling = JoinSet::new();
        let (mut settle_retry, mut settle_at) = (Backoff::new(RELIST, SETTLE), Instant::now());
        let mut list_retry = Backoff::new(RETRY.0, Duration::from_secs(5));
        loop {
            self.start_jobs(&stop);
            tokio::select! {
                () = stop.cancelled() => break,
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => self.finish(done),
                    Err(e) => return Err(Fault::new(Kind::Fatal, format!("indexing failed: {e}"), "report this, with the log")),
                },
                Some(settled) = settling.join_next() => match settled {
                    Ok(true) => settle_retry.reset(),
                    _ => settle_at = Instant::now() + settle_retry.next(),
                },
                Some(due) = self.retries.next(), if !self.retries.is_empty() => {
                    let cid = due.into_inner();
                    self.piece(cid).waiting = false;
                    self.enqueue(cid);
                }
                // It never fails: the sender lives in the index.
                Ok(()) = rebuilds.changed() => self.anew(),
                // Only the listing knows all deals of a piece; before it, an event may mislead.
                event = events.next(), if listed.is_none() => match event {
                    Some(Ok(event)) => self.take(&event),
                    Some(Err(e)) if e.kind() == Kind::Config => {
                        return Err(Fault::new(e.kind(), e.to_string(), e.fix()));
                    }
                    // Events that are no longer kept: the listing replaces them.
                    Some(Err(_)) | None => {
                        tracing::info!(from = self.seen, "hub events start anew");
                        events = self.subscribe(0);
                        relist.reset_after(RETRY.0);
                    }
                },
                _ = relist.tick() => match self.list(&stop).await {
                    Ok(true) => {
                        list_retry.reset();
                        if let Some(listed) = listed.take() {
                            listed();
                        }
                        if self.seen != saved {
                            saved = self.seen;
                            self.index.set_cursor(saved)?;
                        }
                        let idle = settling.is_empty() && self.jobs.is_empty();
                        if idle && Instant::now() >= settle_at {
                            let index = self.index.clone();
                            settling.spawn_blocking(move || index.settle());
                        }
                    }
                    Ok(false) => break,
                    Err(e) if e.kind() == Kind::Config => {
                        return Err(Fault::new(e.kind(), e.to_string(), e.fix()));
                    }
                    Err(e) => {
                        tracing::info!(error = %e, "pieces not listed; trying again");
                        relist.reset_after(list_retry.next());
                    }
                },
            }
        }
        // The reads of the jobs end by the same token. A job is one transaction: what is not
        // finished is done again at the next start.
        let jobs = async { while self.jobs.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, jobs).await.is_err() {
            tracing::info!("a piece's index is not finished; it is begun again at the next start");
        }
        self.index.set_cursor(self.seen)?;
        Ok(())
    }

    /// Looks at every piece again: some are to be indexed anew.
    fn anew(&mut self) {
        for (cid, piece) in &mut self.pieces {
            piece.reached = None;
            piece.hopeless = None;
            piece.enqueue(*cid, &mut self.queue);
        }
    }

    fn enqueue(&mut self, cid: PieceCid) {
        if let Some(piece) = self.pieces.get_mut(&cid) {
            piece.enqueue(cid, &mut self.queue);
        }
    }

    fn known(&self) -> Result<Vec<PieceCid>, Fault> {
        let mut known = self.hooks.known()?;
        known.extend(self.index.pieces()?.into_iter().map(|(p, _)| p));
        Ok(known)
    }

    fn subscribe(&self, from: u64) -> Pin<Box<dyn Stream<Item = Result<Event, HubError>> + Send>> {
        Box::pin(events_stream(self.hub.clone(), from, &["piece"]))
    }

    fn piece(&mut self, cid: PieceCid) -> &mut Piece {
        self.pieces.entry(cid).or_insert_with(|| Piece {
            deals: BTreeMap::new(),
            info: None,
            reached: None,
            running: false,
            waiting: false,
            queued: false,
            hopeless: None,
            backoff: Backoff::new(RETRY.0, RETRY.1),
        })
    }

    fn take(&mut self, event: &Event) {
        self.seen = self.seen.max(event.seq);
        if let Some(What::Piece(state)) = &event.what {
            self.note(state);
        }
    }

    /// Takes in what the hub says of one deal's piece.
    fn note(&mut self, state: &PieceState) -> Option<(PieceCid, String)> {
        let cid: PieceCid = state.piece_cid.parse().ok()?;
        let key = state
            .key
            .as_ref()
            .map(|k| format!("{}/{}", k.client, k.id))?;
        match state.phase() {
            PiecePhase::Placed | PiecePhase::Active => {
                let info = PieceInfo {
                    cid,
                    size: PaddedSize::new(state.piece_size).ok()?,
                    raw_size: state.raw_size,
                };
                let piece = self.piece(cid);
                piece.info = Some(info);
                piece.deals.insert(key.clone(), Wanted::of(state));
                self.enqueue(cid);
                return Some((cid, key));
            }
            PiecePhase::Withdrawn | PiecePhase::Failed => {
                if let Some(piece) = self.pieces.get_mut(&cid) {
                    piece.deals.remove(&key);
                    piece.enqueue(cid, &mut self.queue);
                }
            }
            PiecePhase::Unspecified
            | PiecePhase::Offered
            | PiecePhase::Pulling
            | PiecePhase::Stored => {}
        }
        None
    }

    /// Compares with everything that the hub has. False when stopped.
    async fn list(&mut self, stop: &CancellationToken) -> Result<bool, HubError> {
        let mut states = Vec::new();
        let mut after = String::new();
        loop {
            let request = self.hub.request(ListPiecesRequest {
                after: after.clone(),
                limit: PAGE,
            });
            let mut client = self.hub.pieces();
            let page = tokio::select! {
                () = stop.cancelled() => return Ok(false),
                r = client.list(request) => r?.into_inner(),
            };
            states.extend(page.pieces);
            if page.next.is_empty() || page.next == after {
                break;
            }
            after = page.next;
        }
        let live: std::collections::HashSet<_> =
            states.iter().filter_map(|s| self.note(s)).collect();
        for (cid, piece) in &mut self.pieces {
            piece
                .deals
                .retain(|key, _| live.contains(&(*cid, key.clone())));
            piece.enqueue(*cid, &mut self.queue);
        }
        Ok(true)
    }

    fn start_jobs(&mut self, stop: &CancellationToken) {
        while self.jobs.len() < JOBS {
            let Some(cid) = self.queue.pop_front() else {
                break;
            };
            let Some(piece) = self.pieces.get_mut(&cid) else {
                continue;
            };
            piece.queued = false;
            let target = piece.target();
            if piece.settled() || piece.running || piece.waiting {
                continue;
            }
            piece.running = true;
            let info = piece.info;
            let stop = stop.clone();
            let (index, source, hooks) =
                (self.index.clone(), self.source.clone(), self.hooks.clone());
            self.jobs.spawn(async move {
                let car = BlockingReader::new(source, cid, stop);
                let work = move || match (target, info) {
                    (Some(wanted), Some(info)) => reach(&index, car, &*hooks, &info, wanted),
                    _ => {
                        index.remove_piece(&cid)?;
                        hooks.gone(&cid)
                    }
                };
                let result = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
                    Err(Fault::new(
                        Kind::Data,
                        format!("indexing {cid}: {e}"),
                        "report this",
                    ))
                });
                Done {
                    piece: cid,
                    target,
                    result,
                }
            });
        }
    }

    fn finish(&mut self, done: Done) {
        let cid = done.piece;
        let Some(piece) = self.pieces.get_mut(&cid) else {
            return;
        };
        piece.running = false;
        match done.result {
            Ok(()) => {
                piece.reached = Some(done.target);
                piece.hopeless = None;
                piece.backoff.reset();
                if piece.deals.is_empty() && done.target.is_none() {
                    self.pieces.remove(&cid);
                }
                self.health.set(&self.component, Ok(self.summary()));
            }
            Err(e) if e.kind == Kind::Data => {
                tracing::warn!(piece = %cid, error = %e, fix = e.fix, "piece cannot be indexed");
                metrics::counter!("lotus_markets_index_failures_total").increment(1);
                piece.hopeless = Some(done.target);
                self.health.set(&self.component, Ok(self.summary()));
            }
            Err(e) => {
                let pause = piece.backoff.next();
                tracing::info!(piece = %cid, error = %e, ?pause, "piece not indexed; trying again");
                piece.waiting = true;
                self.retries.insert_at(cid, Instant::now() + pause);
                if !e.kind.is_retryable() || e.kind == Kind::Capacity {
                    let why = format!("{e}; fix: {}", e.fix);
                    self.health.set(&self.component, Err(why));
                }
            }
        }
        // What is wanted may have changed meanwhile.
        self.enqueue(cid);
    }

    fn summary(&self) -> String {
        let reached = self.pieces.values().filter(|p| p.reached.is_some()).count();
        let bad = self
            .pieces
            .values()
            .filter(|p| p.hopeless.is_some())
            .count();
        // What is to be removed counts too: until then it is still served.
        let open = self.pieces.values().filter(|p| !p.settled()).count();
        let mut text = format!("{reached} pieces");
        if open > 0 {
            text += &format!("; {open} to go");
        }
        if bad > 0 {
            text += &format!("; {bad} cannot be indexed (see the log)");
        }
        text
    }
}

fn reach<H: Hooks>(
    index: &PieceIndex,
    car: BlockingReader,
    hooks: &H,
    info: &PieceInfo,
    wanted: Wanted,
) -> Result<(), Fault> {
    let cid = info.cid;
    if wanted.index {
        if !index.has_piece(&cid)? || index.is_stale(&cid)? {
            // First the lease, so that its errors keep their kind.
            car.open()?;
            let blocks = index.add_car(&cid, car)?;
            tracing::info!(piece = %cid, blocks, "piece indexed");
            metrics::counter!("lotus_markets_indexed_blocks_total").increment(blocks);
        }
    } else {
        index.remove_piece(&cid)?;
    }
    hooks.apply(info, wanted)
}
