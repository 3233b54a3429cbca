//! What a supervisor hands to the image that replaces it: the same process, so its children stay
//! its children, with other code in it.
//!
//! The lock and the sockets stay open across execve(2); their numbers, and what else must not be
//! forgotten, are in a file without a name, whose number is in one variable of the environment.

use std::collections::BTreeMap;
use std::ffi::{CString, OsString};
use std::io::{self, Seek as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

/// Variable with the number of the file.
pub(crate) const VAR: &str = "LOTUS_SUPERVISOR_HANDOVER";
/// Variable that says that the current release was chosen, so that nobody chooses for ever.
pub(crate) const CHOSEN_VAR: &str = "LOTUS_SUPERVISOR_CHOSEN";

/// Everything that is handed over.
#[derive(Debug)]
pub(crate) struct Handover {
    /// The supervisor's lock.
    pub(crate) lock: OwnedFd,
    /// The control socket: calls wait while nobody answers.
    pub(crate) control: OwnedFd,
    /// The socket of readiness and signs of life: what is said meanwhile is read later.
    pub(crate) notify: OwnedFd,
    /// Sockets of spokes, by name.
    pub(crate) listeners: BTreeMap<String, OwnedFd>,
    /// Whoever starts the old image again if this process ends; see [`crate::image::heir`].
    pub(crate) heir: Option<OwnedFd>,
    /// The way back; none on the way back.
    pub(crate) back: Option<Back>,
    pub(crate) words: Words,
}

/// What is handed over besides descriptors. Later releases add keys, with defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Words {
    /// Why the other image was not taken, on the way back.
    pub(crate) failed: Option<String>,
    /// Stops that wait until they are safe.
    pub(crate) plans: Vec<PlanWords>,
}

/// A stop that waits until it is safe.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PlanWords {
    pub(crate) process: String,
    pub(crate) what: String,
    pub(crate) force: bool,
}

/// The image before.
#[derive(Debug)]
pub(crate) struct Back {
    /// Its file, which may have no name any more.
    pub(crate) exe: OwnedFd,
    pub(crate) path: PathBuf,
}

/// The numbers of the descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Document {
    lock: RawFd,
    control: RawFd,
    notify: RawFd,
    #[serde(default)]
    listeners: BTreeMap<String, RawFd>,
    #[serde(default)]
    heir: Option<RawFd>,
    #[serde(default)]
    back: Option<(RawFd, PathBuf)>,
    #[serde(default)]
    words: Words,
}

/// An image to go on as.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Image<'a> {
    /// The file with this name.
    Path(&'a Path),
    /// This file, which had that name.
    Open(&'a OwnedFd, &'a Path),
}

impl Handover {
    /// What the image before this one handed over, if one did. To be called once, first.
    pub(crate) fn from_env() -> io::Result<Option<Self>> {
        let Ok(number) = std::env::var(VAR) else {
            return Ok(None);
        };
        let number = number.parse::<RawFd>().map_err(io::Error::other)?;
        let mut file = std::fs::File::from(own(number)?);
        file.rewind()?;
        let document: Document = serde_json::from_reader(&file)?;
        let mut listeners = BTreeMap::new();
        for (name, number) in document.listeners {
            listeners.insert(name, own(number)?);
        }
        let back = match document.back {
            Some((number, path)) => Some(Back {
                exe: own(number)?,
                path,
            }),
            None => None,
        };
        Ok(Some(Self {
            lock: own(document.lock)?,
            control: own(document.control)?,
            notify: own(document.notify)?,
            listeners,
            heir: document.heir.map(own).transpose()?,
            back,
            words: document.words,
        }))
    }

