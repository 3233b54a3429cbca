use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `[audit]` of the hub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// Size at which a file of the log is full, in bytes.
    pub max_file_bytes: u64,
    /// Files that are kept, the present one among them; 0: all.
    pub keep_files: u64,
    /// Records that may wait for the disk.
    pub queue: usize,
    /// Milliseconds that a call waits for a place in the queue, before it is refused.
    pub queue_wait_ms: u64,
}

impl Default for AuditConfig {
    fn default() -> Self {
        Self {
            max_file_bytes: 64 << 20,
            keep_files: 0,
            queue: 4096,
            queue_wait_ms: 2000,
        }
    }
}

impl AuditConfig {
    pub(crate) const fn queue_wait(&self) -> Duration {
        Duration::from_millis(self.queue_wait_ms)
    }
}
