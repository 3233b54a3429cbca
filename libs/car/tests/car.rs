//! CAR streams: what is read is what was written, at the offsets said; damage is always an error
//! and never a panic.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use bytes::Bytes;
use cid::Cid;
use ipld_core::ipld::Ipld;
use lotus_car::{
    BadBlock, ByteRange, CarError, CarReader, CarStore, CarWriter, DAG_CBOR, DAG_JSON, DAG_PB, RAW,
    Scope, Selector, Walk, WalkError, cat, export, links, pack_dir, verify, walk,
};
use multihash_codetable::{Code, MultihashDigest};
use proptest::prelude::*;

fn raw(data: &[u8]) -> Cid {
    Cid::new_v1(RAW, Code::Sha2_256.digest(data))
}

fn v1(roots: &[Cid], blocks: &[(Cid, Vec<u8>)]) -> Vec<u8> {
    let mut w = CarWriter::new(Vec::new(), roots).unwrap();
    for (cid, data) in blocks {
        w.write(cid, data).unwrap();
    }
    w.finish().unwrap()
}

fn v2(inner: &[u8], padding: usize, index: &[u8]) -> Vec<u8> {
    let mut out = vec![
        0x0a, 0xa1, 0x67, 0x76, 0x65, 0x72, 0x73, 0x69, 0x6f, 0x6e, 0x02,
    ];
    out.extend([0; 16]);
    let start = 51 + padding as u64;
    let index_at = if index.is_empty() {
        0
    } else {
        start + inner.len() as u64 + 3
    };
    for n in [start, inner.len() as u64, index_at] {
        out.extend(n.to_le_bytes());
    }
    out.extend(vec![0; padding]);
    out.extend(inner);
    if !index.is_empty() {
        out.extend([0; 3]);
        out.extend(index);
    }
    out
}

fn read(car: &[u8]) -> Result<Vec<lotus_car::Block>, CarError> {
    CarReader::new(car)?.collect()
}

fn blocks() -> impl Strategy<Value = Vec<(Cid, Vec<u8>)>> {
    let hash = prop_oneof![
        Just(Code::Sha2_256),
        Just(Code::Sha2_512),
        Just(Code::Blake2b256),
        Just(Code::Blake3_256),
        Just(Code::Keccak256)
    ];
    let block = (
        hash,
        proptest::collection::vec(any::<u8>(), 0..300),
        any::<bool>(),
    )
        .prop_map(|(hash, data, v0)| {
            let cid = if v0 {
                Cid::new_v0(Code::Sha2_256.digest(&data)).unwrap()
            } else {
                Cid::new_v1(RAW, hash.digest(&data))
            };
            (cid, data)
        });
    proptest::collection::vec(block, 0..8)
}

