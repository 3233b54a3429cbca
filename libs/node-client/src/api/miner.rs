use cid::Cid;
use lotus_types::{Address, Epoch, EpochDelta, SectorNumber, TokenAmount};
use serde::{Deserialize, Serialize};

use super::{BeaconEntry, BigInt, BitField};
use crate::json::plain;

/// A miner actor's standing data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MinerInfo {
    /// ID address of the owner.
    #[serde(with = "crate::json")]
    pub owner: Address,
    /// ID address of the worker.
    #[serde(with = "crate::json")]
    pub worker: Address,
    /// A worker that takes over at `worker_change_epoch`.
    #[serde(with = "crate::json::maybe_address", default)]
    pub new_worker: Option<Address>,
    /// Addresses that may send the worker's messages.
    #[serde(with = "crate::json", default)]
    pub control_addresses: Vec<Address>,
    /// When `new_worker` takes over; -1 for never.
    pub worker_change_epoch: Epoch,
    /// libp2p peer id in base58.
    pub peer_id: Option<String>,
    /// libp2p addresses in binary form.
    #[serde(with = "crate::json", default)]
    pub multiaddrs: Vec<Vec<u8>>,
    /// Registered WindowPoSt proof type of every sector.
    #[serde(rename = "WindowPoStProofType")]
    pub window_post_proof_type: i64,
    /// Bytes of every sector.
    pub sector_size: u64,
    /// Most sectors in a partition.
    #[serde(rename = "WindowPoStPartitionSectors")]
    pub window_post_partition_sectors: u64,
    /// First epoch after a consensus fault's punishment; -1 for none.
    pub consensus_fault_elapsed: Epoch,
    /// An owner who has not yet accepted.
    #[serde(with = "crate::json::maybe_address", default)]
    pub pending_owner_address: Option<Address>,
    /// Who receives withdrawals.
    #[serde(with = "crate::json::maybe_address", default)]
    pub beneficiary: Option<Address>,
    /// Limits of a beneficiary other than the owner.
    #[serde(default)]
    pub beneficiary_term: Option<BeneficiaryTerm>,
    /// A beneficiary that is not yet approved, in Lotus' JSON.
    #[serde(default)]
    pub pending_beneficiary_term: Option<serde_json::Value>,
}

/// How much a beneficiary may withdraw, and until when.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BeneficiaryTerm {
    /// attoFIL in all.
    #[serde(with = "crate::json")]
    pub quota: TokenAmount,
    /// attoFIL withdrawn so far.
    #[serde(with = "crate::json")]
    pub used_quota: TokenAmount,
    /// Last epoch.
    pub expiration: Epoch,
}

/// `dline.Info`: a proving deadline, with the network's timing constants in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DeadlineInfo {
    /// The epoch at which this was computed.
    pub current_epoch: Epoch,
    /// First epoch of the proving period.
    pub period_start: Epoch,
    /// Index of the deadline in the period.
    pub index: u64,
    /// First epoch in which a proof may land.
    pub open: Epoch,
    /// First epoch after `open` in which a proof may land no more.
    pub close: Epoch,
    /// The epoch whose randomness is the challenge.
    pub challenge: Epoch,
    /// First epoch at which a fault declaration for this deadline is too late.
    pub fault_cutoff: Epoch,
    /// Deadlines per proving period.
    #[serde(rename = "WPoStPeriodDeadlines")]
    pub w_post_period_deadlines: u64,
    /// Epochs in a proving period.
    #[serde(rename = "WPoStProvingPeriod")]
    pub w_post_proving_period: EpochDelta,
    /// Epochs in a deadline.
    #[serde(rename = "WPoStChallengeWindow")]
    pub w_post_challenge_window: EpochDelta,
    /// Epochs from the challenge to the opening.
    #[serde(rename = "WPoStChallengeLookback")]
    pub w_post_challenge_lookback: EpochDelta,
    /// Epochs from the fault cut-off to the opening.
    pub fault_declaration_cutoff: EpochDelta,
}

impl DeadlineInfo {
    /// Whether a proof may land at `current_epoch`.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open <= self.current_epoch && self.current_epoch < self.close
    }

    /// Last epoch in which a proof may land.
    #[must_use]
    pub fn last(&self) -> Epoch {
        self.close - EpochDelta(1)
    }

    /// First epoch of the next proving period.
    #[must_use]
    pub fn next_period_start(&self) -> Epoch {
        self.period_start + self.w_post_proving_period
    }
}

/// What a deadline has received.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Deadline {
    /// Partitions proven in the current window.
    #[serde(with = "crate::json")]
    pub post_submissions: BitField,
    /// Optimistic proofs of the last window that may still be disputed.
    pub disputable_proof_count: u64,
    /// attoFIL per day that the deadline's sectors pay.
    #[serde(with = "crate::json", default)]
    pub daily_fee: TokenAmount,
}

/// The sectors of one partition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Partition {
    /// Every sector that was ever here, terminated ones too.
    #[serde(with = "crate::json")]
    pub all_sectors: BitField,
    /// Faulty, whether declared or detected.
    #[serde(with = "crate::json")]
    pub faulty_sectors: BitField,
    /// Faulty, and declared as recovered.
    #[serde(with = "crate::json")]
    pub recovering_sectors: BitField,
    /// Not terminated.
    #[serde(with = "crate::json")]
    pub live_sectors: BitField,
    /// Live, proven and not faulty: those with power.
    #[serde(with = "crate::json")]
    pub active_sectors: BitField,
}

