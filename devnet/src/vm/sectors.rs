//! Onboarding: pre-commit, prove-commit, and the assignment of sectors to deadlines.

use std::sync::Arc;

use fvm_ipld_bitfield::BitField;
use lotus_actors::miner::{
    PieceActivationManifest, PreCommitSectorBatchParams2, ProveCommitSectors3Params,
    ProveCommitSectors3Return, SectorOnChainInfo, SectorOnChainInfoFlags,
    SectorPreCommitOnChainInfo, is_sealed_sector, is_unsealed_sector, qa_power_for_weight,
};
use lotus_actors::verifreg::Claim;
use lotus_actors::{BatchReturn, BigInt, Cid, ExitCode, actors, encode};
use lotus_proofs::SealInputs;
use lotus_types::{Commitment, PaddedSize, PieceCid, PieceInfo, SectorSize, TokenAmount};

use super::account::repay_or_abort;
use super::{Abort, Call, Economy, Outcome, abort, market, seals};
use crate::policy::Policy;
use crate::state::{Deadline, Miner, Partition, bits};

/// Source: builtin-actors, policy_constants::MAX_SECTOR_NUMBER.
const MAX_SECTOR_NUMBER: u64 = i64::MAX.cast_unsigned();
/// Receivers that reject a notification. Source: builtin-actors, actors/miner/src/lib.rs.
const ERR_NOTIFICATION_REJECTED: ExitCode = ExitCode::new(1004);
/// Pieces of one sector that a message may name.
const PIECES_MAX: usize = 4_096;

pub(super) fn pre_commit(mut call: Call<'_>) -> Outcome {
    let p: PreCommitSectorBatchParams2 = call.params()?;
    let now = call.epoch();
    let policy = call.policy().clone();
    if p.sectors.is_empty() {
        abort!(USR_ILLEGAL_ARGUMENT, "batch empty");
    }
    let mut m = call.miner()?;
    let earliest = now - policy.pre_commit_randomness_lookback;
    let mut numbers = BitField::new();
    for s in &p.sectors {
        let n = s.sector_number;
        if n > MAX_SECTOR_NUMBER {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "sector number {n} out of range 0..(2^63-1)"
            );
        }
        if numbers.get(n) {
            abort!(USR_ILLEGAL_ARGUMENT, "duplicate sector number {n}");
        }
        numbers.set(n);
        if !is_sealed_sector(&s.sealed_cid) {
            abort!(USR_ILLEGAL_ARGUMENT, "sealed CID had wrong prefix");
        }
        let ticket = s.seal_rand_epoch;
        if ticket >= now {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "seal challenge epoch {ticket} must be before now {now}"
            );
        }
        if ticket < earliest {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "seal challenge epoch {ticket} too old, must be after {earliest}"
            );
        }
        if s.unsealed_cid
            .0
            .as_ref()
            .is_some_and(|c| !is_unsealed_sector(c))
        {
            abort!(USR_ILLEGAL_ARGUMENT, "unsealed CID had wrong prefix");
        }
        let activation = now + policy.prove_commit_limit();
        check_expiration(&policy, now, activation, s.expiration)?;
        if !s.deal_ids.is_empty() {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "deals are activated by ProveCommitSectors3, not by deal ids in a pre-commit"
            );
        }
    }
    let available = m.available(&call.state.balance(m.id));
    repay_or_abort(&mut call, &mut m)?;
    call.operators_only(&m)?;
    let deposit = Economy::of(call.state, &policy).pre_commit_deposit(m.fvm_size());
    for info in p.sectors {
        let proof = i64::from(info.seal_proof);
        if proof != lotus_proofs::seal_proof_type(m.size) {
            abort!(USR_ILLEGAL_ARGUMENT, "unsupported seal proof type {proof}");
        }
        m.deposits += &deposit;
        m.pre_commits.insert(
            info.sector_number,
            Arc::new(SectorPreCommitOnChainInfo {
                info,
                pre_commit_deposit: deposit.clone(),
                pre_commit_epoch: now,
            }),
        );
    }
    let total = deposit * numbers.len();
    if available < total {
        abort!(
            USR_INSUFFICIENT_FUNDS,
            "insufficient funds {available} for pre-commit deposit: {total}"
        );
    }
    let taken = &m.allocated & &numbers;
    if !taken.is_empty() {
        let taken: Vec<_> = taken.iter().collect();
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "sector numbers {taken:?} already allocated"
        );
    }
    m.allocated |= &numbers;
    call.save(m);
    Ok(Vec::new())
}

