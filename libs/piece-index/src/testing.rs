//! A hub for component tests: the real protocol and data plane over pieces in a folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hub_proto::v1::{self, PiecePhase, PieceState, Use};
use hub_proto::{HubConfig, with_code};
use lotus_dataplane::{DataError, FdServer, OpenToken};
use lotus_runtime::CancellationToken;
use lotus_types::{Commitment, Kind, PaddedSize, PieceCid, PieceInfo};
use sha2::{Digest as _, Sha256};
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status};

/// Longest that the end of a hub takes.
const STOP: Duration = Duration::from_secs(20);

/// A hub with pieces. Its socket and data socket lie in a folder of its own.
#[derive(Debug)]
pub struct FakeHub {
    state: Arc<State>,
    /// Its own, so that its end takes every connection with it, as a crash would.
    runtime: Option<Runtime>,
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.stop();
    }
}

#[derive(Debug)]
struct State {
    dir: tempfile::TempDir,
    pieces: Mutex<Pieces>,
    events: watch::Sender<Arc<Vec<v1::Event>>>,
}

#[derive(Debug, Default)]
struct Pieces {
    states: BTreeMap<String, PieceState>,
    leases: u64,
}

/// A hub with no pieces, serving.
///
/// # Panics
/// When the system gives no folder or socket.
pub fn fake_hub() -> FakeHub {
    let state = Arc::new(State {
        dir: tempfile::tempdir().expect("a temporary folder"),
        pieces: Mutex::default(),
        events: watch::Sender::default(),
    });
    let mut hub = FakeHub {
        state,
        runtime: None,
    };
    hub.start();
    hub
}

impl FakeHub {
    /// How a spoke reaches it.
    #[must_use]
    pub fn config(&self) -> HubConfig {
        HubConfig {
            addr: format!("unix:{}", self.state.socket().display()),
            ..HubConfig::default()
        }
    }

    /// Serves again after [`FakeHub::stop`].
    ///
    /// # Panics
    /// When the sockets cannot be bound.
    pub fn start(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let within = runtime.enter();
        let socket = self.state.socket();
        drop(std::fs::remove_file(&socket));
        let listener = UnixListener::bind(&socket).expect("a socket");
        let data = FdServer::bind(&self.state.data_socket(), self.state.clone()).expect("a socket");
        drop(within);
        let state = self.state.clone();
        // Both end with the runtime.
        drop(runtime.spawn(data.run(CancellationToken::new())));
        drop(runtime.spawn(async move {
            tonic::transport::Server::builder()
                .add_service(v1::hub_server::HubServer::from_arc(state.clone()))
                .add_service(v1::pieces_server::PiecesServer::from_arc(state.clone()))
                .add_service(v1::unsealed_server::UnsealedServer::from_arc(state.clone()))
                .add_service(v1::events_server::EventsServer::from_arc(state))
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
        }));
        self.runtime = Some(runtime);
    }

    /// Ends it as a crash would; the pieces stay. Nothing of it listens when this returns.
    ///
    /// # Panics
    /// When its thread panicked.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A runtime can not be waited for on a thread of another one.
            let ended = std::thread::spawn(move || runtime.shutdown_timeout(STOP));
            ended.join().expect("the fake hub ends");
        }
    }

    /// Adds an active piece that one deal brought.
    ///
    /// # Panics
    /// When the piece cannot be written.
    pub fn add(&self, bytes: &[u8], wanted: Use) -> PieceInfo {
        let mut comm_p: [u8; 32] = Sha256::digest(bytes).into();
        comm_p[31] &= 0x3f;
        let piece = PieceInfo {
            cid: PieceCid::new(Commitment(comm_p)),
            size: PaddedSize::to_hold(bytes.len() as u64).expect("a small piece"),
            raw_size: bytes.len() as u64,
        };
        std::fs::write(self.state.file(&piece.cid.to_string()), bytes).expect("disk space");
        self.state.put(PieceState {
            key: Some(v1::DealKey {
                client: "t01".into(),
                id: piece.cid.to_string(),
            }),
            phase: PiecePhase::Active.into(),
            piece_cid: piece.cid.to_string(),
            piece_size: piece.size.get(),
            raw_size: piece.raw_size,
            r#use: Some(wanted),
            ..PieceState::default()
        });
        piece
    }

    /// Moves a piece to another phase.
    pub fn set_phase(&self, piece: &PieceCid, phase: PiecePhase) {
        let key = piece.to_string();
        let known = self.state.pieces().states.get(&key).cloned();
        if let Some(mut state) = known {
            state.phase = phase.into();
            self.state.put(state);
        }
    }

    /// Takes the unsealed copy of a piece away.
    ///
    /// # Panics
    /// When there is none.
    pub fn lose(&self, piece: &PieceCid) {
        std::fs::remove_file(self.state.file(&piece.to_string())).expect("the piece");
    }

    /// Leases given so far.
    #[must_use]
    pub fn leases(&self) -> u64 {
        self.state.pieces().leases
    }
}

/// `Use` of a CAR that is indexed and advertised.
#[must_use]
pub fn indexed() -> Use {
    Use {
        index: true,
        announce_payload: true,
        announce_piece: true,
        format: "car".into(),
    }
}

impl State {
    fn socket(&self) -> PathBuf {
        self.dir.path().join("hub.sock")
    }

    fn data_socket(&self) -> PathBuf {
        self.dir.path().join("data.sock")
    }

