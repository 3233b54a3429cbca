//! Pieces: from a spoke's offer to a verified file to a place in a proven sector.

mod far;
mod intake;
mod keep;
pub mod machine;
mod runner;
mod staging;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use hub_proto::v1::event::What;
use lotus_dataplane::DataError;
use lotus_journal::{EffectId, Journal, JournalError, Machine as _, Machines, Map, Step, Tx};
use lotus_types::{DealKey, Kind, PieceCid, PieceInfo};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use ulid::Ulid;

use crate::config::PiecesConfig;
use crate::events::EventLog;
use crate::owner::{self, Seller};
pub use far::FarSpokes;
use intake::{Intake, put_in_place};
pub use keep::{KeepUnsealed, sweep};
use machine::{DealTerms, Event, Offer, Phase, PieceMachine, Place};
pub use runner::PieceRunner;
pub(crate) use staging::blocking;

/// Hand-offs by piece.
const BY_CID: Map<(String, DealKey), PieceInfo> = Map::new("pieces.by_cid");
/// Piece files that were verified, by piece. The file itself may be missing.
const FILES: Map<String, PieceInfo> = Map::new("pieces.files");

/// Hand-offs of one piece that a lookup reads.
const MAX_DEALS_OF_A_PIECE: usize = 256;

/// Why a sector does not take a piece.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct NoPlace {
    /// `Data`: never. Anything else: not now.
    pub kind: Kind,
    /// Why.
    pub message: String,
}

/// Finds places in sectors: sealing, or a fake in tests.
#[async_trait]
pub trait Placer: Send + Sync + 'static {
    /// Places a verified piece. The same key gets the same place for ever.
    async fn place(
        &self,
        key: &DealKey,
        piece: PieceInfo,
        terms: &DealTerms,
    ) -> Result<Place, NoPlace>;
    /// The place of a piece that was placed.
    async fn placement(&self, key: &DealKey) -> Result<Option<Place>, NoPlace>;
    /// What has become of a sector.
    fn sector(&self, number: u64) -> SectorFate;
    /// Whether a sector is proven, and for so long that no reorg takes it back.
    fn is_final(&self, number: u64) -> bool;
}

/// What has become of a sector, as far as its pieces care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SectorFate {
    /// On its way, in this sealing state.
    Sealing(String),
    /// Proven.
    Proven,
    /// It will never be proven, or is gone.
    Lost(String),
    /// The sector gives the piece back.
    Returned,
}

/// Why an offer or a withdrawal is refused.
#[derive(Debug, thiserror::Error)]
pub enum PieceError {
    /// The key was used for something else.
    #[error("deal {key} was offered before, as another {what}")]
    OtherOffer {
        /// The key.
        key: DealKey,
        /// What differs.
        what: &'static str,
    },
    /// Another spoke has it.
    #[error("deal {key} is one of {owner}")]
    NotYours {
        /// The key.
        key: DealKey,
        /// Whose it is.
        owner: String,
    },
    /// Too many pieces wait.
    #[error("{waiting} pieces wait already")]
    Full {
        /// How many.
        waiting: usize,
    },
    /// Nobody offered it.
    #[error("no piece was offered for deal {key}")]
    Unknown {
        /// The key.
        key: DealKey,
    },
    /// It is in a sector, or at its end.
    #[error("deal {key} can not be withdrawn: its piece is {phase}")]
    TooLate {
        /// The key.
        key: DealKey,
        /// Where it is.
        phase: String,
    },
    /// Sealing does not answer.
    #[error(transparent)]
    NoPlace(#[from] NoPlace),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl PieceError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::OtherOffer { .. }
            | Self::NotYours { .. }
            | Self::Unknown { .. }
            | Self::TooLate { .. } => Kind::Data,
            Self::Full { .. } => Kind::Capacity,
            Self::NoPlace(e) => e.kind,
            Self::Journal(e) => e.kind(),
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::OtherOffer { .. } => "give each deal an id of its own".into(),
            Self::NotYours { owner, .. } => owner::fix(owner),
            Self::Full { .. } => "wait until sectors take the pieces that are here".into(),
            Self::Unknown { .. } => "offer it first".into(),
            Self::TooLate { .. } => "let it be: it stays until its sector ends".into(),
            Self::NoPlace(_) => "see `lotus-miner sectors list`".into(),
            Self::Journal(e) => e.fix(),
        }
    }
}

/// What is known about a hand-off that waits, beside the journal.
#[derive(Debug)]
struct Live {
    piece: PieceInfo,
    pulled: Arc<AtomicU64>,
    /// What it waits for.
    waits: String,
    /// Ends its pull when it is withdrawn.
    cancel: CancellationToken,
    stored: bool,
}

