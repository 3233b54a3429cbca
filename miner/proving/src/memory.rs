//! How much memory this process may still take.

use std::fs;
use std::path::Path;

const CGROUPS: &str = "/sys/fs/cgroup";

/// Bytes that a new process of ours could use: what Linux estimates for the whole machine, or
/// less where a control group (a container, a systemd unit) allows less.
pub(crate) fn free_memory() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| available(&text));
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = own.lines().find_map(|l| l.strip_prefix("0::/"));
    let group = group.and_then(|own| left_in_groups(Path::new(CGROUPS), own));
    machine.into_iter().chain(group).min()
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// What the limits of a group and of those around it leave. Files that nobody has used of late are
/// counted as free, as in `MemAvailable`. Source: Linux, cgroup-v2.rst.
fn left_in_groups(root: &Path, own: &str) -> Option<u64> {
    let dir = root.join(own);
    let groups = dir.ancestors().take_while(|d| d.starts_with(root));
    let left = groups.filter_map(|d| {
        let number = |file| fs::read_to_string(d.join(file)).ok()?.trim().parse().ok();
        let (max, used): (u64, u64) = (number("memory.max")?, number("memory.current")?);
        let stat = fs::read_to_string(d.join("memory.stat")).unwrap_or_default();
        let idle = stat.lines().find_map(|l| l.strip_prefix("inactive_file "));
        let idle: u64 = idle.and_then(|n| n.parse().ok()).unwrap_or(0);
        Some(max.saturating_sub(used.saturating_sub(idle)))
    });
    left.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_counts() {
        assert!(free_memory().is_some_and(|m| m > 1 << 20));
        let text = "MemTotal: 9 kB\nMemAvailable:       2048 kB\n";
        assert_eq!(available(text), Some(2 << 20));
        assert_eq!(available("MemTotal: 9 kB\n"), None);

        let dir = tempfile::tempdir().unwrap();
        let group = |path: &str, max: &str, used: u64, idle: u64| {
            let at = dir.path().join(path);
            fs::create_dir_all(&at).unwrap();
            fs::write(at.join("memory.max"), format!("{max}\n")).unwrap();
            fs::write(at.join("memory.current"), format!("{used}\n")).unwrap();
            let stat = format!("anon 7\ninactive_file {idle}\n");
            fs::write(at.join("memory.stat"), stat).unwrap();
        };
        let left = || left_in_groups(dir.path(), "pod/hub");
        assert_eq!(left(), None);
        group("pod/hub", "max", 500, 0);
        assert_eq!(left(), None);
        group("pod", "1000", 600, 100);
        assert_eq!(left(), Some(500));
        group("pod/hub", "300", 250, 20);
        assert_eq!(left(), Some(70));
        group("pod/hub", "300", 400, 0);
        assert_eq!(left(), Some(0));
    }
}
