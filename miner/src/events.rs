//! The hub's event log: ordered, durable, resumable.
//!
//! An event is appended in the transaction of the change that it tells, so that none is lost and
//! none is told that did not happen. Subscribers read the log itself: one that is slow holds up
//! nobody, and one that was away goes on where it stopped. The newest events are in memory too, so that
//! those who are up to date, which is nearly all, do not each read the journal for each.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::Stream;
use hub_proto::v1::event::What;
use hub_proto::v1::{Event, HeadChanged};
use lotus_journal::{Journal, JournalError, Map, Tx};
use lotus_types::Generation;
use prost::Message as _;
use serde_bytes::ByteBuf;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Events by number, as protobuf.
const EVENTS: Map<u64, ByteBuf> = Map::new("hub.events");

/// Events that a subscriber reads at a time.
const PAGE: usize = 256;
/// What happens within this time is told at once, to all: nearly all that telling costs is that a
/// subscriber is woken and written to, and one change of the hub is often several events.
const GATHER: Duration = Duration::from_millis(10);
/// Newest events in memory.
const RECENT: usize = 4 * PAGE;
/// Old events dropped with each new one: more than one, so that a lowered limit is reached.
const DROP_AT_ONCE: usize = 4;

/// What a subscriber wants to hear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topics {
    /// Changes of pieces.
    pub piece: bool,
    /// Changes of sectors.
    pub sector: bool,
    /// New chain heads.
    pub head: bool,
}

impl Topics {
    /// Everything.
    pub const ALL: Self = Self {
        piece: true,
        sector: true,
        head: true,
    };

    /// Reads topic names; none means all.
    pub fn parse(names: &[String]) -> Result<Self, String> {
        if names.is_empty() {
            return Ok(Self::ALL);
        }
        let mut topics = Self {
            piece: false,
            sector: false,
            head: false,
        };
        for name in names {
            match name.as_str() {
                "piece" => topics.piece = true,
                "sector" => topics.sector = true,
                "head" => topics.head = true,
                other => return Err(other.chars().take(32).collect()),
            }
        }
        Ok(topics)
    }

    const fn wants(self, event: &Event) -> bool {
        match &event.what {
            Some(What::Piece(_)) => self.piece,
            Some(What::Sector(_)) => self.sector,
            Some(What::Head(_)) => self.head,
            None => false,
        }
    }
}

/// Why a subscription cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// The events asked for are dropped already, or were never made.
    #[error("event {asked} is not in the log, which holds {oldest} to {last}")]
    OutOfRange {
        /// The number asked for.
        asked: u64,
        /// Oldest kept.
        oldest: u64,
        /// Newest.
        last: u64,
    },
    /// The log cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// The log. Clones share it.
#[derive(Clone, Debug)]
pub struct EventLog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    journal: Journal,
    generation: Generation,
    keep: u64,
    /// Number of the last durable event.
    last: watch::Sender<u64>,
    /// The newest events that are committed, without a gap.
    recent: Mutex<VecDeque<Arc<Event>>>,
    head: watch::Sender<Option<HeadChanged>>,
    /// What subscribers wait for.
    told: watch::Sender<()>,
}

impl EventLog {
    /// The log in this journal, of which the last `keep` events are kept. Subscribers hear what is there,
    /// and as long as [`EventLog::run`] runs, what comes.
    pub fn open(journal: Journal, generation: Generation, keep: u64) -> Result<Self, JournalError> {
        let last = last_in(&journal)?;
        Ok(Self {
            inner: Arc::new(Inner {
                journal,
                generation,
                keep: keep.max(1),
                last: watch::Sender::new(last),
                recent: Mutex::default(),
                head: watch::Sender::new(None),
                told: watch::Sender::new(()),
            }),
        })
    }

