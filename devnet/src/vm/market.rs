//! The market actor, thin: escrow, signed deals, and their activation by a sector.

use std::collections::BTreeMap;

use lotus_actors::market::{
    ADD_BALANCE, AddBalanceParams, ClientDealProposal, DealState, PUBLISH_STORAGE_DEALS,
    PublishStorageDealsParams, PublishStorageDealsReturn, WITHDRAW_BALANCE, WithdrawBalanceParams,
    WithdrawBalanceReturn, is_piece_cid,
};
use lotus_actors::miner::PieceActivationManifest;
use lotus_actors::{BitField, decode, encode};
use lotus_types::{Address, PaddedSize, TokenAmount};

use super::{Abort, Call, Outcome, abort, unhandled};
use crate::keys;
use crate::state::{Deal, Escrow};

/// Most bytes of a deal's label. Source: builtin-actors, actors/market/src/lib.rs.
const LABEL_MAX: usize = 256;
/// Deals in one message.
const DEALS_MAX: usize = 1_024;

pub(super) fn method(call: Call<'_>, method: u64) -> Outcome {
    match method {
        ADD_BALANCE => add_balance(call),
        WITHDRAW_BALANCE => withdraw(call),
        PUBLISH_STORAGE_DEALS => publish(call),
        other => unhandled(other),
    }
}

fn add_balance(call: Call<'_>) -> Outcome {
    let p: AddBalanceParams = call.params()?;
    if !call.value.is_positive() {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "balance to add must be greater than zero"
        );
    }
    let Some(id) = call.state.lookup(&p.provider_or_client) else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "{} is not on the chain",
            p.provider_or_client
        );
    };
    call.state.market.edit().escrow.entry(id).or_default().total += call.value;
    Ok(Vec::new())
}

fn withdraw(mut call: Call<'_>) -> Outcome {
    let p: WithdrawBalanceParams = call.params()?;
    let Some(id) = call.state.lookup(&p.provider_or_client) else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "{} is not on the chain",
            p.provider_or_client
        );
    };
    let miner = call.state.miners.get(&id);
    let allowed = match miner {
        Some(m) => call.caller == m.owner || call.caller == m.worker,
        None => call.caller == id,
    };
    let to = miner.map_or(id, |m| m.owner);
    if !allowed {
        abort!(
            USR_FORBIDDEN,
            "caller t0{} may not withdraw for t0{id}",
            call.caller
        );
    }
    if p.amount.is_negative() {
        abort!(USR_ILLEGAL_ARGUMENT, "negative amount {}", p.amount);
    }
    let e = call
        .state
        .market
        .escrow
        .get(&id)
        .cloned()
        .unwrap_or_default();
    let amount = p.amount.min(&e.total - &e.locked);
    call.state.market.edit().escrow.entry(id).or_default().total -= &amount;
    call.pay(to, &amount)?;
    Ok(encode(&WithdrawBalanceReturn {
        amount_withdrawn: amount,
    }))
}

fn publish(mut call: Call<'_>) -> Outcome {
    let p: PublishStorageDealsParams = call.params()?;
    let Some(first) = p.deals.first().filter(|_| p.deals.len() <= DEALS_MAX) else {
        abort!(USR_ILLEGAL_ARGUMENT, "empty or too long deals parameter");
    };
    let provider = call.state.lookup(&first.proposal.provider);
    let Some(m) = provider.and_then(|id| call.state.miners.get(&id)) else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "{} is no provider",
            first.proposal.provider
        );
    };
    if call.caller != m.worker && !m.control.contains(&call.caller) {
        abort!(
            USR_FORBIDDEN,
            "caller t0{} is not the worker or a control address of provider t0{}",
            call.caller,
            m.id
        );
    }
    let provider = m.id;
    let mut ids = Vec::new();
    let mut valid = BitField::new();
    let mut locked: BTreeMap<u64, TokenAmount> = BTreeMap::new();
    for (i, deal) in (0u64..).zip(p.deals) {
        match accept(&mut call, provider, deal, &mut locked) {
            Ok(id) => {
                ids.push(id);
                valid.set(i);
            }
            Err(a) => tracing::info!(deal = i, why = a.message, "deal refused"),
        }
    }
    if ids.is_empty() {
        abort!(USR_ILLEGAL_ARGUMENT, "all deal proposals invalid");
    }
    Ok(encode(&PublishStorageDealsReturn {
        ids,
        valid_deals: valid,
    }))
}

