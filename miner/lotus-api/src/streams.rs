//! Parameters that are streams of bytes, as go-jsonrpc sends them.
//!
//! A call carries `{"Type": "push", "Info": UUID}`. The caller sends the bytes in a request of its
//! own: HEAD to `/rpc/streams/v0/push/UUID`, which is answered when they are wanted, then POST to
//! the same place, which is answered when they were taken. Callers of the old kind begin with POST.
//! The UUID is the right to do so: Lotus' clients send no token there. Source: lotus
//! lib/rpcenc/reader.go.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use hyper::body::{Body as _, Incoming};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::error::RpcError;

/// Where streams come in.
pub(crate) const PATH: &str = "/rpc/streams/v0/push/";
/// How long call and stream wait for each other. Source: lotus lib/rpcenc/reader.go, `Timeout`.
const OPEN: Duration = Duration::from_secs(30);
/// How long a stream may be silent, on either side.
const SILENCE: Duration = Duration::from_secs(60);
/// Calls with a stream at a time.
const MAX_STREAMS: usize = 32;
/// Chunks on their way.
const QUEUE: usize = 16;
/// Bytes of a chunk of zeros.
const ZEROS: usize = 1 << 16;

/// The bytes of a stream, in order. An error is its last item.
pub type Data = mpsc::Receiver<io::Result<Bytes>>;

/// Lotus' `ReaderStream`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ReaderStream {
    r#type: String,
    info: String,
}

/// A stream that arrived, and whom to tell how it went.
struct Push {
    body: Incoming,
    done: oneshot::Sender<Result<(), String>>,
}

/// The streams that calls wait for.
pub(crate) struct Streams {
    wanted: Mutex<HashMap<Uuid, oneshot::Sender<Push>>>,
    changed: watch::Sender<u64>,
    pumps: TaskTracker,
}

impl Streams {
    /// What fills the streams is among `pumps`.
    pub(crate) fn new(pumps: TaskTracker) -> Arc<Self> {
        Arc::new(Self {
            wanted: Mutex::default(),
            changed: watch::Sender::new(0),
            pumps,
        })
    }

