//! Proof of replication: the statement, and its verification.

use std::iter;

use blstrs::Scalar;
use filecoin_hashers::poseidon::{PoseidonDomain, PoseidonHasher};
use filecoin_hashers::sha256::Sha256Domain;
use filecoin_proofs::parameters::setup_params;
use lotus_types::Commitment;
use sha2::{Digest, Sha256};
use storage_proofs_core::drgraph::{BASE_DEGREE, Graph};
use storage_proofs_porep::stacked::{
    self, EXP_DEGREE, StackedBucketGraph, TOTAL_PARENTS, generate_replica_id,
};

use super::codec::{Header, NODE, Nodes, ProofKind, element};
use super::merkle::{column_hash, hash2, poseidon_root, sha256_root, siblings};
use crate::network::{nodes, prover_id, replica_arities, seal_config};
use crate::{Check, Refused, SealingSector, Seed, Ticket};

/// Parents of a node.
pub(crate) const PARENTS: usize = BASE_DEGREE + EXP_DEGREE;

/// Everything that a seal proof is about, from public inputs alone.
pub(crate) struct SealStatement {
    pub(crate) header: Header,
    pub(crate) graph: StackedBucketGraph<PoseidonHasher>,
    pub(crate) layers: usize,
    /// The challenged leaves of all partitions, in order.
    pub(crate) challenges: Vec<usize>,
    replica_id: PoseidonDomain,
    comm_d: [u8; NODE],
    comm_r: PoseidonDomain,
    arities: Vec<usize>,
    levels: u32,
}

impl SealStatement {
    pub(crate) fn new(
        sector: &SealingSector,
        ticket: &Ticket,
        seed: &Seed,
        comm_d: &Commitment,
        comm_r: &Commitment,
    ) -> Result<Self, Refused> {
        let config = seal_config(sector.size);
        let internal = |e| Refused::Internal(format!("{e:#}"));
        let params = setup_params(&config).map_err(internal)?;
        element(comm_d.0, "comm_d")?;
        let comm_r = element(comm_r.0, "comm_r")?;
        let graph = StackedBucketGraph::new_stacked(
            params.nodes,
            params.degree,
            params.expansion_degree,
            params.porep_id,
            params.api_version,
        )
        .map_err(internal)?;
        let replica_id = generate_replica_id::<PoseidonHasher, _>(
            &prover_id(sector.id.miner),
            sector.id.number.0,
            ticket,
            comm_d.0,
            &config.porep_id,
        );
        let partitions = usize::from(config.partitions);
        let inputs = stacked::PublicInputs::<PoseidonDomain, Sha256Domain> {
            replica_id,
            seed: Some(*seed),
            tau: None,
            k: None,
        };
        let challenges = (0..partitions)
            .flat_map(|k| inputs.challenges(&params.challenges, params.nodes, Some(k)))
            .collect();
        Ok(Self {
            header: Header {
                kind: ProofKind::Seal,
                size: sector.size,
                count: u32::try_from(partitions).map_err(|e| Refused::Internal(e.to_string()))?,
                miner: sector.id.miner,
            },
            graph,
            layers: params.num_layers,
            challenges,
            replica_id,
            comm_d: comm_d.0,
            comm_r,
            arities: replica_arities(sector.size),
            levels: nodes(sector.size).trailing_zeros(),
        })
    }

    /// Nodes of a proof: the two commitments, then for each challenge the data leaf and its
    /// path, the replica leaf and its path, and the columns of the node and of its parents, each
    /// with its path.
    fn nodes(&self) -> usize {
        let path = siblings(&self.arities);
        let data = 1 + self.levels as usize;
        let replica = 1 + path;
        let columns = (1 + PARENTS) * (self.layers + path);
        2 + self.challenges.len() * (data + replica + columns)
    }

