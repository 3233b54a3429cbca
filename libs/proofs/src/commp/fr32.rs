//! Fr32 padding: two zero bits after every 254, so that each 32 bytes are a field element.

/// Payload bytes of one unit.
pub(crate) const QUAD_RAW: usize = 127;
/// The same after padding: four field elements.
pub(crate) const QUAD_PADDED: usize = 128;

const TOP: u64 = u64::MAX >> 2;

/// Pads whole units: `out` is 128 bytes for each 127 of `raw`.
pub(crate) fn pad(raw: &[u8], out: &mut [u8]) {
    debug_assert_eq!(raw.len() / QUAD_RAW, out.len() / QUAD_PADDED);
    for (unit, padded) in raw
        .chunks_exact(QUAD_RAW)
        .zip(out.chunks_exact_mut(QUAD_PADDED))
    {
        // Sixteen little-endian words; the last has seven bytes of payload.
        let mut w = [0u64; 17];
        for (word, bytes) in w.iter_mut().zip(unit.chunks(8)) {
            let mut le = [0u8; 8];
            le[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(le);
        }
        // Element e begins at bit 254 e, so at word 4 e - 1 (from e = 1 on), shifted by 64 - 2 e.
        let mut o = [0u64; 16];
        o[..4].copy_from_slice(&w[..4]);
        for e in 1..4 {
            for j in 0..4 {
                let at = 4 * e - 1 + j;
                o[4 * e + j] = (w[at] >> (64 - 2 * e)) | (w[at + 1] << (2 * e));
            }
        }
        for e in 0..4 {
            o[4 * e + 3] &= TOP;
        }
        for (bytes, word) in padded.chunks_exact_mut(8).zip(o) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Pads `raw`, extended with zeros to whole units, into `out`, and returns how much of `out` that
/// fills.
pub(crate) fn pad_tail(raw: &[u8], out: &mut [u8]) -> usize {
    let whole = raw.len() / QUAD_RAW;
    let (units, rest) = raw.split_at(whole * QUAD_RAW);
    pad(units, &mut out[..whole * QUAD_PADDED]);
    if rest.is_empty() {
        return whole * QUAD_PADDED;
    }
    let mut last = [0u8; QUAD_RAW];
    last[..rest.len()].copy_from_slice(rest);
    let end = (whole + 1) * QUAD_PADDED;
    pad(&last, &mut out[whole * QUAD_PADDED..end]);
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Read;

    proptest! {
        #[test]
        fn padding_agrees_with_the_library(raw in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let units = raw.len().div_ceil(QUAD_RAW);
            let mut ours = vec![0xffu8; units * QUAD_PADDED];
            prop_assert_eq!(pad_tail(&raw, &mut ours), ours.len());
            let mut zero_extended = raw;
            zero_extended.resize(units * QUAD_RAW, 0);
            let mut theirs = Vec::new();
            fr32::Fr32Reader::new(zero_extended.as_slice()).read_to_end(&mut theirs).unwrap();
            prop_assert_eq!(ours, theirs);
        }
    }
}
