//! The API over real sockets, against what Lotus publishes about it.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod pieces;
mod rig;

use std::collections::{BTreeMap, BTreeSet};

use jsonrpsee::core::client::ClientT as _;
use jsonrpsee::rpc_params;
use jsonrpsee::ws_client::WsClientBuilder;
use lotus_api::{LotusApi, LotusApiConfig, METHODS};
use lotus_tokens::Perm;
use rig::{LIMIT, Rig};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

#[derive(Deserialize)]
struct Published {
    methods: BTreeMap<String, PublishedMethod>,
}

#[derive(Deserialize)]
struct PublishedMethod {
    perm: String,
    params: usize,
    result: Value,
}

/// Whether a value has a published shape. `null` in a shape is an example without a value.
fn agrees(shape: &Value, value: &Value, at: &str) -> Result<(), String> {
    let wrong = || Err(format!("{at}: {value} is not {shape}"));
    match shape {
        Value::String(kind) => {
            let fine = match kind.as_str() {
                "string" => value.is_string() || value.is_null(),
                "number" => value.is_number(),
                "bool" => value.is_boolean(),
                "cid" => value.is_null() || value["/"].is_string(),
                _ => true,
            };
            if fine { Ok(()) } else { wrong() }
        }
        Value::Array(one) => match (value, one.first()) {
            (Value::Null, _) | (Value::Array(_), None) => Ok(()),
            (Value::Array(all), Some(one)) => all
                .iter()
                .try_for_each(|v| agrees(one, v, &format!("{at}[]"))),
            _ => wrong(),
        },
        Value::Object(fields) => match value {
            Value::Null => Ok(()),
            Value::Object(found) => match fields.get("*") {
                Some(one) => found
                    .iter()
                    .try_for_each(|(k, v)| agrees(one, v, &format!("{at}.{k}"))),
                // An `interface{}` has no published fields.
                None if fields.is_empty() => Ok(()),
                None => {
                    let (want, have): (BTreeSet<_>, BTreeSet<_>) =
                        (fields.keys().collect(), found.keys().collect());
                    if want != have {
                        return Err(format!("{at}: fields {have:?}, published {want:?}"));
                    }
                    fields
                        .iter()
                        .try_for_each(|(k, s)| agrees(s, &found[k], &format!("{at}.{k}")))
                }
            },
            _ => wrong(),
        },
        _ => Ok(()),
    }
}

