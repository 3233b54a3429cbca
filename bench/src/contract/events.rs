//! The event stream against polling by JSON-RPC: the same events to as many, as fresh; and a long
//! log read to its end.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use comfy_table::Table;
use hub_proto::HubClient;
use lotus_e2e::{Failed, secs};
use serde::Serialize;
use tokio::task::JoinSet;

use super::json_rpc::{self, Event};
use super::rig::{JsonRpc, PATIENCE, Peer, Rig, idle, last_event, subscribe};
use super::{Calls, float, target};
use crate::markets::processor_time;
use crate::{median, ratio};

/// Subscribers, each with an identity and a connection of its own.
const SUBSCRIBERS: usize = 100;
/// A piece is offered and refused so often: two events, ten a second.
const OFFERS: u64 = 50;
const PACE: Duration = Duration::from_millis(200);
/// How often a poller asks.
const POLL: Duration = Duration::from_millis(100);
/// Events in the log before, and who reads them at once.
const LOG: u64 = 100_000;
const READERS: usize = 4;
/// Events in an answer of the peer: as many as the hub reads at a time.
const PAGE: u64 = 256;
const ROUNDS: u64 = 3;
/// How long the idle servers are looked at.
const IDLE: Duration = secs(5);
/// What a poller costs the server for each event, by what a subscriber does.
const TARGET: f64 = 5.0;

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// The server's processor time for an event that is heard: by polling each 100 ms, by that of
    /// the stream. What it takes that the events happen is left out.
    events_vs_polling: f64,
    events_target_met: bool,
    events_stream_us_per_event: f64,
    events_polling_us_per_event: f64,
    /// From when an event happens to when it is heard.
    events_stream_p50_ms: f64,
    events_stream_p99_ms: f64,
    events_polling_p50_ms: f64,
    events_polling_p99_ms: f64,
    /// The same for a log of 100,000 that is read to its end, by JSON-RPC in pages of 256.
    events_bulk_vs_polling: f64,
    events_bulk_stream_us_per_event: f64,
    events_bulk_polling_us_per_event: f64,
    events_bulk_stream_per_second: f64,
    events_bulk_polling_per_second: f64,
    /// Events that did not come, or not in order.
    events_wrong: u64,
}

impl Report {
    pub(super) fn ok(&self) -> bool {
        self.events_wrong == 0
    }

    pub(super) fn rows(&self, table: &mut Table) {
        table.add_row([
            "event stream, cost of polling by its".to_owned(),
            format!("{:.1} times", self.events_vs_polling),
            format!(
                "{:.1} µs and {:.1} µs of processor time for an event{}",
                self.events_stream_us_per_event,
                self.events_polling_us_per_event,
                target(TARGET, self.events_target_met)
            ),
        ]);
        table.add_row([
            "  heard after".to_owned(),
            format!("{:.1} ms", self.events_stream_p50_ms),
            format!(
                "p99 {:.1} ms; polling {:.1} ms, p99 {:.1} ms",
                self.events_stream_p99_ms, self.events_polling_p50_ms, self.events_polling_p99_ms
            ),
        ]);
        table.add_row([
            "  100,000 events at once".to_owned(),
            format!("{:.1} times", self.events_bulk_vs_polling),
            format!(
                "{:.2} µs and {:.2} µs; {:.0} and {:.0} a second",
                self.events_bulk_stream_us_per_event,
                self.events_bulk_polling_us_per_event,
                self.events_bulk_stream_per_second,
                self.events_bulk_polling_per_second
            ),
        ]);
    }
}

