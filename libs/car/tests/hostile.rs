//! CARs and DAGs that mean harm: what is read is what it says it is, and whatever has no end is
//! ended.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};

use bytes::Bytes;
use cid::Cid;
use lotus_car::{
    ByteRange, CarReader, CarWriter, DAG_CBOR, DAG_PB, ExportError, MAX_BLOCK, MAX_HEADER, RAW,
    Scope, Selector, Walk, cat, export, verify,
};
use multihash_codetable::{Code, MultihashDigest};
use proptest::prelude::*;
use proptest::sample::Index;

type Blocks = BTreeMap<Cid, Bytes>;

fn put(all: &mut Blocks, codec: u64, data: Vec<u8>) -> Cid {
    let cid = Cid::new_v1(codec, Code::Sha2_256.digest(&data));
    all.insert(cid, data.into());
    cid
}

fn getter(all: &Blocks) -> impl FnMut(&Cid) -> io::Result<Option<Bytes>> {
    |cid| Ok(all.get(cid).cloned())
}

/// A protobuf field with a number.
fn number(tag: u8, n: u64) -> Vec<u8> {
    let mut buf = unsigned_varint::encode::u64_buffer();
    [&[tag << 3], unsigned_varint::encode::u64(n, &mut buf)].concat()
}

/// A protobuf field with bytes.
fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    let mut buf = unsigned_varint::encode::usize_buffer();
    let len = unsigned_varint::encode::usize(bytes.len(), &mut buf);
    [&[tag << 3 | 2], len, bytes].concat()
}

/// A UnixFS node: 1 is a folder, 2 a file, 4 a symbolic link, 5 a shard.
fn node(kind: u64, data: &[u8], links: &[(&str, Cid)], more: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, cid) in links {
        let link = [field(1, &cid.to_bytes()), field(2, name.as_bytes())].concat();
        out.extend(field(2, &link));
    }
    let mut unixfs = number(1, kind);
    if !data.is_empty() {
        unixfs.extend(field(2, data));
    }
    unixfs.extend(more);
    out.extend(field(1, &unixfs));
    out
}

/// A file in a folder, a link and a list, and the CIDs of all.
fn sample() -> (Vec<Cid>, Blocks) {
    let mut all = Blocks::new();
    let leaf = put(&mut all, RAW, b"leaf".to_vec());
    let sizes = [number(3, 8), number(4, 4), number(4, 4)].concat();
    let file = node(2, b"", &[("", leaf), ("", leaf)], &sizes);
    let file = put(&mut all, DAG_PB, file);
    let link = put(&mut all, DAG_PB, node(4, b"../x", &[], b""));
    let folder = node(1, b"", &[("file", file), ("link", link)], b"");
    let folder = put(&mut all, DAG_PB, folder);
    let list = [file, folder].map(|c| serde_ipld_dagcbor::to_vec(&c).unwrap());
    let list = put(&mut all, DAG_CBOR, [&[0x82], &list.concat()[..]].concat());
    (vec![list, folder, file, link, leaf], all)
}

/// At a place, so many bytes are replaced by others.
type Splice = (Index, usize, Vec<u8>);

fn damage() -> impl Strategy<Value = Vec<Splice>> {
    let few = || prop::collection::vec(any::<u8>(), 1..4);
    let varint = any::<u64>().prop_map(|n| {
        let mut buf = unsigned_varint::encode::u64_buffer();
        unsigned_varint::encode::u64(n, &mut buf).to_vec()
    });
    let splice = prop_oneof![
        4 => few().prop_map(|new| (new.len(), new)),
        2 => few().prop_map(|new| (0, new)),
        2 => (1usize..80).prop_map(|lost| (lost, Vec::new())),
        1 => Just((usize::MAX, Vec::new())),
        2 => varint.prop_map(|long| (1, long)),
    ];
    let splice = (any::<Index>(), splice).prop_map(|(at, (lost, new))| (at, lost, new));
    prop::collection::vec(splice, 1..3)
}

fn damaged(bytes: &[u8], damage: &[Splice]) -> Vec<u8> {
    damage
        .iter()
        .fold(bytes.to_vec(), |bytes, (at, lost, new)| {
            let at = at.index(bytes.len() + 1);
            let end = at.saturating_add(*lost).min(bytes.len());
            [&bytes[..at], new, &bytes[end..]].concat()
        })
}

