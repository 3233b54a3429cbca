use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use cid::Cid;
use http::header::{
    ACCEPT_RANGES, ALLOW, CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_LOCATION,
    CONTENT_TYPE, ETAG, HeaderName, HeaderValue, VARY,
};
use http::request::Parts;
use http::{HeaderMap, Method, StatusCode, Version};
use lotus_car::{Link, Walk, WalkError, WalkMemory, car_header, section_prefix, verify};
use lotus_piece_index::{IndexError, Leased, Location, PieceIndex, PieceSource, SourceError};
use lotus_runtime::{PerClient, trace};
use lotus_types::{Kind, PieceCid};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::answer::{IMMUTABLE, Refusal, common, has_already, set};
use crate::piece;
use crate::request::{Ask, Form};
use crate::send::{Outlet, Place, at_hand, body};
use crate::unseal::Unseals;

/// What requests share.
pub(crate) struct Gateway {
    pub(crate) index: PieceIndex,
    /// Set once the hub is known.
    pub(crate) hub: OnceLock<Hub>,
    /// Requests served at once, in all.
    pub(crate) places: Arc<Semaphore>,
    /// Requests served at once, for each client.
    pub(crate) clients: Arc<PerClient>,
    /// What walks keep in mind.
    pub(crate) memory: Arc<WalkMemory>,
    /// Owns the threads that walk DAGs.
    pub(crate) walks: TaskTracker,
}

/// What a known hub gives.
#[derive(Clone, Debug)]
pub(crate) struct Hub {
    pub(crate) source: PieceSource,
    pub(crate) unseals: Arc<Unseals>,
}

impl Hub {
    /// The piece, or what a client gets that cannot have it now. `shown` is its name.
    pub(crate) async fn open(&self, piece: &PieceCid, shown: &Cid) -> Result<Leased, Refusal> {
        match self.source.open(piece).await {
            Ok(leased) => Ok(leased),
            Err(e) if e.is_not_found() => {
                Err(Refusal::not_found(format!("piece {shown} is not here")))
            }
            Err(e) if e.kind() == Kind::Capacity => Err(self.unseals.ask(piece).await),
            Err(e) => Err(Refusal::unreadable(e.kind(), e.to_string())),
        }
    }
}

pub(crate) fn router(gateway: Arc<Gateway>) -> Router {
    Router::new().fallback(handle).with_state(gateway)
}

/// The two endpoints differ in what they allow in a path too much for patterns.
async fn handle(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    // No endpoint takes a body.
    let (request, _) = request.into_parts();
    let head = request.method == Method::HEAD;
    let path = request.uri.path();
    let kind = match path.split('/').nth(1) {
        Some("ipfs") => "ipfs",
        Some("piece") => "piece",
        _ => "other",
    };
    let span = tracing::info_span!("retrieve", kind, path);
    trace::set_parent(&span, &trace::from_headers(&request.headers));
    let mut response = async {
        let answer = gateway.answer(kind, head, &request).await;
        answer.unwrap_or_else(IntoResponse::into_response)
    }
    .instrument(span)
    .await;
    let status = response.status().as_u16().to_string();
    let http = if request.version == Version::HTTP_2 {
        "2"
    } else {
        "1"
    };
    let labels = [
        ("kind", kind.into()),
        ("status", status),
        ("http", http.into()),
    ];
    metrics::counter!("lotus_markets_retrieval_requests_total", &labels).increment(1);
    common(response.headers_mut());
    if head {
        *response.body_mut() = Body::empty();
    }
    response
}

