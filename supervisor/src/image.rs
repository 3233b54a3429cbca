//! Which image a supervisor is, and the way back from one that does not become ready.
//!
//! Three nets, one below the other. The new image goes back by itself, in the same process, when
//! it fails, panics or is not ready in time. One that is not ours, or hangs before it can do that,
//! is ended by an alarm that was set before. And when the process is gone, an heir starts the old
//! image as a new process, which finds all that runs; under systemd that is systemd's work.

use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lotus_runtime::Fault;
use lotus_types::Kind;

use crate::handover::{self, Back, Handover, Image};
use crate::release;

/// How long a new image may take until it serves. It starts nothing in that time.
const READY: Duration = Duration::from_secs(20);
/// When one that does not go back by itself is ended.
const ALARM_SECS: u32 = 30;
/// How long an heir waits for the lock of one that ended.
const LOCK: Duration = Duration::from_secs(10);

/// The file that this process was started from, as it is called: it may be another file later.
pub(crate) fn own_path() -> io::Result<PathBuf> {
    let called = std::env::args_os().next().map(PathBuf::from);
    match called {
        Some(path) if path.components().count() > 1 => std::path::absolute(path),
        _ => std::env::current_exe(),
    }
}

/// The folder of the binaries of a supervisor that is told of no other.
pub(crate) fn own_dir() -> io::Result<PathBuf> {
    let exe = std::env::current_exe()?;
    Ok(exe.parent().map_or_else(PathBuf::new, Path::to_path_buf))
}

/// Goes on as the supervisor of the current release if this is another one.
pub(crate) fn choose(root: &Path) -> Result<(), Fault> {
    let Some(dir) = release::read(root)?.current else {
        return Ok(());
    };
    let wanted = release::supervisor(&dir);
    let us = std::fs::File::open("/proc/self/exe")?;
    if std::env::var_os(handover::CHOSEN_VAR).is_some() || handover::is_same(&us, &wanted) {
        return Ok(());
    }
    let e = handover::exec_fresh(&wanted);
    eprintln!(
        "lotus-supervisor: the current release is in {}, and its supervisor does not start: {e}\n  \
         fix: put it back, or remove {}; this one goes on",
        dir.display(),
        root.join("release.json").display()
    );
    Ok(())
}

/// Goes on as `image`. Returns only if that fails, with what was handed over.
pub(crate) fn replace(mut handover: Handover, image: &Path, root: &Path) -> (Handover, io::Error) {
    let ready = prepare(&mut handover, root);
    let e = match ready {
        Ok(()) => {
            alarm(ALARM_SECS);
            let e = handover.exec(Image::Path(image));
            alarm(0);
            e
        }
        Err(e) => e,
    };
    handover.back = None;
    dismiss(handover.heir.take());
    (handover, e)
}

fn prepare(handover: &mut Handover, root: &Path) -> io::Result<()> {
    handover.back = Some(Back {
        exe: std::fs::File::open("/proc/self/exe")?.into(),
        path: own_path()?,
    });
    let managed = std::env::var_os("INVOCATION_ID").is_some();
    handover.heir = if managed { None } else { Some(appoint(root)?) };
    Ok(())
}

/// Ends this process after so many seconds; 0 for never. It outlives execve.
fn alarm(secs: u32) {
    let _before = match secs {
        0 => nix::unistd::alarm::cancel(),
        n => nix::unistd::alarm::set(n),
    };
}

/// Starts an heir. It lives for as long as the descriptor is open, and then either ends, if a byte
/// was written, or takes over.
fn appoint(root: &Path) -> io::Result<OwnedFd> {
    // By the open file, as the name may have another one by now.
    let pipe = Command::new("/proc/self/exe")
        .arg0(own_path()?)
        .arg("--repo")
        .arg(root)
        .args(["heir", "--"])
        .args(std::env::args_os().skip(1))
        .env_remove(handover::VAR)
        .stdin(Stdio::piped())
        .spawn()?
        .stdin;
    pipe.map(OwnedFd::from)
        .ok_or_else(|| io::Error::other("no pipe"))
}

