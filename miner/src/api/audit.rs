//! Writes down every call that changes something, once its outcome is known and before the caller
//! hears of it: who called, what, about which thing, and what came of it.
//!
//! Calls that were refused because of who called are not in it: whoever may call nothing could
//! fill the disk. They are counted (`lotus_hub_api_refused_total`).

use std::future::ready;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::State;
use axum::middleware::Next;
use axum::response::IntoResponse as _;
use futures::future::{BoxFuture, Either};
use http::{Request, Response};
use hub_proto::{status, with_code};
use lotus_audit::{Audit, AuditError, Call};
use lotus_identity::{Peer, Shown};
use lotus_types::{Generation, Kind};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument as _, Span};

use super::access::Who;
use crate::control::Failed;

/// Methods that change something. Not among them are leases: they are looks at bytes, for a minute
/// at most, and there are as many as clients ask for.
const CHANGES: [&str; 10] = [
    "/hub.v1.Capacity/Acquire",
    "/hub.v1.Capacity/Release",
    "/hub.v1.Pieces/Offer",
    "/hub.v1.Pieces/Withdraw",
    "/hub.v1.Unsealed/RequestUnseal",
    "/hub.v1.Chain/Publish",
    "/hub.v1.Chain/SignAsk",
    "/hub.v1.Credentials/Join",
    "/hub.v1.Credentials/Renew",
    "/hub.v1.Credentials/Revoke",
];

/// Calls that change something and are under way.
const AT_ONCE: usize = 1024;
/// When to call again if there are so many.
const AGAIN: Duration = Duration::from_secs(1);

/// What a call is about: its idempotency key, where it has one. The method says it.
#[derive(Clone, Debug, Default)]
pub(super) struct About(Arc<OnceLock<String>>);

impl About {
    /// That of a call.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get().cloned().unwrap_or_default()
    }

    /// Says it, once.
    pub(super) fn is(&self, what: impl ToString) {
        self.0.set(what.to_string()).unwrap_or_default();
    }
}

/// The log, for the layers of all ports.
#[derive(Clone, Debug)]
pub struct Recorder {
    audit: Arc<Audit>,
    generation: Generation,
    /// How long a call of the hub API may take.
    limit: Duration,
    tasks: TaskTracker,
    room: Arc<Semaphore>,
}

impl Recorder {
    /// Writes to that log, as the hub of this generation. A call of the hub API may take `limit`.
    #[must_use]
    pub fn new(audit: Audit, generation: Generation, limit: Duration) -> Self {
        Self {
            audit: Arc::new(audit),
            generation,
            limit,
            tasks: TaskTracker::new(),
            room: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }
}

impl Recorder {
    /// What is written down, but for the outcome.
    fn call<B>(&self, request: &Request<B>) -> Call {
        let extensions = request.extensions();
        let from = match extensions.get() {
            Some(Shown::Certificate(Peer {
                addr: Some(addr), ..
            })) => addr.to_string(),
            _ => String::new(),
        };
        Call {
            who: extensions.get().map_or_else(String::new, Who::to_string),
            from,
            method: request.uri().path().into(),
            key: String::new(),
            outcome: String::new(),
            generation: self.generation.0,
        }
    }

    /// Waits until it is on the disk.
    async fn record(&self, call: &Call) -> Result<(), AuditError> {
        let recorded = match self.audit.append_async(call).await {
            Ok(ticket) => ticket.durable().await.map(drop),
            Err(e) => Err(e),
        };
        if let Err(e) = &recorded {
            tracing::error!(method = call.method, who = call.who, error = %e, "not in the audit log");
            metrics::counter!("lotus_hub_audit_failures_total").increment(1);
        }
        recorded
    }
}

/// Writes down the operator's orders over the control socket: whatever is no GET.
pub(crate) async fn recorded(
    State(recorder): State<Recorder>,
    request: axum::extract::Request,
    next: Next,
) -> axum::response::Response {
    if request.method() == http::Method::GET {
        return next.run(request).await;
    }
    let mut call = Call {
        who: Who::Host.to_string(),
        method: request.uri().path().into(),
        generation: recorder.generation.0,
        ..Call::default()
    };
    let tasks = recorder.tasks.clone();
    let work = async move {
        let response = next.run(request).await;
        call.outcome = match response.status() {
            status if status.is_success() => "ok".into(),
            status => status.as_str().into(),
        };
        match recorder.record(&call).await {
            Ok(()) => response,
            Err(e) => Failed::new(
                e.kind(),
                format!("this may be done, but the audit log did not take it: {e}"),
                e.fix(),
            )
            .into_response(),
        }
    };
    let task = tasks.spawn(work.instrument(Span::current()));
    task.await.unwrap_or_else(|e| {
        let what = format!("the order broke: {e}");
        Failed::new(Kind::Fatal, what, "see the log").into_response()
    })
}

/// The outcome in an answer. A failed call has nothing but headers.
fn outcome<B>(response: &Response<B>) -> String {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != Code::Ok => format!("{:?}", status.code()),
        _ => "ok".into(),
    }
}

