//! The checks of a proposal, in order; the first that fails is the answer. Pure: what comes from
//! the chain and from the settings is passed in.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cid::Cid;
use fvm_shared::address::Protocol;
use lotus_types::{
    ActorId, Address, BadPieceCid, DealKey, Epoch, EpochDelta, PaddedSize, PieceCid, PieceInfo,
    SectorSize,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use ulid::Ulid;

use crate::DealsConfig;
use crate::mk12::check::Signed;
use crate::mk20::{self, Code, DataSource, DdoV1, Deal, HttpUrl, Refusal, RetrievalV1};
use crate::source;

mod allocation;

pub use allocation::check_allocation;

/// Shortest commitment without an allocation: 180 days of 2,880 epochs.
/// Source: builtin-actors, runtime/src/runtime/policy.rs, MIN_SECTOR_EXPIRATION; MK20 ddo_v1.
pub const MIN_DURATION: EpochDelta = EpochDelta(518_400);
/// Longest commitment: 1,278 days. Source: policy.rs, MAX_SECTOR_EXPIRATION_EXTENSION.
pub const MAX_DURATION: EpochDelta = EpochDelta(1_278 * 2_880);
/// Source: Curio, market/mk20/utils.go, maxURLCount and maxHeaderCount.
const MAX_URLS: usize = 10;
const MAX_HEADERS: usize = 10;
/// Longest URL, and longest header value.
const MAX_TEXT: usize = 4096;
/// Longest notification payload, in bytes.
const MAX_PAYLOAD: usize = 32 << 10;

/// What a piece holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// A CAR: its structure and every block are checked at intake.
    Car,
    /// Any bytes.
    Raw,
}

impl Format {
    /// The hub's word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Car => "car",
            Self::Raw => "raw",
        }
    }
}

/// Where the bytes come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// The client uploads them.
    Put,
    /// This service downloads them, from the first of these that works.
    Http(Vec<HttpUrl>),
    /// The operator imports them from a file.
    Offline,
}

impl Source {
    /// MK20's name of it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Http(_) => "http",
            Self::Offline => "offline",
        }
    }
}

/// A proposal that passed every check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// Whose deal, and which.
    pub key: DealKey,
    /// The piece.
    pub piece: PieceInfo,
    /// What it holds.
    pub format: Format,
    /// Where it comes from.
    pub source: Source,
    /// First epoch at which the piece must be proven.
    pub start_epoch: Epoch,
    /// Last epoch of the commitment.
    pub end_epoch: Epoch,
    /// Allocation of verified data: the client's actor id, and the allocation's.
    pub allocation: Option<(u64, u64)>,
    /// Actor to notify, and with what.
    pub notify: Option<(String, Vec<u8>)>,
    /// How the piece is to be served.
    pub retrieval: Retrieval,
    /// SHA-256 of the proposal, to tell a repeat from another deal under the same id.
    pub digest: [u8; 32],
    /// What a deal by proposal (MK1.2) has beyond that.
    #[serde(default)]
    pub signed: Option<Box<Signed>>,
}

impl Proposal {
    /// Whether nobody has said how long the file is: an offline deal of MK1.2 names the piece, and
    /// may name no length. `piece.raw_size` is then the most that fits.
    #[must_use]
    pub fn takes_any_length(&self) -> bool {
        let named = self.signed.as_ref().is_none_or(|s| s.transfer_size > 0);
        self.source == Source::Offline && !named
    }
}

/// How the piece is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retrieval {
    /// Index its blocks.
    pub index: bool,
    /// Advertise its blocks.
    pub announce_payload: bool,
    /// Advertise the piece.
    pub announce_piece: bool,
}

impl From<RetrievalV1> for Retrieval {
    fn from(r: RetrievalV1) -> Self {
        Self {
            index: r.indexing,
            announce_payload: r.announce_payload,
            announce_piece: r.announce_piece,
        }
    }
}

/// What the checks are made against.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// This storage provider.
    pub provider: ActorId,
    /// Size of its sectors.
    pub sector_size: SectorSize,
    /// Chain height.
    pub height: Epoch,
    /// The settings.
    pub cfg: &'a DealsConfig,
}

/// SHA-256 of a proposal's canonical JSON.
#[must_use]
pub fn digest(deal: &Deal) -> [u8; 32] {
    Sha256::digest(serde_json::to_vec(deal).unwrap_or_default()).into()
}

