//! Which waiting task goes to which worker.

use std::collections::{BTreeMap, HashMap, VecDeque};

use lotus_types::SectorId;

use crate::fit::{Host, Needs, fits};
use crate::pool::Job;
use crate::{Class, Declared};

/// Sectors of which it is kept in mind that a worker has copies.
const HELD_LIMIT: usize = 64;

/// The tasks that wait, and the workers that take them.
#[derive(Default)]
pub(crate) struct Queues {
    seal: VecDeque<Job>,
    prove: VecDeque<Job>,
    takers: BTreeMap<u64, Taker>,
}

/// An attached worker, as far as it matters for what it gets.
pub(crate) struct Taker {
    pub(crate) class: Class,
    pub(crate) slots: usize,
    pub(crate) host: Host,
    running: HashMap<String, Needs>,
    /// Sectors that it has copies of, the latest last.
    held: VecDeque<SectorId>,
}

impl Taker {
    pub(crate) fn new(class: Class, slots: usize, host: Host) -> Self {
        Self {
            class,
            slots,
            host,
            running: HashMap::new(),
            held: VecDeque::new(),
        }
    }

    /// The worker with what its tasks leave it.
    fn left(&self) -> Host {
        match &self.host {
            Host::Local { rest_only } => Host::Local {
                rest_only: *rest_only,
            },
            Host::Remote(has) => {
                let used = |of: fn(&Needs) -> u64| self.running.values().map(of).sum::<u64>();
                Host::Remote(Declared {
                    memory: has.memory.saturating_sub(used(|n| n.memory)),
                    scratch: has.scratch.saturating_sub(used(|n| n.scratch)),
                    ..has.clone()
                })
            }
        }
    }

    fn begin(&mut self, job: &Job) {
        self.running.insert(job.id.clone(), job.needs);
        if let (Host::Remote(_), Some(sector)) = (&self.host, job.sector) {
            self.held.retain(|s| *s != sector);
            self.held.push_back(sector);
            if self.held.len() > HELD_LIMIT {
                self.held.pop_front();
            }
        }
    }

    /// Whether it can take a task of a sector now, and has the sector's files.
    fn waits_for(&self, job: &Job, sector: SectorId) -> bool {
        self.class == job.class
            && self.running.len() < self.slots
            && self.held.contains(&sector)
            && fits(&job.needs, &self.left()).is_ok()
    }
}

impl Queues {
    pub(crate) const fn of(&self, class: Class) -> &VecDeque<Job> {
        match class {
            Class::Seal => &self.seal,
            Class::Prove => &self.prove,
        }
    }

    pub(crate) const fn of_mut(&mut self, class: Class) -> &mut VecDeque<Job> {
        match class {
            Class::Seal => &mut self.seal,
            Class::Prove => &mut self.prove,
        }
    }

    /// Drops what waits, which tells its callers.
    pub(crate) fn clear(&mut self) {
        self.seal.clear();
        self.prove.clear();
    }

    /// A worker comes.
    pub(crate) fn join(&mut self, worker: u64, taker: Taker) {
        self.takers.insert(worker, taker);
    }

    /// A worker goes. Its tasks are put back one by one.
    pub(crate) fn leave(&mut self, worker: u64) {
        self.takers.remove(&worker);
    }

    /// A worker has done a task.
    pub(crate) fn end(&mut self, worker: u64, job: &str) {
        if let Some(taker) = self.takers.get_mut(&worker) {
            taker.running.remove(job);
        }
    }

    /// The next task for a worker: the first that fits it, and that no other waits for that has
    /// the sector's files already.
    pub(crate) fn take(&mut self, worker: u64) -> Option<Job> {
        let me = self.takers.get(&worker)?;
        let (class, left) = (me.class, me.left());
        self.of_mut(class).retain(|job| !job.reply.is_closed());
        let me = self.takers.get(&worker)?;
        let at = self.of(class).iter().position(|job| {
            let others = || {
                let sector = job.sector.filter(|s| !me.held.contains(s));
                sector.is_some_and(|sector| {
                    let mut others = self.takers.iter().filter(|(id, _)| **id != worker);
                    others.any(|(_, t)| t.waits_for(job, sector))
                })
            };
            fits(&job.needs, &left).is_ok() && !others()
        })?;
        let job = self.of_mut(class).remove(at)?;
        self.takers.get_mut(&worker)?.begin(&job);
        Some(job)
    }

