//! Actor message parameters, method numbers and exit codes: the owner of `fil_actor_*_state`.
//!
//! Parameters are the types of network version 28 (actors version 18), the newest version that
//! has verified allocations; their wire forms did not change in version 19. They encode as CBOR
//! tuples with [`encode`] and [`decode`]. The rest is what both sides of a chain must compute
//! alike: randomness ([`draw_randomness`]), tickets and elections ([`win_count`]), exit codes
//! ([`exit_name`]).

pub mod datacap;
mod election;
mod exit;
pub mod market;
pub mod miner;
pub mod power;
mod randomness;
pub mod verifreg;

pub use cid::Cid;
pub use election::{EXPECTED_LEADERS, MAX_WIN_COUNT, win_count};
pub use exit::{exit_kind, exit_name};
pub use fil_actors_shared::v18::reward::FilterEstimate;
pub use fil_actors_shared::v18::{BatchReturn, FailCode};
pub use fvm_ipld_bitfield::BitField;
pub use fvm_ipld_encoding::{BytesDe, RawBytes};
pub use fvm_shared::bigint::BigInt;
pub use fvm_shared::error::ExitCode;
pub use fvm_shared::piece::PaddedPieceSize;
pub use fvm_shared::randomness::Randomness;
pub use fvm_shared::sector::{
    PoStProof, RegisteredAggregateProof, RegisteredPoStProof, RegisteredSealProof,
    RegisteredUpdateProof,
};
pub use randomness::{
    Dst, address_entropy, draw_randomness, draw_randomness_from_digest, post_randomness,
    ticket_digest,
};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The network version whose actors this crate describes.
pub const NETWORK_VERSION: u32 = 28;

/// A plain transfer of value, without parameters.
pub const METHOD_SEND: u64 = 0;

/// The actors that every chain has.
pub mod actors {
    use lotus_types::ActorId;

    /// Sends the implicit messages: rewards and cron.
    pub const SYSTEM: ActorId = ActorId(0);
    /// Assigns actor ids to addresses.
    pub const INIT: ActorId = ActorId(1);
    /// Pays block rewards.
    pub const REWARD: ActorId = ActorId(2);
    /// Runs the end of every epoch.
    pub const CRON: ActorId = ActorId(3);
    /// Counts power; creates miners.
    pub const POWER: ActorId = ActorId(4);
    /// The storage market: escrow and deals.
    pub const MARKET: ActorId = ActorId(5);
    /// The verified registry: allocations and claims.
    pub const VERIFREG: ActorId = ActorId(6);
    /// The DataCap token.
    pub const DATACAP: ActorId = ActorId(7);
    /// Where burnt funds go.
    pub const BURNT_FUNDS: ActorId = ActorId(99);
}

/// Bytes that are not the CBOR form of the expected type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not the CBOR of a {expected}: {why}")]
pub struct BadParams {
    /// The Rust name of the expected type.
    pub expected: &'static str,
    /// The decoder's words.
    pub why: String,
}

impl BadParams {
    /// The input is wrong.
    #[must_use]
    pub const fn kind(&self) -> lotus_types::Kind {
        lotus_types::Kind::Data
    }

    /// What to do.
    #[must_use]
    pub fn fix(&self) -> String {
        "encode the parameters of the method that the message calls".into()
    }
}

/// The CBOR form of message parameters or return values.
#[must_use]
pub fn encode<T: Serialize>(params: &T) -> Vec<u8> {
    fvm_ipld_encoding::to_vec(params).expect("parameter types always encode")
}

/// Reads what [`encode`] wrote.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, BadParams> {
    fvm_ipld_encoding::from_slice(bytes).map_err(|e| BadParams {
        expected: std::any::type_name::<T>(),
        why: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn params_encode_as_tuples() {
        let p = miner::DeclareFaultsParams {
            faults: vec![miner::FaultDeclaration {
                deadline: 3,
                partition: 1,
                sectors: BitField::try_from_bits([7u64]).unwrap(),
            }],
        };
        let bytes = encode(&p);
        // [[ [3, 1, bitfield] ]]: one field, one element, three fields.
        assert_eq!(&bytes[..5], &[0x81, 0x81, 0x83, 0x03, 0x01]);
        let back: miner::DeclareFaultsParams = decode(&bytes).unwrap();
        assert!(back.faults[0].sectors.get(7));
        assert_eq!(back.faults[0].deadline, 3);
        assert!(decode::<miner::DeclareFaultsParams>(&bytes[1..]).is_err());
        assert!(decode::<miner::DeclareFaultsParams>(&[]).is_err());
    }

    #[test]
    fn damaged_params_never_panic() {
        let good = encode(&miner::SubmitWindowedPoStParams {
            deadline: 1,
            partitions: vec![],
            proofs: vec![],
            chain_commit_epoch: 5,
            chain_commit_rand: Randomness(vec![1; 32]),
        });
        for i in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[i] ^= 1 << bit;
                drop(decode::<miner::SubmitWindowedPoStParams>(&bad));
            }
        }
    }
}