    /// The same once more, with descriptors of its own.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let mut listeners = BTreeMap::new();
        for (name, fd) in &self.listeners {
            listeners.insert(name.clone(), fd.try_clone()?);
        }
        let back = match &self.back {
            Some(back) => Some(Back {
                exe: back.exe.try_clone()?,
                path: back.path.clone(),
            }),
            None => None,
        };
        Ok(Self {
            lock: self.lock.try_clone()?,
            control: self.control.try_clone()?,
            notify: self.notify.try_clone()?,
            listeners,
            heir: self.heir.as_ref().map(OwnedFd::try_clone).transpose()?,
            back,
            words: self.words.clone(),
        })
    }

    /// Becomes `image`, with the command line of this process. Returns only if that fails, and
    /// then nothing has changed.
    pub(crate) fn exec(&self, image: Image<'_>) -> io::Error {
        let kept = self.descriptors();
        let done = self.exec_with(image, &kept);
        // A process that is spawned later must inherit none of them.
        for fd in kept {
            if let Err(e) = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
                tracing::warn!(%e, "a descriptor would be inherited");
            }
        }
        unblock();
        match done {
            Ok(never) => match never {},
            Err(e) => e,
        }
    }

    fn exec_with(
        &self,
        image: Image<'_>,
        kept: &[&OwnedFd],
    ) -> io::Result<std::convert::Infallible> {
        let document = Document {
            lock: self.lock.as_raw_fd(),
            control: self.control.as_raw_fd(),
            notify: self.notify.as_raw_fd(),
            listeners: (self.listeners.iter())
                .map(|(name, fd)| (name.clone(), fd.as_raw_fd()))
                .collect(),
            heir: self.heir.as_ref().map(|fd| fd.as_raw_fd()),
            back: (self.back.as_ref()).map(|b| (b.exe.as_raw_fd(), b.path.clone())),
            words: self.words.clone(),
        };
        let mut file = std::fs::File::from(memfd_create("lotus-supervisor", MemfdFlags::empty())?);
        file.write_all(&serde_json::to_vec(&document)?)?;
        block()?;
        for fd in kept {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        become_image(image, Some(file.as_raw_fd()))
    }

    fn descriptors(&self) -> Vec<&OwnedFd> {
        [&self.lock, &self.control, &self.notify]
            .into_iter()
            .chain(self.listeners.values())
            .chain(&self.heir)
            .chain(self.back.as_ref().map(|b| &b.exe))
            .collect()
    }
}

/// Becomes an image with nothing handed over. Returns only if that fails.
pub(crate) fn exec_fresh(image: &Path) -> io::Error {
    match become_image(Image::Path(image), None) {
        Ok(never) => match never {},
        Err(e) => e,
    }
}

fn become_image(image: Image<'_>, handover: Option<RawFd>) -> io::Result<std::convert::Infallible> {
    let c = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::other);
    let path = match image {
        Image::Path(path) | Image::Open(_, path) => path,
    };
    let mut args = vec![c(path.as_os_str().to_owned())?];
    for arg in std::env::args_os().skip(1) {
        args.push(c(arg)?);
    }
    let mut env = Vec::new();
    for (key, value) in std::env::vars_os() {
        let ours = [
            VAR,
            CHOSEN_VAR,
            // Their descriptors are closed, and their numbers may mean something else.
            lotus_runtime::notify::FD_VAR,
            lotus_runtime::notify::FENCE_VAR,
        ];
        if ours.iter().all(|name| key != **name) {
            let mut text = key;
            text.push("=");
            text.push(value);
            env.push(c(text)?);
        }
    }
    env.push(c(match handover {
        Some(number) => format!("{VAR}={number}").into(),
        None => format!("{CHOSEN_VAR}=1").into(),
    })?);
    match image {
        Image::Open(fd, path) if !is_same(fd, path) => Ok(nix::unistd::fexecve(fd, &args, &env)?),
        // By its name, so that it is called by it in lists of processes.
        Image::Open(_, path) | Image::Path(path) => Ok(nix::unistd::execve(&args[0], &args, &env)
            .map_err(|e| {
                io::Error::new(
                    io::Error::from(e).kind(),
                    format!("{}: {e}", path.display()),
                )
            })?),
    }
}

/// Whether a name still means an open file.
pub(crate) fn is_same(fd: impl AsFd, path: &Path) -> bool {
    let Ok(open) = rustix::fs::fstat(fd) else {
        return false;
    };
    std::fs::metadata(path).is_ok_and(|m| m.ino() == open.st_ino && m.dev() == open.st_dev)
}

/// A descriptor that was handed over. Processes that are spawned do not inherit it.
fn own(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::other(format!("descriptor {number} handed over")));
    }
    #[expect(
        unsafe_code,
        reason = "the image before this one kept it open for us, and it is owned once: see from_env"
    )]
    // SAFETY: see the reason above; a number that is no open descriptor fails below with EBADF.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    match fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(fd),
        Err(e) => {
            // Not ours to close.
            std::mem::forget(fd);
            Err(e.into())
        }
    }
}

/// Signals that would end an image that does not listen to them yet.
fn ending() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
        .into_iter()
        .collect()
}

/// From now on they wait, across execve too.
fn block() -> io::Result<()> {
    Ok(pthread_sigmask(
        SigmaskHow::SIG_BLOCK,
        Some(&ending()),
        None,
    )?)
}

/// What waited arrives now. To be called once somebody listens.
pub(crate) fn unblock() {
    if let Err(e) = pthread_sigmask(SigmaskHow::SIG_UNBLOCK, Some(&ending()), None) {
        tracing::warn!(%e, "signals stay blocked");
    }
}
