//! Brings a signed block to the node.

use std::time::Duration;

use lotus_node_client::api::BlockMsg;
use lotus_node_client::{Node, NodeError};
use lotus_runtime::Backoff;

/// Tries to hand over a block. Doing it twice is harmless: it is the same block.
const TRIES: u32 = 4;
/// A try may take this long at least: a node under load is no dead one.
const TRY_LEAST: Duration = Duration::from_secs(2);
/// Waits between two tries: doubling from the first to the last.
const WAITS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];

/// Hands a block to the node, and again if its answer is lost. An error that is worth a retry
/// means that nobody knows whether the node has it; any other is the node's no.
pub(crate) async fn publish(
    node: &Node,
    block: &BlockMsg,
    epoch: Duration,
) -> Result<(), NodeError> {
    let limit = (epoch / TRIES).max(TRY_LEAST);
    let mut backoff = Backoff::new(WAITS[0], WAITS[1]);
    let mut unsure = None;
    loop {
        let sent = tokio::time::timeout(limit, node.sync_submit_block(block)).await;
        let e = match sent {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(e)) => e,
            Err(_) => NodeError::Timeout {
                endpoint: "node".into(),
                method: "SyncSubmitBlock".into(),
                waited: limit,
            },
        };
        if !e.kind().is_retryable() {
            // After a lost answer a no may be to the second copy of a block that is out.
            return Err(unsure.unwrap_or(e));
        }
        if backoff.tries() + 1 >= TRIES {
            return Err(e);
        }
        tracing::warn!(error = %e, "handing the block to the node again");
        unsure = Some(e);
        tokio::time::sleep(backoff.next()).await;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use lotus_node_client::FullNode;
    use lotus_node_client::api::TipSet;

    use super::*;

    /// Answers with these, one after the other, and then with yes.
    struct Script(Mutex<VecDeque<Option<NodeError>>>);

    #[async_trait]
    impl FullNode for Script {
        async fn sync_submit_block(&self, _: &BlockMsg) -> Result<(), NodeError> {
            let next = self.0.lock().unwrap().pop_front();
            next.flatten().map_or(Ok(()), Err)
        }
    }

    fn block() -> BlockMsg {
        let text = include_str!("../../../libs/node-client/tests/data/tipset.json");
        let mut tipset: TipSet = serde_json::from_str(text).unwrap();
        BlockMsg {
            header: tipset.blocks.remove(0),
            bls_messages: Vec::new(),
            secpk_messages: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_lost_answer_costs_no_block() {
        let lost = || {
            Some(NodeError::Transport {
                endpoint: "node".into(),
                method: "SyncSubmitBlock".into(),
                why: "connection closed".into(),
            })
        };
        let no = || {
            Some(NodeError::Rpc {
                method: "SyncSubmitBlock".into(),
                code: 1,
                message: "block is not wanted".into(),
            })
        };
        for (script, published, left, unsure) in [
            (vec![], true, 0, false),
            (vec![lost(), lost(), lost()], true, 0, false),
            (vec![lost(), lost(), lost(), lost(), None], false, 1, true),
            (vec![no(), None], false, 1, false),
            // The second copy is refused: the first may be out.
            (vec![lost(), no(), None], false, 1, true),
        ] {
            let fake = Arc::new(Script(Mutex::new(script.into())));
            let node: Node = fake.clone();
            let done = publish(&node, &block(), Duration::ZERO).await;
            assert_eq!(done.is_ok(), published, "{done:?}");
            let kind = done.err().map(|e| e.kind());
            assert_eq!(kind.is_some_and(|k| k.is_retryable()), unsure);
            assert_eq!(fake.0.lock().unwrap().len(), left);
        }
    }
}
