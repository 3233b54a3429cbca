//! Where pieces lie in a sector, and how they get there.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use lotus_types::{Commitment, PaddedSize, PieceCid, PieceInfo, SectorSize};

use crate::commp::{CHUNK_PADDED, CHUNK_RAW, Tree, fr32, join, zero_commitment};
use crate::{PlacedPiece, ProofError};

/// Lays pieces out in a sector, in the given order: each at a multiple of its own size, with the
/// gaps and the rest filled by pieces of zeros, as Lotus does (`GetRequiredPadding`).
pub fn layout(size: SectorSize, pieces: &[PieceInfo]) -> Result<Vec<PlacedPiece>, ProofError> {
    let mut placed = Vec::with_capacity(pieces.len());
    let mut at = 0u64;
    let too_large = |needed: u128| ProofError::DoesNotFit {
        sector: size,
        pieces: pieces.len(),
        needed,
    };
    for &piece in pieces {
        if piece.raw_size > piece.size.unpadded().get() {
            return Err(ProofError::PieceSize {
                piece: piece.cid,
                size: piece.size,
                raw: piece.raw_size,
            });
        }
        let offset = u128::from(at).next_multiple_of(u128::from(piece.size.get()));
        let end = offset + u128::from(piece.size.get());
        if end > u128::from(size.bytes()) {
            let all: u128 = pieces.iter().map(|p| u128::from(p.size.get())).sum();
            return Err(too_large(all.max(end)));
        }
        let offset = u64::try_from(offset).map_err(|_| too_large(offset))?;
        fill(&mut placed, at, offset);
        placed.push(PlacedPiece {
            piece,
            offset,
            filler: false,
        });
        at = offset + piece.size.get();
    }
    fill(&mut placed, at, size.bytes());
    Ok(placed)
}

/// Fills a gap with zero pieces, each as large as its alignment and the rest of the gap allow.
fn fill(placed: &mut Vec<PlacedPiece>, mut at: u64, end: u64) {
    while at < end {
        let aligned = if at == 0 {
            u64::MAX
        } else {
            1 << at.trailing_zeros()
        };
        let fits = 1 << (end - at).ilog2();
        let size = PaddedSize::new(aligned.min(fits))
            .expect("pieces are powers of two of at least 128 bytes, so gaps are their sums");
        placed.push(PlacedPiece {
            piece: PieceInfo {
                cid: PieceCid::new(zero_commitment(size)),
                size,
                raw_size: size.unpadded().get(),
            },
            offset: at,
            filler: true,
        });
        at += size.get();
    }
}

/// The commitment of a whole layout. Refuses one that does not cover the sector exactly.
pub fn comm_d(size: SectorSize, layout: &[PlacedPiece]) -> Result<Commitment, ProofError> {
    let mut stack: Vec<(u64, Commitment)> = Vec::new();
    let mut at = 0u64;
    for p in layout {
        let len = p.piece.size.get();
        let bad = |why| {
            Err(ProofError::BadLayout {
                offset: p.offset,
                why,
            })
        };
        if p.offset != at {
            return bad("a gap or an overlap");
        }
        if !at.is_multiple_of(len) {
            return bad("a piece that is not aligned to its size");
        }
        at = match at.checked_add(len) {
            Some(end) if end <= size.bytes() => end,
            _ => return bad("more pieces than the sector holds"),
        };
        let mut top = (len, p.piece.cid.commitment());
        while let Some((_, left)) = stack.pop_if(|left| left.0 == top.0) {
            top = (2 * top.0, join(left, top.1));
        }
        stack.push(top);
    }
    match stack.as_slice() {
        [(len, root)] if *len == size.bytes() => Ok(*root),
        _ => Err(ProofError::BadLayout {
            offset: at,
            why: "the pieces do not fill the sector",
        }),
    }
}

/// Writes a sector's data to `unsealed`: each piece's bytes, as `open` gives them, Fr32-padded at
/// its place, zeros elsewhere. The commP of each is verified in the same pass. What `unsealed`
/// held before is lost; after an error it holds nothing of use.
pub fn add_pieces(
    unsealed: &Path,
    size: SectorSize,
    layout: &[PlacedPiece],
    open: &mut dyn FnMut(&PieceInfo) -> io::Result<Box<dyn Read>>,
) -> Result<(), ProofError> {
    comm_d(size, layout)?;
    let io = || ProofError::io(unsealed);
    let mut file = File::create(unsealed).map_err(io())?;
    // Sparse: the zero pieces need no writing.
    file.set_len(size.bytes()).map_err(io())?;
    for placed in layout.iter().filter(|p| !p.filler) {
        let piece = &placed.piece;
        let source = |source| ProofError::Source {
            piece: piece.cid,
            source,
        };
        if piece.raw_size > piece.size.unpadded().get() {
            return Err(ProofError::PieceSize {
                piece: piece.cid,
                size: piece.size,
                raw: piece.raw_size,
            });
        }
        file.seek(SeekFrom::Start(placed.offset)).map_err(io())?;
        let mut bytes = open(piece).map_err(source)?;
        add_piece(&mut file, piece, &mut *bytes).map_err(|e| match e {
            AddPiece::Read(e) => source(e),
            AddPiece::Write(e) => io()(e),
            AddPiece::Bad(e) => e,
        })?;
    }
    file.sync_data().map_err(io())
}

enum AddPiece {
    Read(io::Error),
    Write(io::Error),
    Bad(ProofError),
}

