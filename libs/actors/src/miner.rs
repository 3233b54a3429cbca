//! The storage miner actor: methods, parameters, and the amounts that it computes.

pub use fil_actor_miner_state::v18::{
    BASE_REWARD_FOR_DISPUTED_WINDOW_POST, ChangeMultiaddrsParams, ChangeOwnerAddressParams,
    ChangePeerIDParams, ChangeWorkerAddressParams, CompactCommD, CompactPartitionsParams,
    DataActivationNotification, DeclareFaultsParams, DeclareFaultsRecoveredParams,
    DisputeWindowedPoStParams, ExpirationExtension2, ExtendSectorExpiration2Params,
    FaultDeclaration, GetControlAddressesReturn, MaxTerminationFeeParams, MaxTerminationFeeReturn,
    PieceActivationManifest, PieceChange, PoStPartition, PowerPair, PreCommitSectorBatchParams2,
    ProveCommitSectors3Params, ProveCommitSectors3Return, ProveReplicaUpdates3Params,
    ProveReplicaUpdates3Return, RecoveryDeclaration, SectorActivationManifest, SectorChanges,
    SectorClaim, SectorContentChangedParams, SectorContentChangedReturn, SectorOnChainInfo,
    SectorOnChainInfoFlags, SectorPreCommitInfo, SectorPreCommitOnChainInfo, SectorUpdateManifest,
    SubmitWindowedPoStParams, TerminateSectorsParams, TerminateSectorsReturn,
    TerminationDeclaration, VerifiedAllocationKey, WithdrawBalanceParams, WithdrawBalanceReturn,
    initial_pledge_for_power, is_sealed_sector, is_unsealed_sector, locked_reward_from_reward,
    pledge_penalty_for_continued_fault, pledge_penalty_for_invalid_windowpost,
    pledge_penalty_for_termination, pre_commit_deposit_for_power, qa_power_for_sector,
    qa_power_for_weight, qa_power_max, seal_proof_sector_maximum_lifetime,
};

/// Who owns and operates the miner.
pub const CONTROL_ADDRESSES: u64 = 2;
/// A new worker key (after a delay) and new control addresses (at once).
pub const CHANGE_WORKER_ADDRESS: u64 = 3;
/// The libp2p peer id that clients dial.
pub const CHANGE_PEER_ID: u64 = 4;
/// A WindowPoSt for some partitions of the open deadline.
pub const SUBMIT_WINDOWED_POST: u64 = 5;
/// Ends sectors before their time, for a fee.
pub const TERMINATE_SECTORS: u64 = 9;
/// Says before the deadline that sectors can not be proven.
pub const DECLARE_FAULTS: u64 = 10;
/// Says that faulty sectors will be proven again.
pub const DECLARE_FAULTS_RECOVERED: u64 = 11;
/// Pays out what is not locked.
pub const WITHDRAW_BALANCE: u64 = 16;
/// The multiaddresses that clients dial.
pub const CHANGE_MULTIADDRS: u64 = 18;
/// Drops what is known of the ended sectors of partitions, and moves the others together.
pub const COMPACT_PARTITIONS: u64 = 19;
/// Makes a pending worker key change effective.
pub const CONFIRM_CHANGE_WORKER_ADDRESS: u64 = 21;
/// Pays fee debt from the balance.
pub const REPAY_DEBT: u64 = 22;
/// A new owner, in two steps.
pub const CHANGE_OWNER_ADDRESS: u64 = 23;
/// Shows that an accepted WindowPoSt was wrong.
pub const DISPUTE_WINDOWED_POST: u64 = 24;
/// Commits to replicas before their proofs, with a deposit.
pub const PRE_COMMIT_SECTOR_BATCH2: u64 = 28;
/// [`PRE_COMMIT_SECTOR_BATCH2`] under the name that the contracts use.
pub const METHOD_PRE_COMMIT_SECTOR_BATCH2: u64 = PRE_COMMIT_SECTOR_BATCH2;
/// Makes sectors live longer.
pub const EXTEND_SECTOR_EXPIRATION2: u64 = 32;
/// Proves pre-committed replicas and activates their sectors.
pub const PROVE_COMMIT_SECTORS3: u64 = 34;
/// Proves that sectors hold new data (snap deals).
pub const PROVE_REPLICA_UPDATES3: u64 = 35;
/// The most that ending a sector of some power and pledge costs: FRC-42 hash of
/// `MaxTerminationFee`, FIP-0098.
pub const MAX_TERMINATION_FEE: u64 = 4_127_382_196;
/// Tells a data consumer that a sector holds its piece: FRC-42 hash of `SectorContentChanged`.
pub const SECTOR_CONTENT_CHANGED: u64 = 2_034_386_435;

