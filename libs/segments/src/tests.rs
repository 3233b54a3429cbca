//! The store against a map, dying at every boundary, and with files that are not as it wrote them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use crate::disk::fault;
use crate::manifest::Manifest;
use crate::{Record, Segments, SegmentsError};

/// Two runs and more for every piece of more than a few records.
const SMALL_RUN: usize = 64;

type Model = BTreeMap<u32, BTreeSet<(u8, u64, u32)>>;

fn hash(n: u8) -> [u8; 34] {
    let mut hash = [n; 34];
    (hash[0], hash[1]) = (0x12, 0x20);
    hash
}

fn add(store: &Segments, piece: u32, blocks: &[(u8, u64, u32)]) -> Result<u64, SegmentsError> {
    let mut ingest = store.ingest(piece);
    for (n, offset, len) in blocks {
        ingest.push(&hash(*n), *offset, *len)?;
    }
    ingest.finish()
}

/// Every answer is the model's.
fn compare(store: &Segments, model: &Model) {
    for n in 0..=u8::MAX {
        let got: BTreeSet<_> = store
            .find(&hash(n), usize::MAX)
            .unwrap()
            .into_iter()
            .collect();
        let want: BTreeSet<_> = model
            .iter()
            .flat_map(|(piece, blocks)| {
                blocks
                    .iter()
                    .filter(|b| b.0 == n)
                    .map(|(_, offset, len)| Record {
                        piece: *piece,
                        offset: *offset,
                        len: *len,
                    })
            })
            .collect();
        assert_eq!(got, want, "hash {n}");
    }
    let got: BTreeSet<u32> = store.pieces().into_keys().collect();
    let filled = model.iter().filter(|(_, b)| !b.is_empty());
    assert_eq!(got, filled.map(|(p, _)| *p).collect());
    assert_eq!(store.verify().unwrap().damaged, Vec::<String>::new());
}

#[derive(Debug, Clone)]
enum Op {
    Add(Vec<(u8, u64, u32)>),
    /// An ingest that is given up.
    Drop(Vec<(u8, u64, u32)>),
    Remove(u32),
    Maintain,
    Compact,
    Reopen,
}

