use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::watch;

/// State of one part of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Component {
    /// Whether it does its job now.
    pub ready: bool,
    /// Why not, or a detail such as the address it serves.
    pub detail: String,
}

/// Readiness of a process: the sum of its components. Clones share it.
#[derive(Clone, Debug)]
pub struct Health {
    parts: Arc<watch::Sender<BTreeMap<String, Component>>>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            parts: Arc::new(watch::Sender::new(BTreeMap::new())),
        }
    }
}

impl Health {
    /// Sets a component: `Ok(detail)` when it is ready, `Err(reason)` when it is not.
    pub fn set(&self, component: &str, state: Result<String, String>) {
        let next = match state {
            Ok(detail) => Component {
                ready: true,
                detail,
            },
            Err(detail) => Component {
                ready: false,
                detail,
            },
        };
        self.parts.send_if_modified(|parts| {
            let changed = parts.get(component) != Some(&next);
            if changed {
                parts.insert(component.to_owned(), next);
            }
            changed
        });
    }

    /// Forgets a component that is no longer wanted.
    pub fn remove(&self, component: &str) {
        self.parts
            .send_if_modified(|parts| parts.remove(component).is_some());
    }

    /// Every component now.
    #[must_use]
    pub fn components(&self) -> BTreeMap<String, Component> {
        self.parts.borrow().clone()
    }

    /// Whether there is a component, and all are ready.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let parts = self.parts.borrow();
        !parts.is_empty() && parts.values().all(|c| c.ready)
    }

    /// Returns when [`Health::is_ready`] holds.
    pub async fn ready(&self) {
        let mut rx = self.parts.subscribe();
        // The sender lives in self, so waiting can not fail.
        if rx
            .wait_for(|parts| !parts.is_empty() && parts.values().all(|c| c.ready))
            .await
            .is_err()
        {
            std::future::pending::<()>().await;
        }
    }

    /// Follows every change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<BTreeMap<String, Component>> {
        self.parts.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ready_when_every_part_is() {
        let h = Health::default();
        assert!(!h.is_ready(), "nothing is not ready");
        h.set("a", Ok(String::new()));
        assert!(h.is_ready());
        h.set("b", Err("starting".into()));
        assert!(!h.is_ready());
        h.remove("b");
        assert!(h.is_ready());
    }
}
