//! Raw copies of pieces whose sectors are sealed: which are kept, and for how long.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lotus_journal::{JournalError, Machine as _};
use lotus_types::{DealKey, PieceCid};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::machine::{Offer, Phase, PieceMachine};
use super::{BY_CID, MAX_DEALS_OF_A_PIECE, Pieces, Placer, blocking, deals_of, intake};

/// Between two looks at all pieces.
const EVERY: Duration = Duration::from_secs(3_600);
/// A file that was written this lately stays: somebody had it unsealed to read it.
const YOUNG: Duration = Duration::from_secs(24 * 3_600);
/// Hand-offs that are read at a time.
const PAGE: usize = 1_000;

/// How long the raw copy of a piece stays beside its sealed sector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeepUnsealed {
    /// As long as the sector.
    #[default]
    Always,
    /// Until the sector is proven for good.
    UntilProven,
    /// Until the deal ends.
    UntilDealEnds,
}

/// A hand-off of a piece, as far as its raw copy cares.
#[derive(Clone, Copy, Debug)]
struct Deal {
    /// In a sector that is proven for good.
    is_final: bool,
    /// What the client said.
    wish: Option<bool>,
    /// Epoch at which the deal ends; 0: with its sector.
    end_epoch: i64,
}

/// Whether nobody needs the raw copy any more, at this epoch. Sealing may need it again until
/// every sector of the piece is final.
fn is_idle(policy: KeepUnsealed, deals: &[Deal], now: i64) -> bool {
    !deals.is_empty()
        && deals.iter().all(|d| {
            let ended = d.end_epoch > 0 && d.end_epoch < now;
            d.is_final
                && match (d.wish, policy) {
                    (Some(false), _) | (None, KeepUnsealed::UntilProven) => true,
                    (Some(true), _) | (None, KeepUnsealed::UntilDealEnds) => ended,
                    (None, KeepUnsealed::Always) => false,
                }
        })
}

/// Deletes raw copies that nobody needs, now and then, until `stop`.
pub async fn sweep(
    pieces: Arc<Pieces>,
    placer: Arc<dyn Placer>,
    height: watch::Receiver<i64>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
        let now = *height.borrow();
        match pieces.drop_idle(&placer, now, YOUNG).await {
            Ok(0) => {}
            Ok(n) => tracing::info!(
                n,
                "unsealed copies were deleted, as pieces.keep_unsealed says"
            ),
            Err(e) => tracing::warn!("unsealed copies are not looked at: {e}"),
        }
    }
}

impl Pieces {
    /// Deletes the raw copies that nobody needs at this epoch and that are not `young`. Returns how
    /// many.
    pub async fn drop_idle(
        self: &Arc<Self>,
        placer: &Arc<dyn Placer>,
        now: i64,
        young: Duration,
    ) -> Result<u64, JournalError> {
        let (mut after, mut dropped) = (None::<DealKey>, 0);
        loop {
            let page = self.list(after.as_ref(), PAGE)?;
            let proven = page
                .iter()
                .filter(|(_, o)| matches!(o.phase, Phase::Active(_)));
            let cids: BTreeSet<PieceCid> = proven.map(|(_, o)| o.piece.cid).collect();
            for cid in cids {
                // Held while a file appears or goes.
                let _files = self.files.lock().await;
                let (this, placer) = (self.clone(), placer.clone());
                let gone = blocking(move || this.drop_one(&*placer, &cid, now, young)).await?;
                dropped += u64::from(gone);
            }
            match page.last() {
                Some((key, _)) if page.len() == PAGE => after = Some(key.clone()),
                _ => return Ok(dropped),
            }
        }
    }

    fn drop_one(
        &self,
        placer: &dyn Placer,
        cid: &PieceCid,
        now: i64,
        young: Duration,
    ) -> Result<bool, JournalError> {
        let path = self.path(cid);
        let written = std::fs::metadata(&path).and_then(|m| m.modified());
        let Ok(written) = written else {
            return Ok(false);
        };
        let age = SystemTime::now().duration_since(written);
        if age.unwrap_or_default() < young {
            return Ok(false);
        }
        let name = cid.to_string();
        let offers = self.machines.journal().read(|v| {
            let deals = deals_of(&name, |from| {
                v.scan(&BY_CID, Some(from), MAX_DEALS_OF_A_PIECE)
            })?;
            let mut offers: Vec<Offer> = Vec::new();
            for (key, _) in &deals {
                offers.extend(v.get(&PieceMachine::STATES, key)?);
            }
            // Of one with more deals not all are known.
            let all = deals.len() < MAX_DEALS_OF_A_PIECE;
            Ok::<_, JournalError>(if all { offers } else { Vec::new() })
        })?;
        let live = offers.iter().filter(|o| o.phase.is_live());
        let deals: Vec<Deal> = live
            .map(|o| Deal {
                is_final: matches!(o.phase, Phase::Active(p) if placer.is_final(p.sector)),
                wish: o.usage.keep_unsealed,
                end_epoch: o.terms.end_epoch,
            })
            .collect();
        if !is_idle(self.cfg.keep_unsealed, &deals, now) {
            return Ok(false);
        }
        // The journal goes on to know the piece: its file can be made again from the sector.
        match intake::remove(&path) {
            Ok(()) => Ok(true),
            Err(e) => {
                tracing::warn!(piece = name, "an unsealed copy is not deleted: {e}");
                Ok(false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use KeepUnsealed::{Always, UntilDealEnds, UntilProven};

    #[test]
    fn a_copy_is_idle_when_nobody_wants_it() {
        let deal = |is_final, wish, end_epoch| Deal {
            is_final,
            wish,
            end_epoch,
        };
        let (yes, no) = (Some(true), Some(false));
        for (policy, deals, idle) in [
            (Always, vec![], false),
            (Always, vec![deal(true, None, 50)], false),
            (UntilProven, vec![deal(true, None, 500)], true),
            (UntilProven, vec![deal(false, None, 50)], false),
            (UntilDealEnds, vec![deal(true, None, 500)], false),
            (UntilDealEnds, vec![deal(true, None, 100)], false),
            (UntilDealEnds, vec![deal(true, None, 99)], true),
            // With its sector.
            (UntilDealEnds, vec![deal(true, None, 0)], false),
            // The deal is asked first.
            (Always, vec![deal(true, no, 500)], true),
            (Always, vec![deal(false, no, 500)], false),
            (UntilProven, vec![deal(true, yes, 500)], false),
            (UntilProven, vec![deal(true, yes, 99)], true),
            // One that wants it is enough.
            (
                UntilProven,
                vec![deal(true, no, 50), deal(true, yes, 500)],
                false,
            ),
            (
                UntilProven,
                vec![deal(true, no, 50), deal(false, no, 50)],
                false,
            ),
            (
                UntilProven,
                vec![deal(true, no, 50), deal(true, None, 50)],
                true,
            ),
        ] {
            assert_eq!(is_idle(policy, &deals, 100), idle, "{policy:?} {deals:?}");
        }
    }
}
