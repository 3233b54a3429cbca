//! Runs the journaled effects: downloads, the hand-off to the hub, and the cleaning up. Each is
//! run until it is done; after a restart it is run again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hub_proto::v1::{
    DealTerms, OfferRequest, Source as OfferSource, SpokeSource, UnixSource, Use, source::At,
};
use hub_proto::{HubClient, HubError};
use lotus_actors::{actors, encode};
use lotus_dataplane::{DataError, HttpPull, Pulled};
use lotus_journal::{JournalError, Pending};
use lotus_runtime::{Backoff, CancellationToken, Fault, trace};
use lotus_types::{DealKey, Kind};
use tokio::sync::mpsc;
use tokio::task::{Id, JoinSet};
use tracing::Instrument as _;

use crate::chunks::UPLOADS;
use crate::engine::{Engine, blocking, journal_fault, view};
use crate::machine::{Checkpoint, DealMachine, Effect, Event, HubView, Record};
use crate::mk20::HttpUrl;
use crate::ranges;
use crate::staging::{Intake, IntakeError};
use crate::validate::{Proposal, Source};

/// Effects other than downloads that run at the same time.
const MAX_HANDOFFS: usize = 32;
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Why an effect was not done.
enum Undone {
    /// The service stops: the effect is run again after the next start.
    Stopped,
    /// The journal fails.
    Journal(JournalError),
}

impl From<JournalError> for Undone {
    fn from(e: JournalError) -> Self {
        Self::Journal(e)
    }
}

type Task = Pending<DealMachine>;

/// Runs every pending effect, and those that come, until stopped.
pub(crate) async fn run(engine: Arc<Engine>, stop: CancellationToken) -> Result<(), Fault> {
    let mut tasks: JoinSet<Result<(), Undone>> = JoinSet::new();
    let mut running: HashMap<Id, (DealKey, bool)> = HashMap::new();
    loop {
        let pending = engine.deals.pending().map_err(|e| journal_fault(&e))?;
        let mut pulls = running.values().filter(|(_, pull)| *pull).count();
        let mut others = running.len() - pulls;
        // The effects of one deal are run in order: a later one may undo an earlier one.
        let mut busy: HashSet<DealKey> = running.values().map(|(key, _)| key.clone()).collect();
        for task in pending {
            if !busy.insert(task.key.clone()) {
                continue;
            }
            let is_pull = task.effect == Effect::Pull;
            let (count, limit) = if is_pull {
                (&mut pulls, engine.cfg.max_transfers.get().into())
            } else {
                (&mut others, MAX_HANDOFFS)
            };
            if *count >= limit {
                continue;
            }
            *count += 1;
            let key = task.key.clone();
            let handle = tasks.spawn(perform(engine.clone(), task, stop.clone()));
            running.insert(handle.id(), (key, is_pull));
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = engine.wake.notified() => {}
            Some(ended) = tasks.join_next_with_id() => match ended {
                Ok((id, Ok(()) | Err(Undone::Stopped))) => {
                    running.remove(&id);
                }
                Ok((_, Err(Undone::Journal(e)))) => return Err(journal_fault(&e)),
                Err(e) => {
                    return Err(Fault::new(
                        Kind::Fatal,
                        format!("work on a deal panicked: {e}"),
                        "see the log; the work is run again",
                    ));
                }
            },
        }
    }
    // Every effect watches `stop`, so this is short.
    while tasks.join_next().await.is_some() {}
    Ok(())
}

async fn perform(engine: Arc<Engine>, task: Task, stop: CancellationToken) -> Result<(), Undone> {
    let Some(record) = engine.deals.get(&task.key)? else {
        return settle(&engine, &task).await;
    };
    let span = tracing::info_span!("deal_effect", deal = %task.key, effect = ?task.effect);
    trace::set_parent(&span, &record.trace);
    let work = async {
        match task.effect {
            Effect::Pull => pull(&engine, &task, &record, &stop).await,
            Effect::Check => check(&engine, &task, &record, &stop).await,
            Effect::Withdraw => withdraw(&engine, &task, &record, &stop).await,
            Effect::Offer => offer(&engine, &task, &record, &stop).await,
            Effect::DropStaging => drop_staging(&engine, &task, &stop).await,
            Effect::ReleaseCredit => {
                engine.release(&record.credit).await;
                settle(&engine, &task).await
            }
        }
    };
    work.instrument(span).await
}

