//! Looking after sectors that the chain does not challenge yet: faults and recoveries are declared
//! before the cut-off, and faults that grow old are told.

use std::collections::BTreeMap;

use lotus_actors::miner::{
    self, DeclareFaultsParams, DeclareFaultsRecoveredParams, FaultDeclaration, RecoveryDeclaration,
};
use lotus_actors::ticket_digest;
use lotus_messages::MessageKind;
use lotus_node_client::api::{BitField, Partition, TipSet, TipSetKey};
use lotus_types::{Epoch, EpochDelta, SectorNumber};

use crate::ProvingError;
use crate::config::CheckLevel;
use crate::deadline::Window;
use crate::partition::Verdict;
use crate::window::Shared;

/// Proving periods before its termination from which a faulty sector is warned about. Mainnet
/// terminates after 42.
const AGING_PERIODS: i64 = 14;
/// Faulty sectors of one deadline whose end is asked for. They turn faulty together or not in
/// such numbers.
const AGING_ASKED: usize = 64;

/// The faulty sectors of a deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Aging {
    /// How many.
    pub(crate) sectors: u64,
    /// When the first of them is terminated.
    pub(crate) first_end: Option<Epoch>,
    /// Head from which on that is worth a warning.
    warn_from: Option<Epoch>,
}

impl Aging {
    /// Of the faulty sectors' ends, 0 for none.
    pub(crate) fn of(sectors: u64, ends: impl Iterator<Item = Epoch>, period: EpochDelta) -> Self {
        let first_end = ends.filter(|e| e.0 > 0).min();
        Self {
            sectors,
            first_end,
            warn_from: first_end.map(|e| e - EpochDelta(period.0.saturating_mul(AGING_PERIODS))),
        }
    }

    /// One line for operators; empty when nothing is old enough.
    pub(crate) fn warning<'a>(all: impl Iterator<Item = &'a Self>, head: Epoch) -> String {
        let old: Vec<&Self> = all
            .filter(|a| a.warn_from.is_some_and(|from| head >= from))
            .collect();
        let sectors: u64 = old.iter().map(|a| a.sectors).sum();
        match old.iter().filter_map(|a| a.first_end).min() {
            Some(end) => format!(
                "{sectors} faulty sectors are terminated from epoch {end} on, unless they are \
                 repaired: see `lotus-miner proving faults`"
            ),
            None => String::new(),
        }
    }
}

impl Shared {
    /// Checks a deadline's sectors and declares what changed. Returns once the declarations, if
    /// any, are on chain.
    pub(crate) async fn check_deadline(
        &self,
        w: &Window,
        head: &TipSet,
        period: EpochDelta,
    ) -> Result<(), ProvingError> {
        let (key, actor) = (head.key(), self.deps.miner.address());
        let partitions = self
            .deps
            .node
            .state_miner_partitions(actor, w.index, &key)
            .await?;
        let (mut faults, mut recoveries) = (Vec::new(), Vec::new());
        let mut faulty = BitField::new();
        for (partition, p) in (0u64..).zip(&partitions) {
            self.check_size(p)?;
            if p.live_sectors.is_empty() {
                continue;
            }
            faulty |= &(&p.faulty_sectors & &p.live_sectors);
            let bad = self.bad_sectors(p, self.deps.cfg.check_before_deadline, &key);
            let bad = bad.await?;
            let numbers = BitField::try_from_bits(bad.keys().copied()).unwrap_or_default();
            let verdict = Verdict::of(p, &numbers);
            let deadline = w.index;
            if !verdict.faults.is_empty() {
                for n in verdict.faults.iter().take(32) {
                    tracing::warn!(sector = n, why = bad.get(&n), "sector can not be proven");
                }
                tracing::error!(
                    deadline,
                    partition,
                    count = verdict.faults.len(),
                    "sectors are bad: declaring them faulty"
                );
                faults.push(FaultDeclaration {
                    deadline,
                    partition,
                    sectors: verdict.faults,
                });
            }
            if !verdict.recoveries.is_empty() {
                tracing::info!(
                    deadline,
                    partition,
                    count = verdict.recoveries.len(),
                    "faulty sectors can be proven again: declaring them recovered"
                );
                recoveries.push(RecoveryDeclaration {
                    deadline,
                    partition,
                    sectors: verdict.recoveries,
                });
            }
        }
        self.note_aging(w.index, &faulty, period, &key).await?;
        let mut sent = Vec::new();
        if !faults.is_empty() {
            let params = lotus_actors::encode(&DeclareFaultsParams { faults });
            sent.push(
                self.declare(w, "faults", miner::DECLARE_FAULTS, params)
                    .await?,
            );
        }
        if !recoveries.is_empty() {
            sent.push(self.declare_recovered(w, recoveries).await?);
        }
        for key in sent {
            let landed = self.landed(&key).await?;
            tracing::info!(key, height = %landed.height, "declaration is on chain");
        }
        Ok(())
    }

