//! HTTP and WebSocket: limits around jsonrpsee, which speaks JSON-RPC.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, Method as HttpMethod, Request, Response, StatusCode};
use hyper::body::{Body as _, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use jsonrpsee::RpcModule;
use jsonrpsee::server::{
    BatchRequestConfig, HttpBody, Methods, PingConfig, Server, ServerConfig, StopHandle,
    TowerServiceBuilder, stop_channel,
};
use lotus_runtime::{CancellationToken, Fault, Tls, addr_file};
use lotus_tokens::{Perm, Tokens};
use lotus_types::Kind;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tower::Service as _;
use tower::layer::util::Identity;
use uuid::Uuid;

use crate::auth::{Caller, allowed};
use crate::error::RpcError;
use crate::methods::{Context, METHODS, Method};
use crate::remote::words as refusal;
use crate::streams::{self, Streams};
use crate::{Hub, LotusApiConfig, remote};

/// Where the API is. Source: lotus node/rpc.go, `MinerHandler`.
const PATH: &str = "/rpc/v0";
/// How long answers that are under way may take once the hub stops.
const DRAIN: Duration = Duration::from_secs(2);
/// Pings on a silent WebSocket, and how many of them may stay without answer.
const PING: Duration = Duration::from_secs(30);
const PINGS_LOST: usize = 2;
/// Rest after a failed accept: a shortage of descriptors does not pass at once.
const ACCEPT_REST: Duration = Duration::from_millis(200);

type Rpc = TowerServiceBuilder<Identity, Identity>;

/// The bound API.
pub struct LotusApi {
    listener: TcpListener,
    addr: SocketAddr,
    tls: Option<Tls>,
    cfg: LotusApiConfig,
    tokens: Arc<Tokens>,
}

impl std::fmt::Debug for LotusApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LotusApi({})", self.addr)
    }
}

impl LotusApi {
    /// Binds the address, unless it is off. Writes `run/lotus-api.addr`, and `api` and `token` into
    /// the repo, where programs look that know Lotus' repo.
    pub async fn bind(
        cfg: &LotusApiConfig,
        repo: &Path,
        run: &Path,
    ) -> Result<Option<Self>, Fault> {
        let tokens = Arc::new(Tokens::open(repo)?);
        let Some(wanted) = cfg.address()? else {
            return Ok(None);
        };
        let tls = cfg.tls()?;
        let listener = TcpListener::bind(wanted)
            .await
            .map_err(|e| Fault::bind(&wanted, "lotus_api.listen", &e))?;
        let addr = listener.local_addr()?;
        addr_file::write(run, "lotus-api", &addr.to_string())?;
        std::fs::write(repo.join("api"), multiaddr(addr, tls.is_some()))?;
        let cfg = cfg.clone();
        Ok(Some(Self {
            listener,
            addr,
            tls,
            cfg,
            tokens,
        }))
    }

    /// The address.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Answers until `stop`.
    pub async fn serve(self, hub: Arc<dyn Hub>, stop: CancellationToken) -> Result<(), Fault> {
        let limit = Duration::from_secs(self.cfg.call_secs.max(1));
        let long = Duration::from_secs(self.cfg.long_call_secs).max(limit);
        let tasks = TaskTracker::new();
        let context = Arc::new(Context {
            hub: hub.clone(),
            tokens: self.tokens.clone(),
            session: Uuid::new_v4(),
            started: jiff::Timestamp::now(),
            streams: Streams::new(tasks.clone()),
        });
        let streams = context.streams.clone();
        let methods = methods(context, limit, long)?;
        let settings = ServerConfig::builder()
            .max_request_body_size(self.cfg.max_request_bytes)
            .max_response_body_size(self.cfg.max_response_bytes)
            .max_connections(self.cfg.max_connections)
            .set_batch_request_config(BatchRequestConfig::Limit(self.cfg.max_batch))
            .enable_ws_ping(
                PingConfig::new()
                    .ping_interval(PING)
                    .inactive_limit(PING)
                    .max_failures(PINGS_LOST),
            )
            .build();
        let rpc = Server::builder().set_config(settings).to_service_builder();
        let (stopping, handle) = stop_channel();
        let connection = Connection {
            rpc,
            methods,
            stopping,
            tls: self.tls.clone(),
            tokens: self.tokens,
            hub,
            streams,
            cfg: Arc::new(self.cfg.clone()),
            limit,
            long,
            stop: stop.clone(),
        };
        if let Some(tls) = self.tls {
            let stop = stop.clone();
            tasks.spawn(async move { tls.follow(&stop).await });
        }
        let places = Arc::new(Semaphore::new(self.cfg.max_connections as usize));
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            let tcp = match accepted {
                Ok((tcp, _)) => tcp,
                Err(e) => {
                    tracing::warn!("Lotus API: accept: {e}");
                    tokio::time::sleep(ACCEPT_REST).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                metrics::counter!("lotus_miner_lotus_api_refused_total").increment(1);
                continue;
            };
            let connection = connection.clone();
            tasks.spawn(async move {
                connection.serve(tcp).await;
                drop(place);
            });
        }
        if handle.stop().is_err() {
            tracing::debug!("every connection of the Lotus API was gone already");
        }
        tasks.close();
        if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
            tracing::debug!("connections of the Lotus API were cut");
        }
        Ok(())
    }
}

