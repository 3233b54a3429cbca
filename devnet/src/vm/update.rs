//! Changing sectors: replica updates (snap deals) and longer lives.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lotus_actors::miner::{
    ExpirationExtension2, ExtendSectorExpiration2Params, ProveReplicaUpdates3Params,
    ProveReplicaUpdates3Return, SectorUpdateManifest, is_sealed_sector, qa_power_for_weight,
};
use lotus_actors::{BigInt, encode};
use lotus_types::Commitment;

use super::sectors::{Verdicts, check_expiration, claim, data_commitment, notify};
use super::{Abort, Call, Economy, Outcome, abort};
use crate::state::{Miner, Partition};

/// Epochs before a sector's end in which its claims may be dropped: 30 days. Source:
/// builtin-actors, runtime/src/runtime/policy.rs, END_OF_LIFE_CLAIM_DROP_PERIOD.
const CLAIM_DROP_PERIOD: i64 = 30 * 2_880;

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

/// Verified bytes of a sector, by what an extension says of their claims.
#[derive(Clone, Copy, Default)]
struct ClaimSpace {
    declared: u64,
    kept: u64,
}

/// Checks the claims that an extension names. Source: builtin-actors, actors/miner/src/lib.rs,
/// validate_extension_declarations.
fn claim_spaces(
    call: &Call<'_>,
    miner: u64,
    e: &ExpirationExtension2,
) -> Result<BTreeMap<u64, ClaimSpace>, Abort> {
    let mut spaces: BTreeMap<u64, ClaimSpace> = BTreeMap::new();
    for s in &e.sectors_with_claims {
        let n = s.sector_number;
        let kept = s.maintain_claims.iter().map(|id| (*id, true));
        for (id, keep) in kept.chain(s.drop_claims.iter().map(|id| (*id, false))) {
            let Some(claim) = call.state.registry.claims.get(&(miner, id)) else {
                abort!(USR_ILLEGAL_ARGUMENT, "no claim {id} of t0{miner}");
            };
            if claim.sector != n {
                abort!(
                    USR_ILLEGAL_ARGUMENT,
                    "claim {id} is of sector {}, not {n}",
                    claim.sector
                );
            }
            let space = spaces.entry(n).or_default();
            space.declared += claim.size.0;
            if keep {
                let last = claim.term_start + claim.term_max;
                if e.new_expiration > last {
                    abort!(
                        USR_FORBIDDEN,
                        "claim {id} only allows extension of sector {n} to {last}, not {}",
                        e.new_expiration
                    );
                }
                space.kept += claim.size.0;
            }
        }
    }
    Ok(spaces)
}

/// Extends sectors. Source: builtin-actors, actors/miner/src/lib.rs,
/// extend_sector_expiration_inner and extend_simple_qap_sector.
pub(super) fn extend(mut call: Call<'_>) -> Outcome {
    let p: ExtendSectorExpiration2Params = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    let (now, policy) = (call.epoch(), call.policy().clone());
    for e in &p.extensions {
        let spaces = claim_spaces(&call, m.id, e)?;
        let with_claims = e.sectors_with_claims.iter().map(|s| s.sector_number);
        let sectors: BTreeSet<u64> = e.sectors.iter().chain(with_claims).collect();
        let Some(part) = partition(&m, e.deadline, e.partition) else {
            abort!(
                USR_NOT_FOUND,
                "no deadline {} partition {}",
                e.deadline,
                e.partition
            );
        };
        let active = part.active();
        if !sectors.iter().all(|n| active.get(*n)) {
            abort!(
                USR_FORBIDDEN,
                "can only extend active sectors of the partition"
            );
        }
        if u64::try_from(sectors.len()).unwrap_or(u64::MAX) > policy.addressed_sectors_max {
            abort!(USR_ILLEGAL_ARGUMENT, "too many sectors for declaration");
        }
        for n in sectors {
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
            check_expiration(&policy, now, old.activation, e.new_expiration)?;
            let mut new = (*old).clone();
            // Weight is bytes times the time that is left.
            let (left, longer) = (old.expiration - now, e.new_expiration - now);
            let before = (old.expiration - old.power_base_epoch).max(1);
            new.deal_weight = if left > 0 {
                &old.deal_weight / before * longer
            } else {
                BigInt::default()
            };
            if old.verified_deal_weight != BigInt::default() {
                let Some(space) = spaces.get(&n).copied() else {
                    abort!(
                        USR_ILLEGAL_ARGUMENT,
                        "claim missing from declaration for sector {n}"
                    );
                };
                if BigInt::from(space.declared) != &old.verified_deal_weight / before {
                    abort!(
                        USR_ILLEGAL_ARGUMENT,
                        "declared claims of {} bytes do not match the verified data of sector {n}",
                        space.declared
                    );
                }
                if space.kept < space.declared && left > CLAIM_DROP_PERIOD {
                    abort!(
                        USR_FORBIDDEN,
                        "claims of sector {n} may be dropped in its last 30 days only"
                    );
                }
                new.verified_deal_weight = BigInt::from(space.kept) * longer;
            }
            new.power_base_epoch = now;
            new.expiration = e.new_expiration;
            m.sectors.insert(n, Arc::new(new));
        }
    }
    m.update_power();
    call.save(m);
    Ok(Vec::new())
}
