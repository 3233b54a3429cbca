//! What the operator does: look, import, cancel, retry; and the operator's filter.

use std::path::Path;

use hub_proto::v1::PiecePhase;
use lotus_deals::operator::{self, DealDetail, DealPage};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;
use ulid::Ulid;

use crate::{Net, answer, data};

impl Net {
    pub(super) fn order(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let dir = self.dir.path().join("deals");
        let token = std::fs::read_to_string(operator::token_file(&dir)).unwrap();
        socket(&dir)
            .request(method.parse().unwrap(), format!("http://operator{path}"))
            .bearer_auth(token)
    }

    pub(super) fn of(&self, id: Ulid, what: &str) -> String {
        format!("/deals/{}{what}", self.hub_key(id))
    }

    pub(super) async fn list(&self, query: &str) -> DealPage {
        let answer = self.order("GET", &format!("/deals?{query}")).send().await;
        answer
            .unwrap()
            .error_for_status()
            .unwrap()
            .json()
            .await
            .unwrap()
    }
}

fn socket(dir: &Path) -> reqwest::Client {
    reqwest::Client::builder()
        .unix_socket(operator::socket(dir))
        .build()
        .unwrap()
}

async fn code(request: reqwest::RequestBuilder) -> u16 {
    request.send().await.unwrap().status().as_u16()
}

fn offline(mut deal: Value) -> Value {
    let data = deal["data"].as_object_mut().unwrap();
    data.remove("source_http_put");
    data.insert("source_offline".into(), json!({}));
    deal
}

#[tokio::test]
async fn an_offline_deal_is_imported_by_who_has_the_token() {
    let net = Net::new(|c| c.upload_ttl_secs = 0).await;
    let bytes = data(1, 2_000);
    let ids: Vec<Ulid> = (1..=3u128).map(Ulid::from).collect();
    for id in &ids {
        let deal = offline(net.deal(*id, &bytes));
        assert_eq!(net.propose(&deal).await.0, 200);
    }
    let (_, sources) = answer(net.request("GET", "/sources")).await;
    assert_eq!(sources, json!({"sources": ["http", "put", "offline"]}));
    let (status, refusal) = net.put(ids[0], &bytes).await;
    assert_eq!(status, 409, "{refusal}");

    let dir = net.dir.path().join("deals");
    assert_eq!(code(socket(&dir).get("http://operator/deals")).await, 401);
    let wrong = socket(&dir).get("http://operator/deals").bearer_auth("x");
    assert_eq!(code(wrong).await, 401);

    let waiting = net.list("waiting=true&source=offline").await;
    assert_eq!(waiting.deals.len(), 3);
    let first = net.list("limit=2").await;
    let after = first.next.clone().unwrap().replace('/', "%2F");
    let rest = net.list(&format!("limit=2&after={after}")).await;
    assert_eq!(
        (first.deals.len(), rest.deals.len(), rest.next),
        (2, 1, None)
    );
    assert_eq!(net.list(&format!("id={}", ids[1])).await.deals.len(), 1);
    assert_eq!(net.list("checkpoint=Active").await.deals.len(), 0);

    let put = |bytes: Vec<u8>| net.order("PUT", &net.of(ids[0], "/data")).body(bytes);
    assert_eq!(code(put(data(2, 2_000))).await, 400, "other bytes");
    assert_eq!(code(put(bytes.clone())).await, 200);
    net.checkpoint(ids[0], "Offered").await;
    assert_eq!(net.hub.state().bytes[&net.hub_key(ids[0])], bytes);
    assert_eq!(code(put(bytes.clone())).await, 409, "it has them");
    let detail: DealDetail = net
        .order("GET", &net.of(ids[0], ""))
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let steps: Vec<&str> = detail
        .history
        .iter()
        .map(|s| s.checkpoint.as_str())
        .collect();
    assert_eq!(steps, ["Accepted", "Transferred", "Offered"]);
    assert_eq!(detail.row.source, "offline");
    assert_eq!(
        code(net.order("GET", &net.of(Ulid::from(9u128), ""))).await,
        404
    );
}

