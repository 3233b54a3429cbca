use std::collections::BTreeMap;
use std::sync::Arc;

use fvm_ipld_bitfield::BitField;
use lotus_actors::BigInt;
use lotus_actors::miner::{
    PowerPair, SectorOnChainInfo, SectorPreCommitOnChainInfo, qa_power_for_sector,
};
use lotus_types::{Commitment, SectorSize, TokenAmount};
use serde::{Deserialize, Serialize};

use super::pairs;
use crate::policy::Policy;

/// A bit field of these numbers.
pub fn bits(numbers: impl IntoIterator<Item = u64>) -> BitField {
    let mut out = BitField::new();
    for n in numbers {
        // A number beyond the bit field's range can not be a sector's or a partition's.
        if out.try_set(n).is_err() {
            continue;
        }
    }
    out
}

/// A WindowPoSt that was accepted unchecked, and what checking it gave.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Submission {
    /// The partitions that it proves.
    pub partitions: BitField,
    /// The sectors that it proves.
    pub sectors: BitField,
    /// Why the proof is wrong. Known at once to the node, but it has no effect before the
    /// deadline closes and the proof is disputed.
    pub wrong: Option<String>,
}

/// Up to a partition's fill of sectors that are proven together.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Partition {
    /// Every sector that was ever here.
    pub sectors: BitField,
    /// Not yet proven by a first PoSt.
    pub unproven: BitField,
    /// Faulty, declared or detected.
    pub faults: BitField,
    /// Faulty, and declared as recovered.
    pub recoveries: BitField,
    /// Ended.
    pub terminated: BitField,
    /// The epoch at which each faulty sector is terminated.
    #[serde(with = "pairs")]
    pub fault_ends: BTreeMap<u64, i64>,
}

impl Partition {
    /// Not ended.
    #[must_use]
    pub fn live(&self) -> BitField {
        &self.sectors - &self.terminated
    }

    /// Those with power.
    #[must_use]
    pub fn active(&self) -> BitField {
        &(&self.live() - &self.faults) - &self.unproven
    }

    /// Marks live sectors as faulty until `ends`; sectors that already were keep their end.
    /// Returns the new faults.
    pub fn add_faults(&mut self, sectors: &BitField, ends: i64) -> BitField {
        let new = &(sectors & &self.live()) - &self.faults;
        self.faults |= &new;
        self.unproven -= &new;
        for n in new.iter() {
            self.fault_ends.insert(n, ends);
        }
        self.recoveries -= sectors;
        new
    }

    /// Makes recovering sectors good again, because a PoSt proved them. Returns them.
    pub fn recover(&mut self) -> BitField {
        let back = std::mem::take(&mut self.recoveries);
        self.faults -= &back;
        for n in back.iter() {
            self.fault_ends.remove(&n);
        }
        back
    }

    /// Ends sectors.
    pub fn terminate(&mut self, sectors: &BitField) {
        self.terminated |= sectors;
        self.faults -= sectors;
        self.unproven -= sectors;
        self.recoveries -= sectors;
        for n in sectors.iter() {
            self.fault_ends.remove(&n);
        }
    }
}

/// One of the proving period's windows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Deadline {
    /// Its partitions.
    pub partitions: Vec<Partition>,
    /// Partitions proven in the current window.
    pub posted: BitField,
    /// PoSts of the current window.
    pub submissions: Vec<Submission>,
    /// PoSts of the last window, disputable; `None` where one was disputed.
    pub snapshot: Vec<Option<Submission>>,
}

impl Deadline {
    /// Sectors that have not ended.
    #[must_use]
    pub fn live_count(&self) -> u64 {
        self.partitions.iter().map(|p| p.live().len()).sum()
    }

    /// Sectors that were ever here.
    #[must_use]
    pub fn total_count(&self) -> u64 {
        self.partitions.iter().map(|p| p.sectors.len()).sum()
    }
}

