use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use lotus_chain::Follower;
use lotus_journal::{Journal, JournalError, Machine as _, Tx};
use lotus_messages::Sender;
use lotus_node_client::Node;
use lotus_proofs::ProofMode;
use lotus_runtime::trace;
use lotus_types::{ActorId, Commitment, DealKey, PieceCid, PieceInfo, SectorNumber, SectorSize};
use lotus_workers::{Output, Pool, Progress, Task, WorkError};
use tokio::sync::watch;

use crate::machine::{Event, Sector, SectorPiece, SectorState, Sectors, Terms};
use crate::pieces::{self, Choice};
use crate::record::{LOG, LOG_LIMIT, LogEntry, SectorChange, SectorRecord};
use crate::runner::Runner;
use crate::shared::{Also, Live, NEXT_NUMBER, PLACED, Placed, Shared, lock, unix_ms};
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
    /// Which proofs its workers make.
    pub proofs: ProofMode,
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

/// The files of one replica of a sector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The replica.
    pub sealed: PathBuf,
    /// Its cache directory.
    pub cache: PathBuf,
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

/// Places pieces and answers questions. Clones share one state.
#[derive(Clone)]
pub struct Sealing(pub(crate) Arc<Shared>);

impl Sealing {
    /// Reads the journal. The sectors go on when the runner runs.
    pub fn new(deps: SealingDeps) -> Result<(Self, Runner), SealingError> {
        let shared = Arc::new(Shared::open(deps)?);
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
        let head = s.head.borrow().as_ref().map(|h| h.height);
        let start = terms.start_epoch;
        if let Some(head) = head.filter(|h| start.0 > 0 && start <= *h) {
            return Err(SealingError::DealExpired { key, start, head });
        }
        loop {
            let upgrade = s.upgrade(&piece, &terms).await?;
            let (number, offset, opens) = match s.choose(&piece, &upgrade) {
                Choice::Into(number, offset) => (number, offset, false),
                Choice::Upgrade(number) => (number, 0, false),
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
                .apply_all(vec![(number, event)], None, move |tx| {
                    if opens {
                        tx.put(&NEXT_NUMBER, &0, &(number.0 + 1))?;
                    }
                    tx.put(&PLACED, &deal, &placed)
                })
                .await?;
            // The sector may have closed in between; then another one is chosen.
            if applied > 0 {
                return Ok(placed.into());
            }
        }
    }

    /// Opens a sector without pieces: committed capacity.
    pub async fn pledge(&self) -> Result<SectorNumber, SealingError> {
        let s = &self.0;
        let _turn = s.placing.lock().await;
        let sealing = pieces::in_use(lock(&s.mirror).busy());
        if s.cfg.max_sealing_sectors > 0 && sealing >= s.cfg.max_sealing_sectors as usize {
            return Err(SealingError::NoRoom { sealing });
        }
        let number = s.next_number().await?;
        let event = Event::Pledged { unix_ms: unix_ms() };
        s.apply_all(vec![(number, event)], None, move |tx| {
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

    /// The state of every sector, by number.
    #[must_use]
    pub fn states(&self) -> Vec<(SectorNumber, SectorState)> {
        lock(&self.0.mirror).states()
    }

    /// The state of a sector, and the reason that goes with it.
    #[must_use]
    pub fn state(&self, number: SectorNumber) -> Option<(SectorState, Option<String>)> {
        let mirror = lock(&self.0.mirror);
        let (state, reason) = mirror.state(number)?;
        Some((state, reason.map(str::to_owned)))
    }

    /// The sectors that are worked on or wait for something, by number, without logs.
    #[must_use]
    pub fn busy(&self) -> Vec<SectorRecord> {
        let busy = lock(&self.0.mirror).busy().clone();
        self.records(busy)
    }

    /// The first `limit` sectors with numbers above `after`, without logs.
    pub fn list(
        &self,
        after: Option<SectorNumber>,
        limit: usize,
    ) -> Result<Vec<SectorRecord>, JournalError> {
        let journal = self.0.machines.journal();
        let page = journal.read(|v| v.scan(&Sectors::STATES, after.as_ref(), limit))?;
        Ok(self.records(page))
    }

    fn records(
        &self,
        sectors: impl IntoIterator<Item = (SectorNumber, Sector)>,
    ) -> Vec<SectorRecord> {
        let live = lock(&self.0.lives);
        sectors
            .into_iter()
            .map(|(number, sector)| record(number, sector, live.get(&number), Vec::new()))
            .collect()
    }

    /// One sector with its log.
    pub fn sector(&self, number: SectorNumber) -> Result<Option<SectorRecord>, SealingError> {
        let Some(sector) = self.0.get(number)? else {
            return Ok(None);
        };
        let first = sector.events.saturating_sub(LOG_LIMIT);
        let limit = usize::try_from(LOG_LIMIT).unwrap_or(usize::MAX);
        let log = self.0.machines.journal().read(|v| {
            let entries = v.scan(&LOG, Some(&(number, first)), limit)?;
            let own = entries.into_iter().take_while(|((n, _), _)| *n == number);
            Ok::<_, JournalError>(own.map(|(_, entry)| entry).collect())
        })?;
        let live = lock(&self.0.lives);
        Ok(Some(record(number, sector, live.get(&number), log)))
    }

    /// Room for pieces now.
    #[must_use]
    pub fn capacity(&self) -> Capacity {
        let s = &self.0;
        let (sealing, room, upgradable) = {
            let mirror = lock(&s.mirror);
            let busy = mirror.busy();
            let waiting = busy.values().filter(|x| x.state.takes_pieces());
            let room: u64 = waiting.map(|x| pieces::room(s.size, x)).sum();
            let upgradable = mirror.available().len();
            (pieces::in_use(busy) as u64, room, upgradable as u64)
        };
        let by_limit = match u64::from(s.cfg.max_sealing_sectors) {
            0 => u64::MAX,
            limit => limit.saturating_sub(sealing),
        };
        let by_disk = s.storage.sealable();
        let by_kind = if s.cfg.make_new_sector_for_deals {
            u64::MAX
        } else {
            upgradable
        };
        let more = by_limit.min(by_disk).min(by_kind);
        Capacity {
            free_bytes: room.saturating_add(more.saturating_mul(s.size.bytes())),
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
        s.get(number)?.ok_or(SealingError::NoSector(number))?;
        s.apply(number, Event::StartPacking, None, Also::Nothing)
            .await?;
        Ok(())
    }

    /// The files of the replica that commits to `comm_r`: those of the upgrade, or the first. That
    /// is what the files themselves say, which may be of a time that this journal does not know.
    #[must_use]
    pub fn replica(&self, number: SectorNumber, comm_r: &Commitment) -> Replica {
        let s = &self.0;
        let id = s.id(number);
        let hint = lock(&s.mirror).updated(number) == Some(*comm_r);
        if s.storage.is_update(id, comm_r, hint) {
            return Replica {
                sealed: s.storage.updated(id),
                cache: s.storage.updated_cache(id),
            };
        }
        Replica {
            sealed: s.storage.sealed(id),
            cache: s.storage.cache(id),
        }
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