pub(super) async fn run() -> Result<Report, Failed> {
    let rig = Rig::start(0, LOG).await?;
    let peer = rig.peer().await?;
    let seller = rig.seller().await?;
    let mut spokes = Vec::new();
    for identity in rig.identities(SUBSCRIBERS)? {
        spokes.push(rig.spoke(&identity).await?);
    }
    let mut pollers = peer.connections(SUBSCRIBERS).await?;
    let mut wrong = 0;
    let bulk = bulk(&rig, &peer, &spokes, &mut pollers, &mut wrong).await?;
    let (mut ours, mut theirs) = (Calls::default(), Calls::default());
    let (mut stream, mut polling) = (Vec::new(), Vec::new());
    let mut next = 1_000;
    for round in 1..=ROUNDS {
        eprintln!("events: round {round} of {ROUNDS}");
        let numbers = next..next + OFFERS;
        next += 3 * OFFERS;
        let (again, last) = (numbers.end, numbers.end + OFFERS);
        let alone = hub(&rig, &seller, &[], numbers.clone()).await?;
        let heard = hub(&rig, &seller, &spokes, again..last).await?;
        stream.push(heard.cost(&alone));
        ours.add(heard.heard);
        let mut offerer = peer.connect().await?;
        let alone = polled(&peer, &mut offerer, &mut Vec::new(), numbers).await?;
        let heard = polled(&peer, &mut offerer, &mut pollers, again..last).await?;
        polling.push(heard.cost(&alone));
        theirs.add(heard.heard);
    }
    rig.stop().await?;
    wrong += ours.failed + theirs.failed;
    let ratios = stream.iter().zip(&polling);
    let ratios = ratios.map(|(stream, polling)| ratio("events", *polling, *stream));
    let events_vs_polling = median(&ratios.collect::<Result<Vec<_>, Failed>>()?);
    Ok(Report {
        events_vs_polling,
        events_target_met: events_vs_polling >= TARGET,
        events_stream_us_per_event: median(&stream),
        events_polling_us_per_event: median(&polling),
        events_stream_p50_ms: ours.ms(0.5),
        events_stream_p99_ms: ours.ms(0.99),
        events_polling_p50_ms: theirs.ms(0.5),
        events_polling_p99_ms: theirs.ms(0.99),
        events_bulk_vs_polling: ratio("events", bulk[1].0, bulk[0].0)?,
        events_bulk_stream_us_per_event: bulk[0].0,
        events_bulk_polling_us_per_event: bulk[1].0,
        events_bulk_stream_per_second: bulk[0].1,
        events_bulk_polling_per_second: bulk[1].1,
        events_wrong: wrong,
    })
}

/// A while with events, and perhaps with somebody who hears them.
struct While {
    server: Duration,
    /// How late each event was heard; `failed` are those that were not, or not in order.
    heard: Calls,
}

impl While {
    /// Microseconds of the server for each event heard, by what it takes when nobody listens.
    fn cost(&self, alone: &Self) -> f64 {
        let events = float(self.heard.took.len() as u64);
        (self.server.as_secs_f64() - alone.server.as_secs_f64()) / events * 1e6
    }
}

async fn hub(
    rig: &Rig,
    seller: &HubClient,
    spokes: &[HubClient],
    numbers: std::ops::Range<u64>,
) -> Result<While, Failed> {
    let from = last_event(seller).await? + 1;
    let count = 2 * (numbers.end - numbers.start);
    let mut listeners = JoinSet::new();
    for spoke in spokes {
        let mut events = subscribe(spoke, from)
            .await
            .map_err(|e| Failed::at("events", e.message()))?;
        listeners.spawn(async move {
            let mut heard = Heard::new(from, count);
            while heard.left > 0 {
                match tokio::time::timeout(PATIENCE, events.message()).await {
                    Ok(Ok(Some(event))) => heard.take(event.seq, event.unix_ms),
                    _ => break,
                }
            }
            heard.end()
        });
    }
    let before = processor_time(rig.pid)?;
    rig.offers(seller, numbers, PACE).await?;
    let mut heard = Calls::default();
    while let Some(one) = listeners.join_next().await {
        heard.add(one.map_err(|e| Failed::at("subscriber", e))?);
    }
    let server = processor_time(rig.pid)? - before;
    Ok(While { server, heard })
}

async fn polled(
    peer: &Peer,
    offerer: &mut JsonRpc,
    pollers: &mut Vec<JsonRpc>,
    numbers: std::ops::Range<u64>,
) -> Result<While, Failed> {
    // As good as any to learn where the log ends.
    let last: u64 = offerer.call(json_rpc::OFFER, [0]).await?;
    let count = 2 * (numbers.end - numbers.start);
    let all = u32::try_from(pollers.len()).unwrap_or(u32::MAX).max(1);
    let mut asking = JoinSet::new();
    for (n, mut poller) in (0..).zip(pollers.drain(..)) {
        // Not all at once.
        let start = tokio::time::Instant::now() + POLL * n / all;
        asking.spawn(async move {
            let mut pace = tokio::time::interval_at(start, POLL);
            let mut heard = Heard::new(last + 1, count);
            let end = Instant::now() + PATIENCE;
            while heard.left > 0 && Instant::now() < end {
                pace.tick().await;
                let asked = poller.call(json_rpc::EVENTS, (heard.next - 1, PAGE)).await;
                let events: Vec<Event> = match asked {
                    Ok(events) => events,
                    Err(_) => break,
                };
                for event in events {
                    heard.take(event.seq, event.unix_ms);
                }
            }
            (poller, heard.end())
        });
    }
    let before = processor_time(peer.pid)?;
    let mut pace = tokio::time::interval(PACE);
    for n in numbers {
        pace.tick().await;
        let _: u64 = offerer.call(json_rpc::OFFER, [n]).await?;
    }
    let mut heard = Calls::default();
    while let Some(one) = asking.join_next().await {
        let (poller, one) = one.map_err(|e| Failed::at("poller", e))?;
        pollers.push(poller);
        heard.add(one);
    }
    let server = processor_time(peer.pid)? - before;
    Ok(While { server, heard })
}

