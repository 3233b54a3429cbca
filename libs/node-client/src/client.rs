use std::env;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use hyper::body::Incoming;
use jsonrpsee::core::client::{ClientT, Error as RpcError};
use jsonrpsee::core::traits::ToRpcParams;
use jsonrpsee::http_client::transport::Error as HttpError;
use jsonrpsee::http_client::{
    HttpBackend, HttpClient, HttpClientBuilder, HttpResponse, RpcLogger, RpcService,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use tower::ServiceBuilder;
use tower::util::MapResponse;

use crate::json::{FromLotus, Lotus, ToLotus};
use crate::{Endpoint, NodeError};

/// Largest answer that is read, bytes. The sectors of a miner with a million of them fit.
pub(crate) const MAX_ANSWER: u32 = 512 << 20;
/// Largest call that is made, bytes. A PoSt message of the largest size fits.
const MAX_CALL: u32 = 64 << 20;
/// Most calls in flight.
const MAX_CALLS: usize = 256;
/// Longest that a TCP connection may take to open.
pub(crate) const CONNECT: Duration = Duration::from_secs(10);
/// Variable that Lotus' tools read the node's endpoint from.
const API_INFO: &str = "FULLNODE_API_INFO";

/// `[node]`: the full node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// `TOKEN:MULTIADDR` or `TOKEN:URL`, as in FULLNODE_API_INFO, which overrides this as with Lotus.
    pub api: String,
    /// The node's repo on this host: its files `token` and `api` are read, again after the node
    /// restarted. Used if neither `api` nor FULLNODE_API_INFO is set.
    pub repo: PathBuf,
    /// A remote wallet that holds the keys, as `TOKEN:MULTIADDR` or `TOKEN:URL`: a `lotus-wallet`,
    /// or what speaks its API. Messages, elections and the ask are signed there. Empty for the
    /// node's own wallet. Blocks are signed by the node in any case.
    pub wallet: String,
    /// Seconds that a call may take.
    pub call_secs: u64,
    /// Seconds that a call may take whose purpose is to wait (StateWaitMsg).
    pub wait_secs: u64,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            api: String::new(),
            repo: PathBuf::new(),
            wallet: String::new(),
            call_secs: 30,
            wait_secs: 900,
        }
    }
}

/// What says where the node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBy {
    /// FULLNODE_API_INFO.
    Variable,
    /// `[node] api`.
    Api,
    /// `[node] repo`.
    Repo,
    /// Nothing does.
    Nothing,
}

impl fmt::Display for NamedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Variable => API_INFO,
            Self::Api => "[node] api",
            Self::Repo => "[node] repo",
            Self::Nothing => "nothing",
        })
    }
}

/// FULLNODE_API_INFO, if it is set.
fn variable() -> Option<String> {
    env::var(API_INFO).ok().filter(|info| !info.is_empty())
}

impl NodeConfig {
    /// What says where the node is: FULLNODE_API_INFO as with Lotus, else `api`, else `repo`.
    #[must_use]
    pub fn named_by(&self) -> NamedBy {
        self.named(variable().as_deref())
    }

    fn named(&self, variable: Option<&str>) -> NamedBy {
        if variable.is_some() {
            NamedBy::Variable
        } else if !self.api.is_empty() {
            NamedBy::Api
        } else if !self.repo.as_os_str().is_empty() {
            NamedBy::Repo
        } else {
            NamedBy::Nothing
        }
    }

    /// Whether FULLNODE_API_INFO overrides another node that is configured.
    #[must_use]
    pub fn is_overridden(&self) -> bool {
        let configured = !self.api.is_empty() || !self.repo.as_os_str().is_empty();
        variable().is_some_and(|info| configured && info != self.api)
    }

    /// Finds the endpoint: FULLNODE_API_INFO, else `api`, else the files of `repo`.
    pub fn endpoint(&self) -> Result<Endpoint, NodeError> {
        self.endpoint_with(variable().as_deref())
    }

    fn endpoint_with(&self, variable: Option<&str>) -> Result<Endpoint, NodeError> {
        match self.named(variable) {
            NamedBy::Variable => return Endpoint::parse(variable.unwrap_or_default()),
            NamedBy::Api => return Endpoint::parse(&self.api),
            NamedBy::Repo => {}
            NamedBy::Nothing => {
                let why = "[node] api, FULLNODE_API_INFO and [node] repo are all unset";
                return Err(NodeError::BadEndpoint { why: why.into() });
            }
        }
        let read = |name: &str| {
            let path = self.repo.join(name);
            fs::read_to_string(&path).map_err(|e| match e.kind() {
                // The node writes its files when it starts, so their absence passes.
                std::io::ErrorKind::NotFound => NodeError::Transport {
                    endpoint: self.repo.display().to_string(),
                    method: "connect".into(),
                    why: format!("no file {}: the node never ran", path.display()),
                },
                _ => NodeError::BadEndpoint {
                    why: format!("{}: {e}", path.display()),
                },
            })
        };
        Endpoint::parse(&format!(
            "{}:{}",
            read("token")?.trim(),
            read("api")?.trim()
        ))
    }
}

