//! `release.json`: which release runs on a folder, which one before it, and the upgrade that is
//! under way. Synced, because a power cut in the middle of an upgrade must not leave half of it.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use lotus_runtime::Fault;
use lotus_types::Kind;
use serde::{Deserialize, Serialize};

use crate::upgrade::Phase;

/// The file's name, in the supervisor's folder.
const NAME: &str = "release.json";

/// What the file says. A folder that was never upgraded has none. Keys of later releases are
/// passed over: an older supervisor reads it after a way back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Release {
    /// Folder of the binaries that run; nothing for those beside the supervisor.
    pub(crate) current: Option<PathBuf>,
    /// Folder of the release before.
    pub(crate) previous: Option<PathBuf>,
    /// The upgrade that is under way.
    pub(crate) upgrade: Option<Journal>,
    /// How the last one ended.
    pub(crate) last: Option<Outcome>,
}

/// An upgrade that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Journal {
    pub(crate) id: u64,
    /// Folder of the release that runs.
    pub(crate) from: PathBuf,
    /// Folder of the one that will.
    pub(crate) to: PathBuf,
    /// The supervisor that will run.
    pub(crate) image: PathBuf,
    /// Do not wait until it is safe to restart the hub.
    pub(crate) force: bool,
    /// What is moved besides the supervisor, in this order.
    pub(crate) units: Vec<Unit>,
    /// How many checks come before.
    pub(crate) checks: usize,
    pub(crate) phase: Phase,
    /// Why it goes back.
    pub(crate) why: String,
}

/// A process that an upgrade moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unit {
    pub(crate) name: String,
    /// It was ready before, so it must be so after.
    pub(crate) must: bool,
}

/// An upgrade that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) id: u64,
    pub(crate) to: PathBuf,
    pub(crate) ok: bool,
    /// Something was moved.
    pub(crate) moved: bool,
    pub(crate) reason: String,
}

/// Reads the file of a folder.
pub(crate) fn read(root: &Path) -> Result<Release, Fault> {
    let path = root.join(NAME);
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Release::default()),
        Err(e) => return Err(e.into()),
    };
    serde_json::from_slice(&text).map_err(|e| {
        Fault::new(
            Kind::Config,
            format!("{} is not readable: {e}", path.display()),
            "correct it, or remove it: then the binaries beside this supervisor run",
        )
    })
}

/// Writes it, whole or not at all.
pub(crate) fn write(root: &Path, release: &Release) -> io::Result<()> {
    let path = root.join(NAME);
    let temp = path.with_extension("json.tmp");
    let mut file = File::create(&temp)?;
    file.write_all(&serde_json::to_vec_pretty(release)?)?;
    file.sync_all()?;
    std::fs::rename(&temp, &path)?;
    File::open(root)?.sync_all()
}

/// The supervisor of a release.
pub(crate) fn supervisor(dir: &Path) -> PathBuf {
    dir.join("lotus-supervisor")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), Release::default());
        let release = Release {
            current: Some("/opt/1".into()),
            previous: None,
            upgrade: Some(Journal {
                id: 7,
                from: "/opt/1".into(),
                to: "/opt/2".into(),
                image: "/opt/2/lotus-supervisor".into(),
                force: true,
                units: vec![Unit {
                    name: "hub".into(),
                    must: true,
                }],
                checks: 3,
                phase: Phase::Undoing(0),
                why: "because".into(),
            }),
            last: None,
        };
        write(dir.path(), &release).unwrap();
        assert_eq!(read(dir.path()).unwrap(), release);
        // A later release adds a key.
        std::fs::write(dir.path().join(NAME), r#"{"current":"/x","news":1}"#).unwrap();
        assert_eq!(read(dir.path()).unwrap().current, Some("/x".into()));
        std::fs::write(dir.path().join(NAME), "{").unwrap();
        assert_eq!(read(dir.path()).unwrap_err().kind, Kind::Config);
    }
}