fn blocks() -> impl Strategy<Value = Vec<(u8, u64, u32)>> {
    // Few hashes, so that keys fill more than a page.
    let block = (
        prop_oneof![0u8..4, any::<u8>()],
        0..1u64 << 40,
        0..1u32 << 24,
    );
    prop_oneof![
        4 => proptest::collection::vec(block.clone(), 0..20),
        1 => proptest::collection::vec(block, 300..900),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => blocks().prop_map(Op::Add),
        1 => blocks().prop_map(Op::Drop),
        3 => (0u32..12).prop_map(Op::Remove),
        2 => Just(Op::Maintain),
        1 => Just(Op::Compact),
        1 => Just(Op::Reopen),
    ];
    proptest::collection::vec(op, 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn it_answers_as_a_map_would(ops in ops()) {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Segments::open_with(dir.path(), SMALL_RUN).unwrap();
        let mut model = Model::new();
        for (number, op) in (0u32..).zip(ops) {
            match op {
                Op::Add(blocks) => {
                    let count = add(&store, number, &blocks).unwrap();
                    prop_assert_eq!(count, blocks.len() as u64);
                    model.insert(number, blocks.into_iter().collect());
                }
                Op::Drop(blocks) => {
                    let mut ingest = store.ingest(number);
                    for (n, offset, len) in blocks {
                        ingest.push(&hash(n), offset, len).unwrap();
                    }
                }
                Op::Remove(piece) => {
                    let filled = model.remove(&piece).is_some_and(|b| !b.is_empty());
                    prop_assert_eq!(store.remove(piece).unwrap(), filled);
                }
                Op::Maintain => store.maintain().unwrap(),
                Op::Compact => {
                    store.compact().unwrap();
                    let stats = store.stats();
                    prop_assert!(stats.segments <= 1 && stats.gone == 0, "{stats:?}");
                }
                Op::Reopen => {
                    let second = Segments::open(dir.path());
                    let locked = matches!(second, Err(SegmentsError::Locked { .. }));
                    prop_assert!(locked, "two owners");
                    drop(store);
                    store = Segments::open_with(dir.path(), SMALL_RUN).unwrap();
                }
            }
        }
        compare(&store, &model);
        drop(store);
        compare(&Segments::open(dir.path()).unwrap(), &model);
        // Nothing lies around.
        let manifest = fs::read_dir(dir.path()).unwrap().count() as u64;
        let store = Segments::open(dir.path()).unwrap();
        prop_assert_eq!(manifest, 2 + store.stats().segments);
    }
}

/// What is committed at the start of each death.
fn prepared(dir: &Path) -> (Segments, Model) {
    let store = Segments::open_with(dir, SMALL_RUN).unwrap();
    let mut model = Model::new();
    for piece in 0..8 {
        let blocks: Vec<_> = (0..30).map(|n| (n * 7 % 31, u64::from(n), piece)).collect();
        add(&store, piece, &blocks).unwrap();
        model.insert(piece, blocks.into_iter().collect());
    }
    store.remove(2).unwrap();
    model.remove(&2);
    (store, model)
}

/// Lets a change die at each of its boundaries; after a restart the store is as before it or as
/// after it. Returns how many boundaries there are.
fn dies_everywhere(
    change: impl Fn(&Segments) -> Result<(), SegmentsError>,
    apply: impl Fn(&mut Model),
) -> u32 {
    for boundary in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let (store, before) = prepared(dir.path());
        let mut after = before.clone();
        apply(&mut after);
        fault::die_after(boundary);
        let done = change(&store);
        let dead = fault::revive();
        if !dead {
            done.unwrap();
            compare(&store, &after);
            return boundary;
        }
        drop(store);
        let store = Segments::open_with(dir.path(), SMALL_RUN).unwrap();
        let is_after = store.pieces().keys().eq(after.keys());
        compare(&store, if is_after { &after } else { &before });
        assert!(
            is_after || done.is_err(),
            "said to be done, and is not: {boundary}"
        );
        // And it goes on.
        if !is_after {
            change(&store).unwrap();
        }
        compare(&store, &after);
    }
    unreachable!("a change has an end")
}

#[test]
fn a_death_at_any_boundary_leaves_before_or_after() {
    let blocks: Vec<_> = (0..50u8).map(|n| (n, u64::from(n) << 20, 9)).collect();
    let add_one = |s: &Segments| add(s, 100, &blocks).map(drop);
    let boundaries = dies_everywhere(add_one, |m| {
        m.insert(100, blocks.iter().copied().collect());
    });
    assert!(boundaries >= 7, "{boundaries}");
    let remove = |s: &Segments| s.remove(5).map(drop);
    assert!(dies_everywhere(remove, |m| drop(m.remove(&5))) >= 4);
    let merge = |s: &Segments| s.compact();
    assert!(dies_everywhere(merge, |_| {}) >= 7);
    let tidy = |s: &Segments| s.maintain();
    assert!(dies_everywhere(tidy, |_| {}) >= 7);
}