    /// Appends an event within the transaction of what it tells. Call [`EventLog::committed`]
    /// after the commit.
    pub fn append(&self, tx: &mut Tx, what: What) -> Result<u64, JournalError> {
        let seq = tx.last(&EVENTS)?.map_or(0, |(seq, _)| seq) + 1;
        let event = Event {
            seq,
            generation: self.inner.generation.0,
            unix_ms: unix_ms(),
            what: Some(what),
        };
        tx.put(&EVENTS, &seq, &ByteBuf::from(event.encode_to_vec()))?;
        for (old, _) in tx.scan(&EVENTS, None, DROP_AT_ONCE)? {
            if old + self.inner.keep <= seq {
                tx.remove(&EVENTS, &old)?;
            }
        }
        Ok(seq)
    }

    /// Wakes the subscribers whenever there is something new, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let (mut last, mut head) = (self.inner.last.subscribe(), self.inner.head.subscribe());
        loop {
            // Both senders are in `self`, so `changed` cannot fail.
            tokio::select! {
                () = stop.cancelled() => return,
                _ = last.changed() => {}
                _ = head.changed() => {}
            }
            tokio::time::sleep(GATHER).await;
            last.mark_unchanged();
            head.mark_unchanged();
            self.inner.told.send_replace(());
        }
    }

    /// Lets the subscribers know.
    pub fn committed(&self) {
        match self.remember() {
            Ok(last) => {
                self.inner.last.send_if_modified(|old| {
                    let newer = last > *old;
                    *old = last.max(*old);
                    newer
                });
            }
            // They are woken with the next event.
            Err(e) => tracing::error!("event log: {e}"),
        }
    }

    /// Takes the events that were committed since the last time into memory. Returns the last number.
    fn remember(&self) -> Result<u64, JournalError> {
        let mut recent = self.recent();
        loop {
            let known = recent.back().map_or_else(|| self.last(), |e| e.seq);
            let page = self.read(known)?;
            if page.first().is_some_and(|e| e.seq > known + 1) {
                recent.clear();
            }
            let full = page.len() == PAGE;
            recent.extend(page);
            // No more than the journal has.
            let most = usize::try_from(self.inner.keep).map_or(RECENT, |keep| keep.min(RECENT));
            let over = recent.len().saturating_sub(most);
            recent.drain(..over);
            if !full {
                return Ok(recent.back().map_or(known, |e| e.seq));
            }
        }
    }

    /// Events behind this number, at most [`PAGE`], from memory if they are there.
    fn behind(&self, after: u64) -> Result<Vec<Arc<Event>>, JournalError> {
        let recent = self.recent();
        match recent.front() {
            Some(first) if first.seq <= after + 1 => {
                let skip = usize::try_from(after + 1 - first.seq).unwrap_or(usize::MAX);
                Ok(recent.iter().skip(skip).take(PAGE).cloned().collect())
            }
            _ => {
                drop(recent);
                self.read(after)
            }
        }
    }

    /// The same from the journal.
    fn read(&self, after: u64) -> Result<Vec<Arc<Event>>, JournalError> {
        let page = self
            .inner
            .journal
            .read(|v| v.scan(&EVENTS, Some(&after), PAGE))?;
        let decoded = page.into_iter().map(|(_, bytes)| {
            let event = Event::decode(bytes.as_slice()).map_err(|e| JournalError::Decode {
                table: "hub.events",
                why: e.to_string(),
            })?;
            Ok(Arc::new(event))
        });
        decoded.collect()
    }

    fn recent(&self) -> MutexGuard<'_, VecDeque<Arc<Event>>> {
        // After a panic elsewhere what is there is whole, and the journal has the rest.
        self.inner
            .recent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a new chain head. Not durable.
    pub fn set_head(&self, head: HeadChanged) {
        self.inner.head.send_replace(Some(head));
    }

    /// The present chain head.
    #[must_use]
    pub fn head(&self) -> Option<HeadChanged> {
        self.inner.head.borrow().clone()
    }

    /// Number of the last durable event; 0 before the first.
    #[must_use]
    pub fn last(&self) -> u64 {
        *self.inner.last.borrow()
    }

    /// Everything from event `from` on, then what comes, until `stop`. 0 starts at the oldest.
    pub fn subscribe(
        &self,
        from: u64,
        topics: Topics,
        stop: CancellationToken,
    ) -> Result<impl Stream<Item = Result<Event, EventsError>> + Send + use<>, EventsError> {
        let (oldest, last) = self.bounds()?;
        let next = if from == 0 { oldest } else { from };
        if next < oldest || next > last + 1 {
            return Err(EventsError::OutOfRange {
                asked: from,
                oldest,
                last,
            });
        }
        let reader = Reader {
            log: self.clone(),
            next,
            topics,
            ready: VecDeque::new(),
            told: self.inner.told.subscribe(),
            head: self.inner.head.subscribe(),
            head_told: !topics.head,
            stop,
            ended: false,
        };
        Ok(futures::stream::unfold(reader, |mut r| async {
            r.next().await.map(|item| (item, r))
        }))
    }

    /// Number of the oldest event kept (the next one, when there is none) and of the last.
    fn bounds(&self) -> Result<(u64, u64), JournalError> {
        self.inner.journal.read(|v| {
            let last = v.last(&EVENTS)?.map_or(0, |(seq, _)| seq);
            let oldest = v
                .scan(&EVENTS, None, 1)?
                .first()
                .map_or(last + 1, |(seq, _)| *seq);
            Ok((oldest, last))
        })
    }
}