    /// The bad ones among a partition's live sectors. Those that are faulty are proven, as only a
    /// proof shows that they are repaired; the others are checked to `level`.
    pub(crate) async fn bad_sectors(
        &self,
        p: &Partition,
        level: CheckLevel,
        key: &TipSetKey,
    ) -> Result<BTreeMap<u64, String>, ProvingError> {
        let faulty = &(&p.faulty_sectors & &p.live_sectors) - &p.recovering_sectors;
        let others = &p.live_sectors - &faulty;
        let mut bad = BTreeMap::new();
        for (sectors, level) in [(&faulty, CheckLevel::Proof), (&others, level)] {
            if !sectors.is_empty() && level != CheckLevel::Off {
                let proof = level == CheckLevel::Proof;
                bad.extend(self.check_sectors(sectors, proof, key).await?);
            }
        }
        Ok(bad)
    }

    async fn note_aging(
        &self,
        deadline: u64,
        faulty: &BitField,
        period: EpochDelta,
        key: &TipSetKey,
    ) -> Result<(), ProvingError> {
        let (node, actor) = (&self.deps.node, self.deps.miner.address());
        let mut ends = Vec::new();
        for n in faulty.iter().take(AGING_ASKED) {
            let at = node.state_sector_expiration(actor, SectorNumber(n), key);
            ends.push(at.await?.early);
        }
        let aging = Aging::of(faulty.len(), ends.into_iter(), period);
        self.set_aging(deadline, aging);
        Ok(())
    }

    pub(crate) async fn declare_recovered(
        &self,
        w: &Window,
        recoveries: Vec<RecoveryDeclaration>,
    ) -> Result<String, ProvingError> {
        let params = lotus_actors::encode(&DeclareFaultsRecoveredParams { recoveries });
        let method = miner::DECLARE_FAULTS_RECOVERED;
        self.declare(w, "recovered", method, params).await
    }

    /// The key names the content, so that a repeated check sends no second message and a changed
    /// one does.
    async fn declare(
        &self,
        w: &Window,
        what: &str,
        method: u64,
        params: Vec<u8>,
    ) -> Result<String, ProvingError> {
        let digest = ticket_digest(&params);
        let content: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
        let key = format!(
            "{what}/{}/{}/{}/{content}",
            self.deps.miner, w.period_start, w.index
        );
        self.send(key.clone(), method, params, MessageKind::Declare)
            .await?;
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_faults_are_warned_about() {
        let period = EpochDelta(100);
        let aging = |n, ends: &[i64]| Aging::of(n, ends.iter().map(|e| Epoch(*e)), period);
        let some = [aging(0, &[]), aging(2, &[5000, 4200]), aging(1, &[9000])];
        assert_eq!(some[1].first_end, Some(Epoch(4200)));
        let at = |head| Aging::warning(some.iter(), Epoch(head));
        assert_eq!(at(2799), "");
        assert!(at(2800).starts_with("2 faulty sectors are terminated from epoch 4200"));
        assert!(at(8000).starts_with("3 faulty sectors"));
        // A node that tells no end.
        assert_eq!(aging(3, &[0]).first_end, None);
    }
}
