use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::execute::Growth;

/// Estimates how far a task is from the growth of its output, because the proof library tells
/// nothing.
pub(crate) struct Meter {
    growth: Growth,
    at_start: u64,
    highest: f64,
}

impl Meter {
    /// Begins now: what is there already does not count.
    pub(crate) fn start(growth: Growth) -> Self {
        Self {
            at_start: allocated(&growth.path),
            growth,
            highest: 0.0,
        }
    }

    /// 0 to 0.99, never falling.
    pub(crate) fn fraction(&mut self) -> f64 {
        let grown = allocated(&self.growth.path).saturating_sub(self.at_start);
        #[expect(clippy::cast_precision_loss, reason = "an estimate for people")]
        let now = grown as f64 / self.growth.expected.max(1) as f64;
        self.highest = self.highest.max(now.min(0.99));
        self.highest
    }
}

/// Bytes on disk under a path. Blocks, not lengths, because outputs are sparse at first.
fn allocated(path: &Path) -> u64 {
    let Ok(meta) = path.symlink_metadata() else {
        return 0;
    };
    if !meta.is_dir() {
        return meta.blocks().saturating_mul(512);
    }
    let Ok(entries) = path.read_dir() else {
        return 0;
    };
    // A cache directory is flat and holds a few dozen files.
    entries
        .take(1000)
        .filter_map(|e| e.ok()?.metadata().ok())
        .filter(|m| m.is_file())
        .map(|m| m.blocks().saturating_mul(512))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_follows_growth_and_never_falls() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("old"), vec![1; 1 << 20]).unwrap();
        let mut meter = Meter::start(Growth {
            path: dir.path().into(),
            expected: 4 << 20,
        });
        assert!(meter.fraction() < 0.01);
        std::fs::write(dir.path().join("new"), vec![1; 2 << 20]).unwrap();
        let half = meter.fraction();
        assert!((0.4..0.6).contains(&half), "{half}");
        std::fs::remove_file(dir.path().join("new")).unwrap();
        assert!(meter.fraction() >= half);
        std::fs::write(dir.path().join("new"), vec![1; 9 << 20]).unwrap();
        assert!(meter.fraction() < 1.0);
    }
}
