//! What a node says about miners.

use std::sync::Arc;

use cid::multibase::Base;
use fvm_ipld_bitfield::BitField;
use lotus_actors::BigInt;
use lotus_node_client::api::{
    Claim, Deadline, DeadlineInfo, MinerInfo, MinerPower, Partition, SectorExpiration,
    SectorLocation, SectorOnChainInfo, SectorPreCommitInfo, SectorPreCommitOnChainInfo, TipSetKey,
};
use lotus_types::{Address, Epoch, EpochDelta, SectorNumber, SectorSize, TokenAmount};

use super::Chain;
use super::store::{Entry, Executed};
use crate::error::ChainError;
use crate::policy::Policy;
use crate::state::{Miner, bits};
use crate::vm::Economy;

/// Lotus' answers on deposits and pledges leave a tenth of room.
const ROOM_PERCENT: u64 = 110;

impl Chain {
    fn with_miner<R>(
        &self,
        addr: &Address,
        key: &TipSetKey,
        f: impl FnOnce(&Miner, &Arc<Entry>, &Executed) -> Result<R, ChainError>,
    ) -> Result<R, ChainError> {
        let (e, x) = self.state_at(key)?;
        let id = x.state.lookup(addr).ok_or(ChainError::NoActor(*addr))?;
        let m = x.state.miners.get(&id);
        let m = m.ok_or_else(|| ChainError::Invalid(format!("actor {addr} is no miner")))?;
        f(m, &e, &x)
    }

