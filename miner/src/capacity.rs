//! Backpressure: room is taken before a deal is accepted, and returns by itself.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hub_proto::v1::{CapacityState, Credit};
use lotus_types::{DealKey, Generation, Kind, PaddedSize, SectorSize};
use tokio::sync::watch;
use ulid::Ulid;

use crate::config::PiecesConfig;
use crate::events::unix_ms;
use crate::owner::{self, Seller};
use crate::pieces::Pieces;

/// Credits at a time.
const MAX_CREDITS: usize = 10_000;
/// When a caller without room should ask again.
const RETRY_AFTER: Duration = Duration::from_secs(15);

/// Why there is no credit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CapacityError {
    /// It will never fit.
    #[error("a piece of {piece} padded bytes does not fit a sector of {sector}")]
    TooLarge {
        /// Padded size of the piece.
        piece: u64,
        /// Padded size of a sector.
        sector: u64,
    },
    /// No padded piece size.
    #[error("{0}")]
    BadSize(String),
    /// Another spoke has the deal.
    #[error("deal {key} is one of {owner}")]
    NotYours {
        /// The deal.
        key: DealKey,
        /// Whose it is.
        owner: String,
    },
    /// No room now.
    #[error("no room for {piece} bytes: {free} are free, {waiting} pieces wait for sectors")]
    NoRoom {
        /// Padded size of the piece.
        piece: u64,
        /// Bytes left.
        free: u64,
        /// Pieces that wait.
        waiting: usize,
    },
}

impl CapacityError {
    /// Who must act.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::TooLarge { .. } | Self::BadSize(_) | Self::NotYours { .. } => Kind::Data,
            Self::NoRoom { .. } => Kind::Capacity,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::TooLarge { sector, .. } => {
                format!("split the data into pieces of at most {sector} padded bytes")
            }
            Self::BadSize(_) => "give the padded piece size".into(),
            Self::NotYours { owner, .. } => owner::fix(owner),
            Self::NoRoom { .. } => "try again later, or free disk space on the hub".into(),
        }
    }

    /// When to try again.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NoRoom { .. } => Some(RETRY_AFTER),
            _ => None,
        }
    }
}

struct Held {
    id: String,
    size: u64,
    expires: Instant,
    /// The spoke that took it; empty for the operator.
    owner: String,
}

/// The room of this hub and who took it. Credits live in memory: a new hub knows none, and its
/// generation tells.
pub struct Capacity {
    credits: Mutex<HashMap<DealKey, Held>>,
    pieces: Arc<Pieces>,
    disk: PathBuf,
    keep_free: u64,
    max_secs: u32,
    sector: SectorSize,
    generation: Generation,
    changed: watch::Sender<u64>,
}

impl std::fmt::Debug for Capacity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Capacity({})", self.disk.display())
    }
}

impl Capacity {
    /// The room on the disk at `disk`.
    #[must_use]
    pub fn new(
        pieces: Arc<Pieces>,
        disk: PathBuf,
        cfg: &PiecesConfig,
        sector: SectorSize,
        generation: Generation,
    ) -> Self {
        Self {
            credits: Mutex::default(),
            pieces,
            disk,
            keep_free: cfg.keep_free_bytes,
            max_secs: cfg.max_credit_secs.max(1),
            sector,
            generation,
            changed: watch::Sender::new(0),
        }
    }

    /// Takes room for a piece; the same key gets the same credit while it lives.
    pub fn acquire(
        &self,
        key: &DealKey,
        size: u64,
        secs: u32,
        seller: &Seller,
    ) -> Result<Credit, CapacityError> {
        self.check_size(size)?;
        let life = Duration::from_secs(u64::from(secs.clamp(1, self.max_secs)));
        let mut credits = self.lock();
        check_owner(&credits, key, seller)?;
        let expires = Instant::now() + life;
        let same = |h: &&mut Held| h.size == size && seller.owns(&h.owner);
        if let Some(held) = credits.get_mut(key).filter(same) {
            held.expires = held.expires.max(expires);
            return Ok(self.credit(held));
        }
        let taken: u64 = credits.values().map(|h| h.size).sum();
        if credits.len() >= MAX_CREDITS {
            return Err(self.no_room(size, 0));
        }
        self.check_room(size, taken)?;
        let held = Held {
            id: Ulid::generate().to_string(),
            size,
            expires,
            owner: seller.name().unwrap_or_default().into(),
        };
        let credit = self.credit(&held);
        credits.insert(key.clone(), held);
        drop(credits);
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
        Ok(credit)
    }

