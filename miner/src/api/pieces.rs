use std::collections::BTreeMap;
use std::path::PathBuf;

use cid::Cid;
use hub_proto::status;
use hub_proto::v1::pieces_server::Pieces;
use hub_proto::v1::{self, source};
use hub_proto::v1::{
    ListPiecesRequest, ListPiecesResponse, OfferRequest, PiecePhase, PieceState,
    PieceStatusRequest, WithdrawRequest,
};
use lotus_dataplane::MAX_TOKEN;
use lotus_node_client::json::parse_address;
use lotus_runtime::trace;
use lotus_types::{DealKey, PaddedSize, PieceCid, PieceInfo, SectorSize};
use tonic::{Request, Response, Status};

use super::access::Who;
use super::audit::About;
use super::hub::from_capacity;
use super::{Answer, Api, MAX_PAGE, from_journal, invalid, not_found, not_yours};
use crate::owner::Seller;
use crate::pieces::machine::{DealTerms, Offer, Phase, Source, Usage};
use crate::pieces::{PieceError, SectorFate, blocking};

/// The service that sells.
const DEALS: &str = "deals";
/// Longest URL to pull from, bytes.
const MAX_URL: usize = 4096;
/// Headers of a pull, and the bytes of each.
const MAX_HEADERS: usize = 16;
const MAX_HEADER: usize = 4096;
/// Longest path of a Unix socket: sockaddr_un less the closing zero.
const MAX_SOCKET: usize = 107;
/// Largest payload of a notification, bytes.
const MAX_NOTIFY: usize = 16 << 10;

#[tonic::async_trait]
impl Pieces for Api {
    async fn offer(&self, request: Request<OfferRequest>) -> Answer<PieceState> {
        let about = About::of(&request);
        let who = request.extensions().get::<Who>().cloned();
        let seller = self.access.seller(who.as_ref());
        let request = request.into_inner();
        let (key, offer) = parse_offer(&request, self.sector_size, who.as_ref())?;
        about.is(&key);
        let size = offer.piece.size.get();
        // A replay is answered whatever the room; its credit, if any, goes back.
        if self
            .pieces
            .get(&key)
            .map_err(|e| from_journal(&e))?
            .is_none()
        {
            self.capacity
                .redeem(&key, &request.credit, size, &seller)
                .map_err(|e| from_capacity(&e))?;
        } else if !request.credit.is_empty() {
            self.capacity.release(&request.credit, &seller);
        }
        let (pieces, owned) = (self.pieces.clone(), key.clone());
        let now = blocking(move || pieces.offer(&owned, offer, &seller))
            .await
            .map_err(|e| from_pieces(&e))?;
        tracing::info!(%key, piece = %now.piece.cid, phase = ?now.phase, "offer");
        Ok(Response::new(self.full_state(&key, &now)))
    }

    async fn status(&self, request: Request<PieceStatusRequest>) -> Answer<PieceState> {
        let seller = self.access.seller(request.extensions().get());
        let key = deal_key(request.into_inner().key.as_ref())?;
        let offer = self.pieces.get(&key).map_err(|e| from_journal(&e))?;
        let offer = offer.filter(|offer| seller.has(offer));
        let offer = offer.ok_or_else(|| from_pieces(&PieceError::Unknown { key: key.clone() }))?;
        Ok(Response::new(self.full_state(&key, &offer)))
    }

    async fn withdraw(&self, request: Request<WithdrawRequest>) -> Answer<PieceState> {
        let about = About::of(&request);
        let seller = self.access.seller(request.extensions().get());
        let key = deal_key(request.into_inner().key.as_ref())?;
        about.is(&key);
        let now = self
            .pieces
            .withdraw(&key, &*self.placer, &seller)
            .await
            .map_err(|e| from_pieces(&e))?;
        Ok(Response::new(self.full_state(&key, &now)))
    }

    async fn list(&self, request: Request<ListPiecesRequest>) -> Answer<ListPiecesResponse> {
        let seller = self.sells(request.extensions().get());
        let request = request.into_inner();
        let after: Option<DealKey> = match request.after.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                invalid(
                    "`after` is no cursor of this list",
                    "send `next` of the last answer",
                )
            })?),
        };
        let limit = page(request.limit);
        let found = self
            .pieces
            .list(after.as_ref(), limit)
            .map_err(|e| from_journal(&e))?;
        let next = match found.last() {
            Some((key, _)) if found.len() == limit => key.to_string(),
            _ => String::new(),
        };
        let pieces = found
            .iter()
            .filter(|(_, offer)| seller.has(offer))
            .map(|(key, offer)| self.full_state(key, offer))
            .collect();
        Ok(Response::new(ListPiecesResponse { pieces, next }))
    }
}

impl Api {
    /// Of a caller who sells, what it sells; the others see the deals of all.
    pub(super) fn sells(&self, who: Option<&Who>) -> Seller {
        let deals = |who: &&Who| matches!(who, Who::Spoke(c) if c.service.as_str() == DEALS);
        self.access.seller(who.filter(deals))
    }

