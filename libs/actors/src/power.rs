//! The power actor: creating miners.

use fvm_ipld_encoding::tuple::{Deserialize_tuple, Serialize_tuple};
use fvm_ipld_encoding::{BytesDe, strict_bytes};
use fvm_shared::address::Address;
use fvm_shared::sector::RegisteredPoStProof;

/// Makes a miner actor.
pub const CREATE_MINER: u64 = 2;

/// Parameters of [`CREATE_MINER`]. Source: builtin-actors, actors/power/src/types.rs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize_tuple, Deserialize_tuple)]
pub struct CreateMinerParams {
    /// Owns the miner's funds.
    pub owner: Address,
    /// Signs blocks and messages: a BLS key.
    pub worker: Address,
    /// Fixes the sector size.
    pub window_post_proof_type: RegisteredPoStProof,
    /// The libp2p peer id that clients dial.
    #[serde(with = "strict_bytes")]
    pub peer: Vec<u8>,
    /// The multiaddresses that clients dial.
    pub multiaddrs: Vec<BytesDe>,
}

/// What [`CREATE_MINER`] returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize_tuple, Deserialize_tuple)]
pub struct CreateMinerReturn {
    /// The short address: `t01234`.
    pub id_address: Address,
    /// The address that survives a reorg: `t2…`.
    pub robust_address: Address,
}
