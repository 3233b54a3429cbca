//! What the operator asks of sectors, and which sector a piece may upgrade.

use std::sync::Arc;

use lotus_node_client::api::TipSetKey;
use lotus_types::{PieceInfo, SectorNumber, TokenAmount};
use serde::{Deserialize, Serialize};

use crate::batch::{BatchKind, Waiting, aggregates, waiting};
use crate::machine::{Claim, Effect, Event, Sector, SectorState, Terms};
use crate::pieces::{Choice, Upgrade, choose};
use crate::shared::{Also, Shared, lock};
use crate::{Sealing, SealingError};

/// Sectors that are asked for at the chain for one piece: the others are tried with the next.
const CANDIDATES: usize = 16;

/// What is lost with a sector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stake {
    /// The sector.
    pub sector: u64,
    /// Its state.
    pub state: String,
    /// Deals whose pieces it holds.
    pub deals: usize,
    /// The most that ending it now costs, attoFIL; only for sectors on chain.
    pub termination_fee_attofil: Option<String>,
    /// Its pledge, attoFIL: what is left of it comes back. Only for sectors on chain.
    pub pledge_attofil: Option<String>,
    /// Its pre-commit's deposit, attoFIL: lost unless the sector is proven.
    pub deposit_attofil: Option<String>,
}

impl Sealing {
    async fn ask(
        &self,
        number: SectorNumber,
        event: Event,
        wanted: &'static str,
    ) -> Result<(), SealingError> {
        let s = &self.0;
        let sector = s.get(number)?.ok_or(SealingError::NoSector(number))?;
        if s.apply(number, event, None, Also::Nothing).await? {
            return Ok(());
        }
        Err(SealingError::WrongState {
            number,
            state: sector.state,
            wanted,
        })
    }

    /// Gives a sector up and deletes its files, when the chain does not need them. Pieces of a
    /// sector that never was on chain go into another.
    pub async fn remove(&self, number: SectorNumber) -> Result<(), SealingError> {
        let s = &self.0;
        let mut sector = s.get(number)?.ok_or(SealingError::NoSector(number))?;
        if s.lost(number, &sector).await? {
            sector = s.get(number)?.ok_or(SealingError::NoSector(number))?;
        }
        if let SectorState::FailedUnrecoverable | SectorState::ChainConflict = sector.state {
            // The chain may have the number from elsewhere, but not with these files.
            if s.follow(number, &sector, Effect::Remove).await?.is_some() {
                let why = "its files are, or may be, those of the sector on chain".into();
                return Err(SealingError::Needed { number, why });
            }
        } else {
            s.unneeded(number, &sector).await?;
        }
        let wanted = "without a message on its way, and not being upgraded";
        self.ask(number, Event::Remove, wanted).await
    }

    /// Ends a sector before its time.
    pub async fn terminate(&self, number: SectorNumber) -> Result<(), SealingError> {
        let wanted = "in state Proving, Available, UpdateActivating or ReleaseSectorKey";
        self.ask(number, Event::Terminate, wanted).await
    }

    /// What is lost when the sector is terminated or removed now.
    pub async fn stake(&self, number: SectorNumber) -> Result<Stake, SealingError> {
        let s = &self.0;
        let sector = s.get(number)?.ok_or(SealingError::NoSector(number))?;
        let at = TipSetKey::HEAD;
        let info = s.live_info(number, &at).await?;
        let pre = s
            .node
            .state_sector_precommit_info(s.actor(), number, &at)
            .await?;
        let fee = match &info {
            Some(info) => Some(s.termination_fee(info).await?),
            None => None,
        };
        let atto = |a: Option<TokenAmount>| a.map(|a| a.atto().to_string());
        Ok(Stake {
            sector: number.0,
            state: sector.state.as_str().into(),
            deals: sector.pieces.len(),
            termination_fee_attofil: atto(fee),
            pledge_attofil: atto(info.map(|i| i.initial_pledge)),
            deposit_attofil: atto(pre.map(|p| p.pre_commit_deposit)),
        })
    }

    /// Offers a sector without data for upgrades.
    pub async fn snap_up(&self, number: SectorNumber) -> Result<(), SealingError> {
        let wanted = "in state Proving that hold no data";
        self.ask(number, Event::MarkedForUpdate, wanted).await
    }

    /// Gives an upgrade up. Its pieces go into another sector.
    pub async fn abort_upgrade(&self, number: SectorNumber) -> Result<(), SealingError> {
        let wanted = "that are being upgraded and have no message on its way";
        self.ask(number, Event::AbortUpgrade, wanted).await
    }

