//! What happens to a message on its way, for tests.

use proptest::prelude::*;
use proptest::sample::Index;

/// At a place, so many bytes are replaced by others.
pub(crate) type Splice = (Index, usize, Vec<u8>);

/// Bytes that are changed, added, lost, cut off, or made the head of something long in CBOR.
pub(crate) fn damage() -> impl Strategy<Value = Vec<Splice>> {
    let few = || prop::collection::vec(any::<u8>(), 1..4);
    let head = (2u8..6, any::<u64>())
        .prop_map(|(kind, len)| [&[kind << 5 | 27], &len.to_be_bytes()[..]].concat());
    let splice = prop_oneof![
        4 => few().prop_map(|new| (new.len(), new)),
        2 => few().prop_map(|new| (0, new)),
        2 => (1usize..40).prop_map(|lost| (lost, Vec::new())),
        1 => Just((usize::MAX, Vec::new())),
        1 => head.prop_map(|head| (1, head)),
    ];
    let splice = (any::<Index>(), splice).prop_map(|(at, (lost, new))| (at, lost, new));
    prop::collection::vec(splice, 1..3)
}

/// The bytes after that.
pub(crate) fn damaged(bytes: &[u8], damage: &[Splice]) -> Vec<u8> {
    damage
        .iter()
        .fold(bytes.to_vec(), |bytes, (at, lost, new)| {
            let at = at.index(bytes.len() + 1);
            let end = at.saturating_add(*lost).min(bytes.len());
            [&bytes[..at], new, &bytes[end..]].concat()
        })
}
