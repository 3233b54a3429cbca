//! What the handle and the runner share: the journaled sectors and their mirror in memory.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use lotus_journal::{EffectId, JournalError, Machines, Map, Pending, Tx};
use lotus_messages::Sender;
use lotus_node_client::Node;
use lotus_node_client::api::{NetworkParams, TipSet, TipSetKey};
use lotus_proofs::ProofMode;
use lotus_types::{
    ActorId, Commitment, DealKey, Epoch, PieceCid, SectorId, SectorNumber, SectorSize,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, OnceCell, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::batch::Composed;
use crate::machine::{Event, FoundAt, Sector, SectorState, Sectors, returned};
use crate::mirror::Mirror;
use crate::record::{LOG, LOG_LIMIT, LogEntry, SectorChange};
use crate::storage::{FileTypes, Part, sync_tree};
use crate::{
    Observer, PieceFiles, SealingConfig, SealingDeps, SealingError, Storage, StorageError, Work,
};

/// A journaled placement.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Placed {
    pub(crate) sector: SectorNumber,
    pub(crate) offset: u64,
    pub(crate) piece: PieceCid,
}

/// Where each deal's piece is.
pub(crate) const PLACED: Map<DealKey, Placed> = Map::new("sealing.placed");
/// The next sector number, under key 0.
pub(crate) const NEXT_NUMBER: Map<u64, u64> = Map::new("sealing.next_number");
/// The next number of a batch of messages, under key 0.
const NEXT_BATCH: Map<u64, u64> = Map::new("sealing.next_batch");
/// Sectors on chain that a reorg could still take away, since when the chain has them.
const YOUNG: Map<SectorNumber, Epoch> = Map::new("sealing.young");
/// Large outputs that a later step needs.
const OUTPUTS: Map<(SectorNumber, u64), StoredBytes> = Map::new("sealing.outputs");

#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct StoredBytes(#[serde(with = "serde_bytes")] pub(crate) Vec<u8>);

/// Which output.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stored {
    /// Of PreCommit1, for PreCommit2.
    Labels = 1,
    /// The seal proof.
    Proof = 2,
    /// The update proof.
    UpdateProof = 3,
}

impl Stored {
    pub(crate) const ALL: &'static [Self] = &[Self::Labels, Self::Proof, Self::UpdateProof];
}

/// What changes in the journal together with a sector's state.
#[derive(Debug, Default)]
pub(crate) enum Also {
    /// Nothing.
    #[default]
    Nothing,
    /// An output is stored.
    Store(Stored, Vec<u8>),
    /// Outputs are dropped.
    Drop(&'static [Stored]),
}

/// What is known of a sector but not journaled.
#[derive(Clone, Debug, Default)]
pub(crate) struct Live {
    pub(crate) progress: Option<f64>,
    pub(crate) last_error: Option<String>,
    pub(crate) next_retry_unix_ms: Option<u64>,
    /// The replica that the chain has, when the present step began.
    pub(crate) on_chain: Option<Commitment>,
}

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
    pub(crate) proofs: ProofMode,
    pub(crate) cfg: SealingConfig,
    pub(crate) pieces: Arc<dyn PieceFiles>,
    pub(crate) params: OnceCell<NetworkParams>,
    observer: Arc<dyn Observer>,
    /// Held while a change is committed and mirrored, so that both have one order.
    writing: Mutex<()>,
    /// What is asked often of the journal's sectors.
    pub(crate) mirror: Mutex<Mirror>,
    pub(crate) lives: Mutex<HashMap<SectorNumber, Live>>,
    /// Sectors that a reorg could still take away.
    pub(crate) young: Mutex<BTreeSet<SectorNumber>>,
    /// One piece is placed at a time.
    pub(crate) placing: tokio::sync::Mutex<()>,
    /// One batch is made or sent at a time.
    pub(crate) batching: tokio::sync::Mutex<()>,
    /// Sectors whose batch the operator wants now.
    pub(crate) published: Mutex<BTreeSet<SectorNumber>>,
    /// Held while files come to their place or are deleted, so that a step that the operator has
    /// stopped puts nothing where another has cleaned up.
    files: Mutex<()>,
    /// There are new effects.
    pub(crate) wake: Notify,
    /// Counts changes, for those who wait for one.
    pub(crate) changes: watch::Sender<u64>,
    pub(crate) stop: CancellationToken,
    /// Calls that block: awaited at the end, so that nothing is written after it.
    pub(crate) calls: TaskTracker,
}