/// A full node over Lotus JSON-RPC. Calls go over HTTP, so each finds its own way after the node
/// was away; head changes come over a WebSocket per subscription.
pub struct Client {
    cfg: NodeConfig,
    conn: RwLock<Option<Arc<Conn>>>,
    /// The remote wallet, if there is one.
    pub(crate) wallet: Option<Arc<Conn>>,
}

/// The RPC library's client with [`show_errors`] below it.
type Http = HttpClient<RpcLogger<RpcService<MapResponse<HttpBackend, ShowErrors>>>>;
type ShowErrors = fn(HttpResponse<Incoming>) -> HttpResponse<Incoming>;

/// Lotus answers some failed calls (an unknown method, a wrong parameter) with HTTP status 500
/// and says in the body what is wrong, which the RPC library reads only under status 200.
fn show_errors(mut answer: HttpResponse<Incoming>) -> HttpResponse<Incoming> {
    if answer.status() == StatusCode::INTERNAL_SERVER_ERROR {
        *answer.status_mut() = StatusCode::OK;
    }
    answer
}

pub(crate) struct Conn {
    pub(crate) endpoint: Endpoint,
    http: Http,
}

impl Conn {
    fn new(endpoint: Endpoint) -> Result<Arc<Self>, NodeError> {
        if endpoint.http().scheme() == "https" {
            // Fails only if the process has chosen a provider already, which will do too.
            drop(rustls::crypto::ring::default_provider().install_default());
        }
        let http = HttpClientBuilder::default()
            .max_request_size(MAX_CALL)
            .max_response_size(MAX_ANSWER)
            .max_concurrent_requests(MAX_CALLS)
            .connect_timeout(CONNECT)
            // Each call brings its own, shorter deadline.
            .request_timeout(Duration::from_secs(24 * 3600))
            .set_headers(auth_header(&endpoint)?)
            .set_http_middleware(ServiceBuilder::new().map_response(show_errors as ShowErrors))
            .build(endpoint.http())
            .map_err(|e| NodeError::BadEndpoint { why: e.to_string() })?;
        Ok(Arc::new(Self { endpoint, http }))
    }

    /// Makes a call once. `method` is what an error names, `name` what goes over the wire.
    pub(crate) async fn call<R: FromLotus>(
        &self,
        method: &str,
        name: &str,
        params: Vec<Value>,
        waited: Duration,
    ) -> Result<R, NodeError> {
        let call = self.http.request::<Lotus<R>, _>(name, Params(params));
        match tokio::time::timeout(waited, call).await {
            Ok(Ok(v)) => Ok(v.0),
            Ok(Err(e)) => Err(classify(&self.endpoint, method, e)),
            Err(_) => Err(NodeError::Timeout {
                endpoint: self.endpoint.to_string(),
                method: method.into(),
                waited,
            }),
        }
    }
}

pub(crate) fn auth_header(endpoint: &Endpoint) -> Result<HeaderMap, NodeError> {
    let mut headers = HeaderMap::new();
    if let Some(token) = endpoint.token() {
        let mut bearer = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
            let why = "the token holds characters that no token has".into();
            NodeError::BadEndpoint { why }
        })?;
        bearer.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, bearer);
    }
    Ok(headers)
}

/// Parameters by position. Written even when empty: some nodes want the field.
pub(crate) struct Params(pub(crate) Vec<Value>);

impl ToRpcParams for Params {
    fn to_rpc_params(self) -> Result<Option<Box<RawValue>>, serde_json::Error> {
        to_raw_value(&self.0).map(Some)
    }
}

impl Client {
    /// Makes a client. Only a bad endpoint fails here; an absent node is met by each call, and
    /// [`Client::check`] asks at once.
    pub fn connect(cfg: &NodeConfig) -> Result<Arc<Self>, NodeError> {
        let wallet = match cfg.wallet.as_str() {
            "" => None,
            info => Some(Conn::new(Endpoint::parse_wallet(info)?)?),
        };
        let client = Self {
            cfg: cfg.clone(),
            conn: RwLock::new(None),
            wallet,
        };
        match client.conn() {
            // A node whose repo is still empty may start later.
            Ok(_) | Err(NodeError::Transport { .. }) => Ok(Arc::new(client)),
            Err(e) => Err(e),
        }
    }

    /// Whether the node answers and takes the token.
    pub async fn check(&self) -> Result<crate::api::Version, NodeError> {
        self.call("Version", vec![]).await
    }

    /// Calls any method of the node by its full name, such as `Filecoin.StateListActors`, with
    /// parameters in Lotus' JSON. Makes the call once, as it may have effect.
    pub async fn request(&self, method: &str, params: Vec<Value>) -> Result<Value, NodeError> {
        self.call_once(method, method, params).await
    }

