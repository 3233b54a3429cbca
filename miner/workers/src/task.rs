use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use lotus_proofs::{
    PlacedPiece, PostSector, SealInputs, SealedCommitments, Seed, Ticket, UpdatedSector,
};
use lotus_types::{ActorId, Commitment, PieceCid, SectorId, SectorNumber, SectorSize};
use serde::{Deserialize, Serialize};

use crate::{Post, PostClaim, PostKind};

/// Which worker processes run a task. The classes never share a process, so that sealing cannot
/// starve or crash proving.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Sealing and unsealing: long, may wait, niced.
    Seal,
    /// WindowPoSt and WinningPoSt: short, on the clock, normal priority.
    Prove,
}

impl Class {
    /// Every class.
    pub const ALL: [Self; 2] = [Self::Seal, Self::Prove];

    /// Name on the wire, in logs and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Seal => "seal",
            Self::Prove => "prove",
        }
    }

    /// The class of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.as_str() == name)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where the raw bytes of a piece are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceFile {
    /// The piece.
    pub cid: PieceCid,
    /// Its raw payload: complete and verified.
    pub path: PathBuf,
}

/// A sector to prove and where its replica is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostFile {
    /// Number within the miner.
    pub number: SectorNumber,
    /// The replica's commitment, as on chain.
    pub comm_r: Commitment,
    /// The replica.
    pub sealed: PathBuf,
    /// Its cache directory.
    pub cache: PathBuf,
}

impl From<&PostFile> for PostSector {
    fn from(f: &PostFile) -> Self {
        Self {
            number: f.number,
            comm_r: f.comm_r,
            sealed: f.sealed.clone(),
            cache: f.cache.clone(),
        }
    }
}

/// A seal to aggregate with others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealProof {
    /// Number within the miner.
    pub number: SectorNumber,
    /// Sealing randomness.
    #[serde(with = "hex32")]
    pub ticket: Ticket,
    /// Interactive randomness.
    #[serde(with = "hex32")]
    pub seed: Seed,
    /// What the sector commits to.
    pub commitments: SealedCommitments,
    /// What `Commit` gave.
    #[serde(with = "base64_bytes")]
    pub proof: Vec<u8>,
}

impl SealProof {
    /// What the proof is about.
    #[must_use]
    pub const fn inputs(&self) -> SealInputs {
        SealInputs {
            number: self.number,
            ticket: self.ticket,
            seed: self.seed,
            commitments: self.commitments,
        }
    }
}

/// The files of a sector before and after a replica update (snap deal).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateFiles {
    /// The sector.
    pub sector: SectorId,
    /// Size of the sector.
    pub size: SectorSize,
    /// The replica before the update.
    pub sealed: PathBuf,
    /// Its cache directory.
    pub cache: PathBuf,
    /// The replica after the update.
    pub updated: PathBuf,
    /// Its cache directory.
    pub updated_cache: PathBuf,
}

impl UpdateFiles {
    /// Gives each file another path.
    pub(crate) fn move_to(&mut self, to: &impl Fn(&'static str) -> PathBuf) {
        self.sealed = to("sealed");
        self.cache = to("cache");
        self.updated = to("update");
        self.updated_cache = to("update-cache");
    }

    pub(crate) fn paths(&self) -> UpdatedSector<'_> {
        UpdatedSector {
            size: self.size,
            sealed: &self.sealed,
            cache: &self.cache,
            updated: &self.updated,
            updated_cache: &self.updated_cache,
        }
    }
}

