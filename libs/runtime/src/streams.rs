//! Streams of HTTP/2 whose client takes nothing. Their connection may be healthy all the while,
//! and neither hyper nor h2 gives up on one, or on the end of an answer that was handed to it. So
//! each stream knows what it gave that was not taken, lasts until all of it was, and is reset when
//! that takes too long.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::Response;
use hyper::body::{Bytes, Frame, SizeHint};
use hyper::rt::Executor;
use hyper_util::rt::TokioExecutor;
use tokio::time::Instant;

/// Largest part that is given at once, bytes: a client must take as much within the patience.
const PART: usize = 64 << 10;

tokio::task_local! {
    /// What the stream that runs has given.
    static GIVEN: Arc<Given>;
}

/// Runs the streams of HTTP/2 connections. One whose client takes nothing for so long is dropped,
/// which resets it and lets go of what waits for the client.
#[derive(Clone, Debug)]
pub(crate) struct Streams {
    pub(crate) patience: Duration,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let patience = self.patience;
        TokioExecutor::new().execute(async move {
            let given = Arc::<Given>::default();
            tokio::select! {
                () = GIVEN.scope(given.clone(), stream) => {}
                () = given.stalled(patience) => {
                    tracing::debug!("a stream whose client takes nothing is reset");
                }
            }
        });
    }
}

/// The answer, watched if this is a stream of HTTP/2.
pub(crate) fn watched(answer: Response<Body>) -> Response<Body> {
    let Ok(given) = GIVEN.try_with(Arc::clone) else {
        return answer;
    };
    answer.map(|body| {
        Body::new(Watched {
            body,
            rest: Bytes::new(),
            ended: false,
            given,
        })
    })
}

/// What was given and is not taken yet.
#[derive(Debug, Default)]
struct Given(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    parts: usize,
    /// When the last part was taken, or the first of these was given.
    since: Option<Instant>,
    /// Waits for the last to be taken.
    end: Option<Waker>,
}

impl Given {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(self: &Arc<Self>, bytes: Bytes) -> Bytes {
        let mut state = self.lock();
        if state.parts == 0 {
            state.since = Some(Instant::now());
        }
        state.parts += 1;
        drop(state);
        let given = self.clone();
        Bytes::from_owner(Part { bytes, given })
    }

    fn poll_taken(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.parts == 0 {
            return Poll::Ready(());
        }
        state.end = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Returns when nothing was taken for so long, though something was there.
    async fn stalled(&self, patience: Duration) {
        loop {
            let since = {
                let state = self.lock();
                state.since.filter(|_| state.parts > 0)
            };
            let due = since.unwrap_or_else(Instant::now) + patience;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// Bytes on their way to the client; taken when dropped.
struct Part {
    bytes: Bytes,
    given: Arc<Given>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let mut state = self.given.lock();
        state.parts -= 1;
        state.since = Some(Instant::now());
        let end = if state.parts == 0 {
            state.end.take()
        } else {
            None
        };
        drop(state);
        if let Some(end) = end {
            end.wake();
        }
    }
}

/// A body that ends when all of it was taken.
struct Watched {
    body: Body,
    /// Not given yet.
    rest: Bytes,
    ended: bool,
    given: Arc<Given>,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        while self.rest.is_empty() && !self.ended {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(e)) => return Poll::Ready(Some(Err(e))),
                None => self.ended = true,
            }
        }
        if self.rest.is_empty() {
            return self.given.poll_taken(cx).map(|()| None);
        }
        let len = self.rest.len().min(PART);
        let part = self.rest.split_to(len);
        Poll::Ready(Some(Ok(Frame::data(self.given.give(part)))))
    }

    fn is_end_stream(&self) -> bool {
        let ended = self.ended || self.body.is_end_stream();
        ended && self.rest.is_empty() && self.given.lock().parts == 0
    }

    fn size_hint(&self) -> SizeHint {
        // Asked for before the first part.
        self.body.size_hint()
    }
}