/// Source: builtin-actors, actors/miner/src/lib.rs, validate_expiration.
pub(super) fn check_expiration(
    policy: &Policy,
    now: i64,
    activation: i64,
    expiration: i64,
) -> Result<(), Abort> {
    if expiration <= activation {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "sector expiration {expiration} must be after activation {activation}"
        );
    }
    if expiration - activation < policy.sector_lifetime_min {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "invalid expiration {expiration}, total sector lifetime ({}) must exceed {} after \
             activation {activation}",
            expiration - activation,
            policy.sector_lifetime_min
        );
    }
    if expiration > now + policy.sector_extension_max {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "invalid expiration {expiration}, cannot be more than {} past current epoch {now}",
            policy.sector_extension_max
        );
    }
    if expiration - activation > policy.sector_lifetime_max {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "invalid expiration {expiration}, total sector lifetime ({}) cannot exceed {}",
            expiration - activation,
            policy.sector_lifetime_max
        );
    }
    Ok(())
}

/// Collects the verdict on each item of a batch.
pub(super) struct Verdicts {
    codes: Vec<ExitCode>,
    all_or_nothing: bool,
}

impl Verdicts {
    pub(super) fn new(all_or_nothing: bool) -> Self {
        Self {
            codes: Vec::new(),
            all_or_nothing,
        }
    }

    pub(super) fn push(&mut self, outcome: Result<(), Abort>) -> Result<(), Abort> {
        match outcome {
            Ok(()) => self.codes.push(ExitCode::OK),
            Err(a) if self.all_or_nothing => {
                abort!(
                    USR_ILLEGAL_ARGUMENT,
                    "{} while requiring activation success",
                    a.message
                )
            }
            Err(a) => {
                tracing::info!(code = %a.code, why = a.message, "sector of a batch refused");
                self.codes.push(a.code);
            }
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<BatchReturn, Abort> {
        if !self.codes.iter().any(|c| c.is_success()) {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "no sector of the batch is valid: {:?}",
                self.codes
            );
        }
        Ok(BatchReturn::of(&self.codes))
    }
}

pub(super) fn prove_commit(mut call: Call<'_>) -> Outcome {
    let p: ProveCommitSectors3Params = call.params()?;
    let mut m = call.miner()?;
    call.operators_only(&m)?;
    let mut loaded = Vec::new();
    let mut numbers = BitField::new();
    for a in &p.sector_activations {
        let n = a.sector_number;
        match m.pre_commits.get(&n) {
            Some(pc) if !numbers.get(n) => loaded.push(pc.clone()),
            Some(_) => abort!(USR_ILLEGAL_ARGUMENT, "duplicate sector {n}"),
            None => abort!(USR_NOT_FOUND, "loading precommits: sector {n} not found"),
        }
        numbers.set(n);
    }
    if loaded.is_empty() {
        abort!(USR_ILLEGAL_ARGUMENT, "no sectors to prove");
    }
    seals::check_form(call.policy(), &p)?;
    let delay = call.policy().pre_commit_challenge_delay;
    if loaded
        .iter()
        .any(|pc| call.epoch() <= pc.pre_commit_epoch + delay)
    {
        abort!(USR_FORBIDDEN, "too early to prove sector");
    }
    let proofs = seals::proofs(&call, &m, &p, &loaded)?;
    let mut verdicts = Verdicts::new(p.require_activation_success);
    let mut notices = Vec::new();
    for (at, (a, pc)) in p.sector_activations.iter().zip(&loaded).enumerate() {
        let outcome = activate(&mut call, &mut m, pc, &a.pieces, |call, m, seal| {
            proofs.check(at, call, m, seal)
        });
        if outcome.is_ok() {
            notices.push((a.sector_number, pc.info.expiration, a.pieces.as_slice()));
        }
        // commD that does not match its pieces fails the whole message, as on the network.
        if let Err(e) = &outcome
            && e.message.starts_with(COMMD_MISMATCH)
        {
            return Err(e.clone());
        }
        verdicts.push(outcome)?;
    }
    let batch = verdicts.finish()?;
    let unlocked = m.unlocked(&call.state.balance(m.id));
    if unlocked.is_negative() {
        abort!(
            USR_INSUFFICIENT_FUNDS,
            "insufficient funds for aggregate initial pledge requirement: short of {}",
            -unlocked
        );
    }
    let new = bits(notices.iter().map(|(n, ..)| *n));
    assign(&mut m, call.policy(), call.env.epoch, &new)?;
    call.save(m);
    notify(&mut call, &notices, p.require_notification_success)?;
    Ok(encode(&ProveCommitSectors3Return {
        activation_results: batch,
    }))
}

const COMMD_MISMATCH: &str = "unsealed CID does not match pieces";

/// Checks one sector's proof and data and makes it a sector; changes nothing if it refuses.
fn activate(
    call: &mut Call<'_>,
    m: &mut Miner,
    pc: &SectorPreCommitOnChainInfo,
    pieces: &[PieceActivationManifest],
    check: impl FnOnce(&Call<'_>, &Miner, &SealInputs) -> Result<(), Abort>,
) -> Result<(), Abort> {
    let now = call.epoch();
    let n = pc.info.sector_number;
    let due = pc.pre_commit_epoch + call.policy().prove_commit_limit();
    if now > due {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "too late to prove sector {n} at {now}, due {due}"
        );
    }
    let seal = seals::inputs(call, pc)?;
    check(call, m, &seal)?;
    if data_commitment(m.size, pieces)? != seal.commitments.comm_d {
        abort!(USR_ILLEGAL_ARGUMENT, "{COMMD_MISMATCH} of sector {n}");
    }
    let duration = pc.info.expiration - now;
    if duration < call.policy().sector_lifetime_min {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "sector {n} has lifetime {duration} less than minimum"
        );
    }
    let verified = claim(call, m.id, n, pc.info.expiration, pieces)?;
    let occupied: u64 = pieces.iter().map(|p| p.size.0).sum();
    let weight = |bytes: u64| BigInt::from(bytes) * duration;
    let power = qa_power_for_weight(m.fvm_size(), duration, &weight(verified));
    let pledge = Economy::of(call.state, call.policy()).pledge(&power);
    m.deposits -= &pc.pre_commit_deposit;
    m.pledge += &pledge;
    m.pre_commits.remove(&n);
    m.sectors.insert(
        n,
        Arc::new(SectorOnChainInfo {
            sector_number: n,
            seal_proof: pc.info.seal_proof,
            sealed_cid: pc.info.sealed_cid,
            activation: now,
            expiration: pc.info.expiration,
            deal_weight: weight(occupied - verified),
            verified_deal_weight: weight(verified),
            initial_pledge: pledge,
            power_base_epoch: now,
            flags: SectorOnChainInfoFlags::SIMPLE_QA_POWER,
            ..SectorOnChainInfo::default()
        }),
    );
    Ok(())
}

