use std::collections::BTreeMap;
use std::sync::Arc;

use lotus_types::Epoch;
use tokio::sync::watch;

/// What kind of work it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Proofs of a deadline are made.
    WindowPost,
    /// Proofs of a deadline will be made within an epoch or two.
    WindowPostSoon,
    /// A deadline is not proven on chain yet: its proofs are made, and their messages on the way.
    Deadline,
    /// The proof of a block is made.
    WinningPost,
    /// A round is won, and its block is not out yet.
    Block,
}

impl Work {
    /// Whether a restart of the hub would interrupt it.
    const fn is_interrupted(self) -> bool {
        match self {
            Self::WindowPost | Self::Deadline | Self::Block => true,
            // The one has not begun, the other is part of a block.
            Self::WindowPostSoon | Self::WinningPost => false,
        }
    }

    /// Whether it takes the processor and the disks, now or in a moment.
    const fn is_proving(self) -> bool {
        match self {
            Self::WindowPost | Self::WindowPostSoon | Self::WinningPost => true,
            Self::Deadline | Self::Block => false,
        }
    }
}

/// Something that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Busy {
    /// Its kind.
    pub work: Work,
    /// What is going on, for operators.
    pub what: String,
    /// The epoch by which it is over at the latest; `None` if nobody knows.
    pub until: Option<Epoch>,
}

/// What WindowPoSt and mining are doing now. Clones share it; `SafeToRestart` and `WatchProving`
/// read it.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<watch::Sender<BTreeMap<u64, Busy>>>);

impl Activity {
    /// Everything that a restart would interrupt; empty means safe.
    #[must_use]
    pub fn busy(&self) -> Vec<Busy> {
        self.of(Work::is_interrupted)
    }

    /// The proofs that are made now, or within moments.
    #[must_use]
    pub fn proving(&self) -> Vec<Busy> {
        self.of(Work::is_proving)
    }

    fn of(&self, wanted: impl Fn(Work) -> bool) -> Vec<Busy> {
        let now = self.0.borrow();
        now.values().filter(|b| wanted(b.work)).cloned().collect()
    }

    /// Told of each change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<BTreeMap<u64, Busy>> {
        self.0.subscribe()
    }

    /// Notes an activity until the guard is dropped.
    pub(crate) fn begin(&self, work: Work, what: String, until: Option<Epoch>) -> BusyGuard {
        let busy = Busy { work, what, until };
        let mut id = 0;
        self.0.send_modify(|all| {
            id = all.last_key_value().map_or(0, |(last, _)| last + 1);
            all.insert(id, busy);
        });
        BusyGuard {
            of: self.clone(),
            id,
        }
    }
}

/// Ends an activity when dropped.
pub(crate) struct BusyGuard {
    of: Activity,
    id: u64,
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.of
            .0
            .send_if_modified(|all| all.remove(&self.id).is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_activity_lasts_as_long_as_its_guard() {
        let a = Activity::default();
        let mut changes = a.changes();
        changes.mark_unchanged();
        let begin = |work| a.begin(work, "it".into(), Some(Epoch(9)));
        let deadline = begin(Work::Deadline);
        assert!(changes.has_changed().unwrap());
        assert_eq!((a.busy().len(), a.proving().len()), (1, 0));
        let proof = begin(Work::WindowPost);
        assert_eq!((a.busy().len(), a.proving().len()), (2, 1));
        changes.mark_unchanged();
        drop(proof);
        assert!(changes.has_changed().unwrap());
        assert_eq!((a.busy().len(), a.proving().len()), (1, 0));
        drop(deadline);
        let soon = begin(Work::WindowPostSoon);
        assert_eq!((a.busy().len(), a.proving().len()), (0, 1));
        drop(soon);
        assert!(a.busy().is_empty() && a.proving().is_empty());
    }
}
