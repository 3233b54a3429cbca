//! Workers and their jobs in Lotus' JSON.

use std::collections::BTreeMap;

use lotus_workers::{Class, JobInfo, WorkerInfo};
use serde::Serialize;
use uuid::Uuid;

use crate::machine::{Machine, resident};
use crate::types::{SectorRef, uuid_of};

/// The name of a step as Lotus writes it; source: lotus storage/sealer/sealtasks/task.go.
fn task_type(step: &str) -> String {
    match step {
        "add_pieces" => "seal/v0/addpiece",
        "pre_commit1" => "seal/v0/precommit/1",
        "pre_commit2" => "seal/v0/precommit/2",
        "commit" => "seal/v0/commit/2",
        "finalize" => "seal/v0/finalize",
        "unseal" => "seal/v0/unseal",
        "window_post" => "post/v0/windowproof",
        "winning_post" => "post/v0/winningproof",
        other => return format!("hub/v0/{other}"),
    }
    .into()
}

/// Everything that a worker of a class does, by the names of Lotus.
fn tasks_of(class: Class) -> Vec<String> {
    let steps: &[&str] = match class {
        Class::Seal => &[
            "add_pieces",
            "pre_commit1",
            "pre_commit2",
            "commit",
            "finalize",
            "unseal",
        ],
        Class::Prove => &["window_post", "winning_post"],
    };
    steps.iter().map(|s| task_type(s)).collect()
}

pub(crate) fn worker_id(worker: u64) -> Uuid {
    uuid_of("worker", &worker.to_string())
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct CallId {
    sector: SectorRef,
    #[serde(rename = "ID")]
    id: Uuid,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct WorkerJob {
    #[serde(rename = "ID")]
    id: CallId,
    sector: SectorRef,
    task: String,
    /// 0: it runs.
    run_wait: i32,
    start: String,
    hostname: String,
}

impl WorkerJob {
    /// A job that runs; `None` for one that is about no single sector.
    pub(crate) fn new(job: &JobInfo, hostname: &str) -> Option<(Uuid, Self)> {
        let sector = SectorRef::from(job.sector?);
        let start = i64::try_from(job.since_unix_ms).unwrap_or(0);
        let start = jiff::Timestamp::from_millisecond(start).unwrap_or_default();
        let made = Self {
            id: CallId {
                sector,
                id: uuid_of("task", &job.id),
            },
            sector,
            task: task_type(&job.step),
            run_wait: 0,
            start: start.to_string(),
            hostname: hostname.into(),
        };
        Some((worker_id(job.worker?), made))
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct WorkerResources {
    mem_physical: u64,
    mem_used: u64,
    mem_swap: u64,
    mem_swap_used: u64,
    #[serde(rename = "CPUs")]
    cpus: u64,
    #[serde(rename = "GPUs")]
    gpus: Vec<String>,
    resources: Option<()>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct WorkerMachine {
    hostname: String,
    ignore_resources: bool,
    resources: WorkerResources,
}

/// `storiface.WorkerStats`. Memory is measured; Lotus estimates it.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct WorkerStats {
    info: WorkerMachine,
    tasks: Vec<String>,
    enabled: bool,
    mem_used_min: u64,
    mem_used_max: u64,
    gpu_used: f64,
    cpu_use: u64,
    task_counts: BTreeMap<String, u64>,
}

impl WorkerStats {
    /// Of a worker on another host is shown what it says that it has; the others are on `here`.
    pub(crate) fn new(worker: &WorkerInfo, jobs: &[JobInfo], here: &Machine, proof: i64) -> Self {
        let mut task_counts = BTreeMap::new();
        for job in jobs.iter().filter(|j| j.worker == Some(worker.id)) {
            let key = format!("{proof}:{}", task_type(&job.step));
            *task_counts.entry(key).or_default() += 1;
        }
        let memory = worker.pid.map_or(0, resident);
        let resources = match &worker.declared {
            Some(there) => WorkerResources {
                mem_physical: there.memory,
                mem_used: 0,
                mem_swap: 0,
                mem_swap_used: 0,
                cpus: there.cores.into(),
                gpus: Vec::new(),
                resources: None,
            },
            None => WorkerResources {
                mem_physical: here.memory,
                mem_used: here.memory_used,
                mem_swap: here.swap,
                mem_swap_used: here.swap_used,
                cpus: here.cpus,
                gpus: Vec::new(),
                resources: None,
            },
        };
        let cpus = resources.cpus;
        Self {
            info: WorkerMachine {
                hostname: worker.host.as_ref().unwrap_or(&here.hostname).clone(),
                ignore_resources: false,
                resources,
            },
            tasks: tasks_of(worker.class),
            enabled: true,
            mem_used_min: memory,
            mem_used_max: memory,
            gpu_used: 0.0,
            // A worker computes on all processors, or not at all.
            cpu_use: if task_counts.is_empty() { 0 } else { cpus },
            task_counts,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SchedRequest {
    sector: Option<SectorRef>,
    task_type: String,
    priority: i32,
    sched_id: Uuid,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct SchedInfo {
    requests: Vec<SchedRequest>,
    open_windows: Vec<String>,
}

/// What waits for a worker, and which task each busy worker has.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct SchedDiag {
    sched_info: SchedInfo,
    returned_work: Vec<String>,
    waiting: Vec<String>,
    call_to_work: BTreeMap<String, String>,
    early_ret: Vec<String>,
}

impl SchedDiag {
    pub(crate) fn new(jobs: &[JobInfo], workers: &[WorkerInfo]) -> Self {
        let (running, waiting): (Vec<_>, Vec<_>) = jobs.iter().partition(|j| j.worker.is_some());
        let requests = waiting.into_iter().map(|job| SchedRequest {
            sector: job.sector.map(SectorRef::from),
            task_type: task_type(&job.step),
            priority: 0,
            sched_id: uuid_of("task", &job.id),
        });
        let busy = |w: &WorkerInfo| running.iter().any(|j| j.worker == Some(w.id));
        let idle = workers.iter().filter(|w| !busy(w));
        Self {
            sched_info: SchedInfo {
                requests: requests.collect(),
                open_windows: idle.map(|w| worker_id(w.id).to_string()).collect(),
            },
            returned_work: Vec::new(),
            waiting: Vec::new(),
            call_to_work: running
                .iter()
                .map(|j| (uuid_of("task", &j.id).to_string(), task_type(&j.step)))
                .collect(),
            early_ret: Vec::new(),
        }
    }
}