/// commD of a sector that holds these pieces, in order, zero pieces filling the gaps.
pub(super) fn data_commitment(
    size: SectorSize,
    pieces: &[PieceActivationManifest],
) -> Result<Commitment, Abort> {
    if pieces.len() > PIECES_MAX {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "{} pieces in one sector",
            pieces.len()
        );
    }
    let mut infos = Vec::new();
    for p in pieces {
        let (Ok(cid), Ok(padded)) = (piece_cid(&p.cid), PaddedSize::new(p.size.0)) else {
            abort!(
                USR_ILLEGAL_ARGUMENT,
                "piece {} of {} bytes is invalid",
                p.cid,
                p.size.0
            );
        };
        infos.push(PieceInfo {
            cid,
            size: padded,
            raw_size: padded.unpadded().get(),
        });
    }
    let comm_d =
        lotus_proofs::layout(size, &infos).and_then(|layout| lotus_proofs::comm_d(size, &layout));
    match comm_d {
        Ok(c) => Ok(c),
        Err(e) => abort!(USR_ILLEGAL_ARGUMENT, "pieces do not make a sector: {e}"),
    }
}

fn piece_cid(cid: &Cid) -> Result<PieceCid, lotus_types::BadPieceCid> {
    Commitment::from_unsealed_cid(cid).map(PieceCid::new)
}

/// Turns a sector's allocations into claims; returns the bytes claimed. Source: builtin-actors,
/// actors/verifreg/src/lib.rs, can_claim_alloc.
pub(super) fn claim(
    call: &mut Call<'_>,
    provider: u64,
    sector: u64,
    expiration: i64,
    pieces: &[PieceActivationManifest],
) -> Result<u64, Abort> {
    let now = call.epoch();
    let mut claims = Vec::new();
    for p in pieces {
        let Some(key) = &p.verified_allocation_key else {
            continue;
        };
        let key = (key.client, key.id);
        let Some(a) = call.state.registry.allocations.get(&key) else {
            abort!(
                USR_NOT_FOUND,
                "no allocation {} for client t0{}",
                key.1,
                key.0
            );
        };
        let left = expiration - now;
        let twice = claims.iter().any(|(k, _)| *k == key);
        let fits = a.provider == provider
            && a.data == p.cid
            && a.size == p.size
            && now <= a.expiration
            && (a.term_min..=a.term_max).contains(&left)
            && !twice;
        if !fits {
            abort!(
                USR_FORBIDDEN,
                "failed to claim allocation {} in sector {sector} expiry {expiration}",
                key.1
            );
        }
        claims.push((
            key,
            Claim {
                provider,
                client: a.client,
                data: a.data,
                size: a.size,
                term_min: a.term_min,
                term_max: a.term_max,
                term_start: now,
                sector,
            },
        ));
    }
    let mut bytes = 0;
    for (key, claim) in claims {
        bytes += claim.size.0;
        let registry = call.state.registry.edit();
        registry.allocations.remove(&key);
        registry.claims.insert((provider, key.1), claim);
    }
    Ok(bytes)
}