impl<S> Layer<S> for Recorder {
    type Service = Recorded<S>;

    fn layer(&self, inner: S) -> Recorded<S> {
        Recorded {
            recorder: self.clone(),
            inner,
        }
    }
}

/// A service behind a [`Recorder`].
#[derive(Clone, Debug)]
pub struct Recorded<S> {
    recorder: Recorder,
    inner: S,
}

impl<S, B> Service<Request<B>> for Recorded<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, BoxFuture<'static, Result<Response<Body>, S::Error>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        if !CHANGES.contains(&request.uri().path()) {
            return Either::Left(self.inner.call(request));
        }
        let Ok(place) = self.recorder.room.clone().try_acquire_owned() else {
            return Either::Right(Box::pin(ready(Ok(full().into_http()))));
        };
        let about = About::default();
        request.extensions_mut().insert(about.clone());
        let mut call = self.recorder.call(&request);
        let (recorder, answer) = (self.recorder.clone(), self.inner.call(request));
        let work = async move {
            let _place = place;
            let response = match tokio::time::timeout(recorder.limit, answer).await {
                Ok(response) => response?,
                Err(_) => late(recorder.limit).into_http(),
            };
            call.key = about.0.get().cloned().unwrap_or_default();
            call.outcome = outcome(&response);
            match recorder.record(&call).await {
                Ok(()) => Ok(response),
                Err(e) => Ok(unrecorded(&e).into_http()),
            }
        };
        let tasks = self.recorder.tasks.clone();
        Either::Right(Box::pin(async move {
            // A task of its own, in the trace of the call: whoever hangs up does not keep it from
            // being written down.
            let task = tasks.spawn(work.instrument(Span::current()));
            task.await.unwrap_or_else(|e| {
                let what = format!("the call broke: {e}");
                Ok(status(Kind::Fatal, what, "see the log", None).into_http())
            })
        }))
    }
}

/// Nobody who hangs up ends a call, so there is a limit to them.
fn full() -> Status {
    let what = format!("{AT_ONCE} calls that change something are under way");
    status(Kind::Capacity, what, "call again", Some(AGAIN))
}

/// The server itself stops waiting at the same moment; this is for the log.
fn late(limit: Duration) -> Status {
    let what = format!("not done in {limit:?}");
    with_code(
        Code::DeadlineExceeded,
        Kind::Transport,
        what,
        "call again",
        None,
    )
}

/// The call may be done; the same again changes nothing more, and is written down then.
fn unrecorded(e: &AuditError) -> Status {
    with_code(
        Code::Unavailable,
        e.kind(),
        format!("the audit log did not take this call: {e}"),
        e.fix(),
        None,
    )
}

#[cfg(test)]
mod tests {
    use hub_proto::access::METHODS;

    use super::*;

    /// Methods that look, and change nothing.
    const LOOKS: [&str; 16] = [
        "/hub.v1.Hub/Hello",
        "/hub.v1.Hub/Identity",
        "/hub.v1.Hub/SafeToRestart",
        "/hub.v1.Hub/WatchProving",
        "/hub.v1.Capacity/Watch",
        "/hub.v1.Pieces/Status",
        "/hub.v1.Pieces/List",
        "/hub.v1.Sectors/List",
        "/hub.v1.Sectors/Get",
        "/hub.v1.Unsealed/Locate",
        "/hub.v1.Unsealed/Lease",
        "/hub.v1.Events/Subscribe",
        "/hub.v1.Chain/Head",
        "/hub.v1.Chain/Allocation",
        "/hub.v1.Chain/MarketClient",
        "/hub.v1.Credentials/List",
    ];

    #[test]
    fn each_method_is_known_to_change_something_or_not() {
        for m in METHODS {
            let known = CHANGES.contains(&m.path) != LOOKS.contains(&m.path);
            assert!(known, "{} is new: does it change something?", m.path);
        }
        assert_eq!(METHODS.len(), CHANGES.len() + LOOKS.len());
    }

    #[test]
    fn the_outcome_is_the_code_of_the_answer() {
        let failed = status(Kind::Data, "no", "yes", None).into_http::<Body>();
        assert_eq!(outcome(&failed), "InvalidArgument");
        assert_eq!(outcome(&Response::new(Body::empty())), "ok");
    }
}
