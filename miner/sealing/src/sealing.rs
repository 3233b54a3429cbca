use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use futures::future::BoxFuture;
use lotus_chain::Follower;
use lotus_journal::{EffectId, Journal, JournalError, Machines, Map, Tx};
use lotus_messages::Sender;
use lotus_node_client::Node;
use lotus_node_client::api::{NetworkParams, TipSet, TipSetKey};
use lotus_runtime::trace;
use lotus_types::{ActorId, DealKey, PieceCid, PieceInfo, SectorId, SectorNumber, SectorSize};
use lotus_workers::{Output, Pool, Progress, Task, WorkError};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, OnceCell, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::machine::{Event, Sector, SectorPiece, SectorState, Sectors, Terms};
use crate::pieces::{self, Choice};
use crate::record::{LOG, LOG_LIMIT, LogEntry, SectorChange, SectorRecord};
use crate::runner::Runner;
use crate::{SealingConfig, SealingError, Storage};

/// Told of every change in the transaction that makes it.
pub trait Observer: Send + Sync {
    /// Writes what must change together with the sector.
    fn in_tx(&self, tx: &mut Tx, change: &SectorChange<'_>) -> Result<(), JournalError>;
    /// The transaction of the last change is on disk.
    fn committed(&self);
}

/// Where the raw bytes of pieces are.
pub trait PieceFiles: Send + Sync {
    /// The file of a piece: complete and verified.
    fn path(&self, cid: &PieceCid) -> PathBuf;
}

/// Where heavy work is done.
pub trait Work: Send + Sync {
    /// Does a task and reports its progress.
    fn run(&self, task: Task, progress: Progress) -> BoxFuture<'_, Result<Output, WorkError>>;
}

impl Work for Pool {
    fn run(&self, task: Task, progress: Progress) -> BoxFuture<'_, Result<Output, WorkError>> {
        Box::pin(Self::run(self, task, Some(progress)))
    }
}

/// What sealing needs.
pub struct SealingDeps {
    /// The hub's journal.
    pub journal: Journal,
    /// The full node.
    pub node: Node,
    /// Its head.
    pub follower: Follower,
    /// Sends messages.
    pub sender: Sender,
    /// Does heavy work: a [`Pool`].
    pub work: Arc<dyn Work>,
    /// Where sectors are kept.
    pub storage: Storage,
    /// The miner.
    pub miner: ActorId,
    /// Size of its sectors.
    pub size: SectorSize,
    /// `[sealing]`.
    pub cfg: SealingConfig,
    /// Told of every change.
    pub observer: Arc<dyn Observer>,
    /// Where the pieces are.
    pub pieces: Arc<dyn PieceFiles>,
}

/// Where a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The sector.
    pub sector: SectorNumber,
    /// Offset in it, Fr32 padding included.
    pub offset: u64,
}

/// Room for pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Padded bytes that sealing can take now: room in waiting sectors and in sectors that may
    /// still be opened.
    pub free_bytes: u64,
    /// Largest piece, padded bytes.
    pub max_piece_size: u64,
    /// Sectors between `WaitDeals` and `Proving`.
    pub sealing_sectors: u32,
}

/// Disk space that sealing one sector takes, in sectors: replica, data, trees and labels. Eleven
/// layers of labels at 32 GiB; the small sizes have two.
const SPACE_PER_SECTOR: u64 = 16;

/// A journaled placement.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Placed {
    sector: SectorNumber,
    offset: u64,
    piece: PieceCid,
}

/// Where each deal's piece is: for ever.
const PLACED: Map<DealKey, Placed> = Map::new("sealing.placed");
/// The next sector number, under key 0.
const NEXT_NUMBER: Map<u64, u64> = Map::new("sealing.next_number");
/// Large outputs that a later step needs.
const OUTPUTS: Map<(SectorNumber, u64), StoredBytes> = Map::new("sealing.outputs");

#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct StoredBytes(#[serde(with = "serde_bytes")] Vec<u8>);

/// Which output.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stored {
    /// Of PreCommit1, for PreCommit2.
    Labels = 1,
    /// The seal proof.
    Proof = 2,
}

/// What changes in the journal together with a sector's state.
#[derive(Debug, Default)]
pub(crate) enum Also {
    /// Nothing.
    #[default]
    Nothing,
    /// An output is stored.
    Store(Stored, Vec<u8>),
    /// The outputs are dropped.
    DropOutputs,
}

/// What is known of a sector but not journaled.
#[derive(Clone, Debug, Default)]
pub(crate) struct Live {
    pub(crate) progress: Option<f64>,
    pub(crate) last_error: Option<String>,
    pub(crate) next_retry_unix_ms: Option<u64>,
}

/// Places pieces and answers questions. Clones share one state.
#[derive(Clone)]
pub struct Sealing(Arc<Shared>);

