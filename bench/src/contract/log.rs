//! A long event log, read by many that break off at random and go on where they were, while more
//! happens.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use comfy_table::Table;
use hub_proto::v1::event::What;
use hub_proto::v1::{Event, PiecePhase};
use lotus_e2e::{Failed, secs};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::Serialize;
use tokio::task::JoinSet;

use super::rig::{PATIENCE, Rig, spoke, subscribe};
use super::{float, pieces};
use crate::markets::processor_time;

/// Subscribers, each with an identity and a connection of its own.
const SUBSCRIBERS: usize = 50;
/// Tens digits of the most events that one reads before it breaks off: every length is as likely as
/// ten times it.
const MOST: f64 = 5.0;
/// A piece is offered so often meanwhile.
const PACE: Duration = Duration::from_millis(200);
/// The number of the last piece that is offered.
const LAST: u64 = 1 << 40;
/// Streams of one subscriber that may fail before it gives up.
const FAILURES: u64 = 10;
/// How often it is said how far they are.
const SAY: Duration = secs(20);

/// What was measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Events in the log at the end.
    events: u64,
    subscribers: usize,
    /// Where they broke off: `--seed`.
    seed: u64,
    /// How often they connected anew, the first time left out.
    reconnects: u64,
    /// Over all subscribers: numbers left out, numbers that came twice, and those that came late.
    events_missed: u64,
    events_doubled: u64,
    events_disordered: u64,
    /// Streams and connections that failed.
    events_failed: u64,
    /// Delivered to all of them together, until each had read what was there at the start.
    events_per_second: f64,
    /// The hub's processor time for each, and how many cores both sides took.
    log_hub_us_per_event: f64,
    log_hub_cores: f64,
    log_client_cores: f64,
}

impl Report {
    pub(super) fn ok(&self) -> bool {
        let wrong = self.events_missed + self.events_doubled + self.events_disordered;
        wrong + self.events_failed == 0
    }

    pub(super) fn rows(&self, table: &mut Table) {
        table.add_row([
            format!("{} events to {} subscribers", self.events, self.subscribers),
            format!("{:.0} a second", self.events_per_second),
            format!(
                "{} reconnects with --seed {}: {} missed, {} doubled, {} out of order, {} failed; \
                 {:.2} µs of the hub's processor time for each",
                self.reconnects,
                self.seed,
                self.events_missed,
                self.events_doubled,
                self.events_disordered,
                self.events_failed,
                self.log_hub_us_per_event
            ),
        ]);
    }
}

pub(super) async fn run(events: u64, seed: u64) -> Result<Report, Failed> {
    eprintln!("log: {events} events are written; --seed {seed}");
    let rig = Rig::start(0, events).await?;
    let seller = rig.seller().await?;
    let far = Arc::new(Far::default());
    let (own, hub) = (
        processor_time(std::process::id())?,
        processor_time(rig.pid)?,
    );
    let began = Instant::now();
    let mut reading = JoinSet::new();
    for (n, identity) in (0..).zip(rig.identities(SUBSCRIBERS)?) {
        let reader = Reader {
            addr: rig.addr(),
            identity,
            random: StdRng::seed_from_u64(seed ^ n),
            there: events,
            far: far.clone(),
        };
        reading.spawn(reader.run());
    }
    let (mut number, mut said) = (0, Instant::now());
    while far.done.load(Ordering::Relaxed) < SUBSCRIBERS {
        rig.offers(&seller, number..number + 1, PACE).await?;
        number += 1;
        tokio::time::sleep(PACE).await;
        if said.elapsed() > SAY {
            said = Instant::now();
            let read = far.read.load(Ordering::Relaxed);
            let percent = float(read) / float(events * SUBSCRIBERS as u64) * 100.0;
            eprintln!("log: {percent:.0} % after {:.0?}", began.elapsed());
        }
    }
    let time = began.elapsed().as_secs_f64();
    let used = |pid, before: Duration| {
        processor_time(pid).map(|now| now.saturating_sub(before).as_secs_f64())
    };
    let (own, hub) = (used(std::process::id(), own)?, used(rig.pid, hub)?);
    // All of them hear this one, and end.
    rig.offers(&seller, LAST..LAST + 1, PACE).await?;
    let mut all = Vec::new();
    while let Some(one) = reading.join_next().await {
        all.push(one.map_err(|e| Failed::at("reader", e))?);
    }
    rig.stop().await?;
    let end = all.iter().map(|s| s.next).max().unwrap_or(1);
    let sum = |of: fn(&Seen) -> u64| all.iter().map(of).sum::<u64>();
    let read = float(far.read.load(Ordering::Relaxed));
    Ok(Report {
        events: end - 1,
        subscribers: SUBSCRIBERS,
        seed,
        reconnects: sum(|s| s.reconnects),
        events_missed: sum(|s| s.missed) + all.iter().map(|s| end - s.next).sum::<u64>(),
        events_doubled: sum(|s| s.doubled),
        events_disordered: sum(|s| s.disordered),
        events_failed: sum(|s| s.failed),
        events_per_second: read / time,
        log_hub_us_per_event: hub / read * 1e6,
        log_hub_cores: hub / time,
        log_client_cores: own / time,
    })
}

