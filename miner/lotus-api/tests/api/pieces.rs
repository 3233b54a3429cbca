//! Data in both directions: streams to the hub, raw pieces from it.

use lotus_proofs::fr32_pad;
use lotus_tokens::Perm;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::rig::{LIMIT, Rig, raw};

const CID: &str = "baga6ea4seaqao7s73y24kcutaosvacpdjgfe5pw76ooefnyqw4ynr3d2y6x2mpq";

/// A deal with an allocation, as Boost hands it over.
pub(crate) fn deal(allocation: u64) -> Value {
    json!({
        "PublishCid": null, "DealID": 0, "DealProposal": null,
        "DealSchedule": {"StartEpoch": 10, "EndEpoch": 900},
        "PieceActivationManifest": {"CID": {"/": CID}, "Size": 2048,
            "VerifiedAllocationKey": {"Client": 1004, "ID": allocation}, "Notify": null},
        "KeepUnsealed": true,
    })
}

fn push(id: Uuid) -> Value {
    json!({"Type": "push", "Info": id.to_string()})
}

/// Sends a stream as go-jsonrpc does: HEAD, then POST. Callers of the old kind begin with POST.
async fn send(rig: &Rig, id: Uuid, head: bool, body: Vec<u8>) -> u16 {
    let url = format!("http://{}/rpc/streams/v0/push/{id}", rig.addr);
    if head {
        let wanted = rig.http.head(&url).send().await.unwrap();
        assert_eq!(wanted.status(), 200);
    }
    let sent = rig.http.post(&url).body(body).send().await.unwrap();
    sent.status().as_u16()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_and_its_call_find_each_other() {
    let rig = Rig::start(|_| ()).await;
    let mut full = raw();
    full.resize(2032, 0);
    let want = lotus_proofs::commp(full.as_slice()).unwrap();
    for head in [true, false] {
        // Shorter data is extended with zeros.
        for body in [raw(), full.clone()] {
            let id = Uuid::new_v4();
            let call = rig.result("ComputeDataCid", json!([2032, push(id)]));
            let both = async { tokio::join!(call, send(&rig, id, head, body)) };
            let (found, sent) = tokio::time::timeout(LIMIT, both).await.unwrap();
            let cid = want.cid.to_string();
            assert_eq!(found, json!({"Size": 2048, "PieceCID": {"/": cid}}));
            assert_eq!(sent, 200);
        }
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_too_long_ends_both() {
    let rig = Rig::start(|_| ()).await;
    let admin = rig.token(Perm::Admin);
    let id = Uuid::new_v4();
    let call = rig.call(
        Some(&admin),
        "Filecoin.ComputeDataCid",
        json!([127, push(id)]),
    );
    let both = async { tokio::join!(call, send(&rig, id, true, vec![1; 128])) };
    let (answer, sent) = tokio::time::timeout(LIMIT, both).await.unwrap();
    let why = answer["error"]["message"].as_str().unwrap();
    assert!(why.contains("more than the 127 bytes"), "{answer}");
    assert_eq!(sent, 500);

    for (params, why) in [
        (json!([128, push(id)]), "unpadded"),
        (json!([4064, push(id)]), "does not hold"),
        (
            json!([127, {"Type": "http", "Info": "http://x"}]),
            "push it",
        ),
        (
            json!([127, {"Type": "push", "Info": "x"}]),
            "no id of a stream",
        ),
        (
            json!([127, {"Type": "null", "Info": "128"}]),
            "128 zeros are more",
        ),
        (json!([127, {"Type": "null", "Info": "0"}]), "empty"),
        (json!([127, {}]), "no reader stream"),
    ] {
        let answer = rig
            .call(Some(&admin), "Filecoin.ComputeDataCid", params.clone())
            .await;
        let said = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(said.contains(why), "{params} {answer}");
    }
    let denied = rig
        .call(None, "Filecoin.ComputeDataCid", json!([127, push(id)]))
        .await;
    assert!(
        denied["error"]["message"]
            .as_str()
            .unwrap()
            .contains("need 'admin'")
    );
    let url = format!("http://{}/rpc/streams/v0/push/", rig.addr);
    let put = rig.http.put(format!("{url}{id}")).send().await.unwrap();
    assert_eq!(put.status(), 405);
    let nameless = rig.http.post(format!("{url}x")).send().await.unwrap();
    assert_eq!(nameless.status(), 400);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deal_is_taken_once() {
    let rig = Rig::start(|c| c.call_secs = 1).await;
    let id = Uuid::new_v4();
    let mut full = raw();
    full.resize(2032, 0);
    let call = rig.result("SectorAddPieceToAny", json!([2032, push(id), deal(1)]));
    let both = async { tokio::join!(call, send(&rig, id, true, full.clone())) };
    let (place, sent) = tokio::time::timeout(LIMIT, both).await.unwrap();
    assert_eq!((place, sent), (json!({"Sector": 9, "Offset": 0}), 200));
    // Again, as after a crash of the caller: the data is not asked for.
    let again = rig.result(
        "SectorAddPieceToAny",
        json!([2032, push(Uuid::new_v4()), deal(1)]),
    );
    let again = tokio::time::timeout(LIMIT, again).await.unwrap();
    assert_eq!(again, json!({"Sector": 9, "Offset": 0}));
    {
        let taken = rig.hub.taken.lock().unwrap();
        assert_eq!((taken.len(), &taken[0].1), (1, &full));
        assert_eq!(taken[0].0.piece.cid.to_string(), CID);
        assert_eq!(taken[0].0.allocation.map(|a| (a.0.0, a.1)), Some((1004, 1)));
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raw_pieces_are_read_as_from_lotus() {
    let rig = Rig::start(|_| ()).await;
    let admin = rig.token(Perm::Admin);
    let sector = json!({"Miner": 1000, "Number": 7});
    let find = || rig.result("StorageFindSector", json!([sector, 1, 2048, true]));
    let url = format!("http://{}/remote/unsealed/s-t01000-7", rig.addr);
    let get = async |path: &str, range: Option<&str>| {
        let mut request = rig.http.get(format!("{url}{path}")).bearer_auth(&admin);
        if let Some(range) = range {
            request = request.header("range", range);
        }
        let answer = request.send().await.unwrap();
        (answer.status().as_u16(), answer.bytes().await.unwrap())
    };

    // Nothing is there until it is unsealed.
    assert_eq!(find().await, json!([]));
    assert_eq!(get("/5/allocated/0/2032", None).await.0, 416);
    assert_eq!(get("", Some("bytes=0-127")).await.0, 416);
    let piece = json!([{"ID": sector, "ProofType": 5}, 0, 2032, "", null]);
    rig.result("SectorsUnsealPiece", piece).await;

    let found = find().await;
    assert_eq!(found[0]["URLs"], json!([url]), "{found}");
    assert_eq!(get("/5/allocated/0/2032", None).await.0, 200);
    assert_eq!(get("/5/allocated/127/2032", None).await.0, 416);
    let mut full = raw();
    full.resize(2032, 0);
    let want = fr32_pad(&full);
    assert_eq!(get("", None).await, (200, want.clone().into()));
    assert_eq!(
        get("", Some("bytes=128-383")).await,
        (206, want[128..384].to_vec().into())
    );

    // Only read, only unsealed data, only with a token of admin.
    let deleted = rig
        .http
        .delete(&url)
        .bearer_auth(&admin)
        .send()
        .await
        .unwrap();
    assert_eq!(deleted.status(), 405);
    for (url, token, status) in [
        (url.clone(), Some(rig.token(Perm::Sign)), 401),
        (url.clone(), None, 401),
        (url.replace("unsealed", "sealed"), Some(admin.clone()), 404),
        (
            url.replace("s-t01000-7", "s-t01000-70"),
            Some(admin.clone()),
            404,
        ),
        (
            url.replace("s-t01000-7", "s-t01001-7"),
            Some(admin.clone()),
            404,
        ),
    ] {
        let mut request = rig.http.get(&url);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        assert_eq!(request.send().await.unwrap().status(), status, "{url}");
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_are_told_and_nothing_is_changed() {
    let rig = Rig::start(|c| c.url = "https://hub.example/".into()).await;
    let admin = rig.token(Perm::Admin);
    let id = |number: u64| json!({"Miner": 1000, "Number": number});
    let found = rig
        .result("StorageFindSector", json!([id(7), 2, 2048, false]))
        .await;
    assert_eq!(
        (&found[0]["ID"], &found[0]["URLs"]),
        (&json!("hdd"), &json!([])),
        "{found}"
    );
    let piece = json!([{"ID": id(7), "ProofType": 5}, 0, 1, "", null]);
    rig.result("SectorsUnsealPiece", piece).await;
    let found = rig
        .result("StorageFindSector", json!([id(7), 1, 2048, false]))
        .await;
    assert_eq!(found[0]["BaseURLs"], json!(["https://hub.example/remote"]));

    // A lock to read is given and not held: there is nothing that it could hold up.
    for _ in 0..2 {
        assert_eq!(
            rig.result("StorageTryLock", json!([id(7), 1, 0])).await,
            true
        );
        assert_eq!(
            rig.result("StorageLock", json!([id(7), 1, 0])).await,
            Value::Null
        );
    }
    assert_eq!(
        rig.result("StorageTryLock", json!([id(7), 1, 2])).await,
        false
    );
    for (method, params) in [
        ("StorageLock", json!([id(7), 1, 2])),
        ("StorageLock", json!([id(70), 1, 0])),
        ("StorageLock", json!([{"Miner": 1001, "Number": 7}, 1, 0])),
        ("StorageDeclareSector", json!(["hdd", id(9), 2, true])),
        ("StorageDropSector", json!(["hdd", id(7), 2])),
        ("StorageDropSector", json!(["none", id(7), 2])),
        ("StorageBestAlloc", json!([2, 100, "sealing", 1000])),
        ("StorageReportHealth", json!(["none", {}])),
        (
            "SectorsUnsealPiece",
            json!([{"ID": id(7), "ProofType": 5}, 2032, 1, "", null]),
        ),
    ] {
        let name = format!("Filecoin.{method}");
        let answer = rig.call(Some(&admin), &name, params).await;
        assert_eq!(answer["error"]["code"], 1, "{method} {answer}");
        let denied = rig
            .call(Some(&rig.token(Perm::Sign)), &name, json!([]))
            .await;
        let why = denied["error"]["message"].as_str().unwrap();
        assert!(why.contains("need 'admin'"), "{method} {denied}");
    }
    rig.end().await;
}
