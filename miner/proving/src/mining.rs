use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lotus_chain::Follower;
use lotus_node_client::Node;
use lotus_node_client::api::TipSet;
use lotus_runtime::{Backoff, CancellationToken, Health};
use lotus_types::{ActorId, Epoch, EpochDelta, SectorSize};
use lotus_workers::Pool;
use tokio::sync::watch;

use crate::pace::{Base, Pace};
use crate::round::{Budget, Round};
use crate::watch::{Foreign, Watch};
use crate::{Activity, Fence, MiningConfig, ProvingError, SectorFiles};

/// Name of the health component.
const COMPONENT: &str = "mining";
/// A round may take this long beyond the end of its epoch before it is given up.
const GRACE: Duration = Duration::from_secs(5);
/// A signed block that is not on chain is published again after a restart, if the chain is not
/// further than this.
const RESUBMIT: EpochDelta = EpochDelta(5);

/// What mining works with.
#[derive(Clone)]
pub struct MiningDeps {
    /// The full node.
    pub node: Node,
    /// Follows its head.
    pub follower: Follower,
    /// Makes WinningPoSts.
    pub pool: Pool,
    /// Finds replicas.
    pub files: Arc<dyn SectorFiles>,
    /// The mined-block log.
    pub fence: Arc<dyn Fence>,
    /// The miner.
    pub miner: ActorId,
    /// Size of its sectors.
    pub size: SectorSize,
    /// `[mining]`.
    pub cfg: MiningConfig,
    /// Gets the component `mining`.
    pub health: Health,
    /// Shared with WindowPoSt and `SafeToRestart`.
    pub activity: Activity,
}

/// Block production.
pub struct Mining(Shared);

pub(crate) struct Shared {
    pub(crate) deps: MiningDeps,
}

type Heads = watch::Receiver<Option<Arc<TipSet>>>;

/// Why the loop of rounds ended.
enum End {
    /// The follower stopped, so the hub is stopping.
    Stopped,
    /// Another process mines for this actor.
    Foreign(Foreign),
}

impl Mining {
    /// Mining that does nothing until [`Mining::run`].
    #[must_use]
    pub const fn new(deps: MiningDeps) -> Self {
        Self(Shared { deps })
    }

    /// Takes part in every epoch's election until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let health = self.0.deps.health.clone();
        if self.0.deps.cfg.enabled {
            health.set(COMPONENT, Ok("starting".into()));
            tokio::select! {
                () = stop.cancelled() => return,
                end = self.0.rounds() => match end {
                    End::Stopped => {}
                    End::Foreign(block) => self.0.refuse(&block),
                },
            }
        } else {
            health.set(COMPONENT, Ok("off by [mining] enabled".into()));
        }
        stop.cancelled().await;
    }
}

impl Shared {
    fn refuse(&self, block: &Foreign) {
        let Foreign { height, cid } = block;
        let why = format!(
            "the chain has block {cid} of {} at height {height}, which is not in the mined-block \
             log (a restored backup, a second hub, or an old miner that still runs)",
            self.deps.miner
        );
        let fix = format!(
            "make sure that nothing else mines for {}, then set [mining] \
             accept_foreign_blocks_until = {height} and restart",
            self.deps.miner
        );
        tracing::error!(why, fix, "mining is refused");
        let state = Err(format!("refused: {why}; {fix}"));
        self.deps.health.set(COMPONENT, state);
    }

    async fn rounds(&self) -> End {
        let mut heads = self.deps.follower.head();
        let Ok(pace) = self.pace().await;
        tracing::info!(
            miner = %self.deps.miner,
            epoch = ?pace.delay(),
            fence = self.deps.fence.scope(),
            "mining"
        );
        self.deps.health.set(COMPONENT, Ok(String::new()));
        let mut watch = Watch::new();
        let mut known: Option<(Arc<TipSet>, Base)> = None;
        let mut tried: Option<Epoch> = None;
        let mut resubmitted = false;
        loop {
            if heads.has_changed().is_err() || !self.connected().await {
                return End::Stopped;
            }
            let Some(head) = heads.borrow_and_update().clone() else {
                if heads.changed().await.is_err() {
                    return End::Stopped;
                }
                continue;
            };
            let (base, clock) = match known.take() {
                Some((base, clock)) if base.cids == head.cids => (base, clock),
                // A tipset that only grew did not begin later.
                Some((base, clock)) if base.height == head.height => (head, clock),
                _ => {
                    let clock = Base::of(&head, SystemTime::now());
                    (head, clock)
                }
            };
            known = Some((base.clone(), clock));
            if !resubmitted {
                self.resubmit(base.height).await;
                resubmitted = true;
            }
            let round = pace.round(&clock, tried, SystemTime::now());
            if !wait(pace.begin(&clock, round), &mut heads).await {
                continue;
            }
            tried = Some(round);
            if let Some(foreign) = self
                .try_round(&pace, &mut watch, &base, &clock, round)
                .await
            {
                return End::Foreign(foreign);
            }
        }
    }

