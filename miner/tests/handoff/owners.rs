//! Two deals spokes of one hub, and whose a deal is.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use hub_proto::v1::event::What;
use hub_proto::v1::{
    AcquireRequest, Event, ListPiecesRequest, OfferRequest, PieceState, PieceStatusRequest,
    PublishRequest, ReleaseRequest, SubscribeRequest, WithdrawRequest,
};
use hub_proto::{HubClient, HubConfig};
use lotus_identity::{Authority, Caller, Held};
use lotus_miner::pieces::machine::Source;
use lotus_runtime::trace;
use tonic::{Code, Status};

use super::harness::{DEADLINE, Hub, Sectors, Spoke, bytes, fast, key};
use super::market::deal;

/// A deals spoke with an identity of its own.
struct Seller(HubClient);

impl Seller {
    async fn joined(dir: &Path, hub: &Hub, caller: &Caller, authority: &Authority) -> Self {
        let identity = dir.join(caller.instance.to_string());
        let day = Duration::from_secs(24 * 3600);
        let bundle = authority.invite(caller, "hub:1", day).unwrap();
        drop(Held::start(&identity, Some(bundle)).unwrap());
        let config = HubConfig {
            addr: format!("unix:{}", hub.dir.join("run/hub.sock").display()),
            identity,
            ..HubConfig::default()
        };
        let client = HubClient::connect(&config, "deals", "", trace::client_interceptor);
        Self(client.await.unwrap())
    }

    async fn acquire(&self, n: u8) -> Result<String, Status> {
        let request = AcquireRequest {
            key: Some(key(n)),
            piece_size: 2048,
            ttl_seconds: 60,
        };
        let credit = self.0.capacity().acquire(self.0.request(request)).await?;
        Ok(credit.into_inner().id)
    }

    async fn release(&self, id: &str) {
        let request = ReleaseRequest { id: id.into() };
        let mut capacity = self.0.capacity();
        capacity.release(self.0.request(request)).await.unwrap();
    }

    async fn offer(&self, offer: &OfferRequest) -> Result<PieceState, Status> {
        let request = self.0.request(offer.clone());
        Ok(self.0.pieces().offer(request).await?.into_inner())
    }

    async fn status(&self, n: u8) -> Result<PieceState, Status> {
        let request = self.0.request(PieceStatusRequest { key: Some(key(n)) });
        Ok(self.0.pieces().status(request).await?.into_inner())
    }

    async fn withdraw(&self, n: u8) -> Result<PieceState, Status> {
        let request = self.0.request(WithdrawRequest { key: Some(key(n)) });
        Ok(self.0.pieces().withdraw(request).await?.into_inner())
    }

    async fn deals(&self) -> usize {
        let request = self.0.request(ListPiecesRequest::default());
        let listed = self.0.pieces().list(request).await.unwrap();
        listed.into_inner().pieces.len()
    }

    /// The code of the attempt; the chain here answers nothing.
    async fn publish(&self) -> Code {
        let request = PublishRequest {
            deals: vec![deal(1000)],
            ..PublishRequest::default()
        };
        let answer = self.0.chain().publish(self.0.request(request)).await;
        answer.unwrap_err().code()
    }

    /// The first event about a piece.
    async fn hears(&self) -> Event {
        let request = SubscribeRequest {
            topics: vec!["piece".into()],
            ..SubscribeRequest::default()
        };
        let mut events = self.0.events().subscribe(request).await.unwrap();
        let first = tokio::time::timeout(DEADLINE, events.get_mut().next());
        first.await.unwrap().unwrap().unwrap()
    }
}

fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.unwrap_err().code()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deal_is_of_the_spoke_that_offers_it_first() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub::start(dir.path(), &Arc::new(Sectors::default()), fast()).await;
    let authority = Authority::open(&hub.dir.join("ca")).unwrap();
    let (of_a, of_b): (Caller, Caller) = ("deals/a".parse().unwrap(), "deals/b".parse().unwrap());
    let a = Seller::joined(dir.path(), &hub, &of_a, &authority).await;
    let b = Seller::joined(dir.path(), &hub, &of_b, &authority).await;
    // Nothing is pulled: nobody serves what is staged.
    let spoke = Spoke::new(dir.path());
    let (_, first) = spoke.stage("first", &bytes(1000));
    let (_, mut second) = spoke.stage("second", &bytes(1500));
    second.key = Some(key(2));

    // From the first credit on.
    let credit = a.acquire(1).await.unwrap();
    assert_eq!(code(b.acquire(1).await), Code::AlreadyExists);
    assert_eq!(code(b.offer(&first).await), Code::AlreadyExists);
    b.release(&credit).await;
    assert_eq!(a.acquire(1).await.unwrap(), credit);
    a.release(&credit).await;
    let credit = b.acquire(1).await.unwrap();
    b.release(&credit).await;

    // And for good with the offer.
    let state = a.offer(&first).await.unwrap();
    assert_eq!(state.owner, "deals/a");
    assert_eq!(code(b.acquire(1).await), Code::AlreadyExists);
    let mut elsewhere = first.clone();
    elsewhere.source.clone_from(&second.source);
    assert_eq!(code(b.offer(&elsewhere).await), Code::AlreadyExists);
    assert_eq!(code(b.status(1).await), Code::NotFound);
    assert_eq!(code(b.withdraw(1).await), Code::NotFound);
    assert_eq!((a.deals().await, b.deals().await), (1, 0));
    b.offer(&second).await.unwrap();
    let heard = b.hears().await;
    // The first of all is about the other's.
    assert!(
        matches!(&heard.what, Some(What::Piece(p)) if heard.seq > 1 && p.key == Some(key(2))),
        "{heard:?}"
    );
    assert_eq!(a.hears().await.seq, 1);
    // The operator sees all.
    assert_eq!(hub.status(key(1)).await.owner, "deals/a");

    // A proposal is published by one, in whatever message.
    assert_eq!(a.publish().await, Code::Unavailable);
    assert_eq!(b.publish().await, Code::AlreadyExists);
    assert_eq!(a.publish().await, Code::Unavailable);

    // Whoever is sent away owns nothing.
    assert!(authority.revoke(&of_a).unwrap());
    let state = b.offer(&elsewhere).await.unwrap();
    assert_eq!(state.owner, "deals/b");
    let kept = hub.pieces.get(&(&key(1)).try_into().unwrap());
    let source = kept.unwrap().unwrap().source;
    assert!(matches!(source, Source::Unix { token, .. } if token == "second"));
    assert_eq!(b.publish().await, Code::Unavailable);
    assert_eq!(
        b.withdraw(1).await.unwrap().phase(),
        hub_proto::v1::PiecePhase::Withdrawn
    );
}
