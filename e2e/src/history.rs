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

/// Every message from genesis to the head, oldest first, each once.
pub async fn landed(node: &Node) -> Result<Vec<Landed>, Failed> {
    let fail = |what: &'static str| move |e| Failed::at(what, e);
    let mut found: BTreeMap<Cid, Landed> = BTreeMap::new();
    let mut tipset = node.chain_head().await.map_err(fail("ChainHead"))?;
    while tipset.height > Epoch(0) {
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
                found.insert(cid, one);
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
    let mut found: Vec<Landed> = found.into_values().collect();
    for one in &mut found {
        let lookup = node
            .state_search_msg(&TipSetKey::HEAD, one.cid, EpochDelta(-1), false)
            .await
            .map_err(fail("StateSearchMsg"))?;
        one.receipt = lookup.map(|l| l.receipt);
    }
    found.sort_by_key(|m| (m.height, m.message.nonce));
    Ok(found)
}
