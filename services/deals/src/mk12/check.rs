//! The checks of a MK1.2 proposal, in Boost's order and words: clients show the reason to people,
//! and some match it. Pure: what comes from the chain and from the settings is passed in.

use std::collections::BTreeMap;

use lotus_actors::BigInt;
use lotus_actors::market::{DealProposal, Label, is_piece_cid};
use lotus_types::{
    ActorId, Address, DealKey, Epoch, EpochDelta, PaddedSize, PieceCid, PieceInfo, SectorSize,
    TokenAmount,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::transfer::SCHEME;
use super::wire::{DealParams, HttpParams, Transfer, encode};
use crate::config::DealsConfig;
use crate::mk20::{self, HttpUrl};
use crate::validate::{Format, MAX_DURATION, MIN_DURATION, Proposal, Retrieval, Source};
use crate::{auth, source};

/// Longest label, in bytes. Source: builtin-actors, actors/market/src/lib.rs, DEAL_MAX_LABEL_SIZE.
const MAX_LABEL: usize = 256;
/// Longest JSON of a transfer's parameters.
const MAX_PARAMS: usize = 64 << 10;
/// Most headers of a transfer. Source: Curio, market/mk20/utils.go, maxHeaderCount.
const MAX_HEADERS: usize = 10;
/// Longest URL.
const MAX_URL: usize = 4096;

/// What only a MK1.2 deal has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// CBOR of the signed proposal, as it goes on chain.
    #[serde(with = "serde_bytes")]
    pub deal: Vec<u8>,
    /// The bytes come by other means than a transfer.
    pub offline: bool,
    /// Bytes that the transfer names.
    pub transfer_size: u64,
}

/// The provider's terms, as they are checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    /// attoFIL per GiB and epoch.
    pub price: TokenAmount,
    /// attoFIL per GiB and epoch of verified data.
    pub verified_price: TokenAmount,
    /// Padded bytes.
    pub min_piece_size: PaddedSize,
    /// Padded bytes.
    pub max_piece_size: PaddedSize,
}

/// What the checks are made against.
#[derive(Clone, Debug)]
pub(super) struct Facts<'a> {
    /// This storage provider.
    pub(super) provider: ActorId,
    pub(super) sector_size: SectorSize,
    pub(super) height: Epoch,
    /// The client's address in key form.
    pub(super) client: Address,
    /// attoFIL that the client has in the market, not bound to deals.
    pub(super) client_available: TokenAmount,
    /// Least collateral of the provider for a piece of this size.
    pub(super) collateral_min: TokenAmount,
    pub(super) terms: &'a Terms,
    pub(super) cfg: &'a DealsConfig,
}

/// SHA-256 of a proposal as it was sent, to tell a repeat from another deal under the same id.
pub(super) fn digest(params: &DealParams) -> [u8; 32] {
    Sha256::digest(encode(params)).into()
}

/// Checks a proposal. The error is the reason for the client.
pub(super) fn check(params: &DealParams, facts: &Facts<'_>) -> Result<Proposal, String> {
    let p = &params.client_deal_proposal.proposal;
    signature(params, &facts.client)?;
    on_chain(p, facts)?;
    let size = PaddedSize::new(p.piece_size.0).map_err(|e| e.to_string())?;
    ask(p, size, facts.terms)?;
    let needed = p.client_balance_requirement();
    if facts.client_available < needed {
        return Err(format!(
            "client available funds in escrow {} not enough to meet storage cost for deal {}",
            facts.client_available.atto(),
            needed.atto()
        ));
    }
    if p.verified_deal {
        return Err(
            "verified deals are taken by allocation (DDO, FIP-0076) here, not by deal proposal"
                .into(),
        );
    }
    let (source, raw_size) = transfer(params, size, facts.cfg)?;
    let cid = PieceCid::from_cid(&p.piece_cid).map_err(|e| e.to_string())?;
    let piece = PieceInfo {
        cid,
        size,
        raw_size,
    };
    if !piece.fits(facts.sector_size) {
        return Err(format!(
            "proposal piece size is invalid: {size} bytes do not fit a sector of {} bytes",
            facts.sector_size.bytes()
        ));
    }
    Ok(Proposal {
        key: DealKey {
            client: mk20::address_text(&facts.client),
            id: params.deal_uuid.ulid(),
        },
        piece,
        format: Format::Car,
        source,
        start_epoch: Epoch(p.start_epoch),
        end_epoch: Epoch(p.end_epoch),
        allocation: None,
        notify: None,
        retrieval: Retrieval {
            index: true,
            announce_payload: !params.skip_ipni_announce,
            announce_piece: false,
        },
        digest: digest(params),
        signed: Some(Box::new(Signed {
            deal: encode(&params.client_deal_proposal),
            offline: params.is_offline,
            transfer_size: params.transfer.size,
        })),
    })
}

