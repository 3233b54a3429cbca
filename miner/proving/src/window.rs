use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lotus_chain::Follower;
use lotus_journal::Journal;
use lotus_messages::Sender;
use lotus_node_client::Node;
use lotus_node_client::api::{DeadlineInfo, TipSet};
use lotus_runtime::{Backoff, CancellationToken, Health};
use lotus_types::{ActorId, Epoch, SectorSize};
use lotus_workers::Pool;
use tokio::sync::OnceCell;
use tokio::task::{Id, JoinSet};

use crate::check::Aging;
use crate::deadline::{Due, Window};
use crate::record::Records;
use crate::{Activity, DeadlineRecord, ProvingConfig, ProvingError, SectorFiles};

/// Name of the health component.
const COMPONENT: &str = "window_post";

/// What WindowPoSt works with.
#[derive(Clone)]
pub struct ProvingDeps {
    /// The hub's journal.
    pub journal: Journal,
    /// The full node.
    pub node: Node,
    /// Follows its head.
    pub follower: Follower,
    /// Sends messages.
    pub sender: Sender,
    /// Makes proofs.
    pub pool: Pool,
    /// Finds replicas.
    pub files: Arc<dyn SectorFiles>,
    /// The miner.
    pub miner: ActorId,
    /// Size of its sectors.
    pub size: SectorSize,
    /// `[proving]`.
    pub cfg: ProvingConfig,
    /// Gets the component `window_post`.
    pub health: Health,
    /// Shared with mining and `SafeToRestart`.
    pub activity: Activity,
}

/// The WindowPoSt scheduler.
#[derive(Clone)]
pub struct WindowPost(Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) deps: ProvingDeps,
    pub(crate) records: Records,
    /// Length of an epoch, once the node told it.
    block_delay: OnceCell<Duration>,
    /// Faulty sectors by deadline, as the last check of each saw them.
    aging: Mutex<BTreeMap<u64, Aging>>,
}

/// Names a window for ever.
type Key = (Epoch, u64);

const fn key(w: &Window) -> Key {
    (w.period_start, w.index)
}

/// What runs for a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Job {
    /// Prove and submit.
    Prove,
    /// Check the sectors and declare.
    Check,
    /// See whether proofs of earlier deadlines were disputed.
    Disputes,
}

impl WindowPost {
    /// A scheduler that does nothing until [`WindowPost::run`].
    #[must_use]
    pub fn new(deps: ProvingDeps) -> Self {
        let records = Records(deps.journal.clone());
        Self(Arc::new(Shared {
            deps,
            records,
            block_delay: OnceCell::new(),
            aging: Mutex::default(),
        }))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }

    /// Deadlines that are over, oldest first: two months of them.
    pub fn outcomes(&self) -> Result<Vec<DeadlineRecord>, ProvingError> {
        Ok(self.0.records.outcomes()?)
    }

