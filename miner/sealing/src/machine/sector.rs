use cid::Cid;
use lotus_proofs::{SealedCommitments, Seed, Ticket};
use lotus_types::{ActorId, Address, DealKey, Epoch, EpochDelta, PieceInfo};
use serde::{Deserialize, Serialize};

use super::SectorState;

/// What the chain is told about a piece.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// First epoch at which the piece must be in a proven sector; 0 when it does not matter.
    pub start_epoch: Epoch,
    /// Last epoch of the commitment; the sector lives at least until then.
    pub end_epoch: Epoch,
    /// Allocation of verified data.
    pub allocation: Option<Allocation>,
    /// Actor to notify when the sector is proven.
    pub notify: Option<Notify>,
}

/// Names an allocation in the verified registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// The client.
    pub client: ActorId,
    /// Number of the allocation.
    pub id: u64,
}

/// A notification of an actor at activation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notify {
    /// The actor.
    pub address: Address,
    /// What it is sent.
    #[serde(with = "serde_bytes")]
    pub payload: Vec<u8>,
}

/// How long the verified registry lets a claim live, counted from activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The sector must live at least so long.
    pub term_min: EpochDelta,
    /// And at most so long.
    pub term_max: EpochDelta,
}

/// A piece in a sector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SectorPiece {
    /// The deal.
    pub key: DealKey,
    /// The piece.
    pub piece: PieceInfo,
    /// Where it begins in the sector, Fr32 padding included.
    pub offset: u64,
    /// What the chain is told.
    pub terms: Terms,
    /// The allocation's limits, once it was found on chain. Without it the piece is activated
    /// as unverified data.
    pub claim: Option<Claim>,
    /// Trace of the hand-over, which the work on the sector goes on with: W3C traceparent, or
    /// empty.
    #[serde(default)]
    pub trace: String,
}

/// Sealing randomness and where it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealTicket {
    /// The 32 bytes.
    pub value: Ticket,
    /// Epoch of the chain's ticket.
    pub epoch: Epoch,
}

/// Interactive randomness and where it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealSeed {
    /// The 32 bytes.
    pub value: Seed,
    /// Epoch of the beacon entry.
    pub epoch: Epoch,
}

/// The journaled state of a sector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sector {
    /// Where it stands.
    pub state: SectorState,
    /// Its pieces, in the order of their offsets. Empty for committed capacity.
    pub pieces: Vec<SectorPiece>,
    /// When the first piece came, Unix milliseconds.
    pub opened_unix_ms: u64,
    /// Sealing randomness.
    pub ticket: Option<SealTicket>,
    /// What the replica commits to.
    pub commitments: Option<SealedCommitments>,
    /// The last pre-commit message.
    pub pre_commit: Option<Cid>,
    /// Pre-commit messages that the chain refused: the next one gets a new key.
    pub pre_commit_tries: u32,
    /// Epoch at which the chain took the pre-commit.
    pub pre_commit_epoch: Option<Epoch>,
    /// Interactive randomness.
    pub seed: Option<SealSeed>,
    /// Whether a proof for `seed` is stored.
    pub proved: bool,
    /// The last prove-commit message.
    pub commit: Option<Cid>,
    /// Prove-commit messages that the chain refused.
    pub commit_tries: u32,
    /// Epoch at which the chain took the sector.
    pub activation: Option<Epoch>,
    /// Epoch at which its commitment ends.
    pub expiration: Option<Epoch>,
    /// Failures of the present step, or of the steps that it was sent back to, in a row.
    pub failures: u32,
    /// Why it is in a failure state.
    pub reason: Option<String>,
    /// Events that it has seen: the number of the last entry in its log.
    pub events: u64,
}

impl Sector {
    pub(crate) const fn new(state: SectorState, opened_unix_ms: u64) -> Self {
        Self {
            state,
            pieces: Vec::new(),
            opened_unix_ms,
            ticket: None,
            commitments: None,
            pre_commit: None,
            pre_commit_tries: 0,
            pre_commit_epoch: None,
            seed: None,
            proved: false,
            commit: None,
            commit_tries: 0,
            activation: None,
            expiration: None,
            failures: 0,
            reason: None,
            events: 0,
        }
    }

    /// The pieces without their deals.
    #[must_use]
    pub fn piece_infos(&self) -> Vec<PieceInfo> {
        self.pieces.iter().map(|p| p.piece).collect()
    }
}
