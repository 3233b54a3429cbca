use std::collections::BTreeMap;

use clap::Subcommand;
use lotus_runtime::Fault;
use lotus_types::Kind;
use lotus_workers::{Class, JobInfo, WorkerInfo};
use reqwest::Method;
use serde::Serialize;

use super::{Cx, bytes, print, print_json, table, time};
use crate::control;
use crate::events::unix_ms;
use crate::operations::Work;

#[derive(Debug, Subcommand)]
pub(super) enum SealingCommand {
    /// List what the workers do now and what waits for them
    Jobs,
    /// List the attached workers of this host and of others, with what they have and do
    Workers,
    /// Show how full each class of workers is, the queue in the order in which it is done, and why
    /// a task fits no worker
    SchedDiag,
    /// Give up a task for now
    ///
    /// The worker that has it is killed and started anew, and the step is done again from its
    /// beginning after a while: for a worker that hangs. Proofs are never given up.
    Abort {
        /// The task's id in `sealing jobs`, or the number that it begins with
        task: String,
    },
}

pub(super) async fn sealing(cx: &Cx, command: SealingCommand) -> Result<(), Fault> {
    let socket = cx.control_socket()?;
    let work: Work = control::call(&socket, Method::GET, "/v1/work").await?;
    match command {
        SealingCommand::Jobs => jobs(cx, &work.jobs),
        SealingCommand::Workers => workers(cx, &work),
        SealingCommand::SchedDiag => diagnosis(cx, &work),
        SealingCommand::Abort { task } => {
            let job = named(&work.jobs, &task)?;
            let path = format!("/v1/work/{}/abort", job.id);
            let () = control::call(&socket, Method::POST, &path).await?;
            if cx.json {
                return print_json(job);
            }
            print(&format!(
                "{} was aborted: it is done again after a while",
                job.id
            ))
        }
    }
}

/// The job with this id, or with this number before its step.
fn named<'a>(jobs: &'a [JobInfo], wanted: &str) -> Result<&'a JobInfo, Fault> {
    let number = |id: &str| id.split_once('-').is_some_and(|(n, _)| n == wanted);
    jobs.iter()
        .find(|j| j.id == wanted || number(&j.id))
        .ok_or_else(|| {
            Fault::new(
                Kind::Data,
                format!("no task {wanted} waits or runs"),
                "see `lotus-miner sealing jobs`",
            )
        })
}

fn jobs(cx: &Cx, jobs: &[JobInfo]) -> Result<(), Fault> {
    if cx.json {
        return print_json(&jobs);
    }
    if jobs.is_empty() {
        return print("nothing is being done and nothing waits");
    }
    print(&job_table(jobs, unix_ms()))
}

fn job_table(jobs: &[JobInfo], now: u64) -> String {
    let mut out = table(&[
        "ID", "Sector", "Worker", "Task", "State", "Time", "Progress",
    ]);
    for j in jobs {
        let since = std::time::Duration::from_secs(now.saturating_sub(j.since_unix_ms) / 1_000);
        out.add_row([
            j.id.clone(),
            j.sector.map(|s| s.number.to_string()).unwrap_or_default(),
            j.worker.map(|w| w.to_string()).unwrap_or_default(),
            j.step.clone(),
            if j.worker.is_some() {
                "running"
            } else {
                "waiting"
            }
            .into(),
            spell(since),
            j.progress
                .map(|p| format!("{:.0} %", p * 100.0))
                .unwrap_or_default(),
        ]);
    }
    out.to_string()
}

/// A length of time in its two largest units.
fn spell(time: std::time::Duration) -> String {
    let s = time.as_secs();
    match (s / 86_400, s / 3_600 % 24, s / 60 % 60, s % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, m, s) => format!("{m} min {s} s"),
        (0, h, m, _) => format!("{h} h {m} min"),
        (d, h, _, _) => format!("{d} d {h} h"),
    }
}

/// A worker as `--json` prints it.
#[derive(Serialize)]
struct Worker<'a> {
    #[serde(flatten)]
    info: &'a WorkerInfo,
    /// Memory that its process holds, bytes.
    memory_bytes: Option<u64>,
    jobs: Vec<&'a JobInfo>,
}

fn workers(cx: &Cx, work: &Work) -> Result<(), Fault> {
    let all: Vec<Worker<'_>> = work
        .workers
        .iter()
        .map(|info| Worker {
            info,
            memory_bytes: info.pid.and_then(memory),
            jobs: of(&work.jobs, info.id),
        })
        .collect();
    if cx.json {
        return print_json(&all);
    }
    if all.is_empty() {
        return print("no worker is attached; see logs/worker-*.log in the hub's repo");
    }
    let mut out = table(&[
        "Worker",
        "Class",
        "Where",
        "Slots",
        "Memory",
        "Attached (UTC)",
        "Does",
    ]);
    for w in all {
        let does: Vec<&str> = w.jobs.iter().map(|j| j.id.as_str()).collect();
        out.add_row([
            w.info.id.to_string(),
            w.info.class.to_string(),
            place(w.info),
            w.info.slots.to_string(),
            w.memory_bytes.map(bytes).unwrap_or_default(),
            time(w.info.since_unix_ms),
            does.join("\n"),
        ]);
    }
    print(&out.to_string())
}

