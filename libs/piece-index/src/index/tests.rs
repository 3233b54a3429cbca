use std::collections::{BTreeMap, BTreeSet};

use lotus_car::CarWriter;
use lotus_types::Commitment;
use multihash_codetable::{Code, MultihashDigest};
use proptest::prelude::*;

use super::*;

fn piece(n: u8) -> PieceCid {
    PieceCid::new(Commitment([n; 32]))
}

fn hash(n: u8) -> Multihash<64> {
    let code = if n.is_multiple_of(2) {
        Code::Sha2_256
    } else {
        Code::Blake2b256
    };
    code.digest(&[n])
}

fn entry(n: u8, offset: u64) -> Entry {
    Entry {
        hash: hash(n),
        section: offset,
        offset,
        len: 1,
    }
}

#[derive(Debug, Clone)]
enum Op {
    Add(u8, Vec<(u8, u64)>),
    /// An add that fails in the middle.
    Fail(u8, Vec<(u8, u64)>),
    Remove(u8),
    /// Marks pieces for a rebuild, all or one.
    Rebuild(Option<u8>),
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let entries = || proptest::collection::vec((0u8..12, 0u64..1 << 40), 0..10);
    let op = prop_oneof![
        3 => (0u8..4, entries()).prop_map(|(p, e)| Op::Add(p, e)),
        1 => (0u8..4, entries()).prop_map(|(p, e)| Op::Fail(p, e)),
        2 => (0u8..4).prop_map(Op::Remove),
        1 => proptest::option::of(0u8..4).prop_map(Op::Rebuild),
        1 => Just(Op::Reopen),
    ];
    proptest::collection::vec(op, 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn it_answers_as_a_map_would(ops in ops()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        let mut index = PieceIndex::open(&path).unwrap();
        let mut model: BTreeMap<u8, BTreeMap<u8, u64>> = BTreeMap::new();
        let mut stale = BTreeSet::new();
        for op in ops {
            match op {
                Op::Add(p, entries) => {
                    let items = entries.iter().map(|(h, o)| Ok::<_, IndexError>(entry(*h, *o)));
                    let n = index.add_piece(&piece(p), items).unwrap();
                    if stale.remove(&p) || !model.contains_key(&p) {
                        let mut first = BTreeMap::new();
                        for (h, o) in entries {
                            let at: &mut u64 = first.entry(h).or_insert(o);
                            *at = o.min(*at);
                        }
                        model.insert(p, first);
                    }
                    prop_assert_eq!(n, model[&p].len() as u64);
                }
                Op::Fail(p, entries) => {
                    let items = entries.iter().map(|(h, o)| Ok(entry(*h, *o)))
                        .chain([Err(IndexError::DiskFull)]);
                    let r = index.add_piece(&piece(p), items);
                    prop_assert_eq!(r.is_ok(), model.contains_key(&p) && !stale.contains(&p));
                }
                Op::Remove(p) => {
                    stale.remove(&p);
                    prop_assert_eq!(index.remove_piece(&piece(p)).unwrap(), model.remove(&p).is_some());
                }
                Op::Rebuild(p) => {
                    let chosen = model.keys().filter(|k| p.is_none_or(|p| p == **k));
                    let before = stale.len();
                    let chosen: BTreeSet<_> = chosen.copied().collect();
                    let n = index.rebuild(p.map(piece).as_ref()).unwrap();
                    prop_assert_eq!(n, chosen.len() as u64);
                    stale.extend(chosen);
                    prop_assert!(before <= stale.len());
                }
                Op::Reopen => {
                    let locked = matches!(PieceIndex::open(&path), Err(IndexError::Locked { .. }));
                    prop_assert!(locked, "two owners");
                    drop(index);
                    index = PieceIndex::open(&path).unwrap();
                }
            }
        }
        for h in 0..12 {
            let got: BTreeSet<_> = index.find(&hash(h)).unwrap().iter().map(|l| (l.piece.commitment().0[0], l.offset)).collect();
            let want: BTreeSet<_> = model.iter().filter_map(|(p, e)| Some((*p, *e.get(&h)?))).collect();
            prop_assert_eq!(&got, &want);
            let held: BTreeSet<_> = index.holders(&hash(h)).unwrap().iter().map(|p| p.commitment().0[0]).collect();
            prop_assert_eq!(held, want.into_iter().map(|(p, _)| p).collect());
        }
        let pieces: Vec<_> = index.pieces().unwrap().iter().map(|(p, n)| (p.commitment().0[0], *n)).collect();
        let want: Vec<_> = model.iter().map(|(p, e)| (*p, e.len() as u64)).collect();
        prop_assert_eq!(pieces, want);
        let all = model.values().map(|e| e.len() as u64).sum::<u64>();
        prop_assert_eq!(index.len().unwrap(), all);
        for (p, e) in &model {
            prop_assert_eq!(index.is_stale(&piece(*p)).unwrap(), stale.contains(p));
            // Page by page, each once.
            let mut got = Vec::new();
            while let page @ [_, ..] = &index.multihashes(&piece(*p), got.len() as u64, 3).unwrap()[..] {
                got.extend_from_slice(page);
            }
            prop_assert_eq!(got.len(), e.len());
            prop_assert_eq!(got.into_iter().map(|h| h.to_bytes()).collect::<BTreeSet<_>>(), e.keys().map(|h| hash(*h).to_bytes()).collect());
        }
        let verified = index.verify(8).unwrap();
        prop_assert_eq!(verified.damaged, Vec::<String>::new());
        prop_assert_eq!((verified.pieces, verified.multihashes), (model.len() as u64, all));
    }
}

fn filled(path: &Path) -> PieceIndex {
    let index = PieceIndex::open(path).unwrap();
    for p in 0..3 {
        let entries = (0..9).map(|n| Ok::<_, IndexError>(entry(n + p, u64::from(n))));
        assert_eq!(index.add_piece(&piece(p), entries).unwrap(), 9);
    }
    index
}

/// What a crash between two steps leaves, or an operator who deletes one of the parts.
#[test]
fn parts_that_do_not_fit_are_brought_together() {
    let part = |name: &str| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        drop(filled(&path));
        let gone = path.with_extension(name);
        if gone.is_dir() {
            fs::remove_dir_all(gone).unwrap();
        } else {
            fs::remove_file(gone).unwrap();
        }
        let index = PieceIndex::open(&path).unwrap();
        assert_eq!(index.pieces().unwrap(), []);
        assert_eq!(index.find(&hash(4)).unwrap(), []);
        assert!(index.verify(9).unwrap().damaged.is_empty());
        let again = (0..9).map(|n| Ok::<_, IndexError>(entry(n, 1)));
        assert_eq!(index.add_piece(&piece(1), again).unwrap(), 9);
        assert_eq!(index.holders(&hash(4)).unwrap(), [piece(1)]);
    };
    part("redb");
    part("segments");
    part("sidecars");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index.redb");
    let index = filled(&path);
    fs::remove_file(index.sidecar_path(&piece(1))).unwrap();
    fs::write(path.with_extension("sidecars").join("stray.new"), "x").unwrap();
    assert_eq!(index.verify(9).unwrap().damaged.len(), 1);
    drop(index);
    let index = PieceIndex::open(&path).unwrap();
    let left: Vec<_> = index
        .pieces()
        .unwrap()
        .into_iter()
        .map(|(p, _)| p)
        .collect();
    assert_eq!(left, [piece(0), piece(2)]);
    assert_eq!(
        fs::read_dir(path.with_extension("sidecars"))
            .unwrap()
            .count(),
        2
    );
}

