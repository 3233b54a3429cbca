//! The hub's directory: configuration, lock, journal, sockets, pieces, sectors.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lotus_journal::{Journal, Map};
use lotus_runtime::Fault;
use lotus_types::{Generation, Kind};

/// Variable with the repo's path.
pub const REPO_VAR: &str = "LOTUS_HUB_MINER";
/// Variable with the repo's path, as Lotus calls it.
pub const LOTUS_VAR: &str = "LOTUS_MINER_PATH";
/// Repo when neither `--repo` nor the variable names one, below the home directory.
pub const DEFAULT_REPO: &str = "~/.lotus-hub/miner";

/// The repo when no `--repo` was given: that of the Lotus variable, else [`DEFAULT_REPO`].
#[must_use]
pub fn default_repo() -> String {
    or_default(std::env::var(LOTUS_VAR).ok())
}

fn or_default(lotus: Option<String>) -> String {
    lotus
        .filter(|path| !path.is_empty())
        .unwrap_or_else(|| DEFAULT_REPO.into())
}

/// How long a hub that was just killed may take to let go of its repo.
const DYING: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(20);

pub(crate) const GENERATION: Map<u64, Generation> = Map::new("hub.generation");

/// Paths of a repo; nothing is opened.
#[derive(Clone, Debug)]
pub struct Repo {
    root: PathBuf,
}

impl Repo {
    /// The repo at `path`; a leading `~` is the home directory. The repo of the Go lotus-miner
    /// is refused: this one has another form, and must not touch it.
    pub fn at(path: &str) -> Result<Self, Fault> {
        let root = match path.strip_prefix("~/") {
            Some(rest) => home()?.join(rest),
            None => PathBuf::from(path),
        };
        // Marks of the Go lotus-miner: its key store and its badger data store.
        if ["keystore", "datastore", "storage.json"]
            .iter()
            .any(|name| root.join(name).exists())
        {
            return Err(Fault::new(
                Kind::Config,
                format!("{} is a repo of the Go lotus-miner", root.display()),
                format!(
                    "leave it as it is, and give this hub a directory of its own with --repo or \
                     {REPO_VAR} (a {LOTUS_VAR} of the old miner counts else): \
                     `lotus-miner init --repo {DEFAULT_REPO} --actor <your actor>`"
                ),
            ));
        }
        Ok(Self { root })
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `config.toml`.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// Sockets and address files.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// The hub API on this host.
    #[must_use]
    pub fn hub_socket(&self) -> PathBuf {
        self.run().join("hub.sock")
    }

    /// The data plane on this host.
    #[must_use]
    pub fn data_socket(&self) -> PathBuf {
        self.run().join("data.sock")
    }

    /// What only the operator may do.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.run().join("control.sock")
    }

    /// Raw piece files.
    #[must_use]
    pub fn pieces(&self) -> PathBuf {
        self.root.join("pieces")
    }

    /// Sealed sectors.
    #[must_use]
    pub fn storage(&self) -> PathBuf {
        self.root.join("storage")
    }

