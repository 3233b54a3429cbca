//! What the chain says of the provider, read from the node as any outsider can.

use std::collections::BTreeSet;

use lotus_node_client::Node;
use lotus_node_client::api::{TipSet, TipSetKey};
use lotus_types::{ActorId, Epoch, SectorNumber};

use crate::Failed;

/// Follows one miner.
pub(crate) struct Watch {
    node: Node,
    miner: ActorId,
    /// Proving windows in which a proof was accepted, per sector: start of the period, sector.
    proven: BTreeSet<(i64, u64)>,
}

impl Watch {
    pub(crate) const fn new(node: Node, miner: ActorId) -> Self {
        Self {
            node,
            miner,
            proven: BTreeSet::new(),
        }
    }

    pub(crate) async fn height(&self) -> Result<Epoch, Failed> {
        let head = self.node.chain_head().await;
        Ok(head.map_err(|e| Failed::at("ChainHead", e))?.height)
    }

    /// Looks at the current deadline: a partition whose bit is set there had its proof accepted
    /// in this window. Returns the windows seen so far in which `sector` was proven.
    pub(crate) async fn window_posts(&mut self, sector: SectorNumber) -> Result<usize, Failed> {
        let (node, miner) = (&self.node, self.miner.address());
        let fail = |what: &'static str| move |e| Failed::at(what, e);
        let head = node.chain_head().await.map_err(fail("ChainHead"))?;
        let at = TipSetKey(head.cids);
        let now = node
            .state_miner_proving_deadline(miner, &at)
            .await
            .map_err(fail("StateMinerProvingDeadline"))?;
        let place = node
            .state_sector_partition(miner, sector, &at)
            .await
            .map_err(fail("StateSectorPartition"))?;
        if now.is_open() && now.index == place.deadline {
            let deadlines = node
                .state_miner_deadlines(miner, &at)
                .await
                .map_err(fail("StateMinerDeadlines"))?;
            let partitions = node
                .state_miner_partitions(miner, now.index, &at)
                .await
                .map_err(fail("StateMinerPartitions"))?;
            let accepted = usize::try_from(now.index)
                .ok()
                .and_then(|i| deadlines.get(i))
                .is_some_and(|d| d.post_submissions.get(place.partition));
            let active = usize::try_from(place.partition)
                .ok()
                .and_then(|i| partitions.get(i))
                .is_some_and(|p| p.active_sectors.get(sector.0));
            if accepted && active {
                self.proven.insert((now.period_start.0, sector.0));
            }
        }
        Ok(self.proven.iter().filter(|(_, s)| *s == sector.0).count())
    }

    /// Blocks of the miner on the chain below the head.
    pub(crate) async fn blocks_won(&self) -> Result<usize, Failed> {
        let mut won = 0;
        let mut tipset: TipSet = self
            .node
            .chain_head()
            .await
            .map_err(|e| Failed::at("ChainHead", e))?;
        loop {
            let miner = self.miner.address();
            won += tipset.blocks.iter().filter(|b| b.miner == miner).count();
            if tipset.height <= Epoch(0) {
                return Ok(won);
            }
            let parents = match tipset.blocks.first() {
                Some(block) => TipSetKey(block.parents.clone()),
                None => return Ok(won),
            };
            tipset = self
                .node
                .chain_get_tipset(&parents)
                .await
                .map_err(|e| Failed::at("ChainGetTipSet", e))?;
        }
    }
}
