//! The same questions over libp2p streams.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{AsyncWriteExt as _, StreamExt as _};
use lotus_p2p::{Host, HostLimits, IncomingStreams, PeerId, Stream};
use lotus_runtime::Rates;
use lotus_runtime::{CancellationToken, Fault};
use lotus_types::Kind;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tracing::Instrument as _;

use super::wire::{
    self, ASK_PROTOCOL, AskRequest, DEAL_PROTOCOLS, DealParams, DealStatusRequest, STATUS_PROTOCOL,
    TRANSPORTS_PROTOCOL,
};
use crate::engine::Engine;

/// Longest time for a question to arrive. Source: Boost, lp2pimpl/net.go, providerReadDeadline.
const READ_PATIENCE: Duration = Duration::from_secs(10);
/// Longest time for an answer to be found; clients wait 60 s.
const PATIENCE: Duration = Duration::from_secs(45);
/// Longest time for an answer to be taken. Source: as above, providerWriteDeadline.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);
/// Streams in work; each may hold a message of [`wire::MAX_MESSAGE`] bytes.
const MAX_STREAMS: usize = 64;
/// Of them, those of one peer.
const MAX_STREAMS_OF_PEER: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    Deal,
    Status,
    Ask,
    Transports,
}

/// The streams of every protocol, and their limits.
struct Net {
    engine: Arc<Engine>,
    all: Arc<Semaphore>,
    peers: Mutex<HashMap<PeerId, Arc<Semaphore>>>,
    rates: Rates<PeerId>,
}

/// Room for one stream, in all and for its peer.
type Room = (OwnedSemaphorePermit, OwnedSemaphorePermit);

/// Binds the host. Its key is `dir/peer.key`.
pub(crate) async fn bind(engine: &Engine, dir: &Path) -> Result<Host, Fault> {
    let cfg = &engine.cfg.mk12;
    let fault = |e: lotus_p2p::P2pError| Fault::new(e.kind(), e.to_string(), e.fix());
    let key = lotus_p2p::load_or_create(&dir.join("peer.key")).map_err(fault)?;
    engine.mk12.key.get_or_init(|| key.clone());
    let limits = HostLimits {
        connections: cfg.max_connections,
        per_peer: cfg.max_connections_per_peer,
    };
    let agent = concat!("lotus-markets/", env!("CARGO_PKG_VERSION"));
    Host::listen(key, cfg.listen, agent, limits)
        .await
        .map_err(fault)
}

/// Answers until stopped; then finishes what it has begun.
pub(crate) async fn run(
    host: Host,
    engine: Arc<Engine>,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let mut tasks: JoinSet<()> = JoinSet::new();
    let net = Arc::new(Net {
        rates: Rates::new(engine.cfg.requests_per_second),
        engine,
        all: Arc::new(Semaphore::new(MAX_STREAMS)),
        peers: Mutex::default(),
    });
    let mut served = JoinSet::new();
    for (protocol, question) in [
        (DEAL_PROTOCOLS[0], Question::Deal),
        (DEAL_PROTOCOLS[1], Question::Deal),
        (STATUS_PROTOCOL, Question::Status),
        (ASK_PROTOCOL, Question::Ask),
        (TRANSPORTS_PROTOCOL, Question::Transports),
    ] {
        let streams = host.accept(protocol);
        let streams = streams.map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
        served.spawn(serve(net.clone(), streams, question, stop.clone()));
    }
    // The connections outlive the streams that are being answered.
    let closed = CancellationToken::new();
    tasks.spawn(host.run(closed.clone()));
    tokio::select! {
        () = stop.cancelled() => {}
        _ = tasks.join_next() => {
            return Err(Fault::new(Kind::Fatal, "the libp2p host ended by itself", "see the log"));
        }
    }
    while served.join_next().await.is_some() {}
    closed.cancel();
    tasks.join_next().await;
    Ok(())
}

/// Takes the streams of one protocol.
async fn serve(
    net: Arc<Net>,
    mut streams: IncomingStreams,
    question: Question,
    stop: CancellationToken,
) {
    let mut answers: JoinSet<()> = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = answers.join_next() => {}
            next = streams.next() => {
                let Some((peer, stream)) = next else { break };
                let Some(room) = net.room(peer) else {
                    // Dropped, the stream is reset: the client may come back later.
                    tracing::debug!(%peer, ?question, "too many requests");
                    metrics::counter!("lotus_markets_mk12_refused_streams_total").increment(1);
                    continue;
                };
                let net = net.clone();
                let span = tracing::info_span!("mk12", %peer, ?question);
                answers.spawn(async move {
                    let _room = room;
                    if let Err(e) = net.answer(stream, question).await {
                        tracing::debug!(%e, "stream ended without an answer");
                    }
                }.instrument(span));
            }
        }
    }
    // Each has a deadline.
    while answers.join_next().await.is_some() {}
}

impl Net {
    /// Room for one more stream of this peer.
    fn room(&self, peer: PeerId) -> Option<Room> {
        if !self.rates.allow(peer, Instant::now()) {
            return None;
        }
        let all = self.all.clone().try_acquire_owned().ok()?;
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        // A peer that has no stream need not be remembered: at most MAX_STREAMS have.
        peers.retain(|_, s| s.available_permits() < MAX_STREAMS_OF_PEER);
        let own = peers
            .entry(peer)
            .or_insert_with(|| Arc::new(Semaphore::new(MAX_STREAMS_OF_PEER)));
        Some((all, own.clone().try_acquire_owned().ok()?))
    }

    async fn answer(&self, mut stream: Stream, question: Question) -> io::Result<()> {
        let engine = &self.engine;
        let answer = match question {
            Question::Deal => {
                let params: DealParams = read(&mut stream).await?;
                within(async { Ok(engine.mk12_deal(params).await) }).await?
            }
            Question::Status => {
                let request: DealStatusRequest = read(&mut stream).await?;
                within(async { Ok(engine.mk12_status(request).await) }).await?
            }
            Question::Ask => {
                let request: AskRequest = read(&mut stream).await?;
                let ask = async { engine.mk12_ask(&request).await.map_err(io::Error::other) };
                within(ask).await?
            }
            Question::Transports => wire::encode(&engine.mk12_transports()),
        };
        let write = async {
            stream.write_all(&answer).await?;
            stream.close().await
        };
        tokio::time::timeout(WRITE_PATIENCE, write).await?
    }
}

async fn read<T: DeserializeOwned>(stream: &mut Stream) -> io::Result<T> {
    tokio::time::timeout(READ_PATIENCE, wire::read(stream)).await?
}

/// The CBOR of an answer that is found in time.
async fn within<T: Serialize>(answer: impl Future<Output = io::Result<T>>) -> io::Result<Vec<u8>> {
    let answer = tokio::time::timeout(PATIENCE, answer).await??;
    Ok(wire::encode(&answer))
}