fn add_piece(file: &mut File, piece: &PieceInfo, bytes: &mut dyn Read) -> Result<(), AddPiece> {
    let mut tree = Tree::new();
    let mut raw = Vec::with_capacity(CHUNK_RAW);
    let mut padded = vec![0u8; CHUNK_PADDED];
    let mut left = piece.raw_size;
    let tail = loop {
        raw.clear();
        let want = left.min(CHUNK_RAW as u64);
        bytes
            .take(want)
            .read_to_end(&mut raw)
            .map_err(AddPiece::Read)?;
        left -= raw.len() as u64;
        if (raw.len() as u64) < want {
            return Err(AddPiece::Bad(ProofError::PieceLength {
                piece: piece.cid,
                announced: piece.raw_size,
                got: piece.raw_size - left,
            }));
        }
        let len = fr32::pad_tail(&raw, &mut padded);
        file.write_all(&padded[..len]).map_err(AddPiece::Write)?;
        if raw.len() < CHUNK_RAW {
            break len;
        }
        tree.push(&padded);
    };
    // A reader that goes on has something else than the piece.
    if io::copy(&mut bytes.take(1), &mut io::sink()).map_err(AddPiece::Read)? != 0 {
        return Err(AddPiece::Bad(ProofError::PieceLength {
            piece: piece.cid,
            announced: piece.raw_size,
            got: piece.raw_size + 1,
        }));
    }
    let got = PieceCid::new(tree.finish(&padded[..tail], piece.size));
    if got != piece.cid {
        return Err(AddPiece::Bad(ProofError::WrongPiece {
            piece: piece.cid,
            got,
        }));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commp::commp;
    use filecoin_proofs::{SectorSize as LibSize, UnpaddedBytesAmount, compute_comm_d};
    use proptest::prelude::*;

    fn piece(raw: &[u8]) -> PieceInfo {
        commp(raw).unwrap()
    }

    fn sector(
        size: SectorSize,
        pieces: &[Vec<u8>],
        fill: bool,
    ) -> (Vec<PlacedPiece>, Result<(), ProofError>, Vec<u8>) {
        let infos: Vec<_> = pieces.iter().map(|p| piece(p)).collect();
        let placed = layout(size, &infos).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut next = pieces.iter();
        let result = add_pieces(file.path(), size, &placed, &mut |_| {
            let mut bytes = next.next().unwrap().clone();
            if !fill {
                bytes[0] ^= 1;
            }
            Ok(Box::new(io::Cursor::new(bytes)))
        });
        (placed, result, std::fs::read(file.path()).unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn a_sector_commits_to_its_pieces(lens in proptest::collection::vec(1usize..400, 0..5)) {
            let pieces: Vec<Vec<u8>> = lens.iter().map(|&l| vec![l.to_le_bytes()[0] | 1; l]).collect();
            let infos: Vec<_> = pieces.iter().map(|p| piece(p)).collect();
            let needed: u64 = infos.iter().map(|p| p.size.get()).sum();
            let Ok(_) = layout(SectorSize::S2KiB, &infos) else {
                // Refused only when alignment can need more than the sector.
                prop_assert!(needed * 2 > 2048);
                return Ok(());
            };
            let (placed, added, bytes) = sector(SectorSize::S2KiB, &pieces, true);
            added.unwrap();
            let root = comm_d(SectorSize::S2KiB, &placed).unwrap();
            let theirs: Vec<_> = placed.iter().map(|p| filecoin_proofs::PieceInfo {
                commitment: p.piece.cid.commitment().0,
                size: UnpaddedBytesAmount(p.piece.size.unpadded().get()),
            }).collect();
            prop_assert_eq!(root.0, compute_comm_d(LibSize(2048), &theirs).unwrap());
            // The file's own tree, over bytes that are padded already.
            let tree = Tree::new();
            prop_assert_eq!(tree.finish(&bytes, SectorSize::S2KiB.padded()), root);
            for p in &placed {
                prop_assert_eq!(p.offset % p.piece.size.get(), 0);
            }
        }
    }

    #[test]
    fn gaps_are_filled_like_lotus_does() {
        // Source: lotus, storage/pipeline/lib/ffiwrapper GetRequiredPadding.
        let small = piece(&[1; 100]);
        let large = piece(&[2; 1000]);
        let placed = layout(SectorSize::S8MiB, &[small, large]).unwrap();
        let sizes: Vec<_> = placed.iter().map(|p| p.piece.size.get()).collect();
        assert_eq!(
            sizes,
            [128, 128, 256, 512, 1024]
                .into_iter()
                .chain((11..23).map(|s| 1 << s))
                .collect::<Vec<_>>()
        );
        let empty = layout(SectorSize::S8MiB, &[]).unwrap();
        assert_eq!(empty.len(), 1);
        assert!(empty[0].filler);
    }

    #[test]
    fn wrong_pieces_and_layouts_are_refused() {
        let size = SectorSize::S2KiB;
        let full = piece(&[3; 127 * 16]);
        assert!(matches!(
            layout(size, &[full, piece(&[1])]),
            Err(ProofError::DoesNotFit { .. })
        ));
        let (_, wrong, _) = sector(size, &[vec![9; 500]], false);
        assert!(matches!(wrong, Err(ProofError::WrongPiece { .. })));

        let p = piece(&[7; 300]);
        let placed = layout(size, &[p]).unwrap();
        for (len, what) in [(299, "short"), (301, "long")] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let got = add_pieces(file.path(), size, &placed, &mut |_| {
                Ok(Box::new(io::repeat(7).take(len)))
            });
            assert!(matches!(got, Err(ProofError::PieceLength { .. })), "{what}");
        }
        assert!(comm_d(size, &[]).is_err());
        assert!(comm_d(size, &placed[..1]).is_err());
        assert!(comm_d(size, &placed[1..]).is_err());
        assert!(comm_d(SectorSize::S8MiB, &placed).is_err());
        let mut shifted = placed.clone();
        shifted.swap(0, 1);
        assert!(comm_d(size, &shifted).is_err());
    }
}
