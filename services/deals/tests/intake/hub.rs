//! A hub as the deal service sees it: gRPC, credits, pull by descriptor, events.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fvm_shared::crypto::signature::Signature;
use hub_proto::v1::{self, event::What, source::At};
use hub_proto::{status, with_code};
use lotus_types::Kind;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tokio_stream::wrappers::{UnboundedReceiverStream, UnixListenerStream};
use tonic::{Code, Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;
type Events = Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) pieces: HashMap<String, v1::PieceState>,
    pub(crate) offers: Vec<v1::OfferRequest>,
    pub(crate) bytes: HashMap<String, Vec<u8>>,
    pub(crate) released: Vec<String>,
    pub(crate) traces: Vec<String>,
    /// No room for anyone.
    pub(crate) full: bool,
    /// Pieces calls answer "unavailable".
    pub(crate) down: bool,
    /// What was to be published, in order of the calls.
    pub(crate) publishes: Vec<v1::PublishRequest>,
    /// What is said of it.
    pub(crate) published: v1::PublishState,
    events: Vec<v1::Event>,
    followers: Vec<UnboundedSender<Result<v1::Event, Status>>>,
}

#[derive(Clone)]
pub(crate) struct FakeHub(Arc<Mutex<State>>);

pub(crate) fn name(key: &v1::DealKey) -> String {
    format!("{}/{}", key.client, key.id)
}