fn sector(number: u64) -> Value {
    json!({"Miner": 1000, "Number": number})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_agrees_with_what_lotus_publishes() {
    let published: Published =
        serde_json::from_str(include_str!("../data/lotus-openrpc.json")).unwrap();
    let names: Vec<&str> = METHODS.iter().map(|m| m.name).collect();
    let known: Vec<&str> = published.methods.keys().map(String::as_str).collect();
    assert_eq!(names, known);

    let rig = Rig::start(|_| ()).await;
    let token = rig.token(Perm::Read);
    let paths = rig.result("StorageLocal", json!([])).await;
    let path = paths.as_object().unwrap().keys().next().unwrap().clone();
    for method in METHODS {
        let wanted = &published.methods[method.name];
        assert_eq!(method.perm.name(), wanted.perm, "{method:?}");
        assert_eq!(method.params.len(), wanted.params, "{method:?}");
        let params = match method.name {
            "ActorSectorSize" => json!(["t01000"]),
            "AuthNew" => json!([["read"]]),
            "AuthVerify" => json!([token]),
            "SealingSchedDiag" => json!([true]),
            "SectorsListInStates" => json!([["Proving", "NoSuchState"]]),
            "SectorsStatus" => json!([7, true]),
            "StorageInfo" | "StorageStat" => json!([path]),
            "ComputeDataCid" => json!([2032, {"Type": "null", "Info": "2032"}]),
            "SectorAddPieceToAny" => {
                json!([2032, {"Type": "null", "Info": "2032"}, pieces::deal(1)])
            }
            "SectorsUnsealPiece" => {
                json!([{"ID": sector(7), "ProofType": 5}, 0, 2032, "", null])
            }
            "StorageBestAlloc" => json!([2, 100, "storage", 1000]),
            "StorageDeclareSector" => json!([path, sector(7), 2, true]),
            "StorageDropSector" => json!([path, sector(9), 2]),
            "StorageFindSector" => json!([sector(7), 3, 2048, false]),
            "StorageLock" | "StorageTryLock" => json!([sector(7), 1, 0]),
            "StorageRedeclareLocal" => json!([null, true]),
            "StorageReportHealth" => json!([path, {"Stat": {}, "Err": "slow"}]),
            _ => json!([]),
        };
        let result = rig.result(method.name, params).await;
        agrees(&wanted.result, &result, method.name).unwrap();
    }
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answers_are_the_hubs() {
    let rig = Rig::start(|_| ()).await;
    for (method, params, want) in [
        ("ActorAddress", json!([]), json!("t01000")),
        ("ActorSectorSize", json!(["f01000"]), json!(2048)),
        ("SectorsList", json!(null), json!([7, 8, 9])),
        (
            "SectorsSummary",
            json!([]),
            json!({"Proving": 1, "PreCommit1": 1, "WaitDeals": 1}),
        ),
        ("SectorsListInStates", json!([["Proving"]]), json!([7])),
        ("SectorsListInStates", json!([[]]), json!([])),
    ] {
        assert_eq!(rig.result(method, params).await, want, "{method}");
    }
    let version = rig.result("Version", json!([])).await;
    assert_eq!(version["APIVersion"], 0x10500, "{version}");
    assert_eq!(version["BlockDelay"], 30);

    let status = rig.result("SectorsStatus", json!([7, false])).await;
    assert_eq!(
        (&status["State"], &status["SealProof"]),
        (&json!("Proving"), &json!(5))
    );
    assert_eq!(
        (&status["Activation"], &status["InitialPledge"]),
        (&json!(0), &json!("0"))
    );
    assert_eq!(status["Ticket"]["Value"].as_str().unwrap().len(), 44);
    assert_eq!(
        status["Pieces"][0]["DealInfo"]["DealSchedule"]["EndEpoch"],
        800
    );
    assert_eq!(status["Log"][0]["Timestamp"], 1_700_000_000);
    let chain = rig.result("SectorsStatus", json!([7, true])).await;
    assert_eq!(chain["InitialPledge"], "1000000000000000001");
    assert_eq!(
        (&chain["Expiration"], &chain["Early"]),
        (&json!(900), &json!(77))
    );

    let decls = rig.result("StorageList", json!([])).await;
    let at = |number: u64, files: u64| json!([{"Miner": 1000, "Number": number, "SectorFileType": files}]);
    assert_eq!(decls, json!({"hdd": at(7, 6), "not-mounted": at(8, 2)}));
    let local = rig.result("StorageLocal", json!([])).await;
    assert_eq!(
        local,
        json!({"hdd": "/mnt/hdd", "not-mounted": "/mnt/lost"})
    );
    let info = rig.result("StorageInfo", json!(["hdd"])).await;
    assert_eq!(
        (&info["ID"], &info["Weight"]),
        (&json!("hdd"), &json!(3)),
        "{info}"
    );
    assert_eq!(
        (&info["CanSeal"], &info["CanStore"], &info["Groups"]),
        (&json!(false), &json!(true), &json!(["cold"]))
    );
    let stat = rig.result("StorageStat", json!(["hdd"])).await;
    assert_eq!(
        stat,
        json!({"Capacity": 10_000, "Available": 600, "FSAvailable": 900, "Reserved": 100,
            "Max": 1_000, "Used": 300})
    );
    let lost = rig.result("StorageInfo", json!(["not-mounted"])).await;
    assert_eq!(lost["CanStore"], json!(false), "{lost}");
    let jobs = rig.result("WorkerJobs", json!([])).await;
    let stats = rig.result("WorkerStats", json!([])).await;
    let (worker, jobs) = jobs.as_object().unwrap().iter().next().unwrap();
    // The one without a sector and the one that waits are no jobs of Lotus' kind.
    assert_eq!(jobs.as_array().unwrap().len(), 1);
    assert_eq!(jobs[0]["Task"], "seal/v0/precommit/1");
    assert_eq!(jobs[0]["Start"], "2023-11-14T22:13:20Z");
    assert_eq!(stats[worker]["TaskCounts"]["5:seal/v0/precommit/1"], 1);
    assert!(stats[worker]["MemUsedMax"].as_u64().unwrap() > 0);
    let diag = rig.result("SealingSchedDiag", json!([false])).await;
    assert_eq!(
        diag["SchedInfo"]["Requests"][0]["TaskType"],
        "seal/v0/unseal"
    );

    // The files that programs of Lotus look for.
    let api = std::fs::read_to_string(rig.repo.path().join("api")).unwrap();
    assert_eq!(api, format!("/ip4/127.0.0.1/tcp/{}/http", rig.addr.port()));
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_and_errors_are_told_as_lotus_tells_them() {
    let rig = Rig::start(|_| ()).await;
    let error = async |token: Option<&str>, method: &str, params: Value| {
        let answer = rig.call(token, method, params).await;
        let code = answer["error"]["code"].as_i64().unwrap();
        (
            code,
            answer["error"]["message"].as_str().unwrap().to_owned(),
        )
    };
    let (read, admin) = (rig.token(Perm::Sign), rig.token(Perm::Admin));
    let denied = "missing permission to invoke 'StorageList' (need 'admin')".to_owned();
    for token in [None, Some(read.as_str())] {
        let got = error(token, "Filecoin.StorageList", json!([])).await;
        assert_eq!(got, (1, denied.clone()));
    }
    for unknown in [
        "Filecoin.SectorRemove",
        "Filecoin.StorageDetach",
        "Filecoin.Nonsense",
        "SectorsList",
    ] {
        assert_eq!(error(Some(&admin), unknown, json!([])).await.0, -32601);
    }
    let (code, message) = error(None, "Filecoin.SectorsStatus", json!([7])).await;
    assert_eq!(code, -32602);
    assert!(message.contains("1 != 2"), "{message}");
    for params in [
        json!(["x", false]),
        json!([-1, false]),
        json!([7, 1]),
        json!({"a": 1}),
    ] {
        assert_eq!(
            error(None, "Filecoin.SectorsStatus", params).await.0,
            -32700
        );
    }
    let (code, message) = error(None, "Filecoin.SectorsStatus", json!([70, false])).await;
    assert_eq!((code, message.as_str()), (1, "sector 70 not found"));

    // A token that AuthNew makes does what it says, and AuthVerify says the same.
    let made = rig.result("AuthNew", json!([["read", "write"]])).await;
    let perms: Vec<u8> = base64(made.as_str().unwrap());
    let made = String::from_utf8(perms).unwrap();
    let verified = rig.call(None, "Filecoin.AuthVerify", json!([made])).await;
    assert_eq!(verified["result"], json!(["read", "write"]));
    assert_eq!(
        error(None, "Filecoin.AuthNew", json!([["read"]])).await.0,
        1
    );
    assert_eq!(
        error(Some(&admin), "Filecoin.AuthNew", json!([["root"]]))
            .await
            .0,
        1
    );
    assert_eq!(
        error(Some(&admin), "Filecoin.AuthVerify", json!(["x"]))
            .await
            .0,
        1
    );
    rig.end().await;
}

fn base64(text: &str) -> Vec<u8> {
    use lotus_node_client::json::Lotus;
    serde_json::from_value::<Lotus<Vec<u8>>>(text.into())
        .unwrap()
        .0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_refused_before_they_cost() {
    let rig = Rig::start(|c| {
        c.max_request_bytes = 4_096;
        c.max_batch = 2;
    })
    .await;
    let url = format!("http://{}/rpc/v0", rig.addr);
    let post = |body: String| rig.http.post(&url).body(body);
    let call = json!({"jsonrpc": "2.0", "id": 1, "method": "Filecoin.Version", "params": []});
    for (request, status) in [
        (rig.http.get(format!("http://{}/rpc/v9", rig.addr)), 404),
        (rig.http.get(&url), 405),
        (post(call.to_string()).bearer_auth("wrong"), 401),
        (
            post(call.to_string()).header("authorization", "Basic x"),
            401,
        ),
        (
            post(call.to_string()).header("origin", "https://example.com"),
            401,
        ),
        (post("x".repeat(5_000)), 413),
        (post(call.to_string()), 200),
    ] {
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status);
    }
    let batch = |n| Value::from(vec![call.clone(); n]).to_string();
    let two: Value = post(batch(2)).send().await.unwrap().json().await.unwrap();
    assert_eq!(two.as_array().unwrap().len(), 2);
    let three: Value = post(batch(3)).send().await.unwrap().json().await.unwrap();
    assert!(three["error"]["code"].is_i64(), "{three}");
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_counted_and_silent_ones_are_cut() {
    let rig = Rig::start(|c| {
        c.max_connections = 1;
        c.call_secs = 1;
    })
    .await;
    let mut silent = TcpStream::connect(rig.addr).await.unwrap();
    silent
        .write_all(b"POST /rpc/v0 HTTP/1.1\r\n")
        .await
        .unwrap();
    // There is no place beside it.
    let refused = async {
        let mut second = TcpStream::connect(rig.addr).await.unwrap();
        second.read(&mut [0; 1]).await
    };
    let refused = tokio::time::timeout(LIMIT, refused).await.unwrap();
    assert!(matches!(refused, Ok(0) | Err(_)), "{refused:?}");
    // It never says what it wants, and loses its place.
    let mut rest = Vec::new();
    let cut = tokio::time::timeout(LIMIT, silent.read_to_end(&mut rest)).await;
    drop(cut.unwrap());
    let version = async {
        loop {
            let body = r#"{"jsonrpc":"2.0","id":1,"method":"Filecoin.Version","params":[]}"#;
            let url = format!("http://{}/rpc/v0", rig.addr);
            if let Ok(answer) = rig.http.post(url).body(body).send().await {
                return answer.status();
            }
            tokio::task::yield_now().await;
        }
    };
    assert_eq!(tokio::time::timeout(LIMIT, version).await.unwrap(), 200);
    rig.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_has_the_permissions_of_its_upgrade() {
    let rig = Rig::start(|_| ()).await;
    let url = format!("ws://{}/rpc/v0", rig.addr);
    let reader = WsClientBuilder::default().build(&url).await.unwrap();
    let list: Vec<u64> = reader
        .request("Filecoin.SectorsList", rpc_params![])
        .await
        .unwrap();
    assert_eq!(list, [7, 8, 9]);
    let denied = reader.request::<Value, _>("Filecoin.WorkerJobs", rpc_params![]);
    let denied = denied.await.unwrap_err().to_string();
    assert!(denied.contains("need 'admin'"), "{denied}");
    // As browsers and Lotus' JavaScript client send a token.
    let url = format!("{url}?token={}", rig.token(Perm::Admin));
    let admin = WsClientBuilder::default().build(&url).await.unwrap();
    let jobs = admin.request::<Value, _>("Filecoin.WorkerJobs", rpc_params![]);
    assert_eq!(jobs.await.unwrap().as_object().unwrap().len(), 1);
    let wrong = WsClientBuilder::default().build(&format!("{url}x")).await;
    assert!(wrong.is_err());
    // Open connections do not hold the stop.
    rig.end().await;
}

#[tokio::test]
async fn it_can_be_off_and_a_wrong_address_is_named() {
    let repo = tempfile::tempdir().unwrap();
    let bind = async |listen: &str| {
        let cfg = LotusApiConfig {
            listen: listen.into(),
            ..LotusApiConfig::default()
        };
        LotusApi::bind(&cfg, repo.path(), repo.path()).await
    };
    assert!(bind("").await.unwrap().is_none());
    // Tokens can be made all the same.
    assert!(repo.path().join("jwt.key").exists());
    let e = bind("localhost").await.unwrap_err();
    assert!(e.fix.contains("lotus_api.listen"), "{e:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_certificate_it_speaks_https_and_nothing_else() {
    let tmp = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (tmp.path().join("cert.pem"), tmp.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let rig = Rig::start(|c| {
        c.tls_cert.clone_from(&cert);
        c.tls_key.clone_from(&key);
    })
    .await;
    assert_eq!(rig.result("ActorAddress", json!([])).await, json!("t01000"));
    // Whoever is told an address gets one that answers.
    let told = std::fs::read_to_string(rig.repo.path().join("api")).unwrap();
    assert!(told.ends_with("/https"), "{told}");
    let piece = json!([{"ID": sector(7), "ProofType": 5}, 0, 1, "", null]);
    rig.result("SectorsUnsealPiece", piece).await;
    let found = rig
        .result("StorageFindSector", json!([sector(7), 1, 2048, false]))
        .await;
    assert_eq!(found[0]["BaseURLs"], json!([format!("{}/remote", rig.url)]));
    // It is no HTTP/2, whatever the client would like.
    let root = rig.http.get(&rig.url).send().await.unwrap();
    assert_eq!(root.version(), reqwest::Version::HTTP_11);

    let mut plain = TcpStream::connect(rig.addr).await.unwrap();
    plain
        .write_all(b"POST /rpc/v0 HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    let mut rest = Vec::new();
    let read = tokio::time::timeout(LIMIT, plain.read_to_end(&mut rest));
    drop(read.await.unwrap());
    assert!(!rest.starts_with(b"HTTP"));
    rig.end().await;

    let half = LotusApiConfig {
        listen: "127.0.0.1:0".into(),
        tls_cert: cert,
        ..LotusApiConfig::default()
    };
    let e = LotusApi::bind(&half, tmp.path(), tmp.path()).await;
    let e = e.unwrap_err();
    assert!(e.message.contains("lotus_api.tls_key"), "{e}");
}
