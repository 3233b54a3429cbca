use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use lotus_node_client::NodeError;
use lotus_node_client::api::{HeadChange, HeadChangeKind, TipSet, TipSetKey};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use crate::{Change, Shared, Stopped};

/// Pause before the node is asked again for a path that it could not give.
const AGAIN: Duration = Duration::from_secs(1);

/// An unbroken walk of the head. A reader that is slow catches up by a path from the last tipset
/// it saw, and so may skip detours, but no tipset of the chain.
pub struct Changes {
    shared: Arc<Shared>,
    rx: Receiver<Change>,
    /// The head after everything handed out and queued.
    at: Option<TipSetKey>,
    queue: VecDeque<Change>,
    /// Changes were lost and a path must be asked for.
    behind: bool,
}

impl Changes {
    pub(crate) fn new(
        shared: Arc<Shared>,
        head: Option<Arc<TipSet>>,
        rx: Receiver<Change>,
    ) -> Self {
        Self {
            shared,
            rx,
            at: head.as_ref().map(|h| h.key()),
            queue: head.map(Change::Apply).into_iter().collect(),
            behind: false,
        }
    }

    /// The next step. Cancel-safe.
    pub async fn next(&mut self) -> Result<Change, Stopped> {
        loop {
            if let Some(change) = self.queue.pop_front() {
                return Ok(change);
            }
            if self.behind {
                self.catch_up().await;
                continue;
            }
            match self.rx.recv().await {
                Ok(change) => {
                    self.at = Some(match &change {
                        Change::Apply(t) => t.key(),
                        Change::Revert(t) => t.parents(),
                    });
                    return Ok(change);
                }
                Err(RecvError::Lagged(_)) => self.behind = true,
                Err(RecvError::Closed) => return Err(Stopped),
            }
        }
    }

    /// [`Changes::next`], or `None` once `stop` is cancelled or the follower has stopped.
    pub async fn next_or_stop(&mut self, stop: &CancellationToken) -> Option<Change> {
        tokio::select! {
            () = stop.cancelled() => None,
            change = self.next() => change.ok(),
        }
    }

    async fn catch_up(&mut self) {
        let (head, rx) = self.shared.subscribe();
        let steps = match (&self.at, &head) {
            (Some(at), Some(head)) => match path(&self.shared, at, head).await {
                Ok(steps) => steps,
                Err(e) => {
                    tracing::debug!(error = %e, "no path yet");
                    return tokio::time::sleep(AGAIN).await;
                }
            },
            _ => head.iter().cloned().map(Change::Apply).collect(),
        };
        self.queue = steps.into();
        self.at = head.map(|h| h.key());
        self.rx = rx;
        self.behind = false;
    }
}

/// The steps between two tipsets, by the node's knowledge. A node that does not know the old one
/// was reset or restored: the walk then jumps, which readers see as an `Apply` on other parents.
pub(crate) async fn path(
    shared: &Shared,
    from: &TipSetKey,
    to: &Arc<TipSet>,
) -> Result<Vec<Change>, NodeError> {
    let to_key = to.key();
    if *from == to_key {
        return Ok(Vec::new());
    }
    match shared.node.chain_get_path(from, &to_key).await {
        Ok(steps) => Ok(steps.into_iter().map(step).collect()),
        Err(e @ NodeError::Rpc { .. }) => {
            tracing::warn!(error = %e, %from, to = %to_key, "the node has no path from the last head");
            Ok(vec![Change::Apply(to.clone())])
        }
        Err(e) => Err(e),
    }
}

pub(crate) fn step(change: HeadChange) -> Change {
    let tipset = Arc::new(change.val);
    match change.kind {
        HeadChangeKind::Revert => Change::Revert(tipset),
        HeadChangeKind::Apply | HeadChangeKind::Current => Change::Apply(tipset),
    }
}
