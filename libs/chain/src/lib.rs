//! Follows the chain's head: reorgs, null rounds, lost connections, no gap.
//!
//! A full node says how its head moves, but only while one listens. The follower listens, again
//! and again, and asks for the path (`ChainGetPath`) from the last head it knew to the current one
//! whenever something may have been missed, so that [`Follower::changes`] is one unbroken walk.

mod changes;
mod runner;

use std::sync::{Arc, Mutex, PoisonError};

use lotus_node_client::api::TipSet;
use lotus_node_client::{Node, NodeError};
use lotus_types::Epoch;
use tokio::sync::{broadcast, watch};

pub use changes::Changes;
pub use runner::Runner;

/// Changes that a reader may be behind before it catches up by a path of its own.
const BUFFER: usize = 1024;

/// One step of the head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The tipset was the head and left the chain; its parent is the head now.
    Revert(Arc<TipSet>),
    /// The tipset is the head now, on top of the previous one. On other parents only if the node
    /// has forgotten the previous head (it was reset or restored).
    Apply(Arc<TipSet>),
}

/// The follower has stopped, and nothing will change any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the chain follower has stopped")]
pub struct Stopped;

/// The state of the connection to the node: `Ok` while head changes arrive.
pub type Connection = Result<(), NodeError>;

struct Shared {
    node: Node,
    head: watch::Sender<Option<Arc<TipSet>>>,
    changes: broadcast::Sender<Change>,
    connection: watch::Sender<Connection>,
    /// Held while `head` and `changes` move together.
    together: Mutex<()>,
}

/// Handle on the followed chain. Clones share the follower.
#[derive(Clone)]
pub struct Follower {
    shared: Arc<Shared>,
}

impl Follower {
    /// A follower of this node's chain, and what makes it run.
    #[must_use]
    pub fn new(node: Node) -> (Self, Runner) {
        let starting = NodeError::Transport {
            endpoint: "node".into(),
            method: "ChainNotify".into(),
            why: "not connected yet".into(),
        };
        let shared = Arc::new(Shared {
            node,
            head: watch::Sender::new(None),
            changes: broadcast::Sender::new(BUFFER),
            connection: watch::Sender::new(Err(starting)),
            together: Mutex::new(()),
        });
        let follower = Self {
            shared: shared.clone(),
        };
        (follower, Runner::new(shared))
    }

    /// The head; `None` until the node was reached for the first time.
    #[must_use]
    pub fn head(&self) -> watch::Receiver<Option<Arc<TipSet>>> {
        self.shared.head.subscribe()
    }

    /// Every step of the head from now on. The first is an `Apply` of the current head.
    #[must_use]
    pub fn changes(&self) -> Changes {
        let (head, rx) = self.shared.subscribe();
        Changes::new(self.shared.clone(), head, rx)
    }

    /// The state of the connection to the node, for readiness.
    #[must_use]
    pub fn connection(&self) -> watch::Receiver<Connection> {
        self.shared.connection.subscribe()
    }

    /// Waits until the head is at a height or above it, and returns that head. With null rounds it
    /// may be above.
    pub async fn wait_height(&self, at: Epoch) -> Result<Arc<TipSet>, Stopped> {
        let mut head = self.head();
        let reached = head.wait_for(|h| h.as_ref().is_some_and(|h| h.height >= at));
        let reached = reached.await.map_err(|_| Stopped)?;
        reached.clone().ok_or(Stopped)
    }

    /// Waits for the first head.
    pub async fn wait_head(&self) -> Result<Arc<TipSet>, Stopped> {
        self.wait_height(Epoch(i64::MIN)).await
    }
}

impl Shared {
    fn current(&self) -> Option<Arc<TipSet>> {
        self.head.borrow().clone()
    }

    /// The head, and every change from exactly there on.
    fn subscribe(&self) -> (Option<Arc<TipSet>>, broadcast::Receiver<Change>) {
        let _together = self.together.lock().unwrap_or_else(PoisonError::into_inner);
        (self.current(), self.changes.subscribe())
    }

    fn publish(&self, steps: Vec<Change>, head: Arc<TipSet>) {
        let _together = self.together.lock().unwrap_or_else(PoisonError::into_inner);
        for step in steps {
            // Fails only without readers, which is fine.
            drop(self.changes.send(step));
        }
        self.head.send_replace(Some(head));
    }
}