async fn settle(engine: &Arc<Engine>, task: &Task) -> Result<(), Undone> {
    let (deals, id) = (engine.deals.clone(), task.id);
    Ok(blocking(move || deals.settle(id)).await?)
}

async fn finish(engine: &Engine, task: &Task, event: Event) -> Result<(), Undone> {
    engine.apply(&task.key, event, Some(task.id), None).await?;
    Ok(())
}

/// Waits for the next attempt, which the operator may have at once.
async fn pause(
    engine: &Engine,
    key: &DealKey,
    wait: Duration,
    stop: &CancellationToken,
) -> Result<(), Undone> {
    let mut nudged = engine.nudge.subscribe();
    let nudge = async {
        while nudged.changed().await.is_ok() {
            if nudged.borrow_and_update().as_ref() == Some(key) {
                return;
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => Err(Undone::Stopped),
        () = nudge => Ok(()),
        () = tokio::time::sleep(wait) => Ok(()),
    }
}

async fn drop_staging(
    engine: &Arc<Engine>,
    task: &Task,
    stop: &CancellationToken,
) -> Result<(), Undone> {
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    loop {
        // A transfer that still writes must end first.
        let removed = match engine.arriving.lease(&task.key) {
            Some(lease) => {
                let (journal, staging) = (engine.deals.journal().clone(), engine.staging.clone());
                blocking(move || {
                    journal.write(|tx| tx.remove(&UPLOADS, &lease.key).map(drop))?;
                    Ok(staging.remove(&lease.key))
                })
                .await?
            }
            None => Err(std::io::ErrorKind::ResourceBusy.into()),
        };
        match removed {
            Ok(()) => return settle(engine, task).await,
            Err(e) => tracing::warn!(%e, deal = %task.key, "the staging copy is not removed yet"),
        }
        pause(engine, &task.key, backoff.next(), stop).await?;
    }
}

/// Checks the bytes of a piece that are all here.
async fn check(
    engine: &Arc<Engine>,
    task: &Task,
    record: &Record,
    stop: &CancellationToken,
) -> Result<(), Undone> {
    let p = &record.proposal;
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    loop {
        let waits = engine.deals.get(&task.key)?.is_some_and(|r| r.checking);
        if !waits {
            return settle(engine, task).await;
        }
        let checked = match engine.arriving.lease(&p.key) {
            // A crash between the check and the journal leaves the complete piece.
            Some(_) if engine.staging.has(&p.key) => Ok(()),
            Some(lease) => tokio::select! {
                () = stop.cancelled() => return Err(Undone::Stopped),
                checked = engine.staging.check(p.piece, p.format, lease) => checked,
            },
            None => Err(std::io::Error::from(std::io::ErrorKind::ResourceBusy).into()),
        };
        match checked {
            Ok(()) => return finish(engine, task, Event::Transferred).await,
            Err(e) if e.kind() == Kind::Data => {
                return finish(engine, task, Event::TransferFailed(e.to_string())).await;
            }
            Err(e) => tracing::warn!(%e, deal = %task.key, "the piece is not checked yet"),
        }
        pause(engine, &task.key, backoff.next(), stop).await?;
    }
}

/// Takes the offer of a deal back that the operator gave up.
async fn withdraw(
    engine: &Arc<Engine>,
    task: &Task,
    record: &Record,
    stop: &CancellationToken,
) -> Result<(), Undone> {
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    loop {
        let asked = tokio::select! {
            () = stop.cancelled() => return Err(Undone::Stopped),
            asked = engine.withdraw(&record.proposal.key) => asked,
        };
        let e = match asked {
            Ok(Some(now)) => return finish(engine, task, Event::Hub(view(&now))).await,
            Ok(None) => return finish(engine, task, Event::Hub(HubView::Unknown)).await,
            Err(e) => e,
        };
        let wait = e.retry_after().unwrap_or_else(|| backoff.next());
        tracing::info!(%e, ?wait, deal = %task.key, "the withdrawal is tried again");
        pause(engine, &task.key, wait.min(LONGEST_WAIT), stop).await?;
    }
}

/// How one attempt at a download ended.
enum Attempt {
    /// Everything came.
    Complete,
    /// The bytes are not to be had, or not the right ones.
    Hopeless(String),
    /// Worth another attempt.
    Broken(String),
}

async fn pull(
    engine: &Arc<Engine>,
    task: &Task,
    record: &Record,
    stop: &CancellationToken,
) -> Result<(), Undone> {
    let p = &record.proposal;
    let Source::Http(urls) = &p.source else {
        return settle(engine, task).await;
    };
    let first = Duration::from_secs(engine.cfg.pull_backoff_secs);
    let mut backoff = Backoff::new(first, first.saturating_mul(100));
    loop {
        let checkpoint = engine.deals.get(&task.key)?.map(|r| r.checkpoint);
        if checkpoint != Some(Checkpoint::Accepted) {
            return settle(engine, task).await;
        }
        // A crash between the last byte and the journal leaves the complete piece.
        let attempt = if engine.staging.has(&p.key) {
            Attempt::Complete
        } else {
            tokio::select! {
                () = stop.cancelled() => return Err(Undone::Stopped),
                attempt = download(engine, p, urls) => attempt,
            }
        };
        let why = match attempt {
            Attempt::Complete => return finish(engine, task, Event::Transferred).await,
            Attempt::Hopeless(why) => {
                return finish(engine, task, Event::TransferFailed(why)).await;
            }
            Attempt::Broken(why) => why,
        };
        let given_up = engine.deals.get(&task.key)?.map(|r| r.checkpoint);
        if given_up != Some(Checkpoint::Accepted) {
            return settle(engine, task).await;
        }
        let wait = backoff.next();
        if backoff.tries() >= engine.cfg.max_pull_attempts {
            let why = format!("given up after {} attempts: {why}", backoff.tries());
            return finish(engine, task, Event::TransferFailed(why)).await;
        }
        tracing::info!(deal = %task.key, why, ?wait, "the download is tried again");
        pause(engine, &task.key, wait, stop).await?;
    }
}

/// One attempt over all URLs, from where the last one stopped.
async fn download(engine: &Engine, p: &Proposal, urls: &[HttpUrl]) -> Attempt {
    let Some(lease) = engine.arriving.lease(&p.key) else {
        return Attempt::Broken("another transfer has just ended".into());
    };
    let stop = lease.transfer.stop.clone();
    let mut intake = engine.staging.intake(p.piece, p.format, true, lease);
    let mut from = intake.start().await;
    let mut hopeless = Vec::new();
    let mut broken = Vec::new();
    for u in urls {
        if from >= p.piece.raw_size {
            break;
        }
        let Some(sink) = intake.sink() else { break };
        let pulling = fetch(engine, u, from, p.piece.raw_size, sink);
        let pulled = tokio::select! {
            () = stop.cancelled() => break,
            pulled = pulling => pulled,
        };
        match pulled {
            Ok(pulled) => from = pulled.end,
            // The intake gave up: it says why below.
            Err(DataError::Stopped) => break,
            Err(e) => {
                let text = match &e {
                    DataError::UnknownToken { .. } => {
                        format!("{} does not give the file out", u.url)
                    }
                    _ => e.to_string(),
                };
                let list = if e.kind() == Kind::Data {
                    &mut hopeless
                } else {
                    &mut broken
                };
                list.push(text);
                // What is in the channel belongs to the intake: it knows how far it is.
                from = drained(&intake).await;
            }
        }
    }
    let outcome = intake.finish().await;
    verdict(outcome, &hopeless, &broken, urls.len())
}

/// Downloads from one URL.
async fn fetch(
    engine: &Engine,
    from_url: &HttpUrl,
    from: u64,
    limit: u64,
    sink: &mpsc::Sender<Bytes>,
) -> Result<Pulled, DataError> {
    let headers = from_url.headers.iter();
    let mut pull = HttpPull {
        url: from_url.url.clone(),
        headers: headers.map(|(k, v)| (k.clone(), v.join(", "))).collect(),
        from,
        limit,
        idle: Duration::from_secs(engine.cfg.transfer_idle_secs.max(1)),
        etag: None,
    };
    let peer = engine.peer_client(&pull.url).await;
    let peer = peer.map_err(|why| DataError::Unreachable {
        at: pull.url.clone(),
        why,
    })?;
    if let Some(peer) = &peer {
        pull.url.clone_from(&peer.url);
    }
    let http = peer.as_ref().map_or(&engine.http, |peer| &peer.http);
    ranges::pull(http, &pull, engine.cfg.pull_ranges, sink).await
}

/// Bytes taken, once the intake has taken all that was sent.
async fn drained(intake: &Intake) -> u64 {
    // It takes a chunk from the queue when it is done with the one before: once this empty one has
    // left it, every byte is counted. An intake that gave up closes the queue.
    if let Some(sink) = intake.sink()
        && sink.send(Bytes::new()).await.is_ok()
    {
        drop(sink.reserve_many(sink.max_capacity()).await);
    }
    intake.received()
}

fn verdict(
    outcome: Result<(), IntakeError>,
    hopeless: &[String],
    broken: &[String],
    urls: usize,
) -> Attempt {
    match outcome {
        Ok(()) => Attempt::Complete,
        Err(e @ IntakeError::Short { .. }) => {
            if hopeless.len() == urls {
                return Attempt::Hopeless(hopeless.join("; "));
            }
            match broken.first().or(hopeless.first()) {
                Some(why) => Attempt::Broken(format!("{e}: {why}")),
                // The server said that this is the whole file.
                None => Attempt::Hopeless(e.to_string()),
            }
        }
        Err(e) if e.kind() == Kind::Data => Attempt::Hopeless(e.to_string()),
        Err(e) => Attempt::Broken(e.to_string()),
    }
}

async fn offer(
    engine: &Arc<Engine>,
    task: &Task,
    record: &Record,
    stop: &CancellationToken,
) -> Result<(), Undone> {
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    loop {
        let waits = engine.deals.get(&task.key)?;
        let waiting = [Checkpoint::Transferred, Checkpoint::PublishConfirmed];
        if !waits.is_some_and(|r| waiting.contains(&r.checkpoint) && r.cancel.is_empty()) {
            return settle(engine, task).await;
        }
        let outcome = tokio::select! {
            () = stop.cancelled() => return Err(Undone::Stopped),
            outcome = offer_once(engine, record) => outcome,
        };
        let e = match outcome {
            Ok(now) => return finish(engine, task, Event::Hub(now)).await,
            Err(e) => e,
        };
        if matches!(e.kind(), Kind::Data | Kind::Chain) {
            return finish(engine, task, Event::Refused(e.to_string())).await;
        }
        let wait = e.retry_after().unwrap_or_else(|| backoff.next());
        tracing::info!(%e, ?wait, deal = %task.key, "the hand-off is tried again");
        pause(engine, &task.key, wait.min(LONGEST_WAIT), stop).await?;
    }
}

async fn offer_once(engine: &Engine, record: &Record) -> Result<HubView, HubError> {
    let p = &record.proposal;
    // After a lost answer or a crash the hub may have it already, and no credit is needed.
    if let Some(known) = engine.hub_state(&p.key).await? {
        return Ok(view(&known));
    }
    if !engine.staging.has(&p.key) {
        return Err(HubError::Refused {
            kind: Kind::Data,
            code: 0,
            message: "the staging copy is missing".into(),
            fix: "propose the deal again".into(),
            retry_after: None,
        });
    }
    let credit = engine.acquire(&p.key, p.piece.size.get()).await?;
    let token = token(&p.key);
    let at = match is_far(&engine.hub) {
        true => At::Spoke(SpokeSource { token }),
        false => At::Unix(UnixSource {
            socket: engine.data_socket.clone(),
            token,
        }),
    };
    let request = offer_request(record, credit, at);
    let state = engine
        .hub
        .pieces()
        .offer(engine.hub.request(request))
        .await?;
    Ok(view(&state.into_inner()))
}

/// Whether the hub is on another host, and pulls over connections instead of a socket.
pub(crate) fn is_far(hub: &HubClient) -> bool {
    hub.hello().data_socket.is_empty()
}

fn offer_request(record: &Record, credit: String, at: At) -> OfferRequest {
    let p = &record.proposal;
    let (allocation_client, allocation_id) = p.allocation.unwrap_or_default();
    // The market actor activates a published deal when it is told its id (FIP-0076).
    let deal_id = record.published.as_ref().and_then(|p| p.deal_id);
    let notify = match deal_id {
        Some(id) => Some((actors::MARKET.to_string(), encode(&id))),
        None => p.notify.clone(),
    };
    let (notify_address, notify_payload) = notify.unwrap_or_default();
    OfferRequest {
        key: Some((&p.key).into()),
        piece_cid: p.piece.cid_v2().to_string(),
        piece_size: p.piece.size.get(),
        raw_size: p.piece.raw_size,
        source: Some(OfferSource { at: Some(at) }),
        terms: Some(DealTerms {
            start_epoch: p.start_epoch.0,
            end_epoch: p.end_epoch.0,
            allocation_client,
            allocation_id,
            notify_address,
            notify_payload,
        }),
        r#use: Some(Use {
            index: p.retrieval.index,
            announce_payload: p.retrieval.announce_payload,
            announce_piece: p.retrieval.announce_piece,
            format: p.format.as_str().into(),
        }),
        credit,
    }
}