    /// One round with everything that can go wrong in it. Says if another miner was seen.
    #[tracing::instrument(name = "mining_round", skip_all, fields(%round))]
    async fn try_round(
        &self,
        pace: &Pace,
        watch: &mut Watch,
        base: &Arc<TipSet>,
        clock: &Base,
        round: Epoch,
    ) -> Option<Foreign> {
        let d = &self.deps;
        let look = watch.look(&d.node, d.fence.as_ref(), &d.cfg, d.miner.address(), base);
        match look.await {
            Ok(None) => {}
            Ok(Some(foreign)) => return Some(foreign),
            Err(e) => {
                tracing::warn!(error = %e, "cannot compare the chain with the mined-block log: no round");
                return None;
            }
        }
        let mut budget = Budget::default();
        let limit = pace
            .start(clock, round)
            .duration_since(SystemTime::now())
            .unwrap_or_default()
            + pace.delay()
            + GRACE;
        let result = tokio::time::timeout(limit, self.round(pace, base, clock, round, &mut budget));
        let outcome = match result.await {
            Err(_) => {
                tracing::error!(%budget, "the round took longer than {limit:?}");
                "timeout"
            }
            Ok(Err(e)) => {
                tracing::error!(error = %e, fix = e.fix(), %budget, "the round failed");
                "error"
            }
            Ok(Ok(done)) => {
                match &done {
                    Round::Mined { cid, wins } => {
                        tracing::info!(cid, wins, %budget, "mined a block");
                    }
                    Round::Fenced(why) => tracing::warn!(why, "no block in this round"),
                    Round::TooLate => {
                        tracing::warn!(%budget, "the chain was faster than this round")
                    }
                    Round::Lost | Round::NotEligible => {
                        tracing::debug!(outcome = done.name(), %budget, "no block");
                    }
                }
                done.name()
            }
        };
        metrics::counter!("lotus_miner_mining_rounds_total", "outcome" => outcome).increment(1);
        None
    }

    /// Publishes the last signed block again: the hub may have died before it was out.
    async fn resubmit(&self, head: Epoch) {
        let last = match self.deps.fence.last().await {
            Ok(last) => last,
            Err(e) => {
                tracing::error!(error = %e, fix = e.fix(), "mined-block log");
                return;
            }
        };
        let Some((height, block)) = last.and_then(|(h, m)| Some((h, m.block?))) else {
            return;
        };
        if height + RESUBMIT < head {
            return;
        }
        match self.deps.node.sync_submit_block(&block).await {
            Ok(()) => tracing::info!(%height, "published the last block of the log again"),
            Err(e) => {
                tracing::debug!(%height, error = %e, "the last block of the log is not wanted")
            }
        }
    }

    /// Waits for the node; false when the hub is stopping.
    async fn connected(&self) -> bool {
        let mut connection = self.deps.follower.connection();
        connection.wait_for(Result::is_ok).await.is_ok()
    }

    async fn pace(&self) -> Result<Pace, Infallible> {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            match self.deps.node.state_get_network_params().await {
                Ok(p) => return Ok(Pace::new(&p, self.deps.cfg.propagation(p.block_delay()))),
                Err(e) => {
                    let e = ProvingError::from(e);
                    let why = format!("{e}; {}", e.fix());
                    self.deps.health.set(COMPONENT, Err(why));
                    tokio::time::sleep(backoff.next()).await;
                }
            }
        }
    }
}

/// Waits for a moment; false if the head changed before.
async fn wait(until: SystemTime, heads: &mut Heads) -> bool {
    let left = until.duration_since(SystemTime::now()).unwrap_or_default();
    tokio::select! {
        // An error means that the follower ended, which the caller finds out.
        _ = heads.changed() => false,
        () = tokio::time::sleep(left) => true,
    }
}