    /// A miner's standing data.
    pub fn state_miner_info(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<MinerInfo, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            let peer = (!m.peer_id.is_empty()).then(|| Base::Base58Btc.encode(&m.peer_id));
            let (new_worker, at) = m.pending_worker.unzip();
            Ok(MinerInfo {
                owner: Address::new_id(m.owner),
                worker: Address::new_id(m.worker),
                new_worker: new_worker.map(Address::new_id),
                control_addresses: m.control.iter().copied().map(Address::new_id).collect(),
                worker_change_epoch: Epoch(at.unwrap_or(-1)),
                peer_id: peer,
                multiaddrs: m.multiaddrs.iter().map(|a| a.to_vec()).collect(),
                window_post_proof_type: lotus_proofs::window_post_proof_type(m.size),
                sector_size: m.size.bytes(),
                window_post_partition_sectors: Policy::partition_sectors(m.size),
                consensus_fault_elapsed: Epoch(-1),
                pending_owner_address: m.pending_owner.map(Address::new_id),
                beneficiary: Some(Address::new_id(m.beneficiary)),
                beneficiary_term: None,
                pending_beneficiary_term: None,
            })
        })
    }

    /// The miner's current deadline and the network's PoSt timing.
    pub fn state_miner_proving_deadline(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<DeadlineInfo, ChainError> {
        self.with_miner(addr, key, |m, e, _| {
            Ok(self.0.policy.current_deadline(m.period_offset, e.height()))
        })
    }

    /// Every deadline of a proving period, in order.
    pub fn state_miner_deadlines(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<Vec<Deadline>, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            let all = m.deadlines.iter().map(|d| Deadline {
                post_submissions: d.posted.clone(),
                disputable_proof_count: d.snapshot.iter().flatten().count() as u64,
                daily_fee: TokenAmount::default(),
            });
            Ok(all.collect())
        })
    }

    /// The partitions of a deadline, in order.
    pub fn state_miner_partitions(
        &self,
        addr: &Address,
        deadline: u64,
        key: &TipSetKey,
    ) -> Result<Vec<Partition>, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            let d = usize::try_from(deadline)
                .ok()
                .and_then(|i| m.deadlines.get(i));
            let d = d.ok_or_else(|| ChainError::Invalid(format!("invalid deadline {deadline}")))?;
            let all = d.partitions.iter().map(|p| Partition {
                all_sectors: p.sectors.clone(),
                faulty_sectors: p.faults.clone(),
                recovering_sectors: p.recoveries.clone(),
                live_sectors: p.live(),
                active_sectors: p.active(),
            });
            Ok(all.collect())
        })
    }

    /// Sectors by number; `None` for all.
    pub fn state_miner_sectors(
        &self,
        addr: &Address,
        numbers: Option<&BitField>,
        key: &TipSetKey,
    ) -> Result<Vec<SectorOnChainInfo>, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            let all = m
                .sectors
                .iter()
                .filter(|(n, _)| numbers.is_none_or(|f| f.get(**n)));
            Ok(all.map(|(_, s)| sector(s)).collect())
        })
    }

    /// Sectors with power.
    pub fn state_miner_active_sectors(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<Vec<SectorOnChainInfo>, ChainError> {
        let active = self.union(addr, key, |p| p.active())?;
        self.state_miner_sectors(addr, Some(&active), key)
    }

    fn union(
        &self,
        addr: &Address,
        key: &TipSetKey,
        f: impl Fn(&crate::state::Partition) -> BitField,
    ) -> Result<BitField, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            let all = m.deadlines.iter().flat_map(|d| &d.partitions);
            Ok(all.fold(BitField::new(), |sum, p| &sum | &f(p)))
        })
    }

    /// Numbers of the faulty sectors.
    pub fn state_miner_faults(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<BitField, ChainError> {
        self.union(addr, key, |p| p.faults.clone())
    }

    /// Numbers of the sectors declared as recovered.
    pub fn state_miner_recoveries(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<BitField, ChainError> {
        self.union(addr, key, |p| p.recoveries.clone())
    }

    /// The miner's power and the network's.
    pub fn state_miner_power(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<MinerPower, ChainError> {
        self.with_miner(addr, key, |m, _, x| {
            let claim = |p: &lotus_actors::miner::PowerPair| Claim {
                raw_byte_power: p.raw.clone(),
                quality_adj_power: p.qa.clone(),
            };
            Ok(MinerPower {
                miner_power: claim(&m.power),
                total_power: claim(&x.state.total_power()),
                has_min_power: m.power.qa >= BigInt::from(self.0.policy.min_power),
            })
        })
    }

    /// What the miner actor may spend, attoFIL.
    pub fn state_miner_available_balance(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<TokenAmount, ChainError> {
        self.with_miner(addr, key, |m, e, x| {
            let mut m = m.clone();
            m.vest(e.height());
            Ok(m.available(&x.state.balance(m.id)))
        })
    }

    /// Sector numbers that were ever used.
    pub fn state_miner_allocated(
        &self,
        addr: &Address,
        key: &TipSetKey,
    ) -> Result<BitField, ChainError> {
        self.with_miner(addr, key, |m, _, _| Ok(m.allocated.clone()))
    }

    /// Whether a sector number was ever used.
    pub fn state_miner_sector_allocated(
        &self,
        addr: &Address,
        n: SectorNumber,
        key: &TipSetKey,
    ) -> Result<bool, ChainError> {
        self.with_miner(addr, key, |m, _, _| Ok(m.allocated.get(n.0)))
    }

    /// A proven sector.
    pub fn state_sector_get_info(
        &self,
        addr: &Address,
        n: SectorNumber,
        key: &TipSetKey,
    ) -> Result<Option<SectorOnChainInfo>, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            Ok(m.sectors.get(&n.0).map(|s| sector(s)))
        })
    }

    /// A pre-committed sector.
    pub fn state_sector_precommit_info(
        &self,
        addr: &Address,
        n: SectorNumber,
        key: &TipSetKey,
    ) -> Result<Option<SectorPreCommitOnChainInfo>, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            Ok(m.pre_commits.get(&n.0).map(|p| SectorPreCommitOnChainInfo {
                info: SectorPreCommitInfo {
                    seal_proof: p.info.seal_proof.into(),
                    sector_number: n,
                    sealed_cid: p.info.sealed_cid,
                    seal_rand_epoch: Epoch(p.info.seal_rand_epoch),
                    deal_ids: p.info.deal_ids.clone(),
                    expiration: Epoch(p.info.expiration),
                    unsealed_cid: p.info.unsealed_cid.0,
                },
                pre_commit_deposit: p.pre_commit_deposit.clone(),
                pre_commit_epoch: Epoch(p.pre_commit_epoch),
            }))
        })
    }

    /// Where a sector is proven.
    pub fn state_sector_partition(
        &self,
        addr: &Address,
        n: SectorNumber,
        key: &TipSetKey,
    ) -> Result<SectorLocation, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            let found = m.find(n.0);
            let found = found.ok_or_else(|| ChainError::NotFound(format!("sector {n}")));
            found.map(|(deadline, partition)| SectorLocation {
                deadline,
                partition,
            })
        })
    }

    /// When a sector leaves.
    pub fn state_sector_expiration(
        &self,
        addr: &Address,
        n: SectorNumber,
        key: &TipSetKey,
    ) -> Result<SectorExpiration, ChainError> {
        self.with_miner(addr, key, |m, _, _| {
            let info = m.sectors.get(&n.0);
            let info = info.ok_or_else(|| ChainError::NotFound(format!("sector {n}")))?;
            let parts = m.deadlines.iter().flat_map(|d| &d.partitions);
            let early = parts.filter_map(|p| p.fault_ends.get(&n.0)).copied().next();
            Ok(SectorExpiration {
                on_time: Epoch(info.expiration),
                early: Epoch(early.unwrap_or(0)),
            })
        })
    }

    /// Every miner actor.
    pub fn state_list_miners(&self, key: &TipSetKey) -> Result<Vec<Address>, ChainError> {
        let (_, x) = self.state_at(key)?;
        Ok(x.state
            .miners
            .keys()
            .copied()
            .map(Address::new_id)
            .collect())
    }

    /// Deposit that a pre-commit needs, with room, attoFIL.
    pub fn state_miner_pre_commit_deposit_for_power(
        &self,
        addr: &Address,
        _info: &SectorPreCommitInfo,
        key: &TipSetKey,
    ) -> Result<TokenAmount, ChainError> {
        self.with_miner(addr, key, |m, _, x| {
            let exact = Economy::of(&x.state, &self.0.policy).pre_commit_deposit(m.fvm_size());
            Ok(with_room(&exact))
        })
    }

    /// Pledge that a sector needs, with room, attoFIL.
    pub fn state_miner_initial_pledge_for_sector(
        &self,
        duration: EpochDelta,
        size: u64,
        verified: u64,
        key: &TipSetKey,
    ) -> Result<TokenAmount, ChainError> {
        let (_, x) = self.state_at(key)?;
        let size = SectorSize::try_from(size).map_err(|e| ChainError::Invalid(e.to_string()))?;
        if verified > size.bytes() || duration.0 <= 0 {
            return Err(ChainError::Invalid(
                "verified size or duration out of range".into(),
            ));
        }
        let m = Miner::new(0, 0, 0, size, &self.0.policy);
        let weight = BigInt::from(verified) * duration.0;
        let power = lotus_actors::miner::qa_power_for_weight(m.fvm_size(), duration.0, &weight);
        Ok(with_room(
            &Economy::of(&x.state, &self.0.policy).pledge(&power),
        ))
    }

    /// The sectors that a bit field of numbers names, for tests and tools.
    #[must_use]
    pub fn numbers(list: &[u64]) -> BitField {
        bits(list.iter().copied())
    }
}

fn with_room(amount: &TokenAmount) -> TokenAmount {
    (amount * ROOM_PERCENT).div_floor(100u64)
}

fn sector(s: &lotus_actors::miner::SectorOnChainInfo) -> SectorOnChainInfo {
    SectorOnChainInfo {
        sector_number: SectorNumber(s.sector_number),
        seal_proof: s.seal_proof.into(),
        sealed_cid: s.sealed_cid,
        activation: Epoch(s.activation),
        expiration: Epoch(s.expiration),
        deal_weight: s.deal_weight.clone(),
        verified_deal_weight: s.verified_deal_weight.clone(),
        initial_pledge: s.initial_pledge.clone(),
        expected_day_reward: s.expected_day_reward.clone(),
        expected_storage_pledge: s.expected_storage_pledge.clone(),
        power_base_epoch: Epoch(s.power_base_epoch),
        replaced_day_reward: s.replaced_day_reward.clone(),
        sector_key_cid: s.sector_key_cid,
        flags: s.flags.bits().into(),
        daily_fee: s.daily_fee.clone(),
    }
}
