//! The types that cross the node's RPC, named and shaped as Lotus' Go types.

mod block;
mod message;
mod miner;
mod node;

pub use block::{
    BeaconEntry, BlockHeader, BlockMessages, BlockMsg, BlockTemplate, ElectionProof, HeadChange,
    HeadChangeKind, PoStProof, Ticket, TipSet, TipSetKey,
};
pub use fvm_ipld_bitfield::BitField;
pub use fvm_shared::bigint::BigInt;
pub use fvm_shared::crypto::signature::{Signature, SignatureType};
pub use message::{
    InvocResult, Message, MessageReceipt, MessageSendSpec, MsgGasCost, MsgLookup, SignedMessage,
};
pub use miner::{
    BeneficiaryTerm, Claim, Deadline, DeadlineInfo, MinerInfo, MinerPower, MinerSector,
    MiningBaseInfo, Partition, SectorExpiration, SectorLocation, SectorOnChainInfo,
    SectorPreCommitInfo, SectorPreCommitOnChainInfo,
};
pub use node::{
    Actor, Allocation, DealCollateralBounds, DealProposal, DealState, MarketBalance, MarketDeal,
    NetworkParams, VerifiedClaim, Version,
};

use cid::Cid;
use multihash_codetable::{Code, MultihashDigest};

/// CID of a chain object: dag-cbor and blake2b-256, as Filecoin names blocks, messages and state.
#[must_use]
pub fn cbor_cid(bytes: &[u8]) -> Cid {
    Cid::new_v1(fvm_ipld_encoding::DAG_CBOR, Code::Blake2b256.digest(bytes))
}