    /// Proves deadlines until `stop`. What is interrupted goes on after a restart: proofs and
    /// messages are journaled, and what the chain has is not sent again.
    pub async fn run(self, stop: CancellationToken) {
        let shared = self.0;
        if !shared.deps.cfg.enabled {
            shared
                .deps
                .health
                .set(COMPONENT, Ok("off by [proving] enabled".into()));
            stop.cancelled().await;
            return;
        }
        let mut heads = shared.deps.follower.head();
        let mut jobs = JoinSet::new();
        // A job that ended well is not begun again; one that failed or panicked is, at the next
        // head: a panic is never "nothing to prove".
        let mut begun: BTreeMap<(Key, Job), State> = BTreeMap::new();
        let mut ids: HashMap<Id, (Key, Job)> = HashMap::new();
        let mut backoff = Backoff::new(shared.deps.cfg.retry_first(), Duration::from_secs(30));
        loop {
            let mut retry = None;
            let head = heads.borrow_and_update().clone();
            if let Some(head) = head {
                match shared.due(&head).await {
                    Ok(due) => {
                        backoff.reset();
                        shared
                            .deps
                            .health
                            .set(COMPONENT, Ok(shared.warning(head.height)));
                        begun.retain(|(k, _), s| *s == State::Running || due.contains_window(*k));
                        for (w, job) in due.jobs {
                            let name = (key(&w), job);
                            if begun.contains_key(&name) {
                                continue;
                            }
                            begun.insert(name, State::Running);
                            let work = shared.clone().work(due.info, w, job, head.clone());
                            ids.insert(jobs.spawn(work).id(), name);
                        }
                    }
                    Err(e) => {
                        tracing::warn!(error = %e, "cannot see which deadlines are due");
                        let why = format!("{e}; {}", e.fix());
                        shared.deps.health.set(COMPONENT, Err(why));
                        retry = Some(backoff.next());
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => break,
                changed = heads.changed() => if changed.is_err() {
                    // The follower ended, so the hub is stopping.
                    stop.cancelled().await;
                    break;
                },
                Some(ended) = jobs.join_next_with_id() => {
                    let (id, ok) = match ended {
                        Ok((id, ok)) => (id, ok),
                        Err(e) => {
                            tracing::error!(error = %e, "a proving job panicked; it is begun anew");
                            (e.id(), false)
                        }
                    };
                    if let Some(name) = ids.remove(&id) {
                        if ok {
                            begun.insert(name, State::Done);
                        } else {
                            begun.remove(&name);
                        }
                    }
                }
                () = sleep_if(retry) => {}
            }
        }
        jobs.shutdown().await;
    }
}

pub(crate) async fn sleep_if(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Done,
}

/// What a head asks for.
struct DueNow {
    info: DeadlineInfo,
    jobs: Vec<(Window, Job)>,
    windows: BTreeSet<Key>,
}

impl DueNow {
    fn contains_window(&self, k: Key) -> bool {
        self.windows.contains(&k)
    }
}

impl Shared {
    async fn due(&self, head: &TipSet) -> Result<DueNow, ProvingError> {
        let miner = self.deps.miner.address();
        let node = &self.deps.node;
        let di = node
            .state_miner_proving_deadline(miner, &head.key())
            .await?;
        let mut jobs = Vec::new();
        for w in Window::upcoming(&di) {
            let now = matches!(w.due(head.height), Due::Prove | Due::Submit);
            if now || w.is_near(head.height) {
                jobs.push((w, Job::Prove));
            }
            if w.check_due(head.height) {
                jobs.push((w, Job::Check));
            }
        }
        // Once in each window: the count of disputable proofs stays where it is for a period.
        jobs.push((Window::current(&di), Job::Disputes));
        Ok(DueNow {
            info: di,
            jobs,
            windows: Window::upcoming(&di).map(|w| key(&w)).collect(),
        })
    }

    /// Does a job; says whether it is done for good.
    async fn work(
        self: Arc<Self>,
        di: DeadlineInfo,
        w: Window,
        job: Job,
        head: Arc<TipSet>,
    ) -> bool {
        let done = match job {
            Job::Prove => {
                self.attend(&w).await;
                Ok(())
            }
            Job::Check => self.check_deadline(&w, di.w_post_proving_period).await,
            Job::Disputes => self.watch_disputes(&di, &head).await,
        };
        if let Err(e) = &done {
            tracing::warn!(?job, deadline = w.index, error = %e, fix = e.fix(), "failed; it is tried again");
        }
        done.is_ok()
    }

    /// Length of an epoch.
    pub(crate) async fn block_delay(&self) -> Result<Duration, ProvingError> {
        let ask = async || {
            let params = self.deps.node.state_get_network_params().await?;
            Ok(params.block_delay())
        };
        self.block_delay.get_or_try_init(ask).await.copied()
    }

    /// Notes the faulty sectors of a deadline.
    pub(crate) fn set_aging(&self, deadline: u64, aging: Aging) {
        let mut all = self.aging.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(deadline, aging);
        let count: u64 = all.values().map(|a| a.sectors).sum();
        #[expect(clippy::cast_precision_loss, reason = "a gauge")]
        metrics::gauge!("lotus_miner_faulty_sectors").set(count as f64);
    }

    /// What operators should know although proving works.
    fn warning(&self, head: Epoch) -> String {
        let all = self.aging.lock().unwrap_or_else(PoisonError::into_inner);
        Aging::warning(all.values(), head)
    }
}
