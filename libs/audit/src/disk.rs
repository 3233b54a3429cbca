//! Every change of the disk. In tests each of them is a boundary at which it may fail.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

pub(crate) use fault::Faults;

/// Makes a folder, and those above it, for their owner alone.
pub(crate) fn make_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // A relative path of one name has an empty parent.
    let parent = dir.parent().filter(|p| !p.as_os_str().is_empty());
    sync_dir(parent.unwrap_or(Path::new(".")))
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

impl Faults {
    /// Makes a file with these bytes, whole or not at all, and opens it to append.
    pub(crate) fn create(&self, path: &Path, bytes: &[u8]) -> io::Result<File> {
        let beside = path.with_extension("new");
        self.boundary()?;
        match fs::remove_file(&beside) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = File::options()
            .create_new(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .open(&beside)?;
        self.write(&mut file, bytes)?;
        self.boundary()?;
        file.sync_all()?;
        self.boundary()?;
        fs::rename(&beside, path)?;
        self.boundary()?;
        sync_dir(path.parent().unwrap_or(Path::new(".")))?;
        Ok(file)
    }

    /// Appends. When this fails, a part may be in the file.
    pub(crate) fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        if let Err(e) = self.boundary() {
            file.write_all(self.torn(bytes))?;
            return Err(e);
        }
        file.write_all(bytes)
    }

    /// What was written is on the disk when this returns.
    pub(crate) fn sync(&self, file: &File) -> io::Result<()> {
        self.syncing();
        self.boundary()?;
        file.sync_data()
    }

    /// Cuts what is after `len`, for good.
    pub(crate) fn cut(&self, file: &File, len: u64) -> io::Result<()> {
        self.boundary()?;
        file.set_len(len)?;
        file.sync_all()
    }

    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        self.boundary()?;
        fs::remove_file(path)
    }
}

/// Nothing fails here.
#[cfg(not(test))]
mod fault {
    use std::io;

    #[derive(Clone, Debug, Default)]
    pub(crate) struct Faults(());

    impl Faults {
        pub(super) fn boundary(&self) -> io::Result<()> {
            Ok(())
        }
        pub(super) fn torn<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
            bytes
        }
        pub(super) fn syncing(&self) {}
    }
}

/// A disk that fails, or a process that dies, at a chosen boundary; and one that takes its time.
#[cfg(test)]
mod fault {
    use std::io;
    use std::sync::{Arc, Condvar, Mutex, MutexGuard};

    #[derive(Debug, Default)]
    struct Plan {
        /// Boundaries until its death; `None` when it lives on.
        dies: Option<u32>,
        /// Boundaries until one fails, and only that.
        fails: Option<u32>,
        syncs: u32,
        /// Whether a sync waits, and whether one does.
        held: bool,
        waits: bool,
    }

    #[derive(Clone, Debug, Default)]
    pub(crate) struct Faults(Arc<(Mutex<Plan>, Condvar)>);

    impl Faults {
        fn plan(&self) -> MutexGuard<'_, Plan> {
            self.0.0.lock().unwrap()
        }

        /// From now on everything fails after so many boundaries.
        pub(crate) fn die_after(&self, boundaries: u32) {
            self.plan().dies = Some(boundaries);
        }

        /// Whether it died.
        pub(crate) fn dead(&self) -> bool {
            self.plan().dies == Some(0)
        }

        /// The boundary after so many others finds the disk full.
        pub(crate) fn fail_after(&self, boundaries: u32) {
            self.plan().fails = Some(boundaries);
        }

        /// Whether that boundary was reached. Nothing fails from now on.
        pub(crate) fn failed(&self) -> bool {
            self.plan().fails.take().is_none()
        }

        /// Syncs until now.
        pub(crate) fn syncs(&self) -> u32 {
            self.plan().syncs
        }

        /// From now on a sync waits until it is let go.
        pub(crate) fn hold(&self) {
            self.plan().held = true;
        }

        /// Returns when a sync waits.
        pub(crate) fn wait_for_a_sync(&self) {
            let plan = self.plan();
            drop(self.0.1.wait_while(plan, |p| !p.waits).unwrap());
        }

        pub(crate) fn let_go(&self) {
            self.plan().held = false;
            self.0.1.notify_all();
        }

        pub(super) fn syncing(&self) {
            let mut plan = self.plan();
            plan.syncs += 1;
            plan.waits = true;
            self.0.1.notify_all();
            let mut plan = self.0.1.wait_while(plan, |p| p.held).unwrap();
            plan.waits = false;
        }

        pub(super) fn torn<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
            &bytes[..bytes.len() * 2 / 3]
        }

        pub(super) fn boundary(&self) -> io::Result<()> {
            let mut plan = self.plan();
            match &mut plan.fails {
                Some(0) => {
                    plan.fails = None;
                    return Err(io::ErrorKind::StorageFull.into());
                }
                Some(n) => *n -= 1,
                None => {}
            }
            match &mut plan.dies {
                Some(0) => Err(io::Error::other("the process is dead")),
                Some(n) => {
                    *n -= 1;
                    Ok(())
                }
                None => Ok(()),
            }
        }
    }
}