impl Gateway {
    async fn answer(
        self: &Arc<Self>,
        kind: &str,
        head: bool,
        request: &Parts,
    ) -> Result<Response, Refusal> {
        let path = request.uri.path();
        let rest = path.strip_prefix(&format!("/{kind}/"));
        let Some(rest) = rest.filter(|_| kind != "other") else {
            return Err(Refusal::new(
                StatusCode::NOT_FOUND,
                "nothing is served here",
                "ask for /ipfs/{cid}?format=car, /ipfs/{cid}?format=raw or /piece/{cid}",
            ));
        };
        if !head && request.method != Method::GET {
            let mut refused = Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{} is not possible here", request.method),
                "use GET or HEAD",
            )
            .into_response();
            refused
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return Ok(refused);
        }
        let place = self.place(request)?;
        if kind == "piece" {
            return piece::answer(self, rest, head, request, place).await;
        }
        let ask = Ask::parse(rest, request.uri.query(), &request.headers)?;
        let etag = ask.etag();
        let mut headers = HeaderMap::new();
        set(&mut headers, ETAG, &etag);
        headers.insert(CACHE_CONTROL, IMMUTABLE);
        headers.insert(VARY, HeaderValue::from_static("Accept"));
        // Neither a block nor a CAR is sent in parts: `entity-bytes` is for that.
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("none"));
        if let Some(location) = ask.location(path, request.uri.query()) {
            set(&mut headers, CONTENT_LOCATION, &location);
        }
        if has_already(&request.headers, &etag) {
            return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
        }
        set(&mut headers, CONTENT_TYPE, &ask.content_type());
        set(&mut headers, CONTENT_DISPOSITION, &ask.disposition());
        let root = ask.root.to_string();
        set(&mut headers, HeaderName::from_static("x-ipfs-path"), path);
        set(&mut headers, HeaderName::from_static("x-ipfs-roots"), &root);
        match ask.form {
            Form::Raw => self.raw(ask, headers, head, place).await,
            Form::Car(_) => self.car(ask, headers, head, place).await,
        }
    }

    /// Leave to serve a request, if its client and all together do not have too many.
    fn place(&self, request: &Parts) -> Result<Place, Refusal> {
        let peer = request.extensions.get::<ConnectInfo<SocketAddr>>();
        let peer = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |c| c.0.ip());
        let sender = self.clients.sender(peer, &request.headers);
        let many = |of: &'static str| {
            metrics::counter!("lotus_markets_retrieval_refused_total", "limit" => of).increment(1);
            let error = match of {
                "client" => "too many requests at once from this address",
                _ => "too many requests at once",
            };
            Refusal::later(StatusCode::TOO_MANY_REQUESTS, error, 1)
        };
        let share = self.clients.take(sender).ok_or_else(|| many("client"))?;
        let total = self.places.clone().try_acquire_owned();
        Ok(Place::new(total.map_err(|_| many("total"))?, share))
    }

    pub(crate) fn hub(&self) -> Result<&Hub, Refusal> {
        self.hub.get().ok_or_else(|| {
            Refusal::later(
                StatusCode::SERVICE_UNAVAILABLE,
                "the storage behind this gateway is not reachable yet",
                5,
            )
        })
    }

    /// Blocks from the pieces that hold them.
    fn blocks(&self) -> Result<Blocks, Refusal> {
        Ok(Blocks {
            index: self.index.clone(),
            hub: self.hub()?.clone(),
            runtime: Handle::current(),
            last: None,
        })
    }

    async fn raw(
        &self,
        ask: Ask,
        mut headers: HeaderMap,
        head: bool,
        place: Place,
    ) -> Result<Response, Refusal> {
        let root = ask.root;
        let data = if let Link::Inline(inline) = Link::from(&root) {
            inline.data
        } else {
            let mut blocks = self.blocks()?;
            let span = tracing::Span::current();
            let read = self.walks.spawn_blocking(move || {
                let _in = span.enter();
                let data = blocks
                    .get(&root)
                    .map_err(|source| WalkError::Read { cid: root, source })?
                    .ok_or(WalkError::Missing(root))?;
                verify(&root, &data)?;
                Ok(data)
            });
            let read = read
                .await
                .map_err(|e| Refusal::unreadable(Kind::Fatal, format!("reading the block: {e}")))?;
            read.map_err(|e| refuse(&ask, e))?
        };
        headers.insert(CONTENT_LENGTH, data.len().into());
        if head {
            return Ok(headers.into_response());
        }
        Ok((headers, at_hand("ipfs", place, data)).into_response())
    }

    async fn car(
        self: &Arc<Self>,
        ask: Ask,
        headers: HeaderMap,
        head: bool,
        place: Place,
    ) -> Result<Response, Refusal> {
        let Form::Car(select) = ask.form else {
            return Err(Refusal::unreadable(
                Kind::Fatal,
                "a block was taken for a CAR",
            ));
        };
        let mut blocks = self.blocks()?;
        let (found, start) = oneshot::channel();
        let (outlet, body) = body("ipfs", place);
        let span = tracing::Span::current();
        let (root, path) = (ask.root, ask.path.clone());
        let (memory, runtime) = (self.memory.clone(), Handle::current());
        self.walks.spawn_blocking(move || {
            let _in = span.enter();
            let walk = Walk::within(&memory, &root, &path, select, |cid: &Cid| blocks.get(cid));
            let walk = match walk {
                Ok(walk) => walk,
                Err(e) => {
                    drop(found.send(Err(e)));
                    return;
                }
            };
            // Fails when the client went away: then there is nobody to serve.
            if found.send(Ok(())).is_err() || head {
                return;
            }
            stream_car(&root, walk, outlet, &runtime);
        });
        match start.await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(refuse(&ask, e)),
            Err(_) => return Err(Refusal::unreadable(Kind::Fatal, "the walk ended by itself")),
        }
        Ok((headers, body).into_response())
    }
}

