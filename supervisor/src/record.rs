//! What a supervisor leaves for the next one, should it be killed: which processes live, and what
//! it knew of them. Of one boot only: after a reboot nobody is alive.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::sockets::Known;

/// A process of the operating system, for good: a pid alone is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    /// Clock ticks from boot to its start (field 22 of /proc/PID/stat).
    pub(crate) start_time: u64,
}

/// What is known of one process. Keys of later releases are passed over: after a way back an
/// older supervisor reads the record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Entry {
    pub(crate) alive: Option<Identity>,
    /// Unix milliseconds at which it was spawned.
    pub(crate) since_unix_ms: u64,
    pub(crate) ready: bool,
    /// An operator stopped it.
    pub(crate) stopped: bool,
    pub(crate) restarts: u32,
    pub(crate) crashes_in_a_row: u32,
    pub(crate) last_exit: String,
    /// The proving guard squeezes or froze it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) squeezed: bool,
    /// The file that it runs, to tell releases apart.
    pub(crate) program: String,
    /// Unix milliseconds until which it may finish what is open; 0 when it does not drain.
    pub(crate) drains_until_unix_ms: u64,
    /// Sockets that this supervisor owned for it.
    pub(crate) sockets: Vec<Known>,
    /// Its sandbox in words.
    pub(crate) sandbox: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Document {
    boot_id: String,
    processes: BTreeMap<String, Entry>,
}

/// The record's file.
#[derive(Debug)]
pub(crate) struct Record {
    path: PathBuf,
    boot_id: String,
    written: String,
}

impl Record {
    /// Opens the record, and gives what the supervisor before this one wrote in this boot. A
    /// record that cannot be read is none: the locks still say who lives.
    pub(crate) fn open(run_dir: &Path) -> io::Result<(Self, BTreeMap<String, Entry>)> {
        let path = run_dir.join("processes.json");
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
            .trim()
            .to_owned();
        let before = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice::<Document>(&text).unwrap_or_else(|e| {
                tracing::warn!(%e, path = %path.display(), "the record is not readable");
                Document::default()
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Document::default(),
            Err(e) => return Err(e),
        };
        let known = if before.boot_id == boot_id {
            before.processes
        } else {
            BTreeMap::new()
        };
        let record = Self {
            path,
            boot_id,
            written: String::new(),
        };
        Ok((record, known))
    }

    /// Writes what is known now, if it changed. Not synced: it is worth nothing after a reboot.
    pub(crate) fn write(&mut self, processes: BTreeMap<String, Entry>) -> io::Result<()> {
        let text = serde_json::to_string_pretty(&Document {
            boot_id: self.boot_id.clone(),
            processes,
        })?;
        if text == self.written {
            return Ok(());
        }
        let temp = self.path.with_extension("json.tmp");
        std::fs::write(&temp, &text)?;
        std::fs::rename(&temp, &self.path)?;
        self.written = text;
        Ok(())
    }
}

/// When a process started, in clock ticks since boot; none if there is no such process.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    start_time_of(&stat)
}

/// Field 22 of /proc/PID/stat. The second field may hold spaces and parentheses.
fn start_time_of(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// Whether a process is a child of ours, so that its exit status is ours to know. It is if the
/// supervisor that started it was this process, with another image.
pub(crate) fn is_child(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    parent_of(&stat) == Some(std::process::id())
}

/// Field 4 of /proc/PID/stat.
fn parent_of(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// Whether a process leads its process group, as each one does that a supervisor spawned.
pub(crate) fn is_leader(pid: u32) -> bool {
    i32::try_from(pid).is_ok_and(|pid| {
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::unistd::getpgid(Some(pid)) == Ok(pid)
    })
}

/// What a supervisor that starts finds of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// It does not run.
    Nobody,
    /// It runs: this is its pid.
    Alive(u32),
    /// It ended, and processes that it started hold its lock.
    Leftovers(Vec<u32>),
}

/// Who lives: `recorded` if its identity still holds, else whoever has the lock. Of those the one
/// that leads its group is the process, and the others are what it started.
pub(crate) fn found(
    recorded: Option<Identity>,
    start_time: impl Fn(u32) -> Option<u64>,
    holders: &[u32],
    is_leader: impl Fn(u32) -> bool,
) -> Found {
    if let Some(id) = recorded
        && start_time(id.pid) == Some(id.start_time)
    {
        return Found::Alive(id.pid);
    }
    match holders.iter().copied().find(|pid| is_leader(*pid)) {
        Some(pid) => Found::Alive(pid),
        None if holders.is_empty() => Found::Nobody,
        None => Found::Leftovers(holders.to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_supervisor_knows_who_lives() {
        let id = |pid, start_time| Some(Identity { pid, start_time });
        // Pid 7 started at tick 70, and so on.
        let started = |pid: u32| (pid < 10).then(|| u64::from(pid) * 10);
        let leads = |pid: u32| pid == 8;
        for (recorded, holders, wanted) in [
            (None, &[][..], Found::Nobody),
            (id(7, 70), &[7], Found::Alive(7)),
            // Its lock file was removed by someone; it lives all the same.
            (id(7, 70), &[], Found::Alive(7)),
            // The pid was used again.
            (id(7, 33), &[], Found::Nobody),
            (id(12, 120), &[], Found::Nobody),
            // Spawned just before the supervisor was killed: the lock knows more than the record.
            (id(7, 33), &[5, 8], Found::Alive(8)),
            (None, &[8], Found::Alive(8)),
            (id(12, 120), &[5, 6], Found::Leftovers(vec![5, 6])),
        ] {
            assert_eq!(
                found(recorded, started, holders, leads),
                wanted,
                "{recorded:?} {holders:?}"
            );
        }
    }

    #[test]
    fn a_start_time_is_found_behind_any_name() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 987 0 0";
        assert_eq!(start_time_of(stat), Some(987));
        assert_eq!(parent_of(stat), Some(1));
        assert!(!is_child(std::process::id()));
        assert_eq!(start_time_of("42 (x"), None);
        assert!(start_time(std::process::id()).is_some_and(|t| t > 0));
    }

    #[test]
    fn a_record_is_of_one_boot() {
        let dir = tempfile::tempdir().unwrap();
        let (mut record, before) = Record::open(dir.path()).unwrap();
        assert!(before.is_empty());
        let entry = Entry {
            ready: true,
            ..Entry::default()
        };
        record
            .write([("hub".to_owned(), entry.clone())].into())
            .unwrap();
        assert_eq!(Record::open(dir.path()).unwrap().1["hub"], entry);
        record.boot_id = "another".into();
        record.write([("hub".to_owned(), entry)].into()).unwrap();
        assert!(Record::open(dir.path()).unwrap().1.is_empty());
        std::fs::write(dir.path().join("processes.json"), "{").unwrap();
        assert!(Record::open(dir.path()).unwrap().1.is_empty());
    }
}
