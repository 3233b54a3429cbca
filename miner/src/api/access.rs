//! Who calls, and whether they may. Asked of every request before anything of it is read, and of
//! every open connection from time to time: streams have no requests.

use std::fmt;
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{BoxFuture, Either};
use http::{HeaderMap, Request, Response, StatusCode};
use hub_proto::access::{JOINING, Method};
use hub_proto::{GENERATION_HEADER, status, with_code};
use lotus_dataplane::{Asker, PATH};
use lotus_identity::{Authority, Caller, Local, Peer, Presented, Refused, Secured, Shown};
use lotus_types::{Generation, Kind};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::quotas::Quotas;
use crate::owner::Seller;

/// How often open connections are held against the register. A revocation by the running hub does
/// not wait for it.
const LOOK: Duration = Duration::from_secs(5);
/// Connections that are open at once, of all and of one caller: a spoke needs a few.
const CONNECTIONS: usize = 4096;
const CONNECTIONS_OF_ONE: usize = 64;

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// A process of this host and of the hub's user, in no sandbox.
    Host,
    /// A spoke with an identity.
    Spoke(Caller),
    /// A spoke that comes with a join bundle, and has no identity yet.
    Joining(Caller),
    /// A spoke that renews its identity, which may have expired.
    Renewing(Caller),
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("operator"),
            Self::Spoke(caller) | Self::Renewing(caller) => write!(f, "{caller}"),
            Self::Joining(caller) => write!(f, "{caller} (joining)"),
        }
    }
}

/// Whether a request is passed on.
///
/// `asked` is the generation that it was meant for, where it names one.
fn decide(
    path: &str,
    who: &Result<Who, Refused>,
    asked: Option<u64>,
    generation: Generation,
) -> Result<(), Status> {
    let (service, allowed) = match who {
        // The operator's own processes.
        Ok(Who::Host) => return stale(asked, generation),
        Ok(Who::Spoke(caller)) => {
            let service = caller.service.as_str();
            // Whoever may be given a lease may read by it.
            let path = if path == PATH { LEASE } else { path };
            (service, Method::at(path).is_some_and(|m| m.may(service)))
        }
        Ok(Who::Joining(_)) => {
            let may = |m: &Method| m.callers.contains(&JOINING);
            (JOINING, Method::at(path).is_some_and(may))
        }
        Ok(Who::Renewing(caller)) => (caller.service.as_str(), path == RENEW),
        Err(refused) => return Err(unknown(refused)),
    };
    if !allowed {
        return Err(status(
            Kind::Config,
            format!("{service} may not call {path}"),
            "`lotus-miner api --matrix` shows who may call what",
            None,
        ));
    }
    stale(asked, generation)
}

const RENEW: &str = "/hub.v1.Credentials/Renew";
const OFFER: &str = "/hub.v1.Pieces/Offer";
const LEASE: &str = "/hub.v1.Unsealed/Lease";

fn code(status: &Status) -> &'static str {
    match status.code() {
        Code::PermissionDenied => "permission_denied",
        Code::Unauthenticated => "unauthenticated",
        Code::Aborted => "aborted",
        _ => "other",
    }
}

/// A caller that means an earlier start of this hub is told so, whatever it asks.
fn stale(asked: Option<u64>, generation: Generation) -> Result<(), Status> {
    match asked {
        Some(asked) if asked != generation.0 => Err(with_code(
            Code::Aborted,
            Kind::Transport,
            format!("this hub is of generation {generation}, the call is for {asked}"),
            "say Hello again: the hub was restarted, or is not the one that is meant",
            None,
        )),
        _ => Ok(()),
    }
}

pub(crate) fn unknown(refused: &Refused) -> Status {
    let kind = match refused {
        // The spoke renews it and calls again.
        Refused::Expired => Kind::Transport,
        Refused::Broken(_) => Kind::Fatal,
        _ => Kind::Config,
    };
    with_code(
        Code::Unauthenticated,
        kind,
        refused.to_string(),
        "`lotus-miner credentials list` on the hub shows who may call",
        None,
    )
}