    /// Why no attached worker could ever do a task; `None` if one can.
    pub(crate) fn blocked(&self, job: &Job) -> Option<String> {
        let mut why = Vec::new();
        for (id, taker) in self.takers.iter().filter(|(_, t)| t.class == job.class) {
            match fits(&job.needs, &taker.host) {
                Ok(()) => return None,
                Err(misfit) => why.push(format!("worker {id}: {misfit}")),
            }
        }
        Some(if why.is_empty() {
            format!("no {} worker is attached", job.class)
        } else {
            why.join("; ")
        })
    }
}

#[cfg(test)]
mod tests {
    use lotus_types::{ActorId, SectorNumber, SectorSize};

    use super::*;
    use crate::Task;

    fn sector(n: u64) -> SectorId {
        SectorId {
            miner: ActorId(1000),
            number: SectorNumber(n),
        }
    }

    fn job(id: &str, task: &Task) -> Job {
        let (job, answer) = Job::new(id.into(), task, None, None);
        // A job whose caller is gone is dropped.
        std::mem::forget(answer);
        job
    }

    fn pre_commit2(n: u64) -> Task {
        Task::PreCommit2 {
            sector: sector(n),
            size: SectorSize::S8MiB,
            pc1: Vec::new(),
            sealed: "s".into(),
            cache: "c".into(),
            attempt: "a".into(),
        }
    }

    fn finalize(n: u64) -> Task {
        Task::Finalize {
            sector: sector(n),
            size: SectorSize::S8MiB,
            cache: "c".into(),
        }
    }

    fn remote(slots: usize) -> Taker {
        let declared = Declared {
            steps: Task::REMOTE.map(str::to_owned).to_vec(),
            cores: 1,
            memory: 150 << 20,
            scratch: 1 << 30,
            gpus: 0,
        };
        Taker::new(Class::Seal, slots, Host::Remote(declared))
    }

    fn taken(q: &mut Queues, worker: u64) -> Option<String> {
        q.take(worker).map(|j| j.id)
    }

    #[test]
    fn a_task_goes_to_the_worker_that_has_its_files() {
        let mut q = Queues::default();
        q.join(1, remote(1));
        q.join(2, remote(1));
        q.seal.push_back(job("a", &pre_commit2(1)));
        assert_eq!(taken(&mut q, 1).as_deref(), Some("a"));
        q.end(1, "a");
        q.seal.push_back(job("b", &pre_commit2(1)));
        q.seal.push_back(job("c", &pre_commit2(2)));
        // b waits for worker 1, which is free.
        assert_eq!(taken(&mut q, 2).as_deref(), Some("c"));
        assert_eq!(taken(&mut q, 1).as_deref(), Some("b"));
        q.seal.push_back(job("d", &pre_commit2(1)));
        q.end(2, "c");
        // Worker 1 is busy now: better a copy than to wait.
        assert_eq!(taken(&mut q, 2).as_deref(), Some("d"));
        q.leave(1);
        assert_eq!(taken(&mut q, 1), None);
    }

    #[test]
    fn a_worker_gets_no_more_than_it_can_hold() {
        let mut q = Queues::default();
        q.join(1, remote(8));
        for (id, n) in [("a", 1), ("b", 2), ("c", 3)] {
            q.seal.push_back(job(id, &pre_commit2(n)));
        }
        // Each needs 64 MiB and a part of the sector.
        assert_eq!(taken(&mut q, 1).as_deref(), Some("a"));
        assert_eq!(taken(&mut q, 1).as_deref(), Some("b"));
        assert_eq!(taken(&mut q, 1), None);
        q.end(1, "a");
        assert_eq!(taken(&mut q, 1).as_deref(), Some("c"));
    }

    #[test]
    fn what_fits_nobody_says_why() {
        let mut q = Queues::default();
        let waiting = job("f", &finalize(1));
        assert!(q.blocked(&waiting).unwrap().contains("no seal worker"));
        q.join(1, remote(1));
        assert!(q.blocked(&waiting).unwrap().contains("another host"));
        q.seal.push_back(waiting);
        assert_eq!(taken(&mut q, 1), None);
        let rest_only = Host::Local { rest_only: true };
        q.join(2, Taker::new(Class::Seal, 1, rest_only));
        q.seal.push_front(job("p", &pre_commit2(1)));
        assert_eq!(taken(&mut q, 2).as_deref(), Some("f"));
        let seal = job("s", &pre_commit2(1));
        assert_eq!(q.blocked(&seal), None);
        q.leave(1);
        assert!(q.blocked(&seal).unwrap().contains("seal_locally"));
    }
}