proptest! {
    #[test]
    fn what_is_written_is_read_at_exact_offsets(
        blocks in blocks(), second in any::<bool>(), padding in 0usize..40, index in any::<bool>(), zeros in 0usize..20,
    ) {
        let roots: Vec<Cid> = blocks.iter().take(2).map(|b| b.0).collect();
        let mut inner = v1(&roots, &blocks);
        inner.extend(vec![0; zeros]);
        let car = if second { v2(&inner, padding, if index { b"\x81\x08" } else { b"" }) } else { inner };
        let reader = CarReader::new(&car[..]).unwrap();
        prop_assert_eq!(reader.roots(), &roots[..]);
        prop_assert_eq!(reader.version(), if second { 2 } else { 1 });
        let got = reader.collect::<Result<Vec<_>, _>>().unwrap();
        prop_assert_eq!(got.len(), blocks.len());
        for (b, (cid, data)) in got.iter().zip(&blocks) {
            prop_assert_eq!(&b.cid, cid);
            prop_assert_eq!(&b.data[..], &data[..]);
            let at = usize::try_from(b.offset).unwrap();
            prop_assert_eq!(&car[at..at + data.len()], &data[..]);
            prop_assert!(b.section < b.offset);
        }
    }

    #[test]
    fn a_cut_inside_a_section_is_an_error(blocks in blocks(), cut in any::<prop::sample::Index>()) {
        let car = v1(&[raw(b"")], &blocks);
        let at = cut.index(car.len());
        let mut ends: BTreeSet<u64> = read(&car).unwrap().iter().map(|b| b.section).collect();
        ends.insert(car.len() as u64);
        let whole = read(&car[..at]);
        if ends.contains(&(at as u64)) {
            prop_assert!(whole.is_ok());
        } else {
            prop_assert!(matches!(whole, Err(CarError::Truncated { .. })), "{whole:?}");
        }
    }

    #[test]
    fn a_flipped_bit_never_panics_and_never_passes_other_bytes(
        blocks in blocks(), second in any::<bool>(), at in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let inner = v1(&[raw(b"")], &blocks);
        let mut car = if second { v2(&inner, 0, b"\x81\x08") } else { inner };
        let i = at.index(car.len());
        car[i] ^= 1 << bit;
        if let Ok(reader) = CarReader::new(&car[..]) {
            for b in reader.map_while(Result::ok) {
                prop_assert!(verify(&b.cid, &b.data).is_ok());
            }
        }
    }

    #[test]
    fn any_bytes_at_all_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        drop(read(&bytes));
        for codec in [DAG_PB, DAG_CBOR, DAG_JSON, RAW, 0x85] {
            drop(links(codec, &Bytes::from(bytes.clone())));
        }
        // A valid CID over a bad node: the walk must end with an error, not a panic.
        for codec in [DAG_PB, DAG_CBOR, DAG_JSON] {
            let cid = Cid::new_v1(codec, Code::Sha2_256.digest(&bytes));
            let data = Bytes::from(bytes.clone());
            for scope in [Scope::Block, Scope::Entity, Scope::All] {
                if let Ok(w) = walk(&cid, scope, |c| Ok((*c == cid).then(|| data.clone()))) {
                    prop_assert!(w.count() <= 2);
                }
            }
            drop(Walk::new(&cid, &["a".into(), "0".into()], Selector::default(), |_| Ok(Some(data.clone()))));
        }
    }
}

#[test]
fn each_kind_of_damage_has_its_own_error() {
    let block = (raw(b"hello"), b"hello".to_vec());
    let good = v1(&[block.0], std::slice::from_ref(&block));
    let header = good.len() - 1 - 36 - 5;
    type Check = fn(&CarError) -> bool;
    let section = |bytes: &[u8]| [&good[..header], bytes].concat();
    let cases: Vec<(&str, Vec<u8>, Check)> = vec![
        ("empty", vec![], |e| {
            matches!(e, CarError::Truncated { what: "header", .. })
        }),
        ("no CAR", b"PK\x03\x04 a zip file".to_vec(), |e| {
            matches!(e, CarError::Truncated { .. } | CarError::Header { .. })
        }),
        ("text", b"\x05hello".to_vec(), |e| {
            matches!(e, CarError::Header { .. })
        }),
        (
            "header too large",
            vec![0xff, 0xff, 0xff, 0xff, 0x0f],
            |e| matches!(e, CarError::Header { offset: 0, .. }),
        ),
        ("endless varint", section(&[0x80; 20]), |e| {
            matches!(e, CarError::Varint { .. })
        }),
        ("padded varint", section(&[0x80, 0x00]), |e| {
            matches!(e, CarError::Varint { .. })
        }),
        (
            "huge section",
            section(&[0xff, 0xff, 0xff, 0xff, 0x7f]),
            |e| matches!(e, CarError::TooLarge { .. }),
        ),
        ("no CID", section(b"\x05hello"), |e| {
            matches!(e, CarError::Cid { .. })
        }),
        (
            "other bytes",
            [&good[..good.len() - 1], b"O"].concat(),
            |e| {
                matches!(
                    e,
                    CarError::Block {
                        why: BadBlock::Mismatch { .. },
                        ..
                    }
                )
            },
        ),
        ("data after zeros", [&good[..], &[0, 0, 7]].concat(), |e| {
            matches!(e, CarError::Trailing { .. })
        }),
        (
            "version 3",
            {
                let mut b = good.clone();
                b[header - 1] = 3;
                b
            },
            |e| matches!(e, CarError::Header { .. }),
        ),
        (
            "unfinished v2",
            v2(&good, 0, b"")[..11]
                .iter()
                .copied()
                .chain([0; 40])
                .collect(),
            |e| matches!(e, CarError::Header { why, .. } if why.contains("finalized")),
        ),
        (
            "v2 without its end",
            {
                let c = v2(&good, 0, b"");
                c[..c.len() - 1].to_vec()
            },
            |e| matches!(e, CarError::Truncated { .. }),
        ),
        (
            "v2 without its last block",
            {
                let c = v2(&good, 0, b"");
                c[..51 + header].to_vec()
            },
            |e| matches!(e, CarError::Truncated { .. }),
        ),
        (
            "v2 without its index",
            {
                let c = v2(&good, 0, b"\x81");
                c[..c.len() - 1].to_vec()
            },
            |e| {
                matches!(
                    e,
                    CarError::Truncated {
                        what: "CARv2 index",
                        ..
                    }
                )
            },
        ),
        (
            "unknown hash",
            {
                let cid = Cid::new_v1(RAW, multihash::Multihash::wrap(0x99, &[1; 32]).unwrap());
                v1(&[], &[(cid, vec![1])])
            },
            |e| {
                matches!(
                    e,
                    CarError::Block {
                        why: BadBlock::UnknownHash { code: 0x99, .. },
                        ..
                    }
                )
            },
        ),
        (
            "short digest",
            {
                let cid = Cid::new_v1(RAW, Code::Sha2_256.digest(b"x").truncate(4));
                v1(&[], &[(cid, b"x".to_vec())])
            },
            |e| {
                matches!(
                    e,
                    CarError::Block {
                        why: BadBlock::ShortDigest { len: 4, .. },
                        ..
                    }
                )
            },
        ),
    ];
    assert_eq!(read(&good).unwrap().len(), 1);
    for (name, bytes, is) in cases {
        let e = read(&bytes).expect_err(name);
        assert!(is(&e), "{name}: {e:?}");
        assert_eq!(e.kind(), lotus_types::Kind::Data, "{name}");
        assert!(!e.fix().is_empty() && !e.to_string().is_empty());
    }
}

