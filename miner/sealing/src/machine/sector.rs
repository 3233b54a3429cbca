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

/// The upgrade of a sector without data: new data in a new replica, with the first one as key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// What the new replica commits to.
    pub commitments: Option<SealedCommitments>,
    /// Whether a proof of it is stored.
    pub proved: bool,
    /// The last update message.
    pub message: Option<Cid>,
    /// Update messages that are spent: the next one gets a new key.
    pub tries: u32,
    /// Epoch at which the chain was seen to have the new replica.
    pub landed: Option<Epoch>,
}

/// A sector as the chain has it, which this journal does not know: it was restored from a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What the first replica commits to.
    pub commitments: SealedCommitments,
    /// Sealing randomness of the first replica, if it can be told.
    pub ticket: Option<SealTicket>,
    /// How far it is.
    pub at: FoundAt,
    /// It holds the pieces that the journal has. Else they go into another sector.
    pub same_pieces: bool,
    /// It holds data.
    pub has_data: bool,
}

/// How far the chain is with a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundAt {
    /// It has the pre-commit.
    PreCommitted {
        /// Since when.
        epoch: Epoch,
    },
    /// It has the sector.
    Active {
        /// Since when.
        activation: Epoch,
        /// Until when.
        expiration: Epoch,
    },
    /// It has the sector with an upgrade.
    Updated {
        /// Since when it has the sector.
        activation: Epoch,
        /// Until when.
        expiration: Epoch,
        /// What the new replica commits to.
        commitments: SealedCommitments,
        /// Where it was seen.
        seen: Epoch,
    },
}

/// The part of a refused batch whose sectors go together next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Group {
    /// The batch.
    pub batch: u64,
    /// Which of its sectors.
    pub half: Half,
}

/// Which sectors of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Half {
    /// All of them: nothing is wrong with any.
    Both,
    /// The first half.
    First,
    /// The second half.
    Second,
}

impl Group {
    /// The group of a sector at this place among so many, and how large it is.
    pub(crate) const fn of(batch: u64, place: u32, of: u32, whole: bool) -> (Self, u32) {
        let first = of / 2;
        let (half, size) = if whole {
            (Half::Both, of)
        } else if place < first {
            (Half::First, first)
        } else {
            (Half::Second, of - first)
        };
        (Self { batch, half }, size)
    }
}

/// Where a sector waits for a message that it may share with others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// Since when, Unix milliseconds.
    pub since_unix_ms: u64,
    /// The batch that it goes with. Names the message, so that it is the same after a crash.
    pub batch: Option<u64>,
    /// The batch was made for one aggregate of its proofs.
    #[serde(default)]
    pub aggregate: bool,
    /// It goes without others: its batches were refused down to this sector.
    pub alone: bool,
    /// Its place in the batch.
    #[serde(default)]
    pub place: u32,
    /// Sectors that the batch began with; 0 when that is not known.
    #[serde(default)]
    pub of: u32,
    /// Its batch was refused: these go together next, so that a bad sector is found in few
    /// messages and holds up no good one.
    #[serde(default)]
    pub group: Option<Group>,
    /// No aggregate was to be had of a batch with this sector: its proof goes as it is.
    #[serde(default)]
    pub plain: bool,
}

/// The journaled state of a sector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sector {
    /// Where it stands.
    pub state: SectorState,
    /// Its pieces, in the order of their offsets. Empty for committed capacity; with an update,
    /// those of the update.
    pub pieces: Vec<SectorPiece>,
    /// When the first piece came, Unix milliseconds.
    pub opened_unix_ms: u64,
    /// Sealing randomness.
    pub ticket: Option<SealTicket>,
    /// What the replica commits to; with an update, the first replica.
    pub commitments: Option<SealedCommitments>,
    /// The last pre-commit message.
    pub pre_commit: Option<Cid>,
    /// The batch of that message.
    pub pre_commit_batch: Option<u64>,
    /// Epoch at which the chain took the pre-commit.
    pub pre_commit_epoch: Option<Epoch>,
    /// Interactive randomness.
    pub seed: Option<SealSeed>,
    /// Whether a proof for `seed` is stored.
    pub proved: bool,
    /// The last prove-commit message.
    pub commit: Option<Cid>,
    /// The batch of that message.
    #[serde(default)]
    pub commit_batch: Option<u64>,
    /// What a seal proof is made of was deleted, as it is once the chain has the sector: another
    /// proof needs the replica made again, from the pieces on.
    #[serde(default)]
    pub bare: bool,
    /// The chain has it with data whose pieces are not in this journal, which was restored from a
    /// backup.
    #[serde(default)]
    pub unlisted: bool,
    /// Its place in a batch of messages.
    pub seat: Seat,
    /// Epoch at which the chain took the sector.
    pub activation: Option<Epoch>,
    /// Epoch at which its commitment ends.
    pub expiration: Option<Epoch>,
    /// The upgrade with data.
    pub update: Option<Update>,
    /// The last termination message.
    pub terminate: Option<Cid>,
    /// Termination messages that are spent.
    pub terminate_tries: u32,
    /// Failures of the present step, or of the steps that it was sent back to, in a row.
    pub failures: u32,
    /// Proofs of this replica that the chain called wrong.
    pub bad_proofs: u32,
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
            pre_commit_batch: None,
            pre_commit_epoch: None,
            seed: None,
            proved: false,
            commit: None,
            commit_batch: None,
            bare: false,
            unlisted: false,
            seat: Seat {
                since_unix_ms: 0,
                batch: None,
                aggregate: false,
                alone: false,
                place: 0,
                of: 0,
                group: None,
                plain: false,
            },
            activation: None,
            expiration: None,
            update: None,
            terminate: None,
            terminate_tries: 0,
            failures: 0,
            bad_proofs: 0,
            reason: None,
            events: 0,
        }
    }

    /// The pieces without their deals.
    #[must_use]
    pub fn piece_infos(&self) -> Vec<PieceInfo> {
        self.pieces.iter().map(|p| p.piece).collect()
    }

    /// What the replica commits to that the chain has, or will have: of the update once the
    /// chain took it.
    #[must_use]
    pub fn current_commitments(&self) -> Option<SealedCommitments> {
        let updated = self.update.as_ref().filter(|u| u.landed.is_some());
        updated.and_then(|u| u.commitments).or(self.commitments)
    }
}
