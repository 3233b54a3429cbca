//! Joins sealing, proving and the worker pool to the parts that only know their traits.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use hub_proto::v1::event::What;
use hub_proto::v1::{
    ProvingState, ProvingWork, SafeToRestartResponse, SectorChanged, SectorInfo, SectorLogEntry,
    SectorPiece,
};
use lotus_chain::Follower;
use lotus_journal::{JournalError, Tx};
use lotus_proving::{Activity, Busy, SectorFiles, Work};
use lotus_sealing::machine::{Allocation, Notify, SealTicket};
use lotus_sealing::{
    Observer, PieceFiles, Sealing, SealingError, SectorChange, SectorRecord, SectorState, Storage,
    StorageError, Terms,
};
use lotus_types::{
    ActorId, Commitment, DealKey, Epoch, EpochDelta, Kind, PieceCid, PieceInfo, SectorId,
    SectorNumber, SectorSize,
};
use lotus_workers::{Output, Pool, Task, UpdateFiles};

use crate::api::{Safety, SectorBook};
use crate::events::{EventLog, unix_ms};
use crate::pieces::machine::{DealTerms, Place};
use crate::pieces::{NoPlace, Pieces, Placer, SectorFate};
use crate::restart::{self, Held, RestartConfig, Wish};
use crate::unsealed::Unsealer;

/// Fr32 stores 127 payload bytes in every 128.
const FR32: (u64, u64) = (127, 128);

/// Epochs after which no reorg takes a sector back. Source: builtin-actors, runtime/src/runtime/
/// policy.rs, `CHAIN_FINALITY`.
const FINALITY: EpochDelta = EpochDelta(900);

/// Sealing, as the API and the hand-off see it.
pub struct Sealer {
    /// Places pieces and knows the sectors.
    pub sealing: Sealing,
    /// Unseals.
    pub pool: Pool,
    /// Where sectors are.
    pub storage: Storage,
    /// The miner.
    pub miner: ActorId,
    /// Size of its sectors.
    pub size: SectorSize,
    /// When sealing holds a restart back.
    pub restart: RestartConfig,
    /// Since when somebody waits for that.
    pub(crate) wish: Mutex<Wish>,
    /// What proving and mining are doing.
    pub activity: Activity,
    /// The chain's head.
    pub follower: Follower,
    /// Length of an epoch, once the node told it.
    pub block_delay: Arc<OnceLock<Duration>>,
}

impl Sealer {
    const fn id(&self, number: SectorNumber) -> SectorId {
        SectorId {
            miner: self.miner,
            number,
        }
    }

    /// Tells the Unix milliseconds at which an epoch begins, as far as known.
    fn clock(&self) -> impl Fn(Epoch) -> Option<u64> + Send + use<> {
        let (follower, delay) = (self.follower.clone(), self.block_delay.clone());
        move |epoch| {
            let head = follower.head().borrow().clone()?;
            let ahead = u64::try_from((epoch - head.height).0).unwrap_or(0);
            let delay = u64::try_from(delay.get()?.as_millis()).ok()?;
            Some(unix_ms().saturating_add(ahead.saturating_mul(delay)))
        }
    }
}

fn no_place(e: &SealingError) -> NoPlace {
    NoPlace {
        kind: e.kind(),
        message: format!("{e} ({})", e.fix()),
    }
}

fn terms(t: &DealTerms) -> Result<Terms, NoPlace> {
    let notify = match &t.notify {
        Some((address, payload)) => Some(Notify {
            address: lotus_node_client::json::parse_address(address).map_err(|_| NoPlace {
                kind: Kind::Data,
                message: format!("{address} is no address to notify"),
            })?,
            payload: payload.clone(),
        }),
        None => None,
    };
    Ok(Terms {
        start_epoch: Epoch(t.start_epoch),
        end_epoch: Epoch(t.end_epoch),
        allocation: t.allocation.map(|(client, id)| Allocation {
            client: ActorId(client),
            id,
        }),
        notify,
    })
}

fn fate(state: SectorState, reason: Option<&str>) -> SectorFate {
    let because = |what: &str| match reason {
        Some(reason) => SectorFate::Lost(format!("{what}: {reason}")),
        None => SectorFate::Lost(what.into()),
    };
    match state {
        // Until its end is on chain a sector is proven.
        SectorState::Proving
        | SectorState::UpdateActivating
        | SectorState::ReleaseSectorKey
        | SectorState::Terminating
        | SectorState::TerminateWait
        | SectorState::TerminateFailed => SectorFate::Proven,
        SectorState::FailedUnrecoverable => because("its sector can never be proven"),
        SectorState::TerminateFinality => because("its sector was terminated"),
        SectorState::Removing | SectorState::RemoveFailed | SectorState::Removed => {
            because("its sector was removed")
        }
        sealing => SectorFate::Sealing(sealing.as_str().into()),
    }
}