/// As a full disk does it: a write fails, and the process goes on.
#[test]
fn what_fails_leaves_no_file() {
    type Change<'a> = &'a dyn Fn(&Segments) -> Result<(), SegmentsError>;
    let blocks: Vec<_> = (0..50u8).map(|n| (n, u64::from(n) << 20, 9)).collect();
    let ingest = |s: &Segments| add(s, 100, &blocks).map(drop);
    let merge = |s: &Segments| s.compact();
    let known = |s: &Segments| match add(s, 5, &blocks) {
        Err(SegmentsError::Known { piece: 5 }) => Ok(()),
        other => other.map(drop),
    };
    let changes: [Change<'_>; 3] = [&ingest, &merge, &known];
    for (which, change) in changes.into_iter().enumerate() {
        for boundary in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let (store, before) = prepared(dir.path());
            let mut after = before.clone();
            if which == 0 {
                after.insert(100, blocks.iter().copied().collect());
            }
            fault::fail_after(boundary);
            let done = change(&store);
            let failed = fault::failed();
            compare(&store, if done.is_ok() { &after } else { &before });
            let mut segments = BTreeSet::new();
            for file in fs::read_dir(dir.path()).unwrap() {
                let name = file.unwrap().file_name().into_string().unwrap();
                segments.extend(name.ends_with(".seg").then_some(name));
            }
            // What was committed in the end, as far as the disk says, and what is in use.
            let manifest = Manifest::read(&dir.path().join("MANIFEST"))
                .unwrap()
                .unwrap();
            let used = store.segment_ids().into_iter().chain(manifest.segments);
            let used: BTreeSet<_> = used.map(|id| format!("{id:016x}.seg")).collect();
            // What failed may be the removal of what is not used any more.
            let removal = which > 0 && done.is_ok() && failed;
            let spare = segments.difference(&used).count();
            assert!(
                spare <= usize::from(removal),
                "{which} at {boundary}: {segments:?}, {used:?}"
            );
            assert!(used.is_subset(&segments), "{which} at {boundary}");
            if !failed {
                done.unwrap();
                break;
            }
            // And it goes on.
            if done.is_err() {
                change(&store).unwrap();
                compare(&store, &after);
            }
            drop(store);
            compare(&Segments::open(dir.path()).unwrap(), &after);
        }
    }
}

#[test]
fn a_death_while_it_is_made_leaves_a_store_to_be_made() {
    for boundary in 0.. {
        let dir = tempfile::tempdir().unwrap();
        fault::die_after(boundary);
        let opened = Segments::open(dir.path()).map(drop);
        let dead = fault::revive();
        let store = Segments::open(dir.path()).unwrap();
        compare(&store, &Model::new());
        if !dead {
            opened.unwrap();
            return;
        }
    }
}

/// A damaged store.
#[derive(Debug, Clone)]
enum Damage {
    Flip(usize, u8),
    Cut(usize),
    Grow(u8),
    Gone,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn damage_is_an_error_and_never_another_answer(
        which in any::<prop::sample::Index>(),
        damage in prop_oneof![
            6 => (any::<usize>(), 1u8..).prop_map(|(at, mask)| Damage::Flip(at, mask)),
            2 => any::<usize>().prop_map(Damage::Cut),
            1 => any::<u8>().prop_map(Damage::Grow),
            1 => Just(Damage::Gone),
        ],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (store, model) = prepared(dir.path());
        drop(store);
        let mut files: Vec<_> = fs::read_dir(dir.path()).unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| !p.ends_with("LOCK"))
            .collect();
        files.sort();
        let file = which.get(&files);
        let mut bytes = fs::read(file).unwrap();
        match damage {
            Damage::Flip(at, mask) => {
                let at = at % bytes.len();
                bytes[at] ^= mask;
            }
            Damage::Cut(at) => bytes.truncate(at % bytes.len()),
            Damage::Grow(byte) => bytes.push(byte),
            Damage::Gone => {}
        }
        if matches!(damage, Damage::Gone) {
            fs::remove_file(file).unwrap();
        } else {
            fs::write(file, bytes).unwrap();
        }
        let store = match Segments::open(dir.path()) {
            Err(SegmentsError::Corrupt { .. }) => return Ok(()),
            other => other.unwrap(),
        };
        // Only pages are not read at the start.
        prop_assert_eq!(store.verify().unwrap().damaged.len(), 1);
        let mut errors = 0;
        for n in 0..=u8::MAX {
            match store.find(&hash(n), usize::MAX) {
                Err(SegmentsError::Corrupt { .. }) => errors += 1,
                got => {
                    let got: BTreeSet<_> = got.unwrap().into_iter().map(|r| (r.piece, r.offset)).collect();
                    let want: BTreeSet<_> = model.iter()
                        .flat_map(|(p, b)| b.iter().filter(|b| b.0 == n).map(|b| (*p, b.1)))
                        .collect();
                    prop_assert_eq!(got, want);
                }
            }
        }
        prop_assert!(errors > 0);
        // A merge reads all but the segment of the piece that is gone, its third.
        let refused = matches!(store.compact(), Err(SegmentsError::Corrupt { .. }));
        prop_assert_eq!(refused, !file.ends_with("0000000000000003.seg"));
        if !refused {
            compare(&store, &model);
        }
    }
}

