//! Programs of others against the index: see `peers.rs`.

use std::collections::BTreeMap;

use cid::Cid;
use lotus_car::{CarWriter, section_prefix};
use lotus_e2e::peers;
use lotus_piece_index::PieceIndex;
use lotus_types::{Commitment, PieceCid};
use multihash_codetable::{Code, MultihashDigest};
use tokio::process::Command;

/// The lists of what pieces hold are CARv2 indexes that go-car reads, with the offsets that it would
/// find itself.
#[tokio::test]
#[ignore = "needs go: cargo xtask peers"]
async fn go_car() {
    let Some(reader) = peers::installed("go-car", peers::go_here("go-car").await) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let index = PieceIndex::open(&dir.path().join("index.redb")).unwrap();
    for (n, blocks) in [0u32, 1, 7, 40_000].into_iter().enumerate() {
        // Two hash functions, and each block twice.
        let data: Vec<_> = (0..blocks).map(|b| [b.to_be_bytes(); 9].concat()).collect();
        let cid = |b: &Vec<u8>| {
            let code = if b[3].is_multiple_of(3) {
                Code::Blake2b256
            } else {
                Code::Sha2_256
            };
            Cid::new_v1(0x55, code.digest(b))
        };
        let root = cid(&vec![0; 36]);
        let mut car = CarWriter::new(Vec::new(), &[root]).unwrap();
        for block in data.iter().chain(&data) {
            car.write(&cid(block), block).unwrap();
        }
        let car = car.finish().unwrap();
        let piece = PieceCid::new(Commitment([u8::try_from(n).unwrap(); 32]));
        assert_eq!(index.add_car(&piece, &car[..]).unwrap(), u64::from(blocks));

        let list = index.sidecar_path(&piece);
        let printed = peers::run(Command::new(&reader).arg(&list), peers::RUN)
            .await
            .unwrap();
        let read: BTreeMap<&str, usize> = printed
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(hash, at)| (hash, at.parse().unwrap()))
            .collect();
        assert_eq!(printed.lines().count(), data.len());
        assert_eq!(read.len(), data.len());
        for block in &data {
            let cid = cid(block);
            let hex: String = cid
                .hash()
                .to_bytes()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            let at = read[&hex[..]];
            let section = [section_prefix(&cid, block.len()), block.clone()].concat();
            assert_eq!(car[at..at + section.len()], section, "{cid}");
        }
    }
}