    /// The journal.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.root.join("journal.redb")
    }

    /// Key and registers of the authority that spokes and workers on other hosts are known by.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.root.join("ca")
    }

    /// The audit log.
    #[must_use]
    pub fn audit(&self) -> PathBuf {
        self.root.join("audit")
    }

    /// Logs of the workers.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Whether `init` was here.
    #[must_use]
    pub fn is_initialised(&self) -> bool {
        self.config().exists()
    }

    /// What is said of a directory that `init` did not see.
    pub(crate) fn no_hub(&self) -> Fault {
        Fault::new(
            Kind::Config,
            format!("{} is no hub repo", self.root.display()),
            format!(
                "run `lotus-miner init --repo {} --actor <your actor>`",
                self.root.display()
            ),
        )
    }

    /// Creates the directory, for this user alone.
    pub fn create(&self) -> Result<(), Fault> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(|e| self.fault("create", &e))
    }

    /// Writes `config.toml` for this user alone: it may hold the node's token.
    pub fn write_config(&self, text: &str) -> Result<(), Fault> {
        self.write_private("config.toml", text.as_bytes())
    }

    /// Writes a file for this user alone, in one step.
    pub(crate) fn write_private(&self, name: &str, bytes: &[u8]) -> Result<(), Fault> {
        let write = || {
            let tmp = self.root.join(format!(".{name}.tmp"));
            let mut file = fs::OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&tmp)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(tmp, self.root.join(name))?;
            File::open(&self.root)?.sync_all()
        };
        write().map_err(|e| self.fault(&format!("write {name} in"), &e))
    }

    /// Locks the repo, opens the journal and raises the generation.
    pub fn open(self) -> Result<OpenRepo, Fault> {
        if !self.is_initialised() {
            return Err(self.no_hub());
        }
        let lock = self.lock()?;
        for dir in [self.run(), self.pieces(), self.storage(), self.logs()] {
            fs::create_dir_all(dir).map_err(|e| self.fault("create directories in", &e))?;
        }
        let journal = Journal::open(&self.journal())
            .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
        let generation = journal
            .write(|tx| {
                let next = Generation(tx.get(&GENERATION, &0)?.unwrap_or_default().0 + 1);
                tx.put(&GENERATION, &0, &next)?;
                Ok::<_, lotus_journal::JournalError>(next)
            })
            .map_err(|e| Fault::new(e.kind(), e.to_string(), e.fix()))?;
        Ok(OpenRepo {
            repo: self,
            journal,
            generation,
            _lock: lock,
        })
    }

    /// Takes the lock that this process holds until it ends, however it ends.
    fn lock(&self) -> Result<File, Fault> {
        let path = self.root.join("repo.lock");
        let mut file = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| self.fault("lock", &e))?;
        let end = Instant::now() + DYING;
        let locked = loop {
            match file.try_lock() {
                Err(fs::TryLockError::WouldBlock) if Instant::now() < end => {
                    std::thread::sleep(LOCK_POLL);
                }
                done => break done,
            }
        };
        match locked {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // The holder may be writing its pid just now: the text is for people only.
                if file.read_to_string(&mut pid).is_err() || pid.trim().is_empty() {
                    pid = "unknown".into();
                }
                return Err(Fault::new(
                    Kind::Config,
                    format!(
                        "another hub (pid {}) runs on {}",
                        pid.trim(),
                        self.root.display()
                    ),
                    "stop it first, or give this hub its own --repo",
                ));
            }
            Err(fs::TryLockError::Error(e)) => return Err(self.fault("lock", &e)),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(|e| self.fault("lock", &e))?;
        Ok(file)
    }

    fn fault(&self, doing: &str, e: &std::io::Error) -> Fault {
        let cause = Fault::from(std::io::Error::from(e.kind()));
        Fault::new(
            cause.kind,
            format!("cannot {doing} {}: {e}", self.root.display()),
            cause.fix,
        )
    }
}

/// A repo that this process holds.
#[derive(Debug)]
pub struct OpenRepo {
    /// Its paths.
    pub repo: Repo,
    /// Its journal.
    pub journal: Journal,
    /// The generation of this start.
    pub generation: Generation,
    /// Held until the process ends.
    _lock: File,
}

fn home() -> Result<PathBuf, Fault> {
    std::env::home_dir()
        .filter(|h| !h.as_os_str().is_empty())
        .ok_or_else(|| {
            Fault::new(
                Kind::Config,
                "no home directory",
                "set HOME, or give --repo a full path",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(dir: &Path) -> Repo {
        let repo = Repo::at(dir.join("hub").to_str().unwrap()).unwrap();
        repo.create().unwrap();
        repo
    }

    #[test]
    fn each_start_has_a_higher_generation_and_the_repo_to_itself() {
        let dir = tempfile::tempdir().unwrap();
        let e = repo(dir.path()).open().unwrap_err();
        assert!(e.fix.contains("lotus-miner init"), "{e:?}");
        repo(dir.path()).write_config("").unwrap();

        let first = repo(dir.path()).open().unwrap();
        let e = repo(dir.path()).open().unwrap_err();
        assert_eq!(e.kind, Kind::Config);
        assert!(
            e.message.contains(&format!("pid {}", std::process::id())),
            "{e:?}"
        );
        let generation = first.generation;
        drop(first);
        assert!(repo(dir.path()).open().unwrap().generation > generation);
    }

    #[test]
    fn the_go_repo_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("keystore")).unwrap();
        // Also where only the variable of the old miner names it.
        let path = or_default(Some(dir.path().to_str().unwrap().to_owned()));
        let e = Repo::at(&path).unwrap_err();
        assert!(
            e.message.contains("Go lotus-miner") && e.kind == Kind::Config,
            "{e:?}"
        );
        assert!(e.fix.contains(LOTUS_VAR), "{e:?}");
        for none in [None, Some(String::new())] {
            assert_eq!(or_default(none), DEFAULT_REPO);
        }
    }
}