/// Tells data consumers what new sectors hold.
pub(super) fn notify(
    call: &mut Call<'_>,
    sectors: &[(u64, i64, &[PieceActivationManifest])],
    must_accept: bool,
) -> Result<(), Abort> {
    for (number, expiration, pieces) in sectors {
        for piece in *pieces {
            for n in &piece.notify {
                let to_market = call.state.lookup(&n.address) == Some(actors::MARKET.0);
                let accepted = to_market
                    && market::stored(call, *number, *expiration, piece, n.payload.bytes());
                if !accepted && must_accept {
                    return Err(Abort {
                        code: ERR_NOTIFICATION_REJECTED,
                        message: format!("{} rejected piece {}", n.address, piece.cid),
                    });
                }
            }
        }
    }
    Ok(())
}

/// Puts new sectors into deadlines: into the emptiest, but first into partitions that are begun,
/// and never into the deadline that is open or opens next. Source: builtin-actors,
/// actors/miner/src/deadline_assignment.rs.
fn assign(m: &mut Miner, policy: &Policy, now: i64, new: &BitField) -> Result<(), Abort> {
    let fill = Policy::partition_sectors(m.size);
    let offset = m.period_offset;
    for n in new.iter() {
        let rank = |i: u64, d: &Deadline| {
            let (live, total) = (d.live_count(), d.total_count());
            let full = total.is_multiple_of(fill);
            (
                (live + 1).div_ceil(fill),
                (total + 1).div_ceil(fill),
                full,
                if full { 0 } else { u64::MAX - total },
                live,
                i,
            )
        };
        let best = (0u64..)
            .zip(&m.deadlines)
            .filter(|(i, d)| {
                policy.is_mutable(offset, *i, now)
                    && d.total_count() < fill * policy.partitions_per_deadline_max
            })
            .min_by_key(|(i, d)| rank(*i, d))
            .map(|(i, _)| i);
        let Some(d) = best.and_then(|i| m.deadlines.get_mut(usize::try_from(i).ok()?)) else {
            abort!(
                USR_ILLEGAL_STATE,
                "max partitions limit reached for all deadlines"
            );
        };
        let part = place(d, fill);
        part.sectors.set(n);
        part.unproven.set(n);
    }
    Ok(())
}

/// The partition that takes the next sector of a deadline: its last, or a new one if that is full.
pub(super) fn place(d: &mut Deadline, fill: u64) -> &mut Partition {
    let last = d.partitions.pop_if(|p| p.sectors.len() < fill);
    d.partitions.push(last.unwrap_or_default());
    let at = d.partitions.len() - 1;
    &mut d.partitions[at]
}

/// The sum of pledges of these sectors, attoFIL.
pub(super) fn pledge_of(m: &Miner, sectors: &BitField) -> TokenAmount {
    let mut sum = TokenAmount::default();
    for info in sectors.iter().filter_map(|n| m.sectors.get(&n)) {
        sum += &info.initial_pledge;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_spread_over_deadlines_and_fill_partitions() {
        let policy = Policy::fast();
        let mut m = Miner::new(1000, 1, 1, SectorSize::S2KiB, &policy);
        m.period_offset = 0;
        // At epoch 45 deadlines 2 and 3 are immutable.
        assign(&mut m, &policy, 45, &bits(0..10)).unwrap();
        let fill: Vec<_> = m.deadlines.iter().map(Deadline::total_count).collect();
        assert_eq!(fill.iter().sum::<u64>(), 10);
        assert_eq!((fill[2], fill[3]), (0, 0));
        assert!(
            m.deadlines
                .iter()
                .all(|d| d.partitions.iter().all(|p| p.sectors.len() <= 2))
        );
        // A begun partition is filled before another deadline is opened.
        assert!(fill.iter().filter(|n| **n == 1).count() <= 1, "{fill:?}");
    }

    #[test]
    fn expirations_are_bounded() {
        let p = Policy::devnet_2k();
        for (activation, expiration, ok) in [
            (100, 100, false),
            (100, 100 + p.sector_lifetime_min - 1, false),
            (100, 100 + p.sector_lifetime_min, true),
            (100, 50 + p.sector_extension_max, true),
            (100, 51 + p.sector_extension_max, false),
        ] {
            let got = check_expiration(&p, 50, activation, expiration);
            assert_eq!(got.is_ok(), ok, "{activation} {expiration}");
        }
    }
}
