//! Pieces that come over Lotus' JSON-RPC: staged by the hub itself, then offered as a spoke offers
//! them.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use lotus_api::{Data, NewPiece};
use lotus_node_client::json::address_text;
use lotus_runtime::{Fault, trace};
use lotus_types::{DealKey, Kind, SectorNumber};

use crate::capacity::Capacity;
use crate::owner::Seller;
use crate::pieces::machine::{DealTerms, Offer, Phase, Source, Usage};
use crate::pieces::{PieceError, Pieces, blocking};

/// Takes pieces over.
pub struct Handover {
    pieces: Arc<Pieces>,
    capacity: Arc<Capacity>,
    /// Deals whose data arrives now.
    staging: Mutex<HashSet<DealKey>>,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Handover({:?})", self.pieces)
    }
}

/// Keeps a second call for the same deal away while the first brings its data.
struct Staging<'a>(&'a Handover, DealKey);

impl Drop for Staging<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

impl Handover {
    /// Into these pieces.
    #[must_use]
    pub fn new(pieces: Arc<Pieces>, capacity: Arc<Capacity>) -> Self {
        Self {
            pieces,
            capacity,
            staging: Mutex::default(),
        }
    }

    /// Takes a piece over, and waits for its place: sector and padded offset. A deal that is known
    /// keeps its place, and its data is not read again.
    pub async fn take(&self, new: NewPiece, data: Data) -> Result<(SectorNumber, u64), Fault> {
        let key = new.key.clone();
        let mut changed = self.pieces.watch();
        let offer = offer(&new);
        let known = self.pieces.get(&key).map_err(|e| from_journal(&e))?;
        if known.is_none() {
            let _alone = self.stage(&key)?;
            self.capacity
                .redeem(&key, "", new.piece.size.get(), &Seller::Operator)
                .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
            let staged = self.pieces.stage(&key, new.piece, data).await;
            staged.map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
            self.offer(&key, offer).await?;
        } else {
            // The same deal, or an error.
            self.offer(&key, offer).await?;
        }
        loop {
            let now = self.pieces.get(&key).map_err(|e| from_journal(&e))?;
            match now.map(|o| o.phase) {
                Some(Phase::Placed(p) | Phase::Active(p)) => {
                    return Ok((SectorNumber(p.sector), p.offset));
                }
                Some(Phase::Failed { reason, .. }) => {
                    return Err(Fault::new(
                        Kind::Data,
                        format!("deal {key} has no place: {reason}"),
                        "it stays so: make another deal",
                    ));
                }
                Some(Phase::Withdrawn) | None => {
                    return Err(Fault::new(
                        Kind::Data,
                        format!("deal {key} was withdrawn"),
                        "make another deal",
                    ));
                }
                Some(Phase::Offered | Phase::Pulling | Phase::Stored) => {}
            }
            if changed.changed().await.is_err() {
                let why = "the hub stops";
                return Err(Fault::new(
                    Kind::Transport,
                    why,
                    "call again when it is back",
                ));
            }
        }
    }

    fn stage(&self, key: &DealKey) -> Result<Staging<'_>, Fault> {
        if !self.lock().insert(key.clone()) {
            return Err(Fault::new(
                Kind::Capacity,
                format!("the data of deal {key} arrives now, by another call"),
                "wait for that one",
            ));
        }
        Ok(Staging(self, key.clone()))
    }

    async fn offer(&self, key: &DealKey, offer: Offer) -> Result<(), Fault> {
        let (pieces, owned) = (self.pieces.clone(), key.clone());
        let offered = blocking(move || pieces.offer(&owned, offer, &Seller::Operator)).await;
        offered
            .map(|_| ())
            .map_err(|e: PieceError| Fault::new(e.kind(), e.to_string(), e.fix()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<DealKey>> {
        // Every change is one step.
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn offer(new: &NewPiece) -> Offer {
    let notify = new.notify.as_ref();
    Offer {
        piece: new.piece,
        source: Source::Staged,
        terms: DealTerms {
            start_epoch: new.start_epoch.0,
            end_epoch: new.end_epoch.0,
            allocation: new.allocation.map(|(client, id)| (client.0, id)),
            notify: notify.map(|(to, payload)| (address_text(to), payload.clone())),
        },
        // Who hands a piece over this way, indexes and announces it.
        usage: Usage {
            keep_unsealed: Some(new.keep_unsealed),
            ..Usage::default()
        },
        trace: trace::current(),
        owner: None,
        phase: Phase::Offered,
    }
}

fn from_journal(e: &lotus_journal::JournalError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}