/// The client's signature over the CBOR of the proposal.
fn signature(params: &DealParams, client: &Address) -> Result<(), String> {
    let signed = &params.client_deal_proposal;
    if auth::signed_by(client, &signed.client_signature, &encode(&signed.proposal)) {
        Ok(())
    } else {
        Err("invalid signature".into())
    }
}

/// What the market actor asks of every deal.
fn on_chain(p: &DealProposal, facts: &Facts<'_>) -> Result<(), String> {
    if p.provider != Address::new_id(facts.provider.0) {
        return Err(format!(
            "incorrect provider for deal; proposal.Provider: {}; provider.Address: {}",
            mk20::address_text(&p.provider),
            facts.provider
        ));
    }
    let label = match &p.label {
        Label::String(s) => s.len(),
        Label::Bytes(b) => b.len(),
    };
    if label > MAX_LABEL {
        return Err(format!(
            "deal label can be at most {MAX_LABEL} bytes, is {label}"
        ));
    }
    if let Err(e) = PaddedSize::new(p.piece_size.0) {
        return Err(format!("proposal piece size is invalid: {e}"));
    }
    if !is_piece_cid(&p.piece_cid) {
        return Err("proposal PieceCID had wrong prefix".into());
    }
    let (start, end, now) = (p.start_epoch, p.end_epoch, facts.height.0);
    if end <= start {
        return Err(format!("proposal end {end} before proposal start {start}"));
    }
    if now > start {
        return Err(format!(
            "deal start epoch {start} has already elapsed (current epoch: {now})"
        ));
    }
    let earliest = facts.height + EpochDelta(facts.cfg.min_start_delay_epochs);
    if Epoch(start) < earliest {
        return Err(format!(
            "deal start epoch {start} is too soon: this provider seals nothing before {earliest} (current epoch: {now})"
        ));
    }
    let duration = end.checked_sub(start).unwrap_or(i64::MAX);
    if !(MIN_DURATION.0..=MAX_DURATION.0).contains(&duration) {
        return Err(format!(
            "deal duration out of bounds (min, max, provided): {MIN_DURATION}, {MAX_DURATION}, {duration}"
        ));
    }
    if Epoch(end) > facts.height + MAX_DURATION {
        return Err(format!(
            "invalid deal end epoch {end}: cannot be more than {MAX_DURATION} past current epoch {now}"
        ));
    }
    if p.storage_price_per_epoch.is_negative() || p.client_collateral.is_negative() {
        return Err("proposal has a negative price or collateral".into());
    }
    let most = &facts.collateral_min * facts.cfg.mk12.max_collateral_multiplier;
    if p.provider_collateral < facts.collateral_min {
        return Err(format!(
            "proposed provider collateral {} below minimum {}",
            p.provider_collateral.atto(),
            facts.collateral_min.atto()
        ));
    }
    if p.provider_collateral > most {
        return Err(format!(
            "proposed provider collateral {} above maximum {}",
            p.provider_collateral.atto(),
            most.atto()
        ));
    }
    Ok(())
}

