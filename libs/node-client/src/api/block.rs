use std::cmp::Ordering;
use std::fmt;

use cid::Cid;
use fvm_ipld_encoding::BytesSer;
use fvm_shared::bigint::bigint_ser::BigIntSer;
use lotus_types::{Address, Epoch, TokenAmount};
use multihash_codetable::{Code, MultihashDigest};
use serde::{Deserialize, Serialize};

use super::{BigInt, Message, Signature, SignedMessage, cbor_cid};
use crate::json::plain;

/// Names a tipset by the CIDs of its blocks, in the tipset's order. Empty means the head.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TipSetKey(#[serde(with = "crate::json")] pub Vec<Cid>);

impl TipSetKey {
    /// The key that stands for the node's current head.
    pub const HEAD: Self = Self(Vec::new());

    /// Whether this stands for the head.
    #[must_use]
    pub fn is_head(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for TipSetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (i, c) in self.0.iter().enumerate() {
            write!(f, "{}{c}", if i == 0 { "" } else { "," })?;
        }
        f.write_str("}")
    }
}

/// A block's place in the ticket chain: a VRF proof by the miner's worker key.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Ticket {
    /// BLS signature that serves as the VRF's output.
    #[serde(rename = "VRFProof", with = "crate::json")]
    pub vrf_proof: Vec<u8>,
}

impl Ticket {
    /// Orders the blocks of a tipset: by the blake2b-256 digest of the proof.
    /// Source: lotus, `chain/types/blockheader.go`, `Ticket.Less`.
    #[must_use]
    pub fn order(&self, other: &Self) -> Ordering {
        let digest = |t: &Self| Code::Blake2b256.digest(&t.vrf_proof);
        digest(self).digest().cmp(digest(other).digest())
    }
}

/// Proof that a miner won an epoch's election.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ElectionProof {
    /// How many times the miner won.
    pub win_count: i64,
    /// BLS signature that serves as the VRF's output.
    #[serde(rename = "VRFProof", with = "crate::json")]
    pub vrf_proof: Vec<u8>,
}

/// One round of the randomness beacon.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BeaconEntry {
    /// The beacon's round.
    pub round: u64,
    /// The round's signature; its hash is the randomness.
    #[serde(with = "crate::json")]
    pub data: Vec<u8>,
}

/// A PoSt proof with its registered proof type (`lotus_proofs::window_post_proof_type`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PoStProof {
    /// Registered PoSt proof type.
    #[serde(rename = "PoStProof")]
    pub post_proof: i64,
    /// The proof.
    #[serde(rename = "ProofBytes", with = "crate::json")]
    pub proof_bytes: Vec<u8>,
}

/// A block header.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BlockHeader {
    /// ID address of the miner actor.
    #[serde(with = "crate::json")]
    pub miner: Address,
    /// Absent only in the genesis block of some networks.
    pub ticket: Option<Ticket>,
    /// Absent only in the genesis block.
    pub election_proof: Option<ElectionProof>,
    /// Beacon rounds since the parent tipset.
    #[serde(with = "crate::json")]
    pub beacon_entries: Vec<BeaconEntry>,
    /// WinningPoSt.
    #[serde(rename = "WinPoStProof", with = "crate::json")]
    pub win_post_proof: Vec<PoStProof>,
    /// Blocks of the parent tipset.
    #[serde(with = "crate::json")]
    pub parents: Vec<Cid>,
    /// Chain weight of the parent tipset.
    #[serde(with = "crate::json")]
    pub parent_weight: BigInt,
    /// Height.
    pub height: Epoch,
    /// State after executing the parent tipset's messages.
    #[serde(with = "crate::json")]
    pub parent_state_root: Cid,
    /// Receipts of the parent tipset's messages.
    #[serde(with = "crate::json")]
    pub parent_message_receipts: Cid,
    /// Root of this block's messages.
    #[serde(with = "crate::json")]
    pub messages: Cid,
    /// Aggregate of the BLS signatures of this block's messages.
    #[serde(rename = "BLSAggregate", with = "crate::json", default)]
    pub bls_aggregate: Option<Signature>,
    /// Unix time, in seconds, at which the block's epoch begins.
    pub timestamp: u64,
    /// The worker's signature over [`BlockHeader::signing_bytes`].
    #[serde(with = "crate::json", default)]
    pub block_sig: Option<Signature>,
    /// Unused by consensus.
    pub fork_signaling: u64,
    /// Base fee, attoFIL per unit of gas, that the parent tipset sets for this block.
    #[serde(with = "crate::json")]
    pub parent_base_fee: TokenAmount,
}

