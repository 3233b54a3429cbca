//! The tasks that a worker on another host does at the same time.

use std::collections::HashMap;

use hub_proto::worker::v1::TaskDone;
use lotus_types::Kind;
use tokio::task::{AbortHandle, JoinError, JoinSet};

use crate::worker::failed;

/// Tasks by their names. Dropping it ends them all.
#[derive(Default)]
pub(super) struct Tasks {
    set: JoinSet<TaskDone>,
    names: HashMap<String, AbortHandle>,
}

impl Tasks {
    pub(super) fn start(
        &mut self,
        id: String,
        task: impl Future<Output = TaskDone> + Send + 'static,
    ) {
        self.names.insert(id, self.set.spawn(task));
    }

    /// Ends one task. One that is over, or is not known, is left as it is.
    pub(super) fn abort(&self, id: &str) {
        if let Some(task) = self.names.get(id) {
            task.abort();
        }
    }

    /// The next end of a task; `None` when there is none.
    pub(super) async fn next(&mut self) -> Option<Result<TaskDone, JoinError>> {
        let ended = self.set.join_next_with_id().await?;
        let task = match &ended {
            Ok((task, _)) => *task,
            Err(e) => e.id(),
        };
        let name = self.names.iter().find(|(_, t)| t.id() == task);
        let name = name.map(|(name, _)| name.clone()).unwrap_or_default();
        self.names.remove(&name);
        Some(match ended {
            Ok((_, done)) => Ok(done),
            Err(e) if e.is_cancelled() => {
                Ok(failed(name, Kind::Transport, "it was aborted".into()))
            }
            Err(e) => Err(e),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn one_is_aborted_and_the_others_go_on() {
        let mut tasks = Tasks::default();
        let mut held = Vec::new();
        for id in ["1", "2", "3"] {
            let (go, wait) = oneshot::channel::<()>();
            held.push(go);
            tasks.start(id.into(), async move {
                wait.await.unwrap();
                TaskDone {
                    task_id: id.into(),
                    ..TaskDone::default()
                }
            });
        }
        tasks.abort("2");
        tasks.abort("nothing");
        let aborted = tasks.next().await.unwrap().unwrap();
        assert_eq!(
            (aborted.task_id.as_str(), aborted.error_kind.as_str()),
            ("2", Kind::Transport.as_str())
        );
        // Its future is gone.
        assert!(held.remove(1).send(()).is_err());
        for go in held {
            go.send(()).unwrap();
        }
        let mut ended = Vec::new();
        while let Some(done) = tasks.next().await {
            ended.push(done.unwrap().task_id);
        }
        ended.sort();
        assert_eq!(ended, ["1", "3"]);
    }
}