/// What the handle and the runner share.
pub(crate) struct Shared {
    pub(crate) machines: Machines<Sectors>,
    pub(crate) node: Node,
    pub(crate) head: watch::Receiver<Option<Arc<TipSet>>>,
    pub(crate) sender: Sender,
    pub(crate) work: Arc<dyn Work>,
    pub(crate) storage: Storage,
    pub(crate) miner: ActorId,
    pub(crate) size: SectorSize,
    pub(crate) cfg: SealingConfig,
    pub(crate) pieces: Arc<dyn PieceFiles>,
    pub(crate) params: OnceCell<NetworkParams>,
    observer: Arc<dyn Observer>,
    /// Held while a change is committed and mirrored, so that both have one order.
    writing: Mutex<()>,
    /// The journal's sectors, to read without a transaction.
    mirror: Mutex<BTreeMap<SectorNumber, Sector>>,
    live: Mutex<HashMap<SectorNumber, Live>>,
    /// One piece is placed at a time.
    placing: tokio::sync::Mutex<()>,
    /// There are new effects.
    pub(crate) wake: Notify,
    /// Counts changes, for those who wait for one.
    pub(crate) changes: watch::Sender<u64>,
    pub(crate) stop: CancellationToken,
    /// Calls that block: awaited at the end, so that nothing is written after it.
    pub(crate) calls: TaskTracker,
}

impl Sealing {
    /// Reads the journal. The sectors go on when the runner runs.
    pub fn new(deps: SealingDeps) -> Result<(Self, Runner), SealingError> {
        let machines = Machines::new(deps.journal);
        let mirror = machines.all()?.into_iter().collect();
        let shared = Arc::new(Shared {
            machines,
            node: deps.node,
            head: deps.follower.head(),
            sender: deps.sender,
            work: deps.work,
            storage: deps.storage,
            miner: deps.miner,
            size: deps.size,
            cfg: deps.cfg,
            pieces: deps.pieces,
            params: OnceCell::new(),
            observer: deps.observer,
            writing: Mutex::default(),
            mirror: Mutex::new(mirror),
            live: Mutex::default(),
            placing: tokio::sync::Mutex::default(),
            wake: Notify::new(),
            changes: watch::Sender::new(0),
            stop: CancellationToken::new(),
            calls: TaskTracker::new(),
        });
        Ok((Self(shared.clone()), Runner(shared)))
    }

    /// Puts a piece into a sector, once for each deal: asked again, it answers the same.
    pub async fn add_piece(
        &self,
        key: DealKey,
        piece: PieceInfo,
        terms: Terms,
    ) -> Result<Placement, SealingError> {
        let s = &self.0;
        if !piece.fits(s.size) {
            return Err(SealingError::TooLarge {
                piece: piece.size,
                sector: s.size,
            });
        }
        let _turn = s.placing.lock().await;
        if let Some(placed) = self.placed(&key)? {
            if placed.piece != piece.cid {
                return Err(SealingError::OtherPiece { key });
            }
            return Ok(placed.into());
        }
        loop {
            let (number, offset, opens) = match s.choose(&piece) {
                Choice::Into(number, offset) => (number, offset, false),
                Choice::Open => (s.next_number().await?, 0, true),
                Choice::Close(full) => {
                    s.apply(full, Event::StartPacking, None, Also::Nothing)
                        .await?;
                    continue;
                }
                Choice::NoRoom(sealing) => return Err(SealingError::NoRoom { sealing }),
            };
            let placed = Placed {
                sector: number,
                offset,
                piece: piece.cid,
            };
            let event = Event::PieceAdded {
                piece: SectorPiece {
                    key: key.clone(),
                    piece,
                    offset,
                    terms: terms.clone(),
                    claim: None,
                    trace: trace::current(),
                },
                unix_ms: unix_ms(),
            };
            let deal = key.clone();
            let applied = s
                .apply_with(number, event, None, move |tx| {
                    if opens {
                        tx.put(&NEXT_NUMBER, &0, &(number.0 + 1))?;
                    }
                    tx.put(&PLACED, &deal, &placed)
                })
                .await?;
            // The sector may have closed in between; then another one is chosen.
            if applied {
                return Ok(placed.into());
            }
        }
    }

    /// Opens a sector without pieces: committed capacity.
    pub async fn pledge(&self) -> Result<SectorNumber, SealingError> {
        let s = &self.0;
        let _turn = s.placing.lock().await;
        let sealing = pieces::in_use(&lock(&s.mirror));
        if s.cfg.max_sealing_sectors > 0 && sealing >= s.cfg.max_sealing_sectors as usize {
            return Err(SealingError::NoRoom { sealing });
        }
        let number = s.next_number().await?;
        let event = Event::Pledged { unix_ms: unix_ms() };
        s.apply_with(number, event, None, move |tx| {
            tx.put(&NEXT_NUMBER, &0, &(number.0 + 1))
        })
        .await?;
        Ok(number)
    }

