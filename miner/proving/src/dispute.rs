//! WindowPoSts are accepted unchecked, and may be disputed for a while after their deadline has
//! closed. Whether that happened shows in the number of proofs that can still be disputed.

use lotus_node_client::api::{DeadlineInfo, TipSet};
use lotus_types::{Epoch, EpochDelta};
use serde::{Deserialize, Serialize};

use crate::ProvingError;
use crate::window::Shared;

/// The optimistic proofs of a deadline's last window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disputable {
    /// When that window closed.
    pub(crate) closed: Epoch,
    /// Proofs that may still be disputed. Only a dispute lowers it before the next close.
    pub(crate) proofs: u64,
}

impl Disputable {
    /// Disputes that succeeded since an earlier look.
    pub(crate) fn lost_since(&self, before: Option<&Self>) -> u64 {
        before
            .filter(|b| b.closed == self.closed)
            .map_or(0, |b| b.proofs.saturating_sub(self.proofs))
    }
}

/// When deadline `index` closed last, in a state in which every epoch below `now` is over.
pub(crate) fn last_close(di: &DeadlineInfo, index: u64, now: Epoch) -> Epoch {
    let windows = i64::try_from(index.saturating_add(1)).unwrap_or(i64::MAX);
    let length = di.w_post_challenge_window.0.saturating_mul(windows);
    let mut close = di.period_start + EpochDelta(length);
    while close > now {
        close = close - di.w_post_proving_period;
    }
    close
}

impl Shared {
    /// Looks for disputes that were lost. A disputed sector is faulty; if it can be proven, the
    /// check before its next deadline recovers it.
    pub(crate) async fn watch_disputes(
        &self,
        di: &DeadlineInfo,
        head: &TipSet,
    ) -> Result<(), ProvingError> {
        let (key, node) = (head.key(), &self.deps.node);
        // The state at the head is that after its parents; null rounds between are not over in it.
        let parent = node.chain_get_tipset(&head.parents()).await?;
        let over = parent.height + EpochDelta(1);
        let deadlines = node
            .state_miner_deadlines(self.deps.miner.address(), &key)
            .await?;
        let now: Vec<Disputable> = (0u64..)
            .zip(&deadlines)
            .map(|(index, d)| Disputable {
                closed: last_close(di, index, over),
                proofs: d.disputable_proof_count,
            })
            .collect();
        for (deadline, proofs) in self.records.disputable(&now)? {
            metrics::counter!("lotus_miner_window_post_disputed_total").increment(proofs);
            tracing::error!(
                deadline,
                proofs,
                "a WindowPoSt was disputed with success: its sectors are faulty and a penalty is \
                 due; report this with the log"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_dispute_lowers_the_count_within_a_window() {
        let at = |closed, proofs| Disputable {
            closed: Epoch(closed),
            proofs,
        };
        for (before, now, lost) in [
            (None, at(60, 1), 0),
            (Some(at(60, 2)), at(60, 2), 0),
            (Some(at(60, 2)), at(60, 1), 1),
            (Some(at(60, 2)), at(2940, 0), 0),
            (Some(at(60, 0)), at(60, 3), 0),
        ] {
            assert_eq!(now.lost_since(before.as_ref()), lost, "{before:?} {now:?}");
        }
    }

    #[test]
    fn each_deadline_closed_within_the_last_period() {
        let di = DeadlineInfo {
            current_epoch: Epoch(130),
            period_start: Epoch(100),
            index: 1,
            open: Epoch(120),
            close: Epoch(140),
            challenge: Epoch(110),
            fault_cutoff: Epoch(97),
            w_post_period_deadlines: 3,
            w_post_proving_period: EpochDelta(60),
            w_post_challenge_window: EpochDelta(20),
            w_post_challenge_lookback: EpochDelta(10),
            fault_declaration_cutoff: EpochDelta(23),
        };
        let closes = |now| [0, 1, 2].map(|i| last_close(&di, i, Epoch(now)).0);
        assert_eq!(closes(130), [120, 80, 100]);
        assert_eq!(closes(140), [120, 140, 100]);
        // Null rounds: the state has not seen the close of deadline 0 yet.
        assert_eq!(closes(119), [60, 80, 100]);
    }
}
