use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use lotus_types::{ActorId, Commitment, PieceInfo, SectorId, SectorNumber, SectorSize};

use crate::{ProofError, Refused};

/// A sector that is being sealed. Its prover id is derived from `id.miner`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealingSector {
    /// Miner and number.
    pub id: SectorId,
    /// Size of the replica.
    pub size: SectorSize,
}

/// Sealing randomness: 32 bytes from the chain's tickets at the sector's seal epoch.
pub type Ticket = [u8; 32];

/// Interactive randomness: 32 bytes from the beacon after the pre-commit, which selects the
/// challenges of the seal proof.
pub type Seed = [u8; 32];

/// A position in a sector's data, counted in payload bytes, before Fr32 padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnpaddedOffset(pub u64);

/// A piece at its place in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PlacedPiece {
    /// The piece.
    pub piece: PieceInfo,
    /// Where it begins, in bytes after Fr32 padding. A multiple of the piece's own size.
    pub offset: u64,
    /// Whether this is a zero piece that [`layout`](crate::layout) added.
    pub filler: bool,
}

/// What a sealed sector commits to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SealedCommitments {
    /// The replica.
    pub comm_r: Commitment,
    /// The data.
    pub comm_d: Commitment,
}

/// What a seal proof is about: its public inputs, besides miner and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SealInputs {
    /// The sector's number.
    pub number: SectorNumber,
    /// Sealing randomness.
    pub ticket: Ticket,
    /// Interactive randomness.
    pub seed: Seed,
    /// What the sector commits to.
    pub commitments: SealedCommitments,
}

/// A sector to prove in a PoSt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostSector {
    /// Number within the miner.
    pub number: SectorNumber,
    /// The replica's commitment, as on chain.
    pub comm_r: Commitment,
    /// The replica. For an updated sector, the updated one.
    pub sealed: PathBuf,
    /// Its cache directory. For an updated sector, the updated one.
    pub cache: PathBuf,
}

/// Outcome of a WindowPoSt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WindowPost {
    /// Proof bytes of the whole partition.
    Proved(Vec<u8>),
    /// Nothing is proved: these sectors are missing, unreadable or wrong. The caller drops them
    /// (replacing them by good ones, as the actor does) and calls again.
    Faulty(Vec<SectorNumber>),
}

/// The files of a sector before and after a replica update (snap deal).
#[derive(Clone, Copy, Debug)]
pub struct UpdatedSector<'a> {
    /// Size of the replica.
    pub size: SectorSize,
    /// The replica before the update: the key that encodes the new data.
    pub sealed: &'a Path,
    /// Its cache directory.
    pub cache: &'a Path,
    /// The replica after the update.
    pub updated: &'a Path,
    /// Its cache directory.
    pub updated_cache: &'a Path,
}

/// Makes replicas and proofs. Each step may be done again: it removes its own stale output first,
/// and what it returns for is on the disk.
pub trait Prover: Send + Sync {
    /// Copies `unsealed` to `sealed`, checks it against `layout`, and labels the graph into
    /// `cache`. Returns what [`Prover::pre_commit2`] needs; opaque and bound to this version.
    fn pre_commit1(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        layout: &[PlacedPiece],
        unsealed: &Path,
        sealed: &Path,
        cache: &Path,
    ) -> Result<Vec<u8>, ProofError>;

    /// Encodes `sealed` in place and builds its trees. It may be interrupted at any point and done
    /// again, until [`Prover::finalize`].
    fn pre_commit2(
        &self,
        sector: &SealingSector,
        pc1: &[u8],
        sealed: &Path,
        cache: &Path,
    ) -> Result<SealedCommitments, ProofError>;

    /// The seal proof: the bytes for `ProveCommitSectors3.sector_proofs`. It is verified before
    /// it is returned.
    #[expect(clippy::too_many_arguments, reason = "a sector has that many parts")]
    fn commit(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        seed: &Seed,
        layout: &[PlacedPiece],
        commitments: &SealedCommitments,
        sealed: &Path,
        cache: &Path,
    ) -> Result<Vec<u8>, ProofError>;

    /// One proof for the seals of many sectors of one miner, in their order: the bytes for
    /// `ProveCommitSectors3.aggregate_proof`. `proofs` are those of [`Prover::commit`]. Only
    /// SNARKs can be aggregated. It is verified before it is returned.
    fn aggregate_seal_proofs(
        &self,
        miner: ActorId,
        size: SectorSize,
        seals: &[SealInputs],
        proofs: &[Vec<u8>],
    ) -> Result<Vec<u8>, ProofError>;

    /// Drops the labels and the data tree, and keeps what PoSt and unsealing need.
    fn finalize(&self, sector: &SealingSector, cache: &Path) -> Result<(), ProofError>;

    /// Writes `len` payload bytes from `offset` to `out`. Works in `scratch`, a directory in
    /// which it makes and removes its own and which needs room for the labels (two to eleven
    /// times the sector); the sector's cache is left alone. What a damaged replica gives is
    /// damaged: check commP.
    #[expect(clippy::too_many_arguments, reason = "a sector has that many parts")]
    fn unseal(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        comm_d: &Commitment,
        sealed: &Path,
        cache: &Path,
        scratch: &Path,
        out: &mut dyn Write,
        offset: UnpaddedOffset,
        len: u64,
    ) -> Result<(), ProofError>;

