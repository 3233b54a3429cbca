//! Looks for blocks of this miner that the mined-block log lacks.

use std::collections::VecDeque;
use std::sync::Arc;

use lotus_node_client::api::{TipSet, TipSetKey};
use lotus_types::{Address, Epoch};

use crate::config::FINALITY;
use crate::{Fence, MiningConfig, ProvingError};

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

    /// Walks from `head` back to what was seen before, and reports the first own block above
    /// `accepted` that the log lacks. At most finality is walked: beyond it nothing is slashed.
    pub(crate) async fn look(
        &mut self,
        node: &lotus_node_client::Node,
        fence: &dyn Fence,
        cfg: &MiningConfig,
        miner: Address,
        accepted: Epoch,
        head: &Arc<TipSet>,
    ) -> Result<Option<Foreign>, ProvingError> {
        let since = fence.complete_since(head.height).await?;
        let never_mined = fence.last().await?.is_none();
        let floor = floor(since, never_mined, head.height, cfg);
        let mut fresh = Vec::new();
        let mut at = head.clone();
        while at.height > floor && !self.seen.contains(&at.key()) {
            for (cid, block) in at.cids.iter().zip(&at.blocks) {
                if block.miner != miner || block.height <= accepted {
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
        // The newest at the back: the front is forgotten.
        self.seen.extend(fresh.into_iter().rev());
        let keep = usize::try_from(FINALITY.0).unwrap_or(usize::MAX);
        while self.seen.len() > keep {
            self.seen.pop_front();
        }
        Ok(None)
    }
}

/// The height above which every own block must be in the log. A log that was begun just now tells
/// nothing of the blocks before it, so one without a block vouches for those too.
fn floor(since: Epoch, never_mined: bool, head: Epoch, cfg: &MiningConfig) -> Epoch {
    let since = if never_mined {
        since.min(head - cfg.look_back())
    } else {
        since
    };
    since.max(head - FINALITY)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use async_trait::async_trait;
    use lotus_journal::Journal;
    use lotus_node_client::{FullNode, NodeError};

    use super::*;
    use crate::LocalFence;

    #[test]
    fn a_log_without_a_block_vouches_for_what_was_before_it() {
        let cfg = |back| MiningConfig {
            first_block_look_back_epochs: back,
            ..MiningConfig::default()
        };
        for (since, never_mined, head, back, want) in [
            (5_000, false, 5_100, 900, 5_000),
            (5_000, true, 5_100, 900, 4_200),
            (5_000, true, 5_000, 100, 4_900),
            (5_000, true, 5_000, 0, 5_000),
            // Nothing below finality counts, whatever the settings say.
            (5_000, true, 5_000, 9_999, 4_100),
            (1, false, 5_000, 900, 4_100),
        ] {
            let at = floor(Epoch(since), never_mined, Epoch(head), &cfg(back));
            assert_eq!(at, Epoch(want), "{since} {never_mined} {head} {back}");
        }
    }

    /// A chain without null rounds.
    struct Fake(BTreeMap<TipSetKey, TipSet>);

    #[async_trait]
    impl FullNode for Fake {
        async fn chain_get_tipset(&self, key: &TipSetKey) -> Result<TipSet, NodeError> {
            let found = self.0.get(key).cloned();
            found.ok_or_else(|| NodeError::no_method("ChainGetTipSet"))
        }
    }

    /// A chain up to `height`, in which `miner` made the block at `own`.
    fn chain(height: i64, miner: Address, own: i64) -> (lotus_node_client::Node, Arc<TipSet>) {
        let text = include_str!("../../../libs/node-client/tests/data/tipset.json");
        let like: TipSet = serde_json::from_str(text).unwrap();
        let mut all = BTreeMap::new();
        let mut parents = Vec::new();
        let mut head = like.clone();
        for at in 0..=height {
            let mut block = like.blocks[0].clone();
            block.height = Epoch(at);
            block.parents = parents;
            block.miner = if at == own { miner } else { Address::new_id(7) };
            head = TipSet::new(vec![block]).unwrap();
            parents = head.cids.clone();
            all.insert(head.key(), head.clone());
        }
        (Arc::new(Fake(all)), Arc::new(head))
    }

    #[tokio::test]
    async fn a_fresh_hub_sees_the_blocks_of_a_live_old_miner() {
        let dir = tempfile::tempdir().unwrap();
        let miner = Address::new_id(1000);
        let cfg = MiningConfig::default();
        let none = Epoch(-1);
        for (own, accepted, found) in [
            (1_450, none, true),
            (601, none, true),
            // Below finality, or vouched for.
            (600, none, false),
            (1_450, Epoch(1_450), false),
            (1_450, Epoch(1_449), true),
        ] {
            let name = dir.path().join(format!("{own}-{accepted}"));
            let fence = LocalFence::new(Journal::open(&name).unwrap());
            let (node, head) = chain(1_500, miner, own);
            let mut watch = Watch::new();
            let seen = watch.look(&node, &fence, &cfg, miner, accepted, &head);
            let height = seen.await.unwrap().map(|f| f.height);
            assert_eq!(height, found.then_some(Epoch(own)), "{own}");
        }
    }
}