#[async_trait]
impl Placer for Sealer {
    async fn place(
        &self,
        key: &DealKey,
        piece: PieceInfo,
        t: &DealTerms,
    ) -> Result<Place, NoPlace> {
        let placed = self.sealing.add_piece(key.clone(), piece, terms(t)?).await;
        let placed = placed.map_err(|e| no_place(&e))?;
        Ok(Place {
            sector: placed.sector.0,
            offset: placed.offset,
        })
    }

    async fn placement(&self, key: &DealKey) -> Result<Option<Place>, NoPlace> {
        let placed = self.sealing.placement(key).map_err(|e| no_place(&e))?;
        Ok(placed.map(|p| Place {
            sector: p.sector.0,
            offset: p.offset,
        }))
    }

    fn sector(&self, number: u64) -> SectorFate {
        match self.sealing.state(SectorNumber(number)) {
            Some((state, reason)) => fate(state, reason.as_deref()),
            // Nothing is known, so nothing is lost.
            None => SectorFate::Sealing(String::new()),
        }
    }

    fn is_final(&self, number: u64) -> bool {
        let head = self.follower.head().borrow().as_ref().map(|h| h.height);
        let record = self.sealing.sector(SectorNumber(number));
        let (Some(head), Ok(Some(record))) = (head, record) else {
            return false;
        };
        // An upgrade is in `UpdateActivating` until it is final.
        let s = record.sector;
        s.state == SectorState::Proving && s.activation.is_some_and(|at| at + FINALITY <= head)
    }
}

#[async_trait]
impl Unsealer for Sealer {
    async fn unseal(&self, place: Place, piece: PieceInfo, out: &Path) -> Result<(), NoPlace> {
        let not_now = |message: String| NoPlace {
            kind: Kind::Capacity,
            message,
        };
        let number = SectorNumber(place.sector);
        let record = self.sealing.sector(number).map_err(|e| no_place(&e))?;
        let sector = record
            .map(|r| r.sector)
            .filter(|s| s.state.has_data_on_chain())
            .ok_or_else(|| not_now(format!("sector {number} is not proven yet")))?;
        let (Some(ticket), Some(commitments)) = (sector.ticket, sector.commitments) else {
            return Err(not_now(format!("sector {number} has no ticket on record")));
        };
        let id = self.id(number);
        let scratch = self.on_disk(move |s| s.begin_unseal(id)).await?;
        let offset = place.offset / FR32.1 * FR32.0;
        let done = match sector.update.and_then(|u| u.commitments) {
            Some(update) => {
                let mut files = UpdateFiles {
                    sector: id,
                    size: self.size,
                    sealed: self.storage.sealed(id),
                    cache: self.storage.cache(id),
                    updated: self.storage.updated(id),
                    updated_cache: self.storage.updated_cache(id),
                };
                let key = if files.sealed.exists() {
                    Ok(())
                } else {
                    self.make_key(id, ticket, &scratch, &mut files).await
                };
                match key {
                    Ok(()) => {
                        self.do_unseal(Task::UnsealUpdate {
                            files,
                            comm_d: update.comm_d,
                            out: out.to_owned(),
                            offset,
                            len: piece.raw_size,
                        })
                        .await
                    }
                    Err(e) => Err(e),
                }
            }
            None => {
                self.do_unseal(Task::Unseal {
                    sector: id,
                    size: self.size,
                    ticket: ticket.value,
                    comm_d: commitments.comm_d,
                    sealed: self.storage.sealed(id),
                    cache: self.storage.cache(id),
                    scratch: scratch.clone(),
                    out: out.to_owned(),
                    offset,
                    len: piece.raw_size,
                })
                .await
            }
        };
        self.on_disk(move |s| s.end_unseal(id)).await?;
        done
    }
}