    /// [`piece_state`] with what only memory knows.
    fn full_state(&self, key: &DealKey, offer: &Offer) -> PieceState {
        let mut state = piece_state(key, offer);
        if let Some((pulled, waits)) = self.pieces.progress(key) {
            if offer.phase != Phase::Stored {
                state.pulled_bytes = pulled;
            }
            state.reason = waits;
        }
        if let Some(number) = state.sector {
            state.sector_state = match self.placer.sector(number) {
                SectorFate::Sealing(name) => name,
                SectorFate::Proven => "Proving".into(),
                SectorFate::Lost(why) => why,
                SectorFate::Returned => String::new(),
            };
        }
        state
    }
}

/// Entries in one page of a list.
pub(super) fn page(asked: u32) -> usize {
    let limit = if asked == 0 {
        MAX_PAGE
    } else {
        asked.min(MAX_PAGE)
    };
    usize::try_from(limit).unwrap_or(usize::MAX)
}

fn from_pieces(e: &PieceError) -> Status {
    match e {
        PieceError::Unknown { .. } => not_found(e.to_string(), &e.fix()),
        PieceError::NotYours { .. } => not_yours(e.to_string(), &e.fix()),
        _ => status(e.kind(), e.to_string(), e.fix(), None),
    }
}

/// A hand-off on the wire, as far as the journal knows it.
pub(crate) fn piece_state(key: &DealKey, offer: &Offer) -> PieceState {
    let (phase, place, reason) = match &offer.phase {
        Phase::Offered => (PiecePhase::Offered, None, ""),
        Phase::Pulling => (PiecePhase::Pulling, None, ""),
        Phase::Stored => (PiecePhase::Stored, None, ""),
        Phase::Placed(place) => (PiecePhase::Placed, Some(*place), ""),
        Phase::Active(place) => (PiecePhase::Active, Some(*place), ""),
        Phase::Withdrawn => (PiecePhase::Withdrawn, None, ""),
        Phase::Failed { reason, place } => (PiecePhase::Failed, *place, reason.as_str()),
    };
    let complete = matches!(
        offer.phase,
        Phase::Stored | Phase::Placed(_) | Phase::Active(_)
    );
    let terms = &offer.terms;
    let (allocation_client, allocation_id) = terms.allocation.unwrap_or_default();
    let (notify_address, notify_payload) = terms.notify.clone().unwrap_or_default();
    PieceState {
        key: Some(key.into()),
        phase: phase.into(),
        piece_cid: offer.piece.cid.to_string(),
        piece_size: offer.piece.size.get(),
        raw_size: offer.piece.raw_size,
        pulled_bytes: if complete { offer.piece.raw_size } else { 0 },
        sector: place.map(|p| p.sector),
        offset: place.map(|p| p.offset),
        reason: reason.into(),
        r#use: Some(v1::Use {
            index: offer.usage.index,
            announce_payload: offer.usage.announce_payload,
            announce_piece: offer.usage.announce_piece,
            format: offer.usage.format.clone(),
        }),
        sector_state: String::new(),
        owner: offer.owner.clone().unwrap_or_default(),
        terms: Some(v1::DealTerms {
            start_epoch: terms.start_epoch,
            end_epoch: terms.end_epoch,
            allocation_client,
            allocation_id,
            notify_address,
            notify_payload,
        }),
    }
}

/// Reads a deal key. The client names files, so it is letters and digits, as addresses are.
pub(super) fn deal_key(key: Option<&v1::DealKey>) -> Result<DealKey, Status> {
    let key = key.ok_or_else(|| invalid("key is missing", "send the deal's client and id"))?;
    let parsed = DealKey::try_from(key)
        .map_err(|e| invalid(format!("key: {e}"), "send the client's address and a ULID"))?;
    if parsed.client.bytes().all(|b| b.is_ascii_alphanumeric()) {
        Ok(parsed)
    } else {
        Err(invalid(
            "key.client holds more than letters and digits",
            "send the client's address, such as t1…",
        ))
    }
}

/// Reads a piece CID of either version; version 2 says the sizes too.
pub(super) fn piece_cid(text: &str) -> Result<(PieceCid, Option<PieceInfo>), Status> {
    let wrong = |e: &dyn std::fmt::Display| {
        invalid(
            format!("piece_cid: {e}"),
            "send a piece CID: baga6ea4sea… or bafkzcib…",
        )
    };
    let piece: PieceCid = text.parse().map_err(|e| wrong(&e))?;
    let cid: Cid = text.parse().map_err(|e| wrong(&e))?;
    Ok((piece, PieceInfo::from_cid_v2(&cid).ok()))
}