/// The name of a staged piece on the data socket.
pub(crate) fn token(key: &DealKey) -> String {
    key.to_string()
}

#[cfg(test)]
mod tests {
    use lotus_types::Commitment;
    use lotus_types::{PaddedSize, PieceCid, PieceInfo};

    use super::*;
    use crate::arriving::Arriving;
    use crate::staging::Staging;
    use crate::validate::Format;

    #[tokio::test]
    async fn the_next_url_goes_on_after_the_last_byte_that_was_sent() {
        const LEN: usize = 16 << 20;
        let dir = tempfile::tempdir().unwrap();
        let key = DealKey {
            client: "t1abc".into(),
            id: ulid::Ulid::from(5u128),
        };
        let piece = PieceInfo {
            cid: PieceCid::new(Commitment([0; 32])),
            size: PaddedSize::to_hold(2 * LEN as u64).unwrap(),
            raw_size: 2 * LEN as u64,
        };
        let lease = Arriving::default().lease(&key).unwrap();
        let staging = Staging::open(dir.path()).unwrap();
        let intake = staging.intake(piece, Format::Raw, true, lease);
        // It takes a while to write and hash this.
        let sink = intake.sink().unwrap();
        sink.send(vec![1; LEN].into()).await.unwrap();
        assert_eq!(drained(&intake).await, LEN as u64);
        // One that gave up is not waited for.
        sink.send(vec![1; LEN + 1].into()).await.unwrap();
        drained(&intake).await;
        let e = intake.finish().await.unwrap_err();
        assert!(matches!(e, IntakeError::Long { .. }), "{e}");
    }
}