impl Sealer {
    /// Asks the storage on a thread that may block.
    async fn on_disk<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Storage) -> Result<R, StorageError> + Send + 'static,
    ) -> Result<R, NoPlace> {
        let storage = self.storage.clone();
        let done = tokio::task::spawn_blocking(move || f(&storage)).await;
        let done = done.map_err(|e| NoPlace {
            kind: Kind::Fatal,
            message: e.to_string(),
        })?;
        done.map_err(|e| NoPlace {
            kind: e.kind(),
            message: format!("{e} ({})", e.fix()),
        })
    }

    async fn do_unseal(&self, task: Task) -> Result<(), NoPlace> {
        match self.heavy(task).await? {
            Output::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    async fn heavy(&self, task: Task) -> Result<Output, NoPlace> {
        self.pool.run(task, None).await.map_err(|e| NoPlace {
            kind: e.kind(),
            message: e.to_string(),
        })
    }

    /// Makes the first replica of an upgraded sector again: it was deleted, and held zeros, so
    /// its ticket gives the same one.
    async fn make_key(
        &self,
        sector: SectorId,
        ticket: SealTicket,
        scratch: &Path,
        files: &mut UpdateFiles,
    ) -> Result<(), NoPlace> {
        let layout = lotus_proofs::layout(self.size, &[]).map_err(|e| NoPlace {
            kind: Kind::Fatal,
            message: e.to_string(),
        })?;
        let unsealed = scratch.join("zeros");
        files.sealed = scratch.join("key");
        files.cache = scratch.join("key-cache");
        self.do_unseal(Task::AddPieces {
            size: self.size,
            layout: layout.clone(),
            pieces: Vec::new(),
            unsealed: unsealed.clone(),
        })
        .await?;
        let pc1 = match self
            .heavy(Task::PreCommit1 {
                sector,
                size: self.size,
                ticket: ticket.value,
                layout,
                unsealed,
                sealed: files.sealed.clone(),
                cache: files.cache.clone(),
            })
            .await?
        {
            Output::PreCommit1(labels) => labels,
            other => return Err(unexpected(&other)),
        };
        let task = Task::PreCommit2 {
            sector,
            size: self.size,
            pc1,
            sealed: files.sealed.clone(),
            cache: files.cache.clone(),
            attempt: scratch.to_owned(),
        };
        match self.heavy(task).await? {
            Output::Commitments(_) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(output: &Output) -> NoPlace {
    NoPlace {
        kind: Kind::Fatal,
        message: format!("the worker answered {output:?}"),
    }
}

impl SectorBook for Sealer {
    fn list(&self, after: Option<u64>, limit: usize) -> Result<Vec<SectorInfo>, JournalError> {
        let page = self.sealing.list(after.map(SectorNumber), limit)?;
        Ok(page.into_iter().map(|r| info(r, false)).collect())
    }

    fn get(&self, number: u64, log: bool) -> Result<Option<SectorInfo>, JournalError> {
        match self.sealing.sector(SectorNumber(number)) {
            Ok(found) => Ok(found.map(|r| info(r, log))),
            Err(SealingError::Journal(e)) => Err(e),
            Err(_) => Ok(None),
        }
    }
}

impl Sealer {
    fn held_by_sealing(&self) -> Vec<Held> {
        let now = unix_ms();
        let wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        restart::held(&self.pool.jobs(), wish.waited(now), now, &self.restart)
    }
}

impl Safety for Sealer {
    fn restart_is_wished(&self) {
        let mut wish = self.wish.lock().unwrap_or_else(PoisonError::into_inner);
        wish.ask(unix_ms());
    }

    fn safe_to_restart(&self) -> SafeToRestartResponse {
        let busy = self.activity.busy();
        let mut until: Option<Epoch> = None;
        let mut open_end = false;
        let mut reasons = Vec::new();
        for b in busy {
            match b.until {
                Some(epoch) => until = until.max(Some(epoch)),
                None => open_end = true,
            }
            reasons.push(match b.until {
                Some(epoch) => format!("{} (until epoch {epoch})", b.what),
                None => b.what,
            });
        }
        let mut sealed_at = 0;
        for held in self.held_by_sealing() {
            match held.until_unix_ms {
                Some(at) => sealed_at = at.max(sealed_at),
                None => open_end = true,
            }
            reasons.push(held.what);
        }
        let known = match until {
            _ if open_end => None,
            None => Some(sealed_at),
            Some(epoch) => self.clock()(epoch).map(|at| at.max(sealed_at)),
        };
        SafeToRestartResponse {
            safe: reasons.is_empty(),
            safe_at_unix_ms: known.unwrap_or(0),
            reasons,
        }
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        let mut changes = self.activity.changes();
        Box::pin(async move {
            if changes.changed().await.is_err() {
                tracing::debug!("proving is over");
            }
        })
    }

    fn proving(&self) -> BoxStream<'static, ProvingState> {
        let (activity, changes) = (self.activity.clone(), self.activity.changes());
        let when = self.clock();
        let start = (activity, changes, when, None::<Vec<Busy>>);
        futures::stream::unfold(start, |(activity, mut changes, when, told)| async move {
            loop {
                changes.borrow_and_update();
                let now = activity.proving();
                if told.as_ref() != Some(&now) {
                    let state = proving_state(&now, &when);
                    return Some((state, (activity, changes, when, Some(now))));
                }
                changes.changed().await.ok()?;
            }
        })
        .boxed()
    }
}

/// What the proofs that are being made look like to others.
fn proving_state(all: &[Busy], when: &impl Fn(Epoch) -> Option<u64>) -> ProvingState {
    let work = all.iter().map(|b| ProvingWork {
        kind: match b.work {
            Work::WinningPost | Work::Block => "winning".into(),
            Work::WindowPost | Work::WindowPostSoon | Work::Deadline => "window".into(),
        },
        what: b.what.clone(),
        closes_unix_ms: b.until.and_then(when).unwrap_or(0),
    });
    ProvingState {
        work: work.collect(),
    }
}

fn info(r: SectorRecord, log: bool) -> SectorInfo {
    let s = r.sector;
    let commitments = s.current_commitments();
    let epoch = |e: Option<Epoch>| e.map_or(0, |e| e.0);
    let cid = |c: Option<cid::Cid>| c.map(|c| c.to_string()).unwrap_or_default();
    SectorInfo {
        number: r.number.0,
        state: s.state.as_str().into(),
        pieces: s
            .pieces
            .iter()
            .map(|p| SectorPiece {
                piece_cid: p.piece.cid.to_string(),
                piece_size: p.piece.size.get(),
                offset: p.offset,
                key: Some((&p.key).into()),
            })
            .collect(),
        progress: r.progress,
        pre_commit_cid: cid(s.pre_commit),
        commit_cid: cid(s.commit),
        activation: epoch(s.activation),
        expiration: epoch(s.expiration),
        last_error: r.last_error.or(s.reason).unwrap_or_default(),
        next_retry_unix_ms: r.next_retry_unix_ms.unwrap_or(0),
        log: if log { r.log } else { Vec::new() }
            .into_iter()
            .map(|e| SectorLogEntry {
                unix_ms: e.unix_ms,
                event: e.event,
                from: e.from,
                to: e.to,
                message: e.message,
            })
            .collect(),
        comm_d: commitments
            .map(|c| c.comm_d.unsealed_cid().to_string())
            .unwrap_or_default(),
        comm_r: commitments
            .map(|c| c.comm_r.sealed_cid().to_string())
            .unwrap_or_default(),
    }
}

/// Tells spokes and pieces of every change of a sector, in the transaction that makes it.
pub struct SectorObserver {
    /// The hand-offs.
    pub pieces: Arc<Pieces>,
    /// The event log.
    pub events: EventLog,
}

impl Observer for SectorObserver {
    fn in_tx(&self, tx: &mut Tx, change: &SectorChange<'_>) -> Result<(), JournalError> {
        if change.from == Some(change.to) {
            return Ok(());
        }
        let sector = SectorChanged {
            number: change.number.0,
            from: change
                .from
                .map(|s| s.as_str().to_owned())
                .unwrap_or_default(),
            to: change.to.as_str().into(),
        };
        self.events.append(tx, What::Sector(sector))?;
        let key = |p: &lotus_sealing::SectorPiece| p.key.clone();
        let returned = change.returned.iter().map(key);
        self.pieces.sector_in(tx, returned, &SectorFate::Returned)?;
        let keys = change.sector.pieces.iter().map(key);
        let fate = fate(change.to, change.sector.reason.as_deref());
        self.pieces.sector_in(tx, keys, &fate)
    }

    fn committed(&self) {
        self.pieces.woken();
    }
}

/// Where sealing finds raw pieces.
pub struct Files(pub Arc<Pieces>);

impl PieceFiles for Files {
    fn path(&self, cid: &PieceCid) -> PathBuf {
        self.0.path(cid)
    }
}

/// Where proving finds a replica: of an upgraded sector there are two for a while.
pub struct Replicas(pub Sealing);

impl SectorFiles for Replicas {
    fn sealed(&self, number: SectorNumber, comm_r: &Commitment) -> PathBuf {
        self.0.replica(number, comm_r).sealed
    }

    fn cache(&self, number: SectorNumber, comm_r: &Commitment) -> PathBuf {
        self.0.replica(number, comm_r).cache
    }

    fn made(&self, number: SectorNumber) -> bool {
        self.0.state(number).is_some()
    }
}
