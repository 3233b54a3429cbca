//! The demo with several deals of different kinds, nothing going wrong.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use cid::Cid;
use ipld_core::ipld;
use lotus_car::{CarWriter, DAG_CBOR};
use lotus_e2e::{Net, NetConfig, demo, secs};
use multihash_codetable::{Code, MultihashDigest as _};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cars_of_every_kind_are_sealed_and_come_back() {
    let net = Net::start(&NetConfig::default()).await.unwrap();
    net.ready(secs(120)).await.unwrap();
    let cars = ["files.car", "v2.car", "cbor.car"].map(|name| net.root().join(name));
    files(&net.root().join("a"), 700_000, &cars[0]);
    files(&net.root().join("b"), 300_000, &cars[1]);
    wrap(&cars[1]);
    cbor(&cars[2]);

    let report = demo::run(&net, &cars, &mut demo::Lines::default())
        .await
        .unwrap();
    assert!(report.ok, "{report:?}\n{}", net.logs());
    assert_eq!(report.deals.len(), 3);
    let all = net.status().await.unwrap();
    assert!(all.iter().all(|p| p.restarts == 0), "{all:?}");
    net.stop().await.unwrap();
}

/// A CARv1 of a folder of files.
fn files(dir: &Path, len: usize, car: &Path) {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(len as u64).fill(&mut bytes[..]);
    std::fs::create_dir_all(dir.join("below")).unwrap();
    std::fs::write(dir.join("large"), bytes).unwrap();
    std::fs::write(dir.join("below/small"), format!("{len}")).unwrap();
    std::fs::write(dir.join("below/empty"), "").unwrap();
    lotus_car::pack_dir(dir, car).unwrap();
}

/// Turns a CARv1 into a CARv2 without an index: pragma, header, the CARv1.
fn wrap(car: &Path) {
    let inner = std::fs::read(car).unwrap();
    let mut out = b"\x0a\xa1\x67version\x02".to_vec();
    // Characteristics; offset and size of the data; offset of the index, none.
    out.extend([0; 16]);
    for n in [51, inner.len() as u64, 0] {
        out.extend(n.to_le_bytes());
    }
    out.extend(inner);
    std::fs::write(car, out).unwrap();
}

/// A CARv1 of dag-cbor with two roots that share a block.
fn cbor(car: &Path) {
    let encode = |node: &ipld::Ipld| {
        let bytes = serde_ipld_dagcbor::to_vec(node).unwrap();
        (Cid::new_v1(DAG_CBOR, Code::Sha2_256.digest(&bytes)), bytes)
    };
    let shared = encode(&ipld!({ "what": "shared", "n": 7 }));
    let mut blocks = vec![shared.clone()];
    let mut roots = Vec::new();
    for name in ["first", "second"] {
        let leaf = encode(&ipld!({ "leaf": name, "bytes": [1, 2, 3] }));
        let root = encode(&ipld!({ "name": name, "links": [leaf.0, shared.0] }));
        roots.push(root.0);
        blocks.extend([leaf, root]);
    }
    let mut writer = CarWriter::new(Vec::new(), &roots).unwrap();
    for (cid, bytes) in &blocks {
        writer.write(cid, bytes).unwrap();
    }
    std::fs::write(car, writer.finish().unwrap()).unwrap();
}
