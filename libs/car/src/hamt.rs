//! Sharded UnixFS directories: where a name is, and how they are made.
//! Source: ipfs/specs, unixfs.md, "HAMT structure and parameters".

use bytes::Bytes;

use crate::unixfs::{Data, NewLink, kind};

/// Multihash `murmur3-x64-64`, the only hash of a shard.
pub(crate) const MURMUR3_X64_64: u64 = 0x22;
/// Children of a shard that we make.
pub(crate) const FANOUT: u64 = 256;

/// Which child of a shard a name belongs to, level by level.
pub(crate) struct Position {
    hash: u64,
    /// Bits used so far.
    used: u32,
}

impl Position {
    pub(crate) fn of(name: &str) -> Self {
        Self {
            hash: murmur3_x64_64(name.as_bytes()),
            used: 0,
        }
    }

    /// The child at the next level of a shard with this fanout, a power of two of at least 8;
    /// `None` when all bits are used.
    pub(crate) fn next(&mut self, fanout: u64) -> Option<u64> {
        let bits = fanout.trailing_zeros();
        if self.used + bits > 64 {
            return None;
        }
        self.used += bits;
        Some((self.hash >> (64 - self.used)) & (fanout - 1))
    }
}

/// Digits of the prefix in the names of a shard's links.
pub(crate) fn prefix_len(fanout: u64) -> usize {
    format!("{:X}", fanout - 1).len()
}

/// The fanout of a shard, if it is one that can be followed.
pub(crate) fn fanout(data: &Data) -> Option<u64> {
    let f = data.fanout?;
    let known = data.kind == kind::HAMT_SHARD && data.hash_type == Some(MURMUR3_X64_64);
    (known && f.is_power_of_two() && (8..=1024).contains(&f)).then_some(f)
}

/// Two names that no depth of shards tells apart.
#[derive(Debug)]
pub(crate) struct Collision;

/// A shard that holds `entries`, sorted by name. `emit` stores a node and returns its link
/// without a name.
pub(crate) fn build<E: From<Collision>>(
    entries: Vec<NewLink>,
    emit: &mut impl FnMut(Vec<NewLink>, Data) -> Result<NewLink, E>,
) -> Result<NewLink, E> {
    let placed = entries
        .into_iter()
        .map(|e| (Position::of(&e.name), e))
        .collect();
    shard(placed, emit)
}

fn shard<E: From<Collision>>(
    entries: Vec<(Position, NewLink)>,
    emit: &mut impl FnMut(Vec<NewLink>, Data) -> Result<NewLink, E>,
) -> Result<NewLink, E> {
    let mut children: Vec<Vec<(Position, NewLink)>> = Vec::new();
    children.resize_with(256, Vec::new);
    for (mut at, entry) in entries {
        let i = at.next(FANOUT).ok_or(Collision)?;
        if let Some(child) = usize::try_from(i).ok().and_then(|i| children.get_mut(i)) {
            child.push((at, entry));
        }
    }
    let mut links = Vec::new();
    let mut bitfield = [0u8; 32];
    for (i, mut child) in children.into_iter().enumerate() {
        if child.is_empty() {
            continue;
        }
        bitfield[31 - i / 8] |= 1 << (i % 8);
        let prefix = format!("{i:02X}");
        if child.len() == 1 {
            if let Some((_, mut entry)) = child.pop() {
                entry.name.insert_str(0, &prefix);
                links.push(entry);
            }
        } else {
            let mut sub = shard(child, emit)?;
            sub.name = prefix;
            links.push(sub);
        }
    }
    let first = bitfield.iter().position(|b| *b != 0).unwrap_or(31);
    let data = Data {
        kind: kind::HAMT_SHARD,
        data: Some(Bytes::copy_from_slice(&bitfield[first..])),
        hash_type: Some(MURMUR3_X64_64),
        fanout: Some(FANOUT),
        ..Data::default()
    };
    emit(links, data)
}

/// First half of MurmurHash3 x64-128 with seed 0.
/// Source: Austin Appleby, smhasher, MurmurHash3.cpp (public domain).
fn murmur3_x64_64(data: &[u8]) -> u64 {
    const C1: u64 = 0x87c3_7b91_1142_53d5;
    const C2: u64 = 0x4cf5_ad43_2745_937f;
    let mix1 = |k: u64| k.wrapping_mul(C1).rotate_left(31).wrapping_mul(C2);
    let mix2 = |k: u64| k.wrapping_mul(C2).rotate_left(33).wrapping_mul(C1);
    let fin = |mut k: u64| {
        k = (k ^ (k >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        k = (k ^ (k >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        k ^ (k >> 33)
    };
    let word = |b: &[u8]| {
        let mut le = [0; 8];
        le[..b.len()].copy_from_slice(b);
        u64::from_le_bytes(le)
    };
    let (mut h1, mut h2) = (0u64, 0u64);
    let mut blocks = data.chunks_exact(16);
    for b in &mut blocks {
        h1 ^= mix1(word(&b[..8]));
        h1 = h1.rotate_left(27).wrapping_add(h2);
        h1 = h1.wrapping_mul(5).wrapping_add(0x52dc_e729);
        h2 ^= mix2(word(&b[8..]));
        h2 = h2.rotate_left(31).wrapping_add(h1);
        h2 = h2.wrapping_mul(5).wrapping_add(0x3849_5ab5);
    }
    let tail = blocks.remainder();
    let (a, b) = tail.split_at(tail.len().min(8));
    h2 ^= mix2(word(b));
    h1 ^= mix1(word(a));
    let len = data.len() as u64;
    h1 ^= len;
    h2 ^= len;
    h1 = h1.wrapping_add(h2);
    h2 = h2.wrapping_add(h1);
    fin(h1).wrapping_add(fin(h2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_agrees_with_published_vectors() {
        // smhasher's MurmurHash3_x64_128 with seed 0, first half.
        for (text, want) in [
            ("", 0u64),
            ("hello", 0xcbd8_a7b3_41bd_9b02),
            ("hello, world", 0x342f_ac62_3a5e_bc8e),
            (
                "The quick brown fox jumps over the lazy dog.",
                0xcd99_481f_9ee9_02c9,
            ),
        ] {
            assert_eq!(murmur3_x64_64(text.as_bytes()), want, "{text}");
        }
    }
}
