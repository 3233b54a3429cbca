//! A WebSocket connection: calls, and Lotus channels (`xrpc.ch.val`, `xrpc.ch.close`,
//! `xrpc.cancel`).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket};
use futures::{SinkExt, StreamExt};
use lotus_node_client::api::{HeadChange, HeadChangeKind};
use lotus_tokens::Perm;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};
use tokio_util::sync::CancellationToken;

use super::call::{Request, RpcError, response};
use super::{Context, permitted};

/// Calls in flight on one connection before no more are read.
const MAX_CALLS: usize = 64;
/// Channels on one connection.
const MAX_CHANNELS: usize = 16;
/// Frames that wait for the socket.
const OUT: usize = 32;
/// Head changes that may wait for a slow reader before its channel is closed.
/// Source: lotus, chain/store/store.go, `SubHeadChanges`.
const MAX_UNREAD: usize = 16;
/// Longest write of one frame.
const WRITE: Duration = Duration::from_secs(30);
/// Between pings; a peer that sends nothing for three of them is gone.
const PING: Duration = Duration::from_secs(10);

/// Serves a connection until either side ends it.
pub(crate) async fn serve(cx: Arc<Context>, perms: Vec<Perm>, ws: WebSocket) {
    let (mut sink, mut source) = ws.split();
    let (out, mut frames) = mpsc::channel::<Value>(OUT);
    let writer = async move {
        let mut ping = interval(PING);
        loop {
            let frame = tokio::select! {
                v = frames.recv() => match v {
                    Some(v) => Message::Text(v.to_string().into()),
                    None => return,
                },
                _ = ping.tick() => Message::Ping(Default::default()),
            };
            if !matches!(timeout(WRITE, sink.send(frame)).await, Ok(Ok(()))) {
                return;
            }
        }
    };
    let mut conn = Connection {
        cx: cx.clone(),
        perms: perms.into(),
        out,
        calls: JoinSet::new(),
        channels: HashMap::new(),
        next_channel: 1,
    };
    let reader = async move {
        loop {
            tokio::select! {
                Some(_) = conn.calls.join_next() => {}
                frame = timeout(PING * 3, source.next()), if conn.calls.len() < MAX_CALLS => {
                    match frame {
                        Ok(Some(Ok(Message::Text(t)))) => conn.take(t.as_bytes()).await,
                        Ok(Some(Ok(Message::Binary(b)))) => conn.take(&b).await,
                        Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {}
                        Ok(Some(Ok(Message::Close(_)) | Err(_)) | None) | Err(_) => return,
                    }
                }
            }
        }
    };
    tokio::select! {
        () = writer => {}
        () = reader => {}
        () = cx.stop.cancelled() => {}
    }
}

struct Connection {
    cx: Arc<Context>,
    perms: Arc<[Perm]>,
    out: mpsc::Sender<Value>,
    calls: JoinSet<()>,
    /// By the id of the request that opened it, as `xrpc.cancel` names it.
    channels: HashMap<String, CancellationToken>,
    next_channel: u64,
}

impl Connection {
    async fn take(&mut self, frame: &[u8]) {
        let request = match Request::parse(frame) {
            Ok(r) => r,
            Err(e) => return self.answer(&Value::Null, Err(e)).await,
        };
        match (request.method.as_str(), &request.id) {
            ("xrpc.cancel", _) => {
                for id in request.params.unwrap_or_default() {
                    if let Some(channel) = self.channels.remove(&id.to_string()) {
                        channel.cancel();
                    }
                }
            }
            ("Filecoin.ChainNotify", Some(id)) => self.open_channel(id.clone()).await,
            _ => {
                let (cx, perms, out) = (self.cx.clone(), self.perms.clone(), self.out.clone());
                self.calls.spawn(async move {
                    let id = request.id.clone();
                    let result = super::call(&cx, &perms, request).await;
                    if let Some(id) = id {
                        // Fails only when the connection is gone.
                        drop(out.send(response(&id, result)).await);
                    }
                });
            }
        }
    }

    async fn answer(&self, id: &Value, result: Result<Value, RpcError>) {
        drop(self.out.send(response(id, result)).await);
    }