impl Shared {
    pub(crate) fn open(deps: SealingDeps) -> Result<Self, SealingError> {
        let machines = Machines::<Sectors>::new(deps.journal);
        let mut mirror = Mirror::default();
        machines.each(|number, sector| {
            mirror.put(number, sector);
            Ok::<_, JournalError>(())
        })?;
        let young = machines
            .journal()
            .read(|v| v.scan(&YOUNG, None, usize::MAX));
        let young = young.map_err(|e: JournalError| e)?;
        let young = young.into_iter().map(|(n, _)| n).collect();
        Ok(Self {
            machines,
            node: deps.node,
            head: deps.follower.head(),
            sender: deps.sender,
            work: deps.work,
            storage: deps.storage,
            miner: deps.miner,
            size: deps.size,
            proofs: deps.proofs,
            cfg: deps.cfg,
            pieces: deps.pieces,
            params: OnceCell::new(),
            observer: deps.observer,
            writing: Mutex::default(),
            mirror: Mutex::new(mirror),
            lives: Mutex::default(),
            young: Mutex::new(young),
            placing: tokio::sync::Mutex::default(),
            batching: tokio::sync::Mutex::default(),
            published: Mutex::default(),
            files: Mutex::default(),
            wake: Notify::new(),
            changes: watch::Sender::new(0),
            stop: CancellationToken::new(),
            calls: TaskTracker::new(),
        })
    }

    pub(crate) fn id(&self, number: SectorNumber) -> SectorId {
        SectorId {
            miner: self.miner,
            number,
        }
    }

    /// A sector that is not idle.
    pub(crate) fn busy(&self, number: SectorNumber) -> Option<Sector> {
        lock(&self.mirror).busy().get(&number).cloned()
    }

    /// A sector.
    pub(crate) fn get(&self, number: SectorNumber) -> Result<Option<Sector>, SealingError> {
        match self.busy(number) {
            Some(sector) => Ok(Some(sector)),
            None => Ok(self.machines.get(&number)?),
        }
    }

    /// Changes what is known of a sector in memory.
    pub(crate) fn live(&self, number: SectorNumber, f: impl FnOnce(&mut Live)) {
        f(lock(&self.lives).entry(number).or_default());
    }

    /// The first number that neither this journal nor the chain has used.
    pub(crate) async fn next_number(&self) -> Result<SectorNumber, SealingError> {
        let miner = self.miner.address();
        let used = self
            .node
            .state_miner_allocated(miner, &TipSetKey::HEAD)
            .await?;
        let mut number = self.counter(&NEXT_NUMBER)?;
        for range in used.ranges() {
            if range.contains(&number) {
                number = range.end;
            }
        }
        Ok(SectorNumber(number))
    }

    fn counter(&self, map: &Map<u64, u64>) -> Result<u64, SealingError> {
        let journal = self.machines.journal();
        let next: Option<u64> = journal.read(|v| v.get(map, &0).map_err(SealingError::from))?;
        Ok(next.unwrap_or(0))
    }

    /// Applies an event; `false` when it does not apply in the sector's state.
    pub(crate) async fn apply(
        self: &Arc<Self>,
        number: SectorNumber,
        event: Event,
        settles: Option<EffectId>,
        also: Also,
    ) -> Result<bool, SealingError> {
        let done = self
            .apply_all(vec![(number, event)], settles, move |tx| match also {
                Also::Nothing => Ok(()),
                Also::Store(what, bytes) => {
                    tx.put(&OUTPUTS, &(number, what as u64), &StoredBytes(bytes))
                }
                Also::Drop(outputs) => {
                    for what in outputs {
                        tx.remove(&OUTPUTS, &(number, *what as u64))?;
                    }
                    Ok(())
                }
            })
            .await?;
        Ok(done > 0)
    }

