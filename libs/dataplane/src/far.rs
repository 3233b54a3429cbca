//! Bytes from another host, of leases from the hub and of staged pieces from a spoke: ranges over
//! HTTP/1.1, on connections that are kept for the next ones.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::header::{AUTHORIZATION, RANGE};
use http::{HeaderName, Method, Request, Response, StatusCode, Uri};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use lotus_types::Kind;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::pull::receive;
use crate::{DataError, HttpPull, PATH, Pulled};

/// Requests at once. A hub lets one spoke have 64 connections, and some are for calls.
const AT_ONCE: usize = 32;
/// Connections that wait for the next request, and how long.
const IDLE: usize = 8;
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// What the errors call the other side.
pub(crate) const WHERE: &str = "the data plane of another host";

/// A connection in both directions.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Duplex for T {}

/// Connections to the other side, on which it answers over HTTP/1.1, and knows who asks.
#[async_trait::async_trait]
pub trait Dial: Send + Sync + 'static {
    /// One more.
    async fn dial(&self) -> io::Result<Box<dyn Duplex>>;
}

/// The data plane of another host. Clones share its connections.
#[derive(Clone)]
pub struct Far(Arc<Inner>);

struct Inner {
    client: Client<Dialer, Empty<Bytes>>,
    places: Arc<Semaphore>,
}

impl std::fmt::Debug for Far {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Far")
    }
}

/// An answer, and the place among the requests that it holds.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response<Incoming>,
    _place: OwnedSemaphorePermit,
}

impl Far {
    /// Over connections that `dial` opens.
    #[must_use]
    pub fn new(dial: Arc<dyn Dial>) -> Self {
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_LIMIT)
            .pool_max_idle_per_host(IDLE)
            .build(Dialer(dial));
        Self(Arc::new(Inner {
            client,
            places: Arc::new(Semaphore::new(AT_ONCE)),
        }))
    }

    /// Asks for what `token` opens, or for a range of it. The answer is one of success.
    pub(crate) async fn ask(
        &self,
        method: Method,
        token: &str,
        range: Option<&str>,
        deadline: Duration,
    ) -> Result<Answer, DataError> {
        let range = range.map(|range| (RANGE, range.to_owned()));
        let sent = self.send(method, token, range.into_iter(), deadline).await;
        let (response, place) = sent?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => Ok(Answer {
                response,
                _place: place,
            }),
            StatusCode::NOT_FOUND => Err(DataError::UnknownToken { at: WHERE.into() }),
            status => Err(DataError::Refused {
                at: WHERE.into(),
                kind: match status.is_server_error() {
                    true => Kind::Transport,
                    false => Kind::Config,
                },
                message: format!("HTTP status {status}"),
            }),
        }
    }

    /// The same as [`pull_http`](crate::pull_http), of what `token` opens.
    pub async fn pull(
        &self,
        token: &str,
        pull: &HttpPull,
        sink: &mpsc::Sender<Bytes>,
    ) -> Result<Pulled, DataError> {
        let sent = self
            .send(Method::GET, token, pull.resumed(), pull.idle)
            .await;
        let (response, _place) = sent?;
        receive(response, pull, sink).await
    }

    /// The answer, and the place among the requests that it holds.
    async fn send(
        &self,
        method: Method,
        token: &str,
        headers: impl Iterator<Item = (HeaderName, String)>,
        deadline: Duration,
    ) -> Result<(Response<Incoming>, OwnedSemaphorePermit), DataError> {
        let asked = async {
            let place = self.0.places.clone().acquire_owned().await;
            let place = place.map_err(|_| DataError::Stopped)?;
            Ok((self.request(method, token, headers).await?, place))
        };
        let asked = tokio::time::timeout(deadline, asked).await;
        asked.unwrap_or_else(|_| {
            Err(DataError::Silent {
                at: WHERE.into(),
                after: deadline,
            })
        })
    }

    async fn request(
        &self,
        method: Method,
        token: &str,
        headers: impl Iterator<Item = (HeaderName, String)>,
    ) -> Result<Response<Incoming>, DataError> {
        let mut request = Request::builder()
            .method(method)
            // The connector looks at nothing of it.
            .uri(format!("http://peer{PATH}"))
            .header(AUTHORIZATION, format!("Bearer {token}"));
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(Empty::new());
        let request = request.map_err(|e| DataError::Protocol {
            at: WHERE.into(),
            what: e.to_string(),
        })?;
        let sent = self.0.client.request(request).await;
        sent.map_err(|e| DataError::Unreachable {
            at: WHERE.into(),
            why: match std::error::Error::source(&e) {
                Some(source) => format!("{e}: {source}"),
                None => e.to_string(),
            },
        })
    }
}

/// The connector of the client.
#[derive(Clone)]
struct Dialer(Arc<dyn Dial>);

impl tower::Service<Uri> for Dialer {
    type Response = Dialed;
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Dialed>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let dial = self.0.clone();
        Box::pin(async move { Ok(Dialed(TokioIo::new(dial.dial().await?))) })
    }
}

/// A connection of the client.
struct Dialed(TokioIo<Box<dyn Duplex>>);

impl Connection for Dialed {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for Dialed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl hyper::rt::Write for Dialed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
