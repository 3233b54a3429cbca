//! What a client does with a deal after its acceptance: upload, finalize, ask how far it is.

use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use lotus_runtime::CancellationToken;
use lotus_types::Kind;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::engine::{Engine, journal_refusal};
use crate::machine::{Checkpoint, Event, Record};
use crate::mk20::{self, Code, Deal, DealStatus, ProductStatus, Refusal, StatusResponse};
use crate::staging::IntakeError;
use crate::validate::{self, Source};

/// Least bytes per second of an upload on the average, once the idle time has passed: whoever is
/// slower only keeps others out.
const LEAST_RATE: u64 = 1_024;

/// Sends a body on, as fast as it is taken. Returns why it broke off; `None` when it came to its
/// end, or when nobody takes it any more.
pub(crate) async fn pump<E: std::fmt::Display>(
    mut body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    sink: &mpsc::Sender<Bytes>,
    idle: Duration,
    stop: &CancellationToken,
) -> Option<String> {
    let began = Instant::now();
    let mut came = 0u64;
    loop {
        let next = tokio::select! {
            () = stop.cancelled() => return Some("the deal was given up".into()),
            next = tokio::time::timeout(idle, body.next()) => next,
        };
        match next {
            Ok(Some(Ok(chunk))) => {
                came = came.saturating_add(chunk.len() as u64);
                let waiting = Instant::now();
                if sink.send(chunk).await.is_err() {
                    return None;
                }
                let passed = waiting.duration_since(began);
                if passed > idle && came / passed.as_secs().max(1) < LEAST_RATE {
                    return Some(format!("less than {LEAST_RATE} bytes per second came"));
                }
            }
            Ok(None) => return None,
            Ok(Some(Err(e))) => return Some(e.to_string()),
            Err(_) => return Some(format!("no byte for {} s", idle.as_secs())),
        }
    }
}

