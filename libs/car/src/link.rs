use bytes::Bytes;
use cid::{Cid, CidGeneric};

use crate::{BadCid, MAX_INLINE};

/// Multihash `identity`: the digest is the data.
pub(crate) const IDENTITY: u64 = 0;

/// What a CID leads to: a block to be fetched, or data that the CID itself holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// A block elsewhere.
    Block(Cid),
    /// An identity CID.
    Inline(Inline),
}

/// The content of an identity CID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inline {
    /// Multicodec of the data.
    pub codec: u64,
    /// The data, at most [`MAX_INLINE`] bytes.
    pub data: Bytes,
}

impl Link {
    /// Reads the CID at the start of `bytes`; returns its length too.
    pub fn read(bytes: &[u8]) -> Result<(Self, usize), BadCid> {
        let mut rest = bytes;
        let cid = CidGeneric::<MAX_INLINE>::read_bytes(&mut rest)
            .map_err(|e| BadCid::Encoding(e.to_string()))?;
        Ok((Self::narrow(&cid)?, bytes.len() - rest.len()))
    }

    /// Reads a CID in text form.
    pub fn parse(text: &str) -> Result<Self, BadCid> {
        // An identity CID of 128 bytes in base 2, the longest form, is below this.
        if text.len() > 2048 {
            return Err(BadCid::Encoding("the text is too long".into()));
        }
        let cid = CidGeneric::<MAX_INLINE>::try_from(text)
            .map_err(|e| BadCid::Encoding(e.to_string()))?;
        Self::narrow(&cid)
    }

    fn narrow(cid: &CidGeneric<MAX_INLINE>) -> Result<Self, BadCid> {
        let hash = cid.hash();
        if hash.code() == IDENTITY {
            if hash.digest().len() > MAX_INLINE {
                return Err(BadCid::Inline);
            }
            return Ok(Self::Inline(Inline {
                codec: cid.codec(),
                data: Bytes::copy_from_slice(hash.digest()),
            }));
        }
        let digest = hash.digest().len();
        let hash = hash.resize().map_err(|_| BadCid::Digest(digest))?;
        Cid::new(cid.version(), cid.codec(), hash)
            .map(Self::Block)
            .map_err(|e| BadCid::Encoding(e.to_string()))
    }

    /// Multicodec of the content.
    #[must_use]
    pub fn codec(&self) -> u64 {
        match self {
            Self::Block(cid) => cid.codec(),
            Self::Inline(inline) => inline.codec,
        }
    }
}

impl From<&Cid> for Link {
    fn from(cid: &Cid) -> Self {
        if cid.hash().code() == IDENTITY {
            return Self::Inline(Inline {
                codec: cid.codec(),
                data: Bytes::copy_from_slice(cid.hash().digest()),
            });
        }
        Self::Block(*cid)
    }
}
