//! The messages on the chain, and what each did.

use std::collections::BTreeMap;

use cid::Cid;
use lotus_actors::miner::{
    PRE_COMMIT_SECTOR_BATCH2, PROVE_COMMIT_SECTORS3, PROVE_REPLICA_UPDATES3,
    PreCommitSectorBatchParams2, ProveCommitSectors3Params, ProveCommitSectors3Return,
    ProveReplicaUpdates3Params, ProveReplicaUpdates3Return,
};
use lotus_node_client::Node;
use lotus_node_client::api::{Message, MessageReceipt, TipSetKey};
use lotus_types::{Epoch, EpochDelta};

use crate::Failed;

/// A message on the chain.
#[derive(Debug, Clone)]
pub struct Landed {
    /// Its CID.
    pub cid: Cid,
    /// Height of the first tipset that holds it.
    pub height: Epoch,
    /// The message.
    pub message: Message,
    /// What it did; `None` as long as it is in the head, which is executed with the next block.
    pub receipt: Option<MessageReceipt>,
}

impl Landed {
    /// The sectors that the message pre-committed, activated or upgraded.
    pub fn sectors(&self) -> Result<Vec<u64>, Failed> {
        let Some(receipt) = self.receipt.as_ref().filter(|r| r.exit_code == 0) else {
            return Ok(Vec::new());
        };
        let bad = |e| Failed::at("a message on the chain", e);
        let params = &self.message.params;
        Ok(match self.message.method {
            PRE_COMMIT_SECTOR_BATCH2 => {
                let p: PreCommitSectorBatchParams2 = lotus_actors::decode(params).map_err(bad)?;
                p.sectors.iter().map(|s| s.sector_number).collect()
            }
            PROVE_COMMIT_SECTORS3 => {
                let p: ProveCommitSectors3Params = lotus_actors::decode(params).map_err(bad)?;
                let done: ProveCommitSectors3Return =
                    lotus_actors::decode(&receipt.r#return).map_err(bad)?;
                let activated = done.activation_results.successes(&p.sector_activations);
                activated.iter().map(|s| s.sector_number).collect()
            }
            PROVE_REPLICA_UPDATES3 => {
                let p: ProveReplicaUpdates3Params = lotus_actors::decode(params).map_err(bad)?;
                let done: ProveReplicaUpdates3Return =
                    lotus_actors::decode(&receipt.r#return).map_err(bad)?;
                let upgraded = done.activation_results.successes(&p.sector_updates);
                upgraded.iter().map(|s| s.sector).collect()
            }
            _ => Vec::new(),
        })
    }
}

/// Epochs that a reorg may take back.
const REORG: EpochDelta = EpochDelta(60);

/// The messages on the chain, read piece by piece: a node forgets old ones.
#[derive(Debug, Default)]
pub struct History {
    found: BTreeMap<Cid, Landed>,
    /// Head of the last reading.
    head: Epoch,
}

impl History {
    /// Reads what came since the last time, and again what a reorg may have changed. To be called
    /// long before the node forgets, which is at finality.
    pub async fn read(&mut self, node: &Node) -> Result<(), Failed> {
        let fail = |what: &'static str| move |e| Failed::at(what, e);
        let mut tipset = node.chain_head().await.map_err(fail("ChainHead"))?;
        let (head, floor) = (tipset.height, (self.head - REORG).max(Epoch(0)));
        let mut new: BTreeMap<Cid, Landed> = BTreeMap::new();
        while tipset.height > floor {
            for block in &tipset.cids {
                let all = node
                    .chain_get_block_messages(*block)
                    .await
                    .map_err(fail("ChainGetBlockMessages"))?;
                let secpk = all.secpk_messages.into_iter().map(|m| m.message);
                let messages = all.bls_messages.into_iter().chain(secpk);
                for (cid, message) in all.cids.into_iter().zip(messages) {
                    let one = Landed {
                        cid,
                        height: tipset.height,
                        message,
                        receipt: None,
                    };
                    new.insert(cid, one);
                }
            }
            let Some(block) = tipset.blocks.first() else {
                break;
            };
            tipset = node
                .chain_get_tipset(&TipSetKey(block.parents.clone()))
                .await
                .map_err(fail("ChainGetTipSet"))?;
        }
        for one in new.values_mut() {
            let lookup = node
                .state_search_msg(&TipSetKey::HEAD, one.cid, EpochDelta(-1), false)
                .await
                .map_err(fail("StateSearchMsg"))?;
            one.receipt = lookup.map(|l| l.receipt);
        }
        self.found.retain(|_, one| one.height <= floor);
        self.found.extend(new);
        self.head = head;
        Ok(())
    }

    /// What was read, oldest first, each once.
    #[must_use]
    pub fn messages(&self) -> Vec<Landed> {
        let mut all: Vec<Landed> = self.found.values().cloned().collect();
        all.sort_by_key(|m| (m.height, m.message.nonce));
        all
    }
}
