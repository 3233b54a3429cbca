use lotus_node_client::api::TipSetKey;
use lotus_runtime::Fault;
use lotus_types::SectorNumber;
use serde::Serialize;

use super::Cx;
use crate::run::from_node;

/// What the chain has of a sector, as `--json` prints it.
#[derive(Serialize)]
pub(super) struct OnChain {
    seal_proof: i64,
    comm_r: String,
    activation: i64,
    /// Scheduled end.
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
    deadline: u64,
    partition: u64,
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
        let ends = node.state_sector_expiration(miner, number, &head).await;
        let ends = ends.map_err(|e| from_node(&e))?;
        let place = node.state_sector_partition(miner, number, &head).await;
        let place = place.map_err(|e| from_node(&e))?;
        Ok(Some(Self {
            seal_proof: info.seal_proof,
            comm_r: info.sealed_cid.to_string(),
            activation: info.activation.0,
            expiration: ends.on_time.0,
            early_expiration: ends.early.0,
            deal_weight: info.deal_weight.to_string(),
            verified_deal_weight: info.verified_deal_weight.to_string(),
            initial_pledge: info.initial_pledge.atto().to_string(),
            initial_pledge_fil: format!("{} FIL", info.initial_pledge),
            deadline: place.deadline,
            partition: place.partition,
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
            (
                "Proven in",
                format!("deadline {}, partition {}", self.deadline, self.partition),
            ),
        ];
        if self.early_expiration != 0 {
            let ends = format!("epoch {}, unless it is recovered", self.early_expiration);
            rows.push(("Faulty; terminated at", ends));
        }
        rows
    }
}
