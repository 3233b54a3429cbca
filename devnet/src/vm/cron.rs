//! What happens at the end of every epoch.

use fvm_ipld_bitfield::BitField;
use lotus_types::TokenAmount;

use super::{Economy, Env, account, money, post};
use crate::policy::Policy;
use crate::state::{Miner, State, bits};

/// Ends an epoch: closes the deadlines whose last epoch it is, and disputes the wrong PoSts of
/// those that closed one epoch before.
pub(super) fn tick(state: &mut State, env: &Env<'_>) {
    let ids: Vec<u64> = state.miners.keys().copied().collect();
    for id in ids {
        let due = state.miners.get(&id).map(|m| {
            let d = env.policy.current_deadline(m.period_offset, env.epoch);
            (d, d.open.0 == env.epoch, d.last().0 == env.epoch)
        });
        let Some((d, opens, closes)) = due else {
            continue;
        };
        if opens {
            let n = env.policy.deadlines;
            dispute(state, env, id, (d.index + n - 1) % n);
        }
        if closes && let Some(part) = state.miners.get(&id) {
            let mut m = Miner::clone(part);
            close(state, env, &mut m, d.index);
            state.miners.insert(id, m.into());
        }
    }
}

/// The node's own `DisputeWindowedPoSt`: it checked every proof when it came.
fn dispute(state: &mut State, env: &Env<'_>, id: u64, deadline: u64) {
    let wrong = |m: &Miner| {
        let d = usize::try_from(deadline)
            .ok()
            .and_then(|i| m.deadlines.get(i));
        d.is_some_and(|d| d.snapshot.iter().flatten().any(|s| s.wrong.is_some()))
    };
    let Some(part) = state.miners.get(&id).filter(|m| wrong(m)) else {
        return;
    };
    let mut m = Miner::clone(part);
    let mut found = Vec::new();
    if let Some(d) = usize::try_from(deadline)
        .ok()
        .and_then(|i| m.deadlines.get_mut(i))
    {
        for slot in &mut d.snapshot {
            found.extend(slot.take_if(|s| s.wrong.is_some()));
        }
    }
    for post in found {
        tracing::info!(
            miner = id,
            deadline,
            why = post.wrong,
            "disputing a wrong PoSt"
        );
        post::punish(state, env.policy, &mut m, deadline, &post, env.epoch);
    }
    state.miners.insert(id, m.into());
}

/// Closes a deadline: missed PoSts become faults, sectors whose time is over end, fees are due.
/// Source: builtin-actors, actors/miner/src/lib.rs, handle_proving_deadline.
fn close(state: &mut State, env: &Env<'_>, m: &mut Miner, index: u64) {
    let (policy, now) = (env.policy, env.epoch);
    account::settle_worker(m, now);
    m.vest(now);
    let mut penalty = expire_pre_commits(policy, m, now);
    let economy = Economy::of(state, policy);
    let ends = now + policy.fault_max_age;
    let Some(d) = usize::try_from(index)
        .ok()
        .and_then(|i| m.deadlines.get_mut(i))
    else {
        return;
    };
    let mut faulty = BitField::new();
    let (mut on_time, mut early) = (BitField::new(), BitField::new());
    for (i, part) in (0u64..).zip(&mut d.partitions) {
        faulty |= &part.faults;
        if !d.posted.get(i) {
            let live = part.live();
            part.add_faults(&live, ends);
            part.recoveries = BitField::new();
        }
        let over = |n: &u64| m.sectors.get(n).is_some_and(|s| s.expiration <= now);
        let expired = bits(part.live().iter().filter(over));
        let aged = part.fault_ends.iter().filter(|(_, end)| **end <= now);
        let aged = &bits(aged.map(|(n, _)| *n)) - &expired;
        part.terminate(&expired);
        part.terminate(&aged);
        on_time |= &expired;
        early |= &aged;
    }
    d.posted = BitField::new();
    d.snapshot = std::mem::take(&mut d.submissions)
        .into_iter()
        .map(Some)
        .collect();
    // Only sectors that were already faulty when the deadline closed pay the fault fee.
    penalty += economy.fault_fee(&m.power_of(&faulty).qa);
    post::release(m, &on_time);
    m.update_power();
    if faulty.is_empty() && early.is_empty() && penalty.is_zero() {
        return;
    }
    money::penalize(state, m, &penalty);
    if !early.is_empty() {
        post::end_early(state, &economy, m, &early, now);
    }
}

/// Removes pre-commits whose proofs never came; returns the deposits that are lost.
fn expire_pre_commits(policy: &Policy, m: &mut Miner, now: i64) -> TokenAmount {
    let limit = policy.prove_commit_limit() + policy.pre_commit_clean_up_delay;
    let mut lost = TokenAmount::default();
    m.pre_commits.retain(|_, pc| {
        let keep = now < pc.pre_commit_epoch + limit;
        if !keep {
            lost += &pc.pre_commit_deposit;
        }
        keep
    });
    m.deposits -= &lost;
    lost
}