/// One step of heavy work: plain data, so that it can cross to another process.
///
/// Paths are the caller's: give attempt directories and rename them when the task is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Task {
    /// Writes the pieces, Fr32-padded and verified, into `unsealed`. [`Output::Done`].
    AddPieces {
        /// Size of the sector.
        size: SectorSize,
        /// Every piece of the sector at its place, fillers included.
        layout: Vec<PlacedPiece>,
        /// The raw files of the pieces that are no fillers.
        pieces: Vec<PieceFile>,
        /// File to write.
        unsealed: PathBuf,
    },
    /// Labels the graph. [`Output::PreCommit1`].
    PreCommit1 {
        /// The sector.
        sector: SectorId,
        /// Size of the sector.
        size: SectorSize,
        /// Sealing randomness.
        #[serde(with = "hex32")]
        ticket: Ticket,
        /// Every piece of the sector at its place, fillers included.
        layout: Vec<PlacedPiece>,
        /// The sector's data.
        unsealed: PathBuf,
        /// Replica to write.
        sealed: PathBuf,
        /// Cache directory to fill.
        cache: PathBuf,
    },
    /// Encodes the replica and builds its trees. Cannot be done twice over one
    /// [`Task::PreCommit1`]. [`Output::Commitments`].
    PreCommit2 {
        /// The sector.
        sector: SectorId,
        /// Size of the sector.
        size: SectorSize,
        /// What `PreCommit1` gave.
        #[serde(with = "base64_bytes")]
        pc1: Vec<u8>,
        /// Replica, encoded in place.
        sealed: PathBuf,
        /// Cache directory.
        cache: PathBuf,
        /// Existing directory on the same file system: for what a worker on another host sends,
        /// before it replaces the two above.
        attempt: PathBuf,
    },
    /// Makes the seal proof. [`Output::Proof`].
    Commit {
        /// The sector.
        sector: SectorId,
        /// Size of the sector.
        size: SectorSize,
        /// Sealing randomness.
        #[serde(with = "hex32")]
        ticket: Ticket,
        /// Interactive randomness.
        #[serde(with = "hex32")]
        seed: Seed,
        /// Every piece of the sector at its place, fillers included.
        layout: Vec<PlacedPiece>,
        /// What `PreCommit2` gave.
        commitments: SealedCommitments,
        /// The replica.
        sealed: PathBuf,
        /// Cache directory.
        cache: PathBuf,
    },
    /// Makes one proof of the seals of many sectors. Reads no files. [`Output::Proof`].
    Aggregate {
        /// The miner.
        miner: ActorId,
        /// Size of its sectors.
        size: SectorSize,
        /// The seals, in the order of their message.
        seals: Vec<SealProof>,
    },
    /// Drops what only sealing needs from the cache. [`Output::Done`].
    Finalize {
        /// The sector.
        sector: SectorId,
        /// Size of the sector.
        size: SectorSize,
        /// Cache directory.
        cache: PathBuf,
    },
    /// Writes a range of the sector's raw data to `out`. [`Output::Done`].
    Unseal {
        /// The sector.
        sector: SectorId,
        /// Size of the sector.
        size: SectorSize,
        /// Sealing randomness.
        #[serde(with = "hex32")]
        ticket: Ticket,
        /// The sector's data commitment.
        comm_d: Commitment,
        /// The replica.
        sealed: PathBuf,
        /// Cache directory: only read.
        cache: PathBuf,
        /// Existing directory for temporary files.
        scratch: PathBuf,
        /// File to write: created or truncated, then synced.
        out: PathBuf,
        /// First payload byte.
        offset: u64,
        /// Number of payload bytes.
        len: u64,
    },
    /// Encodes new data into a new replica. [`Output::Commitments`].
    ReplicaUpdate {
        /// Where the replicas are.
        files: UpdateFiles,
        /// Every piece of the new data at its place, fillers included.
        layout: Vec<PlacedPiece>,
        /// The new data.
        unsealed: PathBuf,
    },
    /// Proves that the new replica holds the new data. [`Output::Proof`].
    ProveUpdate {
        /// Where the replicas are.
        files: UpdateFiles,
        /// Commitment of the replica before the update.
        old_comm_r: Commitment,
        /// What `ReplicaUpdate` gave.
        commitments: SealedCommitments,
    },
    /// Writes a range of an updated sector's raw data to `out`. [`Output::Done`].
    UnsealUpdate {
        /// Where the replicas are.
        files: UpdateFiles,
        /// Commitment of the new data.
        comm_d: Commitment,
        /// File to write: created or truncated, then synced.
        out: PathBuf,
        /// First payload byte.
        offset: u64,
        /// Number of payload bytes.
        len: u64,
    },
    /// Opens the challenged leaves of sectors: the first step of a proof of spacetime.
    /// [`Output::Proof`], the same in every mode, or, of a deadline, [`Output::Faulty`].
    OpenPost(Post),
    /// The second step: the proof of sectors that were opened. [`Output::Proof`].
    ProvePost {
        /// What it says.
        claim: PostClaim,
        /// What [`Task::OpenPost`] gave.
        #[serde(with = "base64_bytes")]
        openings: Arc<[u8]>,
    },
    /// Verifies a proof of spacetime that another host made. [`Output::Done`].
    VerifyPost {
        /// What it says.
        claim: PostClaim,
        /// The proof.
        #[serde(with = "base64_bytes")]
        proof: Vec<u8>,
    },
    /// Looks whether sectors can be proven. [`Output::Checked`].
    CheckSectors {
        /// The miner.
        miner: ActorId,
        /// Size of its sectors.
        size: SectorSize,
        /// Chooses the leaves that are opened; without it only the files are looked for.
        #[serde(with = "maybe_hex32")]
        randomness: Option<[u8; 32]>,
        /// The sectors.
        sectors: Vec<PostFile>,
    },
}