    async fn open_channel(&mut self, id: Value) {
        self.channels.retain(|_, c| !c.is_cancelled());
        if let Err(e) = permitted(&self.perms, "ChainNotify") {
            return self.answer(&id, Err(e)).await;
        }
        if self.channels.len() >= MAX_CHANNELS {
            let e = RpcError::failed(format!("more than {MAX_CHANNELS} channels"));
            return self.answer(&id, Err(e)).await;
        }
        let channel = self.next_channel;
        self.next_channel += 1;
        let cancel = CancellationToken::new();
        self.channels.insert(id.to_string(), cancel.clone());
        let (cx, out) = (self.cx.clone(), self.out.clone());
        self.calls.spawn(async move {
            cx.gate.delay().await;
            drop(out.send(response(&id, Ok(channel.into()))).await);
            follow_heads(&cx, channel, &out, &cancel).await;
            let close = json!({"jsonrpc": "2.0", "method": "xrpc.ch.close", "params": [channel]});
            drop(out.send(close).await);
            cancel.cancel();
        });
    }
}

/// Sends the head and each of its changes until the reader cancels or is too slow.
async fn follow_heads(
    cx: &Context,
    channel: u64,
    out: &mpsc::Sender<Value>,
    cancel: &CancellationToken,
) {
    // Waits for a tipset that is being made.
    let chain = cx.chain.clone();
    let Ok((head, mut changes)) =
        tokio::task::spawn_blocking(move || chain.subscribe_heads()).await
    else {
        return;
    };
    let current = HeadChange {
        kind: HeadChangeKind::Current,
        val: (*head).clone(),
    };
    let mut unread = VecDeque::from([Arc::new(vec![current])]);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            change = changes.recv() => match change {
                Ok(change) if unread.len() < MAX_UNREAD => unread.push_back(change),
                _ => {
                    tracing::warn!(channel, "head change channel closed: its reader is too slow");
                    return;
                }
            },
            room = out.reserve(), if !unread.is_empty() => {
                let (Ok(room), Some(changes)) = (room, unread.pop_front()) else {
                    return;
                };
                room.send(json!({
                    "jsonrpc": "2.0", "method": "xrpc.ch.val", "params": [channel, *changes]
                }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::gate::Gate;
    use crate::{Chain, ChainConfig};
    use lotus_proofs::Vanilla;
    use lotus_tokens::Tokens;

    const WAIT: Duration = Duration::from_secs(20);

    fn context(repo: &std::path::Path) -> Arc<Context> {
        Arc::new(Context {
            chain: Chain::open(repo, ChainConfig::default(), Arc::new(Vanilla)).unwrap(),
            tokens: Tokens::open(repo).unwrap(),
            gate: Arc::new(Gate::default()),
            stop: CancellationToken::new(),
        })
    }

    fn height(frame: &Value) -> i64 {
        frame["params"][1][0]["Val"]["Height"].as_i64().unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_slow_reader_loses_its_channel_and_a_fast_one_no_item() {
        let repo = tempfile::tempdir().unwrap();
        let cx = context(repo.path());
        let start = |room| {
            let (out, frames) = mpsc::channel(room);
            let (cx, cancel) = (cx.clone(), CancellationToken::new());
            let token = cancel.clone();
            let mut task = JoinSet::new();
            task.spawn(async move { follow_heads(&cx, 1, &out, &token).await });
            (task, frames, cancel)
        };
        let (mut slow, mut unread, _open) = start(1);
        let (mut fast, mut frames, cancel) = start(1);
        let first = timeout(WAIT, frames.recv()).await.unwrap().unwrap();
        assert_eq!(first["method"], "xrpc.ch.val");
        assert_eq!(first["params"][1][0]["Type"], "current");
        // The slow one has begun too: its first frame fills its room.
        while unread.is_empty() {
            tokio::task::yield_now().await;
        }
        for _ in 0..MAX_UNREAD + 4 {
            let chain = cx.chain.clone();
            let made = tokio::task::spawn_blocking(move || chain.advance().unwrap());
            let made = made.await.unwrap();
            let frame = timeout(WAIT, frames.recv()).await.unwrap().unwrap();
            assert_eq!(height(&frame), made.height.0);
        }
        timeout(WAIT, slow.join_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert!(fast.try_join_next().is_none());
        cancel.cancel();
        timeout(WAIT, fast.join_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        // What it was sent before is still there to be read.
        assert_eq!(height(&unread.recv().await.unwrap()), 0);
    }
}
