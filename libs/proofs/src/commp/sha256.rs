//! The node hash of the data tree: SHA-256 of two 32-byte children, cut to 254 bits.
//!
//! A 64-byte message fills one block exactly, so SHA-256 appends a second one that is the same
//! for every node. With the x86 SHA extensions its message schedule is a table of constants, and
//! four nodes are hashed interleaved because one alone waits for the latency of each round.

use sha2::{Digest, Sha256};

/// Bytes of a tree node.
pub(crate) const NODE: usize = 32;

/// Hashes neighbours: `out` gets 32 bytes for each 64 of `children`.
pub(crate) fn hash_pairs(children: &[u8], out: &mut [u8]) {
    debug_assert_eq!(children.len(), 2 * out.len());
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sha")
        && std::arch::is_x86_feature_detected!("ssse3")
        && std::arch::is_x86_feature_detected!("sse4.1")
    {
        #[expect(unsafe_code, reason = "SHA extensions are detected at run time")]
        // SAFETY: the CPU has every feature that `ni::hash_pairs` enables; the function itself
        // uses no pointer.
        unsafe {
            ni::hash_pairs(children, out);
        }
        return;
    }
    portable(children, out);
}

/// Hashes two nodes.
pub(crate) fn hash_pair(left: &[u8; NODE], right: &[u8; NODE]) -> [u8; NODE] {
    let mut children = [0u8; 2 * NODE];
    children[..NODE].copy_from_slice(left);
    children[NODE..].copy_from_slice(right);
    let mut out = [0u8; NODE];
    hash_pairs(&children, &mut out);
    out
}

fn portable(children: &[u8], out: &mut [u8]) {
    for (pair, node) in children
        .chunks_exact(2 * NODE)
        .zip(out.chunks_exact_mut(NODE))
    {
        node.copy_from_slice(&Sha256::digest(pair));
        node[NODE - 1] &= 0x3f;
    }
}