    /// Where the piece of a deal is.
    pub fn placement(&self, key: &DealKey) -> Result<Option<Placement>, SealingError> {
        Ok(self.placed(key)?.map(Placement::from))
    }

    fn placed(&self, key: &DealKey) -> Result<Option<Placed>, SealingError> {
        let journal = self.0.machines.journal();
        Ok(journal.read(|v| v.get::<_, _>(&PLACED, key))?)
    }

    /// Every sector, by number, without logs.
    #[must_use]
    pub fn sectors(&self) -> Vec<SectorRecord> {
        let mirror = lock(&self.0.mirror).clone();
        let live = lock(&self.0.live);
        mirror
            .into_iter()
            .map(|(number, sector)| record(number, sector, live.get(&number), Vec::new()))
            .collect()
    }

    /// One sector with its log.
    pub fn sector(&self, number: SectorNumber) -> Result<Option<SectorRecord>, SealingError> {
        let Some(sector) = self.0.get(number) else {
            return Ok(None);
        };
        let first = sector.events.saturating_sub(LOG_LIMIT);
        let limit = usize::try_from(LOG_LIMIT).unwrap_or(usize::MAX);
        let log = self.0.machines.journal().read(|v| {
            let entries = v.scan(&LOG, Some(&(number, first)), limit)?;
            let own = entries.into_iter().take_while(|((n, _), _)| *n == number);
            Ok::<_, JournalError>(own.map(|(_, entry)| entry).collect())
        })?;
        let live = lock(&self.0.live);
        Ok(Some(record(number, sector, live.get(&number), log)))
    }

    /// Room for pieces now.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        let s = &self.0;
        let (sealing, room) = {
            let mirror = lock(&s.mirror);
            let waiting = mirror
                .values()
                .filter(|x| x.state == SectorState::WaitDeals);
            let room: u64 = waiting.map(|x| pieces::room(s.size, x)).sum();
            (pieces::in_use(&mirror) as u64, room)
        };
        let by_limit = match u64::from(s.cfg.max_sealing_sectors) {
            0 => u64::MAX,
            limit => limit.saturating_sub(sealing),
        };
        let by_disk = s.storage.free_bytes() / (s.size.bytes() * SPACE_PER_SECTOR);
        Capacity {
            free_bytes: room.saturating_add(by_limit.min(by_disk).saturating_mul(s.size.bytes())),
            max_piece_size: s.size.bytes(),
            sealing_sectors: u32::try_from(sealing).unwrap_or(u32::MAX),
        }
    }

    /// Counts up with every change of any sector.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// Closes a waiting sector now. One that is closed already stays as it is.
    pub async fn seal_now(&self, number: SectorNumber) -> Result<(), SealingError> {
        let s = &self.0;
        s.get(number).ok_or(SealingError::NoSector(number))?;
        s.apply(number, Event::StartPacking, None, Also::Nothing)
            .await?;
        Ok(())
    }

    /// Deletes the files of a sector that can never be proven.
    pub async fn remove(&self, number: SectorNumber) -> Result<(), SealingError> {
        let s = &self.0;
        let sector = s.get(number).ok_or(SealingError::NoSector(number))?;
        if s.apply(number, Event::Remove, None, Also::Nothing).await? {
            return Ok(());
        }
        Err(SealingError::WrongState {
            number,
            state: sector.state,
            wanted: "in state FailedUnrecoverable",
        })
    }
}

impl From<Placed> for Placement {
    fn from(p: Placed) -> Self {
        Self {
            sector: p.sector,
            offset: p.offset,
        }
    }
}

fn record(
    number: SectorNumber,
    sector: Sector,
    live: Option<&Live>,
    log: Vec<LogEntry>,
) -> SectorRecord {
    let live = live.cloned().unwrap_or_default();
    SectorRecord {
        number,
        last_error: live.last_error.or_else(|| sector.reason.clone()),
        progress: live.progress,
        next_retry_unix_ms: live.next_retry_unix_ms,
        sector,
        log,
    }
}

impl Shared {
    pub(crate) fn id(&self, number: SectorNumber) -> SectorId {
        SectorId {
            miner: self.miner,
            number,
        }
    }

    pub(crate) fn get(&self, number: SectorNumber) -> Option<Sector> {
        lock(&self.mirror).get(&number).cloned()
    }

    /// Changes what is known of a sector in memory.
    pub(crate) fn live(&self, number: SectorNumber, f: impl FnOnce(&mut Live)) {
        f(lock(&self.live).entry(number).or_default());
    }

