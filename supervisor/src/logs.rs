//! Log files. A process writes its own, so that nothing breaks when the supervisor dies.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use crate::fd;

/// Opens a log to append to it.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Copies a log that has grown over `limit` to `NAME.log.1` and empties it. The child keeps
/// writing to the same file: it appends.
pub(crate) fn rotate(path: &Path, limit: u64) -> io::Result<()> {
    let len = match std::fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if len <= limit {
        return Ok(());
    }
    std::fs::copy(path, old(path))?;
    OpenOptions::new().write(true).open(path)?.set_len(0)
}

fn old(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The end of a log, at most `bytes`, from a line's start.
pub(crate) fn tail(path: &Path, bytes: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let from = len.saturating_sub(bytes);
    file.seek(io::SeekFrom::Start(from))?;
    let mut text = Vec::new();
    file.take(bytes).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    Ok(match text.split_once('\n') {
        Some((_, rest)) if from > 0 => rest.to_owned(),
        _ => text.into_owned(),
    })
}

/// The last lines of a log that are not ours, for a message.
pub(crate) fn last_words(log: &Path) -> String {
    let text = tail(log, 4096).unwrap_or_default();
    let lines: Vec<&str> = text
        .lines()
        .filter(|l| !l.starts_with(MARK) && !l.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(2)..].join(" | ")
}

const MARK: &str = "--- supervisor:";

/// Writes a line of the supervisor's own into a process's log.
pub(crate) fn mark(path: &Path, line: &str) {
    let written = open(path).and_then(|mut f| writeln!(f, "{MARK} {line}"));
    if let Err(e) = written {
        tracing::warn!(%e, log = %path.display(), "log not written");
    }
}

/// Says that a log was written to, once: sizes are looked at some time after a write, and never
/// while nobody writes.
#[derive(Debug)]
pub(crate) struct Writes {
    inotify: AsyncFd<OwnedFd>,
}

impl Writes {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        Ok(Self {
            inotify: fd::readable(inotify::init(flags)?)?,
        })
    }

    /// Waits for the next write to one of `logs`, from now on.
    pub(crate) fn watch<'a>(&self, logs: impl Iterator<Item = &'a Path>) {
        let flags = inotify::WatchFlags::MODIFY | inotify::WatchFlags::ONESHOT;
        for log in logs {
            if let Err(e) = inotify::add_watch(self.inotify.get_ref(), log, flags)
                && e != rustix::io::Errno::NOENT
            {
                tracing::warn!(%e, log = %log.display(), "the log's size is not watched");
            }
        }
    }

    /// Returns when a watched log was written to. Cancel-safe.
    pub(crate) async fn written(&self) -> io::Result<()> {
        let mut ready = self.inotify.readable().await?;
        let mut events = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.inotify.get_ref(), &mut events);
        // Which log it was does not matter.
        while reader.next().is_ok() {}
        ready.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_full_log_moves_aside_and_the_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let mut writer = open(&path).unwrap();
        writer.write_all(b"first\nsecond\n").unwrap();
        rotate(&path, 100).unwrap();
        assert_eq!(tail(&path, 100).unwrap(), "first\nsecond\n");
        rotate(&path, 5).unwrap();
        writer.write_all(b"third\n").unwrap();
        assert_eq!(tail(&path, 100).unwrap(), "third\n");
        assert_eq!(tail(&old(&path), 100).unwrap(), "first\nsecond\n");
        assert_eq!(tail(&old(&path), 9).unwrap(), "second\n", "whole lines");
    }

    #[tokio::test]
    async fn a_write_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let mut writer = open(&path).unwrap();
        let writes = Writes::new().unwrap();
        writes.watch([path.as_path()].into_iter());
        writer.write_all(b"one\n").unwrap();
        let limit = Duration::from_secs(5);
        tokio::time::timeout(limit, writes.written())
            .await
            .unwrap()
            .unwrap();
        writer.write_all(b"two\n").unwrap();
        let again = tokio::time::timeout(Duration::from_millis(50), writes.written());
        assert!(again.await.is_err(), "not before it is watched again");
    }
}
