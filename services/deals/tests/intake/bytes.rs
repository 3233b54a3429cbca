//! The ways of bytes: in chunks, and before there is a deal.

use futures::StreamExt as _;
use serde_json::{Value, json};
use ulid::Ulid;

use crate::{Net, answer, data, files};

impl Net {
    async fn chunk(&self, id: Ulid, n: u32, bytes: &[u8]) -> (u16, Value) {
        let put = self.request("PUT", &format!("/uploads/{id}/{n}"));
        let put = put.header("content-type", "application/octet-stream");
        answer(put.body(bytes.to_vec())).await
    }

    async fn start_chunks(&self, id: Ulid, raw_size: usize, chunk_size: u64) -> u16 {
        let body = json!({"raw_size": raw_size, "chunk_size": chunk_size});
        let start = self.request("POST", &format!("/uploads/{id}"));
        answer(start.json(&body)).await.0
    }

    async fn chunks(&self, id: Ulid) -> (u16, Value) {
        answer(self.request("GET", &format!("/uploads/{id}"))).await
    }

    async fn finish_chunks(&self, id: Ulid) -> (u16, Value) {
        answer(self.request("POST", &format!("/uploads/finalize/{id}"))).await
    }

    fn pdp(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let url = format!("{}/pdp{path}", self.base);
        self.http.request(method.parse().unwrap(), url)
    }
}

#[tokio::test]
async fn chunks_come_in_any_order_in_parallel_and_over_a_crash() {
    let mut net = Net::new(|c| c.min_chunk_bytes = 1 << 16).await;
    let bytes = data(9, 5 * 65_536 + 100);
    let chunk = |n: u32| {
        let start = (n as usize - 1) * 65_536;
        bytes[start..bytes.len().min(start + 65_536)].to_vec()
    };
    let id = Ulid::from(1u128);
    assert_eq!(net.propose(&net.deal(id, &bytes)).await.0, 200);
    assert_eq!(net.chunks(id).await.0, 425, "not begun");
    assert_eq!(net.chunk(id, 1, &chunk(1)).await.0, 404);
    assert_eq!(net.finish_chunks(id).await.0, 400);
    assert_eq!(net.start_chunks(id, bytes.len(), 1 << 15).await, 400);
    assert_eq!(net.start_chunks(id, bytes.len() - 1, 1 << 16).await, 400);
    assert_eq!(net.start_chunks(id, bytes.len(), 1 << 16).await, 200);
    assert_eq!(net.start_chunks(id, bytes.len(), 1 << 16).await, 409);
    assert_eq!(
        net.put(id, &bytes).await.0,
        409,
        "the whole, beside its chunks"
    );

    let some = futures::stream::iter([6, 2, 4]);
    let put: Vec<u16> = some
        .map(async |n| net.chunk(id, n, &chunk(n)).await.0)
        .buffer_unordered(3)
        .collect()
        .await;
    assert_eq!(put, [200, 200, 200]);
    assert_eq!(net.chunk(id, 2, &chunk(2)).await.0, 409, "it is here");
    assert_eq!(net.chunk(id, 7, &chunk(1)).await.0, 404);
    assert_eq!(net.chunk(id, 0, &chunk(1)).await.0, 404);
    assert_eq!(net.chunk(id, 1, &chunk(1)[1..]).await.0, 400);
    let bad = net.request("PUT", &format!("/uploads/{id}/x"));
    let bad = bad.header("content-type", "application/octet-stream");
    assert_eq!(answer(bad.body("x")).await.0, 400);
    let (_, refusal) = net.finish_chunks(id).await;
    assert!(
        refusal["error"]
            .as_str()
            .unwrap()
            .contains("3 chunks are missing")
    );

    net.crash().await;
    let (code, state) = net.chunks(id).await;
    assert_eq!(code, 200);
    assert_eq!(state["uploaded_chunks"], json!([2, 4, 6]));
    assert_eq!(state["missing_chunks"], json!([1, 3, 5]));
    assert_eq!(
        net.status(id).await["deal"]["received_bytes"],
        2 * 65_536 + 100
    );
    // One that breaks off is asked for again.
    let broken = net.request("PUT", &format!("/uploads/{id}/1"));
    let parts = futures::stream::iter([
        Ok(chunk(1)[..100].to_vec()),
        Err(std::io::Error::other("gone")),
    ]);
    let broken = broken.header("content-type", "application/octet-stream");
    let broken = broken.body(reqwest::Body::wrap_stream(parts));
    assert!(broken.send().await.is_err());
    net.wait(id, "the broken transfer to end", |_| true).await;
    for n in [3, 1, 5] {
        let end = tokio::time::Instant::now() + crate::DEADLINE;
        // The broken one may still hold its place for a moment.
        while net.chunk(id, n, &chunk(n)).await.0 == 409 {
            assert!(tokio::time::Instant::now() < end);
        }
    }
    net.hub.state().down = true;
    assert_eq!(net.finish_chunks(id).await.0, 200);
    assert_eq!(net.finish_chunks(id).await.0, 200, "the same again");
    net.checkpoint(id, "Transferred").await;
    net.crash().await;
    net.hub.state().down = false;
    net.checkpoint(id, "Offered").await;
    assert_eq!(net.hub.state().bytes[&net.hub_key(id)], bytes);

    // Chunks of something else fail the deal, and leave nothing.
    let id = Ulid::from(2u128);
    assert_eq!(net.propose(&net.deal(id, &data(1, 65_536))).await.0, 200);
    assert_eq!(net.start_chunks(id, 65_536, 1 << 16).await, 200);
    assert_eq!(net.chunk(id, 1, &data(2, 65_536)).await.0, 200);
    assert_eq!(net.finish_chunks(id).await.0, 200);
    let s = net.checkpoint(id, "Failed").await;
    let why = s["ddo_v1"]["errorMsg"].as_str().unwrap();
    assert!(why.contains("the bytes are piece"), "{why}");
    net.wait(id, "its bytes to be removed", |_| {
        files(&net.staging()) == 1
    })
    .await;
    assert_eq!(net.chunks(id).await.0, 425);
}

