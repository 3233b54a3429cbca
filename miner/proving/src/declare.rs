//! Declaring faults and recoveries before the cut-off.

use lotus_actors::miner::{
    self, DeclareFaultsParams, DeclareFaultsRecoveredParams, FaultDeclaration, RecoveryDeclaration,
};
use lotus_actors::ticket_digest;
use lotus_messages::MessageKind;
use lotus_node_client::api::TipSet;

use crate::ProvingError;
use crate::deadline::Window;
use crate::partition::Verdict;
use crate::window::Shared;

impl Shared {
    /// Reads every live sector of a deadline and declares what changed. Returns once the
    /// declarations, if any, are on chain.
    pub(crate) async fn check_deadline(
        &self,
        w: &Window,
        head: &TipSet,
    ) -> Result<(), ProvingError> {
        let (key, actor) = (head.key(), self.deps.miner.address());
        let partitions = self
            .deps
            .node
            .state_miner_partitions(actor, w.index, &key)
            .await?;
        let (mut faults, mut recoveries) = (Vec::new(), Vec::new());
        for (partition, p) in (0u64..).zip(&partitions) {
            self.check_size(p)?;
            if p.live_sectors.is_empty() {
                continue;
            }
            let bad = self.check_sectors(&p.live_sectors, &key).await?;
            let verdict = Verdict::of(p, &bad);
            let (deadline, index) = (w.index, partition);
            if !verdict.faults.is_empty() {
                tracing::error!(
                    deadline,
                    partition,
                    count = verdict.faults.len(),
                    "sectors are bad: declaring them faulty"
                );
                faults.push(FaultDeclaration {
                    deadline,
                    partition: index,
                    sectors: verdict.faults,
                });
            }
            if !verdict.recoveries.is_empty() {
                tracing::info!(
                    deadline,
                    partition,
                    count = verdict.recoveries.len(),
                    "faulty sectors can be read again: declaring them recovered"
                );
                recoveries.push(RecoveryDeclaration {
                    deadline,
                    partition: index,
                    sectors: verdict.recoveries,
                });
            }
        }
        let mut sent = Vec::new();
        if !faults.is_empty() {
            let params = lotus_actors::encode(&DeclareFaultsParams { faults });
            sent.push(
                self.declare(w, "faults", miner::DECLARE_FAULTS, params)
                    .await?,
            );
        }
        if !recoveries.is_empty() {
            let params = lotus_actors::encode(&DeclareFaultsRecoveredParams { recoveries });
            let method = miner::DECLARE_FAULTS_RECOVERED;
            sent.push(self.declare(w, "recovered", method, params).await?);
        }
        for key in sent {
            let landed = self.landed(&key).await?;
            tracing::info!(key, height = %landed.height, "declaration is on chain");
        }
        Ok(())
    }

    /// The key names the content, so that a repeated check sends no second message and a changed
    /// one does.
    async fn declare(
        &self,
        w: &Window,
        what: &str,
        method: u64,
        params: Vec<u8>,
    ) -> Result<String, ProvingError> {
        let digest = ticket_digest(&params);
        let content: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
        let key = format!(
            "{what}/{}/{}/{}/{content}",
            self.deps.miner, w.period_start, w.index
        );
        self.send(key.clone(), method, params, MessageKind::Declare)
            .await?;
        Ok(key)
    }
}