/// What is known about a piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Located {
    /// Its sizes; the raw size is that of the file.
    pub piece: PieceInfo,
    /// Whether it was ever complete here.
    pub verified: bool,
    /// Its places, proven ones first.
    pub places: Vec<Place>,
}

/// All hand-offs of this hub.
pub struct Pieces {
    machines: Machines<PieceMachine>,
    events: EventLog,
    dir: PathBuf,
    cfg: PiecesConfig,
    live: Mutex<HashMap<DealKey, Live>>,
    /// There are new effects.
    work: Notify,
    /// Counts changes of the room that pieces take.
    changed: watch::Sender<u64>,
    /// Held while a piece file appears or goes, with the journal entry that says so.
    files: tokio::sync::Mutex<()>,
    /// Held while a piece is placed or withdrawn.
    placing: tokio::sync::Mutex<()>,
    /// Spokes on other hosts that have staged bytes.
    far: FarSpokes,
}

impl std::fmt::Debug for Pieces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pieces({})", self.dir.display())
    }
}

impl Pieces {
    /// The hand-offs in this journal, with their files in `dir`.
    pub fn open(
        journal: Journal,
        events: EventLog,
        dir: PathBuf,
        cfg: PiecesConfig,
    ) -> Result<Arc<Self>, JournalError> {
        let machines = Machines::<PieceMachine>::new(journal);
        let mut live = HashMap::new();
        machines.each(|key, offer| {
            if let Some(entry) = Live::of(&offer) {
                live.insert(key, entry);
            }
            Ok::<_, JournalError>(())
        })?;
        Ok(Arc::new(Self {
            machines,
            events,
            dir,
            cfg,
            live: Mutex::new(live),
            work: Notify::new(),
            changed: watch::Sender::new(0),
            files: tokio::sync::Mutex::new(()),
            placing: tokio::sync::Mutex::new(()),
            far: FarSpokes::default(),
        }))
    }

    /// Spokes on other hosts that have staged bytes.
    #[must_use]
    pub fn far(&self) -> &FarSpokes {
        &self.far
    }

    /// Journals an offer, or moves the source of one that is known. Returns the present state.
    pub fn offer(
        &self,
        key: &DealKey,
        mut offer: Offer,
        seller: &Seller,
    ) -> Result<Offer, PieceError> {
        offer.owner = seller.name().map(str::to_owned);
        let waiting = self.lock_live().len();
        let event = Event::Offered(Box::new(offer.clone()));
        let (now, step) = self.machines.journal().write(|tx| {
            let mut before = tx.get(&PieceMachine::STATES, key)?;
            match &mut before {
                Some(old) => {
                    if let Some(owner) = old.owner.as_ref().filter(|o| !seller.may_take(o)) {
                        return Err(PieceError::NotYours {
                            key: key.clone(),
                            owner: owner.clone(),
                        });
                    }
                    let other = |what| PieceError::OtherOffer {
                        key: key.clone(),
                        what,
                    };
                    if old.piece != offer.piece {
                        return Err(other("piece"));
                    }
                    if old.terms != offer.terms {
                        return Err(other("set of terms"));
                    }
                    // From whoever is gone it passes on as it is.
                    if offer.owner.is_some() && old.owner != offer.owner {
                        old.owner.clone_from(&offer.owner);
                        tx.put(&PieceMachine::STATES, key, old)?;
                    }
                    if old.source == offer.source {
                        return Ok((old.clone(), None));
                    }
                }
                None if waiting >= self.cfg.max_waiting => {
                    return Err(PieceError::Full { waiting });
                }
                None => {}
            }
            let step = self.apply_in(tx, key, &event, None)?;
            let now = match (&step, before) {
                (Some(step), _) => step.after.clone(),
                (None, Some(before)) => before,
                (None, None) => offer,
            };
            Ok((now, step))
        })?;
        if let Some(step) = step {
            self.committed(key, &step);
        }
        Ok(now)
    }

    /// One hand-off.
    pub fn get(&self, key: &DealKey) -> Result<Option<Offer>, JournalError> {
        self.machines.get(key)
    }

    /// Hand-offs with keys above `after`.
    pub fn list(
        &self,
        after: Option<&DealKey>,
        limit: usize,
    ) -> Result<Vec<(DealKey, Offer)>, JournalError> {
        self.machines
            .journal()
            .read(|v| v.scan(&PieceMachine::STATES, after, limit))
    }