#[cfg(target_arch = "x86_64")]
mod ni {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_cvtsi128_si64,
        _mm_extract_epi64, _mm_set_epi32, _mm_set_epi64x, _mm_setzero_si128, _mm_sha256msg1_epu32,
        _mm_sha256msg2_epu32, _mm_sha256rnds2_epu32, _mm_shuffle_epi8, _mm_shuffle_epi32,
    };

    use super::NODE;

    /// Nodes hashed at once.
    const LANES: usize = 4;

    const K: [u32; 64] = [
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
        0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
        0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
        0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
        0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
        0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
        0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
        0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2,
    ];

    /// Schedule plus round constants of the second block of every 64-byte message: a one bit,
    /// zeros, and the length of 512 bits.
    const PADDING: [u32; 64] = {
        let mut w = [0u32; 64];
        w[0] = 0x8000_0000;
        w[15] = 512;
        let mut t = 16;
        while t < 64 {
            let a = w[t - 15];
            let b = w[t - 2];
            let s0 = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
            let s1 = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
            w[t] = w[t - 16]
                .wrapping_add(s0)
                .wrapping_add(w[t - 7])
                .wrapping_add(s1);
            t += 1;
        }
        t = 0;
        while t < 64 {
            w[t] = w[t].wrapping_add(K[t]);
            t += 1;
        }
        w
    };

    type Lanes = [__m128i; LANES];

    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn four(table: &[u32; 64], t: usize) -> __m128i {
        let at = |i: usize| table[4 * t + i].cast_signed();
        _mm_set_epi32(at(3), at(2), at(1), at(0))
    }

    /// Four rounds of one lane; `wk` is schedule plus constants.
    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn rounds(abef: &mut __m128i, cdgh: &mut __m128i, wk: __m128i) {
        *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, wk);
        *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, _mm_shuffle_epi32::<0x0e>(wk));
    }

    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn load(bytes: &[u8]) -> __m128i {
        let word = |at: usize| {
            let mut le = [0u8; 8];
            le.copy_from_slice(&bytes[at..at + 8]);
            i64::from_le_bytes(le)
        };
        let big_endian = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        _mm_shuffle_epi8(_mm_set_epi64x(word(8), word(0)), big_endian)
    }

    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn store(abef: __m128i, cdgh: __m128i, node: &mut [u8]) {
        let big_endian = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        let feba = _mm_shuffle_epi32::<0x1b>(abef);
        let dchg = _mm_shuffle_epi32::<0xb1>(cdgh);
        let halves = [
            _mm_blend_epi16::<0xf0>(feba, dchg),
            _mm_alignr_epi8::<8>(dchg, feba),
        ];
        for (half, bytes) in halves.into_iter().zip(node.chunks_exact_mut(16)) {
            let half = _mm_shuffle_epi8(half, big_endian);
            bytes[..8].copy_from_slice(&_mm_cvtsi128_si64(half).to_le_bytes());
            bytes[8..].copy_from_slice(&_mm_extract_epi64::<1>(half).to_le_bytes());
        }
        node[NODE - 1] &= 0x3f;
    }

    /// Hashes [`LANES`] pairs of `children` into `out`.
    #[inline]
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    fn hash_lanes(children: &[u8], out: &mut [u8]) {
        let iv = |w: [u32; 4]| {
            let [a, b, c, d] = w.map(u32::cast_signed);
            _mm_set_epi32(a, b, c, d)
        };
        let abef0 = iv([0x6a09e667, 0xbb67ae85, 0x510e527f, 0x9b05688c]);
        let cdgh0 = iv([0x3c6ef372, 0xa54ff53a, 0x1f83d9ab, 0x5be0cd19]);
        let mut abef: Lanes = [abef0; LANES];
        let mut cdgh: Lanes = [cdgh0; LANES];

        let mut w = [[_mm_setzero_si128(); 4]; LANES];
        for j in 0..4 {
            let k = four(&K, j);
            for l in 0..LANES {
                w[l][j] = load(&children[l * 2 * NODE + 16 * j..]);
                rounds(&mut abef[l], &mut cdgh[l], _mm_add_epi32(w[l][j], k));
            }
        }
        for t in 1..4 {
            for j in 0..4 {
                let k = four(&K, 4 * t + j);
                for l in 0..LANES {
                    let w = &mut w[l];
                    let (w1, w2, w3) = (w[(j + 1) & 3], w[(j + 2) & 3], w[(j + 3) & 3]);
                    let sum =
                        _mm_add_epi32(_mm_sha256msg1_epu32(w[j], w1), _mm_alignr_epi8::<4>(w3, w2));
                    w[j] = _mm_sha256msg2_epu32(sum, w3);
                    rounds(&mut abef[l], &mut cdgh[l], _mm_add_epi32(w[j], k));
                }
            }
        }
        let mut abef1 = [abef0; LANES];
        let mut cdgh1 = [cdgh0; LANES];
        for l in 0..LANES {
            abef1[l] = _mm_add_epi32(abef[l], abef0);
            cdgh1[l] = _mm_add_epi32(cdgh[l], cdgh0);
        }
        (abef, cdgh) = (abef1, cdgh1);
        for t in 0..16 {
            let wk = four(&PADDING, t);
            for l in 0..LANES {
                rounds(&mut abef[l], &mut cdgh[l], wk);
            }
        }
        for l in 0..LANES {
            store(
                _mm_add_epi32(abef[l], abef1[l]),
                _mm_add_epi32(cdgh[l], cdgh1[l]),
                &mut out[l * NODE..(l + 1) * NODE],
            );
        }
    }

    #[target_feature(enable = "sha,ssse3,sse4.1")]
    pub(super) fn hash_pairs(children: &[u8], out: &mut [u8]) {
        let mut pairs = children.chunks_exact(LANES * 2 * NODE);
        let mut nodes = out.chunks_exact_mut(LANES * NODE);
        for (pair, node) in pairs.by_ref().zip(nodes.by_ref()) {
            hash_lanes(pair, node);
        }
        let (pairs, nodes) = (pairs.remainder(), nodes.into_remainder());
        if !nodes.is_empty() {
            let mut children = [0u8; LANES * 2 * NODE];
            let mut out = [0u8; LANES * NODE];
            children[..pairs.len()].copy_from_slice(pairs);
            hash_lanes(&children, &mut out);
            nodes.copy_from_slice(&out[..nodes.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_kernel_gives_the_same_nodes(seed in proptest::collection::vec(any::<u8>(), 64), pairs in 1usize..13) {
            let children: Vec<u8> = (0..pairs * 64).map(|i| seed[i % 64].wrapping_mul(i.to_le_bytes()[0] | 1)).collect();
            let (mut fast, mut slow) = (vec![0u8; pairs * 32], vec![0u8; pairs * 32]);
            hash_pairs(&children, &mut fast);
            portable(&children, &mut slow);
            prop_assert_eq!(fast, slow);
        }
    }
}
