//! Deals by proposal over HTTP, as Curio's clients make them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::join_all;
use fvm_shared::crypto::signature::Signature;
use hub_proto::v1::{PiecePhase, PublishOutcome, PublishState};
use lotus_actors::market::{ClientDealProposal, DealProposal, Label};
use lotus_actors::{PaddedPieceSize, decode, encode};
use lotus_deals::mk12::wire::{
    self, AskRequest, AskResponse, DealParams, DealResponse, DealStatusRequest, DealStatusResponse,
    DealUuid, Transfer,
};
use lotus_deals::operator::Publishing;
use lotus_p2p::{Host, HostLimits, Keypair};
use lotus_runtime::CancellationToken;
use lotus_types::{Address, TokenAmount};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::task::JoinSet;
use tokio_util::compat::FuturesAsyncReadCompatExt as _;

use super::{DEADLINE, Net, address, files};

const CID: &str = "bafy2bzacedgq5wyd7c2ulcbo7lzcfvqkhrnkdbimjm4bq2vbfemhbyjvl2kf2";

/// A CAR of so many bytes of data, in blocks of a MiB; the first is the root.
fn car(len: usize) -> (cid::Cid, Vec<u8>) {
    use sha2::Digest as _;
    let data = vec![7; len];
    let blocks = data.chunks(1 << 20).zip(0u8..).map(|(block, n)| {
        let block = [&[n], &block[1..]].concat();
        let hash = sha2::Sha256::digest(&block);
        let hash = cid::multihash::Multihash::wrap(0x12, &hash).unwrap();
        (cid::Cid::new_v1(0x55, hash), block)
    });
    let blocks: Vec<_> = blocks.collect();
    let root = blocks[0].0;
    let mut car = lotus_car::CarWriter::new(Vec::new(), &[root]).unwrap();
    for (cid, block) in &blocks {
        car.write(cid, block).unwrap();
    }
    (root, car.finish().unwrap())
}

/// Answers one request for a file or a range of it.
async fn give(mut s: impl AsyncRead + AsyncWrite + Unpin, file: &[u8]) {
    let mut buf = vec![0; 4096];
    let n = s.read(&mut buf).await.unwrap();
    let text = String::from_utf8_lossy(&buf[..n]).to_lowercase();
    assert!(text.contains("x-token: secret"));
    let range = text.split_once("range: bytes=").map(|(_, rest)| {
        let (from, to) = rest.lines().next().unwrap().split_once('-').unwrap();
        let last = file.len() - 1;
        let to = to.trim().parse().map_or(last, |to: usize| to.min(last));
        (from.parse::<usize>().unwrap(), to)
    });
    let (status, range, body) = match range {
        None => ("200 OK", String::new(), file),
        Some((from, to)) => (
            "206 Partial Content",
            format!("content-range: bytes {from}-{to}/{}\r\n", file.len()),
            &file[from..=to],
        ),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nconnection: close\r\n{range}content-length: {}\r\n\r\n",
        body.len()
    );
    s.write_all(head.as_bytes()).await.unwrap();
    s.write_all(body).await.unwrap();
    s.shutdown().await.unwrap();
}

/// Serves one file until dropped.
async fn serve(bytes: Vec<u8>, tasks: &mut JoinSet<()>) -> std::net::SocketAddr {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = server.local_addr().unwrap();
    tasks.spawn(async move {
        loop {
            let (s, _) = server.accept().await.unwrap();
            give(s, &bytes).await;
        }
    });
    at
}

impl Net {
    fn sign(&self, bytes: &[u8]) -> Signature {
        let hash = blake2b_simd::Params::new().hash_length(32).hash(bytes);
        let (signature, recovery) = self.key.sign_prehash_recoverable(hash.as_bytes()).unwrap();
        let mut signed = signature.to_bytes().to_vec();
        signed.push(recovery.to_byte());
        Signature::new_secp256k1(signed)
    }

