//! A WindowPoSt whose message can not land in time goes out again by another address.

use lotus_node_client::api::TipSet;

use crate::ProvingError;
use crate::attend::Sent;
use crate::deadline::Window;
use crate::window::Shared;

impl Shared {
    /// Sends the proofs again whose messages wait for a nonce that is not ours: the second message
    /// costs a fee, a deadline costs more. Returns the new ones, and marks those that they are for.
    pub(crate) async fn go_around(
        &self,
        w: &Window,
        head: &TipSet,
        flying: &mut Vec<Sent>,
    ) -> Vec<Sent> {
        let mut again = Vec::new();
        for sent in flying.iter_mut().filter(|s| !s.passed) {
            match self.around(w, head, sent).await {
                Ok(Some(new)) => {
                    tracing::warn!(
                        key = sent.key,
                        again = new.key,
                        "WindowPoSt waits behind a message that is not ours: sent again"
                    );
                    sent.passed = true;
                    again.push(new);
                }
                Ok(None) => {}
                Err(e) => tracing::warn!(key = sent.key, error = %e, "no way around yet"),
            }
        }
        flying.extend(again.iter().cloned());
        again
    }

    async fn around(
        &self,
        w: &Window,
        head: &TipSet,
        sent: &Sent,
    ) -> Result<Option<Sent>, ProvingError> {
        let miner = self.deps.miner.address();
        let Some(way) = self.deps.sender.way_around(&sent.key, miner).await? else {
            return Ok(None);
        };
        let first = sent.partitions.first().copied().unwrap_or_default();
        let proof = self.records.proof(w, first)?;
        let Some(proof) = proof.filter(|p| p.partitions == sent.partitions) else {
            return Ok(None);
        };
        let at = head.key();
        let partitions = self
            .deps
            .node
            .state_miner_partitions(miner, w.index, &at)
            .await?;
        let key = self
            .submit(w, sent.attempt, &proof, &partitions, &at, Some(way))
            .await?;
        Ok(Some(Sent {
            key,
            passed: false,
            ..sent.clone()
        }))
    }
}