    /// Takes an offer back, unless a sector has the piece.
    pub async fn withdraw(
        self: &Arc<Self>,
        key: &DealKey,
        placer: &dyn Placer,
        seller: &Seller,
    ) -> Result<Offer, PieceError> {
        let _placing = self.placing.lock().await;
        let unknown = || PieceError::Unknown { key: key.clone() };
        let now = self.get(key)?.filter(|offer| seller.has(offer));
        let now = now.ok_or_else(unknown)?;
        let too_late = |phase: &str| PieceError::TooLate {
            key: key.clone(),
            phase: phase.into(),
        };
        match &now.phase {
            Phase::Withdrawn => return Ok(now),
            Phase::Placed(_) => return Err(too_late("in a sector")),
            Phase::Active(_) => return Err(too_late("in a proven sector")),
            Phase::Failed { .. } => return Err(too_late("refused")),
            Phase::Offered | Phase::Pulling | Phase::Stored => {}
        }
        // A crash may have come between the placement and our note of it.
        if placer.placement(key).await?.is_some() {
            return Err(too_late("in a sector"));
        }
        let (this, owned) = (self.clone(), key.clone());
        blocking(move || this.apply(&owned, &Event::Withdrawn, None)).await?;
        self.get(key)?.ok_or_else(unknown)
    }

    /// What is known about a piece.
    pub fn locate(&self, cid: &PieceCid) -> Result<Option<Located>, JournalError> {
        let name = cid.to_string();
        let (file, deals) = self.machines.journal().read(|v| {
            let deals = deals_of(&name, |from| {
                v.scan(&BY_CID, Some(from), MAX_DEALS_OF_A_PIECE)
            })?;
            let mut offers = Vec::new();
            for (key, _) in &deals {
                offers.extend(v.get(&PieceMachine::STATES, key)?);
            }
            Ok::<_, JournalError>((v.get(&FILES, &name)?, offers))
        })?;
        let mut places: Vec<(bool, Place)> = deals
            .iter()
            .filter_map(|offer| match offer.phase {
                Phase::Active(p) => Some((false, p)),
                Phase::Placed(p) => Some((true, p)),
                _ => None,
            })
            .collect();
        places.sort_by_key(|(sealing, p)| (*sealing, p.sector, p.offset));
        let verified = file.is_some();
        let wanted = deals.iter().find(|o| o.phase.is_live()).map(|o| o.piece);
        Ok(file.or(wanted).map(|piece| Located {
            piece,
            verified,
            places: places.into_iter().map(|(_, p)| p).collect(),
        }))
    }

    /// The raw file of a piece: complete and verified when it is there.
    #[must_use]
    pub fn path(&self, cid: &PieceCid) -> PathBuf {
        self.dir.join(cid.to_string())
    }

    /// Takes the raw file of a known piece back from `unsealed`, if it is that piece.
    pub async fn restore(
        self: &Arc<Self>,
        piece: PieceInfo,
        unsealed: PathBuf,
    ) -> Result<(), DataError> {
        let _files = self.files.lock().await;
        let path = self.path(&piece.cid);
        blocking(move || {
            let part = Intake::open(&unsealed, piece.raw_size, &CancellationToken::new())?;
            let got = part.finish(&piece)?;
            if got != piece {
                intake::remove(&unsealed)?;
                return Err(DataError::Changed {
                    at: unsealed.display().to_string(),
                });
            }
            put_in_place(&unsealed, &path)
        })
        .await
    }

    /// Bytes that pulls at hand will still write.
    #[must_use]
    pub fn expected_bytes(&self) -> u64 {
        self.lock_live()
            .values()
            .filter(|l| !l.stored)
            .map(|l| {
                l.piece
                    .raw_size
                    .saturating_sub(l.pulled.load(Ordering::Relaxed))
            })
            .sum()
    }