#[test]
fn an_add_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index.redb");
    let index = filled(&path);
    let files = || {
        let dirs = ["segments", "sidecars"].map(|d| fs::read_dir(path.with_extension(d)).unwrap());
        let names = dirs.into_iter().flatten().map(|e| e.unwrap().path());
        names.collect::<BTreeSet<_>>()
    };
    let before = files();
    let add = |offset: u64| {
        let entries = (0..9).map(|n| Ok::<_, IndexError>(entry(n, offset + u64::from(n))));
        index.add_piece(&piece(7), entries)
    };
    // While the list is written, which the segments refuse.
    let out_of_range = add(1 << 40);
    assert!(matches!(out_of_range, Err(IndexError::Segments(_))));
    assert_eq!(files(), before);
    // When it is in its place.
    let blocker = path.with_extension("segments").join("MANIFEST.new");
    fs::create_dir(&blocker).unwrap();
    assert!(add(0).is_err(), "no manifest can be written");
    fs::remove_dir(blocker).unwrap();
    assert_eq!(files(), before);
    // One that is indexed keeps what it has.
    assert_eq!(index.rebuild(Some(&piece(1))).unwrap(), 1);
    let bad = [Ok::<_, IndexError>(entry(1, 1 << 40))];
    assert!(index.add_piece(&piece(1), bad).is_err(), "out of range");
    assert_eq!(files(), before);
    assert!(index.verify(9).unwrap().damaged.is_empty());
    assert_eq!(add(0).unwrap(), 9);
    assert_eq!(files().len(), before.len() + 2);
}

