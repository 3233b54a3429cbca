//! Merkle paths, recomputed from a leaf and its siblings at a position that the caller knows.

use filecoin_hashers::poseidon::{PoseidonDomain, PoseidonFunction, PoseidonHasher};
use merkletree::hash::Algorithm;
use storage_proofs_porep::stacked::Column;

use super::codec::{NODE, Nodes};
use crate::Refused;
use crate::commp::sha256::hash_pair;

/// The widest inner node of a replica tree.
const MAX_ARITY: usize = 8;

/// Siblings on the path of a leaf.
pub(crate) fn siblings(arities: &[usize]) -> usize {
    arities.iter().map(|a| a - 1).sum()
}

/// The root that `leaf` at `index` has with the siblings that `nodes` gives.
pub(crate) fn poseidon_root(
    leaf: PoseidonDomain,
    mut index: usize,
    arities: &[usize],
    nodes: &mut Nodes<'_>,
) -> Result<PoseidonDomain, Refused> {
    let mut node = leaf;
    for &arity in arities {
        let mut children = [PoseidonDomain::default(); MAX_ARITY];
        for (i, child) in children[..arity].iter_mut().enumerate() {
            *child = if i == index % arity {
                node
            } else {
                nodes.element("sibling")?
            };
        }
        node = PoseidonFunction::default().multi_node(&children[..arity], 0);
        index /= arity;
    }
    Ok(node)
}

/// The path of the leaf at `index` as the proof library has it: for each level the siblings that
/// `nodes` gives, and the place among them.
pub(crate) fn library_path(
    mut index: usize,
    arities: &[usize],
    nodes: &mut Nodes<'_>,
) -> Result<Vec<(Vec<PoseidonDomain>, usize)>, Refused> {
    let mut path = Vec::with_capacity(arities.len());
    for &arity in arities {
        let siblings = (1..arity).map(|_| nodes.element("sibling"));
        path.push((siblings.collect::<Result<_, _>>()?, index % arity));
        index /= arity;
    }
    Ok(path)
}

/// The root of a binary SHA-256 tree of 2^`levels` leaves.
pub(crate) fn sha256_root(
    leaf: [u8; NODE],
    mut index: usize,
    levels: u32,
    nodes: &mut Nodes<'_>,
) -> Result<[u8; NODE], Refused> {
    let mut node = leaf;
    for _ in 0..levels {
        let sibling = nodes.raw()?;
        node = if index.is_multiple_of(2) {
            hash_pair(&node, &sibling)
        } else {
            hash_pair(&sibling, &node)
        };
        index /= 2;
    }
    Ok(node)
}

/// The leaf of the column tree: the hash of a node's labels in every layer.
pub(crate) fn column_hash(labels: Vec<PoseidonDomain>) -> Result<PoseidonDomain, Refused> {
    Column::<PoseidonHasher>::new(0, labels)
        .map(|column| column.hash().into())
        .map_err(|e| Refused::Internal(format!("{e:#}")))
}

/// H(left, right).
pub(crate) fn hash2(left: PoseidonDomain, right: PoseidonDomain) -> PoseidonDomain {
    PoseidonFunction::default().multi_node(&[left, right], 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prove::put_path;
    use blstrs::Scalar;
    use generic_array::typenum::{U0, U2, U8};
    use merkletree::store::VecStore;
    use storage_proofs_core::merkle::{
        MerkleProof, MerkleProofTrait as _, MerkleTreeTrait, MerkleTreeWrapper,
    };

    type Store = VecStore<PoseidonDomain>;

    /// The shape of a 64 GiB sector, smaller: octal trees under eight under two.
    #[test]
    fn compound_trees_are_climbed_as_the_library_builds_them() {
        let base = |k: u64| {
            let leaves = (0..64).map(|i| Scalar::from(k * 64 + i + 1).into());
            MerkleTreeWrapper::<PoseidonHasher, Store, U8, U0, U0>::new(leaves).unwrap()
        };
        let tree = MerkleTreeWrapper::<PoseidonHasher, Store, U8, U8, U2>::from_sub_trees_as_trees(
            (0..16).map(base).collect(),
        )
        .unwrap();
        let arities = [8, 8, 8, 2];
        for leaf in [0, 1, 7, 8, 63, 64, 511, 512, 700, 1023] {
            let mut path = Vec::new();
            let theirs = tree.gen_proof(leaf).unwrap();
            put_path(&mut path, &theirs);
            assert_eq!(path.len(), siblings(&arities) * NODE);
            let climb = |index| {
                let own = Scalar::from(leaf as u64 + 1).into();
                poseidon_root(own, index, &arities, &mut Nodes::new(&path)).unwrap()
            };
            assert_eq!(climb(leaf), tree.root(), "leaf {leaf}");
            assert_ne!(climb(leaf ^ 1), tree.root(), "leaf {leaf}");
            assert_ne!(climb(leaf ^ 512), tree.root(), "leaf {leaf}");
            // And back: the library's own proof comes out of ours.
            let read = library_path(leaf, &arities, &mut Nodes::new(&path)).unwrap();
            let ours: MerkleProof<PoseidonHasher, U8, U8, U2> =
                MerkleProof::from_parts(theirs.leaf(), theirs.root(), read);
            let bytes = |p| bincode::serialize(p).unwrap();
            assert_eq!(bytes(&ours), bytes(&theirs), "leaf {leaf}");
        }
    }
}