#[test]
fn a_lookup_reads_one_page_whatever_the_number_of_segments() {
    let dir = tempfile::tempdir().unwrap();
    let store = Segments::open(dir.path()).unwrap();
    let multihash = |piece: u32, n: u32| {
        let mut hash = [0; 34];
        hash[2..6].copy_from_slice(&piece.to_be_bytes());
        hash[6..10].copy_from_slice(&n.to_be_bytes());
        hash
    };
    let (pieces, blocks) = (7u32, 20_000u32);
    for piece in 0..pieces {
        let mut ingest = store.ingest(piece);
        for n in 0..blocks {
            ingest.push(&multihash(piece, n), u64::from(n), 1).unwrap();
        }
        ingest.finish().unwrap();
    }
    assert_eq!(store.stats().segments, 7);
    let reads = |piece: &dyn Fn(u32) -> u32| {
        let before = store.stats().pages_read;
        for n in 0..blocks {
            let piece = piece(n);
            let found = store.find(&multihash(piece, n), 9).unwrap();
            assert_eq!(found.len(), usize::from(piece < pieces));
        }
        store.stats().pages_read - before
    };
    let blocks = u64::from(blocks);
    let hits = reads(&|n| n % pieces);
    assert!((blocks..blocks + blocks / 12).contains(&hits), "{hits}");
    let misses = reads(&|_| pieces);
    assert!(misses < blocks / 10, "{misses}");
    store.compact().unwrap();
    assert_eq!(reads(&|n| n % pieces), blocks);
    assert!(reads(&|_| pieces) < blocks / 50);
}

#[test]
fn a_store_settles_when_it_is_quiet() {
    let dir = tempfile::tempdir().unwrap();
    let (store, model) = prepared(dir.path());
    let manifest = fs::File::open(dir.path().join("MANIFEST")).unwrap();
    let quiet = Duration::from_secs(600);
    let ago = |secs| SystemTime::now() - Duration::from_secs(secs);
    manifest.set_modified(ago(500)).unwrap();
    store.settle(quiet).unwrap();
    assert_eq!((store.stats().segments, store.stats().gone), (8, 30));
    // As with a clock that was set back.
    manifest.set_modified(SystemTime::now() + quiet).unwrap();
    store.settle(quiet).unwrap();
    assert_eq!(store.stats().segments, 8);
    manifest.set_modified(ago(700)).unwrap();
    store.settle(quiet).unwrap();
    assert_eq!((store.stats().segments, store.stats().gone), (1, 0));
    compare(&store, &model);
}

#[test]
fn what_has_no_place_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Segments::open(dir.path()).unwrap();
    let mut ingest = store.ingest(1);
    for (offset, len) in [(1 << 40, 1), (0, 1 << 24)] {
        let refused = ingest.push(&hash(1), offset, len);
        assert!(matches!(refused, Err(SegmentsError::OutOfRange { .. })));
    }
    ingest.push(&hash(1), (1 << 40) - 1, (1 << 24) - 1).unwrap();
    assert_eq!(ingest.finish().unwrap(), 1);
    assert!(matches!(
        add(&store, 1, &[(1, 1, 1)]),
        Err(SegmentsError::Known { piece: 1 })
    ));
    assert_eq!(store.find(&hash(1), 9).unwrap()[0].offset, (1 << 40) - 1);
    assert_eq!(store.find(&hash(1), 0).unwrap(), []);
}
