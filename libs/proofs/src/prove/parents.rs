//! The proof library's cache of graph parents.
//!
//! The library writes it on first use, in place, into a folder that all processes share
//! (`FIL_PROOFS_PARENT_CACHE`, else `/var/tmp/filecoin-parents`). A process killed meanwhile
//! leaves a file of full length with holes, from which every later sector would be labelled
//! wrongly. So the cache is made under a lock, checked, and only then marked as good. A folder of
//! another user is used as it is, if what is needed is there and marked.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use filecoin_hashers::poseidon::PoseidonHasher;
use filecoin_proofs::parameters::setup_params;
use lotus_types::SectorSize;
use storage_proofs_core::drgraph::Graph;
use storage_proofs_core::settings::SETTINGS;
use storage_proofs_porep::stacked::StackedBucketGraph;

use super::library;
use crate::ProofError;
use crate::network::seal_config;
use crate::verify::seal::PARENTS;

/// Bytes of one node's entry.
const ENTRY: usize = PARENTS * 4;
/// One node in so many is checked: at least one of every page of memory, the unit that a killed
/// process or a lost write leaves empty.
const STRIDE: usize = 64;
const _: () = assert!((STRIDE + 1) * ENTRY <= 4096);

/// Makes sure that the cache for this size exists and is whole.
pub(crate) fn ensure(size: SectorSize) -> Result<(), ProofError> {
    ensure_in(size, Path::new(&SETTINGS.parent_cache))
}

fn ensure_in(size: SectorSize, dir: &Path) -> Result<(), ProofError> {
    fs::create_dir_all(dir).map_err(ProofError::io(dir))?;
    let lock_path = dir.join(format!("lotus-hub-{}.lock", size.name()));
    let mark = dir.join(format!("lotus-hub-{}.checked", size.name()));
    let marked = || fs::read_to_string(&mark).map(PathBuf::from);
    let whole = || marked().is_ok_and(|cache| File::open(cache).is_ok());
    let lock = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(&lock_path);
    let lock = match lock {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied && whole() => return Ok(()),
        lock => lock.map_err(ProofError::io(&lock_path))?,
    };
    lock.lock().map_err(ProofError::io(&lock_path))?;

    let marked = marked();
    if marked.is_ok() && whole() {
        return Ok(());
    }
    if marked.is_ok() {
        // Somebody removed the cache: what is made next is unchecked again.
        fs::remove_file(&mark).map_err(ProofError::io(&mark))?;
    }
    let graph = graph(size)?;
    let open = || library("making the graph's parent cache", || graph.parent_cache());
    let mut cache = open()?.path;
    if !is_whole(&graph, &cache).map_err(ProofError::io(&cache))? {
        tracing::warn!(cache = %cache.display(), "the graph's parent cache is damaged: making it again");
        fs::remove_file(&cache).map_err(ProofError::io(&cache))?;
        cache = open()?.path;
        if !is_whole(&graph, &cache).map_err(ProofError::io(&cache))? {
            return Err(ProofError::BadInput {
                what: "parent cache",
                why: format!("{} is wrong although it is new", cache.display()),
            });
        }
    }
    let name = cache.to_str().ok_or_else(|| ProofError::BadInput {
        what: "parent cache",
        why: format!("{} is no UTF-8 path", cache.display()),
    })?;
    fs::write(&mark, name).map_err(ProofError::io(&mark))
}

fn graph(size: SectorSize) -> Result<StackedBucketGraph<PoseidonHasher>, ProofError> {
    let config = seal_config(size);
    library("setting up the graph", || {
        let params = setup_params(&config)?;
        StackedBucketGraph::new_stacked(
            params.nodes,
            params.degree,
            params.expansion_degree,
            params.porep_id,
            params.api_version,
        )
    })
}

fn is_whole(graph: &StackedBucketGraph<PoseidonHasher>, cache: &Path) -> io::Result<bool> {
    let mut file = File::open(cache)?;
    let nodes = graph.size();
    if file.metadata()?.len() != (nodes * ENTRY) as u64 {
        return Ok(false);
    }
    let last = nodes - 1;
    for node in (0..nodes).step_by(STRIDE).chain([last]) {
        let mut entry = [0u8; ENTRY];
        file.seek(SeekFrom::Start((node * ENTRY) as u64))?;
        file.read_exact(&mut entry)?;
        let mut parents = [0u32; PARENTS];
        if graph.parents(node, &mut parents).is_err() {
            return Ok(false);
        }
        let stored = entry.chunks_exact(4).map(|b| {
            let mut le = [0; 4];
            le.copy_from_slice(b);
            u32::from_le_bytes(le)
        });
        if !stored.eq(parents) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_is_noticed() {
        let size = SectorSize::S2KiB;
        ensure(size).unwrap();
        let graph = graph(size).unwrap();
        let good = graph.parent_cache().unwrap().path;
        assert!(is_whole(&graph, &good).unwrap());
        let bytes = fs::read(&good).unwrap();
        let copy = tempfile::NamedTempFile::new().unwrap();
        let hole = |from: usize, to: usize| {
            let mut bad = bytes.clone();
            bad[from..to].fill(0);
            fs::write(copy.path(), bad).unwrap();
            is_whole(&graph, copy.path()).unwrap()
        };
        assert!(!hole(bytes.len() / 2, bytes.len()));
        assert!(!hole(bytes.len() - ENTRY, bytes.len()));
        fs::write(copy.path(), &bytes[..bytes.len() - 1]).unwrap();
        assert!(!is_whole(&graph, copy.path()).unwrap());
    }
}
