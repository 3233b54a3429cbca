use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lotus_chain::Follower;
use lotus_journal::JournalError;
use lotus_node_client::api::TipSet;
use lotus_node_client::{Node, NodeError};
use lotus_runtime::{Backoff, CancellationToken, Health};
use lotus_types::{ActorId, Epoch, EpochDelta, SectorSize};
use lotus_workers::Pool;
use tokio::sync::watch;

use crate::host::{HostLock, Taken};
use crate::pace::{Base, Pace};
use crate::round::{Budget, Round};
use crate::watch::{Foreign, Watch};
use crate::{
    Activity, Fence, Leave, MiningConfig, ProvingError, RoundOutcome, RoundRecord, Rounds,
    SectorFiles,
};

/// Name of the health component.
pub(crate) const COMPONENT: &str = "mining";
/// How often a hub that another one keeps from mining looks whether that is gone.
const LOCK_POLL: Duration = Duration::from_secs(2);
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
    /// The log of rounds.
    pub rounds: Rounds,
    /// What an operator allowed.
    pub leave: Leave,
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

/// Why rounds were not attended before the first of a start.
const MISSED_DOWN: &str = "the hub was not running, or was refused to mine";
/// Why rounds were not attended between two others.
const MISSED_LATE: &str = "the hub or its node was not ready in time";

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
                () = self.0.for_ever() => {}
            }
        } else {
            health.set(COMPONENT, Ok("off by [mining] enabled".into()));
        }
        stop.cancelled().await;
    }
}

impl Shared {
    /// Mines until the hub stops, with pauses in which it is refused.
    async fn for_ever(&self) {
        while let End::Foreign(block) = self.alone().await {
            self.refuse(&block);
            self.deps.leave.go_on().await;
        }
    }

    fn refuse(&self, block: &Foreign) {
        let Foreign { height, cid } = block;
        let why = format!(
            "the chain has block {cid} of {} at height {height}, which is not in the mined-block \
             log (a restored backup, a second hub, or an old miner that still runs)",
            self.deps.miner
        );
        let fix = format!(
            "make sure that nothing else mines for {}, then run `lotus-miner mining allow`",
            self.deps.miner
        );
        tracing::error!(why, fix, "mining is refused");
        let state = format!("refused: {why}; {fix}");
        self.deps.leave.hold(Some(state.clone()));
        self.deps.health.set(COMPONENT, Err(state));
    }

