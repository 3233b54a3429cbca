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
use lotus_types::{ActorId, Commitment, Generation, SectorId, SectorNumber, SectorSize};
use lotus_workers::{
    Authority, Class, Output, PieceFile, Pool, PoolConfig, Post, PostFile, PostKind, RemoteArgs,
    Task, UpdateFiles, WorkerArgs, WorkersConfig, execute, remote_main, worker_main,
};
use tokio_util::sync::CancellationToken;

const LIMIT: Duration = Duration::from_secs(120);
const SIZE: SectorSize = SectorSize::S2KiB;
const SECTOR: SectorId = SectorId {
    miner: ActorId(1000),
    number: SectorNumber(1),
};

/// What the pool starts on its own host.
#[derive(clap::Parser)]
enum Local {
    Worker(WorkerArgs),
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let role = args.get(1).map(String::as_str);
    if let Some(role @ ("run" | "task" | "worker")) = role {
        let done = if role == "worker" {
            let Local::Worker(args) = Local::parse();
            worker_main(&args)
        } else {
            remote_main(RemoteArgs::parse())
        };
        return done.map_or_else(
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

fn start(dir: &Path, hub: &str, class: Class) -> Worker {
    let dir = &dir.join(class.as_str());
    std::fs::create_dir(dir).unwrap();
    let authority = Authority::open(&dir.join("../ca")).unwrap();
    let bundle = authority
        .issue(&class.as_str().parse().unwrap(), hub, (Vanilla, SIZE), 1)
        .unwrap();
    bundle.write(&dir.join("bundle")).unwrap();
    let log = dir.join("worker.log");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["run", "--nice", "0", "--class", class.as_str(), "--bundle"])
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
            prove_workers: 1,
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
    let hub = hub.await.unwrap();
    let worker = start(dir, &hub, Class::Seal);

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
    let copies = dir.join("seal/scratch/lotus-worker");
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
        files: files.clone(),
        comm_d: new.comm_d,
        out: out.clone(),
        offset: 0,
        len: 1900,
    };
    execute(&Vanilla, &unseal).unwrap();
    assert_eq!(std::fs::read(out).unwrap(), [9; 1900]);

    proofs_of_spacetime(dir, &pool, &hub, &files, new.comm_r).await;

    stop.cancel();
    let ended = tokio::time::timeout(LIMIT, runs.join_next()).await;
    ended.unwrap().unwrap().unwrap().unwrap();
    drop(worker);
}

/// They are made elsewhere if somebody is there, and are the same here.
async fn proofs_of_spacetime(
    dir: &Path,
    pool: &Pool,
    hub: &str,
    files: &UpdateFiles,
    comm_r: Commitment,
) {
    let post = |kind| Post {
        kind,
        miner: SECTOR.miner,
        size: SIZE,
        randomness: [3; 32],
        sectors: vec![PostFile {
            number: SECTOR.number,
            comm_r,
            sealed: files.updated.clone(),
            cache: files.updated_cache.clone(),
        }],
    };
    let prove = async |kind| {
        let made = tokio::time::timeout(LIMIT, pool.prove(post(kind), LIMIT)).await;
        made.unwrap().unwrap()
    };
    let public = [(SECTOR.number, comm_r)];
    let block = proof(prove(PostKind::Winning).await);
    Vanilla
        .verify_winning_post(SECTOR.miner, SIZE, &[3; 32], &public, &block)
        .unwrap();

    let worker = start(dir, hub, Class::Prove);
    let attached = async {
        let there = |w: &lotus_workers::WorkerInfo| w.class == Class::Prove && w.host.is_some();
        while !pool.workers().iter().any(there) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, attached).await.unwrap();
    let made = proof(prove(PostKind::Window).await);
    Vanilla
        .verify_window_post(SECTOR.miner, SIZE, &[3; 32], &public, &made)
        .unwrap();
    let log = std::fs::read_to_string(&worker.log).unwrap();
    assert!(log.contains("step=\"window_post\""), "{log}");
    drop(worker);
    assert_eq!(proof(prove(PostKind::Window).await), made);

    // A damaged sector is named, and is no error.
    std::fs::write(&files.updated, [7; 2048]).unwrap();
    let bad = prove(PostKind::Window).await;
    assert_eq!(bad, Output::Faulty(vec![SECTOR.number]));
}