/// A storage miner actor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Miner {
    /// Actor id.
    pub id: u64,
    /// Actor id of the owner.
    pub owner: u64,
    /// Actor id of the worker.
    pub worker: u64,
    /// Actor ids that may send the worker's messages.
    pub control: Vec<u64>,
    /// Actor id that receives withdrawals.
    pub beneficiary: u64,
    /// A worker that takes over at an epoch.
    pub pending_worker: Option<(u64, i64)>,
    /// An owner who has not yet accepted.
    pub pending_owner: Option<u64>,
    /// libp2p peer id.
    #[serde(with = "serde_bytes")]
    pub peer_id: Vec<u8>,
    /// libp2p addresses.
    pub multiaddrs: Vec<serde_bytes::ByteBuf>,
    /// Size of every sector.
    pub size: SectorSize,
    /// Pre-commits that await their proofs, by sector number.
    #[serde(with = "pairs")]
    pub pre_commits: BTreeMap<u64, Arc<SectorPreCommitOnChainInfo>>,
    /// Sector numbers that were ever used.
    pub allocated: BitField,
    /// Sectors that have not ended, by number.
    #[serde(with = "pairs")]
    pub sectors: BTreeMap<u64, Arc<SectorOnChainInfo>>,
    /// The proving period.
    pub deadlines: Vec<Deadline>,
    /// Proving periods begin at this epoch modulo their length.
    pub period_offset: i64,
    /// Deposits of pre-commits, attoFIL.
    pub deposits: TokenAmount,
    /// Pledge of sectors, attoFIL.
    pub pledge: TokenAmount,
    /// Rewards that vest: epoch and attoFIL, oldest first.
    pub vesting: Vec<(i64, TokenAmount)>,
    /// Penalties that could not be paid, attoFIL.
    pub fee_debt: TokenAmount,
    /// Power of the active sectors.
    pub power: PowerPair,
}

impl Miner {
    /// A new miner without sectors.
    #[must_use]
    pub fn new(id: u64, owner: u64, worker: u64, size: SectorSize, policy: &Policy) -> Self {
        // Any spread will do; mainnet hashes the address and the epoch.
        let digest = lotus_actors::ticket_digest(&id.to_be_bytes());
        let spread = u64::from(u16::from_be_bytes([digest[0], digest[1]]));
        let period = policy.proving_period();
        Self {
            id,
            owner,
            worker,
            control: Vec::new(),
            beneficiary: owner,
            pending_worker: None,
            pending_owner: None,
            peer_id: Vec::new(),
            multiaddrs: Vec::new(),
            size,
            pre_commits: BTreeMap::new(),
            allocated: BitField::new(),
            sectors: BTreeMap::new(),
            deadlines: (0..policy.deadlines).map(|_| Deadline::default()).collect(),
            period_offset: spread.cast_signed() % period,
            deposits: TokenAmount::default(),
            pledge: TokenAmount::default(),
            vesting: Vec::new(),
            fee_debt: TokenAmount::default(),
            power: PowerPair::zero(),
        }
    }

    /// The network's type for the sector size.
    #[must_use]
    pub fn fvm_size(&self) -> fvm_shared::sector::SectorSize {
        lotus_actors::miner::fvm_size(self.size)
    }

    /// Power of these sectors, whatever their state.
    #[must_use]
    pub fn power_of(&self, sectors: &BitField) -> PowerPair {
        let size = self.fvm_size();
        let mut power = PowerPair::zero();
        for info in sectors.iter().filter_map(|n| self.sectors.get(&n)) {
            power.raw += BigInt::from(self.size.bytes());
            power.qa += qa_power_for_sector(size, info);
        }
        power
    }

    /// Computes `power` again from the partitions.
    pub fn update_power(&mut self) {
        let mut power = PowerPair::zero();
        for p in self.deadlines.iter().flat_map(|d| &d.partitions) {
            power += &self.power_of(&p.active());
        }
        self.power = power;
    }

    /// Where a sector is proven: deadline and partition.
    #[must_use]
    pub fn find(&self, sector: u64) -> Option<(u64, u64)> {
        (0u64..).zip(&self.deadlines).find_map(|(d, dl)| {
            (0u64..)
                .zip(&dl.partitions)
                .find(|(_, p)| p.sectors.get(sector))
                .map(|(p, _)| (d, p))
        })
    }

    /// Rewards that have not vested, attoFIL.
    #[must_use]
    pub fn locked(&self) -> TokenAmount {
        let mut sum = TokenAmount::default();
        for (_, amount) in &self.vesting {
            sum += amount;
        }
        sum
    }

    /// What of `balance` is bound to nothing; fee debt not subtracted.
    #[must_use]
    pub fn unlocked(&self, balance: &TokenAmount) -> TokenAmount {
        balance - &self.deposits - &self.pledge - self.locked()
    }

