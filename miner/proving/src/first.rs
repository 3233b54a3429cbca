//! May a hub make its first block? Another miner for the same actor wins the same rounds, and two
//! blocks at one height cost the collateral.

use std::sync::Arc;

use lotus_node_client::api::TipSet;
use lotus_types::{Epoch, EpochDelta, SectorNumber};

use crate::ProvingError;
use crate::mining::{COMPONENT, Shared};

/// Epochs that nobody may have watched the chain while won rounds are given up: about what a
/// restart takes.
const UNWATCHED: EpochDelta = EpochDelta(20);

/// What holds for the next won round.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum First {
    /// There are blocks in the log, or an operator vouched for there being no other miner.
    Over,
    /// A block may be made, and nothing has to be feared.
    Free,
    /// No block is made, for this reason.
    Waits(String),
}

impl Shared {
    /// Blocks of the miner up to here may be missing from the log.
    pub(crate) fn accepted(&self) -> Result<Epoch, ProvingError> {
        let allowed = self.deps.leave.until()?;
        let set = Epoch(self.deps.cfg.accept_foreign_blocks_until);
        Ok(allowed.map_or(set, |until| until.max(set)))
    }

    pub(crate) async fn first(&self, head: &TipSet) -> Result<First, ProvingError> {
        let d = &self.deps;
        if d.cfg.first_block_quiet_wins == 0 || d.fence.last().await?.is_some() {
            return Ok(First::Over);
        }
        // What is set in a file may be of another time.
        let set = Epoch(d.cfg.accept_foreign_blocks_until);
        let set = set.0 >= 0 && set >= head.height - d.cfg.look_back();
        if set || d.leave.until()?.is_some() {
            return Ok(First::Over);
        }
        let key = head.key();
        let all = d.node.state_miner_allocated(d.miner.address(), &key);
        if all.await?.iter().all(|n| d.files.made(SectorNumber(n))) {
            return Ok(First::Free);
        }
        let given = d.leave.given()?;
        Ok(if given.is_enough(&d.cfg, head.height) {
            First::Free
        } else {
            First::Waits(given.why(&d.cfg, head.height))
        })
    }

    /// After a start: rounds that were given up long ago prove nothing, as nobody watched since.
    pub(crate) async fn forget_old(&self, head: &TipSet) -> Result<(), ProvingError> {
        let attended = self.log(|log| log.attended()).await?;
        if attended.is_none_or(|at| at + UNWATCHED < head.height) {
            self.deps.leave.forget()?;
        }
        Ok(())
    }

    /// Says in health and log whether the first block waits. False once that is over.
    pub(crate) async fn tell_first(&self, head: &Arc<TipSet>) -> bool {
        let d = &self.deps;
        match self.first(head).await {
            Ok(First::Waits(why)) => {
                let why = format!(
                    "waits: {why}; once nothing else mines for {}, `lotus-miner mining allow` \
                     ends this",
                    d.miner
                );
                if d.leave.held().as_ref() != Some(&why) {
                    tracing::warn!("mining {why}");
                }
                d.leave.hold(Some(why.clone()));
                d.health.set(COMPONENT, Err(why));
                true
            }
            Ok(done) => {
                d.leave.hold(None);
                d.health.set(COMPONENT, Ok(String::new()));
                done == First::Free
            }
            Err(e) => {
                tracing::warn!(error = %e, "cannot see whether another miner is to be feared");
                true
            }
        }
    }
}
