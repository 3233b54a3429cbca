//! A worker that shares no file with the pool does every step that it may. This test binary is its
//! own `lotus-worker`, so it has no harness.

#![expect(
    clippy::unwrap_used,
    reason = "clippy sees a test only where it has the harness"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use clap::Parser as _;
use lotus_proofs::{
    PlacedPiece, SealedCommitments, SealingSector, Vanilla, Verifier as _, commp, layout,
};
use lotus_types::{ActorId, Generation, SectorId, SectorNumber, SectorSize};
use lotus_workers::{
    Authority, Output, PieceFile, Pool, PoolConfig, RemoteArgs, Task, UpdateFiles, WorkersConfig,
    execute, remote_main,
};
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(120);
const SIZE: SectorSize = SectorSize::S2KiB;
const SECTOR: SectorId = SectorId {
    miner: ActorId(1000),
    number: SectorNumber(1),
};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|a| a == "run" || a == "task") {
        return remote_main(RemoteArgs::parse()).map_or_else(
            |e| {
                eprintln!("{e}");
                e.kind.exit_code()
            },
            |()| ExitCode::SUCCESS,
        );
    }
    // The harness' own flags: there is nothing to list or to filter but the name below.
    let name = "every_step_can_be_done_elsewhere";
    let filter = args.get(1).filter(|a| !a.starts_with('-'));
    if args.iter().any(|a| a == "--list") || filter.is_some_and(|f| !name.contains(f.as_str())) {
        return ExitCode::SUCCESS;
    }
    tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(every_step_can_be_done_elsewhere());
    println!("test {name} ... ok");
    ExitCode::SUCCESS
}

/// Ends the worker with the test, and shows its log if the test fails.
struct Worker {
    child: Child,
    log: PathBuf,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

fn start(dir: &Path, hub: &str) -> Worker {
    let authority = Authority::open(&dir.join("ca")).unwrap();
    let bundle = authority
        .issue(&"w".parse().unwrap(), hub, Vanilla, 1)
        .unwrap();
    bundle.write(&dir.join("bundle")).unwrap();
    let log = dir.join("worker.log");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["run", "--nice", "0", "--bundle"])
        .arg(dir.join("bundle"))
        .arg("--dir")
        .arg(dir.join("scratch"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    Worker { child, log }
}

/// Writes a sector's data on the hub's side, from one piece.
fn add_pieces(dir: &Path, name: &str, bytes: &[u8]) -> (PathBuf, Vec<PlacedPiece>) {
    let raw = dir.join(format!("{name}.piece"));
    std::fs::write(&raw, bytes).unwrap();
    let piece = commp(bytes).unwrap();
    let layout = layout(SIZE, std::slice::from_ref(&piece)).unwrap();
    let unsealed = dir.join(name);
    let task = Task::AddPieces {
        size: SIZE,
        layout: layout.clone(),
        pieces: vec![PieceFile {
            cid: piece.cid,
            path: raw,
        }],
        unsealed: unsealed.clone(),
    };
    execute(&Vanilla, &task).unwrap();
    (unsealed, layout)
}

async fn run(pool: &Pool, task: Task) -> Output {
    let done = tokio::time::timeout(LIMIT, pool.run(task, None)).await;
    done.unwrap().unwrap()
}

fn proof(output: Output) -> Vec<u8> {
    match output {
        Output::Proof(proof) => proof,
        other => panic!("{other:?}"),
    }
}

fn commitments(output: Output) -> SealedCommitments {
    match output {
        Output::Commitments(c) => c,
        other => panic!("{other:?}"),
    }
}

async fn every_step_can_be_done_elsewhere() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let (pool, runner) = Pool::new(PoolConfig {
        settings: WorkersConfig {
            listen: "127.0.0.1:0".into(),
            seal_workers: 0,
            prove_workers: 0,
            ..WorkersConfig::default()
        },
        run_dir: dir.join("run"),
        log_dir: dir.join("log"),
        exe: std::env::current_exe().unwrap(),
        authority: dir.join("ca"),
        telemetry: Default::default(),
        proofs: Vanilla,
        generation: Generation(1),
    });
    let stop = CancellationToken::new();
    let mut runs = tokio::task::JoinSet::new();
    runs.spawn(runner.run(stop.clone()));
    let hub = tokio::time::timeout(LIMIT, async {
        loop {
            match lotus_runtime::addr_file::read(&dir.join("run"), "workers") {
                Ok(addr) => return addr,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    });
    let worker = start(dir, &hub.await.unwrap());

    let attempt = dir.join("attempt");
    std::fs::create_dir(&attempt).unwrap();
    let (sealed, cache) = (attempt.join("sealed"), attempt.join("cache"));
    let (unsealed, layout) = add_pieces(dir, "unsealed", &[7; 1500]);
    let (ticket, seed) = ([1; 32], [2; 32]);
    let task = Task::PreCommit1 {
        sector: SECTOR,
        size: SIZE,
        ticket,
        layout: layout.clone(),
        unsealed,
        sealed: sealed.clone(),
        cache: cache.clone(),
    };
    let Output::PreCommit1(pc1) = run(&pool, task).await else {
        panic!("no labels");
    };
    let task = Task::PreCommit2 {
        sector: SECTOR,
        size: SIZE,
        pc1,
        sealed: sealed.clone(),
        cache: cache.clone(),
        attempt: attempt.clone(),
    };
    let made = commitments(run(&pool, task).await);
    let task = Task::Commit {
        sector: SECTOR,
        size: SIZE,
        ticket,
        seed,
        layout,
        commitments: made,
        sealed: sealed.clone(),
        cache: cache.clone(),
    };
    let seal_proof = proof(run(&pool, task).await);
    let sector = SealingSector {
        id: SECTOR,
        size: SIZE,
    };
    Vanilla
        .verify_seal(
            &sector,
            &ticket,
            &seed,
            &made.comm_d,
            &made.comm_r,
            &seal_proof,
        )
        .unwrap();
    // With the proof the copies have done their duty.
    let copies = dir.join("scratch/lotus-worker");
    assert_eq!(std::fs::read_dir(&copies).unwrap().count(), 0);

    // What the worker made is a sector for the hub too.
    let finalize = Task::Finalize {
        sector: SECTOR,
        size: SIZE,
        cache: cache.clone(),
    };
    execute(&Vanilla, &finalize).unwrap();
    let (unsealed, layout) = add_pieces(dir, "unsealed-2", &[9; 1900]);
    let files = UpdateFiles {
        sector: SECTOR,
        size: SIZE,
        sealed,
        cache,
        updated: attempt.join("updated"),
        updated_cache: attempt.join("updated-cache"),
    };
    let task = Task::ReplicaUpdate {
        files: files.clone(),
        layout,
        unsealed,
    };
    let new = commitments(run(&pool, task).await);
    let task = Task::ProveUpdate {
        files: files.clone(),
        old_comm_r: made.comm_r,
        commitments: new,
    };
    let update_proof = proof(run(&pool, task).await);
    Vanilla
        .verify_update(SIZE, &made.comm_r, &new.comm_r, &new.comm_d, &update_proof)
        .unwrap();
    let out = dir.join("out");
    let unseal = Task::UnsealUpdate {
        files,
        comm_d: new.comm_d,
        out: out.clone(),
        offset: 0,
        len: 1900,
    };
    execute(&Vanilla, &unseal).unwrap();
    assert_eq!(std::fs::read(out).unwrap(), [9; 1900]);

    stop.cancel();
    let ended = tokio::time::timeout(LIMIT, runs.join_next()).await;
    ended.unwrap().unwrap().unwrap().unwrap();
    drop(worker);
}
