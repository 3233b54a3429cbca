//! The verified registry and the DataCap token: allocations for clients.

use lotus_actors::datacap::{TRANSFER, TransferParams, TransferReturn, UNITS_PER_BYTE};
use lotus_actors::market::is_piece_cid;
use lotus_actors::verifreg::{
    ADD_VERIFIED_CLIENT, ADD_VERIFIER, Allocation, AllocationRequest, AllocationRequests,
    AllocationsResponse, REMOVE_EXPIRED_ALLOCATIONS, RemoveExpiredAllocationsParams,
    RemoveExpiredAllocationsReturn, VerifierParams,
};
use lotus_actors::{BatchReturn, BigInt, ExitCode, RawBytes, actors, decode, encode};
use lotus_types::TokenAmount;
use num_traits::ToPrimitive;

use super::{Abort, Call, Outcome, abort, unhandled};

/// Allocations in one message.
const ALLOCATIONS_MAX: usize = 1_024;

pub(super) fn verifreg(call: Call<'_>, method: u64) -> Outcome {
    match method {
        // On the devnet everyone is a verifier: DataCap is as free as its FIL.
        ADD_VERIFIER => Ok(Vec::new()),
        ADD_VERIFIED_CLIENT => add_client(call),
        REMOVE_EXPIRED_ALLOCATIONS => remove_expired(call),
        other => unhandled(other),
    }
}

fn add_client(call: Call<'_>) -> Outcome {
    let p: VerifierParams = call.params()?;
    let (Some(id), Some(bytes)) = (call.state.lookup(&p.address), p.allowance.to_u64()) else {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "client is not on the chain, or allowance is out of range"
        );
    };
    if bytes < call.policy().allocation_size_min {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "allowance {bytes} is below the minimum allocation"
        );
    }
    let cap = call.state.registry.edit().datacap.entry(id).or_default();
    *cap = cap.saturating_add(bytes);
    Ok(Vec::new())
}

pub(super) fn datacap(call: Call<'_>, method: u64) -> Outcome {
    if method != TRANSFER {
        return unhandled(method);
    }
    let p: TransferParams = call.params()?;
    if call.state.lookup(&p.to) != Some(actors::VERIFREG.0) {
        abort!(
            USR_FORBIDDEN,
            "DataCap may be sent to the verified registry only"
        );
    }
    let requests: AllocationRequests = match decode(p.operator_data.bytes()) {
        Ok(r) => r,
        Err(e) => abort!(USR_ILLEGAL_ARGUMENT, "operator data: {e}"),
    };
    if !requests.extensions.is_empty() || requests.allocations.len() > ALLOCATIONS_MAX {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "claim extensions or too many allocations"
        );
    }
    let mut bytes = 0u64;
    for r in &requests.allocations {
        check(&call, r)?;
        bytes = bytes.saturating_add(r.size.0);
    }
    if p.amount != TokenAmount::from_atto(BigInt::from(bytes) * UNITS_PER_BYTE) {
        abort!(
            USR_ILLEGAL_ARGUMENT,
            "{} tokens sent for allocations of {bytes} bytes",
            p.amount
        );
    }
    let caller = call.caller;
    let held = call
        .state
        .registry
        .datacap
        .get(&caller)
        .copied()
        .unwrap_or(0);
    let Some(left) = held.checked_sub(bytes) else {
        abort!(
            USR_INSUFFICIENT_FUNDS,
            "client t0{caller} has DataCap for {held} bytes"
        );
    };
    let registry = call.state.registry.edit();
    registry.datacap.insert(caller, left);
    let mut new = Vec::new();
    for r in requests.allocations {
        registry.last_allocation += 1;
        let id = registry.last_allocation;
        registry.allocations.insert(
            (caller, id),
            Allocation {
                client: caller,
                provider: r.provider,
                data: r.data,
                size: r.size,
                term_min: r.term_min,
                term_max: r.term_max,
                expiration: r.expiration,
            },
        );
        new.push(id);
    }
    let response = AllocationsResponse {
        allocation_results: BatchReturn::ok(u32::try_from(new.len()).unwrap_or(u32::MAX)),
        extension_results: BatchReturn::empty(),
        new_allocations: new,
    };
    let units = |bytes: u64| TokenAmount::from_atto(BigInt::from(bytes) * UNITS_PER_BYTE);
    Ok(encode(&TransferReturn {
        from_balance: units(left),
        to_balance: TokenAmount::default(),
        recipient_data: RawBytes::new(encode(&response)),
    }))
}

/// Source: builtin-actors, actors/verifreg/src/lib.rs, validate_new_allocation.
fn check(call: &Call<'_>, r: &AllocationRequest) -> Result<(), Abort> {
    let (policy, now) = (call.policy(), call.epoch());
    let checks = [
        (
            call.state.miners.contains_key(&r.provider),
            "allocation provider is no miner",
        ),
        (is_piece_cid(&r.data), "allocation data is no piece"),
        (
            r.size.validate().is_ok(),
            "allocation size is no padded piece size",
        ),
        (
            r.size.0 >= policy.allocation_size_min,
            "allocation size below minimum",
        ),
        (
            r.term_min >= policy.allocation_term_min,
            "allocation term min below limit",
        ),
        (
            r.term_max <= policy.allocation_term_max,
            "allocation term max above limit",
        ),
        (
            r.term_min <= r.term_max,
            "allocation term min exceeds term max",
        ),
        (r.expiration >= now, "allocation expiration is in the past"),
        (
            r.expiration <= now + policy.allocation_expiration_max,
            "allocation expiration exceeds maximum",
        ),
    ];
    if let Some((_, why)) = checks.iter().find(|(ok, _)| !ok) {
        abort!(USR_ILLEGAL_ARGUMENT, "{why}");
    }
    Ok(())
}

fn remove_expired(call: Call<'_>) -> Outcome {
    let p: RemoveExpiredAllocationsParams = call.params()?;
    let now = call.epoch();
    let registry = call.state.registry.edit();
    let considered: Vec<u64> = if p.allocation_ids.is_empty() {
        let all = registry
            .allocations
            .range((p.client, 0)..=(p.client, u64::MAX));
        all.filter(|(_, a)| a.expiration < now)
            .map(|((_, id), _)| *id)
            .collect()
    } else {
        p.allocation_ids
    };
    let mut bytes = 0;
    let mut codes = Vec::new();
    for id in &considered {
        let key = (p.client, *id);
        codes.push(match registry.allocations.get(&key) {
            None => ExitCode::USR_NOT_FOUND,
            Some(a) if a.expiration >= now => ExitCode::USR_FORBIDDEN,
            Some(a) => {
                bytes += a.size.0;
                registry.allocations.remove(&key);
                ExitCode::OK
            }
        });
    }
    *registry.datacap.entry(p.client).or_default() += bytes;
    Ok(encode(&RemoveExpiredAllocationsReturn {
        considered,
        results: BatchReturn::of(&codes),
        datacap_recovered: BigInt::from(bytes),
    }))
}