    /// Where the node is, without the token.
    #[must_use]
    pub fn endpoint(&self) -> String {
        match self.conn() {
            Ok(conn) => conn.endpoint.to_string(),
            Err(_) => self.cfg.repo.display().to_string(),
        }
    }

    /// Where the remote wallet is, without the token; `None` if the node signs.
    #[must_use]
    pub fn wallet(&self) -> Option<String> {
        self.wallet.as_ref().map(|w| w.endpoint.to_string())
    }

    pub(crate) fn call_timeout(&self) -> Duration {
        Duration::from_secs(self.cfg.call_secs)
    }

    pub(crate) fn conn(&self) -> Result<Arc<Conn>, NodeError> {
        let held = self.conn.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(conn) = held.as_ref() {
            return Ok(conn.clone());
        }
        drop(held);
        let conn = Conn::new(self.cfg.endpoint()?)?;
        *self.conn.write().unwrap_or_else(PoisonError::into_inner) = Some(conn.clone());
        Ok(conn)
    }

    /// After a failure: the node may have come back elsewhere or with another token.
    pub(crate) fn look_again(&self) {
        if let Ok(endpoint) = self.cfg.endpoint() {
            let mut held = self.conn.write().unwrap_or_else(PoisonError::into_inner);
            if held.as_ref().is_some_and(|c| c.endpoint != endpoint) {
                *held = None;
            }
        }
    }

    pub(crate) fn param<T: ToLotus>(&self, method: &str, v: &T) -> Result<Value, NodeError> {
        serde_json::to_value(Lotus(v)).map_err(|e| NodeError::Decode {
            method: method.into(),
            why: e.to_string(),
        })
    }

    /// Makes a call. Every call of [`crate::FullNode`] may be made twice without harm, so a broken
    /// connection is answered with one more try.
    pub(crate) async fn call<R: FromLotus>(
        &self,
        method: &str,
        params: Vec<Value>,
    ) -> Result<R, NodeError> {
        let name = format!("Filecoin.{method}");
        match self.call_once(method, &name, params.clone()).await {
            Err(NodeError::Transport { .. } | NodeError::Auth { .. }) => {
                self.look_again();
                self.call_once(method, &name, params).await
            }
            other => other,
        }
    }

    async fn call_once<R: FromLotus>(
        &self,
        method: &str,
        name: &str,
        params: Vec<Value>,
    ) -> Result<R, NodeError> {
        let conn = self.conn()?;
        let waited = match method {
            "StateWaitMsg" => Duration::from_secs(self.cfg.wait_secs),
            _ => self.call_timeout(),
        };
        conn.call(method, name, params, waited).await
    }
}

/// Maps the RPC library's error to ours.
pub(crate) fn classify(endpoint: &Endpoint, method: &str, e: RpcError) -> NodeError {
    let endpoint = endpoint.to_string();
    let method = method.to_owned();
    match e {
        RpcError::Call(e) if e.message().starts_with("missing permission to invoke") => {
            let why = e.message().to_owned();
            NodeError::Auth { endpoint, why }
        }
        RpcError::Call(e) => NodeError::Rpc {
            method,
            code: e.code().into(),
            message: e.message().to_owned(),
        },
        RpcError::ParseError(e) => NodeError::Decode {
            method,
            why: e.to_string(),
        },
        RpcError::Transport(e) => {
            if let Some(HttpError::Rejected {
                status_code: code @ (401 | 403),
            }) = e.downcast_ref()
            {
                let why = format!("HTTP status {code}");
                return NodeError::Auth { endpoint, why };
            }
            let mut why = e.to_string();
            let mut cause = e.source();
            while let Some(c) = cause {
                why = format!("{why}: {c}");
                cause = c.source();
            }
            NodeError::Transport {
                endpoint,
                method,
                why,
            }
        }
        other => NodeError::Transport {
            endpoint,
            method,
            why: other.to_string(),
        },
    }
}

#[cfg(test)]
mod named {
    use super::*;

    #[test]
    fn the_variable_wins_then_the_address_then_the_repo() {
        let config = |api: &str, repo: &str| NodeConfig {
            api: api.into(),
            repo: repo.into(),
            ..NodeConfig::default()
        };
        let (a, b) = ("a:/ip4/127.0.0.1/tcp/1/http", "b:/ip4/127.0.0.1/tcp/2/http");
        for (cfg, variable, by, token) in [
            (config(a, "/r"), Some(b), NamedBy::Variable, Some("b")),
            (config("", "/r"), Some(b), NamedBy::Variable, Some("b")),
            (config(a, "/r"), None, NamedBy::Api, Some("a")),
            (config("", "/r"), None, NamedBy::Repo, None),
            (config("", ""), None, NamedBy::Nothing, None),
        ] {
            assert_eq!(cfg.named(variable), by);
            let endpoint = cfg.endpoint_with(variable).ok();
            assert_eq!(endpoint.as_ref().and_then(Endpoint::token), token, "{by}");
        }
    }
}