/// The refusal of bytes.
fn not_read(status: &Status) -> Response<Body> {
    let mut response = Response::new(Body::new(status.message().to_owned()));
    *response.status_mut() = match status.code() {
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::Aborted => StatusCode::CONFLICT,
        _ => StatusCode::BAD_REQUEST,
    };
    response
}

fn asked(headers: &HeaderMap) -> Result<Option<u64>, Status> {
    let Some(value) = headers.get(GENERATION_HEADER) else {
        return Ok(None);
    };
    let number = value.to_str().ok().and_then(|v| v.parse().ok());
    number.map(Some).ok_or_else(|| {
        status(
            Kind::Data,
            format!("{GENERATION_HEADER} is no number"),
            "send the generation that Hello told, or none",
            None,
        )
    })
}

/// Who may call: the register, and the connections that are open. Clones share it.
#[derive(Clone, Debug)]
pub struct Access {
    authority: Arc<Authority>,
    generation: Generation,
    open: Arc<Mutex<Vec<Connection>>>,
    quotas: Quotas,
}

#[derive(Debug)]
struct Connection {
    peer: Peer,
    of: Presented,
    /// Cancelled when it is closed, or to close it.
    end: CancellationToken,
    /// It might not call any more when it was last looked at.
    late: bool,
}

impl Access {
    /// For the hub of this generation, of which each spoke may make so many calls a second.
    #[must_use]
    pub fn new(authority: Arc<Authority>, generation: Generation, calls_per_second: u32) -> Self {
        Self {
            authority,
            generation,
            open: Arc::default(),
            quotas: Quotas::new(calls_per_second),
        }
    }

    pub(crate) fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    pub(crate) fn authority(&self) -> Arc<Authority> {
        self.authority.clone()
    }

    fn who(&self, path: &str, shown: Option<&Shown>) -> Result<Who, Refused> {
        let peer = match shown {
            Some(Shown::Operator) => return Ok(Who::Host),
            Some(Shown::Certificate(peer)) => peer,
            Some(Shown::Nothing) | None => return Err(Refused::Nothing),
        };
        if path != RENEW {
            match self.authority.caller(&peer.certificate) {
                // No spoke's.
                Err(Refused::NotOurs) => {}
                called => return called.map(Who::Spoke),
            }
        }
        match self.authority.presented(&peer.certificate) {
            Presented::Joining(caller) => Ok(Who::Joining(caller)),
            // Whether it may still be renewed is for the one who renews it.
            Presented::Spoke(caller) if path == RENEW => Ok(Who::Renewing(caller)),
            Presented::Spoke(_) | Presented::Other => Err(Refused::NotOurs),
        }
    }

    /// Whose deals a caller acts on.
    pub(crate) fn seller(&self, who: Option<&Who>) -> Seller {
        let Some(Who::Spoke(caller)) = who else {
            return Seller::Operator;
        };
        let authority = self.authority.clone();
        let is_gone = move |name: &str| {
            let named = name.parse::<Caller>().ok();
            // A register that can not be read lets nobody have another's deals.
            named.is_some_and(|caller| authority.is_gone(&caller).unwrap_or(false))
        };
        Seller::Spoke {
            name: caller.to_string(),
            is_gone: Arc::new(is_gone),
        }
    }

    /// The name of a spoke that may offer pieces now.
    pub(crate) fn offers(&self, peer: &Peer) -> Option<String> {
        let caller = self.authority.caller(&peer.certificate).ok()?;
        let may = Method::at(OFFER).is_some_and(|m| m.may(caller.service.as_str()));
        may.then(|| caller.to_string())
    }