/// An address as Lotus writes it.
#[must_use]
pub fn multiaddr(addr: SocketAddr, https: bool) -> String {
    let net = if addr.is_ipv4() { "ip4" } else { "ip6" };
    let http = if https { "https" } else { "http" };
    format!("/{net}/{}/tcp/{}/{http}", addr.ip(), addr.port())
}

/// The table as jsonrpsee dispatches it.
fn methods(context: Arc<Context>, limit: Duration, long: Duration) -> Result<Methods, Fault> {
    let mut module = RpcModule::from_arc(context);
    for method in METHODS {
        let registered = module.register_async_method(
            method.full_name,
            move |params, cx, extensions| async move {
                let nobody = Caller::default();
                let caller = extensions.get::<Caller>().unwrap_or(&nobody);
                let limit = if method.is_long() { long } else { limit };
                let began = Instant::now();
                let call = method.answer(cx, caller, &params);
                let result = tokio::time::timeout(limit, call)
                    .await
                    .unwrap_or_else(|_| Err(RpcError::failed(format!("no answer in {limit:?}"))));
                told(method, began, result.as_ref().err());
                result
            },
        );
        registered.map_err(|e| Fault::new(Kind::Fatal, e.to_string(), "report this"))?;
    }
    Ok(module.into())
}

fn told(method: &Method, began: Instant, error: Option<&RpcError>) {
    let outcome = if error.is_some() { "error" } else { "ok" };
    metrics::histogram!(
        "lotus_miner_lotus_api_seconds", "method" => method.name, "outcome" => outcome
    )
    .record(began.elapsed().as_secs_f64());
    if let Some(e) = error {
        tracing::debug!(method = method.name, "{e}");
    }
}

/// What serves one connection.
#[derive(Clone)]
struct Connection {
    rpc: Rpc,
    methods: Methods,
    stopping: StopHandle,
    tls: Option<Tls>,
    tokens: Arc<Tokens>,
    hub: Arc<dyn Hub>,
    streams: Arc<Streams>,
    cfg: Arc<LotusApiConfig>,
    limit: Duration,
    long: Duration,
    stop: CancellationToken,
}

impl Connection {
    async fn serve(self, tcp: TcpStream) {
        let Some(tls) = self.tls.clone() else {
            return self.requests(tcp).await;
        };
        let shaken = tokio::time::timeout(self.limit, tls.accept(tcp));
        let shaken = tokio::select! {
            () = self.stop.cancelled() => return,
            shaken = shaken => shaken,
        };
        match shaken {
            Ok(Ok(stream)) => self.requests(stream).await,
            Ok(Err(e)) => tracing::debug!("Lotus API: no TLS: {e}"),
            Err(_) => tracing::debug!("Lotus API: no TLS in time"),
        }
    }