/// Quality-adjusted power of a sector: bytes, verified data counted tenfold. `duration` is what
/// the weight was computed over.
#[must_use]
pub fn power_of(
    size: lotus_types::SectorSize,
    duration: lotus_types::EpochDelta,
    verified_weight: &fvm_shared::bigint::BigInt,
) -> fvm_shared::bigint::BigInt {
    qa_power_for_weight(fvm_size(size), duration.0, verified_weight)
}

/// The network's type for a sector size.
#[must_use]
pub const fn fvm_size(size: lotus_types::SectorSize) -> fvm_shared::sector::SectorSize {
    use fvm_shared::sector::SectorSize as Fvm;
    use lotus_types::SectorSize as Size;
    match size {
        Size::S2KiB => Fvm::_2KiB,
        Size::S8MiB => Fvm::_8MiB,
        Size::S512MiB => Fvm::_512MiB,
        Size::S32GiB => Fvm::_32GiB,
        Size::S64GiB => Fvm::_64GiB,
    }
}

/// The name of a method, for logs and tables.
#[must_use]
pub const fn method_name(method: u64) -> Option<&'static str> {
    Some(match method {
        crate::METHOD_SEND => "Send",
        CONTROL_ADDRESSES => "ControlAddresses",
        CHANGE_WORKER_ADDRESS => "ChangeWorkerAddress",
        CHANGE_PEER_ID => "ChangePeerID",
        SUBMIT_WINDOWED_POST => "SubmitWindowedPoSt",
        TERMINATE_SECTORS => "TerminateSectors",
        DECLARE_FAULTS => "DeclareFaults",
        DECLARE_FAULTS_RECOVERED => "DeclareFaultsRecovered",
        WITHDRAW_BALANCE => "WithdrawBalance",
        CHANGE_MULTIADDRS => "ChangeMultiaddrs",
        COMPACT_PARTITIONS => "CompactPartitions",
        CONFIRM_CHANGE_WORKER_ADDRESS => "ConfirmChangeWorkerAddress",
        REPAY_DEBT => "RepayDebt",
        CHANGE_OWNER_ADDRESS => "ChangeOwnerAddress",
        DISPUTE_WINDOWED_POST => "DisputeWindowedPoSt",
        PRE_COMMIT_SECTOR_BATCH2 => "PreCommitSectorBatch2",
        EXTEND_SECTOR_EXPIRATION2 => "ExtendSectorExpiration2",
        PROVE_COMMIT_SECTORS3 => "ProveCommitSectors3",
        PROVE_REPLICA_UPDATES3 => "ProveReplicaUpdates3",
        MAX_TERMINATION_FEE => "MaxTerminationFee",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fil_actor_miner_state::v18::{Method, SECTOR_CONTENT_CHANGED as HASHED};

    #[test]
    fn numbers_are_the_actors() {
        for (ours, theirs) in [
            (SUBMIT_WINDOWED_POST, Method::SubmitWindowedPoSt),
            (TERMINATE_SECTORS, Method::TerminateSectors),
            (COMPACT_PARTITIONS, Method::CompactPartitions),
            (DECLARE_FAULTS, Method::DeclareFaults),
            (DECLARE_FAULTS_RECOVERED, Method::DeclareFaultsRecovered),
            (WITHDRAW_BALANCE, Method::WithdrawBalance),
            (DISPUTE_WINDOWED_POST, Method::DisputeWindowedPoSt),
            (PRE_COMMIT_SECTOR_BATCH2, Method::PreCommitSectorBatch2),
            (EXTEND_SECTOR_EXPIRATION2, Method::ExtendSectorExpiration2),
            (PROVE_COMMIT_SECTORS3, Method::ProveCommitSectors3),
            (PROVE_REPLICA_UPDATES3, Method::ProveReplicaUpdates3),
            (CHANGE_WORKER_ADDRESS, Method::ChangeWorkerAddress),
            (CHANGE_OWNER_ADDRESS, Method::ChangeOwnerAddress),
            (REPAY_DEBT, Method::RepayDebt),
        ] {
            assert_eq!(ours, theirs as u64);
        }
        assert_eq!(SECTOR_CONTENT_CHANGED, HASHED);
        assert_eq!(
            MAX_TERMINATION_FEE,
            Method::MaxTerminationFeeExported as u64
        );
        assert_eq!(method_name(28), Some("PreCommitSectorBatch2"));
    }
}