    /// A signed proposal for a file at an address.
    fn params(&self, id: u8, root: cid::Cid, file: &[u8], url: &str) -> DealParams {
        let piece = lotus_proofs::commp(file).unwrap();
        let proposal = DealProposal {
            piece_cid: piece.cid.cid(),
            piece_size: PaddedPieceSize(piece.size.get()),
            verified_deal: false,
            client: address(&self.key),
            provider: Address::new_id(1000),
            label: Label::String(format!("deal {id}")),
            start_epoch: 5000,
            end_epoch: 600_000,
            storage_price_per_epoch: TokenAmount::from_atto(0),
            provider_collateral: TokenAmount::from_atto(0),
            client_collateral: TokenAmount::from_atto(0),
        };
        let client_signature = self.sign(&encode(&proposal));
        DealParams {
            deal_uuid: DealUuid([id; 16]),
            transfer: Transfer {
                size: file.len() as u64,
                kind: "http".into(),
                params: format!(r#"{{"URL":"{url}","Headers":{{"X-Token":"secret"}}}}"#).into(),
                client_id: String::new(),
            },
            is_offline: false,
            deal_data_root: root,
            skip_ipni_announce: true,
            client_deal_proposal: ClientDealProposal {
                proposal,
                client_signature,
            },
            remove_unsealed_copy: false,
        }
    }

    async fn ask<T: DeserializeOwned>(&self, method: &str, path: &str, what: &impl Serialize) -> T {
        let url = format!("{}/market/mk12/{path}", self.base);
        let answer = self
            .http
            .request(method.parse().unwrap(), url)
            .header("content-type", "application/cbor")
            .body(wire::encode(what))
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), 200);
        wire::decode(&answer.bytes().await.unwrap()).unwrap()
    }

    async fn deal_status(&self, id: u8) -> DealStatusResponse {
        let request = DealStatusRequest {
            deal_uuid: DealUuid([id; 16]),
            signature: self.sign(&[id; 16]),
        };
        self.ask("GET", "status", &request).await
    }

    async fn reaches(&self, id: u8, status: &str) -> DealStatusResponse {
        let end = tokio::time::Instant::now() + DEADLINE;
        loop {
            let now = self.deal_status(id).await;
            let state = now.deal_status.clone().unwrap();
            if state.status == status {
                return now;
            }
            assert!(tokio::time::Instant::now() < end, "{status}: {now:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn under_way() -> PublishState {
    PublishState {
        cid: CID.into(),
        ..PublishState::default()
    }
}

fn landed(ids: &[Option<u64>]) -> PublishState {
    PublishState {
        landed: true,
        outcomes: ids
            .iter()
            .map(|&deal_id| PublishOutcome { deal_id })
            .collect(),
        ..under_way()
    }
}

#[tokio::test]
async fn a_proposal_is_published_once_over_crashes_and_sealed_with_its_id() {
    let (root, file) = car(100_000);
    let mut servers = JoinSet::new();
    let at = serve(file.clone(), &mut servers).await;
    let mut net = Net::new(move |c| {
        c.allow_private_sources = true;
        c.pull_ports = vec![at.port()];
    })
    .await;
    net.hub.state().published = under_way();
    let params = net.params(1, root, &file, &format!("http://{at}/a.car"));
    for _ in 0..2 {
        let answer: DealResponse = net.ask("POST", "store", &params).await;
        assert!(answer.accepted, "{}", answer.message);
    }
    // Neither the id nor the signed proposal can be used twice.
    let mut other = params.clone();
    other.skip_ipni_announce = false;
    let answer: DealResponse = net.ask("POST", "store", &other).await;
    assert!(
        answer
            .message
            .starts_with("deal has the same uuid as deal 0101")
    );
    other.deal_uuid = DealUuid([2; 16]);
    let answer: DealResponse = net.ask("POST", "store", &other).await;
    assert!(
        answer
            .message
            .starts_with("deal proposal is identical to deal 0101")
    );

    let s = net.reaches(1, "Published").await;
    assert_eq!(s.n_bytes_received, file.len() as u64);
    assert_eq!(s.transfer_size, file.len() as u64);
    let state = s.deal_status.unwrap();
    assert_eq!(state.publish_cid.unwrap().to_string(), CID);
    assert_eq!(state.chain_deal_id, 0);
    assert_eq!(state.proposal, params.client_deal_proposal.proposal);
    assert_eq!(
        net.hub.state().offers.len(),
        0,
        "not sealed before it is on chain"
    );

    net.crash().await;
    net.hub.state().published = landed(&[Some(77)]);
    let s = net.reaches(1, "PublishConfirmed").await;
    assert_eq!(s.deal_status.unwrap().chain_deal_id, 77);
    let key = net.hub_key(DealUuid([1; 16]).ulid());
    net.wait(DealUuid([1; 16]).ulid(), "offered", |s| {
        s["deal"]["checkpoint"] == "Offered"
    })
    .await;
    {
        let hub = net.hub.state();
        assert_eq!(hub.bytes[&key], file);
        let terms = hub.offers[0].terms.clone().unwrap();
        // The market actor, with the deal's id.
        assert_eq!(terms.notify_address, "t05");
        assert_eq!(decode::<u64>(&terms.notify_payload).unwrap(), 77);
        // Every call was about the same message.
        let first = hub.publishes.first().unwrap();
        assert!(hub.publishes.len() > 1);
        assert!(
            hub.publishes
                .iter()
                .all(|p| p.deals == first.deals && p.attempt == 0)
        );
        assert_eq!(first.deals, [encode(&params.client_deal_proposal)]);
        // The first answer comes at once, and the others when there is something new.
        assert_eq!(first.wait_ms, 0);
        assert!(hub.publishes.last().unwrap().wait_ms > 0);
    }
    let calls = net.hub.state().publishes.len();
    net.crash().await;
    net.hub.advance(&key, PiecePhase::Stored, "");
    net.hub.advance(&key, PiecePhase::Placed, "PreCommit1");
    let s = net.reaches(1, "IndexedAndAnnounced").await;
    assert_eq!(s.deal_status.unwrap().sealing_status, "PreCommit1");
    net.hub.advance(&key, PiecePhase::Active, "Proving");
    let s = net.reaches(1, "Complete").await;
    let state = s.deal_status.unwrap();
    assert_eq!(
        (state.sealing_status.as_str(), state.error.as_str()),
        ("Proving", "")
    );
    assert_eq!(files(&net.staging()), 0);
    assert_eq!(net.hub.state().publishes.len(), calls, "published once");
}

#[tokio::test]
async fn a_signed_proposal_is_taken_once_however_many_ask_at_once() {
    let (root, file) = car(1_000);
    let net = Net::new(|c| c.allow_private_sources = true).await;
    let params = net.params(1, root, &file, "http://127.0.0.1/a.car");
    let answers = join_all((1..=8u8).map(|id| {
        let deal_uuid = DealUuid([id; 16]);
        let params = DealParams {
            deal_uuid,
            ..params.clone()
        };
        let net = &net;
        async move { net.ask::<DealResponse>("POST", "store", &params).await }
    }))
    .await;
    let accepted = answers.iter().filter(|a| a.accepted).count();
    assert_eq!(accepted, 1, "{answers:?}");
    let identical = |a: &&DealResponse| a.message.starts_with("deal proposal is identical to deal");
    assert_eq!(answers.iter().filter(identical).count(), 7, "{answers:?}");
}

#[tokio::test]
async fn a_file_comes_over_streams_of_its_client() {
    // Two ranges, each on a stream of its own.
    let (root, file) = car(7_500_000);
    let limits = HostLimits {
        connections: 8,
        per_peer: 2,
    };
    let any = ([127, 0, 0, 1], 0).into();
    let client = Host::listen(Keypair::generate_ed25519(), any, "test", limits)
        .await
        .unwrap();
    let at = client.address();
    let mut streams = client.accept("/fil/storage/transfer/1.0.0").unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(client.run(CancellationToken::new()));
    let served = Arc::new(AtomicUsize::new(0));
    let (own, count) = (file.clone(), served.clone());
    tasks.spawn(async move {
        let mut answers = JoinSet::new();
        while let Some((_, stream)) = streams.next().await {
            let own = own.clone();
            count.fetch_add(1, Ordering::Relaxed);
            answers.spawn(async move { give(stream.compat(), &own).await });
        }
    });
    let port = at.to_string().split('/').nth(4).unwrap().parse().unwrap();
    let net = Net::new(move |c| {
        c.allow_private_sources = true;
        c.pull_ports = vec![port];
    })
    .await;
    net.hub.state().published = landed(&[Some(5)]);
    let mut params = net.params(1, root, &file, &format!("libp2p://{at}"));
    params.transfer.kind = "libp2p".into();
    let answer: DealResponse = net.ask("POST", "store", &params).await;
    assert!(answer.accepted, "{}", answer.message);
    let id = DealUuid([1; 16]).ulid();
    net.checkpoint(id, "Offered").await;
    assert!(
        net.hub.state().bytes[&net.hub_key(id)] == file,
        "the same bytes"
    );
    assert_eq!(served.load(Ordering::Relaxed), 2);
    let left = std::fs::read_dir(net.dir.path().join("deals")).unwrap();
    let left = left.filter(|e| {
        e.as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with("peer-")
    });
    assert_eq!(left.count(), 0, "no socket is left");
}

#[tokio::test]
async fn an_offline_deal_without_a_length_takes_the_file_that_is_its_piece() {
    let (root, file) = car(1_500);
    let net = Net::new(|c| c.mk12.publish_period_secs = 3_600).await;
    net.hub.state().published = landed(&[Some(5)]);
    let mut params = net.params(1, root, &file, "");
    params.is_offline = true;
    params.transfer = Transfer::default();
    let answer: DealResponse = net.ask("POST", "store", &params).await;
    assert!(answer.accepted, "{}", answer.message);
    let id = DealUuid([1; 16]).ulid();
    assert!(net.list("waiting=true").await.deals[0].any_length);
    for (bytes, code) in [(car(1_400).1, 400), (file.clone(), 200)] {
        let put = net.order("PUT", &net.of(id, "/data")).body(bytes);
        assert_eq!(put.send().await.unwrap().status(), code);
    }
    // It waits for others, until the operator waits no more.
    net.checkpoint(id, "Transferred").await;
    let pending = net.order("GET", "/publish").send().await.unwrap();
    let pending: Publishing = pending.json().await.unwrap();
    assert_eq!(pending.waiting, [net.hub_key(id)]);
    assert!(pending.due_unix_ms.is_some() && pending.batches.is_empty());
    let now = net.order("POST", "/publish").send().await.unwrap();
    assert_eq!(now.status(), 200);
    net.checkpoint(id, "Offered").await;
    let hub = net.hub.state();
    assert_eq!(hub.bytes[&net.hub_key(id)], file);
    assert_eq!(hub.offers[0].raw_size, file.len() as u64);
}

/// The other signature that holds for the same bytes and key: whoever has one can make it.
fn mirrored(signature: &Signature) -> Signature {
    let (rs, v) = signature.bytes.split_first_chunk::<64>().unwrap();
    let (r, s) = k256::ecdsa::Signature::from_slice(rs)
        .unwrap()
        .split_scalars();
    let other = k256::ecdsa::Signature::from_scalars(r, -s).unwrap();
    Signature::new_secp256k1([&other.to_bytes()[..], &[v[0] ^ 1]].concat())
}

#[tokio::test]
async fn another_signature_makes_no_other_proposal() {
    let (root, file) = car(1_000);
    let net = Net::new(|c| c.allow_private_sources = true).await;
    let params = net.params(1, root, &file, "http://127.0.0.1/a.car");
    let answer: DealResponse = net.ask("POST", "store", &params).await;
    assert!(answer.accepted, "{}", answer.message);
    let again = |id: u8, mut params: DealParams| {
        params.deal_uuid = DealUuid([id; 16]);
        let signed = &mut params.client_deal_proposal;
        signed.client_signature = mirrored(&signed.client_signature);
        params
    };
    let answer: DealResponse = net.ask("POST", "store", &again(2, params)).await;
    assert!(!answer.accepted);
    let identical = "deal proposal is identical to deal 0101";
    assert!(answer.message.starts_with(identical), "{}", answer.message);
    // It does hold, where it is the first.
    let params = net.params(3, root, &file, "http://127.0.0.1/a.car");
    let answer: DealResponse = net.ask("POST", "store", &again(3, params)).await;
    assert!(answer.accepted, "{}", answer.message);
}

#[tokio::test]
async fn what_the_chain_refuses_together_is_tried_apart() {
    let (root, file) = car(1_000);
    let mut servers = JoinSet::new();
    let at = serve(file.clone(), &mut servers).await;
    let net = Net::new(move |c| {
        c.allow_private_sources = true;
        c.pull_ports = vec![at.port()];
        c.mk12.publish_period_secs = 3_600;
        c.mk12.max_deals_per_publish = 2.try_into().unwrap();
    })
    .await;
    net.hub.state().published = under_way();
    let url = format!("http://{at}/a.car");
    for id in [1, 2] {
        let params = net.params(id, root, &file, &url);
        let answer: DealResponse = net.ask("POST", "store", &params).await;
        assert!(answer.accepted, "{}", answer.message);
        // One alone waits for a second, as the period is long.
        net.reaches(id, if id == 1 { "Transferred" } else { "Published" })
            .await;
    }
    assert!(net.hub.state().publishes.iter().all(|p| p.deals.len() == 2));
    net.hub.state().published = PublishState {
        exit_code: 16,
        exit_name: "USR_ILLEGAL_ARGUMENT".into(),
        ..landed(&[])
    };
    for id in [1, 2] {
        let s = net.reaches(id, "Complete").await.deal_status.unwrap();
        assert!(s.error.contains("USR_ILLEGAL_ARGUMENT"), "{}", s.error);
    }
    let hub = net.hub.state();
    let alone = hub.publishes.iter().filter(|p| p.deals.len() == 1).count();
    assert!(alone >= 2, "each was tried by itself");
}

#[tokio::test]
async fn questions_that_are_wrong_are_told_so() {
    let net = Net::new(|_| {}).await;
    let (root, file) = car(1_000);
    // The address is inside, the reason is Boost's, and nothing is journaled.
    let params = net.params(1, root, &file, "http://127.0.0.1/a.car");
    let answer: DealResponse = net.ask("POST", "store", &params).await;
    assert!(!answer.accepted);
    assert!(
        answer.message.starts_with("failed validation: "),
        "{}",
        answer.message
    );
    let s = net.deal_status(1).await;
    assert_eq!(
        s.error,
        "no storage deal found with deal UUID 01010101-0101-0101-0101-010101010101"
    );
    assert!(s.deal_status.is_none());

    let url = format!("{}/market/mk12/store", net.base);
    let post = |kind: &'static str, body: Vec<u8>| {
        net.http
            .post(&url)
            .header("content-type", kind)
            .body(body)
            .send()
    };
    let code = async |kind, body| post(kind, body).await.unwrap().status().as_u16();
    assert_eq!(code("application/json", vec![0xa0]).await, 415);
    assert_eq!(code("application/cbor", vec![0xa0]).await, 400);
    assert_eq!(code("application/cbor", vec![0x9b; 64]).await, 400);
    assert_eq!(code("application/cbor", vec![0; (4 << 20) + 1]).await, 413);
}

#[tokio::test]
async fn only_the_client_sees_its_deal_and_everybody_the_ask() {
    let (root, file) = car(1_000);
    let mut net = Net::new(|c| {
        c.allow_private_sources = true;
        c.mk12.price_attofil = "9".into();
    })
    .await;
    let mut params = net.params(1, root, &file, "http://127.0.0.1:80/a.car");
    let dear = &mut params.client_deal_proposal;
    dear.proposal.storage_price_per_epoch = TokenAmount::from_atto(1);
    dear.client_signature = net.sign(&encode(&dear.proposal));
    dear.proposal.storage_price_per_epoch = TokenAmount::from_atto(0);
    let answer: DealResponse = net.ask("POST", "store", &params).await;
    assert_eq!(answer.message, "failed validation: invalid signature");
    let params = net.params(1, root, &file, "http://127.0.0.1:80/a.car");
    let answer: DealResponse = net.ask("POST", "store", &params).await;
    assert!(answer.accepted, "{}", answer.message);
    let stolen = DealStatusRequest {
        deal_uuid: DealUuid([1; 16]),
        signature: net.sign(&[2; 16]),
    };
    let s: DealStatusResponse = net.ask("GET", "status", &stolen).await;
    assert_eq!(s.error, "signature verification failed");
    assert!(s.deal_status.is_none());

    let ours = AskRequest {
        miner: Address::new_id(1000),
    };
    let first: AskResponse = net.ask("GET", "ask", &ours).await;
    let first = first.ask.unwrap();
    assert_eq!(first.ask.price, TokenAmount::from_atto(9));
    assert_eq!((first.ask.seq_no, first.ask.timestamp), (0, 100));
    assert_eq!(first.ask.max_piece_size, 8 << 20);
    net.crash().await;
    let again: AskResponse = net.ask("GET", "ask", &ours).await;
    assert_eq!(again.ask.unwrap(), first, "an ask outlives a restart");
    let theirs = AskRequest {
        miner: Address::new_id(1001),
    };
    let none: AskResponse = net.ask("GET", "ask", &theirs).await;
    assert!(none.ask.is_none());
}