/// The deal's id.
pub fn identifier(text: &str) -> Result<Ulid, Refusal> {
    // 26 characters hold 130 bits: the library drops the two that are too many.
    let parsed = Ulid::from_string(text).ok();
    let exact = parsed.filter(|id| id.to_string().eq_ignore_ascii_case(text));
    exact.ok_or_else(|| {
        Refusal::new(
            Code::BadProposal,
            format!("{:?} is no ULID", clip(text)),
            "use a ULID such as 01ARZ3NDEKTSV4RRFFQ69G5FAV, a new one for each deal",
        )
        .at("identifier")
    })
}

/// Checks a proposal that `signer` signed. The allocation is checked by [`check_allocation`], as
/// it needs the chain.
pub fn validate(deal: &Deal, signer: &Address, rules: &Rules<'_>) -> Result<Proposal, Refusal> {
    let id = identifier(&deal.identifier)?;
    let client = client(&deal.client, signer)?;
    if deal.products.pdp_v1.is_some() {
        return Err(Refusal::new(
            Code::UnsupportedProduct,
            "product pdp_v1 is not offered here",
            "propose ddo_v1 with retrieval_v1; GET /market/mk20/products lists what is offered",
        )
        .at("products.pdp_v1"));
    }
    let data = deal.data.as_ref().ok_or_else(|| {
        Refusal::new(
            Code::BadProposal,
            "the proposal names no data",
            "add the data section",
        )
        .at("data")
    })?;
    let piece = piece(data, rules)?;
    let format = format(data)?;
    let source = source_of(data, rules.cfg)?;
    let ddo = deal.products.ddo_v1.as_ref().ok_or_else(|| {
        Refusal::new(
            Code::InvalidProduct,
            "the proposal names no storage product",
            "add products.ddo_v1",
        )
        .at("products.ddo_v1")
    })?;
    let (start_epoch, end_epoch) = terms(ddo, rules)?;
    let notify = notify(ddo)?;
    let retrieval = retrieval(deal.products.retrieval_v1.as_ref(), format)?;
    Ok(Proposal {
        key: DealKey { client, id },
        piece,
        format,
        source,
        start_epoch,
        end_epoch,
        allocation: ddo.allocation_id.map(|id| (0, id)),
        notify,
        retrieval,
        digest: digest(deal),
        signed: None,
    })
}

fn clip(text: &str) -> String {
    text.chars().take(128).collect()
}

fn client(text: &str, signer: &Address) -> Result<String, Refusal> {
    let bad =
        |error: String, fix: &str| Err(Refusal::new(Code::BadProposal, error, fix).at("client"));
    let Some(address) = mk20::parse_address(text) else {
        return bad(
            format!("{:?} is no address", clip(text)),
            "give the address of the key that signs, such as t1…",
        );
    };
    if !matches!(address.protocol(), Protocol::Secp256k1 | Protocol::BLS) {
        return bad(
            format!("{text} is not the address of a key"),
            "give the key address (t1… or t3…), not an id or contract address",
        );
    }
    if address != *signer {
        return bad(
            format!(
                "the request is signed by {}, not by the client {text}",
                mk20::address_text(signer)
            ),
            "sign the request with the client's key",
        );
    }
    Ok(mk20::address_text(&address))
}

fn piece(data: &DataSource, rules: &Rules<'_>) -> Result<PieceInfo, Refusal> {
    let text = &data.piece_cid.0;
    let bad =
        |code, error: String, fix: String| Err(Refusal::new(code, error, fix).at("data.piece_cid"));
    let how = "compute it with `lotus-markets client piece-cid FILE`";
    let Ok(cid) = Cid::try_from(text.as_str()) else {
        return bad(
            Code::BadProposal,
            format!("{:?} is no CID", clip(text)),
            how.into(),
        );
    };
    let piece = match PieceInfo::from_cid_v2(&cid) {
        Ok(p) => p,
        Err(BadPieceCid::NotAPiece(_)) if PieceCid::from_cid(&cid).is_ok() => {
            return bad(
                Code::BadProposal,
                format!("{cid} is a version 1 piece CID, which lacks the size"),
                format!("give the version 2 form (bafkzcib…): {how}"),
            );
        }
        Err(e) => return bad(Code::BadProposal, e.to_string(), how.into()),
    };
    if piece.raw_size == 0 {
        return bad(
            Code::BadProposal,
            "the piece is empty: its raw size is 0".into(),
            "store at least one byte".into(),
        );
    }
    if PaddedSize::to_hold(piece.raw_size) != Some(piece.size) {
        return bad(
            Code::BadProposal,
            format!(
                "the piece is padded to {} bytes, more than its {} bytes need",
                piece.size, piece.raw_size
            ),
            how.into(),
        );
    }
    if !piece.fits(rules.sector_size) {
        return bad(
            Code::BadProposal,
            format!(
                "the piece takes {} bytes, a sector of this provider holds {}",
                piece.size,
                rules.sector_size.bytes()
            ),
            format!(
                "split the data: at most {} bytes before padding fit one piece",
                rules.sector_size.padded().unpadded()
            ),
        );
    }
    Ok(piece)
}

