//! Backup of what a hub can not make anew: its journal, its configuration, the secret of its
//! tokens. And what a hub does that was made from one.
//!
//! A backup is a file of the journal's own kind with one table more, the manifest. It is verified
//! by reading it back. Sectors and pieces are not in it: they are large, and lie where they lie.
//!
//! What happened after a backup is not in it either. Three things of that can cost money, and a
//! restored hub guards against them: a lease or task of an older start (its generation is far
//! above any that was given out), and a block that was signed at a height at which it would sign
//! another (it does not mine for [`QUIET`] epochs, and after that not while the chain has a block
//! of its own that its log lacks), and a sector that the chain has and the journal would seal again
//! (before a step overwrites files, sealing asks the chain and follows it).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use lotus_journal::{Archive, Contents, Journal, JournalError, Map};
use lotus_node_client::api::TipSet;
use lotus_runtime::{Fault, Health};
use lotus_tokens::KEY_FILE;
use lotus_types::{Epoch, EpochDelta, Generation, Kind};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::config::MinerConfig;
use crate::events::unix_ms;
use crate::repo::{GENERATION, Repo};

/// The manifest's table and the one key in it.
const MANIFEST: Map<u64, Manifest> = Map::new("backup.manifest");
const MANIFEST_TABLE: &str = "backup.manifest";
/// Form of the manifest.
const FORMAT: u32 = 1;
/// Largest file of the repo that is taken along, bytes.
const MAX_FILE: u64 = 1 << 20;
/// A restored hub starts this far above the backup's generation: more starts than any hub has.
const GENERATIONS_AHEAD: u64 = 1 << 20;
/// Epochs after a restore in which the hub does not mine. A block that the lost hub signed last is
/// then in the chain, where the mined-block log is compared with it, or too old to be a second one
/// at a height.
pub const QUIET: EpochDelta = EpochDelta(20);

/// The hub was made from a backup: key 0.
const RESTORED: Map<u64, Restored> = Map::new("hub.restored");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Restored {
    /// The last epoch without mining, once a head was seen.
    until: Option<Epoch>,
}

/// What a backup says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Form of this record.
    pub format: u32,
    /// Release that made it.
    pub release: String,
    /// The miner.
    pub actor: String,
    /// Size of its sectors.
    pub sector_size: String,
    /// Generation of the hub at the time.
    pub generation: u64,
    /// When, Unix milliseconds.
    pub created_unix_ms: u64,
    /// Number of journal entries.
    pub entries: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// SHA-256 of the journal's contents.
    pub sha256: String,
    /// Files of the repo: name and text or secret.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    files: Vec<(String, Stored)>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct Stored(#[serde(with = "serde_bytes")] Vec<u8>);

/// Files hold secrets.
impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Manifest {
    fn contents_are(&self, found: &Contents) -> bool {
        (self.entries, self.bytes, &self.sha256) == (found.entries, found.bytes, &found.sha256)
    }

    /// What may be shown: no files.
    fn without_files(mut self) -> Self {
        self.files.clear();
        self
    }
}

/// A backup that was made or restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// The file.
    pub file: PathBuf,
    /// Its size, bytes.
    pub size: u64,
    /// What it says of itself.
    pub manifest: Manifest,
}

/// Writes a backup of a journal that may be in use, and reads it back. The file must not exist; it
/// is for this user alone, and appears when it is complete.
pub fn make(journal: &Journal, repo: &Repo, file: &Path) -> Result<Made, Fault> {
    if !file.is_absolute() {
        return Err(data(
            format!("{} is no absolute path", file.display()),
            "name the file with its full path",
        ));
    }
    if file.exists() {
        return Err(data(
            format!("{} exists", file.display()),
            "name a file that does not exist: backups are never overwritten",
        ));
    }
    let cfg = MinerConfig::load(&repo.config())?;
    let part = beside(file);
    let made = write(journal, repo, &cfg, &part).and_then(|manifest| {
        let size = std::fs::metadata(&part)?.len();
        // Disks for backups often know no links, with which nothing could ever be overwritten.
        std::fs::rename(&part, file)?;
        sync_dir(file)?;
        Ok(Made {
            file: file.to_owned(),
            size,
            manifest: manifest.without_files(),
        })
    });
    match std::fs::remove_file(&part) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!("{} is left over: {e}", part.display());
        }
        _ => {}
    }
    made
}

