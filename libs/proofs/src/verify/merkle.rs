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
        node = if index % 2 == 0 {
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
