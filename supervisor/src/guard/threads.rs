//! Scheduling of each thread of a process and of what it started: the rung for hosts where no
//! control group may be written, and the disk's part where a group has none.
//!
//! `SCHED_IDLE` (sched(7)) weighs less than nice 19 and leaves the nice value alone, so nothing
//! has to be remembered to undo it.

use std::collections::BTreeSet;
use std::io;

/// ioprio_set(2): "one thread", and where the class is in a priority.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_SHIFT: libc::c_int = 13;
/// None: it follows from the nice value.
const IOPRIO_NONE: libc::c_int = 0;
const IOPRIO_IDLE: libc::c_int = 3 << IOPRIO_CLASS_SHIFT;
/// Bit of CAP_SYS_NICE (linux/capability.h).
const CAP_SYS_NICE: u32 = 23;
/// Least RLIMIT_NICE with which a thread of nice 0 leaves SCHED_IDLE: 20 - nice.
const NICE_0: u64 = 20;
/// Threads inherit, so a look may be late by those that were started meanwhile.
const LOOKS: usize = 16;

/// What is changed of each thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// The processor, and with it the disk.
    All,
    /// The disk only.
    Disk,
}

/// Whether what is done to a process can be taken back, or why not.
pub(crate) fn reversible(pid: u32) -> Result<(), String> {
    let ours = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if has_capability(&ours, CAP_SYS_NICE) {
        return Ok(());
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    if nice_limit(&limits).is_some_and(|n| n >= NICE_0) {
        return Ok(());
    }
    Err("a lowered priority could not be raised again: it takes CAP_SYS_NICE or an RLIMIT_NICE of 20".into())
}

/// Whether a bit of `CapEff` is set in /proc/PID/status.
fn has_capability(status: &str, bit: u32) -> bool {
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let all = line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    all.is_some_and(|all| (all >> bit) & 1 == 1)
}

/// The soft RLIMIT_NICE in /proc/PID/limits.
fn nice_limit(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max nice priority"))?;
    let soft = line.split_whitespace().next()?;
    if soft == "unlimited" {
        return Some(u64::MAX);
    }
    soft.parse().ok()
}

/// Lowers every thread of `pid` and of what it started.
pub(crate) fn squeeze(pid: u32, what: What) -> io::Result<()> {
    sweep(pid, &|tid| {
        let policy = if what == What::All && policy(tid)? == libc::SCHED_OTHER {
            set_policy(tid, libc::SCHED_IDLE)?;
            true
        } else {
            false
        };
        let disk = class_of(tid)? == IOPRIO_NONE;
        if disk {
            set_class(tid, IOPRIO_IDLE)?;
        }
        Ok(policy || disk)
    })
}

/// Takes it back.
pub(crate) fn release(pid: u32, what: What) -> io::Result<()> {
    sweep(pid, &|tid| {
        let policy = what == What::All && policy(tid)? == libc::SCHED_IDLE;
        if policy {
            set_policy(tid, libc::SCHED_OTHER)?;
        }
        let disk = class_of(tid)? == IOPRIO_IDLE;
        if disk {
            set_class(tid, IOPRIO_NONE)?;
        }
        Ok(policy || disk)
    })
}

/// Does something to every thread, until a whole look finds nothing to do.
fn sweep(pid: u32, each: &impl Fn(u32) -> io::Result<bool>) -> io::Result<()> {
    for _ in 0..LOOKS {
        let mut changed = false;
        for tid in family(pid).into_iter().flat_map(threads) {
            match each(tid) {
                Ok(did) => changed |= did,
                // It ended meanwhile.
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                Err(e) => return Err(e),
            }
        }
        if !changed {
            return Ok(());
        }
    }
    Err(io::Error::other(format!(
        "it starts threads faster than they are found, {LOOKS} times"
    )))
}

/// A process and those that it started, as long as their parents live.
pub(crate) fn family(pid: u32) -> BTreeSet<u32> {
    let mut found = BTreeSet::from([pid]);
    let mut todo = vec![pid];
    while let Some(parent) = todo.pop() {
        for tid in threads(parent) {
            let children = std::fs::read_to_string(format!("/proc/{parent}/task/{tid}/children"));
            let children = children.unwrap_or_default();
            for child in children.split_whitespace().filter_map(|c| c.parse().ok()) {
                if found.insert(child) {
                    todo.push(child);
                }
            }
        }
    }
    found
}

/// The threads of a process; none if it is gone.
pub(crate) fn threads(pid: u32) -> Vec<u32> {
    let dir = std::fs::read_dir(format!("/proc/{pid}/task"));
    let ids = dir.into_iter().flatten().flatten();
    ids.filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect()
}

fn id(tid: u32) -> io::Result<libc::pid_t> {
    libc::pid_t::try_from(tid).map_err(io::Error::other)
}

/// The scheduling policy of a thread (sched(7)), as the kernel gives it.
pub(crate) fn policy(tid: u32) -> io::Result<libc::c_int> {
    let tid = id(tid)?;
    #[expect(unsafe_code, reason = "a number goes in and a number comes out")]
    // SAFETY: see the reason above.
    let policy = unsafe { libc::sched_getscheduler(tid) };
    if policy < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(policy)
}

fn set_policy(tid: u32, policy: libc::c_int) -> io::Result<()> {
    let tid = id(tid)?;
    let param = libc::sched_param { sched_priority: 0 };
    #[expect(unsafe_code, reason = "the parameter lives for as long as the call")]
    // SAFETY: see the reason above.
    let done = unsafe { libc::sched_setscheduler(tid, policy, &raw const param) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The I/O priority of a thread, as it was set: none if it never was.
fn class_of(tid: u32) -> io::Result<libc::c_int> {
    let tid = id(tid)?;
    #[expect(unsafe_code, reason = "numbers go in and a number comes out")]
    // SAFETY: see the reason above.
    let priority = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    if priority < 0 {
        return Err(io::Error::last_os_error());
    }
    // What is below the class is a level, which neither of our two classes has.
    let class = libc::c_int::try_from(priority).unwrap_or_default() >> IOPRIO_CLASS_SHIFT;
    Ok(class << IOPRIO_CLASS_SHIFT)
}

fn set_class(tid: u32, priority: libc::c_int) -> io::Result<()> {
    let tid = id(tid)?;
    #[expect(unsafe_code, reason = "only numbers go in")]
    // SAFETY: see the reason above.
    let done = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid, priority) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A shell that started another process.
    struct Two(Child);

    impl Two {
        fn start() -> Self {
            use std::os::unix::process::CommandExt as _;
            let mut command = Command::new("sh");
            command.args(["-c", "sleep 60 & sleep 60; true"]);
            Self(command.process_group(0).spawn().unwrap())
        }

        /// Waits until it has done so.
        fn family(&self) -> BTreeSet<u32> {
            let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
            loop {
                let all = family(self.0.id());
                if all.len() == 3 {
                    return all;
                }
                assert!(std::time::Instant::now() < end, "{all:?}");
                std::thread::yield_now();
            }
        }
    }

    impl Drop for Two {
        fn drop(&mut self) {
            let group = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
            nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn every_thread_is_lowered_and_raised_again() {
        let two = Two::start();
        let all = two.family();
        let pid = two.0.id();
        if let Err(why) = reversible(pid) {
            eprintln!("SKIPPED: threads are not squeezed on this machine: {why}");
            return;
        }
        let now = || -> Vec<_> {
            let tids = all.iter().copied().flat_map(threads);
            tids.map(|t| (policy(t).unwrap(), class_of(t).unwrap()))
                .collect()
        };
        let before = now();
        assert!(
            before
                .iter()
                .all(|p| *p == (libc::SCHED_OTHER, IOPRIO_NONE)),
            "{before:?}"
        );
        squeeze(pid, What::All).unwrap();
        assert_eq!(now(), vec![(libc::SCHED_IDLE, IOPRIO_IDLE); before.len()]);
        // The kernel's own word: field 41 is the policy.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1;
        assert_eq!(fields.split_whitespace().nth(38), Some("5"), "{stat}");
        release(pid, What::All).unwrap();
        assert_eq!(now(), before);
        squeeze(pid, What::Disk).unwrap();
        assert_eq!(now(), vec![(libc::SCHED_OTHER, IOPRIO_IDLE); before.len()]);
        release(pid, What::All).unwrap();
        assert_eq!(now(), before);
    }

    #[test]
    fn what_was_set_by_others_stays() {
        let two = Two::start();
        let pid = two.0.id();
        two.family();
        set_policy(pid, libc::SCHED_BATCH).unwrap();
        set_class(pid, (2 << IOPRIO_CLASS_SHIFT) | 4).unwrap();
        squeeze(pid, What::All).unwrap();
        assert_eq!(policy(pid).unwrap(), libc::SCHED_BATCH);
        assert_eq!(class_of(pid).unwrap(), 2 << IOPRIO_CLASS_SHIFT);
        release(pid, What::All).unwrap();
        assert_eq!(policy(pid).unwrap(), libc::SCHED_BATCH);
    }

    #[test]
    fn a_process_that_is_gone_is_no_error() {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        squeeze(child.id(), What::All).unwrap();
        release(child.id(), What::All).unwrap();
    }

    #[test]
    fn the_kernels_words_are_read() {
        let status = "Name:\tx\nCapEff:\t0000000000800000\n";
        assert!(has_capability(status, CAP_SYS_NICE));
        assert!(!has_capability("CapEff:\t0000000000400000\n", CAP_SYS_NICE));
        assert!(!has_capability("", CAP_SYS_NICE));
        let limits = |soft| {
            format!(
                "Max processes   9 9 x\nMax nice priority         {soft}                    0\n"
            )
        };
        assert_eq!(nice_limit(&limits("0")), Some(0));
        assert_eq!(nice_limit(&limits("20")), Some(20));
        assert_eq!(nice_limit(""), None);
    }
}