fn write(
    journal: &Journal,
    repo: &Repo,
    cfg: &MinerConfig,
    part: &Path,
) -> Result<Manifest, Fault> {
    let contents = journal.copy_to(part).map_err(journal_fault)?;
    let mut files = Vec::new();
    for name in ["config.toml", KEY_FILE] {
        let path = repo.root().join(name);
        match std::fs::metadata(&path) {
            Ok(m) if m.len() <= MAX_FILE => {
                files.push((name.to_owned(), Stored(std::fs::read(&path)?)));
            }
            Ok(_) => return Err(data(format!("{name} is too large"), "see what is in it")),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
    }
    let copy = Journal::open(part).map_err(journal_fault)?;
    let made: Result<Manifest, JournalError> = copy.write(|tx| {
        let manifest = Manifest {
            format: FORMAT,
            release: env!("CARGO_PKG_VERSION").into(),
            actor: cfg.miner.actor.clone(),
            sector_size: cfg.miner.sector_size.clone(),
            generation: tx.get(&GENERATION, &0)?.unwrap_or_default().0,
            created_unix_ms: unix_ms(),
            entries: contents.entries,
            bytes: contents.bytes,
            sha256: contents.sha256.clone(),
            files,
        };
        tx.put(&MANIFEST, &0, &manifest)?;
        Ok(manifest)
    });
    drop(copy);
    let manifest = made.map_err(journal_fault)?;
    let (_, read) = open(part)?;
    if read == manifest {
        Ok(manifest)
    } else {
        Err(damaged(part, "what was read back is not what was written"))
    }
}

/// Opens a backup and checks all of it against its manifest.
fn open(file: &Path) -> Result<(Archive, Manifest), Fault> {
    let not_one = |e: JournalError| damaged(file, &e.to_string());
    let archive = Archive::open(file).map_err(not_one)?;
    let manifest = archive.read(|v| v.get(&MANIFEST, &0)).map_err(not_one)?;
    let manifest = manifest.ok_or_else(|| damaged(file, "it has no manifest"))?;
    if manifest.format != FORMAT {
        return Err(data(
            format!("{} has form {}", file.display(), manifest.format),
            format!("use lotus-miner {}", manifest.release),
        ));
    }
    let found = archive.contents(&[MANIFEST_TABLE]).map_err(not_one)?;
    if !manifest.contents_are(&found) {
        return Err(damaged(
            file,
            &format!("its SHA-256 is {}, not {}", found.sha256, manifest.sha256),
        ));
    }
    Ok((archive, manifest))
}

/// Checks a backup and says what is in it.
pub fn verify(file: &Path) -> Result<Made, Fault> {
    let (_, manifest) = open(file)?;
    Ok(Made {
        file: file.to_owned(),
        size: std::fs::metadata(file)?.len(),
        manifest: manifest.without_files(),
    })
}

/// Makes a repo from a backup. The directory must be empty or missing. `config.toml` is written
/// last, so that half a restore is no repo.
pub fn restore(file: &Path, repo: &Repo) -> Result<Made, Fault> {
    let empty = match std::fs::read_dir(repo.root()) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => true,
        Err(e) => return Err(e.into()),
    };
    if !empty {
        return Err(Fault::new(
            Kind::Config,
            format!("{} is not empty", repo.root().display()),
            "restore into a new directory; the old repo may still be needed",
        ));
    }
    let (archive, manifest) = open(file)?;
    repo.create()?;
    let written = archive.copy_to(&repo.journal(), &[MANIFEST_TABLE]);
    if !manifest.contents_are(&written.map_err(journal_fault)?) {
        return Err(damaged(file, "it changed while it was read"));
    }
    let journal = Journal::open(&repo.journal()).map_err(journal_fault)?;
    let raised: Result<(), JournalError> = journal.write(|tx| {
        let ahead = manifest.generation.saturating_add(GENERATIONS_AHEAD);
        tx.put(&GENERATION, &0, &Generation(ahead))?;
        tx.put(&RESTORED, &0, &Restored { until: None })
    });
    raised.map_err(journal_fault)?;
    drop(journal);
    let (config, others): (Vec<_>, Vec<_>) = manifest
        .files
        .iter()
        .partition(|(name, _)| name == "config.toml");
    for (name, bytes) in others.into_iter().filter(|(name, _)| name == KEY_FILE) {
        repo.write_private(name, &bytes.0)?;
    }
    for (name, bytes) in config {
        repo.write_private(name, &bytes.0)?;
    }
    Ok(Made {
        file: file.to_owned(),
        size: std::fs::metadata(file)?.len(),
        manifest: manifest.without_files(),
    })
}