    fn file(&self, piece: &str) -> PathBuf {
        self.dir.path().join(piece)
    }

    fn pieces(&self) -> MutexGuard<'_, Pieces> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, state: PieceState) {
        let mut pieces = self.pieces();
        pieces.states.insert(state.piece_cid.clone(), state.clone());
        self.events.send_modify(|log| {
            let log = Arc::make_mut(log);
            log.push(v1::Event {
                seq: log.len() as u64 + 1,
                generation: 1,
                unix_ms: 0,
                what: Some(v1::event::What::Piece(state)),
            });
        });
    }
}

fn unused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not for spokes that read"))
}

fn absent(what: &str) -> Status {
    with_code(Code::NotFound, Kind::Data, format!("no {what}"), "", None)
}

#[async_trait::async_trait]
impl OpenToken for State {
    async fn open(&self, token: &str, _: Option<&str>) -> Result<(File, u64), DataError> {
        let file = File::open(self.file(token)).map_err(DataError::io("piece"))?;
        let len = file.metadata().map_err(DataError::io("piece"))?.len();
        Ok((file, len))
    }
}

#[async_trait::async_trait]
impl v1::hub_server::Hub for State {
    async fn hello(
        &self,
        _: Request<v1::HelloRequest>,
    ) -> Result<Response<v1::HelloResponse>, Status> {
        Ok(Response::new(v1::HelloResponse {
            major: hub_proto::API_VERSION.0,
            minor: hub_proto::API_VERSION.1,
            generation: 1,
            data_socket: self.data_socket().display().to_string(),
            ..v1::HelloResponse::default()
        }))
    }

    async fn identity(
        &self,
        _: Request<v1::IdentityRequest>,
    ) -> Result<Response<v1::IdentityResponse>, Status> {
        unused()
    }

    async fn safe_to_restart(
        &self,
        _: Request<v1::SafeToRestartRequest>,
    ) -> Result<Response<v1::SafeToRestartResponse>, Status> {
        unused()
    }

    type WatchProvingStream = Pin<Box<dyn Stream<Item = Result<v1::ProvingState, Status>> + Send>>;

    async fn watch_proving(
        &self,
        _: Request<v1::WatchProvingRequest>,
    ) -> Result<Response<Self::WatchProvingStream>, Status> {
        unused()
    }
}

#[async_trait::async_trait]
impl v1::pieces_server::Pieces for State {
    async fn offer(&self, _: Request<v1::OfferRequest>) -> Result<Response<PieceState>, Status> {
        unused()
    }

    async fn status(
        &self,
        _: Request<v1::PieceStatusRequest>,
    ) -> Result<Response<PieceState>, Status> {
        unused()
    }

    async fn withdraw(
        &self,
        _: Request<v1::WithdrawRequest>,
    ) -> Result<Response<PieceState>, Status> {
        unused()
    }

    /// Two pieces a page, so that tests turn pages.
    async fn list(
        &self,
        request: Request<v1::ListPiecesRequest>,
    ) -> Result<Response<v1::ListPiecesResponse>, Status> {
        let after = request.into_inner().after;
        let pieces: Vec<_> = self
            .pieces()
            .states
            .range::<str, _>((
                std::ops::Bound::Excluded(after.as_str()),
                std::ops::Bound::Unbounded,
            ))
            .map(|(_, s)| s.clone())
            .take(2)
            .collect();
        let full = pieces.len() == 2;
        let next = pieces.last().filter(|_| full);
        Ok(Response::new(v1::ListPiecesResponse {
            next: next.map(|s| s.piece_cid.clone()).unwrap_or_default(),
            pieces,
        }))
    }
}

#[async_trait::async_trait]
impl v1::unsealed_server::Unsealed for State {
    async fn locate(
        &self,
        _: Request<v1::LocateRequest>,
    ) -> Result<Response<v1::LocateResponse>, Status> {
        unused()
    }

    async fn lease(
        &self,
        request: Request<v1::LeaseRequest>,
    ) -> Result<Response<v1::LeaseResponse>, Status> {
        let request = request.into_inner();
        let mut pieces = self.pieces();
        let piece = pieces.states.get(&request.piece_cid).cloned();
        let piece = piece
            .filter(|p| self.file(&p.piece_cid).exists())
            .ok_or_else(|| absent("such piece"))?;
        pieces.leases += 1;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let until = now + Duration::from_secs(request.ttl_seconds.min(60).into());
        Ok(Response::new(v1::LeaseResponse {
            token: piece.piece_cid,
            generation: 1,
            expires_unix_ms: u64::try_from(until.as_millis()).unwrap_or(u64::MAX),
            raw_size: piece.raw_size,
            piece_size: piece.piece_size,
        }))
    }

    async fn request_unseal(
        &self,
        _: Request<v1::LocateRequest>,
    ) -> Result<Response<v1::LocateResponse>, Status> {
        unused()
    }
}

#[async_trait::async_trait]
impl v1::events_server::Events for State {
    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;

    async fn subscribe(
        &self,
        request: Request<v1::SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let mut next =
            usize::try_from(request.into_inner().from_seq.saturating_sub(1)).unwrap_or(0);
        let mut log = self.events.subscribe();
        Ok(Response::new(Box::pin(async_stream::stream! {
            loop {
                let now = log.borrow_and_update().clone();
                while let Some(event) = now.get(next) {
                    next += 1;
                    yield Ok(event.clone());
                }
                if log.changed().await.is_err() {
                    return;
                }
            }
        })))
    }
}