    /// Proves one partition. Missing, unreadable or wrong sectors are an outcome, not an error. In
    /// [`ProofMode::Vanilla`] the proof is the sectors' openings.
    fn window_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[PostSector],
    ) -> Result<WindowPost, ProofError>;

    /// The second step of [`Prover::window_post`] alone: the proof of sectors that were opened, as
    /// [`ProofMode::Vanilla`] proves them. It needs no file of a sector. What it returns is
    /// verified.
    fn window_post_of(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        openings: &[u8],
    ) -> Result<Vec<u8>, ProofError>;

    /// Proves the sectors that [`winning_challenge`](crate::winning_challenge) chose, in its
    /// order. In [`ProofMode::Vanilla`] the proof is the sectors' openings.
    fn winning_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[PostSector],
    ) -> Result<Vec<u8>, ProofError>;

    /// The second step of [`Prover::winning_post`] alone, as [`Prover::window_post_of`].
    fn winning_post_of(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        openings: &[u8],
    ) -> Result<Vec<u8>, ProofError>;

    /// Encodes `unsealed` (new data, laid out by `layout`) into the replica `files.updated`.
    fn replica_update(
        &self,
        files: &UpdatedSector<'_>,
        layout: &[PlacedPiece],
        unsealed: &Path,
    ) -> Result<SealedCommitments, ProofError>;

    /// The update proof: the bytes for `ProveReplicaUpdates3.sector_proofs`. It is verified
    /// before it is returned.
    fn prove_update(
        &self,
        files: &UpdatedSector<'_>,
        old_comm_r: &Commitment,
        new: &SealedCommitments,
    ) -> Result<Vec<u8>, ProofError>;

    /// Writes `len` payload bytes from `offset` of an updated sector to `out`.
    fn unseal_update(
        &self,
        files: &UpdatedSector<'_>,
        comm_d: &Commitment,
        out: &mut dyn Write,
        offset: UnpaddedOffset,
        len: u64,
    ) -> Result<(), ProofError>;
}

/// Checks proofs. Strict and total: any input gives an answer, none a panic, and every public
/// input comes from the caller, who takes it from chain state.
pub trait Verifier: Send + Sync {
    /// Whether `proof` shows that `comm_r` is the replica of `comm_d` for this sector.
    fn verify_seal(
        &self,
        sector: &SealingSector,
        ticket: &Ticket,
        seed: &Seed,
        comm_d: &Commitment,
        comm_r: &Commitment,
        proof: &[u8],
    ) -> Result<(), Refused>;

    /// Whether `proof` shows that each `comm_r` is the replica of its `comm_d`, for all these
    /// sectors in this order.
    fn verify_aggregate_seal_proofs(
        &self,
        miner: ActorId,
        size: SectorSize,
        seals: &[SealInputs],
        proof: &[u8],
    ) -> Result<(), Refused>;

    /// Whether `proof` shows that the partition's replicas are stored. A SNARK of a PoSt does not
    /// know the miner: `randomness` must be drawn with the miner's address, as chains do.
    fn verify_window_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused>;

    /// Whether `proof` shows that the challenged replicas of a block are stored.
    fn verify_winning_post(
        &self,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused>;

    /// Whether `proof` shows that `new_comm_r` encodes `new_comm_d` with the replica
    /// `old_comm_r` as key.
    fn verify_update(
        &self,
        size: SectorSize,
        old_comm_r: &Commitment,
        new_comm_r: &Commitment,
        new_comm_d: &Commitment,
        proof: &[u8],
    ) -> Result<(), Refused>;
}

/// How proofs are made and checked. A mode is its own [`Prover`] and [`Verifier`]: they share every
/// step but the last of a proof, and a network takes the proofs of one mode only.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum ProofMode {
    /// No SNARKs: full Merkle openings, no parameter files.
    #[default]
    Vanilla,
    /// SNARKs for WindowPoSt and WinningPoSt; seals and updates as in [`ProofMode::Vanilla`]. What
    /// a developer's machine affords.
    Groth16Post,
    /// SNARKs for everything, as on public networks.
    Groth16,
}

impl ProofMode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::Vanilla, Self::Groth16Post, Self::Groth16];

    /// Its name in settings, on command lines and in logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Vanilla => "vanilla",
            Self::Groth16Post => "groth16-post",
            Self::Groth16 => "groth16",
        }
    }

    /// Whether a PoSt is a SNARK.
    pub(crate) const fn post_snarks(self) -> bool {
        !matches!(self, Self::Vanilla)
    }

    /// Whether the proof of a seal or of an update is a SNARK, so that seals can be aggregated.
    #[must_use]
    pub const fn seal_snarks(self) -> bool {
        matches!(self, Self::Groth16)
    }
}

impl fmt::Display for ProofMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ProofMode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        let mode = Self::ALL.into_iter().find(|m| m.as_str() == text);
        mode.ok_or_else(|| UnknownMode(text.into()))
    }
}

/// A text that names no [`ProofMode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no proof mode: vanilla, groth16-post or groth16")]
pub struct UnknownMode(String);