/// Sends a CAR part by part. Ends when the client goes away; an error breaks the body off, so
/// that the client cannot take the part for the whole.
fn stream_car(
    root: &Cid,
    walk: impl Iterator<Item = Result<(Cid, Bytes), WalkError>>,
    outlet: Outlet,
    runtime: &Handle,
) {
    let send = |data: Bytes| runtime.block_on(outlet.send(data));
    let mut next = car_header(&[*root]);
    for block in walk {
        let (cid, data) = match block {
            Ok(block) => block,
            Err(e) => {
                tracing::warn!(%root, error = %e, "CAR is cut short");
                // What came before is good; nothing follows, whether it arrives or not.
                let _gone = send(next.into());
                return;
            }
        };
        next.extend_from_slice(&section_prefix(&cid, data.len()));
        // Small blocks travel together, large ones are not copied.
        let sent = if data.len() < 16 << 10 {
            next.extend_from_slice(&data);
            if next.len() < 64 << 10 {
                continue;
            }
            send(std::mem::take(&mut next).into())
        } else {
            send(std::mem::take(&mut next).into()).and_then(|()| send(data))
        };
        if sent.is_err() {
            return;
        }
    }
    if send(next.into()).is_ok() {
        outlet.finish();
    }
}

/// What a request gets whose DAG cannot be followed to the end of its path.
fn refuse(ask: &Ask, e: WalkError) -> Refusal {
    match e {
        WalkError::Missing(cid) if ask.only_if_cached && cid == ask.root => Refusal::new(
            StatusCode::PRECONDITION_FAILED,
            format!("{cid} is not here"),
            "ask without only-if-cached, or another provider",
        ),
        WalkError::Missing(_) | WalkError::NoSuchPath { .. } | WalkError::Node(_) => {
            Refusal::not_found(e.to_string())
        }
        WalkError::OutOfRange { .. } => {
            Refusal::bad(e.to_string(), "ask for bytes that the file has")
        }
        WalkError::TooWide { .. } => Refusal::bad(e.to_string(), "ask for a part of the DAG"),
        WalkError::Busy { .. } => Refusal::later(StatusCode::SERVICE_UNAVAILABLE, e.to_string(), 5),
        WalkError::Corrupt(_) => Refusal::unreadable(Kind::Data, e.to_string()),
        WalkError::Read { ref source, .. } => Refusal::unreadable(kind_of(source), e.to_string()),
    }
}

fn source_error(e: &io::Error) -> Option<&SourceError> {
    e.get_ref()?.downcast_ref()
}

fn kind_of(e: &io::Error) -> Kind {
    let index = || Some(e.get_ref()?.downcast_ref::<IndexError>()?.kind());
    source_error(e)
        .map(SourceError::kind)
        .or_else(index)
        .unwrap_or(Kind::Fatal)
}

/// Finds and reads blocks, for one thread.
struct Blocks {
    index: PieceIndex,
    hub: Hub,
    runtime: Handle,
    /// The piece of the last block: the next is likely in it.
    last: Option<(PieceCid, Leased)>,
}

impl Blocks {
    /// The bytes that the index names. Of several pieces the first whose bytes are right; of one
    /// they are not yet verified.
    fn get(&mut self, cid: &Cid) -> io::Result<Option<Bytes>> {
        let mut found = self.index.find(cid.hash()).map_err(io::Error::other)?;
        if let Some((last, _)) = &self.last {
            found.sort_by_key(|l| l.piece != *last);
        }
        let mut failed = None;
        // Whoever asked verifies them, and a hash is most of the work.
        let alone = found.len() == 1;
        for at in found {
            match self.read(&at) {
                Ok(data) if alone || verify(cid, &data).is_ok() => return Ok(Some(data)),
                Ok(_) => {
                    failed = Some(io::Error::other(format!(
                        "the bytes in piece {} are not those of the block",
                        at.piece
                    )));
                }
                // The index is ahead of or behind the hub: as good as not indexed.
                Err(e) if source_error(&e).is_some_and(SourceError::is_not_found) => {}
                Err(e) => {
                    if source_error(&e).is_some_and(|e| e.kind() == Kind::Capacity) {
                        // The client is told to come back, as for anything that is busy.
                        drop(self.runtime.block_on(self.hub.unseals.ask(&at.piece)));
                    }
                    failed = Some(e);
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }

    fn read(&mut self, at: &Location) -> io::Result<Bytes> {
        let fresh = matches!(&self.last, Some((p, l)) if *p == at.piece && l.is_fresh());
        if !fresh {
            let open = self.hub.source.open(&at.piece);
            let leased = self.runtime.block_on(open).map_err(io::Error::other)?;
            self.last = Some((at.piece, leased));
        }
        match &self.last {
            Some((_, leased)) => leased.read_blocking(&self.runtime, at.offset, at.len as usize),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}
