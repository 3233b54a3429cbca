//! The pool with real worker processes: this test binary is its own worker, so it has no harness.

#![expect(
    clippy::unwrap_used,
    reason = "clippy sees a test only where it has the harness"
)]

use std::fs::OpenOptions;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use lotus_proofs::layout;
use lotus_types::{Generation, Kind, PieceInfo, SectorSize};
use lotus_workers::{
    Class, Output, PieceFile, Pool, PoolConfig, Task, WorkError, WorkerArgs, WorkersConfig,
    worker_main,
};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: SectorSize = SectorSize::S2KiB;

#[derive(Parser)]
enum Cli {
    /// What the pool starts.
    Worker(WorkerArgs),
    /// A hub that is killed while it works.
    Hub { dir: PathBuf },
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "worker" || a == "hub") {
        let done = match Cli::parse() {
            Cli::Worker(args) => worker_main(&args),
            Cli::Hub { dir } => {
                block_on(hub(&dir));
                Ok(())
            }
        };
        return done.map_or_else(|e| e.kind.exit_code(), |()| ExitCode::SUCCESS);
    }
    // The harness' own flags: there is nothing to list or to filter but the names below.
    if args.iter().any(|a| a == "--list") {
        return ExitCode::SUCCESS;
    }
    let tests: [(&str, fn()); 8] = [
        (
            "tasks_are_done_and_errors_are_typed",
            tasks_are_done_and_errors_are_typed,
        ),
        ("a_killed_worker_is_replaced", a_killed_worker_is_replaced),
        ("a_stopped_worker_is_killed", a_stopped_worker_is_killed),
        (
            "a_task_over_its_limit_goes_to_another",
            a_task_over_its_limit_goes_to_another,
        ),
        (
            "a_task_that_kills_every_worker_ends",
            a_task_that_kills_every_worker_ends,
        ),
        ("workers_leave_with_their_hub", workers_leave_with_their_hub),
        ("stopping_tells_every_caller", stopping_tells_every_caller),
        (
            "the_operator_aborts_seal_tasks",
            the_operator_aborts_seal_tasks,
        ),
    ];
    let filter = args.get(1).filter(|a| !a.starts_with('-'));
    let mut failed = false;
    for (name, test) in tests {
        if filter.is_some_and(|f| !name.contains(f.as_str())) {
            continue;
        }
        let ok = catch_unwind(AssertUnwindSafe(test)).is_ok();
        println!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        failed |= !ok;
    }
    ExitCode::from(u8::from(failed))
}

fn block_on<F: Future>(f: F) -> F::Output {
    tokio::runtime::Runtime::new().unwrap().block_on(f)
}

/// A pool in a directory of its own; its logs are shown when a test fails.
struct Rig {
    dir: tempfile::TempDir,
    pool: Pool,
    stop: CancellationToken,
    runner: tokio::task::JoinSet<Result<(), WorkError>>,
}

fn config(dir: &Path, settings: WorkersConfig) -> PoolConfig {
    PoolConfig {
        settings,
        run_dir: dir.join("run"),
        log_dir: dir.join("log"),
        exe: std::env::current_exe().unwrap(),
        authority: dir.join("worker-ca"),
        telemetry: Default::default(),
        proofs: Default::default(),
        generation: Generation(7),
    }
}

impl Rig {
    fn start(settings: WorkersConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (pool, runner) = Pool::new(config(dir.path(), settings));
        let stop = CancellationToken::new();
        let mut set = tokio::task::JoinSet::new();
        set.spawn(runner.run(stop.clone()));
        Self {
            dir,
            pool,
            stop,
            runner: set,
        }
    }

    /// A task that a worker can not end before [`Gate::open`].
    fn gated(&self, name: &str) -> (Task, Gate) {
        gated(self.dir.path(), name)
    }

    async fn end(mut self) {
        self.stop.cancel();
        let ended = tokio::time::timeout(LIMIT, self.runner.join_next()).await;
        ended.unwrap().unwrap().unwrap().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in std::fs::read_dir(self.dir.path().join("log"))
                .into_iter()
                .flatten()
            {
                let path = log.unwrap().path();
                eprintln!("--- {}", path.display());
                eprintln!("{}", std::fs::read_to_string(path).unwrap_or_default());
            }
        }
    }
}

