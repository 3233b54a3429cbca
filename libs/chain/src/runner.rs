use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use lotus_node_client::api::{HeadChange, HeadChangeKind, TipSet, TipSetKey};
use lotus_node_client::{HeadChanges, NodeError};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::changes::{path, step};
use crate::{Change, Shared};

/// Waits between attempts to subscribe: doubling from the first to the last.
const RETRY: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(5)];
/// Epochs without a head change after which a subscription counts as dead. Runs of null rounds
/// are shorter; where one is not, subscribing again does no harm.
const SILENT_EPOCHS: u32 = 8;
/// Bounds of the silence, for very short and very long epochs.
const SILENCE: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(240)];

/// What makes a follower run.
pub struct Runner {
    shared: Arc<Shared>,
}

impl Runner {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Follows the head until `stop`. Losing the node is normal: it subscribes again, for ever.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&self) {
        let mut wait = RETRY[0];
        let mut told = false;
        loop {
            let before = self.shared.current().map(|h| h.key());
            let Err(e) = self.session(&mut told).await;
            if self.shared.current().map(|h| h.key()) != before {
                wait = RETRY[0];
            }
            if !told {
                tracing::warn!(error = %e, fix = e.fix(), "node connection lost");
                told = true;
            }
            self.shared.connection.send_modify(|c| *c = Err(e));
            sleep(wait).await;
            wait = (wait * 2).min(RETRY[1]);
        }
    }

    /// One subscription, from its start to its failure.
    async fn session(&self, told: &mut bool) -> Result<std::convert::Infallible, NodeError> {
        let mut heads = self.shared.node.chain_notify().await?;
        let silence = self.silence().await;
        loop {
            let batch = next(&mut heads, silence).await?;
            self.advance(batch).await?;
            if self.shared.connection.borrow().is_err() {
                self.shared.connection.send_modify(|c| *c = Ok(()));
                if std::mem::take(told) {
                    tracing::info!("node connection restored");
                }
            }
        }
    }

    async fn silence(&self) -> Duration {
        match self.shared.node.state_get_network_params().await {
            Ok(p) => (p.block_delay() * SILENT_EPOCHS).clamp(SILENCE[0], SILENCE[1]),
            Err(_) => SILENCE[1],
        }
    }

    /// Moves the head along a batch of changes, filling what lies between.
    async fn advance(&self, batch: Vec<HeadChange>) -> Result<(), NodeError> {
        let Some(end) = end_of(&batch) else {
            return Ok(());
        };
        let last = self.shared.current();
        let head = match batch.iter().find(|c| c.val.cids == end.0) {
            Some(c) if c.kind != HeadChangeKind::Revert => Arc::new(c.val.clone()),
            _ => Arc::new(self.shared.node.chain_get_tipset(&end).await?),
        };
        let steps = match last {
            None => vec![Change::Apply(head.clone())],
            Some(last) if follows(&last, &batch) => batch.into_iter().map(step).collect(),
            Some(last) => path(&self.shared, &last.key(), &head).await?,
        };
        self.shared.publish(steps, head);
        Ok(())
    }
}

async fn next(heads: &mut HeadChanges, silence: Duration) -> Result<Vec<HeadChange>, NodeError> {
    let lost = |why: String| NodeError::Transport {
        endpoint: "node".into(),
        method: "ChainNotify".into(),
        why,
    };
    match timeout(silence, heads.next()).await {
        Ok(Some(batch)) => batch,
        Ok(None) => Err(lost("the subscription ended".into())),
        Err(_) => Err(lost(format!("no head change for {silence:?}"))),
    }
}

/// The head after a batch.
fn end_of(batch: &[HeadChange]) -> Option<TipSetKey> {
    batch.last().map(|c| match c.kind {
        HeadChangeKind::Revert => c.val.parents(),
        HeadChangeKind::Apply | HeadChangeKind::Current => c.val.key(),
    })
}

/// Whether a batch starts at `last` and each step continues the one before.
fn follows(last: &TipSet, batch: &[HeadChange]) -> bool {
    let mut at = last.key();
    for c in batch {
        let (from, to) = match c.kind {
            HeadChangeKind::Revert => (c.val.key(), c.val.parents()),
            HeadChangeKind::Apply => (c.val.parents(), c.val.key()),
            HeadChangeKind::Current => return false,
        };
        if from != at {
            return false;
        }
        at = to;
    }
    true
}
