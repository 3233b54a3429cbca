//! WindowPoSt, faults, recoveries, disputes, terminations.

use std::collections::BTreeMap;

use fvm_ipld_bitfield::BitField;
use lotus_actors::miner::{
    BASE_REWARD_FOR_DISPUTED_WINDOW_POST, DeclareFaultsParams, DeclareFaultsRecoveredParams,
    DisputeWindowedPoStParams, MaxTerminationFeeParams, MaxTerminationFeeReturn, PoStPartition,
    PowerPair, SubmitWindowedPoStParams, TerminateSectorsParams, TerminateSectorsReturn,
};
use lotus_actors::{Dst, encode};
use lotus_node_client::api::DeadlineInfo;
use lotus_types::{ActorId, TokenAmount};

use super::account::repay_or_abort;
use super::{Abort, Call, Economy, Outcome, abort, money, sectors};
use crate::policy::Policy;
use crate::state::{Deadline, Miner, Partition, State, Submission};

pub(super) fn deadline_mut(m: &mut Miner, index: u64) -> Result<&mut Deadline, Abort> {
    let i = usize::try_from(index).unwrap_or(usize::MAX);
    match m.deadlines.get_mut(i) {
        Some(d) => Ok(d),
        None => abort!(USR_ILLEGAL_ARGUMENT, "invalid deadline {index}"),
    }
}

fn partition_mut(d: &mut Deadline, index: u64) -> Result<&mut Partition, Abort> {
    let i = usize::try_from(index).unwrap_or(usize::MAX);
    match d.partitions.get_mut(i) {
        Some(p) => Ok(p),
        None => abort!(USR_NOT_FOUND, "no such partition {index}"),
    }
}

pub(super) fn submit(mut call: Call<'_>) -> Outcome {
    let p: SubmitWindowedPoStParams = call.params()?;
    let policy = call.policy().clone();
    let now = call.epoch();
    let [proof] = p.proofs.as_slice() else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "expected exactly one proof, got {}",
            p.proofs.len()
        );
    };
    if p.deadline >= policy.deadlines {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "invalid deadline {} of {}",
            p.deadline,
            policy.deadlines
        );
    }
    if p.chain_commit_rand.0.len() > 32 {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "expected at most 32 bytes of randomness"
        );
    }
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    let kind = i64::from(proof.post_proof);
    let expected = lotus_proofs::window_post_proof_type(m.size);
    if kind != expected {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "expected proof of type {expected}, got {kind}"
        );
    }
    let fill = Policy::partition_sectors(m.size);
    let limit = (policy.addressed_sectors_max / fill).min(policy.posted_partitions_max);
    if u64::try_from(p.partitions.len()).unwrap_or(u64::MAX) > limit {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "too many partitions {}, limit {limit}",
            p.partitions.len()
        );
    }
    let open = policy.current_deadline(m.period_offset, now);
    if p.deadline != open.index {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "invalid deadline {} at epoch {now}, expected {}",
            p.deadline,
            open.index
        );
    }
    check_commitment(&call, &p, &open)?;
    let ends = open.last().0 + policy.fault_max_age;
    let d = deadline_mut(&mut m, p.deadline)?;
    let proven = record_proven(d, &p.partitions, ends)?;
    let checked = m.for_proof(&proven.all, &proven.ignored);
    if checked.is_empty() {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "cannot prove partitions with no active sectors"
        );
    }
    let entropy = call.entropy();
    let challenge = call.beacon(Dst::WindowedPoStChallengeSeed, open.challenge.0, &entropy)?;
    let verdict = call.env.verifier.verify_window_post(
        ActorId(m.id),
        m.size,
        &challenge,
        &checked,
        &proof.proof_bytes,
    );
    let wrong = verdict.err().map(|why| why.to_string());
    if proven.recovered.is_empty() {
        // Accepted as it is. That a wrong one is disputed is for the end of the deadline.
        if let Some(why) = &wrong {
            tracing::warn!(
                miner = m.id,
                deadline = p.deadline,
                why,
                "a wrong PoSt was accepted"
            );
        }
        let sectors = &proven.all - &proven.ignored;
        deadline_mut(&mut m, p.deadline)?
            .submissions
            .push(Submission {
                partitions: proven.partitions,
                sectors,
                wrong,
            });
    } else if let Some(why) = wrong {
        abort!(USR_ILLEGAL_ARGUMENT, "invalid post was submitted: {why}");
    }
    m.update_power();
    call.save(m);
    Ok(Vec::new())
}