    /// Mines while no other process of this network namespace does.
    async fn alone(&self) -> End {
        let Ok(genesis) = self
            .ask(|node| async move { node.chain_get_genesis().await })
            .await;
        let Some(genesis) = genesis.cids.first().copied() else {
            let why = "the node's genesis tipset has no block; use another node";
            self.deps.health.set(COMPONENT, Err(why.into()));
            return End::Stopped;
        };
        let mut told = false;
        loop {
            let why = match HostLock::take(&genesis, self.deps.miner) {
                Ok(_lock) => return self.rounds().await,
                Err(Taken::By(pid)) => format!(
                    "refused: another hub on this host (pid {}) mines for {}; stop one of them: \
                     this one goes on when the other is gone",
                    pid.map_or_else(|| "unknown".into(), |p| p.to_string()),
                    self.deps.miner
                ),
                Err(Taken::Refused(e)) => format!(
                    "refused: cannot make sure that no other hub in this network namespace mines: \
                     {e}; allow abstract Unix sockets"
                ),
            };
            if !told {
                tracing::error!(why, "mining is refused");
                told = true;
            }
            self.deps.health.set(COMPONENT, Err(why));
            tokio::time::sleep(LOCK_POLL).await;
        }
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
        let mut missed = MISSED_DOWN;
        let mut settled = false;
        let mut first = true;
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
            if !settled {
                self.settle(&base).await;
                if let Err(e) = self.forget_old(&base).await {
                    tracing::error!(error = %e, fix = e.fix(), "log of rounds");
                }
                first = self.tell_first(&base).await;
                settled = true;
            }
            let round = pace.round(&clock, tried, SystemTime::now());
            if !wait(pace.begin(&clock, round), &mut heads).await {
                continue;
            }
            tried = Some(round);
            let mut budget = Budget::default();
            let done = self.try_round(&pace, &mut watch, &base, &clock, round, &mut budget);
            let outcome = match done.await {
                Ok(outcome) => outcome,
                Err(foreign) => return End::Foreign(foreign),
            };
            first = first && self.tell_first(&base).await;
            let record = outcome.map(|outcome| RoundRecord {
                height: round,
                wins: budget.wins,
                outcome,
                steps: budget.steps(),
            });
            let missed = std::mem::replace(&mut missed, MISSED_LATE);
            if let Err(e) = self.log(move |log| log.over(round, record, missed)).await {
                tracing::error!(error = %e, fix = e.fix(), "log of rounds");
            }
        }
    }

    /// One round with everything that can go wrong in it. Gives what the log must tell of it, or
    /// the block of another miner that was seen.
    #[tracing::instrument(name = "mining_round", skip_all, fields(%round))]
    async fn try_round(
        &self,
        pace: &Pace,
        watch: &mut Watch,
        base: &Arc<TipSet>,
        clock: &Base,
        round: Epoch,
        budget: &mut Budget,
    ) -> Result<Option<RoundOutcome>, Foreign> {
        let d = &self.deps;
        let look = async {
            let (accepted, miner) = (self.accepted()?, d.miner.address());
            let look = watch.look(&d.node, d.fence.as_ref(), &d.cfg, miner, accepted, base);
            look.await
        };
        match look.await {
            Ok(None) => {}
            Ok(Some(foreign)) => return Err(foreign),
            Err(e) => {
                let why = format!("cannot compare the chain with the mined-block log: {e}");
                tracing::warn!(why, "no round");
                return Ok(Some(RoundOutcome::NoBlock { why }));
            }
        }
        let limit = pace
            .start(clock, round)
            .duration_since(SystemTime::now())
            .unwrap_or_default()
            + pace.delay()
            + GRACE;
        let result = tokio::time::timeout(limit, self.round(pace, base, clock, round, budget));
        let result = result.await;
        let nulls = (round - base.height).0 - 1;
        let no_block = |why: String| Some(RoundOutcome::NoBlock { why });
        let (name, told) = match result {
            Err(_) => {
                tracing::error!(nulls, %budget, "the round took longer than {limit:?}");
                let why = format!("it took longer than {limit:?}");
                ("timeout", Some(self.failed(round, true, why).await))
            }
            Ok(Err(e)) => {
                tracing::error!(error = %e, fix = e.fix(), nulls, %budget, "the round failed");
                let unsure = e.kind().is_retryable();
                (
                    "error",
                    Some(self.failed(round, unsure, e.to_string()).await),
                )
            }
            Ok(Ok(done)) => {
                let name = done.name();
                let told = match done {
                    Round::Mined { cid, wins } => {
                        tracing::info!(cid, wins, nulls, %budget, "mined a block");
                        Some(RoundOutcome::Mined { cid })
                    }
                    Round::Fenced(why) | Round::Given(why) => {
                        tracing::warn!(why, nulls, %budget, "no block in this round");
                        no_block(why)
                    }
                    Round::TooLate => {
                        tracing::warn!(nulls, %budget, "the chain was faster than this round");
                        no_block("the chain was faster".into())
                    }
                    Round::Lost | Round::NotEligible => {
                        tracing::info!(outcome = name, nulls, %budget, "no block");
                        None
                    }
                };
                (name, told)
            }
        };
        metrics::counter!("lotus_miner_mining_rounds_total", "outcome" => name).increment(1);
        Ok(told)
    }

    /// What the log tells of a round that failed. A block that was signed may be out, if it is
    /// `unsure` whether the node took it.
    async fn failed(&self, round: Epoch, unsure: bool, why: String) -> RoundOutcome {
        let signed = match self.deps.fence.at(round).await {
            Ok(entry) => entry.and_then(|m| m.cid),
            Err(e) => {
                tracing::error!(error = %e, fix = e.fix(), "mined-block log");
                None
            }
        };
        match signed {
            Some(cid) if unsure => {
                tracing::error!(%round, cid, why, "it is not known whether the node took the block");
                RoundOutcome::Unsure { cid, why }
            }
            _ => RoundOutcome::NoBlock { why },
        }
    }

    /// After a start: publishes the last signed block again, as the hub may have died before it
    /// was out, and closes the rounds that were interrupted.
    async fn settle(&self, head: &TipSet) {
        let settled = async {
            let mut out = None;
            if let Some((height, Some(block))) =
                self.deps.fence.last().await?.map(|(h, m)| (h, m.block))
                && height + RESUBMIT >= head.height
            {
                let cid = block.header.cid().to_string();
                match self.deps.node.sync_submit_block(&block).await {
                    Ok(()) => {
                        tracing::info!(%height, "published the last block of the log again");
                        out = Some(cid);
                    }
                    Err(e) => tracing::debug!(%height, error = %e, "the last block is not wanted"),
                }
            }
            for mut open in self.log(|log| log.open()).await? {
                let signed = self.deps.fence.at(open.height).await?.and_then(|m| m.cid);
                open.outcome = match signed {
                    None => RoundOutcome::NoBlock {
                        why: "the hub ended before its block was signed".into(),
                    },
                    Some(cid)
                        if out.as_ref() == Some(&cid) || self.has(head, &open, &cid).await? =>
                    {
                        RoundOutcome::Mined { cid }
                    }
                    Some(cid) => RoundOutcome::Unsure {
                        cid,
                        why: "the hub ended while it handed over the block".into(),
                    },
                };
                tracing::info!(height = %open.height, outcome = ?open.outcome, "an interrupted round");
                self.log(move |log| log.over(open.height, Some(open), MISSED_DOWN))
                    .await?;
            }
            Ok::<_, ProvingError>(())
        };
        if let Err(e) = settled.await {
            tracing::error!(error = %e, fix = e.fix(), "interrupted rounds are not settled");
        }
    }

    /// Whether the chain has the block of a round.
    async fn has(
        &self,
        head: &TipSet,
        round: &RoundRecord,
        cid: &str,
    ) -> Result<bool, ProvingError> {
        if round.height > head.height {
            return Ok(false);
        }
        let node = &self.deps.node;
        let at = node
            .chain_get_tipset_by_height(round.height, &head.key())
            .await?;
        Ok(at.cids.iter().any(|c| c.to_string() == cid))
    }

    /// Runs a call of the log (one fsync) off the async threads.
    pub(crate) async fn log<R: Send + 'static>(
        &self,
        f: impl FnOnce(&Rounds) -> Result<R, JournalError> + Send + 'static,
    ) -> Result<R, ProvingError> {
        let log = self.deps.rounds.clone();
        match tokio::task::spawn_blocking(move || f(&log)).await {
            Ok(done) => Ok(done?),
            Err(e) => Err(ProvingError::Inconsistent {
                what: "log of rounds",
                why: e.to_string(),
            }),
        }
    }

    /// Waits for the node; false when the hub is stopping.
    async fn connected(&self) -> bool {
        let mut connection = self.deps.follower.connection();
        connection.wait_for(Result::is_ok).await.is_ok()
    }

    async fn pace(&self) -> Result<Pace, Infallible> {
        let Ok(p) = self
            .ask(|node| async move { node.state_get_network_params().await })
            .await;
        Ok(Pace::new(&p, self.deps.cfg.propagation(p.block_delay())))
    }

    /// Asks the node until it answers.
    async fn ask<T, F>(&self, call: impl Fn(Node) -> F) -> Result<T, Infallible>
    where
        F: Future<Output = Result<T, NodeError>>,
    {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        loop {
            match call(self.deps.node.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(e) => {
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
