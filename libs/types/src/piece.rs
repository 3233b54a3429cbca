use std::fmt;
use std::str::FromStr;

use cid::Cid;
use multihash::Multihash;
use serde::{Deserialize, Serialize};

use crate::{PaddedSize, SectorSize};

/// Multicodec `fil-commitment-unsealed`: the codec of a version 1 piece CID.
const FIL_COMMITMENT_UNSEALED: u64 = 0xf101;
/// Multihash `sha2-256-trunc254-padded`: the hash of a version 1 piece CID.
const SHA2_256_TRUNC254_PADDED: u64 = 0x1012;
/// Multihash `fr32-sha256-trunc254-padbintree`: the hash of a version 2 piece CID (FRC-0069).
const FR32_SHA256_TRUNC254_PADBINTREE: u64 = 0x1011;
/// Multicodec `raw`.
const RAW: u64 = 0x55;

/// A 32-byte commitment: commP, commD, commR. Its two highest bits are zero, because it is a
/// field element of BLS12-381.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Commitment(pub [u8; 32]);

impl fmt::Debug for Commitment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl Commitment {
    /// CID of an unsealed commitment (commP, commD): `baga6ea4sea…`.
    #[must_use]
    pub fn unsealed_cid(&self) -> Cid {
        Cid::new_v1(
            FIL_COMMITMENT_UNSEALED,
            wrap(SHA2_256_TRUNC254_PADDED, &self.0),
        )
    }

    /// CID of a sealed commitment (commR): `bagboea4b5abc…` (codec 0xf102, Poseidon, 0xb401).
    #[must_use]
    pub fn sealed_cid(&self) -> Cid {
        Cid::new_v1(0xf102, wrap(0xb401, &self.0))
    }

    /// The commitment in a sealed CID.
    pub fn from_sealed_cid(cid: &Cid) -> Result<Self, BadPieceCid> {
        if cid.codec() != 0xf102 || cid.hash().code() != 0xb401 {
            return Err(BadPieceCid::NotAPiece(*cid));
        }
        digest32(cid)
    }

    /// The commitment in an unsealed CID.
    pub fn from_unsealed_cid(cid: &Cid) -> Result<Self, BadPieceCid> {
        if cid.codec() != FIL_COMMITMENT_UNSEALED || cid.hash().code() != SHA2_256_TRUNC254_PADDED {
            return Err(BadPieceCid::NotAPiece(*cid));
        }
        digest32(cid)
    }
}

fn digest32(cid: &Cid) -> Result<Commitment, BadPieceCid> {
    let digest = cid.hash().digest();
    Ok(Commitment(
        digest
            .try_into()
            .map_err(|_| BadPieceCid::NotAPiece(*cid))?,
    ))
}

fn wrap(code: u64, digest: &[u8]) -> Multihash<64> {
    Multihash::wrap(code, digest).expect("at most 46 bytes fit a 64-byte multihash")
}

/// A CID that names no piece.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadPieceCid {
    /// The text is no CID at all.
    #[error("{0:?} is no CID")]
    NotACid(String),
    /// A CID, but of something else than a piece.
    #[error("{0} is no piece CID: expected baga6ea4sea… (version 1) or bafkzcib… (version 2)")]
    NotAPiece(Cid),
    /// A version 2 CID whose tree height or padding is impossible.
    #[error("piece CID {0} has an impossible height or padding")]
    BadTree(Cid),
}

/// Names a piece: its commP. The version 2 form (FRC-0069) adds the size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PieceCid(Commitment);

impl PieceCid {
    /// The piece with this commP.
    #[must_use]
    pub const fn new(comm_p: Commitment) -> Self {
        Self(comm_p)
    }

    /// commP.
    #[must_use]
    pub const fn commitment(&self) -> Commitment {
        self.0
    }

    /// The version 1 CID, as on chain.
    #[must_use]
    pub fn cid(&self) -> Cid {
        self.0.unsealed_cid()
    }

    /// Reads a version 1 or version 2 piece CID.
    pub fn from_cid(cid: &Cid) -> Result<Self, BadPieceCid> {
        if cid.hash().code() == FR32_SHA256_TRUNC254_PADBINTREE {
            return PieceInfo::from_cid_v2(cid).map(|p| p.cid);
        }
        Commitment::from_unsealed_cid(cid).map(Self)
    }
}

impl fmt::Display for PieceCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cid().fmt(f)
    }
}