    async fn requests<S>(self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (limit, stop) = (self.limit, self.stop.clone());
        let service = service_fn(move |request| {
            let this = self.clone();
            async move { this.answer(request).await }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limit)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut served = std::pin::pin!(served);
        let ended = tokio::select! {
            ended = served.as_mut() => ended,
            () = stop.cancelled() => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        };
        if let Err(e) = ended {
            tracing::debug!("Lotus API connection: {e}");
        }
    }

    async fn answer(
        self,
        request: Request<Incoming>,
    ) -> Result<Response<HttpBody>, std::convert::Infallible> {
        let path = request.uri().path();
        if path.starts_with(streams::PATH) {
            let (status, why) = self.streams.answer(request).await;
            return Ok(refusal(status, &why));
        }
        let files = path.starts_with(remote::PATH);
        if path != PATH && !files {
            return Ok(refusal(StatusCode::NOT_FOUND, "the API is at /rpc/v0\n"));
        }
        let who = allowed(&self.tokens, request.headers(), request.uri());
        let perms = match who {
            Ok(who) => who.0,
            Err(why) => {
                tracing::warn!("Lotus API: {why}");
                return Ok(refusal(StatusCode::UNAUTHORIZED, why));
            }
        };
        if files {
            if !perms.contains(&Perm::Admin) {
                let why = "files of sectors need a token of admin\n";
                return Ok(refusal(StatusCode::UNAUTHORIZED, why));
            }
            let (method, path) = (request.method(), request.uri().path());
            return Ok(remote::answer(&self.hub, method, path, request.headers()).await);
        }
        let base = self.base(request.headers());
        let caller = Caller { perms, base };
        Ok(if request.method() == HttpMethod::POST {
            self.post(request, caller).await
        } else {
            let mut request = request;
            request.extensions_mut().insert(caller);
            let mut service = self.rpc.build(self.methods, self.stopping);
            answered(self.limit * 2, service.call(request)).await
        })
    }

    /// Answers calls in a body, which must arrive first.
    async fn post(self, request: Request<Incoming>, caller: Caller) -> Response<HttpBody> {
        let (mut head, body) = request.into_parts();
        let most = self.cfg.max_request_bytes as usize;
        let body = match tokio::time::timeout(self.limit, collect(body, most)).await {
            Ok(Ok(Some(body))) => body,
            Ok(Ok(None)) => {
                return refusal(StatusCode::PAYLOAD_TOO_LARGE, "the request is too large\n");
            }
            Ok(Err(e)) => return refusal(StatusCode::BAD_REQUEST, &e.to_string()),
            Err(_) => return refusal(StatusCode::REQUEST_TIMEOUT, "the request took too long\n"),
        };
        // Lotus does not look at the type, and its clients send others.
        let json = HeaderValue::from_static("application/json");
        head.headers.insert(CONTENT_TYPE, json);
        head.extensions.insert(caller);
        // A batch of slow calls.
        let limit = if Method::may_be_long(&body) {
            self.long
        } else {
            self.limit * 2
        };
        let mut service = self.rpc.build(self.methods, self.stopping);
        let request = Request::from_parts(head, HttpBody::from(body));
        answered(limit, service.call(request)).await
    }

    /// The URL by which a caller reaches this API.
    fn base(&self, headers: &HeaderMap) -> String {
        if !self.cfg.url.is_empty() {
            return self.cfg.url.trim_end_matches('/').to_owned();
        }
        let host = headers.get(HOST).and_then(|h| h.to_str().ok());
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        host.map(|host| format!("{scheme}://{host}"))
            .unwrap_or_default()
    }
}

/// The bytes of a body; `None` when there are more than `most`.
async fn collect(mut body: Incoming, most: usize) -> Result<Option<Vec<u8>>, hyper::Error> {
    let mut all = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        if let Ok(bytes) = frame?.into_data() {
            if all.len() + bytes.len() > most {
                return Ok(None);
            }
            all.extend_from_slice(&bytes);
        }
    }
    Ok(Some(all))
}

async fn answered<E: std::fmt::Display>(
    limit: Duration,
    answer: impl Future<Output = Result<Response<HttpBody>, E>>,
) -> Response<HttpBody> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(response)) => response,
        Ok(Err(e)) => refusal(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
        Err(_) => refusal(StatusCode::REQUEST_TIMEOUT, "the request took too long\n"),
    }
}
