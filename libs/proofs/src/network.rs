//! What the network fixes for each sector size: proof numbers, parameters, tree shapes.

use filecoin_proofs::{PoRepConfig, PoStConfig};
use filecoin_proofs_api::{RegisteredPoStProof, RegisteredSealProof, RegisteredUpdateProof};
use lotus_types::{ActorId, SectorSize};

/// Calls `$f::<Tree>(...)` with the tree shape of a sector size.
macro_rules! with_tree {
    ($size:expr, $f:ident($($arg:expr),* $(,)?)) => {
        match $size {
            lotus_types::SectorSize::S2KiB
            | lotus_types::SectorSize::S8MiB
            | lotus_types::SectorSize::S512MiB => {
                $f::<filecoin_proofs::constants::SectorShapeBase>($($arg),*)
            }
            lotus_types::SectorSize::S32GiB => {
                $f::<filecoin_proofs::constants::SectorShapeSub8>($($arg),*)
            }
            lotus_types::SectorSize::S64GiB => {
                $f::<filecoin_proofs::constants::SectorShapeTop2>($($arg),*)
            }
        }
    };
}
pub(crate) use with_tree;

/// Position of a size in the network's proof enumerations, which list all five in order.
const fn rank(size: SectorSize) -> i64 {
    match size {
        SectorSize::S2KiB => 0,
        SectorSize::S8MiB => 1,
        SectorSize::S512MiB => 2,
        SectorSize::S32GiB => 3,
        SectorSize::S64GiB => 4,
    }
}

/// `RegisteredSealProof` of an interactive seal, version 1.1: 5 to 9.
/// Source: go-state-types, abi/sector.go.
#[must_use]
pub const fn seal_proof_type(size: SectorSize) -> i64 {
    5 + rank(size)
}

/// `RegisteredPoStProof` of a WindowPoSt, version 1.1 on chain (1.2 in the proof library):
/// 10 to 14. Source: go-state-types, abi/sector.go.
#[must_use]
pub const fn window_post_proof_type(size: SectorSize) -> i64 {
    10 + rank(size)
}

/// `RegisteredPoStProof` of a WinningPoSt: 0 to 4. Source: go-state-types, abi/sector.go.
#[must_use]
pub const fn winning_post_proof_type(size: SectorSize) -> i64 {
    rank(size)
}

/// `RegisteredUpdateProof`: 0 to 4. Source: go-state-types, abi/sector.go.
#[must_use]
pub const fn update_proof_type(size: SectorSize) -> i64 {
    rank(size)
}

/// Sectors of a WindowPoSt partition. Source: builtin-actors, `RegisteredPoStProof::
/// window_post_partitions_sector`, which must agree with the proof parameters.
#[must_use]
pub const fn window_post_partition_sectors(size: SectorSize) -> u64 {
    match size {
        SectorSize::S2KiB | SectorSize::S8MiB | SectorSize::S512MiB => 2,
        SectorSize::S32GiB => 2349,
        SectorSize::S64GiB => 2300,
    }
}

pub(crate) fn seal_config(size: SectorSize) -> PoRepConfig {
    match size {
        SectorSize::S2KiB => RegisteredSealProof::StackedDrg2KiBV1_1,
        SectorSize::S8MiB => RegisteredSealProof::StackedDrg8MiBV1_1,
        SectorSize::S512MiB => RegisteredSealProof::StackedDrg512MiBV1_1,
        SectorSize::S32GiB => RegisteredSealProof::StackedDrg32GiBV1_1,
        SectorSize::S64GiB => RegisteredSealProof::StackedDrg64GiBV1_1,
    }
    .as_v1_config()
}

pub(crate) fn update_config(size: SectorSize) -> PoRepConfig {
    match size {
        SectorSize::S2KiB => RegisteredUpdateProof::StackedDrg2KiBV1,
        SectorSize::S8MiB => RegisteredUpdateProof::StackedDrg8MiBV1,
        SectorSize::S512MiB => RegisteredUpdateProof::StackedDrg512MiBV1,
        SectorSize::S32GiB => RegisteredUpdateProof::StackedDrg32GiBV1,
        SectorSize::S64GiB => RegisteredUpdateProof::StackedDrg64GiBV1,
    }
    .as_v1_config()
}