/// The provider's own terms.
fn ask(p: &DealProposal, size: PaddedSize, terms: &Terms) -> Result<(), String> {
    let price = if p.verified_deal {
        &terms.verified_price
    } else {
        &terms.price
    };
    let least = TokenAmount::from_atto(price.atto() * BigInt::from(size.get()) / (1u64 << 30));
    if p.storage_price_per_epoch < least {
        return Err(format!(
            "storage price per epoch less than asking price: {} < {}",
            p.storage_price_per_epoch.atto(),
            least.atto()
        ));
    }
    if size < terms.min_piece_size {
        return Err(format!(
            "piece size less than minimum required size: {size} < {}",
            terms.min_piece_size
        ));
    }
    if size > terms.max_piece_size {
        return Err(format!(
            "piece size more than maximum allowed size: {size} > {}",
            terms.max_piece_size
        ));
    }
    Ok(())
}

/// Where the bytes come from, and how many there are.
fn transfer(
    params: &DealParams,
    size: PaddedSize,
    cfg: &DealsConfig,
) -> Result<(Source, u64), String> {
    let t = &params.transfer;
    if params.is_offline {
        // The file's length is known when it is imported; until then it is the most that fits.
        let raw = if t.size == 0 {
            size.unpadded().get()
        } else {
            t.size
        };
        return length(raw, size).map(|raw| (Source::Offline, raw));
    }
    if t.kind != "http" && t.kind != "libp2p" {
        return Err(format!(
            "cannot parse params for unrecognized transfer type '{}'",
            clip(&t.kind)
        ));
    }
    if t.size == 0 {
        return Err("the transfer has no size: give the file's length in bytes".into());
    }
    let raw = length(t.size, size)?;
    Ok((Source::Http(vec![url(t, cfg)?]), raw))
}

fn length(raw: u64, size: PaddedSize) -> Result<u64, String> {
    if PaddedSize::to_hold(raw) == Some(size) {
        return Ok(raw);
    }
    Err(format!(
        "a transfer of {raw} bytes makes no piece of {size}: the piece must be the smallest that holds the file"
    ))
}

fn url(t: &Transfer, cfg: &DealsConfig) -> Result<HttpUrl, String> {
    if t.params.len() > MAX_PARAMS {
        return Err(format!(
            "the transfer params have more than {MAX_PARAMS} bytes"
        ));
    }
    let params: HttpParams = serde_json::from_slice(&t.params)
        .map_err(|e| format!("failed to de-serialize transport params bytes: {e}"))?;
    if params.url.len() > MAX_URL {
        return Err(format!("the transfer URL has more than {MAX_URL} bytes"));
    }
    let has_port = match params.url.strip_prefix(SCHEME) {
        Some(peer) => source::check_peer(peer, cfg.allow_private_sources)
            .map(|to| cfg.pull_ports.contains(&to.at.port())),
        None => source::check_url(&params.url, cfg.allow_private_sources)
            .map(|url| source::port_is_one_of(&url, &cfg.pull_ports)),
    };
    if !has_port.map_err(|e| format!("cannot fetch from the transfer URL: {e}"))? {
        return Err(format!(
            "{} has a port that is not fetched from; use 80 or 443",
            clip(&params.url)
        ));
    }
    let headers: BTreeMap<String, Vec<String>> = params
        .headers
        .unwrap_or_default()
        .into_iter()
        .map(|(k, v)| (k, vec![v]))
        .collect();
    if headers.len() > MAX_HEADERS {
        return Err(format!("the transfer has more than {MAX_HEADERS} headers"));
    }
    if let Some(name) = source::bad_header(&headers) {
        return Err(format!("header {:?} can not be sent", clip(&name)));
    }
    Ok(HttpUrl {
        url: params.url,
        headers,
        priority: 0,
        fallback: false,
    })
}

fn clip(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
mod tests;