/// What one subscriber heard of the events that it is to hear.
struct Heard {
    next: u64,
    left: u64,
    late: Calls,
}

impl Heard {
    fn new(next: u64, left: u64) -> Self {
        let late = Calls::default();
        Self { next, left, late }
    }

    fn take(&mut self, seq: u64, unix_ms: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let late = now
            .unwrap_or_default()
            .saturating_sub(Duration::from_millis(unix_ms));
        self.late.took.push(late);
        self.late.failed += u64::from(seq != self.next);
        self.next = seq + 1;
        self.left = self.left.saturating_sub(1);
    }

    fn end(mut self) -> Calls {
        self.late.failed += self.left;
        self.late
    }
}

/// The whole log to some readers, as fast as they read, by stream and by pages: microseconds of the
/// server for each event, and events a second.
async fn bulk(
    rig: &Rig,
    peer: &Peer,
    spokes: &[HubClient],
    pollers: &mut [JsonRpc],
    wrong: &mut u64,
) -> Result<[(f64, f64); 2], Failed> {
    let idle = [idle(rig.pid, IDLE).await?, idle(peer.pid, IDLE).await?];
    let all = float(LOG * READERS as u64);
    let (mut costs, mut speeds) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    // The first round does not count.
    for round in 0..=ROUNDS {
        eprintln!("events: the whole log, round {round} of {ROUNDS}");
        for (n, pid) in [rig.pid, peer.pid].into_iter().enumerate() {
            let (before, began) = (processor_time(pid)?, Instant::now());
            *wrong += match n {
                0 => streamed(spokes).await?,
                _ => paged(pollers).await?,
            };
            let time = began.elapsed().as_secs_f64();
            let used = (processor_time(pid)? - before).as_secs_f64() - idle[n] * time;
            if round > 0 {
                costs[n].push(used / all * 1e6);
                speeds[n].push(all / time);
            }
        }
    }
    Ok([0, 1].map(|n| (median(&costs[n]), median(&speeds[n]))))
}

/// Returns how many events did not come in order.
async fn streamed(spokes: &[HubClient]) -> Result<u64, Failed> {
    let failed = |e: tonic::Status| Failed::at("events", e.message());
    let mut readers = JoinSet::new();
    for spoke in spokes.iter().take(READERS) {
        let mut events = subscribe(spoke, 1).await.map_err(failed)?;
        readers.spawn(async move {
            let mut heard = Heard::new(1, LOG);
            while heard.left > 0
                && let Some(event) = events.message().await.map_err(failed)?
            {
                heard.take(event.seq, event.unix_ms);
            }
            Ok::<_, Failed>(heard.end().failed)
        });
    }
    let mut wrong = 0;
    while let Some(one) = readers.join_next().await {
        wrong += one.map_err(|e| Failed::at("reader", e))??;
    }
    Ok(wrong)
}

async fn paged(pollers: &mut [JsonRpc]) -> Result<u64, Failed> {
    let readers = pollers.iter_mut().take(READERS).map(async |poller| {
        let mut heard = Heard::new(1, LOG);
        while heard.left > 0 {
            let asked = (heard.next - 1, PAGE.min(heard.left));
            let events: Vec<Event> = poller.call(json_rpc::EVENTS, asked).await?;
            if events.is_empty() {
                break;
            }
            for event in events {
                heard.take(event.seq, event.unix_ms);
            }
        }
        Ok::<_, Failed>(heard.end().failed)
    });
    let wrong = futures::future::try_join_all(readers).await?;
    Ok(wrong.iter().sum())
}
