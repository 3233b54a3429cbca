use std::io;
use std::path::{Path, PathBuf};

use lotus_types::{Commitment, Kind, PaddedSize, PieceCid, SectorNumber, SectorSize};

use crate::ProofMode;

/// Why a sector, a piece or a proof could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// A file could not be read or written.
    #[error("{path}: {source}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The source of a piece's bytes failed.
    #[error("reading piece {piece}: {source}")]
    Source {
        /// The piece.
        piece: PieceCid,
        /// What the source said.
        source: io::Error,
    },
    /// Pieces that can not be laid out in the sector.
    #[error("{pieces} pieces do not fit a {sector} sector: {needed} of {sector_bytes} bytes needed",
        sector_bytes = .sector.bytes())]
    DoesNotFit {
        /// The sector's size.
        sector: SectorSize,
        /// How many pieces there are.
        pieces: usize,
        /// Bytes needed with alignment, Fr32 padding included.
        needed: u128,
    },
    /// A layout that does not cover a sector exactly, in order and aligned.
    #[error("bad sector layout at byte {offset}: {why}")]
    BadLayout {
        /// Position in the sector, Fr32 padding included.
        offset: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// A piece whose bytes are not as many as announced.
    #[error("piece {piece} has {got} bytes, announced {announced}")]
    PieceLength {
        /// The piece.
        piece: PieceCid,
        /// Announced raw bytes.
        announced: u64,
        /// Bytes that the source gave, at least.
        got: u64,
    },
    /// A piece whose bytes hash to another commP.
    #[error("the bytes of piece {piece} hash to {got}")]
    WrongPiece {
        /// The announced piece.
        piece: PieceCid,
        /// What the bytes hash to.
        got: PieceCid,
    },
    /// A piece that claims more payload than its padded size holds.
    #[error("piece {piece} of {size} padded bytes can not hold {raw} raw bytes")]
    PieceSize {
        /// The piece.
        piece: PieceCid,
        /// Its padded size.
        size: PaddedSize,
        /// Its claimed raw size.
        raw: u64,
    },
    /// The output of another step, or of another version, was given.
    #[error("the {what} is not what this step needs: {why}")]
    BadInput {
        /// Which input.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A data commitment other than the expected one.
    #[error("comm_d is {got:?}, expected {expected:?}")]
    WrongData {
        /// From the layout.
        expected: Commitment,
        /// From the bytes.
        got: Commitment,
    },
    /// A range that reaches beyond the sector.
    #[error("bytes {offset}+{len} lie beyond the {size} payload bytes of the sector")]
    OutOfRange {
        /// First payload byte.
        offset: u64,
        /// Payload bytes.
        len: u64,
        /// Payload bytes of the sector.
        size: u64,
    },
    /// The proof that was made does not verify: the replica or its cache is damaged.
    #[error("the proof made from these files is wrong: {0}")]
    Unsound(#[from] Refused),
    /// A sector of a WinningPoSt could not be proven.
    #[error("sector {number}: {why}")]
    Sector {
        /// The sector.
        number: SectorNumber,
        /// What went wrong.
        why: String,
    },
    /// SNARKs need files that are not there.
    #[error("{dir} lacks parameter files for {size} sectors: {names}", dir = .dir.display(),
        names = .names.join(", "))]
    NoParameters {
        /// Where they were looked for.
        dir: PathBuf,
        /// The size of the sectors.
        size: SectorSize,
        /// The missing files.
        names: Vec<String>,
        /// Whether the proofs of seals and updates lack theirs.
        seal: bool,
    },
    /// A parameter file that must not be used.
    #[error("{path}: {why}", path = .path.display())]
    BadParameters {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// Openings can not be aggregated.
    #[error("seal proofs of the {0} mode are openings, which can not be aggregated")]
    NoAggregates(ProofMode),
    /// Parameters that are published for everyone, and too large to be made here.
    #[error("parameters for {0} sectors are not made here: a network works with one set of them")]
    Published(SectorSize),
    /// Another process makes parameters.
    #[error("another process makes parameters in {path}", path = .0.display())]
    ParametersBusy(PathBuf),
    /// The proof library failed.
    #[error("{step} failed: {why}")]
    Library {
        /// What was being done.
        step: &'static str,
        /// The library's chain of causes.
        why: String,
        /// Whether the cause was a full disk.
        disk_full: bool,
    },
}

impl ProofError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Io { source, .. } => io_kind(source),
            Self::Source { source, .. } => match io_kind(source) {
                Kind::Fatal => Kind::Transport,
                kind => kind,
            },
            Self::Library {
                disk_full: true, ..
            } => Kind::Capacity,
            Self::Library { .. } | Self::Unsound(_) | Self::Sector { .. } => Kind::Fatal,
            Self::DoesNotFit { .. }
            | Self::BadLayout { .. }
            | Self::PieceLength { .. }
            | Self::WrongPiece { .. }
            | Self::PieceSize { .. }
            | Self::BadInput { .. }
            | Self::WrongData { .. }
            | Self::OutOfRange { .. } => Kind::Data,
            Self::NoParameters { .. }
            | Self::BadParameters { .. }
            | Self::Published(_)
            | Self::NoAggregates(_) => Kind::Config,
            Self::ParametersBusy(_) => Kind::Capacity,
        }
    }

    /// What the operator or the client can do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::NoParameters {
                size, seal, dir, ..
            } if *size == SectorSize::S2KiB => format!(
                "run `lotus-miner params generate --sector-size {size}{only}` with {PARAMS_VAR}={dir}",
                only = if *seal { "" } else { " --post-only" },
                dir = dir.display()
            ),
            Self::NoParameters { size, .. } | Self::Published(size) => fetch_fix(*size),
            Self::BadParameters { path, .. } => format!(
                "move {} away, fetch or make it again, and run `lotus-miner params verify`",
                path.display()
            ),
            Self::NoAggregates(_) => {
                "send each sector's proof as it is, or use proofs.mode = \"groth16\"".into()
            }
            Self::ParametersBusy(_) => "wait for it to end, then run this again".into(),
            _ if self.kind() == Kind::Capacity => {
                "free space on the disk of the sector's files; the step is tried again".into()
            }
            Self::Io { path, .. } => {
                format!(
                    "check that {} exists and that the hub may use it",
                    path.display()
                )
            }
            Self::Source { .. } => "the transfer is resumed when its source answers again".into(),
            Self::DoesNotFit { .. } | Self::BadLayout { .. } => {
                "put fewer or smaller pieces into the sector".into()
            }
            Self::PieceLength { .. } | Self::WrongPiece { .. } | Self::PieceSize { .. } => {
                "send the bytes that the piece CID names, or correct the proposal".into()
            }
            Self::BadInput { .. } | Self::WrongData { .. } => {
                "run the sector again from PreCommit1".into()
            }
            Self::OutOfRange { .. } => "ask for bytes inside the sector".into(),
            Self::Unsound(_) | Self::Sector { .. } => {
                "the replica or its cache is damaged: seal the sector again, or declare it faulty"
                    .into()
            }
            Self::Library { .. } => {
                "check the sector's files and the log; the step may be tried again".into()
            }
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// The variable that names the folder of parameter files, for us as for the proof library.
pub(crate) const PARAMS_VAR: &str = "FIL_PROOFS_PARAMETER_CACHE";

