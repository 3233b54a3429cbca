//! What a squeezed process may read of each disk, where weights do not count.
//!
//! Only reads have a bound. A write that waits may hold what the file system's journal waits for,
//! and with it the journals of the hub.

use std::io;
use std::path::Path;

/// What one read ahead is, by default (`read_ahead_kb`): a bound in bytes alone would let small
/// reads keep a hard disk busy.
const READ: u64 = 128 << 10;
/// More disks than any host of ours has.
const MOST: usize = 1024;

/// Bound of the reads of each disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reads {
    bytes_per_sec: u64,
}

impl Reads {
    /// From MiB a second; none for 0.
    pub(crate) fn new(mib_per_sec: u32) -> Option<Self> {
        let bytes_per_sec = u64::from(mib_per_sec) << 20;
        (bytes_per_sec > 0).then_some(Self { bytes_per_sec })
    }

    const fn per_sec(self) -> u64 {
        self.bytes_per_sec / READ
    }
}

/// A file of a group that bounds what is read of a disk.
pub(super) struct Cap {
    pub(super) file: &'static str,
    bound: fn(Reads) -> String,
    free: &'static str,
}

/// cgroup-v2.rst, "IO Interface Files".
pub(super) const V2: [Cap; 1] = [Cap {
    file: "io.max",
    bound: |r| format!("rbps={} riops={}", r.bytes_per_sec, r.per_sec()),
    free: "rbps=max riops=max",
}];
/// cgroup-v1/blkio-controller.rst, "Throttling/Upper limit policy files".
pub(super) const BLKIO: [Cap; 2] = [
    Cap {
        file: "blkio.throttle.read_bps_device",
        bound: |r| r.bytes_per_sec.to_string(),
        free: "0",
    },
    Cap {
        file: "blkio.throttle.read_iops_device",
        bound: |r| r.per_sec().to_string(),
        free: "0",
    },
];

impl Cap {
    /// Bounds every disk that is there now and needs it.
    pub(super) fn set(&self, dir: &Path, reads: Reads) -> io::Result<()> {
        self.write(
            dir,
            &without_weights(Path::new("/sys/block")),
            &(self.bound)(reads),
        )
    }

    /// Lifts every bound that the group has, whoever set it.
    pub(super) fn lift(&self, dir: &Path) -> io::Result<()> {
        let text = std::fs::read_to_string(dir.join(self.file)).unwrap_or_default();
        let disks: Vec<String> = text
            .lines()
            .filter_map(|l| Some(l.split_whitespace().next()?.to_owned()))
            .collect();
        self.write(dir, &disks, self.free)
    }

    fn write(&self, dir: &Path, disks: &[String], value: &str) -> io::Result<()> {
        let file = dir.join(self.file);
        if !file.exists() {
            return Ok(());
        }
        for disk in disks {
            match std::fs::write(&file, format!("{disk} {value}")) {
                // It was pulled out meanwhile.
                Err(e) if e.raw_os_error() == Some(libc::ENODEV) => {}
                Err(e) => {
                    let what = format!("{} \"{disk} {value}\": {e}", file.display());
                    return Err(io::Error::new(e.kind(), what));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

/// The numbers (`MAJOR:MINOR`) of disks whose scheduler knows no weights of groups. Layers above
/// disks (device mapper, md, loop) are no disks: what is read through them is counted below.
fn without_weights(block: &Path) -> Vec<String> {
    let disks = std::fs::read_dir(block).into_iter().flatten().flatten();
    let numbers = disks.filter_map(|disk| {
        let dir = disk.path();
        let read = |file| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        let weighs = read("queue/scheduler").contains("[bfq]");
        let number = read("dev").trim().to_owned();
        (dir.join("device").exists() && !weighs && !number.is_empty()).then_some(number)
    });
    numbers.take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_with_weights_and_layers_are_left_alone() {
        let tmp = tempfile::tempdir().unwrap();
        for (name, number, scheduler, is_disk) in [
            ("sda", "8:0\n", "[mq-deadline] kyber bfq none\n", true),
            ("sdb", "8:16\n", "mq-deadline kyber [bfq] none\n", true),
            ("nvme0n1", "259:0\n", "[none] mq-deadline\n", true),
            ("dm-0", "253:0\n", "", false),
        ] {
            let dir = tmp.path().join(name);
            std::fs::create_dir_all(dir.join("queue")).unwrap();
            std::fs::write(dir.join("dev"), number).unwrap();
            std::fs::write(dir.join("queue/scheduler"), scheduler).unwrap();
            if is_disk {
                std::fs::create_dir(dir.join("device")).unwrap();
            }
        }
        let mut found = without_weights(tmp.path());
        found.sort();
        assert_eq!(found, ["259:0", "8:0"]);
        assert!(without_weights(&tmp.path().join("none")).is_empty());
    }

    #[test]
    fn bounds_are_words_of_the_kernel() {
        assert_eq!(Reads::new(0), None);
        let reads = Reads::new(4).unwrap();
        assert_eq!((V2[0].bound)(reads), "rbps=4194304 riops=32");
        assert_eq!((BLKIO[0].bound)(reads), "4194304");
        assert_eq!((BLKIO[1].bound)(reads), "32");
    }

    #[test]
    fn every_bound_of_a_group_is_lifted() {
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("io.max");
        std::fs::write(&file, "8:16 rbps=1 wbps=max riops=max wiops=max\n").unwrap();
        V2[0].lift(tmp.path()).unwrap();
        let now = std::fs::read_to_string(&file).unwrap();
        assert_eq!(now, "8:16 rbps=max riops=max");
        BLKIO[0].lift(tmp.path()).unwrap();
        assert!(!tmp.path().join(BLKIO[0].file).exists(), "no such kernel");
    }
}