struct Reader {
    log: EventLog,
    next: u64,
    topics: Topics,
    ready: VecDeque<Arc<Event>>,
    told: watch::Receiver<()>,
    head: watch::Receiver<Option<HeadChanged>>,
    /// Whether the present head was told once; later ones show as changes.
    head_told: bool,
    stop: CancellationToken,
    ended: bool,
}

impl Reader {
    async fn next(&mut self) -> Option<Result<Event, EventsError>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(Arc::unwrap_or_clone(event)));
            }
            // Marked as seen before anything is looked at: what comes later wakes us again.
            self.told.mark_unchanged();
            if self.ended || self.stop.is_cancelled() {
                return None;
            }
            match self.read_page() {
                Ok(0) => {}
                Ok(_) => continue,
                Err(e) => {
                    self.ended = true;
                    return Some(Err(e));
                }
            }
            if !self.head_told || (self.topics.head && self.head.has_changed().unwrap_or(false)) {
                self.head_told = true;
                let head = self.head.borrow_and_update().clone();
                if let Some(head) = head {
                    return Some(Ok(Event {
                        seq: self.next - 1,
                        generation: self.log.inner.generation.0,
                        unix_ms: unix_ms(),
                        what: Some(What::Head(head)),
                    }));
                }
            }
            // `self.log` keeps the sender, so `changed` cannot fail.
            tokio::select! {
                () = self.stop.cancelled() => return None,
                _ = self.told.changed() => {}
            }
        }
    }

    /// Reads the next page, keeps what is wanted of it, and returns how many events it had.
    fn read_page(&mut self) -> Result<usize, EventsError> {
        let page = self.log.behind(self.next - 1)?;
        let Some(first) = page.first() else {
            return Ok(0);
        };
        // We were too slow: the next one is dropped.
        if first.seq > self.next {
            let (oldest, last) = self.log.bounds()?;
            return Err(EventsError::OutOfRange {
                asked: self.next,
                oldest,
                last,
            });
        }
        let len = page.len();
        for event in page {
            self.next = event.seq + 1;
            if self.topics.wants(&event) {
                self.ready.push_back(event);
            }
        }
        Ok(len)
    }
}

fn last_in(journal: &Journal) -> Result<u64, JournalError> {
    journal.read(|v| Ok(v.last(&EVENTS)?.map_or(0, |(seq, _)| seq)))
}