fn fetch_fix(size: SectorSize) -> String {
    format!(
        "fetch them with `lotus fetch-params {size}` (it heeds {PARAMS_VAR} too), then check them \
         with `lotus-miner params verify --sector-size {size}`"
    )
}

fn io_kind(e: &io::Error) -> Kind {
    match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            Kind::Capacity
        }
        _ => Kind::Fatal,
    }
}

/// Whether a full disk is among the causes of a library's error.
pub(crate) fn is_disk_full(e: &anyhow::Error) -> bool {
    e.chain()
        .filter_map(|e| e.downcast_ref::<io::Error>())
        .any(|e| io_kind(e) == Kind::Capacity)
}

/// Why a proof is refused: the first check that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A proof of these public inputs has one exact length.
    #[error("the proof has {got} bytes; it must have {expected}")]
    Length {
        /// The only right length.
        expected: u64,
        /// The proof's.
        got: u64,
    },
    /// The header names something else than the public inputs do.
    #[error("the proof's header names another {0}")]
    Header(&'static str),
    /// Public inputs that no proof can satisfy.
    #[error("bad public input: {0}")]
    PublicInput(&'static str),
    /// 32 bytes that are no canonical element of the field.
    #[error("a {0} is no canonical field element")]
    NotInField(&'static str),
    /// What the proof opens does not hash, encode or lead to what it must.
    #[error("{what}{at}", at = place(*.leaf))]
    Wrong {
        /// The check.
        what: Check,
        /// The challenged leaf, where there is one.
        leaf: Option<u64>,
    },
    /// Openings can not be aggregated.
    #[error("seal proofs of the {0} mode are openings, which can not be aggregated")]
    NoAggregates(ProofMode),
    /// The SNARK does not hold for the public inputs, or is none.
    #[error("the SNARK does not hold: {0}")]
    Snark(String),
    /// The verifier itself failed. The proof counts as wrong.
    #[error("the verifier failed: {0}")]
    Internal(String),
}

fn place(leaf: Option<u64>) -> String {
    leaf.map(|l| format!(" at leaf {l}")).unwrap_or_default()
}

impl Refused {
    /// Always [`Kind::Data`]: a wrong proof stays wrong.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        Kind::Data
    }

    /// What the prover can do.
    #[must_use]
    pub fn fix(&self) -> String {
        "prove again from an intact replica, with the chain's current randomness".into()
    }
}

/// The checks of the verifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Check {
    /// `comm_r = H(comm_c, comm_r_last)`.
    #[error("comm_c and comm_r_last do not hash to comm_r")]
    CommR,
    /// The old replica's commitment in an update.
    #[error("comm_c and the old comm_r_last do not hash to the old comm_r")]
    OldCommR,
    /// The path of a data leaf.
    #[error("the data path does not lead to comm_d")]
    DataPath,
    /// The path of a replica leaf.
    #[error("the replica path does not lead to comm_r_last")]
    ReplicaPath,
    /// The path of a leaf of the old replica.
    #[error("the old replica's path does not lead to its comm_r_last")]
    OldReplicaPath,
    /// The path of a column of labels.
    #[error("the column path does not lead to comm_c")]
    ColumnPath,
    /// A label and its parents.
    #[error("a label is not the hash of its parents")]
    Label,
    /// The replica leaf and the data leaf.
    #[error("the replica leaf does not encode the data leaf")]
    Encoding,
}