/// The head, once there is one.
type Head = watch::Receiver<Option<Arc<TipSet>>>;

/// Returns when mining may begin: at once, but for a restored hub [`QUIET`] epochs after its first
/// head. Never ends with an error: a journal that can not be read is no leave to mine.
pub async fn quiet_after_restore(journal: Journal, mut head: Head, health: Health) {
    let retry = Duration::from_secs(5);
    loop {
        match quiet(&journal, &mut head, &health).await {
            Ok(()) => return,
            Err(e) => {
                tracing::error!("mining waits, as it is not known whether it may begin: {e}");
                health.set("mining", Err(format!("waits: {e}")));
                tokio::time::sleep(retry).await;
            }
        }
    }
}

async fn quiet(journal: &Journal, head: &mut Head, health: &Health) -> Result<(), JournalError> {
    let Some(restored) = journal.read(|v| v.get(&RESTORED, &0))? else {
        return Ok(());
    };
    health.set(
        "mining",
        Err("waits for the node: this hub was restored from a backup".into()),
    );
    let until = match restored.until {
        Some(until) => until,
        None => {
            let until = reached(head, Epoch(i64::MIN)).await + QUIET;
            journal.write(|tx| tx.put(&RESTORED, &0, &Restored { until: Some(until) }))?;
            until
        }
    };
    let why = format!("waits until epoch {until}: this hub was restored from a backup");
    tracing::warn!("mining {why}");
    health.set("mining", Err(why));
    reached(head, until + EpochDelta(1)).await;
    journal.write(|tx| tx.remove(&RESTORED, &0))?;
    Ok(())
}

/// Waits for a head at a height or above it. For ever when the follower has stopped, as the hub
/// then does.
async fn reached(head: &mut Head, at: Epoch) -> Epoch {
    let found = head.wait_for(|h| h.as_ref().is_some_and(|h| h.height >= at));
    let height = found.await.ok().and_then(|h| Some(h.as_ref()?.height));
    match height {
        Some(height) => height,
        None => std::future::pending().await,
    }
}

fn beside(file: &Path) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", ulid::Ulid::generate()));
    file.with_file_name(name)
}

fn sync_dir(file: &Path) -> std::io::Result<()> {
    file.parent()
        .map_or(Ok(()), |dir| std::fs::File::open(dir)?.sync_all())
}

fn damaged(file: &Path, why: &str) -> Fault {
    data(
        format!("{} is no good backup: {why}", file.display()),
        "use another backup",
    )
}

fn data(message: impl Into<String>, fix: impl Into<String>) -> Fault {
    Fault::new(Kind::Data, message, fix)
}