/// How far all are.
#[derive(Default)]
struct Far {
    /// Events read, of those that were there at the start.
    read: AtomicU64,
    /// Subscribers that have read all of them.
    done: AtomicUsize,
}

struct Reader {
    addr: SocketAddr,
    identity: PathBuf,
    random: StdRng,
    there: u64,
    far: Arc<Far>,
}

impl Reader {
    /// Reads until the last piece is refused, or it does not come.
    async fn run(mut self) -> Seen {
        let mut seen = Seen::new();
        loop {
            match self.read(&mut seen).await {
                Ok(true) => break,
                Ok(false) => {}
                Err(e) => {
                    eprintln!("log: {e}");
                    seen.failed += 1;
                    if seen.failed >= FAILURES {
                        break;
                    }
                }
            }
            seen.reconnects += 1;
        }
        if seen.next <= self.there {
            // Nobody waits for it.
            self.far.done.fetch_add(1, Ordering::Relaxed);
        }
        seen
    }

    /// Connects, and reads for a while. Whether it was all.
    async fn read(&mut self, seen: &mut Seen) -> Result<bool, Failed> {
        #[expect(clippy::cast_possible_truncation, reason = "at most 100,000")]
        #[expect(clippy::cast_sign_loss, reason = "a power of ten")]
        let most = 10_f64.powf(self.random.random_range(0.0..MOST)) as u64;
        let failed = |e: tonic::Status| Failed::at("events", e.message());
        let spoke = spoke(self.addr, &self.identity).await?;
        let mut events = subscribe(&spoke, seen.next).await.map_err(failed)?;
        for _ in 0..most.max(1) {
            let event = tokio::time::timeout(PATIENCE, events.message()).await;
            let event = event.map_err(|_| Failed::new("no event in time"))?;
            let event = event.map_err(failed)?;
            let event = event.ok_or_else(|| Failed::new("the stream ended"))?;
            let before = seen.next;
            seen.take(event.seq);
            if event.seq <= self.there {
                self.far.read.fetch_add(1, Ordering::Relaxed);
            }
            if before <= self.there && seen.next > self.there {
                self.far.done.fetch_add(1, Ordering::Relaxed);
            }
            if event.seq > self.there && is_last(&event) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn is_last(event: &Event) -> bool {
    let Some(What::Piece(state)) = &event.what else {
        return false;
    };
    let id = pieces::deal(LAST).id;
    state.phase() == PiecePhase::Failed
        && state.key.as_ref().is_some_and(|k| k.id == id.to_string())
}

/// What one subscriber has read.
struct Seen {
    /// The number that is to come.
    next: u64,
    /// A bit for each number.
    numbers: Vec<u64>,
    missed: u64,
    doubled: u64,
    disordered: u64,
    failed: u64,
    reconnects: u64,
}

impl Seen {
    const fn new() -> Self {
        Self {
            next: 1,
            numbers: Vec::new(),
            missed: 0,
            doubled: 0,
            disordered: 0,
            failed: 0,
            reconnects: 0,
        }
    }

    fn take(&mut self, seq: u64) {
        let (word, bit) = (usize::try_from(seq / 64).unwrap_or(0), 1 << (seq % 64));
        if self.numbers.len() <= word {
            self.numbers.resize(word + 1, 0);
        }
        let known = self.numbers[word] & bit != 0;
        self.numbers[word] |= bit;
        if known {
            self.doubled += 1;
        } else if seq < self.next {
            // It was counted as missed.
            self.missed -= 1;
            self.disordered += 1;
        } else {
            self.missed += seq - self.next;
            self.next = seq + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_repeats_and_disorder_are_seen() {
        let seen = |numbers: &[u64]| {
            let mut seen = Seen::new();
            numbers.iter().for_each(|n| seen.take(*n));
            (seen.next, seen.missed, seen.doubled, seen.disordered)
        };
        assert_eq!(seen(&[1, 2, 3]), (4, 0, 0, 0));
        assert_eq!(seen(&[1, 3, 4]), (5, 1, 0, 0));
        assert_eq!(seen(&[1, 2, 2, 1, 3]), (4, 0, 2, 0));
        assert_eq!(seen(&[1, 3, 2, 4]), (5, 0, 0, 1));
        assert_eq!(seen(&[2]), (3, 1, 0, 0));
        let far: Vec<u64> = (1..1_000).collect();
        assert_eq!(seen(&far), (1_000, 0, 0, 0));
    }
}
