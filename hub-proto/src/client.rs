use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use lotus_identity::Held;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tokio_stream::StreamExt as _;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Endpoint;

use crate::secured::{Secure, Secured};
use crate::v1::{
    Event, HelloRequest, HelloResponse, SubscribeRequest, capacity_client::CapacityClient,
    chain_client::ChainClient, credentials_client::CredentialsClient, events_client::EventsClient,
    hub_client::HubClient as Hub, pieces_client::PiecesClient, sectors_client::SectorsClient,
    unsealed_client::UnsealedClient,
};
use crate::way::Way;
use crate::{API_VERSION, HubError};

/// `[hub]` of a client's configuration.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HubConfig {
    /// `unix:/path/hub.sock` on the hub's host; `https://host:port` of its `api.listen` on another
    /// one, for a spoke that joined (`lotus-markets join`); `listen:ip:port` where the spoke may open
    /// no connection to the hub, for a port here that the hub dials (its `api.dial`). Empty: the hub
    /// that it joined, else the socket of `~/.lotus-hub/miner`.
    pub addr: String,
    /// Folder of the identity. Empty: `identity` in the service's own folder. On the hub's host a
    /// process outside of a sandbox needs none.
    pub identity: PathBuf,
    /// Seconds a connection attempt may take.
    pub connect_secs: u64,
    /// Seconds a call may take. Streams have no end.
    pub call_secs: u64,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self {
            addr: String::new(),
            identity: PathBuf::new(),
            connect_secs: 5,
            call_secs: 30,
        }
    }
}

/// Puts the current trace context on every call.
type Interceptor = fn(tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status>;

/// The channel below the typed clients.
pub type Channel = InterceptedService<tonic::transport::Channel, Interceptor>;

/// A connection to the hub that re-dials by itself. Clones share it.
#[derive(Clone)]
pub struct HubClient {
    channel: Channel,
    hello: Arc<watch::Sender<HelloResponse>>,
    addr: Arc<str>,
    who: Arc<HelloRequest>,
    call: Duration,
    identity: Option<(Secured, Way)>,
    /// Renews the identity. Ends with the last clone.
    _renewal: Arc<JoinSet<()>>,
}

impl std::fmt::Debug for HubClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HubClient({})", self.addr)
    }
}

macro_rules! clients {
    ($($(#[$doc:meta])* $name:ident: $client:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[must_use]
        pub fn $name(&self) -> $client<Channel> {
            $client::new(self.channel.clone())
        }
    )*};
}

impl HubClient {
    /// Dials the hub and says hello. `service` names the caller ("retrieval"), `instance` tells
    /// replicas apart where no identity does, and `interceptor` runs on every call: it adds the
    /// trace context.
    pub async fn connect(
        cfg: &HubConfig,
        service: &str,
        instance: &str,
        interceptor: Interceptor,
    ) -> Result<Self, HubError> {
        let addr = cfg.address()?;
        let connect = Duration::from_secs(cfg.connect_secs.max(1));
        let call = Duration::from_secs(cfg.call_secs.max(1));
        if let Some(socket) = addr.strip_prefix("unix:")
            && !cfg.has_identity()
        {
            let socket = Path::new(socket);
            return Self::on_this_host(socket, call, service, instance, interceptor).await;
        }
        let endpoint = endpoint(connect);
        let identity = Secured::open(&cfg.identity)?;
        let way = Way::open(&addr).await?;
        let ready = tokio::time::timeout(connect + call, identity.ready(&endpoint, &way)).await;
        ready.unwrap_or_else(|_| {
            Err(HubError::Silent {
                addr: addr.clone(),
                why: "no answer in time".into(),
            })
        })?;
        let instance = identity.instance();
        let channel = identity.channel(&endpoint, &way);
        let renewal = identity.keep(channel.clone(), call);
        let who = (service, instance.as_str());
        let identity = Some(((identity, way), renewal));
        Self::greet(channel, identity, addr.clone(), who, call, interceptor).await
    }

    /// Dials the hub at its socket on this host as one of the operator's processes, without an
    /// identity. `call` is how long a unary call may take.
    pub async fn on_this_host(
        socket: &Path,
        call: Duration,
        service: &str,
        instance: &str,
        interceptor: Interceptor,
    ) -> Result<Self, HubError> {
        let addr = format!("unix:{}", socket.display());
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(socket).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        let channel = endpoint(call).connect_with_connector_lazy(connector);
        let who = (service, instance);
        Self::greet(channel, None, addr, who, call, interceptor).await
    }

    async fn greet(
        channel: tonic::transport::Channel,
        identity: Option<((Secured, Way), JoinSet<()>)>,
        addr: String,
        (service, instance): (&str, &str),
        call: Duration,
        interceptor: Interceptor,
    ) -> Result<Self, HubError> {
        let who = HelloRequest {
            major: API_VERSION.0,
            minor: API_VERSION.1,
            service: service.into(),
            instance: instance.into(),
        };
        let (identity, renewal) = identity.unzip();
        let client = Self {
            channel: InterceptedService::new(channel, interceptor),
            hello: Arc::new(watch::Sender::new(HelloResponse::default())),
            addr: addr.into(),
            who: Arc::new(who),
            call,
            identity,
            _renewal: Arc::new(renewal.unwrap_or_default()),
        };
        client.say_hello().await?;
        Ok(client)
    }

    /// Says hello again, after the hub may have been replaced.
    pub async fn say_hello(&self) -> Result<HelloResponse, HubError> {
        let request = (*self.who).clone();
        let answer = tokio::time::timeout(self.call, async { self.hub().hello(request).await })
            .await
            .map_err(|_| self.silent("no answer in time"))?
            .map_err(|s| match s.code() {
                tonic::Code::Unavailable | tonic::Code::Unknown => self.silent(s.message()),
                _ => HubError::from(s),
            })?
            .into_inner();
        if answer.major != API_VERSION.0 {
            return Err(HubError::ApiMismatch {
                hub: format!("{}.{}", answer.major, answer.minor),
                ours: format!("{}.{}", API_VERSION.0, API_VERSION.1),
            });
        }
        let known = self.hello.borrow().generation;
        if answer.generation < known {
            return Err(self.silent(&format!(
                "generation {} answers, and {known} did before: a hub that was replaced has come back. \
                 (If the hub was made anew, restart this process.)",
                answer.generation
            )));
        }
        self.hello.send_replace(answer.clone());
        Ok(answer)
    }

    /// A connection to the hub beside that of the calls, with the identity of this client, for the
    /// protocol of this ALPN name: bytes of pieces come over it where they come by no socket.
    pub async fn dial(&self, alpn: &[u8]) -> io::Result<Secure> {
        let identity = self.identity.as_ref();
        let (identity, way) = identity.ok_or_else(|| io::Error::other("no identity"))?;
        identity.connect(way, alpn).await
    }

    fn silent(&self, why: &str) -> HubError {
        HubError::Silent {
            addr: self.addr.to_string(),
            why: why.into(),
        }
    }

    /// The hub's last hello.
    #[must_use]
    pub fn hello(&self) -> HelloResponse {
        self.hello.borrow().clone()
    }

    /// A request with the deadline of a unary call.
    #[must_use]
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.call);
        request
    }

    clients! {
        /// Version, identity, safety of a restart.
        hub: Hub,
        /// Room for pieces.
        capacity: CapacityClient,
        /// Piece hand-off.
        pieces: PiecesClient,
        /// Sectors, read only.
        sectors: SectorsClient,
        /// Reading unsealed bytes.
        unsealed: UnsealedClient,
        /// The event stream; [`events_stream`] keeps it going.
        events: EventsClient,
        /// Relayed chain reads.
        chain: ChainClient,
        /// Identities.
        credentials: CredentialsClient,
    }
}