    /// Gives the sectors one batch, which no other has.
    pub(crate) async fn seat(self: &Arc<Self>, composed: Composed) -> Result<(), SealingError> {
        let batch = self.counter(&NEXT_BATCH)?;
        let aggregate = composed.aggregate;
        let of = u32::try_from(composed.members.len()).unwrap_or(u32::MAX);
        let members = (0u32..).zip(composed.members);
        let events = members.map(|(place, n)| {
            let event = Event::Batched {
                batch,
                aggregate,
                place,
                of,
            };
            (n, event)
        });
        self.apply_all(events.collect(), None, move |tx| {
            tx.put(&NEXT_BATCH, &0, &(batch + 1))
        })
        .await?;
        Ok(())
    }

    /// Applies events of several sectors in one transaction, with `also` if any of them applies.
    /// Returns how many did.
    pub(crate) async fn apply_all(
        self: &Arc<Self>,
        events: Vec<(SectorNumber, Event)>,
        settles: Option<EffectId>,
        also: impl FnOnce(&mut Tx) -> Result<(), JournalError> + Send + 'static,
    ) -> Result<usize, SealingError> {
        let shared = self.clone();
        let span = tracing::Span::current();
        self.blocking(move || {
            let _entered = span.enter();
            shared.commit(&events, settles, also)
        })
        .await
    }

    fn commit(
        &self,
        events: &[(SectorNumber, Event)],
        settles: Option<EffectId>,
        also: impl FnOnce(&mut Tx) -> Result<(), JournalError>,
    ) -> Result<usize, SealingError> {
        let order = lock(&self.writing);
        let steps = self.machines.journal().write(|tx| {
            let mut steps = Vec::new();
            let mut settles = settles;
            for (number, event) in events {
                let step = Machines::<Sectors>::apply_in(
                    tx,
                    number,
                    event,
                    settles.take(),
                    |tx, before, after| self.note(tx, *number, event, before, after),
                )?;
                steps.extend(step.map(|s| (*number, event, s)));
            }
            if !steps.is_empty() {
                also(tx)?;
            }
            Ok::<_, JournalError>(steps)
        })?;
        let mut moved = Vec::with_capacity(steps.len());
        for (number, event, step) in steps {
            let from = step.before.map(|s| s.state);
            let to = step.after.state;
            lock(&self.mirror).put(number, step.after);
            match ages(event) {
                Some(Some(_)) => {
                    lock(&self.young).insert(number);
                }
                Some(None) => {
                    lock(&self.young).remove(&number);
                }
                None => {}
            }
            if from != Some(to) {
                lock(&self.lives).remove(&number);
                lock(&self.published).remove(&number);
            }
            moved.push((number, event, from, to));
        }
        drop(order);
        for (number, event, from, to) in &moved {
            tracing::info!(sector = %number, event = event.name(),
                from = from.map_or("", SectorState::as_str), to = to.as_str(),
                "{}", event.message());
            metrics::counter!("lotus_miner_sector_events_total", "event" => event.name(),
                "to" => to.as_str())
            .increment(1);
        }
        if !moved.is_empty() {
            self.observer.committed();
            self.changes.send_modify(|n| *n = n.wrapping_add(1));
            self.wake.notify_one();
        }
        Ok(moved.len())
    }

    /// The journaled effects. None of them is of a step that memory does not show yet: it would
    /// look as if its sector had moved on, and be dropped.
    pub(crate) fn pending(&self) -> Result<Vec<Pending<Sectors>>, JournalError> {
        let _order = lock(&self.writing);
        self.machines.pending()
    }