impl Engine {
    /// Takes the bytes of a deal from its client. When this returns the piece is on disk, complete
    /// and verified.
    pub(crate) async fn upload<E: std::fmt::Display>(
        &self,
        record: &Record,
        announced: Option<u64>,
        body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<(), Refusal> {
        awaits_upload(record)?;
        if self.chunked(&record.proposal.key)?.is_some() {
            return Err(Refusal::new(
                Code::Conflict,
                "an upload in chunks has begun for this deal",
                "go on with it at /market/mk20/uploads/{id}",
            ));
        }
        self.take_bytes(record, announced, body).await
    }

    /// Takes the bytes of an offline deal from the operator, and goes on with the deal.
    pub(crate) async fn import<E: std::fmt::Display>(
        &self,
        record: &Record,
        announced: Option<u64>,
        body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<(), Refusal> {
        let p = &record.proposal;
        if p.source != Source::Offline || !record.awaits_bytes() {
            return Err(Refusal::new(
                Code::Conflict,
                format!(
                    "the deal is {} and its source is {}",
                    record.checkpoint.name(),
                    p.source.name()
                ),
                "import data for offline deals that wait for it",
            ));
        }
        if !self.staging.has(&p.key) {
            let sized = match announced {
                Some(len) if p.takes_any_length() => {
                    self.apply(&p.key, Event::Length(len), None, None).await
                }
                _ => Ok(None),
            };
            let sized = sized.map_err(|e| journal_refusal(&e))?;
            let record = sized.as_ref().unwrap_or(record);
            self.take_bytes(record, announced, body).await?;
        }
        self.apply(&p.key, Event::Transferred, None, None)
            .await
            .map_err(|e| journal_refusal(&e))?;
        Ok(())
    }

    async fn take_bytes<E: std::fmt::Display>(
        &self,
        record: &Record,
        announced: Option<u64>,
        body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<(), Refusal> {
        let p = &record.proposal;
        if let Some(len) = announced
            && len != p.piece.raw_size
        {
            return Err(Refusal::new(
                Code::BadProposal,
                format!(
                    "the upload has {len} bytes, the piece CID names {}",
                    p.piece.raw_size
                ),
                "send the file that the deal is for",
            ));
        }
        let lease = self.arriving.lease(&p.key).ok_or_else(|| {
            Refusal::new(
                Code::Conflict,
                "an upload for this deal is running",
                "wait for it, or break it off",
            )
            .retry_after(5)
        })?;
        let idle = Duration::from_secs(self.cfg.transfer_idle_secs.max(1));
        let stop = lease.transfer.stop.clone();
        let intake = self.staging.intake(p.piece, p.format, false, lease);
        let broken = match intake.sink() {
            Some(sink) => pump(body, sink, idle, &stop).await,
            None => None,
        };
        let outcome = intake.finish().await;
        match (outcome, broken) {
            (Ok(()), _) => Ok(()),
            (Err(IntakeError::Short { have, want }), Some(why)) => Err(Refusal::new(
                Code::BadProposal,
                format!("the upload broke off after {have} of {want} bytes: {why}"),
                "upload again",
            )),
            (Err(e), _) => {
                // These are the bytes that the piece CID names: no others can come.
                if matches!(e, IntakeError::Car(_)) {
                    self.apply(&p.key, Event::TransferFailed(e.to_string()), None, None)
                        .await
                        .map_err(|e| journal_refusal(&e))?;
                }
                Err(intake_refusal(&e))
            }
        }
    }

    /// The upload is complete: on with the deal.
    pub(crate) async fn finalize(
        &self,
        record: &Record,
        again: Option<&Deal>,
    ) -> Result<(), Refusal> {
        let p = &record.proposal;
        if again.is_some_and(|d| validate::digest(d) != p.digest) {
            return Err(Refusal::new(
                Code::BadProposal,
                "the deal in the body is not the one that was accepted",
                "send no body, or the same deal",
            ));
        }
        match record.checkpoint {
            Checkpoint::Accepted if record.checking => Ok(()),
            Checkpoint::Accepted if p.source != Source::Put => awaits_upload(record),
            Checkpoint::Accepted if self.chunked(&p.key)?.is_some() => {
                self.finish_chunks(record).await
            }
            Checkpoint::Accepted if !self.staging.has(&p.key) => Err(Refusal::new(
                Code::BadProposal,
                "the upload is not complete",
                format!("PUT the file to {}/upload/{} first", mk20::BASE, p.key.id),
            )),
            Checkpoint::Accepted => {
                self.apply(&p.key, Event::Transferred, None, None)
                    .await
                    .map_err(|e| journal_refusal(&e))?;
                Ok(())
            }
            Checkpoint::Failed | Checkpoint::Expired => Err(over(record)),
            _ => Ok(()),
        }
    }

    /// Bytes of a deal that are here while it waits for them.
    pub(crate) fn received(&self, record: &Record) -> u64 {
        let key = &record.proposal.key;
        if record.checkpoint != Checkpoint::Accepted {
            return 0;
        }
        let chunks = || self.chunked(key).ok().flatten().map(|u| u.received());
        self.arriving.received(key).or_else(chunks).unwrap_or(0)
    }

    /// What is known here about a deal.
    pub(crate) fn known(&self, record: &Record) -> DealStatus {
        let p = &record.proposal;
        let arrived = self.received(record);
        let on_disk = record.checkpoint >= Checkpoint::Transferred
            && record.checkpoint <= Checkpoint::Active
            || self.staging.has(&p.key);
        DealStatus {
            id: p.key.id.to_string(),
            client: p.key.client.clone(),
            checkpoint: record.checkpoint.name().into(),
            piece_cid: p.piece.cid.to_string(),
            piece_cid_v2: p.piece.cid_v2().to_string(),
            piece_size: p.piece.size.get(),
            raw_size: p.piece.raw_size,
            received_bytes: if on_disk { p.piece.raw_size } else { arrived },
            handed_over_bytes: if record.stored { p.piece.raw_size } else { 0 },
            sealing_state: record.sealing_state.clone(),
            sector: record.place.map(|(s, _)| s),
            offset: record.place.map(|(_, o)| o),
            start_epoch: p.start_epoch.0,
            end_epoch: p.end_epoch.0,
            message: record.reason.clone(),
        }
    }

    /// What there is to say about a deal, with the hub's present view.
    pub(crate) async fn status(&self, record: &Record) -> StatusResponse {
        let p = &record.proposal;
        let mut deal = self.known(record);
        if matches!(
            record.checkpoint,
            Checkpoint::Offered | Checkpoint::AddedPiece | Checkpoint::Sealing
        ) {
            match tokio::time::timeout(Duration::from_secs(2), self.hub_state(&p.key)).await {
                Ok(Ok(Some(now))) => {
                    if !record.stored {
                        deal.handed_over_bytes = now.pulled_bytes.min(p.piece.raw_size);
                    }
                    if !now.sector_state.is_empty() {
                        deal.sealing_state = now.sector_state;
                    }
                    if deal.message.is_empty() {
                        deal.message = now.reason;
                    }
                }
                Ok(Ok(None)) => {}
                Ok(Err(_)) | Err(_) => "the hub does not answer; this is the last known state"
                    .clone_into(&mut deal.message),
            }
        }
        StatusResponse {
            ddo_v1: ProductStatus {
                status: product_status(record).into(),
                error_msg: if record.checkpoint.is_final() {
                    record.reason.clone()
                } else {
                    String::new()
                },
            },
            deal,
        }
    }
}

pub(crate) fn awaits_upload(record: &Record) -> Result<(), Refusal> {
    let conflict = |error: &str, fix: &str| Err(Refusal::new(Code::Conflict, error, fix));
    match (record.checkpoint, &record.proposal.source) {
        (Checkpoint::Accepted, Source::Put) if !record.checking => Ok(()),
        (Checkpoint::Accepted, Source::Offline) => conflict(
            "this is an offline deal: the provider imports its bytes",
            "bring them to the provider, or propose a deal with source_http_put to upload",
        ),
        (Checkpoint::Accepted, Source::Http(_)) => conflict(
            "this deal's bytes are downloaded from its source_http",
            "propose a deal with source_http_put to upload",
        ),
        (Checkpoint::Failed | Checkpoint::Expired, _) => Err(over(record)),
        _ => conflict(
            "the bytes of this deal are here already",
            "follow it with GET /market/mk20/status",
        ),
    }
}

fn over(record: &Record) -> Refusal {
    Refusal::new(
        Code::Conflict,
        format!(
            "the deal is over ({}): {}",
            record.checkpoint.name(),
            record.reason
        ),
        "propose a new deal",
    )
}

pub(crate) fn intake_refusal(e: &IntakeError) -> Refusal {
    let code = match e {
        IntakeError::DiskFull => Code::InsufficientStorage,
        IntakeError::Io(_) => Code::Internal,
        _ => Code::BadProposal,
    };
    if e.kind() != Kind::Data {
        tracing::error!(%e, "staging fails");
    }
    let wait = if e.kind() == Kind::Data { 0 } else { 60 };
    Refusal::new(code, e, e.fix())
        .at(if code == Code::BadProposal {
            "data"
        } else {
            ""
        })
        .retry_after(wait)
}

fn product_status(record: &Record) -> &'static str {
    match record.checkpoint {
        Checkpoint::Accepted if record.checking => "processing",
        Checkpoint::Accepted if record.proposal.source == Source::Put => "uploading",
        Checkpoint::Accepted => "accepted",
        Checkpoint::Transferred
        | Checkpoint::Published
        | Checkpoint::PublishConfirmed
        | Checkpoint::Offered
        | Checkpoint::AddedPiece => "processing",
        Checkpoint::Sealing => "sealing",
        Checkpoint::Active => "complete",
        Checkpoint::Failed | Checkpoint::Expired => "failed",
    }
}
