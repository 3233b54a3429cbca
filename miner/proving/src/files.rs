use std::path::PathBuf;

use lotus_types::{Commitment, SectorNumber};

/// Where the files of proven sectors are. An upgraded sector has two replicas for a while: which
/// is meant, its commitment says.
pub trait SectorFiles: Send + Sync {
    /// The replica of a sector.
    fn sealed(&self, sector: SectorNumber, comm_r: &Commitment) -> PathBuf;
    /// Its cache directory.
    fn cache(&self, sector: SectorNumber, comm_r: &Commitment) -> PathBuf;
    /// Whether this hub made the sector. One that made all sectors of its miner need not fear that
    /// another miner has them too.
    fn made(&self, _sector: SectorNumber) -> bool {
        false
    }
}