impl Task {
    /// The processes that run it.
    #[must_use]
    pub const fn class(&self) -> Class {
        match self {
            Self::OpenPost(_)
            | Self::ProvePost { .. }
            | Self::VerifyPost { .. }
            | Self::CheckSectors { .. } => Class::Prove,
            Self::AddPieces { .. }
            | Self::PreCommit1 { .. }
            | Self::PreCommit2 { .. }
            | Self::Commit { .. }
            | Self::Aggregate { .. }
            | Self::Finalize { .. }
            | Self::ReplicaUpdate { .. }
            | Self::ProveUpdate { .. }
            | Self::Unseal { .. }
            | Self::UnsealUpdate { .. } => Class::Seal,
        }
    }

    /// The sector that it is about, where the task names one.
    #[must_use]
    pub const fn sector(&self) -> Option<SectorId> {
        match self {
            Self::PreCommit1 { sector, .. }
            | Self::PreCommit2 { sector, .. }
            | Self::Commit { sector, .. }
            | Self::Finalize { sector, .. }
            | Self::Unseal { sector, .. } => Some(*sector),
            Self::ReplicaUpdate { files, .. }
            | Self::ProveUpdate { files, .. }
            | Self::UnsealUpdate { files, .. } => Some(files.sector),
            Self::AddPieces { .. }
            | Self::Aggregate { .. }
            | Self::OpenPost(_)
            | Self::ProvePost { .. }
            | Self::VerifyPost { .. }
            | Self::CheckSectors { .. } => None,
        }
    }

    /// Name in logs and metrics.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::AddPieces { .. } => "add_pieces",
            Self::PreCommit1 { .. } => "pre_commit1",
            Self::PreCommit2 { .. } => "pre_commit2",
            Self::Commit { .. } => "commit",
            Self::Aggregate { .. } => "aggregate",
            Self::Finalize { .. } => "finalize",
            Self::ReplicaUpdate { .. } => "replica_update",
            Self::ProveUpdate { .. } => "prove_update",
            Self::Unseal { .. } => "unseal",
            Self::UnsealUpdate { .. } => "unseal_update",
            Self::OpenPost(post) => match post.kind {
                PostKind::Window => "window_openings",
                PostKind::Winning => "winning_openings",
            },
            Self::ProvePost { claim, .. } => match claim.kind {
                PostKind::Window => "window_post",
                PostKind::Winning => "winning_post",
            },
            Self::VerifyPost { .. } => "verify_post",
            Self::CheckSectors { .. } => "check_sectors",
        }
    }

    /// Whether it is a step of a block.
    pub(crate) const fn is_for_a_block(&self) -> bool {
        match self {
            Self::OpenPost(post) => matches!(post.kind, PostKind::Winning),
            Self::ProvePost { claim, .. } | Self::VerifyPost { claim, .. } => {
                matches!(claim.kind, PostKind::Winning)
            }
            _ => false,
        }
    }

    /// Its place among those of its class that wait, the lowest first: a block lasts seconds, a
    /// deadline minutes, and a check can be made later. An aggregate takes seconds, and many
    /// sectors wait for it.
    #[must_use]
    pub const fn rank(&self) -> u8 {
        match self {
            Self::Aggregate { .. } => 0,
            Self::CheckSectors { .. } => 2,
            task if task.is_for_a_block() => 0,
            _ => 1,
        }
    }

    /// Whether the pool may give it to another worker when one of this host died over it.
    /// `PreCommit2` consumes its input, so its caller hears of it. A worker on another host works
    /// on copies: all that it does can be repeated.
    #[must_use]
    pub const fn is_repeatable(&self) -> bool {
        !matches!(self, Self::PreCommit2 { .. })
    }
}