fn parse_offer(
    request: &OfferRequest,
    sector: SectorSize,
    who: Option<&Who>,
) -> Result<(DealKey, Offer), Status> {
    let key = deal_key(request.key.as_ref())?;
    let (cid, v2) = piece_cid(&request.piece_cid)?;
    let size = PaddedSize::new(request.piece_size).map_err(|e| {
        invalid(
            format!("piece_size: {e}"),
            "send the padded size of the piece",
        )
    })?;
    let piece = PieceInfo {
        cid,
        size,
        raw_size: request.raw_size,
    };
    if !piece.fits(sector) {
        return Err(invalid(
            format!("piece_size: {size} bytes do not fit a sector of {sector}"),
            format!(
                "split the data into pieces of at most {} padded bytes",
                sector.bytes()
            ),
        ));
    }
    if piece.raw_size == 0 || piece.raw_size > size.unpadded().get() {
        return Err(invalid(
            format!(
                "raw_size: {} is not between 1 and the {} bytes that a piece of {size} holds",
                piece.raw_size,
                size.unpadded().get()
            ),
            "send the number of payload bytes",
        ));
    }
    if let Some(v2) = v2
        && v2 != piece
    {
        return Err(invalid(
            format!(
                "piece_cid says {} padded and {} raw bytes, the fields say {size} and {}",
                v2.size, v2.raw_size, piece.raw_size
            ),
            "send sizes that agree with the piece CID",
        ));
    }
    let usage = request.r#use.clone().unwrap_or_default();
    if !matches!(usage.format.as_str(), "" | "car" | "raw") {
        return Err(invalid(
            "use.format is neither \"car\" nor \"raw\"",
            "send one of the two",
        ));
    }
    let offer = Offer {
        piece,
        source: parse_source(request.source.as_ref(), who)?,
        terms: parse_terms(&request.terms.clone().unwrap_or_default())?,
        usage: Usage {
            index: usage.index,
            announce_payload: usage.announce_payload,
            announce_piece: usage.announce_piece,
            format: usage.format,
            keep_unsealed: None,
        },
        trace: trace::current(),
        owner: None,
        phase: Phase::Offered,
    };
    Ok((key, offer))
}

fn parse_source(source: Option<&v1::Source>, who: Option<&Who>) -> Result<Source, Status> {
    let wrong = |what: &str| {
        invalid(
            format!("source: {what}"),
            "send a Unix socket with a token, a token alone, or an http(s) URL",
        )
    };
    let token = |token: &str| match token.is_empty() || token.len() > MAX_TOKEN {
        true => Err(wrong("the token is empty or too long")),
        false => Ok(token.to_owned()),
    };
    match source.and_then(|s| s.at.as_ref()) {
        Some(source::At::Unix(unix)) => {
            let socket = PathBuf::from(&unix.socket);
            if !socket.is_absolute() || unix.socket.len() > MAX_SOCKET {
                return Err(wrong("the socket is no absolute path of at most 107 bytes"));
            }
            let token = token(&unix.token)?;
            Ok(Source::Unix { socket, token })
        }
        Some(source::At::Spoke(spoke)) => match who {
            Some(Who::Spoke(caller)) => Ok(Source::Spoke {
                name: caller.to_string(),
                token: token(&spoke.token)?,
            }),
            _ => Err(wrong("only a spoke with an identity is asked")),
        },
        Some(source::At::Http(http)) => {
            let known = http.url.starts_with("http://") || http.url.starts_with("https://");
            if !known || http.url.len() > MAX_URL || reqwest::Url::parse(&http.url).is_err() {
                return Err(wrong("the URL is no http(s) URL of at most 4,096 bytes"));
            }
            if http.headers.len() > MAX_HEADERS
                || http
                    .headers
                    .iter()
                    .any(|(k, v)| k.len() + v.len() > MAX_HEADER)
            {
                return Err(wrong(
                    "more than 16 headers, or one of more than 4,096 bytes",
                ));
            }
            let headers: BTreeMap<String, String> = http.headers.clone().into_iter().collect();
            Ok(Source::Http {
                url: http.url.clone(),
                headers,
            })
        }
        None => Err(wrong("there is none")),
    }
}

fn parse_terms(terms: &v1::DealTerms) -> Result<DealTerms, Status> {
    let wrong = |what: &str, fix: &str| Err(invalid(format!("terms: {what}"), fix));
    if terms.start_epoch < 0 || terms.end_epoch < 0 {
        return wrong("an epoch is negative", "send epochs of 0 or more");
    }
    if terms.end_epoch != 0 && terms.end_epoch <= terms.start_epoch {
        return wrong(
            "the end is not after the start",
            "send an end_epoch above start_epoch",
        );
    }
    if (terms.allocation_client == 0) != (terms.allocation_id == 0) {
        return wrong(
            "allocation_client and allocation_id belong together",
            "send both, or neither",
        );
    }
    let notify = if terms.notify_address.is_empty() {
        None
    } else {
        if parse_address(&terms.notify_address).is_err() {
            return wrong(
                "notify_address is no address",
                "send an address such as t01234",
            );
        }
        if terms.notify_payload.len() > MAX_NOTIFY {
            return wrong("notify_payload is larger than 16 KiB", "send less");
        }
        Some((terms.notify_address.clone(), terms.notify_payload.clone()))
    };
    Ok(DealTerms {
        start_epoch: terms.start_epoch,
        end_epoch: terms.end_epoch,
        allocation: (terms.allocation_id != 0)
            .then_some((terms.allocation_client, terms.allocation_id)),
        notify,
    })
}