fn journal_fault(e: JournalError) -> Fault {
    Fault::new(e.kind(), e.to_string(), e.fix())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use lotus_tokens::{Perm, Tokens};

    use super::*;

    const SOME: Map<u64, String> = Map::new("some");

    fn repo(dir: &Path, name: &str) -> Repo {
        Repo::at(dir.join(name).to_str().unwrap()).unwrap()
    }

    /// A repo in use, with `n` entries.
    fn hub(dir: &Path, n: u64) -> crate::repo::OpenRepo {
        let repo = repo(dir, "hub");
        repo.create().unwrap();
        let config = "[miner]\nactor = \"t01000\"\nsector_size = \"2KiB\"\n";
        repo.write_config(config).unwrap();
        let open = repo.open().unwrap();
        for i in 0..n {
            let put = open
                .journal
                .write(|tx| tx.put(&SOME, &i, &format!("entry {i}")));
            put.unwrap();
        }
        open
    }

    #[test]
    fn a_backup_of_a_hub_in_use_becomes_a_hub_of_a_higher_generation() {
        let dir = tempfile::tempdir().unwrap();
        let open = hub(dir.path(), 300);
        let token = Tokens::open(open.repo.root()).unwrap().issue(&[Perm::Read]);
        let file = dir.path().join("hub.backup");
        let made = make(&open.journal, &open.repo, &file).unwrap();
        assert_eq!(made.manifest.actor, "t01000");
        assert_eq!(made.manifest.generation, open.generation.0);
        assert_eq!(verify(&file).unwrap(), made);
        // It holds the token secret and the node's token: for its owner alone, and not shown.
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!serde_json::to_string(&made).unwrap().contains("files"));
        let left: Vec<_> = dir.path().read_dir().unwrap().collect();
        assert_eq!(left.len(), 2, "{left:?}");
        // The hub goes on; a backup is never overwritten.
        open.journal
            .write(|tx| tx.put(&SOME, &300, &"late".to_owned()))
            .unwrap();
        assert_eq!(
            make(&open.journal, &open.repo, &file).unwrap_err().kind,
            Kind::Data
        );

        let new = repo(dir.path(), "new");
        assert_eq!(restore(&file, &new).unwrap().manifest, made.manifest);
        let e = restore(&file, &new).unwrap_err();
        assert!(e.message.contains("not empty"), "{e:?}");
        let config = std::fs::read_to_string(new.config()).unwrap();
        assert!(config.contains("t01000"), "{config}");
        let tokens = Tokens::open(new.root()).unwrap();
        assert_eq!(tokens.verify(&token), Some(vec![Perm::Read]));
        let restored = new.open().unwrap();
        assert!(restored.generation.0 > open.generation.0 + GENERATIONS_AHEAD);
        let entries = restored
            .journal
            .read(|v| v.scan(&SOME, None, 1_000))
            .unwrap();
        assert_eq!(entries.len(), 300);
        assert_eq!(entries[299].1, "entry 299");
        let manifest = restored.journal.read(|v| v.get(&MANIFEST, &0)).unwrap();
        assert_eq!(manifest, None);
    }

    #[test]
    fn what_is_damaged_is_not_restored() {
        let dir = tempfile::tempdir().unwrap();
        let open = hub(dir.path(), 300);
        let file = dir.path().join("hub.backup");
        make(&open.journal, &open.repo, &file).unwrap();
        let good = std::fs::read(&file).unwrap();
        let new = repo(dir.path(), "new");
        let mut flipped = good.clone();
        let at = good.windows(9).position(|w| w == b"entry 123").unwrap();
        flipped[at] = b'E';
        for bad in [
            &flipped[..],
            &good[..good.len() / 2],
            b"no backup at all",
            b"",
        ] {
            std::fs::write(&file, bad).unwrap();
            assert_eq!(verify(&file).unwrap_err().kind, Kind::Data);
            assert_eq!(restore(&file, &new).unwrap_err().kind, Kind::Data);
            assert!(!new.root().exists());
        }
        // A journal that is no backup.
        drop(open);
        let journal = dir.path().join("hub/journal.redb");
        assert!(
            verify(&journal)
                .unwrap_err()
                .message
                .contains("no manifest")
        );
    }

    fn head(height: i64) -> Option<Arc<TipSet>> {
        let text = include_str!("../../libs/node-client/tests/data/tipset.json");
        let mut tipset: TipSet = serde_json::from_str(text).unwrap();
        tipset.height = Epoch(height);
        Some(Arc::new(tipset))
    }

    #[tokio::test]
    async fn a_restored_hub_is_quiet_until_its_epoch_through_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let open = hub(dir.path(), 1);
        let file = dir.path().join("hub.backup");
        make(&open.journal, &open.repo, &file).unwrap();
        let health = Health::default();
        let heads = watch::Sender::new(None);
        // One that was not restored mines at once.
        quiet_after_restore(open.journal.clone(), heads.subscribe(), health.clone()).await;

        let new = repo(dir.path(), "new");
        restore(&file, &new).unwrap();
        let journal = new.open().unwrap().journal;
        let start = || quiet_after_restore(journal.clone(), heads.subscribe(), health.clone());
        let mut waiting = tokio::task::JoinSet::new();
        waiting.spawn(start());
        heads.send_replace(head(1_000));
        let until = Epoch(1_000) + QUIET;
        let noted = async {
            while journal.read(|v| v.get(&RESTORED, &0)).unwrap()
                != Some(Restored { until: Some(until) })
            {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), noted)
            .await
            .unwrap();
        // Killed, and started again on a later head: the epoch stays.
        waiting.shutdown().await;
        heads.send_replace(head(until.0));
        waiting.spawn(start());
        for _ in 0..100 {
            tokio::task::yield_now().await;
            assert!(waiting.try_join_next().is_none());
        }
        let why = health.components()["mining"].detail.clone();
        assert!(why.contains(&until.to_string()), "{why}");
        heads.send_replace(head(until.0 + 1));
        let ended = tokio::time::timeout(Duration::from_secs(20), waiting.join_next());
        ended.await.unwrap().unwrap().unwrap();
        // And from then on it is a hub like any other.
        start().await;
    }
}
