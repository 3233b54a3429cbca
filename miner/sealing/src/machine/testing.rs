//! Values for tests of this crate.

use lotus_types::{Commitment, DealKey, Epoch, PaddedSize, PieceCid, PieceInfo};

use super::{SectorPiece, Terms};

/// A piece with made-up content.
pub(crate) fn piece(n: u8, size: u64) -> PieceInfo {
    let size = PaddedSize::new(size).unwrap();
    PieceInfo {
        cid: PieceCid::new(Commitment([n & 0x3f; 32])),
        size,
        raw_size: size.unpadded().get(),
    }
}

/// A piece of deal `n` at its place.
pub(crate) fn placed(n: u64, piece: PieceInfo, offset: u64) -> SectorPiece {
    SectorPiece {
        key: DealKey {
            client: "t1client".into(),
            id: u128::from(n).into(),
        },
        piece,
        offset,
        terms: Terms {
            start_epoch: Epoch(0),
            end_epoch: Epoch(0),
            allocation: None,
            notify: None,
        },
        claim: None,
        trace: String::new(),
    }
}
