//! Checks of the workspace as a whole: which crate may use which, who owns a heavy dependency,
//! which licences come along, and whether generated files are fresh.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{Failed, gen_config, gen_into, gen_proto, sh};

/// What `cargo metadata` says, as far as it is used.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    license_file: Option<String>,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    optional: bool,
}

/// Layers of the workspace, top first. A crate may use crates of lower layers, and of its own
/// where `peers` says so. Source: docs/ARCHITECTURE.md.
const LAYERS: [(&str, &[&str]); 8] = [
    // Measures what the tests run.
    ("measurements", &["bench"]),
    ("tools", &["e2e", "xtask"]),
    ("binaries", &["miner", "markets", "supervisor", "devnet"]),
    (
        "hub parts",
        &[
            "miner/lotus-api",
            "miner/messages",
            "miner/proving",
            "miner/sealing",
            "miner/workers",
        ],
    ),
    (
        "services",
        &["services/deals", "services/indexing", "services/retrieval"],
    ),
    // What two spokes share and neither may ask the other for.
    ("spoke libraries", &["libs/piece-index"]),
    ("contract", &["hub-proto"]),
    ("libraries", &["libs/"]),
];

/// Arrows of builds that are measured and not shipped: optional dependencies, behind a feature that
/// nothing turns on. The hub hosts the spokes in `run --all-in-one`, to show what keeping them
/// apart is worth (docs/decisions/0018-proving-guard.md).
const MEASURED: [(&str, &str); 1] = [("miner", "markets")];

/// Heavy dependencies and the one folder that may use each, so that replacing one is a change
/// in one place. Its client half and its server half count as two. The bench builds a peer of the hub
/// API from those that the hub's own JSON-RPC is built from.
const OWNERS: [(&str, &[&str]); 21] = [
    ("bellperson", &["libs/proofs"]),
    ("filecoin-proofs", &["libs/proofs"]),
    ("filecoin-proofs-api", &["libs/proofs"]),
    ("storage-proofs-core", &["libs/proofs"]),
    ("storage-proofs-porep", &["libs/proofs"]),
    ("storage-proofs-post", &["libs/proofs"]),
    ("storage-proofs-update", &["libs/proofs"]),
    ("filecoin-hashers", &["libs/proofs"]),
    ("fil_actor_miner_state", &["libs/actors"]),
    ("fil_actor_market_state", &["libs/actors"]),
    ("fil_actor_verifreg_state", &["libs/actors"]),
    ("fil_actors_shared", &["libs/actors"]),
    (
        "jsonrpsee",
        &["libs/node-client", "miner/lotus-api", "bench"],
    ),
    ("jsonwebtoken", &["libs/tokens"]),
    ("libp2p", &["libs/p2p"]),
    ("libp2p-stream", &["libs/p2p"]),
    ("opentelemetry-otlp", &["libs/runtime"]),
    ("metrics-exporter-prometheus", &["libs/runtime"]),
    ("config", &["libs/settings"]),
    ("rcgen", &["libs/identity", "bench"]),
    ("tokio-rustls", &["libs/identity", "libs/runtime", "bench"]),
];

/// Licences that may be linked into a binary under MIT OR Apache-2.0.
const LICENCES: [&str; 14] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "Unlicense",
    "CC0-1.0",
    "Unicode-3.0",
    "MIT-0",
    "BSL-1.0",
    "CDLA-Permissive-2.0",
];

/// Arrows, owners and licences.
pub(crate) fn workspace(root: &Path) -> Result<(), Failed> {
    let value = sh::json(
        root,
        "cargo",
        ["metadata", "--format-version=1", "--locked"],
    )?;
    let metadata: Metadata =
        serde_json::from_value(value).map_err(|e| Failed::new(format!("cargo metadata: {e}")))?;
    let folder = |p: &Package| {
        Path::new(&p.manifest_path)
            .parent()
            .and_then(|dir| dir.strip_prefix(root).ok())
            .map(|dir| dir.display().to_string())
    };
    let members: Vec<(&Package, String)> = metadata
        .packages
        .iter()
        .filter(|p| metadata.workspace_members.contains(&p.id))
        .filter_map(|p| Some((p, folder(p)?)))
        .collect();
    let by_name: BTreeMap<&str, &str> = members
        .iter()
        .map(|(p, dir)| (p.name.as_str(), dir.as_str()))
        .collect();

    let mut wrong = Vec::new();
    for (package, dir) in &members {
        // A test may use anything that the workspace has: it is not part of the product.
        let used = package
            .dependencies
            .iter()
            .filter(|d| d.kind.as_deref() != Some("dev"));
        for dependency in used {
            if let Some(to) = by_name.get(dependency.name.as_str())
                && !may_use(dir, to)
                && !(dependency.optional && MEASURED.contains(&(dir.as_str(), to)))
            {
                wrong.push(format!("{dir} must not use {to}"));
            }
            if let Some((_, owners)) = OWNERS.iter().find(|(name, _)| *name == dependency.name)
                && !owners.contains(&dir.as_str())
            {
                wrong.push(format!(
                    "{dir} must not use {}: {} owns it",
                    dependency.name,
                    owners.join(" or ")
                ));
            }
        }
    }
    let built = built(root)?;
    let comes = |p: &&Package| built.contains(&format!("{} v{}", p.name, p.version));
    for package in metadata.packages.iter().filter(comes) {
        let fine = package.license.as_deref().is_some_and(licence_ok);
        if !fine && package.license_file.is_none() {
            wrong.push(format!(
                "{} has the licence {:?}",
                package.name, package.license
            ));
        }
    }
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(Failed::new(wrong.join("\n       ")))
    }
}