/// What a task gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "output", content = "value", rename_all = "snake_case")]
pub enum Output {
    /// The files are written.
    Done,
    /// Opaque input of `PreCommit2`.
    PreCommit1(#[serde(with = "base64_bytes")] Vec<u8>),
    /// What the replica commits to.
    Commitments(SealedCommitments),
    /// Proof bytes.
    Proof(#[serde(with = "base64_bytes")] Vec<u8>),
    /// No proof: these sectors are missing, unreadable or wrong.
    Faulty(Vec<SectorNumber>),
    /// The sectors that can not be proven, and why. All others can.
    Checked(Vec<(SectorNumber, String)>),
}

/// Bytes as base64 text: a third of their size as a JSON list of numbers.
pub(crate) mod base64_bytes {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&STANDARD.encode(bytes))
    }

    pub(crate) fn deserialize<'de, T: From<Vec<u8>>, D: Deserializer<'de>>(
        d: D,
    ) -> Result<T, D::Error> {
        STANDARD
            .decode(String::deserialize(d)?)
            .map(T::from)
            .map_err(D::Error::custom)
    }
}

/// 32 bytes as hexadecimal text.
pub(crate) mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&hex::encode(bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        let mut out = [0; 32];
        hex::decode_to_slice(String::deserialize(d)?, &mut out).map_err(D::Error::custom)?;
        Ok(out)
    }
}

/// 32 bytes that may be missing.
mod maybe_hex32 {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Bytes(#[serde(with = "super::hex32")] [u8; 32]);

    pub(super) fn serialize<S: Serializer>(b: &Option<[u8; 32]>, s: S) -> Result<S::Ok, S::Error> {
        b.map(Bytes).serialize(s)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<[u8; 32]>, D::Error> {
        Ok(Option::<Bytes>::deserialize(d)?.map(|b| b.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_and_outputs_cross_a_process_boundary() {
        let sector = SectorId {
            miner: ActorId(1000),
            number: SectorNumber(3),
        };
        let task = Task::PreCommit2 {
            sector,
            size: SectorSize::S2KiB,
            pc1: vec![0, 255, 7],
            sealed: "/s".into(),
            cache: "/c".into(),
            attempt: "/a".into(),
        };
        let text = serde_json::to_string(&task).unwrap();
        assert_eq!(serde_json::from_str::<Task>(&text).unwrap(), task);
        assert!(!task.is_repeatable());
        let task = Task::Aggregate {
            miner: ActorId(1000),
            size: SectorSize::S2KiB,
            seals: vec![SealProof {
                number: SectorNumber(3),
                ticket: [1; 32],
                seed: [2; 32],
                commitments: SealedCommitments {
                    comm_r: Commitment([3; 32]),
                    comm_d: Commitment([4; 32]),
                },
                proof: vec![0, 255],
            }],
        };
        let text = serde_json::to_string(&task).unwrap();
        assert_eq!(serde_json::from_str::<Task>(&text).unwrap(), task);
        assert_eq!((task.class(), task.sector()), (Class::Seal, None));
        assert!(task.is_repeatable() && task.can_be_remote() && task.slots().is_empty());
        for randomness in [None, Some([7; 32])] {
            let task = Task::CheckSectors {
                miner: ActorId(1),
                size: SectorSize::S2KiB,
                randomness,
                sectors: vec![],
            };
            let text = serde_json::to_string(&task).unwrap();
            assert_eq!(serde_json::from_str::<Task>(&text).unwrap(), task);
        }
        for out in [
            Output::Checked(vec![(SectorNumber(4), "gone".into())]),
            Output::Done,
            Output::Proof(vec![1; 100]),
            Output::Faulty(vec![SectorNumber(1)]),
        ] {
            let text = serde_json::to_string(&out).unwrap();
            assert_eq!(serde_json::from_str::<Output>(&text).unwrap(), out);
        }
        let short = r#"{"step":"open_post","kind":"winning","miner":1,"size":2048,"randomness":"00","sectors":[]}"#;
        assert!(serde_json::from_str::<Task>(short).is_err());
    }
}
