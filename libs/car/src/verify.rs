use cid::Cid;
use multihash_codetable::{Code, MultihashDigest};

use crate::MIN_DIGEST;
use crate::link::IDENTITY;

/// Why bytes are not what a CID names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadBlock {
    /// Other bytes.
    #[error("its bytes do not hash to {cid}")]
    Mismatch {
        /// The CID.
        cid: Cid,
    },
    /// A hash function that cannot be checked here.
    #[error("{cid} uses the hash function 0x{code:x}, which cannot be checked")]
    UnknownHash {
        /// The CID.
        cid: Cid,
        /// Multihash code.
        code: u64,
    },
    /// A digest so short that it proves nothing.
    #[error("the digest in {cid} has {len} bytes; fewer than {MIN_DIGEST} prove nothing")]
    ShortDigest {
        /// The CID.
        cid: Cid,
        /// Length of its digest.
        len: usize,
    },
}

/// Checks that `data` is what `cid` names. Truncated digests of at least [`MIN_DIGEST`] bytes
/// are compared as far as they go.
pub fn verify(cid: &Cid, data: &[u8]) -> Result<(), BadBlock> {
    let want = cid.hash().digest();
    let code = cid.hash().code();
    let same = if code == IDENTITY {
        want == data
    } else {
        let hash = Code::try_from(code).map_err(|_| BadBlock::UnknownHash { cid: *cid, code })?;
        if want.len() < MIN_DIGEST {
            return Err(BadBlock::ShortDigest {
                cid: *cid,
                len: want.len(),
            });
        }
        let got = hash.digest(data);
        got.digest().starts_with(want)
    };
    if same {
        Ok(())
    } else {
        Err(BadBlock::Mismatch { cid: *cid })
    }
}