/// Where a worker is, and what one on another host has.
fn place(w: &WorkerInfo) -> String {
    let Some(host) = &w.host else {
        return w.pid.map(|p| format!("process {p}")).unwrap_or_default();
    };
    let has = w.declared.as_ref().map(|d| {
        format!(
            "\n{} cores, {} memory, {} scratch, {} GPUs",
            d.cores,
            bytes(d.memory),
            bytes(d.scratch),
            d.gpus
        )
    });
    format!("{host}{}", has.unwrap_or_default())
}

fn of(jobs: &[JobInfo], worker: u64) -> Vec<&JobInfo> {
    jobs.iter().filter(|j| j.worker == Some(worker)).collect()
}

/// Memory of a process on this host, bytes.
fn memory(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// What the scheduler has and what it may give out.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Load {
    workers: usize,
    slots: usize,
    running: usize,
    waiting: usize,
}

fn load(work: &Work) -> BTreeMap<Class, Load> {
    let mut all: BTreeMap<Class, Load> = BTreeMap::new();
    for class in Class::ALL {
        all.entry(class).or_default();
    }
    for w in &work.workers {
        let l = all.entry(w.class).or_default();
        l.workers += 1;
        l.slots += w.slots;
    }
    for j in &work.jobs {
        let l = all.entry(j.class).or_default();
        match j.worker {
            Some(_) => l.running += 1,
            None => l.waiting += 1,
        }
    }
    all
}

#[derive(Serialize)]
struct Diagnosis<'a> {
    classes: BTreeMap<Class, Load>,
    queue: Vec<&'a JobInfo>,
}

fn diagnosis(cx: &Cx, work: &Work) -> Result<(), Fault> {
    let queue: Vec<&JobInfo> = work.jobs.iter().filter(|j| j.worker.is_none()).collect();
    let classes = load(work);
    if cx.json {
        return print_json(&Diagnosis { classes, queue });
    }
    let mut out = table(&["Class", "Workers", "Slots", "Running", "Waiting"]);
    for (class, l) in &classes {
        out.add_row([
            class.to_string(),
            l.workers.to_string(),
            l.slots.to_string(),
            l.running.to_string(),
            l.waiting.to_string(),
        ]);
    }
    let mut text = out.to_string();
    if queue.is_empty() {
        text.push_str("\nnothing waits");
    } else {
        let queue: Vec<JobInfo> = queue.into_iter().cloned().collect();
        text = format!("{text}\n{}", job_table(&queue, unix_ms()));
        for job in &queue {
            if let Some(why) = &job.blocked {
                text.push_str(&format!("\n{} fits no worker: {why}", job.id));
            }
        }
    }
    print(&text)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn job(id: &str, class: Class, worker: Option<u64>) -> JobInfo {
        JobInfo {
            id: id.into(),
            step: "commit".into(),
            class,
            sector: None,
            worker,
            since_unix_ms: 0,
            progress: None,
            blocked: None,
        }
    }

    #[test]
    fn a_task_is_named_by_its_id_or_its_number() {
        let jobs = [
            job("1-commit", Class::Seal, None),
            job("12-commit", Class::Seal, None),
        ];
        for (text, id) in [
            ("1", "1-commit"),
            ("12", "12-commit"),
            ("12-commit", "12-commit"),
        ] {
            assert_eq!(named(&jobs, text).unwrap().id, id);
        }
        for text in ["", "2", "1-", "commit", "12-commi"] {
            assert!(named(&jobs, text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_load_counts_by_class() {
        let worker = |id, class| WorkerInfo {
            id,
            class,
            slots: 1,
            pid: None,
            host: None,
            declared: None,
            since_unix_ms: 0,
        };
        let work = Work {
            workers: vec![worker(1, Class::Seal), worker(2, Class::Seal)],
            jobs: vec![
                job("1-commit", Class::Seal, Some(2)),
                job("2-commit", Class::Seal, None),
                job("3-window_post", Class::Prove, None),
            ],
        };
        let found = load(&work);
        let want = |workers, running, waiting| Load {
            workers,
            slots: workers,
            running,
            waiting,
        };
        assert_eq!(found[&Class::Seal], want(2, 1, 1));
        assert_eq!(found[&Class::Prove], want(0, 0, 1));
        assert_eq!(of(&work.jobs, 2).len(), 1);
    }

    #[test]
    fn times_are_short() {
        for (secs, text) in [
            (0, "0 s"),
            (61, "1 min 1 s"),
            (3_600, "1 h 0 min"),
            (90_000, "1 d 1 h"),
        ] {
            assert_eq!(spell(Duration::from_secs(secs)), text);
        }
    }
}