/// Packages that are built for anything here, as `NAME vVERSION`. `cargo metadata` names more:
/// optional ones that a feature would only add to.
fn built(root: &Path) -> Result<BTreeSet<String>, Failed> {
    let words = "tree --workspace --locked --edges all --target all --prefix none --format {p}";
    let tree = sh::output(root, Path::new("cargo"), words.split(' '))?;
    let package = |line: &str| {
        let mut words = line.split(' ');
        Some(format!("{} {}", words.next()?, words.next()?))
    };
    Ok(tree.lines().filter_map(package).collect())
}

fn layer(dir: &str) -> Option<usize> {
    LAYERS.iter().position(|(_, members)| {
        members
            .iter()
            .any(|m| dir == *m || (m.ends_with('/') && dir.starts_with(m)))
    })
}

/// Arrows point down. Services never use each other; hub parts belong to the hub; libraries may
/// use libraries (Cargo itself refuses a circle).
fn may_use(from: &str, to: &str) -> bool {
    let (Some(a), Some(b)) = (layer(from), layer(to)) else {
        return false;
    };
    let (a_name, b_name) = (LAYERS[a].0, LAYERS[b].0);
    match (a_name, b_name) {
        ("libraries", "libraries") | ("hub parts", "hub parts") => true,
        ("binaries", "hub parts") => from == "miner",
        ("binaries", "services") => from == "markets",
        ("hub parts", "services") => false,
        _ => a < b,
    }
}

/// Every alternative of an AND, and one of an OR, must be on the list.
fn licence_ok(expression: &str) -> bool {
    expression
        .replace(['(', ')'], "")
        .replace('/', " OR ")
        .split(" OR ")
        .any(|one| one.split(" AND ").all(|l| LICENCES.contains(&l.trim())))
}

/// The committed generated files are what the code would generate now.
pub(crate) fn generated(root: &Path) -> Result<(), Failed> {
    let fresh = tempfile::tempdir()?;
    gen_into(root, fresh.path())?;
    let stale = stale(fresh.path(), root)?;
    if stale.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = stale.iter().map(|f| f.display().to_string()).collect();
    Err(Failed::new(format!(
        "stale: {}\n  fix: cargo xtask gen",
        names.join(", ")
    )))
}

/// Copies the generated files that are not the same in the repository.
pub(crate) fn install(fresh: &Path, root: &Path) -> Result<(), Failed> {
    for file in stale(fresh, root)? {
        std::fs::copy(fresh.join(&file), root.join(&file))?;
    }
    Ok(())
}

/// The generated files that are not the same in the repository, or not there.
fn stale(fresh: &Path, root: &Path) -> Result<Vec<PathBuf>, Failed> {
    let mut files = gen_proto::outputs(fresh)?;
    let page = PathBuf::from(gen_config::PAGE);
    if fresh.join(&page).exists() {
        files.push(page);
    }
    files.retain(|f| std::fs::read(fresh.join(f)).ok() != std::fs::read(root.join(f)).ok());
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrows_point_down() {
        for (from, to, ok) in [
            ("miner", "miner/sealing", true),
            ("miner/sealing", "libs/journal", true),
            ("markets", "services/deals", true),
            ("services/deals", "hub-proto", true),
            ("services/retrieval", "libs/piece-index", true),
            ("libs/piece-index", "hub-proto", true),
            ("libs/car", "hub-proto", false),
            ("e2e", "libs/car", true),
            ("bench", "e2e", true),
            ("e2e", "bench", false),
            ("services/deals", "services/retrieval", false),
            ("services/deals", "miner", false),
            ("libs/types", "hub-proto", false),
            ("supervisor", "services/deals", false),
            ("markets", "miner/sealing", false),
            ("miner/sealing", "miner", false),
            ("nowhere", "libs/types", false),
        ] {
            assert_eq!(may_use(from, to), ok, "{from} -> {to}");
        }
    }

    #[test]
    fn licences_are_read() {
        for (text, ok) in [
            ("MIT OR Apache-2.0", true),
            ("MIT/Apache-2.0", true),
            ("GPL-3.0 OR MIT", true),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
            ("GPL-3.0", false),
            ("MIT AND GPL-3.0", false),
        ] {
            assert_eq!(licence_ok(text), ok, "{text}");
        }
    }
}