    /// The bytes that a parameter stands for: not more than `limit`.
    pub(crate) fn open(self: &Arc<Self>, param: &Value, limit: u64) -> Result<Data, RpcError> {
        let stream: ReaderStream = serde_json::from_value(param.clone())
            .map_err(|e| RpcError::failed(format!("the data is no reader stream: {e}")))?;
        let (to, data) = mpsc::channel(QUEUE);
        match stream.r#type.as_str() {
            "null" => {
                let n: u64 = stream.info.parse().map_err(|e| {
                    RpcError::failed(format!("{:?} is no number of zeros: {e}", stream.info))
                })?;
                self.pumps.spawn(zeros(n, limit, to));
            }
            "push" => {
                let id: Uuid = stream.info.parse().map_err(|e| {
                    RpcError::failed(format!("{:?} is no id of a stream: {e}", stream.info))
                })?;
                let wait = self.want(id)?;
                let this = self.clone();
                self.pumps.spawn(async move {
                    this.pump(wait, limit, to).await;
                    this.lock().remove(&id);
                });
            }
            other => {
                return Err(RpcError::failed(format!(
                    "this hub fetches no data by itself: push it instead of a stream of type \
                     {other:?}"
                )));
            }
        }
        Ok(data)
    }

    fn want(&self, id: Uuid) -> Result<oneshot::Receiver<Push>, RpcError> {
        let (to, wait) = oneshot::channel();
        let mut wanted = self.lock();
        if wanted.len() >= MAX_STREAMS {
            return Err(RpcError::failed("too many streams at a time: try again"));
        }
        if wanted.contains_key(&id) {
            return Err(RpcError::failed(format!("stream {id} is of another call")));
        }
        wanted.insert(id, to);
        drop(wanted);
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
        Ok(wait)
    }

    /// Passes a stream on to its call.
    async fn pump(
        &self,
        wait: oneshot::Receiver<Push>,
        limit: u64,
        to: mpsc::Sender<io::Result<Bytes>>,
    ) {
        let push = tokio::select! {
            push = tokio::time::timeout(OPEN, wait) => push,
            // The call needs no data after all.
            () = to.closed() => return,
        };
        let Ok(Ok(Push { mut body, done })) = push else {
            let late = io::Error::new(io::ErrorKind::TimedOut, format!("no stream in {OPEN:?}"));
            // The call may be gone.
            to.send(Err(late)).await.unwrap_or_default();
            return;
        };
        let ended = copy(&mut body, limit, &to).await;
        if let Err(why) = &ended {
            let broken = io::Error::other(why.clone());
            to.send_timeout(Err(broken), SILENCE)
                .await
                .unwrap_or_default();
        }
        drop(to);
        // The caller may be gone.
        done.send(ended).unwrap_or_default();
    }

    /// Answers a request to [`PATH`]: status and words.
    pub(crate) async fn answer(&self, request: Request<Incoming>) -> (StatusCode, String) {
        let id = request.uri().path().strip_prefix(PATH).unwrap_or_default();
        let id: Uuid = match id.parse() {
            Ok(id) => id,
            Err(e) => return (StatusCode::BAD_REQUEST, format!("no id of a stream: {e}\n")),
        };
        match *request.method() {
            Method::HEAD | Method::POST => {}
            _ => return (StatusCode::METHOD_NOT_ALLOWED, "HEAD, then POST\n".into()),
        }
        let wanted = tokio::time::timeout(OPEN, self.until_wanted(id));
        if wanted.await.is_err() {
            return (
                StatusCode::INTERNAL_SERVER_ERROR,
                "no call wants it\n".into(),
            );
        }
        if request.method() == Method::HEAD {
            return (StatusCode::OK, String::new());
        }
        let Some(call) = self.lock().remove(&id) else {
            return (StatusCode::CONFLICT, "it was sent already\n".into());
        };
        let (done, told) = oneshot::channel();
        let body = request.into_body();
        if call.send(Push { body, done }).is_err() {
            return (
                StatusCode::INTERNAL_SERVER_ERROR,
                "its call is over\n".into(),
            );
        }
        match told.await {
            Ok(Ok(())) => (StatusCode::OK, String::new()),
            Ok(Err(why)) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{why}\n")),
            Err(_) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "its call is over\n".into(),
            ),
        }
    }

    async fn until_wanted(&self, id: Uuid) {
        let mut changed = self.changed.subscribe();
        while !self.lock().contains_key(&id) {
            if changed.changed().await.is_err() {
                // The sender is a field of this.
                return;
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, oneshot::Sender<Push>>> {
        // Every change of the map is one step.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies a body. The error is for both ends.
async fn copy(
    body: &mut Incoming,
    limit: u64,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> Result<(), String> {
    let mut left = limit;
    loop {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
        let frame = match tokio::time::timeout(SILENCE, frame).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(e))) => return Err(format!("the stream broke: {e}")),
            Ok(None) => return Ok(()),
            Err(_) => return Err(format!("the stream was silent for {SILENCE:?}")),
        };
        let Ok(bytes) = frame.into_data() else {
            continue;
        };
        left = left
            .checked_sub(bytes.len() as u64)
            .ok_or_else(|| format!("the stream has more than the {limit} bytes of the call"))?;
        if to.send_timeout(Ok(bytes), SILENCE).await.is_err() {
            return Err("the call takes no more".into());
        }
    }
}

async fn zeros(n: u64, limit: u64, to: mpsc::Sender<io::Result<Bytes>>) {
    if n > limit {
        let why = format!("{n} zeros are more than the {limit} bytes of the call");
        to.send(Err(io::Error::other(why)))
            .await
            .unwrap_or_default();
        return;
    }
    let chunk = Bytes::from_static(&[0; ZEROS]);
    let mut left = n;
    while left > 0 {
        let len = usize::try_from(left).map_or(ZEROS, |l| l.min(ZEROS));
        if to.send(Ok(chunk.slice(..len))).await.is_err() {
            return;
        }
        left -= len as u64;
    }
}
