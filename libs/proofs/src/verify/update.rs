//! Replica updates: new data encoded over the replica of an empty sector.

use blstrs::Scalar;
use filecoin_hashers::poseidon::PoseidonDomain;
use filecoin_hashers::sha256::Sha256Domain;
use lotus_types::{ActorId, Commitment, SectorSize};
use storage_proofs_update::constants::{h_default, partition_count};
use storage_proofs_update::{Challenges, phi, rho};

use super::codec::{Header, NODE, ProofKind, element};
use super::merkle::{hash2, poseidon_root, sha256_root, siblings};
use crate::network::{nodes, replica_arities};
use crate::{Check, Refused};

/// Everything that an update proof is about.
pub(crate) struct UpdateStatement {
    pub(crate) header: Header,
    /// The challenged leaves of all partitions, in order.
    pub(crate) challenges: Vec<usize>,
    old_comm_r: PoseidonDomain,
    new_comm_r: PoseidonDomain,
    new_comm_d: [u8; NODE],
    arities: Vec<usize>,
    levels: u32,
    /// How far to shift a leaf's index to get the bits that select its multiplier.
    shift: u32,
}

impl UpdateStatement {
    pub(crate) fn new(
        size: SectorSize,
        old_comm_r: &Commitment,
        new_comm_r: &Commitment,
        new_comm_d: &Commitment,
    ) -> Result<Self, Refused> {
        let leaves = nodes(size);
        let levels = leaves.trailing_zeros();
        let old_comm_r = element(old_comm_r.0, "old comm_r")?;
        let new_comm_r = element(new_comm_r.0, "new comm_r")?;
        element(new_comm_d.0, "new comm_d")?;
        let partitions = partition_count(leaves);
        let challenges = (0..partitions)
            .flat_map(|k| Challenges::new(leaves, new_comm_r, k))
            .map(|c| c as usize)
            .collect();
        let internal = |e: std::num::TryFromIntError| Refused::Internal(e.to_string());
        Ok(Self {
            header: Header {
                kind: ProofKind::Update,
                size,
                count: u32::try_from(partitions).map_err(internal)?,
                miner: ActorId(0),
            },
            challenges,
            old_comm_r,
            new_comm_r,
            new_comm_d: new_comm_d.0,
            arities: replica_arities(size),
            levels,
            shift: levels - u32::try_from(h_default(leaves)).map_err(internal)?,
        })
    }

    /// Nodes of a proof: comm_c, the old and the new comm_r_last, then for each challenge the
    /// leaves of the old replica, the new data and the new replica, each with its path.
    fn nodes(&self) -> usize {
        let replica = 1 + siblings(&self.arities);
        let data = 1 + self.levels as usize;
        3 + self.challenges.len() * (2 * replica + data)
    }

    pub(crate) fn verify(&self, proof: &[u8]) -> Result<(), Refused> {
        let mut nodes = self.header.open(proof, self.nodes())?;
        let comm_c = nodes.element("comm_c")?;
        let old_root = nodes.element("old comm_r_last")?;
        let new_root = nodes.element("comm_r_last")?;
        let check = |ok: bool, what, leaf: Option<usize>| {
            ok.then_some(()).ok_or(Refused::Wrong {
                what,
                leaf: leaf.map(|l| l as u64),
            })
        };
        check(
            hash2(comm_c, old_root) == self.old_comm_r,
            Check::OldCommR,
            None,
        )?;
        check(
            hash2(comm_c, new_root) == self.new_comm_r,
            Check::CommR,
            None,
        )?;
        let phi = phi(&Sha256Domain::from(self.new_comm_d), &self.old_comm_r);
        for &leaf in &self.challenges {
            let at = Some(leaf);
            let old = nodes.element("old replica leaf")?;
            let root = poseidon_root(old, leaf, &self.arities, &mut nodes)?;
            check(root == old_root, Check::OldReplicaPath, at)?;

            let data = nodes.element("data leaf")?;
            let root = sha256_root(data.into(), leaf, self.levels, &mut nodes)?;
            check(root == self.new_comm_d, Check::DataPath, at)?;

            let new = nodes.element("replica leaf")?;
            let root = poseidon_root(new, leaf, &self.arities, &mut nodes)?;
            check(root == new_root, Check::ReplicaPath, at)?;

            let high =
                u32::try_from(leaf >> self.shift).map_err(|e| Refused::Internal(e.to_string()))?;
            let encoded = Scalar::from(old) + Scalar::from(data) * rho(&phi, high);
            check(PoseidonDomain::from(encoded) == new, Check::Encoding, at)?;
        }
        nodes.end()
    }
}
