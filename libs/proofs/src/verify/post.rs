//! Proofs of spacetime: challenged leaves of replicas.

use filecoin_hashers::poseidon::PoseidonDomain;
use filecoin_proofs::PoStConfig;
use lotus_types::{ActorId, Commitment, SectorNumber, SectorSize};
use storage_proofs_post::fallback::{self, generate_leaf_challenge, get_challenge_index};

use super::codec::{HEADER, Header, NODE, Nodes, ProofKind, element};
use super::merkle::{hash2, poseidon_root, siblings};
use crate::network::{replica_arities, window_config, winning_config};
use crate::{Check, Refused};

/// Sectors of one PoSt at most. Source: builtin-actors, `ADDRESSED_SECTORS_MAX`.
const MAX_SECTORS: usize = 25_000;

/// Bytes of a WindowPoSt over so many sectors.
#[must_use]
pub fn window_post_bytes(size: SectorSize, sectors: u64) -> u64 {
    let nodes = sector_nodes(window_config(size).challenge_count, &replica_arities(size));
    let part = (nodes * NODE) as u64;
    sectors.saturating_mul(part).saturating_add(HEADER as u64)
}

/// Nodes of one sector's part: the two commitments, then each leaf with its path.
fn sector_nodes(challenges: usize, arities: &[usize]) -> usize {
    2 + challenges * (1 + siblings(arities))
}

/// Everything that a PoSt is about.
pub(crate) struct PostStatement {
    pub(crate) config: PoStConfig,
    pub(crate) header: Header,
    randomness: PoseidonDomain,
    pub(crate) arities: Vec<usize>,
}

impl PostStatement {
    pub(crate) fn new(
        kind: ProofKind,
        miner: ActorId,
        size: SectorSize,
        randomness: &[u8; 32],
        sectors: usize,
    ) -> Result<Self, Refused> {
        let config = if kind == ProofKind::Winning {
            winning_config(size)
        } else {
            window_config(size)
        };
        if sectors == 0 {
            return Err(Refused::PublicInput("no sectors"));
        }
        if (kind == ProofKind::Winning && sectors != config.sector_count) || sectors > MAX_SECTORS {
            return Err(Refused::PublicInput("too many sectors"));
        }
        Ok(Self {
            config,
            header: Header {
                kind,
                size,
                count: u32::try_from(sectors).map_err(|e| Refused::Internal(e.to_string()))?,
                miner,
            },
            randomness: field_randomness(randomness),
            arities: replica_arities(size),
        })
    }

    /// The challenged leaves of a sector.
    pub(crate) fn challenges(&self, sector: SectorNumber) -> Vec<u64> {
        let params = fallback::PublicParams {
            sector_size: self.header.size.bytes(),
            challenge_count: self.config.challenge_count,
            sector_count: self.config.sector_count,
            api_version: self.config.api_version,
        };
        (0..self.config.challenge_count)
            .map(|n| {
                // WinningPoSt has one sector, and WindowPoSt ignores the sector's position.
                let index =
                    get_challenge_index(self.config.api_version, 0, self.config.challenge_count, n);
                generate_leaf_challenge(&params, self.randomness, sector.0, index)
            })
            .collect()
    }

    /// The chain's randomness as the proof library takes it.
    pub(crate) fn randomness(&self) -> [u8; 32] {
        self.randomness.into()
    }

    fn sector_nodes(&self) -> usize {
        sector_nodes(self.config.challenge_count, &self.arities)
    }

    /// The nodes of a proof of so many sectors.
    pub(crate) fn open<'a>(&self, sectors: usize, proof: &'a [u8]) -> Result<Nodes<'a>, Refused> {
        self.header.open(proof, sectors * self.sector_nodes())
    }

    pub(crate) fn verify(
        &self,
        sectors: &[(SectorNumber, Commitment)],
        proof: &[u8],
    ) -> Result<(), Refused> {
        let mut nodes = self.open(sectors.len(), proof)?;
        for (number, comm_r) in sectors {
            self.verify_next(*number, comm_r, &mut nodes)?;
        }
        nodes.end()
    }

    /// Verifies one sector's part alone.
    pub(crate) fn verify_sector(
        &self,
        number: SectorNumber,
        comm_r: &Commitment,
        part: &[u8],
    ) -> Result<(), Refused> {
        let expected = (self.sector_nodes() * NODE) as u64;
        let got = part.len() as u64;
        if expected != got {
            return Err(Refused::Length { expected, got });
        }
        let mut nodes = Nodes::new(part);
        self.verify_next(number, comm_r, &mut nodes)?;
        nodes.end()
    }

    fn verify_next(
        &self,
        number: SectorNumber,
        comm_r: &Commitment,
        nodes: &mut Nodes<'_>,
    ) -> Result<(), Refused> {
        let comm_r = element(comm_r.0, "comm_r")?;
        let comm_c = nodes.element("comm_c")?;
        let comm_r_last = nodes.element("comm_r_last")?;
        if hash2(comm_c, comm_r_last) != comm_r {
            return Err(Refused::Wrong {
                what: Check::CommR,
                leaf: None,
            });
        }
        for leaf in self.challenges(number) {
            let index = usize::try_from(leaf).map_err(|_| Refused::PublicInput("leaf index"))?;
            let node = nodes.element("replica leaf")?;
            if poseidon_root(node, index, &self.arities, nodes)? != comm_r_last {
                return Err(Refused::Wrong {
                    what: Check::ReplicaPath,
                    leaf: Some(leaf),
                });
            }
        }
        Ok(())
    }
}

/// Chain randomness as a field element: its two highest bits are dropped, as the network does.
pub(crate) fn field_randomness(randomness: &[u8; 32]) -> PoseidonDomain {
    let mut bytes = *randomness;
    bytes[31] &= 0x3f;
    bytes.into()
}
