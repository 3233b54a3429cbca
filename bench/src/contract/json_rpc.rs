//! The peer of the hub API: the same journal, told as JSON-RPC in the manner of Lotus, over HTTP/1.1
//! with TLS and a token. Runs as a process of its own, `lotus-bench json-rpc`.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use hub_proto::v1::event::What;
use hub_proto::v1::{self, PieceState};
use hyper::body::Incoming;
use hyper::header::AUTHORIZATION;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use jsonrpsee::RpcModule;
use jsonrpsee::server::{HttpBody, Methods, Server, ServerConfig, TowerService, stop_channel};
use jsonrpsee::types::{ErrorObjectOwned, Params};
use lotus_e2e::Failed;
use lotus_identity::Authority;
use lotus_journal::{Journal, JournalError, Map};
use lotus_miner::config::PiecesConfig;
use lotus_miner::events::EventLog;
use lotus_miner::pieces::Pieces;
use lotus_tokens::{Perm, Tokens};
use lotus_types::{DealKey, Generation};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tower::Service as _;
use tower::layer::util::Identity;

use super::pieces;

/// Methods.
pub(super) const STATUS: &str = "Filecoin.PieceStatus";
pub(super) const LIST: &str = "Filecoin.PiecesList";
pub(super) const EVENTS: &str = "Filecoin.EventsSince";
pub(super) const OFFER: &str = "Filecoin.PieceOffer";
/// The hub's events, as it keeps them.
const LOG: Map<u64, ByteBuf> = Map::new("hub.events");
/// Connections: more than any measurement has.
const CONNECTIONS: u32 = 4096;

/// Where it finds everything.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Folder with a copy of the hub's journal
    #[arg(long)]
    repo: PathBuf,
    /// The hub's authority
    #[arg(long)]
    authority: PathBuf,
}

/// A hand-off in JSON: all that [`PieceState`] has, in the names that Lotus would give.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Piece {
    pub(super) client: String,
    pub(super) id: String,
    phase: String,
    #[serde(rename = "PieceCID")]
    piece_cid: String,
    piece_size: u64,
    raw_size: u64,
    pulled_bytes: u64,
    sector: Option<u64>,
    offset: Option<u64>,
    reason: String,
    index: bool,
    announce_payload: bool,
    announce_piece: bool,
    format: String,
    sector_state: String,
    start_epoch: i64,
    end_epoch: i64,
    allocation_client: u64,
    allocation_id: u64,
    notify_address: String,
    notify_payload: Vec<u8>,
    owner: String,
}

impl From<PieceState> for Piece {
    fn from(state: PieceState) -> Self {
        let phase = state.phase().as_str_name().to_owned();
        let key = state.key.unwrap_or_default();
        let usage = state.r#use.unwrap_or_default();
        let terms = state.terms.unwrap_or_default();
        Self {
            client: key.client,
            id: key.id,
            phase,
            piece_cid: state.piece_cid,
            piece_size: state.piece_size,
            raw_size: state.raw_size,
            pulled_bytes: state.pulled_bytes,
            sector: state.sector,
            offset: state.offset,
            reason: state.reason,
            index: usage.index,
            announce_payload: usage.announce_payload,
            announce_piece: usage.announce_piece,
            format: usage.format,
            sector_state: state.sector_state,
            start_epoch: terms.start_epoch,
            end_epoch: terms.end_epoch,
            allocation_client: terms.allocation_client,
            allocation_id: terms.allocation_id,
            notify_address: terms.notify_address,
            notify_payload: terms.notify_payload,
            owner: state.owner,
        }
    }
}

/// An event in JSON. The journal of a measurement has none but those of pieces.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Event {
    pub(super) seq: u64,
    generation: u64,
    pub(super) unix_ms: u64,
    piece: Option<Piece>,
}

impl From<v1::Event> for Event {
    fn from(event: v1::Event) -> Self {
        let piece = match event.what {
            Some(What::Piece(state)) => Some(state.into()),
            _ => None,
        };
        Self {
            seq: event.seq,
            generation: event.generation,
            unix_ms: event.unix_ms,
            piece,
        }
    }
}

/// Answers until it is killed. Its address is the first line of standard output.
pub(crate) async fn run(options: &Options) -> Result<(), Failed> {
    let failed = |e: lotus_runtime::Fault| Failed::at("json-rpc", e);
    let hub = Arc::new(Hub::open(options)?);
    let tokens = Arc::new(Tokens::open(&options.repo)?);
    let authority = Authority::open(&options.authority).map_err(failed)?;
    // The hub's kind of certificate; who calls shows a token in place of one.
    let of_hub = authority.server_config(&[]).map_err(failed)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| Failed::at("TLS", e))?
        .with_no_client_auth()
        .with_cert_resolver(of_hub.cert_resolver);
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let tls = TlsAcceptor::from(Arc::new(tls));
    let settings = ServerConfig::builder()
        .http_only()
        .max_connections(CONNECTIONS)
        .build();
    let rpc = Server::builder().set_config(settings).to_service_builder();
    let (stopping, _handle) = stop_channel();
    let rpc = rpc.build(methods(hub)?, stopping);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("{}", listener.local_addr()?);
    let mut connections = JoinSet::new();
    loop {
        let (tcp, _) = listener.accept().await?;
        while connections.try_join_next().is_some() {}
        connections.spawn(serve(tls.clone(), tcp, tokens.clone(), rpc.clone()));
    }
}

type Rpc = TowerService<Identity, Identity>;

