//! The keys of orders whose end is not known yet: they are kept in the repo, so that the same
//! command again is the same order, and both have effect once.

use std::fs;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use lotus_actors::ticket_digest;
use lotus_runtime::Fault;
use lotus_types::Kind;

/// Folder of the repo.
const DIR: &str = "orders";

/// The key of an order, and where it is kept.
#[derive(Debug)]
pub(super) struct Kept {
    file: PathBuf,
    pub(super) key: String,
}

impl Kept {
    /// The kept key of a command of this name that asks for the same. Such an order may have been
    /// sent before.
    pub(super) fn find(repo: &Path, name: &str, asked: &[u8]) -> Result<Option<Self>, Fault> {
        let file = place(repo, name, asked);
        match fs::read_to_string(&file) {
            Ok(key) if key.starts_with(&prefix(name)) => Ok(Some(Self { file, key })),
            // It was being written when its host stopped: nothing was sent.
            Ok(_) => Ok(None),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(unkept(&file, &e)),
        }
    }

    /// The kept key, or a new one, which is kept from now on.
    pub(super) fn of(repo: &Path, name: &str, asked: &[u8]) -> Result<Self, Fault> {
        if let Some(kept) = Self::find(repo, name, asked)? {
            return Ok(kept);
        }
        let (dir, file) = (repo.join(DIR), place(repo, name, asked));
        let failed = |e| unkept(&file, &e);
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        match made {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        let key = format!("{}{}", prefix(name), ulid::Ulid::generate());
        let write = || {
            let mut out = fs::OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&file)?;
            out.write_all(key.as_bytes())?;
            out.sync_all()?;
            fs::File::open(&dir)?.sync_all()
        };
        write().map_err(failed)?;
        Ok(Self { file, key })
    }

    /// What became of the order is known: the same command again is a new one.
    pub(super) fn done(&self) {
        if let Err(e) = fs::remove_file(&self.file)
            && e.kind() != ErrorKind::NotFound
        {
            eprintln!("delete {} by hand: {e}", self.file.display());
        }
    }

    /// An error of sending the order, with what the operator is to do about it.
    pub(super) fn failed(&self, e: Fault) -> Fault {
        if is_certain(e.kind) {
            self.done();
            return e;
        }
        Fault::new(
            e.kind,
            format!(
                "{}; whether order {} was sent is not known",
                e.message, self.key
            ),
            format!(
                "repeat the same command: it goes on with this order, and both have effect once; \
                 or ask with `lotus-miner messages status {}`",
                self.key
            ),
        )
    }
}

fn prefix(name: &str) -> String {
    format!("order/{name}/")
}

fn place(repo: &Path, name: &str, asked: &[u8]) -> PathBuf {
    let digest = ticket_digest(asked);
    let digest: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
    repo.join(DIR).join(format!("{name}-{digest}"))
}

fn unkept(file: &Path, e: &std::io::Error) -> Fault {
    Fault::new(
        Kind::Fatal,
        format!("the order can not be kept as {}: {e}", file.display()),
        "run the command as the hub's user; nothing was sent",
    )
}

/// Whether an error of this kind says that nothing was sent.
const fn is_certain(kind: Kind) -> bool {
    match kind {
        Kind::Capacity | Kind::Chain | Kind::Config | Kind::Data => true,
        Kind::Transport | Kind::Fatal => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeat_is_the_same_order_until_its_end_is_known() {
        let repo = tempfile::tempdir().unwrap();
        let of = |name: &str, asked: &str| {
            let found = Kept::find(repo.path(), name, asked.as_bytes()).unwrap();
            let kept = Kept::of(repo.path(), name, asked.as_bytes()).unwrap();
            (kept.key.clone(), found.is_some(), kept)
        };
        let (first, again, kept) = of("withdraw", "5");
        assert!(!again && first.starts_with("order/withdraw/"));
        // After a timeout the end is open, and the operator is told what to do.
        let timeout = Fault::new(Kind::Transport, "no answer", "wait");
        let told = kept.failed(timeout);
        assert!(
            told.message.contains(&first) && told.fix.contains(&first),
            "{told:?}"
        );
        let (second, again, _) = of("withdraw", "5");
        assert_eq!((&second, again), (&first, true));
        // Another order is another one.
        assert_ne!(of("withdraw", "6").0, first);
        assert_ne!(of("extend", "5").0, first);
        // Refused: nothing was sent.
        let refused = Fault::new(Kind::Chain, "refused", "look");
        assert_eq!(kept.failed(refused).message, "refused");
        let (third, again, kept) = of("withdraw", "5");
        assert!(third != first && !again);
        kept.done();
        assert!(!of("withdraw", "5").1);
    }

    #[test]
    fn half_a_key_is_none() {
        let repo = tempfile::tempdir().unwrap();
        let kept = Kept::of(repo.path(), "extend", b"x").unwrap();
        fs::write(&kept.file, "ord").unwrap();
        assert!(Kept::find(repo.path(), "extend", b"x").unwrap().is_none());
        let next = Kept::of(repo.path(), "extend", b"x").unwrap();
        assert!(next.key.starts_with("order/extend/") && next.key != kept.key);
    }
}
