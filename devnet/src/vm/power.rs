//! The power actor: making miners.

use fvm_shared::sector::SectorSize as FvmSize;
use lotus_actors::power::{CREATE_MINER, CreateMinerParams, CreateMinerReturn};
use lotus_actors::{Cid, encode};
use lotus_types::{Address, SectorSize};

use super::{Call, Outcome, abort, unhandled};
use crate::policy::Policy;
use crate::state::{ActorKind, Miner, State};

pub(super) fn method(mut call: Call<'_>, method: u64) -> Outcome {
    if method != CREATE_MINER {
        return unhandled(method);
    }
    let p: CreateMinerParams = call.params()?;
    let size = match p.window_post_proof_type.sector_size() {
        Ok(FvmSize::_2KiB) => SectorSize::S2KiB,
        Ok(FvmSize::_8MiB) => SectorSize::S8MiB,
        Ok(FvmSize::_512MiB) => SectorSize::S512MiB,
        Ok(FvmSize::_32GiB) => SectorSize::S32GiB,
        Ok(FvmSize::_64GiB) => SectorSize::S64GiB,
        Err(e) => abort!(USR_ILLEGAL_ARGUMENT, "{e}"),
    };
    if i64::from(p.window_post_proof_type) != lotus_proofs::window_post_proof_type(size) {
        abort!(USR_ILLEGAL_ARGUMENT, "proof type is no WindowPoSt type");
    }
    let (Some(owner), Some(worker)) = (call.state.lookup(&p.owner), call.state.lookup(&p.worker))
    else {
        abort!(USR_ILLEGAL_ARGUMENT, "owner or worker is not on the chain");
    };
    if !super::account::is_bls_account(call.state, worker) {
        abort!(USR_ILLEGAL_ARGUMENT, "worker {} is not a BLS key", p.worker);
    }
    let policy = call.policy().clone();
    let id = create_miner(call.state, &policy, owner, worker, size);
    if let Some(m) = call.state.miners.get_mut(&id) {
        let m = m.edit();
        m.peer_id = p.peer;
        m.multiaddrs = p.multiaddrs.into_iter().map(|a| a.0.into()).collect();
    }
    let value = call.value.clone();
    call.pay(id, &value)?;
    let robust = call.state.account(id).and_then(|a| a.address);
    let id_address = Address::new_id(id);
    Ok(encode(&CreateMinerReturn {
        id_address,
        robust_address: robust.unwrap_or(id_address),
    }))
}

/// Makes a miner actor without sectors.
pub fn create_miner(
    state: &mut State,
    policy: &Policy,
    owner: u64,
    worker: u64,
    size: SectorSize,
) -> u64 {
    // Robust addresses hash the creating message; the next id is as unique.
    let next = state.accounts.next_id;
    let robust = Address::new_actor(&[b"miner".as_slice(), &next.to_be_bytes()].concat());
    let id = state.create(ActorKind::Miner, robust);
    state
        .miners
        .insert(id, Miner::new(id, owner, worker, size, policy).into());
    id
}

/// The code CID of a kind of actor: the devnet hashes a name, because it runs no Wasm.
#[must_use]
pub(crate) fn code_cid(kind: ActorKind) -> Cid {
    let name = match kind {
        ActorKind::Account => "fil/18/account",
        ActorKind::Miner => "fil/18/storageminer",
        ActorKind::Singleton => "fil/18/system",
    };
    lotus_node_client::api::cbor_cid(name.as_bytes())
}