    /// Pieces that are here and wait for a sector.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.lock_live().values().filter(|l| l.stored).count()
    }

    /// Whether `max_waiting` is reached.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.lock_live().len() >= self.cfg.max_waiting
    }

    /// Bytes pulled so far and what the hand-off waits for, while it does.
    #[must_use]
    pub fn progress(&self, key: &DealKey) -> Option<(u64, String)> {
        let live = self.lock_live();
        let l = live.get(key)?;
        Some((l.pulled.load(Ordering::Relaxed), l.waits.clone()))
    }

    /// Follows changes of the room that pieces take.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Tells the pieces of a sector what became of it, in the transaction that changes it. Call
    /// [`Pieces::woken`] after the commit.
    pub fn sector_in(
        &self,
        tx: &mut Tx,
        keys: impl IntoIterator<Item = DealKey>,
        fate: &SectorFate,
    ) -> Result<(), JournalError> {
        let Some(event) = fate.event() else {
            return Ok(());
        };
        for key in keys {
            self.apply_in(tx, &key, &event, None)?;
        }
        Ok(())
    }

    /// Looks for new events and effects.
    pub fn woken(&self) {
        self.events.committed();
        self.work.notify_one();
    }

    fn apply(
        &self,
        key: &DealKey,
        event: &Event,
        settles: Option<EffectId>,
    ) -> Result<Option<Step<PieceMachine>>, JournalError> {
        let step = self
            .machines
            .journal()
            .write(|tx| self.apply_in(tx, key, event, settles))?;
        if let Some(step) = &step {
            self.committed(key, step);
        }
        Ok(step)
    }

    /// Applies an event and, with it, keeps the indexes and tells the spokes.
    fn apply_in(
        &self,
        tx: &mut Tx,
        key: &DealKey,
        event: &Event,
        settles: Option<EffectId>,
    ) -> Result<Option<Step<PieceMachine>>, JournalError> {
        Machines::apply_in(
            tx,
            key,
            event,
            settles,
            |tx, before: Option<&Offer>, after: &Offer| {
                let name = after.piece.cid.to_string();
                if before.is_none() {
                    tx.put(&BY_CID, &(name.clone(), key.clone()), &after.piece)?;
                }
                if before.is_some_and(|b| b.phase == after.phase) {
                    return Ok(());
                }
                if after.phase == Phase::Stored {
                    let mut file = after.piece;
                    if let Some(old) = tx.get(&FILES, &name)? {
                        file.raw_size = file.raw_size.max(old.raw_size);
                    }
                    tx.put(&FILES, &name, &file)?;
                }
                let state = crate::api::piece_state(key, after);
                self.events.append(tx, What::Piece(state)).map(|_| ())
            },
        )
    }

    /// Follows up on a committed step.
    fn committed(&self, key: &DealKey, step: &Step<PieceMachine>) {
        {
            let mut live = self.lock_live();
            match Live::of(&step.after) {
                Some(fresh) => {
                    let entry = live.entry(key.clone()).or_insert(fresh);
                    entry.stored = step.after.phase == Phase::Stored;
                    entry.waits.clear();
                }
                None => {
                    if let Some(gone) = live.remove(key) {
                        gone.cancel.cancel();
                    }
                }
            }
        }
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
        self.woken();
    }

    /// Notes that a piece waits, which a sector may have given back.
    fn waits(&self, key: &DealKey, offer: &Offer) {
        if let Some(fresh) = Live::of(offer) {
            self.lock_live().entry(key.clone()).or_insert(fresh);
        }
    }

    fn waits_for(&self, key: &DealKey, why: &str) {
        if let Some(l) = self.lock_live().get_mut(key) {
            why.clone_into(&mut l.waits);
        }
    }

    fn lock_live(&self) -> std::sync::MutexGuard<'_, HashMap<DealKey, Live>> {
        // Every change of the map is one step, so a panic elsewhere leaves it sound.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the bytes of a hand-off arrive. Keys hold letters and digits only.
    fn part(&self, key: &DealKey) -> PathBuf {
        self.tmp().join(format!("{}_{}.part", key.client, key.id))
    }

    /// Files that are not complete.
    #[must_use]
    pub fn tmp(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Live {
    /// `None` when nothing is waited for.
    fn of(offer: &Offer) -> Option<Self> {
        let stored = match offer.phase {
            Phase::Offered | Phase::Pulling => false,
            Phase::Stored => true,
            Phase::Placed(_) | Phase::Active(_) | Phase::Withdrawn | Phase::Failed { .. } => {
                return None;
            }
        };
        Some(Self {
            piece: offer.piece,
            pulled: Arc::new(AtomicU64::new(0)),
            waits: String::new(),
            cancel: CancellationToken::new(),
            stored,
        })
    }
}

impl Phase {
    /// Whether the hand-off needs, or may need, the piece's file.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        match self {
            Self::Offered | Self::Pulling | Self::Stored | Self::Placed(_) | Self::Active(_) => {
                true
            }
            Self::Withdrawn | Self::Failed { .. } => false,
        }
    }
}

impl SectorFate {
    fn event(&self) -> Option<Event> {
        match self {
            Self::Sealing(_) => None,
            Self::Proven => Some(Event::Proven),
            Self::Lost(why) => Some(Event::SectorLost(why.clone())),
            Self::Returned => Some(Event::Returned),
        }
    }
}

/// The entries of [`BY_CID`] for one piece.
fn deals_of(
    name: &str,
    scan: impl FnOnce(&(String, DealKey)) -> Result<Vec<((String, DealKey), PieceInfo)>, JournalError>,
) -> Result<Vec<(DealKey, PieceInfo)>, JournalError> {
    // Sorts before every key: clients are not empty.
    let first = DealKey {
        client: String::new(),
        id: Ulid::nil(),
    };
    Ok(scan(&(name.to_owned(), first))?
        .into_iter()
        .take_while(|((cid, _), _)| cid == name)
        .map(|((_, key), piece)| (key, piece))
        .collect())
}
