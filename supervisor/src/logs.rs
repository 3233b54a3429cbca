//! Log files. A process writes its own, so that nothing breaks when the supervisor dies.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FallocateFlags, fallocate, inotify};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use crate::fd;

/// Opens a log to append to it.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// When logs are moved aside, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rotation {
    /// Bytes from which on.
    pub(crate) limit: u64,
    /// How long before, even if there are fewer.
    pub(crate) age: Duration,
    /// Old ones that are kept.
    pub(crate) keep: u32,
}

/// Moves a log that is large or old enough to `NAME.log.1`, and older ones one further. The
/// process goes on writing to the same file, and no line is lost: what was copied is cut out of
/// the file's beginning, which leaves what is written meanwhile alone. Up to one block stays.
pub(crate) fn rotate(path: &Path, rules: Rotation) -> io::Result<()> {
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let (len, block) = (meta.len(), meta.blksize().max(1));
    let old_enough = begun(path, &meta)
        .and_then(|at| at.elapsed().ok())
        .is_some_and(|age| age >= rules.age);
    // The whole blocks, but never all of the file: that the kernel refuses.
    let cut = len.saturating_sub(1) / block * block;
    if cut == 0 || (len <= rules.limit && !old_enough) {
        return Ok(());
    }
    let temp = old(path, "tmp");
    io::copy(&mut File::open(path)?.take(cut), &mut File::create(&temp)?)?;
    for n in (1..rules.keep).rev() {
        match std::fs::rename(old(path, &n.to_string()), old(path, &(n + 1).to_string())) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    std::fs::rename(&temp, old(path, "1"))?;
    let log = OpenOptions::new().write(true).open(path)?;
    match fallocate(&log, FallocateFlags::COLLAPSE_RANGE, 0, cut) {
        // A file system that cannot: what is written between the copy and this is lost.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => log.set_len(0),
        done => Ok(done?),
    }
}

/// When the log that is written now was begun: when the one before was moved aside, else when the
/// file was made, where the file system knows it.
fn begun(path: &Path, meta: &std::fs::Metadata) -> Option<SystemTime> {
    let before = std::fs::metadata(old(path, "1")).and_then(|m| m.modified());
    before.or_else(|_| meta.created()).ok()
}

fn old(path: &Path, what: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(what);
    name.into()
}

/// The last `lines` of a log, at most `bytes` of them.
pub(crate) fn last_lines(path: &Path, lines: usize, bytes: u64) -> io::Result<Vec<String>> {
    let text = tail(path, bytes)?;
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    Ok(all[from..].iter().map(|l| (*l).to_owned()).collect())
}

/// Prints what is written to a log from `at` on, until printing fails. A log that became shorter
/// was moved aside: it is read from its beginning.
pub(crate) fn follow(
    path: &Path,
    mut at: u64,
    mut print: impl FnMut(&str) -> io::Result<()>,
) -> io::Result<()> {
    loop {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        if len < at {
            at = 0;
        }
        if len > at {
            file.seek(io::SeekFrom::Start(at))?;
            let mut text = Vec::new();
            file.take((len - at).min(MOST)).read_to_end(&mut text)?;
            // A line that is not whole is printed when it is.
            let Some(end) = text.iter().rposition(|b| *b == b'\n') else {
                std::thread::sleep(LOOK);
                continue;
            };
            at += end as u64 + 1;
            match print(&String::from_utf8_lossy(&text[..=end])) {
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                printed => printed?,
            }
        } else {
            std::thread::sleep(LOOK);
        }
    }
}

/// Most that is read of a log at a time.
const MOST: u64 = 1 << 20;
/// How often a log that is followed is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The end of a log, at most `bytes`, from a line's start.
pub(crate) fn tail(path: &Path, bytes: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let from = len.saturating_sub(bytes);
    file.seek(io::SeekFrom::Start(from))?;
    let mut text = Vec::with_capacity(usize::try_from(len - from).unwrap_or(0) + 1);
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
    words(&text.lines().collect::<Vec<_>>())
}

/// The last two lines that are not ours.
pub(crate) fn words<L: AsRef<str>>(lines: &[L]) -> String {
    let said = |l: &&str| !l.starts_with(MARK) && !l.trim().is_empty();
    let last = lines.iter().rev().map(AsRef::as_ref).filter(said).take(2);
    let last: Vec<&str> = last.collect();
    last.into_iter().rev().collect::<Vec<_>>().join(" | ")
}

const MARK: &str = "--- supervisor:";

/// Writes a line of the supervisor's own into a process's log.
pub(crate) fn mark(path: &Path, line: &str) {
    // In one write: the process has the file too.
    let text = format!("{MARK} {line}\n");
    let written = open(path).and_then(|mut f| f.write_all(text.as_bytes()));
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
                && e != Errno::NOENT
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
    use std::sync::atomic::Ordering;

    use super::*;

    const RULES: Rotation = Rotation {
        limit: 10_000,
        age: Duration::from_secs(3600),
        keep: 1000,
    };

    #[test]
    fn no_line_is_lost_when_a_log_moves_aside() {
        const LINES: u32 = 50_000;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let mut writer = open(&path).unwrap();
        writer.write_all(&[0; 20_000]).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        if fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096).is_err() {
            println!(
                "SKIPPED: this file system cuts nothing out of a file: set TMPDIR to ext4, xfs"
            );
            return;
        }
        file.set_len(0).unwrap();
        // On a busy machine the writer may be done before it was moved aside often: it goes on until
        // then, within what `keep` holds.
        let often = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let told = often.clone();
        let writes = std::thread::spawn(move || {
            let mut n = 0;
            while n < LINES || (n < 10 * LINES && !told.load(Ordering::Relaxed)) {
                writer.write_all(format!("line {n}\n").as_bytes()).unwrap();
                n += 1;
            }
            n
        });
        while !writes.is_finished() {
            rotate(&path, RULES).unwrap();
            often.store(old(&path, "11").exists(), Ordering::Relaxed);
        }
        let lines = writes.join().unwrap();
        rotate(&path, RULES).unwrap();
        let mut text = String::new();
        let mut moved = 0;
        for n in (1..RULES.keep).rev() {
            if let Ok(part) = std::fs::read_to_string(old(&path, &n.to_string())) {
                text += &part;
                moved += 1;
            }
        }
        text += &std::fs::read_to_string(&path).unwrap();
        let got: Vec<&str> = text.lines().collect();
        assert_eq!(got.len(), lines as usize, "{moved} moves");
        assert!(
            got.iter()
                .enumerate()
                .all(|(n, l)| *l == format!("line {n}"))
        );
        assert!(moved > 10, "{moved}");
    }

    #[test]
    fn old_logs_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let rules = Rotation { keep: 2, ..RULES };
        for n in 0..5 {
            let mut writer = open(&path).unwrap();
            writer.write_all(&vec![b'a' + n; 20_000]).unwrap();
            rotate(&path, rules).unwrap();
        }
        let first = |what: &str| std::fs::read(old(&path, what)).unwrap()[8_000];
        assert_eq!((first("2"), first("1")), (b'd', b'e'));
        assert!(!old(&path, "3").exists() && !old(&path, "tmp").exists());
        // A small one goes when it is old.
        rotate(&path, rules).unwrap();
        open(&path).unwrap().write_all(&[b'z'; 5_000]).unwrap();
        let aged = Rotation {
            age: Duration::ZERO,
            ..rules
        };
        rotate(&path, aged).unwrap();
        assert_eq!(first("2"), b'e');
    }

    #[test]
    fn the_end_of_a_log_has_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        open(&path).unwrap().write_all(b"first\nsecond\n").unwrap();
        assert_eq!(tail(&path, 100).unwrap(), "first\nsecond\n");
        assert_eq!(tail(&path, 9).unwrap(), "second\n");
        assert_eq!(last_lines(&path, 1, 100).unwrap(), ["second"]);
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
