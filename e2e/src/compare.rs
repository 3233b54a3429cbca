//! What came back against what went in.

use std::collections::BTreeSet;
use std::path::Path;

use cid::Cid;
use lotus_car::{CarStore, Scope, export, walk};

use crate::Failed;

/// Whether `got` holds exactly the DAG below `root` that `sent` holds: the same root, the same
/// blocks (each was hashed again when the stores were opened), and the same files, byte for
/// byte, where the DAG is UnixFS. Says what differs.
pub(crate) fn same_dag(root: &Cid, sent: &CarStore, got: &CarStore) -> Result<(), Failed> {
    if got.roots() != [*root] {
        return Err(Failed(format!(
            "the CAR names the roots {:?} in place of {root}",
            got.roots()
        )));
    }
    let wanted = blocks_below(root, sent)?;
    let came: BTreeSet<Cid> = got.cids().iter().copied().collect();
    if wanted != came {
        return Err(Failed(format!(
            "of {} blocks {} are missing, and {} came that do not belong",
            wanted.len(),
            wanted.difference(&came).count(),
            came.difference(&wanted).count()
        )));
    }
    let dir = tempfile::tempdir()?;
    let (a, b) = (dir.path().join("sent"), dir.path().join("got"));
    match export(root, &mut |cid| sent.get(cid), &a) {
        Ok(_) => {}
        // Another kind of DAG: its blocks are all there is to compare.
        Err(lotus_car::ExportError::NotUnixFs(_)) => return Ok(()),
        Err(e) => return Err(Failed::at("the DAG that was sent", e)),
    }
    export(root, &mut |cid| got.get(cid), &b).map_err(|e| Failed::at("the DAG that came", e))?;
    same_files(&a, &b)
}

/// The CIDs of every block below `root`; an error if one is missing.
pub(crate) fn blocks_below(root: &Cid, store: &CarStore) -> Result<BTreeSet<Cid>, Failed> {
    walk(root, Scope::All, |cid| store.get(cid))
        .map_err(|e| Failed::at("walking the CAR", e))?
        .map(|block| block.map(|b| b.0))
        .collect::<Result<_, _>>()
        .map_err(|e| Failed::at("walking the CAR", e))
}

fn same_files(a: &Path, b: &Path) -> Result<(), Failed> {
    let differ = || Failed(format!("{} differs from {}", b.display(), a.display()));
    let kind = a.symlink_metadata()?.file_type();
    if kind != b.symlink_metadata()?.file_type() {
        return Err(differ());
    }
    if kind.is_symlink() {
        return if std::fs::read_link(a)? == std::fs::read_link(b)? {
            Ok(())
        } else {
            Err(differ())
        };
    }
    if kind.is_file() {
        return if std::fs::read(a)? == std::fs::read(b)? {
            Ok(())
        } else {
            Err(differ())
        };
    }
    let names = |dir: &Path| -> Result<BTreeSet<_>, Failed> {
        std::fs::read_dir(dir)?
            .map(|e| Ok(e?.file_name()))
            .collect()
    };
    let (left, right) = (names(a)?, names(b)?);
    if left != right {
        return Err(differ());
    }
    left.iter()
        .try_for_each(|name| same_files(&a.join(name), &b.join(name)))
}