/// A proven sector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SectorOnChainInfo {
    /// Number.
    pub sector_number: SectorNumber,
    /// Registered seal proof type.
    pub seal_proof: i64,
    /// commR.
    #[serde(rename = "SealedCID", with = "crate::json")]
    pub sealed_cid: Cid,
    /// When the sector was proven.
    pub activation: Epoch,
    /// When it ends.
    pub expiration: Epoch,
    /// Byte-epochs of ordinary deals.
    #[serde(with = "crate::json")]
    pub deal_weight: BigInt,
    /// Byte-epochs of verified data.
    #[serde(with = "crate::json")]
    pub verified_deal_weight: BigInt,
    /// attoFIL locked for it.
    #[serde(with = "crate::json")]
    pub initial_pledge: TokenAmount,
    /// Expected reward per day at activation.
    #[serde(with = "crate::json", default)]
    pub expected_day_reward: Option<TokenAmount>,
    /// Expected pledge at activation.
    #[serde(with = "crate::json", default)]
    pub expected_storage_pledge: Option<TokenAmount>,
    /// When its power was last set.
    #[serde(default)]
    pub power_base_epoch: Epoch,
    /// Reward per day of the sector that it replaced.
    #[serde(with = "crate::json", default)]
    pub replaced_day_reward: Option<TokenAmount>,
    /// commR before a replica update.
    #[serde(rename = "SectorKeyCID", with = "crate::json", default)]
    pub sector_key_cid: Option<Cid>,
    /// Bit 0: power is computed the simple way.
    #[serde(default)]
    pub flags: u64,
    /// attoFIL per day.
    #[serde(with = "crate::json", default)]
    pub daily_fee: TokenAmount,
}

/// What a pre-commit says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SectorPreCommitInfo {
    /// Registered seal proof type.
    pub seal_proof: i64,
    /// Number.
    pub sector_number: SectorNumber,
    /// commR.
    #[serde(rename = "SealedCID", with = "crate::json")]
    pub sealed_cid: Cid,
    /// The epoch of the ticket.
    pub seal_rand_epoch: Epoch,
    /// Deals of the built-in market.
    #[serde(rename = "DealIDs", with = "crate::json", default)]
    pub deal_ids: Vec<u64>,
    /// When the sector ends.
    pub expiration: Epoch,
    /// commD; absent for a sector without data.
    #[serde(with = "crate::json", default)]
    pub unsealed_cid: Option<Cid>,
}

/// A pre-commit that awaits its proof.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SectorPreCommitOnChainInfo {
    /// What it says.
    pub info: SectorPreCommitInfo,
    /// attoFIL deposited; burned if no proof comes.
    #[serde(with = "crate::json")]
    pub pre_commit_deposit: TokenAmount,
    /// The epoch in which the message landed. The seed is drawn a challenge delay later.
    pub pre_commit_epoch: Epoch,
}

/// Where a sector is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SectorLocation {
    /// Deadline index.
    pub deadline: u64,
    /// Partition index.
    pub partition: u64,
}

/// When a sector leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SectorExpiration {
    /// Its scheduled end.
    pub on_time: Epoch,
    /// The end that a long fault brings; 0 for none.
    pub early: Epoch,
}

/// Power, of a miner or of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Claim {
    /// Bytes.
    #[serde(with = "crate::json")]
    pub raw_byte_power: BigInt,
    /// Bytes, verified data counted tenfold.
    #[serde(with = "crate::json")]
    pub quality_adj_power: BigInt,
}

/// A miner's power in relation to the network's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MinerPower {
    /// The miner's.
    pub miner_power: Claim,
    /// The network's.
    pub total_power: Claim,
    /// Whether the miner is above the minimum for elections.
    pub has_min_power: bool,
}

/// `ExtendedSectorInfo`: a sector that a WinningPoSt must open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MinerSector {
    /// Registered seal proof type.
    pub seal_proof: i64,
    /// Number.
    pub sector_number: SectorNumber,
    /// commR before a replica update.
    #[serde(with = "crate::json", default)]
    pub sector_key: Option<Cid>,
    /// commR.
    #[serde(rename = "SealedCID", with = "crate::json")]
    pub sealed_cid: Cid,
}

/// What a miner needs to take part in an epoch's election.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct MiningBaseInfo {
    /// The miner's power at the look-back.
    #[serde(with = "crate::json")]
    pub miner_power: BigInt,
    /// The network's power at the look-back.
    #[serde(with = "crate::json")]
    pub network_power: BigInt,
    /// The sectors that the WinningPoSt must open, in challenge order.
    #[serde(with = "crate::json")]
    pub sectors: Vec<MinerSector>,
    /// Key address of the worker.
    #[serde(with = "crate::json")]
    pub worker_key: Address,
    /// Bytes of every sector.
    pub sector_size: u64,
    /// Last beacon entry of the parent.
    pub prev_beacon_entry: BeaconEntry,
    /// Beacon entries that the block must carry.
    #[serde(with = "crate::json")]
    pub beacon_entries: Vec<BeaconEntry>,
    /// Whether the miner may win at all.
    pub eligible_for_mining: bool,
}

plain!(
    MinerInfo,
    DeadlineInfo,
    Deadline,
    Partition,
    SectorOnChainInfo,
    SectorPreCommitInfo,
    SectorPreCommitOnChainInfo,
    SectorLocation,
    SectorExpiration,
    Claim,
    MinerPower,
    MinerSector,
    MiningBaseInfo,
);
