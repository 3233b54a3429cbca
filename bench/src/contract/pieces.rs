//! Pieces and events as a hub has them, so that there is something to ask for.

use std::collections::BTreeMap;
use std::path::Path;

use hub_proto::v1::event::What;
use hub_proto::v1::{self, OfferRequest, PiecePhase, PieceState, source};
use lotus_e2e::Failed;
use lotus_journal::{Journal, JournalError, Machine as _};
use lotus_miner::events::EventLog;
pub(super) use lotus_miner::pieces::machine::Offer;
use lotus_miner::pieces::machine::{DealTerms, Phase, PieceMachine, Source, Usage};
use lotus_types::{Commitment, DealKey, Generation, PaddedSize, PieceCid, PieceInfo};

/// Whose deals they are.
pub(super) const OWNER: &str = "deals/bench";
/// Padded bytes of a piece.
const SIZE: u64 = 1 << 20;
/// The epoch by which it must be in a sector. It is over, so that the hub refuses the piece and
/// reads nothing.
const START: i64 = 1;
/// 2026-01-01, for ids.
const OFFERED_UNIX_MS: u64 = 1_767_225_600_000;
/// Events that are kept: all.
pub(super) const KEEP: u64 = 1_000_000_000;
/// Events that are written in one transaction.
const BATCH: u64 = 20_000;
/// A W3C traceparent.
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Its deal. Keys are in the order of the numbers.
pub(super) fn deal(number: u64) -> DealKey {
    DealKey {
        client: "t1abjxfbp274xpdqcpuaykwkfb43omjotacm2p3za".into(),
        id: (u128::from(OFFERED_UNIX_MS) << 80 | u128::from(number)).into(),
    }
}

/// A piece as it is offered, and as it is once it is refused.
pub(super) fn refused(number: u64) -> Result<[Offer; 2], Failed> {
    let size = PaddedSize::new(SIZE).map_err(|e| Failed::at("piece", e))?;
    let mut digest = [1; 32];
    digest[..8].copy_from_slice(&number.to_le_bytes());
    digest[31] = 0;
    let offered = Offer {
        piece: PieceInfo {
            cid: PieceCid::new(Commitment(digest)),
            size,
            raw_size: size.unpadded().get() - 1_000,
        },
        source: Source::Http {
            url: format!("http://127.0.0.1:9/pieces/{number}"),
            headers: BTreeMap::new(),
        },
        terms: DealTerms {
            start_epoch: START,
            end_epoch: 1_555_200,
            ..DealTerms::default()
        },
        usage: Usage {
            index: true,
            announce_payload: true,
            format: "car".into(),
            ..Usage::default()
        },
        trace: TRACE.into(),
        owner: Some(OWNER.into()),
        phase: Phase::Offered,
    };
    let reason = format!("start epoch {START} passed before the piece was in a sector (now 77)");
    let phase = Phase::Failed {
        reason,
        place: None,
    };
    let refused = Offer {
        phase,
        ..offered.clone()
    };
    Ok([offered, refused])
}

/// The call that offers it. The hub refuses it at once: two events.
pub(super) fn offer(number: u64) -> Result<OfferRequest, Failed> {
    let [offered, _] = refused(number)?;
    let state = state(&deal(number), &offered);
    let url = match offered.source {
        Source::Http { url, .. } => url,
        _ => String::new(),
    };
    let headers = Default::default();
    Ok(OfferRequest {
        key: state.key,
        piece_cid: state.piece_cid,
        piece_size: state.piece_size,
        raw_size: state.raw_size,
        source: Some(v1::Source {
            at: Some(source::At::Http(v1::HttpSource { url, headers })),
        }),
        terms: state.terms,
        r#use: state.r#use,
        credit: String::new(),
    })
}

/// What the hub tells of it.
pub(super) fn state(key: &DealKey, offer: &Offer) -> PieceState {
    let (phase, reason) = match &offer.phase {
        Phase::Failed { reason, .. } => (PiecePhase::Failed, reason.clone()),
        _ => (PiecePhase::Offered, String::new()),
    };
    let (terms, usage) = (&offer.terms, &offer.usage);
    PieceState {
        key: Some(key.into()),
        phase: phase.into(),
        piece_cid: offer.piece.cid.to_string(),
        piece_size: offer.piece.size.get(),
        raw_size: offer.piece.raw_size,
        reason,
        r#use: Some(v1::Use {
            index: usage.index,
            announce_payload: usage.announce_payload,
            announce_piece: usage.announce_piece,
            format: usage.format.clone(),
        }),
        terms: Some(v1::DealTerms {
            start_epoch: terms.start_epoch,
            end_epoch: terms.end_epoch,
            ..v1::DealTerms::default()
        }),
        owner: offer.owner.clone().unwrap_or_default(),
        ..PieceState::default()
    }
}

/// Writes so many refused pieces, and so many events of them, into the journal of a hub that does
/// not run.
pub(super) fn fill(journal: &Path, pieces: u64, events: u64) -> Result<(), Failed> {
    let failed = |e: JournalError| Failed::at("journal", e);
    let journal = Journal::open(journal).map_err(failed)?;
    let both = |n| Ok((deal(n), refused(n)?));
    let all = (0..pieces.max(1)).map(both);
    let all = all.collect::<Result<Vec<_>, Failed>>()?;
    let put = journal.write(|tx| {
        for (key, [_, refused]) in all.iter().take(usize::try_from(pieces).unwrap_or(0)) {
            tx.put(&PieceMachine::STATES, key, refused)?;
        }
        Ok(())
    });
    put.map_err(failed)?;
    let log = EventLog::open(journal.clone(), Generation(1), KEEP).map_err(failed)?;
    // Offered, refused, and the next piece.
    let mut what = all
        .iter()
        .flat_map(|(key, both)| both.iter().map(move |offer| state(key, offer)))
        .map(What::Piece)
        .cycle();
    let mut left = events.saturating_sub(log.last());
    while left > 0 {
        let now = left.min(BATCH);
        let appended = journal.write(|tx| {
            for what in what.by_ref().take(usize::try_from(now).unwrap_or(0)) {
                log.append(tx, what)?;
            }
            Ok(())
        });
        appended.map_err(failed)?;
        left -= now;
    }
    Ok(())
}
