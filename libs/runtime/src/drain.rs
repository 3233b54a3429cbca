//! What one connection is doing, so that a server that drains knows when to close it.
//!
//! A client of HTTP/1.1 that keeps its connection may send a request at the very moment at which
//! the server closes it, and sees a failure that it did not cause. So while a server drains, each
//! answer says `connection: close`, and a connection without a request is closed only after it was
//! quiet for a while. HTTP/2 has a message for this (GOAWAY).

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::{HeaderValue, Response, Version, header};
use hyper::body::{Bytes, Frame, SizeHint};
use tokio::sync::Notify;
use tokio::time::Instant;

/// What a connection is doing. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Activity(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    since: Instant,
    /// Milliseconds from `since` to the last byte that went in or out.
    moved: AtomicU64,
    /// A write waits for the peer to take something.
    stuck: AtomicBool,
    /// Requests that are not answered to the last byte.
    requests: AtomicUsize,
    http2: AtomicBool,
    answered: Notify,
}

impl Activity {
    /// Of a connection that was just accepted.
    pub(crate) fn new() -> Self {
        Self(Arc::new(Inner {
            since: Instant::now(),
            moved: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
            requests: AtomicUsize::new(0),
            http2: AtomicBool::new(false),
            answered: Notify::new(),
        }))
    }

    /// Bytes went in or out.
    pub(crate) fn moved(&self) {
        let at = self.0.since.elapsed().as_millis();
        let at = u64::try_from(at).unwrap_or(u64::MAX);
        self.0.moved.store(at, Ordering::Relaxed);
    }

    /// Whether the peer takes nothing at the moment.
    pub(crate) fn stuck(&self, stuck: bool) {
        self.0.stuck.store(stuck, Ordering::Relaxed);
    }

    /// A request came in.
    pub(crate) fn request(&self, version: Version) -> Request {
        self.0.requests.fetch_add(1, Ordering::Relaxed);
        let http2 = version == Version::HTTP_2;
        self.0.http2.store(http2, Ordering::Relaxed);
        Request {
            activity: self.clone(),
            http2,
        }
    }

    /// Returns when the connection may be told to end: one of HTTP/2 at once, another when it had
    /// no request and no byte for `grace` from now on.
    pub(crate) async fn quiet(&self, grace: Duration) {
        let inner = &self.0;
        let from = Instant::now();
        loop {
            let answered = inner.answered.notified();
            if inner.http2.load(Ordering::Relaxed) {
                return;
            }
            if inner.requests.load(Ordering::Relaxed) > 0 {
                answered.await;
                continue;
            }
            let moved = Duration::from_millis(inner.moved.load(Ordering::Relaxed));
            let moved = from.max(inner.since + moved);
            let due = if inner.stuck.load(Ordering::Relaxed) {
                Instant::now() + grace
            } else {
                moved + grace
            };
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// A request that is not answered to the last byte.
#[derive(Debug)]
pub(crate) struct Request {
    activity: Activity,
    http2: bool,
}

impl Request {
    /// Its answer. `last` when the connection takes no other request.
    pub(crate) fn answer(self, response: Response<Body>, last: bool) -> Response<Body> {
        let http2 = self.http2;
        let mut response = response.map(|body| {
            Body::new(Answer {
                body,
                _request: self,
            })
        });
        if last && !http2 {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.activity.moved();
        self.activity.0.requests.fetch_sub(1, Ordering::Relaxed);
        self.activity.0.answered.notify_waiters();
    }
}

/// A body that ends its request when it ends.
struct Answer {
    body: Body,
    _request: Request,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_millis(100);

    /// How long the connection is kept, in a run in which `what` happens.
    async fn kept(activity: &Activity, what: impl Future<Output = ()>) -> Duration {
        let start = Instant::now();
        tokio::join!(activity.quiet(GRACE), what);
        start.elapsed()
    }

    // A loaded machine makes everything take longer, so only lower bounds are sure.
    #[tokio::test]
    async fn a_connection_ends_when_it_was_quiet_for_the_grace() {
        let activity = Activity::new();
        assert!(kept(&activity, async {}).await >= GRACE, "it never asked");
        // Bytes that are no whole request yet.
        let moves = async {
            tokio::time::sleep(GRACE / 2).await;
            activity.moved();
        };
        // The last byte is known to the millisecond.
        let least = GRACE * 3 / 2 - Duration::from_millis(1);
        assert!(kept(&activity, moves).await >= least);
        // A request that is answered slowly, and another one right after it.
        let requests = async {
            for _ in 0..2 {
                let request = activity.request(Version::HTTP_11);
                tokio::time::sleep(GRACE * 3).await;
                drop(request);
            }
        };
        let least = GRACE * 7 - Duration::from_millis(1);
        assert!(kept(&activity, requests).await >= least);
        // The end of an answer that the peer does not take.
        activity.stuck(true);
        let takes = async {
            tokio::time::sleep(GRACE * 3).await;
            activity.stuck(false);
        };
        assert!(kept(&activity, takes).await >= GRACE * 3);
        // HTTP/2 is told to go away while it works.
        let _open = activity.request(Version::HTTP_2);
        activity.quiet(Duration::MAX).await;
    }

    #[tokio::test]
    async fn a_request_lasts_as_long_as_its_answer() {
        let activity = Activity::new();
        let open = || activity.0.requests.load(Ordering::Relaxed);
        let request = activity.request(Version::HTTP_11);
        let answer = request.answer(Response::new(Body::from("x")), false);
        assert!(answer.headers().get(header::CONNECTION).is_none());
        assert_eq!(answer.body().size_hint().exact(), Some(1));
        assert_eq!(open(), 1);
        drop(answer);
        assert_eq!(open(), 0);
        for (version, wanted) in [(Version::HTTP_11, Some("close")), (Version::HTTP_2, None)] {
            let request = activity.request(version);
            let answer = request.answer(Response::new(Body::empty()), true);
            let said = answer.headers().get(header::CONNECTION);
            assert_eq!(said.and_then(|v| v.to_str().ok()), wanted);
        }
    }
}
