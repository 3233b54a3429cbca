//! A Bloom filter for the keys of one page.

/// Bytes for a page of 204 keys: 10 bits for each.
pub(crate) const FILTER: usize = 256;
/// Bits of a key: the best number for 10 bits of room, with 0.8 % of false answers.
const PROBES: u32 = 7;

/// The bits of a key. Keys of a page share their upper bits, so they are mixed first.
fn bits(key: u64) -> impl Iterator<Item = (usize, u8)> {
    // Multiplying by an odd number (here the golden ratio's digits) moves every bit upward; the
    // fold brings the upper ones down.
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let mixed = mixed.to_le_bytes();
    let half = |n: usize| u32::from_le_bytes(mixed[n..n + 4].try_into().expect("four bytes"));
    let (mut at, step) = (half(4), half(0) | 1);
    (0..PROBES).map(move |_| {
        let bit = at >> (32 - 11);
        at = at.wrapping_add(step);
        ((bit / 8) as usize, 1 << (bit % 8))
    })
}

pub(crate) fn insert(filter: &mut [u8; FILTER], key: u64) {
    for (byte, mask) in bits(key) {
        filter[byte] |= mask;
    }
}

/// False when the key is surely not in the page.
pub(crate) fn may_have(filter: &[u8], key: u64) -> bool {
    bits(key).all(|(byte, mask)| filter.get(byte).is_some_and(|b| b & mask != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_knows_its_keys_and_few_others() {
        let (mut wrong, mut asked) = (0, 0);
        for page in 0..200u64 {
            // Keys as they are in one page of many: equal upper bits.
            let key = |i: u64| (page << 52) | (i.wrapping_mul(0x5851_f42d_4c95_7f2d) >> 12);
            let mut filter = [0; FILTER];
            (0..204).for_each(|i| insert(&mut filter, key(i)));
            assert!((0..204).all(|i| may_have(&filter, key(i))));
            wrong += (1000..2000).filter(|i| may_have(&filter, key(*i))).count();
            asked += 1000;
        }
        assert!(wrong * 80 < asked, "{wrong} of {asked}");
    }
}
