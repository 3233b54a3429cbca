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

    /// Whether [`Attached`](crate::Attached) has it.
    pub(crate) const fn counts(&self) -> bool {
        matches!(
            (self.class, &self.host),
            (Class::Seal, _) | (_, Host::Local { .. })
        )
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

    /// Whether it can take a task now.
    fn is_free_for(&self, job: &Job) -> bool {
        self.class == job.class
            && self.running.len() < self.slots
            && fits(&job.needs, &self.left()).is_ok()
    }

    /// Whether a task is rather for it than for another: it has the sector's files already, or is
    /// on the right host.
    fn is_better_than(&self, other: &Self, job: &Job) -> bool {
        let has_files = |t: &Self| job.sector.is_some_and(|s| t.held.contains(&s));
        has_files(self) && !has_files(other) || job.needs.rather_for(&self.host, &other.host)
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
    pub(crate) fn leave(&mut self, worker: u64) -> Option<Taker> {
        self.takers.remove(&worker)
    }

    /// A worker has done a task.
    pub(crate) fn end(&mut self, worker: u64, job: &str) {
        if let Some(taker) = self.takers.get_mut(&worker) {
            taker.running.remove(job);
        }
    }

    /// The next task for a worker: the first that fits it, and that is not rather for another that
    /// is free.
    pub(crate) fn take(&mut self, worker: u64) -> Option<Job> {
        let me = self.takers.get(&worker)?;
        let (class, left) = (me.class, me.left());
        self.of_mut(class).retain(|job| !job.reply.is_closed());
        let me = self.takers.get(&worker)?;
        let at = self.of(class).iter().position(|job| {
            let mut others = self.takers.iter().filter(|(id, _)| **id != worker);
            fits(&job.needs, &left).is_ok()
                && !others.any(|(_, t)| t.is_better_than(me, job) && t.is_free_for(job))
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
    use crate::{Post, PostClaim, PostKind, Task};

    fn sector(n: u64) -> SectorId {
        SectorId {
            miner: ActorId(1000),
            number: SectorNumber(n),
        }
    }

    fn job(id: &str, task: &Task) -> Job {
        let (job, answer) = Job::new(id.into(), task.clone(), None, None);
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
        elsewhere(Class::Seal, slots)
    }

    fn elsewhere(class: Class, slots: usize) -> Taker {
        let steps = Task::remote(class).iter().map(|s| (*s).to_owned());
        let declared = Declared {
            steps: steps.collect(),
            cores: 1,
            memory: 150 << 20,
            scratch: 1 << 30,
            gpus: 0,
        };
        Taker::new(class, slots, Host::Remote(declared))
    }

    fn prove_post(kind: PostKind) -> Task {
        let post = Post {
            kind,
            miner: ActorId(1000),
            size: SectorSize::S2KiB,
            randomness: [1; 32],
            sectors: Vec::new(),
        };
        Task::ProvePost {
            claim: PostClaim::from(&post),
            openings: Vec::new().into(),
        }
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
    fn a_deadline_goes_elsewhere_and_a_block_does_not_while_one_is_free() {
        use PostKind::{Window, Winning};
        const HERE: u64 = 1;
        const THERE: u64 = 2;
        let local = || Taker::new(Class::Prove, 1, Host::Local { rest_only: false });
        // Of a queue, what each gets when both are free, in whichever order they look.
        for (order, queue, want) in [
            ([HERE, THERE], [Window, Winning], ["b", "a"]),
            ([THERE, HERE], [Window, Winning], ["a", "b"]),
            ([HERE, THERE], [Winning, Winning], ["a", "b"]),
            // One that looks first may get nothing: it looks again when the other has taken.
            ([THERE, HERE], [Winning, Winning], ["", "a"]),
            ([HERE, THERE], [Window, Window], ["", "a"]),
            ([THERE, HERE], [Window, Window], ["a", "b"]),
        ] {
            let mut q = Queues::default();
            q.join(HERE, local());
            q.join(THERE, elsewhere(Class::Prove, 1));
            for (id, kind) in ["a", "b"].into_iter().zip(queue) {
                q.prove.push_back(job(id, &prove_post(kind)));
            }
            let got = order.map(|worker| taken(&mut q, worker).unwrap_or_default());
            assert_eq!(got, want, "{order:?} {queue:?}");
        }
        // Busy or gone, the one elsewhere is not waited for.
        let mut q = Queues::default();
        q.join(HERE, local());
        q.join(THERE, elsewhere(Class::Prove, 1));
        for id in ["a", "b", "c", "d"] {
            q.prove.push_back(job(id, &prove_post(Window)));
        }
        assert_eq!(taken(&mut q, HERE), None);
        assert_eq!(taken(&mut q, THERE).as_deref(), Some("a"));
        assert_eq!(taken(&mut q, HERE).as_deref(), Some("b"));
        q.end(HERE, "b");
        q.end(THERE, "a");
        assert_eq!(taken(&mut q, HERE), None);
        q.leave(THERE);
        assert_eq!(taken(&mut q, HERE).as_deref(), Some("c"));
        q.end(HERE, "c");
        // What is kept here is left to nobody.
        q.join(THERE, elsewhere(Class::Prove, 1));
        q.prove[0].needs = q.prove[0].needs.kept_here();
        assert_eq!(taken(&mut q, THERE), None);
        assert_eq!(taken(&mut q, HERE).as_deref(), Some("d"));
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
