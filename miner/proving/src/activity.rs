use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use lotus_types::Epoch;

/// Something that a restart would interrupt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Busy {
    /// What is going on, for operators.
    pub what: String,
    /// The epoch by which it is over at the latest; `None` if nobody knows.
    pub until: Option<Epoch>,
}

/// What WindowPoSt and mining are doing now. Clones share it; `SafeToRestart` reads it.
#[derive(Clone, Debug, Default)]
pub struct Activity(Arc<Mutex<BTreeMap<String, Busy>>>);

impl Activity {
    /// Everything that a restart would interrupt; empty means safe.
    #[must_use]
    pub fn busy(&self) -> Vec<Busy> {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.values().cloned().collect()
    }

    /// Notes an activity until the guard is dropped.
    pub(crate) fn begin(&self, key: String, what: String, until: Option<Epoch>) -> BusyGuard {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.insert(key.clone(), Busy { what, until });
        BusyGuard {
            of: self.clone(),
            key,
        }
    }
}

/// Ends an activity when dropped.
pub(crate) struct BusyGuard {
    of: Activity,
    key: String,
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        let mut map = self.of.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_activity_lasts_as_long_as_its_guard() {
        let a = Activity::default();
        let guard = a.begin("wdpost 3".into(), "proving".into(), Some(Epoch(9)));
        assert_eq!(a.busy().len(), 1);
        drop(guard);
        assert!(a.busy().is_empty());
    }
}
