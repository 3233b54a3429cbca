use std::path::PathBuf;

use lotus_types::SectorNumber;

/// Where the files of proven sectors are.
pub trait SectorFiles: Send + Sync {
    /// The replica of a sector.
    fn sealed(&self, sector: SectorNumber) -> PathBuf;
    /// Its cache directory.
    fn cache(&self, sector: SectorNumber) -> PathBuf;
}
