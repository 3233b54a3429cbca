use lotus_node_client::NodeError;
use lotus_node_client::api::TipSetKey;
use lotus_runtime::Fault;
use lotus_types::{Kind, SectorNumber};
use serde::Serialize;

use super::Cx;
use crate::run::from_node;

/// What the chain has of a sector, as `--json` prints it.
#[derive(Serialize)]
pub(super) struct OnChain {
    seal_proof: i64,
    comm_r: String,
    activation: i64,
    /// Scheduled end, as the sector's entry has it where the node does not tell it apart.
    expiration: i64,
    /// The end that a long fault brings; 0 for none.
    early_expiration: i64,
    /// Byte-epochs.
    deal_weight: String,
    /// Byte-epochs.
    verified_deal_weight: String,
    /// attoFIL.
    initial_pledge: String,
    initial_pledge_fil: String,
    /// `null`: the node does not tell, as of a sector that ended.
    deadline: Option<u64>,
    partition: Option<u64>,
    /// What the node did not tell, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    untold: Vec<String>,
}

impl OnChain {
    /// Asks the full node. `None`: the sector is not on chain, or no more.
    pub(super) async fn of(cx: &Cx, number: u64) -> Result<Option<Self>, Fault> {
        let (node, cfg) = cx.node()?;
        let (miner, head) = (cfg.actor()?.address(), TipSetKey::HEAD);
        let number = SectorNumber(number);
        let info = node.state_sector_get_info(miner, number, &head).await;
        let Some(info) = info.map_err(|e| from_node(&e))? else {
            return Ok(None);
        };
        // Nodes know these only of sectors in a partition: of an ended one they fail, and what its
        // entry says is told all the same.
        let mut untold = Vec::new();
        let ends = node.state_sector_expiration(miner, number, &head).await;
        let ends = told(ends, "ends", &mut untold)?;
        let place = node.state_sector_partition(miner, number, &head).await;
        let place = told(place, "place", &mut untold)?;
        Ok(Some(Self {
            seal_proof: info.seal_proof,
            comm_r: info.sealed_cid.to_string(),
            activation: info.activation.0,
            expiration: ends.as_ref().map_or(info.expiration.0, |e| e.on_time.0),
            early_expiration: ends.as_ref().map_or(0, |e| e.early.0),
            deal_weight: info.deal_weight.to_string(),
            verified_deal_weight: info.verified_deal_weight.to_string(),
            initial_pledge: info.initial_pledge.atto().to_string(),
            initial_pledge_fil: format!("{} FIL", info.initial_pledge),
            deadline: place.as_ref().map(|p| p.deadline),
            partition: place.as_ref().map(|p| p.partition),
            untold,
        }))
    }

    /// Rows of a table.
    pub(super) fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![
            ("Seal proof type", self.seal_proof.to_string()),
            ("CommR", self.comm_r.clone()),
            ("Activation", self.activation.to_string()),
            ("Expiration", self.expiration.to_string()),
            ("Deal weight", self.deal_weight.clone()),
            ("Verified deal weight", self.verified_deal_weight.clone()),
            ("Initial pledge", self.initial_pledge_fil.clone()),
        ];
        if let (Some(deadline), Some(partition)) = (self.deadline, self.partition) {
            let place = format!("deadline {deadline}, partition {partition}");
            rows.push(("Proven in", place));
        }
        for why in &self.untold {
            rows.push(("Not told", why.clone()));
        }
        if self.early_expiration != 0 {
            let ends = format!("epoch {}, unless it is recovered", self.early_expiration);
            rows.push(("Faulty; terminated at", ends));
        }
        rows
    }
}

/// An answer, or a note that the chain has none. A node that does not answer is an error.
fn told<T>(
    answer: Result<T, NodeError>,
    what: &str,
    untold: &mut Vec<String>,
) -> Result<Option<T>, Fault> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(e) if matches!(e.kind(), Kind::Transport | Kind::Config) => Err(from_node(&e)),
        Err(e) => {
            untold.push(format!("{what}: {e}"));
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_ended_sector_lacks_is_noted_and_an_outage_is_not() {
        let mut untold = Vec::new();
        let rpc = NodeError::Rpc {
            method: "StateSectorPartition".into(),
            code: 1,
            message: "sector not found".into(),
        };
        assert_eq!(told::<u64>(Err(rpc), "place", &mut untold).unwrap(), None);
        assert_eq!(told(Ok(7), "place", &mut untold).unwrap(), Some(7));
        let lost = NodeError::Transport {
            endpoint: "node".into(),
            method: "StateSectorPartition".into(),
            why: "gone".into(),
        };
        assert!(told::<u64>(Err(lost), "place", &mut untold).is_err());
        assert_eq!(untold.len(), 1);
    }
}