    /// What of `balance` may be spent.
    #[must_use]
    pub fn available(&self, balance: &TokenAmount) -> TokenAmount {
        self.unlocked(balance) - &self.fee_debt
    }

    /// Drops what has vested by `now` from the vesting table.
    pub fn vest(&mut self, now: i64) {
        self.vesting.retain(|(epoch, _)| *epoch > now);
    }

    /// Locks a reward: it vests in equal daily steps, joined to half days.
    pub fn lock_reward(&mut self, now: i64, amount: &TokenAmount, period: i64, step: i64) {
        let steps = (period / step).max(1);
        let share = amount.div_floor(steps);
        let mut left = amount.clone();
        for i in 1..=steps {
            let part = if i == steps {
                left.clone()
            } else {
                share.clone()
            };
            left -= &part;
            let quantum = (step / 2).max(1);
            let at = ((now + i * step) / quantum + 1) * quantum;
            match self.vesting.binary_search_by_key(&at, |(e, _)| *e) {
                Ok(k) => self.vesting[k].1 += &part,
                Err(k) => self.vesting.insert(k, (at, part)),
            }
        }
    }

    /// Takes up to `amount` out of what has not vested, soonest first, so that a penalty can be
    /// paid from it.
    pub fn unlock_for_penalty(&mut self, amount: &TokenAmount) {
        let mut need = amount.clone();
        for (_, locked) in &mut self.vesting {
            if !need.is_positive() {
                break;
            }
            let take = need.clone().min(locked.clone());
            *locked -= &take;
            need -= &take;
        }
        self.vesting.retain(|(_, a)| a.is_positive());
    }

    /// The sectors that a PoSt over `all` must prove, in order: each one in `ignored` is
    /// replaced by the first good one. Empty if none is good.
    #[must_use]
    pub fn for_proof(
        &self,
        all: &BitField,
        ignored: &BitField,
    ) -> Vec<(lotus_types::SectorNumber, Commitment)> {
        let entry = |n: u64| {
            let info = self.sectors.get(&n)?;
            let comm_r = Commitment::from_sealed_cid(&info.sealed_cid).ok()?;
            Some((lotus_types::SectorNumber(n), comm_r))
        };
        let good = all - ignored;
        let Some(stand_in) = good.first().and_then(entry) else {
            return Vec::new();
        };
        all.iter()
            .map(|n| {
                if ignored.get(n) {
                    stand_in
                } else {
                    entry(n).unwrap_or(stand_in)
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_keeps_its_sets_apart() {
        let mut p = Partition {
            sectors: bits([1, 2, 3, 4]),
            unproven: bits([4]),
            terminated: bits([3]),
            ..Partition::default()
        };
        assert_eq!(p.active(), bits([1, 2]));
        assert_eq!(p.add_faults(&bits([2, 3, 4, 9]), 50), bits([2, 4]));
        assert_eq!(p.active(), bits([1]));
        assert!(p.unproven.is_empty());
        assert_eq!(p.add_faults(&bits([2]), 99), BitField::new());
        assert_eq!(p.fault_ends[&2], 50);
        p.recoveries = bits([2]);
        assert_eq!(p.recover(), bits([2]));
        assert_eq!(p.active(), bits([1, 2]));
        p.terminate(&bits([4]));
        assert_eq!(p.live(), bits([1, 2]));
        assert!(p.faults.is_empty() && p.fault_ends.is_empty());
    }

    #[test]
    fn rewards_vest_in_steps_and_pay_penalties_first() {
        let mut m = Miner::new(1000, 1, 1, SectorSize::S2KiB, &Policy::fast());
        let ten = TokenAmount::from_whole(10);
        m.lock_reward(100, &ten, 1_000, 100);
        assert_eq!(m.locked(), ten);
        assert_eq!(m.vesting.len(), 10);
        m.lock_reward(101, &ten, 1_000, 100);
        assert_eq!(m.vesting.len(), 10, "steps join");
        m.unlock_for_penalty(&TokenAmount::from_whole(5));
        assert_eq!(m.locked(), TokenAmount::from_whole(15));
        m.vest(5_000);
        assert_eq!(m.locked(), TokenAmount::default());
    }
}