#[test]
fn identity_cids_are_checked_and_skipped() {
    let inline = Cid::new_v1(RAW, multihash::Multihash::wrap(0, b"tiny").unwrap());
    let car = v1(
        &[inline],
        &[(inline, b"tiny".to_vec()), (raw(b"x"), b"x".to_vec())],
    );
    assert_eq!(read(&car).unwrap().len(), 1);
    let bad = v1(&[inline], &[(inline, b"tinY".to_vec())]);
    assert!(matches!(read(&bad), Err(CarError::Cid { .. })));
}

/// A DAG over all codecs, with identity links, one of them too long for a 64-byte multihash.
fn mixed() -> (Cid, BTreeMap<Cid, Bytes>) {
    let mut map = BTreeMap::new();
    let mut put = |codec: u64, data: Vec<u8>, hash: Code| {
        let cid = Cid::new_v1(codec, hash.digest(&data));
        map.insert(cid, Bytes::from(data));
        cid
    };
    let leaf = put(RAW, b"leaf".to_vec(), Code::Blake2b256);
    let behind = put(RAW, b"behind an identity".to_vec(), Code::Sha2_256);
    let json = put(
        DAG_JSON,
        format!(r#"{{"a":[{{"/":"{leaf}"}}],"b":{{"/":{{"bytes":"AQ"}}}}}}"#).into_bytes(),
        Code::Sha2_256,
    );
    let inner = serde_ipld_dagcbor::to_vec(&Ipld::Link(behind)).unwrap();
    let inline = Cid::new_v1(DAG_CBOR, multihash::Multihash::wrap(0, &inner).unwrap());
    let piece = Cid::new_v1(
        0xf101,
        multihash::Multihash::wrap(0x1012, &[7; 32]).unwrap(),
    );
    // [json, inline, a piece, a 100-byte identity CID]
    let mut cbor = vec![0x84];
    for cid in [json, inline, piece] {
        cbor.extend(serde_ipld_dagcbor::to_vec(&Ipld::Link(cid)).unwrap());
    }
    cbor.extend([0xd8, 42, 0x58, 105, 0, 1, 0x55, 0, 100]);
    cbor.extend([9; 100]);
    let root = put(DAG_CBOR, cbor, Code::Sha2_256);
    (root, map)
}

#[test]
fn a_walk_follows_links_of_every_codec() {
    let (root, map) = mixed();
    let got: BTreeSet<Cid> = walk(&root, Scope::All, |c| Ok(map.get(c).cloned()))
        .unwrap()
        .map(|b| b.unwrap().0)
        .collect();
    assert_eq!(got, map.keys().copied().collect());
}

#[test]
fn a_missing_or_wrong_block_ends_a_walk() {
    let (root, map) = mixed();
    let lost = *map.keys().find(|c| c.codec() == RAW).unwrap();
    let w = walk(&root, Scope::All, |c| {
        Ok(map.get(c).filter(|_| *c != lost).cloned())
    })
    .unwrap();
    assert!(matches!(w.last(), Some(Err(WalkError::Missing(c))) if c == lost));
    let w = walk(&root, Scope::All, |c| {
        Ok(map.get(c).map(|d| {
            if *c == lost {
                Bytes::from_static(b"evil")
            } else {
                d.clone()
            }
        }))
    });
    assert!(matches!(
        w.unwrap().last(),
        Some(Err(WalkError::Corrupt(_)))
    ));
}

fn tree(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn go(base: &Path, dir: &Path, out: &mut BTreeMap<String, Vec<u8>>) {
        for e in fs::read_dir(dir).unwrap() {
            let p = e.unwrap().path();
            let name = p.strip_prefix(base).unwrap().display().to_string();
            let meta = fs::symlink_metadata(&p).unwrap();
            if meta.is_dir() {
                out.insert(format!("{name}/"), vec![]);
                go(base, &p, out);
            } else if meta.is_symlink() {
                out.insert(
                    name,
                    fs::read_link(&p)
                        .unwrap()
                        .display()
                        .to_string()
                        .into_bytes(),
                );
            } else {
                out.insert(name, fs::read(&p).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    go(dir, dir, &mut out);
    out
}

#[test]
fn a_packed_folder_is_exported_as_it_was() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("in");
    fs::create_dir_all(dir.join("sub/empty")).unwrap();
    fs::create_dir(dir.join("many")).unwrap();
    let big: Vec<u8> = (0..3_500_000u32)
        .flat_map(|i| (i / 7).to_le_bytes()[..1].to_vec())
        .collect();
    fs::write(dir.join("big.bin"), &big).unwrap();
    fs::write(dir.join("sub/none"), b"").unwrap();
    fs::write(dir.join("sub/\u{fc}ber straße.txt"), b"text").unwrap();
    std::os::unix::fs::symlink("../big.bin", dir.join("sub/link")).unwrap();
    // Enough names for a sharded folder of two levels.
    for i in 0..5_000 {
        fs::write(dir.join(format!("many/file-{i}")), i.to_string()).unwrap();
    }
    // The CAR may lie in the folder that is packed.
    let car = dir.join("out.car");
    let root = pack_dir(&dir, &car).unwrap();
    let again = tmp.path().join("again.car");
    let bytes = fs::read(&car).unwrap();
    assert_eq!(
        pack_dir(&dir, &car).unwrap(),
        root,
        "the old CAR is not packed either"
    );
    fs::remove_file(&car).unwrap();
    assert_eq!(pack_dir(&dir, &again).unwrap(), root);
    assert_eq!(fs::read(&again).unwrap(), bytes, "packing is deterministic");

    let store = CarStore::open(&again).unwrap();
    assert_eq!(store.roots(), [root]);
    let mut get = |c: &Cid| store.get(c);
    let all: BTreeSet<Cid> = walk(&root, Scope::All, &mut get)
        .unwrap()
        .map(|b| b.unwrap().0)
        .collect();
    assert_eq!(all, store.cids().iter().copied().collect());
    assert_eq!(all.len(), store.cids().len(), "each block once");

    let out = tmp.path().join("out");
    export(&root, &mut get, &out).unwrap();
    assert_eq!(tree(&out), tree(&dir));
    assert!(
        export(&root, &mut get, &out).is_err(),
        "nothing is overwritten"
    );

    // Every name of the sharded folder is found by its hash.
    for i in (0..5_000).step_by(97) {
        let path = ["many".into(), format!("file-{i}")];
        let w = Walk::new(&root, &path, Selector::default(), &mut get).unwrap();
        assert_eq!(w.last().unwrap().unwrap().1, i.to_string());
    }
    let gone = Walk::new(
        &root,
        &["many".into(), "file-x".into()],
        Selector::default(),
        &mut get,
    );
    assert!(matches!(gone, Err(WalkError::NoSuchPath { segment }) if segment == "file-x"));

    // A range of the large file: its root and the one chunk that holds it.
    let mib = 1 << 20;
    for (from, to, blocks) in [
        (0, Some(0), 2),
        (mib - 1, Some(mib), 3),
        (-1, None, 2),
        (0, None, 5),
        (-99_999_999, Some(10), 2),
        (2 * mib, Some(-1), 3),
    ] {
        let select = Selector {
            bytes: Some(ByteRange { from, to }),
            ..Selector::default()
        };
        let w = Walk::new(&root, &["big.bin".into()], select, &mut get).unwrap();
        assert_eq!(w.count(), blocks + 1, "{from}:{to:?}");
    }
    let select = Selector {
        bytes: Some(ByteRange {
            from: 3_500_000,
            to: None,
        }),
        ..Selector::default()
    };
    let w = Walk::new(&root, &["big.bin".into()], select, &mut get);
    assert!(matches!(w, Err(WalkError::OutOfRange { size: 3_500_000 })));
    // A folder as an entity: its shards, without the files.
    let select = Selector {
        scope: Scope::Entity,
        ..Selector::default()
    };
    let shards = Walk::new(&root, &["many".into()], select, &mut get).unwrap();
    assert!(shards.map(|b| b.unwrap().0).all(|c| c.codec() == DAG_PB));

    let one = tmp.path().join("one.car");
    let file = pack_dir(&dir.join("big.bin"), &one).unwrap();
    let store = CarStore::open(&one).unwrap();
    let mut out = Vec::new();
    assert_eq!(
        cat(&file, &mut |c| store.get(c), &mut out).unwrap(),
        3_500_000
    );
    assert_eq!(out, big);
}

#[test]
fn special_files_are_refused_with_their_name() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("in");
    fs::create_dir(&dir).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("sock")).unwrap();
    let out = tmp.path().join("o.car");
    let e = pack_dir(&dir, &out).unwrap_err();
    assert!(e.to_string().contains("sock"), "{e}");
    assert!(!out.exists());
    assert!(pack_dir(&tmp.path().join("absent"), &out).is_err());
}

/// A protobuf field: a number, or bytes.
fn field(tag: u8, value: Result<u64, &[u8]>) -> Vec<u8> {
    let mut buf = unsigned_varint::encode::u64_buffer();
    let (kind, number, bytes) = match value {
        Ok(n) => (0, n, &[][..]),
        Err(bytes) => (2, bytes.len() as u64, bytes),
    };
    let number = unsigned_varint::encode::u64(number, &mut buf);
    [&[tag << 3 | kind], number, bytes].concat()
}

#[test]
fn large_nodes_that_repeat_end_a_walk_before_much_was_read() {
    let own = vec![7; 1 << 20];
    let (mut below, mut size) = (raw(b"l"), 1);
    let mut all = BTreeMap::from([(below, Bytes::from_static(b"l"))]);
    // Each level is there twice: 2^14 visits of a MiB each.
    for _ in 0..14 {
        let part = field(4, Ok(size));
        let data = [field(1, Ok(2)), field(2, Err(&own)), part.clone(), part].concat();
        let link = field(2, Err(&field(1, Err(&below.to_bytes()))));
        let node = [link.clone(), link, field(1, Err(&data))].concat();
        below = Cid::new_v1(DAG_PB, Code::Sha2_256.digest(&node));
        size = own.len() as u64 + 2 * size;
        all.insert(below, node.into());
    }
    let mut read = 0;
    let select = Selector {
        bytes: Some(ByteRange { from: 0, to: None }),
        ..Selector::default()
    };
    let get = |cid: &Cid| {
        let data = all.get(cid).cloned();
        read += data.as_ref().map_or(0, Bytes::len);
        Ok(data)
    };
    let last = Walk::new(&below, &[], select, get).unwrap().last();
    let Some(Err(WalkError::TooWide { what, limit })) = last else {
        panic!("it goes on: {last:?}");
    };
    assert_eq!(what, "bytes of repeated nodes");
    assert!(read < limit + (32 << 20), "{read} bytes were read");
}