    /// Whether a request is passed on, and how long it has to wait first.
    fn check<B>(&self, request: &mut Request<B>) -> Result<Duration, Status> {
        // Of a connection from another host there is the peer alone.
        let peer = request.extensions_mut().remove::<Peer>();
        if let Some(peer) = peer {
            request.extensions_mut().insert(Shown::Certificate(peer));
        }
        let path = request.uri().path();
        let who = self.who(path, request.extensions().get());
        decide(path, &who, asked(request.headers())?, self.generation)?;
        let Ok(who) = who else {
            return Ok(Duration::ZERO);
        };
        let due = match path {
            PATH => self.quotas.read(&who),
            _ => self.quotas.call(&who),
        };
        request.extensions_mut().insert(Asker(who.to_string()));
        request.extensions_mut().insert(who);
        Ok(due)
    }

    /// Takes a connection in, so that it can be closed. False if there are enough.
    pub(crate) fn admit<S>(&self, stream: &Secured<S>) -> bool {
        let of = self.authority.presented(&stream.peer().certificate);
        let mut open = self.connections();
        open.retain(|c| !c.end.is_cancelled());
        let of_one = open.iter().filter(|c| c.of == of).count();
        if open.len() >= CONNECTIONS || of_one >= CONNECTIONS_OF_ONE {
            metrics::counter!("lotus_hub_api_connections_refused_total").increment(1);
            return false;
        }
        open.push(Connection {
            peer: stream.peer().clone(),
            of,
            end: stream.end(),
            late: false,
        });
        true
    }

    /// The same for the socket of this host. Operators' connections are not closed.
    pub(crate) fn admit_local(&self, stream: &Local) -> bool {
        stream.secured().is_none_or(|secured| self.admit(secured))
    }

    fn connections(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the connections of those that may not call any more; `at_once`, or when it was so
    /// the last time too: whoever renews an identity that expired needs a moment.
    pub(crate) fn sweep(&self, at_once: bool) {
        let mut open = self.connections();
        open.retain(|c| !c.end.is_cancelled());
        for connection in &mut *open {
            if let Presented::Joining(_) = connection.of {
                // Nothing but its joining is answered.
                continue;
            }
            let refused = self.authority.caller(&connection.peer.certificate).err();
            let was_late = std::mem::replace(&mut connection.late, refused.is_some());
            if let Some(refused) = refused
                && (at_once || was_late)
            {
                tracing::info!(addr = ?connection.peer.addr, %refused, "a spoke's connection is closed");
                connection.end.cancel();
            }
        }
    }

    /// Sweeps again and again until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => self.sweep(false),
            }
        }
    }
}

impl<S> Layer<S> for Access {
    type Service = Checked<S>;

    fn layer(&self, inner: S) -> Checked<S> {
        Checked {
            access: self.clone(),
            inner,
        }
    }
}

/// A service behind [`Access`].
#[derive(Clone, Debug)]
pub struct Checked<S> {
    access: Access,
    inner: S,
}

/// An answer: of the service, of the service later, or a refusal.
type Answered<F, R> = Either<F, Either<BoxFuture<'static, R>, Ready<R>>>;

impl<S, B> Service<Request<B>> for Checked<S>
where
    S: Service<Request<B>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answered<S::Future, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match self.access.check(&mut request) {
            Ok(Duration::ZERO) => Either::Left(self.inner.call(request)),
            Ok(due) => {
                metrics::counter!("lotus_hub_api_delayed_total").increment(1);
                // The one that is ready is called; its clone stays.
                let clone = self.inner.clone();
                let mut inner = std::mem::replace(&mut self.inner, clone);
                let later = async move {
                    tokio::time::sleep(due).await;
                    inner.call(request).await
                };
                Either::Right(Either::Left(Box::pin(later)))
            }
            Err(status) => {
                // Counted and not said: a hostile spoke calls as often as it can.
                metrics::counter!("lotus_hub_api_refused_total", "code" => code(&status))
                    .increment(1);
                let refused = match request.uri().path() {
                    PATH => not_read(&status),
                    _ => status.into_http(),
                };
                Either::Right(Either::Right(ready(Ok(refused))))
            }
        }
    }
}