fn format(data: &DataSource) -> Result<Format, Refusal> {
    let bad = |error: &str| {
        Err(Refusal::new(
            Code::MalformedSource,
            error,
            "set exactly one of format.car and format.raw to {}",
        )
        .at("data.format"))
    };
    let f = &data.format;
    match (f.car.is_some(), f.raw.is_some(), f.aggregate.is_some()) {
        (true, false, false) => Ok(Format::Car),
        (false, true, false) => Ok(Format::Raw),
        (false, false, true) => bad("format aggregate is not taken here"),
        (false, false, false) => bad("the format is missing"),
        _ => bad("more than one format is set"),
    }
}

fn source_of(data: &DataSource, cfg: &DealsConfig) -> Result<Source, Refusal> {
    let set = [
        data.source_http.is_some(),
        data.source_http_put.is_some(),
        data.source_offline.is_some(),
        data.source_aggregate.is_some(),
    ];
    let count = set.into_iter().filter(|s| *s).count();
    let fix = "set exactly one of source_http, source_http_put and source_offline";
    if count == 0 {
        return Err(Refusal::new(Code::BadProposal, "the data has no source", fix).at("data"));
    }
    if count > 1 {
        return Err(
            Refusal::new(Code::BadProposal, "the data has more than one source", fix).at("data"),
        );
    }
    let Some(http) = &data.source_http else {
        if data.source_http_put.is_some() {
            return Ok(Source::Put);
        }
        if data.source_offline.is_some() {
            return Ok(Source::Offline);
        }
        return Err(Refusal::new(
            Code::UnsupportedSource,
            "source_aggregate is not taken here",
            fix,
        )
        .at("data.source_aggregate"));
    };
    let bad = |error: String, fix: &str| {
        Err(Refusal::new(Code::MalformedSource, error, fix).at("data.source_http.urls"))
    };
    if http.urls.is_empty() || http.urls.len() > MAX_URLS {
        return bad(
            format!("{} URLs are given", http.urls.len()),
            "give one to ten URLs",
        );
    }
    let mut urls = http.urls.clone();
    for u in &urls {
        if u.url.len() > MAX_TEXT {
            return bad("a URL is too long".into(), "use at most 4,096 bytes");
        }
        match source::check_url(&u.url, cfg.allow_private_sources) {
            Ok(url) if source::port_is_one_of(&url, &cfg.pull_ports) => {}
            Ok(url) => {
                return bad(
                    format!("{} has a port that is not fetched from", clip(url.as_str())),
                    "use the usual port, 80 or 443; the provider sets others in deals.pull_ports",
                );
            }
            Err(e) => return bad(e.to_string(), e.fix()),
        }
        if u.headers.len() > MAX_HEADERS {
            return bad("a URL has too many headers".into(), "use at most ten");
        }
        if let Some(name) = source::bad_header(&u.headers) {
            return bad(
                format!("header {:?} can not be sent", clip(&name)),
                "remove it: hop-by-hop headers, Host, Range and malformed ones are refused",
            );
        }
    }
    urls.sort_by_key(|u| (u.fallback, u.priority));
    Ok(Source::Http(urls))
}