/// The largest buffer that a reader asked to be filled, and what it got.
struct Watched<'a> {
    from: &'a [u8],
    largest: usize,
}

impl Read for &mut Watched<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.largest = self.largest.max(buf.len());
        self.from.read(buf)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn a_damaged_car_gives_only_what_its_cids_name(second in any::<bool>(), damage in damage()) {
        let (cids, all) = sample();
        let mut car = CarWriter::new(Vec::new(), &cids[..1]).unwrap();
        for cid in &cids {
            car.write(cid, &all[cid]).unwrap();
        }
        let mut good = car.finish().unwrap();
        if second {
            let mut v2 = b"\x0a\xa1\x67version\x02".to_vec();
            v2.extend([0; 16]);
            for n in [51, good.len() as u64, 51 + good.len() as u64] {
                v2.extend(n.to_le_bytes());
            }
            good = [v2, good, b"\x81\x08".to_vec()].concat();
        }
        let bytes = damaged(&good, &damage);
        let mut from = Watched { from: &bytes, largest: 0 };
        match CarReader::new(&mut from) {
            Ok(mut reader) => {
                let mut sum = 0;
                for block in &mut reader {
                    let Ok(block) = block else { break };
                    prop_assert!(verify(&block.cid, &block.data).is_ok());
                    let at = usize::try_from(block.offset).unwrap();
                    prop_assert_eq!(&bytes[at..at + block.data.len()], &block.data[..]);
                    sum += block.data.len();
                }
                prop_assert!(sum <= bytes.len());
                prop_assert!(reader.next().is_none(), "it ends with its first error");
            }
            Err(e) => prop_assert!(!e.fix().is_empty() && e.to_string().len() < 500, "{e}"),
        }
        let most = usize::try_from(MAX_BLOCK.max(MAX_HEADER)).unwrap() + 1_024;
        prop_assert!(from.largest <= most);
    }

    /// Nodes that are what their CIDs name, and mean something else than was meant.
    #[test]
    fn a_walk_through_damaged_nodes_ends(
        damage in prop::collection::vec(proptest::option::of(damage()), 5),
        range in proptest::option::of((any::<i64>(), proptest::option::of(any::<i64>()))),
        scope in 0usize..3, path in prop::collection::vec("(file|link|0|1|x)", 0..3), duplicates in any::<bool>(),
    ) {
        let (cids, mut all) = sample();
        for (cid, damage) in cids.iter().zip(damage) {
            let Some(damage) = damage else { continue };
            // Who links to it has the old CID, so that it is dangling.
            let data = damaged(&all[cid], &damage);
            put(&mut all, cid.codec(), data);
        }
        let select = Selector {
            scope: [Scope::Block, Scope::Entity, Scope::All][scope],
            bytes: range.map(|(from, to)| ByteRange { from, to }),
            duplicates,
        };
        for root in all.keys() {
            let mut reads = 0;
            let get = |cid: &Cid| {
                reads += 1;
                Ok(all.get(cid).cloned())
            };
            if let Ok(walk) = Walk::new(root, &path, select, get) {
                let mut ended = false;
                for block in walk {
                    prop_assert!(!ended, "it ends with its first error");
                    match block {
                        Ok((cid, data)) => prop_assert_eq!(all.get(&cid), Some(&data)),
                        Err(e) => {
                            ended = true;
                            prop_assert!(e.to_string().len() < 1_000);
                        }
                    }
                }
            }
            prop_assert!(reads < 1_000, "{reads}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn damaged_nodes_are_exported_inside_of_the_folder(damage in damage(), which in 1usize..4) {
        let (cids, mut all) = sample();
        let data = damaged(&all[&cids[which]], &damage);
        let root = put(&mut all, DAG_PB, data);
        let tmp = tempfile::tempdir().unwrap();
        let out = tmp.path().join("a/out");
        fs::create_dir(tmp.path().join("a")).unwrap();
        let mut get = getter(&all);
        if let Err(e) = export(&root, &mut get, &out) {
            prop_assert!(!e.fix().is_empty() && !e.to_string().is_empty());
        }
        let outside = fs::read_dir(tmp.path().join("a")).unwrap();
        prop_assert!(outside.count() <= 1);
        prop_assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    }
}

#[test]
fn names_that_lead_elsewhere_are_not_written() {
    let mut all = Blocks::new();
    let leaf = put(&mut all, RAW, b"evil".to_vec());
    for name in ["..", ".", "", "/tmp/x", "a/b", "../../x", "a\0b"] {
        let root = put(&mut all, DAG_PB, node(1, b"", &[(name, leaf)], b""));
        let tmp = tempfile::tempdir().unwrap();
        let out = tmp.path().join("out");
        let refused = export(&root, &mut getter(&all), &out).unwrap_err();
        assert!(
            matches!(&refused, ExportError::Name(n) if n == name),
            "{refused}"
        );
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    }
    // A link that leads out, and then a file and a folder of its name.
    let tmp = tempfile::tempdir().unwrap();
    let target = tmp.path().join("target");
    fs::create_dir(&target).unwrap();
    let link = node(4, target.as_os_str().as_encoded_bytes(), &[], b"");
    let link = put(&mut all, DAG_PB, link);
    let folder = put(&mut all, DAG_PB, node(1, b"", &[("x", leaf)], b""));
    for (n, other) in [leaf, folder].into_iter().enumerate() {
        for (m, both) in [[link, other], [other, link]].into_iter().enumerate() {
            let root = put(&mut all, DAG_PB, node(1, b"", &both.map(|c| ("a", c)), b""));
            let out = tmp.path().join(format!("{n}{m}"));
            let refused = export(&root, &mut getter(&all), &out).unwrap_err();
            assert!(matches!(refused, ExportError::Write { .. }), "{refused}");
            assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
        }
    }
}

/// Two links to each node below, with nothing in any of them: 2^40 ways that lead to nothing.
#[test]
fn an_export_of_nothing_over_and_over_ends() {
    let mut all = Blocks::new();
    let mut file = put(&mut all, RAW, Vec::new());
    for _ in 0..40 {
        file = put(
            &mut all,
            DAG_PB,
            node(2, b"", &[("", file), ("", file)], b""),
        );
    }
    let mut sink = io::sink();
    let endless = cat(&file, &mut getter(&all), &mut sink).unwrap_err();
    assert!(matches!(endless, ExportError::TooWide), "{endless}");
    // The same in shards of a folder, of 256 names each.
    let fanout = [number(5, 0x22), number(6, 256)].concat();
    let mut shard = put(&mut all, DAG_PB, node(5, b"\x01", &[], &fanout));
    for _ in 0..40 {
        let links = [("00", shard), ("01", shard)];
        shard = put(&mut all, DAG_PB, node(5, b"\x01", &links, &fanout));
    }
    let tmp = tempfile::tempdir().unwrap();
    let endless = export(&shard, &mut getter(&all), &tmp.path().join("out")).unwrap_err();
    assert!(matches!(endless, ExportError::TooWide), "{endless}");
    // What has bytes is written as often as it is there: a file of zeros is such a one.
    let mut zeros = put(&mut all, RAW, vec![0; 64]);
    for _ in 0..14 {
        zeros = put(
            &mut all,
            DAG_PB,
            node(2, b"", &[("", zeros), ("", zeros)], b""),
        );
    }
    let mut out = Vec::new();
    assert_eq!(cat(&zeros, &mut getter(&all), &mut out).unwrap(), 64 << 14);
    out.flush().unwrap();
    assert_eq!(out.len(), 64 << 14);
}

/// A block that names itself cannot be made; a source that pretends so is found out.
#[test]
fn a_circle_is_no_dag() {
    let mut all = Blocks::new();
    let leaf = put(&mut all, RAW, b"x".to_vec());
    let inner = put(&mut all, DAG_PB, node(1, b"", &[("a", leaf)], b""));
    let outer = put(&mut all, DAG_PB, node(1, b"", &[("a", inner)], b""));
    let round = all[&outer].clone();
    all.insert(inner, round);
    let walk = Walk::new(&outer, &[], Selector::default(), getter(&all)).unwrap();
    let got: Vec<_> = walk.collect();
    assert_eq!(got.len(), 2);
    assert!(got[1].is_err(), "{got:?}");
    let path = vec!["a".to_owned(); 200];
    assert!(Walk::new(&outer, &path, Selector::default(), getter(&all)).is_err());
    let tmp = tempfile::tempdir().unwrap();
    let refused = export(&outer, &mut getter(&all), &tmp.path().join("o")).unwrap_err();
    assert!(matches!(refused, ExportError::Corrupt(_)), "{refused}");
}
