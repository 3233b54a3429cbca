//! Bodies on their way to a client: in small parts, with what they hold bounded, and never taken
//! for whole when they are not.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures::{Stream, stream};
use lotus_runtime::Share;
use lotus_runtime::splice::{Holes, Stretch};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Sleep;

/// Largest part, in bytes, that is not sent by the kernel.
pub(crate) const PART: usize = 256 << 10;
/// Parts between whoever reads and the connection.
const AHEAD: usize = 4;

/// An error drops what the server has not written yet, so it comes this much after the last part.
const FLUSH: Duration = Duration::from_millis(100);

/// Leave to serve one request. Kept by everything that holds its bytes.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    _of: Arc<(OwnedSemaphorePermit, Share)>,
}

impl Place {
    pub(crate) fn new(total: OwnedSemaphorePermit, client: Share) -> Self {
        Self {
            _of: Arc::new((total, client)),
        }
    }
}

/// Where the parts of a body are put.
#[derive(Debug)]
pub(crate) struct Outlet {
    parts: mpsc::Sender<Part>,
    whole: Arc<AtomicBool>,
    _place: Place,
}

/// What a body is made of.
#[derive(Debug)]
pub(crate) enum Part {
    Data(Bytes),
    /// For the kernel to send.
    Stretch(Stretch),
}

/// The client takes no more: it went away, or the server gave it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

impl Outlet {
    /// Puts bytes on their way, waiting for the client. The server drops the body of one that takes
    /// nothing for too long.
    pub(crate) async fn send(&self, mut data: Bytes) -> Result<(), Gone> {
        while !data.is_empty() {
            let part = data.split_to(data.len().min(PART));
            let sent = self.parts.send(Part::Data(part)).await;
            sent.map_err(|_| Gone)?;
        }
        Ok(())
    }

    /// All was put. A body whose outlet is dropped without this breaks off, so that the client
    /// does not take a part for the whole.
    pub(crate) fn finish(self) {
        self.whole.store(true, Ordering::Release);
    }
}

/// A body, and where its parts are put. What leaves is counted as `kind`.
pub(crate) fn body(kind: &'static str, place: Place) -> (Outlet, Body) {
    let (parts, mut receive) = mpsc::channel(AHEAD);
    let whole = Arc::new(AtomicBool::new(false));
    let outlet = Outlet {
        parts,
        whole: whole.clone(),
        _place: place.clone(),
    };
    let parts = stream::poll_fn(move |cx| receive.poll_recv(cx));
    let inflow = Inflow {
        parts,
        whole,
        kind,
        holes: None,
        cut: None,
        _place: place,
    };
    (outlet, Body::from_stream(inflow))
}

/// A body of bytes that are in memory: nobody has to be woken to send them, and the head of the
/// answer goes with them.
pub(crate) fn at_hand(kind: &'static str, place: Place, mut data: Bytes) -> Body {
    let parts = std::iter::from_fn(move || {
        let part = data.split_to(data.len().min(PART));
        (!part.is_empty()).then_some(Part::Data(part))
    });
    Body::from_stream(Inflow {
        parts: stream::iter(parts),
        whole: Arc::new(AtomicBool::new(true)),
        kind,
        holes: None,
        cut: None,
        _place: place,
    })
}

/// A body whose parts are made when the connection can take them, with stretches of files. It is
/// whole when `whole` was set by the end of the parts.
pub(crate) fn made(
    kind: &'static str,
    place: Place,
    holes: Holes,
    whole: Arc<AtomicBool>,
    parts: impl Stream<Item = Part> + Send + 'static,
) -> Body {
    Body::from_stream(Inflow {
        parts: Box::pin(parts),
        whole,
        kind,
        holes: Some(holes),
        cut: None,
        _place: place,
    })
}

struct Inflow<S> {
    parts: S,
    whole: Arc<AtomicBool>,
    kind: &'static str,
    holes: Option<Holes>,
    /// Set when there is no more, and should be.
    cut: Option<Pin<Box<Sleep>>>,
    _place: Place,
}

impl<S: Stream<Item = Part> + Unpin> Stream for Inflow<S> {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.cut.is_none() {
            let part = ready!(Pin::new(&mut self.parts).poll_next(cx));
            let data = match (part, &self.holes) {
                (Some(Part::Data(data)), _) => data,
                (Some(Part::Stretch(stretch)), Some(holes)) => holes.hole(stretch),
                (None, _) if self.whole.load(Ordering::Acquire) => return Poll::Ready(None),
                (None | Some(Part::Stretch(_)), _) => {
                    self.cut = Some(Box::pin(tokio::time::sleep(FLUSH)));
                    return self.poll_next(cx);
                }
            };
            metrics::counter!("lotus_markets_retrieval_bytes", "kind" => self.kind)
                .increment(data.len() as u64);
            return Poll::Ready(Some(Ok(data)));
        }
        if let Some(cut) = &mut self.cut {
            ready!(cut.as_mut().poll(cx));
        }
        let cut = io::Error::other("the content is cut short");
        Poll::Ready(Some(Err(cut)))
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use lotus_runtime::PerClient;
    use tokio::sync::Semaphore;

    use super::*;

    fn place(all: &Arc<Semaphore>) -> Place {
        let client = PerClient::new(9, Vec::new());
        let share = client.take([127, 0, 0, 1].into()).unwrap();
        Place::new(all.clone().try_acquire_owned().unwrap(), share)
    }

    #[tokio::test]
    async fn a_body_is_whole_only_when_it_was_finished() {
        let all = Arc::new(Semaphore::new(3));
        let data = Bytes::from(vec![7; PART * 2 + 5]);
        let (outlet, body) = body_of(&all);
        let sending = async {
            outlet.send(data.clone()).await.unwrap();
            assert_eq!(all.available_permits(), 2, "held while it is on its way");
            outlet.finish();
        };
        let ((), got) = tokio::join!(sending, to_bytes(body, usize::MAX));
        assert_eq!(got.unwrap(), data);
        assert_eq!(all.available_permits(), 3);

        let body = at_hand("test", place(&all), data.clone());
        assert_eq!(to_bytes(body, usize::MAX).await.unwrap(), data);

        let (outlet, body) = body_of(&all);
        let sending = async {
            outlet.send(data.clone()).await.unwrap();
            drop(outlet);
        };
        let ((), got) = tokio::join!(sending, to_bytes(body, usize::MAX));
        assert!(got.is_err());
    }

    fn body_of(all: &Arc<Semaphore>) -> (Outlet, Body) {
        body("test", place(all))
    }

    #[tokio::test]
    async fn a_client_that_goes_away_ends_the_reading() {
        let all = Arc::new(Semaphore::new(1));
        let (outlet, body) = body_of(&all);
        let much = Bytes::from(vec![7; PART * (AHEAD + 1)]);
        let away = async {
            tokio::task::yield_now().await;
            drop(body);
        };
        let (sent, ()) = tokio::join!(outlet.send(much), away);
        assert_eq!(sent, Err(Gone));
        drop(outlet);
        assert_eq!(all.available_permits(), 1);
    }
}