#[tokio::test]
async fn a_deal_is_cancelled_wherever_it_is_before_a_sector_and_tried_again() {
    let net = Net::new(|_| {}).await;
    let bytes = data(1, 1_000);
    let cancel = |id| {
        net.order("POST", &net.of(id, "/cancel"))
            .json(&json!({"reason": "no\n room"}))
    };
    let retry = |id| net.order("POST", &net.of(id, "/retry"));
    let why = "cancelled by the provider: no room";

    // Before its bytes.
    let id = Ulid::from(1u128);
    let deal = net.deal(id, &bytes);
    assert_eq!(net.propose(&deal).await.0, 200);
    assert_eq!(code(cancel(id)).await, 200);
    let s = net.checkpoint(id, "Failed").await;
    assert_eq!(s["ddo_v1"]["errorMsg"], why);
    assert_eq!(net.put(id, &bytes).await.0, 409);
    net.wait(id, "the credit", |_| net.hub.state().released.len() == 1)
        .await;
    // And again, with the same id.
    let end = tokio::time::Instant::now() + crate::DEADLINE;
    while code(retry(id)).await == 409 {
        assert!(tokio::time::Instant::now() < end, "still cleaned up");
    }
    assert_eq!(net.status(id).await["ddo_v1"]["status"], "uploading");
    assert_eq!(net.put(id, &bytes).await.0, 200);
    assert_eq!(net.finalize(id).await.0, 200);
    net.checkpoint(id, "Offered").await;

    // At the hub: it gives the piece back.
    assert_eq!(code(cancel(id)).await, 200);
    let s = net.checkpoint(id, "Failed").await;
    assert_eq!(s["ddo_v1"]["errorMsg"], why);
    let key = net.hub_key(id);
    assert_eq!(
        net.hub.state().pieces[&key].phase(),
        PiecePhase::Withdrawn,
        "the hub has let go"
    );
    net.wait(id, "the credit", |_| net.hub.state().released.len() == 2)
        .await;
    assert_eq!(code(retry(id)).await, 409, "the hub gave it up");

    // In a sector it stays.
    let id = Ulid::from(2u128);
    assert_eq!(net.propose(&net.deal(id, &bytes)).await.0, 200);
    assert_eq!(net.put(id, &bytes).await.0, 200);
    assert_eq!(net.finalize(id).await.0, 200);
    net.checkpoint(id, "Offered").await;
    net.hub
        .advance(&net.hub_key(id), PiecePhase::Placed, "WaitDeals");
    net.checkpoint(id, "AddedPiece").await;
    assert_eq!(code(cancel(id)).await, 409);
    assert_eq!(code(retry(id)).await, 409);

    // While the hub has no room.
    let id = Ulid::from(3u128);
    assert_eq!(net.propose(&net.deal(id, &bytes)).await.0, 200);
    assert_eq!(net.put(id, &bytes).await.0, 200);
    net.hub.state().full = true;
    assert_eq!(net.finalize(id).await.0, 200);
    net.checkpoint(id, "Transferred").await;
    assert_eq!(code(cancel(id)).await, 200);
    let s = net.checkpoint(id, "Failed").await;
    assert_eq!(s["ddo_v1"]["errorMsg"], why);
    assert_eq!(net.hub.state().offers.len(), 2, "it was not handed over");
}

/// A filter that refuses what its question has as `refuse`.
async fn filter(refuse: &'static str) -> (std::net::SocketAddr, JoinSet<()>) {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = server.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        loop {
            let (mut s, _) = server.accept().await.unwrap();
            let mut got = String::new();
            let mut buf = [0; 4096];
            while !got.ends_with('}') {
                let n = s.read(&mut buf).await.unwrap();
                got.push_str(std::str::from_utf8(&buf[..n]).unwrap());
            }
            let answer = if got.contains(refuse) {
                "HTTP/1.1 403 No\r\nconnection: close\r\ncontent-length: 7\r\n\r\ntoo big"
            } else {
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            };
            s.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (at, tasks)
}

#[tokio::test]
async fn the_operators_filter_has_the_last_word() {
    let (at, _tasks) = filter("\"raw_size\":777,").await;
    let net = Net::new(move |c| c.filter_url = format!("http://{at}/")).await;
    let (id, other) = (Ulid::from(1u128), Ulid::from(2u128));
    let (status, refusal) = net.propose(&net.deal(id, &data(1, 777))).await;
    assert_eq!(status, 426);
    assert!(
        refusal["error"].as_str().unwrap().ends_with("too big"),
        "{refusal}"
    );
    assert_eq!(net.propose(&net.deal(other, &data(1, 778))).await.0, 200);
    // A repeat is answered as the first time, whatever the rules say by now.
    assert_eq!(net.propose(&net.deal(other, &data(1, 778))).await.0, 200);
    let (status, _) = answer(net.request("GET", &format!("/status/{id}"))).await;
    assert_eq!(status, 404, "nothing is kept of what was refused");
    let same = net.request("POST", &format!("/update/{other}"));
    assert_eq!(
        answer(same.json(&net.deal(other, &data(1, 778)))).await.0,
        200
    );
    let changed = net.request("POST", &format!("/update/{other}"));
    assert_eq!(
        answer(changed.json(&net.deal(other, &data(1, 779))))
            .await
            .0,
        400
    );
}

#[tokio::test]
async fn a_client_has_only_so_many_bytes_open() {
    let net = Net::new(|c| c.max_open_bytes_per_client = 3 << 10).await;
    let propose = async |n: u128, len| net.propose(&net.deal(Ulid::from(n), &data(1, len))).await.0;
    assert_eq!(propose(1, 2_000).await, 200);
    assert_eq!(propose(2, 2_000).await, 429);
    assert_eq!(propose(3, 1_000).await, 200);
    assert_eq!(propose(4, 100).await, 429);
}

#[tokio::test]
async fn a_clients_limits_hold_for_proposals_at_the_same_time() {
    let net = Net::new(|c| c.max_open_deals_per_client = 3).await;
    let bytes = data(1, 1_000);
    let all = (1..=10u128).map(|n| {
        let deal = net.deal(Ulid::from(n), &bytes);
        let net = &net;
        async move { net.propose(&deal).await.0 }
    });
    let answers = futures::future::join_all(all).await;
    let taken = answers.iter().filter(|code| **code == 200).count();
    assert_eq!(taken, 3, "{answers:?}");
    assert!(
        answers.iter().all(|code| [200, 429].contains(code)),
        "{answers:?}"
    );
}