/// Now, in Unix milliseconds.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt as _;
    use hub_proto::v1::{PieceState, SectorChanged};
    use proptest::prelude::*;

    fn log(dir: &std::path::Path, generation: u64, keep: u64) -> EventLog {
        let journal = Journal::open(&dir.join("j")).unwrap();
        EventLog::open(journal, Generation(generation), keep).unwrap()
    }

    fn append(log: &EventLog, sector: bool, number: u64) {
        let what = if sector {
            What::Sector(SectorChanged {
                number,
                ..Default::default()
            })
        } else {
            What::Piece(PieceState {
                raw_size: number,
                ..Default::default()
            })
        };
        log.inner.journal.write(|tx| log.append(tx, what)).unwrap();
        log.committed();
    }

    /// What is there now, without waiting.
    fn read(log: &EventLog, from: u64, topics: Topics) -> Result<Vec<Event>, EventsError> {
        let mut stream = Box::pin(log.subscribe(from, topics, CancellationToken::new())?);
        let mut out = Vec::new();
        while let Some(Some(item)) = futures::FutureExt::now_or_never(stream.next()) {
            out.push(item?);
        }
        Ok(out)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]
        /// Whatever is appended, whatever is kept, and with restarts in between: a subscriber
        /// gets every kept event once and in order, or is told that some are gone.
        #[test]
        fn subscribers_miss_nothing(
            events in proptest::collection::vec((any::<bool>(), any::<bool>()), 1..40),
            keep in 1u64..30,
            from in 0u64..50,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut generation = 1;
            let mut l = log(dir.path(), generation, keep);
            for (i, (sector, restart)) in events.iter().enumerate() {
                append(&l, *sector, i as u64 + 1);
                if *restart {
                    drop(l);
                    generation += 1;
                    l = log(dir.path(), generation, keep);
                }
            }
            let last = events.len() as u64;
            let oldest = last.saturating_sub(keep) + 1;
            prop_assert_eq!(l.last(), last);
            let durable = Topics { head: false, ..Topics::ALL };
            match read(&l, from, durable) {
                Ok(got) => {
                    let start = if from == 0 { oldest } else { from };
                    let seqs: Vec<u64> = got.iter().map(|e| e.seq).collect();
                    prop_assert_eq!(seqs, (start..=last).collect::<Vec<_>>());
                }
                Err(EventsError::OutOfRange { .. }) => {
                    prop_assert!(from != 0 && (from < oldest || from > last + 1));
                }
                Err(e) => prop_assert!(false, "{}", e),
            }
            let sectors = Topics { piece: false, ..durable };
            let got = read(&l, 0, sectors).unwrap();
            let wanted = (oldest..=last).filter(|i| events[usize::try_from(*i).unwrap() - 1].0).count();
            prop_assert_eq!(got.len(), wanted);
        }
    }

    #[tokio::test]
    async fn a_subscriber_follows_and_is_told_when_it_is_too_slow() {
        let dir = tempfile::tempdir().unwrap();
        let log = log(dir.path(), 1, 10);
        let stop = CancellationToken::new();
        let told = log.clone().run(stop.clone());
        let mut live = Box::pin(log.subscribe(0, Topics::ALL, stop.clone()).unwrap());
        let mut slow = Box::pin(log.subscribe(1, Topics::ALL, stop.clone()).unwrap());
        let writer = {
            let log = log.clone();
            async move {
                append(&log, true, 7);
                log.set_head(HeadChanged {
                    height: 5,
                    tipset: vec![],
                });
            }
        };
        let heard = async {
            let (first, ()) = tokio::join!(live.next(), writer);
            assert!(matches!(first.unwrap().unwrap().what, Some(What::Sector(s)) if s.number == 7));
            let head = live.next().await.unwrap().unwrap();
            assert!(matches!(head.what, Some(What::Head(h)) if h.height == 5));
            assert_eq!(head.seq, 1);

            for i in 0..50 {
                append(&log, false, i);
            }
            assert!(matches!(
                slow.next().await,
                Some(Err(EventsError::OutOfRange {
                    asked: 1,
                    oldest: 42,
                    last: 51
                }))
            ));
            assert!(slow.next().await.is_none());
            stop.cancel();
        };
        tokio::join!(told, heard);
    }
}