/// The heir is not needed.
fn dismiss(heir: Option<OwnedFd>) {
    if let Some(pipe) = heir
        && let Err(e) = std::fs::File::from(pipe).write_all(b"x")
    {
        tracing::debug!(%e, "the heir is gone");
    }
}

/// The work of an heir: waits until it is dismissed, or else starts a supervisor with `args`.
pub(crate) fn heir(root: &Path, args: &[std::ffi::OsString]) -> Result<(), Fault> {
    let mut byte = [0u8; 1];
    if io::stdin().read(&mut byte)? > 0 {
        return Ok(());
    }
    eprintln!("lotus-supervisor: the new supervisor ended before it was ready: the old one starts");
    let lock = std::fs::File::create(root.join("run/supervisor.lock"))?;
    let end = Instant::now() + LOCK;
    while lock.try_lock().is_err() {
        if Instant::now() > end {
            return Err(Fault::new(
                Kind::Config,
                "another supervisor runs by now",
                "`lotus-supervisor status` shows what it runs",
            ));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(lock);
    let e = Command::new("/proc/self/exe")
        .arg0(own_path()?)
        .args(args)
        .env(handover::CHOSEN_VAR, "1")
        .stdin(Stdio::null())
        .exec();
    Err(e.into())
}

/// Goes back to the image before this one, if there is one.
pub(crate) fn refuse(why: &str) {
    if let Ok(Some(handover)) = Handover::from_env()
        && let Ok(Some(way_back)) = WayBack::guard(&handover)
    {
        way_back.go(why);
    }
}

/// The way back to the image before this one, until this one is ready.
#[derive(Debug)]
pub(crate) struct WayBack {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// What is handed back; nothing once this image stays.
    handover: Mutex<Option<Handover>>,
    stays: Condvar,
}

impl WayBack {
    /// Guards this image with a copy of what was handed over. Nothing to guard on the way back.
    pub(crate) fn guard(handover: &Handover) -> io::Result<Option<Self>> {
        if handover.back.is_none() {
            alarm(0);
            return Ok(None);
        }
        let shared = Arc::new(Shared {
            handover: Mutex::new(Some(handover.try_clone()?)),
            stays: Condvar::new(),
        });
        let watch = shared.clone();
        std::thread::Builder::new()
            .name("way-back".into())
            .spawn(move || watch.wait())?;
        Ok(Some(Self { shared }))
    }

    /// This image is ready, and stays.
    pub(crate) fn stay(&self) {
        if let Some(handover) = self.shared.lock().take() {
            alarm(0);
            dismiss(handover.heir);
        }
        self.shared.stays.notify_all();
    }

    /// Goes back, if this image is not ready by now.
    pub(crate) fn go(&self, why: &str) {
        let mut held = self.shared.lock();
        go_back(&mut held, why);
    }
}

impl Drop for WayBack {
    fn drop(&mut self) {
        self.go("it ended before it was ready");
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Handover>> {
        self.handover.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) {
        let waits = self
            .stays
            .wait_timeout_while(self.lock(), READY, |held| held.is_some());
        let (mut held, _) = waits.unwrap_or_else(PoisonError::into_inner);
        go_back(&mut held, &format!("it was not ready within {READY:?}"));
    }
}

/// Returns if there is no way back, or it is closed.
fn go_back(held: &mut Option<Handover>, why: &str) {
    let Some(mut handover) = held.take() else {
        return;
    };
    let Some(back) = handover.back.take() else {
        return;
    };
    eprintln!("lotus-supervisor: the new supervisor is not taken: {why}");
    handover.words.failed = Some(why.into());
    alarm(0);
    // The one before does not need it: it was ready.
    dismiss(handover.heir.take());
    let e = handover.exec(Image::Open(&back.exe, &back.path));
    eprintln!(
        "lotus-supervisor: no way back to {}: {e}",
        back.path.display()
    );
}