#[tokio::test]
async fn a_piece_that_came_before_its_deal_is_used() {
    let mut net = Net::new(|_| {}).await;
    let bytes = data(4, 3_000);
    let cid = lotus_proofs::commp(&bytes[..])
        .unwrap()
        .cid_v2()
        .to_string();
    let name = json!({"pieceCid": cid});
    let location = async |request: reqwest::RequestBuilder| {
        let r = request.send().await.unwrap();
        assert_eq!(r.status(), 201);
        r.headers()["location"].to_str().unwrap().to_owned()
    };
    assert_eq!(answer(net.pdp("GET", "/ping")).await, (200, json!("")));
    let find = |net: &Net| net.pdp("GET", "/piece").query(&[("pieceCid", &cid)]);
    assert_eq!(answer(find(&net)).await.0, 404);
    for body in [
        json!({"pieceCid": "x"}),
        json!({}),
        json!({"pieceCid": "bafkqaaa"}),
    ] {
        assert_eq!(answer(net.pdp("POST", "/piece").json(&body)).await.0, 400);
    }
    let at = location(net.pdp("POST", "/piece").json(&name)).await;
    let put = |net: &Net, at: &str, bytes: &[u8]| {
        net.http
            .put(format!("{}{at}", net.base))
            .body(bytes.to_vec())
    };
    assert_eq!(answer(put(&net, &at, &data(5, 3_000))).await.0, 400);
    assert_eq!(answer(put(&net, &at, &bytes)).await, (204, json!("")));
    assert_eq!(answer(find(&net)).await, (200, name.clone()));
    assert_eq!(
        answer(net.pdp("POST", "/piece").json(&name)).await,
        (200, name.clone())
    );
    let (code, status) = answer(net.pdp("GET", &format!("/piece/{cid}/status"))).await;
    assert_eq!((code, &status["status"]), (200, &json!("pending")));

    // Named after its bytes.
    let later = data(6, 500);
    let named = lotus_proofs::commp(&later[..])
        .unwrap()
        .cid_v2()
        .to_string();
    let at = location(net.pdp("POST", "/piece/uploads")).await;
    assert_eq!(answer(put(&net, &at, &later)).await.0, 204);
    let finish = |cid: &str| {
        net.http
            .post(format!("{}{at}", net.base))
            .json(&json!({"pieceCid": cid}))
    };
    assert_eq!(answer(finish(&cid)).await.0, 400);
    assert_eq!(answer(finish(&named)).await.0, 200);
    assert_eq!(answer(finish(&named)).await.0, 404, "it is over");
    assert_eq!(
        answer(put(&net, "/pdp/piece/upload/x", &later)).await.0,
        400
    );

    net.crash().await;
    let id = Ulid::from(1u128);
    assert_eq!(net.propose(&net.deal(id, &bytes)).await.0, 200);
    net.checkpoint(id, "Offered").await;
    assert_eq!(net.hub.state().bytes[&net.hub_key(id)], bytes);
    assert_eq!(answer(find(&net)).await.0, 200, "others may use it too");
}