async fn serve(tls: TlsAcceptor, tcp: TcpStream, tokens: Arc<Tokens>, rpc: Rpc) {
    let shaken = match tcp.set_nodelay(true) {
        Ok(()) => tls.accept(tcp).await,
        Err(e) => Err(e),
    };
    let stream = match shaken {
        Ok(stream) => stream,
        Err(e) => return eprintln!("json-rpc: {e}"),
    };
    let service = service_fn(move |request| {
        let (tokens, rpc) = (tokens.clone(), rpc.clone());
        async move { Ok::<_, Infallible>(answer(&tokens, rpc, request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(e) = served {
        eprintln!("json-rpc: {e}");
    }
}

async fn answer(tokens: &Tokens, mut rpc: Rpc, request: Request<Incoming>) -> Response<HttpBody> {
    let refusal = |status, why: String| {
        let mut response = Response::new(HttpBody::from(why));
        *response.status_mut() = status;
        response
    };
    let shown = request.headers().get(AUTHORIZATION);
    let shown = shown.and_then(|v| v.to_str().ok()?.strip_prefix("Bearer "));
    let perms = shown.and_then(|token| tokens.verify(token));
    if !perms.is_some_and(|p| p.contains(&Perm::Read)) {
        return refusal(StatusCode::UNAUTHORIZED, "no token of this hub".into());
    }
    match rpc.call(request).await {
        Ok(response) => response,
        Err(e) => refusal(StatusCode::INTERNAL_SERVER_ERROR, e.to_string()),
    }
}

/// What it answers from.
struct Hub {
    journal: Journal,
    pieces: Arc<Pieces>,
    events: EventLog,
}

type Answer<T> = Result<T, ErrorObjectOwned>;

fn methods(hub: Arc<Hub>) -> Result<Methods, Failed> {
    let mut module = RpcModule::from_arc(hub);
    let failed = |e| Failed::at("json-rpc", e);
    module
        .register_method(STATUS, |params, hub, _| hub.status(&params))
        .map_err(failed)?;
    module
        .register_method(LIST, |params, hub, _| hub.list(&params))
        .map_err(failed)?;
    module
        .register_method(EVENTS, |params, hub, _| hub.since(&params))
        .map_err(failed)?;
    // Waits for the disk.
    module
        .register_blocking_method(OFFER, |params, hub, _| hub.offer(&params))
        .map_err(failed)?;
    Ok(module.into())
}

impl Hub {
    fn open(options: &Options) -> Result<Self, Failed> {
        let failed = |e: JournalError| Failed::at("journal", e);
        let journal = Journal::open(&options.repo.join("journal.redb")).map_err(failed)?;
        let events =
            EventLog::open(journal.clone(), Generation(1), pieces::KEEP).map_err(failed)?;
        let dir = options.repo.join("pieces");
        let cfg = PiecesConfig::default();
        let pieces = Pieces::open(journal.clone(), events.clone(), dir, cfg).map_err(failed)?;
        Ok(Self {
            journal,
            pieces,
            events,
        })
    }

    /// What the hub reads for one piece, and how far it is.
    fn status(&self, params: &Params) -> Answer<Piece> {
        let (client, id): (String, String) = params.parse()?;
        let key: DealKey = format!("{client}/{id}").parse().map_err(error)?;
        let offer = self.pieces.get(&key).map_err(error)?;
        let offer = offer.ok_or_else(|| error("no piece was offered for it"))?;
        Ok(self.piece(&key, &offer))
    }

    fn piece(&self, key: &DealKey, offer: &pieces::Offer) -> Piece {
        let mut state = pieces::state(key, offer);
        if let Some((pulled, waits)) = self.pieces.progress(key) {
            (state.pulled_bytes, state.reason) = (pulled, waits);
        }
        state.into()
    }

    fn list(&self, params: &Params) -> Answer<Vec<Piece>> {
        let (after, limit): (String, usize) = params.parse()?;
        let after: Option<DealKey> = match after.as_str() {
            "" => None,
            text => Some(text.parse().map_err(error)?),
        };
        let found = self.pieces.list(after.as_ref(), limit).map_err(error)?;
        let pieces = found.iter().map(|(key, offer)| self.piece(key, offer));
        Ok(pieces.collect())
    }

    /// Events behind a number. Where there are none the journal is not read.
    fn since(&self, params: &Params) -> Answer<Vec<Event>> {
        let (after, limit): (u64, usize) = params.parse()?;
        if after >= self.events.last() {
            return Ok(Vec::new());
        }
        let page = self.journal.read(|v| v.scan(&LOG, Some(&after), limit));
        let page = page.map_err(|e: JournalError| error(e))?;
        page.iter()
            .map(|(_, bytes)| v1::Event::decode(bytes.as_slice()).map(Event::from))
            .collect::<Result<_, _>>()
            .map_err(error)
    }

    /// The two events of an offer whose time is over. Returns the number of the last.
    fn offer(&self, params: &Params) -> Answer<u64> {
        let number: u64 = params.one()?;
        let mut last = 0;
        for offer in pieces::refused(number).map_err(error)? {
            let what = What::Piece(pieces::state(&pieces::deal(number), &offer));
            let appended = self.journal.write(|tx| self.events.append(tx, what));
            last = appended.map_err(|e: JournalError| error(e))?;
            self.events.committed();
        }
        Ok(last)
    }
}

fn error(why: impl ToString) -> ErrorObjectOwned {
    ErrorObjectOwned::owned(1, why.to_string(), None::<()>)
}