    /// What is written together with a step: the log, and what hangs on it elsewhere.
    fn note(
        &self,
        tx: &mut Tx,
        number: SectorNumber,
        event: &Event,
        before: Option<&Sector>,
        after: &Sector,
    ) -> Result<(), JournalError> {
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
        match ages(event) {
            Some(Some(since)) => tx.put(&YOUNG, &number, &since)?,
            Some(None) => {
                tx.remove(&YOUNG, &number)?;
            }
            None => {}
        }
        let returned = returned(before, after);
        for piece in returned {
            tx.remove(&PLACED, &piece.key)?;
        }
        self.observer.in_tx(
            tx,
            &SectorChange {
                number,
                from,
                to: after.state,
                sector: after,
                returned,
            },
        )
    }

    /// No reorg takes these sectors away any more, so that they need no proof again.
    pub(crate) async fn settle_young(
        self: &Arc<Self>,
        sectors: Vec<SectorNumber>,
    ) -> Result<(), SealingError> {
        let shared = self.clone();
        self.blocking(move || {
            let _order = lock(&shared.writing);
            shared.machines.journal().write(|tx| {
                for n in &sectors {
                    tx.remove(&YOUNG, n)?;
                    tx.remove(&OUTPUTS, &(*n, Stored::Proof as u64))?;
                }
                Ok::<_, JournalError>(())
            })?;
            let mut young = lock(&shared.young);
            for n in &sectors {
                young.remove(n);
            }
            Ok(())
        })
        .await
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

    /// Moves finished files to their places, unless the sector has left the state in which they
    /// were made.
    pub(crate) async fn put_in_place(
        self: &Arc<Self>,
        number: SectorNumber,
        state: SectorState,
        files: Vec<(PathBuf, Part)>,
    ) -> Result<(), SealingError> {
        let shared = self.clone();
        let id = self.id(number);
        self.blocking(move || {
            for (from, _) in &files {
                sync_tree(from)?;
            }
            let _one_at_a_time = lock(&shared.files);
            if let Some(s) = shared.busy(number).filter(|s| s.state == state) {
                let on_chain = lock(&shared.lives).get(&number).and_then(|l| l.on_chain);
                let active = s.current_commitments().filter(|_| s.activation.is_some());
                let kept = active.map(|c| c.comm_r).into_iter().chain(on_chain);
                let kept: Vec<Commitment> = kept.collect();
                for (from, part) in &files {
                    shared.storage.put(id, *part, from, &kept)?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Deletes files.
    pub(crate) async fn delete(
        self: &Arc<Self>,
        delete: impl FnOnce(&Storage) -> Result<(), StorageError> + Send + 'static,
    ) -> Result<(), SealingError> {
        let shared = self.clone();
        self.blocking(move || {
            let _one_at_a_time = lock(&shared.files);
            Ok(delete(&shared.storage)?)
        })
        .await
    }

    /// Brings files of a sealed sector to where sectors are kept.
    pub(crate) async fn keep(
        self: &Arc<Self>,
        number: SectorNumber,
        files: FileTypes,
    ) -> Result<(), SealingError> {
        let id = self.id(number);
        if self.storage.is_kept(id, files)? {
            return Ok(());
        }
        let _turn = self.storage.turn().await?;
        let shared = self.clone();
        self.blocking(move || Ok(shared.storage.keep(id, files, &shared.stop)?))
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

/// Whether a sector is young since an epoch from this event on, or is not any more.
fn ages(event: &Event) -> Option<Option<Epoch>> {
    match event {
        Event::CommitLanded { activation, .. } => Some(Some(*activation)),
        Event::FoundOnChain(found) => match found.at {
            FoundAt::PreCommitted { .. } => None,
            FoundAt::Active { activation, .. } | FoundAt::Updated { activation, .. } => {
                Some(Some(activation))
            }
        },
        Event::CommitLost | Event::FilesRemoved => Some(None),
        _ => None,
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
