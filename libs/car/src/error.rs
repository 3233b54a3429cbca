use std::io;

use cid::Cid;
use lotus_types::Kind;

use crate::{BadBlock, MAX_INLINE};

/// Bytes that are no CID that this crate handles.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCid {
    /// Not the encoding of a CID.
    #[error("no CID: {0}")]
    Encoding(String),
    /// An identity CID with more data than anyone accepts.
    #[error("an identity CID with more than {MAX_INLINE} bytes")]
    Inline,
    /// A digest longer than any hash function gives.
    #[error("a digest of {0} bytes")]
    Digest(usize),
}

/// What is wrong with a CAR, and at which byte of the stream.
#[derive(Debug, thiserror::Error)]
pub enum CarError {
    /// The stream could not be read.
    #[error("reading the CAR at byte {offset}: {source}")]
    Read {
        /// Where, in bytes from the start of the stream.
        offset: u64,
        /// The system's error.
        source: io::Error,
    },
    /// The CAR could not be written.
    #[error("writing the CAR: {0}")]
    Write(io::Error),
    /// The stream ends in the middle of something.
    #[error(
        "the CAR is truncated: it ends at byte {end} inside the {what} that starts at byte {offset}"
    )]
    Truncated {
        /// What is incomplete.
        what: &'static str,
        /// Where it starts.
        offset: u64,
        /// Where the stream ends.
        end: u64,
    },
    /// Not the header of a CARv1 or CARv2.
    #[error("no CAR header at byte {offset}: {why}")]
    Header {
        /// Where it should be.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// A length that is no varint, or one written in too many bytes.
    #[error("the length at byte {offset} is no valid varint")]
    Varint {
        /// Where it is.
        offset: u64,
    },
    /// A section larger than any block may be.
    #[error("the section at byte {offset} claims {len} bytes; blocks have at most {max}")]
    TooLarge {
        /// Where it starts.
        offset: u64,
        /// Claimed length.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// A section does not start with a CID.
    #[error("the section at byte {offset} does not start with a CID: {why}")]
    Cid {
        /// Where it starts.
        offset: u64,
        /// What is wrong with it.
        why: BadCid,
    },
    /// The bytes of a block are not what its CID names.
    #[error("the block at byte {offset} is corrupt: {why}")]
    Block {
        /// Where its bytes start.
        offset: u64,
        /// What is wrong.
        why: BadBlock,
    },
    /// Something else than zeros after the last block.
    #[error("there is data after the end of the CAR, at byte {offset}")]
    Trailing {
        /// Where it is.
        offset: u64,
    },
    /// No block has this CID.
    #[error("the CAR lacks its root {0}")]
    NoRoot(Cid),
}

impl CarError {
    /// Who must act.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Read { .. } => Kind::Fatal,
            Self::Write(e) if e.kind() == io::ErrorKind::StorageFull => Kind::Capacity,
            Self::Write(_) => Kind::Fatal,
            _ => Kind::Data,
        }
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        match self {
            Self::Read { .. } => "check the disk and the file".into(),
            Self::Write(_) => "free space on the disk, or choose another place".into(),
            Self::Truncated { .. } => "send the whole file again; compare its size first".into(),
            Self::Header { .. } => {
                "send a CARv1 or a finalized CARv2; `lotus-markets client pack` makes one".into()
            }
            Self::TooLarge { .. } => {
                "pack the data in smaller blocks (at most 2 MiB is usual)".into()
            }
            Self::Block {
                why: BadBlock::UnknownHash { .. },
                ..
            } => "pack the data with sha2-256 or blake2b-256".into(),
            Self::Varint { .. } | Self::Cid { .. } | Self::Block { .. } | Self::Trailing { .. } => {
                "the file is damaged: make the CAR anew from its source".into()
            }
            Self::NoRoot(_) => "make the CAR anew with its whole DAG".into(),
        }
    }
}
