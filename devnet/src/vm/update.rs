//! Changing sectors: replica updates (snap deals) and longer lives.

use std::sync::Arc;

use lotus_actors::miner::{
    ExtendSectorExpiration2Params, ProveReplicaUpdates3Params, ProveReplicaUpdates3Return,
    SectorUpdateManifest, is_sealed_sector, qa_power_for_weight,
};
use lotus_actors::{BigInt, encode};
use lotus_types::Commitment;

use super::sectors::{Verdicts, check_expiration, claim, data_commitment, notify};
use super::{Abort, Call, Economy, Outcome, abort};
use crate::state::{Miner, Partition};

fn partition(m: &Miner, deadline: u64, index: u64) -> Option<&Partition> {
    let d = m.deadlines.get(usize::try_from(deadline).ok()?)?;
    d.partitions.get(usize::try_from(index).ok()?)
}

pub(super) fn prove_updates(mut call: Call<'_>) -> Outcome {
    let p: ProveReplicaUpdates3Params = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    if p.sector_proofs.is_empty() || !p.aggregate_proof.is_empty() {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "exactly one proof for each sector is needed; this network has no aggregates"
        );
    }
    if p.sector_proofs.len() != p.sector_updates.len() || p.aggregate_proof_type.is_some() {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "mismatched lengths of updates and proofs"
        );
    }
    if i64::from(p.update_proofs_type) != lotus_proofs::update_proof_type(m.size) {
        abort!(USR_ILLEGAL_ARGUMENT, "unsupported update proof type");
    }
    let mut verdicts = Verdicts::new(p.require_activation_success);
    let mut notices = Vec::new();
    for (u, proof) in p.sector_updates.iter().zip(&p.sector_proofs) {
        let outcome = update(&mut call, &mut m, u, proof.bytes());
        let expiration = m.sectors.get(&u.sector).map_or(0, |s| s.expiration);
        if outcome.is_ok() {
            notices.push((u.sector, expiration, u.pieces.as_slice()));
        }
        verdicts.push(outcome)?;
    }
    let batch = verdicts.finish()?;
    let unlocked = m.unlocked(&call.state.balance(m.id));
    if unlocked.is_negative() {
        abort!(
            USR_INSUFFICIENT_FUNDS,
            "insufficient funds for new pledge: short of {}",
            -unlocked
        );
    }
    m.update_power();
    call.save(m);
    notify(&mut call, &notices, p.require_notification_success)?;
    Ok(encode(&ProveReplicaUpdates3Return {
        activation_results: batch,
    }))
}

/// Source: builtin-actors, actors/miner/src/lib.rs, validate_replica_updates.
fn update(
    call: &mut Call<'_>,
    m: &mut Miner,
    u: &SectorUpdateManifest,
    proof: &[u8],
) -> Result<(), Abort> {
    let (n, now) = (u.sector, call.epoch());
    let Some(old) = m.sectors.get(&n).cloned() else {
        abort!(USR_NOT_FOUND, "sector {n} not found");
    };
    if old.sector_key_cid.is_some() || old.verified_deal_weight != BigInt::default() {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "cannot update sector with non-zero data {n}"
        );
    }
    if old.deal_weight != BigInt::default() {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "cannot update sector with non-zero data {n}"
        );
    }
    if !is_sealed_sector(&u.new_sealed_cid) {
        abort!(USR_ILLEGAL_ARGUMENT, "new sealed CID had wrong prefix");
    }
    if !partition(m, u.deadline, u.partition).is_some_and(|p| p.active().get(n)) {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "sector {n} is not active in deadline {} partition {}",
            u.deadline,
            u.partition
        );
    }
    if !call.policy().is_mutable(m.period_offset, u.deadline, now) {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "cannot upgrade sectors in immutable deadline {}, skipping sector {n}",
            u.deadline
        );
    }
    let (Ok(old_r), Ok(new_r)) = (
        Commitment::from_sealed_cid(&old.sealed_cid),
        Commitment::from_sealed_cid(&u.new_sealed_cid),
    ) else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "a commitment of sector {n} has the wrong prefix"
        );
    };
    let new_d = data_commitment(m.size, &u.pieces)?;
    if let Err(why) = call
        .env
        .verifier
        .verify_update(m.size, &old_r, &new_r, &new_d, proof)
    {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "invalid update proof for sector {n}: {why}"
        );
    }
    let duration = old.expiration - now;
    let verified = claim(call, m.id, n, old.expiration, &u.pieces)?;
    let occupied: u64 = u.pieces.iter().map(|p| p.size.0).sum();
    let weight = |bytes: u64| BigInt::from(bytes) * duration;
    let power = qa_power_for_weight(m.fvm_size(), duration, &weight(verified));
    let economy = Economy::of(call.state, call.policy());
    let pledge = economy.pledge(&power).max(old.initial_pledge.clone());
    m.pledge += &pledge - &old.initial_pledge;
    let mut new = (*old).clone();
    new.sector_key_cid = Some(old.sealed_cid);
    new.sealed_cid = u.new_sealed_cid;
    new.power_base_epoch = now;
    new.deal_weight = weight(occupied - verified);
    new.verified_deal_weight = weight(verified);
    new.initial_pledge = pledge;
    m.sectors.insert(n, Arc::new(new));
    Ok(())
}

/// Extends sectors without claims. Source: builtin-actors, actors/miner/src/lib.rs,
/// extend_sector_expiration_inner.
pub(super) fn extend(mut call: Call<'_>) -> Outcome {
    let p: ExtendSectorExpiration2Params = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    let (now, policy) = (call.epoch(), call.policy().clone());
    for e in &p.extensions {
        if !e.sectors_with_claims.is_empty() {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "this network extends no sectors with claims; list them without their claims"
            );
        }
        let Some(part) = partition(&m, e.deadline, e.partition) else {
            abort!(
                USR_NOT_FOUND,
                "no deadline {} partition {}",
                e.deadline,
                e.partition
            );
        };
        if !part.active().contains_all(&e.sectors) {
            abort!(
                USR_FORBIDDEN,
                "can only extend active sectors of the partition"
            );
        }
        if e.sectors.len() > policy.addressed_sectors_max {
            abort!(USR_ILLEGAL_ARGUMENT, "too many sectors for declaration");
        }
        for n in e.sectors.iter() {
            let Some(old) = m.sectors.get(&n).cloned() else {
                abort!(USR_NOT_FOUND, "sector {n} not found");
            };
            if e.new_expiration < old.expiration {
                abort!(
                    USR_ILLEGAL_ARGUMENT,
                    "cannot reduce sector {n} expiration to {} from {}",
                    e.new_expiration,
                    old.expiration
                );
            }
            if old.verified_deal_weight != BigInt::default() {
                abort!(USR_ILLEGAL_ARGUMENT, "sector {n} has claims");
            }
            check_expiration(&policy, now, old.activation, e.new_expiration)?;
            let mut new = (*old).clone();
            // Weight is bytes times the time that is left.
            let (left, longer) = (old.expiration - now, e.new_expiration - now);
            new.deal_weight = if left > 0 {
                &old.deal_weight / (old.expiration - old.power_base_epoch).max(1) * longer
            } else {
                BigInt::default()
            };
            new.power_base_epoch = now;
            new.expiration = e.new_expiration;
            m.sectors.insert(n, Arc::new(new));
        }
    }
    m.update_power();
    call.save(m);
    Ok(Vec::new())
}