impl FromStr for PieceCid {
    type Err = BadPieceCid;
    fn from_str(s: &str) -> Result<Self, BadPieceCid> {
        let cid =
            Cid::from_str(s).map_err(|_| BadPieceCid::NotACid(s.chars().take(128).collect()))?;
        Self::from_cid(&cid)
    }
}

impl TryFrom<String> for PieceCid {
    type Error = BadPieceCid;
    fn try_from(s: String) -> Result<Self, BadPieceCid> {
        s.parse()
    }
}

impl From<PieceCid> for String {
    fn from(p: PieceCid) -> Self {
        p.to_string()
    }
}

/// A piece with its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PieceInfo {
    /// The piece.
    pub cid: PieceCid,
    /// Size in the sector, Fr32 padding included.
    pub size: PaddedSize,
    /// Payload bytes before zero padding: at most `size.unpadded()`.
    pub raw_size: u64,
}

impl PieceInfo {
    /// The version 2 CID: raw codec, digest = varint(padding) ‖ height ‖ commP. Source: FRC-0069.
    #[must_use]
    pub fn cid_v2(&self) -> Cid {
        let padding = self.size.unpadded().get().saturating_sub(self.raw_size);
        let mut buf = unsigned_varint::encode::u64_buffer();
        let mut digest = unsigned_varint::encode::u64(padding, &mut buf).to_vec();
        let height = u8::try_from((self.size.get() / 32).trailing_zeros())
            .expect("the height of a tree of u64 bytes is below 64");
        digest.push(height);
        digest.extend_from_slice(&self.cid.0.0);
        Cid::new_v1(RAW, wrap(FR32_SHA256_TRUNC254_PADBINTREE, &digest))
    }

    /// Reads a version 2 CID.
    pub fn from_cid_v2(cid: &Cid) -> Result<Self, BadPieceCid> {
        if cid.codec() != RAW || cid.hash().code() != FR32_SHA256_TRUNC254_PADBINTREE {
            return Err(BadPieceCid::NotAPiece(*cid));
        }
        let bad = || BadPieceCid::BadTree(*cid);
        let (padding, rest) =
            unsigned_varint::decode::u64(cid.hash().digest()).map_err(|_| bad())?;
        let (&height, comm_p) = rest.split_first().ok_or_else(bad)?;
        let comm_p: [u8; 32] = comm_p.try_into().map_err(|_| bad())?;
        // Two levels are the smallest piece, 128 bytes; 2^57 leaves is beyond any sector.
        if !(2..=56).contains(&height) {
            return Err(bad());
        }
        let size = PaddedSize::new(32u64 << height).map_err(|_| bad())?;
        let raw_size = size.unpadded().get().checked_sub(padding).ok_or_else(bad)?;
        Ok(Self {
            cid: PieceCid(Commitment(comm_p)),
            size,
            raw_size,
        })
    }

    /// Whether the piece fits a sector of this size.
    #[must_use]
    pub fn fits(&self, sector: SectorSize) -> bool {
        self.size.get() <= sector.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn version_2_agrees_with_the_published_vector() {
        // FRC-0069: the empty 127-byte piece of zeros.
        let v2 = "bafkzcibcaabdomn3tgwgrh3g532zopskstnbrd2n3sxfqbze7rxt7vqn7veigmy";
        let cid: Cid = v2.parse().unwrap();
        let piece = PieceInfo::from_cid_v2(&cid).unwrap();
        assert_eq!(piece.size.get(), 128);
        assert_eq!(piece.raw_size, 127);
        assert_eq!(piece.cid_v2(), cid);
        assert_eq!(
            piece.cid.to_string(),
            "baga6ea4seaqdomn3tgwgrh3g532zopskstnbrd2n3sxfqbze7rxt7vqn7veigmy"
        );
    }

    #[test]
    fn other_cids_are_refused() {
        for s in [
            "",
            "x",
            "bafkqaaa",
            "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG",
        ] {
            assert!(s.parse::<PieceCid>().is_err(), "{s}");
        }
    }

    proptest! {
        #[test]
        fn both_forms_name_the_same_piece(comm in any::<[u8; 32]>(), raw in 1u64..(1 << 36)) {
            let size = PaddedSize::to_hold(raw).unwrap();
            let piece = PieceInfo { cid: PieceCid::new(Commitment(comm)), size, raw_size: raw };
            prop_assert_eq!(PieceInfo::from_cid_v2(&piece.cid_v2()), Ok(piece));
            prop_assert_eq!(PieceCid::from_cid(&piece.cid_v2()), Ok(piece.cid));
            prop_assert_eq!(piece.cid.to_string().parse(), Ok(piece.cid));
        }
    }
}
