//! The miner actor's own affairs: who may act for it, and its funds.

use fvm_shared::address::Protocol;
use lotus_actors::encode;
use lotus_actors::miner::{
    ChangeMultiaddrsParams, ChangePeerIDParams, ChangeWorkerAddressParams,
    GetControlAddressesReturn, WithdrawBalanceParams, WithdrawBalanceReturn,
};
use lotus_types::{Address, TokenAmount};

use super::{Abort, Call, Outcome, abort, money};
use crate::state::{Miner, State};

/// Most bytes of a peer id and of multiaddresses together. Source: builtin-actors, policy.rs.
const PEER_ID_MAX: usize = 128;
const MULTIADDRS_MAX: usize = 1_024;

pub(super) fn is_bls_account(state: &State, id: u64) -> bool {
    let address = state.account(id).and_then(|a| a.address);
    address.is_some_and(|a| a.protocol() == Protocol::BLS)
}

fn owner_only(call: &Call<'_>, m: &Miner) -> Result<(), Abort> {
    if call.caller == m.owner {
        return Ok(());
    }
    abort!(USR_FORBIDDEN, "caller t0{} is not the owner", call.caller)
}

pub(super) fn control_addresses(call: Call<'_>) -> Outcome {
    let m = call.miner()?;
    Ok(encode(&GetControlAddressesReturn {
        owner: Address::new_id(m.owner),
        worker: Address::new_id(m.worker),
        control_addresses: m.control.iter().copied().map(Address::new_id).collect(),
    }))
}

pub(super) fn change_worker(mut call: Call<'_>) -> Outcome {
    let p: ChangeWorkerAddressParams = call.params()?;
    let mut m = call.miner()?;
    owner_only(&call, &m)?;
    if p.new_control_addresses.len() > call.policy().control_addresses_max {
        abort!(USR_ILLEGAL_ARGUMENT, "too many control addresses");
    }
    let Some(worker) = call.state.lookup(&p.new_worker) else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "worker {} is not on the chain",
            p.new_worker
        );
    };
    if !is_bls_account(call.state, worker) {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "worker {} is not a BLS key",
            p.new_worker
        );
    }
    let mut control = Vec::new();
    for a in &p.new_control_addresses {
        match call.state.lookup(a) {
            Some(id) => control.push(id),
            None => abort!(
                USR_ILLEGAL_ARGUMENT,
                "control address {a} is not on the chain"
            ),
        }
    }
    m.control = control;
    if worker != m.worker && m.pending_worker.is_none() {
        let at = call.epoch() + call.policy().worker_change_delay;
        m.pending_worker = Some((worker, at));
    }
    call.save(m);
    Ok(Vec::new())
}

/// Lets a pending worker take over when its time has come.
pub(super) fn settle_worker(m: &mut Miner, now: i64) {
    if let Some((worker, at)) = m.pending_worker
        && now >= at
    {
        m.worker = worker;
        m.pending_worker = None;
    }
}

pub(super) fn confirm_worker(mut call: Call<'_>) -> Outcome {
    let mut m = call.miner()?;
    owner_only(&call, &m)?;
    settle_worker(&mut m, call.epoch());
    call.save(m);
    Ok(Vec::new())
}

pub(super) fn change_owner(mut call: Call<'_>) -> Outcome {
    let new: Address = call.params()?;
    let mut m = call.miner()?;
    let Ok(new) = new.id() else {
        abort!(USR_ILLEGAL_ARGUMENT, "owner {new} must be an ID address");
    };
    if call.caller == m.owner {
        m.pending_owner = (new != m.owner).then_some(new);
    } else if m.pending_owner == Some(call.caller) {
        if new != call.caller {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "expected confirmation of t0{}",
                call.caller
            );
        }
        if m.beneficiary == m.owner {
            m.beneficiary = new;
        }
        m.owner = new;
        m.pending_owner = None;
    } else {
        abort!(USR_FORBIDDEN, "caller t0{} is not the owner", call.caller);
    }
    call.save(m);
    Ok(Vec::new())
}

pub(super) fn change_peer_id(mut call: Call<'_>) -> Outcome {
    let p: ChangePeerIDParams = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    if p.new_id.len() > PEER_ID_MAX {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "peer id of {} bytes is too long",
            p.new_id.len()
        );
    }
    m.peer_id = p.new_id;
    call.save(m);
    Ok(Vec::new())
}

pub(super) fn change_multiaddrs(mut call: Call<'_>) -> Outcome {
    let p: ChangeMultiaddrsParams = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    let total: usize = p.new_multi_addrs.iter().map(|a| a.0.len()).sum();
    if total > MULTIADDRS_MAX || p.new_multi_addrs.iter().any(|a| a.0.is_empty()) {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "multiaddresses are empty or {total} bytes long"
        );
    }
    m.multiaddrs = p.new_multi_addrs.into_iter().map(|a| a.0.into()).collect();
    call.save(m);
    Ok(Vec::new())
}

pub(super) fn withdraw(mut call: Call<'_>) -> Outcome {
    let p: WithdrawBalanceParams = call.params()?;
    if p.amount_requested.is_negative() {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "negative amount {}",
            p.amount_requested
        );
    }
    let mut m = call.miner()?;
    if call.caller != m.owner && call.caller != m.beneficiary {
        abort!(
            USR_FORBIDDEN,
            "caller t0{} is neither owner nor beneficiary",
            call.caller
        );
    }
    m.vest(call.epoch());
    let available = m.available(&call.state.balance(m.id));
    repay_or_abort(&mut call, &mut m)?;
    let amount = p
        .amount_requested
        .min(available)
        .max(TokenAmount::default());
    call.pay(m.beneficiary, &amount)?;
    call.save(m);
    Ok(encode(&WithdrawBalanceReturn {
        amount_withdrawn: amount,
    }))
}

/// Pays the whole debt from unlocked funds, or refuses.
pub(super) fn repay_or_abort(call: &mut Call<'_>, m: &mut Miner) -> Result<(), Abort> {
    let unlocked = m.unlocked(&call.state.balance(m.id));
    if unlocked < m.fee_debt {
        abort!(
            USR_INSUFFICIENT_FUNDS,
            "unlocked balance can not repay fee debt ({unlocked} < {})",
            m.fee_debt
        );
    }
    let burnt = call.state.burn(m.id, &m.fee_debt);
    m.fee_debt -= burnt;
    Ok(())
}

pub(super) fn repay_debt(mut call: Call<'_>) -> Outcome {
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    m.vest(call.epoch());
    money::penalize(call.state, &mut m, &TokenAmount::default());
    call.save(m);
    Ok(Vec::new())
}
