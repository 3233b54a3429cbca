//! Keys and tokens of a storage provider, and whether something shows them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::Failed;

/// Files that have secrets, by the ends of their names: the authority's key, identities, bundles,
/// tokens, keys of peers and clients.
const FILES: [&str; 4] = [".key", "identity.json", ".bundle", "token"];
/// Largest file that is looked at, bytes.
const LARGEST: u64 = 64 << 10;
/// Shorter words of such a file are no secrets.
const SHORTEST: usize = 24;

/// What must be shown nowhere, of all files below `root`.
pub fn all(root: &Path) -> Result<BTreeSet<String>, Failed> {
    let mut found = BTreeSet::new();
    for path in files(root) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let secret = FILES.iter().any(|end| name.ends_with(end));
        if !secret || fs::metadata(&path)?.len() > LARGEST {
            continue;
        }
        let bytes = fs::read(&path)?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => found.extend(words(text)),
            // A key as it is would be shown as text.
            Err(_) => found.extend([hex(&bytes)]),
        }
    }
    Ok(found)
}

/// The files among `logs` that show one of `secrets`.
pub fn shown(secrets: &BTreeSet<String>, logs: &[PathBuf]) -> Result<Vec<PathBuf>, Failed> {
    let mut showing = Vec::new();
    for log in logs {
        let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
        if secrets.iter().any(|secret| text.contains(secret.as_str())) {
            showing.push(log.clone());
        }
    }
    Ok(showing)
}

/// Long words of base64, hex or a token.
fn words(text: &str) -> impl Iterator<Item = String> {
    let inside = |c: char| c.is_ascii_alphanumeric() || "+/=_-.".contains(c);
    text.split(move |c| !inside(c))
        .filter(|word| word.len() >= SHORTEST)
        .map(str::to_owned)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Every file below a folder that can be listed.
fn files(root: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        // What goes meanwhile is nothing.
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_shows_a_key_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, bytes).unwrap();
            path
        };
        let key = "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIB";
        file(
            "a/identity.json",
            format!("{{\"key\":\"{key}\"}}").as_bytes(),
        );
        file("b/peer.key", &[0xfe; 32]);
        file("b/other.txt", &[b'x'; 40]);
        let secrets = all(dir.path()).unwrap();
        let wanted = [key.to_owned(), "fe".repeat(32)];
        assert_eq!(secrets, BTreeSet::from(wanted));
        let (bad, good) = (format!("INFO key={key}"), format!("INFO key={}", &key[1..]));
        let logs = [
            file("bad.log", bad.as_bytes()),
            file("good.log", good.as_bytes()),
        ];
        assert_eq!(shown(&secrets, &logs).unwrap(), logs[..1]);
    }
}