    /// The parents of a node, six in its own layer and eight in the one before.
    pub(crate) fn parents(&self, node: usize) -> Result<[u32; PARENTS], Refused> {
        let mut parents = [0; PARENTS];
        self.graph
            .parents(node, &mut parents)
            .map_err(|e| Refused::Internal(format!("{e:#}")))?;
        Ok(parents)
    }

    pub(crate) fn verify(&self, proof: &[u8]) -> Result<(), Refused> {
        let mut nodes = self.header.open(proof, self.nodes())?;
        let comm_c = nodes.element("comm_c")?;
        let comm_r_last = nodes.element("comm_r_last")?;
        if hash2(comm_c, comm_r_last) != self.comm_r {
            return Err(Refused::Wrong {
                what: Check::CommR,
                leaf: None,
            });
        }
        for &challenge in &self.challenges {
            self.verify_challenge(challenge, comm_c, comm_r_last, &mut nodes)?;
        }
        nodes.end()
    }

    fn verify_challenge(
        &self,
        challenge: usize,
        comm_c: PoseidonDomain,
        comm_r_last: PoseidonDomain,
        nodes: &mut Nodes<'_>,
    ) -> Result<(), Refused> {
        let check = |ok: bool, what| {
            ok.then_some(()).ok_or(Refused::Wrong {
                what,
                leaf: Some(challenge as u64),
            })
        };
        let data = nodes.element("data leaf")?;
        let root = sha256_root(data.into(), challenge, self.levels, nodes)?;
        check(root == self.comm_d, Check::DataPath)?;

        let replica = nodes.element("replica leaf")?;
        let root = poseidon_root(replica, challenge, &self.arities, nodes)?;
        check(root == comm_r_last, Check::ReplicaPath)?;

        let mut column = |node: usize| {
            let labels = (0..self.layers)
                .map(|_| nodes.element("label"))
                .collect::<Result<Vec<_>, _>>()?;
            let root = poseidon_root(column_hash(labels.clone())?, node, &self.arities, nodes)?;
            check(root == comm_c, Check::ColumnPath)?;
            Ok::<_, Refused>(labels)
        };
        let own = column(challenge)?;
        let parents = self
            .parents(challenge)?
            .into_iter()
            .map(|parent| column(parent as usize))
            .collect::<Result<Vec<_>, _>>()?;
        for layer in 1..=self.layers {
            let label = self.label(layer, challenge, &parents);
            check(label == own[layer - 1], Check::Label)?;
        }
        let key: Scalar = own[self.layers - 1].into();
        let encoded = key + Scalar::from(data);
        check(PoseidonDomain::from(encoded) == replica, Check::Encoding)
    }

    /// The label of a node: SHA-256 of the replica id, the layer, the node and 37 parents, cut
    /// to 254 bits. The six parents in the same layer repeat in the first layer; in the others
    /// the eight of the layer before follow, and all repeat.
    fn label(&self, layer: usize, node: usize, parents: &[Vec<PoseidonDomain>]) -> PoseidonDomain {
        let mut prefix = [0u8; 64];
        prefix[..32].copy_from_slice(self.replica_id.as_ref());
        prefix[32..36].copy_from_slice(&(layer as u64).to_be_bytes()[4..]);
        prefix[36..44].copy_from_slice(&(node as u64).to_be_bytes());
        let mut hash = Sha256::new();
        hash.update(prefix);
        let same_layer = parents[..BASE_DEGREE].iter().zip(iter::repeat(layer));
        let before = parents[BASE_DEGREE..].iter().zip(iter::repeat(layer - 1));
        let distinct = if layer == 1 { BASE_DEGREE } else { PARENTS };
        for (labels, layer) in same_layer
            .chain(before)
            .take(distinct)
            .cycle()
            .take(TOTAL_PARENTS)
        {
            let label: &[u8] = labels[layer - 1].as_ref();
            hash.update(label);
        }
        let mut label: [u8; NODE] = hash.finalize().into();
        label[NODE - 1] &= 0x3f;
        label.into()
    }
}