    fn choose(&self, piece: &PieceInfo) -> Choice {
        pieces::choose(self.size, &self.cfg, &lock(&self.mirror), piece)
    }

    /// The first number that neither this journal nor the chain has used.
    async fn next_number(&self) -> Result<SectorNumber, SealingError> {
        let miner = self.miner.address();
        let used = self
            .node
            .state_miner_allocated(miner, &TipSetKey::HEAD)
            .await?;
        let journal = self.machines.journal();
        let next: Option<u64> =
            journal.read(|v| v.get(&NEXT_NUMBER, &0).map_err(SealingError::from))?;
        let mut number = next.unwrap_or(0);
        for range in used.ranges() {
            if range.contains(&number) {
                number = range.end;
            }
        }
        Ok(SectorNumber(number))
    }

    /// Applies an event; `false` when it does not apply in the sector's state.
    pub(crate) async fn apply(
        self: &Arc<Self>,
        number: SectorNumber,
        event: Event,
        settles: Option<EffectId>,
        also: Also,
    ) -> Result<bool, SealingError> {
        self.apply_with(number, event, settles, move |tx| match also {
            Also::Nothing => Ok(()),
            Also::Store(what, bytes) => {
                tx.put(&OUTPUTS, &(number, what as u64), &StoredBytes(bytes))
            }
            Also::DropOutputs => {
                for what in [Stored::Labels, Stored::Proof] {
                    tx.remove(&OUTPUTS, &(number, what as u64))?;
                }
                Ok(())
            }
        })
        .await
    }

    async fn apply_with(
        self: &Arc<Self>,
        number: SectorNumber,
        event: Event,
        settles: Option<EffectId>,
        also: impl FnOnce(&mut Tx) -> Result<(), JournalError> + Send + 'static,
    ) -> Result<bool, SealingError> {
        let shared = self.clone();
        let span = tracing::Span::current();
        self.blocking(move || {
            let _entered = span.enter();
            shared.commit(number, &event, settles, also)
        })
        .await
    }

    fn commit(
        &self,
        number: SectorNumber,
        event: &Event,
        settles: Option<EffectId>,
        also: impl FnOnce(&mut Tx) -> Result<(), JournalError>,
    ) -> Result<bool, SealingError> {
        let order = lock(&self.writing);
        let step = self
            .machines
            .apply(&number, event, settles, |tx, before, after| {
                also(tx)?;
                let from = before.map(|s| s.state);
                let entry = LogEntry {
                    unix_ms: unix_ms(),
                    event: event.name().into(),
                    from: from.map_or(String::new(), |s| s.to_string()),
                    to: after.state.to_string(),
                    message: event.message(),
                };
                tx.put(&LOG, &(number, after.events), &entry)?;
                if let Some(old) = after.events.checked_sub(LOG_LIMIT) {
                    tx.remove(&LOG, &(number, old))?;
                }
                self.observer.in_tx(
                    tx,
                    &SectorChange {
                        number,
                        from,
                        to: after.state,
                        sector: after,
                    },
                )
            })?;
        let Some(step) = step else {
            return Ok(false);
        };
        let from = step.before.map(|s| s.state);
        let to = step.after.state;
        lock(&self.mirror).insert(number, step.after);
        if from != Some(to) {
            lock(&self.live).remove(&number);
        }
        drop(order);
        tracing::info!(sector = %number, event = event.name(),
            from = from.map_or("", SectorState::as_str), to = to.as_str(), "{}", event.message());
        metrics::counter!("lotus_miner_sector_events_total", "event" => event.name(),
            "to" => to.as_str())
        .increment(1);
        self.observer.committed();
        self.changes.send_modify(|n| *n = n.wrapping_add(1));
        self.wake.notify_one();
        Ok(true)
    }

    /// An output of an earlier step.
    pub(crate) async fn stored(
        self: &Arc<Self>,
        number: SectorNumber,
        what: Stored,
    ) -> Result<Option<Vec<u8>>, SealingError> {
        let shared = self.clone();
        self.blocking(move || {
            let journal = shared.machines.journal();
            let found = journal.read(|v| v.get(&OUTPUTS, &(number, what as u64)));
            Ok(found.map_err(|e: JournalError| e)?.map(|b| b.0))
        })
        .await
    }

    /// Runs something that blocks on a thread that may.
    pub(crate) async fn blocking<R: Send + 'static>(
        &self,
        f: impl FnOnce() -> Result<R, SealingError> + Send + 'static,
    ) -> Result<R, SealingError> {
        match self.calls.spawn_blocking(f).await {
            Ok(done) => done,
            Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
            Err(_) => Err(SealingError::Stopped),
        }
    }
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A poisoned lock means that a thread panicked between two lines that keep no invariant open.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
