//! Keeps deals in step with the hub: its event stream, a look at every open deal from time to
//! time, and the deadlines.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use hub_proto::v1::event::What;
use hub_proto::v1::{Event as HubEvent, PieceState, SectorChanged};
use hub_proto::{HubError, events_stream};
use lotus_journal::JournalError;
use lotus_runtime::{Backoff, CancellationToken, Fault, Health};
use lotus_types::{DealKey, Epoch, Kind};

use crate::engine::{CURSOR, Engine, NEXT_SEQ, blocking, journal_fault, unix_ms, view};
use crate::machine::{Checkpoint, Event, HubView};
use crate::validate::Source;

/// Between two looks at the hub and the clock.
const TICK: Duration = Duration::from_secs(1);
/// Every so many ticks each open deal is compared with the hub, should an event be missing.
const RECONCILE_TICKS: u64 = 30;
/// Events that change nothing here move the cursor only every so often.
const CURSOR_STRIDE: u64 = 256;

/// Follows the hub's events until stopped.
pub(crate) async fn events(engine: Arc<Engine>, stop: CancellationToken) -> Result<(), Fault> {
    let mut next = engine
        .deals
        .journal()
        .read(|v| v.get(&CURSOR, &NEXT_SEQ.to_owned()))
        .map_err(|e: JournalError| journal_fault(&e))?
        .unwrap_or(0);
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    loop {
        let mut stream = std::pin::pin!(events_stream(
            engine.hub.clone(),
            next,
            &["piece", "sector", "head"]
        ));
        let failure = loop {
            let item = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                item = stream.next() => item,
            };
            match item {
                Some(Ok(event)) => {
                    backoff.reset();
                    take(&engine, event, &mut next)
                        .await
                        .map_err(|e| journal_fault(&e))?;
                }
                Some(Err(e)) => break e,
                None => {
                    break HubError::Silent {
                        addr: "hub".into(),
                        why: "the event stream ended".into(),
                    };
                }
            }
        };
        if failure.kind() == Kind::Config {
            return Err(Fault::new(Kind::Config, failure.to_string(), failure.fix()));
        }
        // Events from `next` on are not kept any more: look at every deal, and start at the
        // oldest event that there is.
        tracing::warn!(%failure, next, "the hub's events start anew");
        next = 0;
        reconcile(&engine).await?;
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(backoff.next()) => {}
        }
    }
}

async fn take(engine: &Engine, event: HubEvent, next: &mut u64) -> Result<(), JournalError> {
    let seq = event.seq + 1;
    let changed = match event.what {
        Some(What::Piece(state)) => piece(engine, &state, seq).await?,
        Some(What::Sector(change)) => sector(engine, &change, seq).await?,
        Some(What::Head(head)) => {
            engine.height.send_replace(Epoch(head.height));
            return Ok(());
        }
        None => false,
    };
    *next = seq;
    if !changed && seq.is_multiple_of(CURSOR_STRIDE) {
        let journal = engine.deals.journal().clone();
        blocking(move || journal.write(|tx| tx.put(&CURSOR, &NEXT_SEQ.to_owned(), &seq))).await?;
    }
    Ok(())
}

async fn piece(engine: &Engine, state: &PieceState, seq: u64) -> Result<bool, JournalError> {
    let Some(key) = state.key.as_ref().and_then(|k| DealKey::try_from(k).ok()) else {
        return Ok(false);
    };
    if !engine.open().deals.contains_key(&key) {
        return Ok(false);
    }
    let changed = engine
        .apply(&key, Event::Hub(view(state)), None, Some(seq))
        .await?;
    Ok(changed.is_some())
}

/// A sector's state is that of every piece in it.
async fn sector(engine: &Engine, change: &SectorChanged, seq: u64) -> Result<bool, JournalError> {
    let mut changed = false;
    for (key, _, sector) in engine.open_deals() {
        if sector != Some(change.number) {
            continue;
        }
        let Some((sector, offset)) = engine.deals.get(&key)?.and_then(|r| r.place) else {
            continue;
        };
        let state = change.to.clone();
        let placed = HubView::Placed {
            sector,
            offset,
            state,
        };
        changed |= engine
            .apply(&key, Event::Hub(placed), None, Some(seq))
            .await?
            .is_some();
    }
    Ok(changed)
}

/// Compares every handed-over deal with the hub. Stops at the first silence.
pub(crate) async fn reconcile(engine: &Engine) -> Result<(), Fault> {
    for (key, checkpoint, _) in engine.open_deals() {
        if !matches!(
            checkpoint,
            Checkpoint::Offered | Checkpoint::AddedPiece | Checkpoint::Sealing
        ) {
            continue;
        }
        let now = match engine.hub_state(&key).await {
            Ok(Some(state)) => view(&state),
            Ok(None) => HubView::Unknown,
            Err(e) => {
                tracing::debug!(%e, "the hub was not asked about every deal");
                return Ok(());
            }
        };
        engine
            .apply(&key, Event::Hub(now), None, None)
            .await
            .map_err(|e| journal_fault(&e))?;
    }
    Ok(())
}

/// Deadlines, the hub's health, and the regular comparison.
pub(crate) async fn ticks(
    engine: Arc<Engine>,
    health: Health,
    stop: CancellationToken,
) -> Result<(), Fault> {
    let mut every = tokio::time::interval(TICK);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut count = 0u64;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = every.tick() => {}
        }
        let seen = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            seen = engine.provider() => seen,
        };
        match seen {
            Ok(p) => {
                health.set("deals.hub", Ok(format!("{}", p.actor)));
                if count.is_multiple_of(RECONCILE_TICKS) {
                    reconcile(&engine).await?;
                }
            }
            Err(e) => health.set("deals.hub", Err(e.to_string())),
        }
        expire(&engine).await?;
        if count.is_multiple_of(RECONCILE_TICKS) {
            engine.pieces.expire(unix_ms()).await;
        }
        metrics::gauge!("lotus_markets_open_deals_count").set(f64::from(
            u32::try_from(engine.open().deals.len()).unwrap_or(u32::MAX),
        ));
        count += 1;
    }
}

/// Ends the deals whose bytes did not come in time.
async fn expire(engine: &Engine) -> Result<(), Fault> {
    let height = *engine.height.borrow();
    let now = unix_ms();
    for (key, checkpoint, _) in engine.open_deals() {
        if checkpoint != Checkpoint::Accepted || engine.arriving.has(&key) {
            continue;
        }
        let Some(record) = engine.deals.get(&key).map_err(|e| journal_fault(&e))? else {
            continue;
        };
        // What is uploaded in chunks is here, and is being checked.
        if !record.awaits_bytes() {
            continue;
        }
        let start = record.proposal.start_epoch;
        // Bringing disks takes longer than an upload.
        let offline = record.proposal.source == Source::Offline;
        let waited = now.saturating_sub(record.accepted_unix_ms) / 1000;
        let why = if height >= start {
            format!("start epoch {start} has passed before the bytes came")
        } else if !offline && waited > engine.cfg.upload_ttl_secs {
            format!("no bytes came within {} s", engine.cfg.upload_ttl_secs)
        } else {
            continue;
        };
        engine
            .apply(&key, Event::TooLate(why), None, None)
            .await
            .map_err(|e| journal_fault(&e))?;
    }
    Ok(())
}