impl BlockHeader {
    /// The header's CBOR, as named by its CID. Source: lotus, `chain/types/cbor_gen.go`.
    #[must_use]
    pub fn to_cbor(&self) -> Vec<u8> {
        self.encode(self.block_sig.as_ref())
    }

    /// What the worker key signs: the header without its signature.
    #[must_use]
    pub fn signing_bytes(&self) -> Vec<u8> {
        self.encode(None)
    }

    /// The block's CID.
    #[must_use]
    pub fn cid(&self) -> Cid {
        cbor_cid(&self.to_cbor())
    }

    fn encode(&self, sig: Option<&Signature>) -> Vec<u8> {
        let ticket = self.ticket.as_ref().map(|t| (BytesSer(&t.vrf_proof),));
        let election = self
            .election_proof
            .as_ref()
            .map(|e| (e.win_count, BytesSer(&e.vrf_proof)));
        let beacon: Vec<_> = self
            .beacon_entries
            .iter()
            .map(|b| (b.round, BytesSer(&b.data)))
            .collect();
        let post: Vec<_> = self
            .win_post_proof
            .iter()
            .map(|p| (p.post_proof, BytesSer(&p.proof_bytes)))
            .collect();
        fvm_ipld_encoding::to_vec(&(
            &self.miner,
            &ticket,
            &election,
            &beacon,
            &post,
            &self.parents,
            BigIntSer(&self.parent_weight),
            self.height.0,
            &self.parent_state_root,
            &self.parent_message_receipts,
            &self.messages,
            &self.bls_aggregate,
            self.timestamp,
            sig,
            self.fork_signaling,
            &self.parent_base_fee,
        ))
        .expect("a tuple of integers, bytes and CIDs encodes")
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct TipSetJson {
    #[serde(with = "crate::json")]
    cids: Vec<Cid>,
    blocks: Vec<BlockHeader>,
    height: Epoch,
}

/// Blocks of one height with the same parents, ordered by ticket. Never empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "TipSetJson", into = "TipSetJson")]
pub struct TipSet {
    /// CIDs of `blocks`.
    pub cids: Vec<Cid>,
    /// The blocks.
    pub blocks: Vec<BlockHeader>,
    /// Height of every block.
    pub height: Epoch,
}

/// Blocks that form no tipset.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadTipSet {
    /// No block at all.
    #[error("a tipset without blocks")]
    Empty,
    /// A different number of CIDs than of blocks.
    #[error("a tipset with {cids} CIDs and {blocks} blocks")]
    Count {
        /// CIDs given.
        cids: usize,
        /// Blocks given.
        blocks: usize,
    },
    /// Two blocks differ in height or parents.
    #[error("the blocks of a tipset differ in height or parents")]
    Mixed,
}

impl TryFrom<TipSetJson> for TipSet {
    type Error = BadTipSet;
    fn try_from(j: TipSetJson) -> Result<Self, BadTipSet> {
        let first = j.blocks.first().ok_or(BadTipSet::Empty)?;
        if j.cids.len() != j.blocks.len() {
            return Err(BadTipSet::Count {
                cids: j.cids.len(),
                blocks: j.blocks.len(),
            });
        }
        let same = |b: &BlockHeader| b.height == j.height && b.parents == first.parents;
        if !j.blocks.iter().all(same) {
            return Err(BadTipSet::Mixed);
        }
        Ok(Self {
            cids: j.cids,
            blocks: j.blocks,
            height: j.height,
        })
    }
}

impl From<TipSet> for TipSetJson {
    fn from(t: TipSet) -> Self {
        Self {
            cids: t.cids,
            blocks: t.blocks,
            height: t.height,
        }
    }
}

impl TipSet {
    /// Forms a tipset: sorts the blocks by ticket and computes their CIDs.
    pub fn new(mut blocks: Vec<BlockHeader>) -> Result<Self, BadTipSet> {
        blocks.sort_by_cached_key(|b| {
            let ticket = b.ticket.as_ref().map(|t| t.vrf_proof.as_slice());
            let digest = Code::Blake2b256.digest(ticket.unwrap_or_default());
            (digest.digest().to_vec(), b.cid().to_bytes())
        });
        let height = blocks.first().ok_or(BadTipSet::Empty)?.height;
        let cids = blocks.iter().map(BlockHeader::cid).collect();
        TipSetJson {
            cids,
            blocks,
            height,
        }
        .try_into()
    }

