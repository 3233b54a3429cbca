//! What memory holds of the journaled sectors. A provider has millions to which nothing happens:
//! of those the journal has all, and this only what is asked often.

use std::collections::{BTreeMap, BTreeSet};

use lotus_types::{Commitment, Epoch, SectorNumber};

use crate::machine::{Sector, SectorState};

/// What is held of an idle sector.
struct Idle {
    state: SectorState,
    expiration: Option<Epoch>,
    /// Boxed, because few have any of it.
    rare: Option<Box<Rare>>,
}

struct Rare {
    /// comm_r of the replica that an upgrade made.
    updated: Option<Commitment>,
    reason: Option<String>,
}

/// The sectors, by number.
#[derive(Default)]
pub(crate) struct Mirror {
    busy: BTreeMap<SectorNumber, Sector>,
    idle: BTreeMap<SectorNumber, Idle>,
    /// Those that an upgrade may take, the one that ends first at the front.
    available: BTreeSet<(Epoch, SectorNumber)>,
}

/// Nothing happens to such a sector unless somebody asks for it.
const fn is_idle(state: SectorState) -> bool {
    matches!(
        state,
        SectorState::Proving | SectorState::Available | SectorState::Removed
    )
}

impl Mirror {
    /// A sector as it is now.
    pub(crate) fn put(&mut self, number: SectorNumber, sector: Sector) {
        if let Some(old) = self.idle.remove(&number)
            && let Some(end) = old.expiration
        {
            self.available.remove(&(end, number));
        }
        if !is_idle(sector.state) {
            self.busy.insert(number, sector);
            return;
        }
        self.busy.remove(&number);
        if let (SectorState::Available, Some(end)) = (sector.state, sector.expiration) {
            self.available.insert((end, number));
        }
        let rare = Rare {
            updated: updated(&sector),
            reason: sector.reason,
        };
        let idle = Idle {
            state: sector.state,
            expiration: sector.expiration,
            rare: (rare.updated.is_some() || rare.reason.is_some()).then(|| Box::new(rare)),
        };
        self.idle.insert(number, idle);
    }

    /// The sectors that are not idle.
    pub(crate) const fn busy(&self) -> &BTreeMap<SectorNumber, Sector> {
        &self.busy
    }

    /// Sectors that an upgrade may take, with their ends, the one that ends first at the front.
    pub(crate) const fn available(&self) -> &BTreeSet<(Epoch, SectorNumber)> {
        &self.available
    }

    /// The state of a sector, and the reason that goes with it.
    pub(crate) fn state(&self, number: SectorNumber) -> Option<(SectorState, Option<&str>)> {
        if let Some(s) = self.busy.get(&number) {
            return Some((s.state, s.reason.as_deref()));
        }
        let s = self.idle.get(&number)?;
        let reason = s.rare.as_ref().and_then(|r| r.reason.as_deref());
        Some((s.state, reason))
    }

    /// The state of every sector.
    pub(crate) fn states(&self) -> Vec<(SectorNumber, SectorState)> {
        let busy = self.busy.iter().map(|(n, s)| (*n, s.state));
        let idle = self.idle.iter().map(|(n, s)| (*n, s.state));
        let mut all: Vec<_> = busy.chain(idle).collect();
        all.sort_unstable_by_key(|(n, _)| *n);
        all
    }

    /// What the upgrade of a sector commits to.
    pub(crate) fn updated(&self, number: SectorNumber) -> Option<Commitment> {
        match self.busy.get(&number) {
            Some(s) => updated(s),
            None => self.idle.get(&number)?.rare.as_ref()?.updated,
        }
    }
}

fn updated(sector: &Sector) -> Option<Commitment> {
    let commitments = sector.update.as_ref()?.commitments;
    commitments.map(|c| c.comm_r)
}

#[cfg(test)]
mod tests {
    use lotus_proofs::SealedCommitments;

    use super::*;
    use crate::machine::Update;

    fn sector(state: SectorState, end: i64) -> Sector {
        let mut s = Sector::new(state, 0);
        s.expiration = Some(Epoch(end));
        s
    }

    #[test]
    fn every_state_is_on_one_side_and_comes_back() {
        let n = SectorNumber(7);
        for state in SectorState::ALL {
            for next in SectorState::ALL {
                let mut mirror = Mirror::default();
                mirror.put(n, sector(*state, 10));
                mirror.put(n, sector(*next, 20));
                assert_eq!(mirror.states(), [(n, *next)]);
                assert_eq!(mirror.state(n), Some((*next, None)));
                // Effects run on sectors that are held whole.
                assert!(next.effect().is_none() || mirror.busy().contains_key(&n));
                let upgradable = *next == SectorState::Available;
                let first = mirror.available().first();
                assert_eq!(first, upgradable.then_some(&(Epoch(20), n)));
                assert!(mirror.available().len() <= 1);
            }
        }
    }

    #[test]
    fn idle_sectors_keep_what_is_rare() {
        let mut mirror = Mirror::default();
        let n = SectorNumber(7);
        for state in [SectorState::Proving, SectorState::Terminating] {
            let mut s = sector(state, 10);
            s.reason = Some("because".into());
            let comm = |b| Commitment([b; 32]);
            s.update = Some(Update {
                commitments: Some(SealedCommitments {
                    comm_r: comm(1),
                    comm_d: comm(2),
                }),
                ..Update::default()
            });
            mirror.put(n, s);
            assert_eq!(mirror.updated(n), Some(comm(1)));
            assert_eq!(mirror.state(n), Some((state, Some("because"))));
        }
        let other = SectorNumber(8);
        assert_eq!((mirror.updated(other), mirror.state(other)), (None, None));
    }
}