fn terms(ddo: &DdoV1, rules: &Rules<'_>) -> Result<(Epoch, Epoch), Refusal> {
    let bad = |code, error: String, fix: String, field: &str| {
        Err(Refusal::new(code, error, fix).at(&format!("products.ddo_v1.{field}")))
    };
    let provider = mk20::parse_address(&ddo.provider).and_then(|a| a.id().ok());
    if provider != Some(rules.provider.0) {
        return bad(
            Code::InvalidProduct,
            format!(
                "the provider is {:?}, this is {}",
                clip(&ddo.provider),
                rules.provider
            ),
            format!(
                "propose to {}, or ask the provider that you mean",
                rules.provider
            ),
            "provider",
        );
    }
    if ddo.allocation_id == Some(0) {
        return bad(
            Code::InvalidProduct,
            "allocation 0 does not exist".into(),
            "leave allocation_id out, or name a real one".into(),
            "allocation_id",
        );
    }
    if ddo.allocation_id.is_none() && ddo.duration < MIN_DURATION.0 {
        return bad(
            Code::DurationTooShort,
            format!("a duration of {} epochs is too short", ddo.duration),
            format!("ask for at least {MIN_DURATION} epochs (180 days)"),
            "duration",
        );
    }
    if ddo.duration <= 0 || ddo.duration > MAX_DURATION.0 {
        return bad(
            Code::InvalidProduct,
            format!("a duration of {} epochs is not possible", ddo.duration),
            format!("ask for at most {MAX_DURATION} epochs (1,278 days)"),
            "duration",
        );
    }
    let start = match ddo.start_epoch {
        None => rules.height + EpochDelta(rules.cfg.default_start_delay_epochs),
        Some(start) => {
            let earliest = rules.height + EpochDelta(rules.cfg.min_start_delay_epochs.max(1));
            if Epoch(start) < earliest {
                return bad(
                    Code::InvalidProduct,
                    format!(
                        "start epoch {start} is too early: the chain is at {}",
                        rules.height
                    ),
                    format!("name an epoch from {earliest} on, or leave start_epoch out"),
                    "start_epoch",
                );
            }
            if Epoch(start) > rules.height + MAX_DURATION {
                return bad(
                    Code::InvalidProduct,
                    format!(
                        "start epoch {start} is too far away: the chain is at {}",
                        rules.height
                    ),
                    "name an earlier one".into(),
                    "start_epoch",
                );
            }
            Epoch(start)
        }
    };
    if !ddo.market_address.is_empty() || ddo.market_deal_id.is_some() {
        return bad(
            Code::InvalidProduct,
            "market contracts are not supported here".into(),
            "leave market_address and market_deal_id out; GET /market/mk20/contracts is empty"
                .into(),
            "market_address",
        );
    }
    Ok((start, start + EpochDelta(ddo.duration)))
}

fn notify(ddo: &DdoV1) -> Result<Option<(String, Vec<u8>)>, Refusal> {
    let bad = |error: &str, fix: &str, field: &str| {
        Err(Refusal::new(Code::InvalidProduct, error, fix).at(&format!("products.ddo_v1.{field}")))
    };
    // Go writes an undefined address as "<empty>".
    let address = match ddo.notification_address.as_str() {
        "" | "<empty>" => None,
        text => match mk20::parse_address(text) {
            Some(a) => Some(mk20::address_text(&a)),
            None => {
                return bad(
                    "the notification address is no address",
                    "give an address, or leave it out",
                    "notification_address",
                );
            }
        },
    };
    let Ok(payload) = STANDARD.decode(&ddo.notification_payload) else {
        return bad(
            "the notification payload is not base64",
            "encode it as standard base64",
            "notification_payload",
        );
    };
    if payload.len() > MAX_PAYLOAD {
        return bad(
            "the notification payload is too long",
            "use at most 32 KiB",
            "notification_payload",
        );
    }
    match (address, payload.is_empty()) {
        (None, true) => Ok(None),
        (Some(a), false) => Ok(Some((a, payload))),
        (None, false) => bad(
            "there is a notification payload without an address",
            "set notification_address too",
            "notification_address",
        ),
        (Some(_), true) => bad(
            "there is a notification address without a payload",
            "set notification_payload too",
            "notification_payload",
        ),
    }
}

fn retrieval(r: Option<&RetrievalV1>, format: Format) -> Result<Retrieval, Refusal> {
    let bad = |error: &str, fix: &str, field: &str| {
        Err(Refusal::new(Code::InvalidProduct, error, fix).at(field))
    };
    let Some(r) = r else {
        return bad(
            "retrieval_v1 is required with ddo_v1",
            "add products.retrieval_v1",
            "products.retrieval_v1",
        );
    };
    if r.announce_payload && !r.indexing {
        return bad(
            "blocks can not be announced without an index",
            "set indexing, or clear announce_payload",
            "products.retrieval_v1.announce_payload",
        );
    }
    if r.announce_payload && r.announce_piece {
        return bad(
            "payload and piece can not both be announced",
            "choose one of announce_payload and announce_piece",
            "products.retrieval_v1.announce_piece",
        );
    }
    if r.indexing && format == Format::Raw {
        return bad(
            "a raw piece has no blocks to index",
            "clear indexing, or pack the data as a CAR with `lotus-markets client pack`",
            "products.retrieval_v1.indexing",
        );
    }
    Ok((*r).into())
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