fn one_worker() -> WorkersConfig {
    WorkersConfig {
        seal_workers: 1,
        prove_workers: 0,
        ..WorkersConfig::default()
    }
}

const PAYLOAD: &[u8] = b"a piece of few bytes";

fn piece() -> PieceInfo {
    lotus_proofs::commp(PAYLOAD).unwrap()
}

fn add_pieces(dir: &Path, name: &str, source: PathBuf) -> Task {
    Task::AddPieces {
        size: SIZE,
        layout: layout(SIZE, &[piece()]).unwrap(),
        pieces: vec![PieceFile {
            cid: piece().cid,
            path: source,
        }],
        unsealed: dir.join(format!("{name}.unsealed")),
    }
}

/// The writing end of a named pipe that a task reads from.
struct Gate(PathBuf);

impl Gate {
    /// Returns when a worker reads; then it is in the middle of the task.
    fn reached(&self) -> std::fs::File {
        OpenOptions::new().write(true).open(&self.0).unwrap()
    }
}

fn gated(dir: &Path, name: &str) -> (Task, Gate) {
    let pipe = dir.join(format!("{name}.pipe"));
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    (add_pieces(dir, name, pipe.clone()), Gate(pipe))
}

/// State and parent of a process or thread.
fn stat(path: &Path) -> Option<(String, u32)> {
    let text = std::fs::read_to_string(path.join("stat")).ok()?;
    // They follow the name in parentheses.
    let mut rest = text.rsplit(')').next()?.split_whitespace();
    Some((rest.next()?.to_owned(), rest.next()?.parse().ok()?))
}

/// Whether any thread of a process runs. The first may be a zombie while others still hold files.
fn alive(pid: i32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    threads
        .into_iter()
        .flatten()
        .filter_map(|t| stat(&t.ok()?.path()))
        .any(|(state, _)| state != "Z" && state != "X")
}

/// Live worker processes whose parent is `parent`.
fn workers_of(parent: u32) -> Vec<i32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let path = PathBuf::from(format!("/proc/{pid}"));
            stat(&path).is_some_and(|(_, ppid)| ppid == parent) && alive(*pid)
        })
        .collect()
}

fn signal(pid: i32, signal: Signal) {
    nix::sys::signal::kill(Pid::from_raw(pid), signal).unwrap();
}

/// Returns when the worker is gone, or it could still count as a reader of the pipe.
async fn gone(pid: i32) {
    let deadline = Instant::now() + LIMIT;
    while alive(pid) {
        assert!(Instant::now() < deadline, "worker {pid} lives on");
        tokio::task::yield_now().await;
    }
}

async fn blocking<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> R {
    let done = tokio::task::spawn_blocking(f);
    tokio::time::timeout(LIMIT, done).await.unwrap().unwrap()
}

fn tasks_are_done_and_errors_are_typed() {
    block_on(async {
        let rig = Rig::start(WorkersConfig::default());
        let dir = rig.dir.path();
        let source = dir.join("piece");
        std::fs::write(&source, PAYLOAD).unwrap();
        let good = rig.pool.run(add_pieces(dir, "good", source), None);
        assert_eq!(good.await.unwrap(), Output::Done);
        let len = std::fs::metadata(dir.join("good.unsealed")).unwrap().len();
        assert_eq!(len, SIZE.bytes());

        let wrong = dir.join("wrong");
        std::fs::write(&wrong, b"some other bytes....").unwrap();
        let e = rig
            .pool
            .run(add_pieces(dir, "wrong", wrong), None)
            .await
            .unwrap_err();
        assert_eq!(e.kind(), Kind::Data, "{e}");

        let mut attached = rig.pool.attached();
        let all = attached.wait_for(|a| a.of(Class::Seal) == 1 && a.of(Class::Prove) == 2);
        assert!(tokio::time::timeout(LIMIT, all).await.unwrap().is_ok());
        rig.end().await;
        assert!(workers_of(std::process::id()).is_empty());
    });
}