impl FakeHub {
    pub(crate) fn start(tasks: &mut JoinSet<()>, socket: &Path) -> Self {
        let hub = Self(Arc::default());
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        let h = hub.clone();
        tasks.spawn(async move {
            tonic::transport::Server::builder()
                .add_service(v1::hub_server::HubServer::new(h.clone()))
                .add_service(v1::capacity_server::CapacityServer::new(h.clone()))
                .add_service(v1::pieces_server::PiecesServer::new(h.clone()))
                .add_service(v1::events_server::EventsServer::new(h.clone()))
                .add_service(v1::chain_server::ChainServer::new(h))
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .unwrap();
        });
        hub
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn emit(&self, what: What) {
        let mut s = self.state();
        let event = v1::Event {
            seq: s.events.len() as u64 + 1,
            generation: 1,
            unix_ms: 0,
            what: Some(what),
        };
        s.events.push(event.clone());
        s.followers.retain(|f| f.send(Ok(event.clone())).is_ok());
    }

    /// Changes a piece and tells the followers.
    pub(crate) fn advance(&self, key: &str, phase: v1::PiecePhase, sector_state: &str) {
        let piece = {
            let mut s = self.state();
            let p = s.pieces.get_mut(key).expect("the hub knows the piece");
            p.set_phase(phase);
            if phase as i32 >= v1::PiecePhase::Placed as i32 {
                (p.sector, p.offset) = (Some(4), Some(2048));
            }
            p.sector_state = sector_state.into();
            p.clone()
        };
        self.emit(What::Piece(piece));
    }

    pub(crate) fn sector(&self, number: u64, to: &str) {
        for p in self.state().pieces.values_mut() {
            if p.sector == Some(number) {
                p.sector_state = to.into();
            }
        }
        self.emit(What::Sector(v1::SectorChanged {
            number,
            from: String::new(),
            to: to.into(),
        }));
    }

    fn up(&self) -> Result<(), Status> {
        if self.state().down {
            return Err(status(Kind::Transport, "going down", "wait", None));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl v1::hub_server::Hub for FakeHub {
    async fn hello(&self, _: Request<v1::HelloRequest>) -> Answer<v1::HelloResponse> {
        Ok(Response::new(v1::HelloResponse {
            major: 1,
            generation: 1,
            // On this host, and takes bytes from the spoke's socket.
            data_socket: "/no/such".into(),
            ..Default::default()
        }))
    }
    async fn identity(&self, _: Request<v1::IdentityRequest>) -> Answer<v1::IdentityResponse> {
        self.up()?;
        Ok(Response::new(v1::IdentityResponse {
            actor: "t01000".into(),
            sector_size: 8 << 20,
            height: 100,
            network: "test".into(),
            proof_mode: "vanilla".into(),
        }))
    }
    async fn safe_to_restart(
        &self,
        _: Request<v1::SafeToRestartRequest>,
    ) -> Answer<v1::SafeToRestartResponse> {
        Err(Status::unimplemented("not used"))
    }
    type WatchProvingStream = Pin<Box<dyn Stream<Item = Result<v1::ProvingState, Status>> + Send>>;
    async fn watch_proving(
        &self,
        _: Request<v1::WatchProvingRequest>,
    ) -> Answer<Self::WatchProvingStream> {
        Err(Status::unimplemented("not used"))
    }
}

#[tonic::async_trait]
impl v1::capacity_server::Capacity for FakeHub {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::CapacityState, Status>> + Send>>;
    async fn watch(&self, _: Request<v1::WatchCapacityRequest>) -> Answer<Self::WatchStream> {
        Err(Status::unimplemented("not used"))
    }
    async fn acquire(&self, r: Request<v1::AcquireRequest>) -> Answer<v1::Credit> {
        self.up()?;
        if self.state().full {
            let wait = Some(Duration::from_secs(7));
            return Err(status(
                Kind::Capacity,
                "every sector is taken",
                "wait",
                wait,
            ));
        }
        Ok(Response::new(v1::Credit {
            id: format!("credit-{}", r.into_inner().key.unwrap().id),
            generation: 1,
            expires_unix_ms: u64::MAX,
        }))
    }
    async fn release(&self, r: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseResponse> {
        self.state().released.push(r.into_inner().id);
        Ok(Response::new(v1::ReleaseResponse {}))
    }
}

#[tonic::async_trait]
impl v1::pieces_server::Pieces for FakeHub {
    async fn offer(&self, r: Request<v1::OfferRequest>) -> Answer<v1::PieceState> {
        self.up()?;
        let trace = lotus_runtime::trace::from_metadata(r.metadata());
        let offer = r.into_inner();
        let key = name(offer.key.as_ref().unwrap());
        let Some(At::Unix(at)) = offer.source.clone().unwrap().at else {
            return Err(Status::invalid_argument("a descriptor is wanted"));
        };
        let state = v1::PieceState {
            key: offer.key.clone(),
            phase: v1::PiecePhase::Offered as i32,
            piece_cid: offer.piece_cid.clone(),
            piece_size: offer.piece_size,
            raw_size: offer.raw_size,
            ..Default::default()
        };
        {
            let mut s = self.state();
            s.traces.push(trace);
            s.offers.push(offer);
            s.pieces.insert(key.clone(), state.clone());
        }
        // The pull, as the hub does it after its answer; here the answer waits for it.
        let (file, len) =
            lotus_dataplane::fetch_fd(Path::new(&at.socket), &at.token, Duration::from_secs(5))
                .await
                .map_err(|e| Status::unavailable(e.to_string()))?;
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0)?;
        self.state().bytes.insert(key, bytes);
        Ok(Response::new(state))
    }
    async fn status(&self, r: Request<v1::PieceStatusRequest>) -> Answer<v1::PieceState> {
        self.up()?;
        let key = name(r.into_inner().key.as_ref().unwrap());
        match self.state().pieces.get(&key) {
            Some(p) => Ok(Response::new(p.clone())),
            None => Err(with_code(
                Code::NotFound,
                Kind::Data,
                "no such piece",
                "offer it",
                None,
            )),
        }
    }
    async fn withdraw(&self, r: Request<v1::WithdrawRequest>) -> Answer<v1::PieceState> {
        self.up()?;
        let key = name(r.into_inner().key.as_ref().unwrap());
        let mut s = self.state();
        let Some(piece) = s.pieces.get_mut(&key) else {
            return Err(with_code(
                Code::NotFound,
                Kind::Data,
                "no such piece",
                "offer it",
                None,
            ));
        };
        piece.set_phase(v1::PiecePhase::Withdrawn);
        Ok(Response::new(piece.clone()))
    }
    async fn list(&self, _: Request<v1::ListPiecesRequest>) -> Answer<v1::ListPiecesResponse> {
        Err(Status::unimplemented("not used"))
    }
}

#[tonic::async_trait]
impl v1::events_server::Events for FakeHub {
    type SubscribeStream = Events;
    async fn subscribe(&self, r: Request<v1::SubscribeRequest>) -> Answer<Events> {
        let (tx, rx) = unbounded_channel();
        let mut s = self.state();
        for e in s.events.iter().filter(|e| e.seq >= r.get_ref().from_seq) {
            tx.send(Ok(e.clone())).unwrap();
        }
        s.followers.push(tx);
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(rx))))
    }
}

#[tonic::async_trait]
impl v1::chain_server::Chain for FakeHub {
    async fn head(&self, _: Request<v1::HeadRequest>) -> Answer<v1::HeadChanged> {
        Err(Status::unimplemented("not used"))
    }
    async fn allocation(
        &self,
        _: Request<v1::AllocationRequest>,
    ) -> Answer<v1::AllocationResponse> {
        Err(with_code(
            Code::NotFound,
            Kind::Chain,
            "no such allocation",
            "make one",
            None,
        ))
    }

    async fn market_client(
        &self,
        r: Request<v1::MarketClientRequest>,
    ) -> Answer<v1::MarketClientResponse> {
        Ok(Response::new(v1::MarketClientResponse {
            key: r.into_inner().client,
            available: "1000".into(),
            collateral_min: "0".into(),
        }))
    }

    async fn publish(&self, r: Request<v1::PublishRequest>) -> Answer<v1::PublishState> {
        self.up()?;
        let mut s = self.state();
        s.publishes.push(r.into_inner());
        Ok(Response::new(s.published.clone()))
    }

    async fn sign_ask(&self, r: Request<v1::SignAskRequest>) -> Answer<v1::SignAskResponse> {
        let signature = Signature::new_bls(vec![u8::try_from(r.into_inner().seq_no).unwrap(); 96]);
        Ok(Response::new(v1::SignAskResponse {
            signature: lotus_actors::encode(&signature),
        }))
    }
}