#[test]
fn a_damaged_table_is_dropped() {
    for damage in [&b"no table"[..], &[0; 5000], &[]] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        drop(filled(&path));
        let bytes = fs::read(&path).unwrap();
        let start = if damage.is_empty() { 600 } else { 0 };
        fs::write(&path, [&bytes[..start], damage].concat()).unwrap();
        assert!(PieceIndex::open_existing(&path).is_err(), "{start}");
        let index = PieceIndex::open(&path).unwrap();
        assert_eq!(index.pieces().unwrap(), []);
        assert_eq!(index.find(&hash(4)).unwrap(), []);
        assert!(index.verify(9).unwrap().damaged.is_empty());
    }
}

#[test]
fn an_index_of_the_older_format_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index.redb");
    let old = Database::create(&path).unwrap();
    let tx = old.begin_write().unwrap();
    tx.open_table(TableDefinition::<(u64, &[u8]), (u64, u32)>::new(
        super::open::OLD,
    ))
    .unwrap();
    tx.open_table(TableDefinition::<&[u8; 32], (u64, u64)>::new("pieces"))
        .unwrap();
    tx.commit().unwrap();
    drop(old);
    let refused = PieceIndex::open_existing(&path);
    assert!(matches!(refused, Err(IndexError::Old { .. })));
    let index = filled(&path);
    assert_eq!(index.pieces().unwrap().len(), 3);
    drop(index);
    assert_eq!(PieceIndex::open(&path).unwrap().len().unwrap(), 27);
}

#[test]
fn damaged_segments_are_dropped_at_the_start_and_found_by_verify() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index.redb");
    let index = filled(&path);
    let segment = fs::read_dir(path.with_extension("segments"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "seg"))
        .unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    bytes[9] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    let damaged = index.verify(9).unwrap().damaged;
    assert!(damaged.iter().any(|d| d.contains("page 0")), "{damaged:?}");
    // Rebuilt while it runs.
    assert_eq!(index.rebuild(None).unwrap(), 3);
    for p in 0..3 {
        let entries = (0..9).map(|n| Ok::<_, IndexError>(entry(n + p, u64::from(n))));
        assert_eq!(index.add_piece(&piece(p), entries).unwrap(), 9);
    }
    assert_eq!(index.verify(9).unwrap().damaged, Vec::<String>::new());
    drop(index);
    // And what a start reads.
    let segments = fs::read_dir(path.with_extension("segments")).unwrap();
    let files: Vec<_> = segments.map(|e| e.unwrap().path()).collect();
    let segment = files
        .iter()
        .find(|p| p.extension().is_some_and(|e| e == "seg"))
        .unwrap();
    let bytes = fs::read(segment).unwrap();
    fs::write(segment, &bytes[..bytes.len() - 1]).unwrap();
    assert!(
        PieceIndex::open_existing(&path).is_err(),
        "damaged, and opened"
    );
    let index = PieceIndex::open(&path).unwrap();
    assert_eq!(index.pieces().unwrap(), []);
    assert!(index.verify(9).unwrap().damaged.is_empty());
}

#[test]
fn offsets_are_those_of_both_car_versions() {
    let data = |n: u8| vec![n; 100 + usize::from(n)];
    let cid = |n: u8| cid::Cid::new_v1(0x55, Code::Sha2_256.digest(&data(n)));
    let mut v1 = CarWriter::new(Vec::new(), &[cid(0)]).unwrap();
    for n in 0..3 {
        v1.write(&cid(n), &data(n)).unwrap();
    }
    let v1 = v1.finish().unwrap();
    let mut v2 = V2_PRAGMA.to_vec();
    v2.extend([0; 16]);
    for n in [77, v1.len() as u64, 0] {
        v2.extend(n.to_le_bytes());
    }
    v2.resize(77, 0);
    v2.extend(&v1);
    let dir = tempfile::tempdir().unwrap();
    let index = PieceIndex::open(&dir.path().join("index.redb")).unwrap();
    for (p, car) in [(1, &v1), (2, &v2)] {
        assert_eq!(index.add_car(&piece(p), &car[..]).unwrap(), 3);
    }
    for n in 0..3 {
        for at in index.find(cid(n).hash()).unwrap() {
            let car = if at.piece == piece(1) { &v1 } else { &v2 };
            let from = usize::try_from(at.offset).unwrap();
            assert_eq!(car[from..from + at.len as usize], data(n));
        }
    }
    // The list is of the CARv1 within, so it is the same.
    let list = |p: u8| fs::read(index.sidecar_path(&piece(p))).unwrap();
    assert_eq!(list(1), list(2));
}
