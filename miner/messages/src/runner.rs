use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use cid::Cid;
use lotus_types::Address;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::sender::Shared;
use crate::{SendError, SendRequest};

/// A request on its way to the writer of its address.
pub(crate) struct Job {
    pub(crate) order: u64,
    /// Sending address in key form.
    pub(crate) from: Address,
    pub(crate) request: SendRequest,
    pub(crate) reply: oneshot::Sender<Result<Cid, SendError>>,
    pub(crate) _permit: OwnedSemaphorePermit,
    pub(crate) span: tracing::Span,
}

impl Job {
    /// Kinds in the order of their urgency, then first come, first served.
    fn rank(&self) -> (crate::MessageKind, u64) {
        (self.request.kind, self.order)
    }
}

impl PartialEq for Job {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Job {}
impl PartialOrd for Job {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Job {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank().cmp(&other.rank())
    }
}

/// Wait before the tracker starts again that panicked.
const AFTER_PANIC: Duration = Duration::from_secs(10);

/// The requests of one address. One at a time is written, which is what keeps nonces in order.
#[derive(Default)]
struct Lane {
    waiting: BinaryHeap<Reverse<Job>>,
    busy: bool,
}

/// Runs the writers and pushes again what is not on chain.
pub struct Runner {
    shared: Arc<Shared>,
    jobs: mpsc::Receiver<Job>,
}

impl Runner {
    pub(crate) const fn new(shared: Arc<Shared>, jobs: mpsc::Receiver<Job>) -> Self {
        Self { shared, jobs }
    }

    /// Runs until `stop`. A message that is being written then is either journaled or not; what
    /// is journaled is pushed at the next start.
    pub async fn run(mut self, stop: CancellationToken) {
        let end = self.shared.stop.clone();
        let mut tasks = JoinSet::new();
        let mut lanes: HashMap<Address, Lane> = HashMap::new();
        // Which address a task writes for; the tracker is not among them.
        let mut writers: HashMap<Id, Address> = HashMap::new();
        tasks.spawn(self.shared.clone().track(Duration::ZERO));
        loop {
            let from = tokio::select! {
                () = stop.cancelled() => break,
                job = self.jobs.recv() => {
                    // The sender side lives in `shared`, so this queue never closes.
                    let Some(job) = job else { break };
                    let from = job.from;
                    lanes.entry(from).or_default().waiting.push(Reverse(job));
                    from
                }
                Some(done) = tasks.join_next_with_id() => {
                    let id = match done {
                        Ok((id, ())) => id,
                        Err(e) => {
                            tracing::error!(error = %e, "a message task panicked");
                            e.id()
                        }
                    };
                    let Some(from) = writers.remove(&id) else {
                        tasks.spawn(self.shared.clone().track(AFTER_PANIC));
                        continue;
                    };
                    lanes.entry(from).or_default().busy = false;
                    from
                },
            };
            let lane = lanes.entry(from).or_default();
            if lane.busy {
                continue;
            }
            let Some(Reverse(job)) = lane.waiting.pop() else {
                lanes.remove(&from);
                continue;
            };
            lane.busy = true;
            let span = job.span.clone();
            let writer = self.shared.clone().serve(job).instrument(span);
            writers.insert(tasks.spawn(writer).id(), from);
        }
        end.cancel();
        // Writers look at `stop`; a call to the node has its own deadline.
        while tasks.join_next().await.is_some() {}
        self.shared.calls.close();
        self.shared.calls.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MessageKind, Payer};
    use lotus_types::TokenAmount;
    use tokio::sync::Semaphore;

    #[test]
    fn post_goes_first_then_the_older() {
        let room = Arc::new(Semaphore::new(8));
        let mut heap = BinaryHeap::new();
        let kinds = [
            MessageKind::Other,
            MessageKind::Commit,
            MessageKind::Post,
            MessageKind::PreCommit,
            MessageKind::Post,
        ];
        for (order, kind) in kinds.into_iter().enumerate() {
            heap.push(Reverse(Job {
                order: order as u64,
                from: Address::new_id(1),
                request: SendRequest {
                    key: order.to_string(),
                    from: Payer::Address(Address::new_id(1)),
                    to: Address::new_id(2),
                    method: 0,
                    params: vec![],
                    value: TokenAmount::default(),
                    kind,
                    max_fee: None,
                },
                reply: oneshot::channel().0,
                _permit: room.clone().try_acquire_owned().unwrap(),
                span: tracing::Span::none(),
            }));
        }
        let order: Vec<_> = std::iter::from_fn(|| heap.pop().map(|Reverse(j)| j.order)).collect();
        assert_eq!(order, [2, 4, 1, 3, 0]);
    }
}
