//! The port for workers on other hosts, spoken to by hand.

mod prove;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hub_proto::worker::v1::workers_client::WorkersClient;
use hub_proto::worker::v1::{
    FileEntry, FromWorker, Heartbeat, ReadRequest, Task as WireTask, TaskDone, TaskRef, ToWorker,
    WorkerHello, WriteChunk, WriteHead, from_worker, to_worker,
};
use hyper_util::rt::TokioIo;
use lotus_proofs::Vanilla;
use lotus_types::{ActorId, Generation, Kind, SectorId, SectorNumber, SectorSize};
use rcgen::{KeyPair, PublicKeyData as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::identity::{Authority, Bundle};
use crate::worker::failed;
use crate::{Class, Output, Pool, PoolConfig, Task, WorkError, WorkersConfig, server};

const LIMIT: Duration = Duration::from_secs(30);
const GENERATION: u64 = 7;

struct Rig {
    dir: tempfile::TempDir,
    pool: Pool,
    authority: Authority,
    hub: String,
    stop: CancellationToken,
    runner: JoinSet<Result<(), WorkError>>,
}

impl Rig {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = PoolConfig {
            settings: WorkersConfig {
                listen: "127.0.0.1:0".into(),
                seal_workers: 0,
                prove_workers: 0,
                ..WorkersConfig::default()
            },
            run_dir: dir.path().join("run"),
            log_dir: dir.path().join("log"),
            exe: "none".into(),
            authority: dir.path().join("ca"),
            telemetry: Default::default(),
            proofs: Vanilla,
            generation: Generation(GENERATION),
        };
        let authority = Authority::open(&config.authority).unwrap();
        let (pool, runner) = Pool::new(config);
        let stop = CancellationToken::new();
        let mut set = JoinSet::new();
        set.spawn(runner.run(stop.clone()));
        let run_dir = dir.path().join("run");
        let hub = tokio::time::timeout(LIMIT, async {
            loop {
                match lotus_runtime::addr_file::read(&run_dir, "workers") {
                    Ok(addr) => return addr,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        });
        Self {
            hub: hub.await.unwrap(),
            dir,
            pool,
            authority,
            stop,
            runner: set,
        }
    }

    fn bundle(&self, name: &str) -> Bundle {
        self.authority
            .issue(
                &name.parse().unwrap(),
                &self.hub,
                (Vanilla, SectorSize::S2KiB),
                1,
            )
            .unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A PreCommit2 whose files are some text.
    fn pre_commit2(&self) -> Task {
        let cache = self.path("cache");
        std::fs::create_dir_all(&cache).unwrap();
        std::fs::create_dir_all(self.path("attempt")).unwrap();
        std::fs::write(cache.join("layer-1"), "labels").unwrap();
        std::fs::write(self.path("sealed"), "data").unwrap();
        Task::PreCommit2 {
            sector: SectorId {
                miner: ActorId(1000),
                number: SectorNumber(1),
            },
            size: SectorSize::S2KiB,
            pc1: vec![1],
            sealed: self.path("sealed"),
            cache,
            attempt: self.path("attempt"),
        }
    }

    async fn end(mut self) {
        self.stop.cancel();
        let ended = tokio::time::timeout(LIMIT, self.runner.join_next()).await;
        ended.unwrap().unwrap().unwrap().unwrap();
    }
}

async fn dial(bundle: &Bundle) -> Result<WorkersClient<Channel>, tonic::transport::Error> {
    let tls = std::sync::Arc::new(bundle.client_config().unwrap());
    let hub = bundle.hub.clone();
    let endpoint = Endpoint::from_static("http://hub");
    let channel = endpoint.connect_with_connector(tower::service_fn(move |_| {
        let (tls, hub) = (tls.clone(), hub.clone());
        async move {
            let tcp = TcpStream::connect(hub).await?;
            lotus_identity::connect(tls, tcp).await.map(TokioIo::new)
        }
    }));
    Ok(WorkersClient::new(channel.await?))
}

/// An attached worker.
struct Worker {
    client: WorkersClient<Channel>,
    to: mpsc::Sender<FromWorker>,
    from: Streaming<ToWorker>,
}

impl Worker {
    async fn attach(bundle: &Bundle) -> Result<Self, Status> {
        Self::with(dial(bundle).await.unwrap(), env!("CARGO_PKG_VERSION")).await
    }

    async fn with(client: WorkersClient<Channel>, version: &str) -> Result<Self, Status> {
        Self::of(client, version, Class::Seal, 1).await
    }

    async fn of(
        mut client: WorkersClient<Channel>,
        version: &str,
        class: Class,
        slots: u32,
    ) -> Result<Self, Status> {
        let (to, outbound) = mpsc::channel(8);
        let hello = WorkerHello {
            class: class.as_str().into(),
            version: version.into(),
            slots,
            host: "h".into(),
            steps: Task::remote(class)
                .iter()
                .map(|s| (*s).to_owned())
                .collect(),
            memory: 1 << 30,
            scratch: 1 << 30,
            proofs: vec!["vanilla".into()],
            ..WorkerHello::default()
        };
        let worker = async {
            to.send(says(from_worker::What::Hello(hello)))
                .await
                .unwrap();
            let mut request = Request::new(ReceiverStream::new(outbound));
            // For a worker of the hub's host; one of another is not asked for it.
            let generation = GENERATION.to_string().parse().unwrap();
            request
                .metadata_mut()
                .insert(server::GENERATION, generation);
            let from = client.attach(request).await?.into_inner();
            Ok::<_, Status>(from)
        };
        let from = tokio::time::timeout(LIMIT, worker).await.unwrap()?;
        Ok(Self { client, to, from })
    }

    async fn next(&mut self) -> Result<WireTask, Status> {
        let message = tokio::time::timeout(LIMIT, self.from.message()).await;
        match message.unwrap()?.unwrap().what.unwrap() {
            to_worker::What::Task(task) => Ok(task),
            other => panic!("{other:?}"),
        }
    }

    async fn read(&mut self, task: &TaskRef, slot: &str, name: &str, offset: u64) -> Got {
        let request = ReadRequest {
            task: Some(task.clone()),
            slot: slot.into(),
            name: name.into(),
            offset,
        };
        let mut chunks = self.client.read(request).await?.into_inner();
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            bytes.extend(chunk.data);
            if !chunk.hash.is_empty() {
                return Ok((bytes, chunk.hash));
            }
        }
        panic!("the file has no end");
    }

    async fn write(
        &mut self,
        task: &TaskRef,
        (slot, name): (&str, &str),
        len: u64,
        bytes: &[u8],
    ) -> Result<FileEntry, Status> {
        let head = WriteHead {
            task: Some(task.clone()),
            slot: slot.into(),
            name: name.into(),
            len,
        };
        let entry = FileEntry {
            slot: slot.into(),
            name: name.into(),
            len,
            hash: blake3::hash(bytes).as_bytes().to_vec(),
        };
        let chunks = vec![
            WriteChunk {
                head: Some(head),
                ..WriteChunk::default()
            },
            WriteChunk {
                data: bytes.to_vec(),
                ..WriteChunk::default()
            },
            WriteChunk {
                hash: entry.hash.clone(),
                ..WriteChunk::default()
            },
        ];
        let sent = self.client.write(tokio_stream::iter(chunks));
        tokio::time::timeout(LIMIT, sent).await.unwrap()?;
        Ok(entry)
    }

    async fn done(&self, task: &TaskRef, files: Vec<FileEntry>) {
        self.end(TaskDone {
            task_id: task.task_id.clone(),
            result: serde_json::to_vec(&Output::Done).unwrap(),
            files,
            ..TaskDone::default()
        })
        .await;
    }

    async fn gives(&self, task: &WireTask, output: &Output) {
        self.end(TaskDone {
            task_id: task.id.clone(),
            result: serde_json::to_vec(output).unwrap(),
            ..TaskDone::default()
        })
        .await;
    }

    async fn fails(&self, task: &WireTask) {
        self.end(failed(task.id.clone(), Kind::Data, "wrong".into()))
            .await;
    }

    async fn end(&self, done: TaskDone) {
        let done = says(from_worker::What::Done(done));
        self.to.send(done).await.unwrap();
    }

    /// The next task, which must be this one.
    async fn gets(&mut self, step: &str) -> (WireTask, Task) {
        let wire = self.next().await.unwrap();
        let task: Task = serde_json::from_slice(&wire.spec).unwrap();
        assert_eq!(task.name(), step);
        (wire, task)
    }
}

type Got = Result<(Vec<u8>, Vec<u8>), Status>;

fn says(what: from_worker::What) -> FromWorker {
    FromWorker { what: Some(what) }
}

fn task_ref(task: &WireTask) -> TaskRef {
    TaskRef {
        task_id: task.id.clone(),
        generation: task.generation,
        attempt: task.attempt,
    }
}

fn code<T>(result: Result<T, Status>) -> Code {
    result.map_or_else(|s| s.code(), |_| Code::Ok)
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[tokio::test]
async fn only_workers_with_a_bundle_that_counts_are_let_in() {
    let rig = Rig::start().await;
    let good = rig.bundle("one");
    let key = KeyPair::generate().unwrap();
    let public = key.subject_public_key_info();
    let spoke = good.with_certificate(rig.authority.spoke(&public), key.serialize_der());
    assert_eq!(code(Worker::attach(&spoke).await), Code::PermissionDenied);

    // Of another authority: the handshake ends it.
    let elsewhere = tempfile::tempdir().unwrap();
    let other = Authority::open(elsewhere.path()).unwrap();
    let stranger = good.with_certificate(other.spoke(&public), key.serialize_der());
    let refused = async {
        // The client may see it when it connects, or with its first call.
        match dial(&stranger).await {
            Ok(client) => Worker::with(client, env!("CARGO_PKG_VERSION")).await.err(),
            Err(_) => return true,
        }
        .is_some()
    };
    assert!(refused.await);

    let mut old = Worker::with(dial(&good).await.unwrap(), "0.0.0")
        .await
        .unwrap();
    assert_eq!(code(old.next().await), Code::FailedPrecondition);

    let mut worker = Worker::attach(&good).await.unwrap();
    let mut attached = rig.pool.attached();
    let there = attached.wait_for(|a| a.seal == 1);
    tokio::time::timeout(LIMIT, there).await.unwrap().unwrap();
    assert!(rig.authority.revoke(&good.name).unwrap());
    let beat = says(from_worker::What::Heartbeat(Heartbeat {}));
    worker.to.send(beat).await.unwrap();
    assert_eq!(code(worker.next().await), Code::PermissionDenied);
    assert_eq!(code(Worker::attach(&good).await), Code::PermissionDenied);
    rig.end().await;
}

#[tokio::test]
async fn a_worker_reaches_the_files_of_its_task_and_no_others() {
    let rig = Rig::start().await;
    let mut worker = Worker::attach(&rig.bundle("one")).await.unwrap();
    let task = rig.pre_commit2();
    let pool = rig.pool.clone();
    let mut running = JoinSet::new();
    running.spawn(async move { pool.run(task, None).await });
    let wire = worker.next().await.unwrap();
    let spec = String::from_utf8(wire.spec.clone()).unwrap();
    assert!(!spec.contains(rig.dir.path().to_str().unwrap()), "{spec}");
    let mine = task_ref(&wire);

    let files = worker.client.inputs(mine.clone()).await.unwrap();
    let files = files.into_inner().files;
    let names: Vec<_> = files.iter().map(|f| (&*f.slot, &*f.name, f.len)).collect();
    assert_eq!(names, [("cache", "layer-1", 6), ("sealed", "", 4)]);
    let (bytes, hash) = worker.read(&mine, "cache", "layer-1", 0).await.unwrap();
    assert_eq!(bytes, b"labels");
    assert_eq!(hash, blake3::hash(b"labels").as_bytes());
    let (rest, of_all) = worker.read(&mine, "cache", "layer-1", 4).await.unwrap();
    assert_eq!((&rest[..], of_all), (&b"ls"[..], hash));

    for (slot, name) in [
        ("cache", "../sealed"),
        ("cache", ""),
        ("cache", ".."),
        ("sealed", "x"),
        ("attempt", "x"),
        ("unsealed", ""),
    ] {
        let got = worker.read(&mine, slot, name, 0).await;
        assert_eq!(code(got), Code::InvalidArgument, "{slot}/{name}");
        let put = worker.write(&mine, (slot, name), 1, b"x").await;
        assert_eq!(code(put), Code::InvalidArgument, "{slot}/{name}");
    }
    let whole = worker.write(&mine, ("sealed", ""), 1 << 20, b"x").await;
    assert_eq!(code(whole), Code::ResourceExhausted);
    let short = worker.write(&mine, ("sealed", ""), 8, b"x").await;
    assert_eq!(code(short), Code::DataLoss);

    // Another worker, or another moment.
    let mut other = Worker::attach(&rig.bundle("two")).await.unwrap();
    assert_eq!(
        code(other.read(&mine, "sealed", "", 0).await),
        Code::FailedPrecondition
    );
    for stale in [
        TaskRef {
            generation: GENERATION - 1,
            ..mine.clone()
        },
        TaskRef {
            attempt: mine.attempt + 1,
            ..mine.clone()
        },
        TaskRef {
            task_id: "1-commit".into(),
            ..mine.clone()
        },
    ] {
        let got = worker.read(&stale, "sealed", "", 0).await;
        assert_eq!(code(got), Code::FailedPrecondition, "{stale:?}");
    }

    // What does not arrive is not taken, and nothing is changed.
    let made = worker.write(&mine, ("sealed", ""), 7, b"replica").await;
    let made = made.unwrap();
    assert_eq!(text(&rig.path("sealed")), "data");
    worker.done(&mine, vec![made]).await;
    let ended = tokio::time::timeout(LIMIT, running.join_next()).await;
    let e = ended.unwrap().unwrap().unwrap().unwrap_err();
    assert!(matches!(e, WorkError::NotTaken { .. }), "{e}");
    assert_eq!(text(&rig.path("sealed")), "data");
    assert_eq!(std::fs::read_dir(rig.path("attempt")).unwrap().count(), 0);
    rig.end().await;
}

#[tokio::test]
async fn a_lost_worker_comes_too_late() {
    let rig = Rig::start().await;
    let mut first = Worker::attach(&rig.bundle("one")).await.unwrap();
    let task = rig.pre_commit2();
    let pool = rig.pool.clone();
    let mut running = JoinSet::new();
    running.spawn(async move { pool.run(task, None).await });
    let lost = task_ref(&first.next().await.unwrap());
    let made = first.write(&lost, ("sealed", ""), 5, b"first").await;
    let made = made.unwrap();
    let mut again = first.client.clone();
    // Its stream breaks; its other connections do not.
    drop(first);

    let mut second = Worker::attach(&rig.bundle("two")).await.unwrap();
    let wire = second.next().await.unwrap();
    let mine = task_ref(&wire);
    assert_eq!(mine.task_id, lost.task_id);
    assert_ne!(mine.attempt, lost.attempt);
    assert_eq!(
        code(again.inputs(lost.clone()).await),
        Code::FailedPrecondition
    );

    // Only what was read over the wire has a checksum, which says that it is unchanged.
    let (_, labels) = second.read(&mine, "cache", "layer-1", 0).await.unwrap();
    let sealed = second.write(&mine, ("sealed", ""), 6, b"second").await;
    let tree = second.write(&mine, ("cache", "tree"), 4, b"tree").await;
    let same = FileEntry {
        slot: "cache".into(),
        name: "layer-1".into(),
        len: 6,
        hash: labels,
    };
    assert_ne!(sealed.as_ref().unwrap().hash, made.hash);
    let files = vec![same, tree.unwrap(), sealed.unwrap()];
    second.done(&mine, files).await;
    let ended = tokio::time::timeout(LIMIT, running.join_next()).await;
    assert_eq!(ended.unwrap().unwrap().unwrap().unwrap(), Output::Done);
    assert_eq!(text(&rig.path("sealed")), "second");
    assert_eq!(text(&rig.path("cache/tree")), "tree");
    assert_eq!(text(&rig.path("cache/layer-1")), "labels");
    assert_eq!(std::fs::read_dir(rig.path("attempt")).unwrap().count(), 0);
    assert_eq!(code(again.inputs(mine).await), Code::FailedPrecondition);
    rig.end().await;
}

#[tokio::test]
async fn an_abort_takes_one_task_and_not_the_worker() {
    let rig = Rig::start().await;
    let client = dial(&rig.bundle("one")).await.unwrap();
    let version = env!("CARGO_PKG_VERSION");
    let mut worker = Worker::of(client, version, Class::Seal, 2).await.unwrap();
    let mut running = JoinSet::new();
    let mut tasks = Vec::new();
    for _ in 0..2 {
        let (pool, task) = (rig.pool.clone(), rig.pre_commit2());
        running.spawn(async move { pool.run(task, None).await });
        tasks.push(worker.next().await.unwrap());
    }
    let before = rig.pool.workers();

    rig.pool.abort(&tasks[0].id).unwrap();
    // Twice is once.
    rig.pool.abort(&tasks[0].id).unwrap();
    let told = tokio::time::timeout(LIMIT, worker.from.message()).await;
    let told = told.unwrap().unwrap().unwrap().what.unwrap();
    let to_worker::What::Abort(abort) = told else {
        panic!("{told:?}");
    };
    assert_eq!(abort.task_id, tasks[0].id);
    let given_up = failed(abort.task_id, Kind::Transport, "it was aborted".into());
    worker.end(given_up).await;
    let ended = tokio::time::timeout(LIMIT, running.join_next()).await;
    let e = ended.unwrap().unwrap().unwrap().unwrap_err();
    assert!(matches!(e, WorkError::Aborted { .. }), "{e}");

    // The other one goes on, with the same worker, which takes a new one beside it.
    assert_eq!(rig.pool.workers(), before);
    let (pool, task) = (rig.pool.clone(), rig.pre_commit2());
    running.spawn(async move { pool.run(task, None).await });
    let third = worker.next().await.unwrap();
    for task in [&tasks[1], &third] {
        worker.fails(task).await;
        let ended = tokio::time::timeout(LIMIT, running.join_next()).await;
        let e = ended.unwrap().unwrap().unwrap().unwrap_err();
        assert!(matches!(e, WorkError::Failed { .. }), "{e}");
    }
    rig.end().await;
}