/// An endpoint behind a connector: the URI only fills the `:authority` header.
fn endpoint(connect: Duration) -> Endpoint {
    Endpoint::from_static("http://hub")
        .connect_timeout(connect)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
}

impl HubConfig {
    /// The address in use: that of the settings, else of the hub that this spoke joined, else of
    /// the hub that is on this host by default.
    pub fn address(&self) -> Result<String, HubError> {
        if !self.addr.is_empty() {
            return Ok(self.addr.clone());
        }
        if self.has_identity() {
            let hub = Secured::open(&self.identity)?.hub();
            return Ok(
                match hub.starts_with("unix:") || hub.starts_with("listen:") {
                    true => hub,
                    false => format!("https://{hub}"),
                },
            );
        }
        let home = std::env::home_dir().unwrap_or_default();
        let socket = home.join(".lotus-hub/miner/run/hub.sock");
        Ok(format!("unix:{}", socket.display()))
    }

    fn has_identity(&self) -> bool {
        !self.identity.as_os_str().is_empty() && Held::is_in(&self.identity)
    }
}

/// The hub's events from `from_seq` on, without gap or repeat, for as long as it is polled: after
/// any break it says hello, subscribes again behind the last event, and goes on.
///
/// Ends only with an error that waiting can not mend, such as events that are no longer kept
/// (`OUT_OF_RANGE`): then list the state anew and start from the present.
pub fn events_stream(
    client: HubClient,
    from_seq: u64,
    topics: &[&str],
) -> impl Stream<Item = Result<Event, HubError>> + Send + 'static {
    let topics: Vec<String> = topics.iter().map(|t| (*t).to_owned()).collect();
    async_stream::stream! {
        let mut next = from_seq;
        let mut wait = FIRST_WAIT;
        loop {
            let request = SubscribeRequest { from_seq: next, topics: topics.clone() };
            let failure = match client.events().subscribe(request).await {
                Ok(answer) => {
                    let mut events = answer.into_inner();
                    loop {
                        match events.next().await {
                            Some(Ok(event)) => {
                                wait = FIRST_WAIT;
                                // Head events repeat the last durable number.
                                let head = matches!(event.what, Some(crate::v1::event::What::Head(_)));
                                if !head {
                                    next = event.seq + 1;
                                }
                                yield Ok(event);
                            }
                            Some(Err(status)) => break HubError::from(status),
                            None => break client.silent("event stream ended"),
                        }
                    }
                }
                Err(status) => HubError::from(status),
            };
            if !failure.kind().is_retryable() {
                yield Err(failure);
                return;
            }
            tracing::info!(%failure, next, "hub events interrupted; subscribing again");
            tokio::time::sleep(jitter(wait)).await;
            wait = (wait * 2).min(LONGEST_WAIT);
            if let Err(e) = client.say_hello().await
                && !e.kind().is_retryable()
            {
                yield Err(e);
                return;
            }
        }
    }
}

const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

fn jitter(d: Duration) -> Duration {
    d.mul_f64(rand::random_range(0.5..1.0))
}