    /// The tipset's key.
    #[must_use]
    pub fn key(&self) -> TipSetKey {
        TipSetKey(self.cids.clone())
    }

    /// The parent tipset's key; empty at genesis.
    #[must_use]
    pub fn parents(&self) -> TipSetKey {
        TipSetKey(self.min_ticket_block().parents.clone())
    }

    /// The block with the smallest ticket: the one whose ticket seeds randomness.
    #[must_use]
    pub fn min_ticket_block(&self) -> &BlockHeader {
        self.blocks.first().expect("a tipset is never empty")
    }

    /// Smallest timestamp of the blocks, Unix seconds.
    #[must_use]
    pub fn min_timestamp(&self) -> u64 {
        let times = self.blocks.iter().map(|b| b.timestamp);
        times.min().unwrap_or_default()
    }
}

/// How a tipset relates to the head in a [`HeadChange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadChangeKind {
    /// First item of every subscription: the head at that moment.
    Current,
    /// The tipset is a new head on top of the previous one.
    Apply,
    /// The tipset was the head and left the chain.
    Revert,
}

/// One step of the head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct HeadChange {
    /// What happened.
    #[serde(rename = "Type")]
    pub kind: HeadChangeKind,
    /// The tipset.
    pub val: TipSet,
}

/// What `MinerCreateBlock` assembles a block from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BlockTemplate {
    /// The miner actor.
    #[serde(with = "crate::json")]
    pub miner: Address,
    /// The parent tipset.
    pub parents: TipSetKey,
    /// The new ticket.
    pub ticket: Ticket,
    /// Proof of the won election.
    pub eproof: ElectionProof,
    /// Beacon entries since the parent.
    #[serde(with = "crate::json")]
    pub beacon_values: Vec<BeaconEntry>,
    /// Messages to include, in order.
    #[serde(with = "crate::json")]
    pub messages: Vec<SignedMessage>,
    /// Height of the block.
    pub epoch: Epoch,
    /// Unix time of the block, in seconds.
    pub timestamp: u64,
    /// WinningPoSt.
    #[serde(rename = "WinningPoStProof", with = "crate::json")]
    pub winning_post_proof: Vec<PoStProof>,
}

/// A block as it is published: header and message CIDs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BlockMsg {
    /// The signed header.
    pub header: BlockHeader,
    /// Messages with BLS signatures, aggregated in the header.
    #[serde(with = "crate::json")]
    pub bls_messages: Vec<Cid>,
    /// Messages that carry their own secp256k1 signature.
    #[serde(with = "crate::json")]
    pub secpk_messages: Vec<Cid>,
}

/// The messages of a block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BlockMessages {
    /// Messages with BLS signatures, which the header holds as one aggregate.
    #[serde(with = "crate::json")]
    pub bls_messages: Vec<Message>,
    /// Messages that carry their own secp256k1 signature.
    #[serde(with = "crate::json")]
    pub secpk_messages: Vec<SignedMessage>,
    /// CIDs of the first, then of the second, in the same order.
    #[serde(with = "crate::json")]
    pub cids: Vec<Cid>,
}

plain!(
    TipSetKey,
    Ticket,
    ElectionProof,
    BeaconEntry,
    PoStProof,
    BlockHeader,
    TipSet,
    HeadChange,
    BlockTemplate,
    BlockMsg,
    BlockMessages,
);
