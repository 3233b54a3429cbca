//! Looking after sectors that the chain does not challenge yet: faults and recoveries are declared
//! before the cut-off, and faults that grow old are told.

use std::collections::BTreeMap;

use lotus_actors::miner::{
    self, DeclareFaultsParams, DeclareFaultsRecoveredParams, FaultDeclaration, RecoveryDeclaration,
};
use lotus_actors::ticket_digest;
use lotus_messages::{MessageKind, SendError};
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

/// Times that a declaration is sent which fails on chain.
const DECLARE_ATTEMPTS: u32 = 3;

/// What a look at a deadline's sectors found.
#[derive(Default)]
struct Found {
    /// To be declared faulty.
    faults: Vec<FaultDeclaration>,
    /// To be declared recovered.
    recoveries: Vec<RecoveryDeclaration>,
    /// What can not be proven now, faulty or not.
    bad: BitField,
    /// What is faulty on chain.
    faulty: BitField,
}

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
    /// Looks after a deadline's sectors until its cut-off: declares what changed, and looks again
    /// at what is bad. Returns sooner when nothing is.
    pub(crate) async fn check_deadline(
        &self,
        w: &Window,
        period: EpochDelta,
    ) -> Result<(), ProvingError> {
        let mut heads = self.deps.follower.head();
        let mut suspects = None;
        let mut next = None;
        loop {
            let Some(head) = heads.borrow_and_update().clone() else {
                // There was a head, or nothing would be due.
                return Ok(());
            };
            if !w.declarable(head.height) {
                return Ok(());
            }
            if next.is_none_or(|at| head.height >= at) {
                let found = self.look(w, &head, suspects.as_ref()).await?;
                if suspects.is_none() {
                    let faulty = &found.faulty;
                    self.note_aging(w.index, faulty, period, &head.key())
                        .await?;
                }
                let after = w.after_look(head.height, !found.bad.is_empty());
                let (faults, recoveries) = (found.faults, found.recoveries);
                let declared = self.declare_found(w, faults, after.declare, recoveries);
                next = match declared.await {
                    Ok(()) if after.again.is_none() => return Ok(()),
                    Ok(()) => after.again,
                    // What can be proven may have changed meanwhile, so that is looked at too.
                    Err(e) => {
                        let deadline = w.index;
                        tracing::warn!(deadline, error = %e, fix = e.fix(), "not declared; it is tried again");
                        Some(head.height + EpochDelta(1))
                    }
                };
                suspects = Some(found.bad);
            }
            if heads.changed().await.is_err() {
                // The follower ended, so the hub is stopping.
                return Ok(());
            }
        }
    }

    /// Checks a deadline's sectors: all of them, or those that are faulty or were bad before.
    async fn look(
        &self,
        w: &Window,
        head: &TipSet,
        suspects: Option<&BitField>,
    ) -> Result<Found, ProvingError> {
        let (key, actor, deadline) = (head.key(), self.deps.miner.address(), w.index);
        let partitions = self
            .deps
            .node
            .state_miner_partitions(actor, deadline, &key)
            .await?;
        let mut found = Found::default();
        for (partition, p) in (0u64..).zip(&partitions) {
            self.check_size(p)?;
            let faulty = &p.faulty_sectors & &p.live_sectors;
            let part = match suspects {
                Some(suspects) => Partition {
                    live_sectors: &p.live_sectors & &(suspects | &faulty),
                    ..p.clone()
                },
                None => p.clone(),
            };
            if part.live_sectors.is_empty() {
                continue;
            }
            found.faulty |= &faulty;
            let bad = self.bad_sectors(&part, self.deps.cfg.check_before_deadline, &key);
            let bad = bad.await?;
            let numbers = BitField::try_from_bits(bad.keys().copied()).unwrap_or_default();
            let verdict = Verdict::of(p, &numbers);
            found.bad |= &numbers;
            if !verdict.faults.is_empty() {
                for n in verdict.faults.iter().take(32) {
                    tracing::warn!(sector = n, why = bad.get(&n), "sector can not be proven");
                }
                found.faults.push(FaultDeclaration {
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
                found.recoveries.push(RecoveryDeclaration {
                    deadline,
                    partition,
                    sectors: verdict.recoveries,
                });
            }
        }
        Ok(found)
    }

    /// Declares what a look found, faults only when it is time, and returns once that is on chain.
    async fn declare_found(
        &self,
        w: &Window,
        faults: Vec<FaultDeclaration>,
        faults_too: bool,
        recoveries: Vec<RecoveryDeclaration>,
    ) -> Result<(), ProvingError> {
        let faults = async {
            let count: u64 = faults.iter().map(|f| f.sectors.len()).sum();
            if count == 0 {
                return Ok(());
            }
            if !faults_too {
                tracing::warn!(
                    deadline = w.index,
                    count,
                    "sectors are bad: they are looked at again before they are declared faulty"
                );
                return Ok(());
            }
            tracing::error!(
                deadline = w.index,
                count,
                "sectors are bad: declaring them faulty"
            );
            let params = lotus_actors::encode(&DeclareFaultsParams { faults });
            self.see_declared(w, "faults", miner::DECLARE_FAULTS, params)
                .await
        };
        let recoveries = async {
            if recoveries.is_empty() {
                return Ok(());
            }
            let params = lotus_actors::encode(&DeclareFaultsRecoveredParams { recoveries });
            let method = miner::DECLARE_FAULTS_RECOVERED;
            self.see_declared(w, "recovered", method, params).await
        };
        let (faults, recoveries) = tokio::join!(faults, recoveries);
        faults.and(recoveries)
    }

    /// Sends a declaration, again where it failed on chain and can still land, and waits for it.
    async fn see_declared(
        &self,
        w: &Window,
        what: &str,
        method: u64,
        params: Vec<u8>,
    ) -> Result<(), ProvingError> {
        let mut attempt = 0;
        loop {
            let sent = self.declare(w, what, method, params.clone(), attempt);
            let key = sent.await?;
            let e = match self.landed(&key).await {
                Ok(landed) => {
                    tracing::info!(key, height = %landed.height, "declaration is on chain");
                    return Ok(());
                }
                Err(e) => e,
            };
            let failed = matches!(
                e,
                ProvingError::Landed { .. } | ProvingError::Send(SendError::Replaced { .. })
            );
            let head = self.deps.follower.head().borrow().clone();
            let late = head.is_none_or(|h| !w.declarable(h.height));
            attempt += 1;
            if !failed || late || attempt >= DECLARE_ATTEMPTS {
                return Err(e);
            }
            tracing::warn!(key, error = %e, "declaring anew");
        }
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
        self.declare(w, "recovered", method, params, 0).await
    }

    /// The key names the content, so that a repeated check sends no second message and a changed
    /// one does, and so does another attempt.
    async fn declare(
        &self,
        w: &Window,
        what: &str,
        method: u64,
        params: Vec<u8>,
        attempt: u32,
    ) -> Result<String, ProvingError> {
        let digest = ticket_digest(&params);
        let content: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
        let mut key = format!(
            "{what}/{}/{}/{}/{content}",
            self.deps.miner, w.period_start, w.index
        );
        if attempt > 0 {
            key = format!("{key}/{attempt}");
        }
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