fn a_killed_worker_is_replaced() {
    block_on(async {
        let rig = Rig::start(one_worker());
        let (task, gate) = rig.gated("killed");
        let gate = Arc::new(gate);
        let pool = rig.pool.clone();
        let mut running = tokio::task::JoinSet::new();
        running.spawn(async move { pool.run(task, None).await });
        let at = gate.clone();
        let first = blocking(move || at.reached()).await;
        let [pid] = workers_of(std::process::id())[..] else {
            panic!("one worker expected");
        };
        signal(pid, Signal::SIGKILL);
        gone(pid).await;
        drop(first);
        // The next worker opens the pipe anew.
        let at = gate.clone();
        blocking(move || at.reached().write_all(PAYLOAD).unwrap()).await;
        let done = tokio::time::timeout(LIMIT, running.join_next())
            .await
            .unwrap();
        assert_eq!(done.unwrap().unwrap().unwrap(), Output::Done);
        rig.end().await;
    });
}

fn a_stopped_worker_is_killed() {
    block_on(async {
        let rig = Rig::start(WorkersConfig {
            silence_secs: 2,
            ..one_worker()
        });
        let (task, gate) = rig.gated("stopped");
        let gate = Arc::new(gate);
        let pool = rig.pool.clone();
        let mut running = tokio::task::JoinSet::new();
        running.spawn(async move { pool.run(task, None).await });
        let at = gate.clone();
        let first = blocking(move || at.reached()).await;
        let [pid] = workers_of(std::process::id())[..] else {
            panic!("one worker expected");
        };
        signal(pid, Signal::SIGSTOP);
        // The stopped process holds its end of the pipe open until it is killed for its silence.
        gone(pid).await;
        drop(first);
        let at = gate.clone();
        blocking(move || at.reached().write_all(PAYLOAD).unwrap()).await;
        let done = tokio::time::timeout(LIMIT, running.join_next())
            .await
            .unwrap();
        assert_eq!(done.unwrap().unwrap().unwrap(), Output::Done);
        rig.end().await;
    });
}

fn a_task_over_its_limit_goes_to_another() {
    block_on(async {
        let rig = Rig::start(one_worker());
        let (task, gate) = rig.gated("slow");
        let gate = Arc::new(gate);
        let pool = rig.pool.clone();
        let mut running = tokio::task::JoinSet::new();
        running.spawn(async move { pool.run_within(task, Duration::from_secs(3)).await });
        let at = gate.clone();
        let first = blocking(move || at.reached()).await;
        let [pid] = workers_of(std::process::id())[..] else {
            panic!("one worker expected");
        };
        // It works on, and says so, until its time is over.
        gone(pid).await;
        drop(first);
        let at = gate.clone();
        blocking(move || at.reached().write_all(PAYLOAD).unwrap()).await;
        let done = tokio::time::timeout(LIMIT, running.join_next())
            .await
            .unwrap();
        assert_eq!(done.unwrap().unwrap().unwrap(), Output::Done);
        rig.end().await;
    });
}

fn a_task_that_kills_every_worker_ends() {
    block_on(async {
        let deaths = 2;
        let rig = Rig::start(WorkersConfig {
            deaths_per_task: deaths,
            ..one_worker()
        });
        let (task, gate) = rig.gated("deadly");
        let gate = Arc::new(gate);
        let pool = rig.pool.clone();
        let mut running = tokio::task::JoinSet::new();
        running.spawn(async move { pool.run(task, None).await });
        for _ in 0..deaths {
            let at = gate.clone();
            let held = blocking(move || at.reached()).await;
            let [pid] = workers_of(std::process::id())[..] else {
                panic!("one worker expected");
            };
            signal(pid, Signal::SIGKILL);
            gone(pid).await;
            drop(held);
        }
        let done = tokio::time::timeout(LIMIT, running.join_next())
            .await
            .unwrap();
        let e = done.unwrap().unwrap().unwrap_err();
        assert!(matches!(e, WorkError::Lost { .. }), "{e}");
        assert_eq!(e.kind(), Kind::Transport);
        rig.end().await;
    });
}