fn accept(
    call: &mut Call<'_>,
    provider: u64,
    deal: ClientDealProposal,
    locked: &mut BTreeMap<u64, TokenAmount>,
) -> Result<u64, Abort> {
    let mut p = deal.proposal;
    let Some(client) = call.state.lookup(&p.client) else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "client {} is not on the chain",
            p.client
        );
    };
    let Some(key) = call.state.account(client).and_then(|a| a.address) else {
        abort!(USR_ILLEGAL_ARGUMENT, "client {} has no key", p.client);
    };
    let policy = call.policy();
    let duration = p.end_epoch - p.start_epoch;
    let checks = [
        (
            keys::verify(&deal.client_signature, &encode(&p), &key),
            "signature proposal invalid",
        ),
        (p.label.len() <= LABEL_MAX, "label too long"),
        (
            is_piece_cid(&p.piece_cid),
            "proposal PieceCID undefined or not a piece",
        ),
        (
            PaddedSize::new(p.piece_size.0).is_ok(),
            "piece size is no power of two",
        ),
        (
            call.state.lookup(&p.provider) == Some(provider),
            "provider differs from the first",
        ),
        (
            p.end_epoch > p.start_epoch,
            "proposal end before proposal start",
        ),
        (
            call.epoch() <= p.start_epoch,
            "deal start epoch has already elapsed",
        ),
        (
            (policy.deal_duration_min..=policy.deal_duration_max).contains(&duration),
            "deal duration out of bounds",
        ),
        (
            !p.storage_price_per_epoch.is_negative()
                && !p.provider_collateral.is_negative()
                && !p.client_collateral.is_negative(),
            "negative price or collateral",
        ),
        (
            !p.verified_deal,
            "verified data needs an allocation, not a deal",
        ),
    ];
    if let Some((_, why)) = checks.iter().find(|(ok, _)| !ok) {
        abort!(USR_ILLEGAL_ARGUMENT, "{why}");
    }
    p.client = Address::new_id(client);
    p.provider = Address::new_id(provider);
    if call.state.market.deals.values().any(|d| d.proposal == p) {
        abort!(USR_ILLEGAL_ARGUMENT, "cannot publish duplicate deal");
    }
    let needs = [
        (client, p.client_balance_requirement()),
        (provider, p.provider_balance_requirement().clone()),
    ];
    for (id, need) in &needs {
        let e = call
            .state
            .market
            .escrow
            .get(id)
            .cloned()
            .unwrap_or_default();
        if &e.total - &e.locked < *need {
            abort!(USR_INSUFFICIENT_FUNDS, "escrow of t0{id} is below {need}");
        }
    }
    let market = call.state.market.edit();
    for (id, need) in needs {
        let e: &mut Escrow = market.escrow.entry(id).or_default();
        e.locked += &need;
        *locked.entry(id).or_default() += need;
    }
    let id = market.next_deal;
    market.next_deal += 1;
    market.deals.insert(
        id,
        Deal {
            proposal: p,
            state: None,
        },
    );
    Ok(id)
}

/// A miner says that a sector holds a deal's piece: the payload is the deal's id. Whether the
/// deal is now active.
pub(super) fn stored(
    call: &mut Call<'_>,
    sector: u64,
    expiration: i64,
    piece: &PieceActivationManifest,
    payload: &[u8],
) -> bool {
    let Ok(id) = decode::<u64>(payload) else {
        return false;
    };
    let (now, provider) = (call.epoch(), Address::new_id(call.to));
    let fits = call.state.market.deals.get(&id).is_some_and(|d| {
        let p = &d.proposal;
        d.state.is_none()
            && p.provider == provider
            && p.piece_cid == piece.cid
            && p.piece_size == piece.size
            && now <= p.start_epoch
            && p.end_epoch <= expiration
    });
    if let Some(d) = call.state.market.edit().deals.get_mut(&id).filter(|_| fits) {
        d.state = Some(DealState {
            sector_number: sector,
            sector_start_epoch: now,
            last_updated_epoch: -1,
            slash_epoch: -1,
        });
    }
    fits
}