pub(crate) fn window_config(size: SectorSize) -> PoStConfig {
    match size {
        SectorSize::S2KiB => RegisteredPoStProof::StackedDrgWindow2KiBV1_2,
        SectorSize::S8MiB => RegisteredPoStProof::StackedDrgWindow8MiBV1_2,
        SectorSize::S512MiB => RegisteredPoStProof::StackedDrgWindow512MiBV1_2,
        SectorSize::S32GiB => RegisteredPoStProof::StackedDrgWindow32GiBV1_2,
        SectorSize::S64GiB => RegisteredPoStProof::StackedDrgWindow64GiBV1_2,
    }
    .as_v1_config()
}

pub(crate) fn winning_config(size: SectorSize) -> PoStConfig {
    match size {
        SectorSize::S2KiB => RegisteredPoStProof::StackedDrgWinning2KiBV1,
        SectorSize::S8MiB => RegisteredPoStProof::StackedDrgWinning8MiBV1,
        SectorSize::S512MiB => RegisteredPoStProof::StackedDrgWinning512MiBV1,
        SectorSize::S32GiB => RegisteredPoStProof::StackedDrgWinning32GiBV1,
        SectorSize::S64GiB => RegisteredPoStProof::StackedDrgWinning64GiBV1,
    }
    .as_v1_config()
}

/// 32-byte nodes of a sector.
pub(crate) fn nodes(size: SectorSize) -> usize {
    usize::try_from(size.bytes() / 32).expect("sectors are proven on 64-bit machines")
}

/// Children of each inner node of the replica tree, from the leaves up. The trees of the large
/// sectors are several octal trees under a root of eight, and for 64 GiB under one more of two.
pub(crate) fn replica_arities(size: SectorSize) -> Vec<usize> {
    let top: &[usize] = match size {
        SectorSize::S2KiB | SectorSize::S8MiB | SectorSize::S512MiB => &[],
        SectorSize::S32GiB => &[8],
        SectorSize::S64GiB => &[8, 2],
    };
    let base_leaves = nodes(size) / top.iter().product::<usize>();
    let base_levels = base_leaves.trailing_zeros() as usize / 3;
    let mut arities = vec![8; base_levels];
    arities.extend_from_slice(top);
    arities
}

/// The prover id: the payload of the miner's ID address, which is the LEB128 of its number,
/// followed by zeros.
pub(crate) fn prover_id(miner: ActorId) -> [u8; 32] {
    let mut id = [0u8; 32];
    let payload = miner.address().payload_bytes();
    id[..payload.len()].copy_from_slice(&payload);
    id
}

#[cfg(test)]
mod tests {
    use super::*;
    use storage_proofs_core::merkle::{MerkleTreeTrait, compound_path_length};

    fn path_length<T: MerkleTreeTrait>(size: SectorSize) -> usize {
        compound_path_length::<T::Arity, T::SubTreeArity, T::TopTreeArity>(nodes(size))
    }

    #[test]
    fn shapes_and_numbers_are_those_of_the_library() {
        for size in SectorSize::ALL {
            let arities = replica_arities(size);
            assert_eq!(arities.iter().product::<usize>(), nodes(size), "{size}");
            assert_eq!(arities.len(), with_tree!(size, path_length(size)), "{size}");
            let porep_number =
                u64::from_le_bytes(seal_config(size).porep_id[..8].try_into().unwrap());
            assert_eq!(porep_number.cast_signed(), seal_proof_type(size));
            let window = window_config(size);
            assert_eq!(
                window.sector_count as u64,
                window_post_partition_sectors(size)
            );
            assert_eq!(u64::from(window.sector_size), size.bytes());
            assert_eq!(u64::from(winning_config(size).sector_size), size.bytes());
            assert_eq!(u64::from(update_config(size).sector_size), size.bytes());
        }
    }

    #[test]
    fn a_prover_id_is_the_payload_of_the_id_address() {
        assert_eq!(prover_id(ActorId(1000))[..3], [0xe8, 0x07, 0]);
        assert_eq!(prover_id(ActorId(u64::MAX))[9], 1);
    }
}
