//! Looks for blocks of this miner that the mined-block log lacks.

use std::collections::VecDeque;
use std::sync::Arc;

use lotus_node_client::api::{TipSet, TipSetKey};
use lotus_types::{Address, Epoch, EpochDelta};

use crate::{Fence, MiningConfig, ProvingError};

/// How far back a start looks: beyond finality nothing is slashed.
const FINALITY: EpochDelta = EpochDelta(900);

/// Remembers what was looked at, so that every tipset is read once.
pub(crate) struct Watch {
    seen: VecDeque<TipSetKey>,
}

/// A block of this miner that this hub did not make.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Foreign {
    pub(crate) height: Epoch,
    pub(crate) cid: String,
}

impl Watch {
    pub(crate) const fn new() -> Self {
        Self {
            seen: VecDeque::new(),
        }
    }

    /// Walks from `head` back to what was seen before, and reports the first own block that the
    /// log lacks.
    pub(crate) async fn look(
        &mut self,
        node: &lotus_node_client::Node,
        fence: &dyn Fence,
        cfg: &MiningConfig,
        miner: Address,
        head: &Arc<TipSet>,
    ) -> Result<Option<Foreign>, ProvingError> {
        let since = fence.complete_since(head.height).await?;
        let floor = since.max(head.height - FINALITY);
        let mut fresh = Vec::new();
        let mut at = head.clone();
        while at.height > floor && !self.seen.contains(&at.key()) {
            for (cid, block) in at.cids.iter().zip(&at.blocks) {
                if block.miner != miner || cfg.accepts(block.height) {
                    continue;
                }
                let known = fence.at(block.height).await?.and_then(|m| m.cid);
                let cid = cid.to_string();
                if known.as_ref() != Some(&cid) {
                    let height = block.height;
                    return Ok(Some(Foreign { height, cid }));
                }
            }
            fresh.push(at.key());
            let parents = at.parents();
            if parents.is_head() {
                break; // genesis
            }
            at = Arc::new(node.chain_get_tipset(&parents).await?);
        }
        self.seen.extend(fresh);
        let keep = usize::try_from(FINALITY.0).unwrap_or(usize::MAX);
        while self.seen.len() > keep {
            self.seen.pop_front();
        }
        Ok(None)
    }
}
