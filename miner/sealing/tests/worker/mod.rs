//! Does heavy work in this process, with real proofs.

#![allow(dead_code, reason = "two tests use it, each another part")]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use futures::future::BoxFuture;
use lotus_actors::{RawBytes, encode};
use lotus_proofs::Vanilla;
use lotus_sealing::Work;
use lotus_types::Kind;
use lotus_workers::{Output, Progress, Task, WorkError, execute};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

/// Runs tasks on a thread, and fails those that it was told to.
#[derive(Default)]
pub(crate) struct Worker {
    lose: Mutex<Vec<&'static str>>,
    fail: Mutex<Vec<&'static str>>,
    held: watch::Sender<BTreeSet<&'static str>>,
    begun: watch::Sender<Vec<&'static str>>,
    running: TaskTracker,
}

/// Holds tasks back until it is dropped.
pub(crate) struct Gate(Arc<Worker>, &'static str);

impl Drop for Gate {
    fn drop(&mut self) {
        self.0.held.send_modify(|h| {
            h.remove(self.1);
        });
    }
}

impl Worker {
    pub(crate) fn lose(&self, step: &'static str, times: usize) {
        self.lose.lock().unwrap().extend(vec![step; times]);
    }

    pub(crate) fn fail(&self, step: &'static str, times: usize) {
        self.fail.lock().unwrap().extend(vec![step; times]);
    }

    /// How often a step was begun.
    pub(crate) fn begun(&self, step: &'static str) -> usize {
        self.begun.borrow().iter().filter(|s| **s == step).count()
    }

    /// Waits until a step is begun.
    pub(crate) async fn begins(&self, step: &'static str) {
        let mut begun = self.begun.subscribe();
        begun.wait_for(|all| all.contains(&step)).await.unwrap();
    }

    /// Waits for the tasks that still run.
    pub(crate) async fn end(&self) {
        self.running.close();
        self.running.wait().await;
    }

    pub(crate) fn hold(self: &Arc<Self>, step: &'static str) -> Gate {
        self.held.send_modify(|h| {
            h.insert(step);
        });
        Gate(self.clone(), step)
    }

    fn take(list: &Mutex<Vec<&'static str>>, step: &str) -> bool {
        let mut list = list.lock().unwrap();
        let found = list.iter().position(|s| *s == step);
        found.map(|i| list.remove(i)).is_some()
    }
}

impl Work for Worker {
    fn run(&self, task: Task, progress: Progress) -> BoxFuture<'_, Result<Output, WorkError>> {
        Box::pin(async move {
            let step = task.name();
            self.begun.send_modify(|all| all.push(step));
            let mut held = self.held.subscribe();
            held.wait_for(|h| !h.contains(step)).await.unwrap();
            if Self::take(&self.lose, step) {
                return Err(WorkError::Lost {
                    class: "seal",
                    step,
                    why: "killed".into(),
                });
            }
            if Self::take(&self.fail, step) {
                return Err(WorkError::Failed {
                    step,
                    kind: Kind::Fatal,
                    message: "by order".into(),
                });
            }
            progress(0.5);
            // Vanilla proofs have no aggregate: the small chain takes their list for one.
            if let Task::Aggregate { seals, .. } = task {
                let proofs = seals.into_iter().map(|s| RawBytes::new(s.proof));
                return Ok(Output::Proof(encode(&proofs.collect::<Vec<_>>())));
            }
            let done = self
                .running
                .spawn_blocking(move || execute(&Vanilla, &task))
                .await;
            done.unwrap().map_err(|e| WorkError::Failed {
                step,
                kind: e.kind(),
                message: e.to_string(),
            })
        })
    }
}