/// Runs a pool with one task that never ends, until killed.
async fn hub(dir: &Path) {
    let (pool, runner) = Pool::new(config(dir, one_worker()));
    let (task, _gate) = gated(dir, "orphan");
    let stop = CancellationToken::new();
    let (_, _) = tokio::join!(runner.run(stop), pool.run(task, None));
}

fn workers_leave_with_their_hub() {
    let dir = tempfile::tempdir().unwrap();
    let mut hub = Command::new(std::env::current_exe().unwrap())
        .arg("hub")
        .arg(dir.path())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let gate = Gate(dir.path().join("orphan.pipe"));
    let deadline = Instant::now() + LIMIT;
    while !gate.0.exists() {
        assert!(Instant::now() < deadline, "the hub did not start");
        std::thread::yield_now();
    }
    let held = gate.reached();
    let [worker] = workers_of(hub.id())[..] else {
        panic!("one worker expected");
    };
    // The worker is in the middle of a read that never returns.
    hub.kill().unwrap();
    hub.wait().unwrap();
    while alive(worker) {
        assert!(Instant::now() < deadline, "the worker outlived its hub");
        std::thread::yield_now();
    }
    drop(held);
}

fn stopping_tells_every_caller() {
    block_on(async {
        let rig = Rig::start(WorkersConfig {
            stop_secs: 1,
            ..one_worker()
        });
        let mut running = tokio::task::JoinSet::new();
        let (task, gate) = rig.gated("busy");
        for task in [task.clone(), task.clone(), task] {
            let pool = rig.pool.clone();
            running.spawn(async move { pool.run(task, None).await });
        }
        let held = blocking(move || gate.reached()).await;
        rig.end().await;
        while let Some(done) = running.join_next().await {
            let e = done.unwrap().unwrap_err();
            assert!(matches!(e, WorkError::Stopping { .. }), "{e}");
        }
        drop(held);
        assert!(workers_of(std::process::id()).is_empty());
    });
}

fn the_operator_aborts_seal_tasks() {
    block_on(async {
        let rig = Rig::start(one_worker());
        let (task, gate) = rig.gated("aborted");
        let mut running = tokio::task::JoinSet::new();
        for task in [task.clone(), task] {
            let pool = rig.pool.clone();
            running.spawn(async move { pool.run(task, None).await });
        }
        let held = blocking(move || gate.reached()).await;
        let deadline = Instant::now() + LIMIT;
        let jobs = loop {
            let jobs = rig.pool.jobs();
            if jobs.len() == 2 {
                break jobs;
            }
            assert!(Instant::now() < deadline, "{jobs:?}");
            tokio::task::yield_now().await;
        };
        let workers = rig.pool.workers();
        let [pid] = workers_of(std::process::id())[..] else {
            panic!("one worker expected");
        };
        assert_eq!(workers.len(), 1);
        assert_eq!(workers[0].pid, u32::try_from(pid).ok());
        assert_eq!(jobs[0].worker, Some(workers[0].id));
        assert_eq!(
            (jobs[1].worker, jobs[1].step.as_str()),
            (None, "add_pieces")
        );

        // The one that waits goes without a trace; the one that runs takes its worker along.
        for job in [&jobs[1], &jobs[0]] {
            rig.pool.abort(&job.id).unwrap();
            let ended = tokio::time::timeout(LIMIT, running.join_next()).await;
            let e = ended.unwrap().unwrap().unwrap().unwrap_err();
            assert!(matches!(e, WorkError::Aborted { .. }), "{e}");
            assert_eq!(e.kind(), Kind::Transport);
        }
        gone(pid).await;
        let e = rig.pool.abort(&jobs[0].id).unwrap_err();
        assert!(matches!(e, WorkError::NoTask { .. }), "{e}");
        assert!(rig.pool.jobs().is_empty());
        drop(held);
        rig.end().await;
    });
}
