//! Indexes that were damaged or made by somebody else: what they say is bounded by what they are.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// The index of these digests, with places that nobody asks for.
fn index(kinds: &[(u64, usize, BTreeSet<Vec<u8>>)]) -> Vec<u8> {
    let mut out = CODEC.to_vec();
    out.extend(u32::try_from(kinds.len()).unwrap().to_le_bytes());
    for (code, digest, entries) in kinds {
        out.extend(code.to_le_bytes());
        out.extend(1u32.to_le_bytes());
        let width = digest + OFFSET;
        out.extend(u32::try_from(width).unwrap().to_le_bytes());
        out.extend(((entries.len() * width) as u64).to_le_bytes());
        for entry in entries {
            out.extend(entry);
            out.extend([7; OFFSET]);
        }
    }
    out
}

fn digests(len: usize) -> impl Strategy<Value = BTreeSet<Vec<u8>>> {
    let digest = prop::collection::vec(any::<u8>(), len);
    prop::collection::btree_set(digest, 0..300)
}

/// Where something is changed.
#[derive(Clone, Debug)]
enum At {
    Byte(usize),
    Part(Index),
}

/// At a place, so many bytes are replaced by others.
fn damage() -> impl Strategy<Value = Vec<(At, usize, Vec<u8>)>> {
    let few = || prop::collection::vec(any::<u8>(), 1..4);
    let splice = prop_oneof![
        4 => few().prop_map(|new| (new.len(), new)),
        2 => few().prop_map(|new| (0, new)),
        2 => (1usize..60).prop_map(|lost| (lost, Vec::new())),
        1 => Just((usize::MAX, Vec::new())),
        1 => any::<u64>().prop_map(|n| (8, n.to_le_bytes().to_vec())),
        1 => any::<u32>().prop_map(|n| (4, n.to_le_bytes().to_vec())),
    ];
    // Most of what can lie is in the first bytes.
    let at = prop_oneof![
        (0usize..60).prop_map(At::Byte),
        any::<Index>().prop_map(At::Part)
    ];
    let splice = (at, splice).prop_map(|(at, (lost, new))| (at, lost, new));
    prop::collection::vec(splice, 1..3)
}

/// Opens it, and asks everything that can be asked. Whatever it says, it says no more than there
/// is, and it says why when it does not.
fn asked(bytes: &[u8]) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.idx");
    fs::write(&path, bytes).unwrap();
    let sidecar = match Sidecar::open(&path) {
        Ok(sidecar) => sidecar,
        Err(e) => {
            let why = e.to_string();
            prop_assert!(why.contains("x.idx") && why.len() < 500, "{why}");
            return Ok(());
        }
    };
    prop_assert!(sidecar.kinds.len() <= MAX_KINDS);
    let entries = sidecar.count();
    prop_assert!(entries * OFFSET as u64 <= bytes.len() as u64, "{entries}");
    let listed = sidecar.multihashes(0, usize::MAX);
    prop_assert!(listed.is_ok_and(|l| l.len() as u64 == entries));
    prop_assert!(sidecar.multihashes(u64::MAX, 9).is_ok_and(|l| l.is_empty()));
    for (code, digest) in [(0x12, 32), (0xb220, 32), (0, 0), (0, MAX_DIGEST)] {
        for byte in [0, 0x80, 0xff] {
            let hash = Multihash::wrap(code, &vec![byte; digest]).unwrap();
            let (_, reads) = sidecar.search(&hash).unwrap();
            prop_assert!(reads < 200, "{reads}");
        }
    }
    if let Ok(seen) = sidecar.verify() {
        prop_assert_eq!(seen.count, entries);
        // It is in order, so that it knows what it lists.
        for hash in sidecar.multihashes(0, 20).unwrap() {
            let twice = sidecar
                .kinds
                .iter()
                .filter(|k| k.code == hash.code() && k.digest == hash.digest().len());
            prop_assert!(sidecar.has(&hash).unwrap() || twice.count() > 1);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn a_damaged_index_says_no_more_than_there_is(
        sha in digests(32), blake in digests(32), short in digests(3), damage in damage(),
    ) {
        let good = index(&[(0, 3, short), (0x12, 32, sha), (0xb220, 32, blake)]);
        asked(&good)?;
        let bytes = damage.iter().fold(good, |bytes, (at, lost, new)| {
            let at = match at {
                At::Byte(n) => (*n).min(bytes.len()),
                At::Part(part) => part.index(bytes.len() + 1),
            };
            let end = at.saturating_add(*lost).min(bytes.len());
            [&bytes[..at], new, &bytes[end..]].concat()
        });
        asked(&bytes)?;
    }

    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..300), head in any::<bool>()) {
        let start: &[u8] = if head { &CODEC } else { &[] };
        asked(&[start, &bytes].concat())?;
    }
}

/// Counts that no file is long enough for, kinds without end, and widths without a digest.
#[test]
fn counts_are_not_believed() {
    let header =
        |functions: u32, rest: &[u8]| [&CODEC[..], &functions.to_le_bytes(), rest].concat();
    let kind = |lengths: u32, width: u32, bytes: u64| {
        let head = [&0x12u64.to_le_bytes()[..], &lengths.to_le_bytes()].concat();
        [
            head,
            width.to_le_bytes().to_vec(),
            bytes.to_le_bytes().to_vec(),
        ]
        .concat()
    };
    for (bytes, words) in [
        (header(u32::MAX, b""), "ends early"),
        (header(1, &kind(u32::MAX, 40, 0)), "ends early"),
        (header(1, &kind(1, 40, u64::MAX)), "shorter than it says"),
        (
            header(1, &kind(1, 40, u64::MAX - 30)),
            "shorter than it says",
        ),
        (header(1, &kind(1, 0, 0)), "impossible length"),
        (header(1, &kind(1, 7, 0)), "impossible length"),
        (header(1, &kind(1, 73, 0)), "impossible length"),
        (header(1, &kind(1, u32::MAX, 0)), "impossible length"),
        (
            header(1, &[&kind(1, 40, 41)[..], &[0; 41]].concat()),
            "do not fit",
        ),
        (header(300, &kind(1, 40, 0).repeat(300)), "do not fit"),
        (
            header(1, &[&kind(1, 40, 0)[..], &[0]].concat()),
            "longer than it says",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.idx");
        fs::write(&path, bytes).unwrap();
        let refused = Sidecar::open(&path).unwrap_err().to_string();
        assert!(refused.contains(words), "{words}: {refused}");
    }
}