/// The proof must be made for this window, on this chain.
fn check_commitment(
    call: &Call<'_>,
    p: &SubmitWindowedPoStParams,
    open: &DeadlineInfo,
) -> Result<(), Abort> {
    let (at, now) = (p.chain_commit_epoch, call.epoch());
    if at < open.challenge.0 {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "expected chain commit epoch {at} to be after {}",
            open.challenge
        );
    }
    if at >= now {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "chain commit epoch {at} must be less than the current epoch {now}"
        );
    }
    let expected = call.tickets(Dst::PoStChainCommit, at, &[])?;
    if p.chain_commit_rand.0 != expected {
        abort!(USR_ILLEGAL_ARGUMENT, "post commit randomness mismatched");
    }
    Ok(())
}

#[derive(Default)]
struct Proven {
    partitions: BitField,
    all: BitField,
    ignored: BitField,
    recovered: BitField,
}

fn record_proven(
    d: &mut Deadline,
    posts: &[PoStPartition],
    fault_ends: i64,
) -> Result<Proven, Abort> {
    let mut out = Proven::default();
    for post in posts {
        if out.partitions.get(post.index) {
            abort!(USR_ILLEGAL_ARGUMENT, "duplicate partitions proven");
        }
        if d.posted.get(post.index) {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "partition already proven: {}",
                post.index
            );
        }
        let part = partition_mut(d, post.index)?;
        if !part.sectors.contains_all(&post.skipped) {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "skipped faults contains sectors outside partition"
            );
        }
        part.add_faults(&post.skipped, fault_ends);
        out.recovered |= &part.recover();
        part.unproven = BitField::new();
        out.all |= &part.sectors;
        out.ignored |= &part.faults;
        out.ignored |= &part.terminated;
        out.partitions.set(post.index);
    }
    d.posted |= &out.partitions;
    Ok(out)
}

/// The declarations of a message: sectors by deadline and partition.
fn by_place<'a>(
    call: &Call<'_>,
    items: impl Iterator<Item = (u64, u64, &'a BitField)>,
) -> Result<BTreeMap<(u64, u64), BitField>, Abort> {
    let mut out: BTreeMap<_, BitField> = BTreeMap::new();
    for (deadline, partition, sectors) in items {
        if deadline >= call.policy().deadlines {
            abort!(USR_ILLEGAL_ARGUMENT, "invalid deadline {deadline}");
        }
        *out.entry((deadline, partition)).or_default() |= sectors;
    }
    let max = call.policy().addressed_sectors_max;
    if out
        .values()
        .map(BitField::len)
        .fold(0u64, u64::saturating_add)
        > max
    {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "cannot process requested parameters: over {max} sectors"
        );
    }
    Ok(out)
}

/// The deadline that a declaration is for, if it comes in time.
fn declared_deadline(call: &Call<'_>, m: &Miner, index: u64) -> Result<DeadlineInfo, Abort> {
    let d = call
        .policy()
        .next_deadline(m.period_offset, index, call.epoch());
    if call.epoch() >= d.fault_cutoff.0 {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "failed declaration at deadline {index}: late fault or recovery declaration"
        );
    }
    Ok(d)
}

fn declared_partition<'a>(
    m: &'a mut Miner,
    place: (u64, u64),
    sectors: &BitField,
) -> Result<&'a mut Partition, Abort> {
    let part = partition_mut(deadline_mut(m, place.0)?, place.1)?;
    if !part.sectors.contains_all(sectors) {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "not all sectors are assigned to the partition"
        );
    }
    Ok(part)
}

pub(super) fn declare_faults(mut call: Call<'_>) -> Outcome {
    let p: DeclareFaultsParams = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    let items = p
        .faults
        .iter()
        .map(|f| (f.deadline, f.partition, &f.sectors));
    for (place, sectors) in by_place(&call, items)? {
        let d = declared_deadline(&call, &m, place.0)?;
        let ends = d.last().0 + call.policy().fault_max_age;
        declared_partition(&mut m, place, &sectors)?.add_faults(&sectors, ends);
    }
    m.update_power();
    call.save(m);
    Ok(Vec::new())
}

pub(super) fn declare_recovered(mut call: Call<'_>) -> Outcome {
    let p: DeclareFaultsRecoveredParams = call.params()?;
    let mut m = call.miner()?;
    repay_or_abort(&mut call, &mut m)?;
    call.operators_only(&m)?;
    let items = p
        .recoveries
        .iter()
        .map(|r| (r.deadline, r.partition, &r.sectors));
    for (place, sectors) in by_place(&call, items)? {
        declared_deadline(&call, &m, place.0)?;
        let part = declared_partition(&mut m, place, &sectors)?;
        let back = &sectors & &part.faults;
        part.recoveries |= &back;
    }
    call.save(m);
    Ok(Vec::new())
}

