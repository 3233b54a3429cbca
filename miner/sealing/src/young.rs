//! Sectors that a reorg could still take away are looked at until they are final.

use std::collections::BTreeMap;
use std::sync::Arc;

use lotus_node_client::api::{BitField, TipSet, TipSetKey};
use lotus_types::{Epoch, EpochDelta, Kind, SectorNumber};

use crate::SealingError;
use crate::machine::{Event, Sector, SectorState};
use crate::shared::{Also, Shared, lock};

/// Sectors that are asked for in one call.
const AT_ONCE: usize = 1_000;

/// What is known of a sector that was on chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is there, and a reorg may still take it away.
    Young,
    /// It is there, and was there as long ago as the chain is final.
    Final,
    /// It is gone before its time.
    Lost,
}

/// The fate of a sector: since when the chain has it, whether it had it at the depth of finality,
/// and when the journal says that it ends.
fn fate(
    there: Option<Epoch>,
    was_there: bool,
    ends: Option<Epoch>,
    head: Epoch,
    finality: EpochDelta,
) -> Fate {
    match there {
        Some(since) if head - since >= finality && was_there => Fate::Final,
        Some(_) => Fate::Young,
        // The chain forgets sectors some time after their end.
        None if was_there || ends.is_some_and(|e| e <= head) => Fate::Final,
        None => Fate::Lost,
    }
}

/// Whether nothing else looks whether a sector in this state is on chain.
pub(crate) const fn is_watched(state: SectorState) -> bool {
    matches!(
        state,
        SectorState::FinalizeSector
            | SectorState::FinalizeFailed
            | SectorState::Proving
            | SectorState::Available
    )
}

impl Shared {
    /// Looks at young sectors with every head, until the hub stops.
    pub(crate) async fn watch_young(self: Arc<Self>) {
        let mut heads = self.head.clone();
        let stop = self.stop.clone();
        loop {
            heads.borrow_and_update();
            let look = async {
                if let Err(e) = self.look_at_young().await {
                    tracing::warn!(error = %e, "sectors that a reorg could take away were not \
                         looked at; with the next head they are");
                }
                heads.changed().await
            };
            tokio::select! {
                () = stop.cancelled() => return,
                changed = look => if changed.is_err() { return },
            }
        }
    }

    async fn look_at_young(self: &Arc<Self>) -> Result<(), SealingError> {
        let watched: Vec<SectorNumber> = {
            let (young, mirror) = (lock(&self.young), lock(&self.mirror));
            let state = |n: &SectorNumber| mirror.state(*n).map(|(state, _)| state);
            let all = young.iter();
            all.filter(|n| state(n).is_some_and(is_watched))
                .copied()
                .collect()
        };
        if watched.is_empty() {
            return Ok(());
        }
        let head = self.chain_head()?;
        for some in watched.chunks(AT_ONCE) {
            self.look_at(some, &head).await?;
        }
        Ok(())
    }

    async fn look_at(
        self: &Arc<Self>,
        sectors: &[SectorNumber],
        head: &TipSet,
    ) -> Result<(), SealingError> {
        let finality = EpochDelta(self.cfg.finality_epochs);
        let there = self.since(sectors, &head.key()).await?;
        let old = |n: &SectorNumber| there.get(n).is_none_or(|s| head.height - *s >= finality);
        let old: Vec<_> = sectors.iter().copied().filter(old).collect();
        let mut was_there = BTreeMap::new();
        if !old.is_empty() {
            let at = Epoch((head.height - finality).0.max(0));
            let past = self
                .node
                .chain_get_tipset_by_height(at, &head.key())
                .await?;
            was_there = self.since(&old, &past.key()).await?;
        }
        let mut settled = Vec::new();
        for n in sectors {
            let since = there.get(n).copied();
            let ends = match since {
                Some(_) => None,
                None => self.get(*n)?.and_then(|s| s.expiration),
            };
            let was_there = was_there.contains_key(n);
            match fate(since, was_there, ends, head.height, finality) {
                Fate::Young => {}
                Fate::Final => settled.push(*n),
                Fate::Lost => {
                    self.apply(*n, Event::CommitLost, None, Also::Nothing)
                        .await?;
                }
            }
        }
        if !settled.is_empty() {
            self.settle_young(settled).await?;
        }
        Ok(())
    }

    /// Since when the chain has each of these sectors, of those that it has.
    async fn since(
        &self,
        sectors: &[SectorNumber],
        at: &TipSetKey,
    ) -> Result<BTreeMap<SectorNumber, Epoch>, SealingError> {
        let bits = BitField::try_from_bits(sectors.iter().map(|n| n.0));
        let bits = bits.map_err(|e| SealingError::Chain(e.to_string()))?;
        let all = self
            .node
            .state_miner_sectors(self.actor(), Some(&bits), at)
            .await;
        match all {
            Ok(all) => Ok(all
                .iter()
                .map(|i| (i.sector_number, i.activation))
                .collect()),
            Err(e) if e.kind() == Kind::Transport => Err(e.into()),
            // Nodes refuse a list with a sector that is not there.
            Err(_) => {
                let mut found = BTreeMap::new();
                for n in sectors {
                    let info = self.node.state_sector_get_info(self.actor(), *n, at);
                    if let Some(info) = info.await? {
                        found.insert(*n, info.activation);
                    }
                }
                Ok(found)
            }
        }
    }

    /// Sends a sector back to its commit if the chain has lost it. The operator need not wait for
    /// the next look.
    pub(crate) async fn lost(
        self: &Arc<Self>,
        n: SectorNumber,
        s: &Sector,
    ) -> Result<bool, SealingError> {
        if !is_watched(s.state) {
            return Ok(false);
        }
        self.look_at(&[n], &*self.chain_head()?).await?;
        Ok(self.get(n)?.is_some_and(|s| s.activation.is_none()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_is_lost_on_the_word_of_the_chain_alone() {
        let finality = EpochDelta(900);
        let ends = Some(Epoch(100_000));
        for (there, was_there, ends, head, want) in [
            (Some(100), false, ends, 500, Fate::Young),
            (Some(100), false, ends, 999, Fate::Young),
            // Old enough, but the reorg was longer ago than that: not yet seen.
            (Some(100), false, ends, 1_000, Fate::Young),
            (Some(100), true, ends, 1_000, Fate::Final),
            (None, false, ends, 500, Fate::Lost),
            // Also when the hub was down until then.
            (None, false, ends, 5_000, Fate::Lost),
            // It was final, and has ended.
            (None, true, ends, 5_000, Fate::Final),
            (None, false, ends, 100_000, Fate::Final),
            (None, false, None, 5_000, Fate::Lost),
        ] {
            let there = there.map(Epoch);
            let got = fate(there, was_there, ends, Epoch(head), finality);
            assert_eq!(got, want, "{there:?} {was_there} {head}");
        }
    }

    #[test]
    fn what_is_watched_goes_back_when_it_is_lost() {
        for state in SectorState::ALL.iter().filter(|s| is_watched(**s)) {
            let mut s = Sector::new(*state, 1);
            s.activation = Some(Epoch(5));
            let after = crate::machine::step(Some(&s), &Event::CommitLost);
            let (after, _) = after.unwrap_or_else(|| panic!("{state}"));
            assert_eq!(after.state, SectorState::WaitSeed);
            assert_eq!(after.activation, None);
        }
    }
}
