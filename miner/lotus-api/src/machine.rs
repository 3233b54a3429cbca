//! What this machine says of itself, in `/proc`.

use std::fs;

/// Memory and processors.
#[derive(Clone, Debug, Default)]
pub(crate) struct Machine {
    pub(crate) hostname: String,
    pub(crate) cpus: u64,
    pub(crate) memory: u64,
    pub(crate) memory_used: u64,
    pub(crate) swap: u64,
    pub(crate) swap_used: u64,
}

impl Machine {
    /// Asks the kernel. What it does not tell is zero.
    pub(crate) fn here() -> Self {
        let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = |name| field_kib(&text, name);
        Self {
            hostname: hostname.trim().to_owned(),
            cpus: std::thread::available_parallelism().map_or(0, |n| n.get() as u64),
            memory: memory("MemTotal"),
            memory_used: memory("MemTotal").saturating_sub(memory("MemAvailable")),
            swap: memory("SwapTotal"),
            swap_used: memory("SwapTotal").saturating_sub(memory("SwapFree")),
        }
    }
}

/// Bytes of memory that a process holds.
pub(crate) fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    field_kib(&text, "VmRSS")
}

/// A line such as `MemTotal:  1234 kB`, in bytes.
fn field_kib(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_read() {
        let text = "MemTotal:       16374 kB\nMemTotalX: 1 kB\nHugePages_Total:   3\n";
        assert_eq!(field_kib(text, "MemTotal"), 16374 * 1024);
        assert_eq!(field_kib(text, "HugePages_Total"), 0);
        assert_eq!(field_kib(text, "MemFree"), 0);
        let here = Machine::here();
        assert!(here.cpus > 0 && here.memory > here.memory_used, "{here:?}");
        assert!(resident(std::process::id()) > 0);
    }
}