pub(super) fn terminate(mut call: Call<'_>) -> Outcome {
    let p: TerminateSectorsParams = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    let now = call.epoch();
    let items = p
        .terminations
        .iter()
        .map(|t| (t.deadline, t.partition, &t.sectors));
    let mut ended = BitField::new();
    for (place, sectors) in by_place(&call, items)? {
        if !call.policy().is_mutable(m.period_offset, place.0, now) {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "cannot terminate sectors in immutable deadline {}",
                place.0
            );
        }
        let part = declared_partition(&mut m, place, &sectors)?;
        if !part.live().contains_all(&sectors) {
            abort!(USR_ILLEGAL_ARGUMENT, "can only terminate live sectors");
        }
        part.terminate(&sectors);
        ended |= &sectors;
    }
    let economy = Economy::of(call.state, call.policy());
    end_early(call.state, &economy, &mut m, &ended, now);
    call.save(m);
    Ok(encode(&TerminateSectorsReturn { done: true }))
}

/// The fee for a sector so old that it grows no more. Source: FIP-0098.
pub(super) fn max_termination_fee(call: &Call<'_>) -> Outcome {
    let p: MaxTerminationFeeParams = call.params()?;
    let economy = Economy::of(call.state, call.policy());
    Ok(encode(&MaxTerminationFeeReturn {
        max_fee: economy.termination_fee(&p.initial_pledge, i64::from(u32::MAX), &p.power),
    }))
}

/// Releases sectors that end before their time, and charges for it.
pub(super) fn end_early(
    state: &mut State,
    economy: &Economy,
    m: &mut Miner,
    sectors: &BitField,
    now: i64,
) {
    let mut fee = TokenAmount::default();
    for n in sectors.iter() {
        let power = m.power_of(&crate::state::bits([n]));
        if let Some(info) = m.sectors.get(&n) {
            let age = now - info.activation;
            fee += economy.termination_fee(&info.initial_pledge, age, &power.qa);
        }
    }
    release(m, sectors);
    m.update_power();
    money::penalize(state, m, &fee);
}

/// Releases the pledge of sectors that have ended. What the chain knows of them stays until their
/// partition is compacted. Source: builtin-actors, miner state, `State::sectors`.
pub(super) fn release(m: &mut Miner, sectors: &BitField) {
    m.pledge -= sectors::pledge_of(m, sectors);
}

pub(super) fn dispute_message(mut call: Call<'_>) -> Outcome {
    let p: DisputeWindowedPoStParams = call.params()?;
    let mut m = call.miner()?;
    let (policy, now) = (call.policy().clone(), call.epoch());
    if p.deadline >= policy.deadlines {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "invalid deadline {} of {}",
            p.deadline,
            policy.deadlines
        );
    }
    if !policy.is_disputable(m.period_offset, p.deadline, now) {
        abort!(
            USR_FORBIDDEN,
            "can only dispute window posts during the dispute window ({} epochs after the \
             challenge window closes)",
            policy.dispute_window
        );
    }
    let d = deadline_mut(&mut m, p.deadline)?;
    let i = usize::try_from(p.post_index).unwrap_or(usize::MAX);
    let Some(slot) = d.snapshot.get_mut(i).filter(|s| s.is_some()) else {
        abort!(USR_ILLEGAL_ARGUMENT, "proof {} not found", p.post_index);
    };
    if slot.as_ref().is_some_and(|s| s.wrong.is_none()) {
        abort!(USR_ILLEGAL_ARGUMENT, "failed to dispute valid post");
    }
    if let Some(post) = slot.take() {
        let burnt = punish(call.state, &policy, &mut m, p.deadline, &post, now);
        // The reporter's reward comes out of what the miner paid.
        let reward = burnt.min(BASE_REWARD_FOR_DISPUTED_WINDOW_POST.clone());
        let from = lotus_actors::actors::BURNT_FUNDS.0;
        let _paid = call.state.transfer(from, call.caller, &reward);
    }
    call.save(m);
    Ok(Vec::new())
}

/// Faults the sectors of a wrong PoSt and charges the penalty and the reporter's reward. Returns
/// what was paid.
pub(super) fn punish(
    state: &mut State,
    policy: &Policy,
    m: &mut Miner,
    deadline: u64,
    post: &Submission,
    now: i64,
) -> TokenAmount {
    let disputed: PowerPair = m.power_of(&post.sectors);
    let next = policy.next_deadline(m.period_offset, deadline, now);
    let ends = next.last().0 - policy.proving_period() + policy.fault_max_age;
    if let Ok(d) = deadline_mut(m, deadline) {
        for i in post.partitions.iter() {
            if let Ok(part) = partition_mut(d, i) {
                part.add_faults(&post.sectors, ends);
            }
        }
    }
    m.update_power();
    let penalty = Economy::of(state, policy).wrong_post_penalty(&disputed.qa);
    money::penalize(
        state,
        m,
        &(penalty + &*BASE_REWARD_FOR_DISPUTED_WINDOW_POST),
    )
}
