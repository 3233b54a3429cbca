//! A long chain, with removals, as an indexer that knows nothing of it yet takes it in.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// Applies a whole chain: the newest advertisement is read first, and one whose content was taken
/// back or replaced by a newer one is skipped, as storetheindex does it, because its entries may be
/// gone. Returns how many advertisements there are, how many of them are removals, and what is
/// advertised by context.
async fn taken_in(spoke: &Spoke) -> (usize, usize, BTreeMap<Vec<u8>, BTreeSet<Vec<u8>>>) {
    let (mut ads, mut removals) = (0, 0);
    let mut settled = BTreeSet::new();
    let mut held = BTreeMap::new();
    let mut next = spoke.head().await;
    while let Some(cid) = next {
        let ad = spoke.block(&cid).await;
        check_signature(&ad);
        ads += 1;
        next = ad.get("PreviousID").map(link);
        let context = bytes(&ad["ContextID"]).to_vec();
        let is_rm = ad["IsRm"] == Ipld::Bool(true);
        removals += usize::from(is_rm);
        if !settled.insert(context.clone()) || is_rm {
            continue;
        }
        let mut hashes = BTreeSet::new();
        let mut entries = Some(link(&ad["Entries"]));
        while let Some(at) = entries {
            let chunk = spoke.block(&at).await;
            let Ipld::List(list) = &chunk["Entries"] else {
                panic!("no entries")
            };
            hashes.extend(list.iter().map(|h| bytes(h).to_vec()));
            entries = chunk.get("Next").map(link);
        }
        held.insert(context, hashes);
    }
    (ads, removals, held)
}

/// Time for hundreds of pieces on a slow disk.
const LONG: Duration = Duration::from_secs(300);

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_advertisements_with_removals_are_taken_in() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let cars: Vec<_> = (0..350).map(|salt| car(3, salt)).collect();
    let all: Vec<_> = cars.iter().map(|(_, c)| hub.add(c, indexed())).collect();
    let spoke = Spoke::start(&hub, tmp.path(), IndexingConfig::default()).await;
    spoke.indexed_within(350, LONG).await;
    for piece in &all[..150] {
        hub.set_phase(&piece.cid, PiecePhase::Withdrawn);
    }
    spoke.indexed_within(200, LONG).await;

    let (ads, removals, held) = taken_in(&spoke).await;
    assert_eq!((ads, removals), (1000, 300));
    let mut want = BTreeMap::new();
    for (info, (cids, _)) in all.iter().zip(&cars).skip(150) {
        let blocks = cids.iter().map(|c| c.hash().to_bytes()).collect();
        want.insert(info.cid.cid().to_bytes(), blocks);
        let both = [info.cid.cid(), info.cid_v2()].map(|c| c.hash().to_bytes());
        want.insert(info.cid_v2().to_bytes(), BTreeSet::from(both));
    }
    assert!(
        held == want,
        "an indexer holds what is there, and nothing else"
    );
    for (n, (cids, _)) in cars.iter().enumerate() {
        let (status, _) = spoke.get(&format!("/cid/{}", cids[2]), "*/*").await;
        assert_eq!(status, if n < 150 { 404 } else { 200 }, "piece {n}");
    }
    spoke.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_with_the_same_blocks_do_not_take_each_others_chunks() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = fake_hub();
    let (cids, one) = car(5, 1);
    // The same blocks under another header.
    let mut other = CarWriter::new(Vec::new(), &cids[..2]).unwrap();
    for (cid, i) in cids.iter().zip(0u32..) {
        let data = [1u32.to_be_bytes(), i.to_be_bytes()].concat();
        other.write(cid, &data).unwrap();
    }
    let quiet = Use {
        announce_piece: false,
        ..indexed()
    };
    let one = hub.add(&one, quiet.clone());
    let other = hub.add(&other.finish().unwrap(), quiet);
    let spoke = Spoke::start(&hub, tmp.path(), IndexingConfig::default()).await;
    spoke.indexed_within(2, LONG).await;
    let (_, _, held) = taken_in(&spoke).await;
    assert_eq!(held.len(), 2);
    hub.set_phase(&one.cid, PiecePhase::Withdrawn);
    spoke.indexed_within(1, LONG).await;
    let (ads, _, held) = taken_in(&spoke).await;
    assert_eq!(ads, 3);
    let blocks = cids.iter().map(|c| c.hash().to_bytes()).collect();
    assert_eq!(held, BTreeMap::from([(other.cid.cid().to_bytes(), blocks)]));
    spoke.end().await;
}