    /// Puts a sector into a state by the operator's will.
    pub async fn force_state(
        &self,
        number: SectorNumber,
        state: SectorState,
    ) -> Result<(), SealingError> {
        let wanted = "that have what the new state works on";
        // A sector that a reorg took away may go where one that never was on chain may.
        if let Some(sector) = self.0.get(number)?
            && self.0.lost(number, &sector).await?
        {
            tracing::info!(sector = %number, "the chain does not have the sector any more");
        }
        self.ask(number, Event::ForceState(state), wanted).await
    }

    /// The sectors that wait for others to share a message with.
    #[must_use]
    pub fn waiting(&self, kind: BatchKind) -> Vec<Waiting> {
        waiting(&self.0.cfg, kind, lock(&self.0.mirror).busy())
    }

    /// Whether those that wait would share an aggregate if their message were made now, but for
    /// those that go [alone](Waiting::alone) or [as they are](Waiting::plain).
    #[must_use]
    pub fn aggregates(&self, kind: BatchKind, waiting: &[Waiting]) -> bool {
        let together = waiting.iter().filter(|w| !w.alone && !w.plain).count();
        let range = aggregates(&self.0.cfg, self.0.proofs);
        kind == BatchKind::Commit && range.is_some_and(|r| together >= *r.start())
    }

    /// Sends the message of those that wait now. Returns the sectors.
    #[must_use]
    pub fn publish(&self, kind: BatchKind) -> Vec<Waiting> {
        let all = self.waiting(kind);
        lock(&self.0.published).extend(all.iter().map(|w| w.sector));
        self.0.changes.send_modify(|n| *n = n.wrapping_add(1));
        all
    }
}

impl Shared {
    /// An error while the chain may still ask for the sector's files.
    async fn unneeded(&self, number: SectorNumber, s: &Sector) -> Result<(), SealingError> {
        let head = self.chain_head()?;
        let needed = |why| Err(SealingError::Needed { number, why });
        for kind in [BatchKind::PreCommit, BatchKind::Commit] {
            if let Some(batch) = s.seat.batch
                && s.state == kind.state()
                && self.sender.status(&kind.key(batch)).await?.is_some()
            {
                return needed("its message is on its way".into());
            }
        }
        if let Some(info) = self.live_info(number, &head.key()).await? {
            return needed(format!("it is on chain until epoch {}", info.expiration));
        }
        if !self.is_gone(number, s, &head).await? {
            return needed(format!(
                "it was on chain in the last {} epochs, and a block may still ask for it",
                self.cfg.finality_epochs
            ));
        }
        Ok(())
    }

    pub(crate) fn choose(&self, piece: &PieceInfo, upgrade: &Upgrade) -> Choice {
        choose(
            self.size,
            &self.cfg,
            lock(&self.mirror).busy(),
            piece,
            upgrade,
        )
    }

    /// What a piece asks of a sector that is on chain, and a sector to upgrade: the one that ends
    /// first of those that live long enough and are proven.
    pub(crate) async fn upgrade(
        self: &Arc<Self>,
        piece: &PieceInfo,
        terms: &Terms,
    ) -> Result<Upgrade, SealingError> {
        {
            let mirror = lock(&self.mirror);
            let takes = |s: &Sector| s.state == SectorState::SnapDealsWaitDeals;
            if mirror.available().is_empty() && !mirror.busy().values().any(takes) {
                return Ok(Upgrade::default());
            }
        }
        let head = self.chain_head()?;
        let mut upgrade = Upgrade {
            end: terms.end_epoch,
            claim: None,
            head: head.height,
            candidate: None,
        };
        if let Some(a) = terms.allocation {
            let found = self
                .node
                .state_get_allocation(a.client.address(), a.id, &head.key())
                .await?;
            upgrade.claim = found.map(|f| Claim {
                term_min: f.term_min,
                term_max: f.term_max,
            });
        }
        if !matches!(self.choose(piece, &upgrade), Choice::Into(..)) {
            let candidates: Vec<SectorNumber> = lock(&self.mirror)
                .available()
                .iter()
                .filter(|(end, _)| upgrade.fits(*end))
                .map(|(_, n)| *n)
                .take(CANDIDATES)
                .collect();
            for n in candidates {
                if self.live_info(n, &head.key()).await?.is_none() {
                    continue;
                }
                let (at, _) = self.location(n, &head).await?;
                if self.is_active(n, at, &head).await? {
                    upgrade.candidate = Some(n);
                    break;
                }
            }
        }
        Ok(upgrade)
    }
}