    /// Gives a credit of this seller back. One that is unknown has returned by itself.
    pub fn release(&self, id: &str, seller: &Seller) {
        self.lock()
            .retain(|_, held| held.id != id || !seller.owns(&held.owner));
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Exchanges the credit of a deal for its piece. Without one there must be room.
    pub fn redeem(
        &self,
        key: &DealKey,
        credit: &str,
        size: u64,
        seller: &Seller,
    ) -> Result<(), CapacityError> {
        self.check_size(size)?;
        let mut credits = self.lock();
        check_owner(&credits, key, seller)?;
        let held = credits
            .get(key)
            .is_some_and(|h| h.id == credit && h.size >= size);
        if !held {
            let taken = credits
                .iter()
                .filter(|(k, _)| *k != key)
                .map(|(_, h)| h.size)
                .sum();
            self.check_room(size, taken)?;
        }
        credits.remove(key);
        drop(credits);
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
        Ok(())
    }

    /// The room now.
    #[must_use]
    pub fn state(&self) -> CapacityState {
        let credited_bytes = self.lock().values().map(|h| h.size).sum();
        CapacityState {
            free_bytes: self.free().saturating_sub(credited_bytes),
            credited_bytes,
            max_piece_size: self.sector.bytes(),
            waiting_pieces: u32::try_from(self.pieces.waiting()).unwrap_or(u32::MAX),
        }
    }

    /// Follows changes of credits.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn check_size(&self, size: u64) -> Result<(), CapacityError> {
        let piece = PaddedSize::new(size).map_err(|e| CapacityError::BadSize(e.to_string()))?;
        if piece > self.sector.padded() {
            return Err(CapacityError::TooLarge {
                piece: size,
                sector: self.sector.bytes(),
            });
        }
        Ok(())
    }

    fn check_room(&self, size: u64, taken: u64) -> Result<(), CapacityError> {
        let free = self.free().saturating_sub(taken);
        if size > free || self.pieces.is_full() {
            return Err(self.no_room(size, free));
        }
        Ok(())
    }

    fn no_room(&self, piece: u64, free: u64) -> CapacityError {
        CapacityError::NoRoom {
            piece,
            free,
            waiting: self.pieces.waiting(),
        }
    }

    /// Bytes that more pieces may take. 0 while the disk cannot be asked.
    fn free(&self) -> u64 {
        let on_disk = rustix::fs::statvfs(&self.disk).map_or(0, |s| s.f_bavail * s.f_frsize);
        on_disk
            .saturating_sub(self.keep_free)
            .saturating_sub(self.pieces.expected_bytes())
    }

    fn credit(&self, held: &Held) -> Credit {
        let left = held.expires.saturating_duration_since(Instant::now());
        Credit {
            id: held.id.clone(),
            generation: self.generation.0,
            expires_unix_ms: unix_ms() + u64::try_from(left.as_millis()).unwrap_or(u64::MAX / 2),
        }
    }

    /// The credits that live.
    fn lock(&self) -> MutexGuard<'_, HashMap<DealKey, Held>> {
        let mut credits = self.credits.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        credits.retain(|_, held| held.expires > now);
        credits
    }
}

/// A credit that lives is of whoever took it.
fn check_owner(
    credits: &HashMap<DealKey, Held>,
    key: &DealKey,
    seller: &Seller,
) -> Result<(), CapacityError> {
    match credits.get(key) {
        Some(held) if !seller.may_take(&held.owner) => Err(CapacityError::NotYours {
            key: key.clone(),
            owner: held.owner.clone(),
        }),
        _ => Ok(()),
    }
}
